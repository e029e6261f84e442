"""All that is measured on one GPU, by one command: tests, a training step, a run with all evaluators, the benchmarks.

    python -m tools.gpu --name my_gpu --parts step --steps 4                # a training step alone
    DEVICE=cpu python -m tools.gpu --name rehearsal --parts step run --steps 2    # without a GPU

`make gpu` does all parts, in 25 minutes at most: a part has a share of them and is stopped when that is over; begun again
with the same name the command does what is not there yet. Settings are the script's environment variables. Everything goes
to logs/gpu/: NAME_tests.txt (the tests that need a GPU), NAME_step.json (a training step, and where its time goes),
NAME_run.txt with NAME_run/, bench_NAME.json, NAME_suite.txt (all tests) and NAME.md, a summary of one screen. Exit status:
0 all parts are there and the tests passed, 1 not, 2 bad input.
"""

import sys

if not __package__:
    print("error: the tools are a package: python -m tools.gpu ...", file=sys.stderr)
    sys.exit(2)

from tools import console

if __name__ == "__main__":
    console.begin()

import contextlib
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import train_gpt as t
from tools.bench import PEAK, ROOT, device_name, flops_a_token
from tools.logs import read_log

FOLDER = Path("logs") / "gpu"
SHARES = {"tests": 0.1, "step": 0.1, "run": 0.25, "bench": 0.25, "suite": 0.3}  # of the minutes
GOALS = {"NVIDIA H100 80GB HBM3": 640, "NVIDIA H200": 560}  # ms of a step of the record's batch


class Steps:
    """The script's training, step by step, without a log or an end."""

    def __init__(self, c: t.Config) -> None:
        self.c, self.run = c, t.Run(c)
        ranks = self.run.ranks
        self.kernel, attend, _ = t.choose_attention(c.attention, ranks)
        self.data = t.TrainData(c, ranks)
        self.model = t.GPT(c, ranks.dtype, attend).to(ranks.device)
        if ranks.compile:
            t.compile_model(self.model)
        self.state = t.TrainingState(c, ranks, self.model)
        self.feed = self.data.batches()
        self.done = 0

    def step(self) -> None:
        """One more, which nobody waits for."""
        t.train_step(
            self.c,
            self.run.ranks,
            self.model,
            self.state.optimizer,
            next(self.feed),
            step=self.done,
            lr_factor=1.0,
            qat=self.state.qat,
        )
        self.state.averages.update(1.0)
        self.done += 1

    def seconds(self, work: Callable[[], object]) -> float:
        """How long the device takes for something."""
        ranks = self.run.ranks
        start = ranks.moment()
        work()
        return ranks.ms_between(start, ranks.moment()) / 1000

    def each(self, n: int) -> list[float]:
        """Seconds of n steps, the host two ahead at most."""
        ranks = self.run.ranks
        moments = [ranks.moment()]
        for _ in range(n):
            self.step()
            moments.append(ranks.moment())
            if len(moments) > 3:
                ranks.ms_between(moments[-4], moments[-3])
        return [ranks.ms_between(a, b) / 1000 for a, b in pairwise(moments)]


