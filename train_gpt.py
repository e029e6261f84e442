"""Parameter Golf, the SLOT record (pull request #1084), as one script: train, average, quantise, evaluate.

A GPT of 11 layers learns to predict web text in ten minutes on 8 GPUs; its weights are averaged, quantised to six bits,
compressed under 16,000,000 bytes together with this file, read back from disk, and scored in bits per byte by evaluators
that each say whether they are causal.

    torchrun --standalone --nproc_per_node=8 train_gpt.py            the record run (defaults are #1084's run command)
    torchrun --standalone --nproc_per_node=1 train_gpt.py            the same on one GPU, with gradient accumulation
    PRESET=demo python train_gpt.py                                  four minutes on a laptop's CPU (make demo)
    PRESET=demo LOAD_ARTIFACT=logs/ID/final_model.int6.ptz python train_gpt.py   evaluate an artifact, no training
    python train_gpt.py --help                                       every setting: default, bounds, one sentence

Settings are environment variables. The file reads in the order of a run: settings, log, data, byte counts, model, optimiser,
averages, schedules, artifact, scoring core, evaluators, training, main. B batch, T sequence, D model dim, V vocabulary,
L layers, H query heads, K key/value heads, R rows that are scored, N targets of the validation stream, W ranks.
"""
import dataclasses
import difflib
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
# One table is the parser, the bounds check and the help text, so that none of them can disagree. It stands before torch
# is imported because --help must not wait for that.


class BadInput(Exception):
    """A setting or file that cannot be used; found before work starts. Exit status 2."""


class Fault(Exception):
    """Something that went wrong on the way, such as a loss that is not finite. Exit status 1."""


Setting = namedtuple("Setting", "name kind default low high text")
EVALS = ("roundtrip", "sliding_window", "ttt", "ttt_slot", "slot")
INF = float("inf")
SETTINGS = [Setting(*row) for row in (
    ("PRESET", ("pr1084", "demo"), "pr1084", None, None, "Set of defaults: #1084's run command, or a small CPU run."),
    ("RUN_ID", str, "", None, None, "Name of the run: logs/RUN_ID.txt, logs/RUN_ID/. Empty: date, time and seed."),
    ("SEED", int, 1337, 0, 2**31 - 1, "Seed of the initial weights and of the data order."),
    ("DEVICE", ("auto", "cpu", "cuda"), "auto", None, None, "auto takes a GPU if there is one. fp32 on CPU, bf16 on GPU."),
    ("COMPILE", ("auto", "0", "1"), "auto", None, None, "torch.compile the trunk; auto: on a GPU only."),
    ("ATTENTION", ("auto", "fa3", "fa4", "sdpa"), "auto", None, None,
     "FlashAttention-3, -4 or torch's scaled_dot_product_attention; auto takes the first that is installed."),
    ("LOAD_ARTIFACT", str, "", None, None, "Skip training and evaluate this artifact (ours or the lineage's .ptz)."),
    ("EVALS", "evals", "auto", None, None, "Comma list of " + ", ".join(EVALS) + "; auto: roundtrip, sliding_window, and "
     "what TTT_ENABLED and SLOT_ENABLED ask for; none: train and export only."),
    ("SAVE_NLL", bool, 0, None, None, "Write logs/RUN_ID/nll_<evaluator>.npy: nats of every target in stream order."),
    # data
    ("DATA_PATH", str, "./data/datasets/fineweb10B_sp1024", None, None, "Folder of fineweb_train_*.bin, fineweb_val_*.bin."),
    ("TOKENIZER_PATH", str, "./data/tokenizers/fineweb_1024_bpe.model", None, None, "SentencePiece model of the shards."),
    ("TRAIN_BATCH_TOKENS", int, 786432, 1, 2**31, "Tokens of a training step over all ranks."),
    ("TRAIN_SEQ_LEN", int, 2048, 2, 2**20, "Tokens of a training sequence."),
    ("VAL_BATCH_SIZE", int, 524288, 1, 2**31, "Tokens of one evaluation forward over all ranks."),
    ("VAL_LOSS_EVERY", int, 4000, 0, INF, "Steps between validations during training; 0: only at the end."),
    ("TRAIN_LOG_EVERY", int, 500, 1, INF, "Steps between training lines (the first ten are always logged)."),
    # length and learning rate schedule
    ("ITERATIONS", int, 9000, 1, 10**9, "Training steps, unless the wallclock cap comes first."),
    ("MAX_WALLCLOCK_SECONDS", float, 600.0, 0, 1e9, "Cap on training time; 0: none."),
    ("WARMUP_STEPS", int, 20, 0, 10**6, "Steps that only prime torch.compile; all state is restored (no-op if eager)."),
    ("WARMDOWN_ITERS", int, 3500, 0, 10**9, "Steps (or their measured time) over which the rate falls to 0 at the end."),
    # model
    ("VOCAB_SIZE", int, 1024, 2, 65536, "Size of the vocabulary; must be the tokenizer's."),
    ("NUM_LAYERS", int, 11, 1, 1000, "Transformer blocks."),
    ("MODEL_DIM", int, 512, 2, 65536, "Width D of the residual stream."),
    ("NUM_HEADS", int, 8, 1, 1024, "Query heads."),
    ("NUM_KV_HEADS", int, 4, 1, 1024, "Key/value heads; must divide NUM_HEADS (grouped-query attention)."),
    ("MLP_MULT", float, 3.0, 0.01, 64, "MLP width over MODEL_DIM."),
    ("TIE_EMBEDDINGS", bool, 1, None, None, "Use the token embedding as the output head."),
    ("TIED_EMBED_INIT_STD", float, 0.005, 0, 10, "Standard deviation of a tied embedding's initial values."),
    ("LOGIT_SOFTCAP", float, 30.0, 0.01, 1e6, "Logits are cap * tanh(z / cap)."),
    ("QK_GAIN_INIT", float, 1.5, 0, 100, "Initial value of the gain on each normalised query head."),
    ("ROPE_BASE", float, 10000.0, 1, 1e12, "RoPE base."),
    ("ROPE_DIMS", int, 16, 0, 65536, "Dimensions of a head that are rotated; 0: all."),
    ("ROPE_TRAIN_LEN", int, 1024, 1, 2**20, "TRAIN_SEQ_LEN above this rescales ROPE_BASE, in training and evaluation."),
    ("LN_SCALE", bool, 1, None, None, "Scale the input of block i's two halves by 1/sqrt(i+1)."),
    ("XSA_LAST_N", int, 4, 0, 1000, "Last layers with exclusive self attention."),
    ("BIGRAM_VOCAB_SIZE", int, 1536, 0, 2**24, "Buckets of the bigram hash embedding; 0: none."),
    ("BIGRAM_DIM", int, 128, 1, 65536, "Width of the bigram table."),
    ("VE_ENABLED", bool, 1, None, None, "Value embedding: token identity added to the values of VE_LAYERS."),
    ("VE_DIM", int, 128, 1, 65536, "Width of the value embedding table."),
    ("VE_LAYERS", "ints", "9,10", 0, 999, "Layers (from 0) that get the value embedding."),
    # optimiser
    ("MATRIX_LR", float, 0.025, 0, 100, "Muon's rate for the banks (attention and MLP matrices)."),
    ("TIED_EMBED_LR", float, 0.035, 0, 100, "AdamW's rate for embeddings when the head is tied."),
    ("EMBED_LR", float, 0.6, 0, 100, "AdamW's rate for embeddings when it is not."),
    ("HEAD_LR", float, 0.008, 0, 100, "AdamW's rate for an untied head."),
    ("SCALAR_LR", float, 0.025, 0, 100, "AdamW's rate for scalars, vectors and the two small projections."),
    ("MUON_MOMENTUM", float, 0.99, 0, 0.99999, "Muon's Nesterov momentum."),
    ("MUON_MOMENTUM_WARMUP_START", float, 0.92, 0, 0.99999, "Its value at step 0."),
    ("MUON_MOMENTUM_WARMUP_STEPS", int, 1500, 0, 10**9, "Steps from there to MUON_MOMENTUM."),
    ("MUON_BACKEND_STEPS", int, 5, 1, 100, "Newton-Schulz steps."),
    ("MUON_WD", float, 0.04, 0, 100, "Muon's decoupled weight decay."),
    ("ADAM_WD", float, 0.04, 0, 100, "AdamW's weight decay."),
    ("BETA1", float, 0.9, 0, 0.99999, "AdamW beta 1."),
    ("BETA2", float, 0.95, 0, 0.99999, "AdamW beta 2."),
    ("ADAM_EPS", float, 1e-8, 1e-30, 1, "AdamW epsilon."),
    ("GRAD_CLIP_NORM", float, 0.3, 0, 1e9, "Clip by the norm of the reduced gradient; 0: no clipping."),
    # averages and quantisation
    ("EMA_ENABLED", bool, 1, None, None, "Exponential moving average of the weights, a candidate for the export."),
    ("EMA_DECAY", float, 0.997, 0, 0.999999, "Its decay after n steps is min(EMA_DECAY, (1+n)/(10+n))."),
    ("SWA_ENABLED", bool, 1, None, None, "Running mean of snapshots while the rate scale is under 0.2, a candidate too."),
    ("SWA_EVERY", int, 50, 1, 10**9, "Steps between those snapshots."),
    ("LATE_QAT", bool, 1, None, None, "Train through the export's int6 grid while the rate is low (straight-through)."),
    ("LATE_QAT_THRESHOLD", float, 0.15, 0, 1, "Rate scale under which it does."),
    ("ARTIFACT_BYTES", int, 16000000, 1000, 2**40, "Cap on artifact + code; the int6 step is widened until both fit."),
    # evaluation
    ("EVAL_SEQ_LEN", int, 2048, 2, 2**20, "Tokens of an evaluation window."),
    ("EVAL_STRIDE", int, 64, 1, 2**20, "Targets a sliding window scores (the first scores all its targets)."),
    ("TTT_ENABLED", bool, 1, None, None, "Score-first test-time training."),
    ("TTT_LR", float, 0.002, 0, 100, "SGD rate of the first chunk, cosine to 0 on the last."),
    ("TTT_EPOCHS", int, 3, 0, 1000, "Passes over a chunk once it is scored."),
    ("TTT_CHUNK_TOKENS", int, 32768, 1, 2**31, "Targets of a chunk."),
    ("TTT_FREEZE_BLOCKS", int, 0, 0, 1000, "First blocks whose parameters, matrices included, stay fixed."),
    ("TTT_MOMENTUM", float, 0.9, 0, 0.99999, "SGD momentum."),
    ("TTT_BATCH_SEQS", int, 32, 1, 2**20, "Sequences of a TTT step over all ranks."),
    ("TTT_GRAD_CLIP", float, 1.0, 0, 1e9, "Clip of TTT's gradient norm; 0: no clipping."),
    ("SLOT_ENABLED", bool, 1, None, None, "SLOT, inside TTT's scoring if TTT_ENABLED, else on sliding windows."),
    ("SLOT_LR", float, 0.001, 0, 100, "AdamW's rate for the SLOT delta."),
    ("SLOT_STEPS", int, 3, 1, 1000, "AdamW steps of the SLOT delta."),
    ("SLOT_BATCH_SEQS", int, 32, 1, 2**20, "Consecutive windows that share a delta."),
    ("CTW_WEIGHT", float, 0.0, 0, 0, "Context tree weighting is not in this version: only 0 is accepted."),
)]
PRESETS = {"pr1084": {}, "demo": dict(
    DATA_PATH="./data/datasets/demo_sp1024", TOKENIZER_PATH="./data/tokenizers/demo_1024_bpe.model", NUM_LAYERS="4",
    MODEL_DIM="192", NUM_HEADS="6", NUM_KV_HEADS="3", VE_LAYERS="2,3", XSA_LAST_N="2", BIGRAM_VOCAB_SIZE="4096", BIGRAM_DIM="64",
    VE_DIM="64", TRAIN_SEQ_LEN="256", EVAL_SEQ_LEN="256", TRAIN_BATCH_TOKENS="8192", VAL_BATCH_SIZE="8192",
    ITERATIONS="300", WARMDOWN_ITERS="120", MAX_WALLCLOCK_SECONDS="150", VAL_LOSS_EVERY="100", TRAIN_LOG_EVERY="10",
    MUON_MOMENTUM_WARMUP_STEPS="100", MUON_MOMENTUM="0.95", MATRIX_LR="0.04", SWA_EVERY="5", TTT_CHUNK_TOKENS="8192", TTT_LR="0.02",
    EVALS="roundtrip,sliding_window,ttt,ttt_slot")}
