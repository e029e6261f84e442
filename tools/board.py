"""A board: the runs of all logs under folders, a row a configuration with its seeds merged, the best score first."""

import csv
import dataclasses
import itertools
import json
import math
import os
import re
import statistics
from pathlib import Path

from tools.checks import tables
from tools.logs import LARGE, STAGES, LogError, NoLog, read_logs
from tools.significance import MARGIN, welch
from tools.tables import NAMES, markdown, size

ENDINGS = (".log", ".txt", ".out")
SKIPPED = {".git", ".venv", "venv", "node_modules", "__pycache__"}
MOST = LARGE  # bytes of a log that a board reads: the largest public one has a few millions
ACCEPTED = 0.25  # p below which #1902 took a row as a step forward
FREE = re.compile(  # settings that say where a run was, not what it was
    r"(?i)(?:run_id|seed|logfile|log_file|artifact_dir|resume|save_every|rank|local_rank|hostname|job_id|is_main_process|.*(?:path|_dir|_files))$"
)
TIME = re.compile(r"\d+(?:\.\d+)?(?:ms|s|m)")  # what a line above the first step took
METHODS = ("ttt", "slot", "ctw", "etlb", "ngram", "ppm", "sliding")  # words of a stage's settings
PAGES = ("README.md", "README.tables.md", "submission.json")  # what says which folder a log is of
VALIDATION = "validation in training"


@dataclasses.dataclass
class Row:
    """A configuration: its logs, and what they say together; None where they do not."""

    folder: Path
    logs: list
    stage: str = ""
    scores: list = dataclasses.field(default_factory=list)  # bits a byte, a run each
    ratio: float = math.nan  # nats a token for each bit a byte
    causal: bool | None = None
    how: str = ""
    breaks: str = ""
    scored: bool = True  # an artifact was scored, not float weights in training alone
    name: str = ""
    differs: list = dataclasses.field(default_factory=list)  # sentences
    against: dict = dataclasses.field(default_factory=dict)  # margin in nats -> p of the row above

    @property
    def mean(self):
        return statistics.mean(self.scores)

    @property
    def std(self):
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def seeds(self):
        """The seeds as text; one that was run twice says so."""
        seeds = [log.seed for log in self.logs]
        known = sorted({s for s in seeds if s is not None})
        told = [f"{s} x{seeds.count(s)}" if seeds.count(s) > 1 else str(s) for s in known]
        return ", ".join(told + ["?"] * (None in seeds))

    @property
    def seconds(self):
        """Of the run that took longest to evaluate."""
        return most(log.eval_seconds for log in self.logs)

    @property
    def bytes(self):
        """(bytes, text) of the largest artifact and its code."""
        return max((s for log in self.logs if (s := size(log))), default=None)

    @property
    def steps(self):
        return most(log.steps for log in self.logs)

    @property
    def tokenizer(self):
        return next((log.tokenizer for log in self.logs if log.tokenizer), None)


def most(values):
    """The largest of values that are known, or None."""
    return max((v for v in values if v is not None), default=None)


def files(folders):
    """Path -> the folder it was found under, of each file there that may be a log, in order. Raises LogError."""
    for folder in map(Path, folders):
        if not folder.exists():
            raise LogError(f"{folder}: No such file or directory")
    found: dict = {}
    for folder in map(Path, folders):
        if folder.is_file():
            found.setdefault(folder, folder.parent)
        for where, inner, names in os.walk(folder):
            inner[:] = sorted(set(inner) - SKIPPED)
            for name in sorted(names):
                if name.lower().endswith(ENDINGS):
                    found.setdefault(Path(where) / name, folder)
    return found


@dataclasses.dataclass
class Found:
    """What is under folders: logs by the folder they are of, how many files hold them, and a sentence on each other file."""

    logs: dict = dataclasses.field(default_factory=dict)
    files: int = 0
    others: list = dataclasses.field(default_factory=list)  # what is no log
    wrong: list = dataclasses.field(default_factory=list)  # what cannot be read, or understood

    @property
    def runs(self):
        return sum(map(len, self.logs.values()))


