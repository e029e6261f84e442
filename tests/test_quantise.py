"""Quantising: coder, steps by cost, GPTQ, byte budget, QAT, averages, and going on from a checkpoint without training."""

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    TINY,
    config,
    make_tiny_data,
    random_model,
    read_metrics,
    runs,
    t,
    timeless,
    write_shard,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import quantise

CODE = t.code_bytes()


def coded(seed, n, spread, classes=t.DISTRIBUTIONS):
    """(symbols, distributions, table) of n rounded Gaussian levels whose deviation goes with their distribution."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, classes, n).astype(np.uint8)
    symbols = (
        np.clip(np.rint(rng.standard_normal(n) * spread ** (rows / classes)), -511, 511).astype(
            np.int16
        )
        + 511
    )
    counts = np.zeros((t.DISTRIBUTIONS, t.SYMBOLS), np.int64)
    np.add.at(counts, (rows, symbols), 1)
    return symbols, rows, counts


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30_000), st.sampled_from([1.0, 8.0, 300.0]))
def test_coder_gives_back_every_level(seed, n, spread):
    symbols, rows, counts = coded(seed, n, spread)
    table = t.frequencies(counts)
    assert (table.sum(1) == 2**t.BITS).all() and (table[counts > 0] > 0).all()
    codes = t.rans_encode(symbols, rows, table)
    assert np.array_equal(t.rans_decode(codes, rows, table), symbols)


def test_coder_is_within_a_few_thousandths_of_the_entropy():
    symbols, rows, counts = coded(0, 2_000_000, 40.0)
    size, entropy = (
        len(t.rans_encode(symbols, rows, t.frequencies(counts))),
        t.entropy_bytes(counts),
    )
    assert entropy <= size <= 1.005 * entropy
    p = counts.sum(0) / counts.sum()
    assert (
        entropy < 0.9 * -(p[p > 0] * np.log2(p[p > 0])).sum() * 2_000_000 / 8
    )  # one distribution for all would be dearer


def test_damaged_codes_are_refused_not_decoded():
    symbols, rows, counts = coded(1, 20_000, 8.0)
    table = t.frequencies(counts)
    codes = t.rans_encode(symbols, rows, table)
    for wrong in (
        codes[:-2],
        np.concatenate([codes, codes[:2]]),
        np.concatenate([codes[:40], codes[40:42] ^ 255, codes[42:]]),
    ):
        with pytest.raises((ValueError, IndexError)):
            t.rans_decode(wrong, rows, table)
    with pytest.raises(ValueError, match="frequencies"):
        t.rans_decode(codes, rows, table + 1)


@pytest.fixture(scope="module")
def calibrated(tiny_data):
    """(Config, model, {quant: what calibrate found}) of a model with random weights."""
    c = config(tiny_data, CALIBRATION_TOKENS="2048")
    model, ranks = random_model(c), t.Ranks(c)
    return (
        c,
        model,
        {
            q: t.calibrate(
                config(tiny_data, QUANT=q, CALIBRATION_TOKENS="2048"),
                ranks,
                model,
                t.TrainData(c, ranks),
            )
            for q in ("rd", "gptq")
        },
    )


def test_steps_are_the_inverse_root_of_what_errors_cost(calibrated):
    c, model, found = calibrated
    data, params, name = (
        t.TrainData(c, t.Ranks(c)),
        dict(model.named_parameters()),
        "blocks.1.mlp.fc.weight",
    )
    n, total = c.calibration_tokens // c.train_seq_len, 0
    for i in range(n):
        model.zero_grad()
        ids = torch.from_numpy(data.sequence(i).astype(np.int64))[None]
        model(ids[:, :-1], ids[:, 1:], "sum").backward()
        total = total + params["mlp_up_bank"].grad[1].square()
    rows, columns = found["rd"].grid[name].split(total.shape)
    for exponents, cost in ((rows, total.mean(1)), (columns, total.mean(0))):
        expected = -2 * (cost + 0.1 * total.mean()).log2()
        difference = exponents.float() - expected
        assert (
            difference - difference.mean()
        ).abs().max() <= 1.01  # of a quarter of an octave, both rounded
    grids = [found[q].grid for q in found]
    assert all((grids[0][n].int() - grids[1][n].int()).abs().max() <= 1 for n in grids[0])
    model.zero_grad(set_to_none=True)


def damage(c, model, found, state):
    """Cost of an artifact's errors by the Hessians."""
    own = t.split_banks(model.state_dict(), c.num_layers)
    return sum(
        torch.einsum(
            "rc,cd,rd->", (state[n] - own[n]).double(), h.double(), (state[n] - own[n]).double()
        ).item()
        for n, h in found["gptq"].hessians.items()
    )


