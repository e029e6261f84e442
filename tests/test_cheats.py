"""Cheats planted in train_gpt.py's own evaluators are found, on one rank and on two; without them nothing is."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, config, random_model, t

sys.path.insert(0, str(ROOT / "tests/cheats"))
import own

from tools import evaluators


@pytest.mark.parametrize("name", own.CASES)
def test_a_planted_cheat_is_found(name):
    expected = own.CASES[name][-1]
    report = own.audited(name, seed=0)
    assert expected in report["broken"] if expected else not report["broken"], report
    assert report["ok"] == (not expected), report


def test_a_run_ends_where_the_changed_token_was_scored_with_the_same_verdict(monkeypatch):
    c = config(**{**own.BASE, **own.MORE, "EVALS": "ttt"})
    run, model = t.Run(c), random_model(c, seed=1, scale=0.6)
    run.ranks.connect()
    tokens = torch.from_numpy(np.random.default_rng(1).integers(4, c.vocab_size, own.N + 1))
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    box = evaluators.Evaluation(run, model, tokens, "ttt", c)
    windows = []
    score_batch = t.score_batch
    monkeypatch.setattr(
        t, "score_batch", lambda work, s: windows.append(s.stop) or score_batch(work, s)
    )
    for p in (2, own.N // 2, own.N):
        windows.clear()
        whole = box.alone(p)
        last, looked = windows[-1], box.looked.pop(p)
        windows.clear()
        box.rng = np.random.default_rng(1)
        stopped = box.alone(p, whole=False)
        assert looked == box.looked[p] == 0 and not box.moved
        assert not whole[: p - 1].any() and not stopped[: p - 1].any() and not stopped[p:].any()
        assert windows[-1] == last if p == own.N else windows[-1] * own.N < (p + 128) * last
    assert all(w.equal(weights[name]) for name, w in model.state_dict().items())


# what ranks do apart, or in turn; others: logs/audits/own_two_ranks.txt
ON_RANKS = (
    "i2",
    "TTT trains first",
    "SLOT fits the first scored row",
    "SLOT learns before scoring",
    "CTW counts first",
    "nothing, past, reset",
    "nothing, factors",
)


@pytest.mark.slow
def test_planted_cheats_are_found_on_two_ranks():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    cases = [word for name in ON_RANKS for word in ("--case", name)]
    done = subprocess.run(
        [*command, str(ROOT / "tests/cheats/own.py"), "--seeds", "1", "--probes", "48", *cases],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count(": 1 of 1 as expected") == len(ON_RANKS)
