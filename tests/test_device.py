"""What a GPU would break, tested where there is none: a device that answers late."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, config, read_metrics, t


class Moment:
    """A CUDA event of the simulated device."""

    def __init__(self, device, at):
        self.device, self.at = device, at

    def synchronize(self):
        self.device.host = max(self.device.host, self.at)

    def elapsed_time(self, later):
        assert later.at <= self.device.host, "read before the device was there"
        return later.at - self.at


class LateDevice(t.Ranks):
    """A rank whose device works behind the host; both have a clock, in ms."""

    def __init__(self, world=1, rank=0):
        self.rank, self.world, self.local_world, self.cuda = rank, world, world, True
        self.device = torch.device("cpu")
        self.host = self.busy_until = 0.0
        self.waits = 0

    def work(self, ms, launch=3.0):
        """The host launches what takes the device so long."""
        self.host += launch
        self.busy_until = max(self.busy_until, self.host) + ms

    def moment(self):
        return Moment(self, max(self.busy_until, self.host))

    def synchronize(self):
        self.waits += 1
        self.moment().synchronize()

    def put(self, array):
        return torch.from_numpy(array)

    def sum(self, tensor):
        return tensor


def test_answers_are_those_of_two_calls_ago_but_where_they_are_waited_for():
    poll = t.Poll(LateDevice())
    found = [poll.ask(x, tensor=torch.tensor(7.0)) for x in (1.0, 2.0, 3.0, 4.0)]
    assert found == [None, None, [1.0, 0.0, 7.0], [2.0, 0.0, 7.0]]
    assert poll.ask(5.0, 6.0, wait=True) == [5.0, 6.0, 0.0] and poll.ask() is None


def test_without_a_gpu_nothing_is_late():
    poll = t.Poll(t.Ranks(config(DEVICE="cpu")))
    assert [poll.ask(x) for x in (1.0, 2.0)] == [[1.0, 0.0], [2.0, 0.0]]


def simulate(
    step_ms, logged, *, primed=True, begin=0, begin_ms=None, validate=(), jump=-1, first=0
):
    """[(step, exact ms, the clock's ms, step_ms, measured)] of a run to its cap of 600 s."""
    device = LateDevice()
    device.work(500.0)  # what goes before
    begin_ms = begin * step_ms if begin_ms is None else begin_ms
    clock = t.Clock(device, 600_000, begin, begin_ms, step_ms if primed else 0.0)
    left_out, origin = 0.0, clock.anchor[0].at
    first_bad = torch.full((), 20001.0)
    found = []
    for step in range(begin, 20001):
        exact = begin_ms + max(device.busy_until, device.host) - origin - left_out
        elapsed, stop, bad = clock.agreed(step, first_bad)
        assert not stop and not bad
        found.append((step, exact, elapsed, clock.step_ms, clock.measured))
        if step in validate:
            since = clock.now()
            before = device.busy_until
            device.work(5000.0)
            left_out += device.busy_until - before
            clock.leave_out(since)
        if elapsed + clock.step_ms >= 600_000 and step:
            break
        if step == jump:  # as fixing QAT's grid, or a checkpoint
            device.work(7000.0)
            clock.wait_again(step)
        device.work(step_ms + (step == 0) * first)
        if logged and (step < 10 or (step + 1) % 100 == 0):
            assert clock.now() == pytest.approx(
                exact + step_ms + (step == 0) * first, abs=step_ms / 2 + 10
            )
    return found


@pytest.mark.parametrize("warmdown", [dict(WARMDOWN_ITERS=3500), dict(WARMDOWN_FRAC=0.667)])
@pytest.mark.parametrize("logged", [True, False])
@pytest.mark.parametrize("step_ms", [84, 400, 672, 2000])
def test_rates_and_stop_are_those_of_the_exact_time(step_ms, logged, warmdown):
    c = config(MAX_WALLCLOCK_SECONDS=600, ITERATIONS=20000, **warmdown)
    found = simulate(step_ms, logged, validate=(0, 50, 100))
    for step, exact, elapsed, estimate, measured in found:
        assert abs(elapsed - exact) <= step_ms / 2 + 10, step
        factor = t.lr_factor(c, step, elapsed, estimate)
        mean = exact / step if step else step_ms
        assert factor == pytest.approx(t.lr_factor(c, step, exact, mean), rel=0.01, abs=1e-3), step
        assert measured == (step > 1)
    step, exact, *_ = found[-1]
    assert 600_000 - 2 * step_ms - 20 <= exact <= 600_000 + step_ms


def test_a_slow_first_step_that_was_not_primed_has_no_part_in_what_a_step_takes():
    """Nothing is done for good before a second one was measured: not late QAT, not the end."""
    found = simulate(84, True, primed=False, first=60_000)
    assert [row[4] for row in found[:3]] == [False, False, True]
    assert [row[3] for row in found[2:]] == pytest.approx([84] * len(found[2:]), abs=10)
    assert found[-1][1] > 590_000


def test_a_resumed_clock_goes_on_from_its_step():
    found = simulate(400, True, begin=700)
    assert found[0][1:4] == (280_000, 280_000, 400)
    c = config(MAX_WALLCLOCK_SECONDS=600, ITERATIONS=20000, WARMDOWN_FRAC=0.667)
    whole = {row[0]: row for row in simulate(400, True)}
    for step, _, elapsed, estimate, _ in found:  # at the rates of a run that was not cut off
        uncut = t.lr_factor(c, step, *whole[step][2:4])
        assert t.lr_factor(c, step, elapsed, estimate) == pytest.approx(uncut, abs=1e-3)
    assert all(abs(elapsed - exact) < 200 for _, exact, elapsed, *_ in found)


def test_a_clock_that_is_resumed_on_a_faster_machine_measures_anew():
    """Also for the end: a step is not taken for one of the slow machine's."""
    found = simulate(84, True, begin=700, begin_ms=400_000, primed=False)
    assert [row[3:] for row in found[:2]] == [(pytest.approx(400_000 / 700), False)] * 2
    assert [row[3] for row in found[2:]] == pytest.approx([84] * len(found[2:]), abs=10)
    assert found[2][4] and found[-1][1] > 599_000
    assert simulate(84, True, begin=700, begin_ms=400_000)[0][3] == 84


@pytest.mark.parametrize("jump", [100, 700])
def test_what_takes_longer_than_a_step_is_known_at_the_next(jump):
    found = simulate(400, False, jump=jump)
    assert max(abs(elapsed - exact) for _, exact, elapsed, *_ in found) < 400
    step, exact, *_ = found[-1]
    assert 599_000 < exact <= 600_000 and step < 1500 - 15


def test_steps_after_the_first_are_not_waited_for():
    """The host stays up to two steps ahead: it waits for a moment two steps old, never for now."""
    device = LateDevice()
    clock = t.Clock(device, 0)
    ahead = []
    for step in range(20):
        clock.agreed(step, torch.full((), 99.0))
        ahead.append(device.busy_until - device.host)
        device.work(400.0)
    assert max(ahead[: clock.WAITED]) <= 0
    assert all(390 <= ms <= 800 for ms in ahead[clock.WAITED + 1 :]) and not device.waits


def test_ranks_know_the_time_of_rank_0_only():
    """Another rank's own clock has no part in what it is told."""
    device = LateDevice(world=2, rank=1)
    sent = []
    told = iter(([1.0, 900.0, 0.0], [3.0, 1700.0, 0.0]))
    device.sum = lambda row: sent.append(row.clone()) or row + torch.tensor(next(told))
    clock = t.Clock(device, 0)
    for step, ms in ((1, 900), (3, 1700)):
        device.work(77.0)
        assert clock.agreed(step, torch.full((), 99.0))[0] == ms
        assert sent[-1].tolist()[:2] == [0.0, 0.0]
    assert clock.step_ms == 400


def test_it_starts_where_there_are_no_file_locks_and_no_sighup(tiny_data, tmp_path):
    """As on Windows."""
    code = (
        "import sys, signal, runpy; sys.modules['fcntl'] = None; del signal.SIGHUP;"
        f"runpy.run_path({str(ROOT / 'train_gpt.py')!r}, run_name='__main__')"
    )
    env = {**os.environ, **TINY, **tiny_data, "RUN_ID": "w", "EVALS": "roundtrip"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "final_artifact_roundtrip" in read_metrics(tmp_path / "logs/w")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(t.BadInput, match="DEVICE=cuda.*allowed here: cpu or auto"):
        t.find_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    assert t.find_device("cpu").type == "cpu"
    with pytest.raises(t.BadInput, match="LOCAL_RANK=4.*sees 4 GPUs.*--nproc_per_node=4"):
        t.find_device("auto")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert t.find_device("auto") == torch.device("cuda", 3)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinities")
def test_threads_are_of_the_cores_that_a_process_may_use():
    code = "import os, train_gpt as t; os.sched_setaffinity(0, {0}); print(t.cores())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize(
    "steps, recur, rehearsed", [(2, "1", 0), (3, "1", 20), (2, "", 20), (1, "", 0)]
)
def test_a_step_that_compiles_is_not_taken_for_a_usual_one(
    steps, recur, rehearsed, tiny_data, monkeypatch
):
    c = config(tiny_data, WARMUP_STEPS=str(steps), RECUR_LAYERS=recur, RECUR_START="50")
    run = t.Run(c)
    said, seen, now = [], set(), [0.0]
    run.log.line = said.append
    monkeypatch.setattr(t.Ranks, "moment", lambda self: now[0])
    model = t.GPT(c)

    def step(*words, **more):
        now[0] += 0.02 if model.recurring in seen else 5.0
        seen.add(model.recurring)

    monkeypatch.setattr(t, "train_step", step)
    assert t.prime(c, run, model, t.TrainData(c, run.ranks)).step == pytest.approx(rehearsed)
    assert ("a step" in said[0]) == bool(rehearsed)


def test_bf16_follows_fp32(tiny):
    """What a GPU computes in, on a CPU: training from about 6 nats down, then every evaluator."""
    settings = dict(EVALS="roundtrip,sliding_window,slot,ttt,ttt_slot", ITERATIONS="12")
    wide, narrow = tiny(**settings), tiny(**settings, DTYPE="bf16")
    losses = [
        [r["train_loss"] for r in rows.values() if "train_loss" in r] for rows in (wide, narrow)
    ]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.01)
    for label in (label for label in wide if label.startswith("final_")):
        assert narrow[label]["val_loss"] == pytest.approx(wide[label]["val_loss"], rel=0.01), label


def test_one_artifact_scores_in_bf16_as_in_fp32_and_gains_as_much(tiny):
    tiny(RUN_ID="made", EVALS="roundtrip")
    settings = dict(LOAD_ARTIFACT="logs/made/final_model.ptz", CTW_WEIGHT="0.1")
    settings |= dict(EVALS="roundtrip,sliding_window,slot,ttt,ttt_slot,ctw")
    wide, narrow = tiny(**settings), tiny(**settings, DTYPE="bf16")
    for label in (label for label in wide if label.startswith("final_")):
        assert narrow[label]["val_loss"] == pytest.approx(wide[label]["val_loss"], rel=5e-4), label
    gains = [
        [rows[f"final_artifact_{label}"]["val_loss"] for label in ("sliding_window", "ttt")]
        for rows in (wide, narrow)
    ]
    assert gains[1][0] - gains[1][1] == pytest.approx(gains[0][0] - gains[0][1], rel=0.05)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(SWA_ENABLED="0", AVERAGE="ema"),
        dict(EMA_ENABLED="0", SWA_ENABLED="0", LAWA_ENABLED="1"),
        dict(QUANT="gptq_lite"),
        dict(QUANT="gptq", LATE_QAT="0"),
        dict(RECUR_LAYERS="1", MIN_LR="0.5"),
    ],
    ids=str,
)
def test_the_end_is_rehearsed_with_every_kind_of_end_and_nothing_remains(changes, tiny_data):
    c = config(tiny_data, WARMUP_STEPS="3", **changes)
    run = t.Run(c)
    run.log.line = lambda text: None
    model = t.GPT(c)
    before = {name: p.clone() for name, p in model.named_parameters()}
    data = t.TrainData(c, run.ranks)
    known = t.prime(c, run, model, data)
    assert known.step > 0 and known.qat_start == known.end == 0  # it is rehearsed on a GPU alone
    with t.put_back(model.parameters()):
        model.recurring = bool(c.recur_layers)
        qat_start, end = t.rehearse_end(c, run.ranks, model, data)
    fixes_grid = c.late_qat and c.min_lr < c.late_qat_threshold
    assert end > 0 and (qat_start > 1) == fixes_grid
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


