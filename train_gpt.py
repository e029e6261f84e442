"""Parameter Golf, the SLOT record (pull request #1084), in one file: train, average, quantise, evaluate.

A GPT of 11 layers learns to predict web text in ten minutes on 8 GPUs. Its weights are averaged, quantised to six bits
and compressed to less than 16,000,000 bytes together with this file, read back from disk, and scored in bits per byte by
evaluators that each say whether they are causal.

  torchrun --standalone --nproc_per_node=8 train_gpt.py     the record run: the defaults are #1084's run command
  torchrun --standalone --nproc_per_node=1 train_gpt.py     the same on one GPU, with gradient accumulation
  PRESET=demo python train_gpt.py                           a small run for a CPU (make demo builds its data)
  LOAD_ARTIFACT=logs/ID/final_model.int6.ptz ...            no training: evaluate an artifact
  python train_gpt.py --help                                every setting with default, bounds and a sentence

Settings are environment variables. "The lineage" is the published scripts of pull requests #549, #1084 and #1313. Shapes: B
batch, T sequence, D model dim, V vocabulary, L layers, H query heads, K key/value heads, R scored rows, N targets, W ranks.
"""
import dataclasses
import difflib
import functools
import hashlib
import json
import lzma
import math
import os
import re
import struct
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

# ------------------------------------------------------------------------------------------------------------- settings
# One table is parser, bounds check and help text, so that they cannot disagree: name, kind, default, bounds, sentence.
# It stands before torch is imported because --help must not wait for that.


class BadInput(Exception):
    """A setting or file that cannot be used; found before work starts. Exit status 2."""


class Fault(Exception):
    """Something that went wrong on the way, such as a loss that is not finite. Exit status 1."""


EVALS = ("roundtrip", "sliding_window", "ttt", "ttt_slot", "slot")
Setting = namedtuple("Setting", "name kind default low high text")
SETTINGS = [Setting(*line.split(None, 5)) for line in """\
PRESET pr1084|demo pr1084 - - A set of defaults: #1084's run command, or a small run for a CPU.
RUN_ID str - - - Name of the run: logs/RUN_ID.txt and logs/RUN_ID/, which must be new. Empty: date, time and seed.
SEED int 1337 0 2147483647 Seed of the initial weights and of the data order.
DEVICE auto|cpu|cuda auto - - auto takes a GPU if there is one. fp32 on a CPU, bf16 on a GPU.
COMPILE auto|0|1 auto - - torch.compile the trunk; auto: on a GPU only.
ATTENTION auto|fa3|fa4|sdpa auto - - FlashAttention-3, -4 or torch's SDPA; auto takes the first that is installed.
LOAD_ARTIFACT str - - - Do not train, evaluate this artifact: ours or the lineage's final_model.int6.ptz.
EVALS evals auto - - Comma list of evaluators; auto: roundtrip, sliding_window and what TTT_ENABLED, SLOT_ENABLED ask for; or none.
SAVE_NLL bool 0 - - Write logs/RUN_ID/nll_<evaluator>.npy: float64 nats of every target in stream order.
DATA_PATH str ./data/datasets/fineweb10B_sp1024 - - Folder of fineweb_train_*.bin and fineweb_val_*.bin.
TOKENIZER_PATH str ./data/tokenizers/fineweb_1024_bpe.model - - SentencePiece model of these shards.
TRAIN_BATCH_TOKENS int 786432 1 2e9 Tokens of a training step over all ranks.
VAL_BATCH_SIZE int 524288 1 2e9 Tokens of an evaluation forward over all ranks.
VAL_LOSS_EVERY int 4000 0 1e9 Steps between validations in training; 0: only at the end.
TRAIN_LOG_EVERY int 500 1 1e9 Steps between training lines; the first ten are always logged.
ITERATIONS int 9000 1 1e9 Training steps, unless MAX_WALLCLOCK_SECONDS ends first.
MAX_WALLCLOCK_SECONDS float 600 0 1e9 Cap on training time; 0: none.
WARMUP_STEPS int 20 0 1e6 Steps that prime torch.compile and leave no trace; without COMPILE there is nothing to prime.
WARMDOWN_ITERS int 3500 0 1e9 Steps, or their measured time, over which the rate falls to 0 at the end.
TRAIN_SEQ_LEN int 2048 2 1e6 Tokens of a training sequence.
VOCAB_SIZE int 1024 2 65536 Size of the vocabulary; must be the tokenizer's.
NUM_LAYERS int 11 1 1000 Transformer blocks.
MODEL_DIM int 512 2 65536 Width of the residual stream.
NUM_HEADS int 8 1 1024 Query heads.
NUM_KV_HEADS int 4 1 1024 Key/value heads (grouped-query attention); must divide NUM_HEADS.
MLP_MULT float 3 0.01 64 MLP width over MODEL_DIM.
TIE_EMBEDDINGS bool 1 - - The token embedding is the output head too.
LOGIT_SOFTCAP float 30 0.01 1e6 Logits are cap * tanh(z / cap).
ROPE_BASE float 10000 1 1e12 Base of the rotary position embedding (RoPE).
ROPE_DIMS int 16 0 65536 Rotated dimensions of a head; 0: all.
ROPE_TRAIN_LEN int 1024 1 1e6 A longer TRAIN_SEQ_LEN rescales ROPE_BASE, for training and evaluation alike.
LN_SCALE bool 1 - - Scale the inputs of block i's attention and MLP by 1/sqrt(i+1).
XSA_LAST_N int 4 0 1000 Last layers with exclusive self attention (XSA).
BIGRAM_VOCAB_SIZE int 1536 0 16777216 Buckets of the bigram hash embedding; 0: none.
BIGRAM_DIM int 128 1 65536 Width of its table.
VE_ENABLED bool 1 - - Value embedding (VE): a table of the token added to the values of VE_LAYERS.
VE_DIM int 128 1 65536 Width of that table.
VE_LAYERS ints 9,10 0 999 Layers, from 0, that get it.
TIED_EMBED_INIT_STD float 0.005 0 10 Standard deviation of a tied embedding's initial values.
QK_GAIN_INIT float 1.5 0 100 Initial gain of each normalised query head.
MATRIX_LR float 0.025 0 100 Muon's rate, for attention and MLP matrices.
TIED_EMBED_LR float 0.035 0 100 AdamW's rate for embeddings if the head is tied.
EMBED_LR float 0.6 0 100 AdamW's rate for embeddings if it is not.
HEAD_LR float 0.008 0 100 AdamW's rate for an untied head.
SCALAR_LR float 0.025 0 100 AdamW's rate for scalars, vectors and the two small projections.
MUON_MOMENTUM float 0.99 0 0.99999 Muon's Nesterov momentum.
MUON_MOMENTUM_WARMUP_START float 0.92 0 0.99999 Its value at the first step.
MUON_MOMENTUM_WARMUP_STEPS int 1500 0 1e9 Steps from there to MUON_MOMENTUM.
MUON_BACKEND_STEPS int 5 1 100 Newton-Schulz steps.
MUON_WD float 0.04 0 100 Muon's decoupled weight decay.
ADAM_WD float 0.04 0 100 AdamW's weight decay.
BETA1 float 0.9 0 0.99999 AdamW's beta 1.
BETA2 float 0.95 0 0.99999 AdamW's beta 2.
ADAM_EPS float 1e-8 1e-30 1 AdamW's epsilon.
GRAD_CLIP_NORM float 0.3 0 1e9 Clip by the norm of the reduced gradient; 0: no clipping.
EMA_ENABLED bool 1 - - Exponential moving average of the weights, a candidate for the export.
EMA_DECAY float 0.997 0 0.999999 Its decay; after n steps min(EMA_DECAY, (1+n)/(10+n)).
SWA_ENABLED bool 1 - - Mean of snapshots while the rate scale is under 0.2, a candidate too.
SWA_EVERY int 50 1 1e9 Steps between snapshots.
LATE_QAT bool 1 - - Train through the export's int6 grid (straight-through) while the rate scale is low.
LATE_QAT_THRESHOLD float 0.15 0 1 Rate scale under which it does.
ARTIFACT_BYTES int 16000000 1000 1e12 Cap on artifact plus code; the int6 step is widened until both fit.
EVAL_SEQ_LEN int 2048 2 1e6 Tokens of an evaluation window.
EVAL_STRIDE int 64 1 1e6 Targets that each sliding window but the first adds.
TTT_ENABLED bool 1 - - Score-first test-time training (TTT).
TTT_LR float 0.002 0 100 SGD rate on the first chunk, cosine to 0 on the last.
TTT_EPOCHS int 3 0 1000 Passes over a chunk that has been scored.
TTT_CHUNK_TOKENS int 32768 1 2e9 Targets of a chunk.
TTT_FREEZE_BLOCKS int 0 0 1000 First blocks whose parameters, matrices included, stay as they are.
TTT_MOMENTUM float 0.9 0 0.99999 SGD momentum.
TTT_BATCH_SEQS int 32 1 1e6 Sequences of a step over all ranks.
TTT_GRAD_CLIP float 1 0 1e9 Clip of the gradient norm; 0: no clipping.
SLOT_ENABLED bool 1 - - SLOT: inside TTT's scoring with TTT_ENABLED=1, else on sliding windows.
SLOT_LR float 0.001 0 100 AdamW's rate for the delta.
SLOT_STEPS int 3 1 1000 AdamW steps of the delta.
SLOT_BATCH_SEQS int 32 1 1e6 Consecutive windows that share a delta.
CTW_WEIGHT float 0 0 0 Context tree weighting; not in this version, so only 0.
""".splitlines()]
PRESETS = {"pr1084": {}, "demo": dict(word.split("=") for word in """\
DATA_PATH=./data/datasets/demo_sp1024 TOKENIZER_PATH=./data/tokenizers/demo_1024_bpe.model EVALS=roundtrip,sliding_window,ttt,ttt_slot
NUM_LAYERS=4 MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2 VE_LAYERS=2,3 VE_DIM=32 XSA_LAST_N=2 BIGRAM_VOCAB_SIZE=4096 BIGRAM_DIM=32
TRAIN_SEQ_LEN=256 EVAL_SEQ_LEN=256 TRAIN_BATCH_TOKENS=4096 VAL_BATCH_SIZE=8192 ITERATIONS=400 WARMDOWN_ITERS=160
MAX_WALLCLOCK_SECONDS=150 VAL_LOSS_EVERY=200 TRAIN_LOG_EVERY=5 MUON_MOMENTUM=0.95 MUON_MOMENTUM_WARMUP_STEPS=100 MATRIX_LR=0.04
SWA_EVERY=5 TTT_CHUNK_TOKENS=8192 TTT_LR=0.006""".split())}
NAMES = [s.name for s in SETTINGS]
MODEL_SETTINGS = NAMES[NAMES.index("TRAIN_SEQ_LEN"):NAMES.index("VE_LAYERS") + 1]  # shape and arithmetic: an artifact carries them
# An unknown variable that begins like this is a misspelt setting, or one of the lineage's that this version does not have.
FAMILIES = re.compile("(TTT|SLOT|CTW|MUON|ADAM|EMA|SWA|VE|XSA|BIGRAM|ROPE|QAT|LATE_QAT|TIED|WARMDOWN|RECUR|VRL|VALUE_RESIDUAL|"
                      "GATED_ATTENTION|PREQUANT|MTP|DTG|LAWA)(_|$)")