def test_at_equal_bytes_costs_are_far_less_than_gptq_lites_and_gptqs_are_less_still(calibrated):
    c, model, found = calibrated
    state = model.state_dict()
    lite = t.GptqLite(config(CODER="lzma"), state).fit(10**9)[0]
    sizes, costs = [len(lite)], [damage(c, model, found, t.unpack(lite)[0])]
    for quant in ("rd", "gptq"):
        blob, figures = t.make_quantizer(config(QUANT=quant), state, found[quant]).fit(len(lite))
        sizes.append(len(blob))
        costs.append(damage(c, model, found, t.unpack(blob)[0]))
        assert figures["level_bytes"] <= 1.015 * figures["entropy_bytes"]
    assert 0.995 * sizes[0] <= min(sizes[1:]) and max(sizes[1:]) <= sizes[0]
    assert costs[1] < 0.6 * costs[0] and costs[2] < 0.9 * costs[1]


@pytest.mark.parametrize("seed,quant", [(1, "rd"), (2, "rd"), (3, "rd"), (1, "gptq")])
def test_every_seed_lands_in_the_last_two_thousandths_under_the_cap(seed, quant):
    c = config(QUANT=quant, MODEL_DIM="96")
    model, g = random_model(c, seed), torch.Generator().manual_seed(seed)
    names = {
        n: w
        for n, w in t.split_banks(model.state_dict(), c.num_layers).items()
        if t.parameter_rule(n).export in t.LEVELS
    }
    grid = {
        n: torch.randint(-6, 7, (sum(w.shape),), generator=g, dtype=torch.int8)
        for n, w in names.items()
    }
    hessians = (
        {
            n: (x := torch.randn(2 * w.size(1), w.size(1), generator=g)).mT @ x
            for n, w in names.items()
        }
        if quant == "gptq"
        else {}
    )
    cap = 120_000 + seed
    calibration = t.Calibration(grid, hessians)
    blob, figures = t.make_quantizer(c, model.state_dict(), calibration).fit(cap)
    assert 0.998 * cap < len(blob) <= cap
    assert figures["step"] > t.RateDistortion(c, model.state_dict(), calibration).finest


def test_gptq_makes_up_for_earlier_columns(calibrated):
    c, model, found = calibrated
    q = t.Gptq(config(QUANT="gptq"), model.state_dict(), found["gptq"])
    plain, fed = (
        kind(config(QUANT="gptq"), model.state_dict(), found["gptq"]).rounded(0.05)
        for kind in (t.RateDistortion, t.Gptq)
    )
    assert damage(c, model, found, fed) < 0.85 * damage(c, model, found, plain)
    name = q.names[-1]
    rows, columns, levels = q.quantise(0.05)[name]
    assert torch.equal(levels, levels.round()) and levels.abs().max() <= t.LEVELS["int10"]
    torch.testing.assert_close(fed[name], levels * t.spacing(rows, columns, 0.05))


def test_the_validation_split_has_no_part_in_steps_hessians_or_the_choice_of_an_average(
    tmp_path, tiny, tiny_data
):
    other = make_tiny_data(tmp_path)
    tokens = np.fromfile(tmp_path / "fineweb_val_000000.bin", "<u2", offset=1024)
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens[::-1])
    changes = dict(QUANT="gptq", EVALS="none", LATE_QAT_THRESHOLD="0.5", ITERATIONS="4")
    found = [tiny(**changes, **data) for data in ({}, other)]
    one, two = (timeless(f) for f in found)
    assert one["final_float_roundtrip"] != two["final_float_roundtrip"]
    for label in ("quantised", "artifact", "average_none", "average_ema"):
        assert one[label] == two[label], label