def collect(folders):
    """The Found of folders. Raises LogError if one is missing."""
    everything = Found()
    for path, root in files(folders).items():
        try:
            logs = read_logs(path, MOST)
        except NoLog as why:
            everything.others.append(str(why))
        except LogError as why:
            everything.wrong.append(str(why))
        else:
            everything.files += 1
            everything.logs.setdefault(home(path, root), []).extend(map(slim, logs))
    return everything


def slim(log):
    """A log without what a board does not need, which is most of it."""
    log.train, log.running, log.more = log.train[-1:], log.running[:0], []
    log.validation = log.validation[-1:]
    return log


def home(path, root):
    """The folder that a log is of: the nearest one that has pages of its own, below the one that was searched; else the log's."""
    for folder in path.parents:
        if folder != path.parent and not folder.is_relative_to(root):
            break
        if any((folder / name).is_file() for name in PAGES) and (
            folder != root or folder == path.parent
        ):
            return folder
    return path.parent


def same(one, other):
    """Whether two logs are the same run, copied."""
    figures = [
        (log.seed, log.steps, [(r.stage, r.val_bpb, r.seconds) for r in log.results.values()])
        for log in (one, other)
    ]
    return figures[0] == figures[1] and bool(one.results or one.validation == other.validation)


def alike(one, other):
    """Whether two logs are of one configuration: no setting that both say differs, but for those that every run has of its own."""
    for value in ("parameters", "world_size", "tokenizer", "trained"):
        if len({getattr(one, value), getattr(other, value)} - {None}) > 1:
            return False
    if bool(one.results) != bool(other.results):  # a run that broke off takes no score from others
        return False
    for name in one.settings.keys() & other.settings.keys():
        differ = one.settings[name] != other.settings[name] and not FREE.match(name)
        differ = differ and not TIME.fullmatch(str(one.settings[name]))
        if differ and not one_has_it(name.lower(), one, other):
            return False
    # a seed that was run twice is the same configuration only if its code was the same as well
    twice = one.seed is not None and one.seed == other.seed
    return not twice or one.code_bytes == other.code_bytes


def one_has_it(name, one, other):
    """Whether a setting is of a way to evaluate that only one of two logs shows: what both show is still of one configuration."""
    for method in METHODS:
        if method in name:
            shown = [any(method in stage for stage in log.results) for log in (one, other)]
            return shown[0] != shown[1]
    return False


def group(logs):
    """Rows of logs by folder: those of one configuration together; a copy of a log counts once."""
    rows = []
    for folder, own in logs.items():
        kept: list = []
        for log in own:
            if not any(same(log, other) for other in kept):
                kept.append(log)
        # first those of equal code, then what goes with the largest of these
        equal = together([[log] for log in kept], lambda a, b: a.code_bytes == b.code_bytes)
        mine = together(sorted(equal, key=len, reverse=True), lambda a, b: True)
        for found in mine:
            name = folder.name if len(mine) == 1 else f"{folder.name}: {titles(found)}"
            rows.append(Row(folder, found, name=name))
    return rows


def together(groups, also):
    """Groups of logs, put together where all are alike and a further condition holds of each two."""
    found: list = []
    for group_ in groups:
        fits = (g for g in found if all(alike(a, b) and also(a, b) for a in group_ for b in g))
        into = next(fits, None)
        if into is None:
            found.append(list(group_))
        else:
            into += group_
    return found


def titles(logs):
    """Names of logs, short."""
    names = [log.title.replace(log.path.suffix, "") for log in logs]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def judge(row, causal=False):
    """Fill a row's score: of the stages that all its logs have the best, if causal then the best that is; whether there is one."""
    stages = [s for s in row.logs[0].results if all(s in log.results for log in row.logs)]
    found = {s: [log.results[s] for log in row.logs] for s in stages}
    known = {s: r for s, r in found.items() if s in STAGES} or found
    if causal:
        known = {s: r for s, r in known.items() if all(x.causal is True for x in r)}
    if not known and not found and not causal:
        results = [log.prequant or log.averaged for log in row.logs]
        row.scored = False
        known = {VALIDATION: results} if all(results) else {}
    known = {s: r for s, r in known.items() if all(math.isfinite(x.val_bpb) for x in r)}
    if not known:
        return False
    row.stage = min(known, key=lambda s: statistics.mean(r.val_bpb for r in known[s]))
    results = known[row.stage]
    row.scores = [r.val_bpb for r in results]
    ratios = [r.val_loss / r.val_bpb for r in results if r.val_bpb and math.isfinite(r.val_loss)]
    row.ratio = statistics.mean(ratios) if ratios else math.nan
    worst = next((r for r in results if r.causal is False), None)
    worst = worst or next((r for r in results if r.causal is None), results[0])
    row.causal, row.how, row.breaks = worst.causal, worst.how, worst.breaks
    if not row.scored:
        row.causal, row.how = True, "float weights: no artifact was scored"
    return True


