"""How fast train_gpt.py is: its parts beside plain PyTorch versions of the same arithmetic, the two in turn in one process.

    PRESET=demo python -m tools.bench --parts sliding --rounds 2 --targets 512 --out logs/my_bench.json
    python -m tools.bench --render    # write docs/benchmarks.md from logs/speed/bench_*.json and logs/gpu/bench_*.json

Without --parts all parts are timed, about fifteen minutes, on what DATA_PATH holds; without --out the figures go to
logs/speed/bench_cpu.json, or bench_<GPU>.json. --lineage DIR adds the settings for which times of #1084's and #1313's own
scripts are known.

The baselines are in tools/plain.py; a part counts only if its results are theirs. A ratio is the median over rounds of the baseline's
seconds over the script's, so that a machine which is busy for a while does not tell. On a CPU the script is timed as it is
and with COMPILE=1, the baseline as it is; on a GPU both are compiled. Settings are the script's own environment variables.
"""

import sys

if not __package__:
    print("error: the tools are a package: python -m tools.bench ...", file=sys.stderr)
    sys.exit(2)

from tools import console

if __name__ == "__main__":
    console.begin()

import contextlib
import copy
import dataclasses
import gc
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

import train_gpt as t
from tools import plain
from tools.evaluators import Stream

ROOT = Path(__file__).resolve().parents[1]

STEPS = 6  # of training in a turn: kept memory is worth something from the second on
PEAK = {
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H200": 989.5e12,
}  # dense bf16 FLOP/s by their data sheets
SLOT_MODES = {
    "one delta a batch, 3 steps": {},
    "one delta, carried on (causal), 3 steps": {"slot_loss": "past"},
    "a delta and bias a window, 24 steps": {
        "slot_delta": "window",
        "slot_bias": True,
        "slot_loss": "scored",
        "slot_steps": 24,
    },
}
# CPU seconds of one thread that #1084's and #1313's own scripts took with settings.env of two folders, measured elsewhere
LINEAGE = {
    "a": {"step": 1.15, "sliding_window": 8.1, "ttt_slot": 28.7},
    "b1313": {"step": 1.18, "sliding_window": 8.8, "slot": 143.5},
}


def flops_a_token(c):
    """Multiplications and additions of a training token, forward and backward: 6 a matrix weight, and causal attention."""
    D, kv = c.model_dim, c.model_dim // c.num_heads * c.num_kv_heads
    weights = (
        c.num_layers * (2 * D * D + 2 * D * kv + 2 * D * int(D * c.mlp_mult)) + D * c.vocab_size
    )
    weights += c.bigram_dim * D * bool(c.bigram_vocab_size) + c.ve_dim * kv * c.ve_enabled
    return 6 * weights + 6 * c.num_layers * D * c.train_seq_len


