"""Parameter Golf, the SLOT record (#1084), in one file: train, average, quantise, evaluate.

A GPT of 11 layers learns web text in ten minutes on 8 GPUs. What it exports, with the packed copy
of this file, is under 16,000,000 bytes. Its score is bits per byte (bpb) on text it has not seen.

  torchrun --standalone --nproc_per_node=8 train_gpt.py    the record run; =1 on one GPU
  PRESET=pr1313 torchrun ... train_gpt.py                  another published system
  PRESET=demo python train_gpt.py                          a small run for a CPU (make demo)
  python train_gpt.py SLOT_ENABLED=0                       a setting as an argument, not a variable
  LOAD_ARTIFACT=logs/ID/final_model.ptz ...                evaluate an artifact, without training
  RUN_ID=... RESUME=1 torchrun ... train_gpt.py            go on with a run that was stopped
  python train_gpt.py --help [family]                      settings: all, or those of slot, ttt ...
  python train_gpt.py --pack [PATH]                        write the packed copy that is shipped

The sections, each after those that it builds on:

   1 this            2 settings         3 command line        4 files          5 ranks, log, store
   6 data            7 model            8 optimiser           9 schedules     10 quantisation
  11 averages       12 scoring core    13 scoring methods    14 evaluators    15 late QAT
  16 training       17 main

Shapes: B batch, T sequence, D model width, V vocabulary, L layers, H query heads, K key/value
heads, d width of a head, R last rows of a sequence, S scored targets of a batch, N targets of the
validation stream, G groups of rows that share a SLOT delta, P numbers in it, W ranks.

Words: a target is a token that is predicted. A window is EVAL_SEQ_LEN inputs with their targets, of
which the last EVAL_STRIDE are scored and the others are context. A chunk is what test-time training
(TTT) learns from after it was scored. A bank is one tensor with one or two matrices of each layer.
An artifact is the file of quantised weights, a checkpoint what training goes on from. C1 to C4 are
the challenge's conditions on scoring: a probability depends on the past alone (C1), probabilities
sum to 1 (C2), nothing is fitted to a target before it was scored (C3), each target is scored once
(C4); broken_conditions(), in section 13, says which an evaluator breaks. "The lineage" is the
scripts of #549, #1084 and #1313; "#N" is a pull request or issue of the challenge's repository,
openai/parameter-golf.
"""

import ast
import contextlib
import ctypes
import dataclasses
import difflib
import functools
import hashlib
import importlib
import json
import lzma
import math
import os
import re
import signal
import sys
import threading
import typing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from itertools import chain, pairwise
from pathlib import Path
from threading import Thread
from time import perf_counter, sleep, strftime
from typing import Any, ClassVar, Literal, NamedTuple

# ==================================================================================================
# 2. Settings
#
# One table is parser, bounds check and help text: the fields of Config. Each is an environment
# variable of the same name in capitals, or an argument NAME=value, which wins. The section stands
# before the import of torch, for which --help does not wait.
# ==================================================================================================


class BadInput(Exception):
    """An unusable setting, file or argument."""

    status = 2  # the exit status


class Fault(Exception):
    """Something went wrong on the way."""

    status = 1


def in_lines(told: str) -> str:
    """Problems as they are told: a line of over 160 characters is cut after what is wrong.

    What to do is then a second line, indented. A problem is written so: WHAT; WHAT TO DO.
    """
    return re.sub(r"(?m)^(?=.{161})(.*?[.;]) ", r"\1\n  ", told)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """How an evaluation scores the validation stream; a row of EVALUATORS."""

    method: str  # name of the ScoringMethod that turns hidden states into nats
    sliding: bool = True  # overlapping windows; else disjoint ones
    ttt: bool = False  # trains on each chunk after it was scored
    switch: str = ""  # setting that its method needs on
    mixes: bool = False  # scores nothing itself: a mixture of the evaluators named before it

    def needs(self) -> set[str]:
        """Settings that must be on for it."""
        return {name for name in (self.switch, "ttt_enabled" if self.ttt else "") if name}


EVALUATORS = {
    "roundtrip": Evaluator("Plain", sliding=False),
    "sliding_window": Evaluator("Plain"),
    "ttt": Evaluator("Plain", ttt=True),
    "ttt_slot": Evaluator("Slot", ttt=True, switch="slot_enabled"),
    "slot": Evaluator("Slot", switch="slot_enabled"),
    "ttt_ctw": Evaluator("Ctw", ttt=True, switch="ctw_weight"),
    "ctw": Evaluator("Ctw", switch="ctw_weight"),
    "mix": Evaluator("", mixes=True),
}


def setting(
    default: Any,
    text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    in_artifact: bool = False,
) -> Any:
    """A field of Config: its default, help, bounds, and whether an artifact carries it."""
    metadata = dict(text=text, low=low, high=high, in_artifact=in_artifact)
    return dataclasses.field(default=default, metadata=metadata)


MAX_INT = 10**9
CARRIED = ("past", "recent")  # values of SLOT_LOSS with which a fit goes on from the last one


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run; the defaults are #1084's record.

    Integers are from 0 to MAX_INT and numbers from 0 to 100 unless low and high say otherwise.
    """

    # ---- the run
    preset: tuple[str, ...] = setting(
        ("pr1084",),
        "Comma list, later ones win: a published system; best, what helped its followers; demo, a"
        " small run for a CPU.",
    )
    run_id: str = setting(
        "", "NAME or FOLDER/NAME of the log and folder in logs/, new; empty: date, time, seed."
    )
    seed: int = setting(1337, "Seed of initial weights and data order.", high=2**31 - 1)
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "auto: cuda if there is a GPU for it, else cpu."
    )
    compile: Literal["auto", "0", "1"] = setting("auto", "torch.compile; auto: on a GPU.")
    dtype: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "Of products and hidden states; auto: bf16 on a GPU, fp32 on a CPU."
    )
    attention: Literal["auto", "fa3", "fa4", "sdpa"] = setting(
        "auto",
        "FlashAttention-3, -4 or torch's SDPA; auto: FlashAttention-3 where it is, else SDPA.",
    )
    load_artifact: str = setting(
        "", "Evaluate this artifact, ours or the lineage's, without training."
    )
    load_checkpoint: str = setting(
        "",
        "Path of a checkpoint.STEP.ckpt to begin with; with ITERATIONS=STEP it is only averaged and"
        " exported anew.",
    )
    evals: tuple[str, ...] = setting(
        ("auto",),
        "Comma list, or none; auto: roundtrip, sliding_window and what TTT, SLOT and CTW ask for.",
    )
    save_every: int = setting(
        500, "Steps between checkpoints; 0: only at the end and on a signal, in evaluation too."
    )
    resume: bool = setting(False, "Go on with RUN_ID from its last checkpoint.")
    save_nll: bool = setting(
        False, "Write nll_<evaluator>.npy: float64 nats of each target in stream order."
    )

    # ---- data and batches
    data_path: str = setting(
        "./data/datasets/fineweb10B_sp1024", "Folder of fineweb_train_*.bin and fineweb_val_*.bin."
    )
    tokenizer_path: str = setting(
        "./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model of the shards."
    )
    train_batch_tokens: int = setting(
        786432, "Tokens of a training step over all ranks.", low=1, high=2 * 10**9
    )
    val_batch_size: int = setting(
        524288, "Tokens of an evaluation forward over all ranks.", low=1, high=2 * 10**9
    )
    val_loss_every: int = setting(4000, "Steps between validations; 0: only at the end.")
    train_log_every: int = setting(
        500, "Steps between training lines, after ten; slow steps get more of them.", low=1
    )
    data_order: Literal["shuffled", "coprime", "shards"] = setting(
        "shuffled",
        "Sequences of an epoch: a permutation; steps of a stride coprime to their number; or such"
        " strides in 8, later 32 shards a step (#1060).",
    )
    documents: Literal["joined", "mask"] = setting(
        "joined",
        "mask: attention, smear gate and bigram hash stay inside a document, in training and"
        " evaluation; an artifact does not know it.",
    )

    # ---- length of training
    iterations: int = setting(9000, "Training steps, at most.", low=1)
    max_wallclock_seconds: float = setting(
        600.0, "Training time, at most; 0: no cap.", high=MAX_INT
    )
    warmup_steps: int = setting(
        20,
        "Steps before the clock starts, on a GPU or compiled, of which no trace stays: they measure"
        " what a step and the end of training take.",
    )
    warmdown_iters: int = setting(3500, "Steps, or their time, in which rates fall to MIN_LR.")
    warmdown_frac: float = setting(
        0.0,
        "Share of the run, under a cap of its time, in which rates fall to MIN_LR; 0:"
        " WARMDOWN_ITERS.",
        high=1,
    )
    min_lr: float = setting(0.0, "Lowest factor on rates, at the end of the warmdown.", high=1)

    # ---- model
    train_seq_len: int = setting(
        2048, "Tokens of a training sequence.", low=2, high=10**6, in_artifact=True
    )
    vocab_size: int = setting(
        1024, "Vocabulary; must be the tokenizer's.", low=2, high=65536, in_artifact=True
    )
    num_layers: int = setting(11, "Transformer blocks.", low=1, high=1000, in_artifact=True)
    model_dim: int = setting(
        512, "Width of the residual stream.", low=2, high=65536, in_artifact=True
    )
    num_heads: int = setting(
        8, "Query heads, a multiple of the key/value heads.", low=1, high=1024, in_artifact=True
    )
    num_kv_heads: int = setting(
        4, "Key/value heads (grouped-query attention, GQA).", low=1, high=1024, in_artifact=True
    )
    mlp_mult: float = setting(3.0, "MLP width over MODEL_DIM.", low=0.01, high=64, in_artifact=True)
    tie_embeddings: bool = setting(
        True, "The token embedding is the output head too.", in_artifact=True
    )
    logit_softcap: float = setting(
        30.0, "Logits are cap * tanh(z / cap).", low=0.01, high=1000, in_artifact=True
    )
    rope_base: float = setting(
        10000.0,
        "Base of the rotary position embedding (RoPE).",
        low=1,
        high=10**12,
        in_artifact=True,
    )
    rope_dims: int = setting(16, "Rotated dimensions of a head; 0: all.", in_artifact=True)
    rope_train_len: int = setting(
        1024, "A longer TRAIN_SEQ_LEN rescales ROPE_BASE.", low=1, high=10**6, in_artifact=True
    )
    ln_scale: bool = setting(True, "Scale the inputs of block i by 1/sqrt(i+1).", in_artifact=True)
    xsa_last_n: int = setting(
        4, "Last layers with exclusive self attention (XSA).", in_artifact=True
    )
    parallel_last_n: int = setting(
        0, "Last layers whose MLP reads attention's input, not its output.", in_artifact=True
    )
    vrl_enabled: bool = setting(
        False, "Value residual (1-g) v + g v_first, g learned.", in_artifact=True
    )
    value_residual: bool = setting(
        False, "Value residual a v_first + b v, a and b learned.", in_artifact=True
    )
    gated_attention: bool = setting(False, "Learned sigmoid gates on heads.", in_artifact=True)
    parallel_start_layer: int = setting(
        0,
        "Attention and MLP have a lane each from this layer on, in the second half (#1435); 0: no"
        " lanes.",
        in_artifact=True,
    )
    skip_gates_enabled: bool = setting(
        False, "Skips (1-g) skip + g x instead of x + skip, g learned (#1435).", in_artifact=True
    )
    recur_layers: tuple[int, ...] = setting(
        (), "Layers, from 0, that run RECUR_LOOPS times.", in_artifact=True
    )
    recur_style: Literal["own", "shared", "gated"] = setting(
        "own",
        "own: again after the last of them, with vectors of each run's own (#686); shared: with the"
        " same ones (#1435); gated: each again at once (#1278).",
        in_artifact=True,
    )
    recur_loops: int = setting(2, "How often RECUR_LAYERS run.", low=2, high=8, in_artifact=True)
    recur_start: int = setting(
        3000, "Step from which RECUR_LAYERS run more than once.", in_artifact=True
    )
    prequant_ttt_enabled: bool = setting(
        False, "Train on validation tokens before quantising (#1488). Breaks C3.", in_artifact=True
    )
    bigram_vocab_size: int = setting(
        1536, "Buckets of the bigram hash embedding; 0: none.", high=2**24, in_artifact=True
    )
    bigram_dim: int = setting(
        128, "Width of the bigram table.", low=1, high=65536, in_artifact=True
    )
    ve_enabled: bool = setting(True, "Value embedding (VE), added to values.", in_artifact=True)
    ve_dim: int = setting(
        128, "Width of the value embedding's table.", low=1, high=65536, in_artifact=True
    )
    ve_layers: tuple[int, ...] = setting(
        (9, 10), "Layers, from 0, that get the value embedding.", in_artifact=True
    )
    tied_embed_init_std: float = setting(
        0.005, "Initial deviation of the token embedding, if tied.", high=10
    )
    qk_gain_init: float = setting(1.5, "Initial gain of a query head.")

    # ---- optimiser
    matrix_lr: float = setting(0.025, "Muon's rate, for the matrices.")
    tied_embed_lr: float = setting(
        0.035, "AdamW's rate for embeddings, those of bigrams and values too, if tied."
    )
    embed_lr: float = setting(0.6, "AdamW's rate for all embeddings, if untied.")
    head_lr: float = setting(0.008, "AdamW's rate for an untied head.")
    scalar_lr: float = setting(0.025, "AdamW's rate for the rest.")
    muon_momentum: float = setting(0.99, "Muon's Nesterov momentum, in the end.", high=0.99999)
    muon_momentum_warmup_start: float = setting(0.92, "Muon's momentum, at first.", high=0.99999)
    muon_momentum_warmup_steps: int = setting(
        1500, "Steps from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM."
    )
    muon_backend_steps: int = setting(5, "Newton-Schulz steps.", low=1, high=100)
    newton_schulz: Literal["quintic", "polar_express"] = setting(
        "quintic", "Newton-Schulz coefficients: Muon's, or Polar Express's (arXiv:2505.16932)."
    )
    muon_row_norm: bool = setting(
        False, "Give a gradient's rows equal norms before Newton-Schulz (MuonEq-R)."
    )
    muon_projections: bool = setting(
        False, "Muon, not AdamW, trains the projections of bigram and value embedding (#1435)."
    )
    muon_wd: float = setting(0.04, "Decoupled weight decay of Muon.")
    adam_wd: float = setting(0.04, "Decoupled weight decay of AdamW.")
    embed_wd: float = setting(
        -1.0, "That of the token, bigram and value embeddings' tables; -1: ADAM_WD.", low=-1
    )
    beta1: float = setting(0.9, "AdamW's decay of the gradient's mean.", high=0.99999)
    beta2: float = setting(0.95, "AdamW's decay of the mean square.", high=0.99999)
    adam_eps: float = setting(1e-8, "AdamW's epsilon.", low=1e-30, high=1)
    grad_clip_norm: float = setting(
        0.3, "Cap on the reduced gradient's norm; 0: none.", high=MAX_INT
    )

    # ---- averages, late QAT, export
    ema_enabled: bool = setting(
        True, "Exponential moving average (EMA) of the weights, a candidate for the export."
    )
    ema_decay: float = setting(
        0.997, "Decay of the EMA; after n steps min(EMA_DECAY, (1+n)/(10+n)).", high=0.999999
    )
    swa_enabled: bool = setting(
        True, "Mean of weights while rates are under 0.2 of full (SWA), another candidate."
    )
    swa_every: int = setting(50, "Steps between SWA's snapshots.", low=1)
    lawa_enabled: bool = setting(
        False, "Mean of the last LAWA_K snapshots (LAWA), a third candidate."
    )
    lawa_k: int = setting(10, "Snapshots in LAWA's mean.", low=1)
    lawa_freq: int = setting(100, "Steps between LAWA's snapshots.", low=1)
    average: Literal["auto", "ema", "swa", "lawa", "none"] = setting(
        "auto", "What is exported; auto: what loses least on held-out training text, quantised."
    )
    late_qat: bool = setting(
        True, "Straight-through training on the export's grid (quantisation-aware, QAT)."
    )
    late_qat_threshold: float = setting(
        0.15, "Factor on rates under which late QAT begins.", high=1
    )
    quant: Literal["rd", "gptq", "gptq_lite"] = setting(
        "rd",
        "Steps by what errors cost (rate-distortion); with GPTQ's error feedback; or #549's"
        " percentiles.",
    )
    calibration: Literal["train", "validation"] = setting(
        "train",
        "Split that tells QUANT=gptq what errors cost; validation (#1498) breaks C3.",
        in_artifact=True,
    )
    calibration_tokens: int = setting(32768, "Tokens that say what errors cost.", low=1)
    coder: Literal["rans", "lzma"] = setting("rans", "Entropy coder of levels.")
    artifact_bytes: int = setting(
        16_000_000, "Cap on artifact plus code; steps widen to fit.", low=1000, high=10**12
    )
    prequant_ttt_lr: float = setting(
        0.00045, "Rate of pre-quantisation TTT's AdamW, cosine to a tenth."
    )
    prequant_ttt_epochs: int = setting(
        10, "Passes of pre-quantisation TTT over the validation tokens.", low=1, high=1000
    )
    prequant_ttt_freeze_blocks: int = setting(
        1, "First blocks that pre-quantisation TTT leaves alone."
    )

    # ---- evaluation
    eval_seq_len: int = setting(2048, "Tokens of an evaluation window.", low=2, high=10**6)
    eval_stride: int = setting(64, "Targets that a sliding window adds.", low=1, high=10**6)
    ttt_enabled: bool = setting(True, "Score-first test-time training (TTT).")
    ttt_lr: float = setting(
        0.002, "TTT's rate, cosine to 0 over chunks; with TTT_PARAMS=lora constant."
    )
    ttt_epochs: int = setting(3, "TTT's passes over a scored chunk.")
    ttt_chunk_tokens: int = setting(
        32768, "Targets of a chunk, after which TTT and CTW learn.", low=1, high=2 * 10**9
    )
    ttt_freeze_blocks: int = setting(0, "First blocks that TTT leaves alone.")
    ttt_momentum: float = setting(0.9, "TTT's momentum of SGD.", high=0.99999)
    ttt_batch_seqs: int = setting(32, "Sequences of a TTT step over all ranks.", low=1, high=10**6)
    ttt_params: Literal["all", "control", "lora"] = setting(
        "all",
        "What TTT trains; control: scales, mixes, gates, gains and skips alone (#1518); lora:"
        " low-rank factors, new ones for each document (#1530).",
    )
    ttt_optimizer: Literal["sgd", "adamw", "rmsprop"] = setting(
        "sgd", "TTT's optimiser; its state goes on from chunk to chunk."
    )
    ttt_lora_rank: int = setting(4, "Rank of lora's factors.", low=1, high=MAX_INT)
    ttt_lora_alpha: float = setting(
        8.0, "The product of lora's factors is times this / TTT_LORA_RANK."
    )
    ttt_lora_wd: float = setting(0.0, "Weight decay of lora's factors: TTT_LR * this a step.")
    ttt_lora_chunk: int = setting(
        64, "Targets of a document after which lora's factors learn.", low=1, high=10**6
    )
    ttt_phases: int = setting(
        1,
        "Equal parts of the stream; with lora all weights learn from the documents that start in"
        " one, after it, in one pass of SGD (#1610).",
        low=1,
        high=MAX_INT,
    )
    ttt_phase_lr: float = setting(0.001, "Rate of that SGD.")
    ttt_grad_clip: float = setting(1.0, "Cap on the norm of TTT's gradient; 0: none.", high=MAX_INT)
    slot_enabled: bool = setting(True, "SLOT, in TTT's scoring with TTT_ENABLED=1.")
    slot_delta: Literal["shared", "window"] = setting(
        "shared", "One delta for a batch, or one a window."
    )
    slot_bias: bool = setting(False, "Fit a bias on the logits too.")
    slot_loss: Literal["all", "scored", "context", "past", "recent"] = setting(
        "all",
        "Fit to all targets; to those scored; to those scored before; or carry it on: past, fit to"
        " what it scored; recent, to all of a window, once it is scored.",
    )
    slot_steps: int = setting(3, "AdamW steps of a fit.", low=1, high=1000)
    slot_lr: float = setting(0.001, "AdamW's rate in the first step of a fit.", low=1e-6)
    slot_lr_min: float = setting(-1.0, "Rate of the last step, by a cosine; -1: SLOT_LR.", low=-1)
    slot_hyper_lr: float = setting(
        0.0, "Hypergradient (arXiv:2502.11229): rates move by this * (gradient . last gradient)."
    )
    slot_decay: float = setting(
        0.0,
        "Share of what is carried (SLOT_LOSS=past, recent) that each fit forgets.",
        high=0.999999,
    )
    slot_reset: Literal["none", "document"] = setting(
        "none",
        "document: after a window in which a document begins, what is carried starts from the mean"
        " of what it was at earlier documents' ends.",
    )
    slot_batch_seqs: int = setting(
        32, "Consecutive windows of a batch, which share a delta.", low=1, high=10**6
    )
    ctw_weight: float = setting(
        0.0,
        "Weight of context tree weighting (CTW) at the entropy ln V, in proportion below; 0: off.",
        high=1,
    )
    ctw_depth: int = setting(4, "Tokens of CTW's longest context.", high=64)
    ctw_entropy_threshold: float = setting(
        2.0, "CTW is mixed in where the model's entropy is above this, in nats."
    )

    mix_block: int = setting(
        256, "Scored targets after which EVALS=...,mix shares weight out.", low=1, high=10**9
    )
    mix_share: float = setting(
        0.01, "Share of a block's weights that mix gives to all its experts alike.", high=1
    )

    # Names, in small letters, of variables and arguments: LOAD_ARTIFACT refuses those that the
    # artifact says otherwise, and overrides the other settings of the model.
    explicit: frozenset[str] = frozenset()


# What differs from #1084; sizes as in the published logs. A preset may build on another. A line has
# what belongs together: data, training, model, evaluation.
# fmt: off
SLOT24 = dict(
    EVAL_STRIDE=96, SLOT_DELTA="window", SLOT_BIAS=1, SLOT_LOSS="scored",
    SLOT_STEPS=24, SLOT_LR=0.012, SLOT_LR_MIN=0.001,
)
PR1313 = SLOT24 | dict(
    ITERATIONS=20000, TTT_ENABLED=0,
    XSA_LAST_N=11, VRL_ENABLED=1, QK_GAIN_INIT=4, BIGRAM_VOCAB_SIZE=1024,
)
PR1435 = dict(
    ITERATIONS=20000, TTT_ENABLED=0, SLOT_ENABLED=0, QUANT="gptq",
    WARMDOWN_FRAC=0.667, MATRIX_LR=0.02, SCALAR_LR=0.02, TIED_EMBED_LR=0.03,
    MUON_WD=0.09, EMBED_WD=0.09, ADAM_WD=0.02, MUON_ROW_NORM=1, MUON_PROJECTIONS=1,
    EMA_DECAY=0.9965, SWA_ENABLED=0, LATE_QAT=0,
    MLP_MULT=4, BIGRAM_DIM=112, XSA_LAST_N=11, QK_GAIN_INIT=5, ROPE_TRAIN_LEN=2048,
    RECUR_LAYERS="4,5", RECUR_STYLE="shared", SKIP_GATES_ENABLED=1, PARALLEL_START_LAYER=7,
)
PR1042 = PR1435 | dict(
    WARMDOWN_FRAC=0.6, MATRIX_LR=0.028, SCALAR_LR=0.028, TIED_EMBED_LR=0.042, QK_GAIN_INIT=6,
)
PRESETS: dict[str, dict[str, Any]] = {
    "pr1084": {},
    "pr549": dict(SLOT_ENABLED=0),
    "pr1150": dict(BIGRAM_VOCAB_SIZE=2048, ITERATIONS=20000, SLOT_STEPS=5, SLOT_LR=0.003),
    "pr1303": PR1313 | dict(EVAL_STRIDE=64, SLOT_STEPS=16, SLOT_LR=0.008, SLOT_LR_MIN=0.0008),
    "pr1313": PR1313,
    "pr1488": PR1313 | dict(QK_GAIN_INIT=5.25, PREQUANT_TTT_ENABLED=1),
    "pr1278": PR1313 | dict(
        EVAL_STRIDE=64, SLOT_STEPS=32, SLOT_LR=0.015, RECUR_LAYERS="4,5", RECUR_STYLE="gated",
    ),
    "pr1321": PR1313 | dict(SLOT_STEPS=48),
    "pr1324": PR1313 | dict(SLOT_STEPS=48),
    "pr1435": PR1435,
    "pr1042": PR1042,
    "pr1498": PR1435 | SLOT24 | dict(
        SLOT_ENABLED=1, RECUR_LAYERS="3,4,5", QK_GAIN_INIT=5.5, CALIBRATION="validation",
        PREQUANT_TTT_ENABLED=1, PREQUANT_TTT_EPOCHS=11, PREQUANT_TTT_FREEZE_BLOCKS=0,
    ),
    "slot28": PR1313 | dict(SLOT_STEPS=28),
    "slot32": PR1313 | dict(SLOT_STEPS=32, SLOT_LR=0.015),
    "slot48": PR1313 | dict(SLOT_STEPS=48),
    "hypergradient": PR1313 | dict(SLOT_HYPER_LR=1e-5),
    "best": PR1042 | dict(TTT_ENABLED=1),
    "best_demo": dict(  # as PRESET=demo,best_demo: what helps and costs training no time
        SLOT_ENABLED=0, EVALS="auto", DATA_ORDER="coprime", MIN_LR=0.05, XSA_LAST_N=4,
        SKIP_GATES_ENABLED=1, NEWTON_SCHULZ="polar_express", MUON_WD=0.085, QUANT="gptq",
        TTT_PARAMS="lora", TTT_OPTIMIZER="adamw", TTT_LR=0.003,
    ),
    "demo": dict(
        DATA_PATH="./data/datasets/demo_sp1024",
        TOKENIZER_PATH="./data/tokenizers/demo_1024_bpe.model",
        TRAIN_BATCH_TOKENS=4096, TRAIN_SEQ_LEN=256, ITERATIONS=400, WARMDOWN_ITERS=160,
        MAX_WALLCLOCK_SECONDS=150, VAL_LOSS_EVERY=200, TRAIN_LOG_EVERY=5, SAVE_EVERY=50,
        MUON_MOMENTUM=0.95, MUON_MOMENTUM_WARMUP_STEPS=100, MATRIX_LR=0.04, SWA_EVERY=5,
        NUM_LAYERS=4, MODEL_DIM=128, NUM_HEADS=4, NUM_KV_HEADS=2, XSA_LAST_N=2,
        VE_LAYERS="2,3", VE_DIM=32, BIGRAM_VOCAB_SIZE=4096, BIGRAM_DIM=32,
        EVALS="roundtrip,sliding_window,ttt,ttt_slot", EVAL_SEQ_LEN=256, VAL_BATCH_SIZE=8192,
        TTT_CHUNK_TOKENS=8192, TTT_LR=0.006,
    ),
}
# fmt: on


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field of Config as the parser and the help need it."""

    name: str  # in capitals
    kind: str  # bool, int, float, str, ints (a comma list), names (of `choices`) or choice
    default: Any
    low: float
    high: float
    text: str
    choices: tuple[str, ...]
    in_artifact: bool

    def allowed(self) -> str:
        """What values may be, in words."""
        if self.choices:
            return ("a comma list of " if self.kind == "names" else "") + ", ".join(self.choices)
        what = {"ints": "comma list of integers", "int": "integer", "float": "number"}
        if self.kind not in what:
            return "text"
        return f"{what[self.kind]}, {shown_bound(self.low)} to {shown_bound(self.high)}"


def shown_bound(value: float) -> str:
    """A bound as a reader likes it: 1,000,000 or 0.99999 or 1e-30."""
    return f"{value:,}" if float(value).is_integer() else f"{value:g}"


def describe(field: dataclasses.Field) -> Setting:
    """The Setting of a field of Config; its kind follows from the annotation."""
    name, annotation = field.name.upper(), field.type
    choices: tuple[str, ...] = ()
    kinds: dict[Any, str] = {bool: "bool", int: "int", float: "float", str: "str"}
    kinds[tuple[int, ...]] = "ints"
    kind = kinds.get(annotation, "choice")
    if annotation == tuple[str, ...]:
        kind = "names"
        choices = tuple(PRESETS) if name == "PRESET" else ("auto", "none", *EVALUATORS)
    elif kind == "bool":
        choices = ("0", "1", "false", "true")
    elif kind == "choice":
        choices = typing.get_args(annotation)
    low, high = field.metadata["low"], field.metadata["high"]
    return Setting(
        name=name,
        kind=kind,
        default=field.default,
        low=0 if low is None else low,
        high=(100 if kind == "float" else MAX_INT) if high is None else high,
        text=field.metadata["text"],
        choices=choices,
        in_artifact=field.metadata["in_artifact"],
    )


SETTINGS = {f.name.upper(): describe(f) for f in dataclasses.fields(Config) if f.metadata}
# A family is the settings that begin with the same word. A variable that begins like two settings
# or more, and is none, is taken for a misspelt one, unless other programs' begin like that too.
FIRST_WORDS = [name.partition("_")[0] for name in SETTINGS]
FAMILIES = sorted({word for word in FIRST_WORDS if FIRST_WORDS.count(word) > 1})
COMMON_WORDS = {"DATA", "EVAL", "LOAD", "NUM", "PARALLEL", "SAVE", "TRAIN", "VAL"}


def parse_value(s: Setting, text: str) -> Any:
    """Value of a setting from its text. Raises ValueError that says what is allowed."""
    if s.kind == "str":
        return text
    if s.kind in ("bool", "choice"):
        if text.lower() not in s.choices:
            raise ValueError(f"allowed: {s.allowed()}")
        return text.lower() in ("1", "true") if s.kind == "bool" else text.lower()
    words = [word.strip() for word in text.split(",") if word.strip()]
    if s.kind == "names":
        return parse_names(s, words)
    if s.kind != "ints":
        words = [text]
    try:
        values = tuple(float(word) if s.kind == "float" else int(word) for word in words)
    except ValueError:
        raise ValueError(f"allowed: {s.allowed()}") from None
    if not all(s.low <= value <= s.high for value in values):  # nan is refused too
        raise ValueError(f"allowed: {s.allowed()}")
    return values if s.kind == "ints" else values[0]


def parse_names(s: Setting, words: list[str]) -> tuple[str, ...]:
    """Names of a comma list, each once. Raises ValueError."""
    names = tuple(dict.fromkeys(word.lower() for word in words))
    wrong = [name for name in names if name not in s.choices]
    if wrong and len(s.choices) > 12:  # all of them would fill a screen
        near = difflib.get_close_matches(wrong[0], s.choices, 3, 0.0)
        raise ValueError(f"allowed: a comma list of {', '.join(near)} and others, see --help")
    alone = {"auto", "none"} & set(names) and len(names) > 1
    if wrong or alone or not (names or s.name == "EVALS"):
        raise ValueError(f"allowed: {s.allowed()}{'; auto and none stand alone' if alone else ''}")
    return names


def nearest_name(name: str, cutoff: float = 0.0) -> str:
    """The setting whose name is most like this one, of its family if it has one; or ""."""
    family = name.partition("_")[0]
    if family in FAMILIES and family not in COMMON_WORDS:
        known = [n for n in SETTINGS if n.partition("_")[0] == family]
        return difflib.get_close_matches(name, known, 1, 0.0)[0]
    return next(iter(difflib.get_close_matches(name, SETTINGS, 1, cutoff)), "")


def unknown_names(env: Mapping[str, str]) -> list[str]:
    """A problem for each variable that looks like a setting and is none."""
    problems = []
    for name in sorted(set(env) - set(SETTINGS)):
        near = nearest_name(name, cutoff=0.85)
        if near:
            problems.append(
                f"{name}={env[name]}: there is no such setting. Nearest name: {near}. Correct it,"
                f" or, if it belongs to another program, start with env -u {name}."
            )
    return problems


def values_given(env: Mapping[str, str]) -> dict[str, Any]:
    """Values by name of the presets and, after them, of variables: later ones win.

    Of WARMDOWN_ITERS and WARMDOWN_FRAC, two ways to say how long the warmdown is, the later counts:
    a later WARMDOWN_ITERS removes WARMDOWN_FRAC, and a WARMDOWN_FRAC that is not 0 always counts.
    """
    found: dict[str, Any] = {}
    names = env.get("PRESET", "").lower().split(",")
    for values in (*(PRESETS.get(name.strip(), {}) for name in names), env):
        if "WARMDOWN_ITERS" in values:
            found.pop("WARMDOWN_FRAC", None)
        found |= values
    return found


def load_config(env: Mapping[str, str]) -> Config:
    """Config from variables by name. Raises BadInput with all problems, a line each."""
    values: dict[str, Any] = {}
    problems = unknown_names(env)
    given = values_given(env)
    for s in SETTINGS.values():
        text = str(given.get(s.name, shown(s.default))).strip()
        try:
            values[s.name.lower()] = parse_value(s, text)
        except ValueError as why:
            problems.append(f"{s.name}={text}: {why}. {s.text}")
            values[s.name.lower()] = s.default
    c = Config(**values, explicit=frozenset(n for n in values if n.upper() in env))
    problems += cross_check(c)
    if problems:
        raise BadInput("\n".join(problems))
    if c.documents == "mask":  # the other kinds of attention are refused
        c = dataclasses.replace(c, attention="sdpa")
    return dataclasses.replace(c, evals=evaluators_of(c))


def switches_on(c: Config) -> set[str]:
    """Of the settings that evaluators need, those that are on."""
    switches = set().union(*(evaluator.needs() for evaluator in EVALUATORS.values()))
    return {name for name in switches if getattr(c, name)}


def evaluators_of(c: Config) -> tuple[str, ...]:
    """EVALS with auto and none replaced by names."""
    if c.evals == ("none",):
        return ()
    if c.evals != ("auto",):
        return c.evals
    on = switches_on(c)
    last = [name for name, evaluator in EVALUATORS.items() if on and evaluator.needs() == on]
    return ("roundtrip", "sliding_window", *last)


