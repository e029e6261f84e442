"""SLOT in every mode: equal to autograd and torch's AdamW, independent of batches and ranks, within its memory, and labelled right."""

import dataclasses
import itertools
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, config, random_model, read_metrics, runs, t

from tools import audit, blackbox, evaluators
from tools.plain import autograd_slot

MODES = list(
    itertools.product(
        ("shared", "window"), ("0", "1"), ("all", "scored", "context", "past", "recent")
    )
)


def autograd_stream(c, model, tokens, n):
    """Nats [n] of the stream by autograd_slot, batch by batch (window by window for a carried delta a window)."""
    T, out, carry = c.eval_seq_len, torch.zeros(n), {} if c.slot_loss in t.CARRIED else None
    starts, firsts = t.plan_windows(n, T, c.eval_stride)
    size = 1 if c.slot_loss in t.CARRIED and c.slot_delta == "window" else c.slot_batch_seqs
    for b in range(0, len(starts), size):
        rows = tokens[torch.from_numpy(starts[b : b + size, None] + np.arange(T + 1))]
        with torch.no_grad():
            h = model.hidden(rows[:, :-1])
        nats = autograd_slot(c, model, h, rows[:, 1:], firsts[b : b + size], carry)
        for start, first, row in zip(starts[b : b + size], firsts[b : b + size], nats):
            out[start + first : start + T] = row[first:]
    return out


@pytest.mark.parametrize("delta,bias,loss", MODES)
def test_every_mode_equals_autograd_and_torch_adamw(delta, bias, loss, stream):
    c = config(
        SLOT_DELTA=delta,
        SLOT_BIAS=bias,
        SLOT_LOSS=loss,
        SLOT_STEPS="24",
        SLOT_LR="0.012",
        SLOT_LR_MIN="0.001",
        LOGIT_SOFTCAP="6",
    )
    (run, val), model = stream(c, 160), random_model(c, scale=1.0)
    ours = t.score(run, model, val, [("slot", c)])[0][0]
    torch.testing.assert_close(
        ours, autograd_stream(c, model, val.tokens, val.n), rtol=0, atol=1e-5
    )
    plain = t.score(run, model, val, [("sliding_window", c)])[0][0]
    assert (ours - plain).abs().max() > 1e-3


@pytest.mark.parametrize("steps,low", [("1", "-1"), ("1", "0.001"), ("3", "-1"), ("3", "0.001")])
def test_rates_and_hypergradient_equal_autograd(steps, low, stream):
    c = config(
        SLOT_STEPS=steps,
        SLOT_LR="0.02",
        SLOT_LR_MIN=low,
        LOGIT_SOFTCAP="6",
        SLOT_HYPER_LR="0.05",
        SLOT_LOSS="scored",
        SLOT_BIAS="1",
    )
    (run, val), model = stream(c, 96), random_model(c, scale=1.0)
    ours = t.score(run, model, val, [("slot", c)])[0][0]
    torch.testing.assert_close(
        ours, autograd_stream(c, model, val.tokens, val.n), rtol=0, atol=1e-5
    )
    still = t.score(run, model, val, [("slot", dataclasses.replace(c, slot_hyper_lr=0.0))])[0][0]
    assert torch.equal(ours, still) == (steps == "1")


def test_the_cosine_reaches_its_end_on_the_last_step_and_one_step_uses_slot_lr(stream):
    """In AdamW's first step from zero the parameters move by the rate, less eps: read the rates off the moves."""
    c = config(SLOT_STEPS="4", SLOT_LR="0.1", SLOT_LR_MIN="0.01", SLOT_DELTA="shared")
    run, val = stream(c)
    slot, moves = t.Slot(c, run.ranks, random_model(c), val), []
    slot.gradient = lambda z, y, shares, shift, cap: torch.full_like(shift, 1e6)
    shift = slot.shift
    slot.shift = lambda state: (moves.append(state[0].clone()), shift(state))[1]
    state = slot.fresh(1)
    with torch.no_grad():
        slot.fit(
            torch.randn(64, c.model_dim),
            val.tokens[:64],
            torch.arange(64)[None],
            torch.ones(1, 64),
            state,
        )
    rates = [(b - a).abs().max().item() for a, b in zip(moves, [*moves[1:], state[0]])]
    assert rates == pytest.approx([0.1, 0.0775, 0.0325, 0.01], rel=1e-3)


