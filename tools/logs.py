"""Read the logs of training runs: this script's, and those of the pull requests #549, #1084, #1150, #1313, #1488 and the official baseline.

A log may be whole or cut off, open with the source of its script, be full of torchrun's noise, have several results and say the wrong name for one.
Two hundred megabytes take seconds and little memory: only lines that begin as one of ours are looked at.
"""

import dataclasses
import re
from pathlib import Path

import numpy as np

BLOCK = 1 << 22  # bytes looked at in one go
SEPARATOR = b"\n" + b"=" * 100 + b"\n"  # after the source that a log opens with
STAGES = (
    "roundtrip",
    "sliding_window",
    "ttt",
    "ttt_slot",
    "ttt_ctw",
    "slot",
    "ctw",
)  # in the order of a table; the last one there is the score
SECONDS = 1 / 1000
PREFIX = rb"\n(?:\[\w+\]: ?|\x1b\[[0-9;]*m)*"  # torchrun --tee, colours
TRAIN = re.compile(PREFIX + rb"step:(\d+)/\d+ train_loss:(-?[\d.]+|-?inf|nan) train_time:(\d+)ms")
CHUNK = re.compile(PREFIX + rb" *ttt_chunk \[(\d+)/(\d+)\] bpb=([\d.]+|inf|nan) time=")
OTHER = re.compile(
    PREFIX
    + rb"((?:step:\d+/\d+ val_loss|final_|legal_ttt|DIAGNOSTIC|post-prequant|prequant_ttt|ttt_sliding:start|Code size|Total submission|Serialized"
    rb"|stopping_early|stopped by|resuming from|seed:|model_params|world_size|train_batch_tokens|iterations|train_shards|settings:|python:|error:"
    rb"|log:|pass_|Running PyTorch|\| +\d+ +NVIDIA|eval_total|training steps|quantised|artifact|train_loader|val_loader|val_bpb:|XSA|xsa|attention_mode|tie_embeddings|mtp_"
    rb"|num_heads|average|late_qat|swa:|ema:|peak|logs/)[^\n]{0,4000})"
)


WHOLE = re.compile(rb"(val_bpb:\d+\.\d{8}|\d+ms|\d bytes)\r?$")


class LogError(Exception):
    """A file that is no log, or cannot be read: one line that says so."""

    status = 2  # the exit status


@dataclasses.dataclass
class Result:
    """A score: the stage it is of, the label it has in the log, nats a token, bits a byte, seconds, whether causal (None: the log does not say)."""

    stage: str
    label: str
    val_loss: float
    val_bpb: float
    seconds: float | None = None
    causal: bool | None = None
    breaks: str = ""
    tokens: int | None = None
    bytes: int | None = None
    stride: int | None = None


@dataclasses.dataclass
class Log:
    """What a log says; None or empty where it says nothing."""

    path: Path
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
    code_bytes: int | None = None
    total_bytes: int | None = None
    train: np.ndarray | None = None  # [n,3]: step, loss, ms
    validation: list = dataclasses.field(default_factory=list)  # (step, val_loss, val_bpb, ms)
    running: np.ndarray | None = (
        None  # [n,2]: share of the validation stream scored, bits a byte so far
    )
    mislabelled: list = dataclasses.field(default_factory=list)  # sentences
    lines: list = dataclasses.field(default_factory=list)  # labels of result lines, for uniqueness
    finished: bool = False
    prequant_ttt: bool = False
    prequant_seconds: float = 0.0  # of training on validation tokens
    errors: list = dataclasses.field(default_factory=list)
    resumed: int = 0
    stopped: bool = False
    capped: bool = False  # training ended by its time cap, before the last step
    started: set = dataclasses.field(default_factory=set)  # stages that the lineage says it begins
    begun: int = 0  # runs in this file
    last_step: int = 0
    progress: str = ""  # the last line of a pass that is under way
    broken: int = 0  # lines that begin as ours and do not go on so

    @property
    def name(self):
        """NAME or FOLDER/NAME, as RUN_ID has it, of a log in logs/; else the file's name without its ending."""
        *_, above, folder, file = ("", "", *self.path.resolve().with_suffix("").parts)
        return f"{folder}/{file}" if above == "logs" else file

    @property
    def score(self):
        """The Result that the run is about: its last stage."""
        return (
            next(
                (
                    self.results[s]
                    for s in reversed(STAGES)
                    if s in self.results and s not in ("slot", "ctw")
                ),
                None,
            )
            if any(s.startswith("ttt") for s in self.results)
            else next((self.results[s] for s in reversed(STAGES) if s in self.results), None)
        )