def shown(value: Any) -> str:
    """A setting's value as one would give it."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return str(int(value) if isinstance(value, bool) else value)


def cross_check(c: Config) -> list[str]:
    """Problems between settings that are each valid alone, a line each."""
    found = [*run_problems(c), *model_problems(c), *evaluation_problems(c)]
    for small, large in (
        ("EVAL_STRIDE", "EVAL_SEQ_LEN"),
        ("EVAL_SEQ_LEN", "VAL_BATCH_SIZE"),
        ("EVAL_SEQ_LEN", "TTT_CHUNK_TOKENS"),
        ("SLOT_LR_MIN", "SLOT_LR"),
        ("XSA_LAST_N", "NUM_LAYERS"),
        ("PARALLEL_LAST_N", "NUM_LAYERS"),
        ("TTT_FREEZE_BLOCKS", "NUM_LAYERS"),
        ("PREQUANT_TTT_FREEZE_BLOCKS", "NUM_LAYERS"),
    ):
        if getattr(c, small.lower()) > getattr(c, large.lower()):
            found.append((small, f"at most {large}={getattr(c, large.lower())}"))
    multiples = [("MODEL_DIM", "NUM_HEADS"), ("NUM_HEADS", "NUM_KV_HEADS")]
    if not c.load_artifact:  # else nothing is trained
        multiples.append(("TRAIN_BATCH_TOKENS", "TRAIN_SEQ_LEN"))
    for multiple, of in multiples:
        if getattr(c, multiple.lower()) % getattr(c, of.lower()):
            found.append((multiple, f"must be a multiple of {of}={getattr(c, of.lower())}"))
    return [f"{name}={shown(getattr(c, name.lower()))}: {text}." for name, text in found]


def claims_causal(name: str) -> bool:
    """Whether a preset is a system that breaks no condition."""
    preset = PRESETS.get(name, {})
    return preset.get("SLOT_ENABLED") == 0 and not preset.get("PREQUANT_TTT_ENABLED")


def run_problems(c: Config) -> Iterator[tuple[str, str]]:
    """(setting, what is wrong) of how a run is named, begun and exported."""
    if c.run_id and not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", c.run_id, re.ASCII):
        yield (
            "RUN_ID",
            "a name, or FOLDER/NAME, of letters, digits and . _ -; files are named by it",
        )
    if c.resume and not c.run_id:
        yield "RESUME", "needs the RUN_ID to go on with"
    if c.load_artifact and c.load_checkpoint:
        yield "LOAD_CHECKPOINT", "begins a training, LOAD_ARTIFACT needs none; choose one"
    if c.warmdown_frac and {"warmdown_frac", "warmdown_iters"} <= c.explicit:
        yield (
            "WARMDOWN_FRAC",
            f"is the length of the warmdown, as is WARMDOWN_ITERS={c.warmdown_iters}; set one",
        )
    if -1 < c.embed_wd < 0:
        yield "EMBED_WD", "0 or more, or -1 for ADAM_WD"
    if c.calibration == "validation":
        for name in c.preset:
            if claims_causal(name):
                yield "CALIBRATION", f"breaks C3, PRESET={name} no condition; set CALIBRATION=train"
        if c.quant != "gptq" and not c.load_artifact:
            yield "CALIBRATION", "needs QUANT=gptq"
    if c.average not in ("auto", "none") and not getattr(c, f"{c.average}_enabled"):
        yield "AVERAGE", f"needs {c.average.upper()}_ENABLED=1"


def model_problems(c: Config) -> Iterator[tuple[str, str]]:
    """(setting, what is wrong) of the model."""
    head_dim = c.model_dim // c.num_heads
    rotated = c.rope_dims or head_dim
    if rotated > head_dim or rotated % 2:
        yield (
            "ROPE_DIMS",
            f"must be even and at most the head dim {head_dim}, or 0 with an even head dim",
        )
    if c.bigram_vocab_size == 1:
        yield "BIGRAM_VOCAB_SIZE", "must be 0 or at least 2"
    if c.documents == "mask" and c.attention in ("fa3", "fa4"):
        yield "DOCUMENTS", f"ATTENTION={c.attention} knows no documents; set ATTENTION=sdpa or auto"
    if c.vrl_enabled and c.value_residual:
        yield "VRL_ENABLED", "mixes the same values as VALUE_RESIDUAL=1; choose one"
    if c.ve_enabled and not c.ve_layers:
        yield "VE_LAYERS", "name a layer, or set VE_ENABLED=0"
    if c.parallel_start_layer >= c.num_layers:
        yield "PARALLEL_START_LAYER", f"must be under NUM_LAYERS={c.num_layers}; 0: no lanes"
    if c.parallel_start_layer and c.recur_style == "gated":
        yield "PARALLEL_START_LAYER", "RECUR_STYLE=gated has no lanes; set 0, or another style"
    if c.parallel_start_layer and c.parallel_last_n:
        yield "PARALLEL_START_LAYER", "has lanes where PARALLEL_LAST_N has parallel residuals"
    for name, usual in (("recur_style", "own"), ("recur_loops", 2)):
        if getattr(c, name) != usual and not c.recur_layers:
            yield name.upper(), f"needs RECUR_LAYERS; set it, or {name.upper()}={usual}"
    for name, layers, on in (
        ("VE_LAYERS", c.ve_layers, c.ve_enabled),
        ("RECUR_LAYERS", c.recur_layers, True),
    ):
        outside = on and set(layers) - set(range(c.num_layers))
        if outside or len(set(layers)) < len(layers):
            yield name, f"must be different layers from 0 to {c.num_layers - 1}"


def evaluation_problems(c: Config) -> Iterator[tuple[str, str]]:
    """(setting, what is wrong) of SLOT, CTW and the evaluators that are asked for."""
    if c.slot_enabled and c.slot_loss == "context" and c.eval_stride == c.eval_seq_len:
        yield "SLOT_LOSS", f"EVAL_STRIDE={c.eval_seq_len}, the window, leaves no context"
    if c.slot_hyper_lr and not c.slot_enabled:
        yield "SLOT_HYPER_LR", "needs SLOT_ENABLED=1"
    on = switches_on(c)
    together = [evaluator.needs() for evaluator in EVALUATORS.values()]
    if c.evals == ("auto",) and on and on not in together:
        given = ", ".join(f"{name.upper()}={shown(getattr(c, name))}" for name in sorted(on))
        yield "EVALS", f"no evaluator has {given} together; turn one off, or name evaluators"
    for name, usual in (("slot_decay", 0.0), ("slot_reset", "none")):
        if getattr(c, name) != usual and not (c.slot_enabled and c.slot_loss in CARRIED):
            yield (
                name.upper(),
                f"needs SLOT_ENABLED=1 and SLOT_LOSS=past or recent, which carry; set {usual}",
            )
    if c.slot_reset == "document" and c.slot_delta != "window":
        yield "SLOT_RESET", "needs SLOT_DELTA=window: a batch holds several documents"
    yield from mix_problems(c)
    if c.ttt_params == "lora":
        yield from lora_problems(c)
    elif c.ttt_phases > 1:
        yield "TTT_PHASES", "needs TTT_PARAMS=lora; set 1"
    asked = [EVALUATORS[label] for label in c.evals if label in EVALUATORS]
    for name in sorted(set().union(*(evaluator.needs() for evaluator in asked)) - on):
        text = (
            f"{name.upper()}=0 leaves out {name.partition('_')[0]}; turn it on, or set EVALS=auto"
        )
        yield "EVALS", text


def lora_problems(c: Config) -> Iterator[tuple[str, str]]:
    """(setting, what is wrong) of TTT by low-rank factors."""
    for label in evaluators_of(c):
        if label != "ttt" and label in EVALUATORS and EVALUATORS[label].ttt:
            yield "TTT_PARAMS", f"{label} has no lora; set EVALS=ttt, or TTT_PARAMS=all"
    smallest = min(
        c.model_dim, c.model_dim // c.num_heads * c.num_kv_heads, int(c.model_dim * c.mlp_mult)
    )
    if c.ttt_lora_rank > smallest:
        yield "TTT_LORA_RANK", f"at most {smallest}, the smallest side of a matrix"
    if c.ttt_lora_chunk > c.eval_seq_len:
        yield "TTT_LORA_CHUNK", f"at most EVAL_SEQ_LEN={c.eval_seq_len}"


def mix_problems(c: Config) -> Iterator[tuple[str, str]]:
    """(setting, what is wrong) of a mixture of evaluators."""
    for at, label in enumerate(c.evals):
        if label == "mix" and at != len(c.evals) - 1:
            yield "EVALS", "mix mixes those before it; name it last"
        if label == "mix" and at < 2:
            yield "EVALS", "mix needs two other evaluators before it, or more"


def help_page(family: str = "") -> str:
    """The --help page, or only the settings whose names begin with a family's word."""
    lines = [] if family else [__doc__ or "", "Settings: NAME=default (kind, lowest to highest)"]
    for s in SETTINGS.values():
        if family and s.name.partition("_")[0] != family:
            continue
        lines += [f"  {s.name}={shown(s.default)} ({s.allowed()})", f"      {s.text}"]
    if not family:
        lines += [f"Families for --help: {', '.join(FAMILIES).lower()}"]
        lines += [f"Evaluators: {', '.join(EVALUATORS)}", "Presets:"]
        for name, values in PRESETS.items():
            lines.append(f"  {name}: " + " ".join(f"{k}={v}" for k, v in values.items()))
    return "\n".join(lines)


def settings_from_arguments(words: Sequence[str]) -> dict[str, str]:
    """Settings by name of arguments NAME=value. Raises BadInput with all problems, a line each."""
    given, problems = {}, []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or word.startswith("-"):
            problems.append(
                f"{word}: unknown argument; allowed: NAME=value ..., or alone --help [family] or"
                " --pack [PATH]."
            )
        elif name not in SETTINGS:
            near = nearest_name(name.upper())
            problems.append(f"{word}: there is no such setting. Nearest name: {near}. Correct it.")
        given[name] = value
    if problems:
        raise BadInput("\n".join(problems))
    return given


def show_help(words: Sequence[str]) -> None:
    """Print the page that `--help [family]` asks for. Raises BadInput."""
    family = words[0].upper() if words else ""
    if len(words) > 1 or family not in {"", *FIRST_WORDS}:
        raise BadInput(
            f"--help {' '.join(words)}: no such family; allowed: {', '.join(FAMILIES).lower()}."
        )
    try:
        print(help_page(family), flush=True)
    except BrokenPipeError:  # --help | head has read enough; nothing is left to write at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ==================================================================================================
# 3. Command line without torch: console, help, packing, writing a file
#
# No console is silent for long: what takes seconds has a name, which is said meanwhile.
#
# What counts against the 16,000,000 bytes is what is shipped: the packed copy of this file, of two
# lines. Comments and docstrings (but for the module's, which --help prints) do not count, so they
# can be as long as they need to be. The packed copy is the script: it unpacks and executes itself,
# and packs to itself again.
# ==================================================================================================

PACKED_START = b"import base64,lzma\nexec(compile(lzma.decompress(base64.b85decode('"
PACKED_END = b"')),__file__,'exec'))\n"
# No alignment suits text; the .lzma container has the shortest header.
PACKING = [dict(id=lzma.FILTER_LZMA1, preset=9 | lzma.PRESET_EXTREME, lc=3, lp=0, pb=0)]


class Console:
    """What is said to whoever watches: a run's lines, and what goes on while there are none.

    A thread says the latter, so that one long call is no silence either: on standard error, and not
    in the log.
    """

    PAUSE = 4.0  # seconds without a line

    def __init__(self) -> None:
        self.heard = perf_counter()  # when the last line came
        self.activities = [("starting", self.heard)]  # name, begin; each inside the one before

    def say(self, text: str) -> None:
        """Print a line."""
        with contextlib.suppress(OSError):  # a terminal that has gone
            print(f"{text}\n", end="", flush=True)  # as one: nothing comes before its end
        self.heard = perf_counter()

    @contextlib.contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Name what goes on inside, or in a function that this decorates."""
        self.activities.append((activity, perf_counter()))
        try:
            yield
        finally:
            self.activities.pop()

    def silent_in(self, seconds: float) -> bool:
        """Whether, so many seconds from now, a pause will be over."""
        return perf_counter() + seconds - self.heard > self.PAUSE

    def start(self, waited: float = 0.0) -> None:
        """Speak up at each pause from now on, on rank 0; waited: seconds of the first, so far."""
        self.heard -= waited
        if is_first_rank():
            Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        """Speak up at each pause, for as long as the process lives."""
        while True:
            sleep(max(0.0, self.heard + self.PAUSE - perf_counter()) + 0.01)
            if self.silent_in(0):
                self.speak_up()

    def speak_up(self) -> None:
        """Say what goes on, and for how long."""
        self.heard = perf_counter()
        known = self.activities[1:] or self.activities
        words = [f"{activity} {self.heard - began:.0f} s" for activity, began in known]
        with contextlib.suppress(OSError):
            print(f"... {', '.join(words)}\n", end="", file=sys.stderr, flush=True)


CONSOLE = Console()


def is_first_rank() -> bool:
    """Whether this process is the one of a run that speaks and writes."""
    return os.environ.get("RANK", "0") == "0"


def strip_source(source: str) -> str:
    """Python source of the same behaviour, without what only a reader needs.

    Without comments, annotations of functions, and docstrings but for the module's, which --help
    prints. The text depends on the version of Python, as ast.unparse() does.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
    return ast.unparse(tree) + "\n"


def pack_source(stripped: str) -> bytes:
    """The packed copy of what strip_source() gives."""
    import base64  # here and below: --help does not wait for it

    packed = lzma.compress(stripped.encode(), lzma.FORMAT_ALONE, filters=PACKING)
    return PACKED_START + base64.b85encode(packed) + PACKED_END


def is_packed(data: bytes) -> bool:
    """Whether these are the bytes of a packed copy."""
    return data.startswith(PACKED_START) and data.endswith(PACKED_END)


def read_source() -> str:
    """Readable source of this script; of the packed copy, what it unpacks to."""
    data = Path(__file__).read_bytes()
    if not is_packed(data):
        return data.decode()
    import base64

    body = data[len(PACKED_START) : -len(PACKED_END)]
    return lzma.decompress(base64.b85decode(body)).decode()


@functools.cache
def stripped_script() -> str:
    """This script, stripped: the same for the same code, however it is commented."""
    return strip_source(read_source())


@functools.cache
def packed_script() -> bytes:
    """The packed copy of this script."""
    return pack_source(stripped_script())


def code_bytes() -> int:
    """Bytes of code that are counted: those of the packed copy, which is what is shipped."""
    return len(packed_script())


def write_file(path: Path, parts: Iterable[bytes | memoryview], remedy: str) -> None:
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
            f"{path}: {why.strerror}: not written, older files kept. Correct that, then {remedy}."
        ) from None


def pack_to(words: Sequence[str]) -> None:
    """Write the packed copy as `--pack [PATH]` asks. Raises BadInput; nothing else is replaced."""
    path = Path(words[0] if words else "train_gpt_packed.py")
    where = f"--pack {' '.join(words)}"
    if len(words) > 1:
        raise BadInput(f"{where}: allowed: one PATH.")
    if path.is_dir():
        path /= "train_gpt.py"
    if not path.parent.is_dir():
        raise BadInput(f"{where}: there is no folder {path.parent}; make it first.")
    if path.exists() and not is_packed(path.read_bytes()):
        raise BadInput(f"{where}: {path} exists and is no packed script; choose another PATH.")
    write_file(path, [packed_script()], "pack again, or to another PATH")
    print(f"{path}: {code_bytes()} bytes, of {len(read_source().encode())} bytes of source")


def leave_quietly() -> None:
    """Let Ctrl-C end a process that starts, without a traceback; nohup's stays ignored."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))


def run_early(words: Sequence[str]) -> None:
    """Do what needs no torch, --help and --pack, and refuse unknown arguments. Exits if done."""
    try:
        if words and words[0] in ("--help", "-h"):
            if is_first_rank():  # under torchrun one does it for all
                show_help(words[1:])
        elif words and words[0] == "--pack":
            if is_first_rank():
                pack_to(words[1:])
        else:
            settings_from_arguments(words)
            return
    except (BadInput, Fault) as problem:
        print(in_lines(f"error: {problem}"), file=sys.stderr)
        sys.exit(problem.status)
    sys.exit(0)


if __name__ == "__main__":
    run_early(sys.argv[1:])
    leave_quietly()
    # torchrun was silent for some seconds itself
    CONSOLE.start(CONSOLE.PAUSE if "TORCHELASTIC_RUN_ID" in os.environ else 0.0)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

# ==================================================================================================
# 4. Files
#
# Artifacts, checkpoints and progress files (how far an evaluation is, section 14) have one flat
# format, which is read without running code:
#
#   8 bytes    magic with a version
#   32 bytes   SHA-256 of all that follows
#   the body   in an artifact as up to 8 LZMA streams:
#     4 bytes    length of the header, little-endian
#     header     JSON that ends in "tensors": [[name, dtype, shape], ...]
#     tensors    in that order, little-endian, with nothing between them
#
# A file is whole or not there: write_file(), in section 3 since --pack needs it, writes beside its
# place, syncs, and renames.
# ==================================================================================================

MAGIC = b"PGSLOT\x02\n"
EXPANSION = 64  # a body may expand to so many times its LZMA, and always to 32 MiB
STREAMS = 8
HEADER_BYTES = 400_000  # that a header may take, and an eighth of its file more
HEADER_NAMES = {"model", "step", "matrices", "settings", "tensors"}
# Weights do not repeat: one literal context and a short search do as well as preset 6 in half the
# time.
LZMA_FILTERS = [
    dict(id=lzma.FILTER_LZMA2, preset=6, lc=0, lp=0, pb=0, mf=lzma.MF_HC4, depth=1, nice_len=32)
]
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.half, torch.float, torch.double)
}
Claims = dict[str, tuple[torch.dtype, list[int]]]  # dtype and shape by name of a tensor


def seal(
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    encode_body: Callable[[bytes], bytes] | None = None,
) -> list[Any]:
    """A file, as a list of bytes-likes, of a JSON header and CPU tensors of DTYPES by name."""
    table = [
        [name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()
    ]
    head = json.dumps({**header, "tensors": table}).encode()
    parts: list[Any] = [len(head).to_bytes(4, "little"), head]
    parts += [t.reshape(-1).view(torch.uint8).numpy() for t in tensors.values()]
    if encode_body:
        parts = [encode_body(b"".join(parts))]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return [MAGIC, digest.digest(), *parts]


def compress(raw: bytes) -> bytes:
    """LZMA streams of equal parts of raw, made side by side; the same on any number of cores."""
    size = max(2**20, math.ceil(len(raw) / STREAMS))

    def stream(at: int) -> bytes:
        """The stream of the part that begins there."""
        part = raw[at : at + size]
        return lzma.compress(part, lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=LZMA_FILTERS)

    with ThreadPoolExecutor(cores()) as pool:
        return b"".join(pool.map(stream, range(0, len(raw), size)))


def expand(data: bytes | bytearray | memoryview, most: int) -> bytearray:
    """The first `most` raw bytes of LZMA streams, or all if there are fewer.

    Raises ValueError or LZMAError.
    """
    if most > max(EXPANSION * len(data), 2**25):
        raise ValueError(f"its LZMA grows over {EXPANSION} times")
    raw = bytearray()
    for _ in range(STREAMS):
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2**27)
        raw += decoder.decompress(data, most - len(raw))
        data = decoder.unused_data
        if len(raw) == most or not (decoder.eof and data):
            break
    if len(raw) < most and (data or not decoder.eof):
        raise ValueError("its LZMA is cut off, or followed by something")
    return raw


def first_bytes(data: bytes | bytearray | memoryview, most: int) -> memoryview:
    """The first `most` bytes of what is not packed, or all if there are fewer."""
    return memoryview(data)[:most]


def in_words(what: object) -> str:
    """What a file says, for a message: in one short line, without signs that a terminal obeys."""
    text = " ".join(str(what).split()) or type(what).__name__
    if len(text) > 250:
        text = f"{text[:120]} ... {text[-120:]}"
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def is_flat(there: object) -> typing.TypeGuard[dict[str, Any]]:
    """Whether what a file says is an object of values and flat lists, as settings are."""
    if not isinstance(there, dict):
        return False
    values = [v for value in there.values() for v in (value if type(value) is list else [value])]
    return not any(isinstance(value, (dict, list)) for value in values)


def is_name(there: object) -> bool:
    """Whether what a file says can be a tensor's name."""
    return isinstance(there, str) and bool(re.fullmatch(r"[\w.]{1,200}", there, re.ASCII))


def is_shape(there: object) -> bool:
    """Whether what a header says can be a shape: whole numbers from 1 on, also none at all."""
    if not isinstance(there, list) or len(there) > 8:
        return False
    return all(type(size) is int and 0 < size < 2**40 for size in there)


def refuse_constant(name: str) -> None:
    """Refuse the NaN and Infinity of Python's JSON. Raises ValueError."""
    raise ValueError(f"its header has {name} for a number")


def read_header(
    data: bytes | bytearray, decode: Callable[[memoryview, int], Any] = first_bytes
) -> tuple[dict[str, Any], Claims, int]:
    """(header, what it claims of tensors, bytes of the body before them) of a file.

    Nothing is allocated for what is only claimed. Raises ValueError, or others of its readers.
    """
    content = memoryview(data)[40:]
    if data[:8] != MAGIC or hashlib.sha256(content).digest() != data[8:40]:
        raise ValueError("wrong checksum")
    start = 4 + int.from_bytes(decode(content, 4), "little")
    if start > HEADER_BYTES + len(content) // 8:
        raise ValueError(f"its header claims {start} bytes")
    head = bytes(decode(content, start))[4:]
    # A value takes 60 bytes or more in memory: "[],[],[]" grows 20 times when it is read. What we
    # write has one of these signs in 8 bytes or more; with one in 7 it grows 10 times at most.
    if 7 * sum(map(head.count, b"[{,:")) > 10_000 + len(head):
        raise ValueError("its header has too many values for its length")
    header = json.loads(head, parse_constant=refuse_constant)
    if not isinstance(header, dict) or not isinstance(header.get("tensors"), list):
        raise ValueError("its header is no object with tensors")
    if not header.keys() <= HEADER_NAMES:
        raise ValueError(f"its header has {', '.join(sorted(header.keys() - HEADER_NAMES))}")
    claims: Claims = {}
    for row in header["tensors"]:
        match row:
            case [name, str(dtype), shape] if (
                is_name(name) and name not in claims and dtype in DTYPES and is_shape(shape)
            ):
                claims[name] = DTYPES[dtype], shape
            case _:
                raise ValueError(f"its header has the tensor {row}, or has it twice")
    return header, claims, start


def unseal(
    data: bytes | bytearray, decode: Callable[[memoryview, int], Any] = first_bytes
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(header, tensors by name, views) of a file. Raises ValueError, or others of its readers."""
    header, claims, start = read_header(data, decode)
    size = start + sum(math.prod(shape) * dtype.itemsize for dtype, shape in claims.values())
    body = decode(memoryview(data)[40:], size + 1)
    if len(body) != size:
        raise ValueError(f"its header claims {size} bytes, it has {min(len(body), size + 1)}")
    tensors: dict[str, Tensor] = {}
    at = start
    for name, (dtype, shape) in claims.items():
        n = math.prod(shape)
        tensors[name] = torch.frombuffer(body, dtype=dtype, count=n, offset=at).view(shape)
        at += n * dtype.itemsize
    check_finite(tensors)
    return header, tensors


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a NaN or an infinite number."""
    for name, tensor in tensors.items():
        ends = torch.stack(tensor.aminmax())  # a NaN is both; isfinite() of all would take room
        if not ends.isfinite().all():
            raise ValueError(f"{name} has a number that is not finite")


# ==================================================================================================
# 5. Ranks, log, checkpoint store, stop signals
#
# A run is one process a device, started by torchrun, or one process alone. All ranks compute; only
# rank 0 writes. What ranks must agree on (stop? time up?) is asked with Poll, which on a GPU
# usually answers two steps late, so that the host does not wait for what the device is doing.
# ==================================================================================================


class StopSignals:
    """Signals that asked this process to stop."""

    # Windows has no SIGHUP
    NUMBERS = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))

    def __init__(self) -> None:
        self.received: list[tuple[int, float]] = []  # (number, time)

    def install(self) -> None:
        """Receive signals from now on; those that are ignored (nohup's) stay so."""
        for number in self.NUMBERS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.receive)

    def receive(self, number: int, frame: object) -> None:
        """The first signal ends the run where it can go on from; a second ends it at once.

        Under torchrun a Ctrl-C arrives twice, from the terminal and from torchrun: what comes
        within a second of the first is not a second one.
        """
        passed_on = "TORCHELASTIC_RUN_ID" in os.environ
        if self.received and (not passed_on or perf_counter() - self.received[0][1] > 1):
            os._exit(128 + number)
        self.received.append((number, perf_counter()))

    def exit_status(self) -> int:
        """128 + the number of the first; SIGTERM's where only another rank got one."""
        return 128 + (self.received[0][0] if self.received else signal.SIGTERM)


STOP_SIGNALS = StopSignals()


def keep_freed_memory(block: int = 2**25, rest: int = 2**31 - 1) -> None:
    """Let glibc keep freed blocks of up to `block` bytes, `rest` bytes in all, for reuse.

    A GPU's allocator does so. New blocks from the system cost a CPU 5 to 20 % of a step.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        for option, value in ((-3, block), (-1, rest)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)


def find_device(wanted: str) -> torch.device:
    """The device that DEVICE asks for; of several GPUs this process's. Raises BadInput."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BadInput(f"DEVICE={wanted}: torch sees no GPU; allowed here: cpu or auto.")
    number, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= there:
        raise BadInput(
            f"LOCAL_RANK={number}: torch sees {there} GPUs; start with"
            f" --nproc_per_node={there}, or set DEVICE=cpu."
        )
    return torch.device("cuda", number)


def cores() -> int:
    """Cores that this process may use, of which the machine may have more."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Ranks:
    """This process among those that torchrun started, its device, and what they do together."""

    def __init__(self, c: Config) -> None:
        """Raises BadInput for a device that is not there."""
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks of this machine
        self.device = find_device(c.device)
        self.cuda = self.device.type == "cuda"
        bf16 = c.dtype == "bf16" or (c.dtype == "auto" and self.cuda)
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.compile = c.compile == "1" or (c.compile == "auto" and self.cuda)
        if self.cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("highest" if c.dtype == "fp32" else "high")
        else:
            keep_freed_memory()
            if self.local_world > 1:  # torchrun gives each process one thread
                torch.set_num_threads(max(1, cores() // self.local_world))

    @CONSOLE.doing("waiting for the other ranks")
    def connect(self) -> None:
        """Meet the other ranks."""
        if self.world == 1 or dist.is_initialized():
            return
        # torchrun keeps its store over restarts, with dead ranks' addresses: a prefix for each.
        restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        prefix = str(restart if self.local_world == self.world else 0)
        store = dist.PrefixStore(prefix, next(dist.rendezvous("env://"))[0])
        dist.init_process_group(
            "nccl" if self.cuda else "gloo", store=store, rank=self.rank, world_size=self.world
        )

    def synchronize(self) -> None:
        """Wait for the device, before a clock is read."""
        if self.cuda:
            torch.cuda.synchronize()

    def moment(self) -> Any:
        """Now on the device: a CUDA event, or seconds, once the device is done."""
        if not self.cuda:
            self.synchronize()
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms_between(self, first: Any, second: Any) -> float:
        """Milliseconds between two moments; waits until the device has passed the second."""
        if not self.cuda:
            return 1000 * (second - first)
        second.synchronize()
        return first.elapsed_time(second)

    def put(self, array: np.ndarray) -> Tensor:
        """Tensor of a numpy array on the device; nobody waits for it."""
        tensor = torch.from_numpy(array)
        if self.cuda:
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; returns the tensor."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Make tensors rank 0's, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def share(self, data: bytes | bytearray) -> bytes | bytearray:
        """Rank 0's bytes, on all ranks."""
        if self.world == 1:
            return data
        length = torch.tensor(len(data) * (self.rank == 0), device=self.device)
        size = int(self.sum(length).item())
        whole = torch.zeros(size, dtype=torch.uint8, device=self.device)
        if self.rank == 0 and size:
            whole.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(whole, 0)
        return bytearray(whole.cpu().numpy())


class Poll:
    """What all ranks agree on, asked once a step or batch.

    On a GPU the host runs ahead of the device: an answer that is waited for would stop it. So each
    question is sent with a copy that is not waited for, and what comes back is the answer to the
    question of `lag` calls ago, by which time the device has long computed it. What is asked may
    be of another step than that in which the answer comes: a value that belongs to a step is sent
    with its number.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.lag = 2 if ranks.cuda else 0
        self.sent: deque[tuple[Tensor, Any]] = deque()

    def ask(
        self, *values: float, tensor: Tensor | None = None, wait: bool = False
    ) -> list[float] | None:
        """[*rank 0's values, signals over all ranks, this rank's own tensor], of `lag` calls ago.

        None for the first `lag` calls. With wait=True it is this call's own answer, and the next
        `lag` calls have none. All ranks call it together. `tensor`, of one element, is not summed:
        it rides along to spare a wait of its own.
        """
        own = [value * (self.ranks.rank == 0) for value in values]
        own.append(len(STOP_SIGNALS.received))
        row = self.ranks.sum(self.ranks.put(np.array(own, dtype=np.float64)))
        if tensor is not None:
            row = torch.cat((row, tensor.view(1)))
        self.sent.append((row.to("cpu", non_blocking=True), self.ranks.moment()))
        answer = None
        while len(self.sent) > (0 if wait else self.lag):
            answer, moment = self.sent.popleft()
            if self.ranks.cuda:
                moment.synchronize()
        return None if answer is None else answer.tolist()


# How figures are printed, by name. "step" is the quantiser's step size.
FORMATS = {
    "train_time": "{:.0f}ms",
    "eval_time": "{:.0f}ms",
    "compile_time": "{:.0f}ms",
    "step_avg": "{:.2f}ms",
    "seconds": "{:.1f}",
    "step": "{:.6g}",
}


def read_row(line: str) -> dict[str, Any]:
    """Figures of a line of metrics.jsonl. Raises ValueError unless a run can have written it."""
    row = json.loads(line)
    label = row.get("label") if is_flat(row) else None
    score = str(label).startswith("final_")
    if not isinstance(label, str) or (score and not row.keys() >= {"val_loss", "causal"}):
        raise ValueError(f"metrics.jsonl has the line {line}")
    for name in ("eval_time", "compile_time", "val_loss"):
        value = row.get(name, 0.0)
        if type(value) not in (int, float) or not 0 <= value < 1e18:
            raise ValueError(f"metrics.jsonl has {name}:{value} for {label}")
    return row


def without_scores(rows: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows by label without those of an artifact's evaluation."""
    scores = ("pass_artifact", "final_artifact", "eval_total")
    return {label: row for label, row in rows.items() if not label.startswith(scores)}


