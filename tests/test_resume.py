"""A run that is stopped, killed or starved goes on as if nothing had happened, and says clearly what stopped it."""

import gc
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soak
import torch
from conftest import ROOT, TINY, process, read_metrics, runs, t, timeless

EVERYTHING = dict(
    EVALS="roundtrip,sliding_window,ttt,ttt_slot", SAVE_EVERY="3", TRAIN_LOG_EVERY="1", SAVE_NLL="1"
)


@pytest.fixture(autouse=True)
def no_signals():
    """Signals that a test makes up are gone after it."""
    yield
    t.STOP_SIGNALS.received.clear()


def stop_after(monkeypatch, name, calls):
    """Let a signal arrive during a call of the script's function."""
    function, count = getattr(t, name), iter(range(1, 10**6))

    def spy(*args, **kw):
        if next(count) == calls:
            t.STOP_SIGNALS.received.append((signal.SIGTERM, time.perf_counter()))
        return function(*args, **kw)

    monkeypatch.setattr(t, name, spy)


def stopped(tiny, monkeypatch, name, calls, **changes):
    """Run until then; the number of calls that were made stays in the patched function."""
    with monkeypatch.context() as patch:
        stop_after(patch, name, calls)
        assert failing(tiny, SystemExit, **changes) == str(128 + signal.SIGTERM)
    t.STOP_SIGNALS.received.clear()


def failing(tiny, error, **changes):
    """The message of a run's error; what it held open is closed."""
    with pytest.raises(error) as caught:
        tiny(**changes)
    text = str(caught.value)
    del caught
    gc.collect()
    return text


def same(one, other):
    """Both metrics without times and names; the passes' lines have nothing else."""
    one, other = (timeless(m) for m in (one, other))
    assert one.keys() == other.keys()
    assert one == other


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(EMA_ENABLED="0", TIE_EMBEDDINGS="0", LATE_QAT_THRESHOLD="0.9"),
        dict(SWA_ENABLED="0", WARMDOWN_FRAC="0.7", EMBED_WD="0.5", DATA_ORDER="shards"),
        dict(RECUR_LAYERS="1", RECUR_START="4", PREQUANT_TTT_ENABLED="1", PREQUANT_TTT_EPOCHS="1"),
        dict(RECUR_LAYERS="1", RECUR_START="4", RECUR_STYLE="gated"),
        dict(DOCUMENTS="mask"),
    ],
)
@pytest.mark.parametrize("step", [1, 4, 11])
def test_training_goes_on_bit_for_bit(step, changes, tiny, monkeypatch):
    changes = {**EVERYTHING, **changes}
    whole = tiny(RUN_ID="whole", **changes)
    stopped(tiny, monkeypatch, "train_step", step, RUN_ID="part", **changes)
    name = f"checkpoint.{step:09d}.ckpt"
    assert (
        name in os.listdir("logs/part")
        and "saved" not in Path("logs/part.txt").read_text().splitlines()[-1]
    )
    same(tiny(RUN_ID="part", RESUME="1", **changes), whole)
    text = Path("logs/part.txt").read_text()
    assert f"resuming from logs/part/{name}\n" in text and text.count(
        "\nlate_qat:on"
    ) == whole_count("late_qat:on")
    files, others = (
        {f for f in os.listdir(f"logs/{r}") if not f.startswith("checkpoint")}
        for r in ("part", "whole")
    )
    assert files == others and len(files) == 7
    for label in ("ttt_slot", "roundtrip"):
        assert (
            np.load(f"logs/part/nll_{label}.npy") == np.load(f"logs/whole/nll_{label}.npy")
        ).all()
    results = re.findall(r"^final_\S+", text, re.M)
    assert len(results) == len(set(results)) == 5


def whole_count(words):
    return Path("logs/whole.txt").read_text().count("\n" + words)


