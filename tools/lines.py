"""What the lines of training logs mean: a table of (pattern, what it means), a row a line format. The next format is one more row.

Most rows have named groups only, and a group's name is the field of tools.logs.Log that it fills. A row with a function does something more.
What no row matches says nothing. A log may open with the source of its script, which says nothing either.
"""

import ast
import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any

N = r"(?:-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|-?inf|nan)(?![\w.])"
TIME = r"\d+(?:\.\d+)? ?(?:ms|m|s)\b"
UNITS = {"ms": 1, "s": 1000, "m": 60_000}  # in milliseconds
UNKNOWN, YES, NO = None, True, False


@dataclasses.dataclass(frozen=True)
class Stage:
    """A kind of score: what tables call it, which labels are its own, and what is known of all that are called so.

    causal: whether a method of this name predicts each token from the text before it alone; breaks: which of the conditions C1 to C4 it breaks else.
    """

    key: str
    name: str
    labels: str
    causal: bool | None
    how: str
    breaks: str = ""


PLAIN = "by its stage's name"
OWN_LABEL = "by the label in its own log"
NAMELESS = "its label says no stage"
SILENT = "its stage's name does not say"
TOLD = "scores first, by its stage's name"
STAGE_TABLE = (  # the first row whose pattern is in the label (in lower case) counts
    Stage(
        "averaged",
        "float",
        r"^final_float|post[-_ ]?(train_\w*|ema|swa|sdttt)|selected_final_weights|pre[-_ ]?quant|unquanti|trained_validation|^ema\b|^raw",
        YES,
        PLAIN,
    ),
    Stage("ttt_slot", "TTT+SLOT", r"ttt.*slot|slot.*ttt", NO, PLAIN, "C1,C2,C3"),
    Stage(
        "slot", "SLOT", r"(causal|context|legal)\w*slot", UNKNOWN, "SLOT that claims to be causal"
    ),
    Stage("slot", "SLOT", r"slot", NO, PLAIN, "C1,C2,C3"),  # docs/slot.md
    Stage("ttt_ctw", "TTT+CTW", r"ttt.*ctw", YES, TOLD),
    Stage("ctw", "CTW", r"ctw", YES, PLAIN),
    Stage("ppm", "byte mixture", r"ppm|byte[-_ ]?mix|mix_bpb", NO, PLAIN, "C2"),  # #1905
    Stage("ngram", "n-gram", r"tilt|hint", UNKNOWN, SILENT),
    Stage("ngram", "n-gram", r"n-?gram|_cache|backoff|oracle", NO, PLAIN, "C2"),  # #886
    Stage("etlb", "logit bias", r"etlb", UNKNOWN, SILENT),
    Stage("ttt_phased", "phased TTT", r"phased", YES, TOLD),
    Stage("ttt_lora", "LoRA TTT", r"^(quantized_|final_int8_|final_)ttt_lora$", YES, TOLD),
    Stage("ttt_lora", "LoRA TTT", r"lora", UNKNOWN, SILENT),
    Stage(
        "ttt",
        "TTT",
        r"^(quantized_|final_int\d_)ttt$|ttt_sliding|(causal|legal)_?ttt|score[-_]?first",
        YES,
        TOLD,
    ),
    Stage("ttt", "TTT", r"ttt|test[-_ ]time", UNKNOWN, SILENT),
    Stage("sliding_window", "sliding", r"sliding|stride|slide", YES, PLAIN),
    Stage("temped", "tempered", r"temped|temperature", YES, PLAIN),
    Stage("roundtrip", "roundtrip", r"round[-_ ]?trip|quantized|quantised", YES, PLAIN),
    Stage("mix", "mixture", r"^(final_\w+_)?mix$", YES, PLAIN),
)
STAGES = (  # in the order of a table; the last one there is the score
    "roundtrip",
    "temped",
    "sliding_window",
    "etlb",
    "ttt",
    "ttt_lora",
    "ttt_phased",
    "ttt_slot",
    "ttt_ctw",
    "slot",
    "ctw",
    "ngram",
    "ppm",
    "mix",
)


@dataclasses.dataclass
class Result:
    """A score: the stage it is of, the label it has in the log, nats a token, bits a byte, seconds, whether causal (None: not known) and how that is known."""

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
    how: str = ""


