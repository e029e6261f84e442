"""tools/report.py: every style of log, tables, significance, checks, submission.json, figures, and files that are no logs."""

import io
import json
import math
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import PARITY
from scipy import stats

import train_gpt
from tools import checks, figures, report, significance
from tools.follow import follow, status_line
from tools.logs import STAGES, LogError, read_log
from tools.submission import differing, submission
from tools.tables import DEMO

PUBLISHED = PARITY / "lineage" / "published_logs"
needs_published = pytest.mark.skipif(
    not PUBLISHED.exists(), reason="the published logs are not part of the repository"
)


def published(pattern):
    return [read_log(p) for p in sorted(PUBLISHED.glob(pattern))]


def rounded(logs, stage):
    return [round(log.results[stage].val_bpb, 4) for log in logs]


# ---- logs of the lineage, figures from what their authors published (SPEC.md, section 6)


@needs_published
def test_every_published_log_parses_and_gives_the_published_figures():
    assert len(published("*")) == 14 and all(
        log.finished and log.world_size == 8 and log.batch_tokens == 786432
        for log in published("*")
    )
    slot = {log.seed: log for log in published("pr1084_slot*")}
    assert [f"{slot[s].results['ttt_slot'].val_bpb:.4f}" for s in (1337, 42, 2025)] == [
        "1.1188",
        "1.1185",
        "1.1183",
    ]
    values = rounded(slot.values(), "ttt_slot")
    assert f"{statistics.mean(values):.4f} {statistics.stdev(values):.4f}" == "1.1185 0.0003"
    assert all(
        385 <= log.results["ttt_slot"].seconds <= 389 and 15.87e6 <= log.total_bytes <= 16e6
        for log in slot.values()
    )
    (base,) = published("pr1084_baseline*")
    assert "ttt_slot" not in base.results and 350 <= base.results["ttt"].seconds <= 353
    (ctw,) = published("pr1084_ctw*")
    assert (
        f"{ctw.results['ttt_ctw'].val_bpb:.4f}" == "1.1252"
        and round(ctw.results["ttt_ctw"].seconds, -1) == 2760
        and "ttt" not in ctw.results
    )
    logs = published("pr1150*")
    assert f"{statistics.mean(log.score.val_bpb for log in logs):.5f}" == "1.11512" and {
        log.parameters for log in logs
    } == {26_993_756}
    assert all(
        569 <= round(log.results["ttt_slot"].seconds) <= 572
        and round(log.total_bytes, -4) in (15_950_000, 15_960_000)
        for log in logs
    )
    scores = {
        log.seed: (f"{log.score.val_bpb:.4f}", f"{log.results['sliding_window'].val_bpb:.4f}")
        for log in published("pr1313*")
    }
    assert scores == {
        1337: ("0.8683", "1.1258"),
        42: ("0.8582", "1.1210"),
        2024: ("0.8647", "1.1221"),
    }
    last = {log.seed: log for log in published("pr1488*")}
    assert {s: f"{log.score.val_bpb:.4f}" for s, log in last.items()} == {
        42: "0.8233",
        1337: "0.8292",
        2024: "0.8269",
    }
    assert f"{last[1337].results['sliding_window'].val_bpb:.4f}" == "1.0884" and not any(
        r.causal for log in last.values() for r in log.results.values()
    )
    steps = [log.step_avg for log in slot.values()]
    assert (
        min(steps) >= 83.8
        and max(steps) <= 84.2
        and {log.steps for log in slot.values()} == {7154, 7152, 7155}
    )


@needs_published
def test_labels_that_say_the_wrong_thing_are_recognised_as_what_they_are():
    for log in published("pr1084*") + published("pr1150*"):
        (line,) = log.mislabelled
        assert (
            line.startswith("final_int8_zlib_roundtrip_exact")
            and "the score of sliding_window with stride 64" in line
        )
        assert log.results["roundtrip"].val_bpb > 1.14
    for log in published("pr1313*") + published("pr1488*"):
        assert [("stride 96" in line, "stride 64" in line) for line in log.mislabelled] == [
            (True, False),
            (False, True),
        ]
        assert log.results["sliding_window"].stride == 96 and log.extra[0].stride == 64