@pytest.mark.parametrize(
    "evals,changes",
    [
        ("roundtrip", {}),
        ("sliding_window", {}),
        ("ttt,ttt_slot", {}),
        ("ttt_slot", dict(SLOT_LOSS="past")),
        ("slot", dict(SLOT_LOSS="past", SLOT_DELTA="window")),
        ("slot", dict(SLOT_LOSS="recent", SLOT_DELTA="window", SLOT_RESET="document")),
        ("ttt", dict(TTT_MOMENTUM="0")),
        ("ttt", dict(TTT_PARAMS="control", TTT_OPTIMIZER="adamw")),
        ("ctw", dict(SLOT_ENABLED="0", CTW_WEIGHT="0.3", CTW_ENTROPY_THRESHOLD="0")),
    ],
)
@pytest.mark.parametrize("batch", [2, 5])
def test_evaluation_goes_on_with_the_same_digits_and_does_not_begin_anew(
    batch, evals, changes, tiny, monkeypatch
):
    tiny(RUN_ID="model", EVALS="none")
    env = dict(
        LOAD_ARTIFACT="logs/model/final_model.ptz", EVALS=evals, VAL_BATCH_SIZE="96", **changes
    )
    whole, calls = tiny(RUN_ID="whole", **env), []
    stopped(tiny, monkeypatch, "score_batch", batch, RUN_ID="part", **env)
    assert any(f.startswith("progress_artifact_") for f in os.listdir("logs/part"))
    score = t.score_batch
    monkeypatch.setattr(t, "score_batch", lambda *args: calls.append(1) or score(*args))
    again = tiny(RUN_ID="part", RESUME="1", **env)
    same(again, whole)
    total = len(t.plan_windows(576, 32, 32 if evals == "roundtrip" else 8)[0])
    assert (
        len(calls) < -(-total // 3) - batch + 8
        and "resuming from logs/part/progress_artifact_" in Path("logs/part.txt").read_text()
    )
    assert not [f for f in os.listdir("logs/part") if f.startswith("progress")]


def test_time_before_a_stop_counts(tiny, monkeypatch):
    tiny(RUN_ID="model", EVALS="none")
    env = dict(
        LOAD_ARTIFACT="logs/model/final_model.ptz", EVALS="sliding_window", VAL_BATCH_SIZE="96"
    )
    score = t.score_batch
    with monkeypatch.context() as patch:
        patch.setattr(t, "score_batch", lambda *args: time.sleep(0.1) or score(*args))
        stopped(tiny, patch, "score_batch", 5, RUN_ID="part", **env)
    again = tiny(RUN_ID="part", RESUME="1", **env)
    assert (
        500
        <= again["final_artifact_sliding_window"]["eval_time"]
        <= again["eval_total"]["eval_time"] + 1e-6
    )


def test_a_finished_run_is_left_as_it_is(tiny):
    first = tiny(RUN_ID="one", **EVERYTHING)
    size, artifact = (
        Path("logs/one/metrics.jsonl").stat().st_size,
        Path("logs/one/final_model.ptz").stat().st_mtime_ns,
    )
    assert tiny(RUN_ID="one", RESUME="1", **EVERYTHING) == first
    assert (
        Path("logs/one/metrics.jsonl").stat().st_size,
        Path("logs/one/final_model.ptz").stat().st_mtime_ns,
    ) == (size, artifact)


@pytest.mark.parametrize("damage", ["lost", "cut", "of another run"])
def test_an_artifact_that_is_not_the_runs_is_exported_again(damage, tiny):
    run = dict(RUN_ID="one", EVALS="roundtrip,sliding_window")
    first = tiny(**run)
    path = Path("logs/one/final_model.ptz")
    whole = path.read_bytes()
    if damage == "lost":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(whole[:-9])
    else:
        tiny(RUN_ID="two", SEED="2", EVALS="none")
        path.write_bytes(Path("logs/two/final_model.ptz").read_bytes())
    again = tiny(**run, RESUME="1")
    log = Path("logs/one.txt").read_text()
    assert f"{path}: is not what this run wrote; exporting the last checkpoint again" in log
    assert "resuming from logs/one/checkpoint.000000012.ckpt" in log
    assert path.read_bytes() == whole and timeless(again) == timeless(first)
    scored = [row for row in log.splitlines() if row.startswith("final_artifact_roundtrip")]
    assert len(scored) == 1  # the artifact is the same: what was scored stays


def test_scores_of_another_artifact_are_not_kept(tiny, monkeypatch):
    """As on another machine, where rounding gives other bytes."""
    run = dict(RUN_ID="one", EVALS="roundtrip")
    tiny(**run)
    Path("logs/one/final_model.ptz").unlink()
    pack = t.Quantizer.pack
    monkeypatch.setattr(t.Quantizer, "pack", lambda self, size: pack(self, 2 * size))
    again = tiny(**run, RESUME="1")
    log = Path("logs/one.txt").read_text()
    assert "\nthe artifact is not as it was before" in log
    scores = re.findall(r"^final_artifact_roundtrip val_loss:(\S+)", log, re.M)
    assert len(scores) == 2 and scores[0] != scores[1]
    assert f"{again['final_artifact_roundtrip']['val_loss']:.8f}" == scores[1]


@pytest.mark.parametrize(
    "moment", ["before a score", "after one", "before the first score is dropped"]
)
def test_another_artifacts_scores_are_not_kept_after_a_second_stop(moment, tiny, monkeypatch):
    run = dict(RUN_ID="one", EVALS="roundtrip,sliding_window,mix")
    tiny(**run)
    Path("logs/one/final_model.ptz").unlink()
    left = Path("logs/one/progress_artifact_roundtrip.000000001.ckpt")
    left.write_bytes(b"of the first artifact")
    pack = t.Quantizer.pack
    monkeypatch.setattr(t.Quantizer, "pack", lambda self, size: pack(self, 2 * size))
    name = "load_state" if moment == "before the first score is dropped" else "log_result"
    stop_at = 2 if moment == "after one" else 1
    calls = []
    kept = getattr(t, name)

    def killed(*words, **more):
        artifact = words[3] == "artifact" if name == "log_result" else "final_model" in str(words)
        calls.extend([1] * artifact)
        if len(calls) == stop_at and artifact:
            raise KeyboardInterrupt
        return kept(*words, **more)

    monkeypatch.setattr(t, name, killed)
    with pytest.raises(KeyboardInterrupt):
        tiny(**run, RESUME="1")
    monkeypatch.setattr(t, name, kept)
    assert not left.exists()
    again = tiny(**run, RESUME="1")
    whole = tiny(**{**run, "RUN_ID": "two"})
    log = Path("logs/one.txt").read_text()
    for label in ("roundtrip", "sliding_window", "mix"):
        name = f"final_artifact_{label}"
        assert again[name]["val_loss"] == whole[name]["val_loss"]
        assert len(re.findall(rf"^{name} ", log, re.M)) == 2


def test_resume_without_anything_to_go_on_with_is_a_new_run(tiny):
    same(tiny(RUN_ID="a", RESUME="1", **EVERYTHING), tiny(RUN_ID="b", **EVERYTHING))
    with pytest.raises(t.BadInput, match="RESUME=1: needs the RUN_ID"):
        t.load_config({"RESUME": "1"})


def test_other_settings_are_refused_and_each_is_named(tiny, monkeypatch):
    stopped(tiny, monkeypatch, "train_step", 5, RUN_ID="one", **EVERYTHING)
    before = {p: p.read_bytes() for p in Path("logs").rglob("*") if p.is_file()}
    text = failing(
        tiny,
        t.BadInput,
        RUN_ID="one",
        RESUME="1",
        **{**EVERYTHING, "MATRIX_LR": "0.1", "VE_LAYERS": "0", "SEED": "3"},
    )
    assert (
        "MATRIX_LR=0.1 (there 0.025)" in text
        and "VE_LAYERS=0 (there 1,2)" in text
        and "SEED=3 (there 1337)" in text
        and text.count("(there") == 3
    )
    assert before == {p: p.read_bytes() for p in Path("logs").rglob("*") if p.is_file()}
    # and a checkpoint that was carried into another run's folder
    tiny(RUN_ID="two", **EVERYTHING, SEED="3")
    stopped(tiny, monkeypatch, "train_step", 5, RUN_ID="three", **EVERYTHING, SEED="3")
    for path in Path("logs/three").glob("checkpoint*"):
        path.write_bytes(before[Path("logs/one/checkpoint.000000003.ckpt")])
    with pytest.raises(
        t.BadInput,
        match=r"checkpoint.000000005.ckpt: was begun with other settings: RUN_ID=three \(there one\) SEED=3 \(there 1337\)",
    ):
        tiny(RUN_ID="three", RESUME="1", **EVERYTHING, SEED="3")


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tiny, monkeypatch):
    whole = tiny(RUN_ID="whole", **EVERYTHING)
    stopped(tiny, monkeypatch, "train_step", 7, RUN_ID="part", **EVERYTHING)
    newest, older = (
        Path("logs/part/checkpoint.000000007.ckpt"),
        Path("logs/part/checkpoint.000000006.ckpt"),
    )
    data = newest.read_bytes()
    newest.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    same(tiny(RUN_ID="part", RESUME="1", **EVERYTHING), whole)
    assert (
        f"{newest}: damaged: wrong checksum\nresuming from {older}\n"
        in Path("logs/part.txt").read_text()
    )


