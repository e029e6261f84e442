"""TTT_PARAMS=lora: low-rank factors for each document, against plain autograd, causal, resumable, the same on any ranks."""

import copy
import math
import os
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import config, process, random_model, t, timeless, tiny_settings, write_shard

from tools import audit, blackbox, evaluators

LORA = dict(
    TTT_PARAMS="lora", TTT_LORA_CHUNK="8", TTT_OPTIMIZER="adamw", TTT_LR="0.01", SLOT_ENABLED="0"
)


def documents(n, lengths, seed=0, vocab=384):
    """n+1 random tokens, of which those after these lengths begin documents; the first is in the middle of one."""
    tokens = np.random.default_rng(seed).integers(4, vocab, n + 1)
    tokens[np.cumsum(lengths)] = t.DOCUMENT_START
    return torch.from_numpy(tokens)


LENGTHS = (5, 100, 1, 8, 16, 41, 33, 2)


class Adapted(torch.nn.Module):
    """A bank, with b a of an own leaf a and b for each matrix added: for torch's parametrisations."""

    def __init__(self, c, pairs):
        super().__init__()
        self.a = torch.nn.ParameterList(a for a, _ in pairs)
        self.b = torch.nn.ParameterList(b for _, b in pairs)
        self.scale = c.ttt_lora_alpha / c.ttt_lora_rank

    def forward(self, bank):
        """[matrices,out,in]."""
        added = [self.scale * b @ a for a, b in zip(self.a, self.b, strict=True)]
        return bank + torch.stack(added)


def first_pairs(c, model):
    """[(a, b)] of each bank's matrices as a document begins, by the order in which the script draws them."""
    g, L, r = torch.Generator().manual_seed(c.seed), c.num_layers, c.ttt_lora_rank
    pairs = {bank: [None] * len(getattr(model, bank)) for bank in t.BANKS}
    for i in range(c.ttt_freeze_blocks, L):
        for bank, k in (
            ("qo_bank", i),
            ("qo_bank", L + i),
            ("kv_bank", i),
            ("kv_bank", L + i),
            ("mlp_up_bank", i),
            ("mlp_down_bank", i),
        ):
            outs, ins = getattr(model, bank)[k].shape
            a = torch.randn(r, ins, generator=g) / math.sqrt(ins)
            pairs[bank][k] = (a, torch.zeros(outs, r))
    return pairs


OPTIMISERS = {
    "adamw": lambda c, p: torch.optim.AdamW(p, lr=c.ttt_lr, weight_decay=c.ttt_lora_wd),
    "sgd": lambda c, p: torch.optim.SGD(p, lr=c.ttt_lr, momentum=c.ttt_momentum),
    "rmsprop": lambda c, p: torch.optim.RMSprop(p, lr=c.ttt_lr),
}


def plain_document(c, model, tokens, begin, end):
    """Nats of a document's targets, with copies of the weights that torch makes and optimises."""
    model, out = copy.deepcopy(model).requires_grad_(False), torch.zeros(end - begin)
    for bank, pairs in first_pairs(c, model).items():
        torch.nn.utils.parametrize.register_parametrization(model, bank, Adapted(c, pairs))
    params = [p for name, p in model.named_parameters() if ".a." in name or ".b." in name]
    for p in params:
        p.requires_grad_(True)
    optimizer = OPTIMISERS[c.ttt_optimizer](c, params)
    for first in range(begin, end, c.ttt_lora_chunk):
        start = max(begin, first + c.ttt_lora_chunk - c.eval_seq_len)
        stop = min(first + c.ttt_lora_chunk, end)

        def nats():
            logits = model.cap(model.project(model.hidden(tokens[None, start:stop])))[0]
            every = F.cross_entropy(logits, tokens[start + 1 : stop + 1], reduction="none")
            return every[first - start :]

        with torch.no_grad():
            out[first - begin : stop - begin] = nats()
        for _ in range(c.ttt_epochs):
            optimizer.zero_grad()
            nats().mean().backward()
            torch.nn.utils.clip_grad_norm_(params, c.ttt_grad_clip or math.inf)
            optimizer.step()
    return out


