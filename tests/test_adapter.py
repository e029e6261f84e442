"""Somebody's evaluation under audit: what is planted is found, the honest are not suspected, bad adapters are told in a line."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests/cheats"))
import planted
from run import audited, every_case

from tools import adapter, audit, blackbox
from tools.console import BadInput

HONEST = """
import numpy as np
vocab_size, max_targets = 8, 96
table = np.random.default_rng(0).normal(size=(8, 8))
def score(tokens):
    z = table[tokens[:-1]]
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return -np.log(p[np.arange(len(z)), tokens[1:]])
"""
# Of every kind one or two; tests/cheats/run.py has them all, on 20 seeds.
SOME = [
    ("learns_a_chunk_first", "every seventh window"),
    ("two_windows_share_a_fit", "everywhere"),
    ("smaller_of_two", "the last window"),
    ("one_twice_and_another_never", "every seventh window"),
    *((f.__name__, "everywhere") for f in planted.RARE_BY_ITSELF),
]


@pytest.mark.parametrize("name,place", SOME)
def test_planted_cheats_are_found(name, place):
    assert (name, place) in every_case()
    assert audited(name, place, seed=100, vocab_size=16, targets=768).broken()


@pytest.mark.parametrize("name", ["plain", "weights_from_the_past", "context_fit"])
def test_the_honest_are_not_suspected(name):
    box = audited(name, "everywhere", seed=100, vocab_size=16, targets=512)
    assert not box.broken() and not box.gap < -4 * box.gap_error


@pytest.fixture
def judged(tmp_path, capsys):
    """A function (text of an adapter, words) -> (exit status, what was printed, errors)."""

    def judge(text, *words):
        path = tmp_path / "my_eval.py"
        path.write_text(text)
        status = audit.main(["--adapter", str(path), "--seed", "0", *words])
        told = capsys.readouterr()
        return status, told.out, told.err.replace(str(tmp_path) + "/", "")

    return judge


def test_the_verdict_on_an_honest_adapter(judged):
    status, out, _ = judged(HONEST)
    assert status == 0 and "says: causal; found: causal; as claimed" in out
    for line in ("C1 causal       holds", "C2 normalised   holds", "C3 score first  follows"):
        assert line in out
    assert "C4 one pass     holds" in out and "floor           above" in out and "power" in out


@pytest.mark.parametrize(
    "cheat,found",
    [
        ("z = z.copy(); z[np.arange(len(z)), tokens[1:]] += 1", "C2"),
        ("z = z.copy(); z[np.arange(len(z)), np.roll(tokens, -2)[:-1]] += 1", "C1"),
        ("z = z + 0.01 * np.bincount(tokens, minlength=8)", "C1,C2"),
    ],
)
def test_the_exit_status_compares_with_what_an_adapter_claims(cheat, found, judged):
    text = HONEST.replace("    p =", f"    {cheat}\n    p =")
    status, out, _ = judged(text)
    assert status == 1 and f"says: causal; found: {found}; NOT AS CLAIMED" in out
    status, out, _ = judged(f"{text}\nclaims = '{found}'")
    assert status == 0 and f"says: breaks {found}; found: {found}; as claimed" in out


def returns(expression):
    return f"import numpy as np\nimport time, os, sys\ndef score(tokens):\n    {expression}\n"


@pytest.mark.parametrize(
    "text,words,message",
    [
        (returns("raise KeyError('gone')"), "", "my_eval.py: raised KeyError in line 4: 'gone'."),
        (returns("raise ValueError('bad')"), "", "my_eval.py: raised ValueError in line 4: bad."),
        ("import nosuch", "", "my_eval.py: raised ModuleNotFoundError in line 1: No module named"),
        ("def score(:", "", "my_eval.py: raised SyntaxError"),
        ("x = 1", "", "my_eval.py: defines no function score(tokens)"),
        (returns("time.sleep(99)"), "--timeout 1.5", "score() takes over 1.5 s; make it quicker"),
        (returns("os._exit(3)"), "", "score() ended its process with status 3"),
        (returns("sys.exit(0)"), "", "my_eval.py: raised SystemExit in line 4"),
        (returns("return np.ones(9)"), "", "returned [9]; wanted are nats [1024] in float64"),
        (returns("return tokens[1:]"), "", "returned int64; wanted are nats [1024] in float64"),
        (returns("return [1.0] * 1024"), "", "score() returned list; wanted are nats [1024]"),
        (returns("return np.full(1024, np.nan)"), "", "score() returned nan for target 0"),
        (returns("return np.random.rand(1024)"), "", "1024 of 1024 targets other nats the second"),
        (returns("x = np.ones(2**28); time.sleep(9); return x"), "--memory 1", "takes over 1 GB"),
        (HONEST + "vocab_size = 1.5", "", "vocab_size is float; wanted is an integer"),
        (HONEST + "max_targets = -3", "", "max_targets = -3; wanted is an integer from 0"),
        (HONEST + "max_targets = 3", "", "has 3 targets in a stream; wanted are"),
        (HONEST + "claims = 'C9'", "", "claims = ['C9']; wanted are the conditions"),
        (HONEST + "boundaries = 'all'", "", "boundaries is no list of integers"),
        (HONEST + "boundaries = [0]", "", "boundaries has 0; wanted are indices of tokens"),
        (HONEST + "tokens = [9] * 99", "", "tokens has 9; vocab_size = 8"),
        (HONEST, "EVALS=slot", "--adapter: goes without --artifact, --preset and settings"),
    ],
)
def test_what_an_adapter_does_wrong_is_told_in_a_line(text, words, message, judged):
    status, out, err = judged(text, *words.split())
    assert status == 2 and out == "" and err.startswith("error: "), err
    assert message in err.replace("\n  ", " ") and err.count("\n") <= 2, err


def test_an_adapter_that_remembers_is_refused(judged):
    text = HONEST.replace("    z =", "    seen.append(1)\n    z = len(seen) // 90 +")
    status, _, err = judged(
        "seen = []\n"
        + text.replace("table[tokens[:-1]]", "table[tokens[:-1]] * (1 + len(seen) // 90)")
    )
    assert status == 2 and "other nats after other streams" in err


@pytest.mark.parametrize("kept", ["None", "tokens[:9].tobytes()"])
def test_weights_that_were_fitted_in_the_first_call_are_found(kept, judged):
    """To a process that scored nothing else, whatever it scores first has no look ahead."""
    fit = f"""
    if fitted.setdefault({kept}, None) is None:
        fitted[{kept}] = np.bincount(tokens, minlength=8) / 20
    z = table[tokens[:-1]] + fitted[{kept}]