def rows_by_label(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last row of each label; scores stay only until another artifact is written."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        before = found.get("artifact_file", row)
        if row["label"] == "artifact_file" and row.get("sha256") != before.get("sha256"):
            found = without_scores(found)
        found[row["label"]] = row
    return found


class RunLog:
    """logs/RUN_ID.txt and logs/RUN_ID/metrics.jsonl, of rank 0; the lines that other ranks share.

    The text opens with the script's source and all settings, and then holds what the console shows.
    metrics.jsonl has the same figures unrounded, a JSON object with a "label" each line.
    """

    def __init__(self, c: Config, ranks: Ranks) -> None:
        self.ranks = ranks
        self.resume, self.named = c.resume, bool(c.run_id)
        self.name = c.run_id or strftime("%Y%m%d_%H%M%S") + f"_seed{c.seed}"
        self.folder = Path("logs") / self.name
        self.settings = {name: getattr(c, name.lower()) for name in SETTINGS}
        self.settings |= {"RUN_ID": self.name, "device": ranks.device.type}
        digest = hashlib.sha256(stripped_script().encode())  # a comment changes nothing
        for path in (c.load_artifact, c.load_checkpoint):
            digest.update(Path(path).read_bytes() if path else b"")
        self.settings["sha256_of_code_and_artifact"] = digest.hexdigest()
        self.rows: dict[str, dict[str, Any]] = {}  # figures by label, also of before a restart
        self.labels: set[tuple[str, ...]] = set()
        self.text: typing.TextIO | None = None
        self.figures: typing.TextIO | None = None

    def start(self) -> None:
        """Open the logs, or go on with them, and meet the other ranks.

        Raises BadInput unless RUN_ID is new, or RESUME=1 or torchrun --max-restarts was given and
        all settings are as they were. (On several machines a restart cannot be told from a start.)
        """
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        if restarts and not self.named:
            raise BadInput("RUN_ID=: torchrun --max-restarts needs one, to go on with.")
        shared_store = os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1"
        if restarts and shared_store and self.ranks.local_world != self.ranks.world:
            raise BadInput(
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE: must be 1 for --max-restarts on several"
                " machines."
            )
        if self.ranks.rank == 0:
            self.open(bool(self.resume or restarts))
        self.ranks.connect()
        # the name too: it may hold the time, which ranks do not read in the same second
        shared = json.dumps([self.name, self.rows]).encode()
        self.name, self.rows = json.loads(bytes(self.ranks.share(shared)))
        self.folder = Path("logs") / self.name

    def open(self, resume: bool) -> None:
        """Open the two logs; what a kill left as half a line, or half a file, is taken away."""
        text, figures = Path(f"{self.folder}.txt"), self.folder / "metrics.jsonl"
        if not resume and (text.exists() or self.folder.exists()):
            raise BadInput(
                f"RUN_ID={self.name}: exists in logs/; choose another, or RESUME=1 to go on with"
                " it."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.text = open(text, "a", buffering=1)  # noqa: SIM115 (open until the process ends)
            self.figures = open(figures, "a", buffering=1)  # noqa: SIM115
            self.lock()
            for part in self.folder.glob("*.part"):
                part.unlink()
            for path, file in ((text, self.text), (figures, self.figures)):
                file.truncate(path.read_bytes().rfind(b"\n") + 1)
            rows = [read_row(line) for line in figures.read_text().splitlines()]
        except (OSError, ValueError, RecursionError) as why:
            raise BadInput(
                f"RUN_ID={self.name}: {in_words(why)}; run where logs/ can be made and are whole,"
                " or choose another."
            ) from None
        if rows:
            self.rows = rows_by_label(rows)
            self.check_settings(rows[0], f"RUN_ID={self.name}")
        else:
            self.write_head()
        self.line(f"log:{text}")
        self.line(self.machine())

    def lock(self) -> None:
        """Raises BadInput if another process has this log."""
        assert self.text
        try:
            fcntl = importlib.import_module("fcntl")  # not on top: Windows has none
            fcntl.flock(self.text, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"RUN_ID={self.name}: is still running; stop it first, or choose another."
            ) from None
        except (ImportError, OSError):
            pass  # Windows and some file systems have no such locks

    def write_head(self) -> None:
        """Source and settings, on top of a new run's logs."""
        words = " ".join(f"{name}={shown(self.settings[name])}" for name in SETTINGS)
        self.append(self.text, f"{read_source()}\n{'=' * 100}\nsettings: {words}")
        self.append(self.figures, json.dumps({"label": "settings", **self.settings}))

    def machine(self) -> str:
        """Versions and machine, as a line."""
        ranks = self.ranks
        device = f"cpu threads:{torch.get_num_threads()}"
        if ranks.cuda:
            device = torch.cuda.get_device_name()
        return (
            f"python:{sys.version.split()[0]} torch:{torch.__version__} numpy:{np.__version__}"
            f" device:{device} dtype:{ranks.dtype} world_size:{ranks.world}"
            f" compile:{int(ranks.compile)}"
        )

    def check_settings(self, there: Mapping[str, Any], where: str | Path) -> None:
        """Raises BadInput naming the settings that were others there."""
        wrong = [
            f"{name}={shown(value)} (there {in_words(shown(there.get(name)))})"
            for name, value in self.settings.items()
            if shown(there.get(name)) != shown(value) and name not in ("RESUME", "SAVE_EVERY")
        ]
        if wrong:
            more = f" and {len(wrong) - 9} more" if wrong[9:] else ""
            raise BadInput(
                f"{where}: was begun with other settings: {' '.join(wrong[:9])}{more}. Set them as"
                " they were, or choose another RUN_ID."
            )

    def append(self, file: typing.TextIO | None, text: str) -> None:
        """Add a line to one of the logs, if it is open. Raises Fault."""
        if not (file and self.text):
            return
        try:
            file.write(text + "\n")
        except OSError as why:
            self.text = self.figures = None  # this can still be said on the console
            raise Fault(
                f"{file.name}: the log cannot grow: {why.strerror}. Correct that, then"
                f" {self.remedy()}."
            ) from None

    def remedy(self) -> str:
        """What goes on with this run."""
        return f"RUN_ID={self.name} RESUME=1"

    def line(self, text: str) -> None:
        """Print and log a line, on rank 0."""
        if self.ranks.rank == 0:
            CONSOLE.say(text)
            self.append(self.text, text)

    def due(self, ms: float) -> bool:
        """Whether there must be a line now, if the next can be only in so many ms.

        Rank 0 decides for itself: what it says must not need another rank.
        """
        return self.ranks.rank == 0 and CONSOLE.silent_in(ms / 1000)

    def metric(self, label: str, *, digits: int = 8, **fields: Any) -> None:
        """Log figures under a label, rounded in the text, exact in metrics.jsonl.

        A label may come again with other figures; with the same ones that is a Fault.
        """
        key = (label, *fields)
        if key in self.labels:
            raise Fault(f"label {label} logged twice")
        self.labels.add(key)
        words = [label]
        for name, value in fields.items():
            style = FORMATS.get(name, f"{{:.{digits}f}}" if isinstance(value, float) else "{}")
            if isinstance(value, bool):
                value = "yes" if value else "no"
            words.append(f"{name}:{style.format(value)}")
        self.line(" ".join(words))
        self.append(self.figures, json.dumps({"label": label, **fields}))
        self.rows[label] = fields


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, for which the host waits once a dtype and device, not for each tensor."""
    found: dict[str, Tensor] = {}
    kinds: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, tensor in tensors.items():
        found[name] = tensor  # in the order that was given
        kinds.setdefault((tensor.dtype, tensor.device), []).append(name)
    for names in kinds.values():
        whole = torch.cat([tensors[name].detach().flatten() for name in names]).cpu()
        parts = whole.split([tensors[name].numel() for name in names])
        for name, part in zip(names, parts, strict=True):
            found[name] = part.view(tensors[name].shape)
    return found


class CheckpointStore:
    """Files KIND.NUMBER.ckpt in a run's folder: a thread of rank 0 writes, rank 0 reads for all."""

    def __init__(self, ranks: Ranks, log: RunLog) -> None:
        self.ranks, self.log = ranks, log
        self.folder = log.folder
        self.writer = ThreadPoolExecutor(1)
        self.writing: Future = self.writer.submit(int)  # done at once: nothing is being written

    def paths(self, kind: str) -> list[Path]:
        """Files of a kind, oldest first."""
        return sorted(self.folder.glob(f"{kind}.*.ckpt"))

    @CONSOLE.doing("writing a checkpoint")
    def wait(self) -> None:
        """Wait for what is being written. Raises the Fault that it ended in."""
        self.writing.result()

    def save(self, kind: str, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, as they are now, in the background; the file before is kept.

        Raises Fault if the last time failed.
        """
        self.wait()
        if self.ranks.rank:
            return
        for old in self.paths(kind)[:-1]:
            old.unlink()
        path = self.folder / f"{kind}.{number:09d}.ckpt"
        now = to_host(tensors)
        header = {"settings": self.log.settings}
        self.writing = self.writer.submit(
            lambda: write_file(path, seal(header, now), self.log.remedy())
        )

    def restore(
        self, kind: str, check: Callable[[Mapping[str, Tensor]], None]
    ) -> dict[str, Tensor]:
        """Tensors of the newest whole file of a kind, for all ranks; {} if there is none.

        A file is whole if it can be read and check() does not raise ValueError. Raises BadInput for
        one of other settings, and if none of a run's checkpoints is whole; a damaged file of
        another kind costs what it held.
        """
        data: bytes | bytearray = b""
        damaged: list[Path] = []
        paths = self.paths(kind) if self.ranks.rank == 0 else []
        for path in reversed(paths):
            try:
                data = bytearray(path.read_bytes())
                header, tensors = unseal(data)
                if not is_flat(header["settings"]):
                    raise ValueError("its settings are no settings")
                self.log.check_settings(header["settings"], path)
                check(tensors)
                break
            except BadInput:
                raise
            except Exception as why:  # damage makes the readers raise all sorts
                self.log.line(f"{path}: damaged: {in_words(why)}")
                data = b""
                damaged.append(path)
        if paths and not data and kind == "checkpoint":
            raise BadInput(
                f"RUN_ID={self.log.name}: no {kind} of it is whole; choose another RUN_ID."
            )
        if data:
            self.log.line(f"resuming from {path}")
        for bad in damaged:  # or save() would take it for the one to keep
            bad.rename(f"{bad}.damaged")
        data = self.ranks.share(data)
        return unseal(data)[1] if data else {}


class Run:
    """What a run has beside its Config and its model."""

    def __init__(self, c: Config) -> None:
        """Raises BadInput for a device that is not there. Nothing is written before log.start()."""
        self.ranks = Ranks(c)
        self.log = RunLog(c, self.ranks)
        self.store = CheckpointStore(self.ranks, self.log)

    def stop(self) -> None:
        """End all ranks after a signal, once what is being written is written."""
        self.store.wait()
        self.log.line(
            f"stopped by a signal; all that was done is in {self.log.folder};"
            f" {self.log.remedy()} goes on"
        )
        if self.ranks.world > 1:
            dist.barrier()  # torchrun kills all ranks soon after the first has ended
        sys.exit(STOP_SIGNALS.exit_status())


# ==================================================================================================
# 6. Data
#
# A shard is 256 little-endian int32 (magic, version, number of tokens, zeros), then uint16 tokens.
# Headers and sizes are checked at the start; token ids too, or, of a training split over
# SCAN_LIMIT, as they are read. Training sequence i of a run follows from SEED and i (with
# DATA_ORDER=shards also from TRAIN_BATCH_TOKENS), so a run that goes on needs no state of its
# loader. Bytes of text, by which bpb divides, are counted here only.
# ==================================================================================================

SHARD_START = [20240520, 1]
DOCUMENT_START = 1  # the token that begins a document
COMPARED_TOKENS = 2**24  # tokens of a split that are compared with the other's at the start
NGRAM = 64  # tokens: stretches of so many are compared
SCAN_LIMIT = 2**29  # bytes of a split up to which all token ids are checked at the start


def open_shard(path: Path, vocab_size: int, scan: bool) -> np.memmap:
    """Memory map [n] uint16 of a shard; scan: check its ids too. Raises BadInput."""
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=256)
    except OSError as why:
        raise BadInput(
            f"{path}: {why.strerror}; a shard must be a file that can be read."
        ) from None
    if len(header) < 256 or header[:2].tolist() != SHARD_START:
        raise BadInput(
            f"{path}: {size} bytes, starts {header[:2].tolist()}; a shard has 1024 bytes of header"
            f" and starts with magic and version {SHARD_START}. Make it with data/prepare.py."
        )
    n = int(header[2])
    if n < 1 or size != 1024 + 2 * n:
        raise BadInput(
            f"{path}: the header says {n} tokens, the file has {size} bytes; it must be 1024 + 2"
            " times the tokens. Make it again."
        )
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024, shape=(n,))
    if scan:
        check_ids(tokens, path, vocab_size)
    return tokens


def check_ids(tokens: np.ndarray, where: str | Path, vocab_size: int) -> None:
    """Raises BadInput for an id outside the vocabulary."""
    outside = tokens >= vocab_size
    if outside.any():
        at = int(outside.argmax())  # flatnonzero() would list all of them
        raise BadInput(
            f"{where}: token id {int(tokens.ravel()[at])} at position {at};"
            f" VOCAB_SIZE={vocab_size} allows 0 to {vocab_size - 1}. Use the tokenizer of these"
            " shards."
        )


def open_split(c: Config, split: str) -> list[np.memmap]:
    """A split's shards in order of name, checked. Raises BadInput."""
    paths = sorted(Path(c.data_path).glob(f"fineweb_{split}_*.bin"))
    if not paths:
        raise BadInput(
            f"DATA_PATH={c.data_path}: no fineweb_{split}_*.bin there; run make fineweb (or make"
            " demo) or set DATA_PATH."
        )
    scan = split == "val" or sum(p.stat().st_size for p in paths) <= SCAN_LIMIT
    return [open_shard(path, c.vocab_size, scan) for path in paths]


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Random order [n] of the sequences of an epoch."""
    return np.random.default_rng((seed, epoch, 1)).permutation(n)


def coprime_stride(n: int) -> int:
    """The least stride from 0.618 n on that is coprime to n: i * stride % n meets all n places."""
    stride = int(n * 0.618)
    while math.gcd(stride, n) != 1:
        stride += 1
    return stride


class ShardDraws:
    """Which sequences of which shards a step gets with DATA_ORDER=shards (#1060).

    Of the shards 8, in the first step, to 32, from step 1800 on, are drawn, and get one sequence
    each and a share of the rest at random; a shard's chance and share go with the sequences that it
    has left, to the power 0.9 falling to 0.5. An epoch ends for all shards at once. What is left
    follows from the steps before: all are drawn in order, once, and kept.
    """

    STEPS = 1800  # in which the number of shards grows and the power falls

    def __init__(self, seed: int, counts: Sequence[int], size: int) -> None:
        """counts: sequences of each shard; size: those of a step over all ranks."""
        self.seed, self.size, self.counts = seed, size, np.array(counts)
        self.left, self.epoch = self.counts.copy(), 0
        self.steps: list[np.ndarray] = []
        self.lock = threading.Lock()  # calibration reads while a thread reads ahead

    def of_step(self, step: int) -> np.ndarray:
        """[size,3] int32: epoch, shard and how many it gave before, of each sequence of a step."""
        with self.lock:
            while len(self.steps) <= step:
                self.steps.append(self.draw(len(self.steps)))
            return self.steps[step]

    def draw(self, step: int) -> np.ndarray:
        """What of_step() gives for the next step; a shard that has too few left gives those."""
        rng = np.random.default_rng((self.seed, step, 2))
        grown = min(1.0, step / self.STEPS)
        parts: list[np.ndarray] = []
        missing = self.size
        while missing:
            if not self.left.any():
                self.left, self.epoch = self.counts.copy(), self.epoch + 1
            n = min(round(8 + 24 * grown), int(np.count_nonzero(self.left)), missing)
            weights = self.left ** (0.9 - 0.4 * grown)
            shards = rng.choice(len(weights), n, replace=False, p=weights / weights.sum())
            shares = weights[shards] / weights[shards].sum()
            taken = np.minimum(1 + rng.multinomial(missing - n, shares), self.left[shards])
            total = int(taken.sum())
            # rows of a shard follow each other: the number of its first one, for each of them
            begins = (np.cumsum(taken) - taken).repeat(taken)
            before = (self.counts - self.left)[shards].repeat(taken) + np.arange(total) - begins
            epochs = np.full(total, self.epoch)
            parts.append(np.stack((epochs, shards.repeat(taken), before), 1).astype(np.int32))
            self.left[shards] -= taken
            missing -= total
        return np.concatenate(parts)


class TrainData:
    """Training sequences. An epoch cuts the shards anew and visits all sequences in a new order.

    The end of the longest shard is held out to compare averages: 1 % of all tokens, at most 2**18,
    at least a sequence.
    """

    @CONSOLE.doing("reading training shards")
    def __init__(self, c: Config, ranks: Ranks) -> None:
        """Raises BadInput for shards that are damaged or too short."""
        self.c, self.ranks, self.T = c, ranks, c.train_seq_len
        self.shards: list[Any] = [*open_split(c, "train")]  # memory maps
        self.thread = ThreadPoolExecutor(1)
        total = sum(map(len, self.shards))
        longest = max(range(len(self.shards)), key=lambda k: len(self.shards[k]))
        keep = max(1, min(total // 100, 2**18) // self.T) * self.T + 1
        self.held_out = np.array(self.shards[longest][-keep:])
        self.shards[longest] = self.shards[longest][:-keep]
        # sequences of each shard; one less than fit: the first may begin up to T - 1 tokens later
        self.counts = [max(0, (len(shard) - 1) // self.T - 1) for shard in self.shards]
        self.ends = np.cumsum(self.counts)
        self.draws = ShardDraws(c.seed, self.counts, c.train_batch_tokens // self.T)
        if not sum(self.counts) or len(self.held_out) < keep:
            raise BadInput(
                f"DATA_PATH={c.data_path}: {total} training tokens are too few for"
                f" TRAIN_SEQ_LEN={self.T}; give a shard of {5 * self.T} or more."
            )

    def sequence(self, i: int) -> np.ndarray:
        """Tokens [T+1] of sequence i of the run. Raises Fault if its shard has shrunk or gone.

        Sequences of all shards are shuffled together: shard after shard, the model would end fitted
        to the last one.
        """
        total = int(self.ends[-1])
        if self.c.data_order == "shards":
            step, row = divmod(i, self.draws.size)
            epoch, shard, taken = self.draws.of_step(step)[row].tolist()
            order = permutation(self.c.seed, epoch, total)
            count = self.counts[shard]
            number = (int(order[-1 - shard % total]) + taken * coprime_stride(count)) % count
        else:
            epoch, place = divmod(i, total)
            order = permutation(self.c.seed, epoch, total)
            index = int(order[place])
            if self.c.data_order == "coprime":
                index = (int(order[0]) + place * coprime_stride(total)) % total
            shard = int(np.searchsorted(self.ends, index, side="right"))
            number = index - int(self.ends[shard]) + self.counts[shard]
        cut = int(order[shard % total]) % self.T  # where the shard's first sequence begins
        return self.read(shard, cut + number * self.T)

    def read(self, shard: int, start: int) -> np.ndarray:
        """Tokens [T+1] from a place of a shard. Raises Fault."""
        path = self.shards[shard].filename
        try:  # not through the map: a file that shrinks would kill the process
            tokens = np.fromfile(path, "<u2", self.T + 1, offset=1024 + 2 * start)
        except OSError as why:
            raise Fault(f"{path}: {why.strerror}; bring it back, then RESUME=1.") from None
        if len(tokens) <= self.T:
            raise Fault(f"{path}: has shrunk since the start; bring it back, then RESUME=1.")
        return tokens

    def load(self, step: int) -> Tensor:
        """This rank's tokens [sequences, T+1] int64 of a step. Raises BadInput for a bad id."""
        count = self.c.train_batch_tokens // self.T
        mine = count // self.ranks.world
        first = step * count + self.ranks.rank * mine
        rows = np.stack([self.sequence(i) for i in range(first, first + mine)]).astype(np.int64)
        check_ids(rows, f"DATA_PATH={self.c.data_path}, step {step}", self.c.vocab_size)
        tokens = torch.from_numpy(rows)
        return tokens.pin_memory() if self.ranks.cuda else tokens

    def batches(self, step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (inputs, targets) [sequences, T] from a step on; a thread reads ahead."""
        ahead = self.thread.submit(self.load, step)
        while True:
            rows = ahead.result().to(self.ranks.device, non_blocking=True)
            step += 1
            ahead = self.thread.submit(self.load, step)
            yield rows[:, :-1], rows[:, 1:]


class ByteCounts:
    """UTF-8 bytes that a target stands for, by the challenge's rule.

    A piece counts its bytes; its leading space counts only after a token that is no boundary
    (control, unknown, unused); a byte token counts 1, a boundary 0. Tables are [V].
    """

    def __init__(self, path: str, vocab_size: int) -> None:
        """Raises BadInput if there is no such tokenizer or it is not the shards'."""
        sp = load_tokenizer(path, vocab_size)
        self.document_start = sp.bos_id()
        self.boundary = np.zeros(vocab_size, bool)
        self.space = np.zeros(vocab_size, bool)  # begins with a space
        self.size = np.zeros(vocab_size, np.uint8)  # without that space
        for i in range(vocab_size):
            self.boundary[i] = sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)
            if not self.boundary[i]:
                piece = sp.id_to_piece(i).replace("\u2581", " ")  # SentencePiece's sign for a space
                if len(piece.encode()) > 255:
                    raise BadInput(f"TOKENIZER_PATH={path}: piece {i} has over 255 bytes.")
                self.space[i] = piece.startswith(" ")
                self.size[i] = 1 if sp.is_byte(i) else len(piece.encode()) - self.space[i]

    def count(self, previous: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Bytes [n] uint8 of targets [n] after previous ids [n]."""
        return self.size[targets] + (self.space[targets] & ~self.boundary[previous])


def load_tokenizer(path: str, vocab_size: int) -> Any:
    """A SentencePiece processor of so many pieces. Raises BadInput."""
    import sentencepiece

    where = f"TOKENIZER_PATH={path}"
    file = Path(path)
    if not file.is_file():
        raise BadInput(
            f"{where}: no such file; run make fineweb (or make demo) or set TOKENIZER_PATH."
        )
    if file.name == "fineweb_1024_bpe.model" and file.stat().st_size == 253847:
        raise BadInput(
            f"{where}: 253,847 bytes is a lookalike that decodes the official shards to garbage;"
            " run make fineweb."
        )
    sp = sentencepiece.SentencePieceProcessor()
    try:
        sp.Load(str(file))
    except (RuntimeError, OSError) as why:
        raise BadInput(
            f"{where}: not a SentencePiece model ({str(why)[:80]}); give that of the shards."
        ) from None
    if sp.vocab_size() != vocab_size:
        raise BadInput(
            f"{where}: has {sp.vocab_size()} pieces, VOCAB_SIZE={vocab_size}; they must be equal."
        )
    return sp


class ValData:
    """The validation stream: tokens [N+1] int64 on the device, bytes [N] of its targets.

    N is a multiple of EVAL_SEQ_LEN, as in the challenge.
    """

    @CONSOLE.doing("reading validation shards")
    def __init__(self, c: Config, ranks: Ranks) -> None:
        """Raises BadInput if the shards or the tokenizer cannot be used."""
        tokens = np.concatenate(open_split(c, "val"))
        self.n = (len(tokens) - 1) // c.eval_seq_len * c.eval_seq_len
        self.dropped = len(tokens) - 1 - self.n
        tokens = tokens[: self.n + 1]
        counts = ByteCounts(c.tokenizer_path, c.vocab_size)
        of_documents = dict(DOCUMENTS="mask", TTT_PARAMS="lora", SLOT_RESET="document")
        for name, value in of_documents.items():
            needed = getattr(c, name.lower()) == value
            if needed and counts.document_start != DOCUMENT_START:
                raise BadInput(
                    f"TOKENIZER_PATH={c.tokenizer_path}: its documents begin with token"
                    f" {counts.document_start}; {name}={value} needs {DOCUMENT_START}."
                )
        self.bytes = counts.count(tokens[:-1], tokens[1:])
        self.total_bytes = int(self.bytes.sum(dtype=np.int64))
        if not self.total_bytes:
            raise BadInput(
                f"DATA_PATH={c.data_path}: the validation split, {len(tokens) + self.dropped}"
                f" tokens, has no text for a window of EVAL_SEQ_LEN={c.eval_seq_len}; use more text"
                " or a shorter window."
            )
        self.tokens = torch.from_numpy(tokens.astype(np.int64)).to(ranks.device)


# Whether training text has a validation document is asked of stretches of NGRAM tokens, which stand
# side by side in it and may stand anywhere in a shard. With h a random number for each token and B
# an odd one, all modulo 2^64, the hash of tokens x_0 ... x_63 is the sum of h(x_i) B^i: the
# difference of two running sums over the stream, times a power of B's inverse.


def ngram_hashes(tokens: np.ndarray) -> np.ndarray:
    """Hashes [n-63] uint64 of the stretches that begin at each of tokens [n]."""
    words = np.random.default_rng(64).integers(0, 2**64, 2**16, dtype=np.uint64)
    base = 0x9E3779B97F4A7C15  # odd: it has an inverse
    powers, inverse_powers = (
        np.cumprod(np.full(len(tokens), b, np.uint64), dtype=np.uint64)
        for b in (base, pow(base, -1, 2**64))
    )
    sums = np.zeros(len(tokens) + 1, np.uint64)
    np.cumsum(words[tokens] * powers, out=sums[1:])
    differences = sums[NGRAM:] - sums[:-NGRAM]
    return differences * inverse_powers[: len(differences)]


def document_ngrams(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hash [stretches], document [stretches], their number [documents]) of a stream [n].

    Stretches begin behind the token that begins a document; what is left at its end has none.
    """
    starts = np.concatenate([[-1], np.flatnonzero(tokens == DOCUMENT_START), [len(tokens)]])
    counts = (np.diff(starts) - 1) // NGRAM
    document = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(document)) - (np.cumsum(counts) - counts)[document]
    at = starts[document] + 1 + NGRAM * number
    return ngram_hashes(tokens)[at], document, counts


def ngrams_found(hashes: np.ndarray, shards: Sequence[np.ndarray], most: int) -> np.ndarray:
    """Which of the stretches with these hashes [n] stand in the first `most` tokens of shards."""
    keys = np.sort(hashes)
    found = np.zeros(len(keys), bool)
    block = 2**20
    for shard in shards:
        end = min(len(shard), most)
        for begin in range(0, end, block):
            part = ngram_hashes(shard[begin : min(end, begin + block + NGRAM - 1)])
            place = np.minimum(np.searchsorted(keys, part), len(keys) - 1)
            found[place[keys[place] == part]] = True
    return found[np.searchsorted(keys, hashes)]


# ==================================================================================================
# 7. Model
#
# One trunk, GPT.hidden(), for training and every evaluation. Parameters are fp32 and cast where
# they are used, so no optimiser works on bf16 weights. One or two matrices of every layer are one
# bank: Muon orthogonalises a bank in one batch, shared out over the ranks.
# ==================================================================================================

# Bank -> its matrices: one of the first kind for each layer, then one of the second.
BANKS = {
    "qo_bank": ("attn.c_q", "attn.proj"),
    "kv_bank": ("attn.c_k", "attn.c_v"),
    "mlp_up_bank": ("mlp.fc",),
    "mlp_down_bank": ("mlp.proj",),
}


class ParameterRule(NamedTuple):
    """What holds for all tensors whose name fits a pattern, in which @ stands for a block."""

    pattern: str
    init: str  # embedding, orthogonal, stream, q_gain; normal and fill have a `value`
    group: str  # of the optimiser: muon, or AdamW's embed, head, scalar; proj: see Optimizer
    export: str  # int6 and int8 are quantised, fp16 and fp32 kept
    value: float = 0.0


# Every tensor, of a bank every matrix, fits exactly one row.
# fmt: off
PARAMETER_RULES = (
    ParameterRule(r"tok_emb\.weight",                     "embedding",  "embed",  "int8"),
    ParameterRule(r"lm_head\.weight",                     "fill",       "head",   "int8", 0.0),
    ParameterRule(r"bigram\.embed\.weight",               "fill",       "embed",  "int8", 0.0),
    ParameterRule(r"bigram\.scale",                       "fill",       "scalar", "fp32", 0.05),
    ParameterRule(r"ve_shared\.embed\.weight",            "normal",     "embed",  "int8", 0.01),
    ParameterRule(r"ve_shared\.scale",                    "fill",       "scalar", "fp32", 0.1),
    ParameterRule(r"(bigram|ve_shared)\.proj\.weight",    "orthogonal", "proj",   "fp16"),
    ParameterRule(r"ve_layer_scales\.\d+|skip_weights",   "fill",       "scalar", "fp32", 1.0),
    ParameterRule(r"smear\.gate|skip_gates",              "fill",       "scalar", "fp32", 0.0),
    ParameterRule(r"iter_embed",                          "normal",     "scalar", "fp32", 0.02),
    ParameterRule(r"iter_gate",                           "fill",       "scalar", "fp32", -2.0),
    ParameterRule(r"lane_merge",                          "fill",       "scalar", "fp32", 0.5),
    ParameterRule(r"@resid_mix",                          "stream",     "scalar", "fp32"),
    ParameterRule(r"@(attn|mlp)_scale",                   "fill",       "scalar", "fp32", 1.0),
    ParameterRule(r"@attn\.q_gain",                       "q_gain",     "scalar", "fp32"),
    ParameterRule(r"@attn\.vrl_gate",                     "fill",       "scalar", "fp32", -1.5),
    ParameterRule(r"@attn\.vr_lambda",                    "fill",       "scalar", "fp32", 0.5),
    ParameterRule(r"@attn\.attn_gate\.weight",            "fill",       "scalar", "fp32", 0.0),
    ParameterRule(r"@attn\.attn_gate\.bias",              "fill",       "scalar", "fp32", 4.0),
    ParameterRule(r"@(attn\.c_[qkv]|mlp\.fc)\.weight",    "orthogonal", "muon",   "int6"),
    ParameterRule(r"@(attn|mlp)\.proj\.weight",           "fill",       "muon",   "int6", 0.0),
)
# fmt: on


@functools.cache
def parameter_rule(name: str) -> ParameterRule:
    """The row of PARAMETER_RULES for a tensor. Raises Fault unless exactly one fits."""
    rows = [
        rule
        for rule in PARAMETER_RULES
        if re.fullmatch(rule.pattern.replace("@", r"blocks\.\d+\."), name)
    ]
    if len(rows) != 1:
        raise Fault(f"parameter {name} fits {len(rows)} rows of PARAMETER_RULES, not one")
    return rows[0]


def matrix_names(name: str, num_layers: int) -> list[str]:
    """Names of a bank's matrices, in order; of another tensor, its own."""
    if name not in BANKS:
        return [name]
    return [f"blocks.{i}.{part}.weight" for part in BANKS[name] for i in range(num_layers)]


def export_kind(c: Config, name: str) -> str:
    """What PARAMETER_RULES store a parameter as; a bank's matrices are all of a kind."""
    return parameter_rule(matrix_names(name, c.num_layers)[0]).export


def split_banks(state: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Tensors by name, with banks as views of their matrices."""
    split: dict[str, Tensor] = {}
    for name, whole in state.items():
        parts = whole if name in BANKS else [whole]
        split |= zip(matrix_names(name, num_layers), parts, strict=True)
    return split


# Causal attention: q [B,R,H,d], the last R rows of a sequence, and k, v [B,T,K,d] -> [B,R,H,d].
# With DOCUMENTS=mask also what a row may see, [B,1,R,T].
AttentionFunction = Callable[..., Tensor]


def repeats_heads(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether SDPA gets a key/value head for each head: in fp32 a GPU has no kernel with fewer."""
    return device.type == "cuda" and dtype == torch.float32


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention by torch's scaled_dot_product_attention."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    rows, length = q.size(2), k.size(2)
    if mask is None and rows < length:
        mask = torch.ones(rows, length, dtype=torch.bool, device=q.device).tril(length - rows)
    # with a mask torch takes a kernel that does not know fewer key/value heads
    if mask is not None or repeats_heads(q.device, q.dtype):
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
    causal, grouped = mask is None, q.size(1) != k.size(1)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
    return y.transpose(1, 2)


def flash_attention(function: Callable[..., Any]) -> AttentionFunction:
    """Causal attention by FlashAttention's flash_attn_func.

    Its causal mask is aligned to the last key, so q may be the last R rows only.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B,R,heads,d] of queries [B,R,heads,d], keys and values [B,T,kv_heads,d]."""
        out = function(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out  # some return the log-sum-exp too

    return attend


def choose_attention(wanted: str, ranks: Ranks) -> tuple[str, AttentionFunction, str]:
    """(name, function, what to say of it) of the attention that ATTENTION asks for.

    Raises BadInput. FlashAttention-4 is taken only by name, and not compiled: its function cannot
    be traced, so a graph would break in every block.
    """
    note = ""
    for name, module in (("fa3", "flash_attn_interface"), ("fa4", "flash_attn.cute")):
        if wanted != name and (wanted != "auto" or name == "fa4"):
            continue
        try:
            if not ranks.cuda:
                raise ImportError("it needs a GPU")
            if name == "fa4" and ranks.compile:
                raise ImportError("it cannot be compiled; set COMPILE=0")
            function = importlib.import_module(module).flash_attn_func
            if ranks.dtype == torch.float32:
                raise ImportError("it has no fp32; set DTYPE=bf16")
            return name, flash_attention(function), ""
        except Exception as why:  # a library built for another torch raises all sorts
            if wanted == name:
                raise BadInput(
                    f"ATTENTION={name}: {module}: {why}; allowed here: auto or sdpa."
                ) from None
            absent = isinstance(why, ModuleNotFoundError) and why.name == module
            if ranks.cuda and not absent:
                note = f"ATTENTION=auto: {module} cannot be used ({why}); taking torch's own"
    return "sdpa", sdpa_attention, note


def attention_kernel(name: str, c: Config, ranks: Ranks) -> str:
    """The name of the attention, for SDPA with the kernel that torch takes in training.

    Raises BadInput if a GPU has none but plain products, many times slower. The private function is
    the only one that says which kernel is taken; the public ones can but forbid some.
    """
    if name != "sdpa":
        return name
    length = c.eval_seq_len if c.load_artifact else c.train_seq_len
    mask = None
    if c.documents == "mask":
        mask = torch.ones((1, 1, length, length), dtype=torch.bool, device=ranks.device)
    repeated = mask is not None or repeats_heads(ranks.device, ranks.dtype)
    kv_heads = c.num_heads if repeated else c.num_kv_heads
    q, k = (
        torch.empty(
            (1, heads, length, c.model_dim // c.num_heads),
            dtype=ranks.dtype,
            device=ranks.device,
            requires_grad=True,
        )
        for heads in (c.num_heads, kv_heads)
    )
    grouped = c.num_heads != kv_heads
    number = torch._fused_sdp_choice(q, k, k, mask, 0.0, mask is None, enable_gqa=grouped)
    kernels = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
    kernel = kernels.get(number, f"kernel{number}")
    if ranks.cuda and kernel == "math":
        raise BadInput(
            "ATTENTION=sdpa: torch has no fused kernel for these heads on this GPU; install"
            " FlashAttention or change NUM_HEADS."
        )
    return f"{name}_{kernel}"


def rms_norm(x: Tensor) -> Tensor:
    """x over its root mean square, by the last axis."""
    return F.rms_norm(x, (x.size(-1),))


def same_document(ids: Tensor) -> Tensor:
    """What each row of ids [B,T] sees of its own document, up to itself: a mask [B,1,T,T]."""
    document = (ids == DOCUMENT_START).cumsum(1)
    return (document[:, :, None] == document[:, None]).tril().unsqueeze(1)


def last_rows(x: Tensor, n: int) -> Tensor:
    """The last n rows of x [B,T,...]; x itself, without a node in the graph, if those are all."""
    return x if n == x.size(1) else x[:, -n:]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of the first 2r dimensions of x [B,T,heads,d]; cos, sin [T,1,r]."""
    r = cos.size(-1)
    a, b = x[..., :r], x[..., r : 2 * r]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, x[..., 2 * r :]), -1)


class LowRankEmbedding(nn.Module):
    """Table [num,dim], a linear map to `out` (none if equal) and a learned scalar."""

    def __init__(self, num: int, dim: int, out: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num, dim)
        self.proj = nn.Linear(dim, out, bias=False) if dim != out else None
        self.scale = nn.Parameter(torch.empty(()))

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """[B,T] ids -> [B,T,out]."""
        x = self.embed(ids).to(dtype)
        if self.proj is not None:
            x = F.linear(x, self.proj.weight.to(dtype))
        return x * self.scale.to(dtype)


class Smear(nn.Module):
    """Mixes each position with the one before: x[t] <- (1-g) x[t] + g x[t-1], x[-1] = 0.

    With a mask of the positions that begin a document, nothing comes before those.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, begins: Tensor | None = None) -> Tensor:
        """[B,T,D], mask [B,T] -> [B,T,D]."""
        gate = self.gate.sigmoid().to(x.dtype)
        before = F.pad(x, (0, 0, 1, -1))
        if begins is not None:
            before = before.masked_fill(begins.unsqueeze(-1), 0)
        return (1 - gate) * x + gate * before


class LayerCall(NamedTuple):
    """A call of a layer in a forward, and what comes with it."""

    layer: int
    vectors: int  # which of the block's sets of vectors; with RECUR_STYLE=own each visit has one
    repeat: int | None  # row of iter_embed for what is added to its input
    skip: int | None  # row of skip_weights likewise, added before
    kept: bool  # whether its output is added to a later input
    opens: bool  # whether the two lanes part before it


def visits(c: Config, recurring: bool) -> list[tuple[int, int]]:
    """(layer, calls of it before) in the order of a forward."""
    order = [(i, 0) for i in range(c.num_layers)]
    if recurring and c.recur_style == "gated":
        loops = {i: range(c.recur_loops) for i in c.recur_layers}
        order = [(i, again) for i, _ in order for again in loops.get(i, range(1))]
    elif recurring and c.recur_layers:
        at = max(c.recur_layers) + 1
        order[at:at] = [(i, again) for again in range(1, c.recur_loops) for i in c.recur_layers]
    return order


def layer_plan(c: Config, recurring: bool) -> list[LayerCall]:
    """The calls of layers in the order of a forward.

    Skips are those of a U-Net: outputs of the first half are added, weighted, to inputs of the
    second half, last first.
    """
    order = visits(c, recurring)
    own = c.recur_style == "own"
    # calls by number; with RECUR_STYLE=own repeats have no skips
    counted = [n for n, (_, again) in enumerate(order) if not (own and again)]
    half = len(counted) // 2
    encoder, decoder = counted[:half], counted[half:]
    opening = first_with_lanes(c, order, decoder[0])
    takers = skip_takers(c, half, decoder, opening)
    givers = encoder[half - len(takers) :]
    # more takers than rows (#1278 with many repeats): the last row is used again
    skip_row = {n: min(row, c.num_layers // 2 - 1) for row, n in enumerate(takers)}
    repeats = [n for n, (_, again) in enumerate(order) if again and c.recur_style == "gated"]
    repeat_row = {n: row for row, n in enumerate(repeats)}
    return [
        LayerCall(
            layer,
            vectors=again if own else 0,
            repeat=repeat_row.get(n),
            skip=skip_row.get(n),
            kept=n in givers,
            opens=n == opening,
        )
        for n, (layer, again) in enumerate(order)
    ]


def first_with_lanes(c: Config, order: Sequence[tuple[int, int]], begin: int) -> int | None:
    """The call before which lanes part: of those from begin on the first of a layer that has them.

    A layer has lanes from PARALLEL_START_LAYER on.
    """
    if not c.parallel_start_layer:
        return None
    calls = range(begin, len(order))
    return next((n for n in calls if order[n][0] >= c.parallel_start_layer), None)


def skip_takers(c: Config, half: int, decoder: Sequence[int], opening: int | None) -> list[int]:
    """The calls, of the second half, that an output of one of the `half` first ones is added to."""
    rows = c.num_layers // 2  # of skip_weights
    if not rows:
        return []
    # #1278 stops once as many are added as outputs are left
    most = math.ceil(half / 2) if c.recur_style == "gated" else rows
    # behind the place where lanes part #1435 adds skips to what nobody reads
    return [n for n in decoder[:most] if opening is None or n <= opening]


class Adapted(NamedTuple):
    """A matrix and what each sequence of a batch adds to it, b a, which is not multiplied out."""

    weight: Tensor  # [out,in]
    a: Tensor  # [B,r,in]
    b: Tensor  # [B,out,r]


Factors = Mapping[int, Sequence[tuple[Tensor, Tensor]]]  # by layer: a, b of each of LayerWeights


def linear(x: Tensor, w: Tensor | Adapted) -> Tensor:
    """x [B,T,in] times a matrix [out,in], or times one for each of the B."""
    if isinstance(w, Tensor):
        return F.linear(x, w)
    return F.linear(x, w.weight) + x @ w.a.mT @ w.b.mT


class LayerWeights(NamedTuple):
    """A layer's matrices, out of the banks, in the compute dtype: [out,in]."""

    q: Tensor | Adapted
    o: Tensor | Adapted
    k: Tensor | Adapted
    v: Tensor | Adapted
    up: Tensor | Adapted
    down: Tensor | Adapted


class Visit(NamedTuple):
    """What a block is given beside its input, in one call."""

    x0: Tensor  # the embedded sequence [B,T,D]
    rope: tuple[Tensor, Tensor]  # cos and sin [T,1,r]
    value_extra: Tensor | None  # of the value embedding [B,T,K*d]
    v_first: Tensor | None  # values of layer 0 [B,T,K*d], None there
    vectors: int  # which of the block's sets of vectors
    rows: int  # R: how many of the last rows are asked for
    mask: Tensor | None  # [B,1,T,T], what attention sees; None: all that came before


class Attention(nn.Module):
    """Attention's vectors and arithmetic; its matrices are in the banks."""

    def __init__(self, c: Config, index: int, attend: AttentionFunction) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.attend = c.num_heads, c.num_kv_heads, attend
        self.exclusive = index >= c.num_layers - c.xsa_last_n
        self.q_gain = nn.Parameter(torch.empty(c.num_heads))
        self.vrl_gate = nn.Parameter(torch.empty(())) if c.vrl_enabled and index else None
        self.raw_first = c.vrl_enabled
        self.vr_lambda = nn.Parameter(torch.empty(2)) if c.value_residual else None
        self.attn_gate = nn.Linear(c.model_dim, c.num_heads) if c.gated_attention else None

    def forward(self, x: Tensor, w: LayerWeights, visit: Visit) -> tuple[Tensor, Tensor]:
        """([B,R,D] attention of the last R rows of x [B,T,D], [B,T,K*d] values before mixing).

        Layer 0's are mixed into later ones; with VRL they are without the value embedding.
        """
        B, T, _ = x.shape
        R = visit.rows
        q = linear(last_rows(x, R), w.q).view(B, R, self.heads, -1)
        k = linear(x, w.k).view(B, T, self.kv_heads, -1)
        raw = values = linear(x, w.v)
        if visit.value_extra is not None:
            values = raw + visit.value_extra
        v = self.mix_values(values, visit.v_first).view(B, T, self.kv_heads, -1)
        cos, sin = visit.rope
        q = rotate(rms_norm(q), cos[-R:], sin[-R:]) * self.q_gain.to(x.dtype)[:, None]
        k = rotate(rms_norm(k), cos, sin)
        seen = () if visit.mask is None else (visit.mask[:, :, -R:],)
        y = self.attend(q, k, v, *seen)
        if self.attn_gate is not None:
            weight, bias = (p.to(x.dtype) for p in self.attn_gate.parameters())
            y = y * F.linear(last_rows(x, R), weight, bias).sigmoid().unsqueeze(-1)
        if self.exclusive:
            y = self.exclude_own(y, last_rows(v, R))
        return y.reshape(B, R, -1), raw if self.raw_first else values

    def mix_values(self, v: Tensor, v_first: Tensor | None) -> Tensor:
        """Value residual: values mixed with layer 0's; v_first is None in layer 0 itself."""
        if v_first is None:
            v_first = v
        if self.vr_lambda is not None:
            first, own = self.vr_lambda.to(v.dtype)
            return first * v_first + own * v
        if self.vrl_gate is not None:
            return v.lerp(v_first, self.vrl_gate.sigmoid().to(v.dtype))
        return v

    def exclude_own(self, y: Tensor, own: Tensor) -> Tensor:
        """XSA (#549): y [B,R,H,d] without what points along the row's own value [B,R,K,d]."""
        y = y.reshape(*own.shape[:3], self.heads // self.kv_heads, -1)
        own = own.unsqueeze(3)
        along = (y * own).sum(-1, keepdim=True)
        return y - along / own.square().sum(-1, keepdim=True).clamp_min(1e-24) * own


class Block(nn.Module):
    """A layer's arithmetic and vectors; with RECUR_STYLE=own a set of these for each visit."""

    def __init__(self, c: Config, index: int, attend: AttentionFunction) -> None:
        super().__init__()
        own = c.recur_style == "own" and index in c.recur_layers
        visits = (c.recur_loops,) if own else ()
        self.attn = Attention(c, index, attend)
        self.attn_scale = nn.Parameter(torch.empty(*visits, c.model_dim))
        self.mlp_scale = nn.Parameter(torch.empty(*visits, c.model_dim))
        self.resid_mix = nn.Parameter(torch.empty(*visits, 2, c.model_dim))
        self.parallel = index >= c.num_layers - c.parallel_last_n
        self.norm_scale = 1 / math.sqrt(index + 1) if c.ln_scale else 1.0

    def forward(
        self, x: Tensor, lane: Tensor | None, w: LayerWeights, visit: Visit
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(x [B,R,D], lane [B,R,D] or None, [B,T,K*d] values) of x and lane [B,T,D].

        With a lane of its own the MLP reads and writes that, and attention alone writes x.
        """
        mix = self.of_visit(self.resid_mix, 2, visit.vectors, x.dtype)
        attn_scale = self.of_visit(self.attn_scale, 1, visit.vectors, x.dtype)
        mlp_scale = self.of_visit(self.mlp_scale, 1, visit.vectors, x.dtype)
        x = mix[0] * x + mix[1] * visit.x0
        a, v = self.attn(rms_norm(x) * self.norm_scale, w, visit)
        before = last_rows(x, visit.rows)
        x = before + attn_scale * linear(a, w.o)
        if lane is not None:
            lane = last_rows(lane, visit.rows)
            return x, lane + mlp_scale * self.mlp(lane, w), v
        read = before if self.parallel else x
        return x + mlp_scale * self.mlp(read, w), None, v

    def mlp(self, x: Tensor, w: LayerWeights) -> Tensor:
        """[B,R,D] -> [B,R,D]."""
        h = F.leaky_relu(linear(rms_norm(x) * self.norm_scale, w.up), 0.5).square()
        return linear(h, w.down)

    @staticmethod
    def of_visit(p: Tensor, dims: int, vectors: int, dtype: torch.dtype) -> Tensor:
        """A vector's values on a visit: its last `dims` axes, of that visit's set."""
        return p.to(dtype).view(-1, *p.shape[-dims:])[vectors]


class GPT(nn.Module):
    """The model of #549 and #1084, 26,928,220 parameters by default."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        c: Config,
        dtype: torch.dtype = torch.float32,
        attend: AttentionFunction = sdpa_attention,
    ) -> None:
        super().__init__()
        L, D = c.num_layers, c.model_dim
        kv, wide = D // c.num_heads * c.num_kv_heads, int(D * c.mlp_mult)
        self.c, self.dtype, self.attend = c, dtype, attend
        self.tok_emb = nn.Embedding(c.vocab_size, D)
        self.lm_head = None if c.tie_embeddings else nn.Linear(D, c.vocab_size, bias=False)
        self.bigram = None
        if c.bigram_vocab_size:
            self.bigram = LowRankEmbedding(c.bigram_vocab_size, c.bigram_dim, D)
        self.smear = Smear(D)
        self.skip_weights = nn.Parameter(torch.empty(L // 2, D)) if L > 1 else None
        gated = c.skip_gates_enabled and L > 1
        self.skip_gates = nn.Parameter(torch.empty(L // 2, D)) if gated else None
        repeats = len(c.recur_layers) * (c.recur_loops - 1) if c.recur_style == "gated" else 0
        self.iter_embed = nn.Parameter(torch.empty(repeats, D)) if repeats else None
        self.iter_gate = nn.Parameter(torch.empty(repeats, D)) if repeats else None
        self.lane_merge = nn.Parameter(torch.empty(())) if c.parallel_start_layer else None
        self.ve_shared = LowRankEmbedding(c.vocab_size, c.ve_dim, kv) if c.ve_enabled else None
        self.ve_layer_scales = nn.ParameterList(
            nn.Parameter(torch.empty(1)) for _ in c.ve_layers if c.ve_enabled
        )
        self.blocks = nn.ModuleList(Block(c, i, attend) for i in range(L))
        self.qo_bank = nn.Parameter(torch.empty(2 * L, D, D))
        self.kv_bank = nn.Parameter(torch.empty(2 * L, kv, D))
        self.mlp_up_bank = nn.Parameter(torch.empty(L, wide, D))
        self.mlp_down_bank = nn.Parameter(torch.empty(L, D, wide))
        self.plans = {recurring: layer_plan(c, recurring) for recurring in (False, True)}
        self.recurring = bool(c.recur_layers) and c.recur_start == 0
        self.make_rope_tables()
        if not self.cos.is_meta:
            self.reset_parameters()

    def make_rope_tables(self) -> None:
        """cos and sin [T,1,r] for the longest sequence, from fp64 angles."""
        c = self.c
        rotated = c.rope_dims or c.model_dim // c.num_heads
        stretch = max(1.0, c.train_seq_len / c.rope_train_len)
        base = c.rope_base * (stretch ** (rotated / (rotated - 2)) if rotated > 2 else 1)
        # an artifact is not trained, and only claims its TRAIN_SEQ_LEN: that makes nothing long
        trained = 0 if c.load_artifact else c.train_seq_len
        positions = torch.arange(max(c.eval_seq_len, trained)).double()
        frequencies = base ** (-torch.arange(0, rotated, 2).double() / rotated)
        angles = torch.outer(positions, frequencies).unsqueeze(1)
        self.register_buffer("cos", angles.cos().to(self.dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(self.dtype), persistent=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values by PARAMETER_RULES, a function of SEED alone."""
        c = self.c
        g = torch.Generator().manual_seed(c.seed)
        for name, p in split_banks(dict(self.named_parameters()), c.num_layers).items():
            rule = parameter_rule(name)
            if rule.init == "embedding":
                p.normal_(0, c.tied_embed_init_std if c.tie_embeddings else 1.0, generator=g)
            elif rule.init == "normal":
                p.normal_(0, rule.value, generator=g)
            elif rule.init == "orthogonal":
                nn.init.orthogonal_(p, generator=g)
            elif rule.init == "stream":  # all of x, nothing of x0
                p.copy_(torch.tensor([1.0, 0.0])[:, None])
            elif rule.init == "q_gain":
                p.fill_(c.qk_gain_init)
            else:
                p.fill_(rule.value)

    def embed(self, ids: Tensor) -> Tensor:
        """[B,T] ids -> [B,T,D], normalised and smeared, with the bigram embedding if there is one.

        Bucket of position t: ((36313 id[t]) XOR (27191 id[t-1])) mod (buckets - 1); of position 0
        the last one, and with DOCUMENTS=mask that of a document's first.
        """
        begins = ids == DOCUMENT_START if self.c.documents == "mask" else None
        x = self.tok_emb(ids).to(self.dtype)
        if self.bigram is not None:
            last = self.c.bigram_vocab_size - 1
            pairs = torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1]) % last
            pairs = F.pad(pairs, (1, 0), value=last)
            if begins is not None:
                pairs = pairs.masked_fill(begins, last)
            x = x + self.bigram(pairs, self.dtype)
        return self.smear(rms_norm(x), begins)

    def add_skip(self, x: Tensor, earlier: Tensor, row: int) -> Tensor:
        """x [B,T,D] with the output of an earlier call, by a row of weights, and of gates."""
        assert self.skip_weights is not None  # or layer_plan() has no skips
        skip = self.skip_weights[row].to(x.dtype) * earlier
        if self.skip_gates is None:
            return x + skip
        return skip.lerp(x, self.skip_gates[row].sigmoid().to(x.dtype))

    def add_repeat(self, x: Tensor, row: int) -> Tensor:
        """x [B,T,D] with the gated embedding of a repeat."""
        assert self.iter_embed is not None and self.iter_gate is not None  # likewise
        gate = self.iter_gate[row].sigmoid()
        return x + (gate * self.iter_embed[row]).to(x.dtype)

    def asleep(self) -> list[nn.Parameter]:
        """Parameters that have no part in the forward as long as recurrence has not begun."""
        found = () if self.recurring else (self.iter_embed, self.iter_gate)
        return [p for p in found if p is not None]

    def hidden(
        self, ids: Tensor, tail: int | None = None, factors: Factors | None = None
    ) -> Tensor:
        """[B,T] ids -> final normalised hidden states [B,T,D].

        With tail only the last rows [B,tail,D]: the last block needs the others as keys and values,
        but not their queries, output and MLP. With factors each sequence has its own matrices.
        """
        T = ids.size(1)
        x = x0 = self.embed(ids)
        lane = v_first = None
        extra = self.ve_shared(ids, self.dtype) if self.ve_shared is not None else None
        # unbind: the backward of indexing would make a bank of zeros for every matrix
        banks = [getattr(self, bank).to(self.dtype).unbind() for bank in BANKS]
        rope = self.cos[:T], self.sin[:T]
        mask = same_document(ids) if self.c.documents == "mask" else None
        skips: list[Tensor] = []
        plan = self.plans[self.recurring]
        for n, call in enumerate(plan, 1):
            i = call.layer
            if call.skip is not None:
                x = self.add_skip(x, skips.pop(), call.skip)
            if call.repeat is not None:
                x = self.add_repeat(x, call.repeat)
            if call.opens:
                lane = x
            w = self.layer_weights(banks, i, factors)
            rows = tail if tail and n == len(plan) else T
            values = self.scaled_values(extra, i)
            visit = Visit(x0, rope, values, v_first, call.vectors, rows, mask)
            x, lane, v = self.blocks[i](x, lane, w, visit)
            if v_first is None:
                v_first = v
            if call.kept:
                skips.append(x)
        if lane is not None:
            assert self.lane_merge is not None
            x = lane.lerp(x, self.lane_merge.to(x.dtype))
        return rms_norm(x)

    def layer_weights(
        self, banks: Sequence[Sequence[Tensor]], layer: int, factors: Factors | None
    ) -> LayerWeights:
        """A layer's matrices, with what factors add to them for each sequence."""
        (qo, kv, up, down), o = banks, self.c.num_layers + layer
        own = qo[layer], qo[o], kv[layer], kv[o], up[layer], down[layer]
        if factors is None or layer not in factors:
            return LayerWeights(*own)
        return LayerWeights(
            *(Adapted(w, a, b) for w, (a, b) in zip(own, factors[layer], strict=True))
        )

    def scaled_values(self, extra: Tensor | None, layer: int) -> Tensor | None:
        """The value embedding [B,T,K*d] times the layer's scale, for a layer that has it."""
        if extra is None or layer not in self.c.ve_layers:
            return None
        return extra * self.ve_layer_scales[self.c.ve_layers.index(layer)].to(self.dtype)

    @torch.no_grad()
    def start_recurrence(self) -> None:
        """Let recurrent layers run again; later visits' own vectors begin as the first's."""
        self.recurring = True
        for p in self.vectors_by_visit().values():
            p[1:] = p[0]

    def vectors_by_visit(self) -> dict[str, nn.Parameter]:
        """Parameters by name that have a row for each visit of a recurrent layer."""
        layers = self.c.recur_layers if self.c.recur_style == "own" else ()
        kinds = ("resid_mix", "attn_scale", "mlp_scale")
        names = [f"blocks.{i}.{kind}" for i in layers for kind in kinds]
        return {name: self.get_parameter(name) for name in names}

    def head_weight(self) -> Tensor:
        """Output matrix [V,D], fp32."""
        return self.tok_emb.weight if self.lm_head is None else self.lm_head.weight

    def project(self, h: Tensor) -> Tensor:
        """Hidden states [...,D] -> logits before the cap [...,V], fp32."""
        return F.linear(h, self.head_weight().to(h.dtype)).float()

    def cap(self, z: Tensor) -> Tensor:
        """cap * tanh(z / cap); compiled as a sigmoid, which makes a CPU's step 4 % shorter."""
        cap = self.c.logit_softcap
        if torch.compiler.is_compiling():
            return 2 * cap * torch.sigmoid(2 / cap * z) - cap
        return cap * torch.tanh(z / cap)

    def forward(self, ids: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross entropy of targets [B,T] (-100: none) after ids [B,T]."""
        # the class's hidden(): the instance's may be compiled by itself
        logits = self.cap(self.project(GPT.hidden(self, ids)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def compile_model(model: GPT) -> None:
    """Compile what training and all evaluators share; kept in the user's cache for the next run."""
    home = os.path.expanduser("~")
    if os.access(home, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{home}/.cache/train_gpt")
    for name in ("hidden", "forward"):
        setattr(model, name, torch.compile(getattr(model, name), dynamic=False))


Shapes = Mapping[str, Sequence[int]]  # by name of a tensor


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
    """Shapes by name."""
    return {name: [*tensor.shape] for name, tensor in tensors.items()}


def model_shapes(c: Config) -> Shapes:
    """Shapes of all tensors of a model, banks whole and in matrices. Nothing is allocated."""
    with torch.device("meta"):
        state = GPT(c).state_dict()
    return shapes_of({**state, **split_banks(state, c.num_layers)})


def misfits(own: Shapes, there: Shapes) -> list[str]:
    """Names of tensors that are not in both, or not of one shape."""
    return [name for name in sorted({*own, *there}) if own.get(name) != there.get(name)]


def misfit(own: Shapes, there: Shapes) -> str:
    """What does not fit, in words; "" if all does."""
    wrong = misfits(own, there)
    told = [
        f"{in_words(name)} is {there.get(name, 'missing')}, the settings make it"
        f" {own.get(name, 'nothing')}"
        for name in wrong[:3]
    ]
    return f"does not fit: {'; '.join(told)}{' ...' if wrong[3:] else ''}" if wrong else ""


def kinds_of_misfit(own: Shapes, there: Shapes) -> set[tuple[str, str]]:
    """(name, what of it differs) of misfits.

    Numbers in names become @, and what a checkpoint puts before a parameter's name is taken away,
    so that a setting leaves the same traces in every layer, average and momentum.
    """
    found = set()
    for name in misfits(own, there):
        a, b = own.get(name, ()), there.get(name, ())
        differs = "rank"
        if name not in own or name not in there:
            differs = "presence"
        elif len(a) == len(b):
            differs = str([k for k in range(len(a)) if a[k] != b[k]])
        base = re.sub(r"^(ema|swa|lawa\d+|momentum|exp_avg|exp_avg_sq|step|grid)\.", "", name)
        found.add((re.sub(r"\d+", "@", base), differs))
    return found


def settings_behind(c: Config, own: Shapes, there: Shapes) -> str:
    """The settings that shapes of another model point to, found by trying other values of each.

    Own shapes are those of c. The setting is taken that explains most, then the one that explains
    most of the rest, and so on; of equals, the one that moves least of what fits.
    """
    base, moved = model_shapes(c), {}
    for s in (SETTINGS[name] for name in MODEL_SETTINGS):
        value = getattr(c, s.name.lower())
        others: list[Any] = [not value]
        if s.kind == "ints":
            others = [(), tuple(range(c.num_layers))]
        elif s.kind in ("int", "float"):
            others = [n for n in (0, value - 1, value + 1) if s.low <= n <= s.high]
        tried = [dataclasses.replace(c, **{s.name.lower(): other}) for other in others]
        moved[s.name] = set().union(*(kinds_of_misfit(base, model_shapes(x)) for x in tried))
    wrong = kinds_of_misfit(own, there)
    names = {name for name, _ in wrong}
    beside = {name: sum(n not in names for n, _ in kinds) for name, kinds in moved.items()}
    found: list[str] = []
    while True:
        best = max(moved, key=lambda name: (len(moved[name] & wrong), -beside[name]))
        if not moved[best] & wrong:
            return " and ".join(found) or "the model's settings"
        found.append(best)
        wrong -= moved[best]


def copy_tensors(
    c: Config, own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str | Path
) -> None:
    """Copy state into own, both by name and of a model of c. Raises BadInput if they do not fit."""
    shapes = shapes_of(own), shapes_of(state)
    wrong = misfit(*shapes)
    if wrong:
        raise BadInput(f"{where}: {wrong}. Set {settings_behind(c, *shapes)} as trained.")
    for name, tensor in own.items():
        if tensor.dtype != state[name].dtype:
            raise BadInput(f"{where}: {name} is {state[name].dtype}, not {tensor.dtype}.")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def copy_what_both_have(
    c: Config, own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str | Path
) -> set[str]:
    """Copy tensors of names that are in state and own; their names.

    Raises BadInput if there are none, or their shapes differ.
    """
    both = own.keys() & state.keys()
    if not both:
        raise BadInput(f"{where}: has no tensor of this model; give a checkpoint of one like it.")
    copy_tensors(c, {n: own[n] for n in both}, {n: state[n] for n in both}, where)
    return both


# ==================================================================================================
# 8. Optimiser
#
# Muon for the banks, AdamW for the rest, without DDP. After the backward each bank's gradient is
# reduce-scattered: a rank gets the mean gradient of its share of the matrices, orthogonalises it,
# and gathers everybody's updates, while AdamW steps the small parameters that all ranks hold.
#
# A bank of m matrices is cut into W shares of n = ceil(m / W); rank r's begins at matrix r n. The
# bank is padded with zeros to W n matrices, so that collectives see equal parts; padding has no
# gradient, stays zero under Newton-Schulz, and is cut off after the gather. With 11 matrices on 8
# ranks n is 2: rank 5 has one matrix, ranks 6 and 7 have padding only and still take part. Momentum
# is kept for the share alone, so its memory falls with W; a checkpoint gathers it, so that any
# number of ranks can go on.
# ==================================================================================================

# torch 2.13 has the first names, 2.11 the second.
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# Coefficients (a1, a3, a5), a step each; the last repeats. With x = U S V' and gram = x x' a step
#     x <- a1 x + (a3 gram + a5 gram gram) x
# is U p(S) V' with p(s) = a1 s + a3 s^3 + a5 s^5: the singular vectors stay, and p, repeated, moves
# every s in (0, 1] near 1.
QUINTICS = {
    "quintic": [(3.4445, -4.7750, 2.0315)],
    "polar_express": [
        (8.156555, -22.483293, 15.87877),
        (4.04293, -2.808917, 0.500018),
        (3.891668, -2.772484, 0.506065),
        (3.285754, -2.368129, 0.46449),
        (2.346541, -1.709783, 0.423236),
    ],
}


def newton_schulz(g: Tensor, steps: int, dtype: torch.dtype, kind: str = "quintic") -> Tensor:
    """g [n,rows,cols] with its singular values moved near 1, computed in dtype.

    Muon (Jordan et al. 2024), Polar Express (Amsel et al. 2025), whose coefficients
    want the norm 2 % under 1.
    """
    tall = g.size(-2) > g.size(-1)
    x = (g.mT if tall else g).to(dtype)
    margin = 1.02 if kind == "polar_express" else 1
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * margin + 1e-7)
    for i in range(steps):
        a1, a3, a5 = QUINTICS[kind][min(i, len(QUINTICS[kind]) - 1)]
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=a3, alpha=a5), x, beta=a1)
    return x.mT if tall else x


@contextlib.contextmanager
def put_back(params: Iterable[Tensor]) -> Iterator[None]:
    """What is done to params inside is undone at its end, also if that is an error."""
    params = list(params)
    kept = [p.detach().clone() for p in params]
    trained = [p.requires_grad for p in params]
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(params, kept)
        for p, flag in zip(params, trained, strict=True):
            p.requires_grad_(flag)


def matrices(p: Tensor) -> Tensor:
    """A bank as it is, and a matrix as a bank of one."""
    return p if p.ndim == 3 else p[None]


class Optimizer:
    """Muon for banks, of which each rank updates a share, and AdamW, on all ranks, for the rest."""

    def __init__(self, c: Config, ranks: Ranks, model: GPT) -> None:
        self.c, self.ranks, self.model = c, ranks, model
        groups: dict[str, list[Tensor]] = {"muon": [], "embed": [], "head": [], "scalar": []}
        for name, p in model.named_parameters():
            group = parameter_rule(matrix_names(name, c.num_layers)[0]).group
            if group == "proj":
                group = "muon" if c.muon_projections else "scalar"
            groups[group].append(p)
        # the largest reduction starts first
        self.banks = sorted(groups.pop("muon"), key=lambda p: -p.numel())
        embed_rate = c.tied_embed_lr if c.tie_embeddings else c.embed_lr
        embed_wd = c.adam_wd if c.embed_wd < 0 else c.embed_wd
        own = {
            "embed": {"rate": embed_rate, "weight_decay": embed_wd},
            "head": {"rate": c.head_lr, "weight_decay": c.adam_wd},
            "scalar": {"rate": c.scalar_lr, "weight_decay": c.adam_wd},
        }
        self.adam = torch.optim.AdamW(
            [{"params": ps, **own[key]} for key, ps in groups.items() if ps],
            betas=(c.beta1, c.beta2),
            eps=c.adam_eps,
            fused=True,
        )
        self.small = [p for group in self.adam.param_groups for p in group["params"]]
        for p in self.small:  # made now, so that a checkpoint can be read into it
            self.adam.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        # matrices of each bank on a rank
        self.share_sizes = [math.ceil(len(matrices(p)) / ranks.world) for p in self.banks]
        self.momentum = [
            torch.zeros(n, *p.shape[-2:], device=p.device)
            for n, p in zip(self.share_sizes, self.banks, strict=True)
        ]

    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """(those of the banks, those of the small parameters). Raises Fault if one is missing.

        Parameters that are asleep have none, and AdamW leaves them as they are.
        """
        asleep = {*self.model.asleep()}
        missing = [
            tuple(p.shape) for p in self.banks + self.small if p.grad is None and p not in asleep
        ]
        if missing:
            raise Fault(f"no gradient for parameters of shapes {missing}")
        banks, small = (
            [p.grad for p in params if p.grad is not None] for params in (self.banks, self.small)
        )
        return [matrices(g) for g in banks], small

    def reduce(self, loss: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(this rank's shares of the banks' mean gradients, the small parameters' mean gradients).

        loss becomes its mean over ranks.
        """
        banks, small = self.gradients()
        W = self.ranks.world
        if W == 1:
            return banks, small
        pending = []
        for n, g in zip(self.share_sizes, banks, strict=True):
            padded = F.pad(g, (0, 0, 0, 0, 0, n * W - len(g))) / W
            share = torch.empty_like(padded[:n])
            # padded is kept until the work that reads it is done
            pending.append((share, REDUCE_SCATTER(share, padded, async_op=True), padded))
        means = [*small, loss]
        flat = self.ranks.sum(torch.cat([t.reshape(-1) for t in means]) / W)  # in one message
        parts = flat.split([t.numel() for t in means])
        torch._foreach_copy_(means, [part.view_as(t) for part, t in zip(parts, means, strict=True)])
        for _, work, _ in pending:
            work.wait()
        return [share for share, _, _ in pending], small

    def gather(self, share: Tensor) -> tuple[Any, Tensor, Tensor]:
        """(pending work or None, bank of all ranks' shares, padded, what the work reads)."""
        if self.ranks.world == 1:
            return None, share, share
        whole = share.new_empty(len(share) * self.ranks.world, *share.shape[1:])
        share = share.contiguous()
        return ALL_GATHER(whole, share, async_op=True), whole, share

    def clip(self, shares: list[Tensor], small: list[Tensor]) -> Tensor:
        """Scale the whole gradient down to GRAD_CLIP_NORM if it is longer; its norm before that.

        Squares are summed in fp64: the norm scales every gradient, and in fp32 its rounding would
        depend on the number of ranks. (Gradients themselves are averaged over ranks in fp32.)
        """
        squares = [
            torch.stack(torch._foreach_norm(gradients, 2, torch.double)).square().sum()
            for gradients in (shares, small)
        ]
        norm = (self.ranks.sum(squares[0]) + squares[1]).sqrt().float()
        if self.c.grad_clip_norm:
            factor = (self.c.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(small + shares, factor)
        return norm

    def muon_update(self, g: Tensor, buffer: Tensor, momentum: float) -> Tensor:
        """Muon's update of a share from its gradient, overwritten, and its momentum, advanced."""
        buffer.mul_(momentum).add_(g)
        g.add_(buffer, alpha=momentum)
        if self.c.muon_row_norm:
            g /= g.norm(dim=-1, keepdim=True) + 1e-7
        c = self.c
        return newton_schulz(g, c.muon_backend_steps, self.ranks.dtype, c.newton_schulz)

    @torch.no_grad()
    def step(self, loss: Tensor, lr_factor: float, momentum: float) -> Tensor:
        """Update the parameters at all rates times lr_factor; the norm before clipping."""
        c = self.c
        shares, small = self.reduce(loss)
        norm = self.clip(shares, small)
        pending = [
            self.gather(self.muon_update(g, buffer, momentum))
            for g, buffer in zip(shares, self.momentum, strict=True)
        ]
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * lr_factor
        self.adam.step()  # while the gathers run
        for p, (work, update, _) in zip(self.banks, pending, strict=True):
            if work:
                work.wait()
            rate = lr_factor * c.matrix_lr
            bank = matrices(p)
            bank.mul_(1 - rate * c.muon_wd)
            # tall matrices, whose singular values are as many as their columns, move further
            bank.add_(update[: len(bank)], alpha=-rate * math.sqrt(max(1, p.size(-2) / p.size(-1))))
        return norm

    def state(self, names: Mapping[Any, str]) -> dict[str, Tensor]:
        """Tensors by name: AdamW's, live, and Muon's momentum, gathered from all ranks."""
        found: dict[str, Tensor] = {}
        whole = [self.gather(share) for share in self.momentum]
        for p, (work, bank, _) in zip(self.banks, whole, strict=True):
            if work:
                work.wait()
            found[f"momentum.{names[p]}"] = bank[: len(matrices(p))]
        for p in self.small:
            found |= {f"{key}.{names[p]}": t for key, t in self.adam.state[p].items()}
        return found

    def take_momentum(self, state: Mapping[str, Tensor], names: Mapping[Any, str]) -> None:
        """Take this rank's share of the gathered momentum of state()."""
        for n, p, share in zip(self.share_sizes, self.banks, self.momentum, strict=True):
            mine = state[f"momentum.{names[p]}"][self.ranks.rank * n :][:n]
            share[: len(mine)] = mine


# ==================================================================================================
# 9. Schedules
#
# What depends on the step or on the time that is left.
# ==================================================================================================


def lr_factor(c: Config, step: int, elapsed_ms: float, step_ms: float) -> float:
    """Factor on rates: 1, then linearly to 0, but not under MIN_LR.

    It falls before the nearer end, of steps or of time: over WARMDOWN_ITERS, whose time follows
    from that of a step, step_ms (0: not known yet), or over WARMDOWN_FRAC of the whole (#1435).
    """
    if c.warmdown_frac:
        done = step / c.iterations
        if c.max_wallclock_seconds:
            done = max(done, elapsed_ms / (1000 * c.max_wallclock_seconds))
        return max(min(1.0, (1 - done) / c.warmdown_frac), c.min_lr)
    factor = min(1.0, (c.iterations - step) / max(c.warmdown_iters, 1))
    if c.max_wallclock_seconds and step_ms and c.warmdown_iters:
        left_ms = max(0.0, 1000 * c.max_wallclock_seconds - elapsed_ms)
        factor = min(factor, left_ms / (c.warmdown_iters * step_ms))
    return max(factor, c.min_lr)


def muon_momentum(c: Config, step: int) -> float:
    """Muon's momentum: linear from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM, where it stays."""
    left = max(0.0, 1 - step / max(c.muon_momentum_warmup_steps, 1))
    return c.muon_momentum + (c.muon_momentum_warmup_start - c.muon_momentum) * left


def cosine(high: float, low: float, i: int, n: int) -> float:
    """Rate i of n, by a cosine from high, the first, to low, the last."""
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * i / max(n - 1, 1)))


class Clock:
    """Training time, on all ranks rank 0's.

    On a GPU the host is `lag` steps ahead of the device. A time is then that of a moment in the
    device's own order of work, read when the device has passed it, and it goes with the number of
    the step that begins there: at step s rank 0 can read the beginning of step s - lag, and the
    others know it lag steps later. With a lag of 2 the call at step s sends the time of step
    s - 2 and receives what the call at s - 2 sent, the time of step s - 4. It is carried on to step
    s at the mean time of a step so far.

    The mean is of this process's steps: a run can be resumed on another machine. The first one has
    no part in it: it may hold compiling, or a device's start. The first steps are waited for: there
    an error of a few steps would be a large part of the time that has passed. So is the step after
    a save or after QAT's start.
    """

    WAITED = 5  # steps: 2 lag + 1, until when no answer would have come without waiting

    def __init__(
        self, ranks: Ranks, cap_ms: float, step: int = 0, ms: float = 0.0, step_ms: float = 0.0
    ) -> None:
        """Begins after so many steps and ms; step_ms: of a step, as rehearsed (0: it was not)."""
        self.ranks, self.cap_ms, self.poll = ranks, cap_ms, Poll(ranks)
        self.begin = step
        self.waited_to = step + self.WAITED
        self.agreed_at = (step, ms)  # what all ranks know
        self.own = (step, ms)  # what this rank knows
        self.step_ms = step_ms or ms / max(step, 1)  # a guess until it is measured
        self.first_ms = 0.0  # training time when this process had done a step
        self.anchor = (ranks.moment(), ms)  # a moment and its training time
        self.unread: deque[tuple[int, tuple[Any, float], Any]] = deque()

    @property
    def measured(self) -> bool:
        """Whether the time of a usual step is known, and no guess."""
        return self.agreed_at[0] > self.begin + 1

    def read(self, anchor: tuple[Any, float], moment: Any) -> float:
        """Training time in ms at a moment, for which it waits."""
        start, ms = anchor
        return ms + self.ranks.ms_between(start, moment)

    def runs_out(self, ms: float) -> bool:
        """Whether there is a cap, and a training time of so many ms reaches it."""
        return 0 < self.cap_ms <= ms

    def now(self) -> float:
        """This rank's training time in ms, once the device is done."""
        return self.read(self.anchor, self.ranks.moment())

    def agreed(self, step: int, first_bad: Tensor) -> tuple[float, bool, bool]:
        """(training time in ms before this step, whether to stop, whether a bad loss is known)."""
        wait = step < self.waited_to
        self.unread.append((step, self.anchor, self.ranks.moment()))
        while len(self.unread) > (0 if wait else self.poll.lag):
            at, anchor, moment = self.unread.popleft()
            self.own = at, self.read(anchor, moment)
        answer = self.poll.ask(*self.own, tensor=first_bad, wait=wait)
        stops, bad = 0.0, math.inf
        if answer:
            number, ms, stops, bad = answer
            self.agreed_at = int(number), ms
        at, ms = self.agreed_at
        steps = at - self.begin - 1  # without the first
        if steps == 0:
            self.first_ms = ms
            self.step_ms = self.step_ms or ms
        elif steps > 0:
            self.step_ms = (ms - self.first_ms) / steps
        return ms + (step - at) * self.step_ms, stops > 0, bad <= step

    def wait_again(self, step: int) -> None:
        """Wait for the time of the next step: this one held something far longer than a step."""
        self.waited_to = max(self.waited_to, step + 2)

    def leave_out(self, since_ms: float) -> None:
        """Take what was done since now() gave since_ms out of the training time."""
        self.anchor = self.ranks.moment(), since_ms


# ==================================================================================================
# 10. Quantisation
#
# A weight becomes an integer level times its row's step times its column's step. Steps follow what
# an error costs, measured on training text, and one factor over all of them is searched so that the
# artifact just fits the bytes there are. Levels are coded close to their entropy.
#
# The artifact's header has "model", its settings, "step", and "matrices", [[name, [rows, columns]],
# ...]. Its tensors, matrices one after the other:
#   rows      of a matrix, fp16 steps (GPTQ-lite), or int8 quarters of octaves over "step"
#   columns   of a matrix, int8 quarters of octaves
#   levels    int8, with CODER=lzma; or, with CODER=rans:
#   codes     a rANS stream of them, uint8
#   spreads   int8 of rows and of columns: their sum, offset and clamped by distributions(), says
#             which row of `table` a level is coded with
#   table     int16 [64,1023]: frequencies of levels -511 to 511, in 16384ths
# and then every tensor that is not quantised, by its name.
# ==================================================================================================

LEVELS = {"int6": 31, "int8": 127, "int10": 511}  # largest level of a kind
PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
DISTRIBUTIONS = 64
SYMBOLS = 1023  # levels -511 to 511
FP16_MAX = 65504.0
BITS = 14  # of a frequency: those of a distribution add up to 2**BITS
MODEL_SETTINGS = [s.name for s in SETTINGS.values() if s.in_artifact]


class ValidationText:
    """What calibrate() reads with CALIBRATION=validation, in place of training text. Breaks C3."""

    def __init__(self, c: Config, val: ValData) -> None:
        self.tokens = val.tokens.cpu().numpy()
        self.T = min(c.train_seq_len, val.n)

    def sequence(self, i: int) -> np.ndarray:
        """Sequence i [T+1] of those side by side, again from the first after the last."""
        start = i % ((len(self.tokens) - 1) // self.T) * self.T
        return self.tokens[start : start + self.T + 1]


class Calibration(NamedTuple):
    """What errors cost, by name of a quantised matrix."""

    grid: dict[str, Tensor]  # int8 [rows + columns]: quarters of octaves of the steps to take
    hessians: dict[str, Tensor]  # [columns,columns], for QUANT=gptq


@CONSOLE.doing("calibrating")
@torch.enable_grad()
def calibrate(c: Config, ranks: Ranks, model: GPT, text: TrainData | ValidationText) -> Calibration:
    """Measure on text what errors in weights cost: on training text, or it breaks C3.

    The cost of a weight's error is its empirical Fisher information: its squared gradient, summed
    over sequences. Kept are the means over each row and each column. A Hessian is the sum over
    sequences of g'g / rows, g a matrix's gradient; its diagonal is the columns' cost.
    """
    n = max(1, c.calibration_tokens // c.train_seq_len)  # the same on any number of ranks
    sequences = np.stack([text.sequence(i) for i in range(n)]).astype(np.int64)
    mine = ranks.put(sequences[ranks.rank :: ranks.world])
    params = {n: p for n, p in model.named_parameters() if export_kind(c, n) in LEVELS}
    full = c.quant == "gptq"
    by_row: dict[str, Tensor] = {}
    by_column: dict[str, Tensor] = {}
    for name, w in split_banks(params, c.num_layers).items():
        width = w.size(1)
        by_row[name] = w.new_zeros(len(w))
        by_column[name] = w.new_zeros((width, width) if full else width)
    for row in mine:
        loss = GPT.forward(model, row[None, :-1], row[None, 1:], "sum")
        gradients = torch.autograd.grad(loss, list(params.values()))
        split = split_banks(dict(zip(params, gradients, strict=True)), c.num_layers)
        for name in by_row:
            g = split[name]
            by_row[name] += g.square().mean(1)
            by_column[name] += g.mT @ g / len(g) if full else g.square().mean(0)
    for name in by_row:
        ranks.sum(by_row[name])
        ranks.sum(by_column[name])
    costs = {name: cost.diagonal() if full else cost for name, cost in by_column.items()}
    return Calibration(step_exponents(by_row, costs), by_column if full else {})


def step_exponents(
    by_row: Mapping[str, Tensor], by_column: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """{name: int8 [rows + columns]}: quarters of octaves of cost^(-1/2), which are -2 log2(cost).

    Rows are relative to the dearest matrix's mean, columns to their own matrix's, so that together
    they stand for row * column / mean. A tenth of the mean is added: a row that the text did not
    touch gets a step too.
    """
    most = torch.stack([cost.mean() for cost in by_row.values()]).max().item() + 1e-30
    grid = {}
    for name, cost in by_row.items():
        mean = cost.mean() + 1e-6 * most
        rows = ((cost + 0.1 * mean) / most).log2()
        columns = ((by_column[name] + 0.1 * mean) / mean).log2()
        exponents = (-2 * torch.cat((rows, columns))).round().clamp(-127, 127)
        grid[name] = exponents.to(torch.int8)
    return grid


def row_scales(w: Tensor, largest: int) -> Tensor:
    """Scales [...,rows,1], fp16 values in fp32, of w [...,rows,columns], by GPTQ-lite (#549).

    Of five clips, percentiles of |w| in a row, the one of least square error.
    """
    last = w.size(-1) - 1
    # one partial sort has all that these percentiles touch
    top = w.abs().topk(min(last + 1, int((1 - PERCENTILES[0]) * last) + 2)).values
    scales, errors = [], []
    for p in PERCENTILES:
        at = (1 - p) * last
        low, high = int(at), math.ceil(at)
        clip = top[..., low : low + 1].lerp(top[..., high : high + 1], at - low)
        scale = (clip / largest).clamp(2.0**-24, FP16_MAX).half().float()
        error = (w - nearest_levels(w, scale, largest).mul_(scale)).square_()
        scales.append(scale)
        errors.append(error.sum(-1, keepdim=True))
    best = torch.stack(errors).argmin(0, keepdim=True)
    return torch.stack(scales).gather(0, best)[0]


def nearest_levels(w: Tensor, distance: Tensor, largest: int) -> Tensor:
    """Integers from -largest to largest, as floats, nearest to w / distance."""
    return (w / distance).round_().clamp_(-largest, largest)


def spacing(rows: Tensor, columns: Tensor, step_size: float) -> Tensor:
    """Distances [...,rows,columns] between levels, from what is stored of one matrix or several."""
    by_row = rows.float() if rows.dtype == torch.half else step_size * torch.exp2(rows / 4)
    return by_row[..., None] * torch.exp2(columns / 4)[..., None, :]


def bytes_beside_levels(state: Mapping[str, Tensor], kinds: Mapping[str, str]) -> float:
    """Bytes of an artifact but for its levels, about: steps of matrices, and plain tensors.

    A row or column has a byte for its step and one for its spread, of which LZMA leaves some 1.5.
    """
    sizes = {"fp16": 2, "fp32": 4}
    return sum(
        1.5 * sum(t.shape) if kinds[name] in LEVELS else t.numel() * sizes[kinds[name]]
        for name, t in state.items()
    )


def spreads(levels: Tensor) -> Tensor:
    """int8 [rows + columns]: quarters of octaves of a row's deviation, and what columns add."""
    square = levels.square()
    rows = (2 * (square.mean(1) + 1e-3).log2()).round()
    rest = square * torch.exp2(-rows / 2)[:, None]
    columns = (2 * (rest.mean(0) + 1e-3).log2()).round()
    return torch.cat((rows, columns)).to(torch.int8)


def distributions(spread: Tensor, rows: int) -> Tensor:
    """Distribution [rows,columns], int32, of levels with these spreads [rows + columns]."""
    which = spread[:rows, None].int() + spread[rows:] + DISTRIBUTIONS // 2
    return which.clamp_(0, DISTRIBUTIONS - 1)


def frequencies(counts: np.ndarray) -> np.ndarray:
    """Table [DISTRIBUTIONS,SYMBOLS] of counts: rows add up to 2**BITS, none is 0 that occurs."""
    some = counts > 0
    free = 2**BITS - some.sum(1, keepdims=True)
    table = some + counts * free // np.maximum(counts.sum(1, keepdims=True), 1)
    best = table.argmax(1)[:, None]  # takes what rounding left over
    rest = 2**BITS - table.sum(1, keepdims=True)
    np.put_along_axis(table, best, np.take_along_axis(table, best, 1) + rest, 1)
    return table


def entropy_bytes(counts: np.ndarray) -> float:
    """Bytes of symbols by the entropy of their distributions, rows of counts."""
    p = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    return -(counts * np.log2(np.maximum(p, 1e-30))).sum() / 8


# rANS (range asymmetric numeral systems, Duda, arXiv:1311.2540). The state is one integer x. To
# encode a symbol that takes f of the 2**14 slots of its distribution, from slot s on:
#     x <- (x // f) * 2**14 + s + x % f
# The low 14 bits of the new x are a slot of the symbol, so a decoder that looks them up knows the
# symbol, and takes the step back: x <- f * (x >> 14) + slot - s. A step makes x larger by a factor
# of about 2**14 / f, that is by log2(2**14 / f) bits, the symbol's information: nothing is lost to
# whole bits. x is kept in [2**16, 2**32). A step would take it to 2**32 if x >= f * 2**18; then its
# low 16 bits first go out as a word, and one word is always enough. The decoder undoes all in
# reverse, and takes a word when x falls under 2**16. So the encoder runs from the last symbol to
# the first, and the decoder ends at x = 2**16, the start, or the codes are damaged. Up to 1024
# states ("lanes") take turns, so that numpy does a step of all of them at once.


def lane_count(n: int) -> int:
    """Number of states among which n levels are dealt out."""
    return max(1, min(1024, n >> 11))


def rans_encode(symbols: np.ndarray, which: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Codes, uint8, of symbols [n] with distributions which [n], rows of table.

    They are the last states, 4 bytes each, then the words in the order in which they are taken.
    """
    x = np.full(lane_count(len(symbols)), 2**16, np.int64)
    starts = table.cumsum(1) - table
    words = []
    for at in reversed(range(0, len(symbols), len(x))):
        symbol, row = symbols[at : at + len(x)], which[at : at + len(x)]
        frequency, state = table[row, symbol], x[: len(symbol)]
        full = state >= frequency << 32 - BITS
        words.append(state[full].astype("<u2"))
        state[full] >>= 16
        state[:] = (state // frequency << BITS) + state % frequency + starts[row, symbol]
    return np.concatenate([x.astype("<u4").view("<u2"), *words[::-1]]).view(np.uint8)


def rans_decode(codes: np.ndarray, which: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Symbols, int16 [n]. Raises ValueError for codes that are not rans_encode's."""
    if (table.sum(1) != 2**BITS).any() or (table < 0).any():
        raise ValueError("wrong frequencies")
    n = lane_count(len(which))
    words = codes.view("<u2")
    starts = table.cumsum(1) - table
    every = np.arange(table.shape[1], dtype=np.int16)
    lookup = np.stack([np.repeat(every, row) for row in table])  # [distribution,slot] -> symbol
    out = np.empty(len(which), np.int16)
    x = words[: 2 * n].copy().view("<u4").astype(np.int64)
    words = words[2 * n :]
    for at in range(0, len(which), n):
        row, state = which[at : at + n], x[: len(which) - at]
        slot = state & 2**BITS - 1
        symbol = out[at : at + n] = lookup[row, slot]
        state[:] = table[row, symbol] * (state >> BITS) + slot - starts[row, symbol]
        empty = state < 2**16
        more = np.count_nonzero(empty)
        state[empty] = state[empty] << 16 | words[:more]
        words = words[more:]
    if len(words) or (x != 2**16).any():
        raise ValueError("wrong codes")
    return out


class QuantisedMatrix(NamedTuple):
    """Rows of a matrix, or of a bank: what is stored of its steps, and its levels, as floats."""

    rows: Tensor
    columns: Tensor
    levels: Tensor


class Quantizer:
    """What an export makes of a state. Subclasses choose the steps of rows and columns.

    With whole=True banks are not cut into matrices: for nearest() alone, in few operations.
    """

    def __init__(self, c: Config, state: Mapping[str, Tensor], whole: bool = False) -> None:
        self.c = c
        parts = state if whole else split_banks(state, c.num_layers)
        self.state = {name: t.detach().float() for name, t in parts.items()}
        self.kinds = {n: self.level_kind(c, export_kind(c, n)) for n in self.state}
        self.names = [name for name in self.state if self.kinds[name] in LEVELS]

    @staticmethod
    def level_kind(c: Config, export: str) -> str:
        """The kind that a tensor is stored as, of what PARAMETER_RULES say."""
        raise NotImplementedError

    def step_codes(self, name: str, step_size: float) -> tuple[Tensor, Tensor]:
        """(rows, columns): steps of a matrix as they are stored."""
        raise NotImplementedError

    @property
    def finest(self) -> float:
        """The step size under which nothing changes any more."""
        return 2.0**-24

    def largest_level(self, name: str) -> int:
        """Largest level of a matrix."""
        return LEVELS[self.kinds[name]]

    def counts(self) -> dict[str, int]:
        """Number of weights of each kind."""
        kinds = sorted(set(self.kinds.values()))
        return {
            kind: sum(t.numel() for name, t in self.state.items() if self.kinds[name] == kind)
            for kind in kinds
        }

    def nearest(
        self, name: str, step_size: float, every: int = 1
    ) -> tuple[QuantisedMatrix, Tensor]:
        """(every `every`-th row, in its nearest levels; distances [...,rows,columns])."""
        rows, columns = self.step_codes(name, step_size)
        rows, w = rows[..., ::every], self.state[name][..., ::every, :]
        distance = spacing(rows, columns, step_size)
        levels = nearest_levels(w, distance, self.largest_level(name))
        return QuantisedMatrix(rows, columns, levels), distance

    def quantise(self, step_size: float, thin: bool = False) -> dict[str, QuantisedMatrix]:
        """All matrices in levels; thin: about 64 rows of each, for an estimate."""
        found = {}
        for name in self.names:
            every = math.ceil(len(self.state[name]) / 64) if thin else 1
            found[name], _ = self.nearest(name, step_size, every)
        return found

    def rounded(self, step_size: float) -> dict[str, Tensor]:
        """The state by name, fp32, with its matrices rounded."""
        matrices = {
            name: m.levels * spacing(m.rows, m.columns, step_size)
            for name, m in self.quantise(step_size).items()
        }
        return self.state | matrices

    def census(self, found: Mapping[str, QuantisedMatrix]) -> tuple[np.ndarray, dict[str, Tensor]]:
        """(counts [DISTRIBUTIONS,SYMBOLS], scaled up to whole matrices; spreads by name)."""
        spread = {name: spreads(m.levels) for name, m in found.items()}
        device = self.state[self.names[0]].device
        counts = torch.zeros(DISTRIBUTIONS * SYMBOLS, dtype=torch.long, device=device)
        for name, m in found.items():
            which = distributions(spread[name], len(m.levels))
            at = (which * SYMBOLS + m.levels.int() + SYMBOLS // 2).flatten()
            own = torch.zeros_like(counts)
            own.index_add_(0, at, torch.ones_like(at, dtype=torch.long))  # bincount() would wait
            counts += own * len(self.state[name]) // len(m.levels)
        return counts.view(DISTRIBUTIONS, SYMBOLS).cpu().numpy(), spread

    def estimate(self, step_size: float) -> float:
        """Bytes of the artifact by the entropy of 64 rows of each matrix."""
        levels = entropy_bytes(self.census(self.quantise(step_size, thin=True))[0])
        return levels + bytes_beside_levels(self.state, self.kinds)

    def search(self, cap: float) -> float:
        """The finest step size if estimate() is under cap there, else that at which it just is."""
        if self.estimate(self.finest) < cap:
            return self.finest
        low, high = 0.0, 40.0  # octaves over the finest
        while high - low > 1e-3:
            middle = low + (high - low) / 2
            if self.estimate(self.finest * 2.0**middle) < cap:
                high = middle
            else:
                low = middle
        return self.finest * 2.0**high

    def refuse_large(self) -> None:
        """Raises Fault for a weight that could not be read back: of fp16, or of infinite steps."""
        most = {"fp16": FP16_MAX, "fp32": torch.finfo(torch.float).max}
        for name, t in self.state.items():
            largest = t.abs().max().item()
            if not largest <= most.get(self.kinds[name], 2.0**64):  # nor NaN
                raise Fault(
                    f"{name}: has a weight of {largest:.3g}, too large for an artifact; train with"
                    " lower rates, or export an earlier checkpoint (LOAD_CHECKPOINT)."
                )

    def fit(self, cap: int) -> tuple[bytes, dict[str, Any]]:
        """(artifact of at most cap bytes, its figures).

        It ends at the finest step size or within 0.2 % of cap; after six tries the largest that
        fits is taken. Raises Fault if none does.
        """
        best: tuple[bytes, dict[str, Any]] | None = None
        more = 0.0  # bytes over the estimate
        for _ in range(6):
            step_size = self.search(0.999 * cap - more)
            blob, figures = self.pack(step_size)
            if len(blob) <= cap and (best is None or len(blob) > len(best[0])):
                best = blob, figures
            if best and (best[1]["step"] == self.finest or len(best[0]) > 0.998 * cap):
                return best
            more = len(blob) - self.estimate(step_size)
        if best is None:
            raise Fault(
                f"ARTIFACT_BYTES={self.c.artifact_bytes}: code leaves {cap} bytes, the weights take"
                f" {len(blob)}; export the last checkpoint with more (LOAD_CHECKPOINT)."
            )
        return best

    def pack(self, step_size: float) -> tuple[bytes, dict[str, Any]]:
        """(the artifact of a step size, {step, bytes of levels, of their entropy})."""
        found = self.quantise(step_size)
        counts, spread = self.census(found)
        rows, columns, levels = (
            torch.cat([part.flatten() for part in parts]).cpu()
            for parts in zip(*found.values(), strict=True)
        )
        tensors = {"rows": rows, "columns": columns}
        levels = levels.short()
        if self.c.coder == "rans":
            which = torch.cat(
                [
                    distributions(spread[name], len(m.levels)).flatten().to(torch.uint8)
                    for name, m in found.items()
                ]
            ).cpu()
            table = frequencies(counts)
            codes = rans_encode(levels.numpy() + SYMBOLS // 2, which.numpy(), table)
            tensors["codes"] = torch.from_numpy(codes)
            tensors["spreads"] = torch.cat([*spread.values()]).cpu()
            tensors["table"] = torch.from_numpy(table.astype(np.int16))
            size = len(codes)
        else:
            tensors["levels"] = levels.to(torch.int8)
            size = len(compress(tensors["levels"].numpy().tobytes()))
        blob = b"".join(seal(self.header(step_size), tensors | self.plain_tensors(), compress))
        entropy = round(entropy_bytes(counts))
        return blob, {"step": step_size, "level_bytes": size, "entropy_bytes": entropy}

    def header(self, step_size: float) -> dict[str, Any]:
        """Header of the artifact, but for its table of tensors."""
        return {
            "model": {name: getattr(self.c, name.lower()) for name in MODEL_SETTINGS},
            "step": step_size,
            "matrices": [[name, list(self.state[name].shape)] for name in self.names],
        }

    def plain_tensors(self) -> dict[str, Tensor]:
        """Tensors that are not quantised, as they are stored."""
        return to_host(
            {
                name: t.half() if self.kinds[name] == "fp16" else t
                for name, t in self.state.items()
                if name not in self.names
            }
        )


class GptqLite(Quantizer):
    """#549's: int6 or int8 levels, a scale a row.

    The step size widens those of int6 where it is larger.
    """

    def __init__(self, c: Config, state: Mapping[str, Tensor], whole: bool = False) -> None:
        super().__init__(c, state, whole)
        self.scales = {
            name: row_scales(self.state[name], self.largest_level(name))[..., 0]
            for name in self.names
        }

    @staticmethod
    def level_kind(c: Config, export: str) -> str:
        """As PARAMETER_RULES say."""
        return export

    def step_codes(self, name: str, step_size: float) -> tuple[Tensor, Tensor]:
        """Scales of rows, fp16; the step size binds int6 only. Columns are all the same."""
        floor = step_size if self.kinds[name] == "int6" else 0
        columns = torch.zeros_like(self.state[name][..., 0, :], dtype=torch.int8)
        return self.scales[name].clamp(floor, FP16_MAX).half(), columns


class RateDistortion(Quantizer):
    """Steps by what errors cost: at one slope of bytes against damage for all weights.

    Entropy-coded levels d apart take log2(1/d) bits plus a constant; rounding's mean square error
    d^2 / 12 costs loss in proportion to h d^2, h the weight's Fisher information. At a price of p
    bits for that loss, log2(1/d) + p h d^2 is least where h d^2 = 1 / (2 p ln 2): the same for all
    weights, so d ~ h^(-1/2), and p is what the step size sets. A rare large level costs only its
    own bits, so no row is clipped to keep levels few.
    """

    def __init__(
        self, c: Config, state: Mapping[str, Tensor], calibration: Calibration, whole: bool = False
    ) -> None:
        super().__init__(c, state, whole)
        self.grid = {
            name: exponents.split(self.state[name].shape[-2:], -1)
            for name, exponents in calibration.grid.items()
        }
        # The least step of a row at which its largest weight still rounds to the largest level.
        # From 2**-20 of the largest of them on (80 quarters of octaves), with the grid's at most
        # 47, stored exponents stay within int8. Under the finest step size these bind in every row.
        least = {}
        for name, (_, columns) in self.grid.items():
            size = self.state[name].abs() * torch.exp2(-columns / 4)[..., None, :]
            largest = size.amax(-1)
            least[name] = largest / (self.largest_level(name) + 0.5)
        floor = 2.0**-20 * torch.stack([t.max() for t in least.values()]).max() + 1e-20
        self.least = {name: t.maximum(floor) for name, t in least.items()}

    @functools.cached_property
    def finest(self) -> float:
        """The step size under which the least steps bind in every row."""
        ratios = [self.least[name] / torch.exp2(rows / 4) for name, (rows, _) in self.grid.items()]
        return torch.stack([ratio.min() for ratio in ratios]).min().item()

    @staticmethod
    def level_kind(c: Config, export: str) -> str:
        """More levels than PARAMETER_RULES say, which an entropy coder makes cheap."""
        if export not in LEVELS:
            return export
        return "int10" if c.coder == "rans" else "int8"

    def step_codes(self, name: str, step_size: float) -> tuple[Tensor, Tensor]:
        """The grid's quarters of octaves; a row whose weights have outgrown it gets wider steps."""
        rows, columns = self.grid[name]
        needed = (4 * (self.least[name] / step_size).log2()).ceil()
        return rows.maximum(needed).clamp(-127, 127).to(torch.int8), columns


class Gptq(RateDistortion):
    """Rate-distortion steps with GPTQ's error feedback (Frantar et al., arXiv:2210.17323)."""

    def __init__(self, c: Config, state: Mapping[str, Tensor], calibration: Calibration) -> None:
        super().__init__(c, state, calibration)
        self.hessians = calibration.hessians

    def quantise(self, step_size: float, thin: bool = False) -> dict[str, QuantisedMatrix]:
        """As the base class, but later columns make up for what rounding earlier ones costs."""
        found = super().quantise(step_size, thin)
        if thin:
            return found
        by_shape: dict[torch.Size, list[str]] = {}
        for name in self.names:
            by_shape.setdefault(self.state[name].shape, []).append(name)
        for names in by_shape.values():
            self.feed_back(names, found, step_size)
        return found

    def feed_back(
        self, names: list[str], found: Mapping[str, QuantisedMatrix], step_size: float
    ) -> None:
        """Replace the levels of matrices of one shape.

        u is the upper Cholesky factor of the inverse Hessian. Rounding column j with error e, the
        weight less its rounded value, moves the columns k behind it by -e u[j,k] / u[j,j]: there
        the loss is least, given the columns up to j.
        """
        w = torch.stack([self.state[name] for name in names])
        distance = torch.stack(
            [spacing(found[name].rows, found[name].columns, step_size) for name in names]
        )
        h = torch.stack([self.hessians[name] for name in names]).double()
        damping = 0.01 * h.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-30
        h += torch.diag_embed(damping.expand(h.shape[:2]))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        u = torch.linalg.cholesky(inverse, upper=True).float()
        largest = self.largest_level(names[0])
        for j in range(w.size(2)):
            kept = w[:, :, j].clone()
            w[:, :, j] = nearest_levels(w[:, :, j], distance[:, :, j], largest)
            error = (kept - w[:, :, j] * distance[:, :, j]) / u[:, j, j, None]
            w[:, :, j + 1 :].baddbmm_(error[:, :, None], u[:, j, None, j + 1 :], alpha=-1)
        for name, levels in zip(names, w, strict=True):
            found[name].levels.copy_(levels)


def make_quantizer(
    c: Config, state: Mapping[str, Tensor], calibration: Calibration | None, whole: bool = False
) -> Quantizer:
    """GPTQ-lite without a calibration, GPTQ with one that has Hessians, else rate-distortion."""
    if calibration is None:
        return GptqLite(c, state, whole)
    if calibration.hessians:
        return Gptq(c, state, calibration)
    return RateDistortion(c, state, calibration, whole)


def bytes_for_weights(c: Config) -> int:
    """What the code leaves of ARTIFACT_BYTES."""
    return c.artifact_bytes - code_bytes()


def refuse_small_cap(c: Config, model: GPT) -> None:
    """Raises BadInput for an ARTIFACT_BYTES under what an artifact with the widest steps takes.

    Before LZMA, which makes trained weights' steps little smaller. All levels are 0 there, but
    GPTQ-lite's int8 ones, which it does not widen: a byte each.
    """
    kind_of = GptqLite.level_kind if c.quant == "gptq_lite" else RateDistortion.level_kind
    state = split_banks(model.state_dict(), c.num_layers)
    kinds = {name: kind_of(c, export_kind(c, name)) for name in state}
    least = bytes_beside_levels(state, kinds)
    if c.quant == "gptq_lite":
        least += sum(t.numel() for name, t in state.items() if kinds[name] == "int8")
    if bytes_for_weights(c) < least:
        raise BadInput(
            f"ARTIFACT_BYTES={c.artifact_bytes}: code takes {code_bytes()} bytes, the coarsest"
            f" artifact up to {math.ceil(least)}; set {code_bytes() + math.ceil(least)} or more, or"
            " make the model smaller."
        )


def artifact_settings(header: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Config from an artifact's header. Raises ValueError."""
    there, found = header.get("model"), {}
    if not is_flat(there) or there.keys() != {*MODEL_SETTINGS}:
        raise ValueError("it has other settings than this version")
    for name, value in there.items():
        try:
            found[name.lower()] = parse_value(SETTINGS[name], shown(value))
        except ValueError as why:
            raise ValueError(f"{name}={shown(value)}: {why}") from None
        if json.dumps(found[name.lower()]) != json.dumps(value):
            raise ValueError(f"its {name} is {value!r}")  # "8" or true for 8
    return found


def matrix_shapes(header: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """Shapes by name of an artifact's quantised matrices, in order. Raises ValueError."""
    there = header.get("matrices")
    found: dict[str, Sequence[int]] = {}
    for row in there if isinstance(there, list) else [there]:
        match row:
            case [name, [_, _] as shape] if is_name(name) and is_shape(shape) and name not in found:
                found[name] = shape
            case _:
                raise ValueError(f"its header has the matrix {row}, or has it twice")
    return found


def artifact_shapes(header: Mapping[str, Any], claims: Claims, size: int) -> Shapes:
    """Shapes by name of all weights of an artifact of `size` bytes, by its header alone.

    Raises ValueError unless its counts agree with one another and with what pack() writes.
    """
    step = header.get("step")
    if not isinstance(step, float) or not 0 <= step < math.inf:
        raise ValueError(f"its step is {step}")
    shapes = matrix_shapes(header)
    rows, columns = (sum(shape[k] for shape in shapes.values()) for k in (0, 1))
    n = sum(math.prod(shape) for shape in shapes.values())
    if n > EXPANSION * size + 2**25:
        raise ValueError(f"{n} levels, more than a file of {size} bytes may claim")
    parts = {
        "rows": [(torch.int8, [rows]), (torch.half, [rows])],
        "columns": [(torch.int8, [columns])],
    }
    if "codes" in claims:
        states = 2 * lane_count(n)  # in words, of which a level takes one at most
        dtype, (words, *more) = claims["codes"]
        fits = dtype == torch.uint8 and not more and 2 * states <= words <= 2 * (states + n)
        parts["codes"] = [claims["codes"]] if fits and words % 2 == 0 else []
        parts["spreads"] = [(torch.int8, [rows + columns])]
        parts["table"] = [(torch.int16, [DISTRIBUTIONS, SYMBOLS])]
    else:
        parts["levels"] = [(torch.int8, [n])]
    for name, allowed in parts.items():
        if claims.get(name) not in allowed:
            raise ValueError(f"its {name} is {claims.get(name)}: not what its matrices need")
    for name, (dtype, shape) in claims.items():
        if name not in parts:
            if name in shapes or dtype not in (torch.half, torch.float):
                raise ValueError(f"its {name} is a matrix too, or of {dtype}")
            shapes[name] = shape
    return shapes


def unpack_matrices(header: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """fp32 matrices by name of an artifact, whose parts are taken out of tensors.

    Counts must have been checked. Raises ValueError for codes that are not rans_encode's.
    """
    shapes = matrix_shapes(header)
    sizes = [*shapes.values()]
    if "codes" in tensors:
        spread = tensors.pop("spreads").split([rows + columns for rows, columns in sizes])
        which = torch.cat(
            [
                distributions(own, rows).flatten().to(torch.uint8)
                for own, (rows, _) in zip(spread, sizes, strict=True)
            ]
        )
        table = tensors.pop("table").numpy().astype(np.int64)
        symbols = rans_decode(tensors.pop("codes").numpy(), which.numpy(), table)
        tensors["levels"] = torch.from_numpy(symbols).sub_(SYMBOLS // 2)
    matrices = zip(
        shapes.items(),
        tensors.pop("levels").split([rows * columns for rows, columns in sizes]),
        tensors.pop("rows").split([rows for rows, _ in sizes]),
        tensors.pop("columns").split([columns for _, columns in sizes]),
        strict=True,
    )
    return {
        name: spacing(rows, columns, header["step"]).mul_(levels.view(shape))
        for (name, shape), levels, rows, columns in matrices
    }


def unpack(data: bytes | bytearray) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(fp32 tensors by name, settings) of an artifact; the lineage's has no settings.

    Raises ValueError and others.
    """
    if data[:8] != MAGIC:
        return unpack_lineage(data), {}
    header, claims, _ = read_header(data, expand)
    artifact_settings(header)
    artifact_shapes(header, claims, len(data))
    header, tensors = unseal(data, expand)
    matrices = unpack_matrices(header, tensors)
    check_finite(matrices)
    return matrices | {name: t.float() for name, t in tensors.items()}, header["model"]


# What a torch.save of the lineage needs of Python: tensors, and dicts of them.
LINEAGE_WORDS = (
    r"torch (Char|Half|BFloat16|Float)Storage|torch\._utils _rebuild_tensor_v2"
    r"|collections OrderedDict"
)


def lineage_archive(raw: bytearray) -> BytesIO:
    """A torch.save, written anew after a look at its parts. Raises ValueError and others.

    torch's weights-only reader runs no code, but would allocate what a zip or a pickle asks for.
    """
    import pickletools
    import zipfile

    if raw.count(b"PK\1\2") > 10**4:
        raise ValueError("its archive has too many parts")
    with zipfile.ZipFile(BytesIO(raw)) as archive:
        parts = archive.infolist()
        if any(part.compress_type for part in parts) or (
            sum(part.file_size for part in parts) > len(raw)
        ):
            raise ValueError("its archive is packed, or larger than it is")
        files = {part.filename: archive.read(part) for part in parts}
    for pickled in (content for name, content in files.items() if name.endswith("data.pkl")):
        if len(pickled) > HEADER_BYTES:
            raise ValueError("its pickle is too long")
        for op, word, _ in pickletools.genops(pickled):
            if op.name == "GLOBAL" and not re.fullmatch(LINEAGE_WORDS, str(word)):
                raise ValueError(f"its pickle has {word}")
    clean = BytesIO()
    with zipfile.ZipFile(clean, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    clean.seek(0)
    return clean


def unpack_lineage(data: bytes | bytearray) -> dict[str, Tensor]:
    """fp32 tensors by name of the lineage's artifact, LZMA of a torch.save. Runs no code of it.

    Raises ValueError and others.
    """
    most = 8 * len(data)  # weights of a pickle are there one by one: twice or three times
    raw = expand(data, most)
    if len(raw) == most:
        raise ValueError("its LZMA grows over 8 times")
    tensors = torch.load(lineage_archive(raw), map_location="cpu", weights_only=True)["w"]
    dtypes = (torch.int8, torch.half, torch.bfloat16, torch.float)
    for name, t in tensors.items():
        if not is_name(name) or type(t) is not Tensor or t.dtype not in dtypes or not t.numel():
            raise ValueError(f"{name} is no tensor of weights")
    if sum(t.numel() * t.element_size() for t in tensors.values()) > len(raw):
        raise ValueError("tensors overlap")
    found = {}
    for name, t in tensors.items():
        if name.endswith(".q"):
            if f"{name[:-1]}scale" not in tensors:
                raise ValueError(f"{name} has no scale")
            scale = tensors[f"{name[:-1]}scale"].float()
            by_row = scale.view(-1, *[1] * (t.dim() - 1)).expand_as(t)
            found[name.removesuffix(".q")] = t.float() * by_row
        elif f"{name.removesuffix('scale')}q" not in tensors:  # the scale of a matrix is used above
            found[name] = t.float()
    check_finite(found)
    return found


@contextlib.contextmanager
def refused(where: str | Path, remedy: str) -> Iterator[None]:
    """Inside, all that reading an artifact raises becomes a BadInput with this remedy."""
    try:
        yield
    except OSError as why:
        raise BadInput(f"{where}: {why.strerror}; give the path of a final_model.ptz.") from None
    except Exception as why:  # damage makes the readers raise all sorts
        raise BadInput(f"{where}: damaged, or no artifact: {in_words(why)}. {remedy}.") from None


@CONSOLE.doing("reading the artifact")
def read_artifact(c: Config) -> tuple[Config, dict[str, Tensor]]:
    """(Config with its settings, tensors by name) of LOAD_ARTIFACT. Raises BadInput.

    Nothing is unpacked before its settings and shapes have been checked.
    """
    where, remedy = f"LOAD_ARTIFACT={c.load_artifact}", "Export it again"
    values: dict[str, Any] = {}
    state: dict[str, Tensor] = {}
    with refused(where, remedy):
        data = Path(c.load_artifact).read_bytes()
        if data[:8] == MAGIC:
            header, claims, _ = read_header(data, expand)
            values = artifact_settings(header)
            shapes = artifact_shapes(header, claims, len(data))
        else:
            state = unpack_lineage(data)
            shapes = shapes_of(state)
            c = dataclasses.replace(c, recur_start=0)  # it evaluates with recurrence
    clash = [
        f"{name.upper()}={shown(getattr(c, name))} (there {shown(value)})"
        for name, value in values.items()
        # RECUR_START=0 only says that recurrence was on, see export()
        if name in c.explicit and name != "recur_start" and getattr(c, name) != value
    ]
    if clash:
        raise BadInput(
            f"{where}: was made with other settings: {' '.join(map(in_words, clash[:9]))}. Unset"
            " them: the artifact knows."
        )
    c = dataclasses.replace(c, **values)
    problems = cross_check(c)
    if problems:
        raise BadInput(
            f"{where}: has settings that do not go with the others:"
            f" {' '.join(map(in_words, problems[:9]))} Change the others."
        )
    if values and c.num_layers > len(shapes):
        raise BadInput(f"{where}: does not fit: {len(shapes)} tensors in all. {remedy}.")
    with torch.device("meta"):  # nothing is allocated for sizes that the file only claims
        own = shapes_of(split_banks(GPT(c).state_dict(), c.num_layers))
    wrong = misfit(own, shapes)
    if wrong and values:
        raise BadInput(f"{where}: {wrong}. {remedy}.")
    if wrong:
        raise BadInput(f"{where}: {wrong}. Set {settings_behind(c, own, shapes)} as trained.")
    with refused(where, remedy):
        state = state or unpack(data)[0]
    return c, state


def load_state(model: GPT, state: Mapping[str, Tensor], where: str | Path) -> None:
    """Copy an artifact's tensors into the model. Raises BadInput unless they fit."""
    copy_tensors(model.c, split_banks(model.state_dict(), model.c.num_layers), state, where)


@CONSOLE.doing("quantising")
def export(c: Config, run: Run, model: GPT, calibration: Calibration | None) -> None:
    """Rank 0 quantises and writes."""
    if run.ranks.rank == 0:
        path = run.log.folder / "final_model.ptz"
        began = perf_counter()
        # in an artifact RECUR_START=0 says that recurrence was on, another that it never came to it
        trained = dataclasses.replace(c, recur_start=0) if model.recurring else c
        quantizer = make_quantizer(trained, model.state_dict(), calibration)
        quantizer.refuse_large()
        blob, figures = quantizer.fit(bytes_for_weights(c))
        seconds = perf_counter() - began
        digest = hashlib.sha256(blob).hexdigest()
        if run.log.rows.get("artifact_file", {}).get("sha256", digest) != digest:
            for kind in ("progress_artifact*", "scored_artifact*"):  # of another artifact
                remove_files(run, kind)
        write_file(path, [blob], run.log.remedy())
        write_file(path.with_name("train_gpt.py"), [packed_script()], run.log.remedy())
        run.log.metric("quantised", **quantizer.counts(), **figures, seconds=seconds)
        code = code_bytes()
        kind = f"{c.quant}+{c.coder}+lzma"
        source = len(read_source().encode())
        run.log.line(f"Code size: {code} bytes (packed; source {source} bytes)")
        run.log.line(f"Serialized model {kind}: {len(blob)} bytes")
        run.log.line(f"Total submission size {kind}: {len(blob) + code} bytes")
        run.log.metric("artifact_file", sha256=digest)
        sizes = dict(model_bytes=len(blob), code_bytes=code, total_bytes=len(blob) + code)
        run.log.metric("artifact", **sizes)


def read_export(run: Run) -> bytes | bytearray:
    """The artifact that this run logged, for all ranks; nothing if it has gone or is another."""
    data = b""
    if run.ranks.rank == 0 and "artifact" in run.log.rows:
        path = run.log.folder / "final_model.ptz"
        with contextlib.suppress(OSError):
            data = path.read_bytes()
        there = run.log.rows.get("artifact_file", {})
        if hashlib.sha256(data).hexdigest() != there.get("sha256"):
            run.log.line(f"{path}: is not what this run wrote; exporting the last checkpoint again")
            data = b""
    return run.ranks.share(data)


# ==================================================================================================
# 11. Averages
#
# Candidates for the export: the last weights, EMA, SWA and LAWA. With AVERAGE=auto the lowest loss
# on held-out training text decides, quantised, since that is what is scored.
# ==================================================================================================


class Averages:
    """EMA, SWA and LAWA's snapshots of params, fp32, as lists in the order of params."""

    def __init__(self, c: Config, params: Iterable[Tensor]) -> None:
        self.c, self.params = c, list(params)
        self.steps = 0
        self.snapshots = 0  # that SWA is the mean of
        kinds = ["ema"] * c.ema_enabled + ["swa"] * c.swa_enabled
        kinds += [f"lawa{k}" for k in range(c.lawa_k * c.lawa_enabled)]
        self.kept = {kind: [p.detach().clone() for p in self.params] for kind in kinds}

    @torch.no_grad()
    def update(self, lr_factor: float) -> None:
        """Take in the weights after a step at this factor on rates.

        SWA begins anew where rates have risen again, as they do after LOAD_CHECKPOINT.
        """
        c = self.c
        self.steps += 1
        n = self.steps
        if lr_factor >= 0.2:
            self.snapshots = 0
        if c.ema_enabled:
            decay = min(c.ema_decay, (1 + n) / (10 + n))
            torch._foreach_lerp_(self.kept["ema"], self.params, 1 - decay)
        if c.swa_enabled and lr_factor < 0.2 and n % c.swa_every == 0:
            self.snapshots += 1
            torch._foreach_lerp_(self.kept["swa"], self.params, 1 / self.snapshots)
        if c.lawa_enabled and n % c.lawa_freq == 0:
            slot = (n // c.lawa_freq - 1) % c.lawa_k  # of the oldest
            torch._foreach_copy_(self.kept[f"lawa{slot}"], self.params)

    def candidates(self) -> dict[str, list[Tensor]]:
        """Weights by name that AVERAGE allows; the last ones while that average has no snapshot."""
        found = {"none": [p.detach().clone() for p in self.params]}
        if "ema" in self.kept:
            found["ema"] = self.kept["ema"]
        if "swa" in self.kept and self.snapshots:
            found["swa"] = self.kept["swa"]
        taken = self.steps // self.c.lawa_freq
        lawa = [weights for kind, weights in self.kept.items() if kind.startswith("lawa")][:taken]
        if lawa:
            found["lawa"] = [sum(copies) / len(copies) for copies in zip(*lawa, strict=True)]
        if self.c.average == "auto":
            return found
        name = self.c.average if self.c.average in found else "none"
        return {name: found[name]}

    @torch.no_grad()
    def compare(
        self,
        ranks: Ranks,
        model: GPT,
        data: TrainData,
        calibration: Calibration | None,
        found: Mapping[str, list[Tensor]],
    ) -> dict[str, float]:
        """Losses of candidates on held-out text, by name; the model keeps what came last.

        All are rounded at one step size, at which the first of them fits, and without GPTQ's error
        feedback, which takes many times as long.
        """
        losses: dict[str, float] = {}
        step_size = 0.0
        grid_alone = Calibration(calibration.grid, {}) if calibration else None
        tokens = ranks.put(data.held_out.astype(np.int64))
        inputs, targets = (
            t.view(-1, data.T).split(8)[ranks.rank :: ranks.world]
            for t in (tokens[:-1], tokens[1:])
        )
        for name, weights in found.items():
            torch._foreach_copy_(self.params, weights)
            quantizer = make_quantizer(self.c, model.state_dict(), grid_alone)
            step_size = step_size or quantizer.search(bytes_for_weights(self.c))
            load_state(model, quantizer.rounded(step_size), "average")
            total = torch.zeros((), device=ranks.device, dtype=torch.double)
            for ids, goal in zip(inputs, targets, strict=True):
                total += GPT.forward(model, ids, goal, "sum")  # no compiling on the clock
            losses[name] = ranks.sum(total).item() / (len(tokens) - 1)
        return losses

    @CONSOLE.doing("comparing averages")
    @torch.no_grad()
    def choose(
        self, run: Run, model: GPT, data: TrainData, calibration: Calibration | None
    ) -> None:
        """Put the best candidate into the model and log the losses of all."""
        found = self.candidates()
        losses = self.compare(run.ranks, model, data, calibration, found)
        tokens = len(data.held_out) - 1
        for name, loss in losses.items():
            run.log.metric(f"average_{name}", heldout_train_loss=loss, tokens=tokens)
        best = min(losses, key=losses.__getitem__)
        torch._foreach_copy_(self.params, found[best])
        run.log.line(f"average: exporting {best} swa_snapshots:{self.snapshots}")


# ==================================================================================================
# 12. Scoring core
#
# What evaluations are made of: plans of windows, batches, nats of rows. What drives them,
# score_batch() and score(), is in section 14: windows in, nats out, each target once, into one
# array with a row [N] for each job, whose mean is taken once, in fp64. Ranks share out batches.
# ==================================================================================================


class Observer:
    """Watches a pass of score(), for tools/audit.py. This one ignores what it is told.

    Targets are named by their index in the stream, windows by their number in the pass.
    """

    def scoring(self, starts: np.ndarray, firsts: np.ndarray, ends: np.ndarray) -> None:
        """Windows with these starts, first scored rows and ends are scored next, in this order."""

    def learned(self, begin: int, end: int) -> None:
        """What is scored from now on may depend on targets begin to end."""

    def fitted(self, targets: np.ndarray, window: int) -> None:
        """What this window and later ones are scored with was fitted to these targets."""


SILENT = Observer()


def plan_windows(n: int, window: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, first scored row) of each window, int64, to score n targets once, in order.

    The first window scores all its rows, later ones the last `stride`; the last is moved back to
    end at n. With n = 9, window = 4 and stride = 3: starts 0 3 5, first rows 0 1 2. Raises
    ValueError.
    """
    if not 1 <= stride <= window <= n:
        raise ValueError(f"need 1 <= stride {stride} <= window {window} <= n {n}")
    ends = np.minimum(np.arange(window, n + stride, stride), n)
    starts = ends - window
    return starts, np.concatenate([[0], ends[:-1]]) - starts


def scored_rows(firsts: np.ndarray, length: int) -> np.ndarray:
    """Mask [B,length] of the rows that windows score."""
    return np.arange(length) >= firsts[:, None]


class Batch(NamedTuple):
    """The last R rows of some windows, as the trunk left them."""

    h: Tensor  # [B,R,D]
    targets: Tensor  # [B,R]
    firsts: np.ndarray  # [B] first scored one of these rows
    at: np.ndarray  # [S] index in the stream of each scored target
    rows: Tensor  # [S] its row in h.flatten(0, 1)
    origins: np.ndarray  # [B] index in the stream of the first of the R rows
    window: int  # number, in the pass, of the batch's first window


def row_nll(
    model: GPT, h: Tensor, targets: Tensor, rows: Tensor, shift: Tensor | None = None
) -> Tensor:
    """Nats [S] at rows of h.flatten(0, 1), with shift [B or 1,V] on the logits before the cap.

    h is [B,R,D]; only these rows meet the head.
    """
    R = h.size(1)
    h, targets = h.flatten(0, 1), targets.flatten()
    nats = []
    for r in rows.split(16384):
        z = model.project(h[r])
        if shift is not None:
            z += shift[r // R] if len(shift) > 1 else shift
        nats.append(F.cross_entropy(model.cap(z), targets[r], reduction="none"))
    return torch.cat(nats)


# ==================================================================================================
# 13. Scoring methods
#
# What turns hidden states into nats. To add one: subclass ScoringMethod, give Config a setting that
# switches it on, and name both in rows of EVALUATORS, with TTT and without. Whether a method is
# causal follows from the settings, by its leaks(): broken_conditions().
# ==================================================================================================


class ScoringMethod:
    """Nats of scored targets, and what the method learns from them. One is made for each pass."""

    BY_NAME: ClassVar[dict[str, type["ScoringMethod"]]] = {}
    all_rows = False  # whether nats() looks at other rows than those to score
    learns = False  # whether learn() does anything: then the stream is scored in chunks

    def __init_subclass__(cls) -> None:
        ScoringMethod.BY_NAME[cls.__name__] = cls

    def __init__(
        self, c: Config, ranks: Ranks, model: GPT, val: ValData, observer: Observer = SILENT
    ) -> None:
        self.c, self.ranks, self.model, self.val, self.observer = c, ranks, model, val, observer

    @staticmethod
    def leaks(c: Config) -> bool:
        """Whether a target's probability depends on the target itself or on later ones.

        A claim, which tools/audit.py checks.
        """
        return False

    def batch_windows(self) -> int | None:
        """Windows of a batch, if the method fixes it; else the pass takes what memory holds."""
        return None

    def nats(self, b: Batch) -> Tensor:
        """Nats [S] of the scored targets of a batch."""
        raise NotImplementedError

    def learn(self, end: int) -> None:
        """Take in the targets from the last `end` up to this one, all of which were scored.

        A resumed pass calls it again for each chunk before: what it builds is not in state().
        """

    def state(self) -> dict[str, Tensor]:
        """Tensors that nats() changes and later nats() need: saved and restored in place."""
        return {}


class Plain(ScoringMethod):
    """The model's own distribution."""

    def nats(self, b: Batch) -> Tensor:
        """Nats [S]."""
        return row_nll(self.model, b.h, b.targets, b.rows)


# SLOT in closed form. A group (a batch, or one window) has a delta on its hidden states h_n and a
# bias b on its logits before the cap. With E the output matrix, row n's logits are
#     E (h_n + delta) + b = z_n + s,   z_n = E h_n,   s = E delta + b  [V]
# so a step of the fit changes the one vector s; the z_n are computed once, as far as KEEP goes.
# With y_n the target of row n, share_n its weight in the mean and u_n = (z_n + s) / cap:
#     loss(s)  = sum_n share_n CE(cap tanh(u_n), y_n)
#     dloss/ds = sum_n share_n (softmax(cap tanh(u_n)) - onehot(y_n)) (1 - tanh(u_n)^2)
#     dloss/db = dloss/ds,   dloss/ddelta = E^T dloss/ds
# No backward pass is needed, and nothing of the size of h. The code has tanh(u) = 2 q - 1 with
# q = sigmoid(2u), so z and s come times 2/cap; a softmax ignores the -cap of cap tanh(u) =
# 2 cap q - cap; and 1 - tanh(u)^2 = 4 q (1 - q).


def slot_gradient(z: Tensor, targets: Tensor, shares: Tensor, shift: Tensor, cap: float) -> Tensor:
    """dloss/ds [G,V] as above, of z [G,n,V], targets and shares [G,n] and s, here shift [G,V].

    z and shift come times 2/cap.
    """
    q = (z + shift.unsqueeze(1)).sigmoid_()
    own = q.gather(2, targets.unsqueeze(2)).squeeze(2)
    g = torch.softmax(q * (2 * cap), -1).mul_(torch.addcmul(q, q, q, value=-1))
    columns = (shares.unsqueeze(1) @ g).squeeze(1)
    return columns.scatter_add_(1, targets, shares * own * (own - 1)) * 4


class Slot(ScoringMethod):
    """SLOT (arXiv:2505.12392): parameters fitted to a batch (#1084) or a window (#1303), by AdamW.

    A delta [D] on hidden states and, with SLOT_BIAS, a bias [V] on logits before the cap; AdamW's
    epsilon is 1e-5 and its weight decay 1e-8. Their state is [4,groups,P]: parameters, both
    moments, number of steps.
    """

    TILE = 2**18  # base logits that a CPU works on at once; a GPU takes KEEP
    KEEP = 2**26  # base logits kept from step to step; those past it are computed again
    WINDOWS = 32  # a window's loss is divided as in a batch of so many (#1303), whatever the batch

    def __init__(
        self, c: Config, ranks: Ranks, model: GPT, val: ValData, observer: Observer = SILENT
    ) -> None:
        super().__init__(c, ranks, model, val, observer)
        self.gradient = slot_gradient
        if ranks.compile:
            self.gradient = torch.compile(slot_gradient, dynamic=True)
        self.tile = self.KEEP if ranks.cuda else self.TILE
        self.all_rows = self.looks_at_all_rows(c)
        self.by_window = c.slot_delta == "window"
        self.carried = c.slot_loss in CARRIED
        self.carry = self.fresh(1)  # AdamW's state from fit to fit, if it is carried
        self.carry_mean = self.fresh(1)[0]  # of what was carried at documents' ends
        self.documents_ended = torch.zeros((), device=ranks.device)

    @staticmethod
    def leaks(c: Config) -> bool:
        """Whether a delta is fitted to what it then scores."""
        fitted_after_scoring = c.slot_loss in CARRIED
        own_delta = c.slot_delta == "window" or c.slot_batch_seqs == 1
        # of windows that share a delta, one's context is what another scores
        own_context = c.slot_loss == "context" and own_delta
        return not (fitted_after_scoring or own_context)

    @staticmethod
    def looks_at_all_rows(c: Config) -> bool:
        """Whether a fit needs rows of context too."""
        return c.slot_loss in ("all", "context", "recent")

    def batch_windows(self) -> int | None:
        """SLOT_BATCH_SEQS windows, which share a delta unless each has its own."""
        return self.c.slot_batch_seqs

    def state(self) -> dict[str, Tensor]:
        """What is carried from fit to fit."""
        if self.c.slot_reset == "none":
            return {"carry": self.carry}
        return {
            "carry": self.carry,
            "carry_mean": self.carry_mean,
            "documents_ended": self.documents_ended,
        }

    def fresh(self, groups: int) -> Tensor:
        """AdamW's state [4,groups,P] at zero."""
        width = self.c.model_dim + self.c.vocab_size * self.c.slot_bias
        return torch.zeros(4, groups, width, device=self.ranks.device)

    def fit_rows(self, firsts: np.ndarray, length: int) -> np.ndarray:
        """Mask [B,length] of the rows whose targets the parameters are fitted to."""
        if self.c.slot_loss == "all":
            mask = np.ones((len(firsts), length), bool)
            mask[:, -1] = False  # #1084 leaves out the last
            return mask
        if self.c.slot_loss == "recent":
            return np.ones((len(firsts), length), bool)
        scored = scored_rows(firsts, length)
        return ~scored if self.c.slot_loss == "context" else scored

    def usual_rows(self, length: int) -> int:
        """Rows that a window's delta is fitted to, but in the first window and the last."""
        scored = self.c.eval_stride
        rows = {"all": length - 1, "recent": length, "context": length - scored}
        return rows.get(self.c.slot_loss, scored)

    def shift(self, state: Tensor) -> Tensor:
        """Shift s [G,V] of the logits."""
        D = self.c.model_dim
        shift = state[0, :, :D] @ self.model.head_weight().float().mT
        return shift + state[0, :, D:] if self.c.slot_bias else shift

    def fit(self, h: Tensor, targets: Tensor, rows: Tensor, shares: Tensor, state: Tensor) -> None:
        """Fit state, in place, to shares [G,n] times nats at rows [G,n] of h [*,D], targets [*]."""
        c = self.c
        weight = self.model.head_weight().float()
        factor = 2 / c.logit_softcap
        size = len(rows) * c.vocab_size  # logits of one row of each group
        low = c.slot_lr if c.slot_lr_min < 0 else c.slot_lr_min
        width = max(1, self.tile // size)
        tiles = list(zip(rows.split(width, 1), shares.split(width, 1), strict=True))
        kept: dict[int, Tensor] = {}
        moved: float | Tensor = 0.0  # by the hypergradient
        last: float | Tensor = 0.0
        for step in range(c.slot_steps):
            shift = self.shift(state) * factor
            columns = torch.zeros_like(shift)
            for k, (r, share) in enumerate(tiles):
                z = kept[k] if k in kept else self.model.project(h[r]).mul_(factor)
                if (k + 1) * width * size <= self.KEEP:
                    kept[k] = z
                columns = columns + self.gradient(z, targets[r], share, shift, c.logit_softcap)
            g = columns @ weight
            if c.slot_bias:
                g = torch.cat((g, columns), -1)
            if c.slot_hyper_lr:
                moved = moved + c.slot_hyper_lr * (g * last).sum(-1, keepdim=True)
                last = g
            self.adam_step(state, g, cosine(c.slot_lr, low, step, c.slot_steps) + moved)

    @staticmethod
    def adam_step(state: Tensor, g: Tensor, rate: float | Tensor) -> None:
        """One step of AdamW on state [4,G,P], with one rate or rates [G,1]."""
        value, m, v, count = state
        count += 1
        m.lerp_(g, 0.1)
        v.lerp_(g.square(), 0.001)
        # 1 - beta**count, precisely
        first, second = (-torch.expm1(count[:, :1] * math.log(beta)) for beta in (0.9, 0.999))
        update = m / first / ((v / second).sqrt() + 1e-5)
        value -= rate * (update + 1e-8 * value)

    def nats(self, b: Batch) -> Tensor:
        """Nats [S]. If a state is carried, ranks call it together: it goes round."""
        found = [b.h.new_empty(0).float()]  # cat needs one, also on a rank without windows
        if not self.carried:
            return torch.cat([*found, *self.group_nats(b)])
        for rank in range(self.ranks.world):  # in the order of the stream
            if rank == self.ranks.rank:
                found += self.group_nats(b)
            if self.ranks.world > 1:
                for tensor in self.state().values():
                    dist.broadcast(tensor, rank)
        return torch.cat(found)

    def group_nats(self, b: Batch) -> Iterator[Tensor]:
        """Nats of the batch, in parts of the windows that are fitted at once.

        A group is the windows that share a delta: one, or with SLOT_DELTA=shared all.
        """
        length = b.h.size(1)
        put = self.ranks.put
        mask = self.fit_rows(b.firsts, length)
        at_once = self.windows_at_once(length) if self.by_window else max(1, len(mask))
        for begin in range(0, len(mask), at_once):
            part = slice(begin, begin + at_once)
            h, targets = b.h[part], b.targets[part].flatten()
            groups = len(h) if self.by_window else 1
            rows, shares = self.rows_and_shares(mask[part].reshape(groups, -1), length)
            self.tell(b, begin, rows, shares)
            scored = put(np.flatnonzero(scored_rows(b.firsts[part], length)))
            fitted_to = h.flatten(0, 1), targets, put(rows), put(shares.astype(np.float32))
            if self.carried:  # scored first, with what earlier windows left
                yield row_nll(self.model, h, targets, scored, self.shift(self.carry))
                self.fit(*fitted_to, self.carry)
                self.forget(targets[scored])
            else:
                state = self.fresh(groups)
                self.fit(*fitted_to, state)
                yield row_nll(self.model, h, targets, scored, self.shift(state))

    def windows_at_once(self, length: int) -> int:
        """Windows with a delta each that are fitted at once; a carried one takes them in order."""
        if self.carried:
            return 1
        return max(1, self.tile // (self.c.vocab_size * max(1, self.usual_rows(length))))

    def rows_and_shares(self, mask: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows [G,n] of all groups' rows, their shares [G,n] of the loss) for masks [G,rows].

        A group with fewer rows to fit to than another is filled up with rows whose share is 0.
        """
        order = np.argsort(~mask, 1, kind="stable")[:, : mask.sum(1).max()]
        divisor = max(1, mask.sum())
        if self.by_window:
            divisor = self.WINDOWS * self.usual_rows(length)
        shares = np.take_along_axis(mask, order, 1) / divisor
        return order + np.arange(len(mask))[:, None] * length, shares

    def forget(self, targets: Tensor) -> None:
        """After a fit to these targets: SLOT_DECAY, and SLOT_RESET at a document's beginning."""
        if self.c.slot_decay:
            self.carry[0] *= 1 - self.c.slot_decay
        if self.c.slot_reset == "document":
            ended = (targets == DOCUMENT_START).any()  # no if: a GPU would be waited for
            self.documents_ended += ended
            count = self.documents_ended.clamp(min=1)
            self.carry_mean += ended * (self.carry[0] - self.carry_mean) / count
            anew = torch.zeros_like(self.carry)
            anew[0] = self.carry_mean
            self.carry.copy_(torch.where(ended, anew, self.carry))

    def tell(self, b: Batch, first: int, flat: np.ndarray, shares: np.ndarray) -> None:
        """Tell the observer what the groups from the batch's window `first` on are fitted to."""
        R = b.h.size(1)
        ahead = 0  # windows from a group to those that are scored with what is fitted to it
        if self.carried:
            ahead = 1 if self.by_window else len(b.origins)
        for group, (rows, share) in enumerate(zip(flat, shares, strict=True)):
            used = rows[share > 0]
            targets = b.origins[first + used // R] + used % R
            self.observer.fitted(targets, b.window + first + group + ahead)


# CTW weighs all context trees up to a depth at once. A node is a context, the last d tokens. With
# n_a the times that token a followed it, n their sum and alpha = 1/2, it predicts by the KT
# (Krichevsky-Trofimov) estimate (n_a + alpha) / (n + V alpha), under which all that followed it has
# the probability
#     log P_e = sum_a lgamma(n_a + alpha) - V lgamma(alpha) - lgamma(n + V alpha) + lgamma(V alpha)
# Its weighted probability is P_w = P_e at the largest depth, else (P_e + product of its children's
# P_w) / 2. A node that met nothing has P_e = P_w = 1. So after a chunk only the nodes that it met
# change, each by its own counts and its children's change: bottom-up, vectorised, exact. A token's
# probability is the root's P_w with it over that without it, which unrolls along its context to
#     q = KT at the largest depth, then upwards  q <- stop KT + (1 - stop) q,  stop = P_e / (2 P_w)


@dataclasses.dataclass
class CtwDepth:
    """The contexts of one length: numbered nodes, and numbered pairs of a node and a target."""

    node: Tensor  # [N] node of each target's context
    pair: Tensor  # [N] pair of each target
    parent: Tensor  # [nodes] among those one shorter
    owner: Tensor  # [pairs] node
    pair_count: Tensor  # [pairs] fp64, times met
    count: Tensor  # [nodes]
    log_own: Tensor  # [nodes] log P_e
    log_children: Tensor  # [nodes] log of the product of children's P_w
    log_weighted: Tensor  # [nodes] log P_w


class Ctw(ScoringMethod):
    """Context tree weighting over tokens (Willems, Shtarkov, Tjalkens 1995), mixed in.

    A score is (1-w) p + w q. Where the model's entropy is above CTW_ENTROPY_THRESHOLD, w is
    CTW_WEIGHT * entropy / ln V; elsewhere, and in the first chunk, 0. q knows the chunks before and
    does not move inside one. Kept in fp64 on the CPU. CTW_DEPTH=0 is a unigram cache.
    """

    learns = True

    @CONSOLE.doing("building context trees")
    def __init__(
        self, c: Config, ranks: Ranks, model: GPT, val: ValData, observer: Observer = SILENT
    ) -> None:
        super().__init__(c, ranks, model, val, observer)
        self.end = 0  # of the targets that were learnt
        self.depths: list[CtwDepth] = []
        V = c.vocab_size
        tokens = val.tokens.cpu()
        padded = F.pad(tokens, (c.ctw_depth, 0), value=V)  # V: before the stream
        node = torch.zeros_like(tokens[1:])
        parent = torch.zeros(1, dtype=torch.long)
        for d in range(c.ctw_depth + 1):
            if d:
                longer = node * (V + 1) + padded[c.ctw_depth + 1 - d :][: val.n]
                contexts, node = torch.unique(longer, return_inverse=True)
                parent = contexts // (V + 1)
            pairs, pair = torch.unique(node * V + tokens[1:], return_inverse=True)
            pair_count = torch.zeros(len(pairs), dtype=torch.float64)
            zeros = torch.zeros(4, len(parent), dtype=torch.float64)
            depth = CtwDepth(node, pair, parent, pairs // V, pair_count, *zeros)
            self.depths.append(depth)  # zeros: count, log_own, log_children, log_weighted

    @staticmethod
    def count(counts: Tensor, met: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """Count what was met: (its places, what lgamma(counts + alpha) rises by there)."""
        at, times = torch.unique(met, return_counts=True)
        before = counts[at]
        counts[at] += times
        return at, torch.lgamma(before + times + alpha) - torch.lgamma(before + alpha)

    @CONSOLE.doing("weighting context trees")
    def learn(self, end: int) -> None:
        """Count targets before end, and weight the nodes on their paths."""
        new = slice(self.end, end)
        self.end = end
        changed: tuple[Tensor, Tensor] | None = None  # (parents, change of log P_w below them)
        for x in reversed(self.depths):
            pairs, rise = self.count(x.pair_count, x.pair[new], 0.5)
            x.log_own.index_add_(0, x.owner[pairs], rise)
            nodes, rise = self.count(x.count, x.node[new], self.c.vocab_size / 2)
            x.log_own.index_add_(0, nodes, -rise)
            weighted = x.log_own[nodes]
            if changed:
                x.log_children.index_add_(0, *changed)
                weighted = torch.logaddexp(weighted, x.log_children[nodes]) - math.log(2)
            changed = x.parent[nodes], weighted - x.log_weighted[nodes]
            x.log_weighted[nodes] = weighted

    def probability(self, at: Tensor) -> Tensor:
        """q [n] fp64 of targets at these indices of the stream."""
        q: Tensor | float = 0.0
        for k, x in enumerate(reversed(self.depths)):
            node = x.node[at]
            kt = (x.pair_count[x.pair[at]] + 0.5) / (x.count[node] + self.c.vocab_size / 2)
            stop = torch.exp(x.log_own[node] - x.log_weighted[node]) / 2
            q = stop * kt + (1 - stop) * q if k else kt
        return torch.as_tensor(q)

    def nats(self, b: Batch) -> Tensor:
        """Nats [S] under the mixture."""
        if not self.end:
            return row_nll(self.model, b.h, b.targets, b.rows)
        c = self.c
        h, targets = b.h.flatten(0, 1), b.targets.flatten()
        log_q = self.ranks.put(self.probability(torch.from_numpy(b.at)).log().float().numpy())
        nats = []
        for r, q in zip(b.rows.split(1024), log_q.split(1024), strict=True):
            logp = self.model.cap(self.model.project(h[r])).log_softmax(-1)
            own = logp.gather(1, targets[r, None])[:, 0]
            entropy = -(logp.exp() * logp).sum(-1)
            w = c.ctw_weight / math.log(logp.size(1)) * entropy
            w = (w * (entropy > c.ctw_entropy_threshold)).clamp(max=1)  # rounding can pass 1
            # where w is 0 this is own, to the bit
            nats.append(-torch.logaddexp(own + torch.log1p(-w), q + w.log()))
        return torch.cat(nats)


def experts(c: Config) -> tuple[str, ...]:
    """Evaluators that EVALS=...,mix mixes: those before it."""
    return tuple(label for label in c.evals if not EVALUATORS[label].mixes)


def mixture(c: Config, nats: Tensor) -> tuple[Tensor, np.ndarray]:
    """(nats [N] of a mixture of experts, their mean weights [K]) from their nats [K,N], on the CPU.

    Fixed share (Herbster and Warmuth 1998): a target's probability is the mean of the experts' by
    weights in proportion to what each gave to the targets before; after a block of MIX_BLOCK
    targets all experts get MIX_SHARE of the weight in equal parts. So it is a distribution, and
    depends on the past alone. Over N targets it loses to the best expert at most
    ln K - (N / MIX_BLOCK) ln(1 - MIX_SHARE) nats, and to experts that change places a little more.
    """
    K, n = nats.shape
    log_weights = np.full((K, 1), -math.log(K))
    mixed = np.empty(n)
    total = np.zeros(K)
    for begin in range(0, n, c.mix_block):
        own = nats[:, begin : begin + c.mix_block].double().numpy()
        past = np.cumsum(own, 1) - own
        log_prior = log_weights - past
        log_prior -= np.logaddexp.reduce(log_prior, 0)
        mixed[begin : begin + own.shape[1]] = -np.logaddexp.reduce(log_prior - own, 0)
        total += np.exp(log_prior).sum(1)
        log_weights -= own.sum(1, keepdims=True)
        weights = np.exp(log_weights - np.logaddexp.reduce(log_weights, 0))
        shared = (1 - c.mix_share) * weights + c.mix_share / K
        log_weights = np.log(shared + 1e-300)  # MIX_SHARE=0 can leave an expert nothing
    return torch.from_numpy(mixed), total / n


def broken_conditions(c: Config, label: str) -> str:
    """Which conditions of C1 to C4 (issue #1017) an evaluator breaks, "" if it is causal.

    C1: given the weights that a pass begins with, a probability depends on the past alone. C2:
    probabilities sum to 1. C3: nothing is fitted to a target before it was scored. C4: each target
    is scored once, which score() makes sure of.
    """
    scored = experts(c) if EVALUATORS[label].mixes else [label]
    leak = any(ScoringMethod.BY_NAME[EVALUATORS[name].method].leaks(c) for name in scored)
    # a fit that sees the target favours whichever it is: over all targets that sums to more than 1
    broken = ["C1", "C2"] if leak else []
    if leak or c.prequant_ttt_enabled or c.calibration == "validation":
        broken.append("C3")
    return ",".join(broken)


# ==================================================================================================
# 14. Test-time training and evaluators
#
# Score-first TTT (#549): the stream is cut into chunks; the windows of a chunk are scored, then the
# model trains on it, then come those of the next. Evaluators with the same windows, training and
# chunks share a pass, which changes no score. A pass can be stopped at any batch and resumed.
# ==================================================================================================


CPU_TOKENS = 4096  # of a forward, which a CPU's cache likes
GPU_TOKENS = 786432 // 8  # what the record's batch is on each of its GPUs


def trained_at_once(ranks: Ranks) -> int:
    """Tokens that a forward and a backward get at once, whatever the world size."""
    return GPU_TOKENS if ranks.cuda else CPU_TOKENS


def micro_batches(ranks: Ranks, sequences: int, length: int) -> int:
    """The fewest equal parts of a rank's sequences that fit: what a forward gets at once."""
    limit = trained_at_once(ranks)
    for n in range(1, sequences):
        if sequences % n == 0 and sequences // n * length <= limit:
            return n
    return sequences


def ttt_optimizer(c: Config) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """What makes TTT's optimiser of parameters; rates come with each chunk."""
    if c.ttt_optimizer == "adamw":
        return functools.partial(torch.optim.AdamW, weight_decay=0.0)
    if c.ttt_optimizer == "rmsprop":
        return torch.optim.RMSprop
    return functools.partial(torch.optim.SGD, momentum=c.ttt_momentum)


class ChunkTrainer:
    """Trains the model on stretches of the validation stream."""

    def __init__(
        self,
        c: Config,
        ranks: Ranks,
        model: GPT,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        frozen_blocks: int,
        *,
        which: str = "all",
    ) -> None:
        """Trains all parameters, or with which="control" those that an artifact keeps in fp32.

        The others get no gradient until put_back() ends.
        """
        self.c, self.ranks, self.model = c, ranks, model
        self.params: dict[str, nn.Parameter] = {}
        for name, p in model.named_parameters():
            p.requires_grad_(which == "all" or export_kind(c, name) == "fp32")
            if p.requires_grad:
                self.params[name] = p
        self.optimizer = optimizer(list(self.params.values()))
        sizes = [p.numel() for p in self.params.values()]
        # all gradients in one tensor, to clear, sum and clip as one
        self.grad = torch.zeros(sum(sizes), device=ranks.device)
        self.frozen: list[Tensor] = []  # views of it
        parts = self.grad.split(sizes)
        for (name, p), part in zip(self.params.items(), parts, strict=True):
            p.grad = part.view_as(p)
            matrices = split_banks({name: p.grad}, c.num_layers)
            for matrix, gradient in matrices.items():
                if matrix.startswith("blocks.") and int(matrix.split(".")[1]) < frozen_blocks:
                    self.frozen.append(gradient)

    def live_tensors(self) -> dict[str, Tensor]:
        """What training changes, by name: parameters and the optimiser's state, made if need be."""
        if not self.optimizer.state:
            self.make_state()
        live: dict[str, Tensor] = dict(self.params)
        for name, p in self.params.items():
            state = self.optimizer.state[p]
            live |= {f"{key}.{name}": t for key, t in state.items() if torch.is_tensor(t)}
        return live

    def make_state(self) -> None:
        """Make the optimiser's state, which is zero at first: a step of rate 0 makes it."""
        self.optimizer.param_groups[0]["lr"] = 0.0
        self.optimizer.step()
        for state in self.optimizer.state.values():
            for tensor in filter(torch.is_tensor, state.values()):
                tensor.zero_()

    def train(self, tokens: Tensor, begin: int, end: int, *, rate: float, epochs: int) -> None:
        """Passes over targets begin to end of the stream, in sequences of EVAL_SEQ_LEN.

        The last sequence may reach back for context; only its own targets count.
        """
        T = self.c.eval_seq_len
        size = self.c.ttt_batch_seqs
        starts = np.arange(begin, end, T)
        reach = max(0, int(starts[-1]) + T - end)
        starts[-1] -= reach
        inputs, targets = self.sequences(tokens, starts)
        targets[-1, :reach] = -100
        self.optimizer.param_groups[0]["lr"] = rate
        for i in [*range(0, len(inputs), size)] * epochs:
            mine = slice(i + self.ranks.rank, i + size, self.ranks.world)
            self.step(inputs[mine], targets[mine], (targets[i : i + size] >= 0).sum())

    def sequences(self, tokens: Tensor, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """(inputs, targets) [n,EVAL_SEQ_LEN] of sequences with these starts [n]."""
        rows = tokens[self.ranks.put(starts[:, None] + np.arange(self.c.eval_seq_len + 1))]
        # of one sequence too: its strides would be kept, and need a graph of their own
        return rows[:, :-1], rows[:, 1:].clone(memory_format=torch.contiguous_format)

    def prime(self, tokens: Tensor, lengths: Iterable[int]) -> None:
        """Compile what train() calls on so many targets, with the first tokens; nothing is changed.

        A graph is for one shape and one layout: tensors are cut here as in train().
        """
        c, ranks = self.c, self.ranks
        size = c.ttt_batch_seqs
        batches = set()
        for length in lengths:
            n = math.ceil(length / c.eval_seq_len)
            batches |= {min(n, size), n % size}  # whole ones, and what is left over
        for n in sorted(batches - {0}):
            inputs, targets = self.sequences(tokens, np.zeros(n, int))
            mine = slice(ranks.rank, n, ranks.world)
            if len(inputs[mine]):
                parts = micro_batches(ranks, len(inputs[mine]), c.eval_seq_len)
                ids, goal = (t[mine].chunk(parts)[0] for t in (inputs, targets))
                with torch.enable_grad():
                    self.model(ids, goal, "sum").backward()
        self.grad.zero_()

    def step(self, inputs: Tensor, targets: Tensor, count: Tensor) -> None:
        """A step on the mean over the count targets of all ranks; one may hold none."""
        self.grad.zero_()
        if len(inputs):
            n = micro_batches(self.ranks, len(inputs), self.c.eval_seq_len)
            for ids, goal in zip(inputs.chunk(n), targets.chunk(n), strict=True):
                (self.model(ids, goal, "sum") / count).backward()
        self.ranks.sum(self.grad)
        for gradient in self.frozen:
            gradient.zero_()
        if self.c.ttt_grad_clip:
            self.grad *= (self.c.ttt_grad_clip / (self.grad.norm() + 1e-6)).clamp(max=1)
        self.optimizer.step()


class Stopwatch:
    """Seconds of a pass, in all and by method; a resumed pass's include those before the stop.

    Moments are device events, read in by_method(), so that taking one does not wait.
    """

    def __init__(self, ranks: Ranks, methods: int) -> None:
        self.ranks = ranks
        self.began = perf_counter()
        self.compiling = 0.0
        self.spent = np.zeros(methods)
        self.moments: list[list[Any]] = []  # [methods + 1] around the methods' work

    def elapsed(self) -> float:
        """Seconds of the pass."""
        return perf_counter() - self.began

    def by_method(self) -> np.ndarray:
        """Seconds [methods] of each method."""
        self.ranks.synchronize()
        for moments in self.moments:
            for k, (a, b) in enumerate(pairwise(moments)):
                self.spent[k] += self.ranks.ms_between(a, b) / 1000
        self.moments = []
        return self.spent.copy()

    def leave_out(self, seconds: float) -> None:
        """Take seconds of compiling, just spent, out of the pass's time."""
        self.compiling += seconds
        self.began += seconds

    def resume(self, elapsed: float, compiling: float, spent: Sequence[float]) -> None:
        """Take in the seconds of before."""
        self.began -= elapsed
        self.compiling += compiling
        self.spent = np.array(spent)


class Progress:
    """A line every two seconds of a pass that says how far it is."""

    def __init__(self, run: Run, names: str, watch: Stopwatch) -> None:
        self.run, self.names, self.watch = run, names, watch
        self.shown_at = perf_counter()

    def show(self, **done: tuple[int, int]) -> None:
        """Log (how many are done, of how many) by what they are, if it is time."""
        if perf_counter() - self.shown_at > 2:
            self.shown_at = perf_counter()
            self.watch.by_method()  # or moments pile up
            parts = " ".join(f"{unit}:{n}/{total}" for unit, (n, total) in done.items())
            self.run.log.line(f"progress:{self.names} {parts} seconds:{self.watch.elapsed():.1f}")


class PassCheckpoint:
    """What a pass is resumed from: nats so far and live tensors.

    Saved when the run is stopped, and, unless SAVE_EVERY is 0, when thirty times what saving costs
    has passed.
    """

    def __init__(self, c: Config, run: Run, kind: str) -> None:
        self.c, self.run, self.kind = c, run, kind
        self.cost = 0.02  # seconds that saving takes
        self.last = perf_counter()
        self.poll = Poll(run.ranks)

    def own(
        self, there: Mapping[str, Tensor], out: Tensor, live: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Tensors by name that a file's are restored into."""
        counters = torch.zeros(len(out) + 2, dtype=torch.double)
        return {**live, "counters": counters, "nats": out[:, : there["nats"].size(-1)]}

    def check(
        self,
        there: Mapping[str, Tensor],
        *,
        out: Tensor,
        before: np.ndarray,
        live: Mapping[str, Tensor],
    ) -> None:
        """Raises ValueError for a file that this pass cannot have written."""
        check_fits(self.own(there, out, live), there)
        window, *times = there["counters"].tolist()
        whole = window.is_integer() and 0 <= window < len(before)
        if not whole or min(times) < 0:
            raise ValueError(f"its counters are {[window, *times]}")
        if there["nats"].size(-1) != before[int(window)]:
            raise ValueError("its nats are not those of the windows before")

    def resume(
        self, out: Tensor, before: np.ndarray, live: Mapping[str, Tensor], watch: Stopwatch
    ) -> int:
        """The window to go on with, after taking in the newest file, if there is one.

        before [windows]: targets that are scored before each.
        """
        check = functools.partial(self.check, out=out, before=before, live=live)
        there = self.run.store.restore(self.kind, check)
        if not there:
            return 0
        own = self.own(there, out, live)
        copy_tensors(self.c, own, there, self.kind)
        if self.run.ranks.rank:
            out.zero_()  # ranks sum it in the end
        window, elapsed, compiling, *spent = own["counters"].tolist()
        watch.resume(elapsed, compiling, spent)
        return int(window)

    def mark(self, window: int, out: Tensor, live: Mapping[str, Tensor], watch: Stopwatch) -> None:
        """Before a batch, on all ranks together: save if it is time, or stop.

        out [jobs+1,n] has all targets before this batch, once the ranks' are summed.
        """
        now = perf_counter()
        due = bool(self.c.save_every) and now > self.last + 30 * self.cost
        if due:
            self.last = now  # asked once: on a GPU the answer comes batches later
        due_for_all, stop, *_ = self.poll.ask(due) or (0, 0)
        if (due_for_all or stop) and out.size(1):
            spent = watch.by_method()
            figures = [window, now - watch.began, watch.compiling, *spent]
            counters = torch.tensor(figures, dtype=torch.double)
            nats = self.run.ranks.sum(out.clone(memory_format=torch.contiguous_format))
            self.run.store.save(self.kind, window, {**live, "counters": counters, "nats": nats})
            self.last = perf_counter()
            self.cost = self.last - now
        if stop:
            self.run.stop()


def tokens_at_once(c: Config, ranks: Ranks) -> int:
    """Tokens of a forward that a CPU's cache, or half of a GPU's memory, holds."""
    if not ranks.cuda:
        return CPU_TOKENS
    # bytes: what a block keeps, the skips, and the inside of the MLP
    a_token = ranks.dtype.itemsize * c.model_dim * (16 + c.num_layers // 2 + 4 * c.mlp_mult)
    return int(torch.cuda.get_device_properties(ranks.device).total_memory / 2 / a_token)


class Pass:
    """A pass over the stream: its windows, the methods that score them, and the nats so far."""

    def __init__(
        self,
        run: Run,
        model: GPT,
        val: ValData,
        jobs: Sequence[tuple[str, Config]],
        observer: Observer,
    ) -> None:
        """Raises ValueError for jobs that need batches of different sizes."""
        label, c = jobs[0]
        self.c, self.ranks, self.model, self.val = c, run.ranks, model, val
        self.observer = observer
        evaluator = EVALUATORS[label]
        self.methods = [
            ScoringMethod.BY_NAME[EVALUATORS[name].method](config, run.ranks, model, val, observer)
            for name, config in jobs
        ]
        wanted = {n for n in (m.batch_windows() for m in self.methods) if n is not None}
        if len(wanted) > 1:
            raise ValueError(f"evaluators of one pass need batches of {sorted(wanted)} windows")
        at_once = min(c.val_batch_size // run.ranks.world, tokens_at_once(c, run.ranks))
        self.batch_windows = wanted.pop() if wanted else max(1, at_once // c.eval_seq_len)
        stride = c.eval_stride if evaluator.sliding else c.eval_seq_len
        self.starts, self.firsts = plan_windows(val.n, c.eval_seq_len, stride)
        chunked = evaluator.ttt or any(method.learns for method in self.methods)
        # a window belongs to the chunk of its first scored target
        self.chunk_of = (self.starts + self.firsts) // (c.ttt_chunk_tokens if chunked else val.n)
        self.chunks = int(self.chunk_of[-1]) + 1
        # a row of nats for each method, and how often each target was scored
        self.out = torch.zeros(len(jobs) + 1, val.n, device=run.ranks.device)
        self.trainer: ChunkTrainer | None = None
        if evaluator.ttt:
            self.trainer = ChunkTrainer(
                c, run.ranks, model, ttt_optimizer(c), c.ttt_freeze_blocks, which=c.ttt_params
            )

    def live_tensors(self) -> dict[str, Tensor]:
        """What changes while the pass goes on, but for the nats, by name."""
        live = {
            f"{name}.{k}": t
            for k, method in enumerate(self.methods)
            for name, t in method.state().items()
        }
        if self.trainer:
            live |= self.trainer.live_tensors()
        return live

    def learn(self, chunk: int) -> list[Any]:
        """Let methods learn from a scored chunk; moments [methods + 1] around them."""
        begin, end = chunk * self.c.ttt_chunk_tokens, (chunk + 1) * self.c.ttt_chunk_tokens
        moments = [self.ranks.moment()]
        for method in self.methods:
            if method.learns:
                self.observer.learned(begin, end)
            method.learn(end)
            moments.append(self.ranks.moment())
        return moments

    @CONSOLE.doing("test-time training")
    def train(self, chunk: int) -> None:
        """Train on a scored chunk, if the pass does."""
        if self.trainer:
            c = self.c
            begin, end = chunk * c.ttt_chunk_tokens, (chunk + 1) * c.ttt_chunk_tokens
            self.observer.learned(begin, end)
            rate = cosine(c.ttt_lr, 0, chunk, self.chunks)
            self.trainer.train(self.val.tokens, begin, end, rate=rate, epochs=c.ttt_epochs)


@torch.no_grad()
def score_batch(work: Pass, windows: slice) -> list[Any]:
    """Score some windows of a pass into its array; moments [methods + 1] around the methods."""
    c, ranks = work.c, work.ranks
    starts, firsts = work.starts[windows], work.firsts[windows]
    T = c.eval_seq_len
    work.observer.scoring(starts, firsts, starts + T)
    n = len(starts)
    tail = c.eval_stride  # rows that are looked at: more in the first window, or for some methods
    if any(method.all_rows for method in work.methods) or firsts.min(initial=T) < T - tail:
        tail = T
    origins, firsts = starts + T - tail, firsts - (T - tail)
    rows = np.flatnonzero(scored_rows(firsts, tail))
    at = (origins[:, None] + np.arange(tail)).ravel()[rows]
    places = ranks.put(at)
    padded = starts
    if ranks.compile and n:  # whole batches only: one shape a tail is compiled
        padded = starts[np.minimum(np.arange(work.batch_windows), n - 1)]
    tokens = work.val.tokens.unfold(0, T + 1, 1)[ranks.put(padded)]
    h = torch.empty(0, tail, c.model_dim, device=ranks.device)
    if n:
        h = work.model.hidden(tokens[:, :-1], tail)[:n]
    targets = tokens[:n, T + 1 - tail :]
    batch = Batch(h, targets, firsts, at, ranks.put(rows), origins, windows.start)
    moments = [ranks.moment()]
    for k, method in enumerate(work.methods):
        work.out[k, places] = method.nats(batch)
        moments.append(ranks.moment())
    once = torch.ones_like(work.out[-1, places])
    work.out[-1].index_add_(0, places, once)  # += would count doubles once
    return moments


@CONSOLE.doing("compiling")
def prime_pass(work: Pass) -> float:
    """Compile what a pass will call; seconds. Nothing of it remains."""
    began = perf_counter()
    kept = [{name: t.clone() for name, t in method.state().items()} for method in work.methods]
    told: list[Any] = [work, *work.methods]
    observer = work.observer
    for part in told:
        part.observer = SILENT
    size = work.batch_windows
    # the first window is scored whole, the others' last rows alone; one window is a shape too
    for first, last in ((0, size), (size, 2 * size), (size, size + 1)):
        score_batch(work, slice(first, min(last, len(work.starts))))
    if work.trainer:
        work.trainer.prime(work.val.tokens, [work.c.ttt_chunk_tokens])
    work.out.zero_()
    for method, states in zip(work.methods, kept, strict=True):
        for name, tensor in method.state().items():
            tensor.copy_(states[name])
    for part in told:
        part.observer = observer
    work.ranks.synchronize()
    return perf_counter() - began


@CONSOLE.doing("scoring")
def score(
    run: Run,
    model: GPT,
    val: ValData,
    jobs: Sequence[tuple[str, Config]],
    *,
    watch: Stopwatch | None = None,
    checkpoint: PassCheckpoint | None = None,
    observer: Observer = SILENT,
) -> list[tuple[Tensor, float]]:
    """[(nats [N] fp32, seconds)] of jobs [(evaluator, Config)], in one pass.

    It has the first job's windows and TTT, which changes the weights. With a checkpoint it can be
    stopped and resumed. Raises Fault unless each target was scored once (C4).
    """
    if EVALUATORS[jobs[0][0]].ttt and jobs[0][1].ttt_params == "lora":
        if any(job != jobs[0] for job in jobs):
            raise ValueError("lora's factors score for one evaluator and Config alone")
        alone = DocumentPass(jobs[0][1], run.ranks, model, val, observer)
        found = alone.score(run, watch or Stopwatch(run.ranks, 1), checkpoint)
        return found * len(jobs)
    work = Pass(run, model, val, jobs, observer)
    names = "+".join(dict.fromkeys(name for name, _ in jobs))
    ranks, out = work.ranks, work.out
    size = work.batch_windows
    watch = watch or Stopwatch(ranks, len(jobs))
    progress = Progress(run, names, watch)
    resumed = 0  # the window to go on with
    live = work.live_tensors()
    before = work.starts + work.firsts  # targets before each window
    if ranks.compile:
        watch.leave_out(prime_pass(work))
    if checkpoint:
        resumed = checkpoint.resume(out, before, live, watch)
    for chunk in range(work.chunks):
        begin, end = np.searchsorted(work.chunk_of, [chunk, chunk + 1]).tolist()
        for b in range(max(begin, resumed), end, ranks.world * size):
            if checkpoint:
                checkpoint.mark(b, out[:, : before[b]], live, watch)
            first = min(b + ranks.rank * size, end)  # some ranks have none at the end
            windows = slice(first, min(first + size, end))
            watch.moments.append(score_batch(work, windows))
            progress.show(window=(windows.stop, len(work.starts)), chunk=(chunk + 1, work.chunks))
        if chunk + 1 < work.chunks:  # the last chunk is scored only
            watch.moments.append(work.learn(chunk))
            if resumed < end:
                work.train(chunk)
    ranks.sum(out)
    check_times_scored(names, out[-1])
    spent = watch.by_method()  # waits for the device: before the pass's own time is read
    total = watch.elapsed()
    # a job's seconds leave out what only the other jobs of the pass did
    return [(out[k], total - spent.sum() + spent[k]) for k in range(len(jobs))]


def check_times_scored(names: str, times: Tensor) -> None:
    """Raises Fault unless each target was scored once (C4)."""
    wrong = int((times != 1).sum())
    if wrong:
        raise Fault(f"{names}: {wrong} of {len(times)} targets were not scored exactly once")


# TTT_PARAMS=lora (#1530, #1767): each document has W + b a in place of a matrix W [out,in] of the
# banks, with an a [r,in] and b [out,r] of its own. All begin with the same random a, and b as zero.
# A document is cut into chunks; each is scored, then a and b take steps on it. Documents know
# nothing of each other, so their order changes nothing: those of about the same length share a
# batch. A chunk's window reaches back from where a whole chunk would end: were it moved back to end
# with the document, how much context its targets have would tell where that is. With TTT_PHASES the
# stream's documents are done part by part, and between parts W itself learns from the part that was
# scored.


def document_starts(val: ValData) -> np.ndarray:
    """First target of each document of the stream; the BOS after a document is its last target."""
    begins = np.flatnonzero(val.tokens[: val.n].cpu().numpy() == DOCUMENT_START)
    return np.union1d([0], begins)


class DocumentFactors:
    """Factors of a batch of documents, each a row of one tensor [docs,numbers], and their steps."""

    def __init__(self, c: Config, ranks: Ranks, model: GPT) -> None:
        self.c, self.dtype = c, model.dtype
        L, r = c.num_layers, c.ttt_lora_rank
        qo, kv, up, down = (getattr(model, bank) for bank in BANKS)
        self.layers = range(c.ttt_freeze_blocks, L)
        self.shapes: list[tuple[int, ...]] = []  # of a, b, a, b ... of each layer's matrices
        initial = []
        g = torch.Generator().manual_seed(c.seed)
        for i in self.layers:
            # in the order of LayerWeights
            for matrix in (qo[i], qo[L + i], kv[i], kv[L + i], up[i], down[i]):
                outs, ins = matrix.shape
                self.shapes += [(r, ins), (outs, r)]
                a = torch.randn(r, ins, generator=g) / math.sqrt(ins)
                initial += [a.flatten(), torch.zeros(outs * r)]
        self.initial = torch.cat(initial or [torch.zeros(0)]).to(ranks.device)
        self.learn = bool(initial) and c.ttt_epochs > 0
        self.begin(0)

    def begin(self, documents: int) -> None:
        """Factors of new documents."""
        self.numbers = nn.Parameter(self.initial.expand(documents, -1).clone())
        self.optimizer = ttt_optimizer(self.c)([self.numbers])
        self.optimizer.param_groups[0]["lr"] = self.c.ttt_lr

    def by_layer(self, documents: int) -> Factors:
        """Pairs (a, b) of the batch's first documents; b times TTT_LORA_ALPHA / rank."""
        scale = self.c.ttt_lora_alpha / self.c.ttt_lora_rank
        sizes = [math.prod(shape) for shape in self.shapes]
        parts = self.numbers[:documents].to(self.dtype).split(sizes, 1)
        tensors = [part.unflatten(1, s) for part, s in zip(parts, self.shapes, strict=True)]
        pairs = [(a, b * scale) for a, b in zip(tensors[::2], tensors[1::2], strict=True)]
        n = len(LayerWeights._fields)
        return {i: pairs[n * k : n * (k + 1)] for k, i in enumerate(self.layers)}

    def step(self, losses: Tensor) -> None:
        """A step on the losses [n] of the batch's first documents, each with its own clipping."""
        (grad,) = torch.autograd.grad(losses.sum(), self.numbers)
        if self.c.ttt_grad_clip:
            norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
            grad.mul_((self.c.ttt_grad_clip / (norm + 1e-6)).clamp(max=1))
        self.numbers.grad = grad
        with torch.no_grad():
            self.numbers.mul_(1 - self.c.ttt_lr * self.c.ttt_lora_wd)
        self.optimizer.step()


class DocumentPass:
    """A pass over the stream, document by document, each with factors of its own."""

    def __init__(
        self, c: Config, ranks: Ranks, model: GPT, val: ValData, observer: Observer
    ) -> None:
        self.c, self.ranks, self.model, self.val, self.observer = c, ranks, model, val, observer
        self.starts = document_starts(val)
        self.ends = np.append(self.starts[1:], val.n)
        self.chunks = -(-(self.ends - self.starts) // c.ttt_lora_chunk)
        # by where they start: equal numbers of documents would tell how many are still to come
        part_of = self.starts * c.ttt_phases // val.n
        parts = [np.flatnonzero(part_of == part) for part in range(c.ttt_phases)]
        parts = [part for part in parts if len(part)]
        self.phases = [self.by_length(part) for part in parts]
        # targets, from and to, that the documents of each make up
        self.stretches = [(int(self.starts[p[0]]), int(self.ends[p[-1]])) for p in parts]
        self.batches = list(chain(*self.phases))
        self.out = torch.zeros(2, val.n, device=ranks.device)  # nats, and how often it was scored
        self.factors = DocumentFactors(c, ranks, model)
        self.trainer: ChunkTrainer | None = None
        if c.ttt_phases > 1:
            sgd = functools.partial(torch.optim.SGD, momentum=c.ttt_momentum)
            self.trainer = ChunkTrainer(c, ranks, model, sgd, c.ttt_freeze_blocks)
        model.requires_grad_(False)  # until put_back() ends: factors learn, weights do not

    def by_length(self, documents: np.ndarray) -> list[np.ndarray]:
        """Batches of these documents, those with the most chunks first."""
        c = self.c
        limit = trained_at_once(self.ranks)
        order = documents[np.argsort(-self.chunks[documents], kind="stable")]
        batches = []
        while len(order):
            window = min(c.eval_seq_len, int(self.chunks[order[0]]) * c.ttt_lora_chunk)
            # each unit of LoRA rank, with its optimiser's state, takes what three tokens'
            # activations do
            size = max(1, limit // (window + 3 * c.ttt_lora_rank))
            batches.append(order[:size])
            order = order[size:]
        return batches

    def score(
        self, run: Run, watch: Stopwatch, checkpoint: PassCheckpoint | None
    ) -> list[tuple[Tensor, float]]:
        """[(nats [N] fp32, seconds)], as score() gives it."""
        n, world = len(self.batches), self.ranks.world
        live = self.trainer.live_tensors() if self.trainer else {}
        # a checkpoint has the nats of all the stream: batches are not in its order
        before = np.full(n, self.val.n)
        if self.ranks.compile:
            watch.leave_out(self.prime())
        resumed = checkpoint.resume(self.out, before, live, watch) if checkpoint else 0
        progress = Progress(run, "ttt", watch)
        documents_done = np.cumsum([len(batch) for batch in self.batches]).tolist()
        end = 0
        for stretch, batches in zip(self.stretches, self.phases, strict=True):
            begin, end = end, end + len(batches)
            for b in range(max(begin, resumed), end, world):
                if checkpoint:
                    checkpoint.mark(b, self.out, live, watch)
                if b + self.ranks.rank < end:
                    self.score_batch(self.batches[b + self.ranks.rank])
                done = min(b + world, end)
                documents = documents_done[done - 1], len(self.starts)
                progress.show(document=documents, batch=(done, n))
            if resumed < end < n:
                self.train(*stretch)
        self.ranks.sum(self.out)
        check_times_scored("ttt", self.out[-1])
        self.ranks.synchronize()
        return [(self.out[0], watch.elapsed())]

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """While all weights learn."""
        self.model.requires_grad_(True)
        with torch.enable_grad():
            yield
        self.model.requires_grad_(False)

    @CONSOLE.doing("compiling")
    def prime(self) -> float:
        """Compile what training between phases will call; seconds. Nothing of it remains."""
        began = perf_counter()
        if self.trainer:
            lengths = [end - begin for begin, end in self.stretches[:-1] if self.can_train(end)]
            with self.learning():
                self.trainer.prime(self.val.tokens, lengths)
            self.ranks.synchronize()
        return perf_counter() - began

    def can_train(self, end: int) -> bool:
        """Whether the stream up to there is as long as one of the sequences of training."""
        return end >= self.c.eval_seq_len

    @CONSOLE.doing("test-time training")
    def train(self, begin: int, end: int) -> None:
        """Let all weights learn from targets of the stream that were scored."""
        if self.trainer and self.can_train(end):
            self.observer.learned(begin, end)
            rate = self.c.ttt_phase_lr
            with self.learning():
                self.trainer.train(self.val.tokens, begin, end, rate=rate, epochs=1)

    def score_batch(self, documents: np.ndarray) -> None:
        """Score a batch, chunk by chunk, and let the factors learn from each."""
        self.factors.begin(len(documents))
        chunks = self.chunks[documents]
        for k in range(chunks[0]):
            self.score_chunk(documents[chunks > k], k, goes_on=int((chunks > k + 1).sum()))

    def score_chunk(self, documents: np.ndarray, k: int, *, goes_on: int) -> None:
        """Score chunk k of documents [n], and let those learn that go on, which come first."""
        c = self.c
        size = c.ttt_lora_chunk
        length = min((k + 1) * size, c.eval_seq_len)
        begins, ends = self.starts[documents] + k * size, self.ends[documents]
        origins = begins + size - length
        at = origins[:, None] + np.arange(length)
        inside = at < ends[:, None]  # what comes after is padding
        ids = self.take(at, inside)
        targets = self.take(at[:, -size:] + 1, inside[:, -size:])
        stops = np.minimum(begins + size, ends)
        self.observer.scoring(origins, begins - origins, stops)
        learns = self.factors.learn and goes_on > 0
        with torch.set_grad_enabled(learns):
            nats = self.nats(ids, targets)
        places = self.ranks.put(at[:, -size:][inside[:, -size:]])
        self.out[0, places] = nats.detach()[self.ranks.put(inside[:, -size:])]
        self.out[1].index_add_(0, places, torch.ones_like(self.out[1, places]))
        if not learns:
            return
        for begin, stop in zip(begins[:goes_on], stops[:goes_on], strict=True):
            self.observer.learned(int(begin), int(stop))
        with torch.enable_grad():
            for epoch in range(c.ttt_epochs):
                if epoch:  # the first learns from the forward that scored
                    nats = self.nats(ids[:goes_on], targets[:goes_on])
                self.factors.step(nats[:goes_on].mean(1))

    def take(self, at: np.ndarray, inside: np.ndarray) -> Tensor:
        """Tokens at these indices of the stream, 0 where the mask says that they are padding."""
        return self.val.tokens[self.ranks.put(np.where(inside, at, 0))] * self.ranks.put(inside)

    def nats(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Nats [n,TTT_LORA_CHUNK] at the windows' ends, with the documents' factors.

        Of padding too: a head with few rows rounds otherwise, which would tell where documents end.
        """
        factors = self.factors.by_layer(len(ids))
        # the class's: the instance's is compiled for two shapes, and these are many
        h = GPT.hidden(self.model, ids, targets.size(1), factors)
        z = self.model.cap(self.model.project(h))
        nats = F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none")
        return nats.view_as(targets)


def mean_and_bpb(val: ValData, nats: Tensor, label: str) -> tuple[float, float]:
    """(nats a token, bits a byte) of nats [N] of a result. Raises Fault if they are not finite."""
    nats = nats.cpu().double()
    loss = nats.mean().item()
    if not math.isfinite(loss):
        wrong = int((~nats.isfinite()).sum())
        raise Fault(
            f"{label}: no score: {wrong} of {val.n} targets have NaN or infinite nats; the weights,"
            " or what was fitted while scoring, are too large. Take other weights or lower rates."
        )
    return loss, loss / math.log(2) * val.n / val.total_bytes


def evaluate(
    c: Config, run: Run, model: GPT, val: ValData, weights: str, *, labels: Sequence[str]
) -> None:
    """Run evaluators on the model, whose weights are put back, and log a result line for each.

    weights says which they are: "float" as trained, "artifact" as read back. What was logged before
    a restart is not done again.
    """
    passes: dict[tuple[bool, bool, bool], list[str]] = {}
    for label in labels:
        if not EVALUATORS[label].mixes:
            passes.setdefault(pass_of(label), []).append(label)
    mix_due = "mix" in labels and f"final_{weights}_mix" not in run.log.rows
    nats: dict[str, Tensor] = {}
    for group in passes.values():
        done = all(f"final_{weights}_{label}" in run.log.rows for label in group)
        if mix_due and done:
            nats |= kept_nats(run, val, weights, group)
            done = nats.keys() >= {*group}
        if not done:
            found = evaluate_pass(c, run, model, val, weights, labels=group, keep=mix_due)
            if mix_due:
                nats |= found
    if mix_due:
        log_mixture(c, run, val, weights, nats)
    remove_files(run, f"scored_{weights}_*")


def evaluate_pass(
    c: Config,
    run: Run,
    model: GPT,
    val: ValData,
    weights: str,
    *,
    labels: Sequence[str],
    keep: bool,
) -> dict[str, Tensor]:
    """Nats [N] by evaluator of those that share a pass, with a result line for each.

    keep: save them, for a mixture that may come after a restart.
    """
    name = f"{weights}_{'+'.join(labels)}"
    checkpoint = PassCheckpoint(c, run, f"progress_{name}")
    with put_back(model.parameters()):
        jobs = [(label, c) for label in labels]
        watch = Stopwatch(run.ranks, len(jobs))
        results = score(run, model, val, jobs, watch=watch, checkpoint=checkpoint)
        total = watch.elapsed()
    figures: dict[str, Any] = {"eval_time": 1000 * total}
    if watch.compiling:
        figures["compile_time"] = 1000 * watch.compiling
    run.log.metric(f"pass_{name}", **figures)
    for label, (nats, seconds) in zip(labels, results, strict=True):
        if f"final_{weights}_{label}" not in run.log.rows:
            log_result(c, run, val, weights, label, nats=nats, seconds=seconds)
        if keep:
            run.store.save(f"scored_{weights}_{label}", 0, {"nats": nats})
    run.store.wait()
    remove_files(run, checkpoint.kind)
    return {label: nats for label, (nats, _) in zip(labels, results, strict=True)}


def remove_files(run: Run, kind: str) -> None:
    """Remove what an evaluation is resumed from."""
    if run.ranks.rank == 0:
        for path in run.store.paths(kind):
            path.unlink()


def kept_nats(run: Run, val: ValData, weights: str, labels: Sequence[str]) -> dict[str, Tensor]:
    """Nats [N] of evaluators that were done before a restart, of those whose file is whole."""
    check = functools.partial(check_nats, n=val.n)
    there = {label: run.store.restore(f"scored_{weights}_{label}", check) for label in labels}
    return {label: tensors["nats"] for label, tensors in there.items() if tensors}


def check_nats(there: Mapping[str, Tensor], n: int) -> None:
    """Raises ValueError unless a file has the nats [n] of a stream."""
    if {name: tensor.shape for name, tensor in there.items()} != {"nats": (n,)}:
        raise ValueError("it has no nats of this stream")


def log_mixture(
    c: Config, run: Run, val: ValData, weights: str, nats: Mapping[str, Tensor]
) -> None:
    """Log the result line of a mixture of evaluators; its time is theirs and its own."""
    began = perf_counter()
    names = experts(c)
    mixed, mean = mixture(c, torch.stack([nats[name].cpu() for name in names]))
    parts = " ".join(f"{name}:{weight:.4f}" for name, weight in zip(names, mean, strict=True))
    run.log.line(f"mix: mean weights {parts}")
    seconds = perf_counter() - began
    run.log.metric(f"pass_{weights}_mix", eval_time=1000 * seconds)
    passes = [row for n, row in run.log.rows.items() if n.startswith(f"pass_{weights}_")]
    seconds = sum(row["eval_time"] for row in passes) / 1000
    log_result(c, run, val, weights, "mix", nats=mixed, seconds=seconds)


def pass_of(label: str) -> tuple[bool, bool, bool]:
    """What evaluators of one pass share: overlapping windows, TTT, chunks.

    Chunks cut batches short, which would move the windows that share a SLOT delta.
    """
    evaluator = EVALUATORS[label]
    chunked = evaluator.ttt or ScoringMethod.BY_NAME[evaluator.method].learns
    return evaluator.sliding, evaluator.ttt, chunked


def log_result(
    c: Config, run: Run, val: ValData, weights: str, label: str, *, nats: Tensor, seconds: float
) -> None:
    """Log the result line of an evaluator; with SAVE_NLL an artifact's nats are kept."""
    loss, bpb = mean_and_bpb(val, nats, f"final_{weights}_{label}")
    broken = broken_conditions(c, label)
    if c.save_nll and run.ranks.rank == 0 and weights == "artifact":
        buffer = BytesIO()
        np.save(buffer, nats.cpu().double().numpy())
        path = run.log.folder / f"nll_{label}.npy"
        write_file(path, [buffer.getvalue()], run.log.remedy())
    figures: dict[str, Any] = dict(val_loss=loss, val_bpb=bpb, tokens=val.n, bytes=val.total_bytes)
    figures |= dict(causal=not broken, eval_time=1000 * seconds)
    if broken:
        figures["breaks"] = broken
    run.log.metric(f"final_{weights}_{label}", **figures)


def check_fits(own: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless a file has tensors of the names, shapes and dtypes of one's own."""
    wrong = misfits(shapes_of(own), shapes_of(there))
    if not wrong:
        wrong = [name for name in own if own[name].dtype != there[name].dtype]
    if wrong:
        raise ValueError(f"{wrong[0]} is not of this pass")


@CONSOLE.doing("pre-quantisation TTT")
def train_on_validation(c: Config, run: Run, model: GPT, val: ValData) -> None:
    """Pre-quantisation TTT (#1488): AdamW on tokens before they are scored. Breaks C3.

    What it goes on from is saved after each epoch, with SAVE_EVERY=0 only when the run is stopped.
    """
    adam = functools.partial(torch.optim.AdamW, weight_decay=0.0)
    trainer = ChunkTrainer(c, run.ranks, model, adam, c.prequant_ttt_freeze_blocks)
    live = {**trainer.live_tensors(), "epochs": torch.zeros((), dtype=torch.double)}
    there = run.store.restore("prequant_ttt", functools.partial(check_fits, live))
    done = 0  # epochs
    if there:
        copy_tensors(c, live, there, "prequant_ttt")
        done = int(there["epochs"])
    poll = Poll(run.ranks)
    began = perf_counter()
    high, epochs = c.prequant_ttt_lr, c.prequant_ttt_epochs
    for epoch in range(done, epochs):
        rate = cosine(high, high / 10, epoch, epochs)
        trainer.train(val.tokens, 0, val.n, rate=rate, epochs=1)
        seconds = perf_counter() - began
        run.log.line(f"prequant_ttt:epoch {epoch + 1}/{epochs} seconds:{seconds:.1f}")
        answer = poll.ask(wait=True)
        stop = bool(answer and answer[0])
        if stop or c.save_every:
            live["epochs"].fill_(epoch + 1)
            run.store.save("prequant_ttt", epoch + 1, live)
        if stop:
            run.stop()
    model.zero_grad(set_to_none=True)


# ==================================================================================================
# 15. Late QAT
#
# Quantisation-aware training: from the step at which rates are under LATE_QAT_THRESHOLD of full the
# forward sees weights rounded to the nearest level of the grid that the export would have taken at
# that step, and the gradient there moves the weights themselves ("straight-through"). Where a row
# has outgrown the grid its step grows, as in the export. (GPTQ's error feedback is the export's.)
# ==================================================================================================


class LateQat:
    """The grid that training rounds to, once it is on."""

    def __init__(self, c: Config, model: GPT) -> None:
        self.c, self.model = c, model
        self.step_size = 0.0  # 0: off
        params = dict(model.named_parameters())
        self.params = {n: p for n, p in params.items() if export_kind(c, n) in LEVELS}
        # Calibration's grid, of a bank as a whole; GPTQ-lite has none
        self.bank_grid: dict[str, Tensor] = {}
        if c.late_qat and c.quant != "gptq_lite":
            for name, p in self.params.items():
                shape = *p.shape[:-2], sum(p.shape[-2:])
                self.bank_grid[name] = torch.zeros(shape, dtype=torch.int8, device=p.device)
        self.grid = split_banks(self.bank_grid, c.num_layers)  # views, by matrix

    @CONSOLE.doing("fixing the grid of late QAT")
    def start(self, ranks: Ranks, data: TrainData) -> None:
        """Fix the grid that the export would take now."""
        calibration = None
        if self.c.quant != "gptq_lite":
            calibration = calibrate(self.c, ranks, self.model, data)
        quantizer = make_quantizer(self.c, self.model.state_dict(), calibration)
        self.step_size = quantizer.search(bytes_for_weights(self.c))
        for name, exponents in self.grid.items():
            exponents.copy_(torch.cat(quantizer.step_codes(name, self.step_size)))

    def calibration(self) -> Calibration | None:
        """The grid, for the export, if it is on and has one."""
        return Calibration(self.grid, {}) if self.step_size and self.grid else None

    @contextlib.contextmanager
    def rounded_weights(self) -> Iterator[None]:
        """Inside, the model's weights are rounded, if QAT is on."""
        if not self.step_size:
            yield
            return
        with put_back(self.params.values()):
            self.round_weights()
            yield

    @torch.no_grad()
    def round_weights(self) -> None:
        """Round the weights as the export would with this grid, outgrown rows included."""
        calibration = Calibration(self.bank_grid, {}) if self.bank_grid else None
        quantizer = make_quantizer(self.c, self.params, calibration, whole=True)
        for name, p in self.params.items():
            matrices, distance = quantizer.nearest(name, self.step_size)
            p.copy_(matrices.levels.mul_(distance))


# ==================================================================================================
# 16. Training
#
# The loop asks the clock, saves, validates or ends where it must, and then takes a step. What it
# goes on from after a stop is TrainingState: no random number is drawn after the initial weights,
# and the data of a step follow from its number.
# ==================================================================================================


def train_step(
    c: Config,
    ranks: Ranks,
    model: GPT,
    optimizer: Optimizer,
    batch: tuple[Tensor, Tensor],
    *,
    step: int,
    lr_factor: float,
    qat: LateQat | None = None,
) -> tuple[Tensor, Tensor]:
    """(mean loss, gradient norm), on the device, after a step on this rank's part of a batch."""
    inputs, targets = batch
    n = micro_batches(ranks, len(inputs), c.train_seq_len)
    total = torch.zeros((), device=ranks.device)
    with qat.rounded_weights() if qat else contextlib.nullcontext():
        for ids, goal in zip(inputs.chunk(n), targets.chunk(n), strict=True):
            loss = model(ids, goal) / n
            loss.backward()
            total += loss.detach()
    norm = optimizer.step(total, lr_factor, muon_momentum(c, step))
    model.zero_grad(set_to_none=True)
    return total, norm


class Rehearsal(NamedTuple):
    """What parts of training take, in ms, rank 0's; 0: not rehearsed, or there is none."""

    step: float = 0.0  # a usual step
    qat_start: float = 0.0  # fixing late QAT's grid
    end: float = 0.0  # what comes after the last step


@CONSOLE.doing("compiling")
def prime(c: Config, run: Run, model: GPT, data: TrainData) -> Rehearsal:
    """Compile, and measure, before the clock starts; nothing remains of it."""
    ranks = run.ranks
    optimizer = Optimizer(c, ranks, model)
    feed = data.batches()
    taken = []
    with put_back(model.parameters()):
        for step in range(c.warmup_steps):
            model.recurring = bool(c.recur_layers) and step % 2 == 1  # both graphs
            start = ranks.moment()
            train_step(c, ranks, model, optimizer, next(feed), step=step, lr_factor=1.0)
            taken.append(ranks.ms_between(start, ranks.moment()))
        end = 0.0, 0.0
        if ranks.cuda and c.max_wallclock_seconds:  # on a CPU that takes as long as some steps
            model.recurring = bool(c.recur_layers)
            rehearse_end(c, ranks, model, data)  # the first one warms up
            end = rehearse_end(c, ranks, model, data)
    step_ms = min(taken[1 + bool(c.recur_layers) :], default=0.0)  # those before compile
    own = torch.tensor([step_ms, *end], device=ranks.device)
    found = Rehearsal(*ranks.sum(own * (ranks.rank == 0)).tolist())
    line = f"primed in {c.warmup_steps} steps"
    if found.step:
        line += f": a step {found.step:.2f}ms"
    if found.end:
        line += (
            f", fixing QAT's grid {found.qat_start:.0f}ms, what follows the last {found.end:.0f}ms"
        )
    run.log.line(line)
    return found


def rehearse_end(c: Config, ranks: Ranks, model: GPT, data: TrainData) -> tuple[float, float]:
    """What fixing QAT's grid takes, and finish_training() with the last checkpoint, in ms."""
    state = TrainingState(c, ranks, model)
    state.averages.steps = c.lawa_freq  # so that each average has a snapshot
    state.averages.snapshots = int(c.swa_enabled)
    begin = ranks.moment()
    if c.late_qat and c.min_lr < c.late_qat_threshold:
        state.qat.start(ranks, data)  # at the end its grid is there
    start = ranks.moment()
    calibration = calibration_for_export(c, ranks, model, data, state.qat)
    found = state.averages.candidates()
    state.averages.compare(ranks, model, data, calibration, found)
    to_host(state.tensors())
    end = ranks.ms_between(start, ranks.moment())
    return ranks.ms_between(begin, start), end


class Counters(NamedTuple):
    """Numbers of a checkpoint, kept as one fp64 tensor."""

    step: float
    ms: float  # training time
    qat_step_size: float  # 0: late QAT is off
    snapshots: float  # SWA's
    time_up: float  # 1: the time cap ended training


class TrainingState:
    """What training changes, and goes on from."""

    def __init__(self, c: Config, ranks: Ranks, model: GPT) -> None:
        self.c, self.model = c, model
        self.optimizer = Optimizer(c, ranks, model)
        self.averages = Averages(c, model.parameters())
        self.qat = LateQat(c, model)
        self.time_up = False
        self.apart = 0.0  # nats of val_loss over train_loss that were warned of

    def tensors(self, step: int = 0, ms: float = 0.0) -> dict[str, Tensor]:
        """Live tensors by name: all of a checkpoint but its header, which has the settings.

        Parameters, averages, QAT's grid, the optimiser's, and Counters.
        """
        names = {p: name for name, p in self.model.named_parameters()}
        snapshots = self.averages.snapshots
        counters = Counters(step, ms, self.qat.step_size, snapshots, self.time_up)
        found: dict[str, Tensor] = {"counters": torch.tensor(counters, dtype=torch.double)}
        found |= {name: p for p, name in names.items()}
        for kind, tensors in self.averages.kept.items():
            found |= {f"{kind}.{name}": t for name, t in zip(names.values(), tensors, strict=True)}
        found |= {f"grid.{name}": t for name, t in self.qat.grid.items()}
        return found | self.optimizer.state(names)

    def resume(self, run: Run) -> tuple[int, float]:
        """(step, ms) after taking in the last checkpoint, or LOAD_CHECKPOINT, if there is one.

        Raises BadInput for a checkpoint of another model.
        """
        own = self.tensors()
        check = functools.partial(check_counters, last=self.c.iterations)
        there = run.store.restore("checkpoint", check)
        if there:
            copy_tensors(self.c, own, there, "checkpoint")
        else:
            there = read_checkpoint(self.c.load_checkpoint)
            if not there:
                return 0, 0.0
            run.log.line(self.take_what_fits(own, there))
            self.start_recurrence_late(own)
        counters = Counters(*own["counters"].tolist())
        self.averages.steps, self.averages.snapshots = int(counters.step), int(counters.snapshots)
        self.qat.step_size = counters.qat_step_size
        self.time_up = bool(counters.time_up)  # what is measured anew might let the run go on
        names = {p: name for name, p in self.model.named_parameters()}
        self.optimizer.take_momentum(own, names)
        return int(counters.step), counters.ms

    def start_recurrence_late(self, own: Mapping[str, Tensor]) -> None:
        """Begin what LOAD_CHECKPOINT's run had not begun, though this one is past RECUR_START."""
        if not self.c.recur_layers or not own["counters"][0] > self.c.recur_start > 0:
            return
        names = self.model.vectors_by_visit()
        if not any(own[f"exp_avg_sq.{name}"][1:].any() for name in names):  # never learnt
            self.model.start_recurrence()

    @torch.no_grad()
    def take_what_fits(self, own: Mapping[str, Tensor], there: dict[str, Tensor]) -> str:
        """Copy what LOAD_CHECKPOINT has into own; a line that says what begins anew.

        Late QAT always does: that run's grid was fixed for its weights and its ARTIFACT_BYTES. An
        average that is new begins with the weights that are loaded, a new parameter with its
        initial values. Raises BadInput unless the shapes of what both have are equal.
        """
        grid = {name for name in {*own, *there} if name.startswith("grid.")}
        without_grid = {name: tensor for name, tensor in own.items() if name not in grid}
        where = f"LOAD_CHECKPOINT={self.c.load_checkpoint}"
        both = copy_what_both_have(self.c, without_grid, there, where)
        counters = Counters(*own["counters"].tolist())._replace(qat_step_size=0.0, time_up=0.0)
        averages = tuple(f"{kind}." for kind in self.averages.kept)
        new = own.keys() - both - grid
        for name in new:
            if name.startswith(averages):
                own[name].copy_(own[name.partition(".")[2]])
        if not any(name.startswith("swa.") for name in both):
            counters = counters._replace(snapshots=0.0)
        own["counters"].copy_(torch.tensor(counters, dtype=torch.double))
        line = f"LOAD_CHECKPOINT: step {there['counters'][0]:.0f}"
        for words, names in (("begin anew", new), ("left out", there.keys() - own.keys() - grid)):
            if names:
                line += f"; {words}: {names_of_state(names)}"
        return line


def names_of_state(names: Iterable[str], most: int = 20) -> str:
    """Averages and parameters that names of a checkpoint's tensors belong to; not the optimiser's.

    An average is named once, not for each parameter. Of many the first are named.
    """
    found = set()
    for name in names:
        kind = name.partition(".")[0].rstrip("0123456789")
        if kind not in ("momentum", "step", "exp_avg", "exp_avg_sq"):
            found.add(kind if kind in ("ema", "swa", "lawa") else name)
    told = sorted(found)[:most]
    return " ".join(told) + (f" and {len(found) - most} more" if len(found) > most else "")


def check_counters(tensors: Mapping[str, Tensor], last: int = MAX_INT) -> None:
    """Raises ValueError for counters of a checkpoint that no training to the last step has."""
    counters = tensors.get("counters", torch.zeros(0))
    if counters.dtype != torch.double or counters.shape != (len(Counters._fields),):
        raise ValueError("it has no counters of a training")
    step, ms, step_size, snapshots, time_up = Counters(*counters.tolist())
    whole = step.is_integer() and snapshots.is_integer() and time_up in (0, 1)
    if not whole or not 0 <= snapshots <= step <= last or min(ms, step_size) < 0:
        raise ValueError(f"its counters are {counters.tolist()}")
    for name, tensor in tensors.items():
        early = name.startswith("step.") and not (0 <= tensor.min() <= tensor.max() <= step)
        if early or (name.startswith("exp_avg_sq.") and tensor.min() < 0):
            raise ValueError(f"{name} is not of AdamW after {step:.0f} steps")


def read_checkpoint(path: str) -> dict[str, Tensor]:
    """Tensors of LOAD_CHECKPOINT; {} if it is empty. Raises BadInput."""
    if not path:
        return {}
    try:
        tensors = unseal(bytearray(Path(path).read_bytes()))[1]
        check_counters(tensors)
        return tensors
    except Exception as why:  # damage makes the readers raise all sorts
        raise BadInput(
            f"LOAD_CHECKPOINT={path}: {in_words(why)}; give the path of a whole"
            " checkpoint.STEP.ckpt."
        ) from None


APART = 0.5  # nats by which val_loss may part from train_loss before a warning says so


def time_to_end(state: TrainingState, data: TrainData, clock: Clock, known: Rehearsal) -> float:
    """Time of two steps (the next one and one to spare), and of what follows the last step, in ms.

    That is training time too: calibrating, unless QAT did, and comparing averages. Where it was not
    rehearsed it is guessed from the text that is read: a batch of it takes 1.5 times a step. (Up to
    three averages are compared on the held-out text, a forward each, in small parts; calibrating
    takes a forward and a backward.)
    """
    if not clock.measured and not clock.begin:
        return 0.0  # a first step that was not rehearsed would look like all the time there is
    c = state.c
    tokens = len(data.held_out) + c.calibration_tokens * (not state.qat.step_size)
    guess = 1.5 * tokens / c.train_batch_tokens * clock.step_ms
    fixing = 0.0 if state.qat.step_size else known.qat_start
    return 2 * clock.step_ms + fixing + (known.end or guess)


def validate(
    run: Run,
    state: TrainingState,
    val: ValData,
    *,
    clock: Clock,
    step: int,
    train_loss: Tensor | None,
) -> None:
    """Log val_loss on disjoint windows; the time it takes is no training time.

    A warning says where it is far over train_loss, the last step's, if there was one: again only
    when that has grown as much.
    """
    c = state.c
    ms = clock.now()
    nats, _ = score(run, state.model, val, [("roundtrip", c)])[0]
    label = f"step:{step}/{c.iterations}"
    loss, bpb = mean_and_bpb(val, nats, label)
    figures = dict(val_loss=loss, val_bpb=bpb, train_time=ms, step_avg=ms / max(step, 1))
    run.log.metric(label, digits=4, **figures)
    apart = 0.0 if train_loss is None else loss - train_loss.item()
    if apart > state.apart + APART:
        state.apart = apart
        run.log.line(
            f"warning: val_loss is {apart:.2f} nats over train_loss: text of another kind, or"
            " training text known by heart, or (late QAT) weights that training rounds away"
        )
    clock.leave_out(ms)


def log_loss(run: Run, label: str, loss: Tensor, *, clock: Clock, step: int) -> None:
    """Log the loss of the step that ended; the host waits for it."""
    ms = clock.now()
    run.log.metric(label, digits=4, train_loss=loss.item(), train_time=ms, step_avg=ms / step)


@CONSOLE.doing("training")
def train(c: Config, run: Run, model: GPT, data: TrainData, val: ValData) -> Calibration | None:
    """Train, from a checkpoint if there is one, and put the best average into the model.

    Returns what its export needs. Raises Fault for a loss or gradient that is not finite.
    """
    ranks = run.ranks
    primed = (ranks.compile or ranks.cuda) and c.warmup_steps
    known = prime(c, run, model, data) if primed else Rehearsal()
    state = TrainingState(c, ranks, model)
    begin, ms = state.resume(run)
    optimizer, averages, qat = state.optimizer, state.averages, state.qat
    feed = data.batches(begin)
    # the first step, from 1, whose loss or gradient was not finite; past the end: none
    first_bad = torch.full((), c.iterations + 1, device=ranks.device)
    loss: Tensor | None = None
    model.recurring = bool(c.recur_layers) and (begin > c.recur_start or not c.recur_start)
    clock = Clock(ranks, 1000 * c.max_wallclock_seconds, begin, ms, known.step)
    for step in range(begin, c.iterations + 1):
        elapsed, stop, bad = clock.agreed(step, first_bad)
        to_end = time_to_end(state, data, clock, known)
        state.time_up |= step > 0 and clock.runs_out(elapsed + to_end)
        last = step == c.iterations or state.time_up
        due = c.save_every > 0 and step % c.save_every == 0
        near_the_end = clock.runs_out(elapsed + 2 * to_end)  # which would wait for the file
        save = step > begin and (stop or last or (due and not near_the_end))
        if bad or ((last or save) and first_bad.item() <= step):
            raise Fault(
                f"step {first_bad.item()}: loss or gradient is not finite; lower MATRIX_LR,"
                f" TIED_EMBED_LR and SCALAR_LR. What is saved in {run.log.folder} is from before"
                " it."
            )
        if save:
            run.store.save("checkpoint", step, state.tensors(step, clock.now()))
            clock.wait_again(step)
        if stop:
            run.stop()
        if last or (c.val_loss_every and step % c.val_loss_every == 0):
            validate(run, state, val, clock=clock, step=step, train_loss=loss)
        if last:
            break
        if c.recur_layers and step == c.recur_start:
            model.start_recurrence()
            clock.wait_again(step)
            run.log.line(f"recurrence:on step:{step} layers:{shown(c.recur_layers)}")
        factor = lr_factor(c, step, elapsed, clock.step_ms)
        sure = clock.measured or not clock.cap_ms  # the grid is fixed for good: not by a guess
        if c.late_qat and sure and factor < c.late_qat_threshold and not qat.step_size:
            qat.start(ranks, data)
            run.log.line(
                f"late_qat:on step:{step} lr_scale:{factor:.4f} grid_step:{qat.step_size:.6g}"
            )
            clock.wait_again(step)
        loss, norm = train_step(
            c, ranks, model, optimizer, next(feed), step=step, lr_factor=factor, qat=qat
        )
        averages.update(factor)
        finite = torch.isfinite(loss + norm)
        first_bad = torch.where(finite, first_bad, first_bad.clamp(max=step + 1))
        if step < 10 or (step + 1) % c.train_log_every == 0 or run.log.due(clock.step_ms):
            log_loss(run, f"step:{step + 1}/{c.iterations}", loss, clock=clock, step=step + 1)
    if step < c.iterations:
        run.log.line(
            f"stopping_early: wallclock_cap train_time:{clock.now():.0f}ms"
            f" step:{step}/{c.iterations}"
        )
    text = ValidationText(c, val) if c.calibration == "validation" else data
    return finish_training(run, state, data, text, clock=clock, step=step)


def finish_training(
    run: Run,
    state: TrainingState,
    data: TrainData,
    text: TrainData | ValidationText,
    *,
    clock: Clock,
    step: int,
) -> Calibration | None:
    """Put the best average into the model, on the clock; returns what its export needs."""
    c, model = state.c, state.model
    calibration = calibration_for_export(c, run.ranks, model, text, state.qat)
    state.averages.choose(run, model, data, calibration)
    tokens = step * c.train_batch_tokens
    run.log.metric("training", steps=step, tokens=tokens, train_time=clock.now())
    if run.ranks.cuda:
        peak = torch.cuda.max_memory_allocated() >> 20
        run.log.line(f"peak memory allocated: {peak} MiB")
    return calibration


def calibration_for_export(
    c: Config, ranks: Ranks, model: GPT, text: TrainData | ValidationText, qat: LateQat
) -> Calibration | None:
    """What the export is told: QAT's grid if training used one, else a new one; GPTQ's Hessians."""
    if c.quant == "gptq_lite":
        return None
    trained = qat.calibration()
    if c.quant == "rd":
        return trained or calibrate(c, ranks, model, text)
    found = calibrate(c, ranks, model, text)
    return Calibration(trained.grid if trained else found.grid, found.hessians)


# ==================================================================================================
# 17. Main
#
# Exit status: 0 done, 1 a fault on the way, 2 bad input, 128 + its number after a signal.
# ==================================================================================================


def run_all(c: Config) -> None:
    """Check everything, then train and export, or load, then evaluate.

    Raises BadInput before any work starts, Fault on the way.
    """
    refuse_checkpoint(c)
    refuse_experts(c)
    state = None
    if c.load_artifact:
        c, state = read_artifact(c)
    run = Run(c)
    ranks = run.ranks
    if state is None and c.train_batch_tokens % (ranks.world * c.train_seq_len):
        raise BadInput(
            f"TRAIN_BATCH_TOKENS={c.train_batch_tokens}: with {ranks.world} ranks a multiple of"
            f" {ranks.world * c.train_seq_len}."
        )
    name, attend, note = choose_attention(c.attention, ranks)
    name = attention_kernel(name, c, ranks)
    val = ValData(c, ranks)
    refuse_phases(c, val)
    data = None
    if state is None:
        data = TrainData(c, ranks)
        refuse_validation_text(c, data, val)
    model = GPT(c, ranks.dtype, attend)
    if state is None:
        refuse_small_cap(c, model)
        refuse_checkpoint(c, model)
    else:
        load_state(model, state, f"LOAD_ARTIFACT={c.load_artifact}")
    run.log.start()
    model.to(ranks.device)
    ranks.broadcast(model.parameters())  # initial ones differ where processors do
    if ranks.compile:
        compile_model(model)
    log_start(c, run, model, val, name)
    if note:
        run.log.line(note)
    if __name__ == "__main__":
        STOP_SIGNALS.install()
    try:
        carry_out(c, run, model, data, val)
    except Exception as problem:  # also that of a collective whose other end died
        run.store.writer.shutdown()  # ends with the checkpoint that is being written
        run.log.line(in_lines(f"error: {problem}"))
        raise


def log_start(c: Config, run: Run, model: GPT, val: ValData, attention: str) -> None:
    """Log what is about to run, and a CPU that was not meant."""
    run.log.line(
        f"model_params:{sum(p.numel() for p in model.parameters())} attention:{attention}"
        f" val_tokens:{val.n} (the last {val.dropped} fill no window) val_bytes:{val.total_bytes}"
    )
    if c.device == "auto" and torch.version.cuda and not run.ranks.cuda:
        run.log.line(
            f"DEVICE=auto: this torch is for GPUs (CUDA {torch.version.cuda}) and sees none;"
            " running on the CPU"
        )


def carry_out(c: Config, run: Run, model: GPT, data: TrainData | None, val: ValData) -> None:
    """Train and export, if there are data for it, and evaluate the artifact."""
    if data:
        train_and_export(c, run, model, data, val)
    evaluate(c, run, model, val, "artifact", labels=c.evals)
    if "eval_total" not in run.log.rows:
        passes = [row for n, row in run.log.rows.items() if n.startswith("pass_artifact")]
        total = sum(row.get(name, 0) for row in passes for name in ("eval_time", "compile_time"))
        run.log.metric("eval_total", eval_time=total)
    warn_of_scores(c, run)
    if run.ranks.world > 1:
        dist.barrier()  # the rank that ends first takes the others' connections with it


DAMAGE = 0.1  # nats that the artifact may lose before a warning says so


def warn_of_scores(c: Config, run: Run) -> None:
    """Say what a reader could overlook: a model that lost much in the export, or knows nothing."""
    rows = run.log.rows
    causal = [n for n, row in rows.items() if n.startswith("final_artifact_") and row["causal"]]
    if not causal:
        return
    best = min(rows[name]["val_loss"] for name in causal)
    loss = rows.get("final_artifact_roundtrip", {}).get("val_loss", best)
    trained = rows.get("final_float_roundtrip", {}).get("val_loss", loss)
    if loss - trained > DAMAGE:
        run.log.line(
            f"warning: the artifact's val_loss is {loss - trained:.2f} nats over the trained"
            " model's; a larger ARTIFACT_BYTES loses less, or a smaller model"
        )
    if best > math.log(c.vocab_size):
        run.log.line(
            f"warning: val_loss {best:.2f} is over ln(VOCAB_SIZE), that of guessing: too few steps,"
            " or rates that are too high"
        )


def refuse_checkpoint(c: Config, model: GPT | None = None) -> None:
    """Raises BadInput for a LOAD_CHECKPOINT that is none, past ITERATIONS, or of another model.

    Without a model, before the data are read, for what can be said so early.
    """
    loaded = read_checkpoint(c.load_checkpoint)
    if not loaded:
        return
    step = Counters(*loaded["counters"].tolist()).step
    if step > c.iterations:
        raise BadInput(
            f"ITERATIONS={c.iterations}: the checkpoint is of step {step:.0f}; give that or more."
        )
    if model is not None:
        where = f"LOAD_CHECKPOINT={c.load_checkpoint}"
        copy_what_both_have(c, dict(model.named_parameters()), loaded, where)


def refuse_experts(c: Config) -> None:
    """Raises BadInput for a mixture of evaluators of which one is not causal."""
    if any(EVALUATORS[label].mixes for label in c.evals):
        for label in experts(c):
            if ScoringMethod.BY_NAME[EVALUATORS[label].method].leaks(c):
                raise BadInput(
                    f"EVALS={shown(c.evals)}: {label} breaks {broken_conditions(c, label)}; a"
                    " mixture takes causal evaluators alone. Leave it out, or set SLOT_LOSS=past."
                )


def refuse_phases(c: Config, val: ValData) -> None:
    """Raises BadInput for more phases than documents."""
    documents = len(document_starts(val)) if c.ttt_phases > 1 else 1
    if c.ttt_phases > documents:
        raise BadInput(
            f"TTT_PHASES={c.ttt_phases}: at most {documents}, the validation split's documents."
        )


@CONSOLE.doing("comparing training and validation text")
def refuse_validation_text(c: Config, data: TrainData, val: ValData) -> None:
    """Raises BadInput if over 1 % of the validation text is documents that the training text has.

    Or 10 % of their stretches of 64 tokens. Training text has a document if it has two thirds of
    its stretches, anywhere. Of more than COMPARED_TOKENS tokens only the beginnings of shards are
    looked at; tools/documents.py compares any size.
    """
    hashes, document, counts = document_ngrams(val.tokens[:COMPARED_TOKENS].cpu().numpy())
    if not len(hashes):
        return
    found = ngrams_found(hashes, [*data.shards, data.held_out], COMPARED_TOKENS // len(data.shards))
    both = (counts > 0) & (3 * np.bincount(document, found, len(counts)) >= 2 * counts)
    share = both[document].mean()
    if share > 0.01 or found.mean() > 0.1:
        raise BadInput(
            f"DATA_PATH={c.data_path}: training text has {both.sum()} of {(counts > 0).sum()}"
            f" validation documents; that is {100 * share:.1f} % of that text and"
            f" {100 * found.mean():.1f} % of its windows of {NGRAM} tokens; to train or calibrate"
            " on it breaks C3."
        )


def train_and_export(c: Config, run: Run, model: GPT, data: TrainData, val: ValData) -> None:
    """Train unless the artifact is there from before a restart; the model is then the artifact."""
    run.log.line(
        f"train_shards:{len(data.shards)} train_tokens:{sum(map(len, data.shards))}"
        f" heldout_tokens:{len(data.held_out)}"
    )
    artifact = read_export(run)
    if not artifact:
        before = run.log.rows.get("artifact_file")
        calibration = train(c, run, model, data, val)
        if c.prequant_ttt_enabled:
            train_on_validation(c, run, model, val)
        evaluate(c, run, model, val, "float", labels=["roundtrip"])
        export(c, run, model, calibration)
        remove_files(run, "prequant_ttt")
        artifact = read_export(run)
        if before and before.get("sha256") != hashlib.sha256(artifact).hexdigest():
            run.log.line("the artifact is not as it was before: it is evaluated from the beginning")
            run.log.rows = without_scores(run.log.rows)
    path = run.log.folder / "final_model.ptz"
    with refused(path, "Choose another RUN_ID"):
        state, settings = unpack(artifact)
        model.recurring = bool(c.recur_layers) and settings["RECUR_START"] == 0
    load_state(model, state, path)


def main() -> None:
    """Run by environment and arguments; does not return."""
    try:
        given = settings_from_arguments(sys.argv[1:])
        run_all(load_config({**os.environ, **given}))
        sys.exit(0)
    except SystemExit as done:
        os._exit(int(done.code or 0))  # taking gloo down aborts some ranks
    except Exception as problem:
        if not isinstance(problem, (BadInput, Fault, OSError)):
            sys.excepthook(*sys.exc_info())
        lost_another = dist.is_initialized() and isinstance(problem, RuntimeError)
        if os.environ.get("LOCAL_RANK", "0") != "0" or lost_another:
            sleep(3)  # torchrun names the rank that ends first
        print(in_lines(f"error: {problem}"), file=sys.stderr, flush=True)
        # at once: a rank must not wait for others in a collective
        os._exit(getattr(problem, "status", 1))


if __name__ == "__main__":
    main()