def test_a_run_whose_time_was_up_is_over_also_when_it_is_resumed(tiny_data, tmp_path, monkeypatch):
    """What is measured anew could say otherwise. LOAD_CHECKPOINT begins a run with new time."""
    monkeypatch.chdir(tmp_path)
    c = config(tiny_data, RUN_ID="r")
    run = t.Run(c)
    run.log.start()
    state = t.TrainingState(c, run.ranks, t.GPT(c))
    state.time_up = True
    run.store.save("checkpoint", 5, state.tensors(5, 123.4))
    run.store.wait()
    again = t.TrainingState(c, run.ranks, t.GPT(c))
    assert again.resume(run) == (5, 123.4) and again.time_up
    (path,) = run.store.paths("checkpoint")
    loaded = config(tiny_data, RUN_ID="s", LOAD_CHECKPOINT=str(path))
    other = t.Run(loaded)
    other.log.start()
    begun = t.TrainingState(loaded, other.ranks, t.GPT(loaded))
    assert begun.resume(other) == (5, 123.4) and not begun.time_up


def test_a_torch_for_gpus_that_sees_none_says_so(tiny, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiny(RUN_ID="auto", DEVICE="auto", EVALS="roundtrip", ITERATIONS="1")
    tiny(RUN_ID="cpu", DEVICE="cpu", EVALS="roundtrip", ITERATIONS="1")
    told = [
        Path(f"logs/{name}.txt")
        .read_text()
        .count("\nDEVICE=auto: this torch is for GPUs (CUDA 13.0)")
        for name in ("auto", "cpu")
    ]
    assert told == [1, 0]