Config = dataclasses.make_dataclass("Config", [*map(str.lower, NAMES), "explicit"], frozen=True)


def parse_setting(s, text):
    """Value of setting s from its text, "-" for empty. Raises ValueError that says what is allowed."""
    if s.kind == "str":
        return "" if text == "-" else text
    choices = "0|1|false|true" if s.kind == "bool" else s.kind
    if "|" in choices:
        if text.lower() not in choices.split("|"):
            raise ValueError("allowed: " + choices.replace("|", ", "))
        return text.lower() in ("1", "true") if s.kind == "bool" else text.lower()
    words = [w for w in text.split(",") if w] if s.kind in ("ints", "evals") else [text]
    if s.kind == "evals":
        if set(words) - set(EVALS) and words not in (["auto"], ["none"]):
            raise ValueError("allowed: auto, none, or a comma list of " + ", ".join(EVALS))
        return tuple(dict.fromkeys(words))
    try:
        values = tuple(map(float if s.kind == "float" else int, words))
    except ValueError:
        values = (math.nan,)
    if not all(float(s.low) <= v <= float(s.high) for v in values):  # nan fails too
        what = {"ints": "comma list of integers", "int": "integer", "float": "number"}[s.kind]
        raise ValueError(f"allowed: {what}, {s.low} to {s.high}")
    return values if s.kind == "ints" else values[0]


def load_config(env):
    """Config from a mapping of environment variables. Raises BadInput with every problem at once, a line each."""
    values, problems = {}, []
    for name in sorted(set(env) - set(NAMES)):
        near = difflib.get_close_matches(name, NAMES, 1, 0 if FAMILIES.match(name) else 0.85)
        if near:
            problems.append(f"{name}={env[name]}: there is no such setting. Nearest name: {near[0]}. Correct it or unset it.")
    preset = PRESETS.get(env.get("PRESET"), {})
    for s in SETTINGS:
        text = str(env.get(s.name, preset.get(s.name, s.default))).strip()
        try:
            values[s.name.lower()] = parse_setting(s, text)
        except ValueError as why:
            problems.append(f"{s.name}={text}: {why}. {s.text}")
            values[s.name.lower()] = parse_setting(s, s.default)
    c = Config(**values, explicit=frozenset(n for n in values if n.upper() in env))
    last = "_".join(["ttt"] * c.ttt_enabled + ["slot"] * c.slot_enabled)
    auto = ("roundtrip", "sliding_window") + ((last,) if last else ())
    c = dataclasses.replace(c, evals={("auto",): auto, ("none",): ()}.get(c.evals, c.evals))
    problems += cross_check(c)
    if problems:
        raise BadInput("\n".join(problems))
    return c


def cross_check(c):
    """Problems between settings that are each valid alone, one line each."""
    head_dim, window, evals = c.model_dim // c.num_heads, c.eval_seq_len, ",".join(c.evals)
    rules = (
        (c.model_dim % c.num_heads, f"MODEL_DIM={c.model_dim}: must be a multiple of NUM_HEADS={c.num_heads}"),
        (c.num_heads % c.num_kv_heads, f"NUM_KV_HEADS={c.num_kv_heads}: must divide NUM_HEADS={c.num_heads}"),
        ((c.rope_dims or head_dim) > head_dim or (c.rope_dims or head_dim) % 2,
         f"ROPE_DIMS={c.rope_dims}: must be even and at most the head dim {head_dim}, or 0 with an even head dim"),
        (c.xsa_last_n > c.num_layers, f"XSA_LAST_N={c.xsa_last_n}: at most NUM_LAYERS={c.num_layers}"),
        (c.ve_enabled and (not c.ve_layers or max(c.ve_layers) >= c.num_layers or len(set(c.ve_layers)) < len(c.ve_layers)),
         f"VE_LAYERS={','.join(map(str, c.ve_layers))}: different layers from 0 to {c.num_layers - 1}, or VE_ENABLED=0"),
        (c.bigram_vocab_size == 1, "BIGRAM_VOCAB_SIZE=1: must be 0 or at least 2"),
        (c.train_batch_tokens % c.train_seq_len, f"TRAIN_BATCH_TOKENS={c.train_batch_tokens}: must be a multiple of "
         f"TRAIN_SEQ_LEN={c.train_seq_len}"),
        (c.val_batch_size < window, f"VAL_BATCH_SIZE={c.val_batch_size}: must hold one sequence, EVAL_SEQ_LEN={window} tokens"),
        (c.eval_stride > window, f"EVAL_STRIDE={c.eval_stride}: at most EVAL_SEQ_LEN={window}, or targets are skipped"),
        (c.ttt_enabled and c.ttt_chunk_tokens < window, f"TTT_CHUNK_TOKENS={c.ttt_chunk_tokens}: must hold one sequence, "
         f"EVAL_SEQ_LEN={window} tokens"),
        (c.ttt_freeze_blocks > c.num_layers, f"TTT_FREEZE_BLOCKS={c.ttt_freeze_blocks}: at most NUM_LAYERS={c.num_layers}"),
        (not c.ttt_enabled and "ttt" in evals, f"EVALS={evals}: TTT_ENABLED=0 leaves out ttt and ttt_slot; change either"),
        (not c.slot_enabled and "slot" in evals, f"EVALS={evals}: SLOT_ENABLED=0 leaves out slot and ttt_slot; change either"),
        (c.run_id and not re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_.-]*", c.run_id), f"RUN_ID={c.run_id}: only letters, digits and . _ -, since "
         "files are named by it"),
    )
    return [f"{text}." for wrong, text in rules if wrong]


def help_text():
    """The --help page."""
    lines = [__doc__, "Settings: NAME=default (kind, lowest to highest)"]
    for s in SETTINGS:
        bounds = f", {s.low} to {s.high}" if s.low != "-" else ""
        lines += [f"  {s.name}={'' if s.default == '-' else s.default} ({s.kind}{bounds})", f"      {s.text}"]
    demo = " ".join(f"{name}={value}" for name, value in PRESETS["demo"].items())
    return "\n".join([*lines, "Evaluators: " + ", ".join(EVALS), "PRESET=demo sets, unless you do: " + demo])


if __name__ == "__main__" and {"--help", "-h"} & set(sys.argv[1:]):
    print(help_text())
    sys.exit(0)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

# ------------------------------------------------------------------------------------------------------- ranks and log
# Only rank 0 writes. A result is one call of metric(), which puts the same figures on the console, in logs/RUN_ID.txt and,
# unrounded, in logs/RUN_ID/metrics.jsonl; a label with the same figures twice is an error.

FORMATS = {"train_time": "{:.0f}ms", "eval_time": "{:.0f}ms", "step_avg": "{:.2f}ms", "seconds": "{:.1f}"}