def columns(rows, count):
    """findall's tuples of bytes as a float array [n, count]."""
    return (
        np.array([np.array(column, "S24").astype(float) for column in zip(*rows)]).T
        if rows
        else np.zeros((0, count))
    )


def read_log(path):
    """The Log of a file, or of a folder logs/RUN_ID. Raises LogError."""
    path = Path(path).resolve() if str(path) in (".", "..") else Path(path)
    path = (
        path.with_name(path.name + ".txt")
        if path.is_dir() and not path.name.endswith(".txt")
        else path
    )
    log, train, chunks, rest = Log(path), [], [], []
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 21)
            if not head:
                raise LogError(f"{path}: is empty")
            if b"\0" in head[: 1 << 16]:
                raise LogError(f"{path}: is binary, no log")
            file.seek(max(0, head.find(SEPARATOR) + len(SEPARATOR) - 1) if SEPARATOR in head else 0)
            left = b"" if SEPARATOR in head else b"\n"
            while block := file.read(BLOCK):
                block = left + block
                cut = max(block.rfind(b"\n"), 0)
                block, left = block[:cut], block[cut:]
                train.append(columns(TRAIN.findall(block), 3))
                chunks.append(columns(CHUNK.findall(block), 3))
                rest += OTHER.findall(block)
                if (at := block.rfind(b"\nprogress:")) >= 0:  # of many only the last is of use
                    log.progress = block[at + 1 :].split(b"\n", 1)[0].decode(errors="replace")
                left = left if len(left) < BLOCK else b""  # a line of megabytes is no line of ours
            if WHOLE.search(
                left
            ):  # the last line, without an end: only if it cannot have been cut off
                rest += OTHER.findall(left)
            elif OTHER.search(left) or TRAIN.search(left):
                log.broken += 1
    except OSError as why:
        raise LogError(f"{path}: {why.strerror}") from None
    except ValueError as why:
        raise LogError(f"{path}: has a number that is none: {str(why)[:80]}") from None
    log.train, chunks = np.concatenate(train), np.concatenate(chunks)
    log.last_step = int(log.train[-1, 0]) if len(log.train) else 0
    _, last = np.unique(
        log.train[::-1, 0], return_index=True
    )  # a run that was resumed repeats steps; the last time counts
    log.train = log.train[len(log.train) - 1 - last]
    log.running = np.stack([chunks[:, 0] / np.maximum(chunks[:, 1], 1), chunks[:, 2]], 1)
    method = "ttt"
    for line in rest:
        try:
            method = take(log, line.decode(errors="replace"), method)
        except (KeyError, ValueError, IndexError):  # a line that was cut off or overwritten
            log.broken += 1
    if not (len(log.train) or log.validation or log.results):
        raise LogError(f"{path}: has no line of a training log")
    if log.begun > 1:
        raise LogError(f"{path}: has {log.begun} runs; give each a file of its own")
    finish(log)
    return log


def fields(text):
    """name:value and name=value words of a line."""
    return dict(re.findall(r"(\w+)[:=](\S+)", text))


def milliseconds(text):
    """Number of a time like 12ms. Raises ValueError."""
    if not re.fullmatch(r"[\d.]+ms", text):
        raise ValueError(text)
    return float(text[:-2])