class Bench:
    """One machine, one configuration, and what the parts share."""

    def __init__(self, c, rounds, targets):
        self.c, self.rounds, self.targets, self.run = c, rounds, targets, t.Run(c)
        self.runs = {}
        for name in ("script", "compiled"):
            run = self.runs[name] = copy.copy(self.run)
            run.ranks = copy.copy(self.run.ranks)
            run.ranks.compile = name == "compiled"
        self.attention = t.choose_attention(c.attention, self.run.ranks)
        self.data = t.TrainData(c, self.run.ranks)
        self.compiles = self.run.ranks.cuda or c.compile != "0"

    def model(self, compiled):
        """A GPT with weights that are not the initial ones, whose output matrices are zero."""
        model, g = (
            t.GPT(self.c, self.run.ranks.dtype, self.attention[1]),
            torch.Generator().manual_seed(1),
        )
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() > 1:
                    p.add_(torch.randn(p.shape, generator=g) * p.size(-1) ** -0.5 / 2)
        model.to(self.run.ranks.device)
        if compiled:
            t.compile_model(model)
        return model

    def sides(self):
        """{"plain": PlainGPT, "script": GPT, "compiled": GPT}, on a GPU without "script"; all with the same weights."""
        models = {"script": self.model(False)} if not self.run.ranks.cuda else {}
        if self.compiles:
            models["compiled"] = self.model(True)
        return {
            "plain": plain.plain_model(
                self.c, next(iter(models.values())), self.run.ranks.device, self.run.ranks.cuda
            ),
            **models,
        }

    def stream(self, targets):
        """The first validation tokens."""
        tokens = t.open_split(self.c, "val")[0][: targets + 1].astype("int64")
        if len(tokens) <= targets:
            raise t.BadInput(
                f"--targets {targets}: the first validation shard has {len(tokens) - 1}; give less."
            )
        return Stream(torch.from_numpy(tokens).to(self.run.ranks.device))

    def largest_block(self, sequences):
        """Bytes of the largest tensor, of so many sequences, that glibc's own rule would learn to keep: under 32 MiB."""
        tokens, c = sequences * self.c.eval_seq_len, self.c
        sizes = [
            4 * tokens * width
            for width in (c.model_dim, int(c.model_dim * c.mlp_mult), c.vocab_size)
        ]
        return max((size for size in sizes if size < 2**25), default=2**25)

    def compare(self, work, block):
        """{name: [seconds]} of work {name: function}, in turn, after a round that is not counted. The baseline runs with what glibc's malloc
        learns by itself in a script that asks for nothing: blocks up to the largest that was freed are kept, and twice that at the end."""
        seconds = {name: [] for name in work}
        for i in range(self.rounds + 1):
            for name, function in work.items():
                t.keep_freed_memory(*((block, 2 * block) if "plain" in name else ()))
                gc.collect()
                self.run.ranks.synchronize()
                began = time.perf_counter()
                function()
                self.run.ranks.synchronize()
                if i:
                    seconds[name].append(time.perf_counter() - began)
        return seconds


def row(what, seconds, **more):
    """A table row: median seconds of each side, and ratios of the baseline's."""
    base = seconds["plain"]
    return {
        "what": what,
        "seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "ratio": {
            name: statistics.median(a / b for a, b in zip(base, s))
            for name, s in seconds.items()
            if name != "plain"
        },
        **more,
    }


def equal(what, found, limit):
    """Raises Fault unless all sides give the plain one's numbers."""
    for name, values in found.items():
        gap = (
            (torch.as_tensor(values).double() - torch.as_tensor(found["plain"]).double())
            .abs()
            .max()
            .item()
        )
        if not gap <= limit:
            raise t.Fault(
                f"{what}: {name} differs from the plain version by {gap:.2e}, over {limit}; only"
                " equal work is compared."
            )