class Run:
    """What a run is bound to: rank of world ranks, device, compute dtype, folder, log."""

    def __init__(self, c):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local, neighbours = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.cuda = c.device != "cpu" and torch.cuda.is_available()
        if c.device == "cuda" and not self.cuda:
            raise BadInput("DEVICE=cuda: torch sees no GPU here; allowed: cpu or auto, or install a CUDA build of torch.")
        self.device = torch.device("cuda", local) if self.cuda else torch.device("cpu")
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.compile = c.compile == "1" or c.compile == "auto" and self.cuda
        self.labels, self.files, self.name = set(), [], c.run_id or time.strftime("%Y%m%d_%H%M%S") + f"_seed{c.seed}"
        self.folder = Path("logs") / self.name
        if self.cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        elif neighbours > 1:  # torchrun gives each process one thread; share the cores out instead
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // neighbours))

    def start(self, c):
        """Open the log of this RUN_ID, which must be new, with the script's source, settings and versions on top."""
        if self.rank:
            return
        path = self.folder.with_name(self.name + ".txt")
        if path.exists() or self.folder.exists():
            raise BadInput(f"RUN_ID={self.name}: {path} or {self.folder} exists and is not overwritten; choose another RUN_ID.")
        try:
            self.folder.mkdir(parents=True)
            self.files = [open(path, "x", buffering=1), open(self.folder / "metrics.jsonl", "x", buffering=1)]
        except OSError as why:
            raise BadInput(f"RUN_ID={self.name}: cannot write {path}: {why}; run where logs/ can be made.") from None
        settings = {name: getattr(c, name.lower()) for name in NAMES}
        words = " ".join(f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in settings.items())
        self.files[0].write(f"{Path(__file__).read_text()}\n{'=' * 100}\nsettings: {words}\n")
        self.files[1].write(json.dumps({"label": "settings", **settings}) + "\n")
        where = torch.cuda.get_device_name() if self.cuda else f"cpu threads:{torch.get_num_threads()}"
        self.log(f"log:{path}\npython:{sys.version.split()[0]} torch:{torch.__version__} numpy:{np.__version__} device:{where} "
                 f"dtype:{self.dtype} world_size:{self.world} compile:{int(self.compile)}")

    def log(self, text):
        """Print and log a line on rank 0."""
        if self.rank == 0:
            print(text, flush=True)
            for file in self.files[:1]:
                file.write(text + "\n")

    def metric(self, label, digits=8, **fields):
        """One labelled line of figures: losses and bpb with that many digits, times in ms, booleans as yes or no."""
        if (label, *fields) in self.labels:
            raise Fault(f"label {label} logged twice")
        self.labels.add((label, *fields))
        words = [label]
        for key, value in fields.items():
            style = FORMATS.get(key, f"{{:.{digits}f}}" if isinstance(value, float) else "{}")
            words.append(f"{key}:" + (("no", "yes")[value] if isinstance(value, bool) else style.format(value)))
        self.log(" ".join(words))
        for file in self.files[1:]:
            file.write(json.dumps({"label": label, **fields}) + "\n")

    def synchronize(self):
        """Wait for the GPU, so that a clock read next tells the truth."""
        if self.cuda:
            torch.cuda.synchronize()

    def sum(self, tensor):
        """Sum over ranks, in place; returns the tensor."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor


# ---------------------------------------------------------------------------------------------------- shards and loader
# A shard is 256 little-endian int32 (magic, version, number of tokens, zeros) and then uint16 tokens. All headers and
# sizes are checked before the first step: a truncated shard found after nine minutes is nine minutes lost.

SHARD_MAGIC, SHARD_VERSION = 20240520, 1
SCAN_LIMIT = 2**29  # bytes of a split up to which every token id is looked at before the start


def open_shard(path, vocab_size, scan):
    """Tokens [n] uint16 of a shard file, a read-only memory map; with scan, ids are checked too. Raises BadInput."""
    size, header = path.stat().st_size, np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise BadInput(f"{path}: {size} bytes, header starts {header[:2].tolist()}; a shard has a header of 1024 bytes that starts with "
                       f"magic {SHARD_MAGIC}, version {SHARD_VERSION}. Make it with data/prepare.py.")
    n = int(header[2])
    if n < 1 or size != 1024 + 2 * n:
        raise BadInput(f"{path}: its header says {n} tokens, the file has {size} bytes; a shard has at least one token and 1024 + 2 "
                       "bytes a token. Fetch or make it again.")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024, shape=(n,))
    if scan:
        check_ids(tokens, path, vocab_size)
    return tokens


def check_ids(tokens, where, vocab_size):
    """Raises BadInput if a token id is not in the vocabulary; a GPU would only say device-side assert."""
    if int(tokens.max()) >= vocab_size:
        at = int(np.argmax(tokens.ravel() >= vocab_size))
        raise BadInput(f"{where}: token id {int(tokens.ravel()[at])} at position {at}; VOCAB_SIZE={vocab_size} allows 0 to {vocab_size - 1}. "
                       "Use the vocabulary and tokenizer that the shards were made with.")


def open_split(c, split):
    """Memory maps of all shards of a split in order of name, checked."""
    paths = sorted(Path(c.data_path).glob(f"fineweb_{split}_*.bin"))
    if not paths:
        raise BadInput(f"DATA_PATH={c.data_path}: no fineweb_{split}_*.bin there; run make fineweb (or make demo) or set DATA_PATH.")
    scan = split == "val" or sum(p.stat().st_size for p in paths) <= SCAN_LIMIT
    return [open_shard(p, c.vocab_size, scan) for p in paths]


@functools.lru_cache(maxsize=8)
def permutation(seed, epoch, part, n):
    """A random order [n] of part 0 (the shards) or 1 + shard (its sequences) in an epoch."""
    return np.random.default_rng((seed, epoch, part)).permutation(n)


class TrainData:
    """Training sequences in an order that SEED alone fixes, whatever the number of ranks.

    An epoch visits the shards in a new order and the sequences of a shard, cut at a new place, in a new order. Sequence i
    of the run is a function of (SEED, i), so a position in the data is one integer. Up to 1 % of the tokens, the last of
    the longest shard, is held out to compare averages. Raises BadInput if there is too little text.
    """

    def __init__(self, c, run):
        self.c, self.run, self.T, self.shards = c, run, c.train_seq_len, open_split(c, "train")
        total, long, self.pool = sum(map(len, self.shards)), int(np.argmax([len(s) for s in self.shards])), ThreadPoolExecutor(1)
        keep = max(1, min(total // 100, 262144) // self.T) * self.T + 1
        self.held_out, self.shards[long] = np.array(self.shards[long][-keep:]), self.shards[long][:-keep]
        self.counts = [max(0, (len(s) - 1) // self.T - 1) for s in self.shards]  # one less: room for the cut to move
        if not sum(self.counts) or len(self.held_out) < keep:
            raise BadInput(f"DATA_PATH={c.data_path}: {total} training tokens in all, too few for TRAIN_SEQ_LEN={self.T}; give at least "
                           f"{5 * self.T} or shorten the sequence.")

    def sequence(self, i):
        """Tokens [T+1] of sequence i of the run."""
        epoch, i = divmod(i, sum(self.counts))
        for shard in permutation(self.c.seed, epoch, 0, len(self.shards)).tolist():
            if i < self.counts[shard]:
                break
            i -= self.counts[shard]
        order = permutation(self.c.seed, epoch, 1 + shard, self.counts[shard])
        start = int(order[0]) % self.T + int(order[i]) * self.T
        return self.shards[shard][start:start + self.T + 1]

    def load(self, step):
        """This rank's tokens of a step, [sequences, T+1] int64, in pinned memory if there is a GPU."""
        count = self.c.train_batch_tokens // self.T
        mine = count // self.run.world
        first = step * count + self.run.rank * mine
        rows = np.stack([self.sequence(i) for i in range(first, first + mine)]).astype(np.int64)
        check_ids(rows, f"DATA_PATH={self.c.data_path}, step {step}", self.c.vocab_size)
        rows = torch.from_numpy(rows)
        return rows.pin_memory() if self.run.cuda else rows

    def batches(self, step=0):
        """Endless (inputs, targets), each [sequences, T], on the device; a thread reads one step ahead."""
        ahead = self.pool.submit(self.load, step)
        while True:
            rows, step = ahead.result().to(self.run.device, non_blocking=True), step + 1
            ahead = self.pool.submit(self.load, step)
            yield rows[:, :-1], rows[:, 1:]


# ---------------------------------------------------------------------------------------------------------- byte counts
# The only place where bytes are counted.


class ByteCounts:
    """UTF-8 bytes that a target token stands for under a SentencePiece model, by the challenge's rule; tables are [V].

    A piece counts its bytes without the leading space, which counts 1 unless the token before is a boundary (control,
    unknown, unused). A byte token counts 1, a boundary 0. Raises BadInput if the model is missing or does not fit.
    """

    def __init__(self, path, vocab_size):
        import sentencepiece
        where, path, sp = f"TOKENIZER_PATH={path}", Path(path), sentencepiece.SentencePieceProcessor()
        if not path.is_file():
            raise BadInput(f"{where}: no such file; run make fineweb (or make demo) or set TOKENIZER_PATH.")
        if path.name == "fineweb_1024_bpe.model" and path.stat().st_size == 253847:
            raise BadInput(f"{where}: 253,847 bytes is another model that goes by this name and decodes the official shards to garbage; the "
                           "official one has 254,483. Fetch it with make fineweb.")
        try:
            sp.Load(str(path))
        except (RuntimeError, OSError) as why:
            raise BadInput(f"{where}: not a SentencePiece model ({str(why)[:80]}); give the one the shards were made with.") from None
        if sp.vocab_size() != vocab_size:
            raise BadInput(f"{where}: has {sp.vocab_size()} pieces, VOCAB_SIZE={vocab_size}; they must be equal.")
        self.boundary, self.space, self.size = (np.zeros(vocab_size, t) for t in (bool, bool, np.uint8))
        for i in range(vocab_size):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                self.boundary[i] = True
                continue
            piece = sp.id_to_piece(i).replace("\u2581", " ")
            self.space[i] = piece.startswith(" ")
            self.size[i] = 1 if sp.is_byte(i) else len(piece.encode()) - self.space[i]

    def count(self, previous, targets):
        """Bytes [n] uint8 of target ids [n] that follow previous ids [n]."""
        return self.size[targets] + (self.space[targets] & ~self.boundary[previous])


class ValData:
    """The validation stream: tokens [N+1] on the device, bytes [N] of its targets. Raises BadInput if too short.

    N is the largest multiple of EVAL_SEQ_LEN there is, the challenge's own rule (62,021,632 for FineWeb's split).
    """

    def __init__(self, c, run):
        tokens = np.concatenate(open_split(c, "val"))
        self.n = (len(tokens) - 1) // c.eval_seq_len * c.eval_seq_len
        self.dropped, tokens = len(tokens) - 1 - self.n, tokens[:self.n + 1]
        self.bytes = ByteCounts(c.tokenizer_path, c.vocab_size).count(tokens[:-1], tokens[1:])
        self.total_bytes = int(self.bytes.sum(dtype=np.int64))
        if not self.total_bytes:
            raise BadInput(f"DATA_PATH={c.data_path}: the validation split, {len(tokens) + self.dropped} tokens, has no text for one window of "
                           f"EVAL_SEQ_LEN={c.eval_seq_len} (which takes {c.eval_seq_len + 1}); use more text or a shorter window.")
        self.tokens = torch.from_numpy(tokens.astype(np.int64)).to(run.device)


# ---------------------------------------------------------------------------------------------------------------- model
# One trunk, hidden(), for every use. Parameters are fp32 and cast where they are used: no optimiser works on bf16 weights.