def compare(rows):
    """Fill in what is known of the row above each: p that it is better by more than a margin of nats (one-sided Welch), 0.005 as the challenge's README asked and none.

    Bits a byte are compared, since nats are of tokens and those differ between tokenizers: the margin is what 0.005 nats are in the row above.
    The organisers took a row as a step forward at p < 0.25 (#1902, "p<0.25 chronological progression cutoff"), with reproductions where it was close.
    """
    for above, row in itertools.pairwise(rows):
        if above.scored and row.scored and same_text(above, row):
            for margin in (MARGIN, 0.0):
                bits = margin / above.ratio if margin else 0.0
                row.against[margin] = welch(above.scores, row.scores, bits)[2]
    return rows


def same_text(one, other):
    """Whether two rows may have scored the same text; most logs do not say how many bytes theirs has."""
    texts = [
        {r.bytes for log in row.logs for r in log.results.values()} - {None} for row in (one, other)
    ]
    return not all(texts) or texts[0] == texts[1]


def board(logs, causal=False, tokenizer=None):
    """Rows, the best first; those that scored no artifact come last."""
    rows = [row for row in group(logs) if judge(row, causal)]
    if tokenizer:
        rows = [
            row for row in rows if tokenizer in (row.tokenizer, (row.tokenizer or "?").split()[0])
        ]
    for row in rows:
        beside = [other for other in rows if other.folder == row.folder]
        row.differs = list(dict.fromkeys(differences(row, beside)))
    return compare(sorted(rows, key=lambda row: (not row.scored, row.mean)))


# What a folder's own pages say of its logs.

KINDS = (  # heading of a column -> what its cells are; the first that is found in it counts
    (
        r"gain|delta|δ|improve|overhead|\bvs\b|param|p-?value|hardware|gpu|notes?$|budget|reserve|gap|%",
        None,
    ),
    (r"steps?/s|tok/s|ms ?/ ?step|step.?(avg|average|time)|ms\b.*step", "step"),
    (r"(?<!per )\bsteps?\b(?!.*(?:/|ms|time))", "steps"),
    (r"code", "code"),
    (r"artifact|bytes|size|submission", "bytes"),
    (r"time|seconds|\(s\)|\bms\b", None),
    (r"nats|loss", "nats"),
    (r"bpb|bpp|score|sliding|ttt|round.?trip|quant|ema\b", "bits"),
)


def figures(log, kind):
    """All figures of a kind that a log has."""
    results = [*log.results.values(), *log.extra, *filter(None, (log.prequant, log.averaged))]
    found = {
        "step": [log.step_avg],
        "steps": [log.steps],
        "code": [log.code_bytes, log.source_bytes],
        "bytes": [log.total_bytes, log.rounded_bytes],
        "nats": [r.val_loss for r in results],
        "bits": [r.val_bpb for r in results],
    }[kind]
    return [value for value in found if value is not None and math.isfinite(value)]


def agrees(told, value):
    """Whether a number in a table is a figure, at the digits or in the unit that the table has; half a unit more for what was rounded twice."""
    digits = len(told.partition(".")[2])
    number = float(told.replace(",", ""))
    scales = (1, 1e3, 1e6, 1024, 1024**2) if value > 1e5 else (1,)
    return any(abs(number - value / s) <= 0.6 * 10.0**-digits for s in scales)


