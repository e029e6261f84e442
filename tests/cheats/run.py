"""How many of the planted cheats an audit finds, and whether it suspects the honest: a row of JSON a case.

    PYTHONPATH=. python tests/cheats/run.py --seeds 20 --out logs/audits/cheats.jsonl

Weights, text and audit are other ones for each seed; the audit's settings are the defaults of --adapter. Cases that are in the
file already are not done again.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from planted import CHEATS, HONEST, Model, cases, scorer

from tools import blackbox


def audited(name, place, seed, vocab_size=32, targets=1024):
    """The box of a case after an audit."""
    model = Model(vocab_size, seed)
    score = scorer({**HONEST, **CHEATS}[name], place, model)
    return blackbox.Box(score, vocab_size, model.text(targets, seed), (), seed).examine(256, 8)


def every_case():
    """(name, place) of the honest ones and of the cheats."""
    return [*((name, "everywhere") for name in HONEST), *cases()]


def main():
    """Run the cases that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    done = set()
    if args.out.exists():
        done = {(row["name"], row["place"]) for row in map(json.loads, args.out.open())}
    for name, place in every_case():
        if (name, place) in done:
            continue
        boxes = [audited(name, place, seed) for seed in range(args.seeds)]
        row = dict(name=name, place=place, honest=name in HONEST, seeds=args.seeds)
        row |= dict(vocab_size=boxes[0].V, targets=boxes[0].n)
        row |= dict(found=sum(bool(box.broken()) for box in boxes))
        row |= dict(by=dict(sorted(Counter(c for box in boxes for c in box.broken()).items())))
        row |= dict(runs=sum(box.runs for box in boxes) / len(boxes))
        with args.out.open("a") as f:
            f.write(json.dumps(row) + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    main()