def bench_step(b):
    """Whole training steps, loader, optimiser and averages included."""
    c, run, losses, work, memory = b.c, b.run, {}, {}, {}
    for name, model in b.sides().items():
        if name == "plain":
            trainer = plain.PlainTrainer(c, model)
            parts = t.micro_batches(
                run.ranks, c.train_batch_tokens // c.train_seq_len, c.train_seq_len
            )

            def step(i, trainer=trainer, parts=parts):
                rows = b.data.load(i).to(run.ranks.device)
                return trainer.step(rows[:, :-1].chunk(parts), rows[:, 1:].chunk(parts), i, 1.0)
        else:
            optimizer, averages, feed = (
                t.Optimizer(c, run.ranks, model),
                t.Averages(c, model.parameters()),
                b.data.batches(),
            )

            def step(i, model=model, optimizer=optimizer, averages=averages, feed=feed):
                loss, _ = t.train_step(
                    c, run.ranks, model, optimizer, next(feed), step=i, lr_factor=1.0
                )
                averages.update(1.0)
                return loss

        if run.ranks.cuda:
            torch.cuda.reset_peak_memory_stats()
        losses[name] = [float(step(i)) for i in range(3)]
        memory[name] = torch.cuda.max_memory_allocated() if run.ranks.cuda else 0
        count = iter(range(3, 10**6))
        work[name] = lambda step=step, count=count: [step(next(count)) for _ in range(STEPS)]
    equal("training loss", losses, 2e-2 if run.ranks.cuda else 1e-4)
    seconds = {
        name: [s / STEPS for s in found]
        for name, found in b.compare(
            work, b.largest_block(c.train_batch_tokens // c.eval_seq_len)
        ).items()
    }
    more = {"tokens": c.train_batch_tokens}
    if run.ranks.cuda:
        more["memory"] = memory
        peak = PEAK.get(torch.cuda.get_device_name())
        if peak:
            more["mfu"] = {
                name: flops_a_token(c) * c.train_batch_tokens / statistics.median(s) / peak
                for name, s in seconds.items()
            }
    else:
        more["memory"] = (
            {name: child_memory(name) for name in ("plain", "script")}
            if sys.platform == "linux"
            else {}
        )
    return [row("step", seconds, **more)]


def child_memory(name):
    """Bytes that the process grows by, at its largest, in three training steps; measured in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench", "--memory", name], capture_output=True, text=True
    )
    if done.returncode:
        raise t.Fault(f"bench --memory {name}: {done.stderr[-500:]}")
    return int(done.stdout.split()[-1])


def status(field):
    """Bytes of a line of /proc/self/status."""
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def measure_memory(b, name):
    """What child_memory() runs, on Linux."""
    b.compiles = False
    model = b.sides()[name]
    if name == "plain":
        trainer = plain.PlainTrainer(b.c, model)
    else:
        optimizer, averages = (
            t.Optimizer(b.c, b.run.ranks, model),
            t.Averages(b.c, model.parameters()),
        )
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = status("VmRSS")
    for i in range(3):
        rows = b.data.load(i)
        if name == "plain":
            trainer.step([rows[:, :-1]], [rows[:, 1:]], i, 1.0)
        else:
            batch = rows[:, :-1], rows[:, 1:]
            t.train_step(b.c, b.run.ranks, model, optimizer, batch, step=i, lr_factor=1.0)
            averages.update(1.0)
    return status("VmHWM") - before


def bench_sliding(b):
    """Sliding windows, without adaptation: the baseline window by window, and in batches of 32 as the lineage."""
    val, sides, rows = b.stream(b.targets), b.sides(), []
    for batch, what in (
        (1, "baseline window by window"),
        (32, "baseline in batches of 32 windows"),
    ):
        nats = {}

        def evaluate(name, model, batch=batch, nats=nats):
            if name == "plain":
                nats[name] = plain.PlainEvaluation(b.c, model, val.tokens, batch=batch).run()
            else:
                nats[name] = t.score(b.runs[name], model, val, [("sliding_window", b.c)])[0][
                    0
                ].cpu()

        work = {
            name: lambda name=name, model=model: evaluate(name, model)
            for name, model in sides.items()
        }
        seconds = b.compare(work, b.largest_block(batch))
        equal(
            "sliding val_loss",
            {name: x.double().mean() for name, x in nats.items()},
            1e-3 if b.run.ranks.cuda else 2e-6,
        )
        rows.append(row(f"stride {b.c.eval_stride}, {what}", seconds, tokens=val.n))
    return rows


@contextlib.contextmanager
def timed(run, owner, name, into):
    """Add the seconds of calls of a method to into[0]."""
    function = getattr(owner, name)

    def wrapped(*args, **more):
        run.ranks.synchronize()
        began = time.perf_counter()
        result = function(*args, **more)
        run.ranks.synchronize()
        into[0] += time.perf_counter() - began
        return result

    setattr(owner, name, wrapped)
    yield
    setattr(owner, name, function)


def bench_ttt(b):
    """Three chunks of score-first TTT with SLOT, two of which are trained on."""
    c, val = b.c, b.stream(3 * b.c.ttt_chunk_tokens)
    nats, training, parts = {}, {}, {"score": {}, "train": {}}

    def evaluate(name, model):
        spent, began = [0.0], time.perf_counter()
        with (
            t.put_back(model.parameters()),
            timed(
                b.run, plain.PlainEvaluation if name == "plain" else t.ChunkTrainer, "train", spent
            ),
        ):
            if name == "plain":
                nats[name] = plain.PlainEvaluation(
                    c, model, val.tokens, "ttt_slot", c.slot_batch_seqs
                ).run()
            else:
                nats[name] = t.score(b.runs[name], model, val, [("ttt_slot", c)])[0][0].cpu()
        b.run.ranks.synchronize()
        training.setdefault(name, []).append(spent[0])
        parts["score"].setdefault(name, []).append((time.perf_counter() - began - spent[0]) / 3)
        parts["train"].setdefault(name, []).append(spent[0] / 2)

    sides = b.sides()
    work = {
        name: lambda name=name, model=model: evaluate(name, model) for name, model in sides.items()
    }
    whole = b.compare(work, b.largest_block(c.ttt_batch_seqs))
    equal(
        "TTT + SLOT val_loss",
        {name: x.double().mean() for name, x in nats.items()},
        1e-2 if b.run.ranks.cuda else 1e-5,
    )
    rows = [row("three chunks, two trained on", whole, tokens=val.n)]
    return rows + [
        row(f"{what} a chunk of {c.ttt_chunk_tokens} targets", {n: s[1:] for n, s in found.items()})
        for what, found in parts.items()
    ]


def bench_slot(b):
    """Seconds of an evaluation with SLOT less those of plain sliding."""
    targets = b.c.eval_seq_len + b.c.eval_stride * (2 * b.c.slot_batch_seqs - 1)
    val, sides, rows = b.stream(targets), b.sides(), []
    base = dataclasses.replace(b.c, val_batch_size=b.c.slot_batch_seqs * b.c.eval_seq_len)
    for what, changes in SLOT_MODES.items():
        c, nats, work = dataclasses.replace(base, **changes), {}, {}
        for name, model in sides.items():
            for label in ("sliding_window", "slot"):

                def evaluate(name=name, model=model, label=label, c=c):
                    if name == "plain":
                        nats[name] = plain.PlainEvaluation(
                            c, model, val.tokens, label, c.slot_batch_seqs
                        ).run()
                    else:
                        nats[name] = t.score(b.runs[name], model, val, [(label, c)])[0][0].cpu()

                work[name, label] = evaluate
        found = b.compare(work, b.largest_block(c.slot_batch_seqs))
        equal(
            f"SLOT, {what}: val_loss",
            {name: x.double().mean() for name, x in nats.items()},
            1e-3 if b.run.ranks.cuda else 1e-5,
        )
        pairs = {name: [*zip(found[name, "slot"], found[name, "sliding_window"])] for name in sides}
        rows.append(
            row(
                what,
                {name: [x - y for x, y in pair] for name, pair in pairs.items()},
                share={
                    name: statistics.median(x / y - 1 for x, y in pair)
                    for name, pair in pairs.items()
                },
            )
        )
    return rows


def bench_export(b, changes=None):
    """The record's model of 11 x 512 with Gaussian weights: the script, with equal steps for all, also lands just under the cap, the baseline
    takes what comes."""
    c = t.load_config(changes or {})
    model, g = t.GPT(c), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (p.size(-1) if p.dim() else 1) ** -0.5)
    state, sizes, threads = model.state_dict(), {}, torch.get_num_threads()

    def run(name):
        if name == "plain":
            torch.set_num_threads(1)
            sizes[name] = len(plain.plain_quantize(c, state)[0])
            torch.set_num_threads(threads)
        else:
            there = {n: p.to(b.run.ranks.device) for n, p in state.items()}
            steps = {
                n: torch.zeros(sum(w.shape), dtype=torch.int8, device=w.device)
                for n, w in t.split_banks(there, c.num_layers).items()
                if t.parameter_rule(n).export in t.LEVELS
            }
            quantizer = t.make_quantizer(c, there, t.Calibration(steps, {}))
            sizes[name] = len(quantizer.fit(t.bytes_for_weights(c))[0])

    rounds, b.rounds = b.rounds, 1 if changes is None else b.rounds
    block = 4 * max(p[0].numel() for p in model.parameters() if p.dim() == 3)
    seconds = b.compare({name: lambda name=name: run(name) for name in ("plain", "script")}, block)
    b.rounds = rounds
    return [row(f"{sum(p.numel() for p in model.parameters()):,} parameters", seconds, bytes=sizes)]


def bench_start(b, rounds=5):
    """Import, --help, and the script's first and second start with COMPILE=1, each a process."""
    env = {k: v for k, v in os.environ.items() if k not in t.SETTINGS}

    def process(*words, cwd=ROOT, **more):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *words], env={**env, **more}, cwd=cwd, capture_output=True, text=True
        )
        if done.returncode:
            raise t.Fault(f"{' '.join(words)}: {done.stderr[-500:]}")
        return time.perf_counter() - began

    script, rows = str(ROOT / "train_gpt.py"), []
    for what, ours, base, other in (
        ("import train_gpt", ("-c", "import train_gpt"), "import torch", ("-c", "import torch")),
        ("train_gpt.py --help", (script, "--help"), "import torch", ("-c", "import torch")),
    ):
        seconds = {"plain": [], "script": []}
        for i in range(rounds + 1):
            for name, words in (("plain", other), ("script", ours)):
                (seconds[name].append if i else lambda s: None)(process(*words))
        rows.append(row(f"{what} (baseline: {base})", seconds))
    if b.compiles:
        settings = {
            name: t.shown(getattr(b.c, name.lower()))
            for name in t.SETTINGS
            if name.lower() in b.c.explicit or name == "PRESET"
        }
        settings |= {
            name: str(Path(getattr(b.c, name.lower())).resolve())
            for name in ("DATA_PATH", "TOKENIZER_PATH")
        }
        settings |= {
            "COMPILE": "1",
            "ITERATIONS": "3",
            "WARMUP_STEPS": "1",
            "EVALS": "roundtrip",
            "SAVE_EVERY": "0",
        }
        with tempfile.TemporaryDirectory() as folder:
            settings["TORCHINDUCTOR_CACHE_DIR"] = folder + "/cache"
            cold, warm = (
                process(script, cwd=folder, RUN_ID=name, **settings) for name in ("cold", "warm")
            )
        rows.append(
            row(
                "a run of 3 steps and 1 evaluation with COMPILE=1, warm cache (baseline: cold cache)",
                {"plain": [cold], "script": [warm]},
            )
        )
    return rows


