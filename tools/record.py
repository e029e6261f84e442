"""Make the folder that is handed in as a record of the challenge, from the logs of its seeds.

    python -m tools.record my_record logs/demo/best_seed*.txt --author "A. Name" --github-id aname --date 2026-04-01
    python -m tools.record my_better logs/demo/best_seed*.txt --against logs/demo/seed*.txt    # with the test against the record before
    python -m tools.record my_slot logs/demo/seed*.txt --stage ttt_slot --non-record    # a score that is not causal is none of a record

The folder is records/track_10min_16mb/DATE_NAME, or track_non_record_16mb with --non-record, as in the challenge's repository; --out
names another place for it, such as records/ of a clone. In it: README.md, submission.json, requirements.txt, train_gpt.py (the copy
that the logs count as code) and train_seedN.log. Artifacts are not copied; submission.json has their sizes and digests.

Refused, with nothing made: logs that are no seeds of one configuration and one script, a run that did not finish, artifact and code
over the cap (counted from the files), a score that is not causal, a folder that exists. The script of the folder then scores the
artifacts that are here; it is run for that, as it was for the logs that open with it. In the end the folder is checked as by
python -m tools.report FOLDER --check. Exit status: 0 well, 1 the scoring or a check failed, 2 refused.
"""

import sys

if not __package__:
    print("error: the tools are a package: python -m tools.record ...", file=sys.stderr)
    sys.exit(2)

from tools import console

if __name__ == "__main__":
    console.begin()

import dataclasses
import hashlib
import json
import math
import re
import shlex
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from tools import report
from tools.bytecount import TEXT_BYTES
from tools.checks import print_check
from tools.logs import STAGES, LogError, read_log
from tools.proof import artifact_of, prove
from tools.scripts import HEAD, SEPARATOR, shipped_script
from tools.significance import against
from tools.submission import LIMIT, best_stage, causal, one_configuration, submission
from tools.tables import NAMES, markdown, notes, table

ROOT = Path(__file__).resolve().parents[1]
TRACKS = {True: "10min_16mb", False: "non_record_16mb"}
LOG_LIMIT = 100 * 2**20  # bytes of a file that GitHub takes
RUNS_OWN = ("SEED", "RUN_ID", "RESUME", "SAVE_EVERY", "LOAD_ARTIFACT", "LOAD_CHECKPOINT")
CONDITIONS = {
    "C1": "a probability depends on the artifact and the text before it alone",
    "C2": "probabilities are fixed before the target is looked at, and sum to 1",
    "C3": "nothing is fitted to a target before it was scored",
    "C4": "each target is scored once, from left to right",
}


def parse(argv):
    """The command line."""
    parser = console.Parser("record", __doc__)
    parser.add_argument("name", metavar="NAME", help="of the folder: letters, digits and . _ -")
    parser.add_argument("logs", nargs="+", metavar="LOG", help="a log, or its folder logs/RUN_ID")
    parser.add_argument("--out", default="records", help="where the folder goes (default: records)")
    parser.add_argument("--author", help="left open if it is not given, as the next two")
    parser.add_argument("--github-id", help="of the author")
    parser.add_argument("--blurb", help="what is new, in a paragraph")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="default: today")
    parser.add_argument("--against", nargs="+", metavar="OTHER", help="logs of the record before")
    parser.add_argument(
        "--stage", choices=STAGES, help="whose score counts (default: the best that is causal)"
    )
    parser.add_argument(
        "--non-record", action="store_true", help="not for the leaderboard: it need not be causal"
    )
    parser.add_argument(
        "--targets",
        type=console.number(int, 0, 10**9),
        default=200_000,
        help="validation splits of up to so many targets are scored whole (default: 200000)",
    )
    parser.add_argument(
        "--windows",
        type=console.number(int, 1, 10**6),
        default=8,
        help="of longer ones, so many windows (default: 8)",
    )
    return parser.parse_args(argv)


def read_logs(paths):
    """(logs, whether all could be read); says of each that could not why."""
    logs, well = [], True
    for path in map(Path, paths):
        try:
            if path.is_dir() and not path.with_name(f"{path.name}.txt").is_file():
                raise LogError(f"{path}: a folder without a log {path.name}.txt beside it")
            logs.append(read_log(path))
        except LogError as why:
            console.complain(str(why))
            well = False
    return logs, well


# ---- what is refused


