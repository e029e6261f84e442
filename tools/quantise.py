"""Quantise the weights of ONE checkpoint in several ways and byte budgets, without training, and say what each costs.

    PRESET=demo python -m tools.quantise --checkpoint logs/my_run/checkpoint.000000400.ckpt --run-id my_quantisers --bytes 560000 \\
        QUANT=rd "small=QUANT=gptq CALIBRATION_TOKENS=4096"

A row is settings, with NAME= in front if it needs a name: QUANT, CODER and CALIBRATION_TOKENS. Settings of the model and of
the data come from the environment, as trained. --bytes is the artifact's size without code, 0 the finest steps there are; each is tried with
each row. --average takes ema or swa instead of the last weights.

    python -m tools.quantise --table logs/my_quantisers    # the same as a table in Markdown

A line says the bytes, those of the levels with the entropy of their distributions, val_loss less that of the weights themselves
(the damage) with its standard error over sequences, seconds to calibrate, to quantise and to load. The validation split is only scored.

Writes logs/RUN_ID.txt and logs/RUN_ID/metrics.jsonl. Exit status: 0 done, 2 bad input.
"""

import sys

if not __package__:
    print("error: the tools are a package: python -m tools.quantise ...", file=sys.stderr)
    sys.exit(2)

from tools import console

if __name__ == "__main__":
    console.begin()

import os
import re
from pathlib import Path
from time import perf_counter

import train_gpt as t

KNOWN = ("QUANT", "CODER", "CALIBRATION_TOKENS")


def parse_row(text, env):
    """(name, Config) of a row. Raises BadInput."""
    match = re.fullmatch(r"(?:(\w+)=(?=\w+=))?(\w+=\S+(?: +\w+=\S+)*)", text)
    given = dict(word.split("=", 1) for word in match[2].split()) if match else {}
    if not match or set(given) - set(KNOWN):
        raise t.BadInput(f"{text!r}: a row is [NAME=]SETTING=VALUE ..., of {', '.join(KNOWN)}.")
    return match[1] or match[2].replace(" ", ","), t.load_config({**env, **given})


def nats(c, run, model, val):
    """Nats of each target, disjoint windows, as float64 [N]."""
    return t.score(run, model, val, [("roundtrip", c)])[0][0].double()


def compare(run, c, model, val, data, rows, budgets):
    """Log a line for each row and budget; returns them."""
    before, state, found = (
        nats(c, run, model, val),
        {n: p.clone() for n, p in model.state_dict().items()},
        {},
    )
    run.log.metric(
        "unquantised",
        val_loss=before.mean().item(),
        tokens=val.n,
        weights=sum(p.numel() for p in model.parameters()),
    )
    for name, config in rows:
        began = perf_counter()
        calibration = None
        if config.quant != "gptq_lite":
            calibration = t.calibrate(config, run.ranks, model, data)
        calibrated = perf_counter() - began
        for budget in budgets:
            began = perf_counter()
            quantizer = t.make_quantizer(config, state, calibration)
            quantizer.refuse_large()
            try:
                blob, figures = quantizer.fit(budget or 10**12)
            except t.Fault:
                run.log.line(f"{name}@{budget} does not fit at any step")
                continue
            packed = perf_counter()
            t.load_state(model, t.unpack(blob)[0], "artifact")
            loaded = perf_counter()
            change = (nats(c, run, model, val) - before).view(-1, c.eval_seq_len).mean(1)
            label = f"{name}@{budget or 'finest'}"
            found[label] = dict(
                model_bytes=len(blob),
                **figures,
                damage=change.mean().item(),
                error=(change.std() / len(change) ** 0.5).item(),
                calibrate=calibrated,
                quantise=packed - began,
                load=loaded - packed,
            )
            run.log.metric(label, **found[label])
            model.load_state_dict(state)
    return found


def table_row(row):
    """A row of metrics.jsonl as a line of Markdown."""
    name = row["label"].split("@")[0].replace(",", " ")
    more = row["level_bytes"] / row["entropy_bytes"] - 1
    return (
        f"| {name} | {row['model_bytes']:,} B | {more:+.1%} | {row['damage']:.5f} | {row['error']:.5f} | "
        f"{row['quantise']:.0f} s | {row['load']:.1f} s |"
    )


def table(folder):
    """Lines of a Markdown table of what main() wrote into a folder."""
    lines = [
        "| quantiser | artifact | levels over their entropy | val_loss lost | standard error | quantised in | loaded in |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    path = Path(folder) / "metrics.jsonl"
    rows = [row for row in console.read_rows(path) if "damage" in row]
    try:
        lines += map(table_row, rows)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        raise t.BadInput(f"{path}: a row has not what this tool wrote; quantise again.") from None
    return lines


@console.tool
def main(argv=None):
    """Run the rows."""
    parser = console.Parser("quantise", __doc__)
    parser.add_argument(
        "--table", metavar="FOLDER", help="only print what was written there before"
    )
    parser.add_argument("--checkpoint", help="checkpoint.STEP.ckpt of a run")
    parser.add_argument(
        "--run-id", help="NAME or FOLDER/NAME of the log and folder in logs/, which must be new"
    )
    parser.add_argument(
        "--average", choices=("ema", "swa"), help="quantise this average of the checkpoint"
    )
    parser.add_argument(
        "--bytes",
        action="append",
        type=console.number(int, 0, t.MAX_INT),
        help="size of the artifact without code; 0: the finest steps",
    )
    parser.add_argument("rows", nargs="*", help="settings of quantising")
    args = parser.parse_args(argv)
    if args.table:
        print("\n".join(table(args.table)))
        return 0
    if not (args.checkpoint and args.run_id and args.rows):
        raise t.BadInput("--checkpoint, --run-id and at least one row are needed; see --help.")
    env = {
        **os.environ,
        "RUN_ID": args.run_id,
        "LOAD_CHECKPOINT": args.checkpoint,
        "RESUME": "0",
        "EVALS": "none",
    }
    c = t.load_config(env)
    rows = [parse_row(text, env) for text in args.rows]
    console.refuse_repeated(name for name, _ in rows)
    kind = f"{args.average}." if args.average else ""
    tensors = t.read_checkpoint(args.checkpoint)
    there = {n.removeprefix(kind): w for n, w in tensors.items() if n.startswith(kind)}
    if not there:
        raise t.BadInput(f"--average {args.average}: {args.checkpoint} has no such average.")
    run = t.Run(c)
    model, val, data = (
        t.GPT(c).to(run.ranks.device),
        t.ValData(c, run.ranks),
        t.TrainData(c, run.ranks),
    )
    names = dict(model.named_parameters())
    own = {n: w for n, w in there.items() if n in names}
    t.copy_tensors(c, names, own, f"LOAD_CHECKPOINT={args.checkpoint}")
    run.log.start()
    compare(run, c, model, val, data, rows, list(dict.fromkeys(args.bytes or [0])))
    return 0


if __name__ == "__main__":
    console.run(main)