def test_training_on_the_validation_split_is_refused(tmp_path, tiny):
    data = make_tiny_data(tmp_path, targets=2000)
    shutil.copy(tmp_path / "fineweb_val_000000.bin", tmp_path / "fineweb_train_000001.bin")
    with pytest.raises(
        t.BadInput, match=r"has (\d+) of \1 validation documents; that is 100.0 % .* C3"
    ):
        tiny(**data)


def test_qat_rounds_to_the_artifacts_own_weights(tiny_data):
    """What a step under QAT sees is what an artifact with this grid holds, for every quantised tensor."""
    c = config(tiny_data, ARTIFACT_BYTES=str(CODE + 30_000))
    ranks, model = t.Ranks(c), random_model(c)
    qat = t.LateQat(c, model)
    qat.start(ranks, t.TrainData(c, ranks))
    blob, _ = t.make_quantizer(c, model.state_dict(), qat.calibration()).pack(qat.step_size)
    expected, before = (
        t.unpack(blob)[0],
        {n: p.detach().clone() for n, p in model.named_parameters()},
    )
    qat.round_weights()
    changed = 0
    for name, w in t.split_banks(dict(model.named_parameters()), c.num_layers).items():
        if t.parameter_rule(name).export in t.LEVELS:
            torch.testing.assert_close(w, expected[name], rtol=1e-6, atol=0, msg=name)
            changed += not torch.equal(w, t.split_banks(before, c.num_layers)[name])
    assert changed == len(qat.grid) == 6 * c.num_layers + 3 and 0.9 < len(blob) / 30_000 < 1.1


@pytest.mark.parametrize("quant", ["rd", "gptq", "gptq_lite"])
def test_qat_follows_rows_that_outgrow_the_grid_as_the_export_does(quant, tiny_data):
    """Training that goes on after the grid was fixed: no weight is clipped, all are the artifact's."""
    c = config(tiny_data, ARTIFACT_BYTES=str(CODE + 30_000), QUANT=quant)
    ranks, model = t.Ranks(c), random_model(c)
    qat, data = t.LateQat(c, model), t.TrainData(c, ranks)
    qat.start(ranks, data)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 40 * (torch.arange(p.numel()) % 7 == 0).view(p.shape))  # far over the grid
    kept = {n: w.clone() for n, w in t.split_banks(model.state_dict(), c.num_layers).items()}
    quantizer = t.make_quantizer(c, model.state_dict(), qat.calibration())
    exported = t.unpack(quantizer.pack(qat.step_size)[0])[0]
    with qat.rounded_weights():
        for name, w in t.split_banks(qat.params, c.num_layers).items():
            assert torch.equal(w, exported[name]), name
            if quant != "gptq_lite":  # which clips on purpose
                distance = quantizer.nearest(name, qat.step_size)[1]
                assert ((w - kept[name]).abs() <= 0.51 * distance).all(), name
    for name, w in t.split_banks(model.state_dict(), c.num_layers).items():
        assert torch.equal(w, kept[name])


def test_lawa_is_the_mean_of_the_last_snapshots():
    c, w = (
        config(LAWA_ENABLED="1", LAWA_K="3", LAWA_FREQ="2", AVERAGE="lawa"),
        torch.nn.Parameter(torch.zeros(2)),
    )
    averages = t.Averages(c, [w])
    for n in range(1, 12):
        with torch.no_grad():
            w.fill_(n)
        averages.update(1.0)
        if n == 1:
            assert list(averages.candidates()) == ["none"]
        if n in (2, 4, 11):
            found = averages.candidates()
            assert list(found) == ["lawa"] and found["lawa"][0][0].item() == pytest.approx(
                {2: 2, 4: 3, 11: 8}[n]
            )


@pytest.mark.parametrize("kind", ["ema", "swa", "none", "auto"])
def test_average_exports_what_it_names(kind, tiny):
    found = tiny(AVERAGE=kind, EVALS="none")
    losses = {
        n.removeprefix("average_"): row["heldout_train_loss"]
        for n, row in found.items()
        if n.startswith("average_")
    }
    assert set(losses) == ({"none", "ema", "swa"} if kind == "auto" else {kind})
    chosen = min(losses, key=losses.get)
    assert f"average: exporting {chosen} " in Path("logs/run0.txt").read_text()