def refusals(logs, stage, record):
    """Sentences on what forbids a record of these logs; stage: its score, or None for the best that is causal."""
    for log in logs:
        if log.style != "this script":
            yield f"{log.path}: is no log of train_gpt.py, whose packed copy a record ships"
        elif log.errors or not log.finished:
            yield f"{log.path}: {log.errors[0] if log.errors else 'the run did not finish'}"
        elif log.train_seconds is None:
            yield f"{log.path}: evaluates an artifact; give the log of the run that trained it"
        elif log.path.stat().st_size > LOG_LIMIT:
            size = f"{log.path.stat().st_size / 2**20:.0f} MiB"
            yield f"{log.path}: {size}, GitHub takes 100; leave out what other programs wrote into it"
    try:
        one_configuration(logs)
    except LogError as why:
        yield str(why)
        return
    try:
        stage = stage or best_stage(logs)
    except LogError as why:
        yield f"{why}; another can be handed in with --stage and --non-record"
        return
    for log in logs:
        result = log.results.get(stage)
        if result is None:
            yield f"{log.path}: has no {stage} score; it has {', '.join(log.results)}"
        elif not math.isfinite(result.val_bpb):
            yield f"{log.path}: the {stage} score is {result.val_bpb}"
        elif record and not result.causal:
            breaks = f" (breaks {result.breaks})" if result.breaks else ""
            yield f"{log.path}: the {stage} score is not causal{breaks}; choose another with --stage, or say --non-record"


def size_of(log, script):
    """(bytes of artifact and script together, bytes of the artifact, its digest or None if its file is not here). Raises LogError."""
    told = None if log.total_bytes is None else log.total_bytes - (log.code_bytes or 0)
    path = artifact_of(log)
    data = path.read_bytes() if path else None
    if data is None and told is None:
        raise LogError(f"{log.path}: says no size, and its artifact is not here")
    size = told if data is None else len(data)
    if told not in (None, size):
        raise LogError(f"{path}: has {size:,} bytes, the log says {told:,}: is it of another run?")
    total = size + len(script)
    if total >= LIMIT:
        raise LogError(
            f"{path or log.path}: artifact and script have {total:,} bytes together, under {LIMIT:,} are allowed"
        )
    return total, size, data and hashlib.sha256(data).hexdigest()


# ---- what the folder says


def help_of(script):
    """(default by setting, {preset: value by setting}) of a script, as its --help page says."""
    page = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True
    ).stdout
    settings, _, rest = page.partition("\nPresets:\n")
    presets = {
        name: dict(word.split("=", 1) for word in values.split())
        for name, values in re.findall(r"^  (\w+): ?(.*)$", rest, re.M)
    }
    return dict(re.findall(r"^  ([A-Z][A-Z0-9_]*)=(\S*) \(", settings, re.M)), presets


def same_value(a, b):
    """Whether two values of a setting are one: 4 and 4.0 are."""
    try:
        return a == b or float(a) == float(b)
    except (TypeError, ValueError):
        return False


def given(log, defaults, presets):
    """[(setting, default, value, "preset" or "given")] of the settings of a run that differ from the defaults or its preset."""
    base, rows = dict(defaults), []
    for name in log.settings.get("PRESET", "").lower().split(","):
        base |= presets.get(name.strip(), {})
    for name, value in log.settings.items():
        usual, default = base.get(name), defaults.get(name)
        if name not in RUNS_OWN and not (same_value(value, usual) and same_value(value, default)):
            origin = "preset" if same_value(value, usual) else "given"
            rows.append((name, "?" if default is None else default, value, origin))
    return rows


def commands(logs, rows):
    """Command lines: what all runs were given, a line a run, and one that scores an artifact."""
    words = [f"{name}={shlex.quote(value)}" for name, _, value, origin in rows if origin == "given"]
    if words:
        yield f"export {' '.join(words)}"
    ranks = logs[0].world_size or 1
    start = f"torchrun --standalone --nproc_per_node={ranks}" if ranks > 1 else "python"
    for log in logs:
        yield f"SEED={log.seed} RUN_ID=seed{log.seed} {start} train_gpt.py"
    yield f"LOAD_ARTIFACT=logs/seed{logs[0].seed}/final_model.ptz {start} train_gpt.py"