def kernels(steps: Steps, n: int) -> list[dict[str, Any]]:
    """What the device is busy with in n steps, the longest first: name, ms a step, calls a step."""
    cuda = steps.run.ranks.cuda
    kinds = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=kinds) as found:
        for _ in range(n):
            steps.step()
        steps.run.ranks.synchronize()
    rows = [
        {
            "name": event.key[:120],
            "ms": (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000 / n,
            "calls": event.count / n,
        }
        for event in found.key_averages()
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:30]


def measure(c: t.Config, n: int) -> dict[str, Any]:
    """Seconds of training steps, without and with QAT, memory, and where the time goes."""
    steps = Steps(c)
    ranks = steps.run.ranks
    first = steps.seconds(steps.step)
    steps.each(3)
    plain = steps.each(n)
    start = steps.seconds(lambda: steps.state.qat.start(ranks, steps.data))
    steps.each(2)
    rounded = steps.each(n)
    found = {
        "device": device_name(steps.run)[0],
        "torch": torch.__version__,
        "attention": t.attention_kernel(steps.kernel, c, ranks),
        "compile": ranks.compile,
        "environment": {k: v for k, v in os.environ.items() if k.startswith("TORCHINDUCTOR_MIX")},
        "tokens": c.train_batch_tokens,
        "first_step": first,
        "step": statistics.median(plain),
        "steps": plain,
        "qat_start": start,
        "qat_step": statistics.median(rounded),
        "end": t.rehearse_end(c, ranks, steps.model, steps.data)[1] / 1000,
    }
    found["tokens_per_second"] = c.train_batch_tokens / found["step"]
    if ranks.cuda:
        found["memory"] = torch.cuda.max_memory_allocated()
        peak = PEAK.get(torch.cuda.get_device_name())
        if peak:
            found["mfu"] = flops_a_token(c) * c.train_batch_tokens / found["step"] / peak
    found["kernels"] = kernels(steps, 2)
    return found


def part_commands(name: str, steps: int) -> dict[str, tuple[list[str], Path]]:
    """{part: (command, the file that says it is done)}."""
    python = [sys.executable, "-m"]
    script, tests = str(ROOT / "train_gpt.py"), ROOT / "tests"
    bench = [*python, "tools.bench", "--rounds", "3", "--out", str(FOLDER / f"bench_{name}.json")]
    run = FOLDER / f"{name}_run" / "metrics.jsonl"
    step = FOLDER / f"{name}_step.json"
    return {
        "step": ([*python, "tools.gpu", "--measure", str(step), "--steps", str(steps)], step),
        "run": ([*python, "torch.distributed.run", "--standalone", script], run),
        "tests": (
            [*python, "pytest", "-v", str(tests / "test_gpu.py")],
            FOLDER / f"{name}_tests.txt",
        ),
        "bench": (bench, FOLDER / f"{name}_bench.txt"),
        "suite": ([*python, "pytest", "-q", str(tests)], FOLDER / f"{name}_suite.txt"),
    }


def whole(part: str, path: Path) -> bool:
    """Whether a part's file is there and says that it came to its end."""
    if not path.exists():
        return False
    text = path.read_text()
    ends = {
        "run": '"label": "eval_total"',
        "tests": " passed",
        "suite": " passed",
        "bench": "wrote ",
    }
    return ends.get(part, "") in text


def carry_out(part: str, name: str, seconds: float, steps: int) -> str:
    """Run a part; what to say of it."""
    command, path = part_commands(name, steps)[part]
    if whole(part, path):
        return "was there"
    env = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONPATH=str(ROOT))
    if part == "run":
        env |= {"RUN_ID": f"gpu/{name}_run", "RESUME": "1"}
    began = time.perf_counter()
    with open(path, "w+") if path.suffix == ".txt" else tempfile.TemporaryFile("w+") as file:
        status: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = subprocess.run(
                command, env=env, stdout=file, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
        taken = time.perf_counter() - began
        if status == 0:
            return f"done in {taken:.0f} s"
        file.seek(0)
        print("".join(file.readlines()[-12:]))
    how = "stopped, its time was up" if status is None else f"failed with status {status}"
    return f"{how}, after {taken:.0f} s"


def summary(name: str) -> Iterator[str]:
    """Lines of what was measured, with what falls short of its goal."""
    step = FOLDER / f"{name}_step.json"
    if step.exists():
        found = console.read_json(step)
        yield f"# {found['device']}, torch {found['torch']}, attention {found['attention']}"
        yield ""
        yield (
            f"- training step of {found['tokens']:,} tokens: {1000 * found['step']:.1f} ms,"
            f" {found['tokens_per_second']:,.0f} tokens/s"
        )
        if "mfu" in found:
            goal = GOALS.get(found["device"].removeprefix("One "), 0)
            short = " (over it)" if 1000 * found["step"] > goal else ""
            yield f"- MFU {found['mfu']:.1%}; goal for the step {goal} ms{short}"
            yield f"- peak memory {found['memory'] / 2**30:.1f} GiB"
        yield (
            f"- step under late QAT {1000 * found['qat_step']:.1f} ms; first step, with compiling,"
            f" {found['first_step']:.1f} s; end of training {found['end']:.2f} s"
        )
    log = FOLDER / f"{name}_run.txt"
    if log.exists():
        yield ""
        yield "| evaluator | val_bpb | seconds | causal |"
        yield "|---|---|---|---|"
        for label, result in read_log(log).results.items():
            yield f"| {label} | {result.val_bpb:.4f} | {result.seconds} | {result.causal} |"
    for part in ("tests", "suite"):
        path = FOLDER / f"{name}_{part}.txt"
        if path.exists():
            yield ""
            yield f"{part}: {path.read_text().strip().splitlines()[-1].strip('= ')}"


@console.tool
def main(argv: list[str] | None = None) -> int:
    """Do the parts and print the summary; the exit status."""
    parser = console.Parser("gpu", __doc__)
    parser.add_argument("--name", help="of the files in logs/gpu")
    parser.add_argument(
        "--minutes", type=console.number(float, 0.01, 10**4), default=25, help="for all parts (25)"
    )
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=[*SHARES])
    parser.add_argument(
        "--steps", type=console.number(int, 1, 10**4), default=12, help="to time, of each kind (12)"
    )
    parser.add_argument("--measure", type=Path, help=console.HIDDEN)
    options = parser.parse_args(argv)
    c = t.load_config(os.environ)
    t.Ranks(c)
    if options.measure:
        options.measure.write_text(json.dumps(measure(c, options.steps), indent=1) + "\n")
        return 0
    if not re.fullmatch(r"\w[\w.-]*", options.name or ""):
        raise t.BadInput(
            f"--name {options.name}: files are named by it; letters, digits and . _ - only."
        )
    FOLDER.mkdir(parents=True, exist_ok=True)
    shares = {part: SHARES[part] for part in options.parts}
    for part, share in shares.items():
        seconds = 60 * options.minutes * share / sum(shares.values())
        print(f"{part}: at most {seconds:.0f} s ...", flush=True)
        with t.CONSOLE.doing(part):
            done = carry_out(part, options.name, seconds, options.steps)
        print(f"{part}: {done}", flush=True)
    text = "\n".join(summary(options.name)) + "\n"
    (FOLDER / f"{options.name}.md").write_text(text)
    print(text)
    commands = part_commands(options.name, options.steps)
    there = all(whole(part, commands[part][1]) for part in options.parts)
    return 0 if there and " failed" not in text else 1


if __name__ == "__main__":
    console.run(main)
