"""Parameter Golf, the SLOT record (pull request #1084), in one file: train, average, quantise, evaluate.

A GPT of 11 layers learns web text in ten minutes on 8 GPUs. What it exports, with this file, is under 16,000,000 bytes.

  torchrun --standalone --nproc_per_node=8 train_gpt.py     the record run, #1084's; =1 on one GPU, with gradient accumulation
  PRESET=pr1313 torchrun ... train_gpt.py                   another published system
  PRESET=demo python train_gpt.py                           a small run for a CPU (make demo builds its data)
  LOAD_ARTIFACT=logs/ID/final_model.ptz ...                 no training: evaluate an artifact
  RUN_ID=... RESUME=1 torchrun ... train_gpt.py              go on with a run that was stopped or killed
  python train_gpt.py --help                                every setting, an environment variable each
"The lineage" is the scripts of #549, #1084 and #1313. Shapes: B batch, T sequence, D model dim, V vocabulary, L layers, H query heads,
K key/value heads, R scored rows, N targets, W ranks. Tabs indent, small functions stand together, short statements share a line: bytes and lines count.
"""

import contextlib, ctypes, dataclasses, difflib, fcntl, functools, hashlib, itertools, json, lzma, math, os, re, signal, sys
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from time import perf_counter, sleep, strftime


# ---------- settings
# One table is parser, bounds check and help text. It stands before the import of torch, for which --help must not wait.
class BadInput(Exception):
    "Unusable setting or file: exit status 2."


class Fault(Exception):
    "What went wrong on the way. Exit status 1."


def refuse(wrong, message, error=BadInput):
    """Raise error(message) if wrong."""
    if wrong:
        raise error(message)


EVALS, Setting = (
    "roundtrip sliding_window ttt ttt_slot slot ttt_ctw ctw".split(),
    namedtuple("Setting", "name kind default low high text"),
)
DEFAULT_BOUNDS = {
    "int": ("0", "1e9"),
    "ints": ("0", "1e9"),
    "float": ("0", "100"),
}  # of a setting that names none
SETTINGS = [
    Setting(name, kind, default, *((low, high) if low else DEFAULT_BOUNDS.get(kind, "--")), text)
    for names, kind, defaults, low, high, text in re.findall(
        r"(?:^| \| )(\S+) (\S+) (\S+) (?:([-\d.e]+) ([-\d.e]+) )?(.+?)(?=$| \| )",
        """\
PRESET presets pr1084 Comma list, later ones win: a published system; best, what helped its followers; demo, a small run for a CPU.
RUN_ID str - Names the log and folder in logs/, new; empty: date, time, seed. | SEED int 1337 0 2147483647 Seed of initial weights and data order.
DEVICE auto|cpu|cuda auto auto: a GPU if there is one. | COMPILE auto|0|1 auto torch.compile; auto: on a GPU.
ATTENTION auto|fa3|fa4|sdpa auto FlashAttention-3, -4 or torch's SDPA; auto: the first there is.
LOAD_ARTIFACT str - Evaluate this artifact, ours or the lineage's, without training.
LOAD_CHECKPOINT str - Begin with this run's checkpoint; with its ITERATIONS, average and export anew.
EVALS evals auto Comma list, or none; auto: roundtrip, sliding_window and what TTT, SLOT and CTW ask for.
SAVE_EVERY int 500 Steps between checkpoints; 0: at the end and on a signal. | RESUME bool 0 Go on with RUN_ID from its last checkpoint.
SAVE_NLL bool 0 Write nll_<evaluator>.npy: float64 nats of each target in stream order.
DATA_PATH str ./data/datasets/fineweb10B_sp1024 Folder of fineweb_train_*.bin and fineweb_val_*.bin.
TOKENIZER_PATH str ./data/tokenizers/fineweb_1024_bpe.model Its SentencePiece model.
TRAIN_BATCH_TOKENS int 786432 1 2e9 Tokens of a training step over all ranks.
VAL_BATCH_SIZE int 524288 1 2e9 Tokens of an evaluation forward over all ranks. | VAL_LOSS_EVERY int 4000 Steps between validations; 0: at the end.
TRAIN_LOG_EVERY int 500 1 1e9 Steps between training lines, after ten. | ITERATIONS int 9000 1 1e9 Training steps, at most.
DATA_ORDER shuffled|coprime shuffled Sequences of a shard: a permutation, or steps of a stride coprime to their number.
MAX_WALLCLOCK_SECONDS float 600 0 1e9 Training time, at most; 0: no cap. | WARMUP_STEPS int 20 Steps that prime torch.compile; no trace.
WARMDOWN_ITERS int 3500 Steps, or their time, in which rates fall to MIN_LR. | MIN_LR float 0 0 1 Factor on rates that they do not fall under.
TRAIN_SEQ_LEN int 2048 2 1e6 Tokens of a training sequence. | VOCAB_SIZE int 1024 2 65536 Vocabulary; must be the tokenizer's.
NUM_LAYERS int 11 1 1000 Transformer blocks. | MODEL_DIM int 512 2 65536 Width of the residual stream.
NUM_HEADS|NUM_KV_HEADS int 8|4 1 1024 Query heads, a multiple of the key/value heads. | MLP_MULT float 3 0.01 64 MLP width over MODEL_DIM.
TIE_EMBEDDINGS bool 1 The token embedding is the output head too. | LOGIT_SOFTCAP float 30 0.01 1000 Logits are cap * tanh(z / cap).
ROPE_BASE float 10000 1 1e12 Base of the rotary position embedding (RoPE). | ROPE_DIMS int 16 Rotated dimensions of a head; 0: all.
ROPE_TRAIN_LEN int 1024 1 1e6 A longer TRAIN_SEQ_LEN rescales ROPE_BASE. | LN_SCALE bool 1 Scale the inputs of block i by 1/sqrt(i+1).
XSA_LAST_N int 4 Last layers with exclusive self attention (XSA). | PARALLEL_LAST_N int 0 Last layers whose MLP reads what attention does.
VRL_ENABLED bool 0 Value residual (1-g) v + g v_first, g learned. | VALUE_RESIDUAL bool 0 Value residual a v_first + b v, a and b learned.
GATED_ATTENTION bool 0 Learned sigmoid gates on heads. | RECUR_LAYERS ints - Layers, from 0, run twice, each pass with its own vectors (#686).
RECUR_START int 3000 Step from which they are. | PREQUANT_TTT_ENABLED bool 0 Train on validation tokens before quantising (#1488). Breaks C3.
BIGRAM_VOCAB_SIZE int 1536 0 16777216 Buckets of the bigram hash embedding; 0: none. | BIGRAM_DIM int 128 1 65536 Width of its table.
VE_ENABLED bool 1 Value embedding (VE), added to values. | VE_DIM int 128 1 65536 Width of its table.
VE_LAYERS ints 9,10 Layers, from 0, that get it. | TIED_EMBED_INIT_STD float 0.005 0 10 Its initial deviation, if tied.
QK_GAIN_INIT float 1.5 Initial gain of a query head. | MATRIX_LR float 0.025 Muon's rate, for the matrices.
TIED_EMBED_LR|EMBED_LR|HEAD_LR|SCALAR_LR float 0.035|0.6|0.008|0.025 AdamW's rate for tied embeddings, untied ones, an untied head, the rest.
MUON_MOMENTUM|MUON_MOMENTUM_WARMUP_START float 0.99|0.92 0 0.99999 Muon's Nesterov momentum, in the end and at first.
MUON_MOMENTUM_WARMUP_STEPS int 1500 Steps from there to MUON_MOMENTUM. | MUON_BACKEND_STEPS int 5 1 100 Newton-Schulz steps.
NEWTON_SCHULZ quintic|polar_express quintic Their coefficients: Muon's, or Polar Express's (arXiv:2505.16932).
MUON_ROW_NORM bool 0 Give a gradient's rows equal norms before them (MuonEq-R).
MUON_WD|ADAM_WD float 0.04|0.04 Decoupled weight decay of Muon, of AdamW. | BETA1|BETA2 float 0.9|0.95 0 0.99999 AdamW's betas.
ADAM_EPS float 1e-8 1e-30 1 AdamW's epsilon. | GRAD_CLIP_NORM float 0.3 0 1e9 Cap on the reduced gradient's norm; 0: none.
EMA_ENABLED bool 1 Moving average of the weights, a candidate for the export.
EMA_DECAY float 0.997 0 0.999999 Its decay; after n steps min(EMA_DECAY, (1+n)/(10+n)).
SWA_ENABLED bool 1 Mean of weights while rates are under 0.2 of full, another. | SWA_EVERY int 50 1 1e9 Steps between snapshots.
LAWA_ENABLED bool 0 Mean of the last LAWA_K snapshots, another. | LAWA_K|LAWA_FREQ int 10|100 1 1e9 How many, and steps between them.
AVERAGE auto|ema|swa|lawa|none auto What is exported; auto: what loses least on held-out training text, quantised.
LATE_QAT bool 1 Straight-through training on the export's grid. | LATE_QAT_THRESHOLD float 0.15 0 1 Factor on rates under which it is on.
QUANT rd|gptq|gptq_lite rd Steps by what errors cost (rate-distortion); with GPTQ's error feedback; or #549's percentiles.
CALIBRATION_TOKENS int 32768 1 1e9 Training tokens that say what errors cost. | CODER rans|lzma rans Entropy coder of levels.
ARTIFACT_BYTES int 16000000 1000 1e12 Cap on artifact plus code; steps widen to fit. | PREQUANT_TTT_LR float 0.00045 AdamW's rate, cosine to a tenth.
PREQUANT_TTT_EPOCHS int 10 1 1000 Passes over the validation tokens.
PREQUANT_TTT_FREEZE_BLOCKS|TTT_FREEZE_BLOCKS int 1|0 First blocks that it leaves alone. | EVAL_SEQ_LEN int 2048 2 1e6 Tokens of an evaluation window.
EVAL_STRIDE int 64 1 1e6 Targets that a sliding window adds. | TTT_ENABLED bool 1 Score-first test-time training (TTT).
TTT_LR float 0.002 SGD's rate, cosine to 0 over chunks. | TTT_EPOCHS int 3 Passes over a scored chunk.
TTT_CHUNK_TOKENS int 32768 1 2e9 Targets of a chunk, after which TTT and CTW learn. | TTT_MOMENTUM float 0.9 0 0.99999 SGD momentum.
TTT_BATCH_SEQS int 32 1 1e6 Sequences of a step over all ranks. | TTT_GRAD_CLIP float 1 0 1e9 Cap on the gradient's norm; 0: none.
SLOT_ENABLED bool 1 SLOT, in TTT's scoring with TTT_ENABLED=1. | SLOT_DELTA shared|window shared One delta for a batch, or one a window.
SLOT_BIAS bool 0 A bias on the logits beside it.
SLOT_LOSS all|scored|context|past all Fit to all targets; to those scored; to those scored before; or carry it on, fit to what it scored.
SLOT_STEPS int 3 1 1000 AdamW steps of a fit. | SLOT_LR float 0.001 1e-6 100 Rate of its first step.
SLOT_LR_MIN float -1 -1 100 Rate of its last step, by a cosine; -1: SLOT_LR.
SLOT_HYPER_LR float 0 Hypergradient (arXiv:2502.11229): rates move by this * (gradient . last gradient).
SLOT_BATCH_SEQS int 32 1 1e6 Consecutive windows of a batch.
CTW_WEIGHT float 0 0 1 Weight of context tree weighting (CTW) at the entropy ln V, in proportion below; 0: off.
CTW_DEPTH int 4 0 64 Tokens of its longest context. | CTW_ENTROPY_THRESHOLD float 2 Nats of entropy above which it is mixed in.
""",
        re.M,
    )
    for name, default in zip(names.split("|"), defaults.split("|") if "|" in names else [defaults])
]
# what differs from #1084; sizes as in the published logs
PRESETS = {
    line.split()[0]: dict(word.split("=") for word in line.split()[1:])
    for line in """\
pr1084; pr549 SLOT_ENABLED=0
pr1150 BIGRAM_VOCAB_SIZE=2048 ITERATIONS=20000 SLOT_STEPS=5 SLOT_LR=0.003; pr1303 +1313 EVAL_STRIDE=64 SLOT_STEPS=16 SLOT_LR=0.008 SLOT_LR_MIN=0.0008
pr1313 +1313; pr1488 +1313 QK_GAIN_INIT=5.25 PREQUANT_TTT_ENABLED=1
slot28 +1313 SLOT_STEPS=28; slot32 +1313 SLOT_STEPS=32 SLOT_LR=0.015; slot48 +1313 SLOT_STEPS=48
hypergradient +1313 SLOT_HYPER_LR=1e-5
best SLOT_ENABLED=0 XSA_LAST_N=11 QK_GAIN_INIT=4 RECUR_LAYERS=4,5 PARALLEL_LAST_N=4 NEWTON_SCHULZ=polar_express MUON_ROW_NORM=1 MUON_WD=0.085 \
DATA_ORDER=coprime MIN_LR=0.05 QUANT=gptq
best_demo SLOT_ENABLED=0 EVALS=auto XSA_LAST_N=4 NEWTON_SCHULZ=polar_express MUON_WD=0.085 DATA_ORDER=coprime MIN_LR=0.05 QUANT=gptq
demo DATA_PATH=./data/datasets/demo_sp1024 TOKENIZER_PATH=./data/tokenizers/demo_1024_bpe.model EVALS=roundtrip,sliding_window,ttt,ttt_slot \
NUM_LAYERS=4 MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2 VE_LAYERS=2,3 VE_DIM=32 XSA_LAST_N=2 BIGRAM_VOCAB_SIZE=4096 BIGRAM_DIM=32 \
TRAIN_SEQ_LEN=256 EVAL_SEQ_LEN=256 TRAIN_BATCH_TOKENS=4096 VAL_BATCH_SIZE=8192 ITERATIONS=400 WARMDOWN_ITERS=160 \
MAX_WALLCLOCK_SECONDS=150 VAL_LOSS_EVERY=200 TRAIN_LOG_EVERY=5 SAVE_EVERY=50 MUON_MOMENTUM=0.95 MUON_MOMENTUM_WARMUP_STEPS=100 MATRIX_LR=0.04 \
SWA_EVERY=5 TTT_CHUNK_TOKENS=8192 TTT_LR=0.006
""".replace(
        "+1313",
        "ITERATIONS=20000 XSA_LAST_N=11 VRL_ENABLED=1 QK_GAIN_INIT=4 BIGRAM_VOCAB_SIZE=1024 TTT_ENABLED=0 EVAL_STRIDE=96 "
        "SLOT_DELTA=window SLOT_BIAS=1 SLOT_LOSS=scored SLOT_STEPS=24 SLOT_LR=0.012 SLOT_LR_MIN=0.001",
    )
    .replace("; ", "\n")
    .splitlines()
}
NAMES = [s.name for s in SETTINGS]
MODEL_SETTINGS = NAMES[
    NAMES.index("TRAIN_SEQ_LEN") : NAMES.index("VE_LAYERS") + 1
]  # an artifact carries them
# an unknown variable that begins like this is a misspelt setting, or the lineage's
FAMILIES = re.compile(
    "(TTT|SLOT|CTW|MUON|ADAM|EMA|SWA|VE|XSA|BIGRAM|ROPE|QAT|LATE_QAT|TIED|WARMDOWN|RECUR|VRL|VALUE_RESIDUAL|"
    "GATED_ATTENTION|PREQUANT|MTP|DTG|LAWA)(_|$)"
)
Config = dataclasses.make_dataclass("Config", [*map(str.lower, NAMES), "explicit"], frozen=True)


def parse_setting(s, text):
    """Value of setting s from its text, "-" for empty. Raises ValueError."""
    if s.kind == "str":
        return "" if text == "-" else text
    choices = {"bool": "0|1|false|true"}.get(s.kind, s.kind)
    if "|" in choices:
        refuse(
            text.lower() not in choices.split("|"),
            "allowed: " + choices.replace("|", ", "),
            ValueError,
        )
        return text.lower() in ("1", "true") if s.kind == "bool" else text.lower()
    words = (
        [w for w in text.split(",") if w.strip("-")]
        if s.kind in ("ints", "evals", "presets")
        else [text]
    )
    if s.kind == "presets":
        refuse(
            not words or set(map(str.lower, words)) - {*PRESETS},
            "allowed: a comma list of " + ", ".join(PRESETS),
            ValueError,
        )
        return tuple(map(str.lower, words))
    if s.kind == "evals":
        refuse(
            set(words) - {*EVALS} and words not in (["auto"], ["none"]),
            "allowed: auto, none, or a comma list of " + ", ".join(EVALS),
            ValueError,
        )
        return tuple(dict.fromkeys(words))
    try:
        values = tuple(map(float if s.kind == "float" else int, words))
    except ValueError:
        values = (math.nan,)
    what = {"ints": "comma list of integers", "int": "integer", "float": "number"}[s.kind]
    refuse(
        not all(float(s.low) <= v <= float(s.high) for v in values),
        f"allowed: {what}, {s.low} to {s.high}",
        ValueError,
    )  # nan fails too
    return values if s.kind == "ints" else values[0]


