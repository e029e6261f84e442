"""Evaluate ONE artifact under several settings, without training, and say which differences are real.

    python -m tools.ablate --artifact logs/my_run/final_model.ptz --run-id my_ablation \\
        sliding_window pr1084 pr1313 "context=slot SLOT_DELTA=window SLOT_LOSS=context" "ttt TTT_LR=0.004"
    python -m tools.ablate --artifact logs/my_run/final_model.ptz --run-id slot/my_sweep \\
        --grid SLOT_STEPS=1,3,24 --grid SLOT_LR=0.001,0.01 sliding_window slot
    python -m tools.ablate --run-id slot/my_sweep --redraw    # only the figure

A row is an evaluator or a preset (of which the settings of evaluation count: SLOT_*, TTT_*, CTW_*, MIX_*, EVAL_STRIDE), then
settings, with a name in front if it needs one; a row `mix` mixes the causal rows before it. Settings for all rows come from the environment. The first row is what the others are
compared with. --grid crosses each row that reads the settings named with their values.

The interval is that of a paired bootstrap over documents: 95 % of 9,999 resamples. Rows with equal windows and training share a
pass over the model, so 75 SLOT settings cost one sliding evaluation and 75 times what SLOT adds.

Writes logs/RUN_ID.txt and in logs/RUN_ID/: metrics.jsonl, ablate.csv, ablate.png. Exit status: 0 done, 2 bad input.
"""

import sys

if not __package__:
    print("error: the tools are a package: python -m tools.ablate ...", file=sys.stderr)
    sys.exit(2)

from tools import console

if __name__ == "__main__":
    console.begin()

import csv
import io
import itertools
import math
import os
import re
from pathlib import Path

import numpy as np
import torch
from scipy import stats

import train_gpt as t
from tools import audit

EVALUATION = ("SLOT_", "TTT_", "CTW_", "MIX_", "EVAL_STRIDE")
HATCHES = {True: "", False: "///"}  # a grey print shows it too
MARKERS = (("o", 9), ("s", 9), ("^", 4), ("D", 4), ("v", 5), ("x", 5), ("*", 5))  # and their sizes
COLOURS = {True: "#2a78b5", False: "#c8553d"}  # causal, not causal; apart for colour-blind eyes too


def parse_row(text, env, base):
    """(name, evaluator, Config) of a row's words; base: the artifact's Config. Raises BadInput."""
    names = "|".join((*t.EVALUATORS, *t.PRESETS))
    match = re.fullmatch(rf"(?:([^=]+)=)?({names})((?: +\w+=\S*)*)", text)
    if not match:
        raise t.BadInput(
            f"{text!r}: a row is [NAME=]EVALUATOR or [NAME=]PRESET, then SETTING=VALUE; evaluators: {', '.join(t.EVALUATORS)}; presets: "
            f"{', '.join(t.PRESETS)}."
        )
    name, first, rest = match.groups()
    given = dict(w.split("=", 1) for w in rest.split())
    wrong = [n for n in given if not n.startswith(EVALUATION)]
    if wrong:
        raise t.BadInput(
            f"{text!r}: {wrong[0]} is no setting of evaluation; allowed: those that begin with {', '.join(EVALUATION)}."
        )
    # the artifact's model settings, then the environment, then the preset's evaluation, then the row's own
    preset = {k: v for k, v in t.PRESETS.get(first, {}).items() if k.startswith(EVALUATION)}
    shape = {n: t.shown(getattr(base, n.lower())) for n in t.MODEL_SETTINGS}
    label = first if first in t.EVALUATORS else None
    mixes = label and t.EVALUATORS[label].mixes
    evals = label if label and not mixes else "roundtrip" if mixes else "auto"
    c = t.load_config({**env, **shape, **preset, **given, "EVALS": evals})
    return name or text, label or c.evals[-1], c


def grid_value(name, text):
    """Value of a grid's setting. Raises BadInput."""
    try:
        return t.parse_value(t.SETTINGS[name], text)
    except ValueError as why:
        raise t.BadInput(f"--grid {name}={text}: {why}.") from None


