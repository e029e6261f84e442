"""The table of a finished run: bits per byte of every evaluator, bytes, seconds, and general compressors for scale.

    python tools/summary.py logs/RUN_ID                       print it
    python tools/summary.py logs/RUN_ID --update README.md    also put it between the run's markers in a file
"""
import argparse
import gzip
import json
import lzma
import re
import sys
from pathlib import Path

ORDER = ("final_float_roundtrip", "final_int6_roundtrip", "final_int6_sliding_window", "final_int6_ttt", "final_int6_ttt_slot", "final_int6_slot")


def read_run(folder):
    """label -> fields of a run's metrics.jsonl. Raises SystemExit with a message if it is not there or not finished."""
    path = Path(folder) / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as why:
        sys.exit(f"error: {path}: {why}; give the folder logs/RUN_ID of a run")
    found = {row["label"]: row for row in rows if "train_loss" not in row}
    if "eval_total" not in found:
        sys.exit(f"error: {path}: the run did not finish, it has no eval_total line")
    return found


def validation_text(settings):
    """UTF-8 bytes of the text that the run scored, or None if its shards or tokenizer are not here."""
    import numpy as np
    import sentencepiece

    shards = sorted(Path(settings["DATA_PATH"]).glob("fineweb_val_*.bin"))
    if not shards or not Path(settings["TOKENIZER_PATH"]).is_file():
        return None
    tokens = np.concatenate([np.fromfile(p, "<u2")[512:] for p in shards])
    n = (len(tokens) - 1) // settings["EVAL_SEQ_LEN"] * settings["EVAL_SEQ_LEN"]
    tokens = tokens[:n + 1].tolist()
    sp = sentencepiece.SentencePieceProcessor(model_file=settings["TOKENIZER_PATH"])
    starts = [i for i, token in enumerate(tokens) if token == sp.bos_id()] + [len(tokens)]
    if starts[0]:  # the stream begins inside a document
        starts.insert(0, 0)
    pieces = [[token for token in tokens[a:b] if not sp.is_control(token)] for a, b in zip(starts, starts[1:])]
    return "".join(map(sp.decode, pieces)).encode()


def compressors(run):
    """(name, bits per byte) of general compressors on the run's validation text; measured there and then or []."""
    text = validation_text(run["settings"])
    if text is None:
        return []
    sizes = {"gzip -9": len(gzip.compress(text, 9)), "xz -9": len(lzma.compress(text, preset=9))}
    return [(name, 8 * size / len(text)) for name, size in sizes.items()]


def table(run, scale=()):
    """Lines of a Markdown table that also reads well as text."""
    rows = [("score", "val_bpb", "causal", "seconds")]
    for label in ORDER:
        if label in run:
            row = run[label]
            rows.append((label, f"{row['val_bpb']:.4f}", "yes" if row["causal"] else f"no (breaks {row['breaks']})", f"{row['eval_time'] / 1000:.1f}"))
    rows += [(f"{name} on the same text", f"{bpb:.4f}", "yes", "") for name, bpb in scale]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return lines


def facts(run):
    """One line each on training, the artifact and the time of everything."""
    settings, lines = run["settings"], []
    row = next(row for label, row in run.items() if label.startswith("final_"))
    if "training" in run:
        done, quantised, size = run["training"], run["quantised"], run["artifact"]
        lines += [f"Training: seed {settings['SEED']}, {done['steps']} steps, {done['tokens']:,} tokens, {done['train_time'] / 1000:.1f} s.",
                  f"Artifact: {size['model_bytes']:,} bytes + {size['code_bytes']:,} bytes of code = {size['total_bytes']:,}; quantising and "
                  f"compressing {quantised['seconds']:.1f} s."]
    return lines + [f"Evaluation: {row['tokens']:,} targets, {row['bytes']:,} bytes; all evaluators of the artifact together "
                    f"{run['eval_total']['eval_time'] / 1000:.1f} s."]


def update(path, name, text):
    """Replace what stands between the markers of a run in a file. Raises SystemExit if they are not there."""
    old = Path(path).read_text()
    new, count = re.subn(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", lambda m: m[1] + text + m[2], old, flags=re.S)
    if count != 1:
        sys.exit(f"error: {path}: needs the markers <!-- {name} --> and <!-- end --> once, has them {count} times")
    Path(path).write_text(new)


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="logs/RUN_ID")
    parser.add_argument("--update", metavar="FILE", help="put the table between <!-- RUN_ID --> and <!-- end --> in this file")
    options = parser.parse_args()
    run = read_run(options.folder)
    print("\n".join(["", *table(run, compressors(run)), "", *facts(run)]))
    if options.update:
        update(options.update, Path(options.folder).name, "\n".join([*table(run), "", *facts(run), ""]))


if __name__ == "__main__":
    main()