def plain_lora(c, tokens, n):
    """Nats of every target, one document at a time; between phases, whose targets must fill sequences, SGD on the model."""
    model = random_model(c)
    sgd = torch.optim.SGD(model.parameters(), lr=c.ttt_phase_lr, momentum=c.ttt_momentum)
    begins = sorted({0, *(p for p in range(n) if tokens[p] == t.DOCUMENT_START)})
    spans, out = list(zip(begins, [*begins[1:], n], strict=True)), []
    parts = [
        [span for span in spans if span[0] * c.ttt_phases // n == k] for k in range(c.ttt_phases)
    ]
    for phase in map(np.array, filter(None, parts)):
        out += [plain_document(c, model, tokens, begin, end) for begin, end in phase]
        rows = tokens[phase[0, 0] : phase[-1, 1] + 1].unfold(0, c.eval_seq_len + 1, c.eval_seq_len)
        for batch in rows.split(c.ttt_batch_seqs):
            sgd.zero_grad()
            model(batch[:, :-1], batch[:, 1:]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), c.ttt_grad_clip)
            sgd.step()
    return torch.cat(out)


def test_jobs_of_a_pass_have_the_same_scores_and_others_are_refused(stream):
    c = config(**LORA)
    (run, val), model = stream(c, 64), random_model(c)
    with t.put_back(model.parameters()):
        (first, _), (second, _) = t.score(run, model, val, [("ttt", c)] * 2)
        assert first.equal(second)
        with pytest.raises(ValueError, match="one evaluator and Config alone"):
            t.score(run, model, val, [("ttt", c), ("ttt_slot", c)])


@pytest.mark.parametrize(
    "changes",
    [
        dict(TTT_LORA_WD="2"),
        dict(TTT_OPTIMIZER="sgd", TTT_LR="0.1", TTT_EPOCHS="2", TTT_LORA_CHUNK="5"),
        dict(TTT_OPTIMIZER="rmsprop", TTT_LR="0.001", TTT_GRAD_CLIP="0", TTT_LORA_CHUNK="32"),
        dict(RECUR_LAYERS="1", RECUR_START="0", TTT_LORA_RANK="1", TTT_LORA_ALPHA="3"),
    ],
)
def test_equals_plain_autograd_with_copied_weights(changes, stream):
    c = config(**{**LORA, **changes})
    tokens = documents(256, LENGTHS)
    (run, val), model = stream(c, 256, tokens=tokens), random_model(c)
    before = [p.detach().clone() for p in model.parameters()]
    with t.put_back(model.parameters()):
        nats = t.score(run, model, val, [("ttt", c)])[0][0]
        torch.testing.assert_close(nats, plain_lora(c, tokens, 256), rtol=0, atol=1e-5)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))


def test_phases_equal_plain_autograd(stream):
    """Of six phases the first three have 64, 32 and 96 targets, and in the fourth and last no document starts; a step is on two sequences."""
    changes = dict(TTT_PHASES="6", TTT_PHASE_LR="0.05", TTT_BATCH_SEQS="2", TTT_EPOCHS="1")
    c = config(**LORA, **changes)
    tokens = documents(256, (14, 50, 21, 11, 96))
    (run, val), model = stream(c, 256, tokens=tokens), random_model(c)
    with t.put_back(model.parameters()):
        nats = t.score(run, model, val, [("ttt", c)])[0][0]
    torch.testing.assert_close(nats, plain_lora(c, tokens, 256), rtol=0, atol=1e-5)
    with t.put_back(model.parameters()):
        one = t.score(run, model, val, [("ttt", config(**LORA, TTT_EPOCHS="1"))])[0][0]
    assert torch.equal(one[:64], nats[:64]) and (one - nats)[64:].abs().median() > 1e-3


def test_factors_learn_and_blocks_can_be_left_alone(stream):
    """Steps change scores, but not those of first chunks; frozen blocks have no factors."""
    tokens = documents(256, LENGTHS)

    def scores(**changes):
        c = config(**{**LORA, **changes})
        (run, val), model = stream(c, 256, tokens=tokens), random_model(c)
        with t.put_back(model.parameters()):
            return t.score(run, model, val, [("ttt", c)])[0][0]

    still, some, all_ = (
        scores(TTT_EPOCHS="0"),
        scores(TTT_FREEZE_BLOCKS="2"),
        scores(TTT_FREEZE_BLOCKS="0"),
    )
    begins = np.cumsum([0, *LENGTHS])
    age = np.arange(256) - begins[np.searchsorted(begins, np.arange(256), "right") - 1]
    for one, other in ((still, some), (some, all_)):
        moved = (one - other).abs().numpy()
        assert moved[age < 8].max() < 1e-5 and np.median(moved[age >= 16]) > 1e-3
    assert torch.equal(scores(TTT_FREEZE_BLOCKS="3"), still)
    assert torch.equal(scores(TTT_LR="0"), still)


