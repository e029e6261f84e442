"""Run a command and say how long its console was silent at most, and after which line.

    PYTHONPATH=. python tests/silence.py -- python train_gpt.py PRESET=demo
    PYTHONPATH=. python tests/silence.py --show --limit 5 -- python -m tools.report logs/demo/seed*.txt
    PYTHONPATH=. python tests/silence.py --all --limit 5 | tee logs/hostile/silence.txt

--all: the script and every tool in small, one after the other in a fresh copy of what git knows.

Standard output and error come through one pipe; each read of it is timed, and so are start and end. The load is how many
processes wanted a core in the last minute. Exit status: 0; 1 if it was silent for longer than --limit.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RUN = "python train_gpt.py PRESET=demo ITERATIONS=4 MAX_WALLCLOCK_SECONDS=0 EVAL_STRIDE=256"
LAST = "logs/seed1/checkpoint.000000004.ckpt"
ARTIFACT = "--artifact logs/seed1/final_model.ptz"
COMMANDS = (
    "python data/prepare.py demo",
    "python data/prepare.py text tools --val train_gpt.py --name mine",
    "python train_gpt.py --help",
    "python train_gpt.py --pack packed.py",
    f"{RUN} RUN_ID=seed1 SEED=1 EVALS=sliding_window,ttt_slot TTT_EPOCHS=1 SLOT_STEPS=1 SAVE_NLL=1",
    f"{RUN} RUN_ID=seed1 SEED=1 EVALS=sliding_window,ttt_slot TTT_EPOCHS=1 SLOT_STEPS=1 SAVE_NLL=1 RESUME=1",
    f"{RUN} RUN_ID=seed2 SEED=2 EVALS=sliding_window,ttt_slot TTT_EPOCHS=1 SLOT_STEPS=1 SAVE_NLL=1",
    f"python packed.py {RUN[20:]} RUN_ID=packed ITERATIONS=1 EVALS=none",
    f"torchrun --standalone --nproc_per_node=2 {RUN[7:]} RUN_ID=ranks EVALS=none",
    f"{RUN} RUN_ID=compiled COMPILE=1 WARMUP_STEPS=2 EVALS=none",
    f"{RUN} RUN_ID=gptq LOAD_CHECKPOINT={LAST} QUANT=gptq EVALS=none",
    f"{RUN} RUN_ID=prequant LOAD_CHECKPOINT={LAST} PREQUANT_TTT_ENABLED=1 PREQUANT_TTT_EPOCHS=1 EVALS=none",
    "python train_gpt.py RUN_ID=ctw LOAD_ARTIFACT=logs/seed1/final_model.ptz EVALS=ctw CTW_WEIGHT=0.1 PRESET=demo",
    "python -m tools.report logs/seed1.txt logs/seed2.txt --plot figure --csv table.csv",
    "python -m tools.report logs/seed1.txt --against logs/seed2.txt",
    "python -m tools.report logs/seed1.txt logs/seed2.txt --check",
    "python -m tools.report --board logs --html board.html",
    "python -m tools.record mine logs/seed[12].txt --non-record --stage ttt_slot",
    f"PRESET=demo python -m tools.quantise --checkpoint {LAST} --run-id sizes --bytes 560000 QUANT=rd QUANT=gptq",
    f"PRESET=demo EVAL_STRIDE=256 python -m tools.ablate {ARTIFACT} --run-id ways sliding_window 'slot SLOT_STEPS=1'",
    f"PRESET=demo python -m tools.ladder {ARTIFACT} --run-id rungs --tune data/datasets/mine --targets 1024 --tune-targets 1024",
    f"PRESET=demo python -m tools.audit {ARTIFACT} --targets 1024 --probes 4 --sums 0",
    "PRESET=demo python -m tools.bench --parts sliding --rounds 1 --targets 512 --out bench.json",
    "DEVICE=cpu PRESET=demo python -m tools.gpu --name rehearsal --parts step run --steps 2",
    "python -m tools.blocks",
    "python -m tools.settings_page",
)


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


def line(heard, command):
    """A line on what was heard of a command."""
    return (
        f"{heard.longest:.1f} s silent at most, in {heard.seconds:.0f} s, status {heard.status}, "
        f"load {os.getloadavg()[0]:.1f}, after <{heard.before[:100]}>: {command}"
    )


def hear_all(show):
    """Seconds of the longest silence of COMMANDS; infinite if one fails. A line is printed for each."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    print(f"$ python {' '.join(sys.argv)}", flush=True)
    longest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name in tracked.splitlines():
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, Path(folder) / name)
        for command in COMMANDS:
            env = {**os.environ, "PATH": path, "PYTHONPATH": folder}
            heard = listen(["bash", "-c", command], show, cwd=folder, env=env)
            print(line(heard, command), flush=True)
            if heard.status:
                print(heard.text, file=sys.stderr)
            longest = max(longest, float("inf") if heard.status else heard.longest)
    return longest


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--show", action="store_true", help="what the command says, too")
    parser.add_argument("--all", action="store_true", help="the script and every tool")
    parser.add_argument("command", nargs="*", metavar="-- COMMAND", help="to run")
    options = parser.parse_args(argv)
    if options.all:
        return int(hear_all(options.show) > options.limit)
    if not options.command:
        parser.error("give a command, or --all")
    heard = listen(options.command, options.show)
    print(line(heard, " ".join(options.command)), flush=True)
    return int(heard.longest > options.limit)


if __name__ == "__main__":
    sys.exit(main())
