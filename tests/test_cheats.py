"""Cheats planted in train_gpt.py's own evaluators are found, on one rank and on two; without them nothing is."""

import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests/cheats"))
import own


@pytest.mark.parametrize("name", own.CASES)
def test_a_planted_cheat_is_found(name):
    expected = own.CASES[name][-1]
    report = own.audited(name, seed=0)
    assert expected in report["broken"] if expected else not report["broken"], report
    assert report["ok"] == (not expected), report


@pytest.mark.slow
def test_planted_cheats_are_found_on_two_ranks():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [str(ROOT / "tests/cheats/own.py"), "--seeds", "1"]
    done = subprocess.run(
        command + words, cwd=ROOT / "tests", capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count(": 1 of 1 as expected") == len(own.CASES)
