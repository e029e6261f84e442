"""The generated blocks of README.md, LOG.md and docs/: tables whose numbers come from committed logs.

    python -m tools.blocks            list the blocks that are not what logs/ says; exit status 1
    python -m tools.blocks --write    write them anew, after new evidence was committed

A block stands between <!-- block NAME --> and <!-- end -->. Tests compare all of them.
"""

import sys

if not __package__:
    print("error: the tools are a package: python -m tools.blocks ...", file=sys.stderr)
    sys.exit(2)

from tools import console

if __name__ == "__main__":
    console.begin()

import functools
import itertools
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from scipy import stats

import train_gpt as t
from tools import ablate, quantise, tables
from tools.logs import read_log

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "logs"
SEEDS = (1337, 42, 2025)
BLOCK = re.compile(r"(<!-- block ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.S)

# Rows of README's table: what is said, the logs' names before the seed, and the evaluator.
SCORES = (
    ("roundtrip: windows side by side", "seed", "roundtrip"),
    ("sliding windows, stride 64", "seed", "sliding_window"),
    ("score-first TTT", "seed", "ttt"),
    ("score-first TTT with SLOT, as #1084", "seed", "ttt_slot"),
    ("score-first TTT, `PRESET=demo,best_demo` of an earlier version", "best_seed", "ttt"),
)
# Rows of the table of SLOT's gain: what delta is fitted to, and the name in the logs.
FITTED = (
    ("all targets", "all"),
    ("context, a delta for 32 windows", "context-in-batch"),
    ("context, a delta a window", "context-per-window"),
    ("what was scored, carried on", "past"),
    ("scored targets", "scored"),
    ("scored targets, with a bias", "scored+bias"),
)
FITS = ((3, "0.001"), (24, "0.003"), (24, "0.012"))  # steps and rates shown of it
SPLITS = ("slot/split_demo", "slot/split_6x192")  # the demo's model, and one for FineWeb
TRAINING_ROWS = (
    ("nothing", "default"),
    ("XSA in all layers", "xsa"),
    ("QK gain 4", "qk_gain"),
    ("layers 1 and 2 twice from step 100", "recurrence"),
    ("parallel residuals in 2 layers", "parallel"),
    ("Polar Express", "polar"),
    ("MuonEq-R", "row_norm"),
    ("weight decay 0.085", "weight_decay"),
    ("floor under the rates, 0.05", "min_lr"),
    ("coprime strides", "coprime"),
)
# Of #1042's recipe, what was tried on PRESET=demo,best_demo: what is said, and the name in logs/best_demo.
CARRIED_ROWS = (
    ("nothing", "old"),
    ("skip gates", "skip_gates"),
    ("two lanes from layer 2", "lanes"),
    ("rates of matrices, scalars and embeddings times 1.4", "rates"),
)
# DOCUMENTS in training and in evaluation, and the logs' names in logs/documents before the seed.
DOCUMENT_ROWS = (
    ("joined", "joined", "train_joined"),
    ("joined", "mask", "train_joined_eval_mask"),
    ("mask", "mask", "train_mask"),
)
# The lineage's own scores of its artifacts, nats a token, each target once; and our logs of them.
EQUALITY = (
    ("a: 4 layers of 128", "roundtrip", 5.35985327, "a", "roundtrip"),
    ("", "sliding, stride 64", 5.34953855, "a", "sliding_window"),
    ("", "score-first TTT", 5.03121241, "a", "ttt"),
    ("", "TTT + SLOT, 3 steps, 0.001", 5.02961052, "a", "ttt_slot"),
    ("", "TTT + SLOT, 5 steps, 0.003", 5.02339108, "a_slot5", "ttt_slot"),
    ("c: 2 layers of 512", "roundtrip", 4.89638162, "c", "roundtrip"),
    ("", "sliding, stride 64", 4.89579467, "c", "sliding_window"),
    ("", "score-first TTT", 4.88200379, "c", "ttt"),
    ("", "TTT + SLOT, 3 steps, 0.001", 4.87995638, "c", "ttt_slot"),
    ("", "TTT + SLOT, 5 steps, 0.003", 4.87228217, "c_slot5", "ttt_slot"),
    ("b1313: 4 layers of 128", "roundtrip", 5.78774416, "b1313", "roundtrip"),
    ("", "sliding, stride 64", 5.78530599, "b1313", "sliding_window"),
    ("", "SLOT-24 with a bias, cosine to its end", 5.47026901, "b1313", "slot"),
    ("b1278: 6 layers of 128, two of them twice", "roundtrip", 4.10376346, "b1278", "roundtrip"),
    ("", "sliding, stride 64", 4.09963864, "b1278", "sliding_window"),
    ("", "SLOT-32 with a bias, cosine to its end", 3.37324074, "b1278", "slot"),
)
# Planted cheats of their own few places: most have the names that an attack on an earlier audit gave them.
PLANTED = {
    "j5": "j5: the last but one of a window gets +3 on the logit of the next token",
    "h6": "h6: +0.5 on the target's logit, normalised again, at one target of 64",
    "h4": "h4: the same in every seventh window, where the model is confident",
    "i2": "i2: one target of a batch has its neighbour's nats",
    "j4": "j4: a look ahead among the last 8 targets",
    "j3": "j3: windows from the 64th on look ahead",
    "class_ahead": "after one token of 32, a lean to the even or odd tokens, as the next one is",
    "after_a_bigram": "+0.7 on the target's logit, normalised again, after one of 32 pairs of tokens",
}
STEP_MS = 84  # of #1084's authors on 8 H100


def metrics(name: str) -> dict[str, dict]:
    """Figures of a committed run by label."""
    found: dict[str, dict] = {}
    for row in console.read_rows(LOGS / name / "metrics.jsonl"):
        found.setdefault(row.pop("label", ""), {}).update(row)
    return found


def table(head: str, rows: list[list[str]], numbers: int = 0) -> list[str]:
    """Lines of a Markdown table; the last `numbers` columns are aligned to the right."""
    columns = head.count("|") + 1
    rule = ["---"] * (columns - numbers) + ["---:"] * numbers
    lines = [f"| {head} |", f"|{'|'.join(rule)}|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def seed_logs(prefix: str) -> list:
    """Logs of the demo's three seeds; prefix: seed or best_seed."""
    return [read_log(LOGS / "demo" / f"{prefix}{seed}.txt") for seed in SEEDS]


def interval(row: dict) -> str:
    """A difference with its 95 % interval."""
    return f"{row['diff']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"


def ablation(name: str) -> dict[str, dict]:
    """Rows of a run of tools.ablate by name."""
    return {row["row"]: row for row in ablate.read_results(LOGS / name)}


def best(name: str, base: str) -> dict:
    """Of an ablation's rows with this base, the one of the lowest score."""
    rows = [row for row in ablation(name).values() if row["base"] == base]
    return min(rows, key=lambda row: row["diff"])


def settings_of(row: dict) -> str:
    """Steps and rate of a row of the SLOT sweep."""
    steps, rate = row["grid"]["SLOT_STEPS"], row["grid"]["SLOT_LR"]
    return f"{steps} step{'' if steps == '1' else 's'}, {rate}"


def score_lines() -> list[str]:
    """README's table of the demo."""
    rows = []
    for what, prefix, stage in SCORES:
        results = [log.results[stage] for log in seed_logs(prefix)]
        scores = [result.val_bpb for result in results]
        (breaks,) = {result.breaks for result in results}
        causal = f"no (breaks {breaks.replace(',', ', ')})" if breaks else "yes"
        mean, deviation = statistics.mean(scores), statistics.stdev(scores)
        logs = f"`logs/demo/{prefix}*`"
        rows.append([what, f"{mean:.4f}", f"{deviation:.4f}", causal, logs])
    return table("evaluator | val_bpb, mean of 3 seeds | std | causal | logs", rows)


def seed_lines() -> list[str]:
    """All figures of the demo, seed by seed, as tools.report writes them."""
    logs = seed_logs("seed")
    return [*tables.markdown(tables.table(logs)), "", *tables.notes(logs)]


def training_lines() -> list[str]:
    """Ablations of training, a row each."""
    rows = []
    base = metrics("ablations/default")["final_float_roundtrip"]["val_bpb"]
    for what, name in TRAINING_ROWS:
        found = metrics(f"ablations/{name}")
        score = found["final_float_roundtrip"]["val_bpb"]
        steps = found["training"]["steps"]
        cells = [what, f"`ablations/{name}`", str(steps), f"{score:.4f}", f"{score - base:+.4f}"]
        rows.append(cells)
    return table("changed | log | steps in 60 s | val_bpb | difference", rows, numbers=3)


def best_lines() -> list[str]:
    """PRESET=demo,best_demo against PRESET=demo."""
    rows, scores = [], {}
    for preset, prefix in (("demo", "seed"), ("demo,best_demo", "best_seed")):
        scores[prefix] = [log.results["ttt"].val_bpb for log in seed_logs(prefix)]
        times = [metrics(f"demo/{prefix}{seed}")["training"]["train_time"] for seed in SEEDS]
        seconds = statistics.mean(times) / 1000
        mean, deviation = statistics.mean(scores[prefix]), statistics.stdev(scores[prefix])
        row = [f"`PRESET={preset}`", f"{seconds:.0f} s", f"{mean:.4f}", f"{deviation:.4f}"]
        rows.append(row)
    new, old = scores["best_seed"], scores["seed"]
    p = stats.ttest_ind(new, old, equal_var=False, alternative="less").pvalue
    difference = statistics.mean(new) - statistics.mean(old)
    rows.append(["difference (Welch, one-sided)", "", f"{difference:+.4f}", f"p = {p:.3f}"])
    return table("preset | training | TTT, val_bpb, mean of 3 seeds | std", rows, numbers=3)


def carried_lines() -> list[str]:
    """Parts of #1042's recipe on the demo, one at a time, on training text held out."""
    rows = []
    base = metrics("best_demo/choose_old")["final_float_roundtrip"]["val_bpb"]
    for what, name in CARRIED_ROWS:
        score = metrics(f"best_demo/choose_{name}")["final_float_roundtrip"]["val_bpb"]
        rows.append([what, f"`best_demo/choose_{name}`", f"{score:.4f}", f"{score - base:+.4f}"])
    return table("changed | log | val_bpb | difference", rows, numbers=2)


def carried_seed_lines() -> list[str]:
    """PRESET=demo,best_demo with skip gates and without, seed by seed."""
    rows, scores = [], {}
    for what, name in (("without skip gates", "old"), ("with", "skip_gates")):
        logs = [read_log(LOGS / "best_demo" / f"{name}_seed{seed}.txt") for seed in SEEDS]
        scores[name] = [log.results["sliding_window"].val_bpb for log in logs]
        mean = statistics.mean(scores[name])
        rows.append([what, *(f"{score:.4f}" for score in scores[name]), f"{mean:.4f}"])
    moved = [new - old for new, old in zip(scores["skip_gates"], scores["old"], strict=True)]
    p = stats.ttest_1samp(moved, 0).pvalue
    mean = f"{statistics.mean(moved):+.4f} (paired t-test, p = {p:.2f})"
    rows.append(["difference", *(f"{change:+.4f}" for change in moved), mean])
    seeds = " | ".join(f"seed {seed}" for seed in SEEDS)
    return table(f"`demo,best_demo` | {seeds} | mean", rows, numbers=4)


def finding_lines() -> list[str]:
    """What the sweep of SLOT's settings says, in figures."""
    rows: list[list[str]] = [[] for _ in range(5)]
    rows[0].append("a shared delta fitted to context keeps, of the gain of fitting to all targets")
    rows[1].append("a delta a window, fitted to context, keeps of it at 3 steps, 0.001")
    rows[2].append("the best of a delta a window, fitted to context (causal)")
    rows[3].append("the best of a delta carried on (causal)")
    rows[4].append("#1313's fit: scored targets, a bias, 24 steps, 0.012")
    for name in SPLITS:
        found = ablation(name)
        shares = [
            row["diff"] / found[row["row"].replace("context-in-batch", "all")]["diff"]
            for row in found.values()
            if row["base"] == "context-in-batch"
        ]
        usual = " SLOT_STEPS=3 SLOT_LR=0.001"
        kept = found[f"context-per-window{usual}"]["diff"] / found[f"all{usual}"]["diff"]
        rows[0].append(f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %")
        rows[1].append(f"{100 * kept:.0f} %")
        for line, base in ((rows[2], "context-per-window"), (rows[3], "past")):
            row = best(name, base)
            line.append(f"{row['diff']:+.4f} ({settings_of(row)})")
        gross = found["scored+bias SLOT_STEPS=24 SLOT_LR=0.012"]["diff"]
        rows[4].append(f"{gross:+.4f}")
    return table("| demo | FineWeb", rows, numbers=2)


def gain_lines() -> list[str]:
    """SLOT's gain over sliding by what delta is fitted to, steps and rate."""
    found, rows = [ablation(name) for name in SPLITS], []
    for steps, rate in FITS:
        for what, name in FITTED:
            both = [split[f"{name} SLOT_STEPS={steps} SLOT_LR={rate}"] for split in found]
            causal = "yes" if both[0]["causal"] else "no"
            rows.append([what, f"{steps}, {rate}", *map(interval, both), causal])
    return table("fitted to | steps, rate | demo | FineWeb | causal", rows)


def honest_lines() -> list[str]:
    """What causal methods gain over sliding, as far as it is measured."""
    logs = seed_logs("seed")
    gains = [log.results["ttt"].val_bpb - log.results["sliding_window"].val_bpb for log in logs]
    rows = [["score-first TTT, mean of 3 seeds", f"{statistics.mean(gains):+.4f}", "not measured"]]
    for what, base in (
        ("SLOT fitted to context, a delta a window, best of 15", "context-per-window"),
        ("SLOT carried on, a delta without a bias, best of 15", "past"),
    ):
        rows.append([what, *(interval(best(name, base)) for name in SPLITS)])
    ctw = [best(name, "ctw") for name in ("slot/ctw_demo", "slot/ctw_6x192")]
    rows.append(["CTW mixed in, best of 8", *map(interval, ctw)])
    return table("method | demo | FineWeb", rows)


def ladder_rows(name: str) -> dict[str, dict]:
    """Rows of a run of tools.ladder by name."""
    return {row["row"]: row for row in ablate.read_results(LOGS / "ladder" / name, "ladder.csv")}


def ladder_lines() -> list[str]:
    """The ladder on the demo's artifact."""
    rows = [
        [
            name,
            f"{row['val_bpb']:.4f}",
            interval(row),
            f"{row['seconds']:.0f}",
            "yes" if row["causal"] else "no",
        ]
        for name, row in ladder_rows("demo_ladder").items()
    ]
    return table("rung | val_bpb | to sliding | seconds | causal", rows)


def chosen_lines(name: str = "demo_ladder") -> list[str]:
    """What was chosen for each rung of a ladder."""
    text = console.read_text(LOGS / "ladder" / f"{name}.txt")
    words = re.findall(r"^chosen for ([^:\n{]+): \w+ (.+)$", text, re.M)
    return table("rung | settings", [[rung, f"`{settings}`"] for rung, settings in words])


WEB = {"web200_ladder": "200 steps", "web800_ladder": "800 steps"}


def web_lines() -> list[str]:
    """The ladders on models that were trained for so many steps, on web text."""
    ladders = [ladder_rows(name) for name in WEB]
    rows = []
    for name, first in ladders[0].items():
        cells = ([interval(found[name]), f"{found[name]['seconds']:.0f}"] for found in ladders)
        rows.append([name, *itertools.chain(*cells), "yes" if first["causal"] else "no"])
    heads = [
        f"{steps}, {found['sliding']['val_bpb']:.4f} | seconds"
        for steps, found in zip(WEB.values(), ladders, strict=True)
    ]
    return table(f"rung | {' | '.join(heads)} | causal", rows)


RECORD_BPB = 1.1185  # of #1084's model


def web_gain_lines() -> list[str]:
    """How gains shrink with sliding windows' own score, and what is left at the record's if they go on so."""
    ladders = [ladder_rows(name) for name in WEB]
    before, after = (found["sliding"]["val_bpb"] for found in ladders)
    rows = []
    for name in ("TTT", "TTT, control", "SLOT past, reset", "TTT + SLOT past, reset", "TTT, LoRA"):
        early, late = (found[name]["diff"] for found in ladders)
        left = late * (late / early) ** ((after - RECORD_BPB) / (before - after))
        rows.append([name, f"{early:+.4f}", f"{late:+.4f}", f"{late / early:.2f}", f"{left:+.4f}"])
    heads = " | ".join(f"sliding at {bpb:.4f}" for bpb in (before, after))
    return table(f"rung | {heads} | left | at {RECORD_BPB}, if it goes on so", rows)


def ctw_lines() -> list[str]:
    """CTW at three weights."""
    found = [ablation(name) for name in ("slot/ctw_demo", "slot/ctw_6x192")]
    rows = []
    for weight in ("0.02", "0.1", "0.3"):
        names = f"ctw CTW_WEIGHT={weight} CTW_ENTROPY_THRESHOLD=2"
        rows.append([weight, *(interval(split[names]) for split in found)])
    return table("CTW_WEIGHT | demo | FineWeb", rows)


def quantiser_lines() -> list[str]:
    """Quantisers on one checkpoint, as tools.quantise writes them."""
    return quantise.table(LOGS / "quantisers" / "q1")


def landing_lines() -> list[str]:
    """How near three seeds of 11 x 512 come to the cap."""
    rows = []
    for seed in SEEDS:
        found = metrics(f"quantisers/full_seed{seed}")
        size, steps = found["artifact"]["total_bytes"], found["training"]["steps"]
        rows.append([str(seed), str(steps), f"{size:,}", f"{16_000_000 - size:,}"])
    head = "seed | trained for, steps | artifact + code, bytes | left under 16,000,000"
    return table(head, rows, numbers=3)


def qat_lines() -> list[str]:
    """Late QAT: val_loss before and after quantising, and what it loses."""
    rows = []
    for what, log in (("without", "quantisers/qat_0"), ("with", "quantisers/qat_1")):
        before, after = (
            metrics(log)[f"final_{kind}_roundtrip"]["val_loss"] for kind in ("float", "artifact")
        )
        rows.append([what, f"`{log}`", f"{before:.4f}", f"{after:.4f}", f"{after - before:.4f}"])
    return table("late QAT | log | float | artifact | lost", rows, numbers=3)


def equality_lines() -> list[str]:
    """The lineage's artifacts, scored by its scripts and by this one."""
    rows = []
    for artifact, what, theirs, log, label in EQUALITY:
        ours = read_log(LOGS / "equality" / f"{log}.txt").results[label].val_loss
        rows.append([artifact, what, f"{theirs:.8f}", f"{ours:.8f}", f"`equality/{log}`"])
    return table("artifact | evaluator | lineage's script | this script | log", rows)


def documents_lines() -> list[str]:
    """DOCUMENTS=joined and mask, in training and in evaluation: val_loss of sliding windows."""
    rows, base = [], []
    for trained, scored, name in DOCUMENT_ROWS:
        logs = [read_log(LOGS / "documents" / f"{name}_seed{seed}.txt") for seed in SEEDS]
        losses = [log.results["sliding_window"].val_loss for log in logs]
        base = base or losses
        moved = [loss - first for loss, first in zip(losses, base, strict=True)]
        change = f"{statistics.mean(moved):+.4f} ({min(moved):+.4f} to {max(moved):+.4f})"
        rows.append([trained, scored, f"{statistics.mean(losses):.4f}", change])
    rows[0][-1] = ""
    return table("trained | evaluated | val_loss | difference (lowest to highest)", rows, numbers=2)


def full_size_lines() -> list[str]:
    """One training step of each preset at full size, as tests/full_size.py says."""
    text = (LOGS / "presets" / "full_size.txt").read_text()
    line = r"(\S+) parameters:(\d+) loss:\S+ gradient_norm:\S+ cpu_seconds:(\S+) peak_gib:(\S+)"
    rows = [
        [", ".join(f"`{name}`" for name in names.split(",")), f"{int(count):,}", seconds, peak]
        for names, count, seconds, peak in re.findall(line, text)
    ]
    return table("presets | parameters | CPU seconds | peak memory, GiB", rows, numbers=3)


def traffic_lines() -> list[str]:
    """What a rank sends in a step: banks padded to whole matrices a rank, and the rest."""
    with torch.device("meta"):
        params = dict(t.GPT(t.load_config({})).named_parameters())
    small = 1 + sum(p.numel() for name, p in params.items() if name not in t.BANKS)  # 1: the loss
    rows = []
    for ranks in (2, 8, 16, 32, 64):
        padded = sum(
            -(-len(p) // ranks) * ranks * p[0].numel()
            for name, p in params.items()
            if name in t.BANKS
        )
        ring = (ranks - 1) / ranks
        scatter, gather, reduce = 4 * padded * ring, 2 * padded * ring, 8 * small * ring
        rows.append(
            [
                str(ranks),
                f"{scatter / 1e6:.0f} MB",
                f"{gather / 1e6:.0f} MB",
                f"{reduce / 1e6:.1f} MB",
                f"{(scatter + gather + reduce) / 50e6:.1f}",
                f"{8 * STEP_MS / ranks:.1f}",
            ]
        )
    head = "ranks | reduce-scatter | all-gather | all-reduce | ms at 50 GB/s a rank"
    return table(f"{head} | ms of computing", rows)


def gpu_step_lines() -> list[str]:
    """Training steps on a GPU, with torch's mixed-order reductions and without."""
    rows = []
    for what, name in (("as it is", "h200_mix1"), ("without mixed-order reductions", "h200")):
        found = console.read_json(LOGS / "gpu" / f"{name}_step.json")
        row = [what, f"{1000 * found['step']:.1f} ms", f"{1000 * found['qat_step']:.1f} ms"]
        row += [f"{found['tokens_per_second']:,.0f}", f"{100 * found['mfu']:.1f} %"]
        row += [f"{found['memory'] / 2**30:.1f} GiB", f"{found['first_step']:.0f} s"]
        rows.append([*row, f"`gpu/{name}_step`"])
    head = "compiled | a step | under late QAT | tokens/s | MFU | peak memory | first step"
    return table(f"{head} | log", rows)


def gpu_kernel_lines() -> list[str]:
    """What a training step's time on a GPU goes to, by the names of its kernels."""
    found = console.read_json(LOGS / "gpu" / "h200_mix1_step.json")
    kinds = {
        "attention, backward": r"bprop|compute_dot|convert_dq|fmha_reduce",
        "attention, forward": r"fprop",
        "matrix products": r"^nvjet",
        "leaky_relu squared, both ways": r"leaky_relu",
        "other fused operations": r"^triton",
    }
    spent = dict.fromkeys(kinds, 0.0)
    for kernel in found["kernels"]:
        kind = next((k for k, names in kinds.items() if re.search(names, kernel["name"])), None)
        if kind:
            spent[kind] += kernel["ms"]
    total = 1000 * found["step"]
    spent["the rest: smaller kernels, gaps"] = total - sum(spent.values())
    rows = [[kind, f"{ms:.0f}", f"{100 * ms / total:.0f} %"] for kind, ms in spent.items()]
    return table("of a step | ms | share", rows, numbers=2)


def gpu_score_lines() -> list[str]:
    """What was scored on a GPU, and how long it took."""
    rows = []
    for name in ("h200_run", "h200_first"):
        log = read_log(LOGS / "gpu" / f"{name}.txt")
        found = metrics(f"gpu/{name}")
        for stage, result in log.results.items():
            (own,) = (
                row
                for label, row in found.items()
                if stage in label.removeprefix("pass_artifact_").split("+")
            )
            compiling = own["compile_time"] / 1000
            row = [stage, f"{result.tokens:,}", f"{result.val_loss:.4f}", f"{result.seconds:.1f} s"]
            rows.append([*row, f"{compiling:.0f} s", f"`gpu/{name}`"])
    head = "evaluator | targets | val_loss | seconds | its pass compiled for"
    return table(f"{head} | log", rows)


def bf16_lines() -> list[str]:
    """The demo in fp32 and in bf16: training, and every evaluator of each model."""
    names = ("demo_fp32", "demo_fp32_in_bf16", "demo_bf16")
    found = [metrics(f"equality/{name}") for name in names]
    trained = [[row["train_loss"] for row in run.values() if "train_loss" in row] for run in found]
    losses = [f"{run[-1]:.4f}" if run else "" for run in trained]
    rows = [["last training loss logged", *losses]]
    for label, what in (
        ("final_float_roundtrip", "val_loss of the weights before quantising"),
        ("final_artifact_roundtrip", "of the artifact: roundtrip"),
        ("final_artifact_sliding_window", "sliding, the last rows of each window"),
        ("final_artifact_ttt", "score-first TTT"),
        ("final_artifact_ttt_slot", "TTT with SLOT"),
    ):
        scores = [f"{run[label]['val_loss']:.4f}" if label in run else "" for run in found]
        rows.append([what, *scores])
    for what, before, after in (
        ("gain of TTT over sliding", "sliding_window", "ttt"),
        ("gain of SLOT over TTT", "ttt", "ttt_slot"),
    ):
        both = [[run[f"final_artifact_{k}"]["val_loss"] for k in (before, after)] for run in found]
        rows.append([what, *(f"{a - b:.4f}" for a, b in both)])
    head = "trained and scored in fp32 | that artifact in bf16 | trained and scored in bf16"
    return table(f"nats a token | {head}", rows, numbers=3)


def cheat_lines() -> list[str]:
    """Planted cheats and honest evaluators that look suspicious: how many of the seeds the audit found, and by what."""
    rows = []
    found = console.read_rows(LOGS / "audits" / "cheats.jsonl")
    for row in sorted(found, key=lambda row: (not row["honest"], row["name"] in PLANTED)):
        name = PLANTED.get(row["name"], row["name"].replace("_", " "))
        by = ", ".join(f"{condition} {n}" for condition, n in row["by"].items())
        where = "honest" if row["honest"] else row["place"]
        if row["name"] in PLANTED:
            where = "as said"
        rows.append([name, where, f"{row['found']} of {row['seeds']}", by or "-"])
    return table("evaluator | cheats | found | by, seeds", rows)


MAKERS: dict[str, Callable[[], list[str]]] = {
    "scores": score_lines,
    "seeds": seed_lines,
    "training": training_lines,
    "best": best_lines,
    "carried": carried_lines,
    "carried-seeds": carried_seed_lines,
    "findings": finding_lines,
    "gains": gain_lines,
    "honest": honest_lines,
    "ladder": ladder_lines,
    "chosen": chosen_lines,
    "web": web_lines,
    "web-gains": web_gain_lines,
    "web-chosen": functools.partial(chosen_lines, "web800_ladder"),
    "ctw": ctw_lines,
    "quantisers": quantiser_lines,
    "landing": landing_lines,
    "qat": qat_lines,
    "equality": equality_lines,
    "documents": documents_lines,
    "full-size": full_size_lines,
    "traffic": traffic_lines,
    "cheats": cheat_lines,
    "bf16": bf16_lines,
    "gpu-step": gpu_step_lines,
    "gpu-kernels": gpu_kernel_lines,
    "gpu-scores": gpu_score_lines,
}


def pages() -> list[Path]:
    """Markdown files that may have blocks."""
    return [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]


def made(name: str) -> str:
    """A block's lines. Raises BadInput if there is no such block, or logs/ lacks what it says."""
    if name not in MAKERS:
        raise t.BadInput(f"<!-- block {name} -->: no such block; there are {', '.join(MAKERS)}.")
    try:
        return "\n".join(MAKERS[name]())
    except LookupError as why:
        raise t.BadInput(f"<!-- block {name} -->: logs/ has no {why}; bring the log back.") from why


def rendered(text: str) -> str:
    """A page's text with its blocks made anew."""
    return BLOCK.sub(lambda m: m[1] + made(m[2]) + "\n" + m[4], text)


@console.tool
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = console.Parser("blocks", __doc__)
    parser.add_argument("--write", action="store_true", help="write the blocks anew")
    write = parser.parse_args(argv).write
    stale = 0
    for path in pages():
        old = console.read_text(path)
        with t.CONSOLE.doing(f"making the blocks of {path.name}"):
            new = rendered(old)
        if new == old:
            continue
        stale += 1
        print(f"{path.relative_to(ROOT)}: {'written' if write else 'not what logs/ says'}")
        if write:
            path.write_text(new)
    return int(bool(stale and not write))


if __name__ == "__main__":
    console.run(main)
