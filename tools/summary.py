"""The table of a finished run: bits per byte of every evaluator, bytes, seconds, and general compressors for scale.

    python tools/summary.py logs/RUN_ID...                    print it; of several seeds the mean and standard deviation
    python tools/summary.py logs/RUN_ID... --update README.md --submission submission.json
"""
import argparse
import gzip
import json
import lzma
import re
import statistics
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


def table(runs, scale=()):
    """Lines of a Markdown table that also reads well as text; of several runs, the mean and sample standard deviation."""
    rows = [("score", "val_bpb" if len(runs) == 1 else "val_bpb, mean and std", "causal", "seconds")]
    for label in ORDER:
        if all(label in run for run in runs):
            found = [run[label] for run in runs]
            bpb, seconds = ([row[key] for row in found] for key in ("val_bpb", "eval_time"))
            spread = f" {statistics.stdev(bpb):.4f}" if len(runs) > 1 else ""
            rows.append((label, f"{statistics.mean(bpb):.4f}{spread}", "yes" if found[0]["causal"] else f"no (breaks {found[0]['breaks']})",
                         f"{statistics.mean(seconds) / 1000:.1f}"))
    rows += [(f"{name} on the same text", f"{bpb:.4f}", "", "") for name, bpb in scale]
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
        lines += [f"- Seed {settings['SEED']}: {done['steps']} steps, {done['tokens']:,} tokens, {done['train_time'] / 1000:.1f} s of training.",
                  f"  Artifact {size['model_bytes']:,} bytes + code {size['code_bytes']:,} bytes = {size['total_bytes']:,}, quantised and "
                  f"compressed in {quantised['seconds']:.1f} s."]
    return lines + [f"  {row['tokens']:,} targets, {row['bytes']:,} bytes of text scored; all evaluators of the artifact took "
                    f"{run['eval_total']['eval_time'] / 1000:.1f} s."]


def update(path, folders, text):
    """Replace what stands between the markers of these runs in a file. Raises SystemExit if they are not there once."""
    name = " ".join(Path(folder).name for folder in folders)
    old = Path(path).read_text()
    new, count = re.subn(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", lambda m: m[1] + text + m[2], old, flags=re.S)
    if count != 1:
        sys.exit(f"error: {path}: needs the markers <!-- {name} --> and <!-- end --> once, has them {count} times")
    Path(path).write_text(new)


def submission(runs, folders):
    """The fields of submission.json that the logs bear out; null where they do not say. The score is the best causal one."""
    labels = [n for n in ORDER if n.startswith("final_int6") and all(n in run and run[n]["causal"] for run in runs)]
    label = min(labels, key=lambda n: statistics.mean(run[n]["val_bpb"] for run in runs))
    differ = {k for run in runs for k in run["settings"] if run["settings"][k] != runs[0]["settings"][k]} - {"SEED", "RUN_ID"}
    if differ:
        sys.exit(f"error: not one configuration: {', '.join(sorted(differ))} differ between {', '.join(map(str, folders))}")
    console = [Path(f"{folder}.txt").read_text().rsplit("=" * 100, 1)[1] for folder in folders]
    versions = [dict(re.findall(r"(torch|device|world_size):(\S+)", text)) for text in console]
    causal = all(run[label]["causal"] for run in runs)
    values = {key: [run[label][key] for run in runs] for key in ("val_loss", "val_bpb")}
    return {
        "name": "Parameter Golf SLOT record, reference implementation: demo configuration", "author": None, "github_id": None, "date": None,
        "track": "none: a demonstration on a CPU and embedded text, not an entry", "blurb": "Score-first TTT on the int6 artifact read back from disk.",
        **{key: statistics.mean(v) for key, v in values.items()},
        **{key + "_std": statistics.stdev(v) if len(v) > 1 else None for key, v in values.items()}, "std_ddof": 1, "metric": label,
        "causal": causal, "seeds": [run["settings"]["SEED"] for run in runs],
        "seed_results": {str(run["settings"]["SEED"]): {key: run[label][key] for key in values} for run in runs},
        "bytes_total": max(run["artifact"]["total_bytes"] for run in runs), "bytes_code": max(run["artifact"]["code_bytes"] for run in runs),
        "hardware": f"{versions[0]['device']}, {versions[0]['world_size']} process", "pytorch_version": versions[0]["torch"],
        "compliance": {
            "train_under_600s": all(run["training"]["train_time"] <= 600e3 for run in runs),
            "eval_under_600s": all(run["eval_total"]["eval_time"] <= 600e3 for run in runs),
            "artifact_under_16mb": all(run["artifact"]["total_bytes"] < 16_000_000 for run in runs),
            "score_first": causal, "causal": causal, "three_seeds": len({run["settings"]["SEED"] for run in runs}) == 3, "one_configuration": True}}


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="logs/RUN_ID", help="one run, or several seeds of one configuration")
    parser.add_argument("--update", metavar="FILE", help="put the table between <!-- RUN_ID ... --> and <!-- end --> in this file")
    parser.add_argument("--submission", metavar="FILE", help="write submission.json")
    options = parser.parse_args()
    runs = [read_run(folder) for folder in options.folders]
    scale, lines = compressors(runs[0]), [line for run in runs for line in facts(run)]
    print("\n".join(["", *table(runs, scale), "", *lines]))
    if options.update:
        update(options.update, options.folders, "\n".join([*table(runs), "", *lines, ""]))
    if options.submission:
        Path(options.submission).write_text(json.dumps(submission(runs, options.folders), indent=2) + "\n")


if __name__ == "__main__":
    main()