def test_the_good_checkpoint_outlives_the_damaged_one(tiny, monkeypatch):
    """After falling back, the next save must not take the damaged file for the one to keep."""
    whole = tiny(RUN_ID="whole", **EVERYTHING)
    stopped(tiny, monkeypatch, "train_step", 7, RUN_ID="part", **EVERYTHING)
    newest = Path("logs/part/checkpoint.000000007.ckpt")
    newest.write_bytes(newest.read_bytes()[:-1])
    stopped(tiny, monkeypatch, "train_step", 1, RUN_ID="part", RESUME="1", **EVERYTHING)
    assert sorted(p.name for p in Path("logs/part").glob("checkpoint*")) == [
        "checkpoint.000000006.ckpt",
        "checkpoint.000000007.ckpt",
        "checkpoint.000000007.ckpt.damaged",
    ]
    same(tiny(RUN_ID="part", RESUME="1", **EVERYTHING), whole)


def test_a_damaged_progress_file_costs_its_pass_and_no_more(tiny, monkeypatch):
    tiny(RUN_ID="model", EVALS="none")
    env = dict(
        LOAD_ARTIFACT="logs/model/final_model.ptz", EVALS="sliding_window", VAL_BATCH_SIZE="96"
    )
    whole = tiny(RUN_ID="whole", **env)
    stopped(tiny, monkeypatch, "score_batch", 9, RUN_ID="part", **env)
    for path in Path("logs/part").glob("progress*"):
        path.write_bytes(path.read_bytes()[:-1])
    same(tiny(RUN_ID="part", RESUME="1", **env), whole)


