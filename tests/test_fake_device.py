"""The GPU path on a device that is not there: no figures, but all that torch knows of each tensor.

torch lets a program register a device ("ghost" here); fake tensors have a device, a dtype and a
shape, and raise where devices are mixed. They do not compare the dtypes of a product's inputs, and
know nothing of waiting: Watch, which sees every operation, does both. Registering a device lasts as
long as its process, so all cases run in one process of their own, this file as a script, which
prints what Watch saw as JSON; the tests read that. Kernels and figures are tests/test_gpu.py's.
"""

import json
import subprocess
import sys
import traceback
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.utils.backend_registration as registration
from conftest import config, t
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

REGISTER = getattr(registration, "_setup_privateuseone_for_python_backend", None)
DEVICE = "ghost"
FEATURES = {
    "plain": dict(LATE_QAT=0),
    "qat": dict(LAWA_ENABLED=1, LAWA_FREQ=1),
    "qat_lite": dict(QUANT="gptq_lite"),
    "recurrence": dict(LATE_QAT=0, RECUR_LAYERS="1", RECUR_START=10),
    "gated": dict(LATE_QAT=0, RECUR_LAYERS="1", RECUR_START=10, RECUR_STYLE="gated"),
    "lanes": dict(LATE_QAT=0, SKIP_GATES_ENABLED=1, PARALLEL_START_LAYER=1),
    "vrl": dict(LATE_QAT=0, VRL_ENABLED=1),
    "gates": dict(LATE_QAT=0, GATED_ATTENTION=1, VALUE_RESIDUAL=1, PARALLEL_LAST_N=1),
    "documents": dict(LATE_QAT=0, DOCUMENTS="mask"),
    "untied": dict(LATE_QAT=0, TIE_EMBEDDINGS=0, EMBED_WD=0.1),
    "muoneq": dict(LATE_QAT=0, MUON_ROW_NORM=1, MUON_PROJECTIONS=1, NEWTON_SCHULZ="polar_express"),
}
METHODS = {
    "sliding_window": {},
    "ctw": dict(CTW_WEIGHT=0.1, EVALS="ctw"),
    **{
        f"slot_{delta}_{loss}": dict(SLOT_DELTA=delta, SLOT_LOSS=loss, SLOT_BIAS=delta == "window")
        for delta in ("shared", "window")
        for loss in ("all", "context", "scored", "past", "recent")
    },
}
RANKS = (0, 5, 7)  # of eight: one matrix of each bank; of those of six alone; none
QUANTISERS = ("rd", "gptq", "gptq_lite")


class Watch(TorchDispatchMode):
    """Compares the dtypes of what may not be mixed, and notes what the host waits for.

    What the host reads is made up, since fake tensors hold nothing: 1, of an integer 10**9, so that
    no step is bad, and what no poll stops for.
    """

    SAME_DTYPE = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "linear", "lerp")
    SAME_DTYPE += ("scaled_dot_product_attention", "index_put", "index_add", "scatter_add")
    CHECKED = ("_linalg_check_errors", "is_nonzero", "equal")  # end in a look at the result

    def __init__(self):
        super().__init__()
        self.waits = []
        self.copies = 0  # to the host that nobody waits for
        self.work = 0  # operations so far

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        on_device = [x for x in tensors if x.device.type == DEVICE]
        if func._schema.name.startswith("prim::"):
            return func(*args, **kwargs)
        self.work += bool(on_device)
        if name in self.SAME_DTYPE:
            kinds = sorted({str(x.dtype) for x in tensors if x.is_floating_point()})
            assert len(kinds) < 2, f"{name} of {' and '.join(kinds)}"
        if name == "_local_scalar_dense":
            return self.read(args[0])
        if name.removeprefix("_foreach_") in ("_to_copy", "copy"):
            self.copy(name, args, kwargs)
        elif name in self.CHECKED and on_device:
            self.waits.append(name)
        elif name in ("index", "index_put") and on_device:
            # places on the host are copied to the device, and waited for
            self.waits += [name for x in args[1] if x is not None and x.device.type != DEVICE]
        return func(*args, **kwargs)

    def read(self, tensor):
        """A number that the host asks for."""
        if tensor.device.type == DEVICE:
            self.waits.append("item")
        return 1.0 if tensor.is_floating_point() else 10**9

    def copy(self, name, args, kwargs):
        """A copy, perhaps from one of host and device to the other."""
        if name == "_to_copy":
            source, target = args[0].device, kwargs.get("device") or args[0].device
            ahead = kwargs.get("non_blocking")
        else:
            whole = [x[0] if isinstance(x, list) else x for x in args[:2]]
            target, source = (x.device for x in whole)
            ahead = args[2] if len(args) > 2 else kwargs.get("non_blocking")
        there, here = (torch.device(x).type == DEVICE for x in (source, target))
        if there != here and not ahead:
            self.waits.append("to the device" if here else "to the host")
        elif there and not here:
            self.copies += 1

    def seen(self):
        """(what was waited for, copies) since it was last asked."""
        found = self.waits, self.copies
        self.waits, self.copies = [], 0
        return found


