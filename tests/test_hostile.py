"""Random allowed settings on tiny runs (tests/hostile.py), and the warnings that a run gives."""

import random
import re
from pathlib import Path

import hostile
from conftest import config, t


def test_every_setting_is_varied_or_fixed():
    assert set(hostile.VALUES) | hostile.FIXED == set(t.SETTINGS)
    assert not set(hostile.VALUES) & hostile.FIXED


def test_random_settings_mislead_nobody(tmp_path):
    """Each of 15 is checked in one of the ways of the long form, `python tests/hostile.py`, which checks 200 in all of them."""
    runs = hostile.Hostile(tmp_path)
    ended, wrong = hostile.search(
        runs, 15, random.Random(20), lambda rng: [rng.choice(hostile.PARTS)]
    )
    assert not wrong, "\n".join(wrong)
    assert ended["done"] >= 5


def warnings(name):
    return re.findall(r"^warning: (.*)", Path(f"logs/{name}.txt").read_text(), re.M)


def test_validation_far_over_training_is_said_once_for_each_half_nat(tiny):
    """The tiny data's validation text is of another kind."""
    run = tiny(RUN_ID="one", VAL_LOSS_EVERY="1", EVALS="none", TRAIN_LOG_EVERY="1")
    apart = [
        run[f"step:{n}/12"]["val_loss"] - run[f"step:{n}/12"]["train_loss"] for n in range(1, 13)
    ]
    expected, said = [], 0.0
    for gap in apart:
        if gap > said + t.APART:
            expected.append(f"{gap:.2f}")
            said = gap
    told = [words.split()[2] for words in warnings("one") if words.startswith("val_loss is")]
    assert told == expected and 2 <= len(told) < 6


def test_an_artifact_that_lost_much_says_so(tiny):
    tiny(RUN_ID="fine", ITERATIONS="40", EVALS="roundtrip,sliding_window")
    cap = str(t.code_bytes() + 9_000)
    found = tiny(
        RUN_ID="cut", ITERATIONS="40", EVALS="roundtrip,sliding_window", ARTIFACT_BYTES=cap
    )
    lost = (
        found["final_artifact_roundtrip"]["val_loss"] - found["final_float_roundtrip"]["val_loss"]
    )
    assert lost > t.DAMAGE
    told = [words for words in warnings("cut") if words.startswith("the artifact")]
    assert told == [
        f"the artifact's val_loss is {lost:.2f} nats over the trained model's; a larger ARTIFACT_BYTES loses less,"
        " or a smaller model"
    ]
    assert not [words for words in warnings("fine") if words.startswith("the artifact")]


def test_a_model_that_only_guesses_says_so(tiny_data, tmp_path, monkeypatch):
    """What leaks does not count: SLOT on its own targets scores under ln V with any weights."""
    monkeypatch.chdir(tmp_path)
    c = config(tiny_data, RUN_ID="one")
    run = t.Run(c)
    run.log.start()
    for loss, leaked, told in ((5.9, 5.0, 0), (6.0, 5.0, 1)):  # ln 384 is 5.95
        run.log.rows = {
            "final_artifact_ttt": dict(val_loss=loss, causal=True),
            "final_artifact_slot": dict(val_loss=leaked, causal=False),
        }
        t.warn_of_scores(c, run)
        assert len(warnings("one")) == told
    assert warnings("one")[0].startswith("val_loss 6.00 is over ln(VOCAB_SIZE)")