def test_a_run_without_a_name_goes_on_by_the_name_it_got(tiny, monkeypatch):
    monkeypatch.setattr(t, "strftime", lambda form: "20260101_000000")
    stopped(tiny, monkeypatch, "train_step", 5, RUN_ID="", **EVERYTHING)
    assert (
        "RUN_ID=20260101_000000_seed1337 RESUME=1 goes on"
        in Path("logs/20260101_000000_seed1337.txt").read_text()
    )
    same(
        tiny(RUN_ID="20260101_000000_seed1337", RESUME="1", **EVERYTHING),
        tiny(RUN_ID="whole", **EVERYTHING),
    )


def test_a_pass_of_which_one_result_was_logged_goes_on_as_a_whole(tiny, monkeypatch):
    """Killed between the lines of two evaluators that share a pass: the other's digits and the time are those of the whole pass."""
    env = dict(EVERYTHING, EVALS="ttt,ttt_slot")
    whole = tiny(RUN_ID="whole", **env)
    tiny(RUN_ID="part", **env)
    path = Path("logs/part/metrics.jsonl")
    rows = path.read_text().splitlines(True)
    path.write_text(
        "".join(
            row
            for row in rows
            if '"final_artifact_ttt_slot"' not in row and '"eval_total"' not in row
        )
    )
    again = tiny(RUN_ID="part", RESUME="1", **env)
    same(again, whole)
    assert (
        path.read_text().count('"final_artifact_ttt"') == 1
        and again["eval_total"]["eval_time"] == again["pass_artifact_ttt+ttt_slot"]["eval_time"]
    )


def test_a_checkpoint_that_is_being_written_when_an_error_comes_is_finished(tiny, monkeypatch):
    fsync, step, count = os.fsync, t.train_step, iter(range(1, 10**6))

    def spoilt(*args, **more):
        if next(count) == 4:
            raise t.Fault("on purpose")
        return step(*args, **more)

    monkeypatch.setattr(t.os, "fsync", lambda fd: time.sleep(0.5) or fsync(fd))
    monkeypatch.setattr(t, "train_step", spoilt)
    assert failing(tiny, t.Fault, RUN_ID="a", **EVERYTHING) == "on purpose"
    assert [p.name for p in Path("logs/a").glob("checkpoint*")] == ["checkpoint.000000003.ckpt"]


def test_if_no_checkpoint_is_whole_nothing_begins_anew_by_itself(tiny, monkeypatch):
    stopped(tiny, monkeypatch, "train_step", 7, RUN_ID="part", **EVERYTHING)
    for path in Path("logs/part").glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(t.BadInput, match="RUN_ID=part: no checkpoint of it is whole"):
        tiny(RUN_ID="part", RESUME="1", **EVERYTHING)


def test_a_line_that_was_cut_off_and_a_part_of_a_file_are_tidied(tiny, monkeypatch):
    whole = tiny(RUN_ID="whole", **EVERYTHING)
    stopped(tiny, monkeypatch, "train_step", 7, RUN_ID="part", **EVERYTHING)
    Path("logs/part/checkpoint.000000009.ckpt.part").write_bytes(b"half")
    for path in ("logs/part.txt", "logs/part/metrics.jsonl"):
        with open(path, "a") as file:
            file.write('{"label": "fin')
    same(tiny(RUN_ID="part", RESUME="1", **EVERYTHING), whole)
    assert (
        not list(Path("logs").rglob("*.part"))
        and '"fin\n' not in Path("logs/part/metrics.jsonl").read_text()
    )


def test_a_run_that_is_alive_is_not_joined(tiny, tiny_data, tmp_path):
    c = t.load_config({**TINY, **tiny_data, "RUN_ID": "one"})
    run = t.Run(c)
    run.log.start()
    with pytest.raises(t.BadInput, match="RUN_ID=one: is still running"):
        tiny(RUN_ID="one", RESUME="1")


def test_only_two_checkpoints_are_kept_and_none_with_0_but_the_last(tiny):
    tiny(RUN_ID="a", EVALS="none", SAVE_EVERY="2")
    tiny(RUN_ID="b", EVALS="none", SAVE_EVERY="0")
    assert [sorted(p.name[11:20] for p in Path("logs", r).glob("*.ckpt")) for r in "ab"] == [
        ["000000010", "000000012"],
        ["000000012"],
    ]


def test_a_checkpoint_is_readable_by_its_description_alone(tiny):
    tiny(RUN_ID="a", EVALS="none")
    data = Path("logs/a/checkpoint.000000012.ckpt").read_bytes()
    at = 44 + int.from_bytes(data[40:44], "little")
    header, total = json.loads(data[44:at]), 0
    assert header["settings"]["NUM_LAYERS"] == 3 and header["tensors"][0] == [
        "counters",
        "float64",
        [5],
    ]
    step, ms, qat, snapshots, time_up = np.frombuffer(data, "<f8", 5, at)
    assert (step, snapshots, time_up) == (12, 2, 0) and ms > 0 and qat > 0  # QAT's step
    for name, dtype, shape in header["tensors"]:
        total += np.dtype(dtype).itemsize * int(np.prod(shape, dtype=int))
    assert at + total == len(data)
    names = {name for name, *_ in header["tensors"]}
    assert {
        "qo_bank",
        "momentum.qo_bank",
        "ema.qo_bank",
        "swa.qo_bank",
        "exp_avg.tok_emb.weight",
        "exp_avg_sq.tok_emb.weight",
        "step.tok_emb.weight",
        "grid.tok_emb.weight",
    } <= names


