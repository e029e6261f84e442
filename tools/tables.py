"""Tables of seed logs: a row a seed with mean and deviation, the sentences under it, and what general compressors make of the text."""

import contextlib
import gzip
import itertools
import lzma
import re
from pathlib import Path

import numpy as np

from tools import console
from tools.lines import OWN_LABEL, STAGE_TABLE
from tools.logs import STAGES, LogError


class Names(dict):
    """What tables call a stage; one that is not known keeps the name that its log has for it."""

    def __missing__(self, stage):
        return stage


NAMES = Names((s, next(row.name for row in STAGE_TABLE if row.key == s)) for s in STAGES)
DEMO = {"PRESET": "demo", "ITERATIONS": "400", "MAX_WALLCLOCK_SECONDS": "150.0"}  # make demo


def cells(log):
    """Column -> (number, text) of a log; a column that it says nothing of is missing."""
    found = {
        "steps": (log.steps, f"{log.steps:,}") if log.steps else None,
        "step average": (log.step_avg, f"{log.step_avg:.1f} ms") if log.step_avg else None,
    }
    scores = {
        "before averaging": log.prequant,
        "float": log.averaged,
        **{NAMES[s]: log.results.get(s) for s in [*STAGES, *log.results]},
    }
    found |= {name: (r.val_bpb, f"{r.val_bpb:.4f}") if r else None for name, r in scores.items()}
    found["evaluation"] = (
        (log.eval_seconds, f"{log.eval_seconds:.0f} s") if log.eval_seconds else None
    )
    found["artifact + code"] = size(log)
    return {name: cell for name, cell in found.items() if cell}


def size(log):
    """(bytes, text) of artifact and code together, or None."""
    if log.total_bytes:
        return log.total_bytes, f"{log.total_bytes:,} B"
    return (log.rounded_bytes, f"{log.rounded_bytes / 1e6:.2f} MB") if log.rounded_bytes else None


# Columns of our own tables of seeds, in order.
COLUMNS = (
    "steps",
    "step average",
    "before averaging",
    "float",
    *NAMES.values(),
    "evaluation",
    "artifact + code",
)


def table(logs):
    """Rows of text, the first the header: a row a log, then mean and sample standard deviation where there are several."""
    found = [cells(log) for log in logs]
    others = [NAMES[s] for log in logs for s in log.results if s not in STAGES]
    at = COLUMNS.index("evaluation")
    known = dict.fromkeys([*COLUMNS[:at], *others, *COLUMNS[at:]])
    names = [name for name in known if any(name in row for row in found)]
    rows = [["seed", *names]]
    rows += [
        [
            "?" if log.seed is None else str(log.seed),
            *(row[n][1] if n in row else "-" for n in names),
        ]
        for log, row in zip(logs, found)
    ]
    if len(logs) > 1:
        columns = [[row[n][0] for row in found if n in row] for n in names]
        digits = [
            4
            if n in ("before averaging", "float", *NAMES.values(), *others)
            else 1
            if n in ("step average", "evaluation")
            else 0
            for n in names
        ]
        rows.append(["mean", *(f"{np.mean(c):,.{d}f}" for c, d in zip(columns, digits))])
        rows.append(
            [
                "std",
                *(
                    f"{np.std(c, ddof=1):,.{d + (d == 4)}f}" if len(c) > 1 else "-"
                    for c, d in zip(columns, digits)
                ),
            ]
        )
    return rows