class Absent(t.Ranks):
    """A rank whose GPU is not there."""

    def __init__(self, watch, world=1, rank=0):
        self.rank, self.world, self.local_world, self.cuda = rank, world, world, True
        self.device = torch.device(DEVICE, 0)
        self.dtype, self.compile, self.watch = torch.bfloat16, False, watch

    def synchronize(self):
        self.watch.waits.append("synchronize")

    def moment(self):
        """A place in the device's work. To wait for it waits, unless there is later work."""
        at = self.watch.work

        def synchronize():
            self.watch.waits += ["moment"] * (at == self.watch.work)

        return SimpleNamespace(synchronize=synchronize)

    def ms_between(self, first, second):
        second.synchronize()
        return 1.0

    def put(self, array):
        return torch.from_numpy(array).to(self.device, non_blocking=True)


class Text:
    """Training data: zeros."""

    T = 32
    held_out = np.zeros(2 * T + 1, np.uint16)

    def __init__(self, ranks):
        self.ranks = ranks

    def sequence(self, i):
        return np.zeros(self.T + 1, np.uint16)

    def batches(self, step=0):
        while True:
            rows = self.ranks.put(np.zeros((4, self.T + 1), np.int64))
            yield rows[:, :-1], rows[:, 1:]


class Cases:
    """All that is run on the device that is not there; each returns what Watch saw."""

    def __init__(self):
        REGISTER(DEVICE)
        self.mode = FakeTensorMode(allow_non_fake_inputs=False)
        self.watch = Watch()
        self.from_numpy, self.tensor = torch.from_numpy, torch.tensor
        patch.object(FakeTensor, "numpy", self.numpy, create=True).start()
        patch.object(FakeTensor, "tolist", self.tolist).start()
        patch.object(t, "tokens_at_once", lambda c, ranks: 4096).start()
        patch.object(t, "validate", MagicMock()).start()
        patch.object(t, "finish_training", MagicMock()).start()
        # of begin = 10, past the steps that are logged; the first one alone is waited for
        patch.object(t.TrainingState, "resume", lambda state, run: (10, 1000.0)).start()
        patch.object(t.Clock, "WAITED", 1).start()

    @contextmanager
    def faked(self):
        """Inside, new tensors are fake."""
        with (
            patch.object(torch, "from_numpy", self.fake_array),
            patch.object(torch, "tensor", self.fake_numbers),
            self.mode,
        ):
            yield

    def fake_array(self, array):
        """torch.from_numpy()."""
        return self.mode.from_tensor(self.from_numpy(array))

    def fake_numbers(self, data, *, device="cpu", **kwargs):
        """torch.tensor(), which makes them on the host and copies them."""
        with unset_fake_temporarily():
            real = self.tensor(data, **kwargs)
        return self.mode.from_tensor(real).to(device)

    @staticmethod
    def numpy(tensor):
        """What the host makes of a fake tensor: ones."""
        if tensor.device.type != "cpu":
            raise TypeError("can't convert a device's tensor to numpy")
        return np.ones(tensor.shape, str(tensor.dtype).removeprefix("torch."))

    @staticmethod
    def tolist(tensor):
        """What the host reads of a poll: no stop; of the clock's four numbers the last, no bad step."""
        assert tensor.device.type == "cpu"
        return [0.0, 0.0, 0.0, 1e9] if len(tensor) == 4 else [0.0] * len(tensor)

    def ghost(self, tensor):
        """A tensor as one of the device."""
        return self.mode.from_tensor(tensor).detach().to(DEVICE)

    def setting(self, world=1, rank=0, **changes):
        """(Config, Run, model) of a tiny model on the device."""
        changes = {"CALIBRATION_TOKENS": 32, **changes}
        c = config(**{k: str(int(v) if isinstance(v, bool) else v) for k, v in changes.items()})
        model = t.GPT(c, torch.bfloat16)
        with self.faked():
            for module in model.modules():
                for name, p in module._parameters.items():
                    if p is not None:
                        module._parameters[name] = torch.nn.Parameter(self.ghost(p))
                for name, buffer in module._buffers.items():
                    module._buffers[name] = self.ghost(buffer)
        ranks = Absent(self.watch, world, rank)
        log = MagicMock()
        log.due = lambda ms: False  # a line has a loss, for which the host waits
        return c, SimpleNamespace(ranks=ranks, log=log, store=MagicMock()), model

    def stream(self, n=128):
        """A validation stream."""
        return SimpleNamespace(n=n, tokens=self.ghost(torch.zeros(n + 1, dtype=torch.long)))

    def training(self, plant=None, **changes):
        """Of train(), from the start of step 13 to that of step 14.

        Others are empty: they are there for the clock, which waits where training, QAT or
        recurrence begins, at step 10, and to ask for times that are two steps old.
        """
        given = dict(ITERATIONS=15, WARMUP_STEPS=0, WARMDOWN_ITERS=40, SAVE_EVERY=0)
        c, run, model = self.setting(**given, **changes)
        seen = {}
        real = t.train_step

        def train_step(*args, step, **kwargs):
            seen[step] = self.watch.seen()
            if step != 13:
                return torch.zeros((), device=DEVICE), torch.zeros((), device=DEVICE)
            if plant:
                plant(model)
            return real(*args, step=step, **kwargs)

        with self.faked(), self.watch, patch.object(t, "train_step", train_step):
            t.train(c, run, model, Text(run.ranks), None)
        qat = "late_qat:on" in str(run.log.line.call_args_list)
        assert qat == c.late_qat and model.recurring == bool(c.recur_layers)
        return seen[14]

    def eight_ranks(self, rank):
        """Of an optimiser's step and its state, on one of eight ranks."""
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
        try:
            c, run, model = self.setting(world=8, rank=rank)
            with self.faked(), self.watch:
                optimizer = t.Optimizer(c, run.ranks, model)
                batch = next(Text(run.ranks).batches(0))
                self.watch.seen()
                t.train_step(c, run.ranks, model, optimizer, batch, step=0, lr_factor=1.0)
                names = {p: name for name, p in model.named_parameters()}
                state = optimizer.state(names)
                assert state["momentum.qo_bank"].shape == model.qo_bank.shape
                optimizer.take_momentum(state, names)
                return self.watch.seen()
        finally:
            dist.destroy_process_group()

    def rehearsal(self):
        """Of the rehearsal of the end: calibration, a comparison of averages, a checkpoint."""
        c, run, model = self.setting()
        with self.faked(), self.watch:
            self.watch.seen()
            t.rehearse_end(c, run.ranks, model, Text(run.ranks))
            return self.watch.seen()

    def poll(self):
        """Of five questions with a tensor that rides along."""
        _, run, _ = self.setting()
        with self.faked(), self.watch:
            poll = t.Poll(run.ranks)
            bad = torch.zeros((), device=DEVICE)
            self.watch.seen()
            for step in range(5):
                poll.ask(step, 2.0, tensor=bad)
                bad += 1
            return self.watch.seen()

    def scoring(self, label, **changes):
        """Of the first window's batch and the next one's, each with a poll before it."""
        c, run, model = self.setting(SLOT_STEPS=3, SLOT_HYPER_LR=0.1, **changes)
        val = self.stream()
        methods = t.ScoringMethod.BY_NAME
        with patch.dict(methods), self.faked():
            if label == "ctw":
                methods["Ctw"] = self.tree
            work = t.Pass(run, model, val, [(label, c)], t.SILENT)
            progress = t.PassCheckpoint(c, run, "progress")
            timer = t.Stopwatch(run.ranks, 1)
            with self.watch:
                self.watch.seen()
                for windows in (slice(0, 4), slice(4, 8)):
                    progress.mark(windows.start, work.out, {}, timer)
                    t.score_batch(work, windows)
                return self.watch.seen()

    def tree(self, c, ranks, model, val, observer):
        """A Ctw that has learnt; its trees are the host's and grow by what they met, as no fake."""
        with unset_fake_temporarily():
            tokens = torch.arange(val.n + 1) % 7
            method = t.Ctw(c, ranks, model, SimpleNamespace(n=val.n, tokens=tokens), observer)
            method.learn(64)
        for depth in method.depths:
            for name, tensor in vars(depth).items():
                setattr(depth, name, self.mode.from_tensor(tensor))
        return method

    def ttt(self):
        """Of a chunk, with SGD; the last sequence reaches back."""
        changes = dict(TTT_FREEZE_BLOCKS=2, TTT_CHUNK_TOKENS=80, TTT_BATCH_SEQS=2, TTT_EPOCHS=1)
        c, run, model = self.setting(VRL_ENABLED=1, **changes)
        with self.faked():
            work = t.Pass(run, model, self.stream(), [("ttt", c)], t.SILENT)
            work.live_tensors()
            with self.watch:
                self.watch.seen()
                work.train(0)
                return self.watch.seen()

    def prequant(self):
        """Of two epochs with AdamW."""
        changes = dict(PREQUANT_TTT_ENABLED=1, PREQUANT_TTT_EPOCHS=2)
        c, run, model = self.setting(**changes, PREQUANT_TTT_FREEZE_BLOCKS=1, VRL_ENABLED=1)
        run.stop = MagicMock()
        run.store.restore.return_value = {}
        val = self.stream()
        with self.faked(), self.watch:
            self.watch.seen()
            t.train_on_validation(c, run, model, val)
            return self.watch.seen()

    def quantising(self, kind):
        """Of a calibration, the finest step size, an estimate and an artifact."""
        c, run, model = self.setting(QUANT=kind, MODEL_DIM=16)
        with self.faked(), self.watch:
            self.watch.seen()
            calibration = None
            if kind != "gptq_lite":
                calibration = t.calibrate(c, run.ranks, model, Text(run.ranks))
            found = [self.watch.seen()]
            quantizer = t.make_quantizer(c, model.state_dict(), calibration)
            step_size = quantizer.finest
            for work in (quantizer.estimate, quantizer.pack):
                found.append(self.watch.seen())
                work(step_size)
            return [*found, self.watch.seen()]

    def planted(self, fault):
        """Of training with a fault in it."""
        plain = FEATURES["plain"]
        clip = t.Optimizer.clip

        def uncast(model, h):
            return torch.nn.functional.linear(h, model.head_weight())

        def host_table(model):
            model.sin = self.mode.from_tensor(torch.zeros(32, 1, 2, dtype=torch.bfloat16))

        def look(optimizer, shares, small):
            norm = clip(optimizer, shares, small)
            return norm * norm.item()

        def pick(optimizer, shares, small):
            return clip(optimizer, shares, small) + small[0][small[0] > 0].sum()

        def send(optimizer, shares, small):
            return clip(optimizer, shares, small) * torch.tensor([1.0], device=DEVICE)

        def time(optimizer, shares, small):
            optimizer.ranks.ms_between(None, optimizer.ranks.moment())
            return clip(optimizer, shares, small)

        if fault == "uncast product":
            with patch.object(t.GPT, "project", uncast):
                return self.training(**plain)
        if fault == "tensor on the host":
            return self.training(host_table, **plain)
        wrong = {"item": look, "mask": pick, "constant": send, "time": time}[fault]
        with patch.object(t.Optimizer, "clip", wrong):
            return self.training(**plain)