def test_candidates_are_compared_after_quantising(tiny):
    coarse, fine = (
        tiny(AVERAGE="none", EVALS="none", ARTIFACT_BYTES=str(CODE + size))
        for size in (14_000, 10**6)
    )
    assert (
        coarse["average_none"]["heldout_train_loss"]
        > fine["average_none"]["heldout_train_loss"] + 0.001
    )


def test_an_average_that_is_switched_off_cannot_be_asked_for():
    for kind in ("ema", "swa", "lawa"):
        with pytest.raises(t.BadInput, match=f"AVERAGE={kind}: needs {kind.upper()}_ENABLED=1"):
            t.load_config({"AVERAGE": kind, "EMA_ENABLED": "0", "SWA_ENABLED": "0"})


def test_a_checkpoint_is_exported_anew_without_training(tiny):
    made = tiny(RUN_ID="made", EVALS="roundtrip", LATE_QAT="0")
    path = "logs/made/checkpoint.000000012.ckpt"
    again = tiny(LOAD_CHECKPOINT=path, EVALS="roundtrip", LATE_QAT="0")
    assert again["training"]["steps"] == 12 and not [n for n in again if "train_loss" in again[n]]
    for label in ("average_none", "quantised", "artifact", "final_artifact_roundtrip"):
        assert timeless(again)[label] == timeless(made)[label], label
    other = tiny(
        LOAD_CHECKPOINT=path, EVALS="roundtrip", QUANT="gptq", ARTIFACT_BYTES=str(CODE + 30_000)
    )
    assert other["artifact"]["model_bytes"] <= 30_000 < made["artifact"]["model_bytes"]
    more = tiny(LOAD_CHECKPOINT=path, EVALS="none", ITERATIONS="15", TRAIN_LOG_EVERY="1")
    assert (
        more["training"]["steps"] == 15
        and "train_loss" in more["step:15/15"]
        and more["step:13/15"]
        and "step:11/15" not in more
    )


def test_late_qat_begins_anew_from_a_loaded_checkpoint(tiny):
    """Also where it was on when the checkpoint was written, and with LATE_QAT=0 it is off."""
    tiny(RUN_ID="made", EVALS="none", LATE_QAT_THRESHOLD="0.9")
    path = "logs/made/checkpoint.000000012.ckpt"
    assert t.read_checkpoint(path)["counters"][2] > 0
    more = dict(LOAD_CHECKPOINT=path, EVALS="none", ITERATIONS="30", TRAIN_LOG_EVERY="1")
    anew = tiny(RUN_ID="anew", LATE_QAT_THRESHOLD="0.3", **more)
    off = tiny(RUN_ID="off", LATE_QAT="0", **more)
    switched = [
        line for line in Path("logs/anew.txt").read_text().splitlines() if "late_qat:on" in line
    ]
    step = int(switched[-1].split("step:")[1].split()[0])
    assert 12 < step < 30 and "\nlate_qat:on" not in Path("logs/off.txt").read_text()
    for n in range(13, step + 1):  # not a bit of the old grid
        assert anew[f"step:{n}/30"]["train_loss"] == off[f"step:{n}/30"]["train_loss"]
    last = anew["step:30/30"]
    assert last["val_loss"] < anew["step:15/30"]["val_loss"] + 0.02
    assert anew["average_none"]["heldout_train_loss"] < last["train_loss"] + 0.5


