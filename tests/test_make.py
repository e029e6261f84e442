"""The Makefile, the requirements and what runs on a commit or a push: what they promise is there."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

MAKEFILE = (ROOT / "Makefile").read_text()


def make(folder, *words, **env):
    """The finished process of make in a folder, with .venv taken as made."""
    command = ["make", "-f", str(ROOT / "Makefile"), "-o", ".venv/installed", *words]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )


def test_make_alone_prints_each_target_with_a_sentence(tmp_path):
    done = make(tmp_path)
    told = dict(re.findall(r"^  make ([\w-]+) +(.+)\.$", done.stdout, re.M))
    targets = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split()
    assert done.returncode == 0 and set(told) == set(targets)
    assert not list(tmp_path.iterdir())


def test_make_test_runs_each_test_once():
    """What the first command leaves to those that run alone, the second runs."""
    (recipe,) = re.findall(r"^test:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)
    asked = [line.split("-m pytest -q ")[1] for line in recipe.splitlines()]
    assert asked == ['-n $(JOBS) --dist loadfile -m "not alone"', "-m alone"]


@pytest.mark.slow
def test_make_demo_ends_with_where_all_lies_and_commands_that_run(tiny_data, tmp_path):
    """With a tiny model on tiny data, without torchrun."""
    programs = tmp_path / "bin"
    programs.mkdir()
    python = f"[ $1 = data/prepare.py ] || exec {sys.executable}"
    for name, text in (
        ("python", f'{python} "$@"'),
        ("torchrun", f"exec {sys.executable} {ROOT / 'train_gpt.py'}"),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    env = {**TINY, **tiny_data, "EVALS": "sliding_window,ttt_slot"}
    done = make(tmp_path, "demo", "BIN=bin", "RUN_ID=mine", **env)
    assert done.returncode == 0, done.stderr
    table, _, end = done.stdout.partition("This run:\n")
    assert "\n| 1337 | 12 " in table and "wrote logs/mine/figure.png and" in table
    for path in re.findall(r"^  (logs/\S+)", end, re.M):
        assert (tmp_path / path).exists(), path
    commands = re.findall(r"^    (.*)$", end, re.M)
    assert len(commands) == 3
    for command in commands:
        again = command.replace("make ", f"make -f {ROOT / 'Makefile'} -o .venv/installed BIN=bin ")
        done = subprocess.run(
            ["bash", "-c", again], cwd=tmp_path, env={**os.environ, **env}, capture_output=True
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    assert b"\n| 42   |" in done.stdout and b"\n| mean |" in done.stdout


def requirements(name):
    """{package: version} of a file, all of them pinned; and the files it includes."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line[:1] not in ("", "#")]
    included = [line for line in lines if line.startswith("-r ")]
    return dict(line.split("==") for line in lines if line not in included), included


def test_requirements_of_the_script_are_what_it_imports():
    """Of packages it imports always, or where a setting asks for them; the development file adds to them."""
    runtime, _ = requirements("requirements.txt")
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "train_gpt.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported - sys.stdlib_module_names == set(runtime)
    added, included = requirements("requirements-dev.txt")
    assert included == ["-r requirements.txt"] and not set(added) & set(runtime)
    assert {"scipy", "matplotlib", "zstandard", "pytest", "ruff", "mypy"} <= set(added)


def test_what_a_push_and_a_commit_run_exists():
    assert "- run: .ci/run\n" in (ROOT / ".github/workflows/ci.yml").read_text()
    assert os.access(ROOT / ".ci/run", os.X_OK)
    for target in re.findall(r"\bmake ([a-z]+)", (ROOT / ".ci/run").read_text()):
        assert f"\n{target}:" in MAKEFILE
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    file, name = re.search(r"pytest -q (\S+) -k (\w+)", hooks).groups()
    assert len(re.findall(rf"^def test_\w*{name}", (ROOT / file).read_text(), re.M)) == 1
    assert {"ruff", "mypy"} <= set(re.findall(r"entry: \.venv/bin/(\w+)", hooks))
