"""Conditions C1, C2 and C4, and the floor, of a scorer that is a black box: tokens [n+1] in, nats [n] out.

Places are indices of tokens: token p is target p - 1. Nothing here depends on what the scorer is. A verdict rests on exact
comparisons; what is quicker and less sure only says where to compare.

  C1  Change token p: the nats of no token before p may move by a bit. Where a change is seen to reach no further than some
      tokens, one run changes many tokens, each out of reach of the one before. If something moves, halving them finds which of
      them did it, with the same tokens.
  C2  The probabilities that the tokens of a vocabulary get at one place sum to 1. A round of V runs gives each of many places
      every token once, in an order of its own drawn at random. Whatever an honest scorer learns from the past, such a sum has the
      mean 1 at each place; a look at its own token lifts it. Places that stand out are summed again far from each other, and the
      worst of those with everything else held fixed, which is exact.
  C4  The nats handed in are of their own token: over up to 64 random streams no two places say always the same, none says always
      the same.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise

import numpy as np

PERIOD = 64  # places are spread over all residues of this: windows and strides are powers of 2
ENOUGH = 16  # places found to leak, after which no more are looked for
OFF = 1e-4  # what a sum of probabilities in single precision may be away from 1

Score = Callable[[np.ndarray], np.ndarray]


def made_up(n: int, vocab_size: int, rng: np.random.Generator) -> np.ndarray:
    """A stream [n+1] for a scorer that brings no text.

    Stretches of tokens drawn by Zipf's law, of what was said before, word for word or nearly, and of one token again and again.
    """
    rank = rng.permutation(vocab_size)
    weights = 1 / np.arange(1, vocab_size + 1)
    tokens = rank[rng.choice(vocab_size, n + 1, p=weights / weights.sum())]
    start = 32
    while start <= n:
        kind = rng.choice(["new", "said", "nearly said", "one token"], p=[0.45, 0.25, 0.15, 0.15])
        size = min(int(rng.integers(8, 97)), start, n + 1 - start)
        part = tokens[start : start + size]
        if kind == "one token":
            part = part[:40]
            part[:] = part[0]
        elif kind != "new":
            source = int(rng.integers(0, start - size + 1))
            kept = rng.random(size) < (1 if kind == "said" else 15 / 16)
            part[kept] = tokens[source : source + size][kept]
        start += len(part)
    return tokens


def spread(low: int, high: int, rng: np.random.Generator) -> list[int]:
    """The integers from low up to high - 1 in an order whose every 64 or so have all residues of PERIOD, early to late."""
    found = []
    for _ in range(-(-(high - low) // PERIOD)):
        residues = rng.permutation(PERIOD)
        blocks = rng.permutation(np.arange(PERIOD) % max(1, -(-(high - low) // PERIOD)))
        found += (low + blocks * PERIOD + residues).tolist()
    found += rng.permutation(np.arange(low, high)).tolist()
    return list(dict.fromkeys(p for p in found if p < high))


def kinds_of_places(
    n: int, marks: Iterable[int], count: int, rng: np.random.Generator
) -> list[int]:
    """Up to `count` tokens to change, 2 to n: the ends of the stream, tokens at marks, and others spread over all residues.

    marks: tokens that are the first to be scored after a boundary. Of many, some early, in the middle and late.
    """
    ends = [n, n - 1, *range(n - 2, n - 12, -1), 2, 3]
    near = sorted({m + d for m in marks for d in (-1, 0, 1)})
    room = max(1, (count - len(ends)) // (2 if count < PERIOD else 4))
    chosen = [near[k] for k in np.linspace(0, len(near) - 1, min(room, len(near))).astype(int)]
    found = dict.fromkeys(p for p in [*ends[: count // 4 + 1], *chosen] if 2 <= p <= n)
    return list(dict.fromkeys([*found, *spread(2, n + 1, rng)]))[:count]


def chance(leaks: int, tested: int, n: int) -> float:
    """The probability that one of `tested` places drawn from n is among `leaks` of them."""
    if tested + leaks > n:
        return 1.0
    terms = (math.log1p(-leaks / (n - k)) for k in range(tested))
    return -math.expm1(sum(terms)) if leaks else 0.0


class Box:
    """A scorer, the stream that it is tried on, and what was found."""

    REACHES = 8  # runs that measure how far a changed token reaches
    DENSE = 64  # runs on random streams, at most

    def __init__(
        self,
        score: Score,
        vocab_size: int,
        tokens: np.ndarray,
        marks: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        self.score, self.V, self.tokens, self.marks = score, vocab_size, np.asarray(tokens), marks
        self.n = len(tokens) - 1
        self.rng = np.random.default_rng(seed)
        self.runs = 0
        self.lowest = np.full(self.n, np.inf)  # nats of each target, over all runs
        self.base = self.run(self.tokens)
        self.reach: int | None = None  # tokens after its own whose nats a changed token moves
        self.tested: set[int] = set()  # places of C1
        self.moved: dict[int, float] = {}  # of those the ones that moved earlier nats, by how much
        self.summed: set[int] = set()  # places of C2
        self.summed_exactly: set[int] = set()  # of those, places out of others' reach
        self.sums: dict[int, float] = {}  # of those the ones summed exactly
        self.wrong: list[str] = []  # what breaks C4
        self.gap = self.gap_error = math.nan  # mean nats on random tokens less ln V, standard error

    def examine(self, probes: int, sums: int) -> "Box":
        """Look for all that a black box shows; sums: places to sum at exactly, or 0. Returns itself."""
        self.causality(probes)
        if sums:
            self.normalisation(sums)
            self.note(np.flatnonzero(self.lowest < -1e-6), "nats under 0: more than certain")
        return self

    def run(self, tokens: np.ndarray, needed: int | None = None) -> np.ndarray:
        """Nats [n] of a stream; a scorer that can be stopped stops after the first `needed` targets."""
        self.runs += 1
        nats = self.score(tokens)
        self.lowest = np.minimum(self.lowest, nats)
        return nats

    # ---- C1

    def looked_at(self, p: int) -> float:
        """By how much the distribution at p moves with p itself, where the scorer shows it; a black box does not."""
        return 0.0

    def changed(self, places: Sequence[int]) -> np.ndarray:
        """The stream with other tokens at these places."""
        tokens = self.tokens.copy()
        tokens[places] = (tokens[places] + self.rng.integers(1, self.V, len(places))) % self.V
        return tokens

    def turned(self, p: int, kind: int) -> np.ndarray:
        """The stream with another token p, and from there on, by kind 0 to 2, random ones, one only, or what was said before."""
        tokens = self.changed([p])
        rest = self.n - p
        others = self.rng.integers(0, self.V, rest)
        if kind == 1:
            others[:] = self.rng.integers(self.V)
        if kind == 2:
            others = np.resize(tokens[: p + 1], rest)
        tokens[p + 1 :] = others
        return tokens

    def only(self, places: Sequence[int], tokens: np.ndarray) -> np.ndarray:
        """The stream with tokens of a changed one at these places alone."""
        found = self.tokens.copy()
        found[places] = tokens[places]
        return found

    def alone(self, p: int, tokens: np.ndarray | None = None, whole: bool = True) -> np.ndarray:
        """Compare all nats before token p with those of a stream that is changed from there on; returns whose moved [n].

        tokens: that stream, else token p alone is another; whole: score what comes after p too.
        """
        tokens = self.changed([p]) if tokens is None else tokens
        after = self.run(tokens, None if whole else p)
        self.tested.add(p)
        self.compare(p, after)
        return after != self.base

    def compare(self, p: int, after: np.ndarray) -> None:
        """Note p if nats before it moved."""
        sizes = np.abs(after - self.base)[: p - 1][(after != self.base)[: p - 1]]
        if len(sizes):
            self.moved[p] = float(np.nan_to_num(sizes, nan=math.inf).max())

    def measure_reach(self) -> None:
        """See how far a changed token reaches, at eight places; leave it open if that is to the end.

        Where it ends, windows end: if nobody named boundaries, these are taken for them.
        """
        ends, far = [], 0
        for eighth in range(self.REACHES):
            p = int(self.n * (1 + eighth + self.rng.random()) / 16) + 1
            ends.append(int(np.flatnonzero(self.alone(p)).max(initial=p - 1)) + 1)
            far = max(far, ends[-1] - p)
        stride = math.gcd(*(b - a for a, b in pairwise(ends)))
        far += min(stride, far // 4)  # what others than these reach
        if far > self.n // 6:
            return
        self.reach = far
        if not len(self.marks) and stride > 1:
            self.marks = range(ends[0] % stride + 1, self.n + 1, stride)

    def together(self, places: Sequence[int], last: int) -> list[int]:
        """Change tokens out of each other's reach in one run, and look for those that moved earlier nats, up to run number `last`.

        Returns those whose own vector moved. What is tried again has the tokens that showed it: others might not.
        """
        tokens = self.changed(places)
        moved = self.run(tokens) != self.base
        suspects = [p for p in places if self.looked_at(p)]
        early = []  # (target that moved, number of the first changed token after it)
        quiet = 0  # the first target that the changed tokens before do not reach
        for k, p in enumerate(places):
            early += [(quiet + int(at), k) for at in np.flatnonzero(moved[quiet : p - 1])[:1]]
            quiet = p + (self.reach or 0)
        self.tested.update(places[: early[0][1] if early else None])
        for target, k in early[:2]:  # what moved a target may stand far behind it
            self.blame(places[k:], tokens, target)
        for p in suspects:
            if self.runs < last and len(self.moved) < ENOUGH:
                self.alone(p, self.only([p], tokens))
        return suspects

    def blame(self, places: Sequence[int], tokens: np.ndarray, target: int) -> None:
        """Note which of the changed tokens behind a target moved its nats, by halving; the first of those that do so together."""
        after = self.run(self.only(places, tokens))
        if after[target] == self.base[target]:
            return  # a token before it reaches further than was measured
        while len(places) > 1:
            half = len(places) // 2
            for part in (places[:half], places[half:]):
                found = self.run(self.only(part, tokens))
                if found[target] != self.base[target]:
                    places, after = part, found
                    break
            else:
                break
        self.compare(places[0], after)

    def causality(self, count: int) -> None:
        """Up to `count` runs that change tokens; places tested and moved are noted."""
        begun = self.runs
        self.measure_reach()
        order = kinds_of_places(self.n, self.marks, count, self.rng)
        if self.reach is not None:
            self.causality_in_groups(begun + count // 2)
        for k, p in enumerate(order):
            if len(self.moved) >= ENOUGH or self.runs - begun >= count:
                return
            if p not in self.tested or k % 2:  # some whole: nats may be changed after the last one
                tokens = self.turned(p, k // 2 % 3) if k % 2 else None
                self.alone(p, tokens, whole=self.runs % 8 == 0)

    def causality_in_groups(self, last: int) -> None:
        """Runs that change many tokens each, up to run number `last`."""
        for places in self.groups(2, (self.reach or 0) + 16):
            if self.runs >= last or len(self.moved) >= ENOUGH:
                return
            if places:
                self.together(places, last)

    def groups(self, first: int, gap: int) -> Iterator[list[int]]:
        """All tokens from `first` on, in groups whose members are a gap apart; the residues of PERIOD that were seen least first."""
        gap |= 1  # odd: a group has many residues
        starts = (self.rng.permutation(gap) + first).tolist()
        seen = np.zeros(PERIOD, int)
        while starts:
            groups = [np.arange(start, self.n + 1, gap) for start in starts[:16]]
            best = min(range(len(groups)), key=lambda k: seen[groups[k] % PERIOD].sum())
            starts.pop(best)
            seen[groups[best] % PERIOD] += 1
            yield groups[best].tolist()

    # ---- C2

    def round(self, places: np.ndarray) -> np.ndarray:
        """Sums [places] of the probabilities that a place's tokens get, over V runs with a random order for each place."""
        orders = self.rng.permuted(np.tile(np.arange(self.V), (len(places), 1)), axis=1)
        total = np.zeros(len(places))
        for token in orders.T:
            tokens = self.tokens.copy()
            tokens[places] = token
            total += probabilities(self.run(tokens)[places - 1])
        return total

    def exact(self, p: int) -> float:
        """The sum at p with all else as it is."""
        total = self.round(np.array([p]))[0]
        self.sums[p] = total
        self.summed.add(p)
        self.summed_exactly.add(p)
        return total

    def dense(self) -> np.ndarray:
        """Nats [runs,n] of streams that are random throughout; of up to 64 tokens each place has every one once."""
        orders = self.rng.permuted(np.tile(np.arange(self.V), (self.n + 1, 1)), axis=1)
        return np.stack([self.run(orders[:, k]) for k in range(min(self.V, self.DENSE))])

    def sparse_places(self, k: int) -> np.ndarray:
        """One place of each 8, of other residues in the next 64, so that all residues come up; k: number of the round."""
        blocks = np.arange(-(-self.n // 8))
        order = self.rng.permutation(8)
        places = 8 * blocks + order[(blocks + blocks // 8 + k) % 8] + 1
        return places[places <= self.n]

    def apart(self, ranked: Iterable[int]) -> np.ndarray:
        """Of places, best first, those that are far from all better ones, sorted."""
        gap = self.n // 24 if self.reach is None else self.reach
        kept: list[int] = []
        for p in ranked:
            if 1 <= p <= self.n and all(abs(p - other) > gap for other in kept):
                kept.append(int(p))
        return np.array(sorted(kept))

    def normalisation(self, places: int, rounds: int = 2) -> None:
        """Rounds that say where to look, some with places far apart, and exact sums at up to `places` places."""
        nats = self.dense()
        self.own_nats(nats)
        self.floor(nats)
        off: dict[int, float] = {}
        for k in range(rounds):
            where = self.sparse_places(k)
            self.summed.update(where.tolist())
            for p, total in zip(where.tolist(), self.round(where), strict=True):
                off[p] = max(off.get(p, 0.0), suspicion(total))
        ranked = sorted(off, key=lambda p: -off[p])
        kinds = kinds_of_places(self.n, self.marks, 64, self.rng)
        worst: dict[int, float] = {}
        lists = [ranked, [*self.odd_residues(nats), *kinds], *self.marks_in_turn()]
        more = max(2, min(24, 800 // self.V))  # a list takes V runs
        if self.reach is None:  # places of any kind, some of which the noise of near ones hid
            lists += [spread(1, self.n + 1, self.rng) for _ in range(more)]
        else:  # all residues, exactly
            lists += islice(self.groups(1, self.reach + 1), more)
        for some in lists:
            where = self.apart(some)
            self.summed.update(where.tolist())
            if self.reach is not None:
                self.summed_exactly.update(where.tolist())
            sums = self.round(where)
            worst |= {p: suspicion(total) for p, total in zip(where.tolist(), sums, strict=True)}
        if (
            self.reach is not None and max(worst.values()) < OFF / 2
        ):  # out of each other's reach: exact
            return
        for p in [*sorted(worst, key=lambda p: -worst[p])[:places], self.n][: places + 1]:
            if abs(self.exact(p) - 1) > OFF:
                return

    def marks_in_turn(self) -> list[list[int]]:
        """Lists of places: tokens at marks, of which the last first, and the others of these."""
        marks = [int(m) for m in self.rng.permutation(self.marks)]
        half = len(marks) // 2
        return [[max(marks), *marks[half:]], marks[:half]] if half else []

    def odd_residues(self, nats: np.ndarray) -> list[int]:
        """Places of the residues of PERIOD whose sums in random streams are highest, by more than chance; nats [runs,n]."""
        sums = probabilities(nats).mean(0) * self.V
        if self.n < 4 * PERIOD:
            return []
        error = sums.std() / math.sqrt(self.n // PERIOD)
        means = np.array([sums[k::PERIOD].mean() for k in range(PERIOD)])
        odd = [k for k in np.argsort(-means) if means[k] - 1 > 3 * error]
        return [p for k in odd[:4] for p in range(k + 1, self.n + 1, 3 * PERIOD)]

    # ---- C4 and the floor

    def own_nats(self, nats: np.ndarray) -> None:
        """Note nats [runs,n] of random streams that are no token's, or another's."""
        fixed = nats.min(0) == nats.max(0)
        uniform = np.abs(np.where(fixed, nats[0], 0) - math.log(self.V)) < 1e-5
        same = np.flatnonzero(fixed & ~uniform)
        if len(nats) < self.V:  # other tokens than these may have other nats
            same = np.array([k for k in same[:2] if abs(self.exact(k + 1) - 1) > OFF], int)
        self.note(same, "nats that no token changes: not scored")
        columns = np.ascontiguousarray(np.round(nats.T, 9))
        seen: dict[bytes, int] = {}
        copies = []
        for k in np.flatnonzero(~fixed):
            first = seen.setdefault(columns[k].tobytes(), int(k))
            if first != k:
                copies.append(k)
        self.note(np.array(copies, int), "nats of another token, twice")

    def note(self, targets: np.ndarray, what: str) -> None:
        """Note what breaks C4 at targets."""
        if len(targets):
            self.wrong.append(f"{what}, {named(targets + 1)}")

    def floor(self, nats: np.ndarray) -> None:
        """Note the mean of nats on random tokens, less ln V; all places of a stream count as one sample."""
        means = nats.mean(1)
        self.gap = means.mean() - math.log(self.V)
        self.gap_error = means.std(ddof=1) / math.sqrt(len(means))

    # ---- verdict

    def broken(self) -> list[str]:
        """Which of C1, C2 and C4 were found broken."""
        uneven = any(abs(total - 1) > OFF for total in self.sums.values())
        found = (("C1", self.moved), ("C2", uneven), ("C4", self.wrong))
        return [name for name, wrong in found if wrong]


def suspicion(total: float) -> float:
    """How odd a sum of probabilities is: a look at the token makes it larger than 1, chance as often smaller."""
    return total - 1 if total > 1 else (1 - total) / 2


def probabilities(nats: np.ndarray) -> np.ndarray:
    """exp(-nats), of numbers that it can be taken of."""
    return np.exp(-np.clip(nats, -700, None))


def named(places: Iterable[int]) -> str:
    """Places in words, the first few of many."""
    places = sorted(int(p) for p in places)
    more = f" and {len(places) - 6} more" if len(places) > 6 else ""
    return f"token{'s' * (len(places) > 1)} {', '.join(map(str, places[:6]))}{more}"