# A bank holds one kind of matrix of all layers, so that Muon orthogonalises them in one batch and a reduce-scatter over the
# first axis shares the work out: bank -> the matrices of a layer in it; first one of them for all layers, then the next.
BANKS = {"qo_bank": ("attn.c_q", "attn.proj"), "kv_bank": ("attn.c_k", "attn.c_v"), "mlp_up_bank": ("mlp.fc",),
         "mlp_down_bank": ("mlp.proj",)}
# name pattern -> init rule, optimiser group, export format. Every tensor (of a bank: every matrix) fits exactly one row.
PARAMETERS = [(re.compile(p), *rest) for p, *rest in (
    (r"tok_emb\.weight", "embedding", "embed", "int8"),
    (r"lm_head\.weight", "fill 0", "head", "int8"),
    (r"bigram\.embed\.weight", "fill 0", "embed", "int8"),
    (r"ve_shared\.embed\.weight", "normal 0.01", "embed", "int8"),
    (r"(bigram|ve_shared)\.proj\.weight", "orthogonal", "scalar", "fp16"),
    (r"bigram\.scale", "fill 0.05", "scalar", "fp32"),
    (r"ve_shared\.scale", "fill 0.1", "scalar", "fp32"),
    (r"ve_layer_scales\.\d+|skip_weights|blocks\.\d+\.(attn|mlp)_scale", "fill 1", "scalar", "fp32"),
    (r"smear\.gate", "fill 0", "scalar", "fp32"),
    (r"blocks\.\d+\.resid_mix", "stream", "scalar", "fp32"),
    (r"blocks\.\d+\.attn\.q_gain", "q_gain", "scalar", "fp32"),
    (r"blocks\.\d+\.(attn\.c_[qkv]|mlp\.fc)\.weight", "orthogonal", "muon", "int6"),
    (r"blocks\.\d+\.(attn|mlp)\.proj\.weight", "fill 0", "muon", "int6"),
)]


def parameter_rule(name):
    """(init, optimiser group, export format) of a tensor. Raises Fault unless exactly one row of PARAMETERS fits."""
    rows = [row[1:] for row in PARAMETERS if row[0].fullmatch(name)]
    if len(rows) != 1:
        raise Fault(f"parameter {name} fits {len(rows)} rows of PARAMETERS, not one")
    return rows[0]


def matrix_names(name, num_layers):
    """Names of the matrices in a bank, in order along its first axis; of any other tensor, its own name."""
    return [f"blocks.{i}.{part}.weight" for part in BANKS[name] for i in range(num_layers)] if name in BANKS else [name]


def split_banks(state, num_layers):
    """State dict with every bank replaced by its matrices (views)."""
    return {n: t for name, whole in state.items()
            for n, t in zip(matrix_names(name, num_layers), whole if name in BANKS else [whole])}


def choose_attention(wanted, device):
    """(name, function of q [B,T,H,d] and k, v [B,T,K,d] -> [B,T,H,d], causal). Raises BadInput if wanted is not there."""
    def sdpa(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)

    for name, module in (("fa3", "flash_attn_interface"), ("fa4", "flash_attn.cute")):
        if wanted not in (name, "auto") or wanted == "auto" and device.type == "cpu":
            continue
        try:
            if device.type == "cpu":
                raise ImportError("it needs a GPU")
            function = __import__(module, fromlist=["flash_attn_func"]).flash_attn_func
        except (ImportError, AttributeError) as why:
            if wanted == name:
                raise BadInput(f"ATTENTION={name}: cannot use {module}: {why}; allowed here: auto or sdpa.") from None
            continue

        def flash(q, k, v):
            out = function(q, k, v, causal=True)
            return out[0] if isinstance(out, tuple) else out  # some versions return the log-sum-exp as well
        return name, flash
    return "sdpa", sdpa


