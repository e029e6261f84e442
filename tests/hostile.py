"""Runs of a tiny model with random allowed settings, each checked for what could mislead its user.

    PYTHONPATH=. python tests/hostile.py --runs 200 --seed 1 | tee logs/hostile/settings.txt
    PYTHONPATH=. python tests/hostile.py --continuations | tee logs/hostile/continuations.txt

Each run may be refused or end in a fault, in words. Else its figures must be finite, its artifact within its bytes and as
good as the trained model or a warning, each evaluator's label what an audit of the artifact finds. Then it is cut off and
resumed, continued from its last checkpoint, and resumed once more after damage to one of its files.

--continuations: 40 steps, LOAD_CHECKPOINT, and on to 200, beside 200 steps from scratch.

Exit status 1 if something was not as it must be.
"""

import argparse
import collections
import contextlib
import io
import itertools
import math
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import make_tiny_data, read_metrics, t, timeless, tiny_settings

from tools import audit

CODE = t.code_bytes()
# What a setting may become in a random run: what is allowed and a small run can bear.
VALUES = dict(
    SEED=(1, 7),
    DTYPE=("bf16",),
    PRESET=tuple(t.PRESETS),
    TRAIN_BATCH_TOKENS=(96, 192),
    VAL_BATCH_SIZE=(32, 64, 1024),
    VAL_LOSS_EVERY=(0, 5),
    TRAIN_LOG_EVERY=(1, 7),
    DATA_ORDER=("coprime", "shards"),
    DOCUMENTS=("mask",),
    ITERATIONS=(1, 2, 7, 25),
    MAX_WALLCLOCK_SECONDS=(0.001, 0.5, 60),
    WARMDOWN_ITERS=(0, 3, 20, 1000),
    WARMDOWN_FRAC=(0, 0.3, 1),
    MIN_LR=(0.05, 0.3, 1),
    TRAIN_SEQ_LEN=(16, 96),
    NUM_LAYERS=(2, 4),
    MODEL_DIM=(16, 48),
    NUM_HEADS=(2, 8),
    NUM_KV_HEADS=(1, 4),
    MLP_MULT=(0.5, 2),
    TIE_EMBEDDINGS=(0,),
    LOGIT_SOFTCAP=(5, 1000),
    ROPE_BASE=(100,),
    ROPE_DIMS=(0, 2, 8),
    ROPE_TRAIN_LEN=(8,),
    LN_SCALE=(0,),
    XSA_LAST_N=(0, 2, 3),
    PARALLEL_LAST_N=(1, 3),
    PARALLEL_START_LAYER=(1, 2),
    SKIP_GATES_ENABLED=(1,),
    VRL_ENABLED=(1,),
    VALUE_RESIDUAL=(1,),
    GATED_ATTENTION=(1,),
    RECUR_LAYERS=("0", "1", "1,2", "0,2"),
    RECUR_STYLE=("shared", "gated"),
    RECUR_LOOPS=(3,),
    RECUR_START=(0, 4),
    PREQUANT_TTT_ENABLED=(1,),
    PREQUANT_TTT_LR=(0.01,),
    PREQUANT_TTT_EPOCHS=(2,),
    PREQUANT_TTT_FREEZE_BLOCKS=(0, 2),
    BIGRAM_VOCAB_SIZE=(0, 2, 1000),
    BIGRAM_DIM=(4,),
    VE_ENABLED=(0,),
    VE_DIM=(4,),
    VE_LAYERS=("0", "0,1,2"),
    TIED_EMBED_INIT_STD=(0, 0.05),
    QK_GAIN_INIT=(0.5, 5),
    MATRIX_LR=(0, 0.01, 0.05),
    TIED_EMBED_LR=(0, 0.01),
    EMBED_LR=(0.05,),
    HEAD_LR=(0.02,),
    SCALAR_LR=(0, 0.05),
    MUON_MOMENTUM=(0, 0.9),
    MUON_MOMENTUM_WARMUP_START=(0.5,),
    MUON_MOMENTUM_WARMUP_STEPS=(0, 100),
    MUON_BACKEND_STEPS=(1, 10),
    NEWTON_SCHULZ=("polar_express",),
    MUON_ROW_NORM=(1,),
    MUON_PROJECTIONS=(1,),
    MUON_WD=(0, 0.5),
    ADAM_WD=(0, 0.5),
    EMBED_WD=(-1, 0, 0.5),
    BETA1=(0, 0.8),
    BETA2=(0.9,),
    ADAM_EPS=(1e-5,),
    GRAD_CLIP_NORM=(0, 0.01),
    EMA_ENABLED=(0,),
    EMA_DECAY=(0, 0.9),
    SWA_ENABLED=(0,),
    SWA_EVERY=(2, 50),
    LAWA_ENABLED=(1,),
    LAWA_K=(1, 3),
    LAWA_FREQ=(1, 4),
    AVERAGE=("ema", "swa", "lawa", "none"),
    LATE_QAT=(0,),
    LATE_QAT_THRESHOLD=(0, 0.5, 0.9, 1),
    QUANT=("gptq", "gptq_lite"),
    CODER=("lzma",),
    CALIBRATION=("validation",),
    CALIBRATION_TOKENS=(1, 512),
    ARTIFACT_BYTES=(1000, CODE + 9_000, CODE + 14_000, CODE + 30_000),
    EVAL_SEQ_LEN=(16, 64),
    EVAL_STRIDE=(1, 5, 32),
    TTT_ENABLED=(0,),
    TTT_LR=(0, 0.2),
    TTT_EPOCHS=(0, 1),
    TTT_CHUNK_TOKENS=(32, 100, 10_000),
    TTT_FREEZE_BLOCKS=(1, 3),
    TTT_MOMENTUM=(0,),
    TTT_BATCH_SEQS=(1, 3),
    TTT_GRAD_CLIP=(0, 0.01),
    TTT_PARAMS=("control", "lora"),
    TTT_OPTIMIZER=("adamw", "rmsprop"),
    TTT_LORA_RANK=(1, 16),
    TTT_LORA_ALPHA=(0, 1),
    TTT_LORA_WD=(0, 10),
    TTT_LORA_CHUNK=(8, 32),
    TTT_PHASES=(2,),
    TTT_PHASE_LR=(0, 0.1),
    SLOT_ENABLED=(0,),
    SLOT_DELTA=("window",),
    SLOT_BIAS=(1,),
    SLOT_LOSS=("scored", "context", "past", "recent"),
    SLOT_STEPS=(1, 7),
    SLOT_LR=(1e-6, 0.1),
    SLOT_LR_MIN=(0, 0.0001),
    SLOT_HYPER_LR=(1e-5, 0.1),
    SLOT_DECAY=(0.1, 0.999999),
    SLOT_RESET=("document",),
    SLOT_BATCH_SEQS=(1, 3, 100),
    MIX_BLOCK=(1, 10_000),
    MIX_SHARE=(0, 1),
    CTW_WEIGHT=(0.1, 1),
    CTW_DEPTH=(0, 1, 8),
    CTW_ENTROPY_THRESHOLD=(0,),
    EVALS=(
        "none",
        "roundtrip",
        "sliding_window",
        "slot",
        "ttt",
        "ctw",
        "ttt_ctw,ctw",
        "sliding_window,slot,ttt_slot",
        "roundtrip,sliding_window,ttt,mix",
    ),
    SAVE_NLL=(1,),
    SAVE_EVERY=(0, 1),
)
# What every tiny run needs, or other tests vary.
FIXED = {
    "RUN_ID",
    "DEVICE",
    "COMPILE",
    "ATTENTION",
    "LOAD_ARTIFACT",
    "LOAD_CHECKPOINT",
    "RESUME",
    "DATA_PATH",
    "TOKENIZER_PATH",
    "WARMUP_STEPS",
    "VOCAB_SIZE",
}
DAMAGE = 0.1  # nats that an artifact may lose without a word
WORSE = 0.1  # nats that a continued run may lose: at full rates a tiny one wanders