def cross(rows, grid):
    """Rows times the grid's values where a row's evaluator reads them."""
    found = []
    for row in rows:
        reads = [
            g
            for g in grid
            if g[0].split("_")[0].lower() in row[1]
            or (g[0].startswith("EVAL_") and row[1] != "roundtrip")
        ]
        for values in itertools.product(*(values for _, values in reads)):
            changes = {n.lower(): grid_value(n, v) for (n, _), v in zip(reads, values)}
            name = " ".join([row[0], *(f"{n}={v}" for (n, _), v in zip(reads, values))])
            found.append(
                (
                    name,
                    row[1],
                    t.dataclasses.replace(row[2], **changes),
                    row[0],
                    dict(zip((n for n, _ in reads), values)),
                )
            )
    return found


def documents(tokens, bos=1):
    """Number of the document [N] that each target belongs to: a new one begins at every token bos."""
    return np.cumsum(tokens[1:] == bos)


def interval(nats, other, doc, size):
    """(difference in bits per byte of nats [N] to other [N], low, high): 95 % by a paired bootstrap over documents."""
    count = int(doc.max()) + 1
    d, b = (np.bincount(doc, x, count) for x in ((nats - other) / math.log(2), size.astype(float)))
    d, b = d[b > 0], b[b > 0]
    point = d.sum() / b.sum()
    if len(d) < 2 or not d.any():
        return point, point, point
    found = stats.bootstrap(
        (d, b),
        lambda d, b, axis: d.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=9999,
        batch=500,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return point, found.low, found.high


def mixed_rows(rows, k, of=None):
    """Numbers of the rows that row k, a mixture, mixes: the causal ones before it, or of those the ones named. Raises BadInput for
    fewer than two."""
    found = [
        j
        for j, (name, label, c, *_) in enumerate(rows[:k])
        if not t.EVALUATORS[label].mixes and not t.broken_conditions(c, label)
        if of is None or name in of
    ]
    if len(found) < 2:
        raise t.BadInput(f"{rows[k][0]!r}: needs two causal rows before it, or more.")
    return found


def passes_of(rows):
    """Numbers of the rows that each pass over the model scores: those with equal windows, training, and rows of the last block."""
    passes = {}
    for k, (_, label, c, *_) in enumerate(rows):
        if t.EVALUATORS[label].mixes:
            continue
        slot = label.endswith("slot")
        shared = [v for n, v in vars(c).items() if n.startswith(("ttt_", "eval_s", "val_batch"))]
        shared.append(slot and t.Slot.looks_at_all_rows(c))
        batch = c.slot_batch_seqs if slot else None
        key = (t.pass_of(label), tuple(shared) if label != "roundtrip" else ())
        same = next(
            (p for p in passes if p[0] == key and (p[1] is None or batch is None or p[1] == batch)),
            None,
        )
        members = passes.pop(same, []) if same else []
        passes[key, batch if same is None or same[1] is None else same[1]] = [*members, k]
    return list(passes.values())


def score_rows(run, model, val, rows, mixes):
    """[(nats [N] fp64, seconds)] of rows, pass by pass, then the mixtures. mixes: as in ablate()."""
    found = [None] * len(rows)
    trunk = {}  # row: (its pass, seconds that the pass's rows share)
    for number, members in enumerate(passes_of(rows)):
        watch = t.Stopwatch(run.ranks, len(members))
        with t.put_back(model.parameters()):
            results = t.score(run, model, val, [rows[k][1:3] for k in members], watch=watch)
        seconds_shared = watch.elapsed() - watch.by_method().sum()
        for k, (nats, seconds) in zip(members, results):
            found[k] = nats.double().cpu().numpy(), seconds
            trunk[k] = number, seconds_shared
    for k, (name, label, c, *_) in enumerate(rows):
        if t.EVALUATORS[label].mixes:
            parts = mixed_rows(rows, k, mixes.get(name))
            nats, weights = t.mixture(c, torch.from_numpy(np.stack([found[j][0] for j in parts])))
            # what the rows of a pass share counts once
            own = sum(found[j][1] - trunk[j][1] for j in parts)
            found[k] = nats.numpy(), own + sum(dict(trunk[j] for j in parts).values())
            named = " ".join(f"{rows[j][0]}: {w:.4f}" for j, w in zip(parts, weights))
            run.log.line(f"mean weights of {name}: {named}")
    return found


def bar_chart(rows, path, title):
    """Differences to the first row with their intervals; what is not causal is hatched."""
    from matplotlib.figure import Figure

    rows = rows[1:] or rows
    figure = Figure(figsize=(8, 1.6 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for k, row in enumerate(rows):
        axes.barh(
            k,
            row["diff"],
            color=COLOURS[row["causal"]],
            hatch=HATCHES[row["causal"]],
            edgecolor="white",
            xerr=[[row["diff"] - row["low"]], [row["high"] - row["diff"]]],
            error_kw=dict(capsize=3, lw=1),
        )
    axes.set_yticks(range(len(rows)), [row["row"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="black", lw=0.8)
    axes.set_xlabel("difference in val_bpb to the first row, 95 % interval (left is better)")
    axes.set_title(title, fontsize=10)
    found = {row["causal"] for row in rows}
    figure.legend(
        handles=handles(found), loc="outside lower center", ncols=2, fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=130)


def handles(found):
    """Legend of the kinds of rows that were found."""
    from matplotlib.patches import Patch

    labels = {True: "causal", False: "not causal: no compression result"}
    return [
        Patch(facecolor=COLOURS[kind], hatch=HATCHES[kind], edgecolor="white", label=label)
        for kind, label in labels.items()
        if kind in found
    ]


def line_chart(rows, path, title, steps):
    """Difference over the values of one setting, a line for each row and a panel for each value of the others."""
    from matplotlib.figure import Figure

    swept = [row for row in rows if steps in row["grid"]]
    panels = sorted(
        {tuple((k, v) for k, v in row["grid"].items() if k != steps) for row in swept},
        key=lambda p: [float(v) for _, v in p],
    )
    figure = Figure(figsize=(1 + 3.6 * len(panels), 4.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels):
        names = dict.fromkeys(row["base"] for row in swept)
        # rings and crosses: two rows that lie on each other are both seen
        for name, (marker, size) in zip(names, itertools.cycle(MARKERS)):
            line = [
                row
                for row in swept
                if row["base"] == name and all(row["grid"][k] == v for k, v in panel)
            ]
            x, y = [float(row["grid"][steps]) for row in line], [row["diff"] for row in line]
            span = [
                [row["diff"] - row["low"] for row in line],
                [row["high"] - row["diff"] for row in line],
            ]
            axes.errorbar(
                x,
                y,
                span,
                marker=marker,
                ms=size,
                mfc="none" if size > 5 else None,
                lw=1.4,
                capsize=2,
                color=COLOURS[line[0]["causal"]],
                ls="-" if line[0]["causal"] else "--",
                label=name,
            )
        axes.axhline(0, color="black", lw=0.8)
        axes.set(xscale="log", xlabel=steps, title=", ".join(f"{k}={v}" for k, v in panel))
        axes.set_xticks(
            sorted({float(row["grid"][steps]) for row in swept}),
            sorted({int(row["grid"][steps]) for row in swept}),
            minor=False,
        )
        axes.minorticks_off()
        axes.set_yscale("symlog", linthresh=0.003)
        axes.grid(axis="y", lw=0.3)
    figure.axes[0].set_ylabel(
        "difference in val_bpb to the first row\n(linear within 0.003, then logarithmic)"
    )
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        fontsize=8,
        frameon=False,
    )
    figure.suptitle(
        f"{title}\nsolid blue: causal; dashed red: not causal, no compression result", fontsize=10
    )
    figure.savefig(path, dpi=130)


def table(rows):
    """Rows as lines of Markdown."""
    lines = [
        "| row | val_bpb | difference | 95 % interval | causal | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        causal = "yes" if row["causal"] else f"no ({row['breaks']})"
        lines.append(
            f"| {row['row']} | {row['val_bpb']:.4f} | {row['diff']:+.4f} | {row['low']:+.4f} to {row['high']:+.4f} | {causal} | {row['seconds']:.1f} |"
        )
    return lines


def ablate(run, model, val, rows, mixes=None):
    """Results of rows as dicts, in their order; logs a line for each. mixes: {mixture: names of its rows}; else all that are causal."""
    scored, results = score_rows(run, model, val, rows, mixes or {}), []
    doc, base = documents(val.tokens.cpu().numpy()), None
    for (name, label, c, family, grid), (nats, seconds) in zip(rows, scored):
        base = nats if base is None else base
        loss, bpb = t.mean_and_bpb(val, torch.from_numpy(nats), f"ablate_{name}")
        diff, low, high = interval(nats, base, doc, val.bytes)
        broken = t.broken_conditions(c, label)
        run.log.metric(
            f"ablate_{name}",
            evaluator=label,
            val_loss=loss,
            val_bpb=bpb,
            diff=diff,
            low=low,
            high=high,
            causal=not broken,
            breaks=broken or "none",
            seconds=seconds,
            tokens=val.n,
            bytes=val.total_bytes,
            documents=int(doc.max()) + 1,
        )
        results.append(
            dict(
                row=name,
                evaluator=label,
                val_loss=loss,
                val_bpb=bpb,
                diff=diff,
                low=low,
                high=high,
                causal=not broken,
                breaks=broken,
                seconds=seconds,
                base=family,
                grid=grid,
            )
        )
    return results


def draw(results, folder, title):
    """The figure: lines over SLOT_STEPS if that was swept, else bars."""
    chart = line_chart if any("SLOT_STEPS" in row["grid"] for row in results) else bar_chart
    chart(results, folder / "ablate.png", title, *(["SLOT_STEPS"] if chart is line_chart else []))


def write_results(results, path):
    """Write results as a table."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, results[0])
        writer.writeheader()
        writer.writerows(
            {**row, "grid": " ".join(f"{k}={v}" for k, v in row["grid"].items())} for row in results
        )


def read_results(folder, name="ablate.csv"):
    """Results as written to a folder's table. Raises BadInput."""
    path = folder / name
    if not path.is_file():
        raise t.BadInput(f"{folder}: has no {name}; give the RUN_ID of an ablation in logs/.")
    rows = list(csv.DictReader(io.StringIO(console.read_text(path), newline="")))
    try:
        for row in rows:
            for key in ("val_loss", "val_bpb", "diff", "low", "high", "seconds"):
                row[key] = float(row[key])
            row["causal"] = row["causal"] == "True"
            row["grid"] = dict(w.split("=") for w in row["grid"].split())
            row["row"], row["base"]
    except (KeyError, ValueError, TypeError, AttributeError):
        rows = []
    if not rows:
        raise t.BadInput(f"{path}: is no table of an ablation; bring it back, or ablate again.")
    return rows


@console.tool
def main(argv=None):
    """Run the rows."""
    parser = console.Parser("ablate", __doc__)
    parser.add_argument("--artifact", help="final_model.ptz to evaluate")
    parser.add_argument(
        "--run-id",
        required=True,
        help="NAME or FOLDER/NAME of the log and folder in logs/, which must be new",
    )
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="NAME=A,B,...",
        help="values to cross rows with",
    )
    parser.add_argument("--title", default="", help="title of the figure")
    parser.add_argument(
        "--redraw", action="store_true", help="only draw the figure of an existing folder again"
    )
    parser.add_argument(
        "rows",
        nargs="*",
        help="evaluators or presets with settings; the first one is compared with",
    )
    args = parser.parse_args(argv)
    if args.redraw:
        folder = Path("logs") / args.run_id
        draw(read_results(folder), folder, args.title)
        return 0
    env = {**os.environ, "RUN_ID": args.run_id, "RESUME": "0"}
    if not args.artifact or not args.rows:
        raise t.BadInput("--artifact and at least one row are needed; see --help.")
    known = {name for name in t.SETTINGS if name.startswith(EVALUATION)}
    grid = [(g.partition("=")[0], g.partition("=")[2].split(",")) for g in args.grid]
    if [n for n, values in grid if n not in known or not values[0]]:
        raise t.BadInput(
            f"--grid {' '.join(args.grid)}: write SETTING=A,B with a setting of evaluation."
        )
    run, c, model, val = audit.load(args.artifact, {**env, "EVALS": "none"})
    rows = cross([parse_row(text, env, c) for text in args.rows], grid)
    console.refuse_repeated(row[0] for row in rows)
    for k, row in enumerate(rows):
        if t.EVALUATORS[row[1]].mixes:
            mixed_rows(rows, k)
    for _, _, row, *_ in rows:
        problems = t.cross_check(row)
        if problems:
            raise t.BadInput("\n".join(problems))
    run.log.start()
    results = ablate(run, model, val, rows)
    if run.ranks.rank == 0:
        write_results(results, run.log.folder / "ablate.csv")
        draw(results, run.log.folder, args.title or args.run_id)
        print("\n".join(table(results)), flush=True)
    return 0


if __name__ == "__main__":
    console.run(main)