def bench_lineage(folder):
    """CPU seconds of one thread with the settings that the lineage's own scripts were timed with."""
    rows = []
    torch.set_num_threads(1)

    def cpu_seconds(work, times):
        found = []
        for _ in range(times):
            began = time.process_time()
            work()
            found.append(time.process_time() - began)
        return statistics.median(found[1:] or found)

    for name, theirs in LINEAGE.items():
        settings = dict(
            line.split("=", 1) for line in (folder / name / "settings.env").read_text().split()
        )
        settings |= {
            "DATA_PATH": str(folder / "a"),
            "TOKENIZER_PATH": str(folder.parent / "fineweb_1024_bpe.model"),
            "DEVICE": "cpu",
        }
        settings |= {"PRESET": "pr1313", "VRL_ENABLED": "1"} if name == "b1313" else {}
        known = {k: v for k, v in settings.items() if k in t.SETTINGS}
        c = t.load_config({**known, "LOAD_ARTIFACT": str(folder / name / "final_model.ptz")})
        c, state = t.read_artifact(c)
        run, model = t.Run(c), t.GPT(c)
        torch.set_num_threads(1)
        t.load_state(model, state, name)
        val = Stream(torch.from_numpy(t.open_split(c, "val")[0].astype("int64")))
        for label, seconds in theirs.items():
            if label == "step":
                other = t.GPT(c)
                optimizer, averages = (
                    t.Optimizer(c, run.ranks, other),
                    t.Averages(c, other.parameters()),
                )
                rows_of = val.tokens[: c.train_batch_tokens + 1].unfold(
                    0, c.train_seq_len + 1, c.train_seq_len
                )

                def work():
                    batch = rows_of[:, :-1], rows_of[:, 1:]
                    t.train_step(c, run.ranks, other, optimizer, batch, step=0, lr_factor=1.0)
                    averages.update(1.0)

                ours = cpu_seconds(work, 8)
            else:

                def work():
                    with t.put_back(model.parameters()):
                        t.score(run, model, val, [(label, c)])

                ours = cpu_seconds(work, 1)
            rows.append(
                {
                    "what": f"{name}: {label}",
                    "seconds": {"lineage": seconds, "script": ours},
                    "ratio": {"script": seconds / ours},
                }
            )
    return rows