def test_the_clock_goes_on_and_cannot_jump(tiny, monkeypatch):
    """Elapsed training time is in the checkpoint; the wall clock of the machine plays no part."""
    stopped(
        tiny,
        monkeypatch,
        "train_step",
        6,
        RUN_ID="a",
        EVALS="none",
        **{"MAX_WALLCLOCK_SECONDS": "1000"},
    )
    (path,) = Path("logs/a").glob("*.ckpt")
    header, tensors = t.unseal(bytearray(path.read_bytes()))
    tensors["counters"][1] = 999_999.0
    path.write_bytes(b"".join(bytes(p) for p in t.seal(header, tensors)))
    monkeypatch.setattr(time, "time", lambda: 4e9)
    found = tiny(RUN_ID="a", EVALS="none", RESUME="1", MAX_WALLCLOCK_SECONDS="1000")
    assert (
        found["training"]["steps"] == 6 and found["training"]["train_time"] > 999_999
    )  # there was no time left
    tiny(RUN_ID="b", EVALS="none", MAX_WALLCLOCK_SECONDS="1000")
    assert read_metrics(Path("logs/b"))["training"]["steps"] == 12


# What goes wrong on the way.


def test_a_loss_that_is_not_finite_names_its_step_and_leaves_a_checkpoint_from_before(
    tiny, monkeypatch
):
    forward, count = t.GPT.forward, iter(range(10**6))

    def spoilt(self, ids, targets, reduction="mean"):
        loss = forward(self, ids, targets, reduction)
        return loss * (float("nan") if reduction == "mean" and next(count) == 7 else 1)

    monkeypatch.setattr(t.GPT, "forward", spoilt)
    with pytest.raises(
        t.Fault, match="^step 8: loss or gradient is not finite.*logs/a is from before it"
    ):
        tiny(RUN_ID="a", SAVE_EVERY="3", VAL_LOSS_EVERY="0")
    kept = sorted(Path("logs/a").glob("*.ckpt"))
    assert [p.name for p in kept] == ["checkpoint.000000003.ckpt", "checkpoint.000000006.ckpt"]
    assert all(
        torch.isfinite(x).all()
        for p in kept
        for x in t.unseal(bytearray(p.read_bytes()))[1].values()
    )
    assert "error: step 8" in Path("logs/a.txt").read_text().splitlines()[-1]


@pytest.mark.parametrize("how", ["gone", "short"])
def test_data_that_vanishes_is_named_and_the_run_can_go_on(
    how, tiny, tiny_data, tmp_path, monkeypatch
):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in Path(tiny_data["DATA_PATH"]).glob("*.bin"):
        (folder / path.name).write_bytes(path.read_bytes())
    env = dict(EVERYTHING, DATA_PATH=str(folder), RUN_ID="a")
    originals = {p: p.read_bytes() for p in folder.glob("fineweb_train*")}
    sequence, count = t.TrainData.sequence, iter(range(10**6))

    def spoilt(self, i):
        if next(count) == 70:
            for path in originals:
                path.unlink() if how == "gone" else path.write_bytes(originals[path][:1500])
        return sequence(self, i)

    with monkeypatch.context() as patch:
        patch.setattr(t.TrainData, "sequence", spoilt)
        assert re.search(
            r"fineweb_train_00000\d.bin: (No such file or directory|has shrunk).*RESUME=1",
            failing(tiny, t.Fault, **env),
        )
    for path, data in originals.items():
        path.write_bytes(data)
    same(tiny(**env, RESUME="1"), tiny(**{**env, "RUN_ID": "b"}))


