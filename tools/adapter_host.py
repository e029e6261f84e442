"""The process in which somebody's adapter runs, for tools/adapter.py: python tools/adapter_host.py FILE. Needs numpy alone.

In, on standard input: a stream as 8 bytes, the number of tokens, and the tokens, all int64. Out, on standard output: a line of
JSON, and after {"nats": n} as many float64. First of all comes what the adapter defines besides score(). What the adapter itself
prints goes to standard error.
"""

import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path

import numpy as np

CONDITIONS = ("C1", "C2", "C3", "C4")
GIVEN = (("vocab_size", 256, 2, 2**20), ("max_targets", 0, 0, 2**31))  # default, bounds


def told(why, path):
    """An exception in words, with the adapter's line that it came from."""
    lines = [f.lineno for f in traceback.extract_tb(why.__traceback__) if f.filename == str(path)]
    at = f" in line {lines[-1]}" if lines else ""
    return f"raised {type(why).__name__}{at}: {' '.join(str(why).split())[:200]}"


def integer(name, value, low, high):
    """An integer that the adapter defines. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name} is {type(value).__name__}; wanted is an integer")
    if not low <= value <= high:
        raise ValueError(f"{name} = {value}; wanted is an integer from {low} to {high}")
    return int(value)


def integers(name, value):
    """A list of integers that the adapter defines. Raises ValueError."""
    try:
        found = np.asarray(value)
    except (ValueError, TypeError):
        found = np.array("none")
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ValueError(f"{name} is no list of integers; wanted are indices of tokens")
    return found.astype(np.int64).tolist()


def definitions(module):
    """What the adapter defines besides score(). Raises ValueError."""
    if not callable(getattr(module, "score", None)):
        raise ValueError("defines no function score(tokens), which returns nats [n]")
    found = {name: integer(name, getattr(module, name, d), a, b) for name, d, a, b in GIVEN}
    for name in ("boundaries", "tokens"):
        found[name] = integers(name, getattr(module, name, []))
    claims = getattr(module, "claims", [])
    claims = claims.replace(",", " ").split() if isinstance(claims, str) else list(claims)
    if not all(claim in CONDITIONS for claim in claims):
        raise ValueError(f"claims = {claims!r}; wanted are the conditions it breaks, of C1 to C4")
    wrong = [x for x in found["tokens"] if not 0 <= x < found["vocab_size"]]
    if wrong:
        raise ValueError(f"tokens has {wrong[0]}; vocab_size = {found['vocab_size']}")
    return {**found, "claims": sorted(set(claims))}


def checked(nats, n):
    """What score() returned, as float64 [n]. Raises ValueError."""
    if hasattr(nats, "detach"):  # of torch
        nats = nats.detach().cpu().numpy()
    wanted = f"wanted are nats [{n}] in float64 or float32"
    if not isinstance(nats, np.ndarray) or nats.dtype not in (np.float64, np.float32):
        kind = nats.dtype if isinstance(nats, np.ndarray) else type(nats).__name__
        raise ValueError(f"score() returned {kind}; {wanted}")
    if nats.shape != (n,):
        shape = ",".join(map(str, nats.shape))
        raise ValueError(f"score() returned [{shape}]; {wanted}")
    wrong = np.flatnonzero(np.isnan(nats) | (nats == -np.inf))
    if len(wrong):
        raise ValueError(f"score() returned {nats[wrong[0]]} for target {wrong[0]}; {wanted}")
    return nats.astype(np.float64)


def main(path):
    """Serve streams until there is no more to come."""
    out = os.fdopen(os.dup(1), "wb")
    streams = os.fdopen(os.dup(0), "rb")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def answer(row, data=b""):
        out.write(json.dumps(row).encode() + b"\n" + data)
        out.flush()

    sys.path[0] = str(path.resolve().parent)
    sys.argv = [str(path)]
    try:
        spec = importlib.util.spec_from_file_location("adapter", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["adapter"] = module
        spec.loader.exec_module(module)
        answer(definitions(module))
        while head := streams.read(8):
            tokens = np.frombuffer(streams.read(8 * int.from_bytes(head, "little")), np.int64)
            nats = checked(module.score(tokens.copy()), len(tokens) - 1)
            answer({"nats": len(nats)}, nats.tobytes())
    except ValueError as why:
        own = why.__traceback__.tb_next and str(path) in {
            f.filename for f in traceback.extract_tb(why.__traceback__)
        }
        answer({"problem": told(why, path) if own else str(why)})
    except BaseException as why:  # of the adapter, and so of any kind
        answer({"problem": told(why, path)})
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
