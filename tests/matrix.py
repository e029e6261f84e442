"""A matrix of small runs whose figures must not change when the script is only rewritten.

    python tests/matrix.py --compare    run all cases and list every figure that differs from tests/matrix.json (exit status 1)
    python tests/matrix.py --record     write tests/matrix.json anew: only with a commit that says which figures change, and why

Every preset shrunk, each SLOT mode, CTW, TTT, also with low-rank factors, the quantisers, late QAT, averages, recurrence, two ranks and a run that goes on
after it was cut off. The data are made from a seeded generator, so they are the same on every machine. ARTIFACT_BYTES grows
with the code, so that a longer script leaves the weights as many bytes as before.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import sentencepiece

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).with_name("matrix.json")
TIMES = {"train_time", "eval_time", "step_avg", "seconds", "code_bytes", "total_bytes"}

# Sizes at which a run takes about a second; a preset keeps what is not named here.
SMALL = dict(
    NUM_LAYERS="3",
    MODEL_DIM="32",
    NUM_HEADS="4",
    NUM_KV_HEADS="2",
    VE_LAYERS="1,2",
    VE_DIM="8",
    XSA_LAST_N="2",
    BIGRAM_VOCAB_SIZE="64",
    BIGRAM_DIM="8",
    ROPE_DIMS="4",
    TRAIN_SEQ_LEN="32",
    EVAL_SEQ_LEN="32",
    EVAL_STRIDE="8",
    TRAIN_BATCH_TOKENS="384",
    VAL_BATCH_SIZE="256",
    ITERATIONS="12",
    WARMDOWN_ITERS="12",
    MAX_WALLCLOCK_SECONDS="0",
    VAL_LOSS_EVERY="6",
    CALIBRATION_TOKENS="128",
    TTT_CHUNK_TOKENS="128",
    SLOT_BATCH_SEQS="4",
    MUON_MOMENTUM_WARMUP_STEPS="4",
    SWA_EVERY="2",
    DEVICE="cpu",
)
# Settings of presets that a model of three layers cannot have.
SHRUNK = {
    "best_demo": dict(TTT_LORA_CHUNK="16"),
    "best": dict(RECUR_LAYERS="1,2", RECUR_START="6", PARALLEL_START_LAYER="2"),
    "pr1488": dict(PREQUANT_TTT_EPOCHS="2"),
    "pr1278": dict(RECUR_LAYERS="1,2", RECUR_START="6"),
    "pr1435": dict(RECUR_LAYERS="1,2", RECUR_START="6", PARALLEL_START_LAYER="2"),
    "pr1042": dict(RECUR_LAYERS="1,2", RECUR_START="6", PARALLEL_START_LAYER="2"),
    "pr1498": dict(
        RECUR_LAYERS="1,2", RECUR_START="6", PARALLEL_START_LAYER="2", PREQUANT_TTT_EPOCHS="2"
    ),
}
PRESETS = [
    "pr1084",
    "pr549",
    "pr1150",
    "pr1303",
    "pr1313",
    "pr1488",
    "pr1278",
    "pr1321",
    "pr1324",
    "pr1435",
    "pr1042",
    "pr1498",
    "slot28",
    "slot32",
    "slot48",
    "hypergradient",
    "best",
    "best_demo",
    "demo",
]
BUDGET, BUDGET_LITE = (
    19_000,
    26_000,
)  # bytes of an artifact that these models fill: of int8 embeddings, a fifth cannot shrink

# What each case changes. "load" is an artifact that an earlier case left, "budget" its bytes for weights, "ranks" and
# "cut" (the training step at which the run is cut off, and then resumed) how it is run.
CASES = {
    "default": {},
    "two_shards": dict(shards=2, EVALS="none"),
    "coprime": dict(DATA_ORDER="coprime", MIN_LR="0.1", EVALS="none", ITERATIONS="30"),
    "untied": dict(TIE_EMBEDDINGS="0", EMBED_LR="0.05", HEAD_LR="0.5", EVALS="sliding_window"),
    "residual": dict(
        VALUE_RESIDUAL="1", GATED_ATTENTION="1", PARALLEL_LAST_N="1", EVALS="sliding_window"
    ),
    "plain_parts": dict(
        VE_ENABLED="0",
        BIGRAM_VOCAB_SIZE="0",
        LN_SCALE="0",
        XSA_LAST_N="0",
        ROPE_DIMS="0",
        EVALS="roundtrip",
    ),
    "muon": dict(MUON_ROW_NORM="1", NEWTON_SCHULZ="polar_express", EVALS="none"),
    "recurrence": dict(RECUR_LAYERS="1,2", RECUR_START="4", VRL_ENABLED="1", EVALS="roundtrip,ttt"),
    "recurrence_shared": dict(
        RECUR_LAYERS="1,2",
        RECUR_STYLE="shared",
        RECUR_START="4",
        SKIP_GATES_ENABLED="1",
        PARALLEL_START_LAYER="2",
        EVALS="roundtrip,ttt",
    ),
    "recurrence_gated": dict(
        RECUR_LAYERS="1,2",
        RECUR_STYLE="gated",
        RECUR_LOOPS="3",
        RECUR_START="4",
        VRL_ENABLED="1",
        EVALS="roundtrip,ttt",
    ),
    "qat_rd": dict(LATE_QAT_THRESHOLD="0.8", EVALS="roundtrip"),
    "qat_budget": dict(LATE_QAT_THRESHOLD="0.8", budget=BUDGET, EVALS="roundtrip"),
    "qat_lite": dict(
        LATE_QAT_THRESHOLD="0.8", QUANT="gptq_lite", budget=BUDGET_LITE, EVALS="roundtrip"
    ),
    "no_qat": dict(LATE_QAT="0", EVALS="roundtrip"),
    "gptq": dict(QUANT="gptq", budget=BUDGET, EVALS="roundtrip"),
    "gptq_lzma": dict(QUANT="gptq", CODER="lzma", budget=BUDGET, EVALS="roundtrip"),
    "rd_budget": dict(budget=BUDGET, EVALS="roundtrip"),
    "rd_lzma": dict(CODER="lzma", budget=BUDGET, EVALS="roundtrip"),
    "lite_lzma": dict(QUANT="gptq_lite", CODER="lzma", budget=BUDGET_LITE, EVALS="roundtrip"),
    "lawa": dict(LAWA_ENABLED="1", LAWA_K="3", LAWA_FREQ="2", EVALS="none"),
    "average_ema": dict(AVERAGE="ema", EVALS="none"),
    "average_none": dict(AVERAGE="none", EVALS="none"),
    "average_lawa": dict(AVERAGE="lawa", LAWA_ENABLED="1", LAWA_K="2", LAWA_FREQ="3", EVALS="none"),
    "freeze": dict(load="default", TTT_FREEZE_BLOCKS="2", TTT_BATCH_SEQS="2", EVALS="ttt"),
    "batch": dict(load="default", VAL_BATCH_SIZE="96", EVAL_STRIDE="5", EVALS="sliding_window,ttt"),
    "lora": dict(
        load="default",
        SLOT_ENABLED="0",
        TTT_PARAMS="lora",
        TTT_LORA_CHUNK="16",
        TTT_OPTIMIZER="adamw",
        TTT_LR="0.01",
        EVALS="ttt",
    ),
    "ctw": dict(
        load="default",
        SLOT_ENABLED="0",
        CTW_WEIGHT="0.3",
        CTW_ENTROPY_THRESHOLD="1",
        EVALS="ctw,ttt_ctw",
    ),
    "hyper": dict(
        load="default",
        SLOT_HYPER_LR="0.1",
        SLOT_LR_MIN="0.0002",
        SLOT_STEPS="6",
        EVALS="slot,ttt_slot",
    ),
    "control": dict(load="default", TTT_PARAMS="control", TTT_OPTIMIZER="adamw", EVALS="ttt"),
    "mix": dict(
        load="default",
        SLOT_LOSS="past",
        SLOT_DELTA="window",
        SLOT_RESET="document",
        SLOT_DECAY="0.1",
        EVALS="roundtrip,slot,ttt,mix",
    ),
    "ranks": dict(ranks=2, EVALS="roundtrip,sliding_window,ttt_slot"),
    "cut": dict(cut=8, SAVE_EVERY="3", LATE_QAT_THRESHOLD="0.6"),
    **{f"preset_{name}": dict(PRESET=name, **SHRUNK.get(name, {})) for name in PRESETS},
    **{
        f"slot_{delta}_{loss}_{bias}": dict(
            load="default", SLOT_DELTA=delta, SLOT_LOSS=loss, SLOT_BIAS=bias, EVALS="slot,ttt_slot"
        )
        for delta in ("shared", "window")
        for loss in ("all", "scored", "context", "past", "recent")
        for bias in "01"
    },
}


def make_data(folder):
    """Write a tokenizer and shards there; {number of training shards: settings}."""
    rng = np.random.default_rng(1)
    syllables = [
        "".join(rng.choice(list("bcdfglmnprstv")) + rng.choice(list("aeiou")) for _ in range(2))
        for _ in range(60)
    ]
    words = ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(400)]
    shares = 1 / np.arange(1, 401)

    def text(n):
        picked = rng.choice(len(words), n, p=shares / shares.sum())
        return " ".join(words[k] + ("." if k % 7 == 0 else "") for k in picked)

    parts = {name: text(n) for name, n in (("train_0", 3000), ("train_1", 2000), ("val", 800))}
    (folder / "text").write_text(parts["train_0"])
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tiny"),
        vocab_size=384,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        normalization_rule_name="identity",
        max_sentence_length=10**6,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tiny.model"))
    for shards in (1, 2):
        (folder / f"data{shards}").mkdir()
        for name, text in parts.items():
            split, number = name.split("_") if "_" in name else (name, "0")
            if int(number) < shards:
                ids = [1, *model.encode(text)][: 601 if split == "val" else None]
                header = np.zeros(256, "<i4")
                header[:3] = 20240520, 1, len(ids)
                path = folder / f"data{shards}" / f"fineweb_{split}_00000{number}.bin"
                path.write_bytes(header.tobytes() + np.asarray(ids, "<u2").tobytes())
    return {
        n: dict(
            DATA_PATH=str(folder / f"data{n}"),
            TOKENIZER_PATH=str(folder / "tiny.model"),
            VOCAB_SIZE="384",
        )
        for n in (1, 2)
    }


def settings_of(name, data, code_bytes):
    """Environment of a case."""
    case = CASES[name]
    env = {**SMALL, **data[case.get("shards", 1)], "RUN_ID": name}
    env |= {key: value for key, value in case.items() if key.isupper()}
    if "budget" in case:
        env["ARTIFACT_BYTES"] = str(code_bytes + case["budget"])
    if "load" in case:
        env["LOAD_ARTIFACT"] = f"logs/{case['load']}/final_model.ptz"
    return env


def figures(folder):
    """{label: figures} of a run, without settings and times."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        label = row.pop("label")
        if label not in ("settings", "artifact_file"):  # its digest: other figures say more
            found.setdefault(label, {}).update(
                {key: value for key, value in row.items() if key not in TIMES}
            )
    return {label: row for label, row in found.items() if row}


