"""A run that is running: one line that says where it is."""

import math
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from tools.logs import LogError, NoLog, read_log
from tools.tables import NAMES


def status_line(log, width):
    """One line on a run: a bar, step or stage, loss, tokens a second, time left."""
    total, step = log.iterations or int(log.settings.get("ITERATIONS", 0)), log.last_step
    cap = (
        float(
            log.settings.get("MAX_WALLCLOCK_SECONDS", log.settings.get("max_wallclock_seconds", 0))
        )
        or math.inf
    )
    scores = "  ".join(f"{NAMES[s]} {r.val_bpb:.4f}" for s, r in log.results.items())
    if log.finished or log.errors or log.stopped:
        return (
            log.errors[-1]
            if log.errors
            else "stopped by a signal; RESUME=1 goes on"
            if log.stopped
            else "done: " + scores
        )[:width]
    if log.averaged or log.results:
        found = re.search(r"progress:(\S+) \w+:(\d+)/(\d+).* seconds:([\d.]+)", log.progress)
        under_way = ""
        if found and found[1].split("+")[-1] not in log.results and int(found[2]):
            share = int(found[2]) / int(found[3])
            under_way = f"  {found[1]} {100 * share:.0f} %  {float(found[4]) * (1 - share) / share:,.0f} s left"
        return (f"evaluating  {scores}{under_way}")[:width]
    if not step or not total:
        return "starting"
    at = np.searchsorted(log.train[:, 0], step)
    seconds = log.train[at, 2] / 1000
    share = max(step / total, seconds / cap)
    left = min((total - step) * seconds / step, cap - seconds)
    tokens = (log.batch_tokens or 0) * step / max(seconds, 1e-9)
    text = f" {100 * share:3.0f} %  step {step}/{total}  loss {log.train[at, 1]:.4f}  {tokens:,.0f} tokens/s  {left:,.0f} s left"
    bar = max(0, min(30, width - len(text) - 2))
    return ("[" + "#" * round(bar * share) + "." * (bar - round(bar * share)) + "]" + text)[:width]


def follow(path, pause=2.0, out=sys.stdout):
    """Show a run until it ends: one line that is written over on a terminal, elsewhere a new one when it changed or was long ago."""
    last, tty, silent = None, out.isatty(), 60
    shown_at = 0.0
    while True:
        try:
            log = read_log(path)
            line = status_line(log, shutil.get_terminal_size((100, 20)).columns - 1)
        except LogError as why:
            if not Path(path).exists():
                raise
            log, line = (
                None,
                "starting" if isinstance(why, NoLog) or "no line" in str(why) else str(why),
            )
        if (
            log
            and time.time() - log.path.stat().st_mtime > silent
            and not (log.finished or log.errors or log.stopped)
        ):
            line += "  (nothing new for a minute: killed?)"
        if line != last or time.monotonic() - shown_at > 3:
            shown_at = time.monotonic()
            print(("\r\x1b[K" if tty else "") + line, end="" if tty else "\n", file=out, flush=True)
        last = line
        if log and (log.finished or log.errors or log.stopped):
            print(file=out) if tty else None
            return
        time.sleep(pause)