@pytest.mark.parametrize("cap", [0.5, 6.0, 30.0])
@pytest.mark.parametrize("groups", [1, 3])
def test_gradient_equals_autograd_in_fp64(cap, groups):
    g = torch.Generator().manual_seed(1)
    h, weight = (
        torch.randn(groups, 7, 5, generator=g).double() * 2,
        torch.randn(11, 5, generator=g).double(),
    )
    y = torch.randint(0, 11, (groups, 7), generator=g)
    delta, bias = (torch.randn(groups, n, generator=g).double().requires_grad_() for n in (5, 11))
    z = F.linear(h + delta[:, None], weight) + bias[:, None]
    shares = torch.rand(groups, 7, generator=g).double()
    (
        F.cross_entropy((cap * torch.tanh(z / cap)).flatten(0, 1), y.flatten(), reduction="none")
        * shares.flatten()
    ).sum().backward()
    with torch.no_grad():
        columns = t.slot_gradient(
            F.linear(h, weight) * 2 / cap, y, shares, (delta @ weight.T + bias) * 2 / cap, cap
        )
        for ours, theirs in ((columns, bias.grad), (columns @ weight, delta.grad)):
            assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-6


@pytest.mark.parametrize("loss", ["all", "scored", "context", "past", "recent"])
def test_per_window_scores_do_not_depend_on_the_batch(loss, stream):
    nats = []
    for size in ("1", "4", "32"):
        c = config(
            SLOT_DELTA="window", SLOT_BIAS="1", SLOT_LOSS=loss, SLOT_BATCH_SEQS=size, SLOT_STEPS="5"
        )
        (run, val), model = stream(c, 256), random_model(config())
        nats.append(t.score(run, model, val, [("slot", c)])[0][0])
    for other in nats[1:]:
        torch.testing.assert_close(nats[0], other, rtol=0, atol=2e-5)


def test_tiles_and_dropped_base_logits_change_nothing(stream, monkeypatch):
    for delta, loss in itertools.product(("shared", "window"), ("all", "context")):
        c = config(SLOT_DELTA=delta, SLOT_LOSS=loss, SLOT_BATCH_SEQS="8", SLOT_BIAS="1")
        (run, val), model = stream(c, 256), random_model(config())
        monkeypatch.undo()
        whole = t.score(run, model, val, [("slot", c)])[0][0]
        for tile, keep in ((c.vocab_size * 5, 0), (c.vocab_size * 40, c.vocab_size * 100), (1, 1)):
            monkeypatch.setattr(t.Slot, "TILE", tile)
            monkeypatch.setattr(t.Slot, "KEEP", keep)
            torch.testing.assert_close(
                whole, t.score(run, model, val, [("slot", c)])[0][0], rtol=0, atol=2e-5
            )


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements of a floating-point tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize(
    "delta,loss",
    itertools.product(("shared", "window"), ("all", "scored", "context", "past", "recent")),
)
def test_no_tensor_grows_with_the_batch_beyond_the_hidden_states(delta, loss, stream, monkeypatch):
    T, sizes = 32, []
    for seqs in (4, 16):
        c = config(
            SLOT_DELTA=delta,
            SLOT_LOSS=loss,
            SLOT_BIAS="1",
            SLOT_BATCH_SEQS=str(seqs),
            VOCAB_SIZE="2000",
            SLOT_STEPS="2",
        )
        monkeypatch.setattr(t.Slot, "TILE", 64 * 2000)
        monkeypatch.setattr(t.Slot, "KEEP", 128 * 2000)
        (run, val), model = stream(c, 256), random_model(c)
        slot = t.Slot(c, run.ranks, model, val)
        firsts = np.full(seqs, T - c.eval_stride)
        tokens = val.tokens.unfold(0, T + 1, 8)[:seqs]
        rows = torch.from_numpy(np.flatnonzero(t.scored_rows(firsts, T)))
        with torch.no_grad():
            h = model.hidden(tokens[:, :-1])
            with Largest() as seen:
                slot.nats(t.Batch(h, tokens[:, 1:], firsts, rows, rows, np.zeros(seqs, int), 0))
        sizes.append(seen.elements)
        assert (
            seen.elements < 16 * T * 2000 / 2
        )  # of the logits of all rows of the larger batch, half would fit in no tensor here
    scored = {
        4: 4 * 8,
        16: 16 * 8,
    }  # the final scores of a batch that shares a delta go through the head together, 16,384 rows at most
    assert sizes[1] <= max(sizes[0], 128 * 2000, (scored[16] * 2000 if delta == "shared" else 0))