@dataclasses.dataclass
class Reading:
    """A log that is being read, and what earlier lines say of later ones."""

    log: Any
    method: str = "ttt"  # that lines about TTT are of
    mode: str = ""  # a word on how the next score is made, for labels that do not say it
    last: Result | None = None
    base: str = ""  # label of the last result, without "_exact"
    verdict: tuple = (YES, "", "")  # causal, breaks, how: what a line says of all scores after it
    loss: float = math.nan  # that stands in a line of its own
    seconds: float | None = None  # of the next score, whose own line may not say it
    done: float = math.nan  # bits a byte at the end of TTT: the next score, under any label
    block: bool = False  # within a block of settings, one a line
    source: bool = False  # within the source of the script
    artifact: str = ""  # digest of the file that scores are of


def number(text):
    """A whole number that may have commas."""
    return int(text.replace(",", ""))


def milliseconds(text):
    """Milliseconds of a time like 12ms, 0.8m or 3.5s."""
    value, unit = re.fullmatch(r"([\d.]+) ?(ms|m|s)", text).groups()
    return float(value) * UNITS[unit]


def seconds(text):
    """Seconds of such a time."""
    return milliseconds(text) / 1000


def megabytes(text):
    """Bytes of a number of millions."""
    return round(float(text) * 1e6)


FIELDS: dict[str, Callable] = dict(  # groups of rows that are fields of a Log
    seed=int,
    steps=int,
    iterations=int,
    world_size=int,
    batch_tokens=int,
    parameters=number,
    code_bytes=number,
    source_bytes=number,
    total_bytes=number,
    rounded_bytes=megabytes,
    train_seconds=seconds,
    eval_seconds=seconds,
    hardware=str.strip,
    torch=str,
)


def fields(text):
    """name:value and name=value words of a line."""
    return dict(re.findall(r"(\w+)[:=](\S+)", text))


def note(reading, found, line):
    """Fill the fields that the groups are named after."""
    for name, text in found.items():
        if text is not None and name in FIELDS:
            setattr(reading.log, name, FIELDS[name](text))


def nothing(reading, found, line):
    """A line that is known and says nothing of use."""


def broken(reading, found, line):
    """A line that begins as one of a row and does not go on so: cut off or overwritten."""
    reading.log.broken += 1


def warned(reading, found, line):
    """A warning of this script's, as it is when it is said for the last time."""
    kind = found["text"].split(" is ")[0]
    reading.log.warnings[kind] = found["text"]


def capped(reading, found, line):
    """Training ended by its time cap."""
    note(reading, found, line)
    reading.log.capped = True


def end_of_source(reading, found, line):
    """What stands above was the source."""
    reading.source = reading.block = False


def own_settings(reading, found, line):
    """All settings of a run of ours."""
    log = reading.log
    log.settings = dict(word.split("=", 1) for word in found["words"].split() if "=" in word)
    log.style = "this script"
    log.seed = int(log.settings.get("SEED", -1))
    log.batch_tokens = int(log.settings.get("TRAIN_BATCH_TOKENS", 0)) or None
    log.prequant_ttt |= log.settings.get("PREQUANT_TTT_ENABLED") == "1"


def own_machine(reading, found, line):
    """Versions and machine of a run of ours, at each start: it goes on after what stopped it."""
    log, told = reading.log, fields(line)
    log.style, log.errors, log.stopped = "this script", [], False
    log.torch, log.world_size = told.get("torch"), int(told.get("world_size", 1))
    log.hardware = line.split("device:", 1)[-1].split(" dtype:")[0]


def finished(reading, found, line):
    """Evaluation ended."""
    note(reading, found, line)
    reading.log.finished = True


def artifact_file(reading, found, line):
    """A run of ours wrote its artifact; scores of another one, before a restart, are no longer its own."""
    log = reading.log
    if reading.artifact not in ("", found["digest"]):
        log.lines = [label for label in log.lines if not label.startswith("final_artifact")]
        log.results, log.finished, log.eval_seconds = {}, False, None
    reading.artifact = found["digest"]


def resumed(reading, found, line):
    """A run goes on from a checkpoint."""
    reading.log.resumed += 1


def stopped(reading, found, line):
    """A run of ours was stopped by a signal."""
    reading.log.stopped = True


def error(reading, found, line):
    """A run ended by an error."""
    reading.log.errors.append(line)


def open_block(reading, found, line):
    """A block of settings begins, one a line."""
    reading.block = True


