"""Whoever gives the tools or data/prepare.py something that they cannot use is told so in one line."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys

import prepare
import pytest
from conftest import ROOT, TINY, process, t, without_pauses
from test_console import python, starting

from tools import (
    ablate,
    audit,
    bench,
    blocks,
    console,
    gpu,
    logs,
    quantise,
    record,
    report,
    settings_page,
)

TOOLS = dict(
    ablate=ablate,
    audit=audit,
    bench=bench,
    blocks=blocks,
    gpu=gpu,
    quantise=quantise,
    record=record,
    report=report,
    settings_page=settings_page,
)


@pytest.fixture(scope="module")
def made(tiny_data, tmp_path_factory):
    """(folder with files that are not what they should be and a tiny run, settings)."""
    folder = tmp_path_factory.mktemp("hostile")
    env = {**TINY, **tiny_data, "RUN_ID": "run", "EVALS": "none", "EMA_ENABLED": "0"}
    assert process(env, folder).returncode == 0
    (folder / "empty").write_text("")
    (folder / "binary").write_bytes(bytes(range(256)) * 99)
    (folder / "folder").mkdir()
    for name, text in {
        "text": "step:1/9 ",
        "list": "[1]",
        "cut": '{"label": "a", "dam',
        "row": '{"label": "a", "damage": "much"}',
    }.items():
        (folder / f"logs/{name}").mkdir(parents=True)
        (folder / f"logs/{name}/metrics.jsonl").write_text(text)
        (folder / f"logs/{name}/ablate.csv").write_text(text)
        (folder / f"logs/{name}.txt").write_text(text)
    shutil.copy(ROOT / "logs/demo/seed42.txt", folder / "log.txt")
    (folder / "log").mkdir()
    (folder / "log/nll_ttt_slot.npy").write_text("no nats")
    shutil.copy(ROOT / "logs/demo/seed42.txt", folder / "alone.txt")
    env = {k: v for k, v in env.items() if k not in ("RUN_ID", "EVALS")}
    return folder, env


CASES = [
    ("ablate", "", "the following arguments are required: --run-id; see python -m tools.ablate"),
    ("ablate", "--run-id a --nosuch", "unrecognized arguments: --nosuch"),
    ("ablate", "--run-id a --artifact folder slot", "folder: Is a directory"),
    (
        "ablate",
        "--run-id a --artifact binary slot",
        "LOAD_ARTIFACT=binary: damaged, or no artifact",
    ),
    ("ablate", "--run-id a --artifact empty slot", "LOAD_ARTIFACT=empty: damaged, or no artifact"),
    ("ablate", "--run-id a --artifact ART slot slot", "'slot': is the name of two rows"),
    ("ablate", "--run-id a --artifact ART --grid SLOT_STEPS slot", "--grid SLOT_STEPS: write"),
    ("ablate", "--run-id a/b/c --artifact ART slot", "RUN_ID=a/b/c: a name, or FOLDER/NAME"),
    ("ablate", "--run-id text --redraw", "logs/text/ablate.csv: is no table of an ablation"),
    ("ablate", "--run-id cut --redraw", "logs/cut/ablate.csv: is no table of an ablation"),
    ("ablate", "--run-id nosuch --redraw", "logs/nosuch: has no ablate.csv"),
    ("audit", "", "required: --artifact"),
    ("audit", "--artifact nosuch", "LOAD_ARTIFACT=nosuch: No such file"),
    ("audit", "--artifact folder", "Is a directory"),
    ("audit", "--artifact binary", "LOAD_ARTIFACT=binary: damaged, or no artifact"),
    ("audit", "--artifact CKPT", "damaged, or no artifact"),
    (
        "audit",
        "--artifact ART --targets -1",
        "argument --targets: -1: allowed is an integer from 1",
    ),
    ("audit", "--artifact ART --targets x", "argument --targets: x: allowed is an integer from 1"),
    ("audit", "--artifact ART --probes 0", "argument --probes: 0: allowed is an integer from 1"),
    ("audit", "--artifact ART --sums -1", "argument --sums: -1: allowed is an integer from 0"),
    ("audit", "--artifact ART EVALS=none", "EVALS=none: leaves nothing to audit"),
    (
        "audit",
        "--artifact ART EVAL=slot",
        "EVAL=slot: there is no such setting. Nearest name: EVALS",
    ),
    ("audit", "--artifact ART NO_SETTING=1", "NO_SETTING=1: there is no such setting"),
    ("audit", "--artifact ART DATA_PATH=nosuch", "DATA_PATH=nosuch"),
    ("audit", "--artifact ART TOKENIZER_PATH=binary", "TOKENIZER_PATH=binary"),
    ("bench", "--rounds 0", "argument --rounds: 0: allowed is an integer from 1 to 1,000"),
    ("bench", "--targets -5", "argument --targets: -5: allowed is an integer from 1"),
    ("bench", "--parts lunch", "argument --parts: invalid choice: 'lunch'"),
    ("bench", "--out folder", "--out folder: is a folder"),
    ("bench", "--out empty/x.json", "empty: File exists; give another path"),
    ("bench", "--lineage folder", "--lineage folder: has no a/settings.env"),
    ("bench", "--render", "docs/benchmarks.md: No such file or directory"),
    ("blocks", "--nosuch", "unrecognized arguments: --nosuch"),
    ("gpu", "", "--name None: files are named by it"),
    ("gpu", "--name a/b", "--name a/b: files are named by it; letters, digits"),
    ("gpu", "--name a --minutes 0", "argument --minutes: 0: allowed is a number from 0.01"),
    ("gpu", "--name a --minutes nan", "argument --minutes: nan: allowed is a number from 0.01"),
    ("gpu", "--name a --steps -1", "argument --steps: -1: allowed is an integer from 1"),
    ("gpu", "--name a --parts lunch", "argument --parts: invalid choice: 'lunch'"),
    ("quantise", "", "--checkpoint, --run-id and at least one row are needed"),
    ("quantise", "--run-id a --checkpoint nosuch QUANT=rd", "nosuch"),
    ("quantise", "--run-id a --checkpoint folder QUANT=rd", "LOAD_CHECKPOINT=folder: "),
    ("quantise", "--run-id a --checkpoint binary QUANT=rd", "LOAD_CHECKPOINT=binary: "),
    ("quantise", "--run-id a --checkpoint ART QUANT=rd", "LOAD_CHECKPOINT="),
    (
        "quantise",
        "--run-id a --checkpoint CKPT QUANT=rd QUANT=rd",
        "'QUANT=rd': is the name of two",
    ),
    ("quantise", "--run-id a --checkpoint CKPT QUANT=zip", "QUANT=zip: allowed: "),
    ("quantise", "--run-id a --checkpoint CKPT SEED=1", "'SEED=1': a row is"),
    (
        "quantise",
        "--run-id a --checkpoint CKPT --bytes -1 QUANT=rd",
        "--bytes: -1: allowed is an int",
    ),
    (
        "quantise",
        "--run-id a --checkpoint CKPT --bytes 1k QUANT=rd",
        "--bytes: 1k: allowed is an int",
    ),
    ("quantise", "--run-id a --checkpoint CKPT --average ema QUANT=rd", "--average ema: "),
    ("quantise", "--run-id a --checkpoint CKPT --average best QUANT=rd", "invalid choice: 'best'"),
    ("quantise", "--table nosuch", "nosuch/metrics.jsonl: No such file or directory; give another"),
    ("quantise", "--table logs/list", "logs/list/metrics.jsonl, line 1: is no JSON object"),
    ("quantise", "--table logs/cut", "logs/cut/metrics.jsonl, line 1: is no JSON object"),
    ("quantise", "--table logs/row", "logs/row/metrics.jsonl: a row has not what this tool wrote"),
    ("record", "", "required: NAME, LOG"),
    ("record", "x nosuch", "nosuch: No such file or directory"),
    ("record", "x folder", "folder: a folder without a log folder.txt beside it"),
    ("record", "x alone.txt --windows 0", "argument --windows: 0: allowed is an integer from 1"),
    ("report", "", "no log is given; see --help"),
    ("report", "nosuch", "nosuch: No such file or directory"),
    ("report", "nosuch --csv x --plot y", "nosuch: No such file or directory"),
    ("report", "empty", "empty: is empty"),
    ("report", "binary", "binary: is binary, no log"),
    ("report", "folder", "folder.txt: No such file or directory"),
    ("report", "logs/text.txt", "logs/text.txt: has no line of a training log"),
    ("report", "log.txt --stage best", "argument --stage: invalid choice: 'best'"),
    ("report", "log.txt --csv nosuch/x", "nosuch/x: No such file or directory; give another path"),
    ("report", "alone.txt --plot nosuch/x", "nosuch/x.png: No such file or directory"),
    ("report", "log.txt --plot x", "log/nll_ttt_slot.npy: "),
    ("report", "log.txt --update binary", "binary: is no text; give another file"),
    ("report", "log.txt --update nosuch", "nosuch: No such file or directory"),
    ("report", "log.txt --update empty", "empty: needs the markers"),
    ("report", "log.txt --submission logs/cut/metrics.jsonl", "is no JSON object"),
    ("report", "log.txt --submission folder", "folder: Is a directory"),
    ("report", "log.txt --against nosuch", "nosuch: No such file"),
    ("report", "--follow nosuch", "nosuch: No such file or directory"),
    ("report", "--follow", "argument --follow: expected one argument"),
    ("settings_page", "x", "unrecognized arguments: x"),
]


@pytest.mark.parametrize("name,words,message", CASES)
def test_a_tool_says_in_one_line_what_it_cannot_use(
    name, words, message, made, monkeypatch, capsys
):
    folder, env = made
    monkeypatch.chdir(folder)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    paths = {"ART": "logs/run/final_model.ptz", "CKPT": "logs/run/checkpoint.000000012.ckpt"}
    before = {p for p in folder.rglob("*") if p.suffix != ".svg"}
    assert TOOLS[name].main([paths.get(word, word) for word in words.split()]) == 2
    told = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n(  [^\n]+\n)?", told), told  # the second: what to do
    assert message in told.replace("\n ", "")
    assert {p for p in folder.rglob("*") if p.suffix != ".svg"} <= before | {folder / "logs/gpu"}


def test_what_a_tool_ends_with(capsys):
    def ends(problem=None, status=None):
        def main():
            if problem:
                raise problem
            return status

        return console.tool(main)(), capsys.readouterr().err

    missing = FileNotFoundError(2, "No such file or directory", "x.txt")
    assert ends() == (0, "") and ends(status=1) == (1, "") and ends(SystemExit(0)) == (0, "")
    assert ends(t.BadInput("what; do")) == (2, "error: what; do\n")
    assert ends(t.Fault("what; do")) == (1, "error: what; do\n")
    assert ends(logs.LogError("what; do")) == (2, "error: what; do\n")
    assert ends(missing)[0] == 2 and ends(missing)[1].startswith("error: x.txt: No such file")
    assert ends(KeyboardInterrupt()) == (130, "error: interrupted\n")
    with pytest.raises(ZeroDivisionError):  # a mistake in the tool is not told as the user's
        ends(ZeroDivisionError())


READERS_GONE = [
    "-m tools.report logs/demo/seed42.txt logs/demo/seed1337.txt --check",
    "-m tools.quantise --table logs/quantisers/q1",
    "data/prepare.py --help",
]


@pytest.mark.parametrize("words", READERS_GONE)
def test_a_reader_that_has_gone_is_no_reason_to_complain(words):
    shell = f"'{sys.executable}' {words} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    allowed = ("0\n", "141\n") if "--help" in words else ("141\n",)  # argparse keeps it to itself
    assert done.stdout in allowed and without_pauses(done).stderr == ""


def test_a_tool_is_not_silent_before_torch_is_there_and_after():
    code = (
        "import sys, time\n"
        "from tools import console\n"
        "console.Meanwhile.PAUSE = 0.1\n"
        "console.begin()\n"
        "time.sleep(1)\n"
        "import train_gpt as t\n"
        "t.Console.PAUSE = 0.1\n"
        "with t.CONSOLE.doing('work'):\n"
        "    time.sleep(1)\n"
    )
    text = python(code).text
    assert text.count("... working ") > 2 and text.count("... work ") > 2


@pytest.mark.parametrize("words", ["-m tools.ablate", "-m tools.report", "data/prepare.py demo"])
def test_ctrl_c_while_a_tool_starts_ends_without_a_traceback(words, tmp_path):
    child = starting(words.replace("data/", f"{ROOT}/data/").split(), tmp_path)
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=30)[0] == "" and child.returncode == 130


@pytest.mark.slow
def test_ctrl_c_ends_a_tool_that_works_with_one_line(made):
    folder, env = made
    clean = {k: v for k, v in os.environ.items() if k not in t.SETTINGS}
    words = ["--artifact", "logs/run/final_model.ptz", "--probes", "1000000", "EVALS=slot"]
    child = subprocess.Popen(
        [sys.executable, "-m", "tools.audit", *words],
        cwd=folder,
        env={**clean, **env},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    line = ""
    while "auditing" not in line:  # said meanwhile
        line = child.stderr.readline()
        assert line
    child.send_signal(signal.SIGINT)
    rest = child.communicate(timeout=60)[1]
    assert child.returncode == 130 and re.sub(r"\.\.\. .*\n", "", rest) == "error: interrupted\n"


def test_prepare_says_in_one_line_what_it_cannot_use(made, monkeypatch, capsys):
    folder, _ = made
    monkeypatch.chdir(folder)
    for words, message in (
        ("", "the following arguments are required: COMMAND"),
        ("lunch", "invalid choice: 'lunch'"),
        ("demo --nosuch", "unrecognized arguments: --nosuch"),
        ("demo --out empty", "empty"),
        ("fineweb --train-shards -1", "-1: allowed are 0 to 1000000"),
        ("text nosuch --name a", "nosuch: no such file or folder"),
        ("text folder --name a", "folder: no .txt, .py, .jsonl, .jsonl.zst file"),
        ("text binary --name a", "binary: no .txt"),
        ("text a.jsonl --name a", "a.jsonl, line 1: "),
        ("text a.txt --name a", "a.txt: 'utf-8' codec"),
        ("text a.txt --name a --tokenizer folder", "folder: no such tokenizer"),
        ("text a.txt --name a --tokenizer binary", "binary: not a SentencePiece model"),
        ("text a.txt --name a --val-fraction 2", "2: allowed are 0 to 1"),
        ("text a.txt --name a --val-fraction nan", "nan: allowed are 0 to 1"),
        ("text a.txt --name ../a", "--name ../a: it names a folder"),
    ):
        (folder / "a.jsonl").write_text("[1]\n")
        (folder / "a.txt").write_bytes(b"\xff\xfe")
        assert prepare.main([*words.split()]) == 2, words
        told = capsys.readouterr().err
        assert re.fullmatch(r"prepare\.py: [^\n]+\n", told) and message in told, told


def messages():
    """(place, text with 20 characters for a value) of each problem that train_gpt.py, the tools and prepare.py raise."""
    for path in (ROOT / "train_gpt.py", ROOT / "data/prepare.py", *ROOT.glob("tools/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            name = ast.unparse(node.exc.func).split(".")[-1]
            if name in ("BadInput", "Fault", "LogError") and node.exc.args:
                parts = getattr(node.exc.args[0], "values", [node.exc.args[0]])
                texts = [p.value if isinstance(p, ast.Constant) else "v" * 20 for p in parts]
                yield f"{path.name}:{node.lineno}", "".join(texts)


def test_a_problem_over_160_characters_is_told_in_two_lines():
    found = dict(messages())
    assert len(found) > 100
    long = {place: text for place, text in found.items() if len(f"error: {text}") > 160}
    assert len(long) > 5
    for place, text in long.items():
        what, do = t.in_lines(f"error: {text}").split("\n")
        assert len(what) <= 160 and len(do) <= 160 and re.match("  [a-zA-Z]", do), place
    assert t.in_lines("error: " + "x" * 140 + "; do.") == "error: " + "x" * 140 + "; do."
    assert t.in_lines("error: " + "x" * 160) == "error: " + "x" * 160  # as long as its value is
    assert t.in_lines("a; b.\n" + "c" * 160 + "; d. e.") == "a; b.\n" + "c" * 160 + ";\n  d. e."


def test_what_is_wrong_with_a_setting_fits_a_line():
    for name in t.SETTINGS:
        if t.SETTINGS[name].kind != "str":
            with pytest.raises(t.BadInput) as problem:
                t.load_config({name: "nonsense"})
            told = t.in_lines(f"error: {problem.value}")
            assert all(len(line) <= 160 for line in told.split("\n")), told


def test_a_long_problem_is_cut_on_the_console_and_in_the_log(made, tmp_path, capsys):
    folder, env = made
    path = tmp_path / ("long" * 40) / "final_model.ptz"
    done = process({**env, "LOAD_ARTIFACT": str(path)}, tmp_path)
    first, second = done.stderr.splitlines()
    assert first == f"error: LOAD_ARTIFACT={path}: No such file or directory;"
    assert second == "  give the path of a final_model.ptz."
    assert report.main([str(path)]) == 2
    console.complain(f"{path}: what; do this.")
    assert capsys.readouterr().err.endswith(f"error: {path}: what;\n  do this.\n")
