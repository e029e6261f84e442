"""The artifact: what quantising does, what a damaged or hostile file does, and evaluation from the file alone."""

import dataclasses
import hashlib
import io
import json
import lzma
import math
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import config, random_model, t, timeless
from hypothesis import given, settings
from hypothesis import strategies as st


def quantized(model, c):
    q = t.GptqLite(c, model.state_dict())
    return q, t.unpack(q.pack(0.0)[0])[0]


@pytest.mark.parametrize("cols", [2, 17, 512, 1536])
def test_row_scales_are_the_best_of_five_percentiles_of_each_row(cols):
    w = (
        torch.randn(40, cols, generator=torch.Generator().manual_seed(cols))
        * torch.logspace(-4, 2, 40)[:, None]
    )
    best = torch.full((40,), torch.inf)
    for p in (0.999, 0.9995, 0.9999, 0.99999, 1.0):
        scale = (torch.quantile(w.abs(), p, dim=1) / 31).clamp_min(2.0**-24).half().float()
        error = (w - (w / scale[:, None]).round().clamp(-31, 31) * scale[:, None]).square().sum(1)
        best = torch.minimum(best, error)
    scale = t.row_scales(w, 31)
    ours = (w - t.nearest_levels(w, scale, 31) * scale).square().sum(1)
    torch.testing.assert_close(ours, best, rtol=1e-3, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-5, 100), st.integers(0, 1000))
def test_quantising_has_no_floor_that_hurts_small_weights(size, seed):
    w = torch.randn(8, 256, generator=torch.Generator().manual_seed(seed)) * size
    scale = t.row_scales(w, 31)
    assert ((t.nearest_levels(w, scale, 31) * scale - w).norm() / w.norm()).item() < 0.035


def test_zero_rows_and_single_columns_survive():
    w = torch.zeros(3, 8)
    w[1, 2] = 5.0
    for x in (w, w[:, 2:3]):
        scale = t.row_scales(x, 31)
        torch.testing.assert_close(t.nearest_levels(x, scale, 31) * scale, x, rtol=2e-3, atol=0)


def test_what_is_read_back_is_level_times_scale_by_kind():
    c = config()
    model = random_model(c)
    q, state = quantized(model, c)
    assert q.counts()["int6"] == sum(getattr(model, b).numel() for b in t.BANKS) and sum(
        q.counts().values()
    ) == sum(p.numel() for p in model.parameters())
    for name, w in t.split_banks(model.state_dict(), c.num_layers).items():
        kind = t.parameter_rule(name).export
        if kind in t.LEVELS:
            scale = t.row_scales(w, t.LEVELS[kind])
            assert torch.equal(state[name], t.nearest_levels(w, scale, t.LEVELS[kind]) * scale), (
                name
            )
        else:
            assert torch.equal(state[name], w.half().float() if kind == "fp16" else w), name