def setting(reading, found, line):
    """A setting in a line of its own."""
    if reading.block:
        reading.log.settings[found["name"]] = found["value"].strip()


def dictionary(reading, found, line):
    """Settings as a dictionary of Python or JSON; below the first step it is something else."""
    if reading.log.last_step or reading.log.results:
        return
    try:
        told = json.loads(found["text"])
    except ValueError:
        try:
            told = ast.literal_eval(found["text"])
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return
    if isinstance(told, dict):
        plain = {str(k): str(v) for k, v in told.items() if not isinstance(v, (dict, list))}
        reading.log.settings |= plain


def header(reading, found, line):
    """A line of name:value words before the first step: settings."""
    note(reading, found, line)
    log = reading.log
    if log.style == "this script":
        return
    told = fields(line)
    for name, field in (
        ("seed", "seed"),
        ("world_size", "world_size"),
        ("train_batch_tokens", "batch_tokens"),
    ):
        if re.fullmatch(r"\d{1,12}", told.get(name, "")):
            setattr(log, field, int(told[name]))
    log.settings |= {name: value for name, value in told.items() if name != "seed"}


def begin_ttt(reading, found, line):
    """TTT begins, with its settings; the lines that follow are of it."""
    told = fields(line)
    slot, ctw = "slot_steps" in told, float(told.get("ctw_weight", 0)) > 0
    reading.method = "ttt_slot" if slot else "ttt_ctw" if ctw else "ttt"
    reading.log.started.add(reading.method)
    reading.log.settings |= told


def took(reading, found, line):
    """How long the next score took."""
    reading.seconds = seconds(found["time"])


def end_ttt(reading, found, line):
    """TTT has ended; its score comes next, under any label."""
    reading.done = float(found["bpb"])


def begin_phased(reading, found, line):
    """Phased TTT begins."""
    reading.log.started.add("ttt_phased")


def prequant_ttt(reading, found, line):
    """Training on validation tokens before quantising."""
    log = reading.log
    log.prequant_ttt = True
    spent = re.search(r"(?:elapsed=|seconds:|time[:=]|done in )([\d.]+)", line)
    if spent:
        log.prequant_seconds = max(log.prequant_seconds, float(spent[1]))


def next_score(mode):
    """A row's function: the next score is made in a way that its label does not say."""

    def say(reading, found, line):
        reading.mode = mode

    return say


def judge(causal, breaks, how):
    """A row's function: what a line says of all scores after it. What breaks a condition outweighs what is not known."""

    def say(reading, found, line):
        if reading.verdict[0] is not False:
            reading.verdict = (causal, breaks, how)

    return say


def training(reading, found, line):
    """A step of training."""
    log = reading.log
    log.iterations = int(found["total"]) if found.get("total") else log.iterations
    spent = milliseconds(found["time"]) if found.get("time") else math.nan
    log.more.append((int(found["step"]), float(found["loss"]), spent))
    log.last_step = int(found["step"])


def other_step(reading, found, line):
    """A step of training that has no loss."""
    log = reading.log
    log.iterations = int(found["total"]) if found["total"] else log.iterations
    log.last_step = max(log.last_step, int(found["step"]))


def validation(reading, found, line):
    """A validation in training."""
    log, step = reading.log, int(found["step"])
    log.iterations = int(found["total"]) if found.get("total") else log.iterations
    spent = milliseconds(found["time"]) if found.get("time") else math.nan
    loss, bpb = (float(found[n]) if found.get(n) else math.nan for n in ("loss", "bpb"))
    log.validation.append((step, loss, bpb, spent))
    log.last_step = max(log.last_step, step)


def lone_loss(reading, found, line):
    """A val_loss in a line of its own; the next val_bpb belongs to it."""
    reading.loss = float(found["loss"])


def lone_score(reading, found, line):
    """A val_bpb in a line of its own: of what, the line does not say."""
    bpb = float(found["bpb"])
    known = [*reading.log.results.values(), *reading.log.extra]
    if not any(abs(r.val_bpb - bpb) < 6e-5 for r in known):  # a summary repeats a score
        label = "final" if found.get("final") else "val_bpb"
        keep(reading, Result(label, label, reading.loss, bpb, how=NAMELESS))
    reading.loss = math.nan


def bare(label):
    """A label without the word that its digits are exact."""
    return re.sub(r"_exact\b", "", label)


