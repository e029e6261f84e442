"""The packed copy is the script; arguments are settings; what is not understood is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, process, read_metrics, t, timeless

SCRIPT = ROOT / "train_gpt.py"


def call(*words, cwd, script=SCRIPT, env=None):
    clean = {k: v for k, v in os.environ.items() if k not in t.SETTINGS}
    command = [sys.executable, str(script), *words]
    return subprocess.run(
        command, env={**clean, **(env or {})}, cwd=cwd, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def shipped(tiny_data, tmp_path_factory):
    """(folder of a run's logs, environment) of a tiny run from the readable source."""
    folder = tmp_path_factory.mktemp("shipped")
    env = {**TINY, **tiny_data, "RUN_ID": "one", "ITERATIONS": "3", "EVALS": "roundtrip,ttt_slot"}
    assert process(env, folder).returncode == 0
    return folder, env


def test_the_packed_copy_is_small_and_what_is_counted(shipped):
    folder, _ = shipped
    packed = (folder / "logs/one/train_gpt.py").read_bytes()
    assert packed == t.packed_script() and len(packed) == t.code_bytes() <= 65_000
    assert packed.count(b"\n") == 2 and packed.isascii()
    assert read_metrics(folder / "logs/one")["artifact"]["code_bytes"] == len(packed)


def test_comments_docstrings_and_annotations_do_not_count():
    source = "def f(x):\n    return x + 1\n"
    other = (
        '"""Module."""\n\n# why\ndef f(x: int) -> int:\n    """Doc."""\n    return x + 1  # here\n'
    )
    assert t.strip_source(other) == '"""Module."""\n\n' + t.strip_source(source)
    assert "class A:\n    pass" in t.strip_source('class A:\n    """Only words."""\n')
    assert t.strip_source(t.stripped_script()) == t.stripped_script()


@pytest.mark.slow
@pytest.mark.parametrize("ranks,more", [(0, {}), (2, {}), (0, {"COMPILE": "1"})])
def test_the_packed_copy_scores_the_artifact_beside_it_the_same(ranks, more, shipped):
    folder, env = shipped
    here = folder / "logs/one"
    env = {**env, "LOAD_ARTIFACT": "final_model.ptz", "RUN_ID": f"again{ranks}{len(more)}", **more}
    done = process(env, here, ranks, here / "train_gpt.py")
    assert done.returncode == 0, done.stderr[-2000:]
    first, again = read_metrics(here), read_metrics(here / "logs" / env["RUN_ID"])
    for label in ("final_artifact_roundtrip", "final_artifact_ttt_slot"):
        digits = 4 if more else 6 if ranks else 8
        assert round(first[label]["val_loss"], digits) == round(again[label]["val_loss"], digits)
    text = (here / "logs" / f"{env['RUN_ID']}.txt").read_text()
    assert text.startswith('"""Parameter Golf') and "\nclass GPT(nn.Module):\n" in text


def test_the_packed_copy_prints_the_same_help_and_packs_to_itself(shipped, tmp_path):
    packed = shipped[0] / "logs/one/train_gpt.py"
    for words in (["--help"], ["--help", "slot"]):
        assert call(*words, cwd=tmp_path).stdout == call(*words, cwd=tmp_path, script=packed).stdout
    assert call("--pack", "again.py", cwd=tmp_path, script=packed).returncode == 0
    assert (tmp_path / "again.py").read_bytes() == packed.read_bytes()


@pytest.mark.slow
def test_under_torchrun_help_is_printed_once(shipped, tmp_path):
    packed, page = shipped[0] / "logs/one/train_gpt.py", call("--help", cwd=tmp_path).stdout
    for script in (SCRIPT, packed):
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
        done = subprocess.run(
            [sys.executable, *words, "--help"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout == page


def test_a_run_can_be_resumed_with_the_packed_copy_or_other_comments(shipped, tiny_data, tmp_path):
    env = {**TINY, **tiny_data, "RUN_ID": "r", "ITERATIONS": "3", "EVALS": "roundtrip"}
    assert process(env, tmp_path).returncode == 0
    before = timeless(read_metrics(tmp_path / "logs/r"))
    other = tmp_path / "commented.py"
    other.write_text(SCRIPT.read_text() + "# one more comment\n")
    for script in (tmp_path / "logs/r/train_gpt.py", other):
        done = process({**env, "RESUME": "1"}, tmp_path, script=script)
        assert done.returncode == 0, done.stderr
    assert timeless(read_metrics(tmp_path / "logs/r")) == before
    other.write_text(SCRIPT.read_text().replace("1e-7", "1e-6", 1))
    done = process({**env, "RESUME": "1"}, tmp_path, script=other)
    assert done.returncode == 2 and "sha256_of_code_and_artifact" in done.stderr


def test_pack_replaces_nothing_but_packed_copies(tmp_path):
    done = call("--pack", cwd=tmp_path)
    path = tmp_path / "train_gpt_packed.py"
    assert done.returncode == 0 and path.read_bytes() == t.packed_script()
    assert f"{t.code_bytes()} bytes" in done.stdout
    assert call("--pack", str(path), cwd=tmp_path).returncode == 0
    assert call("--pack", ".", cwd=tmp_path).returncode == 0
    assert (tmp_path / "train_gpt.py").read_bytes() == t.packed_script()
    (tmp_path / "mine.py").write_text("print()\n")
    before = sorted(p.name for p in tmp_path.iterdir())
    for words, message in (
        (["mine.py"], "mine.py exists and is no packed script; choose another PATH"),
        (["none/x.py"], "there is no folder none; make it first"),
        (["a", "b"], "allowed: one PATH"),
    ):
        done = call("--pack", *words, cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert before == sorted(p.name for p in tmp_path.iterdir())
    assert (tmp_path / "mine.py").read_text() == "print()\n"


def test_arguments_are_settings_and_win_over_the_environment(tiny_data, tmp_path):
    env = {**TINY, **tiny_data, "RUN_ID": "a", "EVALS": "none", "ITERATIONS": "1", "SEED": "3"}
    done = call("SEED=5", "SLOT_ENABLED=0", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    settings = read_metrics(tmp_path / "logs/a")["settings"]
    assert settings["SEED"] == 5 and settings["SLOT_ENABLED"] is False
    head = (tmp_path / "logs/a.txt").read_text()
    assert " SEED=5 " in head and " SLOT_ENABLED=0 " in head


@pytest.mark.parametrize(
    "words,message",
    [
        (["--hlep"], "--hlep: unknown argument; allowed: NAME=value"),
        (["SLOT_ENABLE=0"], "SLOT_ENABLE=0: there is no such setting. Nearest name: SLOT_ENABLED"),
        (
            ["slot_enabled=0"],
            "slot_enabled=0: there is no such setting. Nearest name: SLOT_ENABLED",
        ),
        (["SEED=5", "extra"], "extra: unknown argument"),
        (["SEED=x"], "SEED=x: allowed: integer, 0 to 2,147,483,647"),
        (["--help", "sloth"], "--help sloth: no such family;\n  allowed: "),
        (["--lr", "3"], "3: unknown argument"),
    ],
)
def test_what_is_not_understood_is_refused_before_anything_is_written(words, message, tmp_path):
    done = call(*words, cwd=tmp_path)
    assert done.returncode == 2 and f"{message}" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_help_of_a_family_and_its_quiet_end(tmp_path):
    page = call("--help", "slot", cwd=tmp_path).stdout
    names = [line.split("=")[0].strip() for line in page.splitlines() if line.startswith("  SLOT")]
    assert names == [name for name in t.SETTINGS if name.startswith("SLOT_")]
    assert "CTW_WEIGHT" not in page
    shell = f"'{sys.executable}' '{SCRIPT}' --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.splitlines()[1] == "0"


def test_an_artifact_is_the_same_in_any_folder(tiny):
    """Its bytes are those of the weights and settings: no name of a run or path is in it."""
    blobs = set()
    for name in ("a", "another_name"):
        tiny(RUN_ID=name, EVALS="none", ITERATIONS="2")
        blobs.add(Path(f"logs/{name}/final_model.ptz").read_bytes())
    assert len(blobs) == 1