def differences(row, rows):
    """Sentences on what the folder's README and submission.json say otherwise than its logs; rows are all of the folder."""
    path = next((p for n in PAGES[:2] if (p := row.folder / n).is_file()), None)
    if path:
        yield from from_readme(row, path.read_text(errors="replace"), rows)
    path = row.folder / PAGES[2]
    if path.is_file():
        try:
            found = json.loads(path.read_text(errors="replace"))
        except ValueError as why:
            yield f"submission.json is no JSON: {why}"
        else:
            if isinstance(found, dict):
                yield from from_submission(row, found, rows)
    sizes = sorted({log.code_bytes for log in row.logs if log.code_bytes})
    if len(sizes) > 1:
        yield f"its runs had code of {' and '.join(f'{n:,}' for n in sizes)} bytes"
    for log in row.logs:
        named = re.search(r"(?:seed|_s)_?(\d+)", log.path.stem)
        if named and log.seed is not None and int(named[1]) != log.seed:
            yield f"{log.title} says seed {log.seed}"


def from_readme(row, text, rows):
    """Sentences on cells of a README's tables of seeds that no figure of a log of that seed is; said once, of the first row that has the seed."""
    logs = [log for r in rows for log in r.logs]
    for header, cells, _ in tables(text, logs):
        column = next(i for i, cell in enumerate(header) if re.fullmatch("seeds?", cell, re.I))
        for line in cells:
            seed = re.fullmatch(r"\D*(\d+)\D*", line[column])
            mine = [log for log in logs if seed and log.seed == int(seed[1])]
            if not mine or not any(mine[0] is log for log in row.logs):
                continue
            for k, (title, cell) in enumerate(zip(header, line)):
                if k != column:
                    yield from from_cell(f"README, seed {seed[1]}, {title}", title, cell, mine)


def from_cell(where, title, cell, logs):
    """A sentence, if a cell of a table is none of the figures that its column is about."""
    kind = next((k for pattern, k in KINDS if re.search(pattern, title.lower())), None)
    told = re.match(r"[^\d-]*(\d[\d,]*\.?\d*)", cell)
    values = [v for log in logs for v in figures(log, kind)] if kind else []
    if told and values and not any(agrees(told[1], v) for v in values):
        nearest = min(values, key=lambda v: abs(v - float(told[1].replace(",", ""))))
        yield f"{where}: {told[1]}, the log says {shown(nearest)}"


def shown(value):
    """A figure as text."""
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:.5g}" if value > 10 else f"{value:.5f}"
    )


def from_submission(row, found, rows):
    """Sentences on a folder's submission.json: its score, if neither the mean of the nearest row is that nor any figure of it; what it has of each seed."""
    told = found.get("val_bpb", found.get("mean_val_bpb"))
    if is_number(told) and nearest(rows, told) is row:
        yield from from_score(row, told)
    seeds = found.get("seed_results")
    for seed, results in (seeds if isinstance(seeds, dict) else {}).items():
        mine = [log for r in rows for log in r.logs if str(log.seed) == seed]
        if mine and isinstance(results, dict) and any(mine[0] is log for log in row.logs):
            for key, value in results.items():
                if is_number(value):
                    where = f"submission.json, seed {seed}, {key}"
                    yield from from_cell(where, key.replace("_", " "), digits(key, value), mine)


def digits(key, value):
    """A number of JSON, which drops the zeros at the end of a score, as its authors wrote it."""
    text = str(value)
    short = re.search("bpb|loss", key) and len(text.partition(".")[2]) < 4
    return f"{value:.4f}" if short else text


def is_number(value):
    """Whether a value of JSON is a number that can be compared."""
    return type(value) in (int, float) and math.isfinite(value)


def nearest(rows, score):
    """The row that a score is most likely of."""
    return min(rows, key=lambda row: min(abs(v - score) for v in (row.mean, *row.scores)))


def from_score(row, told):
    """A sentence on a score that is not the mean of a row: of which run and stage it is, if of any."""
    near = 0.6 * 10.0 ** -min(len(digits("bpb", told).partition(".")[2]), 8)
    if abs(row.mean - told) <= near:
        return
    for log in row.logs:
        for result in [*log.results.values(), *filter(None, (log.averaged, log.prequant))]:
            if abs(result.val_bpb - told) <= near:
                of = f" of {log.title} alone" if len(row.logs) > 1 else ""
                if of or result.stage != row.stage:
                    yield f"submission.json: {told} is the {NAMES[result.stage]} score{of}"
                return
    yield f"submission.json: {told}, the logs' mean is {row.mean:.5f}"


