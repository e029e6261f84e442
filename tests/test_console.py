"""No console is silent for long: what goes on is said meanwhile, and a step that is slow gets its line."""

import os
import re
import signal
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT, TINY, read_metrics, t
from silence import COMMANDS, listen

TALKATIVE = "import train_gpt as t; t.Console.PAUSE = {pause}; t.CONSOLE.start(); "


def python(code, cwd=ROOT, **env):
    """Heard of a process that runs code."""
    clean = {k: v for k, v in os.environ.items() if k not in t.SETTINGS}
    return listen([sys.executable, "-c", code], cwd=cwd, env={**clean, **env})


def test_the_listener_finds_the_longest_silence_and_the_line_before():
    heard = listen(["bash", "-c", "echo a; sleep 0.1; echo b; sleep 1; echo c; sleep 0.1; exit 3"])
    assert heard.status == 3 and heard.text == "a\nb\nc\n" and heard.before == "b"
    assert 0.9 < heard.longest < heard.seconds
    silent = listen(["bash", "-c", "sleep 0.5"])
    assert silent.before == "its start" and silent.longest > 0.4


def test_every_tool_is_listened_to():
    said = " ".join(COMMANDS)
    tools = [
        path for path in (ROOT / "tools").glob("*.py") if "console.run(main)" in path.read_text()
    ]
    assert len(tools) > 8 and not [p for p in tools if f"-m tools.{p.stem}" not in said]


def test_one_long_call_is_no_silence():
    code = (
        "import time\n"
        "t.CONSOLE.say('first')\n"
        "with t.CONSOLE.doing('the whole'):\n"
        "    time.sleep(0.5)\n"
        "    with t.CONSOLE.doing('a part'):\n"
        "        time.sleep(1)\n"
        "t.CONSOLE.say('last')\n"
        "time.sleep(0.5)\n"
    )
    lines = python(TALKATIVE.format(pause=0.1) + "\n" + code).text.splitlines()
    first, last = lines.index("first"), lines.index("last")
    told = Counter(re.sub(r"\d+", "N", line) for line in lines[first + 1 : last])
    assert set(told) == {"... the whole N s", "... the whole N s, a part N s"}
    assert told["... the whole N s, a part N s"] > 3
    assert {re.sub(r"\d+", "N", line) for line in lines[last + 1 :]} == {"... starting N s"}


def test_nothing_is_added_where_lines_come_and_nothing_by_other_ranks():
    code = "import time\nfor _ in range(20):\n    t.CONSOLE.say('line')\n    time.sleep(0.05)\n"
    assert python(TALKATIVE.format(pause=5) + "\n" + code).text == "line\n" * 20
    assert python(TALKATIVE.format(pause=0.1) + "import time; time.sleep(1)", RANK="1").text == ""


class Noting(list):
    """Activities, with a note of each that began, below those that it is a part of."""

    def __init__(self, names):
        super().__init__(names)
        self.begun = set()

    def append(self, activity):
        super().append(activity)
        self.begun.add(", ".join(name for name, _ in self[1:]))


def test_a_run_names_what_takes_long(tiny, monkeypatch):
    noting = Noting(t.CONSOLE.activities)
    monkeypatch.setattr(t.CONSOLE, "activities", noting)
    tiny(CTW_WEIGHT="0.1", QUANT="gptq", EVALS="ttt,ctw", PREQUANT_TTT_ENABLED="1")
    assert noting.begun >= {
        "reading validation shards",
        "reading training shards",
        "training",
        "training, scoring",
        "training, fixing the grid of late QAT, calibrating",
        "training, calibrating",
        "training, comparing averages",
        "pre-quantisation TTT",
        "quantising",
        "scoring",
        "scoring, test-time training",
        "scoring, building context trees",
        "scoring, weighting context trees",
    }
    assert len(noting) == 1


def test_what_is_said_meanwhile_is_whole_and_not_in_the_log(tiny_data, tmp_path):
    env = {**TINY, **tiny_data, "RUN_ID": "a", "EVALS": "none", "ITERATIONS": "40"}
    code = "import time; t.sleep = lambda _: time.sleep(1e-4); t.main()"
    heard = python(TALKATIVE.format(pause=0) + code, tmp_path, **env)
    meanwhile = r"^\.\.\. [a-zQAT, ]+ \d+ s(, [a-zQAT, ]+ \d+ s)*\n"
    assert heard.status == 0 and len(re.findall(meanwhile, heard.text, re.M)) > 10
    log = (tmp_path / "logs/a.txt").read_text()
    said = log[log.index("\nlog:logs/a.txt\n") + 1 :]
    assert re.sub(meanwhile, "", heard.text, flags=re.M) == said


def test_a_slow_step_gets_a_line_which_changes_nothing(tiny, monkeypatch):
    changes = dict(EVALS="roundtrip", ITERATIONS="30")
    usual = tiny(**changes)
    monkeypatch.setattr(t.CONSOLE, "PAUSE", 0.0)
    slow = tiny(**changes)
    assert [n for n in usual if "train_loss" in usual[n]] == [f"step:{n}/30" for n in range(1, 11)]
    assert [n for n in slow if "train_loss" in slow[n]] == [f"step:{n}/30" for n in range(1, 31)]
    scores = [
        {n: row["val_loss"] for n, row in x.items() if "val_loss" in row} for x in (usual, slow)
    ]
    assert scores[0] == scores[1] and len(scores[0]) == 13


def test_a_line_is_due_before_a_pause_is_over(monkeypatch):
    """By the time of the step that comes, or fast steps would get none before a pause, and slow ones too late."""
    console, now = t.Console(), 100.0
    monkeypatch.setattr(t, "perf_counter", lambda: now)
    console.heard = 98.0
    assert not console.silent_in(1.9) and console.silent_in(2.1)
    console.say("a line")
    assert not console.silent_in(3.9) and console.silent_in(4.1)


@pytest.mark.slow
def test_only_the_first_rank_logs_a_slow_step(tiny_data, tmp_path):
    """It waits for nobody there: a collective of one rank would hang."""
    (tmp_path / "slow.py").write_text(
        "import math, os\nimport train_gpt as t\n"
        "t.CONSOLE.PAUSE = 0.0 if t.is_first_rank() else math.inf\nt.main()\n"
    )
    clean = {k: v for k, v in os.environ.items() if k not in t.SETTINGS}
    env = {**clean, **TINY, **tiny_data, "RUN_ID": "a", "EVALS": "none", "ITERATIONS": "20"}
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "slow.py"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, timeout=200)
    found = read_metrics(tmp_path / "logs/a")
    assert done.returncode == 0
    assert sum("train_loss" in row for row in found.values()) == 20


def starting(words, folder):
    """A process in which numpy's place is taken by something that takes long, once it is there."""
    (folder / "numpy.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)\n")
    child = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stdout.readline() == "begun\n"
    return child


def test_ctrl_c_while_it_starts_ends_without_a_traceback(tmp_path):
    child = starting([str(ROOT / "train_gpt.py")], tmp_path)
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=30)[0] == "" and child.returncode == 130
