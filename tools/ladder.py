"""The ladder: how much each way of adapting while scoring gains on ONE artifact, and what it costs in seconds.

    python -m tools.ladder --artifact logs/my_run/final_model.ptz --run-id ladder/mine --tune data/datasets/other
    python -m tools.ladder --artifact logs/my_run/final_model.ptz --run-id ladder/two --tune data/datasets/other \\
        --rung "SLOT context" --rung TTT    # these, the two stacked and mixed
    python -m tools.ladder --run-id ladder/mine --redraw    # only the figure

Each rung has its own best rate, so the rates come first: every rung is scored with each of its settings on the validation split
of the data set --tune, text that is not scored afterwards, and the best ones are kept. Then all rungs, those that stack two of
them and the mixture of the causal ones score the validation split of DATA_PATH, once. Differences are to sliding windows, with
95 % intervals of a paired bootstrap over documents.

Settings for all rungs come from the environment (TTT_CHUNK_TOKENS, TTT_EPOCHS, EVAL_STRIDE ...). Writes logs/RUN_ID.txt and in
logs/RUN_ID/: metrics.jsonl, ladder.csv, ladder.png. Exit status: 0 done, 2 bad input.
"""

import sys

if not __package__:
    print("error: the tools are a package: python -m tools.ladder ...", file=sys.stderr)
    sys.exit(2)

from tools import console

if __name__ == "__main__":
    console.begin()

import dataclasses
import os
from pathlib import Path

import train_gpt as t
from tools import ablate, audit

PAST = "SLOT_LOSS=past SLOT_BIAS=1"
# rung -> (row, values to choose from). A stack takes what its parts have chosen.
RUNGS = {
    "sliding": ("sliding_window", {}),
    "SLOT context": (
        "slot SLOT_LOSS=context SLOT_DELTA=window SLOT_BIAS=1",
        {"SLOT_STEPS": "8,24", "SLOT_LR": "0.001,0.003,0.01"},
    ),
    "SLOT past, a batch": (
        f"slot {PAST}",
        {"SLOT_STEPS": "1,3", "SLOT_LR": "0.0003,0.001,0.003,0.01"},
    ),
    "SLOT past": (
        f"slot {PAST} SLOT_DELTA=window",
        {"SLOT_STEPS": "1,3", "SLOT_LR": "0.0003,0.001,0.003,0.01"},
    ),
    "SLOT past, reset": (
        f"slot {PAST} SLOT_DELTA=window SLOT_RESET=document",
        {"SLOT_STEPS": "1,3", "SLOT_LR": "0.0003,0.001,0.003,0.01"},
    ),
    "SLOT recent": (
        "slot SLOT_LOSS=recent SLOT_BIAS=1 SLOT_DELTA=window SLOT_RESET=document",
        {"SLOT_STEPS": "1,3", "SLOT_LR": "0.001,0.003"},
    ),
    "TTT": ("ttt", {"TTT_LR": "0.002,0.006,0.02,0.06"}),
    "TTT, AdamW": ("ttt TTT_OPTIMIZER=adamw", {"TTT_LR": "0.00003,0.0001,0.0003"}),
    "TTT, control": (
        "ttt TTT_PARAMS=control TTT_OPTIMIZER=adamw",
        {"TTT_LR": "0.0003,0.001,0.003"},
    ),
    "TTT, LoRA": ("ttt TTT_PARAMS=lora TTT_OPTIMIZER=adamw", {"TTT_LR": "0.001,0.003,0.01"}),
}
STACKS = {
    f"{ttt} + {slot}": (ttt, slot)
    for ttt in ("TTT", "TTT, AdamW", "TTT, control")
    for slot in ("SLOT context", "SLOT past, reset")
}
# What a run with EVALS=sliding_window,slot,ttt,ttt_slot,mix mixes, and all that there is.
MIXES = {
    **{
        f"mix of {ttt}, {slot}": ("sliding", ttt, slot, f"{ttt} + {slot}")
        for ttt, slot in STACKS.values()
    },
    "mix of all": None,
}
LEAKS = {
    "SLOT as #1084": "slot",
    "SLOT as #1313": "slot SLOT_DELTA=window SLOT_BIAS=1 SLOT_LOSS=scored SLOT_STEPS=24 SLOT_LR=0.012",
}