def stage_of(label):
    """The Stage of a label, or None."""
    low = bare(label).lower()
    return next((stage for stage in STAGE_TABLE if re.search(stage.labels, low)), None)


def score(reading, found, line):
    """A score with its label: the short line has the time, the "_exact" one the digits."""
    told = fields(line)
    if "causal" in told and "tokens" in told:
        reading.log.style = "this script"
    first, _, more = found["label"].partition(" ")
    if re.fullmatch(r"\w+[:=][\d.]*", first) and not first.endswith(":"):
        return  # a setting, no label
    label = (first + " " + re.sub(r"[\w.]+[:=]\S+", "", more)).strip(" :,([-")
    base = re.sub(r"\(.*\)", "", bare(label)).strip()
    result = Result(
        "",
        label,
        float(found.get("loss") or math.nan),
        float(found["bpb"]),
        next(
            (s for n in ("eval_time", "time", "eval", "elapsed") if (s := spent(told.get(n)))),
            reading.seconds,
        ),
        {"yes": YES, "no": NO}.get(told.get("causal")),
        told.get("breaks", ""),
        *(whole(told.get(name)) for name in ("tokens", "bytes")),
        whole(told.get("stride") or told.get("eval_stride")),
    )
    exact = label != bare(label) and reading.base.startswith(base)
    same = base == reading.base or exact  # the exact line may leave out what the short one says
    twin = reading.last if same and near(reading.last, result, 6e-5) else None
    if twin:
        result.stage, result.how = twin.stage, twin.how
        result = dataclasses.replace(result, causal=twin.causal, breaks=twin.breaks)
        if twin.stage == "averaged":
            reading.log.averaged = merge(twin, result)
        else:
            reading.log.lines.append(label)
            keep(reading, result)
    else:
        name_stage(reading, result, base, told)
    reading.base, reading.last = base, result
    reading.mode, reading.seconds, reading.done = "", None, math.nan


def spent(text):
    """Seconds of a time, None if there is none or it is zero: nothing takes no time."""
    time = text and re.match(TIME, text)
    return (seconds(time[0]) or None) if time else None


def whole(text):
    """A whole number that a word begins with, or None."""
    found = text and re.match(r"\d+", text)
    return int(found[0]) if found else None


def near(one, other, digits):
    """Whether two results are one score to so many digits."""
    return one is not None and abs(one.val_bpb - other.val_bpb) <= digits


def name_stage(reading, result, base, told):
    """Find which stage a score is of and whether it is causal, and keep it."""
    log = reading.log
    own = log.style == "this script"
    key = base.removeprefix("final_").removeprefix("artifact_")
    if result.causal is not None:
        result.how = OWN_LABEL
    if own and key in STAGES:
        result.stage = key
    else:
        look_up(reading, result, key, told)
    if not own:
        weigh(reading, result)
    if result.stage == "averaged":
        log.averaged = result
        return
    log.lines.append(result.label)
    if result.label != bare(result.label) and same_score(log, result):
        return
    if base.startswith("final_int8_zlib") and "roundtrip" not in log.results and not own:
        log.style = "baseline"
    if result.stage == "slot" and "steps" in told and log.style == "lineage":
        log.settings |= {"slot_steps": told["steps"], "slot_lr": told.get("lr")}
    keep(reading, result)


def look_up(reading, result, key, told):
    """Give a score the stage that its label has in the table, else the label itself; and what is known of that stage."""
    plain, mode = stage_of(result.label), told.get("eval_mode") or reading.mode
    if abs(reading.done - result.val_bpb) < 6e-5:
        mode = reading.method
    # lines before a label that says no more than roundtrip may say how the score was made
    said = bool(mode) and plain is not None and plain.key == "roundtrip"
    stage = stage_of(f"{result.label} {mode}") if said else plain
    if key.startswith("legal_ttt"):  # of TTT in any form
        stage = next(s for s in STAGE_TABLE if s.key == reading.method)
    result.stage = stage.key if stage else key
    if result.causal is None and stage:
        result.causal, result.breaks, result.how = stage.causal, stage.breaks, stage.how
    elif result.causal is None:
        result.how = NAMELESS
    if said:
        reading.log.mislabelled.append(
            f"{result.label} {result.val_bpb:.8g} is a score of {result.stage}, as lines before it say"
        )