def test_a_checkpoint_is_taken_in_as_far_as_it_fits(tiny):
    """What is new begins anew, what has no place is left out, and a line says both."""
    tiny(RUN_ID="made", EVALS="none", EMA_ENABLED="0", VRL_ENABLED="1", LATE_QAT_THRESHOLD="0.9")
    path = "logs/made/checkpoint.000000012.ckpt"
    there = t.read_checkpoint(path)
    changes = dict(LAWA_ENABLED="1", LAWA_K="2", GATED_ATTENTION="1", SWA_ENABLED="0")
    changes |= dict(ITERATIONS="13", MATRIX_LR="0", TIED_EMBED_LR="0", SCALAR_LR="0")
    begun = tiny(
        RUN_ID="new", LOAD_CHECKPOINT=path, EVALS="roundtrip", QUANT="gptq_lite", **changes
    )
    log = Path("logs/new.txt").read_text()
    (line,) = [row for row in log.splitlines() if row.startswith("LOAD_CHECKPOINT:")]
    gates = [f"blocks.{i}.attn.attn_gate.{kind}" for i in range(3) for kind in ("bias", "weight")]
    vrl = [f"blocks.{i}.attn.vrl_gate" for i in (1, 2)]
    new = " ".join([*gates, "ema", "lawa"])
    assert line == f"LOAD_CHECKPOINT: step 12; begin anew: {new}; left out: {' '.join(vrl)} swa"
    saved = t.read_checkpoint("logs/new/checkpoint.000000013.ckpt")
    for kind in ("ema", "lawa0", "lawa1"):  # not the initial weights
        assert torch.equal(saved[f"{kind}.tok_emb.weight"], there["tok_emb.weight"])
    assert begun["final_artifact_roundtrip"]["val_loss"] < 5.95


@pytest.mark.parametrize("before", ["2", "50"])
def test_recurrence_that_the_loaded_run_had_not_begun_begins_when_it_is_loaded(
    before, tiny, tiny_data
):
    """Later visits' vectors are what that run learnt of them, or else copies of the first's."""
    own = dict(RECUR_LAYERS="1", RECUR_STYLE="own", EVALS="none", LATE_QAT="0")
    tiny(RUN_ID="made", RECUR_START=before, **own)
    path = "logs/made/checkpoint.000000012.ckpt"
    c = config(tiny_data, **own, RUN_ID="new", RECUR_START="2", LOAD_CHECKPOINT=path)
    run = t.Run(c)
    run.log.start()
    model = t.GPT(c)
    assert t.TrainingState(c, run.ranks, model).resume(run)[0] == 12
    vectors = model.vectors_by_visit()
    assert len(vectors) == 3
    for name, p in vectors.items():
        assert torch.equal(p[0], t.read_checkpoint(path)[name][0])
        assert torch.equal(p[1], p[0]) == (before == "50")


def test_of_many_names_that_begin_anew_twenty_are_told():
    gates = [f"blocks.{i}.attn.vrl_gate" for i in range(10, 50)]
    averages = [f"{kind}.{name}" for kind in ("ema", "lawa0", "lawa1") for name in gates]
    optimiser = [f"exp_avg.{name}" for name in gates]
    told = t.names_of_state([*gates, *averages, *optimiser])
    assert told == f"{' '.join(gates[:20])} and 22 more"
    assert t.names_of_state(gates[:20]) == " ".join(gates[:20])


def test_swa_begins_anew_when_rates_rise_again(tiny):
    tiny(RUN_ID="made", EVALS="none")
    path = "logs/made/checkpoint.000000012.ckpt"
    assert t.read_checkpoint(path)["counters"][3] == 2
    tiny(RUN_ID="same", EVALS="none", LOAD_CHECKPOINT=path)
    tiny(RUN_ID="more", EVALS="none", LOAD_CHECKPOINT=path, ITERATIONS="40")
    told = [
        re.findall(r"swa_snapshots:(\d+)$", Path(f"logs/{n}.txt").read_text(), re.M)
        for n in ("same", "more")
    ]
    assert told == [["2"], ["2"]]  # of steps 11 and 12, and of 39 and 40


@pytest.mark.parametrize("quant", ["rd", "gptq_lite"])
def test_late_qat_does_no_harm_to_a_continued_run(quant, tiny):
    """Weights that had left a grid that was fixed for others once ended at 10 nats."""
    settings = dict(QUANT=quant, EVALS="roundtrip", VAL_LOSS_EVERY="0")
    tiny(RUN_ID="begun", LATE_QAT_THRESHOLD="0.9", **settings)
    settings |= dict(LOAD_CHECKPOINT="logs/begun/checkpoint.000000012.ckpt", ITERATIONS="50")
    on, off = (tiny(LATE_QAT=value, **settings) for value in "10")
    for label in ("step:50/50", "final_float_roundtrip", "final_artifact_roundtrip"):
        assert on[label]["val_loss"] < off[label]["val_loss"] + 0.01, label