@pytest.mark.parametrize("coder", ["rans", "lzma"])
def test_artifact_is_readable_by_its_description_alone(coder):
    """As the comment over the format says, with nothing of the script."""
    c = config(CODER=coder)
    state = random_model(c).state_dict()
    sizes = {
        n: w.shape
        for n, w in t.split_banks(state, c.num_layers).items()
        if t.parameter_rule(n).export in t.LEVELS
    }
    grid = {
        n: torch.arange(sum(shape)).remainder(9).sub(4).to(torch.int8) for n, shape in sizes.items()
    }
    data, figures = t.RateDistortion(c, state, t.Calibration(grid, {})).pack(0.02)
    raw = lzma.decompress(data[40:])
    at = 4 + int.from_bytes(raw[:4], "little")
    header = json.loads(raw[4:at])
    assert data[:8] == b"PGSLOT\x02\n" and data[8:40] == hashlib.sha256(data[40:]).digest()
    assert (
        header["model"]["NUM_LAYERS"] == 3
        and header["step"] == 0.02
        and header["matrices"] == [[n, list(s)] for n, s in sizes.items()]
    )
    found = {}
    for name, dtype, shape in header["tensors"]:
        dtype = np.dtype(dtype)
        found[name] = np.frombuffer(raw, dtype, math.prod(shape), at).reshape(shape)
        at += found[name].nbytes
    assert at == len(raw)
    n = sum(math.prod(shape) for _, shape in header["matrices"])
    if coder == "rans":
        which, spreads = [], [*found["spreads"].tolist()]
        for _, (r, k) in header["matrices"]:
            which += [min(max(a + b + 32, 0), 63) for a in spreads[:r] for b in spreads[r : r + k]]
            del spreads[: r + k]
        starts = np.cumsum(found["table"].astype(int), 1) - found["table"]
        words = found["codes"].view("<u2").tolist()
        count = max(1, min(1024, n >> 11))
        state32, words, levels = (
            [words[2 * i] + (words[2 * i + 1] << 16) for i in range(count)],
            iter(words[2 * count :]),
            [],
        )
        for i in range(n):
            x, k = state32[i % count], which[i]
            symbol = int(np.searchsorted(starts[k], x % 16384, "right")) - 1
            x = int(found["table"][k, symbol]) * (x >> 14) + x % 16384 - int(starts[k, symbol])
            state32[i % count] = (
                x  # words are taken in the order of lanes: a lane's is the next one
            )
            if x < 2**16:
                state32[i % count] = x << 16 | next(words)
            levels.append(symbol - 511)
        levels = np.array(levels)
    else:
        levels = found["levels"].astype(int)
    rows, columns, ours = (
        found["rows"].astype("f8"),
        found["columns"].astype("f8"),
        t.unpack(data)[0],
    )
    for name, (r, k) in header["matrices"]:
        w = (
            levels[: r * k].reshape(r, k)
            * 0.02
            * 2 ** (rows[:r, None] / 4)
            * 2 ** (columns[:k] / 4)
        )
        np.testing.assert_allclose(ours[name].numpy(), w, rtol=1e-5, atol=0)
        levels, rows, columns = levels[r * k :], rows[r:], columns[k:]
    assert (
        figures["level_bytes"]
        == (len(found["codes"]) if coder == "rans" else figures["level_bytes"])
        > 0.99 * figures["entropy_bytes"]
    )


@pytest.mark.parametrize("cap", [30_000, 25_000])
def test_artifact_lands_just_under_the_cap(cap):
    c = config()
    q = t.GptqLite(c, random_model(c, scale=1.0).state_dict())
    assert len(q.pack(0.0)[0]) > cap
    blob, figures = q.fit(cap)
    assert 0.99 * cap < len(blob) <= cap and figures["step"] > q.finest
    assert q.fit(10**6) == q.pack(q.finest)


@pytest.mark.parametrize("quant", ["rd", "gptq_lite"])
def test_a_cap_that_no_steps_can_meet_is_refused_with_one_that_would_do(quant, tiny):
    for cap in (1000, t.code_bytes(), t.code_bytes() + 2000):
        with pytest.raises(t.BadInput, match=f"ARTIFACT_BYTES={cap}: code takes") as refused:
            tiny(ARTIFACT_BYTES=str(cap), QUANT=quant, EVALS="none")
    assert not Path("logs").exists()  # before anything begins
    enough = re.search(r"set (\d+) or more", str(refused.value))[1]
    done = tiny(ARTIFACT_BYTES=enough, QUANT=quant, EVALS="none", ITERATIONS="40")
    assert done["artifact"]["total_bytes"] <= int(enough)
    with pytest.raises(t.BadInput, match=f"ARTIFACT_BYTES={int(enough) - 1}: "):
        tiny(ARTIFACT_BYTES=str(int(enough) - 1), QUANT=quant, EVALS="none")