PARTS = {
    "step": (bench_step, "Training step"),
    "sliding": (bench_sliding, "Sliding evaluation"),
    "ttt": (bench_ttt, "Score-first TTT with SLOT"),
    "slot": (bench_slot, "Time that SLOT adds to sliding"),
    "export": (bench_export, "Quantise and compress"),
    "start": (bench_start, "Start-up"),
}


def cells(row):
    """Texts of a row's columns."""
    sides, more = row["seconds"], []
    for name in ("script", "compiled"):
        more += (
            [f"{sides[name]:.3g}", f"**{row['ratio'][name]:.2f}**"] if name in sides else ["", ""]
        )
    base = next(iter(sides.values()))
    rate = f"{row['tokens'] / min(sides.values()):,.0f}" if "tokens" in row else ""
    return [row["what"], f"{base:.3g}", *more, rate]


def evidence(logs):
    """JSON files of a folder logs/, those of a CPU first."""
    files = sorted([*logs.glob("speed/bench_*.json"), *logs.glob("gpu/bench_*.json")])
    return sorted(files, key=lambda path: read_bench(path)["cuda"])


def read_bench(path):
    """What main() wrote to a file. Raises BadInput."""
    found = console.read_json(path)
    needed = {"cuda", "device", "command", "torch", "python", "attention", "rounds", "parts"}
    if not {*needed, "configuration"} <= set(found):
        raise t.BadInput(f"{path}: is no benchmark's; bring it back, or time again.")
    return found


