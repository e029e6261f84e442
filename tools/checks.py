"""What a reviewer looks at, a line each: the logs, and a README's tables and submission.json against them."""

import json
import math
import re
from pathlib import Path

import numpy as np

from tools import documents
from tools.bytecount import check_bytes
from tools.console import BadInput
from tools.logs import STAGES, LogError
from tools.scripts import readable, same_code, source_of
from tools.submission import LIMIT, SECONDS, WORDS, differing, submission
from tools.tables import COLUMNS, NAMES, cells


def score_of(log, stage=None):
    """The Result of a stage, or that of the log's last one."""
    return log.results.get(stage) or log.score


def check_log(log, stage=None, record=True):
    """(what, verdict True, False or None for unknown, detail) of each check of one log.

    stage is that of the score, by default the log's last one; what is no record need not be causal.
    """
    name, score = log.path.name, score_of(log, stage)
    why = log.errors[0] if log.errors else "has a final score" if log.finished else "no final score"
    yield f"{name}: finished", log.finished and not log.errors, why
    yield within(f"{name}: training within {SECONDS} s", log.train_seconds, SECONDS + 1)
    yield within(
        f"{name}: all evaluation stages within {SECONDS} s", log.eval_seconds, SECONDS, " together"
    )
    yield (
        f"{name}: artifact + code under {LIMIT:,} bytes",
        None if log.total_bytes is None else log.total_bytes < LIMIT,
        f"{log.total_bytes:,}" if log.total_bytes else "not said",
    )
    repeated = sorted({label for label in log.lines if log.lines.count(label) > 1})
    labels = f"twice or more: {', '.join(repeated)}" if repeated else f"{len(log.lines)} labels"
    yield f"{name}: one number a label", not repeated, labels
    wrong = "; ".join(log.mislabelled)
    yield f"{name}: labels say what they are", not wrong, wrong or "all"
    if log.prequant_ttt:
        spent = f"{log.prequant_seconds:.1f} s of it, counted as evaluation"
        yield f"{name}: no training on validation tokens before scoring", False, spent
    if score:
        yield f"{name}: the score is finite", math.isfinite(score.val_bpb), f"{score.val_bpb}"
        breaks = f" breaks {score.breaks}" if score.breaks else ""
        told = f"{NAMES[score.stage]} {score.val_bpb:.8f}{breaks}"
        yield f"{name}: the score is causal", score.causal if record else score.causal or None, told
    yield check_bytes(log, score)


def within(what, seconds, limit, suffix=""):
    """The check that a time is at most a limit; unknown where the log does not say it."""
    if seconds is None:
        return what, None, "not said"
    return what, seconds <= limit, f"{seconds:.1f} s{suffix}"


def check_logs(logs, stage=None, record=True):
    """(what, verdict, detail) of each check of the logs, alone and together."""
    for log in logs:
        yield from check_log(log, stage, record)
    seeds = [log.seed for log in logs]
    if len(logs) > 1:
        differ = differing(logs)
        same = ", ".join(differ) or f"{len(logs[0].settings)} settings"
        yield "settings equal over seeds", not differ, same
        different = None if None in seeds else len(set(seeds)) == len(seeds)
        yield "seeds differ", different, ", ".join(map(str, seeds))
    enough = len(set(seeds)) >= 3 or (False if record else None)
    yield "three seeds", None if None in seeds else enough, f"{len(logs)} logs"


SKIP = object()

HEADINGS = (  # heading of a table in somebody's README -> what a log and its score say of it, most special first; SKIP: not compared
    (r"gain|delta|Δ|\+/-|param|notes?$|time|seconds|hardware|gpu", SKIP),
    (r"step.?_?(avg|average|time)|\bms\b", lambda log, score: log.step_avg),
    (r"\bsteps?\b", lambda log, score: log.steps),
    (r"pre.?(quant|avg|average)", lambda log, score: log.prequant.val_bpb),
    (r"round.?trip", lambda log, score: log.results["roundtrip"].val_bpb),
    (r"pre.?ttt|sliding", lambda log, score: log.results["sliding_window"].val_bpb),
    (r"artifact|bytes|size", lambda log, score: log.total_bytes),
    (r"val.?loss|nats", lambda log, score: score.val_loss),
    (r"ttt|slot|bpb|score", lambda log, score: score.val_bpb),
)