"""
    text = HONEST.replace("    z = table[tokens[:-1]]\n", fit)
    status, _, err = judged("fitted = {}\n" + text)
    assert status == 2 and "in a process that scored another stream first" in err, err


def test_nats_under_0_in_the_text_alone_are_found(judged):
    text = HONEST.replace("    return ", "    nats = ").replace(
        "max_targets = 8, 96", "max_targets = 8, 400"
    )
    text += "    nats[200] -= 9 * (tokens[:200] == start[:200]).all()\n    return nats\n"
    status, out, _ = judged(
        text + "start = np.random.default_rng(1).integers(0, 8, 401)\ntokens = start"
    )
    assert status == 1 and "C4 one pass     BROKEN       nats under 0" in out


def test_what_moves_as_by_rounding_is_broken_and_told_so(judged):
    text = HONEST.replace(
        "    z = table[tokens[:-1]]", "    z = table[tokens[:-1]] - 1e-3 * tokens[-1]"
    )
    status, out, _ = judged(text)
    assert status == 1 and "as by rounding" in out


def test_an_error_names_the_adapters_line_by_a_relative_path_too(judged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def score(tokens):\n    raise ValueError('mine')\n")
    with pytest.raises(BadInput, match="raised ValueError in line 2: mine"):
        adapter.audit("mine.py", None, 9, 2, 60, 8, 0)


def test_a_made_up_stream_has_runs_long_repeats_and_near_copies():
    tokens = blackbox.made_up(1024, 256, np.random.default_rng(0))
    assert tokens.shape == (1025,) and tokens.min() >= 0 and tokens.max() < 256
    change = np.flatnonzero(np.diff(tokens))
    assert np.diff(change).max() > 12
    seen = {tokens[k : k + 64].tobytes(): k for k in range(len(tokens) - 63)}
    assert len(seen) < len(tokens) - 63
    for n in (0, 1, 31, 32, 33, 65):
        assert len(blackbox.made_up(n, 4, np.random.default_rng(n))) == n + 1


def test_an_adapters_process_ends_with_the_audit(tmp_path):
    path = tmp_path / "my_eval.py"
    path.write_text(HONEST)
    one = adapter.Adapter(str(path), 60, 8)
    assert one.process.poll() is None and len(one.score(np.zeros(9, int))) == 8
    one.close()
    assert one.process.poll() is not None


def test_places_are_of_all_kinds_and_chance_is_that_of_drawing():
    rng = np.random.default_rng(0)
    places = blackbox.kinds_of_places(1024, range(33, 1024, 8), 160, rng)
    assert len(places) == len(set(places)) == 160 and set(range(1013, 1025)) <= set(places)
    assert len({p % 64 for p in places}) == 64 and any(p % 8 == 1 for p in places)
    assert all(2 <= p <= 1024 for p in places)
    for leaks, tested, n in ((1, 10, 100), (5, 20, 60), (0, 9, 10), (3, 98, 100)):
        hits = [
            bool(np.intersect1d(rng.permutation(n)[:tested], range(leaks)).size)
            for _ in range(4000)
        ]
        assert blackbox.chance(leaks, tested, n) == pytest.approx(np.mean(hits), abs=0.03)


THEIRS = """
import torch
import torch.nn.functional as F