def test_a_checkpoint_past_the_end_is_refused(tiny):
    tiny(RUN_ID="made", EVALS="none")
    with pytest.raises(t.BadInput, match="ITERATIONS=6: the checkpoint is of step 12"):
        tiny(LOAD_CHECKPOINT="logs/made/checkpoint.000000012.ckpt", ITERATIONS="6")


def test_a_wrong_checkpoint_is_refused_by_name(tiny, tmp_path):
    tiny(RUN_ID="made", EVALS="none")
    path = Path("logs/made/checkpoint.000000012.ckpt")
    bad = tmp_path / "bad.ckpt"
    bad.write_bytes(path.read_bytes()[:-9])
    for value, words, changes in (
        (bad, "wrong checksum; give the path of a whole checkpoint", {}),
        ("nowhere", "No such file", {}),
        (path, "does not fit", dict(MODEL_DIM="64")),
        (path, "LOAD_ARTIFACT", dict(LOAD_ARTIFACT="x")),
    ):
        with pytest.raises(t.BadInput, match=words):
            tiny(LOAD_CHECKPOINT=str(value), **changes)


def test_polar_express_brings_singular_values_closer_to_one():
    g = torch.randn(4, 48, 96, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    off = {
        kind: (torch.linalg.svdvals(t.newton_schulz(g, 5, torch.double, kind)) - 1)
        .abs()
        .mean()
        .item()
        for kind in t.QUINTICS
    }
    assert off["polar_express"] < 0.5 * off["quintic"] < 0.15


def test_row_norm_makes_muon_blind_to_the_size_of_rows(tiny_data):
    moved = []
    for sizes in (1.0, torch.logspace(-2, 2, 32)[:, None]):
        c = config(tiny_data, MUON_ROW_NORM="1", GRAD_CLIP_NORM="0", MUON_WD="0")
        run, model = t.Run(c), t.GPT(c)
        optimizer, g = t.Optimizer(c, run.ranks, model), torch.Generator().manual_seed(3)
        before = model.qo_bank.detach().clone()
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        model.qo_bank.grad *= sizes
        optimizer.step(torch.zeros(()), 1.0, 0.9)
        moved.append(model.qo_bank.detach() - before)
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-6)


def test_muon_trains_the_small_projections_where_told(tiny_data):
    """Its update moves all singular values alike, AdamW's first one all numbers."""
    for told in (False, True):
        c = config(tiny_data, MUON_PROJECTIONS=str(int(told)), MUON_WD="0", ADAM_WD="0")
        run, model = t.Run(c), t.GPT(c)
        optimizer, g = t.Optimizer(c, run.ranks, model), torch.Generator().manual_seed(3)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        for p in (model.bigram.proj.weight, model.ve_shared.proj.weight):
            assert (p in {*optimizer.banks}, p in {*optimizer.small}) == (told, not told)
        before = model.bigram.proj.weight.detach().clone()
        optimizer.step(torch.zeros(()), 1.0, 0.9)
        moved = model.bigram.proj.weight.detach() - before
        size = c.matrix_lr * (moved.size(0) / moved.size(1)) ** 0.5
        alike = torch.linalg.svdvals(moved) / size, moved.abs() / c.scalar_lr
        spread = [values.min() > 0.5 and values.max() < 1.5 for values in alike]
        assert spread == [told, not told]


def test_coprime_order_visits_each_sequence_of_a_shard_once_an_epoch(tiny_data):
    c = config(tiny_data, DATA_ORDER="coprime")
    data, plain = t.TrainData(c, t.Ranks(c)), t.TrainData(config(tiny_data), t.Ranks(c))
    total = sum(data.counts)
    for epoch in range(2):
        seen, usual = (
            sorted(d.sequence(epoch * total + i).tobytes() for i in range(total))
            for d in (data, plain)
        )
        assert seen == usual
    assert [data.sequence(i).tobytes() for i in range(9)] != [
        plain.sequence(i).tobytes() for i in range(9)
    ]


