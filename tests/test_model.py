"""The model against a plain reading of its formulas, its parameters, and its causality."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import config, random_model, t


def plain_order(c):
    """[(layer, visits of it before)] with recurrence, straight from the descriptions of #686, #1435 and #1278."""
    order = []
    for i in range(c.num_layers):
        order.append((i, 0))
        if c.recur_style == "gated" and i in c.recur_layers:
            order += [(i, again) for again in range(1, c.recur_loops)]
        if c.recur_style != "gated" and c.recur_layers and i == max(c.recur_layers):
            for again in range(1, c.recur_loops):
                order += [(j, again) for j in c.recur_layers]
    return order


def plain_skip(c, p, x, earlier, row):
    """x with a skip from an earlier output."""
    skip = p["skip_weights"][row] * earlier
    if not c.skip_gates_enabled:
        return x + skip
    g = torch.sigmoid(p["skip_gates"][row])
    return (1 - g) * skip + g * x


def plain_logits(c, p, ids):
    """Logits [T,V] of one sequence, straight from the formulas of #549/#1084: matrix by matrix, head by head."""

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()

    def angle(x):  # [T,d] -> rotated in its first dims
        n = c.rope_dims or x.size(1)
        base = c.rope_base * max(1, c.train_seq_len / c.rope_train_len) ** (n / (n - 2))
        out = x.clone()
        for i in range(n // 2):
            a = torch.arange(len(x)) * base ** (-2 * i / n)
            out[:, i] = x[:, i] * a.cos() + x[:, i + n // 2] * a.sin()
            out[:, i + n // 2] = x[:, i + n // 2] * a.cos() - x[:, i] * a.sin()
        return out

    T, L, d = len(ids), c.num_layers, c.model_dim // c.num_heads
    x = p["tok_emb.weight"][ids]
    if c.bigram_vocab_size:
        m = c.bigram_vocab_size - 1
        bucket = [m] + [((36313 * ids[i]) ^ (27191 * ids[i - 1])) % m for i in range(1, T)]
        x = x + p["bigram.embed.weight"][bucket] @ p["bigram.proj.weight"].T * p["bigram.scale"]
    x, g = norm(x), torch.sigmoid(p["smear.gate"])
    x = torch.stack([(1 - g) * x[i] + g * (x[i - 1] if i else 0 * x[0]) for i in range(T)])
    x0, skips, v_first, lane, repeats, place = x, [], None, None, 0, 0
    order = plain_order(c)
    half = (L if c.recur_style == "own" else len(order)) // 2  # places of the U-Net's first part
    for i, again in order:
        own = c.recur_style == "own" and i in c.recur_layers
        mix, attn_scale, mlp_scale = (
            p[f"blocks.{i}.{n}"][again] if own else p[f"blocks.{i}.{n}"]
            for n in ("resid_mix", "attn_scale", "mlp_scale")
        )
        in_unet = not again or c.recur_style != "own"
        step = place - half  # of the decoder, from 0
        w = {
            k: p[f"blocks.{i}.{k}.weight"]
            for k in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")
        }
        if step >= 0 and in_unet and L > 1:
            if c.recur_style == "gated" and step < len(skips):
                x = plain_skip(c, p, x, skips.pop(), min(step, L // 2 - 1))
            if c.recur_style != "gated" and step < L // 2 and lane is None:
                x = plain_skip(c, p, x, skips.pop(), step)
        if again and c.recur_style == "gated":
            x = x + torch.sigmoid(p["iter_gate"][repeats]) * p["iter_embed"][repeats]
            repeats += 1
        if lane is None and step >= 0 and 0 < c.parallel_start_layer <= i:
            lane = x
        x = mix[0] * x + mix[1] * x0
        s = 1 / math.sqrt(i + 1) if c.ln_scale else 1
        h = norm(x) * s
        v = h @ w["attn.c_v"].T
        if c.vrl_enabled and v_first is None:
            v_first = v
        if c.ve_enabled and i in c.ve_layers:
            extra = (
                p["ve_shared.embed.weight"][ids]
                @ p["ve_shared.proj.weight"].T
                * p["ve_shared.scale"]
            )
            v = v + extra * p[f"ve_layer_scales.{c.ve_layers.index(i)}"]
        v_first = v if v_first is None else v_first
        if c.vrl_enabled and i:
            gate = torch.sigmoid(p[f"blocks.{i}.attn.vrl_gate"])
            v = (1 - gate) * v + gate * v_first
        if c.value_residual:
            v = (
                p[f"blocks.{i}.attn.vr_lambda"][0] * v_first
                + p[f"blocks.{i}.attn.vr_lambda"][1] * v
            )
        heads = []
        for j in range(c.num_heads):
            kv = slice(
                j // (c.num_heads // c.num_kv_heads) * d,
                (j // (c.num_heads // c.num_kv_heads) + 1) * d,
            )
            q = (
                angle(norm((h @ w["attn.c_q"].T)[:, j * d : (j + 1) * d]))
                * p[f"blocks.{i}.attn.q_gain"][j]
            )
            k, own = angle(norm((h @ w["attn.c_k"].T)[:, kv])), v[:, kv]
            a = (q @ k.T / math.sqrt(d)).masked_fill(
                torch.triu(torch.ones(T, T, dtype=torch.bool), 1), -math.inf
            )
            y = a.softmax(-1) @ own
            if c.gated_attention:
                y = (
                    y
                    * torch.sigmoid(
                        h @ p[f"blocks.{i}.attn.attn_gate.weight"][j]
                        + p[f"blocks.{i}.attn.attn_gate.bias"][j]
                    )[:, None]
                )
            if i >= L - c.xsa_last_n:
                unit = own / own.norm(dim=-1, keepdim=True)
                y = y - (y * unit).sum(-1, keepdim=True) * unit
            heads.append(y)
        x = x + attn_scale * (torch.cat(heads, 1) @ w["attn.proj"].T)
        u = norm(x if lane is None else lane) * s @ w["mlp.fc"].T
        more = mlp_scale * (torch.where(u > 0, u, 0.5 * u) ** 2 @ w["mlp.proj"].T)
        if lane is None:
            x = x + more
        else:
            lane = lane + more
        if step < 0 and in_unet:
            skips.append(x)
        place += in_unet
    if lane is not None:
        x = p["lane_merge"] * x + (1 - p["lane_merge"]) * lane
    return norm(x) @ p["tok_emb.weight" if c.tie_embeddings else "lm_head.weight"].T


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(NUM_LAYERS="4", XSA_LAST_N="4"),
        dict(ROPE_DIMS="0"),
        dict(ROPE_TRAIN_LEN="8"),
        dict(LN_SCALE="0"),
        dict(BIGRAM_VOCAB_SIZE="0"),
        dict(VE_ENABLED="0"),
        dict(TIE_EMBEDDINGS="0"),
        dict(NUM_KV_HEADS="4"),
        dict(NUM_LAYERS="1", VE_LAYERS="0"),
        dict(VRL_ENABLED="1"),
        dict(VALUE_RESIDUAL="1"),
        dict(GATED_ATTENTION="1"),
        dict(RECUR_LAYERS="1", RECUR_START="0"),
        dict(
            NUM_LAYERS="5",
            RECUR_LAYERS="1,3",
            RECUR_START="0",
            VRL_ENABLED="1",
            GATED_ATTENTION="1",
            XSA_LAST_N="5",
        ),
        dict(SKIP_GATES_ENABLED="1"),
        dict(PARALLEL_START_LAYER="1"),
        dict(PARALLEL_START_LAYER="4", NUM_LAYERS="6", SKIP_GATES_ENABLED="1"),
        dict(NUM_LAYERS="1", VE_LAYERS="0", SKIP_GATES_ENABLED="1"),
        dict(RECUR_LAYERS="0", RECUR_START="0", RECUR_LOOPS="3", NUM_LAYERS="1", VE_LAYERS="0"),
        dict(RECUR_LAYERS="1,2", RECUR_START="0", RECUR_LOOPS="3", SKIP_GATES_ENABLED="1"),
        *(
            dict(RECUR_STYLE=style, RECUR_START="0", **more)
            for style in ("shared", "gated")
            for more in (
                dict(RECUR_LAYERS="1", VRL_ENABLED="1", VE_LAYERS="0,1"),
                dict(RECUR_LAYERS="2,3", NUM_LAYERS="6", XSA_LAST_N="6", SKIP_GATES_ENABLED="1"),
                dict(RECUR_LAYERS="0,1,3", NUM_LAYERS="5", RECUR_LOOPS="3", VALUE_RESIDUAL="1"),
                dict(RECUR_LAYERS="0", NUM_LAYERS="1", VE_LAYERS="0"),
            )
        ),
        dict(
            NUM_LAYERS="6",
            RECUR_LAYERS="2,3",
            RECUR_STYLE="shared",
            RECUR_START="0",
            PARALLEL_START_LAYER="3",
            SKIP_GATES_ENABLED="1",
        ),
        dict(
            NUM_LAYERS="6",
            RECUR_LAYERS="4,5",
            RECUR_LOOPS="3",
            RECUR_START="0",
            PARALLEL_START_LAYER="4",
        ),
    ],
)
def test_model_is_the_formulas(changes):
    c = config(**changes)
    model = random_model(c).double()
    model.dtype = torch.float64
    tables = t.GPT(c, torch.float64)  # RoPE tables that were never rounded to fp32
    model.cos, model.sin = tables.cos, tables.sin
    ids = torch.randint(0, c.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model.project(model.hidden(ids).double())
        state = t.split_banks(model.state_dict(), c.num_layers)
        plain = torch.stack([plain_logits(c, state, row.tolist()) for row in ids])
        torch.testing.assert_close(ours.double(), plain, rtol=1e-5, atol=1e-5)
        loss = F.cross_entropy(
            (c.logit_softcap * torch.tanh(plain / c.logit_softcap)).flatten(0, 1), ids.flatten()
        )
        assert model(ids, ids).item() == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(XSA_LAST_N="0"),
        dict(NUM_KV_HEADS="4"),
        dict(VRL_ENABLED="1", GATED_ATTENTION="1"),
        dict(NUM_LAYERS="1", VE_LAYERS="0"),
        dict(RECUR_LAYERS="2", RECUR_START="0"),
        dict(RECUR_LAYERS="2", RECUR_START="0", RECUR_STYLE="gated"),
        dict(RECUR_LAYERS="2", RECUR_START="0", RECUR_STYLE="shared", PARALLEL_START_LAYER="2"),
    ],
)
@pytest.mark.parametrize("tail", [1, 8, 24])
def test_the_last_rows_alone_are_those_of_all(tail, changes):
    c = config(**changes)
    model, ids = (
        random_model(c),
        torch.randint(0, c.vocab_size, (3, 24), generator=torch.Generator().manual_seed(1)),
    )
    with torch.no_grad():
        whole, some = model.hidden(ids), model.hidden(ids, tail)
    assert some.shape == (3, tail, c.model_dim)
    torch.testing.assert_close(some, whole[:, -tail:], rtol=1e-5, atol=2e-6)


def test_only_scored_rows_meet_the_last_block(stream, monkeypatch):
    """The rows that evaluators ask for: the stride's, where the first window is not in the batch and no method looks at more."""
    c = config(VAL_BATCH_SIZE="64", SLOT_BATCH_SEQS="2")
    (run, val), model, asked = stream(c, 128), random_model(c), []
    hidden = model.hidden
    model.hidden = lambda ids, tail=None: asked.append(tail) or hidden(ids, tail)
    for label, loss, usual in (
        ("sliding_window", "all", 8),
        ("slot", "all", 32),
        ("slot", "context", 32),
        ("slot", "scored", 8),
        ("slot", "past", 8),
    ):
        asked.clear()
        t.score(run, model, val, [(label, dataclasses.replace(c, slot_loss=loss))])
        assert asked[0] == 32 and set(asked[1:]) == {usual}, (label, loss)


def test_the_kernel_that_attention_takes_is_named():
    c = config()
    assert (
        t.attention_kernel("sdpa", c, t.Ranks(c)) == "sdpa_flash"
        and t.attention_kernel("fa3", c, None) == "fa3"
    )
    c = config(DOCUMENTS="mask")
    assert c.attention == "sdpa"
    assert t.attention_kernel("sdpa", c, t.Ranks(c)) in ("sdpa_flash", "sdpa_math")


def test_record_model_has_the_published_number_of_parameters_and_rope_base():
    model = t.GPT(t.load_config({}))
    assert sum(p.numel() for p in model.parameters()) == 26_928_220
    step = torch.atan2(
        model.sin[1, 0, 1].double(), model.cos[1, 0, 1].double()
    )  # base ** (-2/16) radians a position
    assert (1 / step.item()) ** 8 == pytest.approx(22082, rel=1e-4)


def test_every_parameter_has_one_rule_and_its_initial_value():
    c = config(TIE_EMBEDDINGS="1", VRL_ENABLED="1", GATED_ATTENTION="1", RECUR_LAYERS="1")
    state = t.split_banks(dict(t.GPT(c).named_parameters()), c.num_layers)
    for more in (
        dict(RECUR_LAYERS="0,1,2", RECUR_STYLE="gated", RECUR_LOOPS="8"),
        dict(SKIP_GATES_ENABLED="1", PARALLEL_START_LAYER="1"),
    ):
        state |= t.split_banks(dict(t.GPT(config(**more)).named_parameters()), c.num_layers)
    for name, p in state.items():
        rule = t.parameter_rule(name)
        if rule.init == "orthogonal":
            gram = p @ p.T if p.size(0) <= p.size(1) else p.T @ p
            torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=0)
        elif rule.init == "embedding":
            assert p.std().item() == pytest.approx(0.005, rel=0.05)
        elif rule.init == "normal":
            assert p.std().item() == pytest.approx(rule.value, rel=0.1)
        elif rule.init == "stream":
            assert (p[..., 0, :] == 1).all() and (p[..., 1, :] == 0).all()
        else:
            assert (p == (c.qk_gain_init if rule.init == "q_gain" else rule.value)).all()
        assert rule.export in ("int6", "int8", "fp16", "fp32")
        assert rule.group in ("muon", "embed", "head", "scalar", "proj")
    for unknown in ("blocks.0.attn.new_gate", "tok_emb.bias"):
        with pytest.raises(t.Fault, match="fits 0 rows"):
            t.parameter_rule(unknown)


def test_every_parameter_is_optimised_once_and_gets_a_gradient():
    for changes in (
        dict(TIE_EMBEDDINGS="0"),
        dict(VRL_ENABLED="1", GATED_ATTENTION="1", RECUR_LAYERS="1"),
        dict(VALUE_RESIDUAL="1"),
        dict(RECUR_LAYERS="1", RECUR_STYLE="gated", RECUR_START="0"),
        dict(SKIP_GATES_ENABLED="1", PARALLEL_START_LAYER="2"),
        dict(MUON_PROJECTIONS="1"),
        {},
    ):
        c = config(**changes)
        model, run = random_model(c), t.Run(c)
        optimizer = t.Optimizer(c, run.ranks, model)
        held = [id(p) for p in optimizer.banks + optimizer.small]
        assert sorted(held) == sorted(id(p) for p in model.parameters())
        ids = torch.randint(0, c.vocab_size, (4, 33), generator=torch.Generator().manual_seed(1))
        model(ids[:, :-1], ids[:, 1:]).backward()
        for name, p in t.split_banks(
            {n: p.grad for n, p in model.named_parameters()}, c.num_layers
        ).items():
            assert p.abs().max() > 0, name
    model.smear.gate.grad = None
    with pytest.raises(t.Fault, match=r"no gradient for parameters of shapes \[\(32,\)\]"):
        optimizer.reduce(torch.zeros(()))


def test_recurrence_starts_where_it_is_told_from_equal_vectors():
    """Before it starts the model is that without; then layers 1 and 2 run twice, first with the first pass's vectors."""
    c = config(RECUR_LAYERS="1,2", RECUR_START="5")
    model, ids = (
        random_model(c),
        torch.randint(0, c.vocab_size, (2, 32), generator=torch.Generator().manual_seed(3)),
    )
    plain = random_model(config())
    state = {
        n: p[0] if p.ndim > q.ndim else p
        for (n, p), q in zip(model.state_dict().items(), plain.state_dict().values())
    }
    plain.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model.hidden(ids), plain.hidden(ids), rtol=0, atol=0)
        model.start_recurrence()
        for name in ("resid_mix", "attn_scale", "mlp_scale"):
            assert torch.equal(*getattr(model.blocks[2], name))
        assert not torch.allclose(model.hidden(ids), plain.hidden(ids), atol=1e-3)


def test_what_belongs_to_repeats_sleeps_until_they_begin(tiny_data):
    """AdamW would let it decay: 3,000 steps without a gradient would leave little of it."""
    c = config(tiny_data, RECUR_LAYERS="1,2", RECUR_STYLE="gated", RECUR_START="5", ADAM_WD="9")
    run, model = t.Run(c), random_model(c)
    optimizer, feed = t.Optimizer(c, run.ranks, model), t.TrainData(c, run.ranks).batches()
    before = {n: p.clone() for n, p in model.state_dict().items()}

    def step():
        t.train_step(c, run.ranks, model, optimizer, next(feed), step=0, lr_factor=1.0)
        return {n for n, p in model.state_dict().items() if torch.equal(p, before[n])}

    assert step() == {"iter_embed", "iter_gate"}
    model.start_recurrence()
    assert step() == set()


@pytest.mark.parametrize("loops", [2, 3])
def test_places_of_the_published_systems(loops):
    """At full size, as #1278's and #1435's scripts list them."""
    for preset, twice, once in (
        (
            dict(RECUR_STYLE="gated"),
            [0, 1, 2, 3, 4, 4, 5, 5, 6, 7, 8, 9, 10],
            [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 6, 7, 8, 9, 10],
        ),
        (
            dict(RECUR_STYLE="shared", PARALLEL_START_LAYER="7"),
            [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 10],
            [0, 1, 2, 3, 4, 5, 4, 5, 4, 5, 6, 7, 8, 9, 10],
        ),
    ):
        c = t.load_config({**preset, "RECUR_LAYERS": "4,5", "RECUR_LOOPS": str(loops)})
        plan = t.layer_plan(c, True)
        assert [place.layer for place in plan] == (twice if loops == 2 else once)
        assert [call.layer for call in t.layer_plan(c, False)] == list(range(11))
        assert [again for _, again in t.visits(c, True)].count(0) == 11
        if loops == 2:
            skips = {n: call.skip for n, call in enumerate(plan) if call.skip is not None}
            shared = c.recur_style == "shared"
            assert skips == ({6: 0, 7: 1, 8: 2, 9: 3} if shared else {6: 0, 7: 1, 8: 2})
            assert [n for n, call in enumerate(plan) if call.opens] == [9] * shared
            assert [n for n, call in enumerate(plan) if call.kept] == [2, 3, 4, 5][not shared :]


EVERYTHING = dict(VRL_ENABLED="1", GATED_ATTENTION="1", RECUR_LAYERS="1", RECUR_START="0")


def row_of_documents(c, lengths):
    """ids [1,T] of documents, each BOS and then random tokens; the first one has lost its BOS."""
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(4, c.vocab_size, (1, sum(lengths)), generator=g)
    ids[0, np.cumsum(lengths)[:-1]] = 1
    return ids


@pytest.mark.parametrize("changes", [{}, EVERYTHING, dict(BIGRAM_VOCAB_SIZE="0", XSA_LAST_N="0")])
def test_with_documents_masked_each_is_read_as_if_it_stood_alone(changes):
    """Also by its targets: the first of a document has its BOS as context, and nothing else."""
    lengths = (5, 1, 9, 17)
    c = config(DOCUMENTS="mask", **changes)
    model, joined = random_model(c), random_model(config(**changes))
    ids = row_of_documents(c, lengths)
    with torch.no_grad():
        whole = model.hidden(ids)
        for part, alone in zip(whole.split(lengths, 1), ids.split(lengths, 1)):
            # positions turn all of a document's rows alike, and rounding is another
            torch.testing.assert_close(part, joined.hidden(alone), rtol=2e-4, atol=2e-5)
        for tail in (1, 12, 20):
            torch.testing.assert_close(model.hidden(ids, tail), whole[:, -tail:], rtol=0, atol=2e-6)
        before = joined.hidden(ids)
        assert torch.allclose(before[:, :5], whole[:, :5], atol=1e-5)
        assert not torch.allclose(before[:, 5:], whole[:, 5:], atol=1e-2)


def test_without_a_beginning_in_it_a_row_is_read_the_same_by_both():
    c = config(DOCUMENTS="mask")
    ids = torch.randint(4, c.vocab_size, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = (random_model(k).hidden(ids) for k in (c, config()))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_mask_is_that_of_plain_loops():
    ids = torch.tensor([[7, 1, 5, 1, 1, 8], [1, 4, 4, 4, 4, 1]])
    expected = np.zeros((2, 6, 6), bool)
    for b, row in enumerate(ids.tolist()):
        for i in range(6):
            for j in range(i, -1, -1):
                expected[b, i, j] = True
                if row[j] == 1:
                    break
    assert (t.same_document(ids)[:, 0].numpy() == expected).all()


@pytest.mark.parametrize("documents", ["joined", "mask"])
def test_hidden_states_before_a_changed_token_are_bit_identical(documents):
    c = config(DOCUMENTS=documents)
    model = random_model(c)
    ids = torch.randint(0, c.vocab_size, (3, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = model.hidden(ids)
        for at in range(32):
            changed = ids.clone()
            changed[1, at] = 1 if at % 2 else (changed[1, at] + 7) % c.vocab_size
            after = model.hidden(changed)
            assert torch.equal(before[1, :at], after[1, :at]) and torch.equal(
                before[::2], after[::2]
            )
            assert not torch.equal(before[1, at], after[1, at])


def test_initial_weights_follow_the_seed():
    a, b, other = (t.GPT(config(SEED=s)).state_dict() for s in "778")
    assert all(torch.equal(a[n], b[n]) for n in a) and not torch.equal(
        a["qo_bank"], other["qo_bank"]
    )


def test_compute_dtype_is_cast_where_used_and_weights_stay_fp32():
    c = config()
    model = t.GPT(c, torch.bfloat16)
    ids = torch.randint(0, c.vocab_size, (2, 32))
    assert (
        model.hidden(ids).dtype == torch.bfloat16
        and model.project(model.hidden(ids)).dtype == torch.float32
    )
    model(ids, ids).backward()
    assert (
        {p.dtype for p in model.parameters()}
        == {p.grad.dtype for p in model.parameters()}
        == {torch.float32}
    )