def getter(title, titles):
    """Function of a log and its score that gives the number a column is about, or SKIP: our own tables' columns by name, others by what they are like."""
    own = {name.lower(): name for name in COLUMNS}
    name = title.lower()
    if name in own and "roundtrip" in titles:
        return lambda log, score: cells(log)[own[name]][0]
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


def numbers(find, logs, stage):
    """What find gives of each log that has it."""
    found = []
    for log in logs:
        try:
            found.append(find(log, score_of(log, stage)))
        except (KeyError, AttributeError):
            continue
    return [value for value in found if value is not None]


def check_readme(text, logs, stage=None):
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
                values = [] if find is SKIP else numbers(find, group if statistic else found, stage)
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
    means = means_of(logs)
    stage = stage_of(found, logs, means)
    told = scores_of(found)
    for key in ("val_loss", "val_bpb"):
        if key in told and stage:
            mean = means[stage][key]
            digits = min(len(str(told[key]).partition(".")[2]), 8)
            near = abs(mean - told[key]) <= 0.6 * 10**-digits
            detail = f"{told[key]}, the mean of {NAMES[stage]} is {mean:.8f}"
            yield f"submission.json: {key}", near, detail
        else:
            why = "not said as a number" if stage else "the logs have no score in common"
            yield f"submission.json: {key}", None, why
    if stage and "causal" in found:
        causal = all(log.results[stage].causal for log in logs)
        detail = f"{found['causal']}, {NAMES[stage]} is {'' if causal else 'not '}causal"
        yield "submission.json: causal", found["causal"] == causal, detail
    expected = expected_submission(logs, stage)
    for key in DERIVED:
        if key in found and expected.get(key) is not None:
            what = "largest in the logs is" if key.startswith("bytes") else "logs say"
            detail = f"{found[key]}, the {what} {expected[key]}"
            yield f"submission.json: {key}", equal(found[key], expected[key]), detail
    for log in logs:
        file = artifacts_of(found).get(str(log.seed))
        if file and log.total_bytes and log.code_bytes:
            size, told = log.total_bytes - log.code_bytes, file.get("bytes")
            what = f"submission.json: artifact of seed {log.seed}"
            yield what, size == told, f"{told} bytes, the log says {size}"
    missing = [word for word in WORDS if word != "track" and not found.get(word)]
    told = f"submission.json lacks {', '.join(missing)}" if missing else "all there"
    yield "who, what and when", None if missing else True, told


DERIVED = (  # what submission.json says that follows from the logs, besides the score itself
    "val_loss_std",
    "val_bpb_std",
    "seeds",
    "seed_results",
    "bytes_total",
    "bytes_code",
    "hardware",
    "pytorch_version",
    "compliance",
)


def scores_of(found):
    """val_loss and val_bpb of somebody's submission.json, where they are numbers."""
    told = {key: found.get(key, found.get(f"mean_{key}")) for key in ("val_loss", "val_bpb")}
    return {key: value for key, value in told.items() if isinstance(value, (int, float))}


def artifacts_of(found):
    """The files that a submission.json names, by seed."""
    told = found.get("artifacts")
    return {k: v for k, v in told.items() if isinstance(v, dict)} if isinstance(told, dict) else {}


def means_of(logs):
    """Means of nats and bits by stage, of the stages that all logs have."""
    shared = [s for s in STAGES if logs and all(s in log.results for log in logs)]
    return {
        s: {
            key: float(np.mean([getattr(log.results[s], key) for log in logs]))
            for key in ("val_loss", "val_bpb")
        }
        for s in shared
    }


def stage_of(found, logs, means):
    """The stage that a submission.json is about: the one it names, else the one whose mean is nearest; None if the logs share none."""
    for stage in means:
        names = (stage, NAMES[stage], *(log.results[stage].label for log in logs))
        if found.get("metric") in names:
            return stage
    told = scores_of(found)
    if not told or not means:
        return None
    key = "val_bpb" if "val_bpb" in told else "val_loss"
    return min(means, key=lambda stage: abs(means[stage][key] - told[key]))


def expected_submission(logs, stage):
    """What the logs would say in submission.json of a stage; of a mixture only what does not depend on it."""
    if not logs:
        return {}
    try:
        return submission(logs, stage=stage)
    except LogError:
        sizes = {
            f"bytes_{key}": max((getattr(log, f"{key}_bytes") or 0 for log in logs), default=0)
            for key in ("total", "code")
        }
        return {key: size or None for key, size in sizes.items()}


