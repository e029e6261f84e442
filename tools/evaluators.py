"""The evaluators of train_gpt.py under audit, for tools/audit.py: as black boxes, and watched from inside.

Watched are the vectors of log-probabilities that scored each target, as they go through train_gpt.row_nll: the nats handed in
must be theirs, and what scores a token must not move when that token is changed. Where a method scores by other means (ctw, mix),
sums over the vocabulary take their place, on a shorter stream.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import train_gpt as t
from tools import blackbox

NEAR = 1e-4  # nats in single precision, and the same by another way


class EnoughError(Exception):
    """All targets that are needed are scored; its value: their nats."""


class Stream:
    """What train_gpt.score needs of validation data: tokens [n+1]."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens, self.n = tokens, len(tokens) - 1


def score(
    run: Any, model: Any, tokens: torch.Tensor, label: str, c: t.Config, observer: Any = t.SILENT
) -> torch.Tensor:
    """Nats [n] of a stream, fp32, of a mixture fp64; the model's weights are as before."""
    if t.EVALUATORS[label].mixes:
        parts = [score(run, model, tokens, name, c, observer) for name in t.experts(c)]
        return t.mixture(c, torch.stack(parts))[0]
    with t.put_back(model.parameters()):
        found = t.score(run, model, Stream(tokens), [(label, c)], observer=observer)
    return found[0][0].cpu()