def rms_norm(x):
    """x over its root mean square along the last axis."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    """Rotary position embedding of the first 2r dimensions of x [B,T,heads,d]; cos, sin [T,1,r]."""
    r = cos.size(-1)
    a, b = x[..., :r], x[..., r:2 * r]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, x[..., 2 * r:]), -1)


class LowRankEmbedding(nn.Module):
    """Table [num,dim] -> linear to out (none if equal) -> learned scalar; the bigram and the value embedding."""

    def __init__(self, num, dim, out):
        super().__init__()
        self.embed = nn.Embedding(num, dim)
        self.proj = nn.Linear(dim, out, bias=False) if dim != out else None
        self.scale = nn.Parameter(torch.empty(()))

    def forward(self, ids, dtype):
        """[B,T] ids -> [B,T,out]."""
        x = self.embed(ids).to(dtype)
        return (x if self.proj is None else F.linear(x, self.proj.weight.to(dtype))) * self.scale.to(dtype)


class Block(nn.Module):
    """A layer: its parameters that are not matrices, and its arithmetic."""

    def __init__(self, c, index):
        super().__init__()
        self.attn = nn.Module()
        self.attn.q_gain = nn.Parameter(torch.empty(c.num_heads))
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.empty(c.model_dim)) for _ in range(2))
        self.resid_mix = nn.Parameter(torch.empty(2, c.model_dim))
        self.heads, self.kv_heads, self.exclusive = c.num_heads, c.num_kv_heads, index >= c.num_layers - c.xsa_last_n
        self.norm_scale = 1 / math.sqrt(index + 1) if c.ln_scale else 1.0

    def forward(self, x, x0, weights, value_extra, rope, attention):
        """x and the embedded input x0 [B,T,D] -> [B,T,D]; weights: q, o, k, v, up, down in the compute dtype."""
        w_q, w_o, w_k, w_v, w_up, w_down = weights
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        a = self.attend(rms_norm(x) * self.norm_scale, w_q, w_k, w_v, value_extra, rope, attention)
        x = x + self.attn_scale.to(x.dtype) * F.linear(a, w_o)
        h = F.leaky_relu(F.linear(rms_norm(x) * self.norm_scale, w_up), 0.5).square()
        return x + self.mlp_scale.to(x.dtype) * F.linear(h, w_down)

    def attend(self, x, w_q, w_k, w_v, value_extra, rope, attention):
        """Causal grouped-query attention of x [B,T,D] with QK-norm, partial RoPE and, in the last layers, XSA."""
        B, T, _ = x.shape
        q, k = F.linear(x, w_q).view(B, T, self.heads, -1), F.linear(x, w_k).view(B, T, self.kv_heads, -1)
        v = F.linear(x, w_v)
        v = (v if value_extra is None else v + value_extra).view(B, T, self.kv_heads, -1)
        q, k = rotate(rms_norm(q), *rope) * self.attn.q_gain.to(x.dtype)[:, None], rotate(rms_norm(k), *rope)
        y = attention(q, k, v)
        if self.exclusive:  # take out of y what points along the token's own value (#549)
            y, own = y.reshape(B, T, self.kv_heads, self.heads // self.kv_heads, -1), v.unsqueeze(3)
            y = y - (y * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True).clamp_min(1e-24) * own
        return y.reshape(B, T, -1)


class GPT(nn.Module):
    """The model of #549 and #1084; 26,928,220 parameters by default. attention: a function as of choose_attention."""

    def __init__(self, c, dtype=torch.float32, attention=None):
        super().__init__()
        L, D, kv, wide = c.num_layers, c.model_dim, c.model_dim // c.num_heads * c.num_kv_heads, int(c.model_dim * c.mlp_mult)
        self.c, self.dtype, self.attention = c, dtype, attention or choose_attention("sdpa", torch.device("cpu"))[1]
        self.tok_emb = nn.Embedding(c.vocab_size, D)
        self.lm_head = None if c.tie_embeddings else nn.Linear(D, c.vocab_size, bias=False)
        self.bigram = LowRankEmbedding(c.bigram_vocab_size, c.bigram_dim, D) if c.bigram_vocab_size else None
        self.smear = nn.Module()
        self.smear.gate = nn.Parameter(torch.empty(D))
        self.skip_weights = nn.Parameter(torch.empty(L // 2, D)) if L > 1 else None
        self.ve_shared = LowRankEmbedding(c.vocab_size, c.ve_dim, kv) if c.ve_enabled else None
        self.ve_layer_scales = nn.ParameterList(nn.Parameter(torch.empty(1)) for _ in c.ve_layers if c.ve_enabled)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(L))
        for bank, shape in zip(BANKS, ((2 * L, D, D), (2 * L, kv, D), (L, wide, D), (L, D, wide))):
            setattr(self, bank, nn.Parameter(torch.empty(shape)))
        rot, stretch = c.rope_dims or D // c.num_heads, max(1.0, c.train_seq_len / c.rope_train_len)
        base = c.rope_base * (stretch ** (rot / (rot - 2)) if rot > 2 else 1)
        positions = torch.arange(max(c.train_seq_len, c.eval_seq_len)).double()
        angles = torch.outer(positions, base ** (-torch.arange(0, rot, 2).double() / rot)).unsqueeze(1)  # [T,1,rot/2]
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Initial values, a function of SEED alone (made on the CPU), by the rows of PARAMETERS."""
        g = torch.Generator().manual_seed(self.c.seed)
        for name, p in split_banks(dict(self.named_parameters()), self.c.num_layers).items():
            rule, _, number = parameter_rule(name)[0].partition(" ")
            if rule in ("embedding", "normal"):
                tied = self.c.tied_embed_init_std if self.c.tie_embeddings else 1.0
                p.normal_(0, float(number or tied), generator=g)
            elif rule == "orthogonal":
                nn.init.orthogonal_(p, generator=g)
            elif rule == "stream":  # all of x, nothing of x0
                p[0], p[1] = 1, 0
            else:  # fill, q_gain
                p.fill_(float(number or self.c.qk_gain_init))

    def bigram_bucket(self, ids):
        """Hash bucket [B,T] of each (previous, current) pair of ids; position 0, without a previous one, takes the last."""
        last = self.c.bigram_vocab_size - 1
        return F.pad(torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1]) % last, (1, 0), value=last)

    def hidden(self, ids):
        """[B,T] ids -> final normalised hidden states [B,T,D]; position t sees positions up to t."""
        c, T, L = self.c, ids.size(1), self.c.num_layers
        x = self.tok_emb(ids).to(self.dtype)
        if self.bigram is not None:
            x = x + self.bigram(self.bigram_bucket(ids), self.dtype)
        x, gate = rms_norm(x), self.smear.gate.sigmoid().to(self.dtype)
        x = x0 = (1 - gate) * x + gate * F.pad(x, (0, 0, 1, -1))
        extra = self.ve_shared(ids, self.dtype) if self.ve_shared is not None else None
        # unbind, not indexing: its backward is one stack instead of a zero-filled bank for every matrix
        qo, kv, up, down = (getattr(self, bank).to(self.dtype).unbind() for bank in BANKS)
        rope, skips = (self.cos[:T], self.sin[:T]), []
        for i, block in enumerate(self.blocks):
            if i >= L // 2 and skips:
                x = x + self.skip_weights[i - L // 2].to(self.dtype) * skips.pop()
            scaled = None
            if extra is not None and i in c.ve_layers:
                scaled = extra * self.ve_layer_scales[c.ve_layers.index(i)].to(self.dtype)
            x = block(x, x0, (qo[i], qo[L + i], kv[i], kv[L + i], up[i], down[i]), scaled, rope, self.attention)
            if i < L // 2:
                skips.append(x)
        return rms_norm(x)

    def head_weight(self):
        """Output matrix [V,D], fp32."""
        return self.tok_emb.weight if self.lm_head is None else self.lm_head.weight

    def project(self, h):
        """Hidden states [...,D] -> logits before the cap [...,V], fp32."""
        return F.linear(h, self.head_weight().to(h.dtype)).float()

    def cap(self, z):
        """Soft cap on logits."""
        return self.c.logit_softcap * torch.tanh(z / self.c.logit_softcap)

    def forward(self, ids, targets, reduction="mean", trunk=None):
        """Cross entropy in nats of targets [B,T] (-100: not counted) under ids [B,T]; trunk instead of hidden, if given."""
        logits = self.cap(self.project((trunk or self.hidden)(ids)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


# ------------------------------------------------------------------------------------------------------------ optimiser
# Muon for the banks, AdamW for the rest, without DDP: each rank gets the mean gradient of its share of every bank
# (reduce-scatter), orthogonalises that share and hands the result out (all-gather). One code path serves 1 and W ranks.

REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
ALL_GATHER = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def newton_schulz(g, steps, dtype):
    """Nearly orthogonal matrices for g [n,rows,cols]: singular values about 1 (Muon, Jordan et al. 2024)."""
    tall = g.size(-2) > g.size(-1)
    x = (g.mT if tall else g).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def sum_over_ranks(run, tensors):
    """Sum each of the tensors over ranks, in place and in one message."""
    if run.world > 1:
        flat = run.sum(torch.cat([t.reshape(-1) for t in tensors]))
        torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)])


class Optimizer:
    """step() turns the gradients of all ranks into the same update of the same weights on each of them."""

    def __init__(self, c, run, model):
        self.c, self.run, groups = c, run, {"muon": [], "embed": [], "head": [], "scalar": []}
        for name, p in model.named_parameters():
            groups[parameter_rule(matrix_names(name, c.num_layers)[0])[1]].append(p)
        self.banks = sorted(groups.pop("muon"), key=lambda p: -p.numel())  # the largest reduction starts first
        rates = {"embed": c.tied_embed_lr if c.tie_embeddings else c.embed_lr, "head": c.head_lr, "scalar": c.scalar_lr}
        self.adam = torch.optim.AdamW([dict(params=ps, rate=rates[k]) for k, ps in groups.items() if ps], betas=(c.beta1, c.beta2),
                                      eps=c.adam_eps, weight_decay=c.adam_wd, fused=True)
        self.small = [p for group in self.adam.param_groups for p in group["params"]]
        self.shares = [-(-len(p) // run.world) for p in self.banks]  # matrices of each bank on a rank, the last ones padding
        self.momentum = [torch.zeros(n, *p.shape[1:], device=p.device) for n, p in zip(self.shares, self.banks)]

    def reduce(self, loss):
        """This rank's share of each bank's mean gradient; small gradients and the loss become means in place."""
        missing = [tuple(p.shape) for p in self.banks + self.small if p.grad is None]
        if missing:
            raise Fault(f"no gradient for parameters of shapes {missing}")
        if self.run.world == 1:
            return [p.grad for p in self.banks]
        W, pending = self.run.world, []
        for n, p in zip(self.shares, self.banks):
            padded = F.pad(p.grad, (0, 0, 0, 0, 0, n * W - len(p))) / W
            share = torch.empty_like(padded[:n])
            pending.append((share, REDUCE_SCATTER(share, padded, async_op=True), padded))
        means = [p.grad for p in self.small] + [loss]
        torch._foreach_div_(means, W)
        sum_over_ranks(self.run, means)
        for _, work, _ in pending:
            work.wait()
        return [share for share, _, _ in pending]

    @torch.no_grad()
    def step(self, loss, scale, momentum):
        """Norm of the reduced gradient, after one update with all rates times scale; loss becomes its mean in place."""
        c, shares, pending = self.c, self.reduce(loss), []
        small = [p.grad for p in self.small]
        # in fp64, so that the number of ranks does not show in its fp32 value
        squares = [torch.stack(torch._foreach_norm(g, 2, torch.float64)).square().sum() for g in (shares, small)]
        norm = (self.run.sum(squares[0]) + squares[1]).sqrt().float()
        if c.grad_clip_norm:
            torch._foreach_mul_(small + shares, (c.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0))
        for g, buffer in zip(shares, self.momentum):
            buffer.mul_(momentum).add_(g)
            g.add_(buffer, alpha=momentum)
            update, work = newton_schulz(g, c.muon_backend_steps, torch.bfloat16 if self.run.cuda else torch.float32), None
            if self.run.world > 1:
                whole = update.new_empty(len(update) * self.run.world, *update.shape[1:])
                work, update = ALL_GATHER(whole, update.contiguous(), async_op=True), whole
            pending.append((work, update))
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * scale
        self.adam.step()  # while the gathers run
        for p, (work, update) in zip(self.banks, pending):
            if work:
                work.wait()
            rate = scale * c.matrix_lr
            p.mul_(1 - rate * c.muon_wd).add_(update[:len(p)], alpha=-rate * math.sqrt(max(1, p.size(1) / p.size(2))))
        return norm


# ------------------------------------------------------------------------------------------------------------- averages
# An average that is collected is a candidate for the export, next to the last weights; the lowest loss on held-out training
# text decides. So none is collected in vain, and none is exported that is worse.


class Averages:
    """EMA and SWA of params, fp32, as lists in their order."""

    def __init__(self, c, params):
        self.c, self.params, self.steps, self.snapshots, self.swa = c, list(params), 0, 0, None
        self.ema = [p.detach().clone() for p in self.params] if c.ema_enabled else None

    @torch.no_grad()
    def update(self, scale):
        """Take in the weights after a step that was made at this rate scale."""
        self.steps += 1
        n, c = self.steps, self.c
        if self.ema:
            torch._foreach_lerp_(self.ema, self.params, 1 - min(c.ema_decay, (1 + n) / (10 + n)))
        if c.swa_enabled and scale < 0.2 and n % c.swa_every == 0:
            self.snapshots += 1
            self.swa = self.swa or [p.detach().clone() for p in self.params]
            torch._foreach_lerp_(self.swa, self.params, 1 / self.snapshots)

    @torch.no_grad()
    def choose(self, run, model, data):
        """Put the candidate with the lowest loss on the held-out training text into the model; log all of them."""
        tokens, losses = torch.from_numpy(data.held_out.astype(np.int64)).to(run.device), {}
        inputs, targets = (t.view(-1, data.T).split(8)[run.rank::run.world] for t in (tokens[:-1], tokens[1:]))
        found = {"raw": [p.detach().clone() for p in self.params], "ema": self.ema, "swa": self.swa}
        found = {name: weights for name, weights in found.items() if weights}
        for name, weights in found.items():
            torch._foreach_copy_(self.params, weights)
            total = torch.zeros((), device=run.device, dtype=torch.float64)
            for ids, goal in zip(inputs, targets):  # in the plain trunk: another shape must not compile on the clock
                total += model(ids, goal, "sum", functools.partial(GPT.hidden, model))
            losses[name] = run.sum(total).item() / (len(tokens) - 1)
            run.metric(f"average_{name}", heldout_train_loss=losses[name], tokens=len(tokens) - 1)
        best = min(losses, key=losses.get)
        torch._foreach_copy_(self.params, found[best])
        run.log(f"average: exporting {best}, the lowest loss on held-out training text; ema_steps:{self.steps if self.ema else 0} "
                f"swa_snapshots:{self.snapshots}")


# ------------------------------------------------------------------------------------------------- schedules and clock


def lr_scale(c, step, elapsed_ms, step_ms):
    """Factor on all rates: 1, then linearly to 0 over WARMDOWN_ITERS steps before whichever end, steps or time, is nearer."""
    scale = min(1.0, (c.iterations - step) / max(c.warmdown_iters, 1))
    if c.max_wallclock_seconds and step_ms and c.warmdown_iters:
        scale = min(scale, max(0.0, 1000 * c.max_wallclock_seconds - elapsed_ms) / (c.warmdown_iters * step_ms))
    return scale


def muon_momentum(c, step):
    """Muon's momentum at a step: linear from its start value."""
    return c.muon_momentum + (c.muon_momentum_warmup_start - c.muon_momentum) * max(0.0, 1 - step / max(c.muon_momentum_warmup_steps, 1))


def ttt_lr(c, chunk, chunks):
    """TTT's rate on a chunk: cosine from TTT_LR on the first to 0 on the last."""
    return c.ttt_lr * 0.5 * (1 + math.cos(math.pi * chunk / max(chunks - 1, 1)))


class Clock:
    """Training time, the same on all ranks, since rates and the end hang on it: rank 0's is sent round every eighth step
    (every step while they are few or slow or cap_ms, 0 for none, is near) and extrapolated in between."""

    def __init__(self, run, cap_ms):
        run.synchronize()
        self.run, self.cap_ms, self.began, self.base, self.step_ms = run, cap_ms, time.perf_counter(), (0, 0.0), 0.0

    def now(self):
        """This rank's training time in ms."""
        self.run.synchronize()
        return 1000 * (time.perf_counter() - self.began)

    def agreed(self, step):
        """(training time in ms before this step, whether it was just read), the same on all ranks."""
        guess = self.base[1] + (step - self.base[0]) * self.step_ms
        fresh = step < 10 or step % 8 == 0 or self.step_ms > 500 or 0 < self.cap_ms < guess + 50 * self.step_ms
        if fresh:
            ms = torch.tensor(self.now(), dtype=torch.float64, device=self.run.device)
            if self.run.world > 1:
                dist.broadcast(ms, 0)
            guess = ms.item()
            self.base, self.step_ms = (step, guess), guess / max(step, 1)
        return guess, fresh


# ------------------------------------------------------------------------------------------------------------- artifact
# magic (8 bytes), raw size (uint64), SHA-256 of raw size and body (32), body: LZMA of the raw bytes. Raw: uint32 length of
# a JSON header {"format", "model": settings, "tensors": [[name, kind, shape], ...]}, the header, then in the order of the
# list all int8 levels, all their fp16 scales (one a row), all fp16 tensors, all fp32 tensors. Loading runs no code.

MAGIC, RAW_LIMIT = b"PGSLOT\x01\n", 2**31
KINDS, LEVELS = ("int6", "int8", "fp16", "fp32"), {"int6": 31, "int8": 127}
PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
# Weights hold no repeats and no alignment: one literal context and a short search are as good as preset 6, in half the time.
LZMA_FILTERS = [dict(id=lzma.FILTER_LZMA2, preset=6, lc=0, lp=0, pb=0, mf=lzma.MF_HC4, depth=1, nice_len=32)]


def row_scales(w, levels):
    """Scales [...,rows,1], fp16 values in fp32, of w [...,rows,cols] fp32 by GPTQ-lite (#549): of five percentiles of |w| in a
    row, the clip that leaves the least squared error. No floor but fp16's smallest number."""
    last = w.size(-1) - 1
    top = w.abs().topk(min(last + 1, int((1 - PERCENTILES[0]) * last) + 2)).values  # all that these percentiles touch
    scales, errors = [], []
    for p in PERCENTILES:
        at = min((1 - p) * last, top.size(-1) - 1)
        clip = top[..., int(at):int(at) + 1].lerp(top[..., math.ceil(at):math.ceil(at) + 1], at - int(at))
        scales.append((clip / levels).clamp(2.0**-24, 65504.0).half().float())
        errors.append((w - code_levels(w, scales[-1], levels).mul_(scales[-1])).square_().sum(-1, keepdim=True))
    return torch.stack(scales).gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]


