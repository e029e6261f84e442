"""What torch.compile makes of the model, traced only: no break, one graph a shape, none on a clock."""

import pytest
import torch
from conftest import config, t

SMALL = dict(NUM_LAYERS="2", VE_LAYERS="1", COMPILE="1")
SHORT = dict(NUM_LAYERS="1", VE_LAYERS="0", COMPILE="1", ITERATIONS="3", WARMUP_STEPS="2")
FEATURES = {
    "recurrence": dict(RECUR_LAYERS="0", RECUR_START="0", TIE_EMBEDDINGS="0", VRL_ENABLED="1"),
    "gated": dict(RECUR_LAYERS="0", RECUR_START="0", RECUR_STYLE="gated", RECUR_LOOPS="3"),
    "lanes": dict(
        RECUR_LAYERS="0",
        RECUR_START="0",
        RECUR_STYLE="shared",
        PARALLEL_START_LAYER="1",
        SKIP_GATES_ENABLED="1",
    ),
    "gates": dict(GATED_ATTENTION="1", VALUE_RESIDUAL="1", PARALLEL_LAST_N="1", SLOT_BIAS="1"),
}
# evaluators of one pass
PASSES = [["roundtrip"], ["sliding_window"], ["slot"], ["ttt", "ttt_slot", "ttt_ctw"], ["ctw"]]


@pytest.fixture
def graphs(monkeypatch):
    """[(function, shape of its first ids or targets, whether a clock ran)] of what is compiled.

    Graphs are traced and then run as they are. fullgraph makes a break an error.
    """
    found = []
    priming = []
    real = torch.compile

    def compiled(function, **options):
        def backend(graph, inputs):
            ids = (x for x in inputs if isinstance(x, torch.Tensor) and x.dtype == torch.long)
            shape = tuple(map(int, next(ids).shape))
            found.append((function.__name__, shape, not priming))
            return graph.forward

        return real(function, **options, fullgraph=True, backend=backend)

    def off_the_clock(function):
        def wrapped(*args):
            priming.append(1)
            result = function(*args)
            priming.pop()
            return result

        return wrapped

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compiled)
    for owner, name in ((t, "prime"), (t, "prime_pass"), (t.DocumentPass, "prime")):
        monkeypatch.setattr(owner, name, off_the_clock(getattr(owner, name)))
    yield found
    torch._dynamo.reset()


TRAINING = ("forward", (12, 32), False)
WHOLE = (
    "hidden",
    (8, 32),
    False,
)  # windows scored to their first row: the first, and disjoint ones
TAIL = ("hidden", (8, 32), False)  # overlapping windows, of which the last rows are scored
SLOT = ("hidden", (4, 32), False)  # SLOT's batch, which is fitted to all rows
CHUNK = ("forward", (4, 32), False)  # what TTT learns from


def gradient(*shape):
    """The graph of SLOT's gradient, which is for all shapes."""
    return ("slot_gradient", shape, False)


def test_a_default_run_has_six_graphs_and_none_is_made_on_a_clock(graphs, tiny):
    tiny(**SHORT)
    assert graphs == [TRAINING, WHOLE, TAIL, SLOT, gradient(1, 124), CHUNK]


@pytest.mark.parametrize("style", ["own", "shared", "gated"])
def test_recurrence_has_a_graph_more_and_one_if_a_validation_comes_before_it(style, graphs, tiny):
    recurrence = dict(RECUR_LAYERS="0", RECUR_START="2", RECUR_STYLE=style)
    tiny(**SHORT, **recurrence, LATE_QAT="0", EVALS="roundtrip")
    assert graphs == [TRAINING, TRAINING, WHOLE, WHOLE]


@pytest.mark.parametrize("name", FEATURES)
def test_no_graph_of_training_or_an_evaluator_breaks(name, graphs, stream):
    c = config(**SMALL, **FEATURES[name], CTW_WEIGHT="0.1", EVALS="roundtrip")
    run, val = stream(c, 128)
    model = t.GPT(c)
    t.compile_model(model)
    model(torch.zeros(12, 32, dtype=torch.long), torch.zeros(12, 32, dtype=torch.long)).backward()
    assert [row[:2] for row in graphs] == [TRAINING[:2]]
    graphs.clear()
    for labels in PASSES:
        for nats, _ in t.score(run, model, val, [(label, c) for label in labels]):
            assert nats.isfinite().all()
    shapes = {row for row in graphs if row[0] != "slot_gradient"}
    assert shapes == {WHOLE, SLOT, CHUNK}
    assert not any(on_a_clock for *_, on_a_clock in graphs)


@pytest.mark.parametrize("loss", ["scored", "context"])
def test_a_last_batch_of_one_window_needs_no_graph_on_the_clock(loss, graphs, stream):
    """A size of 1 is a shape of its own also where others are dynamic."""
    c = config(**SHORT, SLOT_LOSS=loss, SLOT_DELTA="window", SLOT_BATCH_SEQS="4")
    run, val = stream(c, 32 + 8 * 28)  # 29 windows
    model = t.GPT(c)
    t.compile_model(model)
    t.score(run, model, val, [("slot", c)])
    assert {name for name, *_ in graphs} == {"hidden", "slot_gradient"}
    assert not any(on_a_clock for *_, on_a_clock in graphs)


def test_what_lora_trains_between_phases_is_compiled_before_its_clock(graphs, stream):
    lora = dict(TTT_PARAMS="lora", TTT_OPTIMIZER="adamw", EVALS="ttt")
    phases = dict(TTT_LORA_CHUNK="16", TTT_PHASES="3", TTT_BATCH_SEQS="3")
    c = config(**SHORT, **lora, **phases)
    run, val = stream(c)
    val.tokens[::100] = t.DOCUMENT_START
    model = t.GPT(c)
    t.compile_model(model)
    ((nats, _),) = t.score(run, model, val, [("ttt", c)])
    assert nats.isfinite().all()
    assert graphs == [("forward", (n, 32), False) for n in (1, 3)]  # what is left over, and whole


@pytest.mark.parametrize("world", [1, 3])
def test_what_ttt_compiles_is_what_it_calls(world, stream):
    """A graph is for one shape and one layout, also of a rank's part of a chunk."""
    c = config(TTT_CHUNK_TOKENS="128", TTT_BATCH_SEQS="4")
    for rank in range(world):
        run, val = stream(c)
        run.ranks.world, run.ranks.rank, run.ranks.sum = world, rank, lambda tensor: tensor
        model = t.GPT(c)
        called = []
        forward = model.forward
        model.forward = lambda *x: (
            called.append([(y.shape, y.stride()) for y in x[:2]]) or forward(*x)
        )
        trainer = t.ChunkTrainer(c, run.ranks, model, torch.optim.SGD, 0)
        trainer.prime(val.tokens, [128])
        assert called
        trainer.train(val.tokens, 128, 256, rate=0.01, epochs=1)
        assert called[0] == called[1] and len(called) == 2