def test_scores_do_not_depend_on_what_shares_a_batch(stream, monkeypatch):
    """One document at a time, some, or all: the same to the bit, with padding's tokens looked at by none."""
    c = config(**LORA)
    tokens, found = documents(256, LENGTHS), []
    for limit in (1, 150, 4096):
        monkeypatch.setattr(t, "CPU_TOKENS", limit)
        (run, val), model = stream(c, 256, tokens=tokens), random_model(c)
        work = t.DocumentPass(c, run.ranks, model, val, t.SILENT)
        assert sorted(np.concatenate(work.batches)) == list(range(len(LENGTHS) + 1))
        assert len(work.batches) == {1: 9, 4096: 1}.get(limit, len(work.batches))
        found.append(work.score(run, t.Stopwatch(run.ranks, 1), None)[0][0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_two_hundred_flips_change_no_earlier_score(stream):
    """A quarter of them begin a document, some join two: also where a document ends shows in nothing before."""
    c = config(
        **LORA, TTT_EPOCHS="1", TTT_PHASES="2", VOCAB_SIZE="40", NUM_LAYERS="2", VE_LAYERS="1"
    )
    tokens = documents(112, LENGTHS[2:], vocab=40)
    (run, val), model = stream(c, 112, tokens=tokens), random_model(c, scale=0.6)
    box = evaluators.Evaluation(run, model, val.tokens, "ttt", c, seed=3)
    where = blackbox.kinds_of_places(112, box.marks, 111, box.rng)
    assert len(where) == 111 and {*np.cumsum(LENGTHS[2:])} & {*box.marks} & {*where}
    for p in [*where, *where[:89]]:
        box.alone(p)
    assert box.runs == 201 and not box.moved


def test_an_audit_finds_it_causal_and_a_leak_where_one_is_made(stream, monkeypatch):
    small = dict(VOCAB_SIZE="32", EVAL_SEQ_LEN="16", TRAIN_SEQ_LEN="16", NUM_LAYERS="2")
    c = config(
        **LORA, **small, TTT_EPOCHS="1", VE_LAYERS="1", EVAL_STRIDE="6", TTT_CHUNK_TOKENS="48"
    )
    tokens = documents(144, (5, 60, 1, 30), vocab=32)
    (run, val), model = stream(c, 144, tokens=tokens), random_model(c, scale=0.6)
    report = audit.audit(run, model, val.tokens, "ttt", c, count=16)
    assert report["ok"] and not report["claim"] and report["uses"] > 80, report
    score_chunk = t.DocumentPass.score_chunk

    def learn_first(self, documents, k, *, goes_on):
        out = self.out.clone()
        score_chunk(self, documents, k, goes_on=goes_on)
        self.out.copy_(out)
        score_chunk(self, documents, k, goes_on=0)

    monkeypatch.setattr(t.DocumentPass, "score_chunk", learn_first)
    report = audit.audit(run, model, val.tokens, "ttt", c, count=16, sum_count=0)
    assert not report["ok"] and report["broken"].startswith("C1"), report


def test_flips_find_windows_that_tell_where_a_document_ends(stream, monkeypatch):
    """Here a last chunk's context is shorter by what the chunk lacks."""
    c = config(**LORA, TTT_EPOCHS="1")
    (run, val), model = stream(c, 256, tokens=documents(256, LENGTHS)), random_model(c)
    take = t.DocumentPass.take

    def cut(self, at, inside):
        begins = (~inside).sum(1) if at.shape[1] > c.ttt_lora_chunk else np.zeros(len(at), int)
        return take(self, at, inside & (np.arange(at.shape[1]) >= begins[:, None]))

    monkeypatch.setattr(t.DocumentPass, "take", cut)
    box = evaluators.Evaluation(run, model, val.tokens, "ttt", c, seed=3)
    box.causality(32)
    assert box.moved and max(box.moved.values()) > 1e-3


@pytest.fixture
def many(tiny_data, tmp_path):
    """Settings of a validation split of several documents."""
    text = open_val(tiny_data)
    text[np.cumsum(LENGTHS)] = t.DOCUMENT_START
    (tmp_path / "many").mkdir()
    write_shard(tmp_path / "many/fineweb_val_000000.bin", text)
    return {**LORA, "DATA_PATH": str(tmp_path / "many"), "EVALS": "ttt", "SAVE_NLL": "1"}


def open_val(tiny_data):
    """A copy of the first tokens of the tiny validation split."""
    return np.array(t.open_split(config(tiny_data), "val")[0][:257])


@pytest.fixture
def no_signals():
    """Signals that arrived; those that a test makes up are gone after it."""
    yield t.STOP_SIGNALS.received
    t.STOP_SIGNALS.received.clear()


@pytest.mark.parametrize("phases", ["1", "3"])
def test_a_stopped_pass_goes_on_with_the_same_digits(phases, tiny, many, no_signals, monkeypatch):
    tiny(RUN_ID="model", EVALS="none", ITERATIONS="3")
    env = {**many, "LOAD_ARTIFACT": "logs/model/final_model.ptz", "TTT_PHASES": phases}
    monkeypatch.setattr(t, "CPU_TOKENS", 60)
    whole, calls, score_batch = tiny(RUN_ID="whole", **env), [], t.DocumentPass.score_batch

    def stop_in_the_fourth(self, documents):
        calls.append(documents)
        if len(calls) == 4:
            no_signals.append((signal.SIGTERM, time.perf_counter()))
        score_batch(self, documents)

    monkeypatch.setattr(t.DocumentPass, "score_batch", stop_in_the_fourth)
    with pytest.raises(SystemExit):
        tiny(RUN_ID="part", **env)
    no_signals.clear()
    assert [f for f in os.listdir("logs/part") if f.startswith("progress_artifact_ttt")]
    again = tiny(RUN_ID="part", RESUME="1", **env)
    assert timeless(again) == timeless(whole) and np.array_equal(nll("part"), nll("whole"))
    assert sorted(np.concatenate(calls)) == list(range(len(LENGTHS) + 1))  # none twice


def nll(name):
    """Nats of a run."""
    return np.load(f"logs/{name}/nll_ttt.npy")


def test_scores_are_the_same_on_one_and_two_ranks(tiny, tiny_data, many, tmp_path, monkeypatch):
    """Of batches of one document or two: ranks score different ones."""
    tiny(RUN_ID="made", ITERATIONS="3", EVALS="none")
    env = {
        **many,
        "LOAD_ARTIFACT": "logs/made/final_model.ptz",
        "EVAL_SEQ_LEN": "16",
        "TTT_PHASES": "2",
    }
    monkeypatch.setattr(t, "CPU_TOKENS", 60)
    tiny(RUN_ID="one", **env)
    script = "import train_gpt as t; t.CPU_TOKENS = 60; t.main()"
    (tmp_path / "few.py").write_text(script)
    settings = tiny_settings(tiny_data, env, {"RUN_ID": "two"})
    done = process(settings, tmp_path, ranks=2, script=tmp_path / "few.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.abs(nll("one") - nll("two")).max() <= 1e-6


@pytest.mark.parametrize(
    "changes,line",
    [
        (dict(TTT_LORA_RANK="17"), "TTT_LORA_RANK=17: at most 16, the smallest side of a matrix."),
        (dict(TTT_PHASES="2", TTT_PARAMS="all"), "TTT_PHASES=2: needs TTT_PARAMS=lora; set 1."),
        (dict(TTT_LORA_CHUNK="33"), "TTT_LORA_CHUNK=33: at most EVAL_SEQ_LEN=32."),
        (dict(SLOT_ENABLED="1"), "TTT_PARAMS=lora: ttt_slot has no lora"),
        (dict(EVALS="ttt,ttt_ctw", CTW_WEIGHT="1"), "TTT_PARAMS=lora: ttt_ctw has no lora"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes, line):
    with pytest.raises(t.BadInput) as caught:
        config(**{**LORA, **changes})
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
    config(**{**LORA, **changes, "TTT_PARAMS": "all", "TTT_PHASES": "1"})


def test_more_phases_than_documents_are_refused_before_any_work(tiny, many):
    with pytest.raises(t.BadInput, match=r"^TTT_PHASES=10: at most 9, the validation split's doc"):
        tiny(**{**many, "TTT_PHASES": "10"})
    assert not os.path.exists("logs")