def score_table(logs, stage, totals):
    """Rows of the score, a seed each, then mean and sample standard deviation."""
    title = "seed, val_loss, val_bpb, steps, step average, evaluation time, artifact + code"
    rows = [title.split(", ")]
    for log, total in zip(logs, totals):
        result = log.results[stage]
        spent = "-" if log.eval_seconds is None else f"{log.eval_seconds:.1f} s"
        scores = [f"{result.val_loss:.8f}", f"{result.val_bpb:.8f}"]
        steps = [f"{log.steps or 0:,}", f"{log.step_avg:.1f} ms" if log.step_avg else "-"]
        rows.append([str(log.seed), *scores, *steps, spent, f"{total:,} B"])
    if len(logs) > 1:
        values = [
            [getattr(log.results[stage], key) for log in logs] for key in ("val_loss", "val_bpb")
        ]
        rows.append(["mean", *(f"{statistics.mean(v):.8f}" for v in values), *[""] * 4])
        rows.append(["std", *(f"{statistics.stdev(v):.8f}" for v in values), *[""] * 4])
    return rows


def missing(logs, stage, proofs):
    """Sentences on what this folder does not show."""
    result = logs[0].results[stage]
    if len(logs) < 3:
        yield f"It has {len(logs)} seed{'s' * (len(logs) > 1)}; a record needs three."
    if logs[0].world_size != 8 or "H100" not in (logs[0].hardware or ""):
        yield f"The challenge's ten minutes are those of eight H100; the machine here: {machine(logs[0])}."
    if result.bytes and abs(result.bytes / TEXT_BYTES - 1) > 0.001:
        yield (
            f"The text is not the challenge's validation split of {TEXT_BYTES / 1e6:.0f} million bytes: "
            f"{result.tokens:,} targets, {result.bytes:,} bytes. The score compares with no other text's."
        )
    for what, verdict, detail in proofs:
        if verdict is None:
            yield f"{what}: {detail}."


def machine(log):
    """What a run ran on, as its log says."""
    ranks = log.world_size or 1
    return f"{log.hardware}, {ranks} process{'es' * (ranks > 1)}, torch {log.torch}"


def kept(logs, stage):
    """Lines of a table: which conditions the score keeps."""
    breaks = {b for log in logs for b in log.results[stage].breaks.split(",")}
    unknown = causal(logs, stage) is None
    rows = [["", "condition", "kept"]]
    for name, text in CONDITIONS.items():
        rows.append([name, text, "no" if name in breaks else "not said" if unknown else "yes"])
    return markdown(rows)


def headline(logs, stage):
    """The score in a sentence."""
    values = [log.results[stage].val_bpb for log in logs]
    spread = ""
    if len(logs) > 1:
        spread = f" (mean of {len(logs)} seeds, standard deviation {statistics.stdev(values):.5f})"
    words = {True: "causal", False: "not causal: no compression result", None: "causal or not"}
    told = words[causal(logs, stage)]
    return f"**val_bpb {statistics.mean(values):.4f}**{spread}, {NAMES[stage]}, {told}."


def readme(logs, options, facts):
    """README.md. facts: what build() and make() found besides the logs."""
    stage, told = options.stage, logs[0].settings
    settings = [["setting", "default", "here", "from"], *map(list, facts["rows"])]
    author = f"{options.author or 'TODO: --author'} ({options.github_id or 'TODO: --github-id'})"
    shown = [f"- {what}: {detail}." for what, verdict, detail in facts["proofs"] if verdict]
    sections = {
        f"# {options.name}": [
            *(options.blurb or "TODO: what is new here, in a paragraph (--blurb).", ""),
            *(headline(logs, stage), "", *markdown(score_table(logs, stage, facts["totals"])), ""),
            f"{author}, {options.date}. {machine(logs[0])}.",
        ],
        "## All stages": [*markdown(table(logs)), "", *notes(logs)],
        "## Commands": [
            *(
                f"    {line}"
                for line in ["pip install -r requirements.txt", *commands(logs, facts["rows"])]
            ),
            "",
            f"`train_gpt.py` is {facts['what']}. The data: `{told.get('DATA_PATH')}`, `{told.get('TOKENIZER_PATH')}`.",
        ],
        "## Settings that differ from the defaults": markdown(settings),
        "## Conditions": [
            *kept(logs, stage),
            "",
            "As the result lines of the logs say: the script knows what its settings break, and counts the targets.",
        ],
        "## Against the record before": [f"- {line}" for line in facts["against"]],
        "## Shown when this folder was made": shown,
        "## What is not shown": [f"- {line}" for line in missing(logs, stage, facts["proofs"])],
    }
    return (
        "\n\n".join("\n".join([title, "", *lines]) for title, lines in sections.items() if lines)
        + "\n"
    )