@pytest.mark.parametrize("quant", ["rd", "gptq_lite"])
def test_the_coarsest_steps_are_finite_and_make_every_level_0_that_may_widen(quant):
    c = config(QUANT=quant)
    model = random_model(c)
    state = model.state_dict()
    shapes = {
        n: w.shape for n, w in t.split_banks(state, 3).items() if t.export_kind(c, n) in t.LEVELS
    }
    grid = {n: torch.zeros(sum(shape), dtype=torch.int8) for n, shape in shapes.items()}
    calibration = None if quant == "gptq_lite" else t.Calibration(grid, {})
    quantizer = t.make_quantizer(c, state, calibration)
    coarsest = quantizer.search(0.0)
    found = quantizer.quantise(coarsest)
    for name, matrix in found.items():
        assert (quant == "gptq_lite" and quantizer.kinds[name] == "int8") or not matrix.levels.any()
    assert all(torch.isfinite(x).all() for x in quantizer.rounded(coarsest).values())


@pytest.mark.parametrize("quant", ["rd", "gptq", "gptq_lite"])
@pytest.mark.parametrize(
    "name, weight", [("bigram.proj.weight", 1e6), ("mlp_up_bank", 1e25), ("qo_bank", 1e36)]
)
def test_a_weight_too_large_for_an_artifact_is_a_fault_that_names_it(
    name, weight, quant, tiny, monkeypatch
):
    """Of fp16, of levels, and of steps that would be infinite."""
    real = t.evaluate

    def evaluate(c, run, model, *args, **more):
        real(c, run, model, *args, **more)
        with torch.no_grad():
            model.state_dict()[name].view(-1)[5] = weight

    monkeypatch.setattr(t, "evaluate", evaluate)
    part = re.escape(t.matrix_names(name, 3)[0])
    with pytest.raises(t.Fault, match=rf"^{part}: has a weight of 1e\+\d\d, too large"):
        tiny(EVALS="none", QUANT=quant, ITERATIONS="2")
    assert not Path("logs/run0/final_model.ptz").exists()


def test_artifact_that_cannot_fit_is_a_fault_that_keeps_the_weights(tiny, monkeypatch):
    """Not even where it was not foreseen."""
    monkeypatch.setattr(t, "refuse_small_cap", lambda *_: None)
    with pytest.raises(t.Fault, match="ARTIFACT_BYTES=.*: code leaves 2000 bytes"):
        tiny(ARTIFACT_BYTES=str(t.code_bytes() + 2000), EVALS="none")
    header, tensors = t.unseal(bytearray(Path("logs/run0/checkpoint.000000012.ckpt").read_bytes()))
    assert tensors["counters"][0] == 12 and tensors["qo_bank"].shape == (6, 32, 32)
    assert not os.path.exists("logs/run0/final_model.ptz")


@pytest.mark.slow
def test_record_model_fits_under_the_cap_with_its_code():
    c = t.load_config({})
    model, g = t.GPT(c), torch.Generator().manual_seed(0)
    with torch.no_grad():  # no zeros and no repeats: as hard to compress as a trained model
        for bank in t.BANKS:
            p = getattr(model, bank)
            p.copy_(torch.randn(p.shape, generator=g) * 0.04)
    code = t.code_bytes()
    q = t.GptqLite(c, model.state_dict())
    blob, figures = q.fit(16_000_000 - code)
    assert 15_968_000 <= len(blob) + code <= 15_999_999 and figures["step"] > q.finest
    state, shape = t.unpack(blob)
    other = t.GPT(
        config(
            **{
                n: ",".join(map(str, v))
                if isinstance(v, list)
                else str(int(v) if isinstance(v, bool) else v)
                for n, v in shape.items()
            },
            EVAL_SEQ_LEN="2048",
            TRAIN_BATCH_TOKENS="2048",
            VAL_BATCH_SIZE="2048",
            TTT_CHUNK_TOKENS="2048",
        )
    )
    t.load_state(other, state, "test")