FAULTS = {
    "uncast product": "mm of torch.bfloat16 and torch.float32",
    "tensor on the host": "found at least two devices, ghost:0 and cpu",
    "item": [["item"], 1],
    "mask": "aten.nonzero",  # its size is the host's to know
    "constant": [["to the device"], 1],
    "time": [["moment"], 1],
}


def main():
    """Run all cases and print what was seen as JSON, or the error that a case ended in."""
    cases = Cases()
    run = {f"training {name}": partial(cases.training, **x) for name, x in FEATURES.items()}
    run |= {f"rank {rank}": partial(cases.eight_ranks, rank) for rank in RANKS}
    for name, changes in METHODS.items():
        label = name.partition("_")[0] if name.startswith("slot") else name
        run[f"scoring {name}"] = partial(cases.scoring, label, **changes)
    run |= {f"quantising {kind}": partial(cases.quantising, kind) for kind in QUANTISERS}
    run |= {name: getattr(cases, name) for name in ("rehearsal", "poll", "ttt", "prequant")}
    run |= {f"planted {fault}": partial(cases.planted, fault) for fault in FAULTS}
    found = {}
    for name, case in run.items():
        try:
            found[name] = case()
        except Exception as why:
            traceback.print_exc()
            found[name] = f"{type(why).__name__}: {why}"
        cases.watch.seen()
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found():
    """What each case saw: [waits, copies]; or how it failed."""
    if not REGISTER:
        pytest.skip("this torch has no devices that are written in Python; 2.13 has")
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", FEATURES)
def test_a_training_step_polls_once_and_waits_for_nothing(name, found):
    assert found[f"training {name}"] == [[], 1]