def weigh(reading, result):
    """Let what lines before a score say outweigh what is known of its stage."""
    causal, breaks, how = reading.verdict
    if causal is NO or (causal is UNKNOWN and result.causal is YES):
        result.causal, result.how = causal, how
        result.breaks = ",".join(sorted({*filter(None, result.breaks.split(",")), breaks} - {""}))


def same_score(log, result):
    """Whether a label repeats the score of another stage; if so, that is noted."""
    for twin in [*log.results.values(), *log.extra]:
        loss = abs(twin.val_loss - result.val_loss) < 5e-9
        if twin.stage != result.stage and (loss or near(twin, result, 5e-9)):
            stride = f" with stride {twin.stride}" if twin.stride else ""
            log.mislabelled.append(
                f"{result.label} {result.val_bpb:.8f} is the score of {twin.stage}{stride}, not of a {result.stage}"
            )
            return True
    return False


def keep(reading, result):
    """Put a score where it belongs; a second stride has a place of its own."""
    log = reading.log
    if bare(result.label).endswith("_s64"):
        old = next((r for r in log.extra if r.stage == result.stage), None)
        log.extra = [r for r in log.extra if r is not old] + [merge(old, result)]
    else:
        log.results[result.stage] = merge(log.results.get(result.stage), result)


def merge(old, new):
    """Two lines of one score: the digits of the later, the time of whichever has it."""
    new = dataclasses.replace(new, label=bare(new.label))
    if not near(old, new, 1e-4):
        return new
    return dataclasses.replace(
        new,
        val_loss=old.val_loss if math.isnan(new.val_loss) else new.val_loss,
        seconds=new.seconds if new.seconds is not None else old.seconds,
        stride=new.stride or old.stride,
        label=old.label,
    )


def byte_mixture(reading, found, line):
    """Bits a byte of a mixture over bytes (nats a token are not said); the same number under another label is no other score."""
    bpb = float(found["bpb"])
    result = Result("ppm", "mix_bpb", math.nan, bpb, None, NO, "C2", how=PLAIN)
    reading.log.lines.append("mix_bpb")
    keep(reading, result)