def render(files):
    """Text of docs/benchmarks.md."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m tools.bench --render` from `bench_*.json` in `logs/speed/` and `logs/gpu/`; a test regenerates it. Seconds are medians, ratios are medians "
        "over rounds of the baseline's seconds over the script's, the two in turn in one process: over 1 is faster. The baselines, in "
        "`tools/plain.py`, are plain PyTorch of the same arithmetic; a part counts only if its results are theirs.",
    ]
    for path in files:
        found = read_bench(path)
        lines += [
            "",
            f"## {found['device']}",
            "",
            f"`{found['command']}`, torch {found['torch']}, Python {found['python']}, attention {found['attention']}, "
            f"{found['rounds']} rounds, `logs/{path.parent.name}/{path.name}`. Configuration: {found['configuration']}.",
        ]
        for title, rows in found["parts"].items():
            base = "lineage's" if any("lineage" in row["seconds"] for row in rows) else "baseline's"
            lines += [
                "",
                f"### {title}",
                "",
                f"| | {base} seconds | script's | ratio | with COMPILE=1 | ratio | tokens/s |",
            ]
            lines.append("|---|---:|---:|---:|---:|---:|---:|")
            lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
            for row in rows:
                lines += notes(row)
            if base == "lineage's":
                lines += [
                    "",
                    "The lineage's seconds were measured elsewhere with the same settings: no comparison in turn.",
                ]
    if not any(read_bench(path)["cuda"] for path in files):
        lines += [
            "",
            "## GPU",
            "",
            "These comparisons have not been made on a GPU. What has been measured on one is in [speed.md](speed.md#on-a-gpu).",
        ]
    return "\n".join(lines) + "\n"


def notes(row):
    """Lines under a table."""
    found = []
    if "mfu" in row:
        found.append(
            "MFU, of the data sheet's dense bf16 peak: "
            + ", ".join(f"{name} {x:.1%}" for name, x in row["mfu"].items())
            + "."
        )
    if "memory" in row:
        found.append(
            "Peak memory: "
            + ", ".join(f"{name} {x / 2**20:,.0f} MiB" for name, x in row["memory"].items())
            + "."
        )
    if "share" in row:
        found.append(
            f"{row['what']}: adds to the seconds of sliding "
            + ", ".join(f"{name} {x:.0%}" for name, x in row["share"].items())
            + "."
        )
    if "bytes" in row:
        found.append(
            "Artifact: "
            + ", ".join(f"{name} {x:,} bytes" for name, x in row["bytes"].items())
            + "."
        )
    return ["", " ".join(found)] if found else []


def device_name(run):
    """(title, file name) of this machine."""
    if run.ranks.cuda:
        name = torch.cuda.get_device_name()
        return f"One {name}", re.sub(r"\W+", "_", name.removeprefix("NVIDIA ").lower())
    with contextlib.suppress(OSError):
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        return (
            f"CPU, {torch.get_num_threads()} threads of {model[1] if model else platform.machine()}",
            "cpu",
        )
    return f"CPU, {torch.get_num_threads()} threads", "cpu"


@console.tool
def main(argv=None):
    """Time the parts, or write the page of what was timed."""
    parser = console.Parser("bench", __doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument(
        "--rounds",
        type=console.number(int, 1, 1000),
        default=7,
        help="of which medians are taken (7)",
    )
    parser.add_argument(
        "--targets",
        type=console.number(int, 1, t.MAX_INT),
        default=16384,
        help="of sliding evaluation (16384)",
    )
    parser.add_argument("--lineage", type=Path, metavar="DIR", help="folder with a/ and b1313/")
    parser.add_argument(
        "--out", type=Path, help="JSON file instead of logs/speed/bench_DEVICE.json"
    )
    parser.add_argument("--render", action="store_true", help="only write docs/benchmarks.md")
    parser.add_argument("--memory", choices=("plain", "script"), help=console.HIDDEN)
    options = parser.parse_args(argv)
    if options.render:
        Path("docs/benchmarks.md").write_text(render(evidence(Path("logs"))))
        return
    b = Bench(t.load_config(os.environ), options.rounds, options.targets)
    if options.memory:
        print(measure_memory(b, options.memory))
        return
    title, short = device_name(b.run)
    given = sorted(b.c.explicit - {"preset", "data_path", "tokenizer_path"})
    found = {
        "device": title,
        "cuda": b.run.ranks.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rounds": b.rounds,
        "attention": t.attention_kernel(b.attention[0], b.c, b.run.ranks),
        "configuration": " ".join(
            [
                f"PRESET={t.shown(b.c.preset)}",
                *(f"{n.upper()}={t.shown(getattr(b.c, n))}" for n in given),
            ]
        ),
        "command": " ".join(
            [
                "python -m tools.bench",
                *("DIR" if a.startswith(("/", "..")) else a for a in sys.argv[1:]),
            ]
        ),
        "sha256_of_script": hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest(),
        "parts": {},
    }
    path = options.out or Path("logs/speed") / f"bench_{short}.json"
    if path.is_dir():
        raise t.BadInput(f"--out {path}: is a folder; give the path of a JSON file.")
    jobs = [(PARTS[name][1], lambda name=name: PARTS[name][0](b)) for name in options.parts]
    if options.lineage:
        for name in LINEAGE:
            if not (options.lineage / name / "settings.env").is_file():
                raise t.BadInput(
                    f"--lineage {options.lineage}: has no {name}/settings.env; give a folder that has."
                )
        jobs.append(
            (
                "Against the lineage's own scripts, CPU seconds of one thread",
                lambda: bench_lineage(options.lineage),
            )
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    for title, job in jobs:
        with t.CONSOLE.doing(title):
            found["parts"][title] = job()
        for one in found["parts"][title]:
            print(f"{title}: " + " | ".join(x for x in cells(one) if x), flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n")  # what was measured so far survives
    print(f"wrote {path}")


if __name__ == "__main__":
    console.run(main)
