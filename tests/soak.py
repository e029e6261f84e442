"""Kill runs at random moments, let each go on with RESUME=1, and compare with a run that nobody disturbed.

    PYTHONPATH=. python tests/soak.py --kills 200 | tee logs/resume/soak.txt

A chain is one run that is killed one to three times: at a random time, while a file is being written, or shortly after a phase begins; by SIGKILL or
SIGTERM; one process, or two ranks under torchrun of which all or one are killed. It must end with the same 8 decimals of every result, the same
artifact, only whole files, and nothing else in its folder. Exit status 1 at the first difference.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from conftest import ROOT, TINY, make_tiny_data, t

SETTINGS = dict(
    TINY,
    ITERATIONS="80",
    SAVE_EVERY="5",
    VAL_LOSS_EVERY="20",
    TRAIN_LOG_EVERY="10",
    WARMDOWN_ITERS="40",
    EVAL_STRIDE="1",
    TTT_CHUNK_TOKENS="64",
    VAL_BATCH_SIZE="128",
    EVALS="roundtrip,sliding_window,ttt,ttt_slot,slot,ctw",
    CTW_WEIGHT="0.1",
    SAVE_NLL="1",
    TTT_BATCH_SEQS="2",
)
PHASES = (
    "step:20/",
    "late_qat:on",
    "average_none",
    "final_float",
    "quantised",
    "pass_artifact_roundtrip",
    "pass_artifact_sliding_window",
)
PHASE_NAMES = (  # the last line of a log -> what the run was doing after it
    (r"$|settings|log:|python:", "starting"),
    (r"model_params|train_shards|step:|late_qat|resuming from .*checkpoint", "training"),
    (r"average|training|pass_float|stopping", "averaging, float score"),
    (r"final_float|quantised|Code|Serialized|Total|artifact", "exporting, roundtrip"),
    (r"pass_artifact_roundtrip|final_artifact_roundtrip", "sliding, slot, ctw"),
    (
        r"pass_artifact_s|final_artifact_s|final_artifact_ctw|progress:s|resuming from .*progress_artifact_s",
        "TTT",
    ),
    (r"resuming from .*progress|progress:", "an evaluation that went on"),
    (r"stopped by", "starting again"),
    (r"pass_artifact_t|final_artifact_t|eval_total", "ending"),
)


class Chain:
    """A run in its own folder."""

    def __init__(self, folder, ranks):
        self.folder, self.ranks = folder, ranks
        self.env = {**os.environ, **SETTINGS, "RUN_ID": "soak", "OMP_NUM_THREADS": "1"}
        self.log = folder / "logs" / "soak.txt"
        folder.mkdir(parents=True)

    def start(self, **more):
        command = [
            sys.executable,
            *(
                ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
                if self.ranks > 1
                else []
            ),
            str(ROOT / "train_gpt.py"),
        ]
        self.out = open(self.folder / "console", "a")  # noqa: SIM115
        return subprocess.Popen(
            command,
            env={**self.env, **more},
            cwd=self.folder,
            stdout=self.out,
            stderr=self.out,
            start_new_session=True,
        )

    def lines(self):
        text = self.log.read_text() if self.log.exists() else ""
        return text[text.rfind("=" * 100 + "\n") :].splitlines()

    def phase(self):
        last = ["", *self.lines()][-1]
        if last.startswith("train_shards") and (self.folder / "logs/soak/final_model.ptz").exists():
            last = "progress:"
        writing = "+writing a file" * bool(list(self.folder.rglob("*.part")))
        return (
            next(
                (name for pattern, name in PHASE_NAMES if re.match(pattern, last)),
                f"after {last[:30]!r}",
            )
            + writing
        )

    def wait_for(self, child, rng, length):
        """Until the moment to kill; what was waited for."""
        how, begin = rng.choice(("time", "time", "file", "phase")), len(self.lines())
        if how == "time":
            until = time.monotonic() + rng.uniform(0, length)
            while child.poll() is None and time.monotonic() < until:
                time.sleep(0.002)
        elif how == "file":
            skip, seen = rng.randrange(12), set()
            while child.poll() is None and len(seen) <= skip:
                with contextlib.suppress(FileNotFoundError):  # it has been renamed meanwhile
                    seen |= {(p, p.stat().st_ino) for p in self.folder.glob("logs/soak/*.part")}
        else:
            word, delay = rng.choice(PHASES), rng.uniform(0, 0.3)
            while child.poll() is None and not any(
                line.startswith(word) for line in self.lines()[begin:]
            ):
                time.sleep(0.005)
            time.sleep(delay)
        return how

    def kill(self, child, rng):
        """One kill; (signal, whom)."""
        number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        workers = [
            *map(
                int,
                subprocess.run(
                    ["pgrep", "-P", str(child.pid)], capture_output=True, text=True
                ).stdout.split(),
            )
        ]
        if workers and number == signal.SIGKILL and rng.random() < 0.5:
            os.kill(rng.choice(workers), number)
            child.wait(timeout=60)
            return number, "one rank"
        child.send_signal(number)
        for worker in (
            workers if number == signal.SIGKILL else ()
        ):  # they are sessions of their own and would go on without torchrun
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, number)
        child.wait(timeout=60)
        return number, "all"

    def results(self):
        """What must be the same: figures of every result, the artifact, the nats."""
        rows = [
            json.loads(line)
            for line in (self.folder / "logs/soak/metrics.jsonl").read_text().splitlines()
        ]
        final = {
            r["label"]: [f"{r['val_loss']:.8f}", f"{r['val_bpb']:.8f}", r["causal"]]
            for r in rows
            if r["label"].startswith("final_")
        }
        labels = [r["label"] for r in rows if r["label"].startswith(("final_", "eval_total"))]
        assert len(labels) == len(set(labels)) == 8, labels
        files = {
            p.name: hashlib.sha256(p.read_bytes()).hexdigest()
            for p in (self.folder / "logs/soak").glob("*[.z][pn][tp][zy]")
        }
        return final, files

    def check_files(self):
        """Only whole files, and no others than a run leaves."""
        names = {re.sub(r"\d{9}", "N", p.name) for p in (self.folder / "logs/soak").iterdir()}
        assert names == {
            "metrics.jsonl",
            "checkpoint.N.ckpt",
            "final_model.ptz",
            "train_gpt.py",
            *(f"nll_{e}.npy" for e in SETTINGS["EVALS"].split(",")),
        }, names
        for path in (self.folder / "logs/soak").glob("*.ckpt"):
            t.unseal(bytearray(path.read_bytes()))
        assert (
            self.log.read_text().endswith("\n")
            and sum(line.startswith("eval_total") for line in self.lines()) == 1
        )


def run_whole(folder, ranks):
    """(results, seconds) of a run that is left alone."""
    chain, began = Chain(folder, ranks), time.monotonic()
    assert chain.start().wait(timeout=300) == 0, (folder / "console").read_text()
    chain.check_files()
    return chain.results(), time.monotonic() - began


def checkpoint_cost(folder, steps, pairs, **settings):
    """Seconds of blocks of so many training steps of the demo's model [pairs, 2]: without a checkpoint, and with one that is begun after half of them."""
    c = t.load_config({"PRESET": "demo", "DEVICE": "cpu", "RUN_ID": "cost", **settings})
    run, model = t.Run(c), t.GPT(c)
    run.store.folder, seconds = folder, np.zeros((pairs, 2))
    state, feed = t.TrainingState(c, run.ranks, model), t.TrainData(c, run.ranks).batches()
    for pair in range(-1, pairs):  # one to warm up
        for save in (pair % 2, 1 - pair % 2):
            began = time.perf_counter()
            for step in range(steps):
                if save and step == steps // 2:
                    run.store.save("checkpoint", pair + 1, state.tensors())
                t.train_step(
                    c, run.ranks, model, state.optimizer, next(feed), step=step, lr_factor=1.0
                )
                state.averages.update(1.0)
            run.store.wait()
            seconds[pair, save] = time.perf_counter() - began
    return seconds


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cost",
        action="store_true",
        help="instead measure what a checkpoint every 50 steps costs the demo's training",
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="chains at a time")
    args = parser.parse_args(argv)
    if args.cost:
        with tempfile.TemporaryDirectory() as folder:
            seconds = checkpoint_cost(Path(folder), 50, 6)
            size = sum(p.stat().st_size for p in Path(folder).iterdir()) // 2
        for without, saving in seconds:
            print(
                f"50 steps of the demo: without {without:.2f} s, with a checkpoint of {size} bytes {saving:.2f} s"
            )
        without, saving = seconds.sum(0)
        print(
            f"all: checkpointing every 50 steps costs {100 * (saving / without - 1):.2f} % of training time"
        )
        return 0
    lock, total, phases, ended, failed = threading.Lock(), 0, collections.Counter(), 0, []
    folder, whole = Path(tempfile.mkdtemp(prefix="soak")), {}

    def undisturbed(ranks):
        (final, _), seconds = whole[ranks] = run_whole(folder / f"whole{ranks}", ranks)
        print(
            f"undisturbed, ranks:{ranks} {seconds:.0f} s: "
            + " ".join(f"{name.removeprefix('final_')}:{row[0]}" for name, row in final.items()),
            flush=True,
        )

    def one(index, ranks):
        nonlocal total, ended
        rng = random.Random(f"{args.seed}/{index}")
        chain, (expected, length), told = Chain(folder / f"chain{index}", ranks), whole[ranks], []
        for _ in range(rng.randrange(1, 4)):
            child = chain.start(RESUME="1")
            how = chain.wait_for(child, rng, length)
            phase = chain.phase()
            if child.poll() is not None:
                break
            number, whom = chain.kill(child, rng)
            told.append(f"{signal.Signals(number).name} {whom} at {phase} ({how})")
            with lock:
                total += 1
                phases[f"{signal.Signals(number).name} {phase}"] += 1
        if not told:
            return
        status = chain.start(RESUME="1").wait(timeout=300)
        try:
            assert status == 0, f"exit status {status}"
            chain.check_files()
            assert chain.results() == expected, "other results"
            verdict = "same"
        except (AssertionError, OSError, ValueError) as why:
            verdict = f"FAILED: {why!r}; {chain.folder}"
            failed.append(index)
        with lock:
            ended += 1
            print(f"chain {index} ranks:{ranks} {'; '.join(told)} -> {verdict}", flush=True)

    (folder / "data").mkdir()
    SETTINGS.update(make_tiny_data(folder / "data", 1000))
    with ThreadPoolExecutor(args.jobs) as pool:
        index, pending = 0, set()
        while total < args.kills and not failed:
            pending = {p for p in pending if not p.done() or p.result()}
            if len(pending) < args.jobs:
                ranks = 2 if index % 5 == 4 else 1
                if ranks not in whole:
                    undisturbed(ranks)
                pending.add(pool.submit(one, index, ranks))
                index += 1
            time.sleep(0.02)
    for phase, count in sorted(phases.items()):
        print(f"{count:4d} {phase}")
    print(f"kills:{total} chains:{ended} failed:{len(failed)}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