def load_config(env):
    """Config from environment variables. Raises BadInput with all problems, a line each."""
    values, problems = {}, []
    for name in sorted(set(env) - set(NAMES)):
        near = difflib.get_close_matches(name, NAMES, 1, 0 if FAMILIES.match(name) else 0.85)
        if near:
            problems.append(
                f"{name}={env[name]}: there is no such setting. Nearest name: {near[0]}. Correct it or unset it."
            )
    preset = {
        k: v
        for name in env.get("PRESET", "").lower().split(",")
        for k, v in PRESETS.get(name.strip(), {}).items()
    }
    for s in SETTINGS:
        text = str(env.get(s.name, preset.get(s.name, s.default))).strip()
        try:
            values[s.name.lower()] = parse_setting(s, text)
        except ValueError as why:
            problems.append(f"{s.name}={text}: {why}. {s.text}")
            values[s.name.lower()] = parse_setting(s, s.default)
    c = Config(**values, explicit=frozenset(n for n in values if n.upper() in env))
    problems += cross_check(c)
    refuse(problems, "\n".join(problems))
    last = "_".join(
        ["ttt"] * c.ttt_enabled + ["slot"] * c.slot_enabled + ["ctw"] * (c.ctw_weight > 0)
    )
    auto = ("roundtrip", "sliding_window") + ((last,) if last else ())
    return dataclasses.replace(c, evals={("auto",): auto, ("none",): ()}.get(c.evals, c.evals))


def shown(value):
    """A setting's value as one would give it."""
    return (
        ",".join(map(str, value))
        if isinstance(value, (tuple, list))
        else str(int(value) if isinstance(value, bool) else value)
    )


def cross_check(c):
    """Problems between settings that are each valid alone."""
    get, window, head_dim = (
        (lambda name: getattr(c, name.lower())),
        c.eval_seq_len,
        c.model_dim // c.num_heads,
    )
    words, rot = {w for label in c.evals for w in label.split("_")}, c.rope_dims or head_dim
    rules = [
        (
            rot > head_dim or rot % 2,
            "ROPE_DIMS",
            f"must be even and at most the head dim {head_dim}, or 0 with an even head dim",
        ),
        (c.ve_enabled and not c.ve_layers, "VE_LAYERS", "name a layer, or set VE_ENABLED=0"),
        (
            c.vrl_enabled and c.value_residual,
            "VRL_ENABLED",
            "mixes the same values as VALUE_RESIDUAL=1; choose one",
        ),
        (c.bigram_vocab_size == 1, "BIGRAM_VOCAB_SIZE", "must be 0 or at least 2"),
        (
            c.slot_enabled and c.slot_loss == "context" and c.eval_stride == window,
            "SLOT_LOSS",
            f"EVAL_STRIDE={window}, the window, leaves no context",
        ),
        (c.slot_hyper_lr and not c.slot_enabled, "SLOT_HYPER_LR", "needs SLOT_ENABLED=1"),
        (
            c.slot_enabled and c.ctw_weight and c.evals == ("auto",),
            "CTW_WEIGHT",
            "no evaluator has SLOT and CTW; set SLOT_ENABLED=0, or EVALS",
        ),
        (c.resume and not c.run_id, "RESUME", "needs the RUN_ID to go on with"),
        (
            c.load_artifact and c.load_checkpoint,
            "LOAD_CHECKPOINT",
            "begins a training, LOAD_ARTIFACT needs none; choose one",
        ),
        (
            c.average not in ("auto", "none") and not getattr(c, f"{c.average}_enabled", True),
            "AVERAGE",
            f"needs {c.average.upper()}_ENABLED=1",
        ),
        (
            c.run_id and not re.fullmatch(r"\w[\w.-]*", c.run_id, re.A),
            "RUN_ID",
            "only letters, digits and . _ -, since files are named by it",
        ),
        *(
            (not on and word in words, "EVALS", f"{off} leaves out {word}; change either")
            for word, on, off in (
                ("ttt", c.ttt_enabled, "TTT_ENABLED=0"),
                ("slot", c.slot_enabled, "SLOT_ENABLED=0"),
                ("ctw", c.ctw_weight, "CTW_WEIGHT=0"),
            )
        ),
        *(
            (
                on
                and set(get(name)) - set(range(c.num_layers))
                or len(set(get(name))) < len(get(name)),
                name,
                f"must be different layers from 0 to {c.num_layers - 1}",
            )
            for name, on in (("VE_LAYERS", c.ve_enabled), ("RECUR_LAYERS", True))
        ),
        *(
            (get(a) % get(b), a, f"must be a multiple of {b}={get(b)}")
            for a, b in map(
                str.split,
                (
                    "MODEL_DIM NUM_HEADS",
                    "NUM_HEADS NUM_KV_HEADS",
                    "TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN",
                ),
            )
        ),
        *(
            (get(a) > get(b), a, f"at most {b}={get(b)}")
            for a, b in map(
                str.split,
                (
                    "EVAL_STRIDE EVAL_SEQ_LEN",
                    "EVAL_SEQ_LEN VAL_BATCH_SIZE",
                    "EVAL_SEQ_LEN TTT_CHUNK_TOKENS",
                    "SLOT_LR_MIN SLOT_LR",
                    "XSA_LAST_N NUM_LAYERS",
                    "PARALLEL_LAST_N NUM_LAYERS",
                    "TTT_FREEZE_BLOCKS NUM_LAYERS",
                    "PREQUANT_TTT_FREEZE_BLOCKS NUM_LAYERS",
                ),
            )
        ),
    ]
    return [f"{name}={shown(get(name))}: {text}." for wrong, name, text in rules if wrong]


def help_text():
    """The --help page."""
    lines = [__doc__, "Settings: NAME=default (kind, lowest to highest)"]
    for s in SETTINGS:
        bounds = f", {s.low} to {s.high}" if s.low != "-" else ""
        lines += [
            f"  {s.name}={'' if s.default == '-' else s.default} ({s.kind}{bounds})",
            f"      {s.text}",
        ]
    lines += ["Evaluators: " + ", ".join(EVALS), "Presets:"]
    return "\n".join(
        lines
        + [
            f"  {name}: " + " ".join(f"{k}={v}" for k, v in values.items())
            for name, values in PRESETS.items()
        ]
    )


if __name__ == "__main__" and {"--help", "-h"} & set(sys.argv[1:]):
    sys.exit(print(help_text()))

import numpy as np, torch, torch.distributed as dist, torch.nn.functional as F
from torch import nn

# ---------- files
# An artifact, checkpoint or progress file: magic with a version (8 bytes), SHA-256 of the rest (32), then, in an artifact in LZMA streams:
# uint32 length of a JSON header that ends in "tensors": [[name, dtype, shape], ...], the header, those tensors. Reading runs no code.
MAGIC, EXPANSION, STREAMS = b"PGSLOT\x02\n", 64, 8  # LZMA may grow so many times, or to 32 MiB
# weights do not repeat: one literal context and a short search do as well as preset 6 in half the time
LZMA_FILTERS = [
    dict(id=lzma.FILTER_LZMA2, preset=6, lc=0, lp=0, pb=0, mf=lzma.MF_HC4, depth=1, nice_len=32)
]
DTYPES = {
    str(dtype)[6:]: dtype
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.half, torch.float, torch.double)
}


def seal(header, tensors, compress=None):
    """A file, as a list of bytes-likes, of a JSON header and CPU tensors by name."""
    table = [[name, str(t.dtype)[6:], list(t.shape)] for name, t in tensors.items()]
    head, digest = json.dumps({**header, "tensors": table}).encode(), hashlib.sha256()
    parts = [
        len(head).to_bytes(4, "little"),
        head,
        *(t.reshape(-1).view(torch.uint8).numpy() for t in tensors.values()),
    ]
    parts = [compress(b"".join(parts))] if compress else parts
    for part in parts:
        digest.update(part)
    return [MAGIC, digest.digest(), *parts]


def compress(raw):
    """LZMA streams of equal parts of raw, made side by side; the same bytes on any number of cores."""
    size = max(2**20, -(-len(raw) // STREAMS))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return b"".join(
            pool.map(
                lambda at: lzma.compress(
                    raw[at : at + size], lzma.FORMAT_XZ, lzma.CHECK_NONE, None, LZMA_FILTERS
                ),
                range(0, len(raw), size),
            )
        )


def expand(data):
    """Raw bytes of LZMA streams. Raises ValueError or LZMAError."""
    raw, most = bytearray(), max(EXPANSION * len(data), 2**25)
    for _ in range(STREAMS):
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2**27)
        raw += decoder.decompress(data, most - len(raw))
        data = decoder.unused_data
        if not decoder.eof or not data:
            break
    refuse(
        not decoder.eof or data,
        f"its LZMA is cut off, followed by something, or grows over {EXPANSION} times",
        ValueError,
    )
    return raw


def unseal(data, expand=memoryview):
    """(header, tensors by name, views) of a file's bytes. Raises ValueError, or others of what reads them."""
    refuse(
        data[:8] != MAGIC or hashlib.sha256(memoryview(data)[40:]).digest() != data[8:40],
        "wrong checksum",
        ValueError,
    )
    body, tensors = expand(memoryview(data)[40:]), {}
    at = 4 + int.from_bytes(body[:4], "little")
    header = json.loads(bytes(body[4:at]))
    for name, dtype, shape in header["tensors"]:
        n = math.prod(shape)
        refuse(name in tensors or n < 1, f"tensor {name} is empty or there twice", ValueError)
        tensors[name] = torch.frombuffer(body, dtype=DTYPES[dtype], count=n, offset=at).view(shape)
        at += n * DTYPES[dtype].itemsize
    refuse(at != len(body), f"{len(body) - at} bytes too many", ValueError)
    return header, tensors


def write_file(path, parts):
    """Write a file that is whole or not there, the old one staying until then. Raises Fault."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as why:
        part.unlink(missing_ok=True)
        raise Fault(
            f"{path}: {why.strerror}: not written, older files kept; make room, then RUN_ID={path.parent.name} RESUME=1."
        ) from None


# ---------- ranks, log, what a run goes on from
# Only rank 0 writes. metric() does so to the console, logs/RUN_ID.txt and, unrounded, logs/RUN_ID/metrics.jsonl.
STOPS = []  # signals that came: (number, time)


def on_signal(number, frame):
    """The first ends the run where it can go on from; another does at once. torchrun passes on what a terminal has sent already."""
    if STOPS and ("TORCHELASTIC_RUN_ID" not in os.environ or perf_counter() - STOPS[0][1] > 1):
        os._exit(128 + number)
    STOPS.append((number, perf_counter()))


def keep_freed_memory(block=2**25, rest=2**31 - 1):
    """Let glibc reuse freed blocks of so many bytes, as a GPU's allocator does: the system's new ones cost 5 to 20 % of a step."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        for option, value in ((-3, block), (-1, rest)):
            ctypes.CDLL(None).mallopt(option, value)


FORMATS = {
    "train_time": "{:.0f}ms",
    "eval_time": "{:.0f}ms",
    "step_avg": "{:.2f}ms",
    "seconds": "{:.1f}",
    "step": "{:.6g}",
}