def test_best_breaks_no_condition_and_wins_over_the_preset_before_it():
    c = t.load_config({"PRESET": "best"})
    assert c.evals == ("roundtrip", "sliding_window", "ttt") and not any(
        t.broken_conditions(c, label) for label in c.evals
    )
    both = t.load_config({"PRESET": "demo,best_demo", "SEED": "7"})
    assert (
        both.num_layers == 4
        and both.xsa_last_n == 4
        and both.seed == 7
        and not any(t.broken_conditions(both, label) for label in both.evals)
    )
    with pytest.raises(t.BadInput, match="PRESET=demo,bets: allowed: a comma list of best"):
        t.load_config({"PRESET": "demo,bets"})


def test_min_lr_is_where_the_warmdown_ends():
    c = config(ITERATIONS="100", WARMDOWN_ITERS="20", MIN_LR="0.1")
    assert [t.lr_factor(c, s, 0.0, 0.0) for s in (0, 90, 99, 100)] == pytest.approx(
        [1, 0.5, 0.1, 0.1]
    )


def test_parallel_layers_read_what_attention_reads(tiny_data):
    c, g = config(PARALLEL_LAST_N="1"), torch.Generator().manual_seed(5)
    model, ids = random_model(c), torch.randint(4, 384, (1, 16), generator=g)
    other = t.GPT(config())
    other.load_state_dict(model.state_dict())
    assert not torch.equal(model.hidden(ids), other.hidden(ids))
    with torch.no_grad():
        for m in (model, other):
            m.blocks[2].attn_scale.zero_()  # without attention both read the same
    assert torch.equal(model.hidden(ids), other.hidden(ids))


def test_tool_compares_quantisers_on_one_checkpoint(tiny_data, tmp_path, monkeypatch, tiny, capsys):
    tiny(RUN_ID="made", EVALS="none", LATE_QAT="0")
    for name, value in {**TINY, **tiny_data, "LATE_QAT": "0"}.items():
        monkeypatch.setenv(name, value)
    words = [
        "--checkpoint",
        "logs/made/checkpoint.000000012.ckpt",
        "--run-id",
        "cmp",
        "--bytes",
        "0",
        "--bytes",
        "25000",
        "--bytes",
        "9000",
    ]
    assert (
        quantise.main(
            [*words, "QUANT=gptq_lite CODER=lzma", "mine=QUANT=gptq CALIBRATION_TOKENS=512"]
        )
        == 0
    )
    found = read_metrics(tmp_path / "logs" / "cmp")
    assert (
        "QUANT=gptq_lite,CODER=lzma@9000 does not fit at any step"
        in (tmp_path / "logs" / "cmp.txt").read_text()
    )
    row = found["mine@25000"]
    assert (
        24_900 < row["model_bytes"] <= 25_000
        and math.isfinite(row["damage"])
        and row["error"] > 0
        and row["load"] > 0
    )
    assert quantise.main(["--table", "logs/cmp"]) == 0
    assert f"| mine | {row['model_bytes']:,} B | +" in capsys.readouterr().out
    assert quantise.main([*words]) == 2 and "at least one row" in capsys.readouterr().err
    assert (
        quantise.main([*words, "SLOT_STEPS=3"]) == 2
        and "a row is [NAME=]SETTING=VALUE" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_ranks_calibrate_and_switch_to_qat_alike(tiny, tiny_data, tmp_path):
    changes = {
        "QUANT": "gptq",
        "LATE_QAT_THRESHOLD": "0.5",
        "EVALS": "roundtrip",
        "TRAIN_LOG_EVERY": "1",
    }
    runs([{**TINY, **tiny_data, "RUN_ID": "ranks", **changes}], tmp_path, 2)
    found = [tiny(**changes), read_metrics(tmp_path / "logs/ranks")]
    for label in ("step:12/12", "average_none", "final_artifact_roundtrip"):
        key = next(
            k for k in ("train_loss", "heldout_train_loss", "val_loss") if k in found[0][label]
        )
        assert found[1][label][key] == pytest.approx(found[0][label][key], abs=2e-3), label
