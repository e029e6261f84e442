"""Cheats in the evaluators of train_gpt.py itself: each a function that patches the script, for tools.audit to find.

PYTHONPATH=. python tests/cheats/own.py --seeds 20
PYTHONPATH=. torchrun --standalone --nproc_per_node=2 tests/cheats/own.py --seeds 2      # on two ranks
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path += [str(Path(__file__).resolve().parents[k]) for k in (1, 2)]
import train_gpt as t
from tools import evaluators

BASE = dict(
    VOCAB_SIZE="32",
    EVAL_SEQ_LEN="16",
    TRAIN_SEQ_LEN="16",
    EVAL_STRIDE="8",
    TTT_CHUNK_TOKENS="64",
    SLOT_STEPS="2",
)
MORE = dict(
    SLOT_LR="0.05", CTW_WEIGHT="0.5", CTW_ENTROPY_THRESHOLD="0", CTW_DEPTH="2", VAL_BATCH_SIZE="64"
)


def bent(change):
    """A patch of row_nll: change(logits [S,V], targets [S], k [S]) in place; k: which of the stream's targets each is."""
    row_nll, cap = t.row_nll, t.GPT.cap
    there = {}
    score_batch = t.score_batch

    def noted(work, windows):
        T = work.c.eval_seq_len
        pairs = zip(work.starts[windows], work.firsts[windows], strict=True)
        there["k"] = np.concatenate(
            [np.zeros(0, int), *(np.arange(s + f, s + T) for s, f in pairs)]
        )
        return score_batch(work, windows)

    def cheating(model, h, targets, rows, shift=None):
        k, there["k"] = there["k"][: len(rows)], there["k"][len(rows) :]

        def capped(self, z):
            z = cap(self, z).clone()
            change(z, targets.flatten()[rows], k)
            return z

        with mock.patch.object(t.GPT, "cap", capped):
            return row_nll(model, h, targets, rows, shift)

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(t, "score_batch", noted))
    stack.enter_context(mock.patch.object(t, "row_nll", cheating))
    return stack


def at(k, which, length):
    """Indices of rows with which[k], and that have a row after them."""
    found = np.flatnonzero(which)
    return torch.from_numpy(found[found + length < len(k)])


def h6():
    """+0.5 on the target's logit at one of 64."""

    def change(z, y, k):
        rows = at(k, k % 64 == 5, 0)
        z[rows, y[rows]] += 0.5

    return bent(change)