# Settings that fix the shape and arithmetic of the model; an artifact carries them.
MODEL_SETTINGS = ("VOCAB_SIZE NUM_LAYERS MODEL_DIM NUM_HEADS NUM_KV_HEADS MLP_MULT TIE_EMBEDDINGS LOGIT_SOFTCAP ROPE_BASE ROPE_DIMS "
                  "ROPE_TRAIN_LEN TRAIN_SEQ_LEN LN_SCALE XSA_LAST_N BIGRAM_VOCAB_SIZE BIGRAM_DIM VE_ENABLED VE_DIM VE_LAYERS").split()
# An unknown variable of one of the families is an error, and so is one spelt nearly like a setting.
FAMILIES = re.compile(r"(TTT|SLOT|CTW|MUON|ADAM|EMA|SWA|VE|XSA|BIGRAM|ROPE|QAT|LATE_QAT|TIED|WARMDOWN|RECUR|VRL|VALUE_RESIDUAL|"
                      r"GATED_ATTENTION|PREQUANT|MTP|DTG|LAWA)(_|$)")
Config = dataclasses.make_dataclass("Config", [s.name.lower() for s in SETTINGS] + ["explicit"], frozen=True)


def parse_setting(s, text):
    """Value of setting s from its text; ValueError with what is allowed if it has none."""
    text = text.strip()
    if isinstance(s.kind, tuple):
        if text not in s.kind:
            raise ValueError("allowed: " + ", ".join(s.kind))
        return text
    if s.kind is str:
        return text
    if s.kind is bool:
        if text.lower() not in ("0", "1", "false", "true"):
            raise ValueError("allowed: 0, 1, false, true")
        return text.lower() in ("1", "true")
    if s.kind == "evals":
        names = text if text in ("auto", "none") else tuple(dict.fromkeys(text.split(",")))
        if not isinstance(names, str) and set(names) - set(EVALS):
            raise ValueError("allowed: auto, none, or a comma list of " + ", ".join(EVALS))
        return () if names == "none" else names
    many = s.kind == "ints"
    kind, words = (int, [w for w in text.split(",") if w.strip()]) if many else (s.kind, [text])
    bounds = f"{s.low} to {s.high}" if s.low != s.high else f"only {s.low}"
    what = ("comma list of integers" if many else "integer" if kind is int else "number") + f", {bounds}"
    try:
        values = [kind(w) for w in words]
    except ValueError:
        raise ValueError("allowed: " + what) from None
    if not all(s.low <= v <= s.high for v in values):  # also refuses nan
        raise ValueError("allowed: " + what)
    return tuple(values) if many else values[0]


def unknown_variables(env):
    """One line for every variable that looks like a misspelt setting or belongs to a family of settings but is none."""
    names, problems = [s.name for s in SETTINGS], []
    for name in sorted(set(env) - set(names)):
        near = difflib.get_close_matches(name, names, 1, 0.85) or (
            difflib.get_close_matches(name, names, 1, 0) if FAMILIES.match(name) else [])
        if near:
            problems.append(f"{name}={env[name]}: no such setting. Nearest name: {near[0]}. Correct or unset it.")
    return problems


def load_config(env):
    """Config from a mapping of environment variables. Raises BadInput that lists every problem at once."""
    values, problems = {}, unknown_variables(env)
    preset = PRESETS.get(env.get("PRESET", "pr1084"), {})
    for s in SETTINGS:
        text = str(env.get(s.name, preset.get(s.name, s.default)))
        try:
            values[s.name.lower()] = parse_setting(s, text)
        except ValueError as why:
            problems.append(f"{s.name}={text}: not a valid value; {why}. {s.text}")
            values[s.name.lower()] = parse_setting(s, str(s.default))
    c = Config(**values, explicit=frozenset(n for n in values if n.upper() in env))
    if c.evals == "auto":
        tail = ("ttt_slot" if c.slot_enabled else "ttt") if c.ttt_enabled else "slot" if c.slot_enabled else ""
        c = dataclasses.replace(c, evals=("roundtrip", "sliding_window") + ((tail,) if tail else ()))
    problems += cross_check(c)
    if problems:
        raise BadInput("\n".join(problems))
    return c


def cross_check(c):
    """Problems between settings that are each valid alone, one line each."""
    head_dim, windows = c.model_dim // c.num_heads, c.eval_seq_len
    rules = (
        (c.model_dim % c.num_heads, f"MODEL_DIM={c.model_dim}: must be a multiple of NUM_HEADS={c.num_heads}"),
        (c.num_heads % c.num_kv_heads, f"NUM_KV_HEADS={c.num_kv_heads}: must divide NUM_HEADS={c.num_heads}"),
        (c.rope_dims > head_dim or c.rope_dims % 2 or c.rope_dims == 2 or (not c.rope_dims and head_dim % 2),
         f"ROPE_DIMS={c.rope_dims}: must be 0 or an even number from 4 to the head dim {head_dim}, and the head dim even"),
        (c.xsa_last_n > c.num_layers, f"XSA_LAST_N={c.xsa_last_n}: at most NUM_LAYERS={c.num_layers}"),
        (c.ve_enabled and (not c.ve_layers or max(c.ve_layers) >= c.num_layers or len(set(c.ve_layers)) < len(c.ve_layers)),
         f"VE_LAYERS={','.join(map(str, c.ve_layers))}: different layers from 0 to {c.num_layers - 1}, at least one; or VE_ENABLED=0"),
        (c.bigram_vocab_size == 1, "BIGRAM_VOCAB_SIZE=1: must be 0 (none) or at least 2"),
        (c.train_batch_tokens % c.train_seq_len, f"TRAIN_BATCH_TOKENS={c.train_batch_tokens}: must be a multiple of "
         f"TRAIN_SEQ_LEN={c.train_seq_len}"),
        (c.val_batch_size < windows, f"VAL_BATCH_SIZE={c.val_batch_size}: must hold one sequence, EVAL_SEQ_LEN={windows} tokens"),
        (c.eval_stride > windows, f"EVAL_STRIDE={c.eval_stride}: at most EVAL_SEQ_LEN={windows}, or targets are skipped"),
        (c.ttt_enabled and c.ttt_chunk_tokens < windows, f"TTT_CHUNK_TOKENS={c.ttt_chunk_tokens}: at least one "
         f"sequence, EVAL_SEQ_LEN={windows}"),
        (c.ttt_freeze_blocks > c.num_layers, f"TTT_FREEZE_BLOCKS={c.ttt_freeze_blocks}: at most NUM_LAYERS={c.num_layers}"),
        (not c.ttt_enabled and {"ttt", "ttt_slot"} & set(c.evals), f"TTT_ENABLED=0 with EVALS={','.join(c.evals)}: "
         "take ttt and ttt_slot out of EVALS or set TTT_ENABLED=1"),
        (not c.slot_enabled and {"slot", "ttt_slot"} & set(c.evals), f"SLOT_ENABLED=0 with EVALS={','.join(c.evals)}: "
         "take slot and ttt_slot out of EVALS or set SLOT_ENABLED=1"),
        (c.run_id and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", c.run_id), f"RUN_ID={c.run_id}: letters, digits and . _ - "
         "only, starting with a letter or digit, since files are named by it"),
    )
    return [f"{text}." for wrong, text in rules if wrong]


def help_text():
    """The --help page: every setting with kind, default, bounds and sentence, and what PRESET=demo changes."""
    lines = [__doc__, "SETTINGS"]
    for s in SETTINGS:
        kind = "|".join(s.kind) if isinstance(s.kind, tuple) else s.kind if isinstance(s.kind, str) else s.kind.__name__
        bounds = f" [{s.low:g} to {s.high:g}]" if s.low is not None else ""
        lines.append(f"  {s.name}={s.default!s}  ({kind}){bounds}\n      {s.text}")
    demo = " ".join(f"{k}={v}" for k, v in PRESETS["demo"].items())
    return "\n".join([*lines, "", "PRESET=demo sets, unless you set it yourself:", "  " + demo, ""])


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
# unrounded, in logs/RUN_ID/metrics.jsonl; a label is used once a run.

FORMATS = {"train_time": "{:.0f}ms", "eval_time": "{:.0f}ms", "step_avg": "{:.2f}ms", "seconds": "{:.1f}", "lr_scale": "{:.4f}"}