def limited(size):
    """For a child: no file may grow over size bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
@pytest.mark.parametrize(
    "size,message",
    [
        (60_000, r"logs/a.txt: the log cannot grow: File too large"),
        (92_400, r"a.txt: the log cannot grow"),
        (500_000, r"checkpoint.000000003.ckpt: File too large: not written, older files kept"),
    ],
)
def test_a_full_disk_is_a_clear_error_and_the_run_goes_on_when_there_is_room(
    size, message, tiny, tiny_data, tmp_path
):
    env = {**os.environ, **TINY, **tiny_data, **EVERYTHING, "RUN_ID": "a"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py")],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=limited(size),
    )
    assert (
        done.returncode == 1
        and re.search(message, done.stderr)
        and "Traceback" not in done.stderr
        and done.stderr.count("error:") == 1
    )
    assert not list(tmp_path.rglob("*.part"))
    same(tiny(RUN_ID="a", RESUME="1", **EVERYTHING), tiny(RUN_ID="b", **EVERYTHING))


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tiny, monkeypatch):
    write, count = t.write_file, iter(range(10**6))

    def full(path, parts, remedy):
        if next(count) == 1:
            patch.setattr(
                t.os,
                "fsync",
                lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")),
            )
        return write(path, parts, remedy)

    whole = tiny(RUN_ID="whole", **EVERYTHING)
    with monkeypatch.context() as patch:
        patch.setattr(t, "write_file", full)
        text = failing(tiny, t.Fault, RUN_ID="part", **EVERYTHING)
    assert text == (
        "logs/part/checkpoint.000000006.ckpt: No space left on device: not written, older files kept. Correct that, then RUN_ID=part "
        "RESUME=1."
    )
    assert [p.name for p in Path("logs/part").glob("*.ckpt*")] == ["checkpoint.000000003.ckpt"]
    same(tiny(RUN_ID="part", RESUME="1", **EVERYTHING), whole)


def test_a_folder_that_cannot_be_written_is_bad_input(tiny, tmp_path):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(t.BadInput, match="RUN_ID=a: .*run where logs/ can be made"):
        tiny(RUN_ID="a")


# Real signals, real processes.

LONG = dict(
    TINY,
    ITERATIONS="100000",
    VAL_LOSS_EVERY="0",
    TRAIN_LOG_EVERY="20",
    SAVE_EVERY="20",
    EVALS="none",
)


def begin(env, cwd, *torchrun, script=ROOT / "train_gpt.py"):
    """The script as a process, plain or under torchrun with these options, once it has trained for 40 steps and saved."""
    command = [
        sys.executable,
        *(["-m", "torch.distributed.run", *torchrun] if torchrun else []),
        str(script),
    ]
    child = subprocess.Popen(
        command,
        env={**os.environ, **env},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: [
            signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGHUP)
        ],
    )  # whatever the tests run under
    lines = []
    for line in child.stdout:
        lines.append(line)
        if line.startswith("step:40/"):
            return child, lines
    raise AssertionError("".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_step_saves_says_where_and_exits_by_its_number(
    number, tiny_data, tmp_path
):
    child, _ = begin({**LONG, **tiny_data, "RUN_ID": "a"}, tmp_path)
    child.send_signal(number)
    rest = child.communicate(timeout=30)[0]
    assert child.returncode == 128 + number
    steps = [int(p.name[11:20]) for p in (tmp_path / "logs/a").glob("*.ckpt")]
    assert (
        "stopped by a signal" in rest
        and "logs/a; RUN_ID=a RESUME=1 goes on" in rest
        and max(steps) >= 20
        and "Traceback" not in rest
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_leaves_time_for_a_slow_disk(rank, tiny_data, tmp_path):
    """torchrun ends rank 0 when another has ended: that waits until rank 0 has written."""
    script = tmp_path / "slow.py"
    script.write_text("""
import time
import train_gpt as t
write = t.write_file
def slow(path, *rest):
    time.sleep(3 * bool(t.STOP_SIGNALS.received or t.STOPPING))
    write(path, *rest)
