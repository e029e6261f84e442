"""Settings: parsed, checked together, documented, and each with an effect (DEFECTS of the lineage: ignored or misread variables)."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, config, process, t, timeless

# The run commands of #549 and #1084, every variable they name or document, with the values they give.
RECORD_COMMAND = """
    DATA_PATH=./data/datasets/fineweb10B_sp1024 TOKENIZER_PATH=./data/tokenizers/fineweb_1024_bpe.model RUN_ID=x SEED=1337
    VAL_BATCH_SIZE=524288 VAL_LOSS_EVERY=4000 TRAIN_LOG_EVERY=500 ITERATIONS=9000 WARMDOWN_ITERS=3500 WARMUP_STEPS=20
    TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=2048 EVAL_SEQ_LEN=2048 MAX_WALLCLOCK_SECONDS=600 QK_GAIN_INIT=1.5 VOCAB_SIZE=1024
    NUM_LAYERS=11 NUM_KV_HEADS=4 MODEL_DIM=512 NUM_HEADS=8 MLP_MULT=3.0 TIE_EMBEDDINGS=1 ROPE_BASE=10000 ROPE_DIMS=16
    LOGIT_SOFTCAP=30 EMBED_LR=0.6 HEAD_LR=0.008 TIED_EMBED_LR=0.035 TIED_EMBED_INIT_STD=0.005 MATRIX_LR=0.025 SCALAR_LR=0.025
    MUON_MOMENTUM=0.99 MUON_BACKEND_STEPS=5 MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 MUON_WD=0.04 ADAM_WD=0.04
    BETA1=0.9 BETA2=0.95 ADAM_EPS=1e-8 GRAD_CLIP_NORM=0.3 EVAL_STRIDE=64 EMA_ENABLED=1 EMA_DECAY=0.997 SWA_ENABLED=1 SWA_EVERY=50
    LATE_QAT=1 LATE_QAT_THRESHOLD=0.15 BIGRAM_VOCAB_SIZE=1536 BIGRAM_DIM=128 XSA_LAST_N=4 LN_SCALE=1 VE_ENABLED=1 VE_DIM=128
    VE_LAYERS=9,10 TTT_ENABLED=1 TTT_LR=0.002 TTT_EPOCHS=3 TTT_CHUNK_TOKENS=32768 TTT_FREEZE_BLOCKS=0 TTT_MOMENTUM=0.9
    TTT_BATCH_SEQS=32 TTT_GRAD_CLIP=1.0 SLOT_ENABLED=1 SLOT_LR=0.001 SLOT_STEPS=3 CTW_WEIGHT=0"""

# A value for every setting that must change a figure of the tiny run, ...
CHANGES = dict(
    SEED=7,
    TRAIN_BATCH_TOKENS=192,
    TRAIN_SEQ_LEN=16,
    VAL_LOSS_EVERY=2,
    TRAIN_LOG_EVERY=11,
    ITERATIONS=6,
    WARMDOWN_ITERS=2,
    WARMDOWN_FRAC=0.5,
    NUM_LAYERS=4,
    MODEL_DIM=48,
    NUM_HEADS=2,
    NUM_KV_HEADS=1,
    MLP_MULT=2,
    TIE_EMBEDDINGS=0,
    TIED_EMBED_INIT_STD=0.02,
    LOGIT_SOFTCAP=5,
    QK_GAIN_INIT=4,
    ROPE_BASE=100,
    ROPE_DIMS=8,
    ROPE_TRAIN_LEN=8,
    LN_SCALE=0,
    XSA_LAST_N=3,
    BIGRAM_VOCAB_SIZE=0,
    BIGRAM_DIM=4,
    VE_ENABLED=0,
    VE_DIM=4,
    VE_LAYERS="0,1",
    MATRIX_LR=0.1,
    TIED_EMBED_LR=0.1,
    SCALAR_LR=0.1,
    MUON_MOMENTUM=0.5,
    MUON_MOMENTUM_WARMUP_START=0.1,
    MUON_MOMENTUM_WARMUP_STEPS=2,
    MUON_BACKEND_STEPS=1,
    MUON_PROJECTIONS=1,
    MUON_WD=3,
    ADAM_WD=3,
    EMBED_WD=3,
    BETA1=0.1,
    BETA2=0.5,
    ADAM_EPS=0.01,
    GRAD_CLIP_NORM=0.01,
    EMA_ENABLED=0,
    EMA_DECAY=0.1,
    SWA_ENABLED=0,
    SWA_EVERY=2,
    LATE_QAT=0,
    LATE_QAT_THRESHOLD=0.6,
    EVAL_SEQ_LEN=16,
    ARTIFACT_BYTES=t.code_bytes() + 30_000,
    DATA_ORDER="coprime",
    MIN_LR=0.3,
    PARALLEL_LAST_N=1,
    PARALLEL_START_LAYER=1,
    SKIP_GATES_ENABLED=1,
    NEWTON_SCHULZ="polar_express",
    MUON_ROW_NORM=1,
    QUANT="gptq",
    CODER="lzma",
    CALIBRATION_TOKENS=512,
    AVERAGE="swa",
    EVAL_STRIDE=32,
    TTT_ENABLED=0,
    TTT_LR=0.2,
    TTT_EPOCHS=1,
    TTT_CHUNK_TOKENS=64,
    TTT_FREEZE_BLOCKS=2,
    TTT_MOMENTUM=0,
    TTT_BATCH_SEQS=2,
    TTT_GRAD_CLIP=0.01,
    TTT_PARAMS="control",
    TTT_OPTIMIZER="adamw",
    SLOT_ENABLED=0,
    SLOT_LR=0.1,
    SLOT_STEPS=1,
    SLOT_BATCH_SEQS=8,
    SLOT_DELTA="window",
    SLOT_BIAS=1,
    SLOT_LOSS="scored",
    SLOT_LR_MIN=0.0001,
    SLOT_HYPER_LR=0.1,
    VRL_ENABLED=1,
    VALUE_RESIDUAL=1,
    GATED_ATTENTION=1,
    PREQUANT_TTT_ENABLED=1,
    EVALS="roundtrip",
)
# ... and where a change alone is not enough, what else to set in both runs.
LAWA = dict(LAWA_ENABLED=1, LAWA_K=2, LAWA_FREQ=2)
PAST = dict(SLOT_LOSS="past", SLOT_DELTA="window")
MIX = dict(EVALS="roundtrip,sliding_window,ttt,mix")
LORA = dict(
    SLOT_ENABLED=0, TTT_PARAMS="lora", TTT_LORA_CHUNK=32, TTT_OPTIMIZER="adamw", TTT_LR=0.01
)
CTW = dict(SLOT_ENABLED=0, CTW_WEIGHT=0.3, CTW_ENTROPY_THRESHOLD=0)
BESIDE = dict(
    EMBED_LR=(0.05, dict(TIE_EMBEDDINGS=0)),
    HEAD_LR=(0.5, dict(TIE_EMBEDDINGS=0)),
    MAX_WALLCLOCK_SECONDS=(1e-3, {}),
    RECUR_LAYERS=("1,2", dict(RECUR_LAYERS="1", RECUR_START=4)),
    RECUR_START=(8, dict(RECUR_LAYERS="1", RECUR_START=4)),
    RECUR_STYLE=("shared", dict(RECUR_LAYERS="1", RECUR_START=4)),
    RECUR_LOOPS=(3, dict(RECUR_LAYERS="1", RECUR_START=4)),
    CALIBRATION=("validation", dict(QUANT="gptq", ARTIFACT_BYTES=t.code_bytes() + 30_000)),
    PREQUANT_TTT_LR=(0.01, dict(PREQUANT_TTT_ENABLED=1)),
    PREQUANT_TTT_EPOCHS=(2, dict(PREQUANT_TTT_ENABLED=1)),
    PREQUANT_TTT_FREEZE_BLOCKS=(3, dict(PREQUANT_TTT_ENABLED=1)),
    SLOT_DECAY=(0.5, PAST),
    MIX_BLOCK=(16, MIX),
    MIX_SHARE=(0.5, MIX),
    TTT_LORA_RANK=(2, LORA),
    TTT_LORA_ALPHA=(1, LORA),
    TTT_LORA_WD=(10, LORA),
    TTT_LORA_CHUNK=(16, LORA),
    CTW_WEIGHT=(0.1, CTW),
    CTW_ENTROPY_THRESHOLD=(4, CTW),
    LAWA_ENABLED=(0, LAWA),
    LAWA_K=(3, LAWA),
    LAWA_FREQ=(3, LAWA),
)
# Settings that must not change a figure, or are tested for themselves elsewhere.
ELSEWHERE = {
    "PRESET",
    "RUN_ID",
    "DEVICE",
    "DTYPE",
    "COMPILE",
    "ATTENTION",
    "LOAD_ARTIFACT",
    "LOAD_CHECKPOINT",
    "SAVE_NLL",
    "DATA_PATH",
    "TOKENIZER_PATH",
    "VAL_BATCH_SIZE",
    "WARMUP_STEPS",
    "VOCAB_SIZE",
    "CTW_DEPTH",
    "SAVE_EVERY",
    "RESUME",
    "DOCUMENTS",
    "SLOT_RESET",
    "TTT_PHASES",
    "TTT_PHASE_LR",
}


def problems(**env):
    with pytest.raises(t.BadInput) as caught:
        t.load_config(env)
    return str(caught.value).splitlines()


def test_record_command_is_the_default_and_works_verbatim():
    given = dict(word.split("=", 1) for word in RECORD_COMMAND.split())
    by_command, by_default = t.load_config(given), t.load_config({})
    assert [
        s.name
        for s in t.SETTINGS.values()
        if getattr(by_command, s.name.lower()) != getattr(by_default, s.name.lower())
    ] == ["RUN_ID"]


@pytest.fixture(scope="module")
def baselines():
    return {}


def test_every_setting_is_in_one_of_the_tables():
    assert set(CHANGES) | set(BESIDE) | ELSEWHERE == set(t.SETTINGS)


QAT_BASE = dict(LATE_QAT_THRESHOLD="0.8")


@pytest.mark.parametrize("name", [*CHANGES, *BESIDE])
def test_setting_changes_the_figures(name, tiny, baselines):
    value, beside = BESIDE[name] if name in BESIDE else (CHANGES[name], {})
    beside = {
        **(QAT_BASE if name.startswith("LATE_QAT") else {}),
        **{k: str(v) for k, v in beside.items()},
    }
    key = tuple(sorted(beside.items()))
    if key not in baselines:
        baselines[key] = timeless(tiny(**beside))
    assert timeless(tiny(**{**beside, name: str(value)})) != baselines[key]


@pytest.mark.parametrize("name,value", [("VAL_BATCH_SIZE", "64"), ("WARMUP_STEPS", "3")])
def test_setting_that_must_not_change_a_figure(name, value, tiny):
    runs = [timeless(tiny(**{name: v})) for v in (TINY.get(name, "0"), value)]
    flat = [
        [v for row in run.values() for v in row.values() if isinstance(v, float)] for run in runs
    ]
    assert flat[0] == pytest.approx(flat[1], rel=1e-6)


@pytest.mark.parametrize(
    "s",
    [s for s in t.SETTINGS.values() if s.kind in ("int", "ints", "float")],
    ids=lambda s: s.name,
)
def test_numbers_out_of_bounds_or_not_numbers_are_refused_by_name(s):
    low, high = t.shown_bound(s.low), t.shown_bound(s.high)
    not_integers = ["1.5"] if s.kind == "int" else []
    for bad in (str(s.low - 1), str(s.high * 2 + 1), "nan", "abc", "1.5e", *not_integers):
        lines = problems(**{s.name: bad})
        start = f"{s.name}={bad}: allowed: "
        assert any(line.startswith(start) and f"{low} to {high}" in line for line in lines), lines


@pytest.mark.parametrize("name", [s.name for s in t.SETTINGS.values() if s.kind == "bool"])
def test_switches_take_0_1_false_true_and_name_themselves_otherwise(name):
    assert [
        getattr(t.load_config({name: v, "RUN_ID": "x"}), name.lower())
        for v in ("0", "1", "false", "True")
    ] == [False, True, False, True]
    assert problems(**{name: "yes"})[0].startswith(f"{name}=yes: allowed: 0, 1, false, true")


@pytest.mark.parametrize(
    "wrong,near",
    [
        ("TTT_ENABLE", "TTT_ENABLED"),
        ("ITERATION", "ITERATIONS"),
        ("EVAL_STRID", "EVAL_STRIDE"),
        ("SLOT_STEP", "SLOT_STEPS"),
        ("MAX_WALLCLOCK_SECOND", "MAX_WALLCLOCK_SECONDS"),
        ("RECUR_LAYER", "RECUR_LAYERS"),
        ("CTW_ALPHA", "CTW_"),
    ],
)
def test_misspelt_and_missing_settings_are_named_with_the_nearest(wrong, near):
    (line,) = problems(**{wrong: "1"})
    assert line.startswith(f"{wrong}=1: there is no such setting. Nearest name: {near}")


def test_the_environment_of_a_normal_machine_is_not_mistaken_for_settings():
    t.load_config(
        {
            "PATH": "/bin",
            "HOME": "/",
            "MASTER_PORT": "1",
            "LOCAL_RANK": "0",
            "OMP_NUM_THREADS": "1",
            "VIRTUAL_ENV": "x",
            "TORCHELASTIC_RUN_ID": "none",
            "CUDA_VISIBLE_DEVICES": "0",
            "LANG": "C",
            "LOGNAME": "me",
            "DATABASE_URL": "x",
            "NUM_WORKERS": "2",
            "DATA_DIR": "/data",
            "SAVE_DIR": "x",
            "TRAIN_FILE": "x",
            "PARALLEL_SEQ": "3",  # of GNU parallel
        }
    )


def test_all_problems_are_reported_at_once():
    lines = problems(
        ITERATIONS="x", EVAL_STRIDE="0", TTT_ENABLED="maybe", SLOT_STEP="3", XSA_LAST_N="12"
    )
    assert sorted(line.split("=")[0] for line in lines) == [
        "EVAL_STRIDE",
        "ITERATIONS",
        "SLOT_STEP",
        "TTT_ENABLED",
        "XSA_LAST_N",
    ]


@pytest.mark.parametrize(
    "env,name",
    [
        (dict(NUM_HEADS=6), "MODEL_DIM"),
        (dict(NUM_KV_HEADS=3), "NUM_KV_HEADS"),
        (dict(ROPE_DIMS=128), "ROPE_DIMS"),
        (dict(ROPE_DIMS=5), "ROPE_DIMS"),
        (dict(XSA_LAST_N=12), "XSA_LAST_N"),
        (dict(VE_LAYERS="9,11"), "VE_LAYERS"),
        (dict(VE_LAYERS="9,9"), "VE_LAYERS"),
        (dict(VE_LAYERS=""), "VE_LAYERS"),
        (dict(BIGRAM_VOCAB_SIZE=1), "BIGRAM_VOCAB_SIZE"),
        (dict(TRAIN_BATCH_TOKENS=786431), "TRAIN_BATCH_TOKENS"),
        (dict(TRAIN_BATCH_TOKENS=0), "TRAIN_BATCH_TOKENS"),
        (dict(VAL_BATCH_SIZE=2047), "VAL_BATCH_SIZE"),
        (dict(EVAL_STRIDE=2049), "EVAL_STRIDE"),
        (dict(TTT_CHUNK_TOKENS=2047), "TTT_CHUNK_TOKENS"),
        (dict(TTT_FREEZE_BLOCKS=12), "TTT_FREEZE_BLOCKS"),
        (dict(TTT_PARAMS="lora"), "TTT_PARAMS"),
        (dict(TTT_PARAMS="lora", SLOT_ENABLED=0, TTT_LORA_RANK=257), "TTT_LORA_RANK"),
        (dict(TTT_PARAMS="lora", SLOT_ENABLED=0, TTT_LORA_CHUNK=2049), "TTT_LORA_CHUNK"),
        (dict(TTT_PHASES=2), "TTT_PHASES"),
        (dict(TTT_ENABLED=0, EVALS="ttt"), "EVALS"),
        (dict(SLOT_ENABLED=0, EVALS="roundtrip,slot"), "EVALS"),
        (dict(EVALS="rountrip"), "EVALS"),
        (dict(RUN_ID="a/b/c"), "RUN_ID"),
        (dict(RUN_ID="/a"), "RUN_ID"),
        (dict(RUN_ID="a/"), "RUN_ID"),
        (dict(RUN_ID=".."), "RUN_ID"),
        (dict(RUN_ID="../a"), "RUN_ID"),
        (dict(RUN_ID="a/.."), "RUN_ID"),
        (dict(CTW_WEIGHT="0.1"), "CTW_WEIGHT"),
        (dict(CTW_WEIGHT="0.1", EVALS="ttt_slot_ctw"), "EVALS"),
        (dict(EVALS="ctw"), "EVALS"),
        (dict(SLOT_HYPER_LR="0.1", SLOT_ENABLED=0), "SLOT_HYPER_LR"),
        (dict(SLOT_STEPS=0), "SLOT_STEPS"),
        (dict(SLOT_LR_MIN="0.1"), "SLOT_LR_MIN"),
        (dict(SLOT_LOSS="context", EVAL_STRIDE=2048), "SLOT_LOSS"),
        (dict(SLOT_DELTA="batch"), "SLOT_DELTA"),
        (dict(RECUR_LAYERS="4,11"), "RECUR_LAYERS"),
        (dict(RECUR_LAYERS="4,4"), "RECUR_LAYERS"),
        (dict(CALIBRATION="validation"), "CALIBRATION"),
        (dict(CALIBRATION="validation", PRESET="pr1435"), "CALIBRATION"),
        (dict(CALIBRATION="validation", PRESET="demo,best_demo"), "CALIBRATION"),
        (dict(CALIBRATION="validation", PRESET="pr549", QUANT="gptq"), "CALIBRATION"),
        (dict(CALIBRATION="test"), "CALIBRATION"),
        (dict(RECUR_STYLE="shared"), "RECUR_STYLE"),
        (dict(RECUR_STYLE="gated"), "RECUR_STYLE"),
        (dict(RECUR_STYLE="twice", RECUR_LAYERS="4"), "RECUR_STYLE"),
        (dict(RECUR_LOOPS=3), "RECUR_LOOPS"),
        (dict(RECUR_LOOPS=1, RECUR_LAYERS="4"), "RECUR_LOOPS"),
        (dict(PARALLEL_START_LAYER=11), "PARALLEL_START_LAYER"),
        (dict(PARALLEL_START_LAYER=7, PARALLEL_LAST_N=4), "PARALLEL_START_LAYER"),
        (
            dict(PARALLEL_START_LAYER=7, RECUR_STYLE="gated", RECUR_LAYERS="4"),
            "PARALLEL_START_LAYER",
        ),
        (dict(VRL_ENABLED=1, VALUE_RESIDUAL=1), "VRL_ENABLED"),
        (dict(PREQUANT_TTT_FREEZE_BLOCKS=12), "PREQUANT_TTT_FREEZE_BLOCKS"),
        (dict(LOGIT_SOFTCAP=2000), "LOGIT_SOFTCAP"),
        (dict(WARMDOWN_FRAC="0.5", WARMDOWN_ITERS=2000), "WARMDOWN_FRAC"),
        (dict(WARMDOWN_FRAC="0.5", WARMDOWN_ITERS=2000), "WARMDOWN_ITERS"),
        (dict(WARMDOWN_FRAC="1.5"), "WARMDOWN_FRAC"),
        (dict(EMBED_WD="-0.5"), "EMBED_WD"),
        (dict(DOCUMENTS="mask", ATTENTION="fa3"), "DOCUMENTS"),
        (dict(DOCUMENTS="mask", ATTENTION="fa4"), "ATTENTION"),
        (dict(DOCUMENTS="reset"), "DOCUMENTS"),
        (dict(PRESET="record"), "PRESET"),
        (dict(ATTENTION="fa2"), "ATTENTION"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(env, name):
    env = {k: str(v) for k, v in env.items()}
    assert any(
        f"{name}={env.get(name, '')}" in line for line in problems(**env)
    )  # of two that clash, both are named


def test_contradictions_of_slot_and_ctw_are_reported_together():
    lines = problems(
        SLOT_HYPER_LR="0.1", SLOT_ENABLED="0", RECUR_LAYERS="99", SLOT_STEPS="0", EVALS="ctw,slot"
    )
    assert sorted(line.split("=")[0] for line in lines) == [
        "EVALS",
        "EVALS",
        "RECUR_LAYERS",
        "SLOT_HYPER_LR",
        "SLOT_STEPS",
    ]


def test_evals_follow_the_switches():
    evals = {
        (a, b): t.load_config(dict(TTT_ENABLED=a, SLOT_ENABLED=b)).evals[2:]
        for a in "01"
        for b in "01"
    }
    assert evals == {
        ("0", "0"): (),
        ("0", "1"): ("slot",),
        ("1", "0"): ("ttt",),
        ("1", "1"): ("ttt_slot",),
    }
    assert t.load_config(dict(EVALS="none")).evals == ()
    assert [
        t.load_config(dict(SLOT_ENABLED="0", CTW_WEIGHT="0.1", TTT_ENABLED=a)).evals[2:]
        for a in "01"
    ] == [("ctw",), ("ttt_ctw",)]
    assert t.load_config(dict(CTW_WEIGHT="0.1", EVALS="slot,ctw")).evals == ("slot", "ctw")


BLOCKS_1435 = 11 * (2 * 512 * 512 + 2 * 256 * 512 + 2 * 4 * 512 * 512 + 4 * 512 + 8)
TABLES_1435 = 1024 * 512 + 1536 * 112 + 112 * 512 + 1 + 1024 * 128 + 128 * 256 + 1 + 2
# smear gate, skip weights and gates, merge of the lanes
PARAMETERS_1435 = BLOCKS_1435 + TABLES_1435 + 512 + 2 * 5 * 512 + 1
# The table of published systems: preset, parameters in their logs, or counted from their description (None: not known),
# evaluator, conditions it breaks, settings.
SYSTEMS = [
    ("pr549", 26_928_220, "ttt", "", dict(slot_enabled=False)),
    (
        "pr1084",
        26_928_220,
        "ttt_slot",
        "C1,C2,C3",
        dict(
            slot_delta="shared",
            slot_bias=False,
            slot_loss="all",
            slot_steps=3,
            slot_lr=0.001,
            eval_stride=64,
        ),
    ),
    (
        "pr1150",
        26_993_756,
        "ttt_slot",
        "C1,C2,C3",
        dict(slot_loss="all", slot_steps=5, slot_lr=0.003, eval_stride=64),
    ),
    (
        "pr1303",
        26_862_694,
        "slot",
        "C1,C2,C3",
        dict(
            slot_delta="window",
            slot_bias=True,
            slot_loss="scored",
            slot_steps=16,
            slot_lr=0.008,
            slot_lr_min=0.0008,
            eval_stride=64,
        ),
    ),
    (
        "pr1313",
        26_862_694,
        "slot",
        "C1,C2,C3",
        dict(
            slot_delta="window",
            slot_bias=True,
            slot_loss="scored",
            slot_steps=24,
            slot_lr=0.012,
            slot_lr_min=0.001,
            eval_stride=96,
            xsa_last_n=11,
            vrl_enabled=True,
            qk_gain_init=4.0,
            ttt_enabled=False,
        ),
    ),
    (
        "pr1488",
        26_862_694,
        "slot",
        "C1,C2,C3",
        dict(
            qk_gain_init=5.25,
            prequant_ttt_enabled=True,
            prequant_ttt_epochs=10,
            prequant_ttt_lr=0.00045,
            prequant_ttt_freeze_blocks=1,
        ),
    ),
    (
        "pr1278",
        26_862_694 + 2 * 2 * 512,  # #1313's, an embedding and a gate for each of two repeats
        "slot",
        "C1,C2,C3",
        dict(
            slot_steps=32,
            slot_lr=0.015,
            slot_lr_min=0.001,
            eval_stride=64,
            recur_layers=(4, 5),
            recur_style="gated",
            recur_loops=2,
            recur_start=3000,
        ),
    ),
    ("pr1321", 26_862_694, "slot", "C1,C2,C3", dict(slot_steps=48, slot_lr=0.012)),
    ("pr1324", 26_862_694, "slot", "C1,C2,C3", dict(slot_steps=48, slot_lr=0.012)),
    (
        "pr1435",
        PARAMETERS_1435,
        "",
        "",
        dict(
            mlp_mult=4.0,
            bigram_dim=112,
            qk_gain_init=5.0,
            recur_layers=(4, 5),
            recur_style="shared",
            parallel_start_layer=7,
            skip_gates_enabled=True,
            rope_train_len=2048,
            matrix_lr=0.02,
            muon_projections=True,
            tied_embed_lr=0.03,
            scalar_lr=0.02,
            muon_wd=0.09,
            ema_decay=0.9965,
            quant="gptq",
            calibration="train",
        ),
    ),
    (
        "pr1042",
        PARAMETERS_1435,
        "",
        "",
        dict(matrix_lr=0.028, tied_embed_lr=0.042, scalar_lr=0.028, qk_gain_init=6.0),
    ),
    (
        "pr1498",
        PARAMETERS_1435,
        "slot",
        "C1,C2,C3",
        dict(
            recur_layers=(3, 4, 5),
            parallel_start_layer=7,
            qk_gain_init=5.5,
            ema_decay=0.9965,
            prequant_ttt_epochs=11,
            prequant_ttt_freeze_blocks=0,
            calibration="validation",
            slot_steps=24,
            slot_lr=0.012,
            slot_lr_min=0.001,
            slot_bias=True,
            eval_stride=96,
        ),
    ),
    ("slot28", None, "slot", "C1,C2,C3", dict(slot_steps=28, slot_lr=0.012)),
    ("slot32", None, "slot", "C1,C2,C3", dict(slot_steps=32, slot_lr=0.015)),
    ("slot48", None, "slot", "C1,C2,C3", dict(slot_steps=48, slot_lr=0.012)),
    ("hypergradient", None, "slot", "C1,C2,C3", dict(slot_steps=24, slot_hyper_lr=1e-5)),
]


@pytest.mark.parametrize(
    "preset,parameters,label,breaks,values", SYSTEMS, ids=[row[0] for row in SYSTEMS]
)
def test_a_preset_is_the_published_system(preset, parameters, label, breaks, values):
    c = t.load_config(dict(PRESET=preset))
    assert {name: getattr(c, name) for name in values} == values
    assert c.evals == ("roundtrip", "sliding_window", *filter(None, [label]))
    assert t.broken_conditions(c, label or "sliding_window") == breaks
    adapted = preset in ("pr1488", "pr1498")  # to the validation text, before quantising
    assert t.broken_conditions(c, "sliding_window") == ("C3" if adapted else "")
    assert t.claims_causal(preset) == (not breaks)
    if parameters:
        with t.torch.device("meta"):
            assert sum(p.numel() for p in t.GPT(c).parameters()) == parameters
    assert {row[0] for row in SYSTEMS} | {"demo", "best", "best_demo"} == set(t.PRESETS)


def test_preset_sets_defaults_and_explicit_variables_win():
    c = t.load_config(dict(PRESET="demo", MODEL_DIM="96"))
    assert (c.num_layers, c.model_dim, c.seed) == (4, 96, 1337)


def test_of_the_two_lengths_of_the_warmdown_the_later_one_is_meant(monkeypatch):
    """A variable is later than a preset, and a preset than the one before it."""
    monkeypatch.setitem(t.PRESETS, "pr549", dict(WARMDOWN_FRAC=0.6))
    for env, expected in (
        (dict(PRESET="pr549"), (3500, 0.6)),
        (dict(PRESET="pr549", WARMDOWN_ITERS="500"), (500, 0)),
        (dict(PRESET="pr549", WARMDOWN_FRAC="0.2"), (3500, 0.2)),
        (dict(PRESET="pr549", WARMDOWN_FRAC="0"), (3500, 0)),
        (dict(PRESET="demo", WARMDOWN_FRAC="0.2"), (160, 0.2)),
        (dict(PRESET="demo,pr549"), (160, 0.6)),
        (dict(PRESET="pr549,demo"), (160, 0)),
        (dict(PRESET="pr549,demo", WARMDOWN_ITERS="7"), (7, 0)),
        (dict(WARMDOWN_FRAC="0", WARMDOWN_ITERS="7"), (7, 0)),
    ):
        c = t.load_config(env)
        assert (c.warmdown_iters, c.warmdown_frac) == expected, env


def test_help_lists_every_setting_without_importing_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py"), "--help"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for s in t.SETTINGS.values():
        assert f"  {s.name}={t.shown(s.default)} (" in done.stdout and s.text in done.stdout
        assert s.text.endswith(".") and len(s.text) > 10


def test_import_has_no_side_effects(tmp_path):
    code = "import train_gpt, torch.distributed as d; assert not d.is_initialized()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "NUM_LAYERS": "oops"},
    )
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (0, "", []), done.stderr


def test_demo_and_record_differ_only_where_the_demo_says_so():
    demo, record = t.load_config(dict(PRESET="demo")), t.load_config({})
    changed = {
        s.name
        for s in t.SETTINGS.values()
        if getattr(demo, s.name.lower()) != getattr(record, s.name.lower())
    } - {"PRESET"}
    assert changed == set(t.PRESETS["demo"])


def test_gpu_and_flash_attention_are_refused_by_name_where_they_are_not():
    if t.torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(t.BadInput, match="DEVICE=cuda"):
        t.Run(config(DEVICE="cuda"))
    with pytest.raises(t.BadInput, match="ATTENTION=fa3.*allowed here: auto or sdpa"):
        t.choose_attention("fa3", t.Ranks(config(DEVICE="cpu")))


def test_bad_setting_ends_the_process_with_one_message_and_status_2(tmp_path):
    done = process({"EVAL_STRIDE": "0"}, tmp_path)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: EVAL_STRIDE=0: allowed: integer, 1 to ")
        and "Traceback" not in done.stderr
    )
    assert not list(tmp_path.iterdir())