SCORE = rf"val(?:idation)?_loss[:=] ?(?P<loss>{N})\b.*?\bval(?:idation)?_bpb[:=] ?(?P<bpb>{N})"
STEP = r"\s*(?=(?:[Ss]tep|iter)[:= ]|\d+/\d)(?:(?:[Ss]tep|iter)[:= ]\s*)?(?P<step>\d{1,12})(?:/(?P<total>\d{1,12}))?(?!\d)"
HASHED = judge(NO, "C2", "an n-gram cache, by a line of its log")
FITTED = judge(UNKNOWN, "", "a fitted temperature; the log does not say on which text")
MIXED = judge(UNKNOWN, "", "mixes in other predictors; the log does not show that they sum to one")
FIRST = judge(UNKNOWN, "", "TTT before the scores; the log does not say on which text")
EPOCHS = judge(UNKNOWN, "", "TTT of several epochs; the log does not say whether it scores first")
VALIDATION = judge(NO, "C3", "trained on the validation text, by the name of its data")
PAID = judge(UNKNOWN, "", "a paid prefix: validation text is in the artifact, by a line of its log")
GATED = judge(NO, "C2", "n-gram hints that read their target's class, by a line of its log")
LINES = tuple(  # the first row that matches a whole line from its beginning counts
    (re.compile(pattern), meaning)
    for pattern, meaning in (
        # what ends the source, or stands below it
        (r"[=]{40,}$", end_of_source),
        (r"settings: (?P<words>.*)", own_settings),
        (r"python:.* torch:", own_machine),
        # training: this script's, the baseline's and the lineage's, #1394's, the ternary ones', others'
        (rf"{STEP} (?:\S+ )*?{SCORE}(?:.*?train_time: ?(?P<time>{TIME}))?", validation),
        (
            rf"{STEP}\b.*?\b[Vv]al(?:idation)?[_ ]bpb[:= ] ?(?P<bpb>{N})(?:.*?(?:elapsed|time)[:=] ?(?P<time>{TIME}))?",
            validation,
        ),
        (
            rf"{STEP}\b.*?\b[Vv]al(?:idation)?[_ ]loss[:= ] ?(?P<loss>{N})(?:.*?(?:elapsed|time)[:=] ?(?P<time>{TIME}))?",
            validation,
        ),
        (
            rf"{STEP}[ :|].*?(?:train_)?loss[:= ] ?(?P<loss>{N})(?:.*?\b(?:train_time|t|time|elapsed)[:=] ?(?P<time>{TIME}))?",
            training,
        ),
        (
            rf"stopping_early: ?\S+ train_time: ?(?P<train_seconds>{TIME})(?: step: ?(?P<steps>\d+)/(?P<iterations>\d+))?$",
            capped,
        ),
        (r"warning: (?P<text>(?:the artifact's )?val_loss .*)", warned),
        (r"training steps:(?P<steps>\d+) .*train_time:(?P<train_seconds>\d+ms)$", note),
        (r"step:\d+/\d+ (?:train|val)_loss\b", broken),
        (r"[Ss]tep[:= ]\s*(?P<step>\d{1,12})\b(?:/(?P<total>\d{1,12}))?", other_step),
        # what was trained, by whom
        (r"seed: ?(?P<seed>\d+)\b", header),
        (r"model_params: ?(?P<parameters>[\d,]+)", header),
        (
            r"(?:[\w-]+ \| )?(?:[Mm]odel )?[Pp]arams: ?(?P<parameters>[\d,]+)\b.*?(?: ws:(?P<world_size>\d+).*?)?(?: s:(?P<seed>\d+))?$",
            note,
        ),
        (r"\s*total: (?P<parameters>[\d,]+) params\b", note),
        (r"(?:Running )?PyTorch (?P<torch>\S+)", note),
        (r"\| +\d+ +(?P<hardware>NVIDIA [\w ]*?)(?= {2,})", note),
        (r"(?:-+ ?)?Hyperparameters:?(?: ?-+)?$", open_block),
        (rf"\s*val_loss: +(?P<loss>{N})$", lone_loss),
        (rf"\s*(?P<final>FINAL |[Ff]inal )?val_bpb: +(?P<bpb>{N})$", lone_score),
        (r" {2}(?P<name>\w+): ?(?P<value>.*)", setting),
        (r"(?:\w+[:=]? ?)?(?P<text>\{.{2,}\})$", dictionary),
        (r"train_loader:dataset:\S*val_?only", VALIDATION),
        # sizes
        (r"\s*Code size(?: \(compressed\))?: ?(?P<code_bytes>[\d,]+) bytes", note),
        (r"Code size \(uncompressed\): ?(?P<source_bytes>[\d,]+) bytes", note),
        (r"\w+:\d+ code:(?P<code_bytes>\d+) total:(?P<total_bytes>\d+)\b", note),
        (r"Raw model: .* Code: (?P<code_bytes>[\d,]+) bytes", note),
        (r"artifact:\S+ .*\bcode:(?P<code_bytes>\d+)", note),
        (r".*= ?(?P<rounded_bytes>\d+\.\d+)/16\.00MB\b", note),
        (r"artifact_file sha256:(?P<digest>[0-9a-f]+)$", artifact_file),
        (r"budget:(?P<total_bytes>\d+)/16000000\b", note),
        (
            r".*?(?:[Tt]otal|TOTAL)[ _](?:[Ss]ubmission|[Aa]rtifact)(?: size)?(?![a-z])[^:]*: ?(?P<total_bytes>[\d,]+) ?(?:bytes|B)\b",
            note,
        ),
        # evaluation
        (r"eval_total .*eval_time:(?P<eval_seconds>\d+ms)", finished),
        (r"ttt_sliding:start\b|ttt:start chunks=", begin_ttt),
        (r"ttt:start\b|ttt_epoch:", FIRST),
        (r"ttt:.*\bepochs=(?:[2-9]|\d\d)", EPOCHS),
        (rf"ttt(?:_sliding)?:done .*val_bpb=(?P<bpb>{N})", end_ttt),
        (r"ttt_phased: ", begin_phased),
        (rf"ttt:completed .*time:(?P<time>{TIME})", took),
        (r"(?:prequant_ttt|pre_quant_ttt|pre-quant ttt)\b", prequant_ttt),
        (r".*\b[Ss]tarting sliding window eval", next_score("sliding")),
        (r"final_eval_mode:sliding_window", next_score("sliding")),
        (r" +sliding_eval \[", next_score("sliding")),
        (r"ngram_cache:|ngram_eval:", HASHED),
        (r"ngram_tilt:(?!.*within_beta=0\.0\b)", GATED),  # #1145, #1302
        (r".*[Cc]ontext mixer enabled", MIXED),
        (r"Paid prefix", PAID),
        (r"temp_scaling optimal_T:(?!1\.00\b)", FITTED),
        (rf".*\bmix_bpb[:=] ?(?P<bpb>{N})\b", byte_mixture),
        (
            r"\s*(?:\w*progress|\w*_chunk|\w*epoch|\w*warmup(?:_step)?|ttpp?|tttg|\S*:(?:done|progress|chunk|epoch|probe)|eval: batch)\b",
            nothing,
        ),
        (r"ablate_", nothing),  # one artifact, evaluated in many ways
        (rf"(?P<label>[A-Za-z][^|]{{0,60}}?) ?\b{SCORE}", score),
        (rf"(?P<label>\w*(?:final|_exact)\S*) (?:\w+[:=]\S+ )*?val_bpb[:=] ?(?P<bpb>{N})", score),
        # how it ended
        (r"resuming from|Resuming from", resumed),
        (r"stopped by", stopped),
        (r"error:", error),
        (r"(?:final_|legal_ttt)\S* val_loss\b", broken),
    )
)
HEADER = re.compile(r"\w+[:=]\S")  # settings, if before the first step
SOURCE = re.compile(  # a line that only source has
    r"(?:from __future__ import|import \w+(?:, ?\w+)*$|from [\w.]+ import |#!/usr/bin/|\"\"\"|'''|@\w+|def \w+\(|class \w+\b.*:$)"
)
BELOW_SOURCE = re.compile(  # a line that only a log has: nothing ruled the source off
    r"logs/\S+\.txt$|Running P(?:ython|yTorch) \d|val_bpb:enabled|train_loader:dataset"
)