t.STOP_SIGNALS.install()
t.STOPPING, stop = [], t.Run.stop
t.write_file = slow
t.Run.stop = lambda run: t.STOPPING.append(1) or stop(run)
t.main()
""")
    env = {**LONG, **tiny_data, "RUN_ID": "a", "SAVE_EVERY": "0", "PYTHONPATH": str(ROOT)}
    child, _ = begin(env, tmp_path, "--standalone", "--nproc_per_node=2", script=script)
    os.kill(ranks_of(child)[rank], signal.SIGTERM)
    rest = child.communicate(timeout=60)[0]

    assert "stopped by a signal" in rest
    (path,) = (tmp_path / "logs/a").glob("checkpoint.*")
    assert int(t.read_checkpoint(path)["counters"][0]) >= 40


@pytest.mark.parametrize("damage", [False, True])
def test_pre_quantisation_ttt_goes_on_after_its_last_epoch(damage, tiny, monkeypatch):
    settings = dict(PREQUANT_TTT_ENABLED="1", PREQUANT_TTT_EPOCHS="4", EVALS="roundtrip")
    whole = tiny(RUN_ID="whole", **settings)
    poll = t.Poll.ask

    def signalled(self, *words, **more):
        if "prequant_ttt:epoch 2/4" in Path("logs/a.txt").read_text():
            t.STOP_SIGNALS.received.append((signal.SIGTERM, time.perf_counter()))
        return poll(self, *words, **more)

    with monkeypatch.context() as patch:
        patch.setattr(t.Poll, "ask", signalled)
        failing(tiny, SystemExit, RUN_ID="a", **settings)
    t.STOP_SIGNALS.received.clear()
    if damage:
        for path in Path("logs/a").glob("prequant_ttt.*"):
            path.write_bytes(path.read_bytes()[:-9])
    same(tiny(RUN_ID="a", RESUME="1", **settings), whole)
    epochs = re.findall(r"^prequant_ttt:epoch (\d)", Path("logs/a.txt").read_text(), re.M)
    assert epochs == [*"12", *("1234" if damage else "34")]
    assert not list(Path("logs/a").glob("prequant_ttt.*.ckpt"))


@pytest.mark.slow
def test_an_ignored_hangup_stays_ignored(tiny_data, tmp_path):
    """As under nohup."""
    env = {
        **os.environ,
        **LONG,
        **tiny_data,
        "RUN_ID": "a",
        "ITERATIONS": "100",
        "EVALS": "roundtrip",
    }
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "train_gpt.py")],
        env=env,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    for line in child.stdout:
        if line.startswith("step:20/"):
            child.send_signal(signal.SIGHUP)
    assert (
        child.wait(timeout=60) == 0
        and "eval_total" in (tmp_path / "logs/a/metrics.jsonl").read_text()
    )


@pytest.mark.slow
def test_a_second_signal_stops_at_once(tiny_data, tmp_path):
    # a step so long that the first signal cannot have been answered yet
    env = {**LONG, **tiny_data, "RUN_ID": "a", "SAVE_EVERY": "0"}
    child, _ = begin(env, tmp_path)
    child.send_signal(signal.SIGSTOP)
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGCONT)
    child.communicate(timeout=30)
    assert child.returncode in (130, 143) and not list((tmp_path / "logs/a").glob("*.ckpt"))


def ranks_of(agent):
    """Process numbers of torchrun's workers, by rank."""
    children = subprocess.run(
        ["pgrep", "-P", str(agent.pid)], capture_output=True, text=True
    ).stdout.split()
    found = {}
    for pid in children:
        match = re.search(rb"\0RANK=(\d+)\0", b"\0" + Path(f"/proc/{pid}/environ").read_bytes())
        if match:
            found[int(match[1])] = int(pid)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_rank_ends_all_ranks_and_is_named(dead, tiny_data, tmp_path):
    child, lines = begin(
        {**LONG, **tiny_data, "RUN_ID": "a"}, tmp_path, "--standalone", "--nproc_per_node=2"
    )
    ranks, began = ranks_of(child), time.monotonic()
    os.kill(ranks[dead], signal.SIGKILL)
    rest = child.communicate(timeout=60)[0]
    assert child.returncode == 1 and time.monotonic() - began < 60
    cause = rest.split("Root Cause")[1]
    assert f"rank      : {dead} (local_rank: {dead})" in cause and "Signal 9" in cause
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


@pytest.mark.slow
def test_torchruns_own_restart_resumes_and_ends_with_the_same_numbers(tiny_data, tmp_path):
    env = {**LONG, **tiny_data, "ITERATIONS": "200", "EVALS": "roundtrip"}
    whole = process({**env, "RUN_ID": "whole"}, tmp_path, 2)
    child, _ = begin(
        {**env, "RUN_ID": "a"}, tmp_path, "--standalone", "--nproc_per_node=2", "--max-restarts=1"
    )
    os.kill(ranks_of(child)[1], signal.SIGKILL)
    rest = child.communicate(timeout=120)[0]
    assert (
        whole.returncode == 0
        and child.returncode == 0
        and "resuming from logs/a/checkpoint" in rest
    ), rest[-3000:]
    one, other = (timeless(read_metrics(tmp_path / "logs" / r)) for r in ("a", "whole"))
    assert (
        one["final_artifact_roundtrip"] == other["final_artifact_roundtrip"]
        and one["step:200/200"] == other["step:200/200"]
    )
    nameless = process({**env, "TORCHELASTIC_MAX_RESTARTS": "1"}, tmp_path)
    assert (
        nameless.returncode == 2 and "RUN_ID=: torchrun --max-restarts needs one" in nameless.stderr
    )


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_ranks(tiny_data, tmp_path):
    """One rank's loss is spoilt; both say the step and stop, and nobody waits for anybody."""
    script = tmp_path / "spoilt.py"
    script.write_text("""
import os
import train_gpt as t
forward, calls = t.GPT.forward, []
def spoilt(self, ids, targets, reduction="mean"):
    calls.append(1)
    return forward(self, ids, targets, reduction) * (float("inf") if len(calls) == 8 and os.environ["RANK"] == "1" else 1)
t.GPT.forward = spoilt
t.main()
""")
    began = time.monotonic()
    done = process(
        {**TINY, **tiny_data, "RUN_ID": "a", "SAVE_EVERY": "3", "VAL_LOSS_EVERY": "0"},
        tmp_path,
        2,
        script=script,
        timeout=60,
    )
    assert (
        done.returncode == 1
        and "step 8: loss or gradient is not finite" in done.stderr
        and time.monotonic() - began < 60
    )
    assert (
        done.stderr.count("exitcode  : 1") >= 1
        and [p.name for p in sorted((tmp_path / "logs/a").glob("*.ckpt"))][-1]
        == "checkpoint.000000006.ckpt"
    )


