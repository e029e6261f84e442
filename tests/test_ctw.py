"""Context tree weighting: equal to a sequential tree, causal, normalised, the same on any number of ranks."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, config, random_model, read_metrics, runs, t
from hypothesis import given, settings
from hypothesis import strategies as st


class Tree:
    """Sequential CTW, token by token, as in the paper: every node keeps counts, its KT probability and its weighted one."""

    def __init__(self, V, depth):
        self.V, self.depth, self.nodes = V, depth, {}

    def path(self, context):
        return [tuple(context[:d]) for d in range(self.depth + 1)]

    def node(self, key):
        return self.nodes.setdefault(
            key, dict(counts=[0] * self.V, block=0.0, weighted=0.0, children=0.0)
        )

    def update(self, context, token):
        path, change = self.path(context), 0.0
        for d in reversed(range(self.depth + 1)):
            x = self.node(path[d])
            x["block"] += math.log((x["counts"][token] + 0.5) / (sum(x["counts"]) + self.V / 2))
            x["counts"][token] += 1
            x["children"] += change
            old = x["weighted"]
            x["weighted"] = (
                x["block"]
                if d == self.depth
                else np.logaddexp(x["block"], x["children"]) - math.log(2)
            )
            change = x["weighted"] - old

    def predict(self, context):
        """Distribution [V], as the ratio of the root's weighted probability after and before each token."""
        path = self.path(context)
        out = []
        for token in range(self.V):
            change = 0.0
            for d in reversed(range(self.depth + 1)):
                x = self.nodes.get(
                    path[d], dict(counts=[0] * self.V, block=0.0, weighted=0.0, children=0.0)
                )
                block = x["block"] + math.log(
                    (x["counts"][token] + 0.5) / (sum(x["counts"]) + self.V / 2)
                )
                new = (
                    block
                    if d == self.depth
                    else np.logaddexp(block, x["children"] + change) - math.log(2)
                )
                change = new - x["weighted"]
            out.append(math.exp(change))
        return np.array(out)


def ctw(V, depth, tokens, stream):
    c = config(VOCAB_SIZE=str(V), CTW_WEIGHT="0.3", CTW_DEPTH=str(depth), SLOT_ENABLED="0")
    run, val = stream(c, len(tokens) - 1, tokens=torch.tensor(tokens))
    return t.Ctw(c, run.ranks, random_model(c), val)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(0, 4), st.data())
def test_equals_a_sequential_tree_at_every_chunk_boundary(V, depth, data):
    tokens = data.draw(st.lists(st.integers(0, V - 1), min_size=12, max_size=80))
    n, chunk = len(tokens) - 1, data.draw(st.integers(3, 20))
    c = config(VOCAB_SIZE=str(V), CTW_DEPTH=str(depth))
    val = type("Val", (), dict(tokens=torch.tensor(tokens), n=n))
    ours, tree = t.Ctw(c, t.Ranks(c), None, val), Tree(V, depth)
    context = [[tokens[i - d] if i >= d else V for d in range(depth)] for i in range(n)]
    for end in range(chunk, n, chunk):
        ours.learn(end)
        for i in range(end - chunk, end):
            tree.update(context[i], tokens[i + 1])
        assert ours.depths[0].log_weighted[0].item() == pytest.approx(
            tree.nodes[()]["weighted"], abs=1e-9, rel=1e-12
        )
        for d, x in enumerate(ours.depths):
            for i in range(end):
                node, other = x.node[i], tree.nodes[tuple(context[i][:d])]
                assert x.log_weighted[node].item() == pytest.approx(
                    other["weighted"], abs=1e-9, rel=1e-12
                )
        q = ours.probability(torch.arange(end, n))
        for i in range(end, n):
            assert q[i - end].item() == pytest.approx(
                tree.predict(context[i])[tokens[i + 1]], abs=1e-9
            )


def test_predictions_are_distributions_and_learn(stream):
    """Every token put in turn at one place: its probabilities sum to 1; a repeating text becomes predictable."""
    tokens = ([1, 2, 3, 4, 5, 6] * 30)[:130]
    total = 0.0
    for token in range(8):
        x = ctw(8, 3, [*tokens[:121], token, *tokens[122:]], stream)
        x.learn(120)
        total += x.probability(torch.tensor([120])).item()
    assert total == pytest.approx(1, abs=1e-12)
    x = ctw(8, 3, tokens, stream)
    x.learn(120)
    assert x.probability(torch.arange(120, 129)).min() > 0.6