class Run:
    """Rank of world ranks, device, compute dtype, folder, log."""

    def __init__(self, c):
        self.rank, self.world, local, neighbours = (
            int(os.environ.get(name, default))
            for name, default in (
                ("RANK", 0),
                ("WORLD_SIZE", 1),
                ("LOCAL_RANK", 0),
                ("LOCAL_WORLD_SIZE", 1),
            )
        )
        self.cuda = c.device != "cpu" and torch.cuda.is_available()
        refuse(
            c.device == "cuda" and not self.cuda,
            "DEVICE=cuda: torch sees no GPU; allowed here: cpu or auto.",
        )
        self.device, self.dtype = (
            (torch.device("cuda", local), torch.bfloat16)
            if self.cuda
            else (torch.device("cpu"), torch.float32)
        )
        self.compile = c.compile == "1" or c.compile == "auto" and self.cuda
        self.labels, self.files, self.rows, self.name = (
            set(),
            [],
            {},
            c.run_id or strftime("%Y%m%d_%H%M%S") + f"_seed{c.seed}",
        )
        self.pool, self.saving = (
            (pool := ThreadPoolExecutor(1)),
            pool.submit(int),
        )  # what a thread writes
        self.settings = {name: getattr(c, name.lower()) for name in NAMES} | {
            "RUN_ID": self.name,
            "device": self.device.type,
        }
        files, self.folder = (
            [
                Path(path).read_bytes()
                for path in (__file__, c.load_artifact, c.load_checkpoint)
                if path
            ],
            Path("logs") / self.name,
        )
        self.settings["sha256_of_code_and_artifact"] = hashlib.sha256(b"".join(files)).hexdigest()
        self.synchronize = (
            torch.cuda.synchronize if self.cuda else lambda: None
        )  # before a clock is read
        if self.cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        else:
            keep_freed_memory()
            if neighbours > 1:
                torch.set_num_threads(
                    max(1, (os.cpu_count() or 1) // neighbours)
                )  # torchrun gives each process one

    def start(self, c):
        """Open the logs, or go on with them; meet the other ranks. Raises BadInput unless RUN_ID is new, or RESUME=1 and settings as then."""
        restarts, count = (
            int(os.environ.get("TORCHELASTIC_" + word, 0))
            for word in ("MAX_RESTARTS", "RESTART_COUNT")
        )
        refuse(
            restarts and not c.run_id, "RUN_ID=: torchrun --max-restarts needs one, to go on with."
        )
        shared, one_node = (
            os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1",
            os.environ.get("LOCAL_WORLD_SIZE", "1") == str(self.world),
        )
        refuse(
            restarts and shared and not one_node,
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE: must be 1 for --max-restarts on several machines.",
        )
        if self.rank == 0:
            self.open(c.resume or restarts)
        if (
            self.world > 1 and not dist.is_initialized()
        ):  # torchrun keeps its store, where dead ranks' addresses are
            store = dist.PrefixStore(str(count * one_node), next(dist.rendezvous("env://"))[0])
            dist.init_process_group(
                "nccl" if self.cuda else "gloo", store=store, rank=self.rank, world_size=self.world
            )
        self.rows = json.loads(self.share(json.dumps(self.rows).encode()))

    def open(self, resume):
        """Open the two logs, the first with source and settings on top. Only whole lines count."""
        paths = self.folder.with_name(self.name + ".txt"), self.folder / "metrics.jsonl"
        refuse(
            not resume and (paths[0].exists() or self.folder.exists()),
            f"RUN_ID={self.name}: exists in logs/; choose another, or RESUME=1 to go on with it.",
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.files = [open(path, "a", buffering=1) for path in paths]
            try:
                fcntl.flock(self.files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as why:  # some file systems have no locks
                refuse(
                    isinstance(why, BlockingIOError),
                    f"RUN_ID={self.name}: is still running; stop it first, or choose another.",
                )
            for part in self.folder.glob("*.part"):
                part.unlink()
            for path, file in zip(paths, self.files):
                file.truncate(path.read_bytes().rfind(b"\n") + 1)
            rows = [*map(json.loads, paths[1].read_text().splitlines())]
        except (OSError, ValueError) as why:
            raise BadInput(
                f"RUN_ID={self.name}: {why}; run where logs/ can be made and are whole, or choose another."
            ) from None
        if rows:
            self.rows = {row["label"]: row for row in rows}
            self.check_settings(rows[0], f"RUN_ID={self.name}")
        else:
            words = " ".join(f"{name}={shown(self.settings[name])}" for name in NAMES)
            self.write(0, f"{Path(__file__).read_text()}\n{'=' * 100}\nsettings: {words}")
            self.write(1, json.dumps({"label": "settings", **self.settings}))
        where = (
            torch.cuda.get_device_name() if self.cuda else f"cpu threads:{torch.get_num_threads()}"
        )
        self.log(
            f"log:{paths[0]}\npython:{sys.version.split()[0]} torch:{torch.__version__} numpy:{np.__version__} device:{where} "
            f"dtype:{self.dtype} world_size:{self.world} compile:{int(self.compile)}"
        )

    def check_settings(self, there, where):
        """Raises BadInput naming the settings that were others there."""
        wrong = [
            f"{name}={shown(value)} (there {shown(there.get(name))})"
            for name, value in self.settings.items()
            if shown(there.get(name)) != shown(value) and name not in ("RESUME", "SAVE_EVERY")
        ]
        refuse(
            wrong,
            f"{where}: was begun with other settings: {' '.join(wrong)}. Set them as they were, or choose another RUN_ID.",
        )

    def write(self, i, text):
        """Add a line to log i. Raises Fault."""
        for file in self.files[i : i + 1]:
            try:
                file.write(text + "\n")
            except OSError as why:
                self.files = []  # this can still be said on the console
                raise Fault(
                    f"{file.name}: the log cannot grow: {why.strerror}; make room, then RUN_ID={self.name} RESUME=1."
                ) from None

    def log(self, text):
        """Print and log a line, on rank 0."""
        if self.rank == 0:
            with contextlib.suppress(OSError):  # a terminal that has gone
                print(text, flush=True)
            self.write(0, text)

    def metric(self, label, digits=8, **fields):
        """One labelled line of figures; the same ones twice are an error."""
        refuse((label, *fields) in self.labels, f"label {label} logged twice", Fault)
        self.labels.add((label, *fields))
        words = [label]
        for key, value in fields.items():
            style = FORMATS.get(key, f"{{:.{digits}f}}" if isinstance(value, float) else "{}")
            words.append(
                f"{key}:"
                + (("no", "yes")[value] if isinstance(value, bool) else style.format(value))
            )
        self.log(" ".join(words))
        self.write(1, json.dumps({"label": label, **fields}))
        self.rows[label] = fields

    def sum(self, tensor):
        """Sum over ranks, in place; returns the tensor."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, data):
        """Rank 0's bytes, on all ranks."""
        if self.world > 1:
            size = self.sum(torch.tensor(len(data) * (self.rank == 0), device=self.device)).item()
            whole = torch.zeros(size, dtype=torch.uint8, device=self.device)
            if self.rank == 0 and size:
                whole.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            dist.broadcast(whole, 0)
            data = bytearray(whole.cpu().numpy())
        return data

    def put(self, array):
        """Tensor of a numpy array on the device; nobody waits for it."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.cuda else tensor

    def moment(self):
        """Now on the device: a CUDA event, or seconds."""
        event = torch.cuda.Event(enable_timing=True) if self.cuda else perf_counter()
        self.cuda and event.record()
        return event

    def saved(self, kind):
        "Paths of a kind, oldest first."
        return sorted(self.folder.glob(kind + ".*.ckpt"))

    def save(self, kind, number, tensors):
        """Write tensors, as they are now, in the background, keeping the file before. Raises Fault if the last time failed."""
        self.saving.result()
        if self.rank == 0:
            for old in self.saved(kind)[:-1]:
                old.unlink()
            path, tensors = (
                self.folder / f"{kind}.{number:09d}.ckpt",
                {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()},
            )
            self.saving = self.pool.submit(
                lambda: write_file(path, seal({"settings": self.settings}, tensors))
            )

    def restore(self, kind):
        """Tensors of the newest whole file of a kind, for all ranks; {} if there is none. Raises BadInput."""
        data, paths = b"", self.saved(kind) if self.rank == 0 else []
        for path in reversed(paths):
            try:
                data = bytearray(path.read_bytes())
                there = unseal(data)[0]["settings"]
                break
            except Exception as why:  # damage makes the readers raise all sorts
                self.log(f"{path}: damaged: {why}")
                data = b""
        refuse(
            paths and not data and kind == "checkpoint",
            f"RUN_ID={self.name}: no {kind} of it is whole; choose another RUN_ID.",
        )
        if data:
            self.check_settings(there, path)
            self.log(f"resuming from {path}")
            [
                bad.rename(f"{bad}.damaged") for bad in paths if bad > path
            ]  # or it would be taken for the one to keep
        data = self.share(data)
        return unseal(data)[1] if data else {}

    def stop(self):
        """End all ranks after a signal."""
        self.saving.result()
        self.log(
            f"stopped by a signal; all that was done is in {self.folder}; RUN_ID={self.name} RESUME=1 goes on"
        )
        sys.exit(128 + (STOPS[0][0] if STOPS else signal.SIGTERM))


class Poll:
    """What all ranks agree on. A GPU is not waited for: there an answer is to the question of lag calls ago."""

    def __init__(self, run, lag=2):
        self.run, self.lag, self.sent = run, lag * run.cuda, deque()

    def ask(self, value=0.0, tensor=None):
        """[rank 0's value, signals that came to any rank, tensor], or None for the first lag calls."""
        row = self.run.sum(
            self.run.put(np.array([value * (self.run.rank == 0), len(STOPS)], dtype=np.float64))
        )
        if tensor is not None:
            row = torch.cat((row, tensor.view(1)))
        self.sent.append((row.to("cpu", non_blocking=True), self.run.moment()))
        if len(self.sent) <= self.lag:
            return None
        row, asked = self.sent.popleft()
        self.run.cuda and asked.synchronize()
        return row.tolist()


# ---------- shards and loader
# A shard is 256 little-endian int32 (magic, version, number of tokens, zeros), then uint16 tokens. All are checked at the start.
SHARD_START, SCAN_LIMIT = (
    [20240520, 1],
    2**29,
)  # bytes of a split up to which all token ids are checked at the start


def open_shard(path, vocab_size, scan):
    """Memory map [n] uint16 of a shard; scan: check ids too. Raises BadInput."""
    size, header = path.stat().st_size, np.fromfile(path, dtype="<i4", count=256)
    refuse(
        len(header) < 256 or header[:2].tolist() != SHARD_START,
        f"{path}: {size} bytes, starts {header[:2].tolist()}; a shard has 1024 bytes "
        f"of header and starts with magic and version {SHARD_START}. Make it with data/prepare.py.",
    )
    n = int(header[2])
    refuse(
        n < 1 or size != 1024 + 2 * n,
        f"{path}: the header says {n} tokens, the file has {size} bytes; it must be 1024 + 2 a token. Make it again.",
    )
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024, shape=(n,))
    if scan:
        check_ids(tokens, path, vocab_size)
    return tokens


def check_ids(tokens, where, vocab_size):
    """Raises BadInput for an id outside the vocabulary."""
    for at in np.flatnonzero(tokens >= vocab_size)[:1]:
        raise BadInput(
            f"{where}: token id {int(tokens.ravel()[at])} at position {at}; VOCAB_SIZE={vocab_size} allows 0 to {vocab_size - 1}. "
            "Use the tokenizer of these shards."
        )


def open_split(c, split):
    """A split's shards in order of name, checked."""
    paths = sorted(Path(c.data_path).glob(f"fineweb_{split}_*.bin"))
    refuse(
        not paths,
        f"DATA_PATH={c.data_path}: no fineweb_{split}_*.bin there; run make fineweb (or make demo) or set DATA_PATH.",
    )
    scan = split == "val" or sum(p.stat().st_size for p in paths) <= SCAN_LIMIT
    return [open_shard(p, c.vocab_size, scan) for p in paths]


@functools.lru_cache(maxsize=8)
def permutation(seed, epoch, part, n):
    """Random order [n] of part 0 (shards) or 1 + shard (its sequences)."""
    return np.random.default_rng((seed, epoch, part)).permutation(n)


class TrainData:
    """Training sequences; the i-th is a function of (SEED, i). An epoch visits shards and their sequences, cut anew, in a new order. Up to
    1 %, the end of the longest shard, is held out to compare averages. Raises BadInput."""

    def __init__(self, c, run):
        self.c, self.run, self.T, self.shards = c, run, c.train_seq_len, open_split(c, "train")
        total, long, self.pool = (
            sum(map(len, self.shards)),
            int(np.argmax([len(s) for s in self.shards])),
            ThreadPoolExecutor(1),
        )
        keep = max(1, min(total // 100, 262144) // self.T) * self.T + 1
        self.held_out, self.shards[long] = (
            np.array(self.shards[long][-keep:]),
            self.shards[long][:-keep],
        )
        self.counts = [
            max(0, (len(s) - 1) // self.T - 1) for s in self.shards
        ]  # one less: room for the cut to move
        refuse(
            not sum(self.counts) or len(self.held_out) < keep,
            f"DATA_PATH={c.data_path}: {total} training tokens are too few for TRAIN_SEQ_LEN={self.T}; give {5 * self.T}.",
        )

    def sequence(self, i):
        """Tokens [T+1] of sequence i of the run."""
        epoch, i = divmod(i, sum(self.counts))
        for shard in permutation(self.c.seed, epoch, 0, len(self.shards)).tolist():
            if i < self.counts[shard]:
                break
            i -= self.counts[shard]
        order, n = (
            permutation(self.c.seed, epoch, 1 + shard, self.counts[shard]),
            self.counts[shard],
        )
        at = (
            order[i]
            if self.c.data_order == "shuffled"
            else (
                order[0]
                + i * next(k for k in itertools.count(int(n * 0.618)) if math.gcd(k, n) == 1)
            )
            % n
        )
        start, path = int(order[0]) % self.T + int(at) * self.T, self.shards[shard].filename
        try:  # not the map, through which a file that shrinks kills the process
            tokens = np.fromfile(path, "<u2", self.T + 1, offset=1024 + 2 * start)
        except OSError as why:
            raise Fault(f"{path}: {why.strerror}; bring it back, then RESUME=1.") from None
        refuse(
            len(tokens) <= self.T,
            f"{path}: has shrunk since the start; bring it back, then RESUME=1.",
            Fault,
        )
        return tokens

    def load(self, step):
        """This rank's tokens of a step [sequences, T+1]."""
        count = self.c.train_batch_tokens // self.T
        mine = count // self.run.world
        first = step * count + self.run.rank * mine
        rows = np.stack([self.sequence(i) for i in range(first, first + mine)]).astype(np.int64)
        check_ids(rows, f"DATA_PATH={self.c.data_path}, step {step}", self.c.vocab_size)
        return torch.from_numpy(rows).pin_memory() if self.run.cuda else torch.from_numpy(rows)

    def batches(self, step=0):
        """Endless (inputs, targets) [sequences, T]; a thread reads ahead."""
        ahead = self.pool.submit(self.load, step)
        while True:
            rows, step = ahead.result().to(self.run.device, non_blocking=True), step + 1
            ahead = self.pool.submit(self.load, step)
            yield rows[:, :-1], rows[:, 1:]


# ---------- byte counts, the only place where bytes are counted
class ByteCounts:
    """UTF-8 bytes of a target by the challenge's rule: a piece's, its leading space only after no boundary (control, unknown, unused);
    a byte token 1, a boundary 0. Tables are [V]. Raises BadInput if the model does not fit."""

    def __init__(self, path, vocab_size):
        import sentencepiece

        where, path, sp = (
            f"TOKENIZER_PATH={path}",
            Path(path),
            sentencepiece.SentencePieceProcessor(),
        )
        refuse(
            not path.is_file(),
            f"{where}: no such file; run make fineweb (or make demo) or set TOKENIZER_PATH.",
        )
        refuse(
            path.name == "fineweb_1024_bpe.model" and path.stat().st_size == 253847,
            f"{where}: 253,847 bytes is a lookalike that decodes the official shards to garbage; run make fineweb.",
        )
        try:
            sp.Load(str(path))
        except (RuntimeError, OSError) as why:
            raise BadInput(
                f"{where}: not a SentencePiece model ({str(why)[:80]}); give that of the shards."
            ) from None
        refuse(
            sp.vocab_size() != vocab_size,
            f"{where}: has {sp.vocab_size()} pieces, VOCAB_SIZE={vocab_size}; they must be equal.",
        )
        self.boundary, self.space, self.size = (
            np.zeros(vocab_size, t) for t in (bool, bool, np.uint8)
        )
        for i in range(vocab_size):
            piece, self.boundary[i] = (
                sp.id_to_piece(i).replace("\u2581", " "),
                sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i),
            )
            if not self.boundary[i]:
                self.space[i] = piece.startswith(" ")
                self.size[i] = 1 if sp.is_byte(i) else len(piece.encode()) - self.space[i]

    def count(self, previous, targets):
        """Bytes [n] uint8 of targets [n] after previous ids [n]."""
        return self.size[targets] + (self.space[targets] & ~self.boundary[previous])


class ValData:
    """Validation tokens [N+1] on the device, bytes [N] of targets, N a multiple of EVAL_SEQ_LEN as in the challenge. Raises BadInput."""

    def __init__(self, c, run):
        tokens = np.concatenate(open_split(c, "val"))
        self.n = (len(tokens) - 1) // c.eval_seq_len * c.eval_seq_len
        self.dropped, tokens = len(tokens) - 1 - self.n, tokens[: self.n + 1]
        self.bytes = ByteCounts(c.tokenizer_path, c.vocab_size).count(tokens[:-1], tokens[1:])
        self.total_bytes = int(self.bytes.sum(dtype=np.int64))
        refuse(
            not self.total_bytes,
            f"DATA_PATH={c.data_path}: the validation split, {len(tokens) + self.dropped} tokens, has no text for a "
            f"window of EVAL_SEQ_LEN={c.eval_seq_len}; use more text or a shorter window.",
        )
        self.tokens = torch.from_numpy(tokens.astype(np.int64)).to(run.device)


# ---------- model
# One trunk, hidden(), for every use. Parameters are fp32, cast where used: no optimiser works on bf16 weights.
# Bank -> a layer's matrices, one of them for all layers, then the next. Muon orthogonalises a bank in one batch, shared out over ranks.
BANKS = {
    "qo_bank": ("attn.c_q", "attn.proj"),
    "kv_bank": ("attn.c_k", "attn.c_v"),
    "mlp_up_bank": ("mlp.fc",),
    "mlp_down_bank": ("mlp.proj",),
}
# name pattern (@: a block), init rule, optimiser group, export format; every tensor, of a bank every matrix, fits one row
PARAMETERS = [
    (re.compile(row.split()[0].replace("@", r"blocks\.\d+\.")), *re.split(" {2,}", row)[1:])
    for row in r"""
tok_emb\.weight  embedding  embed  int8 ; lm_head\.weight  fill 0  head  int8 ; bigram\.embed\.weight  fill 0  embed  int8
ve_shared\.embed\.weight  normal 0.01  embed  int8 ; (bigram|ve_shared)\.proj\.weight  orthogonal  scalar  fp16
bigram\.scale  fill 0.05  scalar  fp32 ; ve_shared\.scale  fill 0.1  scalar  fp32
ve_layer_scales\.\d+|skip_weights|@(attn|mlp)_scale  fill 1  scalar  fp32 ; smear\.gate|@attn\.attn_gate\.weight  fill 0  scalar  fp32
@resid_mix  stream  scalar  fp32 ; @attn\.q_gain  q_gain  scalar  fp32 ; @attn\.vrl_gate  fill -1.5  scalar  fp32
@attn\.vr_lambda  fill 0.5  scalar  fp32 ; @attn\.attn_gate\.bias  fill 4  scalar  fp32
@(attn\.c_[qkv]|mlp\.fc)\.weight  orthogonal  muon  int6 ; @(attn|mlp)\.proj\.weight  fill 0  muon  int6""".strip()
    .replace(" ; ", "\n")
    .split("\n")
]


@functools.cache
def parameter_rule(name):
    """(init, group, format) of a tensor. Raises Fault unless one row of PARAMETERS fits."""
    rows = [row[1:] for row in PARAMETERS if row[0].fullmatch(name)]
    refuse(len(rows) != 1, f"parameter {name} fits {len(rows)} rows of PARAMETERS, not one", Fault)
    return rows[0]


def matrix_names(name, num_layers):
    """Names of a bank's matrices, in order; of another tensor, its own."""
    return (
        [f"blocks.{i}.{part}.weight" for part in BANKS[name] for i in range(num_layers)]
        if name in BANKS
        else [name]
    )


def split_banks(state, num_layers):
    """State dict with banks as views of their matrices."""
    return {
        n: t
        for name, whole in state.items()
        for n, t in zip(matrix_names(name, num_layers), whole if name in BANKS else [whole])
    }


def choose_attention(wanted, device):
    """(name, causal function of q [B,R,H,d], the last rows, and k, v [B,T,K,d]). Raises BadInput."""

    def sdpa(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        R, T, mask = q.size(2), k.size(2), None
        if R < T:  # the mask makes torch choose a kernel that does not know fewer key/value heads
            k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
            mask = torch.ones(R, T, dtype=torch.bool, device=q.device).tril(T - R)
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=R == T, enable_gqa=q.size(1) != k.size(1)
        ).transpose(1, 2)

    def flash(q, k, v):
        out = function(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out  # some return the log-sum-exp too

    for name, module in (("fa3", "flash_attn_interface"), ("fa4", "flash_attn.cute")):
        if wanted == name or wanted == "auto" and device.type != "cpu":
            try:
                refuse(device.type == "cpu", "it needs a GPU", ImportError)
                function = __import__(module, fromlist=["flash_attn_func"]).flash_attn_func
                return name, flash
            except (ImportError, AttributeError) as why:
                refuse(
                    wanted == name,
                    f"ATTENTION={name}: {module}: {why}; allowed here: auto or sdpa.",
                )
    return "sdpa", sdpa


def attention_kernel(name, c, run):
    """The name, for SDPA with the kernel it takes in training. Raises BadInput if a GPU has none but plain products, many times slower."""
    if name != "sdpa":
        return name
    q, k = (
        torch.empty(
            1,
            heads,
            c.train_seq_len,
            c.model_dim // c.num_heads,
            dtype=run.dtype,
            device=run.device,
            requires_grad=True,
        )
        for heads in (c.num_heads, c.num_kv_heads)
    )
    kernel = ["math", "flash", "efficient", "cudnn"][
        torch._fused_sdp_choice(q, k, k, None, 0.0, True, enable_gqa=c.num_heads != c.num_kv_heads)
    ]
    refuse(
        run.cuda and kernel == "math",
        "ATTENTION=sdpa: torch has no fused kernel for these heads on this GPU; install FlashAttention or change NUM_HEADS.",
    )
    return f"{name}_{kernel}"


def rms_norm(x):
    "x over its root mean square, by the last axis."
    return F.rms_norm(x, (x.size(-1),))


def last_rows(x, n):
    """The last n rows of x [B,T,...]; x itself, without a node in the graph, if those are all."""
    return x if n == x.size(1) else x[:, -n:]


def rotate(x, cos, sin):
    """RoPE of the first 2r dimensions of x [B,T,heads,d]; cos, sin [T,1,r]."""
    r = cos.size(-1)
    a, b = x[..., :r], x[..., r : 2 * r]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, x[..., 2 * r :]), -1)


class LowRankEmbedding(nn.Module):
    """Table [num,dim], linear to out (none if equal), learned scalar."""

    def __init__(self, num, dim, out):
        super().__init__()
        self.embed = nn.Embedding(num, dim)
        self.proj = nn.Linear(dim, out, bias=False) if dim != out else None
        self.scale = nn.Parameter(torch.empty(()))

    def forward(self, ids, dtype):
        """[B,T] ids -> [B,T,out]."""
        x = self.embed(ids).to(dtype)
        return (
            x if self.proj is None else F.linear(x, self.proj.weight.to(dtype))
        ) * self.scale.to(dtype)


class Block(nn.Module):
    """A layer's vectors, for each pass if it recurs, and arithmetic."""

    def __init__(self, c, index):
        super().__init__()
        self.attn, D, passes = nn.Module(), c.model_dim, (2,) * (index in c.recur_layers)
        self.attn.q_gain = nn.Parameter(torch.empty(c.num_heads))
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.empty(*passes, D)) for _ in range(2))
        self.resid_mix = nn.Parameter(torch.empty(*passes, 2, D))
        self.attn.vrl_gate = nn.Parameter(torch.empty(())) if c.vrl_enabled and index else None
        self.attn.vr_lambda = nn.Parameter(torch.empty(2)) if c.value_residual else None
        self.attn.attn_gate = nn.Linear(D, c.num_heads) if c.gated_attention else None
        self.heads, self.kv_heads = c.num_heads, c.num_kv_heads
        self.exclusive, self.parallel = (
            index >= c.num_layers - n for n in (c.xsa_last_n, c.parallel_last_n)
        )
        self.norm_scale = 1 / math.sqrt(index + 1) if c.ln_scale else 1.0

    def forward(self, x, x0, weights, value_extra, v_first, rope, attention, again, R):
        """([B,R,D], values) of x and embedded x0 [B,T,D], for the last R rows; v_first: layer 0's values; again: 1 on a second pass."""
        w_q, w_o, w_k, w_v, w_up, w_down = weights
        mix, attn_scale, mlp_scale = (
            p.to(x.dtype).view(-1, *p.shape[-n:])[again]
            for p, n in ((self.resid_mix, 2), (self.attn_scale, 1), (self.mlp_scale, 1))
        )
        x = mix[0] * x + mix[1] * x0
        a, v = self.attend(
            rms_norm(x) * self.norm_scale, w_q, w_k, w_v, value_extra, v_first, rope, attention, R
        )
        before = last_rows(x, R)
        x = before + attn_scale * F.linear(a, w_o)
        h = F.leaky_relu(
            F.linear(rms_norm(before if self.parallel else x) * self.norm_scale, w_up), 0.5
        ).square()
        return x + mlp_scale * F.linear(h, w_down), v

    def values(self, v, v_first):
        """Value residual: values mixed with layer 0's, None there."""
        v_first = v if v_first is None else v_first
        if self.attn.vr_lambda is not None:
            first, own = self.attn.vr_lambda.to(v.dtype)
            return first * v_first + own * v
        return (
            v
            if self.attn.vrl_gate is None
            else v.lerp(v_first, self.attn.vrl_gate.sigmoid().to(v.dtype))
        )

    def attend(self, x, w_q, w_k, w_v, value_extra, v_first, rope, attention, R):
        """(attention of the last R rows of x [B,T,D] with QK-norm, partial RoPE and XSA, values [B,T,K*d] before mixing)."""
        B, T, _ = x.shape
        q, k = (
            F.linear(last_rows(x, R), w_q).view(B, R, self.heads, -1),
            F.linear(x, w_k).view(B, T, self.kv_heads, -1),
        )
        raw = F.linear(x, w_v)
        raw = raw if value_extra is None else raw + value_extra
        v = self.values(raw, v_first).view(B, T, self.kv_heads, -1)
        q, k = (
            rotate(rms_norm(q), *(p[-R:] for p in rope)) * self.attn.q_gain.to(x.dtype)[:, None],
            rotate(rms_norm(k), *rope),
        )
        y = attention(q, k, v)
        if self.attn.attn_gate is not None:
            y = y * F.linear(
                last_rows(x, R), *(p.to(x.dtype) for p in self.attn.attn_gate.parameters())
            ).sigmoid().unsqueeze(-1)
        if self.exclusive:  # take out of y what points along the token's own value (#549)
            y, own = (
                y.reshape(B, R, self.kv_heads, self.heads // self.kv_heads, -1),
                last_rows(v, R).unsqueeze(3),
            )
            y = (
                y
                - (y * own).sum(-1, keepdim=True)
                / own.square().sum(-1, keepdim=True).clamp_min(1e-24)
                * own
            )
        return y.reshape(B, R, -1), raw


class GPT(nn.Module):
    """The model of #549 and #1084, 26,928,220 parameters by default."""

    def __init__(self, c, dtype=torch.float32, attention=None):
        super().__init__()
        L, D, kv, wide = (
            c.num_layers,
            c.model_dim,
            c.model_dim // c.num_heads * c.num_kv_heads,
            int(c.model_dim * c.mlp_mult),
        )
        self.c, self.dtype, self.attention = (
            c,
            dtype,
            attention or choose_attention("sdpa", torch.device("cpu"))[1],
        )
        self.tok_emb = nn.Embedding(c.vocab_size, D)
        self.lm_head = None if c.tie_embeddings else nn.Linear(D, c.vocab_size, bias=False)
        self.bigram = (
            LowRankEmbedding(c.bigram_vocab_size, c.bigram_dim, D) if c.bigram_vocab_size else None
        )
        self.smear = nn.Module()
        self.smear.gate = nn.Parameter(torch.empty(D))
        self.skip_weights = nn.Parameter(torch.empty(L // 2, D)) if L > 1 else None
        self.ve_shared = LowRankEmbedding(c.vocab_size, c.ve_dim, kv) if c.ve_enabled else None
        self.ve_layer_scales = nn.ParameterList(
            nn.Parameter(torch.empty(1)) for _ in c.ve_layers if c.ve_enabled
        )
        self.blocks, self.recurring = (
            nn.ModuleList(Block(c, i) for i in range(L)),
            bool(c.recur_layers) and c.recur_start == 0,
        )
        for bank, shape in zip(BANKS, ((2 * L, D, D), (2 * L, kv, D), (L, wide, D), (L, D, wide))):
            setattr(self, bank, nn.Parameter(torch.empty(shape)))
        rot, stretch = c.rope_dims or D // c.num_heads, max(1.0, c.train_seq_len / c.rope_train_len)
        base = c.rope_base * (stretch ** (rot / (rot - 2)) if rot > 2 else 1)
        positions = torch.arange(
            max(c.eval_seq_len, min(c.train_seq_len, 2**16 if c.load_artifact else c.train_seq_len))
        ).double()
        angles = torch.outer(
            positions, base ** (-torch.arange(0, rot, 2).double() / rot)
        ).unsqueeze(1)  # [T,1,rot/2]
        for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
            self.register_buffer(name, table.to(dtype), persistent=False)
        if not self.cos.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Initial values by the rows of PARAMETERS, a function of SEED alone."""
        g = torch.Generator().manual_seed(self.c.seed)
        for name, p in split_banks(dict(self.named_parameters()), self.c.num_layers).items():
            rule, _, number = parameter_rule(name)[0].partition(" ")
            tied = self.c.tied_embed_init_std if self.c.tie_embeddings else 1.0
            if rule in ("embedding", "normal"):
                p.normal_(0, float(number or tied), generator=g)
            elif rule == "orthogonal":
                nn.init.orthogonal_(p, generator=g)
            elif rule == "stream":
                p.copy_(torch.tensor([1.0, 0.0])[:, None])  # all of x, nothing of x0
            else:
                p.fill_(float(number or self.c.qk_gain_init))  # fill, q_gain

    def hidden(self, ids, tail=None):
        """[B,T] ids -> final normalised hidden states [B,T,D], or [B,tail,D] of the last rows, which is less work in the last block."""
        c, T, L = self.c, ids.size(1), self.c.num_layers
        x = self.tok_emb(ids).to(self.dtype)
        if self.bigram is not None:
            last = c.bigram_vocab_size - 1  # of the hash buckets of pairs of ids, for position 0
            pairs = torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1]) % last
            x = x + self.bigram(F.pad(pairs, (1, 0), value=last), self.dtype)
        x, gate = rms_norm(x), self.smear.gate.sigmoid().to(self.dtype)
        x = x0 = (1 - gate) * x + gate * F.pad(x, (0, 0, 1, -1))
        extra = self.ve_shared(ids, self.dtype) if self.ve_shared is not None else None
        # indexing would fill a bank with zeros for every matrix in its backward
        qo, kv, up, down = (getattr(self, bank).to(self.dtype).unbind() for bank in BANKS)
        rope, skips, first, order = (
            (self.cos[:T], self.sin[:T]),
            [],
            None,
            [(i, 0) for i in range(L)],
        )
        if self.recurring:  # up to the last recurrent layer, then through those again
            at = max(c.recur_layers) + 1
            order[at:at] = [(i, 1) for i in c.recur_layers]
        for n, (i, again) in enumerate(order, 1):
            if i >= L // 2 and skips and not again:
                x = x + self.skip_weights[i - L // 2].to(self.dtype) * skips.pop()
            scaled = (
                extra * self.ve_layer_scales[c.ve_layers.index(i)].to(self.dtype)
                if c.ve_enabled and i in c.ve_layers
                else None
            )
            weights = qo[i], qo[L + i], kv[i], kv[L + i], up[i], down[i]
            x, v = self.blocks[i](
                x,
                x0,
                weights,
                scaled,
                first,
                rope,
                self.attention,
                again,
                tail if tail and n == len(order) else T,
            )
            first = v if first is None else first
            if i < L // 2 and not again:
                skips.append(x)
        return rms_norm(x)

    @torch.no_grad()
    def start_recurrence(self):
        """Let recurrent layers run twice, first with equal vectors."""
        self.recurring = True
        for i in self.c.recur_layers:
            for name in ("resid_mix", "attn_scale", "mlp_scale"):
                getattr(self.blocks[i], name)[1] = getattr(self.blocks[i], name)[0]

    def head_weight(self):
        "Output matrix [V,D], fp32."
        return self.tok_emb.weight if self.lm_head is None else self.lm_head.weight

    def project(self, h):
        """Hidden states [...,D] -> logits before the cap [...,V], fp32."""
        return F.linear(h, self.head_weight().to(h.dtype)).float()

    def cap(self, z):
        """Soft cap on logits; compiled by a sigmoid, which makes a CPU's step 4 % shorter."""
        if torch.compiler.is_compiling():
            return (
                2 * self.c.logit_softcap * torch.sigmoid(2 / self.c.logit_softcap * z)
                - self.c.logit_softcap
            )
        return self.c.logit_softcap * torch.tanh(z / self.c.logit_softcap)

    def forward(self, ids, targets, reduction="mean"):
        """Cross entropy of targets [B,T] (-100: none) after ids [B,T]."""
        logits = self.cap(self.project(GPT.hidden(self, ids)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def compile_model(model):
    """Compile what training and all evaluators share; kept in the user's cache for the next run."""
    if os.access(home := os.path.expanduser("~"), os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{home}/.cache/train_gpt")
    model.hidden, model.forward = (
        torch.compile(f, dynamic=False) for f in (model.hidden, model.forward)
    )


# ---------- optimiser
# Muon for the banks, AdamW for the rest. A rank gets the gradient of its share of each bank, orthogonalises it and hands it out.
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or getattr(
    dist, "reduce_scatter_tensor", None
)
ALL_GATHER = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)
QUINTICS = {
    "quintic": [(3.4445, -4.7750, 2.0315)],
    "polar_express": [
        (8.156555, -22.483293, 15.87877),
        (4.04293, -2.808917, 0.500018),
        (3.891668, -2.772484, 0.506065),
        (3.285754, -2.368129, 0.46449),
        (2.346541, -1.709783, 0.423236),
    ],
}  # the last one repeats


def newton_schulz(g, steps, dtype, kind="quintic"):
    """g [n,rows,cols] with singular values near 1 (Muon, Jordan et al. 2024; Polar Express, for norms 2 % under 1, Amsel et al. 2025)."""
    tall = g.size(-2) > g.size(-1)
    x = (g.mT if tall else g).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * (1.02 if kind == "polar_express" else 1) + 1e-7)
    for i in range(steps):
        (a, b, c), gram = QUINTICS[kind][min(i, len(QUINTICS[kind]) - 1)], x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@contextlib.contextmanager
def put_back(params):
    """What is done to params inside is undone at its end."""
    params = list(params)
    kept = [p.detach().clone() for p in params]
    yield
    with torch.no_grad():
        for p, old in zip(params, kept):
            p.copy_(old)


class Optimizer:
    """The same update on each rank from the gradients of all."""

    def __init__(self, c, run, model):
        self.c, self.run, groups = c, run, {"muon": [], "embed": [], "head": [], "scalar": []}
        for name, p in model.named_parameters():
            groups[parameter_rule(matrix_names(name, c.num_layers)[0])[1]].append(p)
        self.banks = sorted(
            groups.pop("muon"), key=lambda p: -p.numel()
        )  # the largest reduction starts first
        rates = {
            "embed": c.tied_embed_lr if c.tie_embeddings else c.embed_lr,
            "head": c.head_lr,
            "scalar": c.scalar_lr,
        }
        self.adam = torch.optim.AdamW(
            [dict(params=ps, rate=rates[k]) for k, ps in groups.items() if ps],
            betas=(c.beta1, c.beta2),
            eps=c.adam_eps,
            weight_decay=c.adam_wd,
            fused=True,
        )
        self.small = [p for group in self.adam.param_groups for p in group["params"]]
        self.shares = [
            -(-len(p) // run.world) for p in self.banks
        ]  # matrices on a rank; the last ones are padding
        self.momentum = [
            torch.zeros(n, *p.shape[1:], device=p.device) for n, p in zip(self.shares, self.banks)
        ]
        self.qat_step, self.grid = (
            0.0,
            {
                name: torch.zeros(sum(w.shape), dtype=torch.int8, device=w.device)
                for name, w in split_banks(dict(model.named_parameters()), c.num_layers).items()
                if c.late_qat and c.quant != "gptq_lite" and parameter_rule(name)[2] in LEVELS
            },
        )
        self.adam.state.update(
            {
                p: {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
                for p in self.small
            }
        )

    def reduce(self, loss):
        """This rank's share of the banks' mean gradients; the others and loss become means."""
        missing = [tuple(p.shape) for p in self.banks + self.small if p.grad is None]
        refuse(missing, f"no gradient for parameters of shapes {missing}", Fault)
        if self.run.world == 1:
            return [p.grad for p in self.banks]
        W, pending = self.run.world, []
        for n, p in zip(self.shares, self.banks):
            padded = F.pad(p.grad, (0, 0, 0, 0, 0, n * W - len(p))) / W
            share = torch.empty_like(padded[:n])
            pending.append((share, REDUCE_SCATTER(share, padded, async_op=True), padded))
        means = [p.grad for p in self.small] + [loss]
        flat = self.run.sum(torch.cat([t.reshape(-1) for t in means]) / W)  # in one message
        torch._foreach_copy_(
            means,
            [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in means]), means)],
        )
        for _, work, _ in pending:
            work.wait()
        return [share for share, _, _ in pending]

    def gather(self, share):
        """(pending work or None, bank) of all ranks' shares; the bank is padded."""
        if self.run.world == 1:
            return None, share
        whole = share.new_empty(len(share) * self.run.world, *share.shape[1:])
        return ALL_GATHER(whole, share.contiguous(), async_op=True), whole

    @torch.no_grad()
    def step(self, loss, scale, momentum):
        """Norm of the reduced gradient, after an update with rates times scale."""
        c, shares, pending, small = self.c, self.reduce(loss), [], [p.grad for p in self.small]
        # fp64: the number of ranks must not show in fp32
        squares = [
            torch.stack(torch._foreach_norm(g, 2, torch.float64)).square().sum()
            for g in (shares, small)
        ]
        norm = (self.run.sum(squares[0]) + squares[1]).sqrt().float()
        if c.grad_clip_norm:
            torch._foreach_mul_(small + shares, (c.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0))
        for g, buffer in zip(shares, self.momentum):
            buffer.mul_(momentum).add_(g)
            g.add_(buffer, alpha=momentum)
            if c.muon_row_norm:
                g /= g.norm(dim=-1, keepdim=True) + 1e-7
            pending.append(
                self.gather(
                    newton_schulz(
                        g,
                        c.muon_backend_steps,
                        torch.bfloat16 if self.run.cuda else torch.float32,
                        c.newton_schulz,
                    )
                )
            )
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * scale
        self.adam.step()  # while the gathers run
        for p, (work, update) in zip(self.banks, pending):
            work and work.wait()
            rate = scale * c.matrix_lr
            p.mul_(1 - rate * c.muon_wd).add_(
                update[: len(p)], alpha=-rate * math.sqrt(max(1, p.size(1) / p.size(2)))
            )
        return norm


# ---------- averages
# Candidates for the export; with AVERAGE=auto the lowest loss on held-out training text, quantised, decides.
class Averages:
    """EMA, SWA and LAWA's snapshots of params, fp32, as lists in their order."""

    def __init__(self, c, params):
        self.c, self.params, self.steps, self.snapshots = c, list(params), 0, 0
        kinds = (
            ["ema"] * c.ema_enabled
            + ["swa"] * c.swa_enabled
            + [f"lawa{k}" for k in range(c.lawa_k * c.lawa_enabled)]
        )
        self.kept = {kind: [p.detach().clone() for p in self.params] for kind in kinds}

    @torch.no_grad()
    def update(self, scale):
        """Take in the weights after a step at this rate scale."""
        self.steps += 1
        n, c = self.steps, self.c
        if c.ema_enabled:
            torch._foreach_lerp_(
                self.kept["ema"], self.params, 1 - min(c.ema_decay, (1 + n) / (10 + n))
            )
        if c.swa_enabled and scale < 0.2 and n % c.swa_every == 0:
            self.snapshots += 1
            torch._foreach_lerp_(self.kept["swa"], self.params, 1 / self.snapshots)
        if c.lawa_enabled and n % c.lawa_freq == 0:
            torch._foreach_copy_(self.kept[f"lawa{(n // c.lawa_freq - 1) % c.lawa_k}"], self.params)

    def candidates(self):
        """Weights by name, those that AVERAGE allows; the last ones where there is no average yet."""
        found, taken = (
            {"none": [p.detach().clone() for p in self.params]},
            self.steps // self.c.lawa_freq,
        )
        found |= {"ema": self.kept.get("ema")} | (
            {"swa": self.kept["swa"]} if self.snapshots else {}
        )
        lawa = [weights for kind, weights in self.kept.items() if kind[:4] == "lawa"][:taken]
        found["lawa"] = [sum(copies) / len(copies) for copies in zip(*lawa)]
        found = {name: weights for name, weights in found.items() if weights}
        return (
            found
            if self.c.average == "auto"
            else {
                name: found[name]
                for name in [self.c.average if self.c.average in found else "none"]
            }
        )

    @torch.no_grad()
    def choose(self, run, model, data, grid):
        """Put the best candidate into the model; log all. What the export needs to know: the grid (QAT's, or new), GPTQ's Hessians."""
        c, losses, step, hessians = self.c, {}, None, {}
        if c.quant == "gptq" or c.quant == "rd" and not grid:
            new, hessians = calibrate(c, run, model, data)
        grid = None if c.quant == "gptq_lite" else grid or new
        tokens, found = (
            torch.from_numpy(data.held_out.astype(np.int64)).to(run.device),
            self.candidates(),
        )
        batches = list(
            zip(
                *(
                    t.view(-1, data.T).split(8)[run.rank :: run.world]
                    for t in (tokens[:-1], tokens[1:])
                )
            )
        )
        for name, weights in found.items():
            torch._foreach_copy_(self.params, weights)
            quantizer = Quantizer(c, model.state_dict(), grid)
            step = step or quantizer.search(c.artifact_bytes - Path(__file__).stat().st_size)
            load_state(model, quantizer.rounded(step), "average")
            total = torch.zeros((), device=run.device, dtype=torch.float64)
            for ids, goal in batches:
                total += GPT.forward(model, ids, goal, "sum")  # no compiling on the clock
            losses[name] = run.sum(total).item() / (len(tokens) - 1)
            run.metric(f"average_{name}", heldout_train_loss=losses[name], tokens=len(tokens) - 1)
        best = min(losses, key=losses.get)
        torch._foreach_copy_(self.params, found[best])
        run.log(f"average: exporting {best} swa_snapshots:{self.snapshots}")
        return grid, hessians


# ---------- schedules and clock
def lr_scale(c, step, elapsed_ms, step_ms):
    """Factor on rates: 1, then linearly to 0, but not under MIN_LR, over WARMDOWN_ITERS before the nearer end, of steps or time."""
    scale = min(1.0, (c.iterations - step) / max(c.warmdown_iters, 1))
    if c.max_wallclock_seconds and step_ms and c.warmdown_iters:
        scale = min(
            scale,
            max(0.0, 1000 * c.max_wallclock_seconds - elapsed_ms) / (c.warmdown_iters * step_ms),
        )
    return max(scale, c.min_lr)


def muon_momentum(c, step):
    """Muon's momentum, linear from its start."""
    return c.muon_momentum + (c.muon_momentum_warmup_start - c.muon_momentum) * max(
        0.0, 1 - step / max(c.muon_momentum_warmup_steps, 1)
    )


def cosine(high, low, i, n):
    """Rate i of n, by a cosine from high to low, which the last one is."""
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * i / max(n - 1, 1)))


class Clock:
    """Training time, on all ranks rank 0's. A GPU gets to a step when the host is lag steps further, and answers as late again."""

    def __init__(self, run, cap_ms, step=0, ms=0.0):
        run.synchronize()
        self.run, self.cap_ms, self.began, self.base, self.poll = (
            run,
            cap_ms,
            perf_counter() - ms / 1000,
            (step, ms),
            Poll(run),
        )
        self.step_ms = ms / max(step, 1)

    def now(self):
        """This rank's training time in ms."""
        self.run.synchronize()
        return 1000 * (perf_counter() - self.began)

    def agreed(self, step, first_bad):
        """(training time in ms before this step, whether to stop, whether the first bad step is over)."""
        answer = self.poll.ask(1000 * (perf_counter() - self.began), first_bad)
        (ms, stops, bad), at = (
            answer or (self.base[1], 0, math.inf),
            step - 2 * self.poll.lag if answer else self.base[0],
        )
        self.step_ms = ms / at if at > 0 else self.step_ms
        return ms + (step - at) * self.step_ms, stops > 0, bad <= step


# ---------- calibration
# What an error in a weight costs, by training text: the validation split is never asked (C3). Its time is training time.
@torch.enable_grad()
def calibrate(c, run, model, data):
    """({name: exponents int8 [rows + columns] of the steps that cost least, in quarters of octaves}, {name: Hessian [columns, columns], for
    GPTQ}) of matrices. The Hessian is the Fisher information, estimated by sequences' gradients g: the mean of g'g, by rows of gg'."""
    n, full, L = (
        max(run.world, c.calibration_tokens // c.train_seq_len),
        c.quant == "gptq",
        c.num_layers,
    )
    rows = torch.from_numpy(np.stack([*map(data.sequence, range(n))]).astype(np.int64))
    params = dict(model.named_parameters())
    sums = {
        name: (w.new_zeros(len(w)), w.new_zeros(w.size(1), *[w.size(1)] * full))
        for name, w in split_banks(params, L).items()
        if parameter_rule(name)[2] in LEVELS
    }
    for row in rows[run.rank :: run.world].to(run.device):
        loss = GPT.forward(model, row[None, :-1], row[None, 1:], "sum")
        grads = split_banks(dict(zip(params, torch.autograd.grad(loss, params.values()))), L)
        for name, (by_row, by_column) in sums.items():
            by_row += (g := grads[name]).square().mean(1)
            by_column += g.mT @ g / len(g) if full else g.square().mean(0)
    for total in itertools.chain(*sums.values()):
        run.sum(total)
    most, grid = max(by_row.mean().item() for by_row, _ in sums.values()) + 1e-30, {}
    for name, (
        by_row,
        by_column,
    ) in sums.items():  # a tenth of the mean for what the text did not ask for
        mean = by_row.mean() + 1e-6 * most
        exponents = (
            ((by_row + 0.1 * mean) / most).log2(),
            (((by_column.diagonal() if full else by_column) + 0.1 * mean) / mean).log2(),
        )
        grid[name] = (-2 * torch.cat(exponents)).round().clamp(-127, 127).to(torch.int8)
    return grid, {name: h for name, (_, h) in sums.items() if full}


# ---------- artifact
# The header has "model", its settings, and "matrices", [[name, [rows, columns]], ...]. A weight is level * row's step * column's step: "rows" are
# fp16 steps or int8 quarters of octaves over the header's "step", "columns" int8 quarters. "levels" are int8; or "codes" is a rANS stream of
# them, a level's distribution the row of "table" (16384ths) that "spreads" of row and column add up to. Then plain tensors.
LEVELS, PERCENTILES = {"int6": 31, "int8": 127, "int10": 511}, (0.999, 0.9995, 0.9999, 0.99999, 1.0)
CLASSES, SYMBOLS, BITS = (
    64,
    1023,
    14,
)  # distributions, of so many levels from -511, and the bits of a frequency


def level_kind(c, name, lite):
    """The kind that a tensor is quantised to: PARAMETERS' by GPTQ-lite; else more levels, which an entropy coder makes cheap."""
    kind = parameter_rule(name)[2]
    return kind if lite or kind not in LEVELS else "int10" if c.coder == "rans" else "int8"


def row_scales(w, levels):
    """Scales [...,rows,1], fp16 values in fp32, of w by GPTQ-lite (#549): of five percentiles of |w| in a row the clip of least error."""
    last = w.size(-1) - 1
    top = (
        w.abs().topk(min(last + 1, int((1 - PERCENTILES[0]) * last) + 2)).values
    )  # all that these percentiles touch
    scales, errors = [], []
    for p in PERCENTILES:
        at = min((1 - p) * last, top.size(-1) - 1)
        clip = top[..., int(at) : int(at) + 1].lerp(
            top[..., math.ceil(at) : math.ceil(at) + 1], at - int(at)
        )
        scales.append((clip / levels).clamp(2.0**-24, 65504.0).half().float())
        errors.append(
            (w - code_levels(w, scales[-1], levels).mul_(scales[-1]))
            .square_()
            .sum(-1, keepdim=True)
        )
    return torch.stack(scales).gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]


def code_levels(w, scale, levels):
    "Integer levels, as floats, of w."
    return (w / scale).round_().clamp_(-levels, levels)


def spacing(rows, columns, step):
    """Steps [rows,columns] of a matrix."""
    return (rows.float() if rows.dtype == torch.half else step * torch.exp2(rows / 4))[
        :, None
    ] * torch.exp2(columns / 4)


def spreads(q):
    """int8 [rows + columns]: mean squares of levels q by row, and what columns add, in quarters of octaves of their deviation."""
    size = q.square()
    rows = (2 * (size.mean(1) + 1e-3).log2()).round()
    columns = (2 * ((size * torch.exp2(-rows / 2)[:, None]).mean(0) + 1e-3).log2()).round()
    return torch.cat((rows, columns)).to(torch.int8)


def classes(spread, n):
    """Distribution [rows,columns], int32, of levels with these spreads [n rows + columns]."""
    return (spread[:n, None].int() + spread[n:] + CLASSES // 2).clamp_(0, CLASSES - 1)


def frequencies(counts):
    """Table [CLASSES,SYMBOLS] of counts, its rows adding up to 2**BITS, none 0 that occurs."""
    some = counts > 0
    table = some + counts * (2**BITS - some.sum(1, keepdims=True)) // np.maximum(
        counts.sum(1, keepdims=True), 1
    )
    np.put_along_axis(
        table,
        best := table.argmax(1)[:, None],
        np.take_along_axis(table, best, 1) + 2**BITS - table.sum(1, keepdims=True),
        1,
    )
    return table


def entropy_bytes(counts):
    """Bytes of symbols by the entropy of their distributions, rows of counts."""
    p = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    return -(counts * np.log2(np.maximum(p, 1e-30))).sum() / 8


def lanes(n):
    "Streams that n levels are dealt out to."
    return max(1, min(1024, n >> 11))


def rans_encode(symbols, rows, table):
    """Codes, uint8, of symbols [n] with distributions rows [n] of table, by range asymmetric numeral systems (Duda 2013, arXiv:1311.2540)."""
    x, words, start = np.full(lanes(len(symbols)), 2**16, np.int64), [], table.cumsum(1) - table
    for at in reversed(range(0, len(symbols), len(x))):
        s, k = symbols[at : at + len(x)], rows[at : at + len(x)]
        f, y = table[k, s], x[: len(s)]
        full = y >= f << 32 - BITS
        words.append(y[full].astype("<u2"))
        y[full] >>= 16
        y[:] = (y // f << BITS) + y % f + start[k, s]
    return np.concatenate([x.astype("<u4").view("<u2"), *words[::-1]]).view(np.uint8)


def rans_decode(codes, rows, table):
    """Symbols, int16 [n]. Raises ValueError for codes that are not rans_encode's."""
    n = lanes(len(rows))
    words, start, out = codes.view("<u2"), table.cumsum(1) - table, np.empty(len(rows), np.int16)
    refuse((table.sum(1) != 2**BITS).any() or (table < 0).any(), "wrong frequencies", ValueError)
    lookup = np.stack([np.repeat(np.arange(table.shape[1], dtype=np.int16), row) for row in table])
    x, words = words[: 2 * n].copy().view("<u4").astype(np.int64), words[2 * n :]
    for at in range(0, len(rows), n):
        k, y = rows[at : at + n], x[: len(rows) - at]
        low = y & 2**BITS - 1
        s = out[at : at + n] = lookup[k, low]
        y[:] = table[k, s] * (y >> BITS) + low - start[k, s]
        empty = y < 2**16
        more = np.count_nonzero(empty)
        y[empty] = y[empty] << 16 | words[:more]
        words = words[more:]
    refuse(len(words) or (x != 2**16).any(), "wrong codes", ValueError)
    return out


class Quantizer:
    """What the export makes of a state, by what calibrate() found; without a grid by GPTQ-lite."""

    def __init__(self, c, state, grid=None, hessians=None):
        self.c, self.state, self.grid = (
            c,
            {name: t.detach().float() for name, t in split_banks(state, c.num_layers).items()},
            grid,
        )
        self.kinds, self.hessians = (
            {name: level_kind(c, name, not grid) for name in self.state},
            hessians or {},
        )
        self.names = [name for name in self.state if self.kinds[name] in LEVELS]
        self.counts = {
            k: sum(t.numel() for n, t in self.state.items() if self.kinds[n] == k)
            for k in sorted(set(self.kinds.values()))
        }
        self.beside = sum(
            1.5 * sum(t.shape) if n in self.names else t.nbytes for n, t in self.state.items()
        )  # bytes of what is no level, about
        if grid is None:
            self.scales, self.finest = (
                {n: row_scales(self.state[n], LEVELS[self.kinds[n]])[:, 0] for n in self.names},
                2.0**-24,
            )
        else:  # row steps that no level is too small for, and the step under which they all bind
            self.grid = {n: t.split(self.state[n].shape) for n, t in grid.items()}
            least = {
                n: (self.state[n].abs() * torch.exp2(-columns / 4)).amax(1)
                / (LEVELS[self.kinds[n]] + 0.5)
                for n, (_, columns) in self.grid.items()
            }
            self.least = {
                n: t.clamp_min(2.0**-20 * max(t.max().item() for t in least.values()) + 1e-20)
                for n, t in least.items()
            }
            self.finest = min(
                (self.least[n] / torch.exp2(rows / 4)).min().item()
                for n, (rows, _) in self.grid.items()
            )

    def steps(self, name, step):
        """(rows, columns) of a matrix's steps as they are stored."""
        if self.grid is None:  # the floor binds int6 only
            scale = self.scales[name]
            return scale.clamp_min(
                step if self.kinds[name] == "int6" else 0
            ).half(), torch.zeros_like(self.state[name][0], dtype=torch.int8)
        rows, columns = self.grid[name]
        return rows.maximum((4 * (self.least[name] / step).log2()).ceil()).clamp(-127, 127).to(
            torch.int8
        ), columns

    def levels(self, step, thin=False):
        """{name: (rows, columns, levels)}, thin: of 64 rows a matrix."""
        found = {}
        for n in self.names:
            some, (rows, columns) = (
                slice(None, None, -(-len(self.state[n]) // 64) if thin else None),
                self.steps(n, step),
            )
            found[n] = (
                rows[some],
                columns,
                code_levels(
                    self.state[n][some], spacing(rows[some], columns, step), LEVELS[self.kinds[n]]
                ),
            )
        if self.hessians and not thin:
            self.feed_back(found, step)
        return found

    def feed_back(self, found, step):
        """GPTQ (Frantar et al., arXiv:2210.17323): later columns make up for what the rounding of earlier ones costs."""
        groups = {}
        for n in self.names:
            groups.setdefault(self.state[n].shape, []).append(n)
        for names in groups.values():
            w, scale = (
                torch.stack([self.state[n] for n in names]),
                torch.stack([spacing(*found[n][:2], step) for n in names]),
            )
            h = torch.stack([self.hessians[n] for n in names]).double()
            h += torch.diag_embed(
                (0.01 * h.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-30).expand(
                    h.shape[:2]
                )
            )
            u = torch.linalg.cholesky(
                torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True
            ).float()
            for j in range(w.size(2)):
                kept, w[:, :, j] = (
                    w[:, :, j].clone(),
                    code_levels(w[:, :, j], scale[:, :, j], LEVELS[self.kinds[names[0]]]),
                )
                error = (kept - w[:, :, j] * scale[:, :, j]) / u[:, j, j, None]
                w[:, :, j + 1 :].baddbmm_(error[:, :, None], u[:, j, None, j + 1 :], alpha=-1)
            for n, q in zip(names, w):
                found[n][2].copy_(q)

    def rounded(self, step):
        """The state after rounding, tensors by name."""
        return self.state | {
            n: q * spacing(rows, columns, step)
            for n, (rows, columns, q) in self.levels(step).items()
        }

    def census(self, found):
        """(counts [CLASSES,SYMBOLS] of levels by class, scaled up from rows to matrices; spreads by name)."""
        spread, counts = {n: spreads(q) for n, (_, _, q) in found.items()}, 0
        for n, (_, _, q) in found.items():
            one = torch.bincount(
                (classes(spread[n], len(q)) * SYMBOLS + q.int() + SYMBOLS // 2).flatten(),
                minlength=CLASSES * SYMBOLS,
            )
            counts = counts + one * len(self.state[n]) // len(q)
        return counts.view(CLASSES, SYMBOLS).cpu().numpy(), spread

    def estimate(self, step):
        """Bytes of the artifact by the entropy of 64 rows of each matrix."""
        return entropy_bytes(self.census(self.levels(step, True))[0]) + self.beside

    def search(self, cap):
        """The step at which estimate() is just under cap, or the finest."""
        low, high = -1e-3, 40.0  # octaves over the finest, which is the first tried
        while high - low > 1e-3:
            middle = max(0.0, low + (high - low) * (low >= 0) / 2)
            low, high = (
                (low, middle) if self.estimate(self.finest * 2.0**middle) < cap else (middle, high)
            )
        return self.finest * 2.0**high

    def fit(self, cap):
        """(artifact of at most cap bytes, its figures): of the finest step, or of one that lands within 0.2 % of cap. Raises Fault."""
        best, more = None, 0.0
        for _ in range(6):
            step = self.search(0.999 * cap - more)
            blob, figures = self.pack(step)
            if len(blob) <= cap and (best is None or len(blob) > len(best[0])):
                best = blob, figures
            if best and (best[1]["step"] == self.finest or len(best[0]) > 0.998 * cap):
                return best
            more = len(blob) - self.estimate(step)
        refuse(
            not best,
            f"ARTIFACT_BYTES={self.c.artifact_bytes}: code leaves {cap} bytes, the weights take {len(blob)}; train a smaller model.",
            Fault,
        )
        return best

    def pack(self, step):
        """(the artifact with this step, {step, bytes of levels, of their entropy in their distributions})."""
        found, plain = (
            self.levels(step),
            {
                n: t.half() if k == "fp16" else t
                for n, t in self.state.items()
                if (k := self.kinds[n]) not in LEVELS
            },
        )
        counts, spread = self.census(found)
        rows, columns, q = (
            torch.cat([x.flatten() for x in part]).cpu() for part in zip(*found.values())
        )
        tensors, q, table = {"rows": rows, "columns": columns}, q.short(), frequencies(counts)
        if self.c.coder == "rans":
            which = torch.cat(
                [
                    classes(spread[n], len(x)).flatten().to("cpu", torch.uint8)
                    for n, (_, _, x) in found.items()
                ]
            )
            tensors["codes"] = torch.from_numpy(
                rans_encode(q.numpy() + SYMBOLS // 2, which.numpy(), table)
            )
            tensors |= {
                "spreads": torch.cat([*spread.values()]).cpu(),
                "table": torch.from_numpy(table.astype(np.int16)),
            }
        else:
            tensors["levels"] = q.to(torch.int8)
        header = {
            "model": {n: getattr(self.c, n.lower()) for n in MODEL_SETTINGS},
            "step": step,
            "matrices": [[n, list(self.state[n].shape)] for n in self.names],
        }
        size = (
            tensors["codes"].numel()
            if self.c.coder == "rans"
            else len(compress(tensors["levels"].numpy()))
        )
        return b"".join(seal(header, tensors | {n: t.cpu() for n, t in plain.items()}, compress)), {
            "step": step,
            "level_bytes": size,
            "entropy_bytes": round(entropy_bytes(counts)),
        }


def unpack_levels(header, w):
    """fp32 matrices by name of an artifact's header and tensors, which are taken out of w. Raises ValueError and others."""
    shapes = [shape for _, shape in header["matrices"]]

    def parts(name, size):
        return w.pop(name).split([size(*shape) for shape in shapes])

    if "codes" in w:
        refuse(
            sum(map(math.prod, shapes)) > EXPANSION * len(w["codes"]) + 2**25,
            "more levels than codes can hold",
            ValueError,
        )
        which = torch.cat(
            [
                classes(spread, r).flatten()
                for spread, (r, _) in zip(parts("spreads", int.__add__), shapes)
            ]
        )
        w["levels"] = (
            torch.from_numpy(
                rans_decode(
                    w.pop("codes").numpy(), which.numpy(), w.pop("table").numpy().astype(np.int64)
                )
            )
            - SYMBOLS // 2
        )
    found = zip(
        header["matrices"],
        parts("levels", int.__mul__),
        parts("rows", lambda r, c: r),
        parts("columns", lambda r, c: c),
    )
    return {
        name: q.view(shape) * spacing(rows, columns, header["step"])
        for (name, shape), q, rows, columns in found
    }


def unpack(data):
    """(fp32 tensors by name, settings) of an artifact. The lineage's, LZMA of a torch.save, has none; no code of it is run. Raises ValueError ..."""
    if data[:8] == MAGIC:
        header, w = unseal(data, expand)
        return unpack_levels(header, w) | {n: t.float() for n, t in w.items()}, header["model"]
    w = torch.load(BytesIO(expand(data)), map_location="cpu", weights_only=True)["w"]
    refuse(
        any(t.untyped_storage().nbytes() < t.numel() * t.element_size() for t in w.values()),
        "a tensor overlaps itself",
        ValueError,
    )
    return {
        n.removesuffix(".q"): t.float()
        * w[n[:-1] + "scale"].float().view(-1, *[1] * (t.dim() - 1)).expand_as(t)
        if n.endswith(".q")
        else t.float()
        for n, t in w.items()
        if n[:-5] + "q" not in w
    }, {}


def read_artifact(c):
    """(Config with its settings, tensors by name) of LOAD_ARTIFACT. Raises BadInput."""
    where = f"LOAD_ARTIFACT={c.load_artifact}"
    try:
        state, there = unpack(Path(c.load_artifact).read_bytes())
        refuse(
            there and there.keys() != {*MODEL_SETTINGS},
            "it has other settings than this version",
            ValueError,
        )
        settings = {
            s.name.lower(): parse_setting(s, shown(there[s.name]))
            for s in SETTINGS
            if s.name in there
        }
    except OSError as why:
        raise BadInput(f"{where}: {why.strerror}; give the path of a final_model.ptz.") from None
    except Exception as why:  # damage makes the readers raise all sorts
        raise BadInput(
            f"{where}: damaged, or no artifact: {str(why)[:160]}. Export it again."
        ) from None
    clash = [
        f"{n.upper()}={shown(getattr(c, n))} (there {shown(v)})"
        for n, v in settings.items()
        if n in c.explicit and getattr(c, n) != v
    ]
    c = dataclasses.replace(c, **settings)
    problems = clash or cross_check(c)
    refuse(
        problems,
        f"{where}: was made with other settings: {' '.join(problems)}. Unset them: the artifact knows.",
    )
    with torch.device("meta"):  # nothing is allocated for sizes that the file only claims
        load_state(GPT(c), state, where)
    return c, state


def copy_tensors(own, state, where):
    """Copy state into own, both by name. Raises BadInput unless names and shapes fit."""
    there, here = ({n: list(t.shape) for n, t in tensors.items()} for tensors in (state, own))
    wrong = [
        f"{n} is {there.get(n, 'missing')}, the settings make it {here.get(n, 'nothing')}"
        for n in sorted(there.keys() | here)
        if there.get(n) != here.get(n)
    ]
    refuse(
        wrong,
        f"{where}: does not fit: {'; '.join(wrong[:3])}{' ...' if wrong[3:] else ''}. Set NUM_LAYERS and others as trained.",
    )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def load_state(model, state, where):
    """Copy an artifact's tensors into the model. Raises BadInput."""
    copy_tensors(split_banks(model.state_dict(), model.c.num_layers), state, where)


def export(c, run, model, calibrated):
    """Rank 0 quantises and writes, unless it did before; all ranks load what is read back."""
    path, code = run.folder / "final_model.ptz", Path(__file__).stat().st_size
    if run.rank == 0 and "artifact" not in run.rows:
        began, quantizer = (
            perf_counter(),
            Quantizer(
                dataclasses.replace(c, recur_start=0) if model.recurring else c,
                model.state_dict(),
                *calibrated,
            ),
        )
        blob, figures = quantizer.fit(c.artifact_bytes - code)
        write_file(path, [blob])
        run.metric("quantised", **quantizer.counts, **figures, seconds=perf_counter() - began)
        kind = f"{c.quant}+{c.coder}+lzma"
        run.log(
            f"Code size: {code} bytes\nSerialized model {kind}: {len(blob)} bytes\nTotal submission size {kind}: {len(blob) + code} bytes"
        )
        run.metric("artifact", model_bytes=len(blob), code_bytes=code, total_bytes=len(blob) + code)
    state, settings = unpack(run.share(path.read_bytes() if run.rank == 0 else b""))
    load_state(model, state, path)
    model.recurring = bool(c.recur_layers) and settings["RECUR_START"] == 0


# ---------- scoring core
# Each target is scored once into one array of nats [N], shared out over ranks by whole batches, summed once, in order, in fp64.
def plan_windows(n, window, stride):
    """(start, first scored row) of each window, int64 arrays, to score n targets once, in order: the first window all its rows, later
    ones the last stride; the last is moved back to end at n. Raises ValueError."""
    refuse(
        not 1 <= stride <= window <= n,
        f"need 1 <= stride {stride} <= window {window} <= n {n}",
        ValueError,
    )
    ends = np.minimum(np.arange(window, n + stride, stride), n)
    return ends - window, np.concatenate([[0], ends[:-1]]) - (ends - window)


def row_nll(model, h, targets, rows, shift=None):
    """Nats [R] at flat rows of h [B,T,D], with shift [B or 1,V] on the logits; only rows meet the head."""
    T, h, targets, nats = h.size(1), h.flatten(0, 1), targets.flatten(), []
    for r in rows.split(16384):
        z = model.project(h[r])
        if shift is not None:
            z += shift[r // T] if len(shift) > 1 else shift
        nats.append(F.cross_entropy(model.cap(z), targets[r], reduction="none"))
    return torch.cat(nats)


def scored_rows(firsts, T):
    "Mask [B,T] of the rows that windows score."
    return np.arange(T) >= firsts[:, None]


# ---------- scoring methods
# What turns hidden states into nats. What is causal follows from the settings: broken_conditions().
# [B,T,D], [B,T], [B] of the last T rows of windows; of each scored target stream index, flat row
Batch = namedtuple("Batch", "h targets firsts at rows")


class Plain:
    """The model's own distribution."""

    def __init__(self, c, run, model, val):
        self.c, self.run, self.model, self.all_rows = (
            c,
            run,
            model,
            False,
        )  # whether nats() looks at others than those to score

    def nats(self, b):
        "Nats [R] of the scored targets of a Batch."
        return row_nll(self.model, b.h, b.targets, b.rows)

    def learn(self, end):
        """Take in the scored targets before end."""


def slot_gradient(z, targets, shares, shift, cap):
    """Gradient [G,V] by shift [G,V] of the sum of shares times cross entropies of targets, both [G,n], under cap * tanh((z + shift) /
    cap). z [G,n,V] and shift come times 2/cap: tanh(x) = 2 sigmoid(2x) - 1, whose -1 a softmax ignores, and 1 - tanh^2 = 4 s (1-s)."""
    s = (z + shift.unsqueeze(1)).sigmoid_()
    own, g = (
        s.gather(2, targets.unsqueeze(2)).squeeze(2),
        torch.softmax(s * (2 * cap), -1).mul_(torch.addcmul(s, s, s, value=-1)),
    )
    return (shares.unsqueeze(1) @ g).squeeze(1).scatter_add_(
        1, targets, shares * own * (own - 1)
    ) * 4


class Slot(Plain):
    """SLOT (arXiv:2505.12392): a delta [D] on hidden states, with SLOT_BIAS a bias [V] on logits before the cap, fitted by AdamW
    (eps 1e-5, weight decay 1e-8) for a batch (#1084) or a window (#1303). The logits of h + delta are base logits + W delta, so a
    step adds one vector, and the gradient of delta is W' times the column sum of the logits' gradient."""

    TILE, KEEP = 2**18, 2**26  # base logits at once (on a GPU KEEP), and kept
    WINDOWS = (
        32  # a window's loss is divided as in a batch of so many (#1303), whatever the batch is
    )

    def __init__(self, c, run, model, val):
        super().__init__(c, run, model, val)
        self.compiled = torch.compile(slot_gradient, dynamic=True) if run.compile else None
        self.carry, self.tile, self.all_rows = (
            self.fresh(1),
            self.KEEP if run.cuda else self.TILE,
            c.slot_loss in ("all", "context"),
        )

    def fresh(self, groups):
        """AdamW's [4,groups,P]: parameters (delta, bias), moments, number of steps."""
        return torch.zeros(
            4,
            groups,
            self.c.model_dim + self.c.vocab_size * self.c.slot_bias,
            device=self.run.device,
        )

    def fit_rows(self, firsts, T):
        """Mask [B,T] of the rows whose targets the parameters are fitted to."""
        scored = scored_rows(firsts, T)
        if self.c.slot_loss == "all":
            scored[:], scored[:, -1] = True, False  # #1084 leaves out the last
        return ~scored if self.c.slot_loss == "context" else scored

    def shift(self, state):
        """Shift [G,V] of the logits."""
        D = self.c.model_dim
        return state[0, :, :D] @ self.model.head_weight().float().mT + (
            state[0, :, D:] if self.c.slot_bias else 0
        )

    def fit(self, h, targets, rows, shares, state):
        """Fit state, in place, to shares [G,n] times nats at rows [G,n] of h [*,D], targets [*]."""
        c, weight, moved, last, kept = self.c, self.model.head_weight().float(), 0.0, 0.0, {}
        size, factor, low = (
            len(rows) * c.vocab_size,
            2 / c.logit_softcap,
            c.slot_lr if c.slot_lr_min < 0 else c.slot_lr_min,
        )
        tiles = [*zip(*(x.split(max(1, self.tile // size), 1) for x in (rows, shares)))]
        for step in range(c.slot_steps):
            shift, columns = self.shift(state) * factor, 0.0
            for k, (r, share) in enumerate(tiles):
                z = kept[k] if k in kept else self.model.project(h[r]).mul_(factor)
                if (k + 1) * tiles[0][0].size(1) * size <= self.KEEP:
                    kept[k] = z
                columns = columns + (self.compiled or slot_gradient)(
                    z, targets[r], share, shift, c.logit_softcap
                )
            g = torch.cat((columns @ weight, columns), -1) if c.slot_bias else columns @ weight
            moved, last = moved + c.slot_hyper_lr * (g * last).sum(-1, keepdim=True), g
            rate = cosine(c.slot_lr, low, step, c.slot_steps) + moved
            value, m, v, count = state
            count += 1
            m.lerp_(g, 0.1)
            v.lerp_(g.square(), 0.001)
            debias = [
                -torch.expm1(count[:, :1] * math.log(beta)) for beta in (0.9, 0.999)
            ]  # 1 - beta**count, precisely
            update = m / debias[0] / ((v / debias[1]).sqrt() + 1e-5)
            value -= rate * (update + 1e-8 * value)

    def nats(self, b):
        """Nats [R]. With SLOT_LOSS=past ranks call it together: the state goes round."""
        c, T, past, window, found = (
            self.c,
            b.h.size(1),
            self.c.slot_loss == "past",
            self.c.slot_delta == "window",
            [],
        )
        mask, usual = (
            self.fit_rows(b.firsts, T),
            {"all": T - 1, "context": T - c.eval_stride}.get(c.slot_loss, c.eval_stride),
        )
        most = max(1, self.tile // (c.vocab_size * max(1, usual)))  # windows to fit at once
        most = (1 if past else most) if window else max(1, len(mask))
        for rank in range(self.run.world if past else 1):
            for i in range(0, len(mask), most) if rank == self.run.rank or not past else ():
                h, y, groups = (
                    b.h[i : i + most],
                    b.targets[i : i + most],
                    min(most, len(mask) - i) if window else 1,
                )
                m, state = (
                    mask[i : i + most].reshape(groups, -1),
                    self.carry if past else self.fresh(groups),
                )
                rows = np.argsort(~m, 1, kind="stable")[
                    :, : m.sum(1).max()
                ]  # those to fit to, in order, then others
                shares = np.take_along_axis(m, rows, 1) / (
                    self.WINDOWS * usual if window else max(1, m.sum())
                )
                rows, shares, scored = (
                    self.run.put(x)
                    for x in (
                        rows + np.arange(groups)[:, None] * T,
                        shares.astype(np.float32),
                        np.flatnonzero(scored_rows(b.firsts[i : i + most], T)),
                    )
                )
                for work in ("score", "fit") if past else ("fit", "score"):
                    if work == "score":
                        found.append(row_nll(self.model, h, y, scored, self.shift(state)))
                    else:
                        self.fit(h.flatten(0, 1), y.flatten(), rows, shares, state)
            if past and self.run.world > 1:
                dist.broadcast(self.carry, rank)
        return torch.cat([b.h.new_empty(0).float(), *found])


class Ctw(Plain):
    """Context tree weighting over tokens (Willems, Shtarkov, Tjalkens 1995), KT estimator with alpha 1/2, mixed in: (1-w) p + w q, w =
    CTW_WEIGHT * entropy / ln V where the model's entropy is above the threshold; 0 in the first chunk. Exact at chunk boundaries: P_w =
    (P_e + product of the children's P_w) / 2. Nodes and (node, target) pairs are numbered once; a chunk updates those it meets, on the CPU."""

    def __init__(self, c, run, model, val):
        super().__init__(c, run, model, val)
        V, self.end, self.levels, tokens = c.vocab_size, 0, [], val.tokens.cpu()
        padded, node, parent = (
            F.pad(tokens, (c.ctw_depth, 0), value=V),
            torch.zeros_like(tokens[1:]),
            torch.zeros(1, dtype=torch.long),
        )
        for d in range(c.ctw_depth + 1):
            if d:
                keys, node = torch.unique(
                    node * (V + 1) + padded[c.ctw_depth + 1 - d :][: val.n], return_inverse=True
                )
                parent = keys // (V + 1)
            keys, pair = torch.unique(node * V + tokens[1:], return_inverse=True)
            count, block, children, weighted = torch.zeros(4, len(parent), dtype=torch.float64)
            self.levels.append(
                dict(
                    node=node,
                    parent=parent,
                    pair=pair,
                    owner=keys // V,
                    pairs=torch.zeros(len(keys), dtype=torch.float64),
                    count=count,
                    block=block,
                    children=children,
                    weighted=weighted,
                )
            )

    def learn(self, end):
        """Count targets before end, weight the nodes on their paths."""
        new, self.end, changed = slice(self.end, end), end, None
        for x in reversed(self.levels):
            for index, k, sign, alpha in (
                (x["pair"], x["pairs"], 1, 0.5),
                (x["node"], x["count"], -1, self.c.vocab_size / 2),
            ):
                at, more = torch.unique(index[new], return_counts=True)
                gain = sign * (torch.lgamma(k[at] + more + alpha) - torch.lgamma(k[at] + alpha))
                k[at] += more
                x["block"].index_add_(0, x["owner"][at] if sign > 0 else at, gain)
            if changed:
                x["children"].index_add_(0, *changed)
            now = (
                torch.logaddexp(x["block"][at], x["children"][at]) - math.log(2)
                if changed
                else x["block"][at]
            )
            changed, x["weighted"][at] = (x["parent"][at], now - x["weighted"][at]), now

    def probability(self, at):
        """q [n] fp64 of targets at these indices of the stream."""
        q = None
        for x in reversed(self.levels):
            node = x["node"][at]
            kt = (x["pairs"][x["pair"][at]] + 0.5) / (x["count"][node] + self.c.vocab_size / 2)
            stop = (
                torch.exp(x["block"][node] - x["weighted"][node]) / 2
            )  # posterior weight of this context over longer ones
            q = kt if q is None else stop * kt + (1 - stop) * q
        return q

    def nats(self, b):
        """Nats [R] under the mixture."""
        if not self.end:
            return super().nats(b)
        h, y, nats, q = (
            b.h.flatten(0, 1),
            b.targets.flatten(),
            [],
            self.probability(b.at.cpu()).log().to(b.h.device, torch.float32),
        )
        for r, q in zip(b.rows.split(1024), q.split(1024)):
            logp = self.model.cap(self.model.project(h[r])).log_softmax(-1)
            own, entropy = logp.gather(1, y[r, None])[:, 0], -(logp.exp() * logp).sum(-1)
            w = (
                self.c.ctw_weight
                / math.log(logp.size(1))
                * entropy
                * (entropy > self.c.ctw_entropy_threshold)
            )
            nats.append(
                -torch.where(w > 0, torch.logaddexp(own + torch.log1p(-w), q + w.log()), own)
            )
        return torch.cat(nats)


METHODS = {"slot": Slot, "ctw": Ctw}  # by the end of an evaluator's name


def broken_conditions(c, label):
    """Which conditions of C1 to C4 (challenge issue #1017) an evaluator breaks, "" if it is causal. SLOT is if it fits to what earlier
    windows scored, none of which shares its delta."""
    own = c.slot_delta == "window" or c.slot_batch_seqs == 1
    leak = (
        label.endswith("slot") and c.slot_loss != "past" and not (c.slot_loss == "context" and own)
    )
    return ",".join(["C1", "C2"] * leak + ["C3"] * (leak or c.prequant_ttt_enabled))


# ---------- evaluators
class ChunkTrainer:
    """Trains on scored text: score-first test-time training (#549)."""

    def __init__(self, c, run, model, optimizer, frozen_blocks):
        self.c, self.run, self.model, self.params, self.frozen = (
            c,
            run,
            model,
            list(model.parameters()),
            [],
        )
        self.optimizer, sizes = optimizer(self.params), [p.numel() for p in self.params]
        self.grad = torch.zeros(
            sum(sizes), device=run.device
        )  # all gradients, to clear, sum and clip as one
        for (name, p), part in zip(model.named_parameters(), self.grad.split(sizes)):
            p.grad, names = part.view_as(p), matrix_names(name, c.num_layers)
            rows = [
                i
                for i, n in enumerate(names)
                if n.startswith("blocks.") and int(n.split(".")[1]) < frozen_blocks
            ]
            if rows:  # of a bank; another tensor freezes whole
                self.frozen.append((p, rows if name in BANKS else slice(None)))

    def train(self, tokens, begin, end, rate, epochs):
        """Passes over targets begin to end in sequences of EVAL_SEQ_LEN; the last may reach back for context, counting only its own targets."""
        T, size = self.c.eval_seq_len, self.c.ttt_batch_seqs
        starts = np.arange(begin, end, T)
        reach = max(0, int(starts[-1]) + T - end)
        starts[-1] -= reach
        rows = tokens[self.run.put(starts[:, None] + np.arange(T + 1))]
        inputs, targets = rows[:, :-1], rows[:, 1:].clone()
        targets[-1, :reach] = -100
        self.optimizer.param_groups[0]["lr"] = rate
        for i in [*range(0, len(rows), size)] * epochs:
            mine = slice(i + self.run.rank, i + size, self.run.world)
            self.step(inputs[mine], targets[mine], (targets[i : i + size] >= 0).sum())

    def step(self, inputs, targets, count):
        """A step on the mean over the count targets of all ranks; one may hold none."""
        self.grad.zero_()
        n = micro_batches(self.run, len(inputs), self.c.eval_seq_len) if len(inputs) else 0
        for ids, goal in zip(inputs.chunk(n), targets.chunk(n)) if n else ():
            (self.model(ids, goal, "sum") / count).backward()
        self.run.sum(self.grad)
        for p, rows in self.frozen:
            p.grad[rows] = 0
        if self.c.ttt_grad_clip:
            self.grad *= (self.c.ttt_grad_clip / (self.grad.norm() + 1e-6)).clamp(max=1)
        self.optimizer.step()


class Progress:
    """What a pass of evaluation goes on from: the nats so far and live tensors, saved when 30 times what that costs has passed."""

    def __init__(self, c, run, kind):
        self.c, self.run, self.kind, self.cost, self.last, self.began = (
            c,
            run,
            kind,
            0.02,
            perf_counter(),
            perf_counter(),
        )
        self.poll, self.moments = Poll(run), []

    def resume(self, out, live):
        """The window to go on with, after taking in the newest file, if there is one. Ranks sum out in the end."""
        tensors, counters = (
            self.run.restore(self.kind),
            torch.zeros(len(out) + 1, dtype=torch.double),
        )
        if tensors:
            n = tensors["nats"].size(-1) if "nats" in tensors else 0
            copy_tensors({**live, "counters": counters, "nats": out[:, :n]}, tensors, self.kind)
            out *= self.run.rank == 0
        window, seconds, *self.spent = counters.tolist()
        self.began -= seconds
        return int(window)

    def seconds(self):
        """Seconds [K] spent on each method."""
        self.run.synchronize()
        for moments in self.moments:
            self.spent = [
                old + (a.elapsed_time(b) / 1000 if self.run.cuda else b - a)
                for old, a, b in zip(self.spent, moments, moments[1:])
            ]
        self.moments = []
        return np.array(self.spent)

    def mark(self, window, out, live):
        """Before a batch on all ranks, out being whole for the windows before: save it if it is time, end if a signal came."""
        now = perf_counter()
        due, stop, *_ = self.poll.ask(
            bool(self.c.save_every) and now > self.last + 30 * self.cost
        ) or (0, 0)
        if (due or stop) and out.size(1):
            seconds, nats = self.seconds(), out.clone(memory_format=torch.contiguous_format)
            counters = torch.tensor([window, now - self.began, *seconds], dtype=torch.double)
            self.run.save(
                self.kind, window, {**live, "counters": counters, "nats": self.run.sum(nats)}
            )
            self.last = perf_counter()
            self.cost = self.last - now
        stop and self.run.stop()


def tokens_at_once(c, run):
    """Tokens of a forward that a CPU's cache or half of a GPU's memory holds."""
    a_token = run.dtype.itemsize * c.model_dim * (16 + c.num_layers // 2 + 4 * c.mlp_mult)
    return (
        int(torch.cuda.get_device_properties(run.device).total_memory / 2 / a_token)
        if run.cuda
        else 4096
    )


@torch.no_grad()
def score_batch(c, run, model, val, starts, firsts, pad_to, methods, out):
    """Score windows into out [K+1,N], a row for each method, the last counts. -> moments [K+1] around the methods."""
    T, n = c.eval_seq_len, len(starts)
    tail = (
        T
        if any(method.all_rows for method in methods) or firsts.min(initial=T) < T - c.eval_stride
        else c.eval_stride
    )
    rows = np.flatnonzero(scored_rows(firsts - (T - tail), tail))
    at = run.put((starts[:, None] + np.arange(T - tail, T)).ravel()[rows])
    if run.compile and n:
        starts = starts[
            np.minimum(np.arange(pad_to), n - 1)
        ]  # whole batches only: one shape is compiled
    tokens = val.tokens.unfold(0, T + 1, 1)[run.put(starts)]
    h = (
        model.hidden(tokens[:, :-1], tail)[:n]
        if n
        else torch.empty(0, tail, c.model_dim, device=run.device)
    )
    batch, moments = (
        Batch(h, tokens[:n, T + 1 - tail :], firsts - (T - tail), at, run.put(rows)),
        [run.moment()],
    )
    for k, method in enumerate(methods):
        out[k, at] = method.nats(batch)
        moments.append(run.moment())
    out[-1].index_add_(0, at, torch.ones_like(out[-1, at]))  # += would count doubles once
    return moments


def score(run, model, val, jobs, progress=None):
    """[(nats [N] fp32, seconds)] of jobs [(label, Config)] in one pass with the first one's windows and TTT, which changes the weights.
    With progress it can be ended and gone on with. Raises Fault unless each target was scored once (C4)."""
    (label, c), T, names = (
        jobs[0],
        jobs[0][1].eval_seq_len,
        "+".join(dict.fromkeys(job[0] for job in jobs)),
    )
    clock = progress or Progress(c, run, "")
    methods = [
        METHODS.get(label.split("_")[-1], Plain)(config, run, model, val) for label, config in jobs
    ]
    (size,) = {config.slot_batch_seqs for name, config in jobs if name.endswith("slot")} or {
        max(1, min(c.val_batch_size // run.world, tokens_at_once(c, run)) // T)
    }
    starts, firsts = plan_windows(val.n, T, T if label == "roundtrip" else c.eval_stride)
    ttt, shown, resumed = label.startswith("ttt"), perf_counter(), 0
    chunk = (starts + firsts) // (
        c.ttt_chunk_tokens if ttt or "ctw" in names else val.n
    )  # that of its first scored target
    out, clock.spent, chunks = (
        torch.zeros(len(jobs) + 1, val.n, device=run.device),
        [0.0] * len(jobs),
        int(chunk[-1]) + 1,
    )
    trainer = (
        ChunkTrainer(
            c,
            run,
            model,
            functools.partial(torch.optim.SGD, momentum=c.ttt_momentum),
            c.ttt_freeze_blocks,
        )
        if ttt
        else None
    )
    live = {
        f"carry.{k}": method.carry for k, method in enumerate(methods) if hasattr(method, "carry")
    }
    for name, p in model.named_parameters() if ttt else ():
        live[name], live["momentum." + name] = p, torch.zeros_like(p)
        trainer.optimizer.state[p]["momentum_buffer"] = live["momentum." + name]
    if progress:
        resumed = progress.resume(out, live)
    for i in range(chunks):
        begin, end = np.searchsorted(chunk, [i, i + 1])
        for b in range(max(begin, resumed), end, run.world * size):
            if progress:
                progress.mark(b, out[:, : starts[b] + firsts[b]], live)
            first = min(b + run.rank * size, end)
            batch = slice(first, min(first + size, end))  # empty on some ranks at the end
            clock.moments.append(
                score_batch(c, run, model, val, starts[batch], firsts[batch], size, methods, out)
            )
            if perf_counter() - shown > 2:
                shown, _ = perf_counter(), clock.seconds()  # or moments pile up
                run.log(
                    f"progress:{names} window:{batch.stop}/{len(starts)} chunk:{i + 1}/{chunks} seconds:{shown - clock.began:.1f}"
                )
        if i + 1 < chunks:  # the last chunk is scored only
            text = i * c.ttt_chunk_tokens, (i + 1) * c.ttt_chunk_tokens
            clock.moments.append([run.moment()])
            for method in methods:
                method.learn(text[1])
                clock.moments[-1].append(run.moment())
            if ttt and resumed < end:
                trainer.train(val.tokens, *text, cosine(c.ttt_lr, 0, i, chunks), c.ttt_epochs)
    run.sum(out)
    refuse(
        not bool((out[-1] == 1).all()),
        f"{names}: {int((out[-1] != 1).sum())} of {val.n} targets were not scored exactly once",
        Fault,
    )
    spent, clock.total = clock.seconds(), perf_counter() - clock.began
    return [(out[k], clock.total - spent.sum() + spent[k]) for k in range(len(jobs))]


def mean_and_bpb(val, nats):
    """(nats a token, bits a byte) of nats [N]."""
    loss = nats.double().mean().item()
    return loss, loss / math.log(2) * val.n / val.total_bytes


def evaluate(c, run, model, val, weights, labels):
    """Run evaluators on the model, whose weights are put back, and log a result line for each."""
    passes = {}
    for label in labels:
        passes.setdefault((label == "roundtrip", label.startswith("ttt")), []).append(label)
    for group in (
        group
        for group in passes.values()
        if any(f"final_{weights}_{label}" not in run.rows for label in group)
    ):
        progress = Progress(c, run, f"progress_{weights}_{'+'.join(group)}")
        with put_back(model.parameters()):
            results = score(run, model, val, [(label, c) for label in group], progress)
        run.metric(f"pass_{weights}_{'+'.join(group)}", eval_time=1000 * progress.total)
        for label, (nats, seconds) in (
            r for r in zip(group, results) if f"final_{weights}_{r[0]}" not in run.rows
        ):
            loss, bpb = mean_and_bpb(val, nats)
            broken = broken_conditions(c, label)
            if c.save_nll and run.rank == 0 and weights == "artifact":
                np.save(buffer := BytesIO(), nats.double().cpu().numpy())
                write_file(run.folder / f"nll_{label}.npy", [buffer.getvalue()])
            run.metric(
                f"final_{weights}_{label}",
                val_loss=loss,
                val_bpb=bpb,
                tokens=val.n,
                bytes=val.total_bytes,
                causal=not broken,
                eval_time=1000 * seconds,
                **({"breaks": broken} if broken else {}),
            )
        run.saving.result()
        for path in run.saved("progress_*") if run.rank == 0 else ():
            path.unlink()


def train_on_validation(c, run, model, val):
    """Pre-quantisation TTT (#1488): AdamW on tokens before they are scored."""
    trainer = ChunkTrainer(
        c,
        run,
        model,
        functools.partial(torch.optim.AdamW, weight_decay=0.0),
        c.prequant_ttt_freeze_blocks,
    )
    began, rate = perf_counter(), c.prequant_ttt_lr
    for epoch in range(c.prequant_ttt_epochs):
        trainer.train(
            val.tokens, 0, val.n, cosine(rate, rate / 10, epoch, c.prequant_ttt_epochs), 1
        )
        run.log(
            f"prequant_ttt:epoch {epoch + 1}/{c.prequant_ttt_epochs} seconds:{perf_counter() - began:.1f}"
        )
        Poll(run, 0).ask()[1] and run.stop()
    model.zero_grad(set_to_none=True)


# ---------- training
def start_qat(c, run, model, data, optimizer):
    """Fix the grid that the export would take now for quantisation-aware training (QAT)."""
    grid = None if c.quant == "gptq_lite" else calibrate(c, run, model, data)[0]
    quantizer = Quantizer(c, model.state_dict(), grid)
    optimizer.qat_step = quantizer.search(c.artifact_bytes - Path(__file__).stat().st_size)
    for name, t in optimizer.grid.items():
        t.copy_(torch.cat(quantizer.steps(name, optimizer.qat_step)))


@torch.no_grad()
def round_weights(c, model, optimizer):
    """Put what the export makes of them into the weights. Straight-through: the gradient there updates the kept ones."""
    for name, w in split_banks(dict(model.named_parameters()), c.num_layers).items():
        if (kind := level_kind(c, name, c.quant == "gptq_lite")) in LEVELS:
            if c.quant == "gptq_lite":
                scale = row_scales(w, LEVELS[kind]).clamp_min(
                    optimizer.qat_step if kind == "int6" else 0
                )
            else:
                scale = spacing(*optimizer.grid[name].split(w.shape), optimizer.qat_step)
            w.copy_(code_levels(w, scale, LEVELS[kind]).mul_(scale))


def micro_batches(run, sequences, length):
    """The fewest equal parts of a rank's sequences under a limit: the record's on 8 GPUs, what a CPU's cache likes, whatever the world size."""
    limit = 98304 if run.cuda else 4096
    return next(
        n
        for n in range(1, sequences + 1)
        if sequences % n == 0 and (sequences // n * length <= limit or n == sequences)
    )


def train_step(c, run, model, optimizer, batch, step, scale):
    """(mean loss, gradient norm), on the device, after a step on this rank's part of a batch."""
    n, total = (
        micro_batches(run, len(batch[0]), c.train_seq_len),
        torch.zeros((), device=run.device),
    )
    with put_back(model.parameters()) if optimizer.qat_step else contextlib.nullcontext():
        if optimizer.qat_step:
            round_weights(c, model, optimizer)
        for ids, targets in zip(batch[0].chunk(n), batch[1].chunk(n)):
            loss = model(ids, targets) / n
            loss.backward()
            total += loss.detach()
    norm = optimizer.step(total, scale, muon_momentum(c, step))
    model.zero_grad(set_to_none=True)
    return total, norm


def prime(c, run, model, data):
    """Compile before the clock starts: WARMUP_STEPS steps of which nothing remains."""
    optimizer, feed = Optimizer(c, run, model), data.batches()
    with put_back(model.parameters()):
        for step in range(c.warmup_steps):
            model.recurring = bool(c.recur_layers) and step % 2 == 1  # both graphs
            train_step(c, run, model, optimizer, next(feed), step, 1.0)
    model.recurring = bool(c.recur_layers) and c.recur_start == 0
    run.log(f"primed in {c.warmup_steps} steps")


def training_state(model, optimizer, averages, counters):
    """Live tensors by name that training goes on from, Muon's momentum whole. No random number is drawn after the initial weights."""
    names = {p: name for name, p in model.named_parameters()}
    state, whole = (
        {"counters": counters} | {name: p for p, name in names.items()},
        [optimizer.gather(share) for share in optimizer.momentum],
    )
    for kind, tensors in averages.kept.items():
        state |= {f"{kind}.{name}": t for name, t in zip(names.values(), tensors)}
    state |= {f"grid.{name}": t for name, t in optimizer.grid.items()}
    for p, (work, t) in zip(optimizer.banks, whole):
        work and work.wait()
        state["momentum." + names[p]] = t[: len(p)]
    return state | {
        f"{key}.{names[p]}": t
        for p in optimizer.small
        for key, t in optimizer.adam.state[p].items()
    }


def read_checkpoint(path):
    """Tensors of LOAD_CHECKPOINT; {} if it is empty. Raises BadInput."""
    try:
        return unseal(bytearray(Path(path).read_bytes()))[1] if path else {}
    except Exception as why:  # damage makes the readers raise all sorts
        raise BadInput(
            f"LOAD_CHECKPOINT={path}: {str(why)[:160]}; give the path of a whole checkpoint.STEP.ckpt."
        ) from None


def resume_training(run, model, optimizer, averages):
    """(step, ms), after taking in the last checkpoint, or LOAD_CHECKPOINT, if there is one."""
    tensors, counters = (
        run.restore("checkpoint") or read_checkpoint(averages.c.load_checkpoint),
        torch.zeros(4, dtype=torch.double),
    )
    if tensors:
        copy_tensors(
            own := training_state(model, optimizer, averages, counters), tensors, "checkpoint"
        )
        averages.steps, averages.snapshots, optimizer.qat_step = (
            int(counters[0]),
            int(counters[3]),
            float(counters[2]),
        )
        for n, share, whole in zip(
            optimizer.shares,
            optimizer.momentum,
            [t for name, t in own.items() if name.startswith("momentum.")],
        ):
            share[: max(0, len(whole) - run.rank * n)] = whole[run.rank * n :][:n]
    return [*map(math.ceil, counters.tolist())][
        :2
    ]  # rounded down, a run whose time was up would train another step


def train(c, run, model, data, val):
    """Train, from a checkpoint if there is one, put the best average into the model, return choose()'s for its export. Raises Fault."""
    if run.compile and c.warmup_steps:
        prime(c, run, model, data)
    optimizer, averages = Optimizer(c, run, model), Averages(c, model.parameters())
    begin, ms = resume_training(run, model, optimizer, averages)
    first_bad, feed = torch.full((), c.iterations + 1, device=run.device), data.batches(begin)
    model.recurring = bool(c.recur_layers) and (begin > c.recur_start or not c.recur_start)
    clock = Clock(run, 1000 * c.max_wallclock_seconds, begin, ms)
    reserve = (
        2 + (1.5 * len(data.held_out) + 2 * c.calibration_tokens) / c.train_batch_tokens
    )  # steps' time to calibrate and compare averages
    for step in range(begin, c.iterations + 1):
        elapsed, stop, bad = clock.agreed(step, first_bad)
        last = (
            step == c.iterations
            or 0 < clock.cap_ms <= elapsed + reserve * clock.step_ms
            and step > 0
        )
        save = step > begin and (stop or last or c.save_every > 0 and step % c.save_every == 0)
        if bad or (last or save) and first_bad.item() <= step:
            raise Fault(
                f"step {first_bad.item()}: loss or gradient is not finite; lower MATRIX_LR, TIED_EMBED_LR and SCALAR_LR. "
                f"What is saved in {run.folder} is from before it."
            )
        if save:
            counters = torch.tensor(
                [step, clock.now(), optimizer.qat_step, averages.snapshots], dtype=torch.double
            )
            run.save("checkpoint", step, training_state(model, optimizer, averages, counters))
        stop and run.stop()
        if last or c.val_loss_every and step % c.val_loss_every == 0:
            ms = clock.now()
            loss, bpb = mean_and_bpb(val, score(run, model, val, [("roundtrip", c)])[0][0])
            run.metric(
                f"step:{step}/{c.iterations}",
                4,
                val_loss=loss,
                val_bpb=bpb,
                train_time=ms,
                step_avg=ms / max(step, 1),
            )
            clock.began += (clock.now() - ms) / 1000
        if last:
            break
        if c.recur_layers and step == c.recur_start:
            model.start_recurrence()
            run.log(f"recurrence:on step:{step} layers:{','.join(map(str, c.recur_layers))}")
        scale = lr_scale(c, step, elapsed, clock.step_ms)
        if c.late_qat and scale < c.late_qat_threshold and not optimizer.qat_step:
            start_qat(c, run, model, data, optimizer)
            run.log(
                f"late_qat:on step:{step} lr_scale:{scale:.4f} grid_step:{optimizer.qat_step:.6g}"
            )
        loss, norm = train_step(c, run, model, optimizer, next(feed), step, scale)
        averages.update(scale)
        first_bad = torch.where(
            torch.isfinite(loss + norm), first_bad, first_bad.clamp(max=step + 1)
        )
        if step < 10 or (step + 1) % c.train_log_every == 0:
            ms = clock.now()
            run.metric(
                f"step:{step + 1}/{c.iterations}",
                4,
                train_loss=loss.item(),
                train_time=ms,
                step_avg=ms / (step + 1),
            )
    step < c.iterations and run.log(
        f"stopping_early: wallclock_cap train_time:{clock.now():.0f}ms step:{step}/{c.iterations}"
    )
    calibrated = averages.choose(run, model, data, optimizer.qat_step and optimizer.grid)
    run.metric("training", steps=step, tokens=step * c.train_batch_tokens, train_time=clock.now())
    run.cuda and run.log(f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB")
    return calibrated


# ---------- main
def run_all(c):
    """Check, then train and export, or load, then evaluate."""
    read_checkpoint(c.load_checkpoint)
    c, state = read_artifact(c) if c.load_artifact else (c, None)
    run = Run(c)
    refuse(
        state is None and c.train_batch_tokens % (run.world * c.train_seq_len),
        f"TRAIN_BATCH_TOKENS={c.train_batch_tokens}: with {run.world} ranks a multiple of {run.world * c.train_seq_len}.",
    )
    backend, attention = choose_attention(c.attention, run.device)
    val, data = ValData(c, run), TrainData(c, run) if state is None else None
    model = GPT(c, run.dtype, attention)
    if state is not None:
        load_state(model, state, f"LOAD_ARTIFACT={c.load_artifact}")
    for s in data.shards if data else ():
        refuse(
            np.array_equal(s[:1024], val.tokens[:1024].cpu()),
            f"{s.filename}: begins as the validation "
            "split does; to train or calibrate on that breaks C3.",
        )
    run.start(c)
    model.to(run.device)
    if run.compile:
        compile_model(model)
    run.log(
        f"model_params:{sum(p.numel() for p in model.parameters())} attention:{attention_kernel(backend, c, run)} val_tokens:{val.n} (the last "
        f"{val.dropped} fill no window) val_bytes:{val.total_bytes}"
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if __name__ == "__main__" else ():
        signal.getsignal(number) == signal.SIG_IGN or signal.signal(
            number, on_signal
        )  # nohup's stays
    try:
        if data:
            calibrated = ()
            run.log(
                f"train_shards:{len(data.shards)} train_tokens:{sum(map(len, data.shards))} heldout_tokens:{len(data.held_out)}"
            )
            if "artifact" not in run.rows:
                calibrated = train(c, run, model, data, val)
                if c.prequant_ttt_enabled:
                    train_on_validation(c, run, model, val)
                evaluate(c, run, model, val, "float", ["roundtrip"])
            export(c, run, model, calibrated)
        evaluate(c, run, model, val, "artifact", c.evals)
        if "eval_total" not in run.rows:
            run.metric(
                "eval_total",
                eval_time=sum(
                    row["eval_time"]
                    for label, row in run.rows.items()
                    if label.startswith("pass_artifact")
                ),
            )
    except Exception as problem:  # also that of a collective whose other end died
        run.pool.shutdown()  # a checkpoint that is being written
        run.log(f"error: {problem}")
        raise


def main():
    """Exit status: 0 done, 1 fault, 2 bad input, 128 + its number after a signal."""
    try:
        run_all(load_config(os.environ))
        sys.exit(0)
    except (SystemExit, KeyboardInterrupt) as done:
        os._exit(getattr(done, "code", 130))  # taking gloo down aborts some ranks
    except Exception as problem:
        isinstance(problem, (BadInput, Fault, OSError)) or sys.excepthook(*sys.exc_info())
        if (
            os.environ.get("LOCAL_RANK", "0") != "0"
            or dist.is_initialized()
            and isinstance(problem, RuntimeError)
        ):
            sleep(3)  # torchrun names the rank that ends first
        print(f"error: {problem}", file=sys.stderr, flush=True)
        os._exit(
            2 if isinstance(problem, BadInput) else 1
        )  # at once: a rank must not wait for others in a collective


if __name__ == "__main__":
    main()
