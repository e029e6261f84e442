"""The script on a GPU: the same figures as on a CPU, within bf16, and a host that waits for nothing. Skipped without one."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, config, t

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

GPU = dict(DEVICE="cuda", COMPILE="0")
CAUSAL = "roundtrip,sliding_window,slot,ttt,ttt_slot,ctw"
FEATURES = {
    "plain": {},
    "qat": dict(LATE_QAT="1", LATE_QAT_THRESHOLD="0.9"),
    "recurrence": dict(RECUR_LAYERS="1", RECUR_START="4", VRL_ENABLED="1"),
    "gated": dict(RECUR_LAYERS="1", RECUR_START="4", RECUR_STYLE="gated"),
    "lanes": dict(
        RECUR_LAYERS="1",
        RECUR_START="4",
        RECUR_STYLE="shared",
        SKIP_GATES_ENABLED="1",
        PARALLEL_START_LAYER="2",
    ),
    "gates": dict(GATED_ATTENTION="1", VALUE_RESIDUAL="1", PARALLEL_LAST_N="1"),
    "untied": dict(TIE_EMBEDDINGS="0", MUON_ROW_NORM="1", NEWTON_SCHULZ="polar_express"),
    "gptq": dict(QUANT="gptq", LAWA_ENABLED="1"),
    "lite": dict(QUANT="gptq_lite", CODER="lzma", LATE_QAT="1", LATE_QAT_THRESHOLD="0.9"),
}


def train_losses(rows):
    """Training losses in order."""
    return [row["train_loss"] for row in rows.values() if "train_loss" in row]


@pytest.mark.parametrize("name", FEATURES)
def test_training_follows_the_cpu(name, tiny):
    """fp32 on the CPU, bf16 on the GPU; losses of 12 steps from about 6 nats down."""
    cpu = tiny(**FEATURES[name], EVALS="roundtrip")
    gpu = tiny(**FEATURES[name], EVALS="roundtrip", **GPU)
    assert train_losses(gpu) == pytest.approx(train_losses(cpu), rel=0.02)
    ours, theirs = (rows["final_artifact_roundtrip"]["val_loss"] for rows in (gpu, cpu))
    assert ours == pytest.approx(theirs, rel=0.02)


def test_every_evaluator_scores_an_artifact_as_the_cpu_does(tiny):
    tiny(RUN_ID="made", EVALS="roundtrip")
    path = dict(
        LOAD_ARTIFACT="logs/made/final_model.ptz",
        EVALS=CAUSAL,
        TTT_FREEZE_BLOCKS="2",
        CTW_WEIGHT="0.1",
    )
    cpu, gpu = tiny(**path), tiny(**path, **GPU)
    labels = [label for label in cpu if label.startswith("final_")]
    assert len(labels) == 6
    for label in labels:
        assert gpu[label]["val_loss"] == pytest.approx(cpu[label]["val_loss"], rel=5e-3), label
        assert gpu[label]["causal"] == cpu[label]["causal"]


@pytest.mark.parametrize("loss", ["all", "context", "scored", "past", "recent"])
@pytest.mark.parametrize("delta", ["shared", "window"])
def test_every_slot_scores_as_the_cpu_does(delta, loss, tiny):
    tiny(RUN_ID="made", EVALS="roundtrip", ITERATIONS="6")
    path = dict(LOAD_ARTIFACT="logs/made/final_model.ptz", EVALS="slot", SLOT_BIAS="1")
    path |= dict(SLOT_DELTA=delta, SLOT_LOSS=loss, SLOT_STEPS="8")
    cpu, gpu = (
        rows["final_artifact_slot"]["val_loss"] for rows in (tiny(**path), tiny(**path, **GPU))
    )
    assert gpu == pytest.approx(cpu, rel=5e-3)


@pytest.mark.parametrize("name", ["plain", "qat", "recurrence", "gated"])
def test_a_step_waits_for_nothing(name, tiny_data):
    """torch raises at whatever makes the host wait, in a step, the averages and the clock."""
    c = config(tiny_data, **FEATURES[name], **GPU)
    run = t.Run(c)
    model = t.GPT(c, run.ranks.dtype).to(run.ranks.device)
    data = t.TrainData(c, run.ranks)
    state = t.TrainingState(c, run.ranks, model)
    feed = data.batches()
    if name == "qat":
        state.qat.start(run.ranks, data)
    model.recurring = bool(c.recur_layers)
    clock = t.Clock(run.ranks, 1e6)
    bad = torch.full((), 99.0, device=run.ranks.device)
    step = partial(t.train_step, c, run.ranks, model, state.optimizer)
    for n in range(10):
        if n == 4:
            torch.cuda.set_sync_debug_mode("error")
        try:
            clock.agreed(n + 1, bad)
            step(next(feed), step=n, lr_factor=1.0, qat=state.qat)
            state.averages.update(0.1)
        finally:
            if n == 9:
                torch.cuda.set_sync_debug_mode("default")


def test_the_cap_holds_and_rates_follow_the_clock(tiny):
    rows = tiny(
        **GPU,
        ITERATIONS="100000",
        MAX_WALLCLOCK_SECONDS="6",
        WARMDOWN_ITERS="50",
        EVALS="roundtrip",
    )
    assert 4000 < rows["training"]["train_time"] < 6300
    assert 20 < rows["training"]["steps"] < 100000


def test_a_run_that_was_cut_off_goes_on(tiny):
    whole = tiny(**GPU, ITERATIONS="12")
    tiny(RUN_ID="half", **GPU, ITERATIONS="12", SAVE_EVERY="5")
    last = sorted(Path("logs/half").glob("checkpoint.*"))[0]
    again = tiny(LOAD_CHECKPOINT=str(last), **GPU, ITERATIONS="12")
    assert again["training"]["steps"] == 12
    assert again["final_artifact_roundtrip"]["val_loss"] == pytest.approx(
        whole["final_artifact_roundtrip"]["val_loss"], rel=0.01
    )


def test_compiled_there_is_one_graph_for_each_shape_and_no_break(tiny):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    rows = tiny(DEVICE="cuda", COMPILE="1", WARMUP_STEPS="2", EVALS="roundtrip,sliding_window,ttt")
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 8, counters["stats"]
    assert rows["pass_artifact_roundtrip"]["compile_time"] > 0


def test_an_audit_finds_what_is_claimed(tiny, tiny_data):
    tiny(RUN_ID="made", EVALS="roundtrip")
    settings = {**TINY, **tiny_data, **GPU, "EVALS": "sliding_window,slot,ttt"}
    command = [sys.executable, "-m", "tools.audit", "--probes", "4"]
    command += ["--artifact", "logs/made/final_model.ptz"]
    command += [f"{name}={value}" for name, value in settings.items()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_attention_rows_alone_are_those_of_the_whole():
    q = torch.randn(2, 64, 8, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, 64, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    whole, rows = t.sdpa_attention(q, k, v), t.sdpa_attention(q[:, -16:], k, v)
    assert torch.allclose(whole[:, -16:].float(), rows.float(), atol=2e-2)
    assert np.isfinite(whole.float().cpu().numpy()).all()