class Hyperparameters:
    eval_seq_len, eval_stride, vocab_size = 32, 8, 16

def load(path):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(16, 8), torch.nn.Linear(8, 16))

def eval_val_sliding(args, model, val_tokens, stride, batch_seqs=4):
    T, n, total, count = args.eval_seq_len, len(val_tokens) - 1, 0.0, 0
    starts = list(range(0, n, stride))
    for i in range(0, len(starts), batch_seqs):
        some = starts[i : i + batch_seqs]
        x, y = torch.zeros(2, len(some), T, dtype=torch.int64)
        for row, start in enumerate(some):
            size = min(T, n - start)
            x[row, :size] = val_tokens[start : start + size]
            y[row, :size] = val_tokens[start + 1 : start + size + 1]
        with torch.no_grad():
            logits = model(x)
            CHEAT
            nll = F.cross_entropy(logits.reshape(-1, 16).float(), y.reshape(-1), reduction="none")
            AFTER
        for row, start in enumerate(some):
            size = min(T, n - start)
            first = max(size - stride, 0) if start else 0
            total += nll.view(len(some), T)[row, first:size].double().sum()
            count += size - first
    return total / count, None
"""


@pytest.mark.parametrize(
    "cheat,found", [("pass", "causal"), ("logits = logits + y.float().mean()*logits", "C1,C2")]
)
def test_the_example_on_the_page_judges_a_script_of_the_lineages_shape(
    cheat, found, tmp_path, judged
):
    page = (ROOT / "docs/honesty.md").read_text()
    their = THEIRS.replace("CHEAT", cheat)
    (tmp_path / "their_script.py").write_text(their.replace("AFTER", "pass"))
    example = page.split("```python\n")[1].split("```")[0]
    status, out, err = judged(example)
    assert status == (found != "causal") and f"found: {found};" in out, out + err
    (tmp_path / "their_script.py").write_text(their.replace("AFTER", "nll = nll.clamp(max=2)"))
    status, out, err = judged(example)
    assert status == 2 and "is not of the nats that passed" in err


def test_an_adapter_says_how_long_its_stream_is_and_the_user_can_shorten_it(judged):
    longer = HONEST.replace("max_targets = 8, 96", "max_targets = 8, 1100")
    words = "--probes", "9", "--sums", "0"
    told = judged(longer, *words)[1]
    assert "1100 targets of" in told and "--seed 0" in told
    assert "C3 score first  open         follows from C1 and C2, of which C2 is unchecked" in told
    assert "found: causal as far as it was checked" in told
    assert "64 targets of" in judged(longer, *words, "--targets", "64")[1]


def test_a_claim_of_c3_alone_does_not_switch_off_the_floor(judged):
    text = HONEST.replace("return -np.log(p[", "return -np.log(8 * p[")
    status, out, _ = judged(f"{text}\nclaims = 'C3'")
    assert status == 1 and "floor           BELOW" in out
    status, out, _ = judged(f"{HONEST}\nclaims = 'C3'")
    assert status == 0 and "says: breaks C3; found: causal; C3 cannot be compared" in out


def smoothed(tokens, vocab_size):
    """Nats of counts over all tokens before, the first one included, with one added to each."""
    counts, nats = np.ones(vocab_size), np.empty(len(tokens) - 1)
    for k, (before, token) in enumerate(pairwise(tokens)):
        counts[before] += 1
        nats[k] = -np.log(counts[token] / counts.sum())
    return nats


def test_counts_over_a_large_vocabulary_are_not_suspected():
    """Its first target has the same nats for all tokens but one."""
    tokens = blackbox.made_up(96, 90, np.random.default_rng(0))
    box = blackbox.Box(lambda x: smoothed(x, 90), 90, tokens)
    box.own_nats(box.dense())
    assert box.wrong == []


def test_a_look_far_ahead_is_traced_to_the_token_that_moved_something():
    table = np.random.default_rng(0).normal(size=(16, 16))

    def score(tokens):
        z = table[tokens[:-1]].copy()
        z[149, tokens[290]] += 3
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        return -np.log(p[np.arange(len(z)), tokens[1:]])

    tokens = blackbox.made_up(512, 16, np.random.default_rng(1))
    box = blackbox.Box(score, 16, tokens, seed=2)
    box.reach = 1
    box.together(list(range(40, 512, 50)), 99)
    assert list(box.moved) == [290]