def code_levels(w, scale, levels):
    """Integer levels, as floats, of w under its row scales."""
    return (w / scale).round_().clamp_(-levels, levels)


class Quantizer:
    """What the export makes of a state: int6 and int8 levels by row for matrices, fp16 and fp32 for the rest."""

    def __init__(self, c, state):
        self.c, self.state = c, {name: t.detach().float() for name, t in split_banks(state, c.num_layers).items()}
        self.kinds = {name: parameter_rule(name)[2] for name in self.state}
        self.scales = {n: row_scales(self.state[n], LEVELS[k]) for n, k in self.kinds.items() if k in LEVELS}
        self.counts = {k: sum(t.numel() for n, t in self.state.items() if self.kinds[n] == k) for k in KINDS}

    def scale(self, name, step_floor):
        """Row scales, fp16, of a matrix; the floor binds int6 only."""
        return self.scales[name].clamp_min(step_floor if self.kinds[name] == "int6" else 0).half()

    def estimate(self, step_floor):
        """Bytes of levels and scales by the order-0 entropy of 64 rows of each matrix; LZMA takes some percent more."""
        total = 0.0
        for name, kind in self.kinds.items():
            if kind in LEVELS:
                w = self.state[name]
                rows = slice(None, None, -(-len(w) // 64))
                q = code_levels(w[rows], self.scale(name, step_floor)[rows].float(), LEVELS[kind])
                p = torch.bincount(q.flatten().int() + 128).double() / q.numel()
                total += 2 * len(w) - (p * p.clamp_min(1e-12).log2()).sum().item() * w.numel() / 8
        return total

    def fit(self, cap):
        """(artifact of at most cap bytes, step floor): floor 0 if that fits, else the one that ends within 0.2 % of cap. The
        estimate finds it, corrected by what LZMA took for the last one. Raises Fault if none fits."""
        best, ratio = None, 1.03
        for _ in range(4):
            low, high = -80.0, 80.0  # log2 of the floor
            while high - low > 1e-4:
                middle = (low + high) / 2
                low, high = (low, middle) if self.estimate(2.0**middle) * ratio < 0.999 * cap else (middle, high)
            floor = 2.0**high if high > -24 else 0.0  # fp16's smallest number is no floor
            blob = self.pack(floor)
            if len(blob) <= cap and (best is None or len(blob) > len(best[0])):
                best = blob, floor
            if best and (best[1] == 0 or len(best[0]) > 0.998 * cap):
                return best
            ratio = len(blob) / self.estimate(floor)
        if best is None:
            raise Fault(f"ARTIFACT_BYTES={self.c.artifact_bytes}: code leaves {cap} bytes, the weights take {len(blob)} at the coarsest; "
                        "train a smaller model or raise the cap.")
        return best

    def pack(self, step_floor):
        """The artifact's bytes; int6 rows get a step of at least step_floor, the one knob that trades precision for bytes."""
        order = sorted(self.state, key=lambda n: KINDS.index(self.kinds[n]))
        header = json.dumps({"format": 1, "model": {n: getattr(self.c, n.lower()) for n in MODEL_SETTINGS},
                             "tensors": [[n, self.kinds[n], list(self.state[n].shape)] for n in order]}).encode()
        parts = {"levels": [], "scales": [], "fp16": [], "fp32": []}
        for name in order:
            kind, w = self.kinds[name], self.state[name]
            if kind in LEVELS:
                scale = self.scale(name, step_floor)
                parts["levels"].append(code_levels(w, scale.float(), LEVELS[kind]).to(torch.int8))
                parts["scales"].append(scale)
            else:
                parts[kind].append(w.half() if kind == "fp16" else w)
        raw = struct.pack("<I", len(header)) + header + b"".join(t.cpu().numpy().tobytes() for ts in parts.values() for t in ts)
        size, body = struct.pack("<Q", len(raw)), lzma.compress(raw, lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=LZMA_FILTERS)
        return MAGIC + size + hashlib.sha256(size + body).digest() + body


def decompress(data, limit):
    """LZMA stream -> at most limit bytes. Raises ValueError if it is damaged, cut off, followed by more, or larger."""
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2**28)
    raw = decoder.decompress(data, limit + 1)
    if not decoder.eof or decoder.unused_data or len(raw) > limit:
        raise ValueError("its LZMA stream is cut off, is followed by something, or is larger than it says")
    return raw


def unpack(data):
    """(matrices and other tensors by name, fp32; model settings) of an artifact. Raises ValueError if it is damaged."""
    if len(data) < 48 or hashlib.sha256(data[8:16] + data[48:]).digest() != data[16:48]:
        raise ValueError("checksum mismatch")
    raw = decompress(data[48:], min(struct.unpack("<Q", data[8:16])[0], RAW_LIMIT))
    at = 4 + struct.unpack("<I", raw[:4])[0]
    header = json.loads(raw[4:at])

    def take(dtype, shape):
        nonlocal at
        at, start = at + math.prod(shape) * np.dtype(dtype).itemsize, at
        return torch.from_numpy(np.frombuffer(raw, dtype, math.prod(shape), start).astype(np.float32).reshape(shape))

    coded, plain = ([row for row in header["tensors"] if (row[1] in LEVELS) == wanted] for wanted in (True, False))
    state = {name: take("<i1", shape) for name, _, shape in coded}
    for name, _, shape in coded:
        state[name] *= take("<f2", (shape[0], 1))
    state |= {name: take({"fp16": "<f2", "fp32": "<f4"}[kind], shape) for name, kind, shape in plain}
    if header["format"] != 1 or at != len(raw):
        raise ValueError(f"format {header['format']}, {len(raw) - at} surplus bytes")
    return state, header["model"]


def unpack_lineage(data):
    """(matrices and other tensors by name, fp32; {}) of a lineage final_model.int6.ptz: LZMA of a torch.save, which is read
    without running what is pickled in it."""
    saved = torch.load(BytesIO(decompress(data, RAW_LIMIT)), map_location="cpu", weights_only=True)
    w, coded = saved["w"], {n for n, meta in saved["m"].items() if isinstance(meta, dict)}
    return {n: w[n + ".q"].float() * w[n + ".scale"].float().view(-1, *[1] * (w[n + ".q"].dim() - 1)) if n in coded else w[n].float()
            for n in saved["m"]}, {}


def read_artifact(c):
    """(Config with the artifact's model settings, tensors by name) of LOAD_ARTIFACT. Raises BadInput."""
    where = f"LOAD_ARTIFACT={c.load_artifact}"
    try:
        data = Path(c.load_artifact).read_bytes()
        state, settings = (unpack if data.startswith(MAGIC) else unpack_lineage)(data)
    except OSError as why:
        raise BadInput(f"{where}: {why.strerror}; give the path of a final_model.int6.ptz.") from None
    except Exception as why:  # whatever a damaged file makes the readers raise, it is one kind of problem
        raise BadInput(f"{where}: damaged, or not an artifact: {str(why)[:160]}. Fetch or export it again.") from None
    clash = [f"{n}={getattr(c, n.lower())} (there {v})" for n, v in settings.items() if n.lower() in c.explicit
             and json.loads(json.dumps(getattr(c, n.lower()))) != v]
    c = dataclasses.replace(c, **{n.lower(): tuple(v) if isinstance(v, list) else v for n, v in settings.items()})
    problems = clash or cross_check(c)
    if problems:
        raise BadInput(f"{where}: was made with other settings: {' '.join(problems)}. Unset them: the artifact knows its shape.")
    return c, state


def load_state(model, state, where):
    """Copy tensors by name into the model. Raises BadInput unless names and shapes are exactly the model's."""
    own = split_banks(model.state_dict(), model.c.num_layers)
    shapes = [{n: list(t.shape) for n, t in tensors.items()} for tensors in (state, own)]
    wrong = [f"{n} is {shapes[0].get(n, 'missing')}, the settings make it {shapes[1].get(n, 'nothing')}"
             for n in sorted(own.keys() | state.keys()) if shapes[0].get(n) != shapes[1].get(n)]
    if wrong:
        raise BadInput(f"{where}: does not fit the model settings: {'; '.join(wrong[:3])}{' ...' if wrong[3:] else ''}. Set NUM_LAYERS, "
                       "MODEL_DIM and the others as it was trained.")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def write_file(path, data):
    """Write bytes so that the file is whole or not there."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def export(c, run, model):
    """Rank 0 quantises to the byte cap and writes the artifact; all ranks get the weights as read back from the file."""
    path, blob = run.folder / "final_model.int6.ptz", b""
    if run.rank == 0:
        began, buffer, code = time.perf_counter(), BytesIO(), Path(__file__).stat().st_size
        torch.save({n: t.cpu() for n, t in model.state_dict().items()}, buffer)
        write_file(run.folder / "final_model.pt", buffer.getvalue())
        quantizer = Quantizer(c, model.state_dict())
        blob, floor = quantizer.fit(c.artifact_bytes - code)
        write_file(path, blob)
        run.metric("quantised", **quantizer.counts, step_floor=floor, seconds=time.perf_counter() - began)
        run.metric("artifact", model_bytes=len(blob), code_bytes=code, total_bytes=len(blob) + code)
        run.log(f"Serialized model: {buffer.tell()} bytes\nCode size: {code} bytes\nSerialized model int6+lzma: {len(blob)} bytes\n"
                f"Total submission size int6+lzma: {len(blob) + code} bytes")
        blob = path.read_bytes()
    if run.world > 1:
        size = run.sum(torch.tensor(len(blob), device=run.device))
        data = torch.frombuffer(bytearray(blob or bytes(size.item())), dtype=torch.uint8).to(run.device)
        dist.broadcast(data, 0)
        blob = data.cpu().numpy().tobytes()
    load_state(model, unpack(blob)[0], path)


# --------------------------------------------------------------------------------------------------------- scoring core
# Every evaluator goes through score(): it plans windows, scores each target exactly once into one array of nats [N],
# shared out over ranks by whole batches, and sums that array once, in order, in fp64.


def plan_windows(n, window, stride):
    """(start, first scored row) of each window over n targets, int64 arrays, such that each target is scored once, in order.

    The first window scores all its rows, later ones their last stride rows; the last one is moved back to end at target n.
    Window k scores targets start + first to start + window - 1. Raises ValueError if the numbers cannot do that.
    """
    if not 1 <= stride <= window <= n:
        raise ValueError(f"need 1 <= stride {stride} <= window {window} <= targets {n}")
    ends = np.minimum(np.arange(window, n + stride, stride), n)
    return ends - window, np.concatenate([[0], ends[:-1]]) - (ends - window)


def row_nll(model, h, targets, rows, shift=0.0):
    """Nats [R] fp32 at rows, flat indices into B*T, of h [B,T,D], with shift [V] on the logits; only rows meet the head."""
    h, targets = h.flatten(0, 1), targets.flatten()
    return torch.cat([F.cross_entropy(model.cap(model.project(h[r]) + shift), targets[r], reduction="none") for r in rows.split(16384)])


def slot_shift(c, model, h, targets):
    """Shift [V] of the logits by SLOT (arXiv:2505.12392, #1084): one delta [D], added to all h [B,T,D], fitted by AdamW (eps
    1e-5, weight decay 1e-8) to the cross entropy of all positions but the last of each window.

    Closed form: the logits of h + delta are base logits + W delta, so the base is computed once, and the gradient of delta is
    W' times the column sum of the logits' gradient. Not causal: that loss holds the targets which are then scored.
    """
    weight, goal = model.head_weight().float(), targets[:, :-1].flatten()
    base = model.project(h[:, :-1]).flatten(0, 1)
    delta, m, v = (torch.zeros(h.size(-1), device=h.device) for _ in range(3))
    for step in range(1, c.slot_steps + 1):
        shift, columns = weight @ delta, torch.zeros(len(weight), device=h.device)
        for z, y in zip(base.split(2048), goal.split(2048)):  # tiles that stay in the cache
            capped = model.cap(z + shift)
            g = capped.softmax(-1)
            g.scatter_add_(1, y[:, None], g.new_full((len(y), 1), -1.0))
            columns += (g * (1 - (capped / c.logit_softcap).square())).sum(0)
        grad = weight.mT @ columns / len(goal)
        m.lerp_(grad, 0.1)
        v.lerp_(grad.square(), 0.001)
        delta = delta * (1 - c.slot_lr * 1e-8) - c.slot_lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-5)
    return weight @ delta


# ----------------------------------------------------------------------------------------------------------- evaluators
# A row each: the setting that is the stride; whether weights train on a chunk once it is scored; whether SLOT shifts the
# logits. Rows of equal stride and training share a pass, so TTT with and without SLOT costs one TTT.

Evaluator = namedtuple("Evaluator", "stride ttt slot")
EVALUATORS = dict(zip(EVALS, (Evaluator("eval_seq_len", False, False), Evaluator("eval_stride", False, False),
                              Evaluator("eval_stride", True, False), Evaluator("eval_stride", True, True),
                              Evaluator("eval_stride", False, True))))


def broken_conditions(evaluator):
    """Which of the conditions C1 to C4 (challenge issue #1017) an evaluator breaks; "" if it is causal."""
    return "C1" if evaluator.slot else ""


class ChunkTrainer:
    """Score-first test-time training (#549): SGD on a chunk of the stream that has been scored."""

    def __init__(self, c, run, model):
        self.c, self.run, self.model, self.params, self.frozen = c, run, model, list(model.parameters()), []
        self.sgd = torch.optim.SGD(self.params, lr=c.ttt_lr, momentum=c.ttt_momentum)
        for name, p in model.named_parameters():
            p.grad = torch.zeros_like(p)
            names = matrix_names(name, c.num_layers)
            rows = [i for i, n in enumerate(names) if n.startswith("blocks.") and int(n.split(".")[1]) < c.ttt_freeze_blocks]
            if rows:  # along the first axis of a bank; a tensor of a frozen block freezes whole
                self.frozen.append((p, rows if name in BANKS else slice(None)))

    def train(self, tokens, begin, end, rate):
        """TTT_EPOCHS passes over targets begin to end, each once a pass, in sequences of EVAL_SEQ_LEN. If that does not divide
        the chunk, the last sequence reaches back for context and counts only the targets no other has."""
        T, size = self.c.eval_seq_len, self.c.ttt_batch_seqs
        starts = np.arange(begin, end, T)
        reach = max(0, int(starts[-1]) + T - end)
        starts[-1] -= reach
        rows = tokens[torch.from_numpy(starts[:, None] + np.arange(T + 1)).to(tokens.device)]
        inputs, targets = rows[:, :-1], rows[:, 1:].clone()
        targets[-1, :reach] = -100
        self.sgd.param_groups[0]["lr"] = rate
        for i in [*range(0, len(rows), size)] * self.c.ttt_epochs:
            mine = slice(i + self.run.rank, i + size, self.run.world)
            self.step(inputs[mine], targets[mine], (targets[i:i + size] >= 0).sum())

    def step(self, inputs, targets, count):
        """One SGD step on the mean over count targets, which the ranks hold together; a rank may hold none."""
        grads = [p.grad for p in self.params]
        torch._foreach_zero_(grads)
        if len(inputs):
            (self.model(inputs, targets, "sum") / count).backward()
        sum_over_ranks(self.run, grads)
        for p, rows in self.frozen:
            p.grad[rows] = 0
        if self.c.ttt_grad_clip:
            nn.utils.clip_grad_norm_(self.params, self.c.ttt_grad_clip)
        self.sgd.step()


@torch.no_grad()
def score_batch(c, run, model, val, starts, firsts, pad_to, slots, out):
    """Score windows [B] into out [K+1,N]: row k with or without SLOT as slots [K] say; the last row counts. -> seconds [K]."""
    T, n, seconds = c.eval_seq_len, len(starts), []
    index, rows = starts[:, None] + np.arange(T + 1), np.flatnonzero(np.arange(T) >= firsts[:, None])
    at = torch.from_numpy(index[:, :-1].ravel()[rows]).to(run.device)
    if run.compile:  # whole batches only, so that one shape is compiled
        index = index[np.minimum(np.arange(pad_to), n - 1)]
    tokens, rows = val.tokens[torch.from_numpy(index).to(run.device)], torch.from_numpy(rows).to(run.device)
    h, targets = model.hidden(tokens[:, :-1])[:n], tokens[:n, 1:]
    for k, slot in enumerate(slots):
        run.synchronize()
        began = time.perf_counter()
        out[k, at] = row_nll(model, h, targets, rows, slot_shift(c, model, h, targets) if slot else 0.0)
        run.synchronize()
        seconds.append(time.perf_counter() - began)
    out[-1].index_add_(0, at, torch.ones_like(out[-1, at]))  # += would count a target twice scored once
    return seconds


def score(c, run, model, val, labels):
    """label -> (nats of every target [N] fp32, seconds) for evaluators that share a pass. The model's weights are changed if
    they train. Raises Fault unless each target was scored exactly once (C4)."""
    rows, T, began = [EVALUATORS[label] for label in labels], c.eval_seq_len, time.perf_counter()
    slots, ttt, shown = [row.slot for row in rows], rows[0].ttt, began
    size = c.slot_batch_seqs if any(slots) else max(1, c.val_batch_size // (T * run.world))
    starts, firsts = plan_windows(val.n, T, getattr(c, rows[0].stride))
    chunk = (starts + firsts) // c.ttt_chunk_tokens if ttt else np.zeros_like(starts)  # that of its first scored target
    out, spent, chunks = torch.zeros(len(labels) + 1, val.n, device=run.device), np.zeros(len(labels)), int(chunk[-1]) + 1
    trainer = ChunkTrainer(c, run, model) if ttt else None
    for i in range(chunks):
        begin, end = np.searchsorted(chunk, [i, i + 1])
        for b in range(begin + run.rank * size, end, run.world * size):
            batch = slice(b, min(b + size, end))
            spent += score_batch(c, run, model, val, starts[batch], firsts[batch], size, slots, out)
            if time.perf_counter() - shown > 2:
                shown = time.perf_counter()
                run.log(f"progress:{'+'.join(labels)} window:{batch.stop}/{len(starts)} chunk:{i + 1}/{chunks} seconds:{shown - began:.1f}")
        if ttt and i + 1 < chunks:  # the last chunk is scored only
            trainer.train(val.tokens, i * c.ttt_chunk_tokens, (i + 1) * c.ttt_chunk_tokens, ttt_lr(c, i, chunks))
    run.sum(out)
    if not bool((out[-1] == 1).all()):
        raise Fault(f"{labels}: {int((out[-1] != 1).sum())} of {val.n} targets were not scored exactly once")
    total = time.perf_counter() - began
    return {label: (out[k], total - spent.sum() + spent[k]) for k, label in enumerate(labels)}


def mean_and_bpb(val, nats):
    """(nats a token, bits a byte) of nats [N]."""
    loss = nats.double().mean().item()
    return loss, loss / math.log(2) * val.n / val.total_bytes


def evaluate(c, run, model, val, weights, labels):
    """Run evaluators on the weights in the model, which it has again afterwards, and log a result line for each."""
    kept, passes = [p.detach().clone() for p in model.parameters()], {}
    for label in labels:
        passes.setdefault(EVALUATORS[label][:2], []).append(label)
    for group in passes.values():
        for label, (nats, seconds) in score(c, run, model, val, group).items():
            loss, bpb = mean_and_bpb(val, nats)
            broken = broken_conditions(EVALUATORS[label])
            run.metric(f"final_{weights}_{label}", val_loss=loss, val_bpb=bpb, tokens=val.n, bytes=val.total_bytes, causal=not broken,
                       eval_time=1000 * seconds, **({"breaks": broken} if broken else {}))
            if c.save_nll and run.rank == 0:
                buffer = BytesIO()
                np.save(buffer, nats.double().cpu().numpy())
                write_file(run.folder / f"nll_{label if weights == 'int6' else weights + '_' + label}.npy", buffer.getvalue())
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), kept)


# ------------------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def quantize_banks(banks):
    """Put what the export would make of them into the banks; returns copies to put back. The gradient at the quantised weights
    then updates the kept ones: straight-through, of exactly what is exported, and nothing has to be compiled again."""
    kept = [bank.clone() for bank in banks]
    for bank in banks:
        scale = row_scales(bank, LEVELS["int6"])
        bank.copy_(code_levels(bank, scale, LEVELS["int6"]).mul_(scale))
    return kept


def micro_batches(run, sequences, length):
    """The fewest equal parts of a rank's sequences that fit a limit: on a GPU what 8 GPUs take at once in the record, on a CPU
    what its cache likes. Parts of equal shape whatever the world size also keep rounding the same."""
    limit = 98304 if run.cuda else 4096
    return next(n for n in range(1, sequences + 1) if sequences % n == 0 and (sequences // n * length <= limit or n == sequences))


def train_step(c, run, model, optimizer, batch, step, scale):
    """(mean loss, gradient norm), device tensors, after one optimiser step on this rank's part of a batch."""
    kept = quantize_banks(optimizer.banks) if c.late_qat and scale < c.late_qat_threshold else None
    n, total = micro_batches(run, len(batch[0]), c.train_seq_len), torch.zeros((), device=run.device)
    for ids, targets in zip(batch[0].chunk(n), batch[1].chunk(n)):
        loss = model(ids, targets) / n
        loss.backward()
        total += loss.detach()
    if kept:
        with torch.no_grad():
            torch._foreach_copy_(optimizer.banks, kept)
    norm = optimizer.step(total, scale, muon_momentum(c, step))
    model.zero_grad(set_to_none=True)
    return total, norm


def prime(c, run, model, data):
    """Make torch.compile do its work before the clock starts: WARMUP_STEPS steps of which nothing remains."""
    kept, optimizer, feed = [p.detach().clone() for p in model.parameters()], Optimizer(c, run, model), data.batches()
    for step in range(c.warmup_steps):
        train_step(c, run, model, optimizer, next(feed), step, 1.0)
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), kept)
    run.log(f"primed torch.compile with {c.warmup_steps} steps; weights and data position are as before")


def train(c, run, model, data, val):
    """Train the model, put the best average into it, and log the way there. Raises Fault if a loss or gradient is not finite."""
    if run.compile and c.warmup_steps:
        prime(c, run, model, data)
    optimizer, averages, feed = Optimizer(c, run, model), Averages(c, model.parameters()), data.batches()
    first_bad, qat = torch.full((), c.iterations + 1, device=run.device), False
    clock = Clock(run, 1000 * c.max_wallclock_seconds)
    reserve = 2 + 1.5 * len(data.held_out) / c.train_batch_tokens  # steps' time to compare averages, which is training too
    for step in range(c.iterations + 1):
        elapsed, fresh = clock.agreed(step)
        last = step == c.iterations or 0 < clock.cap_ms <= elapsed + reserve * clock.step_ms and step > 0
        if (fresh or last) and first_bad.item() <= step:
            raise Fault(f"step {first_bad.item()}: loss or gradient is not finite; lower MATRIX_LR, TIED_EMBED_LR and SCALAR_LR.")
        if last or c.val_loss_every and step % c.val_loss_every == 0:
            ms = clock.now()
            loss, bpb = mean_and_bpb(val, score(c, run, model, val, ["roundtrip"])["roundtrip"][0])
            run.metric(f"step:{step}/{c.iterations}", 4, val_loss=loss, val_bpb=bpb, train_time=ms, step_avg=ms / max(step, 1))
            clock.began += (clock.now() - ms) / 1000
        if last:
            break
        scale = lr_scale(c, step, elapsed, clock.step_ms)
        if c.late_qat and scale < c.late_qat_threshold and not qat:
            qat = True
            run.log(f"late_qat:on step:{step} lr_scale:{scale:.4f}")
        loss, norm = train_step(c, run, model, optimizer, next(feed), step, scale)
        averages.update(scale)
        first_bad = torch.where(torch.isfinite(loss + norm), first_bad, first_bad.clamp(max=step + 1))
        if step < 10 or (step + 1) % c.train_log_every == 0:
            ms = clock.now()
            run.metric(f"step:{step + 1}/{c.iterations}", 4, train_loss=loss.item(), train_time=ms, step_avg=ms / (step + 1))
    if step < c.iterations:
        run.log(f"stopping_early: wallclock_cap train_time:{clock.now():.0f}ms step:{step}/{c.iterations}")
    averages.choose(run, model, data)
    run.metric("training", steps=step, tokens=step * c.train_batch_tokens, train_time=clock.now())
    if run.cuda:
        run.log(f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB")


# ----------------------------------------------------------------------------------------------------------------- main


def run_all(c):
    """Check everything, then train and export, or load, then evaluate."""
    c, state = read_artifact(c) if c.load_artifact else (c, None)
    run = Run(c)
    if state is None and c.train_batch_tokens % (run.world * c.train_seq_len):
        raise BadInput(f"TRAIN_BATCH_TOKENS={c.train_batch_tokens}: cannot be split evenly over {run.world} ranks in sequences of "
                       f"TRAIN_SEQ_LEN={c.train_seq_len}; use a multiple of {run.world * c.train_seq_len}.")
    backend, attention = choose_attention(c.attention, run.device)
    val, data = ValData(c, run), TrainData(c, run) if state is None else None
    model = GPT(c, run.dtype, attention)
    if state is not None:
        load_state(model, state, f"LOAD_ARTIFACT={c.load_artifact}")
    run.start(c)
    if run.world > 1:
        dist.init_process_group("nccl" if run.cuda else "gloo")
    model.to(run.device)
    if run.compile:
        model.hidden = torch.compile(model.hidden, dynamic=False)
    run.log(f"model_params:{sum(p.numel() for p in model.parameters())} attention:{backend} val_tokens:{val.n} (the split's last "
            f"{val.dropped} fill no window) val_bytes:{val.total_bytes}")
    try:
        if data:
            run.log(f"train_shards:{len(data.shards)} train_tokens:{sum(map(len, data.shards))} heldout_tokens:{len(data.held_out)}")
            train(c, run, model, data, val)
            evaluate(c, run, model, val, "float", ["roundtrip"])
            export(c, run, model)
        began = time.perf_counter()
        evaluate(c, run, model, val, "int6", c.evals)
        run.metric("eval_total", eval_time=1000 * (time.perf_counter() - began))
    except (BadInput, Fault) as problem:
        run.log(f"error: {problem}")
        raise


def main():
    """Run with settings from the environment. Exit status: 0 done, 1 fault, 2 bad input."""
    try:
        run_all(load_config(os.environ))
        sys.stdout.flush()
        if dist.is_initialized():
            os._exit(0)  # taking gloo's threads down aborted one rank in some dozen, when all was done and written
    except (BadInput, Fault) as problem:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(3)  # the first rank most likely says the same, and torchrun then ends this one
        print(f"error: {problem}", file=sys.stderr, flush=True)
        os._exit(2 if isinstance(problem, BadInput) else 1)  # at once: a rank must not wait for others in a collective


if __name__ == "__main__":
    main()
