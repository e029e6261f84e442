"""Figures of seed logs: training curves, the score along the validation stream, and what each stage adds."""

import math
from pathlib import Path

import numpy as np

from tools.tables import read_nats

LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))  # told apart in black and white too
STEPS = (
    ("before\naveraging", "prequant"),
    ("float", "averaged"),
    ("artifact", "roundtrip"),
    ("sliding", "sliding_window"),
    ("TTT", "ttt"),
    ("TTT\n+SLOT", "ttt_slot"),
    ("TTT\n+CTW", "ttt_ctw"),
    ("SLOT", "slot"),
    ("CTW", "ctw"),
)  # the last two start from sliding


def name(log):
    """Legend of a log."""
    return (
        log.path.stem
        if log.seed is None or str(log.seed) in log.path.stem
        else f"{log.path.stem}, seed {log.seed}"
    )


def smooth(values, window):
    """Running mean over window values on each side, shorter at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    low, high = (np.clip(np.arange(len(values)) + d, 0, len(values)) for d in (-window, window + 1))
    return (total[high] - total[low]) / (high - low)


def curves(axes, logs, by_time):
    """Training loss and validation loss against tokens or time."""
    for k, log in enumerate(logs):
        style = dict(ls=LINES[k % len(LINES)], color=f"{0.18 * (k // len(LINES) % 4):.2f}", lw=1.2)
        scale = 1 / 60_000 if by_time else (log.batch_tokens or 1) / 1e6
        train = log.train[np.isfinite(log.train[:, 1])]
        if len(train):
            x = train[:, 2 if by_time else 0] * scale
            axes.plot(
                x,
                smooth(train[:, 1], max(1, len(x) // 60)),
                label=f"{name(log)}, training",
                **style,
            )
        if log.validation:
            points = np.array([(v[3] if by_time else v[0], v[1]) for v in log.validation])
            axes.plot(
                points[:, 0] * scale,
                points[:, 1],
                ls="none",
                marker="osD^v"[k % 5],
                ms=4,
                mfc="white",
                color=style["color"],
                label=f"{name(log)}, validation",
            )
    axes.set_xlabel("training time, minutes" if by_time else "training tokens, millions")
    axes.set_ylabel("loss, nats a token")
    tail = [
        y
        for y in (
            y
            for log in logs
            for y in [
                *log.train[log.train[:, 0] > 0.03 * (log.steps or 0), 1],
                *(v[1] for v in log.validation[1:]),
            ]
        )
        if math.isfinite(y)
    ]
    axes.set_title("loss over training " + ("time" if by_time else "tokens"))
    if tail:
        axes.set_ylim(
            min(tail) - 0.05 * (max(tail) - min(tail)) - 1e-3,
            max(tail) + 0.05 * (max(tail) - min(tail)) + 1e-3,
        )
    axes.grid(lw=0.3)


def running(log):
    """[n,2]: share of the validation stream, bits a byte up to there. From the log, or from the nats that a run saved."""
    if len(log.running):
        return log.running
    if not log.score:
        return np.zeros((0, 2))
    path = log.path.with_suffix("") / f"nll_{log.score.stage}.npy"
    if not path.is_file():
        return np.zeros((0, 2))
    nats = read_nats(path)
    at = np.linspace(len(nats) // 200 + 1, len(nats), 200).astype(int)
    return np.stack(
        [at / len(nats), np.cumsum(nats)[at - 1] / at * log.score.val_bpb / log.score.val_loss], 1
    )


def stream(axes, logs):
    """Bits a byte up to each place of the validation stream."""
    drawn = False
    for k, log in enumerate(logs):
        points = running(log)
        if len(points):
            axes.plot(
                100 * points[:, 0],
                points[:, 1],
                ls=LINES[k % len(LINES)],
                color=f"{0.18 * (k // len(LINES) % 4):.2f}",
                lw=1.2,
                label=name(log),
            )
            drawn = True
    if not drawn:
        axes.text(
            0.5,
            0.5,
            "the logs do not say\n(SAVE_NLL=1 keeps it)",
            ha="center",
            va="center",
            transform=axes.transAxes,
        )
    axes.set(
        xlabel="share of the validation stream scored, %",
        ylabel="score so far, bits a byte",
        title="score along the stream"
        + ", as rank 0 logged its part" * any(len(log.running) for log in logs),
    )
    axes.grid(lw=0.3)


def waterfall(axes, logs):
    """Mean score after each stage and what it changed; hatched where it is not causal."""
    found = []
    for label, stage in STEPS:
        results = [
            getattr(log, stage) if stage in ("prequant", "averaged") else log.results.get(stage)
            for log in logs
        ]
        if all(results):
            found.append(
                (
                    label,
                    float(np.mean([r.val_bpb for r in results])),
                    any(r.causal is False for r in results),
                )
            )
    if not found:
        axes.text(
            0.5,
            0.5,
            "no stage that all logs have",
            ha="center",
            va="center",
            transform=axes.transAxes,
        )
        return
    values = [v for _, v, _ in found]
    low, span = min(values), max(max(values) - min(values), 1e-4)
    names = [label for label, *_ in found]
    for k, (label, value, leaks) in enumerate(found):
        base = {"SLOT": "sliding", "CTW": "sliding", "TTT\n+SLOT": "TTT", "TTT\n+CTW": "TTT"}.get(
            label
        )
        last = values[names.index(base) if base in names else k - 1] if k else value
        if k:
            axes.bar(
                k,
                value - last,
                bottom=last,
                color="0.85" if value <= last else "0.45",
                edgecolor="black",
                lw=0.8,
                hatch="///" if leaks else None,
            )
            axes.plot([k - 1.4, k + 0.4], [last, last], color="black", lw=0.6)
        else:
            axes.bar(
                k,
                value - (low - 0.25 * span),
                bottom=low - 0.25 * span,
                color="white",
                edgecolor="black",
                lw=0.8,
            )
        text = f"{value:.4f}" + (
            f"\n{value - last + 0.0:+.4f}".replace("-0.0000", "+0.0000") if k else ""
        )
        axes.annotate(
            text,
            (k, max(value, last)),
            textcoords="offset points",
            xytext=(0, 3),
            ha="center",
            fontsize=7,
        )
    axes.set_xticks(range(len(found)), [label for label, *_ in found], fontsize=8)
    axes.set(
        ylim=(low - 0.25 * span, max(values) + 0.3 * span),
        ylabel="bits a byte",
        title="what each stage changes (hatched: not causal)",
    )


def draw(logs, path):
    """Write PATH.png and PATH.svg; their names."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "1", "font.size": 9}):
        figure = Figure(figsize=(11, 8), layout="constrained")
        (a, b), (c, d) = figure.subplots(2, 2)
        curves(a, logs, False)
        curves(b, logs, True)
        stream(c, logs)
        waterfall(d, logs)
        handles, labels = a.get_legend_handles_labels()
        if handles:
            figure.legend(
                handles,
                labels,
                loc="outside lower center",
                ncols=min(4, math.ceil(len(labels) / 3)),
                fontsize=7,
                frameon=False,
            )
        path = Path(path)
        path = path.with_suffix("") if path.suffix in (".png", ".svg") else path
        figure.savefig(f"{path}.png", dpi=120)
        figure.savefig(f"{path}.svg", metadata={"Date": None})
    return [f"{path}.png", f"{path}.svg"]