def test_the_mixture_is_the_formula(stream):
    """Log-probabilities by the definition, with each vector written out."""
    c = config(
        VOCAB_SIZE="32",
        CTW_WEIGHT="0.4",
        CTW_ENTROPY_THRESHOLD="2.5",
        CTW_DEPTH="2",
        SLOT_ENABLED="0",
        TTT_CHUNK_TOKENS="64",
    )
    (run, val), model = stream(c, 256), random_model(c, scale=0.5)
    nats = t.score(run, model, val, [("ctw", c)])[0][0]
    plain = t.score(run, model, val, [("sliding_window", c)])[0][0]
    tree, tokens, mixed = Tree(32, 2), val.tokens.tolist(), 0
    for i in range(256):
        start = 0 if i < 32 else (i - 32) // 8 * 8 + 8  # of the window that scores it
        with torch.no_grad():
            p = (
                model.cap(model.project(model.hidden(val.tokens[None, start : start + 32])))[
                    0, i - start
                ]
                .double()
                .softmax(-1)
            )
        entropy = -(p * p.log()).sum().item()
        first = (
            0 if i < 32 else start + 24
        )  # first target of its window; its chunk decides what the tree knows
        end = first // 64 * 64
        if end and i == first and first % 64 < 8:
            for j in range(end - 64, end):
                tree.update([tokens[j - d] if j >= d else 32 for d in range(2)], tokens[j + 1])
        w = 0.4 * entropy / math.log(32) if entropy > 2.5 and end else 0.0
        q = tree.predict([tokens[i - d] if i >= d else 32 for d in range(2)])
        assert sum(q) == pytest.approx(1, abs=1e-9)
        mixed += w > 0
        assert nats[i].item() == pytest.approx(
            -math.log((1 - w) * p[tokens[i + 1]].item() + w * q[tokens[i + 1]]), abs=2e-5
        ), i
    assert 20 < mixed < 230 and not torch.equal(nats, plain) and torch.equal(nats[:64], plain[:64])


def test_weight_zero_or_a_high_threshold_is_the_model(stream):
    c = config(CTW_WEIGHT="0.5", CTW_ENTROPY_THRESHOLD="99", SLOT_ENABLED="0")
    (run, val), model = stream(c, 384), random_model(c)
    nats, plain = (x for x, _ in t.score(run, model, val, [("ctw", c), ("sliding_window", c)]))
    torch.testing.assert_close(nats, plain, rtol=0, atol=2e-6)


def test_a_tree_alone_gives_finite_scores_at_weight_one(stream):
    """Where the model knows nothing its entropy is ln V, which rounding may pass."""
    c = config(
        CTW_WEIGHT="1",
        CTW_ENTROPY_THRESHOLD="0",
        SLOT_ENABLED="0",
        TIE_EMBEDDINGS="0",
        VOCAB_SIZE="1024",
    )
    run, val = stream(c, 512)
    nats = t.score(run, t.GPT(c), val, [("ctw", c)])[0][0]
    assert torch.isfinite(nats).all()


def test_slot_beside_a_tree_is_slot_alone(tiny):
    env = dict(CTW_WEIGHT="0.3", CTW_ENTROPY_THRESHOLD="0")
    tiny(RUN_ID="made", EVALS="none")
    alone, beside = (
        tiny(LOAD_ARTIFACT="logs/made/final_model.ptz", EVALS=evals, **env)
        for evals in ("slot", "slot,ctw")
    )
    label = "final_artifact_slot"
    assert alone[label]["val_loss"] == beside[label]["val_loss"]


def test_a_tree_that_helps_helps(stream):
    """Text that repeats from chunk to chunk, under a model that knows nothing."""
    c = config(CTW_WEIGHT="1", CTW_ENTROPY_THRESHOLD="0", CTW_DEPTH="3", SLOT_ENABLED="0")
    rng = np.random.default_rng(0)
    run, val = stream(c, 512, tokens=torch.from_numpy(np.tile(rng.integers(4, 384, 64), 9)[:513]))
    nats, plain = (x for x, _ in t.score(run, t.GPT(c), val, [("ctw", c), ("sliding_window", c)]))
    assert nats[160:].mean() < plain[160:].mean() - 1 and F.relu(-nats).max() < 1e-6


def test_scores_are_the_same_on_any_number_of_ranks(tiny, tiny_data, tmp_path):
    tiny(RUN_ID="made", ITERATIONS="3", EVALS="none")
    changes = {
        "LOAD_ARTIFACT": "logs/made/final_model.ptz",
        "EVALS": "ctw,ttt_ctw",
        "CTW_WEIGHT": "0.5",
        "CTW_ENTROPY_THRESHOLD": "1",
    }
    for ranks in (2, 3):
        runs([{**TINY, **tiny_data, "RUN_ID": f"r{ranks}", **changes}], tmp_path, ranks)
    one, *more = (
        {k: v["val_loss"] for k, v in metrics.items() if k.startswith("final_")}
        for metrics in (tiny(**changes), *(read_metrics(tmp_path / f"logs/r{n}") for n in (2, 3)))
    )
    assert len(one) == 2 and more == [pytest.approx(one, abs=1e-6)] * 2