class Head:
    """The first targets of a validation stream, as much as score() and mean_and_bpb() need of it."""

    def __init__(self, val, targets):
        self.n = min(targets, val.n)
        self.tokens, self.bytes = val.tokens[: self.n + 1], val.bytes[: self.n]
        self.total_bytes = int(self.bytes.sum())


def rungs_of(mix):
    """The rungs that a mixture has the nats of, stacked or not; that of all takes what there is."""
    return {rung for part in MIXES[mix] or () for rung in STACKS.get(part, (part,))}


def settings_of(row):
    """The settings in a row's words, as they were written."""
    return row.split(" ", 1)[1] if " " in row else ""


def chosen_rows(run, model, tune, env, base, rungs):
    """{rung: its row with the settings that scored best on the tuning text} of these rungs."""
    rows = []
    for name in rungs:
        row, grid = RUNGS[name]
        parsed = ablate.parse_row(f"tune {name}={row}", env, base)
        rows += ablate.cross([parsed], [(n, values.split(",")) for n, values in grid.items()])
    found = ablate.ablate(run, model, tune, rows)
    chosen = {}
    for name in rungs:
        row, _ = RUNGS[name]
        best = min((r for r in found if r["base"] == f"tune {name}"), key=lambda r: r["val_loss"])
        values = " ".join(f"{n}={v}" for n, v in best["grid"].items())
        chosen[name] = f"{row} {values}".strip()
        run.log.line(f"chosen for {name}: {chosen[name]}")
    return chosen


def ladder_rows(chosen):
    """Rows to score: the rungs, what leaks, and the stacks and mixtures of the rungs."""
    stacks = {
        name: f"ttt_slot {settings_of(chosen[a])} {settings_of(chosen[b])}"
        for name, (a, b) in STACKS.items()
        if {a, b} <= {*chosen}
    }
    mixes = dict.fromkeys((name for name in MIXES if rungs_of(name) <= {*chosen}), "mix")
    return {**chosen, **stacks, **LEAKS, **mixes}


def frontier(rows):
    """Causal rows that nothing causal beats in less time, the fastest first."""
    found = []
    for row in sorted((row for row in rows if row["causal"]), key=lambda row: row["seconds"]):
        if not found or row["val_bpb"] < found[-1]["val_bpb"]:
            found.append(row)
    return found