def take(reading, line):
    """Note what a line says, by the first row that matches it."""
    if reading.source:
        if BELOW_SOURCE.match(line):
            end_of_source(reading, {}, line)
        elif not LINES[0][0].match(line):
            return
    elif SOURCE.match(line):
        reading.source = True
        return
    for pattern, meaning in LINES:
        found = pattern.match(line)
        if found:
            if meaning is not setting:
                reading.block = meaning is open_block
            try:
                meaning(reading, found.groupdict(), line)
            except (KeyError, ValueError, TypeError, OverflowError):  # cut off or overwritten
                reading.log.broken += 1
            return
    reading.block = False
    log = reading.log
    if HEADER.match(line) and not (log.last_step or log.results or log.started):
        header(reading, {}, line)


PACKAGE = r"(?:-[-\w].*|[A-Za-z][\w.\[\]-]*(?: *[=<>~!]=.*| *@ .*)?)"
KINDS = tuple(  # what a text is that is no training log: the first row found in it counts
    (re.compile(pattern, re.M), what)
    for pattern, what in (
        (
            rf"\A(?=(?s:.*)(?:[=<>~!]=|^(?:torch|numpy|sentencepiece)\b))(?:(?:#.*|{PACKAGE})?[ \t\r]*\n)*(?:{PACKAGE})?\Z",
            "a list of packages",
        ),
        (r"\A\s*[{\[](?s:.*)[}\]]\s*\Z", "JSON"),
        (r"^ablate_\S+ .*evaluator:", "a comparison of evaluations, by tools.ablate"),
        (r"^QUANT=\S+ .*model_bytes:", "a comparison of quantisers, by tools.quantise"),
        (r"^evaluator +claim +found", "an audit, by tools.audit"),
        (
            r"^=+ (?:FAILURES|test session starts|\d+ passed)|^[.FEsx]{10,}(?: +\[ *\d+%\])?$|^\d+ passed\b",
            "what pytest says",
        ),
        (
            r"post_ttt_val_bpb|^=+ .*(?:summary|result|eval).* =+$|\A#.*[Ss]ummary",
            "a summary of runs",
        ),
        (
            r"^Traceback \(most recent call last\)|ChildFailedError|^\w+Error: ",
            "a run that ended with an error before its first figure",
        ),
        (r"^(?:val_progress|warmup_step): ?\d", "a run that ended before its first figure"),
        (r"\A\$ ", "what a command said"),
        (r"\A(?:import |from \w+ import|#!/usr/bin|\"\"\")", "source"),
    )
)


def kind(text):
    """What a text is that is no training log, or an empty string."""
    return next((what for pattern, what in KINDS if pattern.search(text)), "")