class Run:
    """What a run is bound to: rank of world ranks, device, compute dtype, folder, log."""

    def __init__(self, c):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if c.device == "cuda" and not torch.cuda.is_available():
            raise BadInput("DEVICE=cuda: torch sees no GPU here; allowed: cpu or auto, or install a CUDA build of torch.")
        use_cuda = c.device != "cpu" and torch.cuda.is_available()
        self.device = torch.device("cuda", local) if use_cuda else torch.device("cpu")
        self.dtype = torch.bfloat16 if use_cuda else torch.float32
        self.compile = c.compile == "1" or c.compile == "auto" and use_cuda
        self.log_file = self.json_file = None
        self.labels, self.name = set(), c.run_id or time.strftime("%Y%m%d_%H%M%S") + f"_seed{c.seed}"
        self.folder = Path("logs") / self.name
        if use_cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        elif local_world > 1:  # torchrun gives each process one thread; share the cores out instead
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))

    def start(self, c):
        """Open the log of this RUN_ID, which must be new, with the script's source, settings and versions on top."""
        if self.rank:
            return
        path = Path("logs") / f"{self.name}.txt"
        try:
            self.folder.mkdir(parents=True)
            self.log_file = open(path, "x", buffering=1)
            self.json_file = open(self.folder / "metrics.jsonl", "x", buffering=1)
        except FileExistsError:
            raise BadInput(f"RUN_ID={self.name}: {path} or {self.folder} exists and is not overwritten; choose another RUN_ID.") from None
        except OSError as why:
            raise BadInput(f"RUN_ID={self.name}: cannot write {path}: {why}") from None
        settings = {s.name: getattr(c, s.name.lower()) for s in SETTINGS}
        self.log_file.write(f"{Path(__file__).read_text()}\n{'=' * 100}\n")
        self.json_file.write(json.dumps({"label": "settings", **settings}) + "\n")
        where = torch.cuda.get_device_name() if self.device.type == "cuda" else f"cpu threads:{torch.get_num_threads()}"
        self.log(f"python:{sys.version.split()[0]} torch:{torch.__version__} numpy:{np.__version__} device:{where} dtype:{self.dtype} "
                 f"world_size:{self.world} compile:{int(self.compile)}")
        self.log("settings: " + " ".join(f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in settings.items()))
        self.log(f"log:{path}")

    def log(self, text):
        """Print and log a line on rank 0."""
        if self.rank == 0:
            print(text, flush=True)
            if self.log_file:
                self.log_file.write(text + "\n")

    def metric(self, label, digits=8, **fields):
        """One labelled line of figures: losses and bpb with that many digits, times in ms, booleans as yes or no."""
        if (label, *fields) in self.labels:
            raise Fault(f"label {label} logged twice")
        self.labels.add((label, *fields))
        words = [label]
        for key, value in fields.items():
            style = FORMATS.get(key, f"{{:.{digits}f}}" if isinstance(value, float) else "{}")
            words.append(f"{key}:" + ({True: "yes", False: "no"}[value] if isinstance(value, bool) else style.format(value)))
        self.log(" ".join(words))
        if self.json_file:
            self.json_file.write(json.dumps({"label": label, **fields}) + "\n")

    def synchronize(self):
        """Wait for the GPU, so that a clock read next tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def sum(self, tensor):
        """Sum over ranks, in place; returns the tensor."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor


# ---------------------------------------------------------------------------------------------------- shards and loader
# A shard is 256 little-endian int32 (magic, version, number of tokens, zeros) and then uint16 tokens. All headers and
# sizes are checked before the first step: a truncated shard found after nine minutes is nine minutes lost.

SHARD_MAGIC, SHARD_VERSION, SCAN_LIMIT = 20240520, 1, 2**28


def open_shard(path, vocab_size, scan):
    """Tokens of a shard file as a read-only memory map [n] uint16. Raises BadInput; scan: also look at every token id."""
    size, header = path.stat().st_size, np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        found = f"magic {header[0]}, version {header[1]}" if len(header) >= 2 else f"{size} bytes"
        raise BadInput(f"{path}: {found}; a shard has a header of 1024 bytes, magic {SHARD_MAGIC}, version {SHARD_VERSION}. "
                       "Make it with data/prepare.py.")
    n = int(header[2])
    if n < 1 or size != 1024 + 2 * n:
        raise BadInput(f"{path}: the header says {n} tokens, which take {1024 + 2 * max(n, 0)} bytes, the file has {size}; it must have at "
                       "least one token and be whole. Fetch or make it again.")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024, shape=(n,))
    if scan:
        check_ids(tokens, path, vocab_size)
    return tokens


def check_ids(tokens, where, vocab_size):
    """BadInput if a token id is not in the vocabulary (on a GPU the embedding would only say device-side assert)."""
    worst = int(tokens.max())
    if worst >= vocab_size:
        at = int(np.argmax(np.asarray(tokens).ravel() >= vocab_size))
        raise BadInput(f"{where}: token id {int(tokens.ravel()[at])} at position {at}; VOCAB_SIZE={vocab_size} allows 0 to {vocab_size - 1}. "
                       "Use the tokenizer and vocabulary that the shards were made with.")


def open_split(c, split):
    """All shards of a split, in order of name, headers and sizes checked; ids too, unless the split is very large."""
    paths = sorted(Path(c.data_path).glob(f"fineweb_{split}_*.bin"))
    if not paths:
        raise BadInput(f"DATA_PATH={c.data_path}: no fineweb_{split}_*.bin there; run make demo-data or make fineweb, or set DATA_PATH.")
    scan = split == "val" or sum(p.stat().st_size for p in paths) < 2 * SCAN_LIMIT
    return [open_shard(p, c.vocab_size, scan) for p in paths]