def requirements(log):
    """requirements.txt: the versions that a run had, as its log says; of what it does not say, those of this repository."""
    with open(log.path, "rb") as file:
        head = file.read(2 * HEAD).partition(SEPARATOR)[2].decode(errors="replace")
    said = dict(re.findall(r"(\w+):(\S+)", re.search(r"^python:.*", head, re.M)[0]))
    ours = (ROOT / "requirements.txt").read_text()
    lines = [f"# Python {said['python']}, torch {said['torch']}"]
    for name in ("torch", "numpy", "sentencepiece"):
        version = said[name].partition("+")[0] if name in said else None
        known = re.search(rf"^{name}==.*$", ours, re.M)
        lines.append(f"{name}=={version}" if version else known[0])
    return "\n".join(lines) + "\n"


def build(folder, logs, options, script):
    """Write the folder's files but its README; script: (bytes, what they are). What the README needs to know besides the logs. Raises LogError."""
    data, what = script
    sizes = [size_of(log, data) for log in logs]
    (folder / "train_gpt.py").write_bytes(data)
    (folder / "requirements.txt").write_text(requirements(logs[0]))
    for log in logs:
        shutil.copyfile(log.path, folder / f"train_seed{log.seed}.log")
    found = submission(
        logs,
        stage=options.stage,
        name=options.name,
        author=options.author,
        github_id=options.github_id,
        date=options.date,
        track=TRACKS[not options.non_record],
        blurb=options.blurb,
    )
    found["artifacts"] = {
        str(log.seed): {"bytes": size, "sha256": digest}
        for log, (_, size, digest) in zip(logs, sizes)
        if digest
    }
    text = json.dumps(found, indent=2, allow_nan=False, ensure_ascii=False)
    (folder / "submission.json").write_text(text + "\n")
    rows = given(logs[0], *help_of(folder / "train_gpt.py"))
    return dict(totals=[total for total, _, _ in sizes], rows=rows, what=what)


def make(target, logs, others, options):
    """Make the folder, whole or not at all. 0, or 1 if a script does not score its artifact. Raises LogError."""
    script = shipped_script(logs)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".part_", dir=target.parent))
    try:
        facts = build(folder, logs, options, script)
        facts["proofs"], facts["against"] = [], []
        if others:
            only = [
                dataclasses.replace(log, results={options.stage: log.results[options.stage]})
                for log in logs
            ]
            facts["against"] = against(only, others)
        limits = dict(targets=options.targets, windows=options.windows)
        for log in logs:
            proof = prove(log, script[0], options.stage, **limits)
            print_check(*proof)
            facts["proofs"].append(proof)
        if any(verdict is False for _, verdict, _ in facts["proofs"]):
            console.complain(f"{target}: not made, for the above")
            return 1
        (folder / "README.md").write_text(readme(logs, options, facts))
        folder.chmod(0o755)
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


@console.tool
def main(argv=None):
    """The exit status."""
    options = parse(argv)
    target = (
        Path(options.out)
        / f"track_{TRACKS[not options.non_record]}"
        / f"{options.date}_{options.name}"
    )
    problems = []
    if not re.fullmatch(r"\w[\w.-]*", options.name, re.ASCII):
        problems.append(f"NAME {options.name}: letters, digits and . _ - only")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", options.date):
        problems.append(f"--date {options.date}: a date as 2026-03-31")
    if target.exists():
        problems.append(f"{target}: exists; choose another NAME, or move it away")
    logs, well = read_logs(options.logs)
    others, fine = read_logs(options.against or [])
    if well:
        problems += refusals(logs, options.stage, not options.non_record)
    for problem in problems:
        console.complain(problem)
    if problems or not (well and fine):
        return 2
    logs.sort(key=lambda log: f"train_seed{log.seed}.log")  # as the folder lists them
    options.stage = options.stage or best_stage(logs)
    if make(target, logs, others, options):
        return 1
    print(f"made {target}; checking it:")
    return report.main([str(target), "--check"])


if __name__ == "__main__":
    console.run(main)