# What the table in #1084's record says of seed 1337, where it differs from its log (DEFECTS.md, row 18).
RECORD = """# A record
| Seed | step_avg | Steps | Pre-TTT bpb | **Post-TTT bpb** | TTT gain | Artifact |
|---|---|---|---|---|---|---|
| 1337 | 83.9ms | 7,127 | 1.1385 | **1.1188** | -0.0197 | 15,965,604 |
| 42 | 83.9ms | 7,155 | 1.1219 | **1.1185** | -0.0034 | 15,882,932 |
| 2025 | 83.9ms | 7,152 | 1.1216 | **1.1183** | -0.0033 | 15,994,920 |
| Mean | | | | 1.1185 | | |
"""


@needs_published
def test_a_record_whose_table_contradicts_its_logs_fails_the_check(tmp_path, capsys):
    for path in PUBLISHED.glob("pr1084_slot*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "README.md").write_text(RECORD)
    (tmp_path / "submission.json").write_text(
        json.dumps({"val_bpb": 1.1185, "val_loss": 1.8885, "bytes_total": 15_965_604})
    )
    assert report.main([str(tmp_path), "--check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line[6:] for line in lines if line.startswith("FAIL")]
    for wrong in (
        "README, seed 1337, Steps: 7,127, the log says 7,154",
        "README, seed 1337, Artifact: 15,965,604, the log says 15,873,232",
        "README, seed 1337, Pre-TTT bpb: 1.1385, the log says 1.1224",
        "submission.json: bytes_total: 15965604, the largest in the logs is 15994920",
    ):
        assert wrong in failed
    assert sum(
        "final_int8_zlib_roundtrip_exact" in line for line in failed
    ) == 3 and "train_gpt.py: missing" in "".join(failed)
    assert sum("README, seed" in line for line in failed) == 3 and any(
        line.startswith("ok") and "submission.json: val_bpb" in line for line in lines
    )


@needs_published
@pytest.mark.parametrize(
    "heading,cell,fine",
    [
        ("Pre-quant BPB", "1.1384", True),
        ("Roundtrip BPB", "1.1459", True),
        ("TTT time (ms)", "386301", True),
        ("Size", "15.87 MB", True),
        ("Params", "26.9", True),
        ("Size (MB)", "15.97", False),
        ("Steps", "7154", True),
        ("ms/step", "83.9", True),
        ("ms/step", "84.9", False),
        ("val_loss", "1.8890", True),
        ("BPB", "1.1189", False),
    ],
)
def test_headings_of_other_peoples_tables(heading, cell, fine, tmp_path):
    log = read_log(PUBLISHED / "pr1084_slot_seed1337.log")
    text = f"| run | Seed | {heading} |\n|---|---|---|\n| a | **1337** (best) | {cell} |\n| b | Mean | {cell} |\n"
    verdicts = [v for w, v, _ in checks.check_readme(text, [log]) if w.startswith("README, ")]
    assert all(v == fine for v in verdicts) and (
        verdicts or "time" in heading or heading == "Params"
    )


@needs_published
def test_a_log_of_the_lineage_that_is_cut_off_is_not_finished(tmp_path):
    data = (PUBLISHED / "pr1084_slot_seed1337.log").read_bytes()
    for end in (
        data.index(b"ttt_sliding:done"),
        data.index(b"legal_ttt_exact") + 40,
        data.index(b"legal_ttt val_loss") + 30,
    ):
        (tmp_path / "a.log").write_bytes(data[:end])
        log = read_log(tmp_path / "a.log")
        assert log.eval_seconds is None or log.results["ttt_slot"].val_bpb == 1.1188
        assert log.finished == ("ttt_slot" in log.results)
    (tmp_path / "two.log").write_bytes(
        data + b"\n" + (PUBLISHED / "pr1084_slot_seed42.log").read_bytes()
    )
    with pytest.raises(LogError, match="has 2 runs"):
        read_log(tmp_path / "two.log")
    (tmp_path / "tee.log").write_bytes(
        b"\n".join(b"[rank0]: " + line for line in data.splitlines())
    )
    assert (
        read_log(tmp_path / "tee.log").results
        == read_log(PUBLISHED / "pr1084_slot_seed1337.log").results
    )


@needs_published
def test_configurations_that_only_the_log_tells_apart_are_not_mixed():
    one, other, _ = published("pr1084_slot*")
    assert differing([one, other]) == []
    other.settings["slot_steps"] = "5"
    assert differing([one, other]) == ["slot_steps"]
    assert "stages" in differing([one, *published("pr1084_baseline*")])
    assert all(
        log.eval_seconds > 550 for log in published("pr1488*")
    )  # with the training on validation tokens


@needs_published
def test_evaluation_time_is_that_of_all_stages(capsys):
    """#1150 stays under 600 s only if TTT is counted alone."""
    assert report.main([*map(str, sorted(PUBLISHED.glob("pr1150*"))), "--check"]) == 1
    out = capsys.readouterr().out
    assert (
        out.count("FAIL  pr1150_seed") >= 3
        and "all evaluation stages within 600 s: 649.9 s together" in out
    )
    assert submission.__doc__ and checks.check.__doc__
    with pytest.raises(LogError, match="not one configuration: .*bytes of code"):
        submission(published("pr1313*") + published("pr1488*"))


# ---- logs made here

HEAD = (
    "import torch\nprint('step:1/2 train_loss:9 train_time:1ms step_avg:1ms')\n" + "=" * 100 + "\n"
)


def our_log(path, seed=1, ttt=2.5, slot=2.4, finished=True, **settings):
    """A log of this script with a source on top."""
    told = {
        "PRESET": "demo",
        "SEED": seed,
        "ITERATIONS": 40,
        "TRAIN_BATCH_TOKENS": 100,
        "MAX_WALLCLOCK_SECONDS": 0.0,
        **settings,
    }
    lines = [
        "settings: " + " ".join(f"{k}={v}" for k, v in told.items()),
        "python:3.11.7 torch:2.13.0+cpu numpy:2 device:cpu threads:2 dtype:torch.float32 world_size:1 compile:0",
    ]
    lines += [
        f"step:{i}/40 train_loss:{5 - i / 20:.4f} train_time:{i * 10}ms step_avg:10.00ms"
        for i in range(1, 41)
    ]
    lines += [
        "step:40/40 val_loss:2.9000 val_bpb:1.7000 train_time:400ms step_avg:10.00ms",
        "training steps:40 tokens:4000 train_time:420ms",
        "final_float_roundtrip val_loss:2.90000000 val_bpb:1.70000000 tokens:10 bytes:20 causal:yes eval_time:5ms",
        "Code size: 900 bytes",
        "Total submission size int6+lzma: 2000 bytes",
    ]
    for label, loss, causal in (
        ("roundtrip", 2.91, "yes"),
        ("sliding_window", 2.7, "yes"),
        ("ttt", ttt, "yes"),
        ("ttt_slot", slot, "no"),
    ):
        lines.append(
            f"final_artifact_{label} val_loss:{loss:.8f} val_bpb:{loss * 0.6:.8f} tokens:10 bytes:20 causal:{causal} eval_time:1000ms"
            + " breaks:C1,C2,C3" * (causal == "no")
        )
    path.write_text(HEAD + "\n".join(lines + ["eval_total eval_time:3000ms"] * finished) + "\n")
    return path


def test_our_own_log_is_read_whole_and_its_source_is_not(tmp_path):
    log = read_log(our_log(tmp_path / "a.txt", 7))
    assert (log.style, log.seed, log.steps, log.step_avg, log.eval_seconds, log.total_bytes) == (
        "this script",
        7,
        40,
        10.0,
        3.0,
        2000,
    )
    assert (
        log.train.shape == (40, 3)
        and log.train[0].tolist() == [1, 4.95, 10]
        and log.finished
        and log.hardware == "cpu threads:2"
    )
    assert {s: (r.val_loss, r.causal) for s, r in log.results.items()} == dict(
        roundtrip=(2.91, True), sliding_window=(2.7, True), ttt=(2.5, True), ttt_slot=(2.4, False)
    )
    assert (
        log.score.stage == "ttt_slot"
        and log.averaged.val_bpb == 1.7
        and log.prequant.val_bpb == 1.7
        and log.results["ttt"].bytes == 20
    )


def test_a_run_that_was_resumed_counts_each_step_once(tmp_path):
    path = our_log(tmp_path / "a.txt")
    text = path.read_text().replace(
        "step:31/40",
        "resuming from x\nstep:30/40 train_loss:1.0000 train_time:999ms step_avg:1ms\nstep:31/40",
    )
    path.write_text(text)
    log = read_log(path)
    assert (
        len(log.train) == 40
        and log.train[29].tolist() == [30, 1, 999]
        and log.resumed == 1
        and (np.diff(log.train[:, 0]) == 1).all()
    )


@pytest.mark.parametrize("digest, kept", [("aa", 4), ("bb", 0)])
def test_scores_of_an_artifact_that_was_replaced_are_not_shown(tmp_path, digest, kept):
    """A run that is resumed exports again if its file is another; it may be cut off before it has new scores."""
    path = our_log(tmp_path / "a.txt")
    text = path.read_text()
    first = text.index("final_artifact_")
    text = text[:first] + "artifact_file sha256:aa\n" + text[first:]
    path.write_text(text + f"artifact_file sha256:{digest}\n")
    log = read_log(path)
    assert len(log.results) == kept and bool(log.score) == log.finished == bool(kept)
    assert log.averaged.val_bpb == 1.7


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.8, 0.95])
def test_a_log_that_is_cut_off_says_what_it_can(cut, tmp_path, capsys):
    path = our_log(tmp_path / "a.txt")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    assert (
        report.main([str(path)]) == 0
        and "a.txt: the run did not finish." in capsys.readouterr().out
    )
    assert report.main([str(path), "--check"]) == 1


def test_torchrun_noise_and_the_baselines_labels(tmp_path):
    path = tmp_path / "train.log"
    path.write_text("""W0318 torch/distributed/run.py:803] *****
[rank0]: something
logs/x.txt
seed:5
world_size:8 grad_accum_steps:1
train_batch_tokens:524288 train_seq_len:1024 iterations:20000 warmup_steps:20 max_wallclock_seconds:600.000
step:0/20000 val_loss:6.9357 val_bpb:4.1077 train_time:0ms step_avg:0.01ms
step:1/20000 train_loss:6.9370 train_time:46ms step_avg:45.60ms
\x1b[31mnoise\x1b[0m step:9/10 train_loss:0 train_time:1ms
step:13780/20000 val_loss:2.0606 val_bpb:1.2172 train_time:600038ms step_avg:43.54ms
stopping_early: wallclock_cap train_time:600038ms step:13780/20000
Code size: 47642 bytes
Total submission size int8+zlib: 15863489 bytes
final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570
""")
    log = read_log(path)
    assert (
        log.style,
        log.seed,
        log.steps,
        log.total_bytes,
        round(log.step_avg, 2),
        log.batch_tokens,
    ) == ("baseline", 5, 13780, 15863489, 43.54, 524288)
    assert (
        log.results["roundtrip"].val_bpb == 1.2243657
        and log.results["roundtrip"].seconds == 1.401
        and not log.mislabelled
        and len(log.train) == 1
    )


def test_table_csv_and_update(tmp_path, capsys):
    paths = [our_log(tmp_path / f"s{i}.txt", i, 2.5 + i / 100) for i in (1, 2, 3)]
    (tmp_path / "README.md").write_text("a\n<!-- s1 s2 s3 -->\nold\n<!-- end -->\nb\n")
    assert (
        report.main(
            [
                *map(str, paths),
                "--csv",
                str(tmp_path / "t.csv"),
                "--update",
                str(tmp_path / "README.md"),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in out.splitlines()
        if line.startswith("|")
    ]
    assert rows[0] == [
        "seed",
        "steps",
        "step average",
        "before averaging",
        "float",
        "roundtrip",
        "sliding",
        "TTT",
        "TTT+SLOT",
        "evaluation",
        "artifact + code",
    ]
    values = [0.6 * (2.5 + i / 100) for i in (1, 2, 3)]
    assert (
        rows[2][7] == "1.5060"
        and rows[5][0] == "mean"
        and rows[5][7] == f"{statistics.mean(values):.4f}"
        and rows[6][7] == f"{statistics.stdev(values):.5f}"
    )
    assert (
        "Not causal, no compression result: TTT+SLOT (breaks C1,C2,C3)." in out
        and "10 targets, 20 bytes of text scored." in out
    )
    text = (tmp_path / "README.md").read_text()
    assert (
        text.startswith("a\n<!-- s1 s2 s3 -->\n| seed | steps")
        and text.endswith("<!-- end -->\nb\n")
        and "old" not in text
    )
    assert (tmp_path / "t.csv").read_text().splitlines()[1].startswith("1,40,10.0 ms,1.7000")
    assert report.main([str(paths[0]), "--update", str(tmp_path / "README.md")]) == 2
    assert (
        "needs the markers <!-- s1 --> and <!-- end --> once, has them 0 times"
        in capsys.readouterr().err
    )


def test_a_log_in_a_folder_of_logs_is_named_by_both(tmp_path, capsys):
    """As RUN_ID names it; the markers in a README are these names."""
    folder = tmp_path / "logs" / "slot"
    folder.mkdir(parents=True)
    paths = [our_log(folder / f"s{i}.txt", i) for i in (1, 2)]
    alone = read_log(our_log(tmp_path / "logs" / "s3.txt"))
    assert [log.name for log in (*map(read_log, paths), alone)] == ["slot/s1", "slot/s2", "s3"]
    readme = tmp_path / "README.md"
    readme.write_text("<!-- slot/s1 slot/s2 -->\n<!-- end -->\n")
    assert report.main([*map(str, paths), "--update", str(readme)]) == 0
    assert "| 2    | 40" in readme.read_text()
    (folder / "README.md").write_text(readme.read_text().replace("| 1.4400", "| 1.9999"))
    capsys.readouterr()
    assert report.main([str(folder), "--check"]) == 1
    assert "FAIL  README, seed 2, TTT+SLOT: 1.9999" in capsys.readouterr().out


@pytest.mark.parametrize("cap,slow", [(150.0, True), (60.0, False)])
def test_a_run_that_its_time_cap_ended_says_so_under_the_table(cap, slow, tmp_path, capsys):
    """Only of make demo's own cap is it known that all steps fit into it."""
    path = our_log(tmp_path / "a.txt", ITERATIONS=400, MAX_WALLCLOCK_SECONDS=cap)
    text = path.read_text().replace("/40 ", "/400 ")
    assert report.main([str(path)]) == 0 and "time cap" not in capsys.readouterr().out
    early = "stopping_early: wallclock_cap train_time:420ms step:40/400\ntraining steps:40"
    path.write_text(text.replace("training steps:40", early))
    assert report.main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "a.txt: stopped by the time cap at 40 of 400 steps" in out
    assert ("too slow or busy, the scores are not comparable" in out) == slow


def test_warnings_of_a_run_stand_under_the_table(tmp_path, capsys):
    """Each kind once, as it was said last."""
    path = our_log(tmp_path / "w.txt")
    gaps = [
        f"warning: val_loss is {gap} nats over train_loss: known by heart" for gap in (0.61, 1.2)
    ]
    lost = "warning: the artifact's val_loss is 0.15 nats over the trained model's"
    path.write_text("\n".join([path.read_text().rstrip("\n"), *gaps, lost, ""]))
    report.main([str(path)])
    told = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert told == [f"w.txt: {gaps[1]}.", f"w.txt: {lost}."]


def test_welch_is_scipys_and_hand_checked(tmp_path, capsys):
    ours, theirs = [1.8825, 1.8831, 1.8829], [1.8916, 1.8902, 1.8911, 1.8907]
    for margin in (0.005, 0.0):
        t, freedom, p = significance.welch(ours, theirs, margin)
        a, b = statistics.variance(ours) / 3, statistics.variance(theirs) / 4
        assert t == pytest.approx(
            (statistics.mean(theirs) - statistics.mean(ours) - margin) / math.sqrt(a + b)
        )
        assert freedom == pytest.approx(
            (a + b) ** 2 / (a * a / 2 + b * b / 3)
        ) and p == pytest.approx(stats.t.sf(t, freedom))
    n = significance.needed(ours, theirs, 0.005)
    assert n == min(
        m
        for m in range(2, 50)
        if stats.t.sf(
            (statistics.mean(theirs) - statistics.mean(ours) - 0.005)
            / math.sqrt((statistics.variance(ours) + statistics.variance(theirs)) / m),
            (m - 1)
            * (statistics.variance(ours) + statistics.variance(theirs)) ** 2
            / (statistics.variance(ours) ** 2 + statistics.variance(theirs) ** 2),
        )
        < 0.01
    )
    assert significance.needed(theirs, ours, 0.0) is None
    better = [our_log(tmp_path / f"a{i}.txt", i, slot=2.4 + i / 1000) for i in (1, 2, 3)]
    worse = [our_log(tmp_path / f"b{i}.txt", i, slot=2.45 + i / 1000) for i in (1, 2, 3)]
    assert report.main([*map(str, better), "--against", *map(str, worse)]) == 0
    out = capsys.readouterr().out
    assert (
        "TTT+SLOT: 3 seeds, mean 2.402000 nats; against TTT+SLOT: 3 seeds, mean 2.452000; difference -0.050000"
        in out
    )
    assert (
        "better by more than 0.005 nats: t 55.11, 4.0 degrees of freedom, p 3.2e-07 (Welch, one-sided); 2 seeds a side"
        in out
    )
    assert (
        report.main([str(better[0]), "--against", str(worse[0]), "--stage", "ttt"]) == 0
        and "needs two seeds on each side" in capsys.readouterr().out
    )


def test_paired_where_both_sides_saved_their_nats(tmp_path, capsys):
    rng = np.random.default_rng(0)
    hard = rng.gamma(2, 1.3, 40_000)
    for name, shift in (("a", -0.01), ("b", 0.0)):
        our_log(tmp_path / f"{name}.txt", 5)
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "nll_ttt_slot.npy", hard + shift + rng.normal(0, 0.1, 40_000))
    assert report.main([str(tmp_path / "a.txt"), "--against", str(tmp_path / "b.txt")]) == 0
    line = next(
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("seed 5, paired over 39 blocks")
    )
    gain, error, p = map(
        float, re.search(r"targets: (\S+) \+- (\S+) nats, p (\S+)$", line).groups()
    )
    assert -0.013 < gain < -0.007 and error < 0.002 and p < 1e-6


def test_submission_says_only_what_the_logs_say_and_refuses_a_mixture(tmp_path, capsys):
    paths = [our_log(tmp_path / f"s{i}.txt", i, 2.5 + i / 100) for i in (1, 2, 3)]
    target = tmp_path / "submission.json"
    assert (
        report.main(
            [
                *map(str, paths),
                "--submission",
                str(target),
                "--author",
                "somebody",
                "--date",
                "2026-11-21",
            ]
        )
        == 0
    )
    found = json.loads(target.read_text())
    assert (found["metric"], found["author"], found["github_id"], found["val_loss"]) == (
        "final_artifact_ttt",
        "somebody",
        None,
        2.52,
    )
    assert (
        found["val_loss_std"] == 0.01
        and found["seeds"] == [1, 2, 3]
        and found["bytes_total"] == 2000
        and found["hardware"] == "cpu threads:2, 1 process"
    )
    assert found["compliance"] == dict(
        train_under_600s=True,
        eval_under_600s=True,
        artifact_under_16mb=True,
        score_first=True,
        causal=True,
        three_seeds=True,
        one_configuration=True,
    )
    assert (
        report.main([*map(str, paths), "--submission", str(target)]) == 0
        and json.loads(target.read_text())["author"] == "somebody"
    )  # kept
    (tmp_path / "s2.txt").write_text(paths[1].read_text().replace("Total submission size", "Size"))
    assert submission([read_log(p) for p in paths])["compliance"]["artifact_under_16mb"] is None
    before = target.read_text()
    our_log(paths[2], 3, ITERATIONS=41)
    assert (
        report.main([*map(str, paths), "--submission", str(target)]) == 2
        and target.read_text() == before
    )
    assert (
        "not one configuration: ITERATIONS differ between s1.txt, s2.txt, s3.txt"
        in capsys.readouterr().err
    )


def test_check_of_good_logs_passes_and_of_each_fault_fails(tmp_path, capsys):
    folder = tmp_path / "record"
    folder.mkdir()
    for i in (1, 2, 3):
        path = our_log(folder / f"train_seed{i}.log", i, 2.5 + i / 100)
        path.write_text(
            "\n".join(line for line in path.read_text().splitlines() if "ttt_slot" not in line)
            + "\n"
        )
    (folder / "train_gpt.py").write_text(HEAD.partition("=" * 100)[0].ljust(900, "#"))
    (folder / "README.md").write_text(
        "| seed | steps | bpb | bytes |\n|---|---|---|---|\n"
        + "".join(f"| {i} | 40 | {0.6 * (2.5 + i / 100):.4f} | 2,000 |\n" for i in (1, 2, 3))
    )
    (folder / "submission.json").write_text(
        json.dumps({"val_loss": 2.52, "val_bpb": 1.512, "bytes_total": 2000})
    )
    assert report.main([str(folder), "--check"]) == 0
    assert "README has a table of seeds: 9 cells compared" in capsys.readouterr().out
    good = {p: p.read_text() for p in folder.iterdir()}
    log = folder / "train_seed2.log"
    for path, old, new, told in (
        (
            log,
            "eval_total eval_time:3000ms",
            "eval_total eval_time:601000ms",
            "all evaluation stages within 600 s: 601.0 s",
        ),
        (log, "train_time:420ms", "train_time:660000ms", "training within 600 s: 660.0 s"),
        (log, "lzma: 2000", "lzma: 16000000", "under 16,000,000 bytes: 16,000,000"),
        (log, "SEED=2", "SEED=1", "seeds differ"),
        (log, "PRESET=demo", "PRESET=pr1084", "settings equal over seeds: PRESET"),
        (log, "eval_total eval_time:3000ms\n", "", "no final score"),
        (
            folder / "README.md",
            "| 2 | 40",
            "| 2 | 39",
            "README, seed 2, steps: 39, the log says 40",
        ),
        (folder / "train_gpt.py", "#", "", "train_gpt.py is what the logs counted: 72 bytes"),
        (folder / "train_gpt.py", "torch", "types", "the script that the logs open with: 0 of 3"),
        (folder / "submission.json", "1.512", "1.522", "submission.json: val_bpb"),
        (folder / "submission.json", "{", "", "submission.json is JSON"),
    ):
        path.write_text(good[path].replace(old, new))
        assert report.main([str(folder), "--check"]) == 1
        assert any(
            line.startswith("FAIL") and told in line
            for line in capsys.readouterr().out.splitlines()
        ), told
        path.write_text(good[path])


def test_the_table_that_this_tool_makes_passes_its_own_check(tmp_path, capsys):
    folder = tmp_path / "record"
    folder.mkdir()
    paths = [our_log(folder / f"s{i}.txt", i, 2.5 + i / 100) for i in (1, 2, 3)]
    (folder / "README.md").write_text(
        "<!-- s1 s2 s3 -->\n<!-- end -->\n\n| seed | bpb |\n|---|---|\n| 9 | 1.0 |\n"
    )
    assert (
        report.main(
            [
                *map(str, paths),
                "--update",
                str(folder / "README.md"),
                "--submission",
                str(folder / "submission.json"),
            ]
        )
        == 0
    )
    capsys.readouterr()
    report.main([str(folder), "--check"])
    lines = [
        line
        for line in capsys.readouterr().out.splitlines()
        if "README, " in line or "submission.json: " in line
    ]
    assert len(lines) > 50 and [line for line in lines if not line.startswith("ok")] == [
        "FAIL  README, seed 9: no log of this seed"
    ]
    text = (folder / "submission.json").read_text()
    for old, new, told in (
        ('"val_bpb_std": 0.006', '"val_bpb_std": 0.5', "val_bpb_std"),
        ('"bytes_code": 900', '"bytes_code": 3', "bytes_code"),
        ('"train_under_600s": true', '"train_under_600s": false', "compliance"),
        ('"causal": true,\n  "seeds"', '"causal": false,\n  "seeds"', "causal"),
    ):
        assert old in text
        (folder / "submission.json").write_text(text.replace(old, new))
        assert report.main([str(folder), "--check"]) == 1
        assert any(
            line.startswith(f"FAIL  submission.json: {told}")
            for line in capsys.readouterr().out.splitlines()
        ), told
    for odd in ("[1]", '{"val_bpb": "1.5"}'):
        (folder / "submission.json").write_text(odd)
        report.main([str(folder), "--check"])


def test_our_console_output_alone_is_ours_too(tmp_path):
    path = our_log(tmp_path / "a.txt")
    text = path.read_text()
    path.write_text(text[text.index("python:") :])
    log = read_log(path)
    assert (
        log.style == "this script"
        and log.eval_seconds == 3
        and log.results["ttt"].causal
        and not log.results["ttt_slot"].causal
    )


def test_a_score_that_is_not_finite_is_reported_and_not_submitted(tmp_path, capsys):
    paths = [our_log(tmp_path / f"s{i}.txt", i) for i in (1, 2)]
    paths[1].write_text(
        paths[1]
        .read_text()
        .replace(
            "final_artifact_ttt val_loss:2.50000000 val_bpb:1.50000000",
            "final_artifact_ttt val_loss:nan val_bpb:nan",
        )
    )
    assert (
        report.main([*map(str, paths), "--submission", str(tmp_path / "s.json")]) == 2
        and not (tmp_path / "s.json").exists()
    )
    assert "a score is not finite" in capsys.readouterr().err


def test_files_that_are_no_logs_get_one_line_each_and_the_others_are_reported(tmp_path, capsys):
    good = our_log(tmp_path / "good.txt", 9)
    bad = {
        "empty": b"",
        "binary": random.Random(0).randbytes(5000),
        "text": b"once upon a time\n" * 50,
        "number": b"\nstep:1/2 train_loss:x train_time:1ms\n",
        "long": b"a" * 9_000_000,
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    assert (
        report.main([*(str(tmp_path / name) for name in bad), str(tmp_path / "missing"), str(good)])
        == 2
    )
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 6 and all(line.startswith(f"error: {tmp_path}/") for line in lines)
    assert (
        "is empty" in lines[0]
        and "is binary" in lines[1]
        and "no line of a training log" in lines[2]
        and "No such file" in lines[5]
    )
    assert "| 9    | 40" in captured.out
    target = tmp_path / "t.csv"
    for option in ("--csv", "--update", "--plot", "--submission"):
        assert report.main([str(tmp_path / "missing"), option, str(target)]) == 2
        assert not target.exists() and "No such file" in capsys.readouterr().err
    assert report.main([]) == 2


def test_figures_are_written_as_png_and_svg(tmp_path, capsys):
    paths = [our_log(tmp_path / f"s{i}.txt", i) for i in (1, 2)]
    assert report.main([*map(str, paths), "--plot", str(tmp_path / "fig.png")]) == 0
    assert f"wrote {tmp_path}/fig.png and {tmp_path}/fig.svg\n" in capsys.readouterr().out
    assert (tmp_path / "fig.png").read_bytes().startswith(
        b"\x89PNG"
    ) and "training tokens, millions" in (tmp_path / "fig.svg").read_text().replace("<!-- ", "")
    (tmp_path / "s1").mkdir()
    np.save(tmp_path / "s1" / "nll_ttt_slot.npy", np.full(1000, 2.4))
    points = figures.running(read_log(paths[0]))
    assert points.shape == (200, 2) and points[-1].tolist() == pytest.approx([1, 1.44])


def test_following_a_run_shows_where_it_is(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    whole = our_log(path, MAX_WALLCLOCK_SECONDS=0.8).read_text()
    stages = [
        HEAD,
        whole[: whole.index("step:21/40")],
        whole[: whole.index("final_artifact_ttt ")],
        whole,
    ]
    path.write_text(stages.pop(0))
    monkeypatch.setattr(time, "sleep", lambda seconds: path.write_text(stages.pop(0)))
    out = io.StringIO()
    follow(path, out=out)
    lines = out.getvalue().splitlines()
    assert (
        lines[0] == "starting"
        and "step 20/40  loss 4.0000  10,000 tokens/s  0 s left" in lines[1]
        and lines[1].startswith("[#")
        and " 50 %" in lines[1]
    )
    assert (
        lines[2] == "evaluating  roundtrip 1.7460  sliding 1.6200"
        and lines[3].startswith("done: ")
        and "TTT+SLOT 1.4400" in lines[3]
    )
    for progress in ("window:3/12 chunk:1/4", "document:3/12 batch:1/2"):
        path.write_text(
            whole[: whole.index("final_artifact_ttt ")] + f"progress:ttt {progress} seconds:1.0\n"
        )
        assert status_line(read_log(path), 99).endswith("sliding 1.6200  ttt 25 %  3 s left")
    assert report.main(["--follow", str(tmp_path / "none")]) == 2
    assert all(len(status_line(read_log(path), width)) <= width for width in (20, 60, 200))


@pytest.mark.slow
@pytest.mark.alone
def test_200_megabytes_take_little_time_and_memory(tmp_path):
    """In a process of its own, whose memory is read when it ends; the time is held against plainly reading the lines."""
    path, rng = tmp_path / "big.txt", random.Random(0)
    whole = our_log(tmp_path / "a.txt").read_text()
    head, tail = whole[: whole.index("step:1/40")], whole[whole.index("step:40/40 val") :]
    block = "".join(
        f"step:{{}}/9000000 train_loss:{rng.uniform(2, 3):.4f} train_time:{i * 84}ms step_avg:84.00ms\n"
        f"progress:sliding_window window:{i}/99999 chunk:1/1 seconds:{i / 7:.1f}\n"
        for i in range(10_000)
    )
    with open(path, "w") as file:
        file.write(head)
        for k in range(1000):
            file.write(block.format(*range(10_000 * k + 1, 10_000 * (k + 1) + 1)))
            if file.tell() > 200e6:
                break
        file.write(tail)
    code = (
        f"import sys, time; from tools.logs import read_log; began = time.perf_counter(); log = read_log({str(path)!r}); "
        "spent = time.perf_counter() - began; began = time.perf_counter(); n = sum(1 for line in open(sys.argv[1]) if line.startswith('step:')); "
        "print(len(log.train), n, log.finished, spent, time.perf_counter() - began, open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, plain, finished, spent, reading, memory = done.stdout.split()
    assert (
        finished == "True"
        and int(rows) in (int(plain) - 1, int(plain))
        and float(memory) / 1024 < 300
        and float(spent) < 12 * float(reading)
    )
    assert Path(path).stat().st_size > 200e6


def test_stages_are_those_of_the_script():
    assert set(train_gpt.EVALUATORS) <= set(STAGES)


def test_make_demo_is_known_by_its_settings():
    c = train_gpt.load_config({"PRESET": "demo"})
    shown = {name: train_gpt.shown(getattr(c, name.lower())) for name in DEMO}
    assert shown == DEMO