class Wrong(AssertionError):
    """What a user would have been misled by."""


def hold(condition, words):
    """Raises Wrong."""
    if not condition:
        raise Wrong(words)


def combination(rng):
    """Settings by name: one to eight changes of TINY."""
    names = rng.sample(sorted(VALUES), rng.randint(1, 8))
    return {name: str(rng.choice(VALUES[name])) for name in names}


class Hostile:
    """Tiny runs in an empty folder."""

    def __init__(self, folder, targets=600):
        self.folder = folder
        data = folder / "data"
        data.mkdir()
        self.base = {**make_tiny_data(data, targets), "SAVE_EVERY": "3"}
        self.count = 0

    def run(self, name, changes):
        """Figures by label of a run. Raises what it raises."""
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(io.StringIO()):
            t.run_all(t.load_config(tiny_settings(self.base, changes, {"RUN_ID": name})))
        return read_metrics(self.folder / "logs" / name)

    def path(self, name):
        """Folder of a run."""
        return self.folder / "logs" / name

    def log(self, name):
        """What a run said."""
        text = Path(f"{self.path(name)}.txt").read_text(errors="replace")
        return text[text.rfind("=" * 100) :]

    def check(self, changes, rng, parts):
        """How a run with these changes ended, in a word or two. Raises Wrong, or what was not to be raised."""
        self.count += 1
        name = f"r{self.count}"
        try:
            found = self.run(name, changes)
        except t.BadInput as problem:
            for line in str(problem).splitlines():
                hold(re.match(r"[A-Z_0-9]+=", line) or line.startswith(" "), f"unclear: {line}")
            return f"refused: {str(problem).partition('=')[0]}"
        except t.Fault as problem:
            hold("loss or gradient is not finite" in str(problem), f"fault: {problem}")
            return "fault: loss is not finite"
        self.check_figures(name, found)
        for part in parts:
            getattr(self, f"check_{part}")(name, changes, found, rng)
        told = re.findall(
            r"^warning: (the artifact's val_loss|val_loss .* guessing)", self.log(name), re.M
        )
        return "done, with a warning" if told else "done"

    def check_figures(self, name, found):
        """Finite, within the bytes, and no loss that is not said."""
        for label, row in found.items():
            for key, value in row.items():
                hold(
                    not isinstance(value, float) or math.isfinite(value), f"{label} {key}: {value}"
                )
        cap = found["settings"]["ARTIFACT_BYTES"]
        hold(found["artifact"]["total_bytes"] <= cap, f"{found['artifact']} over {cap}")
        size = (self.path(name) / "final_model.ptz").stat().st_size
        hold(found["artifact"]["model_bytes"] == size, f"{found['artifact']}, the file has {size}")
        artifact = found.get("final_artifact_roundtrip")
        if artifact:
            lost = artifact["val_loss"] - found["final_float_roundtrip"]["val_loss"]
            told = "\nwarning: the artifact's val_loss" in self.log(name)
            hold(told == (lost > DAMAGE), f"the artifact lost {lost:.3f} nats, told: {told}")

    def check_labels(self, name, changes, found, rng):
        """What says causal is: no score moves with a later token, nothing is fitted to a target before it is scored."""
        artifact = self.path(name) / "final_model.ptz"
        mine = {
            k: v
            for k, v in tiny_settings(self.base, changes).items()
            if k not in (*t.MODEL_SETTINGS, "TRAIN_BATCH_TOKENS")
        }
        mine |= {"PRESET": changes["PRESET"]} if "PRESET" in changes else {}
        with contextlib.redirect_stdout(io.StringIO()):
            run, c, model, val = audit.load(artifact, mine)
            n = min(val.n, max(128, 2 * c.eval_seq_len) // c.eval_seq_len * c.eval_seq_len)
            c = audit.shrink(c, n)
            for label in c.evals:
                row = found[f"final_artifact_{label}"]
                report = audit.audit(
                    run, model, val.tokens[: n + 1], label, c, 4, 0, rng.randrange(99)
                )
                if row["causal"]:
                    hold(not report["broken"], f"{label} says causal: {report}")

    def check_resume(self, name, changes, found, rng):
        """A run that fails in a random step or batch, and goes on, ends with the same figures."""
        place = rng.choice(("train_step", "score_batch"))
        real, left = getattr(t, place), [rng.randrange(1, 30)]

        def failing(*args, **more):
            left[0] -= 1
            if not left[0]:
                raise t.Fault("cut off on purpose")
            return real(*args, **more)

        setattr(t, place, failing)
        with contextlib.suppress(t.Fault):
            self.run(f"{name}_cut", changes)
        setattr(t, place, real)
        again = self.run(f"{name}_cut", {**changes, "RESUME": "1"})
        if "MAX_WALLCLOCK_SECONDS" not in changes:  # or the time decides
            hold(
                timeless(again) == timeless(found),
                f"resumed after {place}: {difference(again, found)}",
            )

    def check_continuation(self, name, changes, found, rng):
        """LOAD_CHECKPOINT with three times the steps, and other settings: no worse than the start."""
        last = max(self.path(name).glob("checkpoint.*.ckpt"))
        steps = found["training"]["steps"]
        more = {
            "LOAD_CHECKPOINT": str(last),
            "ITERATIONS": str(3 * steps + 6),
            "MAX_WALLCLOCK_SECONDS": "0",
        }
        others = dict(
            QUANT=("rd", "gptq", "gptq_lite"), LATE_QAT="01", LAWA_ENABLED="01", EMA_ENABLED="01"
        )
        others |= dict(
            SWA_ENABLED="01", ARTIFACT_BYTES=("16000000", str(CODE + 30_000)), VALUE_RESIDUAL="01"
        )
        for key in rng.sample(sorted(others), 3):
            more[key] = rng.choice(others[key])
        try:
            longer = self.run(f"{name}_more", {**changes, **more})
        except t.BadInput as problem:  # AVERAGE=swa with SWA_ENABLED=0
            hold("AVERAGE=" in str(problem) or "VRL_ENABLED=" in str(problem), str(problem))
            return
        label = "final_float_roundtrip"
        before, after = (figures[label]["val_loss"] for figures in (found, longer))
        hold(after < before + WORSE, f"continued with {more}: {before:.4f} became {after:.4f}")
        self.check_figures(f"{name}_more", longer)

    def check_damage(self, name, changes, found, rng):
        """A file lost, cut off or overwritten: the run says so, or ends with the same scores."""
        paths = [
            p for p in [*self.path(name).iterdir(), Path(f"{self.path(name)}.txt")] if p.is_file()
        ]
        path = rng.choice(sorted(paths))
        data = path.read_bytes()
        kind = rng.choice(("lost", "empty", "cut", "garbage", "longer"))
        if kind == "lost":
            path.unlink()
        else:
            cut = rng.randrange(len(data) + 1)
            garbage = data[:cut] + rng.randbytes(20) + data[cut + 20 :]
            path.write_bytes(
                dict(empty=b"", cut=data[:cut], garbage=garbage, longer=data + rng.randbytes(9))[
                    kind
                ]
            )
        what = f"{path.name} {kind}"
        try:
            again = self.run(name, {**changes, "RESUME": "1"})
        except (t.BadInput, t.Fault) as problem:
            hold(name in str(problem), f"{what}: {problem}")
            return
        if "MAX_WALLCLOCK_SECONDS" in changes:
            return
        for label in found:
            if label.startswith("final_"):
                hold(
                    timeless(again)[label] == timeless(found)[label],
                    f"{what}: {label} {again[label]}",
                )


def difference(one, other):
    """The first labels whose figures are not the same."""
    one, other = timeless(one), timeless(other)
    return [
        f"{n}: {one.get(n)} {other.get(n)}" for n in {*one, *other} if one.get(n) != other.get(n)
    ][:2]


PARTS = ("labels", "resume", "continuation", "damage")


def search(hostile, runs, rng, parts):
    """(outcomes and their numbers, what was wrong) of random runs; parts(rng) are the checks of one."""
    ended, wrong = collections.Counter(), []
    for k in range(runs):
        changes = combination(rng)
        words = " ".join(f"{name}={value}" for name, value in changes.items())
        begin = time.monotonic()
        try:
            outcome = hostile.check(changes, rng, parts(rng))
        except Exception as why:  # a traceback would be wrong too
            outcome = f"WRONG: {type(why).__name__}"
            wrong.append(f"{words}\n    {type(why).__name__}: {why}")
        ended[outcome] += 1
        print(f"{k + 1}/{runs} {outcome}, {time.monotonic() - begin:.1f} s: {words}", flush=True)
    return ended, wrong


def continuations(hostile, short=40, long=200):
    """Lines of val_loss from scratch and continued, for quantisers, late QAT and seeds; the largest loss by continuing."""
    plain = dict(EVALS="roundtrip", TTT_ENABLED="0", SLOT_ENABLED="0", VAL_LOSS_EVERY="0")
    labels = (f"step:{long}/{long}", "final_artifact_roundtrip")
    worst = -math.inf
    for number, (quant, qat, seed) in enumerate(
        itertools.product(("rd", "gptq", "gptq_lite"), "01", "123")
    ):
        changes = {**plain, "QUANT": quant, "LATE_QAT": qat, "SEED": seed}
        hostile.run(f"begun{number}", {**changes, "ITERATIONS": str(short)})
        loaded = {
            "LOAD_CHECKPOINT": str(max(hostile.path(f"begun{number}").glob("checkpoint.*.ckpt")))
        }
        runs = [
            hostile.run(f"{kind}{number}", {**changes, **more, "ITERATIONS": str(long)})
            for kind, more in (("scratch", {}), ("more", loaded))
        ]
        losses = [[figures[label]["val_loss"] for label in labels] for figures in runs]
        lost = max(more - scratch for scratch, more in zip(*losses))
        worst = max(worst, lost)
        words = " ".join(
            f"{kind}: trained {trained:.4f} artifact {artifact:.4f}"
            for kind, (trained, artifact) in zip(("scratch", "continued"), losses)
        )
        print(f"QUANT={quant} LATE_QAT={qat} SEED={seed} {words} lost: {lost:+.4f}", flush=True)
    print(f"most lost by continuing:{worst:+.4f}")
    return int(worst > 0.02)


def main():
    """Print each run, how many ended how, and what was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200, help="random combinations of settings")
    parser.add_argument("--seed", type=int, default=1, help="of them")
    parser.add_argument(
        "--continuations", action="store_true", help="compare with runs from scratch"
    )
    args = parser.parse_args()
    print(f"$ python {' '.join(sys.argv)}", flush=True)
    torch.set_num_threads(1)
    for name in set(t.SETTINGS) & set(os.environ):
        del os.environ[name]
    with tempfile.TemporaryDirectory() as folder:
        if args.continuations:
            return continuations(Hostile(Path(folder), 4096))
        hostile = Hostile(Path(folder))
        ended, wrong = search(hostile, args.runs, random.Random(args.seed), lambda rng: PARTS)
    for outcome, count in ended.most_common():
        print(f"{count:4} {outcome}")
    for words in wrong:
        print(f"WRONG {words}")
    print(f"runs:{ended.total()} wrong:{len(wrong)}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