def run_cut(script, env, step):
    """A run that fails in this training step, and then goes on."""
    train_step, count = script.train_step, iter(range(1, 10**6))

    def spoilt(*args, **more):
        if next(count) == step:
            raise script.Fault("cut off on purpose")
        return train_step(*args, **more)

    script.train_step = spoilt
    try:
        script.run_all(script.load_config(env))
    except script.Fault:
        pass
    finally:
        script.train_step = train_step
    script.run_all(script.load_config({**env, "RESUME": "1"}))


def run_ranks(script, env, ranks):
    """A run under torchrun."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        script.__file__,
    ]
    clean = {key: value for key, value in os.environ.items() if key not in script.SETTINGS}
    subprocess.run(
        command, env={**clean, **env, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True
    )


def run_matrix(script, folder, names=tuple(CASES)):
    """{case: figures} of all cases, in one process but for those on several ranks, in a folder that becomes the current one."""
    data, found = make_data(folder), {}
    os.chdir(folder)
    threads = script.torch.get_num_threads()
    script.torch.set_num_threads(1)
    code_bytes = script.code_bytes()
    for name in names:
        env, case = settings_of(name, data, code_bytes), CASES[name]
        if "cut" in case:
            run_cut(script, env, case["cut"])
        elif "ranks" in case:
            run_ranks(script, env, case["ranks"])
        else:
            script.run_all(script.load_config(env))
        found[name] = figures(folder / "logs" / name)
    script.torch.set_num_threads(threads)
    return found


def differences(found, expected, tolerance=0.0):
    """A line for every figure that is not as recorded, within a relative tolerance."""
    lines = []
    for case in sorted(found.keys() | expected):
        ours, theirs = found.get(case, {}), expected.get(case, {})
        for label in dict.fromkeys([*ours, *theirs]):
            a, b = ours.get(label, {}), theirs.get(label, {})
            for key in dict.fromkeys([*a, *b]):
                x, y = a.get(key), b.get(key)
                close = (
                    isinstance(x, float)
                    and isinstance(y, float)
                    and abs(x - y) <= tolerance * max(1.0, abs(y))
                )
                if x != y and not close:
                    lines.append(f"{case} {label} {key}: {x}, recorded {y}")
    return lines


def load(path):
    """A version of the script as the module train_gpt."""
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    sys.modules["train_gpt"] = script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def main():
    """Record, or compare; the exit status says whether all is equal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="write tests/matrix.json")
    parser.add_argument(
        "--compare", action="store_true", help="list what differs from tests/matrix.json"
    )
    parser.add_argument(
        "--script", type=Path, default=ROOT / "train_gpt.py", help="another version of the script"
    )
    parser.add_argument("cases", nargs="*", help="only these")
    args = parser.parse_args()
    script = load(args.script)

    stdout = sys.stdout
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as sys.stdout:
        found = run_matrix(script, Path(folder), tuple(args.cases) or tuple(CASES))
    sys.stdout = stdout
    if args.record:
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
        print(f"wrote {RECORD}: {len(found)} cases")
        return 0
    expected = json.loads(RECORD.read_text())
    lines = differences(found, {name: expected[name] for name in found})
    print("\n".join([*lines, f"{len(found)} cases, {len(lines)} figures differ"]))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
