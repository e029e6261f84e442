"""Read seed logs, ours and the lineage's: tables, significance, checks, submission.json, figures, and a running run.

    python -m tools.report logs/demo/seed*.txt                    # a row a seed, mean and sample standard deviation
    python -m tools.report logs/demo/seed*.txt --update README.md    # the same between <!-- NAMES --> and <!-- end --> of a file
    python -m tools.report logs/demo/seed*.txt --csv table.csv --plot figure --submission submission.json
    python -m tools.report logs/demo/best_seed*.txt --against logs/demo/seed*.txt    # better by 0.005 nats? Welch, one-sided; paired where nats were saved
    python -m tools.report logs/demo/seed*.txt --check            # what a reviewer looks at, a line each
    python -m tools.report --follow logs/demo/seed42.txt          # a run that is running: bar, loss, tokens/s, time left
    python -m tools.report --board logs --causal --html board.html    # all runs under folders, a row a configuration, the best first

A log is a file, or a folder logs/RUN_ID; a folder with README.md or submission.json is a record, which stands for the logs in it.
Exit status: 0 well, 1 a check failed, 2 something is no log, cannot be read or cannot be done (the rest is still reported).
"""

import sys

if not __package__:
    print("error: the tools are a package: python -m tools.report ...", file=sys.stderr)
    sys.exit(2)

from tools import console

if __name__ == "__main__":
    console.begin()

import contextlib
import csv
import json
from pathlib import Path

from tools import board, figures
from tools.checks import check, check_data, is_record
from tools.follow import follow
from tools.logs import STAGES, LogError, NoLog, read_logs
from tools.page import page
from tools.significance import against
from tools.submission import submission
from tools.tables import compressors, markdown, notes, table, update


def expand(paths):
    """Log files of paths: a record's folder stands for the logs in it."""
    for path in map(Path, paths):
        if path.is_dir() and is_record(path):
            found = sorted(
                p
                for p in [
                    *path.glob("*.log"),
                    *path.glob("*.txt"),
                    *path.glob("logs/*.txt"),
                    *path.glob("logs/*.log"),
                ]
                if p.name != "requirements.txt"
            )
            yield from found if found else [path / "train.log"]
        else:
            yield path


def read_all(paths):
    """(logs, whether all could be read); says of each that could not why. A log and its folder are one."""
    logs, well = [], True
    named = set(map(Path, paths))
    for path in expand(paths):
        try:
            found = read_logs(path)
            if found[0].path not in [other.path for other in logs]:
                logs += found
        except LogError as why:
            beside = isinstance(why, NoLog) and path not in named  # a record has other texts too
            if beside:
                print(f"note: {why}", file=sys.stderr)
            else:
                console.complain(str(why))
            well &= beside
    return logs, well


def parse(argv):
    """The command line."""
    parser = console.Parser("report", __doc__)
    parser.add_argument(
        "logs",
        nargs="*",
        metavar="LOG",
        help="a log file, a folder logs/RUN_ID, or a record's folder",
    )
    parser.add_argument("--against", nargs="+", metavar="OTHER", help="logs to be better than")
    parser.add_argument(
        "--stage",
        choices=STAGES,
        help="the score that --against compares (default: each side's last)",
    )
    parser.add_argument(
        "--check", action="store_true", help="what a reviewer looks at, one line each"
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="with --check: a data set's folder, whose training text is searched for its validation documents",
    )
    parser.add_argument(
        "--update",
        metavar="FILE",
        help="put the table between <!-- NAMES --> and <!-- end --> of a file",
    )
    parser.add_argument("--csv", metavar="FILE", help="write the table as CSV")
    parser.add_argument("--plot", metavar="FIGURE", help="write FIGURE.png and FIGURE.svg")
    parser.add_argument("--submission", metavar="FILE", help="write submission.json")
    for name in ("name", "author", "github-id", "date", "track", "blurb"):
        parser.add_argument(
            f"--{name}", help=f"{name} in submission.json (default: what the file says, or null)"
        )
    parser.add_argument(
        "--scale",
        action="store_true",
        help="beside the scores what gzip and xz make of the validation text",
    )
    parser.add_argument("--follow", metavar="LOG", help="show a running run")
    parser.add_argument(
        "--board",
        nargs="+",
        metavar="DIR",
        help="rank all runs under folders, a row a configuration; with --csv and --html as files",
    )
    parser.add_argument(
        "--causal",
        action="store_true",
        help="on a board: rank by the best stage that is causal, leave out what has none",
    )
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="on a board: only runs of this tokenizer (sp1024 ...)"
    )
    parser.add_argument(
        "--html", metavar="FILE", help="write the board as one page that needs nothing else"
    )
    return parser.parse_args(argv)