def equal(found, expected):
    """Whether two values are the same: numbers to four digits after the point, lists in any order, of objects the keys that both have.

    Words are the same if they name the same GPU. None: they share no key.
    """
    if isinstance(expected, dict) and isinstance(found, dict):
        shared = [key for key in expected if key in found]
        return all(equal(found[key], expected[key]) for key in shared) if shared else None
    if isinstance(expected, list) and isinstance(found, list):
        return sorted(map(str, found)) == sorted(map(str, expected))
    if isinstance(expected, float) and isinstance(found, float):
        return abs(found - expected) < 6e-5
    if isinstance(expected, str) and isinstance(found, str):
        gpu = re.search(r"\b[A-Z]{1,3}\d{2,4}\b|\bRTX \d+", expected)
        return found == expected or bool(gpu and gpu[0] in found)
    return found == expected


def check(paths, logs):
    """Print one line a check; 1 if one failed."""
    folders, rest, verdicts = [Path(p) for p in paths if is_record(p)], list(logs), []
    for folder in folders:
        mine = [log for log in rest if folder.resolve() in log.path.resolve().parents]
        mine = mine or (rest if len(folders) == 1 else [])
        rest = [log for log in rest if log not in mine]
        verdicts += check_record(folder, mine)
    if rest or not folders:
        verdicts += check_logs(rest) if rest else [("logs", False, "there are none")]
    for line in verdicts:
        print_check(*line)
    return int(any(verdict is False for _, verdict, _ in verdicts))


def check_data(folder):
    """Print the line of the check that a data set's splits share no document; 1 if they do. Raises BadInput."""
    train, val = (documents.shards(Path(folder), split) for split in ("train", "val"))
    if not (train and val):
        raise BadInput(
            f"--data {folder}: has no fineweb_train_*.bin and fineweb_val_*.bin; give a DATA_PATH."
        )
    found = documents.compare(train, val)
    verdict = False if found.too_much() else None if len(found.both) else True
    print_check("training text and validation documents", verdict, f"has {found.told()}")
    return int(verdict is False)


def print_check(what, verdict, detail):
    """Print the line of a check."""
    print(f"{'ok  ' if verdict else '??  ' if verdict is None else 'FAIL'}  {what}: {detail}")


def check_record(folder, logs):
    """(what, verdict, detail) of each check of a record's folder and the logs in it. Runs nothing of it."""
    found, problem = {}, None
    if (folder / "submission.json").is_file():
        try:
            found = json.loads((folder / "submission.json").read_text(errors="replace"))
        except ValueError as why:
            problem = ("submission.json is JSON", False, str(why))
    told = found if isinstance(found, dict) else {}
    stage = stage_of(told, logs, means_of(logs))
    record = not str(told.get("track", "")).lower().startswith("non")  # none, non-record-16mb
    yield from check_logs(logs, stage, record) if logs else [("logs", False, "there are none")]
    for name in ("README.md", "submission.json", "train_gpt.py", "requirements.txt"):
        there = (folder / name).is_file()
        size = f"{(folder / name).stat().st_size:,} bytes" if there else "missing"
        needed = None if name == "requirements.txt" else False  # which many records lack
        yield f"{folder.name} has {name}", there or needed, size
    if (folder / "train_gpt.py").is_file():
        yield from check_script((folder / "train_gpt.py").read_bytes(), logs)
    if (folder / "README.md").is_file():
        text = (folder / "README.md").read_text(errors="replace")
        yield from check_readme(text, logs, stage)
    if problem:
        yield problem
    elif (folder / "submission.json").is_file():
        yield from check_submission(found, logs)


def check_script(data, logs):
    """Checks of a record's script: its size, and that it is the one which the logs open with."""
    told = {log.code_bytes for log in logs}
    detail = f"{len(data):,} bytes, the logs say {', '.join(map(str, told))}"
    yield "train_gpt.py is what the logs counted", told == {len(data)}, detail
    sources = [source for source in map(source_of, logs) if source is not None]
    if not sources:
        return
    what = "train_gpt.py is the script that the logs open with"
    try:
        script = readable(data)
        verdicts = [same_code(source, script) for source in sources]
    except ValueError as why:
        yield what, False, str(why)
        return
    verdict = False if False in verdicts else None if None in verdicts else True
    yield what, verdict, f"{verdicts.count(True)} of {len(logs)} logs"


def is_record(path):
    """Whether a path is the folder of a record."""
    return any((Path(path) / name).is_file() for name in ("README.md", "submission.json"))