def test_streams_are_the_same_on_any_number_of_cores_and_no_more_than_are_read(monkeypatch):
    raw, made = np.random.default_rng(0).integers(0, 9, 9 * 2**20 + 5, np.uint8).tobytes(), set()
    for cores in (1, 2, 7):
        monkeypatch.setattr(t.os, "cpu_count", lambda cores=cores: cores)
        made.add(t.compress(raw))
    (blob,) = made
    assert t.expand(blob, len(raw) + 1) == raw and blob.count(b"\xfd7zXZ\0") == t.STREAMS == 8
    assert t.expand(blob, 3 * 2**20) == raw[: 3 * 2**20]
    for wrong in (blob + t.compress(b"x"), blob[:-1], blob + b"x"):
        with pytest.raises((ValueError, t.lzma.LZMAError)):
            t.expand(wrong, len(raw) + 1)


@pytest.fixture
def artifact(tiny, tmp_path):
    metrics = tiny(RUN_ID="made", EVALS="roundtrip,sliding_window,ttt,ttt_slot")
    return tmp_path / "logs" / "made" / "final_model.ptz", metrics


def test_evaluation_from_the_artifact_alone_repeats_the_run_bit_for_bit(artifact, tiny):
    path, made = artifact
    again = tiny(LOAD_ARTIFACT=str(path), EVALS="roundtrip,sliding_window,ttt,ttt_slot")
    assert {n: r for n, r in timeless(again).items() if n.startswith("final_artifact")} == {
        n: r for n, r in timeless(made).items() if n.startswith("final_artifact")
    }
    assert not [n for n in again if n.startswith(("step:", "average", "training", "quantised"))]


def test_artifact_knows_its_shape_and_contradiction_is_named(artifact, tiny_data):
    path, _ = artifact
    base = dict(
        LOAD_ARTIFACT=str(path),
        **tiny_data,
        EVAL_SEQ_LEN="32",
        EVAL_STRIDE="8",
        VAL_BATCH_SIZE="32",
    )
    c, state = t.read_artifact(t.load_config(base))
    assert (c.num_layers, c.model_dim, c.ve_layers, c.vocab_size) == (3, 32, (1, 2), 384)
    with pytest.raises(t.BadInput, match=r"NUM_LAYERS=5 \(there 3\)"):
        t.read_artifact(
            t.load_config({**base, "NUM_LAYERS": "5", "VE_LAYERS": "1,2", "XSA_LAST_N": "1"})
        )


def test_an_artifact_is_evaluated_with_the_settings_that_it_was_trained_with(tiny, tiny_data):
    """Also where RECUR_START says that recurrence was on, and no batch of training fits its sequences."""
    model = dict(RECUR_LAYERS="0", RECUR_START="5", TRAIN_SEQ_LEN="40", TRAIN_BATCH_TOKENS="400")
    made = tiny(RUN_ID="made", EVALS="roundtrip", **model)
    path = {"LOAD_ARTIFACT": "logs/made/final_model.ptz"}
    again = tiny(**path, EVALS="roundtrip", RECUR_LAYERS="0", RECUR_START="5", TRAIN_SEQ_LEN="40")
    label = "final_artifact_roundtrip"
    assert again[label]["val_loss"] == made[label]["val_loss"]
    c = t.load_config({**path, **tiny_data})
    with pytest.raises(t.BadInput, match="do not go with the others: EVAL_STRIDE=64: at most"):
        t.read_artifact(dataclasses.replace(c, eval_seq_len=32))


def refused(path, data):
    path.write_bytes(data)
    with pytest.raises(t.BadInput, match="LOAD_ARTIFACT=.*(damaged|not fit)"):
        c, state = t.read_artifact(config(LOAD_ARTIFACT=str(path)))
        t.load_state(t.GPT(c), state, f"LOAD_ARTIFACT={path}")


