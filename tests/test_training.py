"""Muon, AdamW, clipping, schedules, averages, QAT: each against a plain version of itself; seeds and ranks."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    TINY,
    config,
    process,
    random_model,
    read_metrics,
    runs,
    t,
    timeless,
    write_shard,
)


@pytest.mark.parametrize(
    "rows,cols", [(256, 128), (128, 256), (64, 192), (32, 512), (96, 96), (512, 64)]
)
def test_newton_schulz_singular_values(rows, cols):
    g = torch.randn(3, rows, cols, generator=torch.Generator().manual_seed(rows))
    for dtype in (torch.float32, torch.bfloat16):
        s = torch.linalg.svdvals(t.newton_schulz(g * 1e-3, 5, dtype).float())
        assert s.max() <= 1.4
        if max(rows, cols) >= 2 * min(rows, cols):
            assert s.min() >= 0.6


def plain_muon(w, g, buffer, c, lr, momentum):
    """One step of Muon on one matrix."""
    buffer.mul_(momentum).add_(g)
    x = g + momentum * buffer
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if tall else x
    return w * (1 - lr * c.muon_wd) - lr * math.sqrt(max(1, w.size(0) / w.size(1))) * x


@pytest.mark.parametrize("embed_wd", [None, "0", "0.5"])
def test_banked_muon_and_adamw_equal_their_plain_versions(embed_wd):
    c = config(GRAD_CLIP_NORM="0.5", **({"EMBED_WD": embed_wd} if embed_wd else {}))
    model, run = random_model(c), t.Run(c)
    optimizer = t.Optimizer(c, run.ranks, model)
    plain = {
        n: p.detach().clone()
        for n, p in t.split_banks(dict(model.named_parameters()), c.num_layers).items()
    }
    buffers = {n: torch.zeros_like(p) for n, p in plain.items()}
    small = {
        n: p.detach().clone().requires_grad_()
        for n, p in model.named_parameters()
        if n not in t.BANKS
    }
    lr_of = {"embed": c.tied_embed_lr, "scalar": c.scalar_lr, "proj": c.scalar_lr}
    tables = {"tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight"}
    assert tables < set(small)
    adam = torch.optim.AdamW(
        [
            dict(
                params=[p],
                lr=lr_of[t.parameter_rule(n).group],
                weight_decay=float(embed_wd or 0.04) if n in tables else 0.04,
            )
            for n, p in small.items()
        ],
        betas=(c.beta1, c.beta2),
        eps=c.adam_eps,
    )
    g = torch.Generator().manual_seed(3)
    for step in range(3):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        clip = min(1.0, c.grad_clip_norm / norm.item())
        grads = {
            n: p.clone() * clip
            for n, p in t.split_banks(
                {n: p.grad for n, p in model.named_parameters()}, c.num_layers
            ).items()
        }
        for n, p in small.items():
            p.grad = grads[n]
        for group, (n, p) in zip(adam.param_groups, small.items()):
            group["lr"] = lr_of[t.parameter_rule(n).group] * 0.7
        adam.step()
        for n in plain:
            if n not in small:
                plain[n] = plain_muon(plain[n], grads[n], buffers[n], c, 0.7 * c.matrix_lr, 0.9)
        assert optimizer.step(torch.zeros(()), 0.7, 0.9).item() == pytest.approx(
            norm.item(), rel=1e-5
        )
    for n, p in t.split_banks(dict(model.named_parameters()), c.num_layers).items():
        torch.testing.assert_close(
            p.detach(), small[n].detach() if n in small else plain[n], rtol=2e-4, atol=2e-5, msg=n
        )


def test_lr_falls_to_zero_before_whichever_end_is_nearer():
    c = config(ITERATIONS="9000", WARMDOWN_ITERS="3500", MAX_WALLCLOCK_SECONDS="600")
    assert t.lr_factor(c, 0, 0.0, 0.0) == t.lr_factor(c, 3000, 3000 * 84.0, 84.0) == 1.0
    assert t.lr_factor(c, 5000, 5000 * 84.0, 84.0) == pytest.approx(
        (600_000 - 420_000) / (3500 * 84)
    )  # time ends first
    assert t.lr_factor(c, 7000, 7000 * 10.0, 10.0) == pytest.approx(
        2000 / 3500
    )  # steps end first, in spite of a large cap
    assert (
        t.lr_factor(c, 9000, 9000 * 10.0, 10.0) == 0 and t.lr_factor(c, 7200, 700_000.0, 84.0) == 0
    )
    uncapped = config(ITERATIONS="100", WARMDOWN_ITERS="20", MAX_WALLCLOCK_SECONDS="0")
    assert [t.lr_factor(uncapped, s, 1e9, 1e6) for s in (0, 80, 90, 100)] == [1, 1, 0.5, 0]
    assert t.lr_factor(config(WARMDOWN_ITERS="0"), 5, 1.0, 1.0) == 1


def test_a_warmdown_of_a_share_is_one_of_the_run_or_under_a_cap_of_its_time():
    share, steps = 0.6, np.arange(0, 2001)
    for cap, step_ms in ((0, 84.0), (600, 84.0), (600, 400.0), (60, 0.5)):
        c = config(ITERATIONS="2000", WARMDOWN_FRAC=share, MAX_WALLCLOCK_SECONDS=cap)
        ms = steps * step_ms
        parts = np.maximum(steps / 2000, ms / (1000 * cap) if cap else 0)
        expected = np.clip((1 - parts) / share, 0, 1)
        found = [t.lr_factor(c, s, m, 0.0) for s, m in zip(steps.tolist(), ms, strict=True)]
        np.testing.assert_allclose(found, expected, atol=1e-12)
        # at full rate until the warmdown's share is what is left
        late = 600_000 / step_ms * 0.4 if cap == 600 and step_ms == 400 else 800
        assert found.index(next(f for f in found if f < 1)) == late + 1
    c = config(ITERATIONS="2000", WARMDOWN_FRAC="0.6", MIN_LR="0.1")
    assert [t.lr_factor(c, s, 0.0, 0.0) for s in (799, 1400, 2000)] == pytest.approx([1, 0.5, 0.1])


def test_momentum_and_ttt_rate():
    c = t.load_config({})
    assert t.muon_momentum(c, 0) == pytest.approx(0.92) and t.muon_momentum(
        c, 750
    ) == pytest.approx(0.955)
    assert t.muon_momentum(c, 1500) == t.muon_momentum(c, 9000) == pytest.approx(0.99)
    assert [t.cosine(4, 1, i, 5) for i in (0, 2, 4)] == pytest.approx([4, 2.5, 1]) and t.cosine(
        4, 1, 0, 1
    ) == 4


def test_averages_are_what_they_are_called():
    c, w = config(EMA_DECAY="0.6", SWA_EVERY="2"), torch.nn.Parameter(torch.zeros(3))
    averages, values, ema = t.Averages(c, [w]), [], 0.0
    for n in range(1, 13):
        with torch.no_grad():
            w.fill_(n * n)
        averages.update(0.1 if n > 4 else 1.0)
        decay = min(0.6, (1 + n) / (10 + n))
        ema = decay * ema + (1 - decay) * n * n
        values += [n * n] if n > 4 and n % 2 == 0 else []
    assert averages.kept["ema"][0][0].item() == pytest.approx(ema, rel=1e-5)
    assert (
        averages.kept["swa"][0][0].item() == pytest.approx(np.mean(values), rel=1e-6)
        and averages.snapshots == 4
    )


@pytest.mark.parametrize("steps", [1, 3, 12, 40])
def test_export_loses_little_at_any_length_of_run(steps, tiny):
    found = tiny(
        ITERATIONS=str(steps), EVALS="roundtrip", TRAIN_LOG_EVERY="100", VAL_LOSS_EVERY="0"
    )
    last, exported = (
        found[f"step:{steps}/{steps}"]["val_loss"],
        found["final_float_roundtrip"]["val_loss"],
    )
    candidates = {n: found[n]["heldout_train_loss"] for n in found if n.startswith("average_")}
    assert len(candidates) >= 2 and exported <= last + 0.05
    assert (
        abs(
            found["final_artifact_roundtrip"]["val_bpb"] - found["final_float_roundtrip"]["val_bpb"]
        )
        < 0.02
    )


def test_the_best_average_is_the_one_in_the_model(tiny_data):
    c = config(tiny_data)
    run, data, model = t.Run(c), t.TrainData(c, t.Ranks(c)), t.GPT(c)
    averages = t.Averages(c, model.parameters())
    good = [p.detach().clone() for p in model.parameters()]
    averages.kept, averages.snapshots = (
        {"ema": [p + torch.randn(p.shape) for p in good], "swa": good},
        1,
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape))
    averages.choose(run, model, data, None)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), good))


@pytest.mark.parametrize("quant", ["rd", "gptq_lite"])
def test_late_qat_trains_exactly_the_exported_matrices_on_their_grid_and_leaves_no_trace(
    quant, tiny_data
):
    c = config(tiny_data, QUANT=quant)
    ranks, seen = t.Ranks(c), []
    model = random_model(c)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer, qat, data = t.Optimizer(c, ranks, model), t.LateQat(c, model), t.TrainData(c, ranks)
    batch = next(data.batches())
    optimizer.step = lambda loss, lr_factor, momentum: torch.zeros(())
    forward = model.forward
    qat.start(ranks, data)
    quantizer = t.make_quantizer(c, model.state_dict(), qat.calibration())
    rounded = quantizer.rounded(qat.step_size)
    expected = {n: w for n, w in rounded.items() if t.parameter_rule(n).export in t.LEVELS}
    assert not any(
        torch.equal(w, t.split_banks(before, c.num_layers)[n]) for n, w in expected.items()
    )

    def spy(*args):
        seen.append(
            {
                n: p.detach().clone()
                for n, p in t.split_banks(dict(model.named_parameters()), c.num_layers).items()
            }
        )
        return forward(*args)

    model.forward = spy
    t.train_step(c, ranks, model, optimizer, batch, step=0, lr_factor=0.4, qat=qat)
    for n, w in seen[0].items():
        torch.testing.assert_close(
            w, expected.get(n, t.split_banks(before, c.num_layers)[n]), rtol=1e-6, atol=0, msg=n
        )
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    qat.step_size = 0.0
    t.train_step(c, ranks, model, optimizer, batch, step=0, lr_factor=0.6, qat=qat)
    assert all(torch.equal(w, t.split_banks(before, c.num_layers)[n]) for n, w in seen[-1].items())


def test_late_qat_changes_nothing_before_its_switch(tiny):
    runs = [
        tiny(LATE_QAT=v, LATE_QAT_THRESHOLD="0.5", TRAIN_LOG_EVERY="1", EVALS="none") for v in "01"
    ]
    losses = [[run[f"step:{s}/12"]["train_loss"] for s in range(1, 13)] for run in runs]
    assert losses[0][:7] == losses[1][:7] and losses[0][8:] != losses[1][8:]


def test_masked_documents_change_training_and_scores(tiny, tiny_data, tmp_path):
    data = tmp_path / "documents"
    data.mkdir()
    for path in Path(tiny_data["DATA_PATH"]).glob("fineweb_*.bin"):
        tokens = np.fromfile(path, "<u2", offset=1024)
        tokens[::13] = 1
        write_shard(data / path.name, tokens)
    more = dict(DATA_PATH=str(data), TRAIN_LOG_EVERY="1", EVALS="roundtrip,ttt_slot")
    joined, mask = (tiny(DOCUMENTS=d, RUN_ID=d, **more) for d in ("joined", "mask"))
    assert joined["step:2/12"]["train_loss"] != mask["step:2/12"]["train_loss"]
    for d, other in (("joined", "mask"), ("mask", "joined")):
        artifact = f"logs/{d}/final_model.ptz"
        read = {
            k: tiny(DOCUMENTS=k, LOAD_ARTIFACT=artifact, **more)["final_artifact_roundtrip"]
            for k in (d, other)
        }
        own = (joined if d == "joined" else mask)["final_artifact_roundtrip"]["val_loss"]
        assert read[d]["val_loss"] == pytest.approx(own, abs=1e-6)
        assert abs(read[other]["val_loss"] - own) > 1e-5


def test_same_seed_twice_is_bit_identical(tiny):
    assert timeless(tiny()) == timeless(tiny())


def test_priming_leaves_no_trace(tiny_data):
    c = config(tiny_data, WARMUP_STEPS="2")
    run, model = t.Run(c), t.GPT(c)
    before = [p.detach().clone() for p in model.parameters()]
    t.prime(c, run, model, t.TrainData(c, run.ranks))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before)) and all(
        p.grad is None for p in model.parameters()
    )


@pytest.mark.slow
def test_ranks_do_not_change_training_or_scores(tiny, tiny_data, tmp_path):
    env = {
        **TINY,
        **tiny_data,
        "ITERATIONS": "20",
        "EVALS": "roundtrip,sliding_window,ttt,ttt_slot",
        "TRAIN_LOG_EVERY": "1",
        "TTT_CHUNK_TOKENS": "72",
        "TTT_BATCH_SEQS": "2",
        "LATE_QAT": "0",
    }
    # on one rank trained and exported, on all of them scored
    alone = {**env, "LOAD_ARTIFACT": "logs/w1/final_model.ptz"}
    for ranks in (1, 2, 3):
        runs([{**env, "RUN_ID": f"w{ranks}"}, {**alone, "RUN_ID": f"e{ranks}"}], tmp_path, ranks)
    found = {ranks: read_metrics(tmp_path / "logs" / f"w{ranks}") for ranks in (1, 2, 3)}
    for ranks in (2, 3):
        for label, row in found[1].items():
            if "train_loss" in row:
                assert found[ranks][label]["train_loss"] == pytest.approx(
                    row["train_loss"], rel=1e-4
                ), label
            # parts of equal shape round alike on 1 and 2 ranks; on 3 a weight may fall on the other side of an int6 step
            if label.startswith("final_"):
                assert found[ranks][label]["val_bpb"] == pytest.approx(
                    row["val_bpb"], abs=1e-5 if ranks == 2 else 1e-3
                ), label
    scores = [
        {n: row["val_bpb"] for n, row in metrics.items() if "val_bpb" in row}
        for metrics in (
            tiny(**{**alone, "RUN_ID": "plain"}),
            *(read_metrics(tmp_path / "logs" / f"e{ranks}") for ranks in (1, 2, 3)),
        )
    ]
    assert len(scores[0]) == 4 and scores[1:] == [pytest.approx(scores[0], abs=1e-6)] * 3


@pytest.mark.slow
def test_torch_compile_gives_the_same_figures(tiny):
    plain, compiled = (
        tiny(
            COMPILE=v,
            EVALS="ttt_slot",
            WARMUP_STEPS="1",
            ITERATIONS="4",
            NUM_LAYERS="2",
            VE_LAYERS="1",
        )
        for v in "01"
    )
    for label in ("step:4/4", "final_artifact_ttt_slot"):
        assert compiled[label]["val_loss"] == pytest.approx(plain[label]["val_loss"], abs=2e-4)


@pytest.mark.alone
def test_wallclock_cap_ends_the_run_and_the_warmdown_reaches_its_end(tiny, capsys):
    found = tiny(
        MAX_WALLCLOCK_SECONDS="1.5",
        ITERATIONS="100000",
        EVALS="none",
        VAL_LOSS_EVERY="0",
        TRAIN_LOG_EVERY="10",
    )
    assert 5 < found["training"]["steps"] < 100000 and 200 < found["training"]["train_time"] < 6000
    assert "stopping_early: wallclock_cap" in capsys.readouterr().out


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_ends_the_run_and_names_the_step(
    poison, tiny, monkeypatch
):
    calls, forward = [], t.GPT.forward

    def broken(self, *args, **kwargs):
        if self.training and torch.is_grad_enabled():
            calls.append(1)
        out = forward(self, *args, **kwargs)
        if len(calls) == 3 and torch.is_grad_enabled():
            bad = out * math.nan
            out = bad if poison == "loss" else out + (bad - bad.detach()).nan_to_num(0)
            out.register_hook(lambda g: g * math.nan)
        return out

    monkeypatch.setattr(t.GPT, "forward", broken)
    with pytest.raises(t.Fault, match="step 3: loss or gradient is not finite"):
        tiny()
    assert not (Path("logs/run0") / "final_model.ptz").exists()


@pytest.mark.slow
def test_a_fault_ends_all_ranks_with_status_1(tiny_data, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(
        "import math\nimport train_gpt as t\nforward = t.GPT.forward\n"
        "t.GPT.forward = lambda *a, **k: forward(*a, **k) * math.nan\nt.main()\n"
    )
    for ranks in (0, 2):
        done = process({**TINY, **tiny_data, "RUN_ID": f"nan{ranks}"}, tmp_path, ranks, script)
        assert (
            done.returncode == 1 and "error: step 1: loss or gradient is not finite" in done.stderr
        ), done.stderr[-2000:]


def test_cpu_threads_are_left_alone_without_torchrun():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    t.Run(config())
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)
