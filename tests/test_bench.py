"""The plain versions do the script's work, the bench measures both, and docs/benchmarks.md is what its logs say."""

import itertools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, config, random_model, t

from tools import bench, plain

LOGS = bench.evidence(ROOT / "logs")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(VRL_ENABLED="1", XSA_LAST_N="3"),
        dict(TIE_EMBEDDINGS="0", BIGRAM_VOCAB_SIZE="0", VE_ENABLED="0"),
        dict(NUM_KV_HEADS="4", LN_SCALE="0"),
    ],
)
def test_plain_training_is_the_scripts(changes, tiny_data):
    c = config(tiny_data, **changes)
    run, model = t.Run(c), random_model(c)
    other = plain.plain_model(c, model, "cpu")
    optimizer, averages, trainer = (
        t.Optimizer(c, run.ranks, model),
        t.Averages(c, model.parameters()),
        plain.PlainTrainer(c, other),
    )
    for step, rows in zip(range(4), map(t.TrainData(c, run.ranks).load, range(4))):
        ids, targets = rows[:, :-1], rows[:, 1:]
        loss, _ = t.train_step(
            c, run.ranks, model, optimizer, (ids, targets), step=step, lr_factor=0.7
        )
        averages.update(0.7)
        assert trainer.step(ids.chunk(2), targets.chunk(2), step, 0.7) == pytest.approx(
            loss.item(), abs=2e-5
        )
    averaged = t.split_banks(
        dict(zip(dict(model.named_parameters()), averages.kept["ema"])), c.num_layers
    )
    for found, expected in (
        (
            dict(other.named_parameters()),
            t.split_banks(dict(model.named_parameters()), c.num_layers),
        ),
        (trainer.ema, averaged),
    ):
        for name, p in expected.items():
            torch.testing.assert_close(found[name], p, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize(
    "label,changes",
    [
        ("sliding_window", {}),
        ("ttt", {}),
        ("ttt_slot", {}),
        ("slot", dict(SLOT_LOSS="past")),
        ("slot", dict(SLOT_DELTA="window", SLOT_BIAS="1", SLOT_LOSS="scored")),
    ],
)
def test_plain_evaluation_is_the_scripts(label, changes, stream):
    c = config(**changes)
    (run, val), model = stream(c, 384), random_model(c)
    expected = plain.PlainEvaluation(
        c, plain.plain_model(c, model, "cpu"), val.tokens, label, c.slot_batch_seqs
    ).run()
    torch.testing.assert_close(
        t.score(run, model, val, [(label, c)])[0][0], expected, rtol=0, atol=1e-4
    )


def test_plain_quantising_is_the_scripts_without_a_cap():
    c = config()
    state = random_model(c).state_dict()
    quantizer = t.GptqLite(c, state)
    ours, theirs = t.unpack(quantizer.pack(0.0)[0])[0], plain.plain_quantize(c, state)[1]
    for name, kind in quantizer.kinds.items():
        other = (
            theirs[name + ".q"].float() * theirs[name + ".scale"].float()[:, None]
            if kind in t.LEVELS
            else theirs[name].float()
        )
        # at a tie of two percentiles, or of two levels, the last bit of a float decides
        assert ((other - ours[name]).abs() > 1e-6).float().mean() < 0.02, name


def test_unequal_work_is_not_compared():
    bench.equal("loss", {"plain": [1.0], "script": [1.0 + 1e-7]}, 1e-6)
    for wrong in (1.1, float("nan")):
        with pytest.raises(t.Fault, match="loss: script differs"):
            bench.equal("loss", {"plain": [1.0], "script": [wrong]}, 1e-6)


def test_bench_measures_writes_and_renders(tiny_data, tmp_path):
    out = tmp_path / "bench_test.json"
    command = [
        sys.executable,
        "-m",
        "tools.bench",
        "--parts",
        "step",
        "sliding",
        "ttt",
        "slot",
        "--rounds",
        "2",
        "--targets",
        "128",
        "--out",
        str(out),
    ]
    clean = {k: v for k, v in os.environ.items() if k not in t.SETTINGS}
    done = subprocess.run(
        command,
        env={**clean, **TINY, **tiny_data, "COMPILE": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert not found["cuda"] and len(found["parts"]) == 4
    rows = [row for part in found["parts"].values() for row in part]
    assert len(rows) == 9 and all(
        row["seconds"].keys() == {"plain", "script"} and np.isfinite(row["ratio"]["script"])
        for row in rows
    )
    assert all(x > 0 for x in rows[0]["memory"].values())
    text = bench.render([out])
    assert text.count("\n|") == 9 + 2 * 4 and "have not been made on a GPU" in text


def test_bench_refuses_what_it_cannot_use(tiny_data, tmp_path):
    for words, env, message in (
        (
            ["--targets", "100000"],
            {},
            "--targets 100000: the first validation shard has 600; give less",
        ),
        ([], {"TRAIN_BATCH_TOKENS": "x"}, "TRAIN_BATCH_TOKENS=x"),
    ):
        command = [
            sys.executable,
            "-m",
            "tools.bench",
            "--parts",
            "sliding",
            "--out",
            str(tmp_path / "no.json"),
            *words,
        ]
        clean = {k: v for k, v in os.environ.items() if k not in t.SETTINGS}
        done = subprocess.run(
            command,
            env={**clean, **TINY, **tiny_data, **env},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert (
            done.returncode == 2
            and message in done.stderr
            and "Traceback" not in done.stderr
            and not (tmp_path / "no.json").exists()
        )


def test_export_and_start_up_are_measured(tiny_data):
    b = bench.Bench(config(tiny_data, COMPILE="0"), 1, 128)
    (row,) = bench.bench_export(b, TINY)
    assert row["bytes"]["plain"] > 1000 < row["bytes"]["script"]
    assert [r["what"].split(" (")[0] for r in bench.bench_start(b, 1)] == [
        "import train_gpt",
        "train_gpt.py --help",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_kept():
    """New blocks cost a page fault for every 4096 bytes, kept ones none."""
    code = """import resource
import train_gpt as t
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40): t.torch.empty(2**21).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
t.keep_freed_memory(2**17, 2**17)
new = faults()
t.keep_freed_memory()
faults()
print(new, faults())"""
    new, kept = map(
        int,
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split(),
    )
    assert kept < new / 20, (new, kept)


def test_benchmarks_are_what_the_logs_say():
    assert LOGS and (ROOT / "docs/benchmarks.md").read_text() == bench.render(LOGS)


def test_the_speeds_that_the_page_gives_are_measured():
    found = {
        title: {row["what"]: row for row in rows}
        for title, rows in json.loads((ROOT / "logs/speed" / "bench_cpu.json").read_text())[
            "parts"
        ].items()
    }
    readme = " ".join((ROOT / "docs/speed.md").read_text().split())
    said = re.search(
        r"a training step ([\d.]+) times as fast \(([\d.]+) compiled\), sliding evaluation ([\d.]+) \(([\d.]+)\) against windows one by one "
        r"and ([\d.]+) \(([\d.]+)\) against batches of 32, TTT with SLOT ([\d.]+) \(([\d.]+)\), "
        r"quantising and compressing the record's model ([\d.]+) \((\d+) s\)",
        readme,
    ).groups()
    (export,) = json.loads((ROOT / "logs/speed" / "bench_export_cpu.json").read_text())["parts"][
        "Quantise and compress"
    ]  # of today's quantiser
    rows = [
        *found["Training step"].values(),
        *found["Sliding evaluation"].values(),
        *found["Score-first TTT with SLOT"].values(),
    ][:4]
    assert list(said[:8]) == [
        f"{row['ratio'][name]:.2f}" for row in rows for name in ("script", "compiled")
    ]
    assert said[8:] == (f"{export['ratio']['script']:.1f}", f"{export['seconds']['script']:.0f}")
    start = list(found["Start-up"].values())
    assert (
        f"import takes {start[0]['seconds']['script']:.1f} s" in readme
        and f"`--help` {start[1]['seconds']['script']:.1f} s" in readme
    )
    cold, warm = (start[2]["seconds"][name] for name in ("plain", "script"))
    assert f"{cold:.0f} s with an empty compile cache, {warm:.0f} s with a warm one" in readme
    assert all(
        row["ratio"]["script"] > 1
        for row in found["Against the lineage's own scripts, CPU seconds of one thread"].values()
    )


@pytest.mark.parametrize("writable", [True, False])
def test_compiled_code_is_kept_in_the_users_cache_if_there_can_be_one(
    writable, monkeypatch, tmp_path
):
    monkeypatch.setenv("HOME", str(tmp_path if writable else tmp_path / "none"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "x")  # so that monkeypatch puts it back
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    t.compile_model(t.GPT(config()))
    kept = os.environ.get(
        "TORCHINDUCTOR_CACHE_DIR", ""
    )  # torch names a folder of its own if there is none
    assert (
        kept == str(tmp_path / ".cache/train_gpt")
        if writable
        else not kept.startswith(str(tmp_path))
    )


@pytest.mark.parametrize("lag", [0, 2])
def test_progress_is_saved_once_an_interval_however_late_answers_come(lag, tiny_data, monkeypatch):
    """A GPU answers batches after it was asked: what was asked meanwhile must not save again."""
    run, saved, ticks = t.Run(config(tiny_data)), [], iter(np.arange(10**5) * 0.05)
    monkeypatch.setattr(t, "perf_counter", lambda: float(next(ticks)))
    run.store.save = lambda kind, window, tensors: saved.append(window)
    checkpoint = t.PassCheckpoint(t.load_config({}), run, "progress")
    checkpoint.poll.lag = lag
    watch = t.Stopwatch(run.ranks, 1)
    for window in range(400):
        checkpoint.mark(window, torch.zeros(2, 5), {}, watch)
    assert len(saved) > 5 and min(b - a for a, b in itertools.pairwise(saved)) > 4, saved