# Claims. The flip test, sums and ledger of tools/audit.py over all combinations of the settings, at small size.

SMALL = dict(
    VOCAB_SIZE="32",
    EVAL_SEQ_LEN="16",
    TRAIN_SEQ_LEN="16",
    TTT_CHUNK_TOKENS="48",
    EVAL_STRIDE="6",
    SLOT_STEPS="2",
    SLOT_LR="0.05",
)


@pytest.mark.parametrize("label", ["slot", "ttt_slot"])
@pytest.mark.parametrize("delta,bias,loss", MODES)
def test_the_claim_is_what_an_audit_finds(delta, bias, loss, label, stream):
    for size in ("1", "3") if bias == "0" else ("3",):
        c = config(**SMALL, SLOT_DELTA=delta, SLOT_BIAS=bias, SLOT_LOSS=loss, SLOT_BATCH_SEQS=size)
        (run, val), model = stream(c, 144), random_model(c, scale=0.6)
        report = audit.audit(run, model, val.tokens, label, c, count=14)
        assert report["ok"], report
        assert report["moved"] >= 4 or not report["claim"]  # not by a hair


@pytest.mark.parametrize("label", ["roundtrip", "sliding_window", "ttt", "ctw", "ttt_ctw"])
def test_an_audit_finds_the_others_causal_unless_the_weights_saw_the_validation_tokens(
    label, stream
):
    for adapted in ("0", "1"):
        c = config(
            **SMALL,
            SLOT_ENABLED="0",
            CTW_WEIGHT="0.5",
            CTW_ENTROPY_THRESHOLD="0",
            CTW_DEPTH="2",
            PREQUANT_TTT_ENABLED=adapted,
        )
        (run, val), model = stream(c, 144), random_model(c, scale=0.6)
        report = audit.audit(run, model, val.tokens, label, c, count=14)
        assert report["ok"] and report["claim"] == ("C3" if adapted == "1" else ""), report
        assert label in ("roundtrip", "sliding_window") or report["uses"] > 0


