"""Run a command and say how long its console was silent at most, and after which line.

    PYTHONPATH=. python tests/silence.py -- python train_gpt.py PRESET=demo
    PYTHONPATH=. python tests/silence.py --show --limit 5 -- python -m tools.report logs/demo/seed*.txt

Standard output and error come through one pipe; each read of it is timed, and so are start and end. The load is how many
processes wanted a core in the last minute. Exit status: 0; 1 if it was silent for longer than --limit.
"""

import argparse
import os
import subprocess
import sys
import time
from typing import NamedTuple


class Heard(NamedTuple):
    """What was heard of a command."""

    status: int  # its exit status
    seconds: float  # that it took
    longest: float  # seconds of its longest silence
    before: str  # the last line before that
    text: str  # all that it said


def listen(command, show=False, **more):
    """Heard of a command; more goes to Popen."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)
    began = last = time.monotonic()
    longest, before, text = 0.0, "", b""
    ended = False
    while not ended:
        part = os.read(child.stdout.fileno(), 2**16)
        ended = not part
        now = time.monotonic()
        if now - last > longest:
            longest, before = now - last, text.decode(errors="replace").rpartition("\n")[0]
        last, text = now, text + part
        if show:
            sys.stdout.buffer.write(part)
            sys.stdout.flush()
    status = child.wait()
    line = before.rpartition("\n")[2] or "its start"
    return Heard(status, time.monotonic() - began, longest, line, text.decode(errors="replace"))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--show", action="store_true", help="what the command says, too")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="to run")
    options = parser.parse_args(argv)
    heard = listen(options.command, options.show)
    print(
        f"{heard.longest:.1f} s silent at most, in {heard.seconds:.0f} s, status {heard.status}, "
        f"load {os.getloadavg()[0]:.1f}, after <{heard.before[:100]}>: {' '.join(options.command)}",
        flush=True,
    )
    return int(heard.longest > options.limit)


if __name__ == "__main__":
    sys.exit(main())