def test_damaged_artifacts_are_refused(artifact, tmp_path):
    whole, path, rng = artifact[0].read_bytes(), tmp_path / "damaged", np.random.default_rng(0)
    for cut in (0, 1, 8, 39, 40, 60, len(whole) // 2, len(whole) - 1):
        refused(path, whole[:cut])
    refused(path, whole + b"\0")
    for bit in [*range(0, 40 * 8, 7), *rng.integers(40 * 8, len(whole) * 8, 60).tolist()]:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        refused(path, bytes(flipped))


def test_artifact_with_other_tensors_is_refused_by_name():
    c = config()
    state = t.split_banks(random_model(c).state_dict(), c.num_layers)
    for change, word in (
        (dict(extra=torch.zeros(1)), "extra is"),
        ({"smear.gate": torch.zeros(5)}, r"smear.gate is \[5\], the settings make it \[32\]"),
    ):
        with pytest.raises(t.BadInput, match=word):
            t.load_state(t.GPT(c), {**state, **change}, "here")
    with pytest.raises(t.BadInput, match="smear.gate is missing"):
        t.load_state(t.GPT(c), {n: w for n, w in state.items() if n != "smear.gate"}, "here")


BEHIND = {  # another value -> what a model of it does not fit is told to set
    "VOCAB_SIZE": "300",
    "NUM_LAYERS": "4",
    "MODEL_DIM": "48",
    "NUM_HEADS": "2",
    "NUM_KV_HEADS": "4",
    "MLP_MULT": "2",
    "TIE_EMBEDDINGS": "0",
    "VRL_ENABLED": "1",
    "VALUE_RESIDUAL": "1",
    "GATED_ATTENTION": "1",
    "RECUR_LAYERS": "1",
    "BIGRAM_VOCAB_SIZE": "0",
    "BIGRAM_DIM": "16",
    "VE_ENABLED": "0",
    "VE_DIM": "4",
    "VE_LAYERS": "2",
}


@pytest.mark.parametrize("name", BEHIND)
def test_a_tensor_that_does_not_fit_names_the_setting_that_decides_it(name):
    """Both ways round, for an artifact's matrices and a checkpoint's banks and averages."""
    models = [t.GPT(config()), t.GPT(config(**{name: BEHIND[name]}))]
    for here, there in (models, models[::-1]):
        state = there.state_dict()
        with pytest.raises(t.BadInput, match=f"does not fit: .*. Set {name} as trained"):
            t.load_state(here, t.split_banks(state, there.c.num_layers), "here")
        own, other = (
            {**x, **{f"ema.{n}": w for n, w in x.items()}} for x in (here.state_dict(), state)
        )
        with pytest.raises(t.BadInput, match=f"does not fit: .*. Set {name} as trained"):
            t.copy_tensors(here.c, own, other, "here")


def test_two_settings_that_do_not_fit_are_both_named():
    here, there = t.GPT(config()), t.GPT(config(VOCAB_SIZE="300", GATED_ATTENTION="1"))
    state = t.split_banks(there.state_dict(), 3)
    with pytest.raises(t.BadInput, match="Set VOCAB_SIZE and GATED_ATTENTION as trained"):
        t.load_state(here, state, "here")


def test_a_setting_is_named_also_where_another_value_of_one_makes_no_model():
    c = t.Config(parallel_start_layer=10)  # with 11 no place would open the lanes
    own = t.model_shapes(c)
    there = t.model_shapes(dataclasses.replace(c, vocab_size=512))
    assert t.settings_behind(c, own, there) == "VOCAB_SIZE"


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_pickled_is_ever_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save({"w": {"a": Bomb()}, "m": {"a": "passthrough"}}, buffer)
    for raw in (buffer.getvalue(), pickle.dumps(Bomb(), 2)):
        refused(tmp_path / "bomb.ptz", lzma.compress(raw))
    assert not (tmp_path / "executed").exists()
    refused(tmp_path / "zeros.ptz", lzma.compress(bytes(1000)) + b"more")


def test_missing_artifact_is_named():
    with pytest.raises(t.BadInput, match="LOAD_ARTIFACT=/nowhere.ptz: No such file"):
        t.read_artifact(config(LOAD_ARTIFACT="/nowhere.ptz"))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    t.write_file(path, [b"o", b"ld"], "try again")
    monkeypatch.setattr(
        t.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(
        t.Fault, match="file: No space left on device: not written, older files kept"
    ):
        t.write_file(path, [b"new"], "try again")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]
