"""What all tools do in the same way: say what goes on meanwhile, one line for what the user can put right, an exit status."""

import argparse
import contextlib
import functools
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Thread
from time import perf_counter, sleep
from typing import Any


class BadInput(Exception):
    """An unusable argument or file: train_gpt.BadInput, for tools that do without torch."""

    status = 2  # the exit status


class Meanwhile:
    """Says what goes on where nothing was said for a while; once train_gpt is there, what its CONSOLE knows."""

    PAUSE = 4.0  # seconds without a line

    def __init__(self) -> None:
        self.began = self.heard = perf_counter()  # the tool; the last line
        self.silent = False  # for a tool that speaks itself

    def watch(self) -> None:
        """Speak up at each pause, for as long as the process lives."""
        script = None
        while True:
            sleep(0.1)
            if not script:
                script = getattr(sys.modules.get("train_gpt"), "CONSOLE", None)
                if script:
                    script.heard = self.heard
            if script and script.silent_in(0):
                script.speak_up()
            elif not script and perf_counter() - self.heard > self.PAUSE:
                self.speak_up()

    def speak_up(self) -> None:
        """Say that the tool is at work, and for how long."""
        self.heard = perf_counter()
        if not self.silent:
            with contextlib.suppress(OSError):
                text = f"... working {self.heard - self.began:.0f} s\n"
                print(text, end="", file=sys.stderr, flush=True)


MEANWHILE = Meanwhile()


def begin() -> None:
    """What a tool does before it imports what takes seconds: Ctrl-C ends it without a traceback, and it speaks up."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as nohup leaves it
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    if os.environ.get("RANK", "0") == "0":
        Thread(target=MEANWHILE.watch, daemon=True).start()


def run(main: Callable[[], int]) -> None:
    """End the process with the status of a tool's main(), at once: taking gloo down can abort a rank."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 1
    try:
        status = main()
    except Exception:  # a mistake in the tool
        sys.excepthook(*sys.exc_info())
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


def tool(main: Callable[..., int | None]) -> Callable[..., int]:
    """A tool's main() that returns an exit status whatever happens; what went wrong is told in a line.

    2 bad input, or a file that cannot be read or written; 1 a fault on the way; 130 after Ctrl-C; 141 where the reader of the
    output has gone, as `| head` does. Other exceptions are mistakes in the tool and come through.
    """

    @functools.wraps(main)
    def status_of(*words: Any) -> int:
        try:
            status = main(*words) or 0
            sys.stdout.flush()
        except SystemExit as done:  # --help
            return int(done.code or 0)
        except KeyboardInterrupt:
            complain("interrupted")
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left
            return 141
        except Exception as problem:
            status = getattr(problem, "status", 2 if isinstance(problem, OSError) else 0)
            if not status:
                raise
            complain(told(problem))
        return status

    return status_of


def complain(text: str) -> None:
    """Tell the user of a problem; a line of over 160 characters as two, as train_gpt.in_lines() does."""
    text = re.sub(r"(?m)^(?=.{161})(.*?[.;]) ", r"\1\n  ", f"error: {text}")
    print(text, file=sys.stderr, flush=True)


def told(problem: Exception) -> str:
    """What an exception says, in a line."""
    if isinstance(problem, OSError) and problem.filename is not None:
        return f"{problem.filename}: {problem.strerror}; give another path, or put that right."
    return str(problem)


HIDDEN = argparse.SUPPRESS  # help of an argument that is not the user's


class Parser(argparse.ArgumentParser):
    """The command line of a tool; what is wrong with it is told in one line."""

    def __init__(self, name: str, page: str | None) -> None:
        """name of the tool; page: its --help."""
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"python -m tools.{name}", description=page, formatter_class=style)

    def error(self, message: str) -> None:
        """Raises BadInput."""
        raise BadInput(f"{message}; see {self.prog} --help.")


def refuse_repeated(names: Iterable[str]) -> None:
    """Raises BadInput for a name that two rows have."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise BadInput(f"{repeated[0]!r}: is the name of two rows; write NAME= before one.")


def number(kind: Callable[[str], Any], low: float, high: float) -> Callable[[str], Any]:
    """A parser of an argument that is a number from low to high."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        words = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text}: allowed is {words} from {low:,} to {high:,}")

    return parse


def read_text(path: Path) -> str:
    """Text of a file. Raises BadInput or OSError."""
    try:
        return path.read_text()
    except UnicodeDecodeError:
        raise BadInput(f"{path}: is no text; give another file.") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises BadInput or OSError."""
    return as_object(read_text(path), str(path))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects in a metrics.jsonl. Raises BadInput or OSError."""
    lines = enumerate(read_text(path).splitlines(), 1)
    return [as_object(line, f"{path}, line {n}") for n, line in lines]


def as_object(text: str, where: str) -> dict[str, Any]:
    """The object that a JSON text is. Raises BadInput."""
    found = None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
    if not isinstance(found, dict):
        raise BadInput(f"{where}: is no JSON object; bring it back as it was written.")
    return found