# How a board is written.

COLUMNS = dict(  # of the CSV; the text has those of SHORT
    rank="#",
    score="bits a byte",
    std="std",
    runs="runs",
    seeds="seeds",
    stage="stage",
    causal="causal",
    how="how that is known",
    seconds="evaluation s",
    bytes="bytes",
    steps="steps",
    tokenizer="tokenizer",
    margin="p, 0.005 nats",
    p="p, #1902",
    run="run",
    differs="differs from its folder's pages",
)
SHORT = tuple(key for key in COLUMNS if key not in ("seeds", "how", "steps", "differs"))


def probability(p):
    """A p as text."""
    return "" if p is None or math.isnan(p) else f"{p:.2g}"


def cells(rank, row):
    """The cells of a row by column, as text; what is not known is empty."""
    p = row.against.get(0.0)
    accepted = "" if p is None or math.isnan(p) else " yes" if p < ACCEPTED else " no"
    return dict(
        rank=str(rank),
        score=f"{row.mean:.5f}",
        std="" if row.std is None else f"{row.std:.5f}",
        runs=str(len(row.logs)),
        seeds=row.seeds,
        stage=NAMES[row.stage],
        causal={True: "yes", False: "no", None: "unknown"}[row.causal],
        how=row.how + (f" (breaks {row.breaks})" if row.breaks else ""),
        seconds="" if row.seconds is None else f"{row.seconds:.0f}",
        bytes="" if row.bytes is None else row.bytes[1].removesuffix(" B"),
        steps="" if row.steps is None else f"{row.steps:,}",
        tokenizer=row.tokenizer or "",
        margin=probability(row.against.get(MARGIN)),
        p=probability(p) + accepted,
        run=row.name,
        differs="; ".join(row.differs),
    )


def notes(rows):
    """Sentences on how a board is to be read."""
    yield "Bits a byte of the best stage that all runs of a row have. Causal as far as names and lines of logs tell; seconds and bytes are the largest of a row."
    yield "p: that the row above is better, by 0.005 nats or at all (Welch, one-sided, two runs or more on each side); yes: below 0.25, where the organisers took a row as a step forward (#1902)."
    if any(not row.scored for row in rows):
        yield f"{VALIDATION.capitalize()}: no artifact was scored; these rows come last."


def lines(rows):
    """A board as text: a table, how to read it, and what differs from the folders' own pages."""
    told = [cells(rank, row) for rank, row in enumerate(rows, 1)]
    yield from markdown(
        [[COLUMNS[key] for key in SHORT], *([row[key] or "-" for key in SHORT] for row in told)]
    )
    yield ""
    yield from notes(rows)
    for how in sorted({row.how for row in rows if row.causal is None}):
        yield f"Not known whether causal: {how}."
    for rank, row in enumerate(rows, 1):
        for sentence in row.differs:
            yield f"{rank}: {sentence}"


def counts(found, rows):
    """How much there was, and how much of it is on the board."""
    told = [
        f"{len(rows)} configurations, {sum(len(r.logs) for r in rows)} of {found.runs} runs in {found.files} logs"
    ]
    copies = found.runs - sum(len(row.logs) for row in group(found.logs))
    told += [f"{copies} copies left out"] * bool(copies)
    told += [
        f"{len(found.others)} {'file is' if len(found.others) == 1 else 'files are'} no log"
    ] * bool(found.others)
    told += [f"{len(found.wrong)} not read or not understood"] * bool(found.wrong)
    return "; ".join(told) + "."


def nothing(found, causal, tokenizer):
    """Why a board has no row."""
    if not found.logs:
        return "no training log there"
    if tokenizer:
        known = {log.tokenizer for logs in found.logs.values() for log in logs} - {None}
        return f"no run with the tokenizer {tokenizer}; there are {', '.join(sorted(known)) or 'none that are known'}"
    return "no run with a score" + " that is known to be causal" * causal


def write_csv(rows, path):
    """The board as CSV, numbers without commas."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writerow(COLUMNS)
        for rank, row in enumerate(rows, 1):
            size = row.bytes[0] if row.bytes else ""
            steps = "" if row.steps is None else row.steps
            writer.writerow(cells(rank, row) | {"bytes": size, "steps": steps})
