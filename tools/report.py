"""Read seed logs, ours and the lineage's: tables, significance, checks, submission.json, figures, and a running run.

    python tools/report.py LOG...                             per-seed table, mean and sample standard deviation
    python tools/report.py LOG... --update README.md          the same between <!-- NAMES --> and <!-- end --> of a file
    python tools/report.py LOG... --csv FILE --plot FIGURE --submission submission.json
    python tools/report.py LOG... --against OTHER...          is it better by 0.005 nats? one-sided Welch t-test; paired where nats were saved
    python tools/report.py LOG... --check                     what a reviewer looks at; a folder with README.md or submission.json is a record
    python tools/report.py --follow logs/RUN_ID.txt           a run that is running

A LOG is a file, or a folder logs/RUN_ID. Exit status: 0 well, 1 a check failed, 2 something is no log or cannot be done (the rest is still reported).
"""

import argparse
import csv
import gzip
import itertools
import json
import lzma
import math
import re
import shutil
import statistics
import sys
import time
from pathlib import Path

import figures
import numpy as np
from scipy import stats

from logs import STAGES, LogError, read_log

NAMES = dict(
    roundtrip="roundtrip",
    sliding_window="sliding",
    ttt="TTT",
    ttt_slot="TTT+SLOT",
    ttt_ctw="TTT+CTW",
    slot="SLOT",
    ctw="CTW",
)
MARGIN = 0.005  # nats by which a record must beat the last one
LIMIT, SECONDS = 16_000_000, 600


# ---- tables


def cells(log):
    """Column -> (number, text) of a log; a column that it says nothing of is missing."""
    found = {
        "steps": (log.steps, f"{log.steps:,}") if log.steps else None,
        "step average": (log.step_avg, f"{log.step_avg:.1f} ms") if log.step_avg else None,
    }
    scores = {
        "before averaging": log.prequant,
        "float": log.averaged,
        **{NAMES[s]: log.results.get(s) for s in STAGES},
    }
    found |= {name: (r.val_bpb, f"{r.val_bpb:.4f}") if r else None for name, r in scores.items()}
    found["evaluation"] = (
        (log.eval_seconds, f"{log.eval_seconds:.0f} s") if log.eval_seconds else None
    )
    found["artifact + code"] = (
        (log.total_bytes, f"{log.total_bytes:,} B") if log.total_bytes else None
    )
    return {name: cell for name, cell in found.items() if cell}


def table(logs):
    """Rows of text, the first the header: a row a log, then mean and sample standard deviation where there are several."""
    found = [cells(log) for log in logs]
    order = [
        "steps",
        "step average",
        "before averaging",
        "float",
        *NAMES.values(),
        "evaluation",
        "artifact + code",
    ]
    names = [name for name in order if any(name in row for row in found)]
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
            if n in ("before averaging", "float", *NAMES.values())
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
    lines, stages = [], [s for s in STAGES if any(s in log.results for log in logs)]
    leaks = {
        s: {r.breaks for log in logs if (r := log.results.get(s)) and r.causal is False}
        for s in stages
    }
    told = [
        f"{NAMES[s]} (breaks {' / '.join(sorted(b for b in leaks[s] if b)) or '?'})"
        for s in stages
        if leaks[s]
    ]
    if any(log.averaged and log.averaged.causal is False for log in logs):
        told.insert(0, "float, after training on the validation tokens (breaks C3)")
    unknown = any(r.causal is None for log in logs for r in log.results.values()) or not stages
    lines.append(
        "Bits a byte. "
        + (
            f"Not causal, no compression result: {', '.join(told)}. "
            if told
            else ""
            if unknown
            else "All causal. "
        )
        + "Evaluation: all stages together."
    )
    size = {
        (r.tokens, r.bytes) for log in logs for r in log.results.values() if r.tokens and r.bytes
    }
    lines += [f"{n:,} targets, {b:,} bytes of text scored." for n, b in sorted(size)]
    lines += [f"{log.path.name}: {text}." for log in logs for text in log.mislabelled]
    lines += [f"{log.path.name}: the run did not finish." for log in logs if not log.finished]
    lines += [
        f"{log.path.name}: {log.broken} lines are cut off or overwritten."
        for log in logs
        if log.broken
    ]
    return lines


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


