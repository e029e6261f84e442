"""The scoring core and every evaluator: each target once, equal to plain versions, and causal exactly where it says so."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import config, random_model, t
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 400), st.integers(1, 64), st.integers(1, 64))
def test_windows_tile_the_targets_exactly_once_in_order(n, window, stride):
    if not stride <= window <= n:
        with pytest.raises(ValueError):
            t.plan_windows(n, window, stride)
        return
    starts, firsts = t.plan_windows(n, window, stride)
    scored = [s + r for s, first in zip(starts, firsts) for r in range(first, window)]
    assert scored == list(range(n)) and starts.min() == 0 and (starts + window).max() == n
    assert (firsts[1:] >= window - stride).all()  # at least window - stride tokens of context


def test_fineweb_split_is_scored_once():
    starts, firsts = t.plan_windows(62_021_632, 2048, 64)
    assert len(starts) == 969_057 and int((2048 - firsts).sum()) == 62_021_632


def plain_sliding(model, tokens, n, T, stride):
    """Nats of every target, one window at a time, with the logits of all its rows."""
    out, done = torch.zeros(n), 0
    while done < n:
        end = min(done + stride, n) if done else T
        start = end - T
        logits = model.cap(model.project(model.hidden(tokens[None, start:end])))[0]
        nll = F.cross_entropy(logits, tokens[start + 1 : end + 1], reduction="none")
        out[done:end] = nll[done - start :]
        done = end
    return out


@pytest.mark.parametrize(
    "n,T,stride,batch",
    [
        (256, 32, 8, 256),
        (256, 32, 32, 64),
        (250, 32, 7, 96),
        (33, 32, 1, 32),
        (32, 32, 5, 32),
        (100, 16, 16, 48),
    ],
)
def test_sliding_equals_a_plain_loop_for_any_length_stride_and_batch(n, T, stride, batch, stream):
    c = config(EVAL_SEQ_LEN=str(T), EVAL_STRIDE=str(stride), VAL_BATCH_SIZE=str(batch))
    (run, val), model = stream(c, n), random_model(config())
    nats, _ = t.score(run, model, val, [("sliding_window", c)])[0]
    with torch.no_grad():
        torch.testing.assert_close(
            nats, plain_sliding(model, val.tokens, n, T, stride), rtol=1e-5, atol=1e-5
        )


def test_a_plan_that_scores_twice_or_never_is_a_fault(stream, monkeypatch):
    c = config()
    (run, val), model, plan = stream(c), random_model(config()), t.plan_windows
    for wrong in (
        lambda *a: (plan(*a)[0], plan(*a)[1] - (np.arange(len(plan(*a)[1])) == 3)),
        lambda *a: (plan(*a)[0], plan(*a)[1] + (np.arange(len(plan(*a)[1])) == 3)),
    ):
        monkeypatch.setattr(t, "plan_windows", wrong)
        with pytest.raises(t.Fault, match=" of 256 targets were not scored exactly once"):
            t.score(run, model, val, [("sliding_window", c)])


def plain_ttt(c, model, tokens, n):
    """Score-first TTT with torch's optimiser, as #549 describes it; chunks that are whole multiples of the window."""
    T, C, out = c.eval_seq_len, c.ttt_chunk_tokens, torch.zeros(n)
    chunks, params = math.ceil(n / C), [p for p in model.parameters() if p.requires_grad]
    sgd = {
        "sgd": lambda: torch.optim.SGD(params, lr=1.0, momentum=c.ttt_momentum),
        "adamw": lambda: torch.optim.AdamW(params, weight_decay=0),
        "rmsprop": lambda: torch.optim.RMSprop(params),
    }[c.ttt_optimizer]()
    with torch.no_grad():
        whole = plain_sliding(model, tokens, n, T, c.eval_stride)
    for i in range(chunks):
        if i:
            with torch.no_grad():
                whole = plain_sliding(model, tokens, n, T, c.eval_stride)
        first = 0 if i == 0 else -(-(i * C - T) // c.eval_stride) * c.eval_stride + T
        out[first:] = whole[first:]
        if i == chunks - 1:
            return out
        sgd.param_groups[0]["lr"] = c.ttt_lr * 0.5 * (1 + math.cos(math.pi * i / (chunks - 1)))
        for _ in range(c.ttt_epochs):
            x = tokens[i * C : (i + 1) * C].view(-1, T)
            for b in range(0, len(x), c.ttt_batch_seqs):
                y = tokens[i * C + 1 : (i + 1) * C + 1].view(-1, T)[b : b + c.ttt_batch_seqs]
                sgd.zero_grad()
                model(x[b : b + c.ttt_batch_seqs], y).backward()
                torch.nn.utils.clip_grad_norm_(params, c.ttt_grad_clip)
                sgd.step()


@pytest.mark.parametrize("batch", ["2", "32"])
def test_ttt_equals_a_plain_loop_and_gives_the_weights_back(batch, stream):
    c = config(TTT_BATCH_SEQS=batch, SAVE_EVERY="0")
    (run, val), model, other = stream(c, 512), random_model(config()), random_model(config())
    before = [p.detach().clone() for p in model.parameters()]
    nats = t.score(run, model, val, [("ttt", c)])[0][0]
    torch.testing.assert_close(nats, plain_ttt(c, other, val.tokens, val.n), rtol=1e-4, atol=1e-4)
    assert not torch.equal(
        model.qo_bank, before[[n for n, _ in model.named_parameters()].index("qo_bank")]
    )
    with torch.no_grad():
        for p, kept in zip(model.parameters(), before):
            p.copy_(kept)
    t.evaluate(c, run, model, val, "artifact", labels=["ttt"])
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize("which", ["all", "control"])
def test_ttt_of_control_vectors_and_other_optimisers_equals_a_plain_loop(which, optimizer, stream):
    c = config(TTT_PARAMS=which, TTT_OPTIMIZER=optimizer, SAVE_EVERY="0", TTT_LR="0.003")
    (run, val), model, other = stream(c, 512), random_model(config()), random_model(config())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in other.named_parameters():
        p.requires_grad_(which == "all" or t.export_kind(c, name) == "fp32")
    with t.put_back(model.parameters()):
        nats = t.score(run, model, val, [("ttt", c)])[0][0]
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert "blocks.0.attn_scale" in moved and ("qo_bank" in moved) == (which == "all")
    assert all(p.requires_grad and torch.equal(p, before[n]) for n, p in model.named_parameters())
    plain = plain_ttt(c, other, val.tokens, val.n)
    torch.testing.assert_close(nats, plain, rtol=1e-4, atol=1e-4)
    still = t.score(run, model, val, [("sliding_window", c)])[0][0]
    assert (nats - still).abs().max() > 1e-3


def chunk_trainer(c, run, model):
    return t.ChunkTrainer(
        c,
        run.ranks,
        model,
        functools.partial(torch.optim.SGD, momentum=c.ttt_momentum),
        c.ttt_freeze_blocks,
    )


@pytest.mark.parametrize("chunk,batch", [(72, 2), (100, 3), (32, 1), (33, 4), (128, 32)])
def test_each_scored_token_is_trained_on_once_an_epoch_for_any_chunk(chunk, batch, stream):
    """Also across ranks: the parts of three ranks together are the whole, though some have nothing."""
    c = config(TTT_CHUNK_TOKENS=str(chunk), TTT_BATCH_SEQS=str(batch), TTT_EPOCHS="2")
    (run, val), model, used = stream(c, 512), random_model(config()), np.zeros(512, int)
    val.tokens = torch.arange(513)
    for rank in range(3):
        run.ranks.rank, run.ranks.world = rank, 3
        trainer, counts = chunk_trainer(c, run, model), []
        trainer.step = lambda inputs, targets, count: (
            counts.append(int(count)),
            [
                used.__setitem__(int(y) - 1, used[int(y) - 1] + 1)
                for y in targets.flatten()
                if y >= 0
            ],
        )
        trainer.train(val.tokens, 2 * chunk, 3 * chunk, rate=0.1, epochs=2)
        assert sum(counts) == 2 * chunk
    assert (used[2 * chunk : 3 * chunk] == 2).all() and used.sum() == 2 * chunk


def test_a_rank_without_sequences_still_steps(stream):
    c = config()
    (run, val), model = stream(c), random_model(config())
    before = model.qo_bank.detach().clone()
    chunk_trainer(c, run, model).step(val.tokens[:0].view(0, 32), val.tokens[:0].view(0, 32), 64)
    assert torch.equal(before, model.qo_bank)


@pytest.mark.parametrize("vrl", ["0", "1"])  # whose gates are scalars
def test_freezing_blocks_freezes_their_matrices_too(vrl, stream):
    c = config(TTT_FREEZE_BLOCKS="2", VRL_ENABLED=vrl)
    (run, val), model = stream(c), random_model(config(VRL_ENABLED=vrl))
    before = {
        n: p.clone()
        for n, p in t.split_banks({n: p.detach() for n, p in model.named_parameters()}, 3).items()
    }
    chunk_trainer(c, run, model).train(val.tokens, 0, 128, rate=0.1, epochs=3)
    for name, p in t.split_banks({n: p.detach() for n, p in model.named_parameters()}, 3).items():
        assert torch.equal(p, before[name]) == name.startswith(("blocks.0.", "blocks.1.")), name


# The flip test (C1): with token p of the stream changed, no distribution for a token up to p may move by a bit: neither the
# scores of earlier tokens nor the whole vector that scores p itself, which must not have looked at it.


def vectors(label, c, stream, tokens, n=512):
    """Logits after the cap [n,V] that scored each target, in stream order."""
    run, val = stream(c, n, tokens=tokens)
    seen, row_nll = [], t.row_nll

    def spy(model, h, targets, rows, shift=None):
        z = model.project(h.flatten(0, 1)[rows])
        seen.append(
            model.cap(
                z if shift is None else z + (shift[rows // h.size(1)] if len(shift) > 1 else shift)
            )
        )
        return row_nll(model, h, targets, rows, shift)

    t.row_nll = spy
    try:
        nats = t.score(run, random_model(config()), val, [(label, c)])[0][0]
    finally:
        t.row_nll = row_nll
    seen = torch.cat(seen)
    torch.testing.assert_close(
        F.cross_entropy(seen, tokens[1:], reduction="none"), nats, rtol=0, atol=0
    )
    torch.testing.assert_close(
        seen.softmax(-1).sum(-1), torch.ones(n)
    )  # C2: each is a distribution
    return seen


def moved(label, c, stream, probes=12):
    """How many probes changed a vector that they must not."""
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.integers(4, c.vocab_size, 513))
    base, count = vectors(label, c, stream, tokens), 0
    # first tokens after a window, a stride, a batch and a chunk boundary among them
    for p in [33, 34, 129, 130, 257, 385, *rng.integers(40, 512, probes).tolist()]:
        changed = tokens.clone()
        changed[p] = 4 + (changed[p] - 4 + 11) % (c.vocab_size - 4)
        after = vectors(label, c, stream, changed)
        count += not torch.equal(base[:p], after[:p])  # row p-1 is the vector that scores token p
        assert not torch.equal(base[p:], after[p:])
    return count


@pytest.mark.parametrize(
    "label", [label for label in t.EVALUATORS if "ctw" not in label and label != "mix"]
)  # those have no logits: see test_ctw.py and test_mix.py
def test_flip_test_agrees_with_every_claim(label, stream):
    changed = moved(label, config(), stream)
    assert (changed == 0) == (t.broken_conditions(config(), label) == ""), (
        f"{label}: {changed} probes moved earlier scores"
    )
    if label.endswith("slot"):
        assert changed >= 10


@pytest.mark.parametrize("label", ["roundtrip", "sliding_window", "ttt"])
def test_with_documents_masked_a_token_moves_scores_of_its_document_only(label, stream):
    """Of later ones, without training; of earlier tokens in no case."""
    c, begins = config(DOCUMENTS="mask"), [0, 40, 41, 100, 170, 255]
    tokens = torch.from_numpy(np.random.default_rng(0).integers(4, c.vocab_size, 257))
    tokens[begins] = 1

    def nats_of(tokens):
        run, val = stream(c, 256, tokens=tokens)
        return t.score(run, random_model(c), val, [(label, c)])[0][0]

    base = nats_of(tokens)
    for at, begin in ((20, 40), (99, 100), (110, 170)):
        changed = tokens.clone()
        changed[at] = 4 + (changed[at] - 4 + 11) % (c.vocab_size - 4)
        after = nats_of(changed)  # row t: the target t + 1, after token t
        assert torch.equal(after[: at - 1], base[: at - 1]), at
        assert not torch.equal(after[at - 1 : begin], base[at - 1 : begin]), at
        assert torch.equal(after[begin:], base[begin:]) == (label != "ttt"), at


def wrong_attention(monkeypatch):
    def attend(self, x, *rest, attend=t.Attention.forward):
        y, v = attend(self, x, *rest)
        return y + 1e-3 * x.mean(1, keepdim=True), v

    monkeypatch.setattr(t.Attention, "forward", attend)


def wrong_smear(monkeypatch):
    hidden = t.GPT.hidden
    monkeypatch.setattr(
        t.GPT,
        "hidden",
        lambda self, *args: hidden(self, *args) + 1e-3 * hidden(self, *args).roll(-1, 1),
    )


def wrong_order(monkeypatch):
    """Train on a chunk before it is scored."""
    batch, done = t.score_batch, {}

    def first(work, windows):
        c, chunk = work.c, int(work.chunk_of[windows.start])
        begin, end = chunk * c.ttt_chunk_tokens, (chunk + 1) * c.ttt_chunk_tokens
        if done.get(id(work)) != chunk and end <= work.val.n:
            done[id(work)] = chunk
            with torch.enable_grad():
                trainer = chunk_trainer(c, work, work.model)
                trainer.train(work.val.tokens, begin, end, rate=0.05, epochs=3)
        return batch(work, windows)

    monkeypatch.setattr(t, "score_batch", first)


@pytest.mark.parametrize(
    "label,wrong",
    [
        ("sliding_window", wrong_attention),
        ("sliding_window", wrong_smear),
        ("ttt", wrong_attention),
        ("ttt", wrong_order),
    ],
)
def test_flip_test_catches_wrong_implementations(label, wrong, stream, monkeypatch):
    wrong(monkeypatch)
    assert moved(label, config(), stream) > 0


def test_no_causal_evaluator_beats_chance_on_random_tokens(stream):
    c = config()
    run, val = stream(c, 4096)
    for label in ("roundtrip", "sliding_window", "ttt"):
        model = random_model(config(), scale=0.01)
        nats = t.score(run, model, val, [(label, c)])[0][0]
        assert nats.mean().item() > math.log(c.vocab_size - 4) - 3 * nats.std().item() / math.sqrt(
            val.n
        )


def test_a_shared_pass_gives_what_each_evaluator_gives_alone(stream):
    c = config()
    (run, val) = stream(c, 512)
    both = t.score(run, random_model(config()), val, [("ttt", c), ("ttt_slot", c)])
    for (nats, _), label in zip(both, ("ttt", "ttt_slot")):
        alone = t.score(run, random_model(config()), val, [(label, c)])[0][0]
        torch.testing.assert_close(nats, alone, rtol=1e-5, atol=1e-5)


def test_bits_per_byte_is_nats_over_ln2_and_bytes(stream):
    _, val = stream(config(), 100)
    val.total_bytes = 250
    assert t.mean_and_bpb(val, torch.full((100,), 2.0), "it") == pytest.approx(
        (2.0, 2.0 / math.log(2) * 100 / 250)
    )