@pytest.mark.parametrize("rank", RANKS)
def test_ranks_with_whole_shares_parts_and_padding_wait_for_nothing(rank, found):
    assert found[f"rank {rank}"] == [[], 0]


@pytest.mark.parametrize("name", METHODS)
def test_scoring_polls_once_a_batch_and_waits_for_nothing(name, found):
    assert found[f"scoring {name}"] == [[], 2]


def test_a_poll_is_one_copy(found):
    assert found["poll"] == [[], 5]


def test_learning_a_chunk_waits_for_nothing(found):
    assert found["ttt"] == [[], 0]


def test_training_on_validation_waits_once_an_epoch(found):
    assert found["prequant"] == [["moment"] * 2, 2]


@pytest.mark.parametrize("kind", QUANTISERS)
def test_an_export_waits_at_most_50_times(kind, found):
    """Of a search, which asks for 1 + log2(40 / 1e-3) estimates, and one try."""
    calibration, finest, estimate, artifact = (waits for waits, _ in found[f"quantising {kind}"])
    assert calibration == ["item"] * (kind != "gptq_lite")
    assert estimate == ["to the host"]
    assert len(finest) + 17 * len(estimate) + len(artifact) <= 50


def test_the_end_of_training_waits_for_figures_alone(found):
    """Twice a calibration's, a search's, and a loss for each of three averages; a checkpoint."""
    waits, _ = found["rehearsal"]
    assert "to the device" not in waits and len(waits) <= 12


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault, found):
    expected, seen = FAULTS[fault], found[f"planted {fault}"]
    assert expected in seen if isinstance(expected, str) else expected == seen


if __name__ == "__main__":
    main()