PAST = dict(SLOT_LOSS="past", SLOT_DELTA="window", SLOT_BIAS="1", SLOT_BATCH_SEQS="4")
RESET = PAST | dict(SLOT_RESET="document", SLOT_DECAY="0.1")
CAUSAL = {
    "context": ("slot", PAST | dict(SLOT_LOSS="context")),
    "past of a batch": ("slot", PAST | dict(SLOT_DELTA="shared")),
    "past": ("slot", PAST),
    "past, reset": ("slot", RESET),
    "recent, reset": ("slot", RESET | dict(SLOT_LOSS="recent")),
    "control and past": ("ttt_slot", RESET | dict(TTT_PARAMS="control", TTT_OPTIMIZER="adamw")),
    "ttt by rmsprop": ("ttt", dict(TTT_OPTIMIZER="rmsprop")),
    "mix": ("mix", RESET | dict(EVALS="sliding_window,slot,ttt,mix", MIX_BLOCK="16")),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_modes_survive_two_hundred_probes(name, stream):
    """Documents begin in the stream, and a changed token may begin one."""
    label, changes = CAUSAL[name]
    c = config(**{**SMALL, "VOCAB_SIZE": "384"}, TTT_LR="0.003", **changes)
    (run, val), model = stream(c, 240), random_model(c, scale=0.6)
    val.tokens[[40, 41, 130, 200]] = t.DOCUMENT_START
    box = evaluators.Evaluation(run, model, val.tokens, label, c, seed=3)
    for p in blackbox.kinds_of_places(val.n, box.marks, 200, box.rng):
        box.alone(p)
    assert len(box.tested) == 200 and not box.moved and not any(box.looked.values())


def test_lying_claims_are_found_both_ways(stream, monkeypatch):
    c = config(**SMALL, SLOT_LOSS="scored")
    (run, val), model = stream(c, 144), random_model(c, scale=0.6)
    monkeypatch.setattr(
        t, "broken_conditions", lambda c, label: "" if label == "slot" else "C1,C2,C3"
    )
    assert not audit.audit(run, model, val.tokens, "slot", c, count=8)["ok"]
    assert not audit.audit(run, model, val.tokens, "sliding_window", c, count=8)["ok"]


def test_random_token_floor(stream):
    """On uniform random tokens #1313's mode goes below ln V, nothing that claims to be causal does."""
    record = dict(SLOT_BIAS="1", SLOT_STEPS="24", SLOT_LR="0.012", SLOT_LR_MIN="0.001")
    for delta, _, loss in MODES[::2]:
        c = config(SLOT_DELTA=delta, SLOT_LOSS=loss, **record)
        (run, _), rng = stream(c), np.random.default_rng(0)
        gap, error = evaluators.floor(run, t.GPT(c), c, "slot", 2048, rng)
        if not t.broken_conditions(c, "slot"):
            assert gap > -4 * error
        elif (delta, loss) == ("window", "scored"):
            assert gap < -0.1 and gap < -20 * error


def test_scores_are_the_same_on_one_and_two_ranks(tiny, tiny_data, tmp_path):
    """Every mode, from one artifact."""
    tiny(RUN_ID="made", ITERATIONS="3", EVALS="none")
    modes = [
        ("shared", "all"),
        ("window", "scored"),
        ("shared", "context"),
        ("window", "context"),
        ("shared", "past"),
        ("window", "past"),
        ("shared", "recent"),
        ("window", "recent"),
    ]
    settings = [
        {
            "LOAD_ARTIFACT": "logs/made/final_model.ptz",
            "EVALS": "slot,ttt_slot" if number == 3 else "slot",
            "SLOT_DELTA": delta,
            "SLOT_LOSS": loss,
            "SLOT_BIAS": "1",
        }
        for number, (delta, loss) in enumerate(modes)
    ]
    runs(
        [{**TINY, **tiny_data, "RUN_ID": f"m{n}", **s} for n, s in enumerate(settings)], tmp_path, 2
    )
    for number, changes in enumerate(settings):
        one, two = (
            {k: v["val_loss"] for k, v in metrics.items() if k.startswith("final_")}
            for metrics in (tiny(**changes), read_metrics(tmp_path / "logs" / f"m{number}"))
        )
        assert one == pytest.approx(two, abs=1e-6) and one


def scored_only_autograd(c, model, h, targets, firsts):
    """The same for equal windows, of which only the scored positions go through the head: the least that autograd can do."""
    keep = c.eval_seq_len - int(firsts[-1])
    return autograd_slot(
        dataclasses.replace(c, eval_seq_len=keep, eval_stride=keep),
        model,
        h[:, -keep:],
        targets[:, -keep:],
        np.zeros(len(h), int),
    )


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(
    "mode,plain,least",
    [
        (dict(SLOT_STEPS="3"), autograd_slot, 5),
        (
            dict(SLOT_DELTA="window", SLOT_LOSS="scored", SLOT_BIAS="1", SLOT_STEPS="24"),
            autograd_slot,
            8,
        ),
        (
            dict(SLOT_DELTA="window", SLOT_LOSS="scored", SLOT_BIAS="1", SLOT_STEPS="24"),
            scored_only_autograd,
            3,
        ),
    ],
)
def test_closed_form_is_many_times_faster_than_autograd(
    mode, plain, least, stream, every_core, capsys
):
    """SLOT's own added time at the demo's size, the two alternating; a shared machine gets half of what was measured in peace."""
    c = t.load_config({"PRESET": "demo", "DEVICE": "cpu", **mode})
    run, val = stream(c, 2304)
    model, starts, spent = random_model(c), np.arange(32) * 64, np.zeros(3)
    rows, firsts = val.tokens[torch.from_numpy(starts[:, None] + np.arange(257))], np.full(32, 192)
    rows = rows[:, :-1], rows[:, 1:]
    with torch.no_grad():
        h, scored = (
            model.hidden(rows[0]),
            torch.from_numpy(np.flatnonzero(t.scored_rows(firsts, 256))),
        )
    slot = t.Slot(c, run.ranks, model, val)
    batch = t.Batch(h, rows[1], firsts, scored, scored, starts, 0)
    for _ in range(3):
        clock = [time.perf_counter()]
        with torch.no_grad():
            ours = slot.nats(batch)
            clock.append(time.perf_counter())
            t.row_nll(model, h, rows[1], scored)
        clock.append(time.perf_counter())
        theirs = plain(c, model, h, rows[1], firsts)
        clock.append(time.perf_counter())
        spent += np.diff(clock)
    torch.testing.assert_close(
        ours,
        theirs.flatten() if len(theirs.flatten()) == len(ours) else theirs.flatten()[scored],
        rtol=0,
        atol=5e-5,
    )
    ratio = (spent[2] - spent[1]) / (spent[0] - spent[1])
    with capsys.disabled():
        print(f"\n{mode} {plain.__name__}: added time {ratio:.1f} times less")
    assert ratio > least / 2