def write_board(options):
    """Print and write the board of --board; the exit status."""
    try:
        found = board.collect(options.board)
        rows = board.board(found.logs, options.causal, options.tokenizer)
        for sentence in found.others:
            print(f"note: {sentence}", file=sys.stderr)
        for sentence in found.wrong:
            print(f"error: {sentence}", file=sys.stderr)
        where = ", ".join(options.board)
        if not rows:
            raise LogError(f"{where}: {board.nothing(found, options.causal, options.tokenizer)}")
        print("\n".join(board.lines(rows)))
        print(counts := board.counts(found, rows))
        if options.csv:
            board.write_csv(rows, options.csv)
        if options.html:
            title = ", ".join(Path(folder).resolve().name for folder in options.board)
            text = page(rows, f"Runs under {title}", [counts, *board.notes(rows)])
            Path(options.html).write_text(text)
        for path in filter(None, (options.csv, options.html)):
            print(f"wrote {path}")
    except (LogError, OSError) as why:
        print(f"error: {why}", file=sys.stderr)
        return 2
    return 2 if found.wrong else 0


def write_submission(logs, options):
    """Write submission.json, keeping what only people know from the file that is there."""
    path = Path(options.submission)
    words = ("name", "author", "github_id", "date", "track", "blurb")
    old = console.read_json(path) if path.is_file() else {}
    path.write_text(
        json.dumps(
            submission(logs, **{w: getattr(options, w) or old.get(w) for w in words}),
            indent=2,
            allow_nan=False,
        )
        + "\n"
    )


@console.tool
def main(argv=None):
    """The exit status."""
    options = parse(argv)
    if options.follow:
        console.MEANWHILE.silent = True
        with contextlib.suppress(KeyboardInterrupt):  # the way to end it
            follow(options.follow)
        return 0
    if options.board:
        return write_board(options)
    if options.data and not options.check:
        raise console.BadInput("--data DIR: goes with --check; add that.")
    if options.data and not options.logs:
        return check_data(options.data)
    if not options.logs:
        raise console.BadInput("no log is given; see --help.")
    logs, well = read_all(options.logs)
    if not logs:
        if options.check:
            check(options.logs, logs)
        return 2
    try:
        rows = table(logs)
        print("\n".join([*markdown(rows), *notes(logs)]))
        if options.scale:
            print(
                "\n".join(
                    f"{name} on the same text: {bpb:.4f}" for name, bpb in compressors(logs[0])
                )
            )
        if options.update:
            update(
                options.update,
                [log.name for log in logs],
                "\n".join([*markdown(rows), "", *notes(logs), ""]),
            )
        if options.csv:
            with open(options.csv, "w", newline="") as file:
                csv.writer(file).writerows(rows)
        if options.plot:
            print("wrote " + " and ".join(figures.draw(logs, options.plot)))
        if options.against:
            others, fine = read_all(options.against)
            well &= fine
            if others:
                print("\n".join(against(logs, others, options.stage)))
        if options.submission:
            write_submission(logs, options)
    except BrokenPipeError:
        raise
    except (LogError, console.BadInput, OSError, ValueError) as why:
        console.complain(console.told(why))
        well = False
    failed = check(options.logs, logs) if options.check else 0
    if options.check and options.data:
        failed |= check_data(options.data)
    return 2 if not well else failed


if __name__ == "__main__":
    console.run(main)