def take(log, line, method):
    """Note what a line says; the method that lines about TTT are of."""
    label, found = line.split(" ", 1)[0].rstrip(":"), fields(line)
    if line.startswith("step:"):
        step, total = map(int, label[5:].split("/"))
        log.iterations = total
        log.begun += step == 0 and not log.resumed and log.style != "this script"
        log.validation.append(
            (
                step,
                float(found["val_loss"]),
                float(found["val_bpb"]),
                milliseconds(found.get("train_time", "0ms")),
            )
        )
    elif label.startswith(("final_", "legal_ttt")) and "val_bpb" in found:
        take_result(log, label, found, method)
    elif label in ("DIAGNOSTIC", "post-prequant-ttt") and "val_bpb" in found:
        log.averaged = Result("averaged", label, float(found["val_loss"]), float(found["val_bpb"]))
    elif label.startswith("prequant_ttt"):
        log.prequant_ttt = True
        spent = re.search(r"(?:elapsed=|seconds:|time:)([\d.]+)", line)
        log.prequant_seconds = (
            max(log.prequant_seconds, float(spent[1])) if spent else log.prequant_seconds
        )
    elif label.startswith("ttt_sliding"):
        method = (
            "ttt_slot"
            if "slot_steps" in found
            else "ttt_ctw"
            if float(found.get("ctw_weight", 0))
            else "ttt"
        )
        if line.startswith("ttt_sliding:start"):
            log.started.add(method)
            log.settings |= found
    elif line.startswith(("Code size:", "Total submission size")):
        number = (
            int(re.search(r": (\d+) bytes", line)[1]) if re.search(r": (\d+) bytes", line) else None
        )
        if line.startswith("Code"):
            log.code_bytes = number
        else:
            log.total_bytes = number
    elif label == "settings":
        log.settings, log.style = (
            dict(word.split("=", 1) for word in line.split()[1:] if "=" in word),
            "this script",
        )
        log.begun += 1
        log.seed, log.batch_tokens = (
            int(log.settings.get("SEED", -1)),
            int(log.settings.get("TRAIN_BATCH_TOKENS", 0)) or None,
        )
        log.prequant_ttt |= log.settings.get("PREQUANT_TTT_ENABLED") == "1"
    elif label == "python" or line.startswith("python:"):
        log.style, log.errors, log.stopped = (
            "this script",
            [],
            False,
        )  # it goes on after what stopped it
        log.torch, log.world_size = found.get("torch"), int(found.get("world_size", 1))
        log.hardware = line.split("device:", 1)[-1].split(" dtype:")[0]
    elif label == "eval_total":
        log.eval_seconds, log.finished = milliseconds(found["eval_time"]) * SECONDS, True
    elif label == "training":
        log.steps, log.train_seconds = (
            int(found["steps"]),
            milliseconds(found["train_time"]) * SECONDS,
        )
    elif line.startswith("stopping_early"):
        log.train_seconds = milliseconds(found["train_time"]) * SECONDS
        log.steps, log.iterations = map(int, found["step"].split("/"))
        log.capped = True
    elif line.startswith("stopped by"):
        log.stopped = True
    elif line.startswith("Running PyTorch"):
        log.torch = line.split()[2]
    elif "NVIDIA" in line:
        log.hardware = re.search(r"NVIDIA [\w ]*?(?= {2,})", line)[0]
    elif line.startswith("error:"):
        log.errors.append(line)
    elif line.startswith("resuming from"):
        log.resumed += 1
    elif label.startswith("model_params"):
        log.parameters = int(found["model_params"])
    elif log.style != "this script":
        header(log, line, found)
    return method


def header(log, line, found):
    """A line of the lineage's header: settings, number of ranks, seed."""
    for name, value in found.items():
        if name == "seed":
            log.seed = int(value)
        elif name == "world_size":
            log.world_size = int(value)
        elif name == "train_batch_tokens":
            log.batch_tokens = int(value)
    if not line.startswith(
        (
            "late_qat",
            "swa",
            "ema",
            "peak",
            "average",
            "logs/",
            "Serialized",
            "quantised",
            "artifact",
            "stopped",
            "train_shards:",
            "seed:",
        )
    ):
        log.settings |= {name: value for name, value in found.items() if name != "seed"}