def markdown(rows):
    """Rows as a Markdown table that reads well as text too."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def notes(logs):
    """Sentences under a table: what is not causal, what was evaluated, what is odd."""
    lines = [causality(logs)]
    size = {
        (r.tokens, r.bytes) for log in logs for r in log.results.values() if r.tokens and r.bytes
    }
    lines += [f"{n:,} targets, {b:,} bytes of text scored." for n, b in sorted(size)]
    lines += [f"{log.title}: {text}." for log in logs for text in log.mislabelled]
    lines += [f"{log.title}: warning: {w}." for log in logs for w in log.warnings.values()]
    lines += [f"{log.title}: the run did not finish." for log in logs if not log.finished]
    lines += [f"{log.title}: an evaluation alone." for log in logs if not log.trained]
    lines += [time_cap(log) for log in logs if log.capped and log.steps and log.iterations]
    lines += [
        f"{log.title}: {log.broken} lines are cut off or overwritten." for log in logs if log.broken
    ]
    return lines


def causality(logs):
    """The first sentence under a table: which scores are causal, and which are not."""
    stages = list(dict.fromkeys([*STAGES, *(s for log in logs for s in log.results)]))
    scores = [r for log in logs for r in log.results.values()]
    leaks = {s: {r.breaks for r in scores if r.stage == s and r.causal is False} for s in stages}
    told = [
        f"{NAMES[s]} (breaks {' / '.join(sorted(b for b in leaks[s] if b)) or '?'})"
        for s in stages
        if leaks[s]
    ]
    if any(log.averaged and log.averaged.causal is False for log in logs):
        told.insert(0, "float, after training on the validation tokens (breaks C3)")
    unknown = [NAMES[s] for s in stages if any(r.stage == s and r.causal is None for r in scores)]
    sentences = ["Bits a byte."]
    if told:
        sentences.append(f"Not causal, no compression result: {', '.join(told)}.")
    if unknown:
        sentences.append(f"Not known to be causal: {', '.join(unknown)}.")
    if any(r.causal and r.how != OWN_LABEL for r in scores):
        which = "The others are" if told or unknown else "All are"
        sentences.append(f"{which} causal by their names; their logs do not show it.")
    elif scores and not told and not unknown:
        sentences.append("All causal.")
    return " ".join([*sentences, "Evaluation: all stages together."])


def time_cap(log):
    """Sentence on a run that its time cap ended; make demo's steps fit into its cap unless the machine is slow or busy."""
    told = f"{log.title}: stopped by the time cap at {log.steps:,} of {log.iterations:,} steps"
    if all(log.settings.get(name) == value for name, value in DEMO.items()):
        told += ": the machine was too slow or busy, the scores are not comparable with the committed ones"
    return told + "."


def compressors(log):
    """(name, bits a byte) of general compressors on the validation text of a run of ours, [] if its shards or tokenizer are not here."""
    import sentencepiece

    shards = sorted(Path(log.settings.get("DATA_PATH", "-")).glob("fineweb_val_*.bin"))
    if not shards or not Path(log.settings["TOKENIZER_PATH"]).is_file():
        return []
    tokens, window = (
        np.concatenate([np.fromfile(p, "<u2")[512:] for p in shards]),
        int(log.settings["EVAL_SEQ_LEN"]),
    )
    tokens = tokens[: (len(tokens) - 1) // window * window + 1].tolist()
    sp = sentencepiece.SentencePieceProcessor(model_file=log.settings["TOKENIZER_PATH"])
    starts = [i for i, token in enumerate(tokens) if token == sp.bos_id()] + [len(tokens)]
    starts = starts if starts[0] == 0 else [0, *starts]  # the stream may begin inside a document
    pieces = [
        [token for token in tokens[a:b] if not sp.is_control(token)]
        for a, b in itertools.pairwise(starts)
    ]
    text = "".join(map(sp.decode, pieces)).encode()
    sizes = {"gzip -9": len(gzip.compress(text, 9)), "xz -9": len(lzma.compress(text, preset=9))}
    return [(name, 8 * size / len(text)) for name, size in sizes.items()]


def read_nats(path):
    """Nats of each target, as a run with SAVE_NLL=1 saved them. Raises LogError."""
    found = None
    with contextlib.suppress(OSError, EOFError, ValueError):
        found = np.load(path)
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind != "f":
        raise LogError(f"{path}: is no array of nats; bring it back, or move it away.")
    return found


def update(path, names, text):
    """Replace what stands between the markers of these logs in a file. Raises LogError if they are not there once."""
    old = console.read_text(Path(path))
    new, count = re.subn(
        rf"(<!-- {re.escape(' '.join(names))} -->\n).*?(<!-- end -->)",
        lambda m: m[1] + text + m[2],
        old,
        flags=re.S,
    )
    if count != 1:
        raise LogError(
            f"{path}: needs the markers <!-- {' '.join(names)} --> and <!-- end --> once, has them {count} times"
        )
    Path(path).write_text(new)