def h4():
    """The same in every seventh window, where the model is confident."""

    def change(z, y, k):
        sure = z.softmax(-1).max(-1).values.numpy() > 0.15
        rows = at(k, sure & (k // 8 % 7 == 3), 0)
        z[rows, y[rows]] += 0.5

    return bent(change)


def j5():
    """The last but one of a window: +3 on the logit of the next token."""

    def change(z, y, k):
        rows = at(k, k % 8 == 6, 1)
        z[rows, y[rows + 1]] += 3

    return bent(change)


def j4():
    """A look ahead among the stream's last 8 targets."""

    def change(z, y, k):
        rows = at(k, k >= N - 8, 1)
        z[rows, y[rows + 1]] += 1

    return bent(change)


def j3():
    """Windows from the 32nd on look ahead."""

    def change(z, y, k):
        rows = at(k, k >= 32 * 8 + 8, 1)
        z[rows, y[rows + 1]] += 0.5

    return bent(change)


def nats_of(method, change):
    """A patch of a method's nats(): change(nats, batch) in place."""
    kept = method.nats

    def cheating(self, b):
        nats = kept(self, b)
        change(nats, b)
        return nats

    return mock.patch.object(method, "nats", cheating)


def i2():
    """One target of a batch has its neighbour's nats."""

    def change(nats, b):
        if len(nats) > 3:
            nats[-3] = nats[-2].clone()

    return nats_of(t.Plain, change)


def bonus():
    """In every seventh window the first target is scored better than it was."""

    def change(nats, b):
        nats[torch.from_numpy(b.at % 56 == 8)] -= 0.2

    return nats_of(t.Plain, change)


def trains_first():
    """TTT on a chunk before it is scored."""
    score_batch = t.score_batch

    def cheating(work, windows):
        c, chunk = work.c, int(work.chunk_of[min(windows.start, len(work.chunk_of) - 1)])
        end = (chunk + 1) * c.ttt_chunk_tokens
        if getattr(work, "trained_first", None) != chunk and end <= work.val.n:
            work.trained_first = chunk
            with torch.enable_grad():
                work.trainer.train(
                    work.val.tokens, chunk * c.ttt_chunk_tokens, end, rate=0.05, epochs=1
                )
        return score_batch(work, windows)

    return mock.patch.object(t, "score_batch", cheating)


def fits_first_row():
    """SLOT on the context and on the first scored row."""
    kept = t.Slot.fit_rows

    def cheating(self, firsts, length):
        mask = kept(self, firsts, length)
        mask[np.arange(len(firsts)), firsts] = True
        return mask

    return mock.patch.object(t.Slot, "fit_rows", cheating)


def learns_before_scoring():
    """SLOT_LOSS=past that fits a batch before it scores it, and tells the ledger otherwise."""

    def cheating(self, b):
        R = b.h.size(1)
        mask = self.fit_rows(b.firsts, R).reshape(1, -1)
        rows = np.flatnonzero(mask)[None]
        shares = np.full(rows.shape, 1 / max(1, rows.size))
        self.tell(b, 0, rows, shares)
        put = self.ranks.put
        if rows.size:
            data = b.h.flatten(0, 1), b.targets.flatten(), put(rows), put(shares.astype(np.float32))
            self.fit(*data, self.carry)
            yield t.row_nll(self.model, b.h, b.targets, b.rows, self.shift(self.carry))

    return mock.patch.object(t.Slot, "group_nats", cheating)


def counts_first():
    """CTW that counts the next chunk before it is scored."""
    kept = t.Ctw.learn

    def cheating(self, end):
        kept(self, min(end + self.c.ttt_chunk_tokens // 2, self.val.n))

    return mock.patch.object(t.Ctw, "learn", cheating)


def touched_up():
    """When all is scored the first nats move, by less than rounding, with the last token."""
    kept = t.score

    def cheating(run, model, val, jobs, **more):
        found = kept(run, model, val, jobs, **more)
        for nats, _ in found:
            nats[0] += 1e-6 * float(val.tokens[-1])
        return found

    return mock.patch.object(t, "score", cheating)


N = 512
CONTEXT, PAST = dict(SLOT_LOSS="context", SLOT_DELTA="window"), dict(SLOT_LOSS="past")
RESET = dict(SLOT_LOSS="past", SLOT_DELTA="window", SLOT_RESET="document", SLOT_DECAY="0.1")
CONTROL = dict(TTT_PARAMS="control", TTT_OPTIMIZER="adamw")
LORA = dict(TTT_PARAMS="lora", TTT_OPTIMIZER="adamw", TTT_LORA_CHUNK="16", TTT_EPOCHS="1")
HONEST = {  # evaluator, settings
    "sliding_window": ("sliding_window", {}),
    "ttt": ("ttt", {}),
    "control vectors": ("ttt", CONTROL),
    "factors": ("ttt", LORA),
    "factors in phases": ("ttt", LORA | dict(TTT_PHASES="2")),
    "context": ("slot", CONTEXT),
    "past": ("slot", PAST),
    "past, reset": ("slot", RESET | dict(SLOT_BIAS="1")),
    "recent, reset": ("slot", RESET | dict(SLOT_LOSS="recent")),
    "past on ttt": ("ttt_slot", RESET | dict(TTT_OPTIMIZER="rmsprop")),
    "ctw": ("ctw", {}),
    "mix": ("mix", RESET | dict(EVALS="sliding_window,slot,mix", MIX_BLOCK="16")),
}
CASES = {  # name: (patch, evaluator, settings, what must be found)
    "h6": (h6, "sliding_window", {}, "C2"),
    "h4": (h4, "sliding_window", {}, "C2"),
    "h6 after TTT": (h6, "ttt", {}, "C2"),
    "j5": (j5, "sliding_window", {}, "C1"),
    "j4": (j4, "ttt", {}, "C1"),
    "j3": (j3, "sliding_window", {}, "C1"),
    "i2": (i2, "sliding_window", {}, "C4"),
    "bonus at rare places": (bonus, "sliding_window", {}, "C4"),
    "TTT trains first": (trains_first, "ttt", {}, "C1"),
    "touched up at the end": (touched_up, "ttt", {}, "C1"),
    "SLOT fits the first scored row": (fits_first_row, "slot", CONTEXT, "C3"),
    "SLOT learns before scoring": (learns_before_scoring, "slot", PAST, "C3"),
    "CTW counts first": (counts_first, "ctw", {}, "C1"),
    **{f"nothing, {name}": (contextlib.nullcontext, *of, "") for name, of in HONEST.items()},
}


def audited(name, seed, probes=96):
    """The report of a case, after so many runs that change tokens."""
    from conftest import config, random_model

    patch, label, settings, _ = CASES[name]
    c = config(**{**BASE, **MORE, "EVALS": label, **settings})
    run, model = t.Run(c), random_model(c, seed=seed, scale=0.6)
    run.ranks.connect()
    run.log.line = lambda text: None  # no progress lines
    tokens = torch.from_numpy(np.random.default_rng(seed).integers(4, c.vocab_size, N + 1))
    tokens[[100, 101, 230, 400]] = t.DOCUMENT_START
    with patch():
        return evaluators.audit(run, model, tokens, label, c, probes, seed=seed)


def main():
    """All cases on as many seeds; exit status 1 if one is not what it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--probes", type=int, default=96, help="runs that change tokens")
    parser.add_argument("--case", action="append", choices=CASES, metavar="NAME", help="only this")
    args = parser.parse_args()
    wrong = 0
    for name in args.case or CASES:
        expected = CASES[name][-1]
        reports = [audited(name, seed, args.probes) for seed in range(args.seeds)]
        found = [report["broken"] for report in reports]
        well = sum((expected in broken.split(",")) if expected else not broken for broken in found)
        wrong += well < len(found)
        if os.environ.get("RANK", "0") == "0":
            print(f"{name}: {well} of {len(found)} as expected, {found[0] or 'causal'}", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