@pytest.mark.alone
def test_checkpointing_every_50_steps_costs_under_3_percent(
    tiny_data, tmp_path, every_core, capsys
):
    """Blocks of 10 steps of the demo's model with and without one checkpoint, alternating: a fifth of that is its share of 50 steps."""
    seconds = soak.checkpoint_cost(tmp_path, 10, 3, **tiny_data, VOCAB_SIZE="384")
    share = (seconds.min(0)[1] / seconds.min(0)[0] - 1) / 5
    with capsys.disabled():
        print(f"\na checkpoint every 50 steps costs {100 * share:.2f} % of training time")
    assert share < 0.03


@pytest.mark.slow
def test_soak():
    """A few of the kills of `python tests/soak.py`, whose full log is logs/resume/soak.txt."""
    assert soak.main(["--kills", "5", "--seed", "7"]) == 0


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_within_rounding(tiny, tiny_data, tmp_path):
    env = {**TINY, **tiny_data, **EVERYTHING, "ITERATIONS": "40", "SAVE_EVERY": "8"}

    def cut_off(ranks):
        """Metrics of the run that began on so many ranks; its folder becomes that of one killed after step 32."""
        folder = tmp_path / "logs" / f"r{ranks}"
        whole = timeless(read_metrics(folder))
        for path in folder.iterdir():
            if path.name not in ("checkpoint.000000032.ckpt", "metrics.jsonl"):
                path.unlink()
        rows = (folder / "metrics.jsonl").read_text().splitlines(True)
        (folder / "metrics.jsonl").write_text("".join(rows[:60]))
        return {**env, "RUN_ID": f"r{ranks}", "RESUME": "1"}, whole

    begun = {}
    tiny(**{**env, "RUN_ID": "r0"})
    for ranks, earlier in ((2, 0), (3, 2)):
        again, begun[earlier] = cut_off(earlier)
        runs([again, {**env, "RUN_ID": f"r{ranks}"}], tmp_path, ranks)
    again, begun[3] = cut_off(3)
    tiny(**again)
    for ranks, whole in begun.items():
        assert (
            f"resuming from logs/r{ranks}/checkpoint.000000032"
            in (tmp_path / f"logs/r{ranks}.txt").read_text()
        )
        other = timeless(read_metrics(tmp_path / "logs" / f"r{ranks}"))
        assert whole.keys() == other.keys()
        for label, row in whole.items():
            for key in ("train_loss", "val_loss"):
                if key in row:
                    assert other[label][key] == pytest.approx(row[key], abs=1e-4), (ranks, label)


def two_agents(env, folders, *more):
    """Two agents of torchrun on loopback, each with one rank, in these folders."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}",
        "--rdzv_id=x",
        *more,
        str(ROOT / "train_gpt.py"),
    ]
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **env, "OMP_NUM_THREADS": "1"},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for folder in folders
    ]


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_rank_that_dies_on_one_machine_ends_the_other_or_both_go_on(
    restarts, tiny_data, tmp_path
):
    env = {
        **LONG,
        **tiny_data,
        "RUN_ID": "a",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "ITERATIONS": "200" if restarts else "1000000",
    }
    agents = two_agents(
        env, [tmp_path, tmp_path], f"--max-restarts={restarts}"
    )  # one folder that both machines have
    while not list(tmp_path.glob("logs/a/*.ckpt")):
        time.sleep(0.1)
        assert [a.poll() for a in agents] == [None, None]
    began, victim = time.monotonic(), ranks_of(agents[0]) | ranks_of(agents[1])
    os.kill(victim[1], signal.SIGKILL)
    out = [a.communicate(timeout=100 if restarts else 60)[0] for a in agents]
    if restarts:
        assert [a.returncode for a in agents] == [
            0,
            0,
        ] and "resuming from logs/a/checkpoint" in "".join(out), out
    else:
        assert (
            all(a.returncode for a in agents)
            and time.monotonic() - began < 60
            and "Signal 9" in "".join(out)
        )


@pytest.mark.slow
def test_two_machines_give_the_numbers_of_one_process(tiny, tiny_data, tmp_path):
    """Two agents of torchrun on loopback, each with one rank, in folders of their own."""
    env, folders = (
        {**TINY, **tiny_data, **EVERYTHING, "RUN_ID": "a"},
        [tmp_path / n for n in ("node0", "node1", "ranks")],
    )
    for folder in folders:
        folder.mkdir()
    agents = two_agents(env, folders[:2])
    out = [a.communicate(timeout=200)[0] for a in agents]
    assert [a.returncode for a in agents] == [0, 0], out
    (where,) = [f for f in folders[:2] if (f / "logs").exists()]  # rank 0 writes, nobody else
    assert process(env, folders[2], 2).returncode == 0
    two_nodes, two_ranks = (timeless(read_metrics(f / "logs/a")) for f in (where, folders[2]))
    one = timeless(tiny(**EVERYTHING))
    for label in one:
        if label.startswith("final_"):
            assert two_nodes[label]["val_bpb"] == pytest.approx(
                two_ranks[label]["val_bpb"], abs=1e-6
            )  # as they have other numbers of threads
            assert two_nodes[label]["val_bpb"] == pytest.approx(one[label]["val_bpb"], abs=1e-5)
