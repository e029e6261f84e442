"""EVALS=...,mix: a mixture of evaluators by fixed share, against the formula a target at a time, its bound, its resume."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import config, t
from test_resume import failing, same

CAUSAL = dict(SLOT_LOSS="past", SLOT_BIAS="1")


def fixed_share(nats, block, share):
    """Nats [N] of the mixture of nats [K,N], a target at a time."""
    count, out = len(nats), []
    weights = np.full(count, 1 / count)
    for n in range(nats.shape[1]):
        if n and n % block == 0:
            weights = (1 - share) * weights + share / count
        joint = weights * np.exp(-nats[:, n])
        out.append(-math.log(joint.sum()))
        weights = joint / joint.sum()
    return np.array(out)


@pytest.mark.parametrize("block,share", [(1, 0.1), (7, 0.01), (64, 0.0), (1000, 0.5)])
def test_a_mixture_equals_fixed_share_a_target_at_a_time(block, share):
    nats = np.random.default_rng(0).gamma(2, 2, (3, 200))
    c = config(MIX_BLOCK=str(block), MIX_SHARE=str(share))
    found, mean = t.mixture(c, torch.from_numpy(nats))
    np.testing.assert_allclose(found.numpy(), fixed_share(nats, block, share), rtol=1e-12)
    assert mean.sum() == pytest.approx(1)


def test_a_mixture_loses_no_more_than_its_bound_and_follows_the_better_expert():
    rng = np.random.default_rng(1)
    good, bad = rng.gamma(2, 1, 4000), rng.gamma(2, 1, 4000) + 0.5
    half = np.arange(4000) < 2000
    nats = np.stack([np.where(half, good, bad), np.where(half, bad, good), bad])
    c = config(MIX_BLOCK="100", MIX_SHARE="0.01")
    found, mean = t.mixture(c, torch.from_numpy(nats))
    best = nats.sum(1).min()
    assert found.sum().item() <= best + math.log(3) - 40 * math.log1p(-0.01)
    assert found.mean().item() < best / 4000 - 0.2  # nearly as if each half had its own expert
    assert mean[2] < 0.02


def test_experts_that_are_hopeless_or_far_apart_leave_finite_nats():
    nats = torch.tensor([[0.0, 800.0, 0.0], [900.0, 0.0, 900.0]])
    found, _ = t.mixture(config(MIX_BLOCK="1", MIX_SHARE="0"), nats)
    assert found.isfinite().all() and found.min() >= 0


def lost(*args):
    """A run that ends before its mixture."""
    raise t.Fault("on purpose")


def test_a_mixture_is_logged_with_its_experts_and_goes_on_after_a_stop(tiny, monkeypatch):
    tiny(RUN_ID="made", EVALS="none")
    path = dict(LOAD_ARTIFACT="logs/made/final_model.ptz", SAVE_NLL="1", **CAUSAL)
    path["EVALS"] = "roundtrip,sliding_window,slot,ttt,mix"
    whole = tiny(RUN_ID="whole", **path)
    names = ("roundtrip", "sliding_window", "slot", "ttt")
    nats = np.stack([np.load(f"logs/whole/nll_{name}.npy") for name in names])
    mixed, _ = t.mixture(config(), torch.from_numpy(nats))
    np.testing.assert_allclose(np.load("logs/whole/nll_mix.npy"), mixed, rtol=1e-12)
    row = whole["final_artifact_mix"]
    assert row["causal"] and row["val_loss"] == pytest.approx(mixed.mean().item(), rel=1e-12)
    assert row["eval_time"] == pytest.approx(whole["eval_total"]["eval_time"], rel=1e-6)
    weights = Path("logs/whole.txt").read_text().partition("\nmix: mean weights ")[2].split("\n")[0]
    assert [part.partition(":")[0] for part in weights.split()] == [*names]
    with monkeypatch.context() as patch:
        patch.setattr(t, "log_mixture", lost)
        assert failing(tiny, t.Fault, RUN_ID="part", **path) == "on purpose"
    assert len([*Path("logs/part").glob("scored_artifact_*")]) == 4
    monkeypatch.setattr(t, "score", None)  # nothing is scored again
    same(tiny(RUN_ID="part", RESUME="1", **path), whole)
    assert not [name for name in os.listdir("logs/part") if name.endswith(".ckpt")]


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(EVALS="ttt,mix"), "EVALS=ttt,mix: mix needs two other evaluators"),
        (dict(EVALS="mix,ttt,roundtrip"), "name it last"),
        (dict(EVALS="sliding_window,ttt_slot,mix"), "ttt_slot breaks C1,C2,C3; a mixture takes"),
        (dict(SLOT_RESET="document"), "SLOT_RESET=document: needs SLOT_ENABLED=1 and SLOT_LOSS="),
        (dict(SLOT_RESET="document", **CAUSAL), "needs SLOT_DELTA=window: a batch holds several"),
        (dict(SLOT_DECAY="0.5"), "SLOT_DECAY=0.5: needs SLOT_ENABLED=1 and SLOT_LOSS=past"),
    ],
)
def test_what_cannot_be_mixed_or_carried_is_refused_by_name(changes, message, tiny):
    with pytest.raises(t.BadInput) as problem:
        tiny(**changes)
    assert message in str(problem.value)
    assert not Path("logs").exists()


def test_a_carried_state_forgets_and_begins_documents_at_the_mean_of_earlier_ends(stream):
    c = config(SLOT_DELTA="window", SLOT_DECAY="0.25", SLOT_RESET="document", **CAUSAL)
    (run, val), model = stream(c, 96), t.GPT(config())
    slot = t.Slot(c, run.ranks, model, val)
    inside, ends = torch.tensor([5, 6]), torch.tensor([5, t.DOCUMENT_START])
    slot.carry[:] = 4
    slot.forget(inside)
    assert (slot.carry[0] == 3).all() and (slot.carry[1:] == 4).all()
    slot.forget(ends)
    assert (slot.carry[0] == 2.25).all() and (slot.carry[1:] == 0).all()
    slot.carry[:] = 8
    slot.forget(ends)
    assert (slot.carry[0] == (2.25 + 6) / 2).all()
