"""Read the logs of training runs: this script's, and those that others have published. What their lines mean is the table of tools.lines.

A log may be whole or cut off, hold several runs, open with the source of its script, be full of torchrun's noise and say the wrong name for a score.
Two hundred megabytes take seconds and little memory: the lines that a log has many of are looked at first, by one pattern each.
"""

import array
import codecs
import dataclasses
import io
import re
from pathlib import Path

import numpy as np

from tools.lines import PLAIN, STAGES, Reading, Result, kind, take

__all__ = ["STAGES", "Log", "LogError", "NoLog", "Result", "read_log", "read_logs"]

BLOCK = 1 << 22  # bytes looked at in one go
HEAD = 1 << 16  # bytes by which a file that is no log is known
LARGE = 64_000_000  # bytes of a file in UTF-16 that are still read
UTF8, UTF16 = codecs.BOM_UTF8, (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
LINE = 20_000  # a longer line is no line of a log
PREFIX = rb"(?:\[\w+\]:? ?|\x1b\[[0-9;]*m|\d{10}\.\d{3} |\[?\d\d:\d\d:\d\d\]? |\[?\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d[.,\dZ]*\]? (?:- )?(?:\[?INFO\]?:? )?(?:- )?)*"
OPENS = re.compile(PREFIX).match  # torchrun --tee, colours, times
NUMBER = rb"(-?\d+(?:\.\d+)?|-?inf|nan)"
STEP = rb"step:(\d{1,12})/\d+ train_loss:" + NUMBER + rb" train_time:(\d+)ms"
TRAIN, TRAIN_BEHIND = re.compile(STEP).match, re.compile(PREFIX + STEP).match
CHUNK = re.compile(PREFIX + rb" *ttt_chunk \[(\d+)/(\d+)\] bpb=" + NUMBER + rb" time=").match
BEGINS = re.compile(  # the first lines of a run
    r"settings: |seed: ?\d+$|(?:-+ )?Hyperparameters:?(?: -+)?$|Running P(?:ython|yTorch) \d|logs/\S+\.txt$|(?:step:)?(?P<step>[01])/\d+ (?:val|train)_loss:"
)
WHOLE = re.compile(  # a last line without an end that cannot have been cut off
    rb"(val_bpb:\d+\.\d{8}|\d+ms|\d bytes|\d s|\ds|FITS|\))\r?$"
)
PAIR = re.compile(rb"val_loss:\d+\.(\d+) val_bpb:\d+\.(\d+)\r?$")  # whole if of as many digits
TOKENIZERS = (  # a word of the settings -> name of the tokenizer
    (r"(?:fineweb_|sp)(\d+)_?(?:bpe)?_lossless_caps", "sp{} caseops"),
    (r"fineweb_(\d+)_bpe", "sp{}"),
    (r"\b(\w+_\d+_bpe)\.model", "{}"),
    (r"fineweb10B_(sp\d+|byte\d+)", "{}"),
    (r"fineweb_?(?:10B_)?bytes?\b", "byte"),
)


class LogError(Exception):
    """A file that is no log, or cannot be read: one line that says so."""

    status = 2  # the exit status


class NoLog(LogError):
    """A file that is something else: a list of packages, a summary ..."""


@dataclasses.dataclass
class Log:
    """What a log says of one run; None or empty where it says nothing."""

    path: Path
    run: int = 0  # number of the run in a file of several
    style: str = "lineage"  # or "this script", "baseline"
    settings: dict = dataclasses.field(default_factory=dict)
    seed: int | None = None
    steps: int | None = None
    iterations: int | None = None
    train_seconds: float | None = None
    step_avg: float | None = None
    prequant: Result | None = None  # the last validation of training
    averaged: Result | None = None  # the float weights that are exported
    results: dict = dataclasses.field(default_factory=dict)  # stage -> Result
    extra: list = dataclasses.field(default_factory=list)  # results of a second stride
    eval_seconds: float | None = None
    parameters: int | None = None
    world_size: int | None = None
    batch_tokens: int | None = None
    hardware: str | None = None
    torch: str | None = None
    tokenizer: str | None = None
    code_bytes: int | None = None
    source_bytes: int | None = None  # of the code before it was packed
    total_bytes: int | None = None
    rounded_bytes: int | None = None  # where the log says millions only, to two digits
    train: np.ndarray | None = None  # [n,3]: step, loss, ms
    validation: list = dataclasses.field(default_factory=list)  # (step, val_loss, val_bpb, ms)
    running: np.ndarray | None = (
        None  # [n,2]: share of the validation stream scored, bits a byte so far
    )
    mislabelled: list = dataclasses.field(default_factory=list)  # sentences
    warnings: dict = dataclasses.field(default_factory=dict)  # sentences by what they are of
    lines: list = dataclasses.field(default_factory=list)  # labels of result lines, for uniqueness
    finished: bool = False
    prequant_ttt: bool = False
    prequant_seconds: float = 0.0  # of training on validation tokens
    errors: list = dataclasses.field(default_factory=list)
    resumed: int = 0
    stopped: bool = False
    capped: bool = False  # training ended by its time cap, before the last step
    started: set = dataclasses.field(default_factory=set)  # stages that the lineage says it begins
    last_step: int = 0
    progress: str = ""  # the last line of a pass that is under way
    broken: int = 0  # lines that begin as ours and do not go on so
    more: list = dataclasses.field(default_factory=list)  # steps of other formats, as in train

    @property
    def name(self):
        """NAME or FOLDER/NAME, as RUN_ID has it, of a log in logs/; else the file's name without its ending."""
        *_, above, folder, file = ("", "", *self.path.resolve().with_suffix("").parts)
        name = f"{folder}/{file}" if above == "logs" else file
        return f"{name}#{self.run}" if self.run else name

    @property
    def title(self):
        """The file's name, and which run in it if there are several."""
        return f"{self.path.name}, run {self.run}" if self.run else self.path.name

    @property
    def trained(self):
        """Whether the log is of training, not of an evaluation alone."""
        return bool(len(self.train) or self.validation)

    @property
    def score(self):
        """The Result that the run is about: its last stage; if its labels say no stage, the one that says final, or that says nothing."""
        if any(s.startswith("ttt") for s in self.results):
            mine = [s for s in STAGES if s not in ("slot", "ctw")]
        else:
            mine = list(STAGES)
        told = [s for s in self.results if s == "val_bpb" or s.startswith("final")]
        return next((self.results[s] for s in [*reversed(mine), *told] if s in self.results), None)


class Runs:
    """The runs of a file that is being read."""

    def __init__(self, path):
        self.path = path
        self.done: list = []
        self.begin()

    def begin(self):
        """A run begins."""
        self.reading = Reading(Log(self.path))
        self.train, self.chunks = array.array("d"), array.array("d")
        self.step = b"0"

    def end(self):
        """A run has ended; it counts if it has any figure."""
        log = self.reading.log
        log.train = np.array(log.more).reshape(-1, 3)
        log.train = np.concatenate([np.array(self.train).reshape(-1, 3), log.train])
        chunks = np.array(self.chunks).reshape(-1, 3)
        log.running = np.stack([chunks[:, 0] / np.maximum(chunks[:, 1], 1), chunks[:, 2]], 1)
        if len(log.train):
            log.last_step = max(int(log.train[-1, 0]), log.last_step if log.more else 0)
        if log.trained or log.results or log.averaged:
            self.done.append(log)

    def again(self, first):
        """Whether a line of a run's beginning, of step first, belongs to a further run."""
        log = self.reading.log
        if log.resumed:
            return False
        return max(int(self.step), log.last_step) > first or bool(log.results)

    def lines(self, block):
        """Take in whole lines. Those that a log has many of are looked at first."""
        progress = b""
        for line in block.split(b"\n"):
            if line.startswith(b"step:"):
                found = TRAIN(line)
            elif line.startswith(b"progress:"):
                progress = line  # only the last is of use
                continue
            else:
                found = b" train_loss:" in line and TRAIN_BEHIND(line)
            if found:
                self.training(found)
            elif b"ttt_chunk [" in line and (found := CHUNK(line)):
                self.chunks.extend(map(float, found.groups()))
            elif line:
                # of a bar of progress that was written over only the end is of use
                line = line.rstrip(b"\r").rsplit(b"\r", 1)[-1]
                if len(line) <= LINE:
                    self.line(line[OPENS(line).end() :].decode(errors="replace"))
        self.reading.log.progress = progress.decode(errors="replace") or self.reading.log.progress

    def training(self, found):
        """Take in a step of training."""
        if self.reading.source:
            return
        if found[1] == b"1" and self.again(1):
            self.end()
            self.begin()
        self.step = found[1]
        self.train.extend(map(float, found.groups()))

    def line(self, text):
        """Take in a line that is not one of many."""
        begins = not self.reading.source and BEGINS.match(text)
        if begins and self.again(int(begins["step"] or 0)):
            self.end()
            self.begin()
        self.reading.log.last_step = max(self.reading.log.last_step, int(self.step))
        take(self.reading, text)

    def broken(self, line):
        """Whether a line that was cut off would have said something."""
        return re.match(rb"(?:step:\d|final_|legal_ttt|quantized)", line[OPENS(line).end() :])


def read_logs(path, most=None):
    """The Logs of a file, one a run, or of a folder logs/RUN_ID. Files of more than most bytes are not read. Raises LogError, NoLog."""
    path = Path(path).resolve() if str(path) in (".", "..") else Path(path)
    path = (
        path.with_name(path.name + ".txt")
        if path.is_dir() and not path.name.endswith(".txt")
        else path
    )
    runs = Runs(path)
    try:
        size = path.stat().st_size
        if most is not None and size > most:
            raise LogError(
                f"{path}: has {size / 1e6:,.0f} MB, not read: logs of a board have at most {most / 1e6:,.0f} MB"
            )
        with open(path, "rb") as file:
            ends = read_lines(file, size, runs)
    except OSError as why:
        raise LogError(f"{path}: {why.strerror}") from None
    runs.end()
    logs = [
        log
        for k, log in enumerate(runs.done)
        if not any(copied(log, later) for later in runs.done[k + 1 :])
    ]
    if not logs:
        what = kind(ends.decode(errors="replace"))
        if what:
            raise NoLog(f"{path}: is {what}, no training log")
        raise LogError(f"{path}: has no line of a training log")
    for number, log in enumerate(logs, 1):
        log.run = number if len(logs) > 1 else 0
        finish(log)
    return logs


def read_lines(file, size, runs):
    """Give the lines of a file to runs; the beginning and the end of it, to see what it is if it is no log. Raises LogError, NoLog."""
    head = file.read(HEAD)
    if not head:
        raise NoLog(f"{runs.path}: is empty")
    if head.startswith(UTF16) and size < LARGE:  # what PowerShell writes
        text = (head + file.read()).decode("utf-16", errors="replace").encode()
        file = io.BytesIO(text)
        head = text[:HEAD]
    if b"\0" in head:
        raise LogError(f"{runs.path}: is binary, no log")
    end = file.seek(0, io.SEEK_END)
    file.seek(max(len(head), end - HEAD))
    tail = file.read()
    file.seek(len(UTF8) if head.startswith(UTF8) else 0)
    left = b""
    while block := file.read(BLOCK):
        block = left + block
        cut = block.rfind(b"\n") + 1
        runs.lines(block[:cut])
        left = block[cut:] if len(block) - cut < BLOCK else b""  # no line of a log
    digits = PAIR.search(left)
    if WHOLE.search(left) or (digits and len(digits[1]) == len(digits[2])):
        runs.lines(left)
    elif left and runs.broken(left):
        runs.reading.log.broken += 1
    return head + b"\n" + tail


def copied(one, other):
    """Whether a file holds a run twice, as a console and a log that were put together do."""
    figures = [[(r.stage, r.val_bpb) for r in log.results.values()] for log in (one, other)]
    steps = np.array_equal(one.train, other.train, equal_nan=True)
    return bool(one.results) and figures[0] == figures[1] and steps


def read_log(path):
    """The Log of a file that holds one run, or of a folder logs/RUN_ID. Raises LogError."""
    logs = read_logs(path)
    if len(logs) > 1:
        raise LogError(f"{path}: has {len(logs)} runs; give each a file of its own")
    return logs[0]


def finish(log):
    """What follows from all lines together."""
    _, last = np.unique(
        log.train[::-1, 0], return_index=True
    )  # a run that was resumed repeats steps; the last time counts
    log.train = log.train[len(log.train) - 1 - last]
    identify(log)
    if log.validation:
        step, loss, bpb, ms = log.validation[-1]
        if bpb == bpb:
            log.prequant = Result("prequant", "step", loss, bpb, how=PLAIN)
        log.steps = step if log.steps is None else log.steps
        if log.train_seconds is None and ms == ms:
            log.train_seconds = ms / 1000
    elif len(log.train):
        log.steps = log.steps or int(log.train[-1, 0])
        ms = log.train[-1, 2]
        log.train_seconds = log.train_seconds or (ms / 1000 if ms == ms else None)
    if log.steps and log.train_seconds:
        log.step_avg = 1000 * log.train_seconds / log.steps
        if log.validation and log.validation[-1][0] == log.steps and log.validation[-1][3] > 0:
            log.step_avg = log.validation[-1][3] / log.steps
    if log.style != "this script":
        evaluation(log)


def evaluation(log):
    """How long the stages of somebody else's log took together, and what training on validation tokens does to them."""
    results = [*log.results.values(), *log.extra]
    times = [r.seconds for r in results if r.seconds and not r.label.lower().startswith("diag")]
    log.finished = bool(results) and log.started <= set(log.results)
    log.eval_seconds = sum(times) + log.prequant_seconds if times and log.finished else None
    if log.prequant_ttt:
        for result in filter(None, [*results, log.averaged]):
            breaks = {*filter(None, result.breaks.split(",")), "C3"}
            result.causal, result.breaks = False, ",".join(sorted(breaks))
            result.how = "trained on validation tokens before, by lines of its log"


def identify(log):
    """Seed, batch, ranks and tokenizer, where settings say them and nothing else did; a seed that the log leaves out may stand in the file's name."""
    told = {name.lower(): value for name, value in log.settings.items()}
    for name, field in (
        ("seed", "seed"),
        ("world_size", "world_size"),
        ("train_batch_tokens", "batch_tokens"),
        ("iterations", "iterations"),
    ):
        if getattr(log, field) is None and str(told.get(name, "")).isdigit():
            setattr(log, field, int(told[name]))
    named = re.search(r"seed[_-]?(\d+)", log.path.stem)
    if log.seed is None and named and not log.run:
        log.seed = int(named[1])
    where = " ".join(str(v) for k, v in told.items() if re.search(r"tok|data|train|val|dir", k))
    for pattern, name in TOKENIZERS:
        found = re.search(pattern, where)
        if found:
            log.tokenizer = name.format(*found.groups())
            return
    if told.get("tokenizer_kind", "").startswith("byte"):
        log.tokenizer = f"byte{told.get('vocab_size', '')}"
