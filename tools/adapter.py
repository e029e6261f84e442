"""Somebody's evaluation behind an adapter, for tools/audit.py: a process of its own, with limits, and the verdict on it.

An adapter is a Python file that defines score(tokens) -> nats [n], of an array int64 [n+1]; and, if it likes,
  vocab_size    tokens are 0 to that less 1; else 256
  max_targets   targets of a stream, at most; else 1024
  boundaries    tokens that are the first to be scored after a window, batch, chunk or document ends
  tokens        text to try it on; else a stream is made up
  claims        the conditions that it says it breaks, "C1,C2"; else none
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import numpy as np

from tools import blackbox
from tools.console import BadInput

HOST = Path(__file__).with_name("adapter_host.py")
CHECKED = ("C1", "C2", "C4")
TARGETS = 1024  # of a stream, where neither the adapter nor the user says
ROUNDING = 1e-9  # nats by which a score in float64 may move as sums are taken in another order
POLL = 0.05  # seconds between looks at the memory


class Adapter:
    """An adapter's process. What it does wrong is a BadInput that names it."""

    def __init__(self, path: str, seconds: float, memory: float) -> None:
        """seconds for a call, and for the import; memory in GB."""
        if not Path(path).is_file():
            raise BadInput(
                f"--adapter {path}: no such file; give a file that defines score(tokens)."
            )
        self.path, self.seconds, self.memory = path, seconds, memory
        self.left = b""  # read, but not used
        self.process = subprocess.Popen(
            [sys.executable, str(HOST), path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.given = self.answer("its import")

    def close(self) -> None:
        """End the process, and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def refuse(self, what: str) -> None:
        """Raises BadInput."""
        raise BadInput(f"{self.path}: {what}.")

    def used(self) -> float:
        """GB of memory that the process holds; 0 where the system does not say."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError, ValueError):
            return 0.0
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e9

    def read(self, size: int, what: str, until: float) -> bytes:
        """So many bytes of the process's output, a line if size is 0; what: it is doing."""
        assert self.process.stdout
        while len(self.left) < size if size else b"\n" not in self.left:
            if perf_counter() > until:
                self.refuse(
                    f"{what} takes over {self.seconds:g} s; make it quicker, or --timeout longer"
                )
            if self.used() > self.memory:
                self.refuse(
                    f"{what} takes over {self.memory:g} GB; make it smaller, or --memory larger"
                )
            if select.select([self.process.stdout], [], [], POLL)[0]:
                data = os.read(self.process.stdout.fileno(), 2**20)
                if not data:
                    status = self.process.wait()
                    self.refuse(f"{what} ended its process with status {status}; it must return")
                self.left += data
        size = size or self.left.index(b"\n") + 1
        data, self.left = self.left[:size], self.left[size:]
        return data

    def answer(self, what: str) -> dict:
        """The next line of the process."""
        line = self.read(0, what, perf_counter() + self.seconds)
        try:
            row = json.loads(line)
        except ValueError:
            row = {
                "problem": "wrote into the pipe of its process; it must print to standard output or error"
            }
        if "problem" in row:
            self.refuse(row["problem"])
        return row

    def score(self, tokens: np.ndarray) -> np.ndarray:
        """Nats [n] of a stream [n+1]."""
        data = np.ascontiguousarray(tokens, np.int64)
        assert self.process.stdin
        try:
            self.process.stdin.write(len(data).to_bytes(8, "little") + data.tobytes())
            self.process.stdin.flush()
        except BrokenPipeError:
            self.refuse(f"its process ended with status {self.process.wait()}; it must stay")
        n = self.answer("score()")["nats"]
        return np.frombuffer(self.read(8 * n, "score()", perf_counter() + self.seconds))


def stream(adapter: Adapter, targets: int | None, seed: int) -> np.ndarray:
    """Tokens [n+1] to try an adapter on. Raises BadInput."""
    given = adapter.given
    most = given["max_targets"] or targets or TARGETS
    n = min(targets or most, most)
    text = given["tokens"]
    if text:
        n = min(n, len(text) - 1)
    if n < 32:
        adapter.refuse(
            f"has {n} targets in a stream; wanted are max_targets, and tokens, of 32 or more"
        )
    wrong = [b for b in given["boundaries"] if b < 1]
    if wrong:
        adapter.refuse(f"boundaries has {wrong[0]}; wanted are indices of tokens, from 1")
    rng = np.random.default_rng(seed)
    return np.array(text[: n + 1]) if text else blackbox.made_up(n, given["vocab_size"], rng)


def examine(
    adapter: Adapter, targets: int | None, probes: int, sums: int, seed: int
) -> blackbox.Box:
    """What is found out about an adapter. Raises BadInput."""
    tokens, V = stream(adapter, targets, seed), adapter.given["vocab_size"]
    marks = sorted({b for b in adapter.given["boundaries"] if b < len(tokens)})
    box = blackbox.Box(adapter.score, V, tokens, marks, seed)
    same(adapter, box, box.run(tokens), "the second time")
    same(adapter, box, elsewhere(adapter, box), "in a process that scored another stream first")
    box.examine(probes, sums)
    same(adapter, box, box.run(tokens), "after other streams")
    return box


def elsewhere(adapter: Adapter, box: blackbox.Box) -> np.ndarray:
    """Nats [n] of the stream in a process of its own, after one that begins in the same way.

    What is kept from the first call on, as weights that were fitted in it, is that one's there.
    """
    other = Adapter(adapter.path, adapter.seconds, adapter.memory)
    try:
        other.score(box.changed(np.arange(box.n // 2, box.n + 1)))
        return other.score(box.tokens)
    finally:
        other.close()


def same(adapter: Adapter, box: blackbox.Box, again: np.ndarray, when: str) -> None:
    """Raises BadInput if the same stream now has other nats."""
    moved = again != box.base
    if moved.any():
        size = np.nan_to_num(np.abs(again - box.base)[moved], nan=np.inf).max()
        adapter.refuse(
            f"score() gave {moved.sum()} of {box.n} targets other nats {when}, by up to {size:.1e}; wanted are the same "
            "for the same tokens: fix seeds, and keep nothing from call to call"
        )


def verdict(box: blackbox.Box, claims: list[str], sums: int) -> tuple[list[str], bool]:
    """(lines that say what was found, whether it is what is claimed)."""
    found = box.broken()
    tested, n = len(box.tested), box.n - 1
    size = max(box.moved.values(), default=0)
    text = f"no earlier nats moved with a token at {tested} of {n} places"
    if box.moved:
        text = f"earlier nats moved with {blackbox.named(box.moved)}, of {tested} tried, by up to {size:.1e}"
        if size < ROUNDING:
            text += ": as by rounding, of an FFT or a maximum over all the stream; take those of the past alone"
    lines = [told("C1 causal", "C1" in found, text)]
    if sums:
        uneven = {p: total for p, total in box.sums.items() if abs(total - 1) > blackbox.OFF}
        shown = ", ".join(f"{total:.4f} at token {p}" for p, total in sorted(uneven.items()))
        exactly = len(box.summed_exactly)
        text = f"probabilities sum to 1 at {exactly} places"
        if len(box.summed) > exactly:
            text += (
                f", and about to 1 at {len(box.summed) - exactly} where other changed tokens reach"
            )
        if uneven:
            text = f"probabilities sum to {shown}"
        lines += [told("C2 normalised", "C2" in found, text)]
        text = "; ".join(box.wrong) or f"all {box.n} nats are of their own tokens"
        lines += [told("C4 one pass", "C4" in found, text)]
    else:
        lines += [f"{'C2, C4':15} unchecked    with --sums 0"]
    if {"C1", "C2"} & set(found):
        follows = "open", "not settled where C1 or C2 fails"
    elif not sums:
        follows = "open", "follows from C1 and C2, of which C2 is unchecked"
    else:
        why = "what is fitted to a token changes no score of it or before it"
        follows = "follows", f"from C1 and C2, for a black box: {why}"
    lines.insert(-1, f"{'C3 score first':15} {follows[0]:12} {follows[1]}")
    if sums:
        below = (
            box.gap < -4 * box.gap_error - blackbox.OFF
        )  # a uniform score is at it, but for rounding
        lines += [
            f"{'floor':15} {'BELOW' if below else 'above':12} random tokens: ln V {box.gap:+.4f} +- {box.gap_error:.4f}"
        ]
    lines += [f"{'power':15} {'':12} {power(tested, n)}"]
    compared = [c for c in CHECKED if c in claims and (sums or c == "C1")]
    as_claimed = compared == found and (not sums or bool(compared) or not below)
    said = f"breaks {','.join(claims)}" if claims else "causal"
    words = ",".join(found) or ("causal" if sums else "causal as far as it was checked")
    if sums and below and not found:
        words = "below the floor"
    left = [c for c in claims if c not in compared]
    result = f"{','.join(left)} cannot be compared" if left else "as claimed"
    lines += [f"says: {said}; found: {words}; {result if as_claimed else 'NOT AS CLAIMED'}"]
    return lines, as_claimed


def told(what: str, wrong: bool, detail: str) -> str:
    """A line of the verdict."""
    return f"{what:15} {'BROKEN' if wrong else 'holds':12} {detail}"


def power(tested: int, n: int) -> str:
    """How likely a leak would have been found, in words."""
    counts = sorted({max(1, n // share) for share in (8, 64, 512)}, reverse=True)
    text = ", ".join(f"{k} of {n} places {blackbox.chance(k, tested, n):.3f}" for k in counts)
    return (
        "a look up to 16 tokens ahead that any other token shows, at so many places, would be found with"
        f" probability: {text}"
    )


def audit(
    path: str, targets: int | None, probes: int, sums: int, seconds: float, memory: float, seed: int
) -> int:
    """Print the verdict on an adapter; the exit status."""
    adapter = Adapter(path, seconds, memory)
    try:
        box = examine(adapter, targets, probes, sums, seed)
    finally:
        adapter.close()
    lines, as_claimed = verdict(box, adapter.given["claims"], sums)
    text = "its own text" if adapter.given["tokens"] else "a made-up stream"
    print(f"{path}: {box.n} targets of {text}, vocabulary {box.V}, {box.runs} runs, --seed {seed}")
    print("\n".join(lines))
    return int(not as_claimed)