def shrink(c: t.Config, targets: int) -> t.Config:
    """Settings with chunks and batches of which `targets` holds several; a batch of one window stays one."""
    windows = max(2, targets // c.eval_stride // 8)
    return dataclasses.replace(
        c,
        ttt_chunk_tokens=min(c.ttt_chunk_tokens, max(c.eval_seq_len, targets // 4)),
        slot_batch_seqs=min(c.slot_batch_seqs, windows),
        mix_block=min(c.mix_block, max(8, targets // 8)),
        ttt_lora_chunk=min(c.ttt_lora_chunk, max(1, targets // 16)),
    )


def boundaries(c: t.Config, run: Any, label: str, n: int) -> list[int]:
    """Indices of tokens that are the first to be scored after a window, batch (so rank) or chunk boundary."""
    T = c.eval_seq_len
    starts, firsts = t.plan_windows(n, T, T if label == "roundtrip" else c.eval_stride)
    heads = starts + firsts + 1
    size = max(1, c.val_batch_size // (T * run.ranks.world))
    if label.endswith("slot"):
        size = c.slot_batch_seqs
    chunks = [int(np.searchsorted(heads, k + 1)) for k in range(0, n, c.ttt_chunk_tokens)]
    middle, last = len(heads) // 2, len(heads) - 1
    picked = [1, 2, middle, last - 1, last, chunks[-1] + size, *chunks]
    picked += [k + d for k in chunks for d in (1, size)]
    return sorted({int(heads[k]) for k in picked if 0 < k < len(heads)})


def by_documents(c: t.Config, label: str) -> bool:
    """Whether an evaluator scores document by document, each in chunks, and not window by window."""
    return t.EVALUATORS[label].ttt and c.ttt_params == "lora"


def chunk_ends(c: t.Config, tokens: torch.Tensor) -> list[int]:
    """The first tokens of documents and those that follow a document's chunks."""
    n = len(tokens) - 1
    begins = t.document_starts(Stream(tokens)).tolist()
    spans = zip(begins, [*begins[1:], n], strict=True)
    found = {k for begin, end in spans for k in (begin, *range(begin + 1, end, c.ttt_lora_chunk))}
    return sorted(k for k in found if k > 1)


class Ledger(t.Observer):
    """What scored each target, and what was fitted to it, in the order in which it happened.

    Windows are numbered in the order of the pass; ranks score theirs at the same time, so what was learnt too early shows only when
    all are put together, in settle(). With keep, vectors are kept for all targets, else for `wanted` ones.
    """

    def __init__(self, c: t.Config, label: str, n: int, ranks: Any, keep: bool = False) -> None:
        self.c, self.label, self.ranks, self.n, self.T = c, label, ranks, n, c.eval_seq_len
        self.keep, self.wanted = keep, np.zeros(n, bool)
        stride = self.T if label == "roundtrip" else c.eval_stride
        starts, firsts = t.plan_windows(n, self.T, stride)
        self.scored_by = np.repeat(np.arange(len(starts)), self.T - firsts)
        self.count = np.zeros(n, int)
        self.done = np.zeros(n, bool)  # gone through row_nll
        self.early = self.uses = 0
        self.learnt = np.zeros(
            (2, n), int
        )  # times a target was learnt by all ranks, and then not scored by this one
        self.due = np.zeros(
            0, int
        )  # targets of the batch, of which those from `taken` on are to come
        self.taken = 0
        self.told = np.zeros(0, int)  # targets that the next fit is to
        self.vectors: dict[int, np.ndarray] = {}

    def scoring(self, starts: np.ndarray, firsts: np.ndarray, ends: np.ndarray) -> None:
        """Count the targets that these windows score."""
        rows = [np.arange(s + f, e) for s, f, e in zip(starts, firsts, ends, strict=True)]
        self.due, self.taken = np.concatenate([np.zeros(0, int), *rows]), 0
        np.add.at(self.count, self.due, 1)

    def learned(self, begin: int, end: int) -> None:
        """What is scored from now on depends on these targets; a document's chunk is learnt by the rank that scored it alone."""
        span = slice(begin, min(end, self.n))
        unscored = self.count[span] == 0
        own = by_documents(self.c, self.label) and end - begin <= self.c.ttt_lora_chunk
        self.uses += len(unscored) if own or self.ranks.rank == 0 else 0
        if own:
            self.early += int(unscored.sum())
        else:
            self.learnt[:, span] += [np.ones(len(unscored), int), unscored]

    def settle(self) -> None:
        """Add up what all ranks know, once all is scored: what was learnt, and not yet scored by any."""
        learnt, unscored = self.total(self.learnt)
        self.early, self.uses, self.count = (
            self.total(x) for x in (self.early, self.uses, self.count)
        )
        self.early += ((learnt > 0) & (unscored == learnt)).sum()

    def fitted(self, targets: np.ndarray, window: int) -> None:
        """Note that what `window` and later ones are scored with was fitted to these targets."""
        self.told = targets
        self.uses += len(targets)
        self.early += int((self.scored_by[targets] >= window).sum())

    def fit(self) -> None:
        """A carried SLOT fits now: what it was told it fits to must have gone through row_nll, here or on another rank."""
        here = (self.count[self.told] > 0) | (self.ranks.world == 1)
        self.early += int((here & ~self.done[self.told]).sum())

    def went_through(self, logits: torch.Tensor) -> None:
        """Logits [S,V] score the next S targets of the batch."""
        at = self.due[self.taken : self.taken + len(logits)]
        self.taken += len(logits)
        self.done[at] = True
        rows = np.arange(len(at)) if self.keep else np.flatnonzero(self.wanted[at])
        if len(rows):
            some = logits[torch.from_numpy(rows).to(logits.device)].float().log_softmax(-1).cpu()
            self.vectors |= dict(zip(at[rows].tolist(), some.numpy(), strict=True))

    def total(self, value: Any) -> np.ndarray:
        """The sum of a number, or of an array, over ranks."""
        wide = torch.as_tensor(np.asarray(value, np.float64)).to(self.ranks.device)
        return self.ranks.sum(wide).cpu().numpy()

    @contextlib.contextmanager
    def watching(self, needed: int | None = None) -> Iterator[None]:
        """See what goes through row_nll, and when a carried delta is fitted.

        Raises EnoughError after the first `needed` targets of a pass.
        """
        row_nll, cross_entropy, fit = t.row_nll, F.cross_entropy, t.Slot.fit
        score_batch = t.score_batch

        def seen(logits: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
            self.went_through(logits)
            return cross_entropy(logits, *rest, **more)

        def watched(*words: Any, **more: Any) -> torch.Tensor:
            with mock.patch.object(F, "cross_entropy", seen):
                return row_nll(*words, **more)

        def timed(slot: t.Slot, *words: Any, **more: Any) -> None:
            if slot.carried:
                self.fit()
            fit(slot, *words, **more)

        def stopped(work: t.Pass, windows: slice) -> Any:
            moment = score_batch(work, windows)
            if needed:
                nats, times = self.ranks.sum(work.out[:, :needed].clone())
                if times.all():  # on all ranks at once
                    raise EnoughError(nats)
            return moment

        with (
            mock.patch.object(t, "row_nll", watched),
            mock.patch.object(t.Slot, "fit", timed),
            mock.patch.object(t, "score_batch", stopped),
        ):
            yield


class Evaluation(blackbox.Box):
    """An evaluator of train_gpt.py on a stream."""

    REACHES = 4

    def __init__(
        self, run: Any, model: Any, tokens: torch.Tensor, label: str, c: t.Config, seed: int = 0
    ) -> None:
        self.run_, self.model, self.label, self.c = run, model, label, c
        self.device = tokens.device
        self.ledger: Ledger | None = None  # of the first run, with all vectors
        self.now: Ledger | None = None  # of the last
        self.looked: dict[int, float] = {}  # places of C2, and by how much their vectors moved
        marks = boundaries(c, run, label, len(tokens) - 1)
        if by_documents(c, label):
            marks = chunk_ends(c, tokens)
        self.shown = False  # whether nats are those of what went through row_nll
        super().__init__(self.run, c.vocab_size, tokens.cpu().numpy(), marks, seed)
        self.shown = self.shows()

    def run(self, tokens: np.ndarray, needed: int | None = None) -> np.ndarray:
        """Nats [n] fp64 of a stream, with a ledger; that of the first run stays.

        Those after the first `needed` targets may be the first run's, if nats are what row_nll gave.
        """
        self.runs += 1
        mixes = t.EVALUATORS[self.label].mixes
        ledger = Ledger(self.c, self.label, len(tokens) - 1, self.run_.ranks, not self.ledger)
        if self.ledger:  # where tokens stand alone, or before a changed rest, p_t must not move
            changed = np.flatnonzero(tokens[1:] != self.tokens[1:])
            ledger.wanted[changed if len(changed) < self.n // 8 else changed[:1]] = True
        self.now = ledger
        stream = torch.from_numpy(tokens).to(self.device)
        observer = t.SILENT if mixes else ledger
        watching = ledger.watching(needed if self.shown else None)
        try:
            with contextlib.nullcontext() if mixes else watching:
                nats = score(self.run_, self.model, stream, self.label, self.c, observer)
        except EnoughError as enough:
            return np.append(enough.args[0].double().cpu(), self.base[needed:])
        self.ledger = self.ledger or ledger
        return nats.double().numpy()

    def shows(self) -> bool:
        """Whether the nats are those of the vectors that went through row_nll; what differs in places only breaks C4."""
        assert self.ledger
        off, there = np.zeros(self.n), np.zeros(self.n)
        for k, vector in self.ledger.vectors.items():
            there[k] = 1
            off[k] = abs(self.base[k] + vector[self.tokens[k + 1]])
        off, there = self.ledger.total(off), self.ledger.total(there)
        wrong = np.flatnonzero((off > NEAR) | ~(off >= 0))
        if (there != 1).any() or len(wrong) > self.n // 2:
            return False
        self.note(wrong, "nats that are not those of the distribution")
        return True

    def looked_at(self, p: int) -> float:
        """By how much the vector of token p moved in the last run, in which it was changed."""
        assert self.ledger and self.now
        if not self.shown:
            return 0.0
        before, after = (x.vectors.get(p - 1) for x in (self.ledger, self.now))
        there = before is not None and after is not None
        moved = np.abs(after - before).max() if there else 0.0
        return float(self.ledger.total(moved))

    def changed(self, places: Sequence[int]) -> np.ndarray:
        """As that of a black box; where documents begin and end counts too, so sometimes a token that begins one is put there."""
        tokens = super().changed(places)
        if self.rng.random() < 0.25:
            begins = np.array(places)[self.tokens[places] != t.DOCUMENT_START]
            tokens[begins] = t.DOCUMENT_START
        return tokens

    def alone(self, p: int, tokens: np.ndarray | None = None, whole: bool = True) -> np.ndarray:
        """As that of a black box; and the vector at p is compared too."""
        moved = super().alone(p, tokens, whole)
        self.looked[p] = self.looked_at(p)
        return moved

    def together(self, places: Sequence[int], last: int) -> list[int]:
        """As that of a black box."""
        suspects = super().together(places, last)
        self.looked |= {p: 0.0 for p in places if p not in suspects and p not in self.looked}
        return suspects

    def normalised(self, places: int) -> float:
        """How far a distribution is from being one that does not know its token: C2."""
        if self.shown:
            return max(self.looked.values(), default=0.0)
        # a run for each token: on two windows' worth, with a chunk boundary between them
        T = self.c.eval_seq_len
        c = dataclasses.replace(
            self.c, ttt_chunk_tokens=T, ttt_lora_chunk=min(T, self.c.ttt_lora_chunk)
        )
        tokens = torch.from_numpy(self.tokens[: min(self.n, 2 * T) + 1]).to(self.device)
        short = Evaluation(self.run_, self.model, tokens, self.label, c, int(self.rng.integers(99)))
        where = short.sparse_places(0)
        off = np.abs(short.round(where) - 1)
        kinds = [short.n, min(short.n, T + 1 + c.eval_stride // 2)]
        worst = [int(p) for p in where[np.argsort(-off)]]
        for p in dict.fromkeys([worst[0], kinds[1], kinds[0], *worst[1:]][:places]):
            short.exact(p)
        self.looked = dict.fromkeys(where.tolist(), 0.0)
        return float(max(abs(total - 1) for total in short.sums.values()))


def floor(
    run: Any, model: Any, c: t.Config, label: str, n: int, rng: np.random.Generator
) -> tuple[float, float]:
    """(mean nats on uniform random tokens less ln V, its standard error)."""
    tokens = torch.from_numpy(rng.integers(0, c.vocab_size, n + 1)).to(run.ranks.device)
    nats = score(run, model, tokens, label, c).double()
    return nats.mean().item() - math.log(c.vocab_size), nats.std().item() / math.sqrt(n)


def audit(
    run: Any,
    model: Any,
    tokens: torch.Tensor,
    label: str,
    c: t.Config,
    count: int = 96,
    sum_count: int = 2,
    seed: int = 0,
) -> dict[str, Any]:
    """Report of an evaluator; broken is what was found in the form of train_gpt.broken_conditions.

    count: runs that change tokens; sum_count: places to sum probabilities at, where vectors are not shown.
    """
    box = Evaluation(run, model, tokens, label, c, seed)
    ledger = box.ledger
    assert ledger
    ledger.settle()
    again = box.run(box.tokens)
    steady = np.array_equal(box.base, again)
    if steady:
        box.causality(count)
    box.note(np.flatnonzero(box.base < -1e-6), "nats under 0: more than certain")
    off = box.normalised(sum_count) if sum_count or box.shown else None
    mixes = t.EVALUATORS[label].mixes
    if not mixes:
        box.note(np.flatnonzero(ledger.count != 1), "not scored once")
    fresh = t.GPT(c, model.dtype, model.attend).to(run.ranks.device)
    gaps = [floor(run, m, c, label, box.n, box.rng) for m in (fresh, model)]
    # the artifact itself was fitted to all of them
    trained = c.prequant_ttt_enabled or c.calibration == "validation"
    broken = ["C1"] * bool(box.moved or not steady)
    broken += ["C2"] * (off is not None and off > (0 if box.shown else blackbox.OFF))
    broken += ["C3"] * bool(ledger.early or trained) + ["C4"] * bool(box.wrong)
    claim = t.broken_conditions(c, label)
    compared = [w for w in claim.split(",") if w and (off is not None or w != "C2")]
    if mixes:  # its experts' ledgers are theirs
        compared = [w for w in compared if w != "C3" or trained]
    below = any(gap < -4 * error for gap, error in gaps)
    return dict(
        evaluator=label,
        claim=claim,
        broken=",".join(broken),
        n=box.n,
        runs=box.runs,
        probes=len(box.tested),
        moved=len(box.moved),
        moved_at=sorted(box.moved),
        largest=max(box.moved.values(), default=0.0 if steady else math.nan),
        looked=len(box.looked),
        sum_error=off,
        early=int(ledger.early) + box.n * trained,
        uses=int(ledger.uses) + box.n * trained,
        idle=not (ledger.uses or mixes) and label not in ("roundtrip", "sliding_window"),
        wrong=box.wrong,
        gap=gaps[0][0],
        gap_error=gaps[0][1],
        gap_artifact=gaps[1][0],
        gap_artifact_error=gaps[1][1],
        below=below,
        ok=compared == broken and not (below and not claim),
    )
