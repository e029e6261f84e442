"""Validation text among the training text: documents by hashes of all their windows of 64 tokens, wherever those stand.

A document is what follows a document-start token. Its windows stand side by side from its first token on; one of up to 64 tokens is
a window by itself. It is found if two thirds of its windows or more are, so that a copy which was renamed, moved or cut a little is
found too; of cut ones the share of all windows tells. A few are chance: text of the web is repeated, so is a library's code.
Hashes of the training text are rolling ones, of the window at each token: sum over j of h(token j) B^j, modulo 2^64, divided by the
power at its beginning.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

WINDOW = 64
START = 1  # the token that begins a document
BLOCK = 2**21  # tokens hashed at once
# more than these shares of the validation split is no chance: windows of documents that are found, windows that are
SHARE, WINDOWS = 0.01, 0.1
BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
TOKEN = np.random.default_rng(64).integers(0, 2**64, 2**16, dtype=np.uint64)


def powers(base: int, n: int) -> np.ndarray:
    """base**0 to base**(n-1) modulo 2**64."""
    found = np.full(n, base, np.uint64)
    found[:1] = 1
    return np.cumprod(found, dtype=np.uint64)


UP, DOWN = (powers(b, BLOCK + WINDOW) for b in (BASE, pow(BASE, -1, 2**64)))


def hashes(tokens: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Hashes of tokens[begin:end], of up to BLOCK + WINDOW tokens."""
    sums = np.zeros(len(tokens) + 1, np.uint64)
    np.cumsum(TOKEN[tokens] * UP[: len(tokens)], out=sums[1:])
    return (sums[ends] - sums[begins]) * DOWN[begins]


def blocks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Blocks of a stream that overlap by a window less one."""
    for start in range(0, len(tokens), BLOCK):
        yield np.asarray(tokens[start : start + BLOCK + WINDOW - 1])


class Index(NamedTuple):
    """The windows of a validation split."""

    starts: np.ndarray  # [documents] first tokens
    document: np.ndarray  # [windows] number of the one that it is of
    whole: np.ndarray  # [windows] whether it is a document of up to 64 tokens
    hashes: np.ndarray  # [windows]
    tokens: int


def index(tokens: np.ndarray) -> Index:
    """The windows of a validation split [n], which memory holds."""
    first = np.flatnonzero(tokens == START)
    first = first if len(first) and first[0] == 0 else np.concatenate([[0], first])
    begins = first + (tokens[first] == START)
    ends = np.append(first[1:], len(tokens))
    counts = np.where(ends - begins > WINDOW, (ends - begins) // WINDOW, ends > begins)
    document = np.repeat(np.arange(len(first)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    low = begins[document] + number * WINDOW
    high = np.minimum(low + WINDOW, ends[document])
    found = np.zeros(len(low), np.uint64)
    for start in range(0, len(tokens), BLOCK):
        mine = (low >= start) & (low < start + BLOCK)
        part = np.asarray(tokens[start : start + BLOCK + WINDOW])
        found[mine] = hashes(part, low[mine] - start, high[mine] - start)
    return Index(first, document, high - low < WINDOW, found, len(tokens))


class Search:
    """Looks for the windows of a validation split in training text."""

    def __init__(self, val: Index) -> None:
        self.val = val
        self.keys, self.of = np.unique(val.hashes, return_inverse=True)
        self.sieve = np.zeros(2**24, bool)  # by the highest bits: most windows go no further
        self.sieve[self.keys >> np.uint64(40)] = True
        self.found = np.zeros(len(self.keys), bool)

    def take(self, tokens: np.ndarray) -> None:
        """Look through a training shard [n]."""
        for part in blocks(tokens):
            at = np.arange(max(0, len(part) - WINDOW + 1))
            self.look_up(hashes(part, at, at + WINDOW))
            edges = np.append(np.flatnonzero(part == START), len(part))
            short = np.flatnonzero((np.diff(edges) > 1) & (np.diff(edges) <= WINDOW))
            self.look_up(hashes(part, edges[short] + 1, edges[short + 1]))

    def look_up(self, some: np.ndarray) -> None:
        """Note which windows have these hashes."""
        some = some[self.sieve[some >> np.uint64(40)]]
        at = np.minimum(np.searchsorted(self.keys, some), len(self.keys) - 1)
        self.found[at[self.keys[at] == some]] = True

    def result(self) -> "Overlap":
        """What was found so far."""
        hit = self.found[self.of]
        windows = np.bincount(self.val.document, minlength=len(self.val.starts))
        hits = np.bincount(self.val.document, hit, minlength=len(self.val.starts))
        both = np.flatnonzero((hits > 0) & (3 * hits >= 2 * windows))
        of_both, n = windows[both].sum() / len(hit), len(self.val.starts)
        return Overlap(both, n, self.val.starts[both], float(of_both), float(hit.mean()))


class Overlap(NamedTuple):
    """Validation documents that the training text has."""

    both: np.ndarray  # their numbers, from 0
    documents: int  # of the validation split
    starts: np.ndarray  # first tokens of those in both
    share: float  # of the split's windows those of documents in both
    windows: float  # of the split's windows those that are found

    def too_much(self) -> bool:
        """Whether it is more than chance."""
        return self.share > SHARE or self.windows > WINDOWS

    def told(self) -> str:
        """In words."""
        first = ""
        if len(self.both):
            first = f"; the first is number {self.both[0]}, from token {self.starts[0]:,} on"
        return (
            f"{len(self.both):,} of {self.documents:,} validation documents, {100 * self.share:.2f} % of that text, and "
            f"{100 * self.windows:.2f} % of its windows of 64 tokens{first}"
        )


def shards(folder: Path, split: str) -> list[np.ndarray]:
    """Memory maps of a data set's shards."""
    paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
    return [np.memmap(path, "<u2", "r", 1024) for path in paths]


def compare(
    train: Sequence[np.ndarray], val: Sequence[np.ndarray], progress: Callable[[str], Any] = str
) -> Overlap:
    """What training shards have of the validation shards; progress is told how far it is."""
    search = Search(index(np.concatenate(val)))
    for k, shard in enumerate(train, 1):
        progress(f"looking for validation text in training shard {k} of {len(train)}")
        search.take(shard)
    return search.result()