def take_result(log, label, found, method):
    """A result line: the short one has the time, the "_exact" one the digits."""
    exact, name = (
        label.endswith("_exact"),
        label.removesuffix("_exact")
        .removeprefix("final_")
        .removeprefix("artifact_")
        .removeprefix("int6_")
        .removeprefix("int8_zlib_"),
    )
    loss, bpb = float(found["val_loss"]), float(found["val_bpb"])
    seconds = milliseconds(found["eval_time"]) * SECONDS if "eval_time" in found else None
    causal = {"yes": True, "no": False}.get(found.get("causal"))
    if causal is not None and "tokens" in found:
        log.style = "this script"
    second, name = name.endswith("_s64"), name.removesuffix("_s64")
    if label.startswith("legal_ttt"):
        name = method
    if name.startswith("float_"):
        log.averaged = Result(
            "averaged", label, loss, bpb, seconds, causal, found.get("breaks", "")
        )
        return
    log.lines.append(label)
    if exact and label.startswith(("final_int8_zlib", "final_int6_roundtrip")):
        twin = next(
            (
                r
                for r in [*log.results.values(), *log.extra]
                if abs(r.val_loss - loss) < 5e-9 and r.stage != "roundtrip"
            ),
            None,
        )
        if twin:
            log.mislabelled.append(
                f"{label} {bpb:.8f} is the score of {twin.stage}{f' with stride {twin.stride}' if twin.stride else ''}, not of a roundtrip"
            )
            return
    if label.startswith("final_int8_zlib") and "roundtrip" not in log.results:
        log.style = "baseline"
    if name == "slot" and "steps" in found and log.style == "lineage":
        log.settings |= {"slot_steps": found["steps"], "slot_lr": found.get("lr")}
    result = Result(
        name,
        label.removesuffix("_exact"),
        loss,
        bpb,
        seconds,
        causal,
        found.get("breaks", ""),
        *(int(found[key]) if key in found else None for key in ("tokens", "bytes", "stride")),
    )
    if second:
        old = next((r for r in log.extra if r.stage == name), None)
        log.extra = [r for r in log.extra if r is not old] + [merge(old, result)]
    elif name in STAGES:
        log.results[name] = merge(log.results.get(name), result)


def merge(old, new):
    """Two lines of one score: the digits of the later, the time of whichever has it."""
    if old is None or abs(old.val_loss - new.val_loss) > 1e-4:
        return new
    return dataclasses.replace(
        new,
        seconds=new.seconds if new.seconds is not None else old.seconds,
        stride=new.stride or old.stride,
    )


def finish(log):
    """What follows from all lines together."""
    if log.validation:
        step, loss, bpb, ms = log.validation[-1]
        log.prequant = Result("prequant", "step", loss, bpb)
        log.steps = step if log.steps is None else log.steps
        log.train_seconds = ms * SECONDS if log.train_seconds is None else log.train_seconds
    elif len(log.train):
        log.steps, log.train_seconds = (
            log.steps or int(log.train[-1, 0]),
            log.train_seconds or log.train[-1, 2] * SECONDS,
        )
    if log.steps and log.train_seconds:
        log.step_avg = 1000 * log.train_seconds / log.steps
        if log.validation and log.validation[-1][0] == log.steps:
            log.step_avg = log.validation[-1][3] / log.steps
    if log.style != "this script":
        times = [r.seconds for r in [*log.results.values(), *log.extra] if r.seconds is not None]
        log.finished = bool(log.results) and log.started <= set(log.results)
        log.eval_seconds = sum(times) + log.prequant_seconds if times and log.finished else None
        found = [
            r
            for r in [*log.results.values(), *log.extra, log.averaged]
            if r and r.causal is None and log.style == "lineage"
        ]
        for result in found:  # what #1084's and #1313's SLOT do is known
            leak = result.stage.endswith("slot")
            result.causal = not (leak or log.prequant_ttt)
            result.breaks = ",".join(["C1", "C2"] * leak + ["C3"] * (leak or log.prequant_ttt))
    log.begun = min(log.begun, 1) if log.style == "this script" and log.resumed else log.begun