def draw(rows, path, title):
    """val_bpb's difference to sliding windows against seconds; what leaks has a panel of its own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    leaks = [row for row in rows if not row["causal"]]
    first, *_, last = sorted(row["seconds"] for row in rows)
    panels = figure.subplots(1, 2, width_ratios=[4, 1]) if leaks else [figure.subplots()]
    for axes, causal in zip(panels, (True, False)):
        shown = [row for row in rows if row["causal"] == causal]
        for k, row in enumerate(shown):
            marker, size = ablate.MARKERS[k % len(ablate.MARKERS)]
            axes.errorbar(
                row["seconds"],
                row["diff"],
                [[row["diff"] - row["low"]], [row["high"] - row["diff"]]],
                marker=marker,
                ms=size,
                mfc="none" if size > 5 else None,
                lw=0.8,
                capsize=2,
                color=ablate.COLOURS[causal],
            )
            axes.annotate(
                f"{k + 1 if causal else row['row']}",
                (row["seconds"], row["diff"]),
                xytext=(6, 3),
                textcoords="offset points",
                fontsize=8,
            )
        axes.axhline(0, color="black", lw=0.6)
        axes.grid(lw=0.3)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlim(first / 1.3, last * 1.6)
        axes.set_xlabel("seconds of evaluation")
        axes.set_title("causal" if causal else "not causal:\nno compression result", fontsize=10)
    steps = frontier(rows)
    panels[0].step(
        [row["seconds"] for row in steps],
        [row["diff"] for row in steps],
        where="post",
        lw=1.2,
        ls=":",
        color=ablate.COLOURS[True],
    )
    panels[0].set_ylabel("difference in val_bpb to sliding windows (lower is better)")
    causal = [row for row in rows if row["causal"]]
    legend = "\n".join(f"{k}  {row['row']}" for k, row in enumerate(causal, 1))
    figure.text(1.01, 0.5, legend, fontsize=8, va="center")
    words = [title, "dotted: the best for its time"]
    figure.suptitle("\n".join(filter(None, words)), fontsize=10)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def load(artifact, tune, env):
    """(run, its Config, model, tuning text, text to score). Raises BadInput."""
    run, c, model, val = audit.load(artifact, {**env, "EVALS": "none"})
    other = t.ValData(dataclasses.replace(c, data_path=str(tune)), run.ranks)
    if Head(other, 1024).tokens.equal(Head(val, 1024).tokens):
        raise t.BadInput(
            f"--tune {tune}: begins as the text to score does; rates are chosen on other text."
        )
    return run, c, model, other, val


@console.tool
def main(argv=None):
    """Choose, score, draw."""
    parser = console.Parser("ladder", __doc__)
    parser.add_argument("--artifact", help="final_model.ptz to evaluate")
    parser.add_argument("--run-id", required=True, help="NAME or FOLDER/NAME of the log, new")
    parser.add_argument("--tune", help="DATA_PATH of the text that rates are chosen on")
    for name, default, what in (
        ("--targets", t.MAX_INT, "of the text to score, at most (all)"),
        ("--tune-targets", 65536, "of the tuning text, at most (65,536)"),
    ):
        parser.add_argument(
            name, type=console.number(int, 1, t.MAX_INT), default=default, help=what
        )
    parser.add_argument(
        "--rung",
        action="append",
        choices=RUNGS,
        metavar="NAME",
        help=f"only this one and sliding, may be repeated ({'; '.join(RUNGS)})",
    )
    parser.add_argument("--title", default="", help="title of the figure")
    parser.add_argument("--redraw", action="store_true", help="only draw the figure again")
    args = parser.parse_args(argv)
    if args.redraw:
        folder = Path("logs") / args.run_id
        draw(ablate.read_results(folder, "ladder.csv"), folder / "ladder.png", args.title)
        return 0
    if not args.artifact or not args.tune:
        raise t.BadInput("--artifact and --tune are needed; see --help.")
    env = {**os.environ, "RUN_ID": args.run_id, "RESUME": "0"}
    run, c, model, tune, val = load(args.artifact, args.tune, env)
    tune, val = Head(tune, args.tune_targets), Head(val, args.targets)
    rungs = [name for name in RUNGS if not args.rung or name in ("sliding", *args.rung)]
    for row in ladder_rows({name: RUNGS[name][0] for name in rungs}).values():
        ablate.parse_row(row, env, c)  # before anything is written: the settings go together
    run.log.start()
    chosen = chosen_rows(run, model, tune, env, c, rungs)
    rows = [
        (*ablate.parse_row(f"{name}={row}", env, c), name, {})
        for name, row in ladder_rows(chosen).items()
    ]
    mixes = {name: of for name, of in MIXES.items() if of and rungs_of(name) <= {*rungs}}
    results = ablate.ablate(run, model, val, rows, mixes)
    if run.ranks.rank == 0:
        ablate.write_results(results, run.log.folder / "ladder.csv")
        draw(results, run.log.folder / "ladder.png", args.title)
        print("\n".join(ablate.table(results)))
    return 0


if __name__ == "__main__":
    console.run(main)
