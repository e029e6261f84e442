"""What a reviewer looks at, a line each: the logs, and a README's tables and submission.json against them."""

import json
import math
import re
from pathlib import Path

import numpy as np

from tools.logs import STAGES, LogError
from tools.submission import LIMIT, SECONDS, differing, submission
from tools.tables import NAMES, cells


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
            named = [log for log in logs if log.name in marker[1].split()]
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
