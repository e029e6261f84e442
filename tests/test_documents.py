"""Validation documents among the training text are found, whole, cut, moved or renamed; chance is not."""

import re
import shutil

import numpy as np
import pytest
from conftest import make_tiny_data, t, write_shard

from tools import documents, report


def text(lengths, seed=0):
    """Documents of random tokens, each behind token 1."""
    rng = np.random.default_rng(seed)
    return np.concatenate([[1, *rng.integers(4, 384, n)] for n in lengths]).astype(np.uint16)


VAL = text([300, 40, 64, 65, 700, 10, 129], 1)
STARTS = np.flatnonzero(VAL == 1)
OTHER = text([500] * 20, 2)


def found(*train):
    return documents.compare([np.concatenate(train)], [VAL])


@pytest.mark.parametrize("number", range(7))
def test_a_document_is_found_wherever_it_stands(number):
    end = [*STARTS, len(VAL)][number + 1]
    copy = VAL[STARTS[number] : end]
    for moved in (0, 1, 63, 64):
        overlap = found(OTHER[501 - moved : 1002], copy, OTHER[1002:])
        assert overlap.both.tolist() == [number] and overlap.starts.tolist() == [STARTS[number]]


def test_renamed_and_cut_copies_are_found_and_chance_is_not():
    whole = VAL[STARTS[4] : STARTS[5]]
    assert found(OTHER, whole[1:]).both.tolist() == [4]  # without its beginning
    assert found(OTHER, whole[100:650], OTHER).both.tolist() == [4]
    changed = whole.copy()
    changed[[70, 500]] = 5
    assert found(OTHER, changed).both.tolist() == [4]
    half = found(OTHER, whole[:350])
    assert not len(half.both) and 0.2 < half.windows < 0.3 and half.too_much()
    assert not len(found(OTHER).both) and found(OTHER).windows == 0
    assert not found(OTHER, OTHER[:5000], whole[:64]).too_much()


def test_hashes_over_blocks_are_those_of_one(monkeypatch):
    expected = found(OTHER, VAL)
    for size in (100, 128, 1000):
        monkeypatch.setattr(documents, "BLOCK", size)
        overlap = found(OTHER[:777], VAL)
        assert overlap.both.tolist() == expected.both.tolist() and overlap.windows == 1


def test_hashes_are_of_the_tokens_alone():
    tokens = np.concatenate([VAL, OTHER])
    hashes = t.ngram_hashes(tokens)
    assert len(set(hashes.tolist())) == len(hashes)
    np.testing.assert_array_equal(t.ngram_hashes(tokens[17:]), hashes[17:])


@pytest.fixture
def mixed(tmp_path):
    """A function (tokens put before, cut from the front) -> settings of data whose training text has the validation text."""
    data = make_tiny_data(tmp_path, targets=2000)
    val = np.fromfile(tmp_path / "fineweb_val_000000.bin", "<u2", offset=1024)

    def make(before, cut):
        write_shard(tmp_path / "fineweb_train_000001.bin", [7] * before + val[cut:].tolist())
        return data

    return make


@pytest.mark.parametrize("before,cut", [(0, 0), (1, 0), (1, 1), (5000, 0), (0, 500)])
def test_training_on_validation_text_is_refused_at_the_start(before, cut, mixed, tiny):
    with pytest.raises(
        t.BadInput, match=r"training text has \d+ of \d+ validation documents; .* C3"
    ):
        tiny(**mixed(before, cut))


def test_the_report_checks_a_data_set(mixed, tmp_path, capsys):
    mixed(1, 0)
    assert report.main(["--check", "--data", str(tmp_path)]) == 1
    line = capsys.readouterr().out
    assert re.match(
        r"FAIL .*has 1 of 1 validation documents, 100.00 % .*number 0, from token 0", line
    )
    shutil.copy(tmp_path / "fineweb_train_000000.bin", tmp_path / "fineweb_train_000001.bin")
    assert report.main(["--check", "--data", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("ok  ")
    assert report.main(["--check", "--data", "nosuch"]) == 2
    assert "--data nosuch: has no fineweb_train_*.bin" in capsys.readouterr().err
    assert report.main(["--data", str(tmp_path)]) == 2
    assert "goes with --check" in capsys.readouterr().err