def update(path, names, text):
    """Replace what stands between the markers of these logs in a file. Raises LogError if they are not there once."""
    old = Path(path).read_text()
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


# ---- significance


def common_stage(logs):
    """The last stage that all logs have. Raises LogError."""
    shared = [s for s in STAGES if all(s in log.results for log in logs)]
    scores = {log.score.stage for log in logs if log.score}
    if not shared:
        raise LogError("the logs have no score in common")
    return scores.pop() if len(scores) == 1 else shared[-1]


def welch(ours, theirs, margin):
    """(t, degrees of freedom, one-sided p) that ours [n] are lower than theirs [m] by more than margin; nan where a side has one value."""
    if min(len(ours), len(theirs)) < 2:
        return math.nan, math.nan, math.nan
    if not np.ptp(ours) and not np.ptp(theirs):
        gain = theirs[0] - margin - ours[0]
        return (
            math.copysign(math.inf, gain) if gain else 0.0,
            len(ours) + len(theirs) - 2,
            0.0 if gain > 0 else 1.0,
        )
    found = stats.ttest_ind(
        np.asarray(theirs) - margin, ours, equal_var=False, alternative="greater"
    )
    return float(found.statistic), float(found.df), float(found.pvalue)


def needed(ours, theirs, margin, level=0.01):
    """Seeds a side with which these means and deviations would give p < level; None if the means never do."""
    gain = statistics.mean(theirs) - statistics.mean(ours) - margin
    if gain <= 0 or min(len(ours), len(theirs)) < 2:
        return None
    variance = [statistics.variance(x) for x in (ours, theirs)]
    if not sum(variance):
        return 2

    def enough(n):
        freedom = (n - 1) * sum(variance) ** 2 / sum(v * v for v in variance)
        return stats.t.sf(gain / math.sqrt(sum(variance) / n), freedom) < level

    high = 2
    while not enough(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def nats(log, stage):
    """Nats of each target that a run saved with SAVE_NLL=1, or None."""
    path = log.path.with_suffix("") / f"nll_{stage}.npy"
    return np.load(path) if path.is_file() else None


def against(ours, theirs, stage=None):
    """Lines that compare two sets of logs."""
    of_ours, of_theirs = (stage or common_stage(group) for group in (ours, theirs))
    a, b = (
        [log.results[s].val_loss for log in group if s in log.results]
        for group, s in ((ours, of_ours), (theirs, of_theirs))
    )
    if not a or not b:
        raise LogError(f"no {stage} score on both sides")
    lines = [
        f"{NAMES[of_ours]}: {len(a)} seeds, mean {statistics.mean(a):.6f} nats; against {NAMES[of_theirs]}: {len(b)} seeds, mean "
        f"{statistics.mean(b):.6f}; difference {statistics.mean(a) - statistics.mean(b):+.6f}"
    ]
    for margin in (MARGIN, 0.0):
        t, freedom, p = welch(a, b, margin)
        enough = needed(a, b, margin)
        many = (
            f"{enough} seeds a side would give p < 0.01"
            if enough
            else "no number of seeds would show it"
        )
        lines.append(
            f"better by more than {margin:g} nats: "
            + (
                f"t {t:.2f}, {freedom:.1f} degrees of freedom, p {p:.2g} (Welch, one-sided); {many}"
                if not math.isnan(t)
                else "needs two seeds on each side"
            )
        )
    texts = [
        {(r.tokens, r.bytes) for log in group if (r := log.results.get(s))}
        for group, s in ((ours, of_ours), (theirs, of_theirs))
    ]
    if texts[0] != texts[1]:
        lines.append("The logs do not say that both sides scored the same text.")
    causal = [
        {log.results[s].causal for log in group}
        for group, s in ((ours, of_ours), (theirs, of_theirs))
    ]
    if causal[0] != causal[1]:
        lines.append(
            "Only one side is causal: the difference says nothing about which model compresses better."
        )
    return lines + paired(ours, theirs, of_ours, of_theirs)


def paired(ours, theirs, of_ours, of_theirs):
    """Lines of paired tests, seed by seed, over blocks of 1,024 targets, whose means are nearly independent."""
    lines = []
    for log in ours:
        other = next((o for o in theirs if o.seed == log.seed), None)
        a, b = nats(log, of_ours), nats(other, of_theirs) if other else None
        if a is None or b is None or len(a) != len(b):
            continue
        size = max(1, min(1024, len(a) // 8))
        d = (b - a)[: len(a) // size * size].reshape(-1, size).mean(1)
        error = d.std(ddof=1) / math.sqrt(len(d))
        p = float(stats.ttest_1samp(d, 0, alternative="greater").pvalue)
        lines.append(
            f"seed {log.seed}, paired over {len(d)} blocks of {size} targets: {-d.mean():+.6f} +- {error:.6f} nats, p {p:.2g}"
        )
    return lines


# ---- checks


def differing(logs):
    """Settings that differ between logs, but for seed and name."""
    free = {
        "SEED",
        "RUN_ID",
        "RESUME",
        "seed",
        "train_time",
        "step_avg",
        "val_loss",
        "val_bpb",
        "time",
        "elapsed",
        "loss",
        "epoch",
    }
    names = {n for log in logs for n in log.settings} - free
    found = sorted(n for n in names if len({log.settings.get(n) for log in logs}) > 1)
    others = {
        "bytes of code": lambda log: log.code_bytes,
        "parameters": lambda log: log.parameters,
        "number of ranks": lambda log: log.world_size,
        "hardware": lambda log: log.hardware,
        "stages": lambda log: tuple(log.results),
        "scored text": lambda log: tuple(
            sorted({(r.tokens, r.bytes) for r in log.results.values() if r.tokens})
        ),
    }
    return found + [name for name, value in others.items() if len({value(log) for log in logs}) > 1]


def check_logs(logs):
    """(what, verdict True, False or None for unknown, detail) of each check of the logs."""
    for log in logs:
        name, score = log.path.name, log.score
        yield (
            f"{name}: finished",
            log.finished and not log.errors,
            log.errors[0]
            if log.errors
            else "has a final score"
            if log.finished
            else "no final score",
        )
        seconds = log.train_seconds
        yield (
            f"{name}: training within {SECONDS} s",
            None if seconds is None else seconds <= SECONDS + 1,
            f"{seconds:.1f} s" if seconds else "not said",
        )
        seconds = log.eval_seconds
        yield (
            f"{name}: all evaluation stages within {SECONDS} s",
            None if seconds is None else seconds <= SECONDS,
            f"{seconds:.1f} s together" if seconds else "not said",
        )
        yield (
            f"{name}: artifact + code under {LIMIT:,} bytes",
            None if log.total_bytes is None else log.total_bytes < LIMIT,
            f"{log.total_bytes:,}" if log.total_bytes else "not said",
        )
        repeated = sorted({label for label in log.lines if log.lines.count(label) > 1})
        yield (
            f"{name}: one number a label",
            not repeated,
            f"twice or more: {', '.join(repeated)}" if repeated else f"{len(log.lines)} labels",
        )
        yield (
            f"{name}: labels say what they are",
            not log.mislabelled,
            "; ".join(log.mislabelled) or "all",
        )
        if log.prequant_ttt:
            yield (
                f"{name}: no training on validation tokens before scoring",
                False,
                f"{log.prequant_seconds:.1f} s of it, counted as evaluation",
            )
        if score:
            yield f"{name}: the score is finite", math.isfinite(score.val_bpb), f"{score.val_bpb}"
            yield (
                f"{name}: the score is causal",
                score.causal,
                f"{NAMES[score.stage]} {score.val_bpb:.8f}"
                + (f" breaks {score.breaks}" if score.breaks else ""),
            )
    if len(logs) > 1:
        differ = differing(logs)
        yield (
            "settings equal over seeds",
            not differ,
            ", ".join(differ) or f"{len(logs[0].settings)} settings",
        )
    seeds = [log.seed for log in logs]
    if len(logs) > 1:
        yield (
            "seeds differ",
            None if None in seeds else len(set(seeds)) == len(seeds),
            ", ".join(map(str, seeds)),
        )
    yield "three seeds", None if None in seeds else len(set(seeds)) >= 3, f"{len(logs)} logs"


SKIP = object()
HEADINGS = (  # heading of a table in somebody's README -> what a log says of it, most special first; SKIP: not compared
    (r"gain|delta|Δ|\+/-|param|notes?$|time|seconds|hardware|gpu", SKIP),
    (r"step.?_?(avg|average|time)|\bms\b", lambda log: log.step_avg),
    (r"\bsteps?\b", lambda log: log.steps),
    (r"pre.?(quant|avg|average)", lambda log: log.prequant.val_bpb),
    (r"round.?trip", lambda log: log.results["roundtrip"].val_bpb),
    (r"pre.?ttt|sliding", lambda log: log.results["sliding_window"].val_bpb),
    (r"artifact|bytes|size", lambda log: log.total_bytes),
    (r"val.?loss|nats", lambda log: log.score.val_loss),
    (r"ttt|slot|bpb|score", lambda log: log.score.val_bpb),
)


def getter(title, titles):
    """Function of a log that gives the number a column is about, or SKIP: our own tables' columns by name, others by what they are like."""
    own = {
        name.lower(): name
        for name in (
            "steps",
            "step average",
            "before averaging",
            "float",
            *NAMES.values(),
            "evaluation",
            "artifact + code",
        )
    }
    name = title.lower()
    if name in own and "roundtrip" in titles:
        return lambda log: cells(log)[own[name]][0]
    return next((find for pattern, find in HEADINGS if re.search(pattern, name)), SKIP)


def compare(where, title, told, values):
    """(what, verdict, detail) of a cell against the numbers that the logs allow, None if it says no number."""
    number = re.search(r"-?\d[\d,]*\.?\d*", told)
    if number is None or not values:
        return None
    unit = re.search(r"\b([KM])i?B\b", f"{told} {title}", re.I)
    scale = {None: 1, "K": 1e3, "M": 1e6}[unit[1].upper() if unit else None]
    digits, plain = len(number[0].partition(".")[2]), number[0].replace(",", "")
    shown = [f"{value / scale:.{digits}f}" for value in values]
    return (
        f"README, {where}, {title}",
        plain in shown,
        f"{number[0]}, the log says {' or '.join(f'{v / scale:,.{digits}f}' for v in values)}",
    )


def tables(text, logs):
    """(header, rows, logs) of each table that has a column of seeds. Between <!-- NAMES --> and <!-- end --> it is about the logs of these names."""
    header, rows, mine, about = None, [], logs, logs
    for line in [*text.splitlines(), ""]:
        marker = re.fullmatch(r"<!-- (.*?) -->", line.strip())
        if marker:
            named = [log for log in logs if log.path.stem in marker[1].split()]
            mine = (
                named
                if named and len(named) == len(marker[1].split())
                else []
                if marker[1] != "end" and named
                else logs
            )
        cells_ = (
            [cell.strip(" *`") for cell in line.strip().strip("|").split("|")]
            if line.strip().startswith("|")
            else []
        )
        if header and not cells_:
            yield header, rows, about
            header = None
        elif any(re.fullmatch("seeds?", cell, re.I) for cell in cells_):
            header, rows, about = cells_, [], mine
        elif header and len(cells_) == len(header) and not set("".join(cells_)) <= set("-: "):
            rows.append(cells_)


def numbers(find, logs):
    """What find gives of each log that has it."""
    found = []
    for log in logs:
        try:
            found.append(find(log))
        except (KeyError, AttributeError):
            continue
    return [value for value in found if value is not None]


def check_readme(text, logs):
    """Checks of a README's tables of seeds: each cell against the log of its seed, means and deviations against all of the table's logs."""
    seen = 0
    for header, rows, mine in tables(text, logs):
        column = next(i for i, cell in enumerate(header) if re.fullmatch("seeds?", cell, re.I))
        told = [re.fullmatch(r"\D*(\d+)\D*", row[column]) for row in rows]
        group = [log for log in mine if any(m and int(m[1]) == log.seed for m in told)]
        for row, seed in zip(rows, told):
            statistic = next(
                (
                    f
                    for word, f in (
                        ("mean", np.mean),
                        ("avg", np.mean),
                        ("average", np.mean),
                        ("std", lambda v: np.std(v, ddof=1)),
                    )
                    if re.search(rf"\b{word}\b", row[column], re.I)
                ),
                None,
            )
            found = [log for log in mine if seed and log.seed == int(seed[1])]
            if seed and not found:
                yield f"README, seed {seed[1]}", False, "no log of this seed"
            for title, cell in zip(header, row):
                find = SKIP if header.index(title) == column else getter(title, header)
                values = [] if find is SKIP else numbers(find, group if statistic else found)
                if statistic and values:
                    values = (
                        [float(statistic(values))]
                        if len(values) > (statistic not in (np.mean,))
                        else []
                    )
                verdict = compare(
                    f"seed {seed[1]}" if seed else row[column], title, cell, sorted(set(values))
                )
                if verdict and (found or statistic):
                    seen += 1
                    yield verdict
    yield "README has a table of seeds", seen > 0, f"{seen} cells compared"


def check_submission(found, logs):
    """Checks of submission.json against the logs: the scores as means of one stage, then everything that the logs themselves would say."""
    if not isinstance(found, dict):
        yield "submission.json is an object", False, type(found).__name__
        return
    shared = [s for s in STAGES if logs and all(s in log.results for log in logs)]
    means = {
        s: {
            key: float(np.mean([getattr(log.results[s], key) for log in logs]))
            for key in ("val_loss", "val_bpb")
        }
        for s in shared
    }
    told = {key: found.get(key, found.get(f"mean_{key}")) for key in ("val_loss", "val_bpb")}
    told = {key: value for key, value in told.items() if isinstance(value, (int, float))}
    stage = next(
        (
            s
            for s in shared
            if found.get("metric") in (s, NAMES[s], *(log.results[s].label for log in logs))
        ),
        None,
    )
    if stage is None and told and means:
        key = "val_bpb" if "val_bpb" in told else "val_loss"
        stage = min(means, key=lambda s: abs(means[s][key] - told[key]))
    for key in ("val_loss", "val_bpb"):
        if key not in told or stage is None:
            yield (
                f"submission.json: {key}",
                None,
                "not said as a number" if stage else "the logs have no score in common",
            )
            continue
        digits = len(str(told[key]).partition(".")[2])
        yield (
            f"submission.json: {key}",
            abs(means[stage][key] - told[key]) <= 0.6 * 10 ** -min(digits, 8),
            f"{told[key]}, the mean of {NAMES[stage]} is {means[stage][key]:.8f}",
        )
    if stage and "causal" in found:
        causal = all(log.results[stage].causal for log in logs)
        yield (
            "submission.json: causal",
            found["causal"] == causal,
            f"{found['causal']}, {NAMES[stage]} is {'' if causal else 'not '}causal",
        )
    try:
        expected = submission(logs)
    except LogError:
        expected = {
            key: max(
                (getattr(log, key.replace("bytes_", "") + "_bytes") or 0 for log in logs), default=0
            )
            or None
            for key in ("bytes_total", "bytes_code")
        }
    if expected.get("metric") not in (None, *(log.results[stage].label for log in logs if stage)):
        expected = {
            key: expected[key] for key in ("bytes_total", "bytes_code", "seeds")
        }  # the file is about another stage than we would choose
    for key in (
        "val_loss_std",
        "val_bpb_std",
        "seeds",
        "seed_results",
        "bytes_total",
        "bytes_code",
        "hardware",
        "pytorch_version",
        "compliance",
    ):
        if key in found and expected.get(key) is not None:
            near = (
                isinstance(expected[key], float)
                and isinstance(found[key], float)
                and abs(found[key] - expected[key]) < 6e-5
            )
            what = "largest in the logs is" if key.startswith("bytes") else "logs say"
            yield (
                f"submission.json: {key}",
                near or found[key] == expected[key],
                f"{found[key]}, the {what} {expected[key]}",
            )


def check(paths, logs):
    """Print one line a check; 1 if one failed."""
    verdicts = list(check_logs(logs)) if logs else [("logs", False, "there are none")]
    for folder in (Path(p) for p in paths if is_record(p)):
        for name in ("README.md", "submission.json", "train_gpt.py"):
            there = (folder / name).is_file()
            verdicts.append(
                (
                    f"{folder.name} has {name}",
                    there,
                    f"{(folder / name).stat().st_size:,} bytes" if there else "missing",
                )
            )
        if (folder / "train_gpt.py").is_file():
            size = (folder / "train_gpt.py").stat().st_size
            told = {log.code_bytes for log in logs}
            verdicts.append(
                (
                    "train_gpt.py is what the logs counted",
                    told == {size},
                    f"{size:,} bytes, the logs say {', '.join(map(str, told))}",
                )
            )
        if (folder / "README.md").is_file():
            verdicts += check_readme((folder / "README.md").read_text(errors="replace"), logs)
        if (folder / "submission.json").is_file():
            try:
                verdicts += check_submission(
                    json.loads((folder / "submission.json").read_text()), logs
                )
            except ValueError as why:
                verdicts.append(("submission.json is JSON", False, str(why)))
    for what, verdict, detail in verdicts:
        print(f"{'ok  ' if verdict else '??  ' if verdict is None else 'FAIL'}  {what}: {detail}")
    return int(any(verdict is False for _, verdict, _ in verdicts))


def is_record(path):
    """Whether a path is the folder of a record."""
    return any((Path(path) / name).is_file() for name in ("README.md", "submission.json"))


# ---- submission.json


def submission(logs, author=None, github_id=None, date=None, name=None, track=None, blurb=None):
    """The fields of submission.json that the logs bear out, None where they do not say. The score is the best stage that is causal. Raises LogError."""
    differ = differing(logs)
    if differ:
        raise LogError(
            f"not one configuration: {', '.join(differ)} differ between {', '.join(log.path.name for log in logs)}"
        )
    stages = [s for s in STAGES if all(s in log.results and log.results[s].causal for log in logs)]
    if not stages:
        raise LogError("no causal score that all logs have")
    seeds = [log.seed for log in logs]
    if None in seeds or len(set(seeds)) < len(seeds):
        raise LogError(f"seeds must be known and different, they are {', '.join(map(str, seeds))}")
    if not all(math.isfinite(log.results[s].val_bpb) for log in logs for s in stages):
        raise LogError("a score is not finite")
    stage = min(stages, key=lambda s: statistics.mean(log.results[s].val_bpb for log in logs))
    values = {
        key: [getattr(log.results[stage], key) for log in logs] for key in ("val_loss", "val_bpb")
    }

    def every(value, test):
        found = [value(log) for log in logs]
        return None if any(x is None for x in found) else all(map(test, found))

    machines = {
        log.hardware
        and f"{log.hardware}, {log.world_size} process{'es' * ((log.world_size or 1) > 1)}"
        for log in logs
    }
    versions = {log.torch for log in logs}
    return {
        "name": name,
        "author": author,
        "github_id": github_id,
        "date": date,
        "track": track,
        "blurb": blurb,
        **{key: round(statistics.mean(v), 8) for key, v in values.items()},
        **{
            key + "_std": round(statistics.stdev(v), 8) if len(v) > 1 else None
            for key, v in values.items()
        },
        "std_ddof": 1,
        "metric": logs[0].results[stage].label,
        "causal": True,
        "seeds": [log.seed for log in logs],
        "seed_results": {
            str(log.seed): {key: getattr(log.results[stage], key) for key in values} for log in logs
        },
        **{
            f"bytes_{key}": max(found)
            if all(found := [getattr(log, f"{key}_bytes") for log in logs])
            else None
            for key in ("total", "code")
        },
        "hardware": machines.pop() if len(machines) == 1 else None,
        "pytorch_version": versions.pop() if len(versions) == 1 else None,
        "compliance": {
            "train_under_600s": every(lambda log: log.train_seconds, lambda s: s <= SECONDS + 1),
            "eval_under_600s": every(lambda log: log.eval_seconds, lambda s: s <= SECONDS),
            "artifact_under_16mb": every(lambda log: log.total_bytes, lambda n: n < LIMIT),
            "score_first": stage.startswith("ttt") or None,
            "causal": True,
            "three_seeds": len({log.seed for log in logs}) >= 3,
            "one_configuration": True,
        },
    }


# ---- a running run


def status_line(log, width):
    """One line on a run: a bar, step or stage, loss, tokens a second, time left."""
    total, step = log.iterations or int(log.settings.get("ITERATIONS", 0)), log.last_step
    cap = (
        float(
            log.settings.get("MAX_WALLCLOCK_SECONDS", log.settings.get("max_wallclock_seconds", 0))
        )
        or math.inf
    )
    scores = "  ".join(f"{NAMES[s]} {r.val_bpb:.4f}" for s, r in log.results.items())
    if log.finished or log.errors or log.stopped:
        return (
            log.errors[-1]
            if log.errors
            else "stopped by a signal; RESUME=1 goes on"
            if log.stopped
            else "done: " + scores
        )[:width]
    if log.averaged or log.results:
        found = re.search(r"progress:(\S+) window:(\d+)/(\d+).* seconds:([\d.]+)", log.progress)
        under_way = ""
        if found and found[1].split("+")[-1] not in log.results and int(found[2]):
            share = int(found[2]) / int(found[3])
            under_way = f"  {found[1]} {100 * share:.0f} %  {float(found[4]) * (1 - share) / share:,.0f} s left"
        return (f"evaluating  {scores}{under_way}")[:width]
    if not step or not total:
        return "starting"
    at = np.searchsorted(log.train[:, 0], step)
    seconds = log.train[at, 2] / 1000
    share = max(step / total, seconds / cap)
    left = min((total - step) * seconds / step, cap - seconds)
    tokens = (log.batch_tokens or 0) * step / max(seconds, 1e-9)
    text = f" {100 * share:3.0f} %  step {step}/{total}  loss {log.train[at, 1]:.4f}  {tokens:,.0f} tokens/s  {left:,.0f} s left"
    bar = max(0, min(30, width - len(text) - 2))
    return ("[" + "#" * round(bar * share) + "." * (bar - round(bar * share)) + "]" + text)[:width]


def follow(path, pause=2.0, out=sys.stdout):
    """Show a run until it ends: one line that is written over on a terminal, a new line when it changed elsewhere."""
    last, tty, silent = None, out.isatty(), 60
    while True:
        try:
            log = read_log(path)
            line = status_line(log, shutil.get_terminal_size((100, 20)).columns - 1)
        except LogError as why:
            if not Path(path).exists():
                raise
            log, line = (
                None,
                "starting" if "no line" in str(why) or "empty" in str(why) else str(why),
            )
        if (
            log
            and time.time() - log.path.stat().st_mtime > silent
            and not (log.finished or log.errors or log.stopped)
        ):
            line += "  (nothing new for a minute: killed?)"
        if line != last:
            print(("\r\x1b[K" if tty else "") + line, end="" if tty else "\n", file=out, flush=True)
        last = line
        if log and (log.finished or log.errors or log.stopped):
            print(file=out) if tty else None
            return
        time.sleep(pause)


# ---- command line


def expand(paths):
    """Log files of paths: a record's folder stands for the logs in it."""
    for path in map(Path, paths):
        if path.is_dir() and is_record(path):
            found = sorted(
                p
                for p in [
                    *path.glob("*.log"),
                    *path.glob("*.txt"),
                    *path.glob("logs/*.txt"),
                    *path.glob("logs/*.log"),
                ]
                if p.name != "requirements.txt"
            )
            yield from found if found else [path / "train.log"]
        else:
            yield path


def read_all(paths):
    """(logs, whether all could be read); says of each that could not why. A log and its folder are one."""
    logs, well = [], True
    for path in expand(paths):
        try:
            log = read_log(path)
            if log.path not in [other.path for other in logs]:
                logs.append(log)
        except LogError as why:
            print(f"error: {why}", file=sys.stderr)
            well = False
    return logs, well


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "logs",
        nargs="*",
        metavar="LOG",
        help="a log file, a folder logs/RUN_ID, or a record's folder",
    )
    parser.add_argument("--against", nargs="+", metavar="OTHER", help="logs to be better than")
    parser.add_argument(
        "--stage",
        choices=STAGES,
        help="the score that --against compares (default: each side's last)",
    )
    parser.add_argument(
        "--check", action="store_true", help="what a reviewer looks at, one line each"
    )
    parser.add_argument(
        "--update",
        metavar="FILE",
        help="put the table between <!-- NAMES --> and <!-- end --> of a file",
    )
    parser.add_argument("--csv", metavar="FILE", help="write the table as CSV")
    parser.add_argument("--plot", metavar="FIGURE", help="write FIGURE.png and FIGURE.svg")
    parser.add_argument("--submission", metavar="FILE", help="write submission.json")
    for name in ("name", "author", "github-id", "date", "track", "blurb"):
        parser.add_argument(
            f"--{name}", help=f"{name} in submission.json (default: what the file says, or null)"
        )
    parser.add_argument(
        "--scale",
        action="store_true",
        help="beside the scores what gzip and xz make of the validation text",
    )
    parser.add_argument("--follow", metavar="LOG", help="show a running run")
    return parser.parse_args(argv)


def write_submission(logs, options):
    """Write submission.json, keeping what only people know from the file that is there."""
    path = Path(options.submission)
    words = ("name", "author", "github_id", "date", "track", "blurb")
    old = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(
        json.dumps(
            submission(logs, **{w: getattr(options, w) or old.get(w) for w in words}),
            indent=2,
            allow_nan=False,
        )
        + "\n"
    )


def main(argv=None):
    """The exit status."""
    options = parse(argv)
    if options.follow:
        try:
            follow(options.follow)
        except LogError as why:
            print(f"error: {why}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print()
        return 0
    if not options.logs:
        print("error: give a log; see --help", file=sys.stderr)
        return 2
    logs, well = read_all(options.logs)
    try:
        if logs:
            rows = table(logs)
            print("\n".join([*markdown(rows), *notes(logs)]))
            if options.scale:
                print(
                    "\n".join(
                        f"{name} on the same text: {bpb:.4f}" for name, bpb in compressors(logs[0])
                    )
                )
        if options.update:
            update(
                options.update,
                [log.path.stem for log in logs],
                "\n".join([*markdown(rows), "", *notes(logs), ""]),
            )
        if options.csv:
            with open(options.csv, "w", newline="") as file:
                csv.writer(file).writerows(rows)
        if options.plot:
            figures.draw(logs, options.plot)
        if options.against:
            others, fine = read_all(options.against)
            well &= fine
            print("\n".join(against(logs, others, options.stage)))
        if options.submission:
            write_submission(logs, options)
    except (LogError, OSError, ValueError) as why:
        print(f"error: {why}", file=sys.stderr)
        well = False
    failed = check(options.logs, logs) if options.check else 0
    return 2 if not well else failed


if __name__ == "__main__":
    sys.exit(main())