class TrainData:
    """Training sequences in an order that SEED alone fixes, whatever the number of ranks.

    Each epoch cuts every shard into sequences of T+1 tokens (shifted by a new random offset), visits the shards in a new
    order and the sequences of a shard in a new order. Sequence number i of the run is a pure function of (SEED, i), so a
    position in the data is one integer. The last sequences of the last shard are held out to compare averages.
    """

    def __init__(self, c, run):
        self.c, self.run, self.shards, self.T = c, run, open_split(c, "train"), c.train_seq_len
        last, self.pool, self.cache = self.shards[-1], ThreadPoolExecutor(1), (None, None)
        total = sum(len(s) for s in self.shards)
        keep = max(1, min(total // 100, 262144) // self.T)  # held-out sequences
        self.held_out = np.array(last[max(0, len(last) - keep * self.T - 1):])
        self.shards[-1] = last[:max(0, len(last) - keep * self.T)]
        self.counts = [max(0, (len(s) - self.T) // self.T) for s in self.shards]  # one sequence less: room for the offset
        if not sum(self.counts) or len(self.held_out) <= self.T:
            raise BadInput(f"DATA_PATH={c.data_path}: {total} training tokens are too few for TRAIN_SEQ_LEN={self.T}; give "
                           f"at least {4 * self.T} tokens or shorten the sequence.")

    def order(self, epoch):
        """(shard order, first sequence number of each, per-shard (offset, permutation)) of an epoch; the last is kept."""
        if self.cache[0] != epoch:
            rng = np.random.default_rng((self.c.seed, epoch))
            shards = rng.permutation(len(self.shards))
            starts = np.concatenate([[0], np.cumsum([self.counts[s] for s in shards])])
            self.cache = (epoch, (shards, starts, [(int(rng.integers(self.T)), rng.integers(2**32)) for _ in shards], {}))
        return self.cache[1]

    def sequence(self, i):
        """Tokens [T+1] of sequence number i of the run."""
        epoch, i = divmod(int(i), sum(self.counts))
        shards, starts, draws, perms = self.order(epoch)
        k = int(np.searchsorted(starts, i, side="right")) - 1
        offset, seed = draws[k]
        if k not in perms:  # the permutation of one shard at a time: 100 M tokens are 48,828 sequences
            perms.clear()
            perms[k] = np.random.default_rng(seed).permutation(self.counts[shards[k]])
        start = offset + int(perms[k][i - starts[k]]) * self.T
        return self.shards[shards[k]][start:start + self.T + 1]

    def load(self, step):
        """This rank's tokens of a step, [sequences, T+1] int64, in pinned memory on a GPU machine."""
        per_step = self.c.train_batch_tokens // self.T
        mine = per_step // self.run.world
        first = step * per_step + self.run.rank * mine
        rows = np.stack([self.sequence(i) for i in range(first, first + mine)]).astype(np.int64)
        check_ids(rows, f"DATA_PATH={self.c.data_path}, step {step}", self.c.vocab_size)
        rows = torch.from_numpy(rows)
        return rows.pin_memory() if self.run.device.type == "cuda" else rows

    def batches(self, first_step):
        """Endless (inputs, targets), [sequences, T] each on the device; a thread reads one step ahead."""
        ahead, step = self.pool.submit(self.load, first_step), first_step
        while True:
            rows, step = ahead.result().to(self.run.device, non_blocking=True), step + 1
            ahead = self.pool.submit(self.load, step)
            yield rows[:, :-1], rows[:, 1:]


# ---------------------------------------------------------------------------------------------------------- byte counts
# bits per byte = nats / ln 2 / bytes. This is the only place where bytes are counted.


class ByteCounts:
    """UTF-8 bytes that each target token stands for, under a SentencePiece model (the challenge's rule).

    A piece counts its bytes without the leading space; the space counts 1 unless the previous token is a boundary
    (control, unknown, unused); a byte token counts 1; boundary tokens count 0. Tables are [V].
    """

    def __init__(self, path, vocab_size):
        import sentencepiece
        path = Path(path)
        if not path.is_file():
            raise BadInput(f"TOKENIZER_PATH={path}: no such file; run make demo-data or make fineweb, or set TOKENIZER_PATH.")
        if path.name == "fineweb_1024_bpe.model" and path.stat().st_size == 253847:
            raise BadInput(f"TOKENIZER_PATH={path}: 253,847 bytes is another model that circulates under this name and decodes the official "
                           "shards to garbage; the official one has 254,483 bytes. Fetch it with make fineweb.")
        sp = sentencepiece.SentencePieceProcessor()
        try:
            sp.Load(str(path))
        except (RuntimeError, OSError) as why:
            raise BadInput(f"TOKENIZER_PATH={path}: not a SentencePiece model ({str(why)[:80]}).") from None
        if sp.vocab_size() != vocab_size:
            raise BadInput(f"TOKENIZER_PATH={path}: {sp.vocab_size()} pieces; VOCAB_SIZE={vocab_size} must be the same.")
        boundary, space, size = (np.zeros(vocab_size, t) for t in (bool, bool, np.int64))
        for i in range(vocab_size):
            piece = sp.id_to_piece(i)
            boundary[i] = sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)
            space[i] = piece.startswith("\u2581") and not boundary[i]
            if not boundary[i]:
                size[i] = 1 if sp.is_byte(i) else len(piece[int(space[i]):].replace("\u2581", " ").encode())
        self.boundary, self.space, self.size = boundary, space, size

    def count(self, previous, targets):
        """Bytes [n] int64 of target ids [n] that follow previous ids [n]."""
        return self.size[targets] + (self.space[targets] & ~self.boundary[previous])


class ValData:
    """The validation stream: tokens [N+1] on the device, and the bytes [N] of its targets.

    N is the largest multiple of EVAL_SEQ_LEN that fits, the challenge's own rule (62,021,632 for the FineWeb split).
    """

    def __init__(self, c, run):
        tokens = np.concatenate(open_split(c, "val"))
        self.n = (len(tokens) - 1) // c.eval_seq_len * c.eval_seq_len
        if not self.n:
            raise BadInput(f"DATA_PATH={c.data_path}: {len(tokens)} validation tokens; one window, EVAL_SEQ_LEN={c.eval_seq_len}, needs "
                           f"{c.eval_seq_len + 1}. Use more text or a shorter window.")
        self.dropped = len(tokens) - 1 - self.n
        tokens = tokens[:self.n + 1].astype(np.int64)
        self.bytes = ByteCounts(c.tokenizer_path, c.vocab_size).count(tokens[:-1], tokens[1:])
        self.tokens = torch.from_numpy(tokens).to(run.device)
        if not self.bytes.sum():
            raise BadInput(f"DATA_PATH={c.data_path}: the validation text has no bytes; use real text.")


# ---------------------------------------------------------------------------------------------------------------- model
# One trunk, hidden(), which every use shares; logits() is the head; forward() their cross entropy. All parameters are
# fp32 and cast to the compute dtype where they are used, so that nothing is ever trained in bf16, in TTT neither.

# A bank holds the matrices of all layers in one tensor, so that Muon orthogonalises them in one batch and a reduce-scatter
# over its first axis shares the work out. bank -> the matrices of layer i, listed for all layers one after the other.
BANKS = {"qo_bank": ("attn.c_q", "attn.proj"), "kv_bank": ("attn.c_k", "attn.c_v"), "mlp_up_bank": ("mlp.fc",),
         "mlp_down_bank": ("mlp.proj",)}
# name pattern -> init rule, optimiser group, export format. Every parameter (of a bank: every matrix) matches one row.
PARAMETERS = [(re.compile(p), *rest) for p, *rest in (
    (r"tok_emb\.weight", "embedding", "embed", "int8"),
    (r"lm_head\.weight", "zeros", "head", "int8"),
    (r"bigram\.embed\.weight", "zeros", "embed", "int8"),
    (r"ve_shared\.embed\.weight", "normal 0.01", "embed", "int8"),
    (r"(bigram|ve_shared)\.proj\.weight", "orthogonal", "scalar", "fp16"),
    (r"bigram\.scale", "fill 0.05", "scalar", "fp32"),
    (r"ve_shared\.scale", "fill 0.1", "scalar", "fp32"),
    (r"ve_layer_scales\.\d+|skip_weights|blocks\.\d+\.(attn|mlp)_scale", "fill 1", "scalar", "fp32"),
    (r"smear\.gate", "zeros", "scalar", "fp32"),
    (r"blocks\.\d+\.resid_mix", "stream", "scalar", "fp32"),
    (r"blocks\.\d+\.attn\.q_gain", "q_gain", "scalar", "fp32"),
    (r"blocks\.\d+\.(attn\.c_[qkv]|mlp\.fc)\.weight", "orthogonal", "muon", "int6"),
    (r"blocks\.\d+\.(attn|mlp)\.proj\.weight", "zeros", "muon", "int6"),
)]


def parameter_rule(name):
    """(init, optimiser group, export format) of a parameter. Raises Fault unless exactly one row of PARAMETERS fits."""
    rows = [row[1:] for row in PARAMETERS if row[0].fullmatch(name)]
    if len(rows) != 1:
        raise Fault(f"parameter {name} fits {len(rows)} rows of PARAMETERS, not one")
    return rows[0]


def bank_matrices(bank, num_layers):
    """Names of the matrices in a bank, in order along its first axis: one part of all layers, then the next part."""
    return [f"blocks.{i}.{part}.weight" for part in BANKS[bank] for i in range(num_layers)]


def split_banks(state, num_layers):
    """State dict with every bank replaced by its matrices (views)."""
    out = {}
    for name, tensor in state.items():
        out.update(zip(bank_matrices(name, num_layers), tensor) if name in BANKS else [(name, tensor)])
    return out


def join_banks(state, num_layers):
    """The inverse of split_banks. Raises KeyError if a matrix is missing."""
    out = dict(state)
    for bank in BANKS:
        out[bank] = torch.stack([out.pop(name) for name in bank_matrices(bank, num_layers)])
    return out


def choose_attention(wanted, device):
    """(name, function of q [B,T,H,d], k, v [B,T,K,d] -> [B,T,H,d], causal). Raises BadInput if wanted is not there."""
    def sdpa(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)

    why = f"needs a GPU, the device is {device.type}" if device.type != "cuda" else ""
    for name, module in (("fa3", "flash_attn_interface"), ("fa4", "flash_attn.cute")):
        if wanted == name or wanted == "auto" and not why:
            try:
                if why:
                    raise ImportError(why)
                function = __import__(module, fromlist=["flash_attn_func"]).flash_attn_func

                def flash(q, k, v, function=function):
                    out = function(q, k, v, causal=True)
                    return out[0] if isinstance(out, tuple) else out  # some versions also return the log-sum-exp
                return name, flash
            except (ImportError, AttributeError) as problem:
                if wanted == name:
                    raise BadInput(f"ATTENTION={name}: cannot use {module}: {problem}; allowed here: auto or sdpa.") from None
    return "sdpa", sdpa


def rms_norm(x):
    """x over its root mean square, along the last axis."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    """Rotary position embedding of the first 2*h dimensions of x [B,T,heads,d]; cos, sin [T,1,h]."""
    h = cos.size(-1)
    a, b, rest = x[..., :h], x[..., h:2 * h], x[..., 2 * h:]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), -1)


class LowRankEmbedding(nn.Module):
    """table [num, dim] -> linear dim -> out (none if equal) -> learned scalar; the bigram and value embeddings."""

    def __init__(self, num, dim, out):
        super().__init__()
        self.embed = nn.Embedding(num, dim)
        self.proj = nn.Linear(dim, out, bias=False) if dim != out else None
        self.scale = nn.Parameter(torch.empty(()))

    def forward(self, ids, dtype):
        """[B,T] ids -> [B,T,out]."""
        x = self.embed(ids).to(dtype)
        if self.proj is not None:
            x = F.linear(x, self.proj.weight.to(dtype))
        return x * self.scale.to(dtype)


class Block(nn.Module):
    """The parameters of a layer that are not matrices, and its arithmetic."""

    def __init__(self, c, index):
        super().__init__()
        self.attn = nn.Module()
        self.attn.q_gain = nn.Parameter(torch.empty(c.num_heads))
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.empty(c.model_dim)) for _ in range(2))
        self.resid_mix = nn.Parameter(torch.empty(2, c.model_dim))
        self.kv_heads, self.exclusive = c.num_kv_heads, index >= c.num_layers - c.xsa_last_n
        self.norm_scale = 1 / math.sqrt(index + 1) if c.ln_scale else 1.0

    def forward(self, x, x0, weights, value_extra, rope, attention):
        """x, x0 [B,T,D] -> [B,T,D]; weights: the layer's q, o, k, v, up, down in the compute dtype."""
        w_q, w_o, w_k, w_v, w_up, w_down = weights
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        a = self.attend(rms_norm(x) * self.norm_scale, w_q, w_k, w_v, value_extra, rope, attention)
        x = x + self.attn_scale.to(x.dtype) * F.linear(a, w_o)
        h = F.leaky_relu(F.linear(rms_norm(x) * self.norm_scale, w_up), 0.5).square()
        return x + self.mlp_scale.to(x.dtype) * F.linear(h, w_down)

    def attend(self, x, w_q, w_k, w_v, value_extra, rope, attention):
        """Causal grouped-query attention of x [B,T,D] with QK-norm, partial RoPE and XSA -> [B,T,D]."""
        B, T, _ = x.shape
        heads = self.attn.q_gain.numel()
        q = F.linear(x, w_q).view(B, T, heads, -1)
        k = F.linear(x, w_k).view(B, T, self.kv_heads, -1)
        v = F.linear(x, w_v)
        v = (v if value_extra is None else v + value_extra).view(B, T, self.kv_heads, -1)
        q, k = rotate(rms_norm(q), *rope) * self.attn.q_gain.to(x.dtype)[:, None], rotate(rms_norm(k), *rope)
        y = attention(q, k, v)
        if self.exclusive:  # take out of y its component along the token's own value (exclusive self attention, #549)
            y = y.reshape(B, T, self.kv_heads, heads // self.kv_heads, -1)
            own = v.unsqueeze(3)
            y = y - (y * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True).clamp_min(1e-24) * own
        return y.reshape(B, T, -1)


class GPT(nn.Module):
    """The model of #549 and #1084; 26,928,220 parameters by default. attention: see choose_attention."""

    def __init__(self, c, dtype=torch.float32, attention=None):
        super().__init__()
        L, D, kv, wide = c.num_layers, c.model_dim, c.model_dim // c.num_heads * c.num_kv_heads, int(c.model_dim * c.mlp_mult)
        self.c, self.dtype = c, dtype
        self.attention = attention or choose_attention("sdpa", torch.device("cpu"))[1]
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
        rot = c.rope_dims or D // c.num_heads
        stretch = max(1.0, c.train_seq_len / c.rope_train_len)
        base = c.rope_base * stretch ** (rot / (rot - 2)) if rot > 2 else c.rope_base
        angles = torch.outer(torch.arange(max(c.train_seq_len, c.eval_seq_len)).double(),
                             base ** (-torch.arange(0, rot, 2).double() / rot))
        self.register_buffer("cos", angles.cos().to(dtype).unsqueeze(1), persistent=False)  # [T,1,rot/2]
        self.register_buffer("sin", angles.sin().to(dtype).unsqueeze(1), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Initial values from SEED alone (made on the CPU), each parameter by its row of PARAMETERS."""
        c, g = self.c, torch.Generator().manual_seed(self.c.seed)
        for name, p in split_banks(dict(self.named_parameters()), c.num_layers).items():
            rule, _, number = parameter_rule(name)[0].partition(" ")
            if rule == "embedding":
                p.normal_(0, c.tied_embed_init_std if c.tie_embeddings else 1.0, generator=g)
            elif rule == "normal":
                p.normal_(0, float(number), generator=g)
            elif rule == "orthogonal":
                nn.init.orthogonal_(p, generator=g)
            elif rule == "stream":  # all of x, nothing of x0
                p[0], p[1] = 1, 0
            else:
                p.fill_({"zeros": 0, "q_gain": c.qk_gain_init}.get(rule) if not number else float(number))

    def bigram_bucket(self, ids):
        """Hash bucket [B,T] of each (previous, current) pair; position 0, which has no previous, takes the last."""
        last = self.c.bigram_vocab_size - 1
        pair = torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1]) % last
        return F.pad(pair, (1, 0), value=last)

    def hidden(self, ids):
        """[B,T] ids -> final normalised hidden states [B,T,D], position t seeing positions <= t only."""
        c, T = self.c, ids.size(1)
        x = self.tok_emb(ids).to(self.dtype)
        if self.bigram is not None:
            x = x + self.bigram(self.bigram_bucket(ids), self.dtype)
        x = rms_norm(x)
        gate = self.smear.gate.sigmoid().to(self.dtype)
        x = x0 = (1 - gate) * x + gate * F.pad(x, (0, 0, 1, -1))
        extra = self.ve_shared(ids, self.dtype) if self.ve_shared is not None else None
        # unbind, not indexing: its backward is one stack instead of a zero-filled bank for every matrix
        qo, kv, up, down = (getattr(self, bank).to(self.dtype).unbind() for bank in BANKS)
        rope, skips, half, L = (self.cos[:T], self.sin[:T]), [], c.num_layers // 2, c.num_layers
        for i, block in enumerate(self.blocks):
            if i >= half and skips:
                x = x + self.skip_weights[i - half].to(self.dtype) * skips.pop()
            ve = c.ve_layers.index(i) if extra is not None and i in c.ve_layers else None
            value_extra = None if ve is None else extra * self.ve_layer_scales[ve].to(self.dtype)
            x = block(x, x0, (qo[i], qo[L + i], kv[i], kv[L + i], up[i], down[i]), value_extra, rope, self.attention)
            if i < half:
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

    def forward(self, ids, targets, reduction="mean"):
        """Cross entropy in nats of targets [B,T] (-100: not counted) under ids [B,T]."""
        logits = self.cap(self.project(self.hidden(ids)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


# ------------------------------------------------------------------------------------------------------------ optimiser
# Muon for the banks, AdamW for the rest, without DDP: each rank gets the mean gradient of its share of every bank
# (reduce-scatter), orthogonalises that share and hands the result out (all-gather). One code path serves 1 and W ranks.

REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
ALL_GATHER = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def newton_schulz(g, steps, dtype):
    """Nearly orthogonal matrices in the place of g [n,rows,cols]: singular values about 1 (Jordan et al., Muon, 2024)."""
    x = g.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Optimizer:
    """step() turns the gradients of all ranks into an update of the same weights on each of them."""

    def __init__(self, c, run, model):
        self.c, self.run, groups = c, run, {"muon": [], "embed": [], "head": [], "scalar": []}
        for name, p in model.named_parameters():
            first = bank_matrices(name, c.num_layers)[0] if name in BANKS else name
            groups[parameter_rule(first)[1]].append(p)
        self.banks = sorted(groups.pop("muon"), key=lambda p: -p.numel())  # the largest reduction starts first
        rates = {"embed": c.tied_embed_lr if c.tie_embeddings else c.embed_lr, "head": c.head_lr, "scalar": c.scalar_lr}
        self.adam = torch.optim.AdamW([dict(params=ps, lr=rates[k], rate=rates[k]) for k, ps in groups.items() if ps],
                                      betas=(c.beta1, c.beta2), eps=c.adam_eps, weight_decay=c.adam_wd, fused=True)
        self.small = [p for group in self.adam.param_groups for p in group["params"]]
        self.shares = [-(-p.size(0) // run.world) for p in self.banks]  # matrices of each bank on a rank, padded
        self.momentum = [torch.zeros(n, *p.shape[1:], device=p.device) for n, p in zip(self.shares, self.banks)]

    def reduce(self, loss):
        """(mean loss over ranks, this rank's share of each bank's mean gradient); small gradients become means in place."""
        missing = [p.shape for p in self.banks + self.small if p.grad is None]
        if missing:
            raise Fault(f"no gradient for parameters of shapes {missing}")
        if self.run.world == 1:
            return loss, [p.grad for p in self.banks]
        W, shares, works = self.run.world, [], []
        for n, p in zip(self.shares, self.banks):
            padded = F.pad(p.grad, (0, 0, 0, 0, 0, n * W - p.size(0))).div_(W)
            shares.append(torch.empty_like(padded[:n]))
            works.append((REDUCE_SCATTER(shares[-1], padded, async_op=True), padded))
        small = [p.grad for p in self.small] + [loss]
        flat = self.run.sum(torch.cat([g.reshape(-1) for g in small])) / W  # one message for all of them
        parts = [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in small]), small)]
        torch._foreach_copy_(small[:-1], parts[:-1])
        for work, _ in works:
            work.wait()
        return parts[-1], shares

    @torch.no_grad()
    def step(self, loss, scale, momentum):
        """(mean loss, norm of the reduced gradient) as device tensors, after one update with all rates times scale."""
        c = self.c
        loss, shares = self.reduce(loss)
        small = [p.grad for p in self.small]
        squares = self.run.sum(torch.stack(torch._foreach_norm(shares)).square().sum())
        norm = (squares + torch.stack(torch._foreach_norm(small)).square().sum()).sqrt()
        if c.grad_clip_norm:
            torch._foreach_mul_(small + shares, (c.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0))
        gathers = [self.muon(p, g, buf, scale * c.matrix_lr, momentum) for p, g, buf in zip(self.banks, shares, self.momentum)]
        for group in self.adam.param_groups:  # while the gathers run
            group["lr"] = group["rate"] * scale
        self.adam.step()
        for p, (work, update) in zip(self.banks, gathers):
            if work:
                work.wait()
            rate = scale * c.matrix_lr * math.sqrt(max(1, p.size(1) / p.size(2)))
            p.mul_(1 - scale * c.matrix_lr * c.muon_wd).add_(update[:p.size(0)], alpha=-rate)
        return loss, norm

    def muon(self, p, g, buf, rate, momentum):
        """(pending gather or None, update [matrices,rows,cols]) of a bank from this rank's share g of its gradient."""
        buf.mul_(momentum).add_(g)
        dtype = torch.bfloat16 if p.device.type == "cuda" else torch.float32
        update = newton_schulz(g.add(buf, alpha=momentum), self.c.muon_backend_steps, dtype)
        if self.run.world == 1:
            return None, update
        whole = update.new_empty(update.size(0) * self.run.world, *update.shape[1:])
        return ALL_GATHER(whole, update.contiguous(), async_op=True), whole


# ------------------------------------------------------------------------------------------------------------- averages
# Averages that are collected are candidates for the export, next to the last weights; the lowest loss on training text
# that was held out decides. So none is collected in vain, and none is exported that is worse (a fixed EMA seeded with the
# initial weights costs 0.7 bpb after 160 steps).


class Averages:
    """EMA and SWA of the weights, fp32, as lists in the order of params."""

    def __init__(self, c, params):
        self.c, self.params, self.steps, self.snapshots = c, list(params), 0, 0
        self.ema = [p.detach().clone() for p in self.params] if c.ema_enabled else None
        self.swa = None

    @torch.no_grad()
    def update(self, scale):
        """Take in the weights after a step that was made at this rate scale."""
        self.steps += 1
        n, c = self.steps, self.c
        if self.ema:
            torch._foreach_lerp_(self.ema, self.params, 1 - min(c.ema_decay, (1 + n) / (10 + n)))
        if c.swa_enabled and scale < 0.2 and n % c.swa_every == 0:
            self.snapshots += 1
            if self.swa is None:
                self.swa = [p.detach().clone() for p in self.params]
            else:
                torch._foreach_lerp_(self.swa, self.params, 1 / self.snapshots)

    def candidates(self):
        """name -> weights, those that exist."""
        found = {"raw": [p.detach().clone() for p in self.params], "ema": self.ema, "swa": self.swa}
        return {name: weights for name, weights in found.items() if weights}


@torch.no_grad()
def choose_average(c, run, model, data, averages):
    """Put the candidate with the lowest loss on the held-out training text into the model, and log all of them."""
    tokens, T, losses = torch.from_numpy(data.held_out.astype(np.int64)).to(run.device), c.train_seq_len, {}
    rows = tokens[:-1].view(-1, T), tokens[1:].view(-1, T)
    mine = [i for i in range(0, len(rows[0]), 8)][run.rank::run.world]  # eight sequences at a time, dealt out
    candidates = averages.candidates()
    for name, weights in candidates.items():
        torch._foreach_copy_(averages.params, weights)
        total = torch.zeros((), device=run.device, dtype=torch.float64)
        for i in mine:
            total += GPT.forward(model, rows[0][i:i + 8], rows[1][i:i + 8], "sum").double()
        losses[name] = run.sum(total).item() / rows[0].numel()
        run.metric(f"average_{name}", heldout_train_loss=losses[name], tokens=rows[0].numel())
    best = min(losses, key=losses.get)
    torch._foreach_copy_(averages.params, candidates[best])
    run.log(f"average: exporting {best} (lowest loss on held-out training text), ema_steps:{averages.steps} "
            f"swa_snapshots:{averages.snapshots}")


# ------------------------------------------------------------------------------------------------------------ schedules


def lr_scale(c, step, elapsed_ms, step_ms):
    """Factor on all rates: 1, then linear to 0 over WARMDOWN_ITERS steps towards whichever end, steps or time, is nearer."""
    scale = min(1.0, (c.iterations - step) / max(c.warmdown_iters, 1))
    if c.max_wallclock_seconds and step_ms > 0 and c.warmdown_iters:
        remaining = max(0.0, 1000 * c.max_wallclock_seconds - elapsed_ms)
        scale = min(scale, remaining / (c.warmdown_iters * step_ms))
    return scale


def muon_momentum(c, step):
    """Muon's momentum at a step: linear from its start value."""
    done = min(1.0, step / max(c.muon_momentum_warmup_steps, 1))
    return (1 - done) * c.muon_momentum_warmup_start + done * c.muon_momentum


def ttt_lr(c, chunk, chunks):
    """TTT's rate on a chunk: cosine from TTT_LR on the first to 0 on the last."""
    return c.ttt_lr * 0.5 * (1 + math.cos(math.pi * chunk / max(chunks - 1, 1)))


class Clock:
    """Training time without validations. Ranks must agree on it, since rates and the end depend on it, so rank 0's time is
    sent round every few steps (every step while they are slow) and extrapolated in between."""

    def __init__(self, run):
        self.run, self.ms, self.since, self.base, self.step_ms = run, 0.0, None, (0, 0.0), 0.0

    def resume(self):
        """Start or go on."""
        self.run.synchronize()
        self.since = time.perf_counter()

    def now(self):
        """This rank's training time in ms."""
        return self.ms + 1000 * (time.perf_counter() - self.since)

    def pause(self):
        """Stop until resume()."""
        self.run.synchronize()
        self.ms = self.now()

    def agreed(self, step):
        """(training time in ms before this step, whether it was read just now and not extrapolated), same on all ranks."""
        fresh = step < 10 or step % 8 == 0 or self.step_ms > 500
        if fresh:
            self.run.synchronize()
            ms = torch.tensor(self.now(), dtype=torch.float64, device=self.run.device)
            if self.run.world > 1:
                dist.broadcast(ms, 0)
            self.base = (step, ms.item())
            self.step_ms = self.base[1] / max(step, 1)
        return self.base[1] + (step - self.base[0]) * self.step_ms, fresh


# ------------------------------------------------------------------------------------------------------------- artifact
# magic (8 bytes), raw size (uint64), SHA-256 of raw size and LZMA stream (32), LZMA stream. Decompressed: uint32 length of
# a JSON header {"format", "model": settings, "tensors": [[name, kind, shape], ...]}, the header, then all int6 and int8
# levels (int8, in the order of the list), all their scales (fp16, one a row), the fp16 tensors, the fp32 tensors.
# Loading runs no code. final_model.int6.ptz of the lineage (LZMA of a torch.save) is read too, with weights_only.

MAGIC, LIMIT = b"PGSLOT\x01\n", 2**31
PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
LEVELS = {"int6": 31, "int8": 127}
# Quantised weights have no repeats worth searching for and no alignment: a short search and one context code them as small
# as preset 6 (bt4, three literal context bits) in half the time.
LZMA_FILTERS = [dict(id=lzma.FILTER_LZMA2, preset=6, lc=0, lp=0, pb=0, mf=lzma.MF_HC4, depth=1, nice_len=32)]


def row_scales(w, levels):
    """Scales [...,rows,1], fp16 values as fp32, of w [...,rows,cols] fp32 by GPTQ-lite (#549): of five percentiles of |w|,
    per row, the clip with the least squared error. No floor on the scale but fp16's own smallest number."""
    last = w.size(-1) - 1
    top = w.abs().topk(min(last + 1, int((1 - PERCENTILES[0]) * last) + 2)).values  # all that the percentiles can touch
    best = least = None
    for p in PERCENTILES:
        at = (1 - p) * last
        lo = min(int(at), top.size(-1) - 1)
        hi = min(lo + 1, top.size(-1) - 1)
        clip = top[..., lo:lo + 1].lerp(top[..., hi:hi + 1], at - lo)
        scale = (clip / levels).clamp(2.0**-24, 65504.0).half().float()
        error = (w - (w / scale).round_().clamp_(-levels, levels).mul_(scale)).square_().sum(-1, keepdim=True)
        best, least = (scale, error) if best is None else (torch.where(error < least, scale, best), torch.minimum(error, least))
    return best


def widen(scale, step_floor):
    """Scales that are at least step_floor, as fp16 values: the one knob that trades precision for bytes."""
    return scale.clamp_min(step_floor).half().float()


def code_levels(w, scale, levels):
    """int8 levels of w under its row scales."""
    return (w / scale).round_().clamp_(-levels, levels).to(torch.int8)


def entropy_bytes(levels):
    """Order-0 entropy of a tensor of levels in bytes: what an ideal coder of single symbols needs."""
    p = torch.bincount(levels.flatten().int() + 128, minlength=256).double() / levels.numel()
    return -(p * p.clamp_min(1e-300).log2()).sum().item() * levels.numel() / 8


class Quantizer:
    """Levels and scales of a state's matrices, with one step floor for all int6 rows that fits them into a byte budget."""

    def __init__(self, state, num_layers):
        self.state = {name: t.detach().float() for name, t in split_banks(state, num_layers).items()}
        self.kinds = {name: parameter_rule(name)[2] for name in self.state}
        self.scales = {n: row_scales(self.state[n], LEVELS[k]) for n, k in self.kinds.items() if k in LEVELS}
        self.fixed = sum(t.numel() * {"fp16": 2, "fp32": 4}.get(self.kinds[n], 0) for n, t in self.state.items())

    def scale(self, name, step_floor):
        """Row scales of a matrix; the floor binds int6 only."""
        return widen(self.scales[name], step_floor) if self.kinds[name] == "int6" else self.scales[name]

    def estimate(self, step_floor):
        """Compressed size in bytes by entropy, from every fourth row of the matrices."""
        total = self.fixed
        for name, scale in self.scales.items():
            w, s = self.state[name], self.scale(name, step_floor)
            rows = slice(None, None, 4 if len(w) >= 64 else 1)
            q = code_levels(w[rows], s[rows], LEVELS[self.kinds[name]])
            total += entropy_bytes(q) * w.numel() / q.numel() + 2 * len(w)
        return total

    def fit(self, budget):
        """Smallest step floor whose estimated size is within budget; 0.0 if none is needed."""
        low, high = 0.0, 2 * max([s.max().item() for n, s in self.scales.items() if self.kinds[n] == "int6"] + [1e-3])
        if self.estimate(low) <= budget:
            return low
        for _ in range(14):
            mid = (low + high) / 2
            low, high = (low, mid) if self.estimate(mid) <= budget else (mid, high)
        return high

    def pack(self, c, step_floor):
        """The artifact's bytes."""
        order = sorted(self.state, key=lambda n: list(LEVELS | {"fp16": 0, "fp32": 0}).index(self.kinds[n]))
        settings = {s: getattr(c, s.lower()) for s in MODEL_SETTINGS}
        header = json.dumps({"format": 1, "model": settings, "tensors": [[n, self.kinds[n], list(self.state[n].shape)] for n in order]})
        parts, tail = [struct.pack("<I", len(header)), header.encode()], []
        for name in order:
            kind, w = self.kinds[name], self.state[name]
            if kind in LEVELS:
                scale = self.scale(name, step_floor)
                parts.append(code_levels(w, scale, LEVELS[kind]).cpu().numpy().tobytes())
                tail.insert(len(parts) - 3, scale.half().cpu().numpy().tobytes())
            else:
                tail.append(w.to(torch.float16 if kind == "fp16" else torch.float32).cpu().numpy().tobytes())
        raw = b"".join(parts + tail)
        body = struct.pack("<Q", len(raw)), lzma.compress(raw, format=lzma.FORMAT_XZ, check=lzma.CHECK_NONE, filters=LZMA_FILTERS)
        return MAGIC + body[0] + hashlib.sha256(body[0] + body[1]).digest() + body[1]


def decompress(data, limit):
    """LZMA stream -> at most limit bytes. Raises ValueError if it is damaged, cut off, followed by more, or larger."""
    d = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=2**28)
    try:
        raw = d.decompress(data, max_length=limit + 1)
    except (lzma.LZMAError, EOFError) as why:
        raise ValueError(f"LZMA: {why}") from None
    if not d.eof or d.unused_data or len(raw) > limit:
        raise ValueError("the LZMA stream is cut off, has something after it, or is larger than it should be")
    return raw


def unpack(data):
    """(matrices and tensors by name in fp32, model settings) of an artifact's bytes. Raises ValueError if it is damaged."""
    size, digest = struct.unpack("<Q", data[8:16])[0], data[16:48]
    if hashlib.sha256(data[8:16] + data[48:]).digest() != digest:
        raise ValueError("checksum mismatch")
    if size > LIMIT:
        raise ValueError(f"raw size {size}, more than {LIMIT}")
    raw = decompress(data[48:], size)
    length = struct.unpack("<I", raw[:4])[0]
    header, at = json.loads(raw[4:4 + length]), 4 + length

    def take(dtype, shape):
        nonlocal at
        count = math.prod(shape)
        at, start = at + count * np.dtype(dtype).itemsize, at
        return torch.from_numpy(np.frombuffer(raw, dtype, count, start).astype(np.float32).reshape(shape))

    rows = header["tensors"]
    state = {name: take("<i1", shape) for name, kind, shape in rows if kind in LEVELS}
    for name, kind, shape in rows:
        if kind in LEVELS:
            state[name] *= take("<f2", (shape[0], 1))
    for name, kind, shape in rows:
        if kind not in LEVELS:
            state[name] = take({"fp16": "<f2", "fp32": "<f4"}[kind], shape)
    if header["format"] != 1 or at != len(raw):
        raise ValueError(f"format {header['format']}, {len(raw) - at} surplus bytes")
    return state, header["model"]


def unpack_lineage(data):
    """Matrices and tensors by name in fp32 of a lineage final_model.int6.ptz, without executing what is pickled in it."""
    saved = torch.load(BytesIO(decompress(data, LIMIT)), map_location="cpu", weights_only=True)
    state = {}
    for name, meta in saved["m"].items():
        if isinstance(meta, dict):
            scale = saved["w"][name + ".scale"].float()
            state[name] = saved["w"][name + ".q"].float() * scale.view(-1, *[1] * (saved["w"][name + ".q"].dim() - 1))
        else:
            state[name] = saved["w"][name].float()
    return state


def read_artifact(c):
    """(Config with the artifact's model, matrices and tensors by name) from LOAD_ARTIFACT. Raises BadInput."""
    where, path = f"LOAD_ARTIFACT={c.load_artifact}", Path(c.load_artifact)
    try:
        data = path.read_bytes()
        if data[:8] != MAGIC and data[:6] != b"\xfd7zXZ\x00":
            raise ValueError(f"starts with {data[:8]!r}; an artifact of this script starts with {MAGIC!r}, the lineage's are xz files")
        state, settings = unpack(data) if data[:8] == MAGIC else (unpack_lineage(data), {})
    except OSError as why:
        raise BadInput(f"{where}: {why.strerror}; give the path of a final_model.int6.ptz.") from None
    except Exception as why:  # whatever a damaged file makes the readers raise, it is one kind of problem
        raise BadInput(f"{where}: damaged or not an artifact: {str(why)[:200]}. Fetch or export it again.") from None
    clash = [f"{n}={getattr(c, n.lower())}" for n in settings if n.lower() in c.explicit
             and json.loads(json.dumps(getattr(c, n.lower()))) != settings[n]]
    if clash:
        raise BadInput(f"{where}: was made with other settings than {' '.join(clash)}; unset them, the artifact knows its shape.")
    fields = {n.lower(): tuple(v) if isinstance(v, list) else v for n, v in settings.items()}
    c = dataclasses.replace(c, **fields)
    if cross_check(c):
        raise BadInput(f"{where}: " + " ".join(cross_check(c)))
    return c, state


def load_state(model, state, where):
    """Copy matrices and tensors by name into the model. Raises BadInput unless names and shapes are exactly the model's."""
    own = split_banks(model.state_dict(), model.c.num_layers)
    wrong = [f"{n}: {list(state[n].shape) if n in state else 'missing'}, the settings say "
             f"{list(own[n].shape) if n in own else 'no such tensor'}" for n in sorted(own.keys() | state.keys())
             if n not in own or n not in state or own[n].shape != state[n].shape]
    if wrong:
        raise BadInput(f"{where}: does not fit the model settings: {'; '.join(wrong[:4])}{' ...' if wrong[4:] else ''}. Set NUM_LAYERS, "
                       "MODEL_DIM and the others as it was trained.")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def write_file(path, data):
    """Write bytes so that the file is whole or not there."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    part.replace(path)


def export(c, run, model):
    """Rank 0 quantises to the budget and writes the artifact; every rank gets the weights read back from the file."""
    path, state, blob = run.folder / "final_model.int6.ptz", model.state_dict(), b""
    if run.rank == 0:
        began, code = time.perf_counter(), len(Path(__file__).read_bytes())
        buffer = BytesIO()
        torch.save({n: t.cpu() for n, t in state.items()}, buffer)
        write_file(run.folder / "final_model.pt", buffer.getvalue())
        quantizer, floor, target = Quantizer(state, c.num_layers), 0.0, c.artifact_bytes - code
        for _ in range(8):  # entropy tells LZMA's size to 3 %; each round corrects it by what LZMA really took
            blob = quantizer.pack(c, floor)
            if len(blob) + code <= c.artifact_bytes:
                break
            target = quantizer.estimate(floor) * (c.artifact_bytes - code) / len(blob) * 0.9995
            floor = quantizer.fit(target)
        else:
            raise Fault(f"ARTIFACT_BYTES={c.artifact_bytes}: {len(blob)} bytes of weights and {code} of code do not fit; the weights "
                        f"are in {run.folder / 'final_model.pt'}. Train a smaller model or raise the cap.")
        write_file(path, blob)
        counts = {k: sum(t.numel() for n, t in quantizer.state.items() if quantizer.kinds[n] == k) for k in ("int6", "int8", "fp16", "fp32")}
        run.metric("quantised", **counts, step_floor=floor, seconds=time.perf_counter() - began)
        run.log(f"Serialized model: {len(buffer.getvalue())} bytes\nCode size: {code} bytes\nSerialized model int6+lzma: {len(blob)} bytes\n"
                f"Total submission size int6+lzma: {len(blob) + code} bytes")
        run.metric("artifact", model_bytes=len(blob), code_bytes=code, total_bytes=len(blob) + code)
        blob = path.read_bytes()
    if run.world > 1:
        size = torch.tensor(len(blob), device=run.device)
        dist.broadcast(size, 0)
        data = torch.frombuffer(bytearray(blob or bytes(size.item())), dtype=torch.uint8).to(run.device)
        dist.broadcast(data, 0)
        blob = data.cpu().numpy().tobytes()
    load_state(model, unpack(blob)[0], str(path))


# --------------------------------------------------------------------------------------------------------- scoring core
# Every evaluator goes through score(): it plans windows, scores each target of the stream exactly once into one array of
# nats [N], shared out over ranks by whole batches, and sums that array once, in order, in fp64.


def plan_windows(n, window, stride):
    """(start, first scored row) of each window over n targets, int64 arrays, so that targets are scored once and in order.

    The first window scores all its rows, each later one its last `stride`; the last is moved back to end at target n.
    Window k scores targets start+first to start+window-1. Raises ValueError if stride does not fit or n is too small.
    """
    if not 1 <= stride <= window <= n:
        raise ValueError(f"need 1 <= stride {stride} <= window {window} <= targets {n}")
    ends = np.minimum(np.arange(window, n + stride, stride), n)
    starts = ends - window
    return starts, np.concatenate([[0], ends[:-1]]) - starts


def token_nll(model, logits, targets):
    """Nats [R] of targets [R] under logits before the cap [R,V]."""
    return F.cross_entropy(model.cap(logits), targets, reduction="none")


def plain_nll(c, model, h, targets, rows):
    """Nats [R] fp32 of the rows (flat indices into B*T) of hidden states h [B,T,D]; only these go through the head."""
    h, targets = h.flatten(0, 1), targets.flatten()
    return torch.cat([token_nll(model, model.project(h[r]), targets[r]) for r in rows.split(16384)])


def slot_nll(c, model, h, targets, rows):
    """As plain_nll after SLOT (arXiv:2505.12392, #1084): one delta [D], added to all hidden states of the batch, fitted by
    AdamW (eps 1e-5, weight decay 1e-8) to the cross entropy of all positions but the last of each window.

    In closed form: logits of h + delta are base logits + W delta, so the base is computed once, and the gradient of delta
    is W' times the column sum of the logits' gradient. Not causal: the loss holds the targets that are scored.
    """
    weight = model.head_weight().float()
    base, goal = model.project(h[:, :-1]).flatten(0, 1), targets[:, :-1].flatten()
    delta, m, v = (torch.zeros(h.size(-1), device=h.device) for _ in range(3))
    for step in range(1, c.slot_steps + 1):
        shift, columns = weight @ delta, torch.zeros(len(weight), device=h.device)
        for z, y in zip(base.split(4096), goal.split(4096)):  # tiles that stay in the cache
            capped = model.cap(z + shift)
            g = capped.softmax(-1)
            g.scatter_add_(1, y[:, None], g.new_full((len(y), 1), -1.0))
            columns += (g * (1 - (capped / c.logit_softcap).square())).sum(0)
        grad = weight.mT @ columns / len(goal)
        m.lerp_(grad, 0.1)
        v.lerp_(grad.square(), 0.001)
        delta = delta * (1 - c.slot_lr * 1e-8)
        delta -= c.slot_lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-5)
    h, targets, shift = h.flatten(0, 1), targets.flatten(), weight @ delta
    return torch.cat([token_nll(model, model.project(h[r]) + shift, targets[r]) for r in rows.split(16384)])


# ----------------------------------------------------------------------------------------------------------- evaluators
# A row each: which setting is the stride, whether the weights are trained on a chunk after it is scored, and how hidden
# states become nats. Rows with the same stride and training share a pass: TTT with and without SLOT costs one TTT.

Evaluator = namedtuple("Evaluator", "stride ttt nll")
EVALUATORS = {
    "roundtrip": Evaluator("eval_seq_len", False, plain_nll),
    "sliding_window": Evaluator("eval_stride", False, plain_nll),
    "ttt": Evaluator("eval_stride", True, plain_nll),
    "ttt_slot": Evaluator("eval_stride", True, slot_nll),
    "slot": Evaluator("eval_stride", False, slot_nll),
}


def broken_conditions(label):
    """Which of the conditions C1 to C4 (challenge issue #1017) an evaluator breaks, "" if it is causal; from its row."""
    return "C1" if EVALUATORS[label].nll is slot_nll else ""


class ChunkTrainer:
    """Score-first test-time training (#549): SGD on a chunk of the stream that has been scored."""

    def __init__(self, c, run, model):
        self.c, self.run, self.model, self.params = c, run, model, list(model.parameters())
        self.sgd = torch.optim.SGD(self.params, lr=c.ttt_lr, momentum=c.ttt_momentum)
        self.frozen = []  # (parameter, indices along its first axis) of the first TTT_FREEZE_BLOCKS blocks
        for name, p in model.named_parameters():
            names = bank_matrices(name, c.num_layers) if name in BANKS else [name] * len(p) if name.startswith("blocks.") else []
            rows = [i for i, n in enumerate(names) if int(n.split(".")[1]) < c.ttt_freeze_blocks]
            if rows:
                self.frozen.append((p, rows))

    def train(self, tokens, begin, end, rate):
        """TTT_EPOCHS passes over targets begin to end, each once a pass, in windows of EVAL_SEQ_LEN; if the chunk is no
        multiple of that, the last window reaches back and counts only what no other has."""
        T, size = self.c.eval_seq_len, self.c.ttt_batch_seqs
        starts = np.minimum(np.arange(begin, end, T), end - T)
        skip = np.arange(begin, end, T) - starts
        index = torch.from_numpy(starts[:, None] + np.arange(T + 1)).to(tokens.device)
        rows = tokens[index]
        inputs, targets = rows[:, :-1], rows[:, 1:].clone()
        targets[-1, :skip[-1]] = -100
        self.sgd.param_groups[0]["lr"] = rate
        for _ in range(self.c.ttt_epochs):
            for i in range(0, len(rows), size):
                mine = slice(i + self.run.rank, i + size, self.run.world)
                self.step(inputs[mine], targets[mine], int((targets[i:i + size] >= 0).sum()))

    def step(self, inputs, targets, count):
        """One SGD step on the mean over count targets, which the ranks hold together; a rank may have none."""
        self.model.zero_grad(set_to_none=False)
        if len(inputs):
            (self.model(inputs, targets, "sum") / count).backward()
        grads = [p.grad for p in self.params]
        if self.run.world > 1:
            flat = self.run.sum(torch.cat([g.reshape(-1) for g in grads]))
            torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads)])
        for p, rows in self.frozen:
            p.grad[rows] = 0
        if self.c.ttt_grad_clip:
            nn.utils.clip_grad_norm_(self.params, self.c.ttt_grad_clip)
        self.sgd.step()


def score_batch(c, run, model, val, starts, firsts, pad_to, methods, out):
    """Score windows [B] with each method into out [K+1,N]: nats of method k in row k, how often scored in the last."""
    T, n = c.eval_seq_len, len(starts)
    index = starts[:, None] + np.arange(T + 1)
    rows = np.flatnonzero(np.arange(T) >= firsts[:, None])  # the scored ones, flat into [B,T]
    at = torch.from_numpy(index[:, :-1].ravel()[rows]).to(run.device)
    if run.compile:  # whole batches only, so that there is one compiled shape
        index = index[np.minimum(np.arange(pad_to), n - 1)]
    tokens = val.tokens[torch.from_numpy(index).to(run.device)]
    h, rows = model.hidden(tokens[:, :-1])[:n], torch.from_numpy(rows).to(run.device)
    seconds = []
    for k, method in enumerate(methods):
        run.synchronize()
        began = time.perf_counter()
        out[k, at] = method(c, model, h, tokens[:n, 1:], rows)
        run.synchronize()
        seconds.append(time.perf_counter() - began)
    out[-1, at] += 1
    return seconds


def score(c, run, model, val, labels):
    """label -> (nats of every target [N] fp32, seconds) for evaluators that share a pass. Raises Fault unless each target was
    scored exactly once (C4)."""
    row, T, began, shown = EVALUATORS[labels[0]], c.eval_seq_len, time.perf_counter(), time.perf_counter()
    methods = [EVALUATORS[label].nll for label in labels]
    size = c.slot_batch_seqs if slot_nll in methods else max(1, c.val_batch_size // (T * run.world))
    starts, firsts = plan_windows(val.n, T, getattr(c, row.stride))
    chunk = (starts + firsts) // c.ttt_chunk_tokens if row.ttt else np.zeros_like(starts)  # of its first scored target
    out = torch.zeros(len(labels) + 1, val.n, device=run.device)
    spent, chunks, trainer = np.zeros(len(labels)), int(chunk[-1]) + 1, ChunkTrainer(c, run, model) if row.ttt else None
    for i in range(chunks):
        begin, end = np.searchsorted(chunk, [i, i + 1])
        batches = [slice(b, min(b + size, end)) for b in range(begin, end, size)]
        with torch.no_grad():
            for b in batches[run.rank::run.world]:
                spent += score_batch(c, run, model, val, starts[b], firsts[b], size, methods, out)
                if time.perf_counter() - shown > 3:
                    shown = time.perf_counter()
                    run.log(f"progress:{'+'.join(labels)} window:{b.stop}/{len(starts)} chunk:{i + 1}/{chunks} time:{shown - began:.1f}s")
        if row.ttt and i + 1 < chunks:
            trainer.train(val.tokens, i * c.ttt_chunk_tokens, (i + 1) * c.ttt_chunk_tokens, ttt_lr(c, i, chunks))
    run.sum(out)
    if not bool((out[-1] == 1).all()):
        raise Fault(f"{labels}: {int((out[-1] != 1).sum())} of {val.n} targets were not scored exactly once")
    total = time.perf_counter() - began
    return {label: (out[k], total - spent.sum() + spent[k]) for k, label in enumerate(labels)}


def mean_and_bpb(val, nats):
    """(nats a token, bits a byte) of nats [N]."""
    loss = nats.double().mean().item()
    return loss, loss / math.log(2) * val.n / int(val.bytes.sum())


def evaluate(c, run, model, val, weights, labels):
    """Run evaluators on the weights the model holds, which it gets back, and log a result line for each."""
    kept, passes = [p.detach().clone() for p in model.parameters()], {}
    for label in labels:
        passes.setdefault(EVALUATORS[label][:2], []).append(label)
    for group in passes.values():
        for label, (nats, seconds) in score(c, run, model, val, group).items():
            loss, bpb = mean_and_bpb(val, nats)
            broken = broken_conditions(label)
            run.metric(f"final_{weights}_{label}", val_loss=loss, val_bpb=bpb, tokens=val.n, bytes=int(val.bytes.sum()),
                       causal=not broken, eval_time=1000 * seconds, **({"breaks": broken} if broken else {}))
            if c.save_nll and run.rank == 0:
                buffer = BytesIO()
                np.save(buffer, nats.double().cpu().numpy())
                write_file(run.folder / f"nll_{label if weights == 'int6' else weights + '_' + label}.npy", buffer.getvalue())
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), kept)


# ------------------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def quantize_banks(banks, on):
    """Put what the export would make of them into the banks and return copies to put back; () if not on. The gradient at
    the quantised weights then updates the originals: a straight-through estimator that costs no recompilation."""
    kept = [bank.clone() for bank in banks if on]
    for bank in banks if on else ():
        scale = row_scales(bank, LEVELS["int6"])
        bank.copy_((bank / scale).round_().clamp_(-31, 31).mul_(scale))
    return kept


def train_step(c, run, model, optimizer, batch, step, scale):
    """(mean loss, gradient norm) as device tensors, after one optimiser step on this rank's sequences of the batch."""
    qat = c.late_qat and scale < c.late_qat_threshold
    kept = quantize_banks(optimizer.banks, qat)
    limit = 98304 if run.device.type == "cuda" else 32768  # tokens of a micro-batch: what 8 GPUs take at once in the record
    per_rank, total = len(batch[0]), torch.zeros((), device=run.device)
    micro = next(n for n in range(1, per_rank + 1) if per_rank % n == 0 and (per_rank // n * c.train_seq_len <= limit or n == per_rank))
    for ids, targets in zip(batch[0].chunk(micro), batch[1].chunk(micro)):
        loss = model(ids, targets) / micro
        loss.backward()
        total += loss.detach()
    if kept:
        with torch.no_grad():
            torch._foreach_copy_(optimizer.banks, kept)
    loss, norm = optimizer.step(total, scale, muon_momentum(c, step))
    model.zero_grad(set_to_none=True)
    return loss, norm


def prime(c, run, model, data):
    """Make torch.compile do its work before the clock starts: WARMUP_STEPS steps that leave no trace."""
    kept, optimizer, feed = [p.detach().clone() for p in model.parameters()], Optimizer(c, run, model), data.batches(0)
    for step in range(c.warmup_steps):
        train_step(c, run, model, optimizer, next(feed), step, 1.0)
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), kept)
    run.log(f"primed torch.compile with {c.warmup_steps} steps, weights and data position restored")


def train(c, run, model, data, val):
    """Train the model in place, put the best average into it, and log the way there."""
    if run.compile and c.warmup_steps:
        prime(c, run, model, data)
    optimizer, averages, feed = Optimizer(c, run, model), Averages(c, model.parameters()), data.batches(0)
    first_bad = torch.full((), c.iterations + 1, device=run.device)
    clock, cap, qat = Clock(run), 1000 * c.max_wallclock_seconds, False
    clock.resume()
    for step in range(c.iterations + 1):
        elapsed, fresh = clock.agreed(step)
        if (fresh or step == c.iterations) and first_bad.item() <= step:
            raise Fault(f"step {first_bad.item()}: loss or gradient is not finite; lower MATRIX_LR, TIED_EMBED_LR, SCALAR_LR or check the data.")
        # keep the time of two steps for comparing the averages, which belongs to training
        last = step == c.iterations or bool(cap) and step > 0 and elapsed + 2 * clock.step_ms >= cap
        if last or c.val_loss_every and step % c.val_loss_every == 0:
            clock.pause()
            loss, bpb = mean_and_bpb(val, score(c, run, model, val, ["roundtrip"])["roundtrip"][0])
            run.metric(f"step:{step}/{c.iterations}", 4, val_loss=loss, val_bpb=bpb, train_time=clock.ms, step_avg=clock.ms / max(step, 1))
            clock.resume()
        if last:
            break
        scale = lr_scale(c, step, elapsed, clock.step_ms)
        if not qat and c.late_qat and scale < c.late_qat_threshold:
            qat = True
            run.log(f"late_qat:on step:{step} lr_scale:{scale:.4f}")
        loss, norm = train_step(c, run, model, optimizer, next(feed), step, scale)
        averages.update(scale)
        first_bad = torch.where(torch.isfinite(loss + norm), first_bad, first_bad.clamp(max=step + 1))
        if step < 10 or (step + 1) % c.train_log_every == 0:
            value, ms = loss.item(), clock.now()
            run.metric(f"step:{step + 1}/{c.iterations}", 4, train_loss=value, train_time=ms, step_avg=ms / (step + 1))
    if step < c.iterations:
        run.log(f"stopping_early: wallclock_cap train_time:{clock.now():.0f}ms step:{step}/{c.iterations}")
    choose_average(c, run, model, data, averages)
    clock.pause()
    run.metric("training", train_time=clock.ms, tokens=step * c.train_batch_tokens, steps=step)
    if run.device.type == "cuda":
        run.log(f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB")


# ----------------------------------------------------------------------------------------------------------------- main


def run_all(c):
    """Check everything, then train (or load), export, evaluate."""
    if c.load_artifact:
        c, state = read_artifact(c)
    run = Run(c)
    if not c.load_artifact and c.train_batch_tokens % (run.world * c.train_seq_len):
        raise BadInput(f"TRAIN_BATCH_TOKENS={c.train_batch_tokens}: cannot be split evenly over {run.world} ranks in sequences of "
                       f"TRAIN_SEQ_LEN={c.train_seq_len}; take a multiple of {run.world * c.train_seq_len}.")
    backend, attention = choose_attention(c.attention, run.device)
    val, data = ValData(c, run), None if c.load_artifact else TrainData(c, run)
    model = GPT(c, run.dtype, attention)
    if c.load_artifact:
        load_state(model, state, f"LOAD_ARTIFACT={c.load_artifact}")
    run.start(c)
    if run.world > 1:
        dist.init_process_group("nccl" if run.device.type == "cuda" else "gloo")
    model.to(run.device)
    if run.compile:
        model.hidden = torch.compile(model.hidden, dynamic=False)
    run.log(f"model_params:{sum(p.numel() for p in model.parameters())} attention:{backend} val_targets:{val.n} (the last {val.dropped} of "
            f"the split fill no window) val_bytes:{val.bytes.sum()}")
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
    if run.world > 1:
        dist.destroy_process_group()


def main():
    """Run with settings from the environment. Exit status: 0 done, 1 fault, 2 bad input."""
    try:
        run_all(load_config(os.environ))
    except (BadInput, Fault) as problem:
        print(f"error: {problem}", file=sys.stderr, flush=True)
        os._exit(2 if isinstance(problem, BadInput) else 1)  # at once: other ranks may wait in a collective that never ends


if __name__ == "__main__":
    main()
