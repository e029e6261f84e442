"""tools/bytecount.py: bytes of text counted anew, and byte counts that flatter a score, in the data and in a log alone."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from conftest import PARITY, ROOT, t, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import bytecount
from tools.logs import LogError, Result, read_log


@pytest.fixture(scope="module")
def model(tiny_data):
    return tiny_data["TOKENIZER_PATH"]


@settings(max_examples=100, deadline=None)
@given(begin=st.integers(0, 400), length=st.integers(2, 190), text=st.text(max_size=40))
def test_decoding_counts_the_bytes_of_any_cut_of_a_stream(model, begin, length, text):
    """As the script's table does, from inside a document or a character to inside another."""
    sp = sentencepiece.SentencePieceProcessor(model_file=model)
    ids = [1, *sp.encode("one two"), 1, *sp.encode(text), 3, *sp.encode(f" {text}"), 1]
    tokens = np.array(ids * 10, np.uint16)[begin : begin + length]
    if len(tokens) > 1:
        counts = t.ByteCounts(model, 384).count(tokens[:-1], tokens[1:])
        assert bytecount.text_bytes(sp, tokens) == counts.sum(dtype=int)


def counted(model, folder):
    """(log, result, targets that begin with a space) of a text that the script counted with a tokenizer."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens = np.array([1, *sp.encode("one two three " * 20)])
    write_shard(folder / "fineweb_val_000000.bin", tokens)
    table = t.ByteCounts(str(model), 384)
    total = int(table.count(tokens[:-1], tokens[1:]).sum(dtype=int))
    log = read_log(ROOT / "logs/demo/seed42.txt")
    log.settings |= dict(DATA_PATH=str(folder), TOKENIZER_PATH=str(model), EVAL_SEQ_LEN="1")
    result = Result("ttt", "x", 2.0, 1.0, tokens=len(tokens) - 1, bytes=total)
    return log, result, int(table.space[tokens[1:]].sum())


def test_a_space_that_counts_twice_is_found(model, tmp_path):
    log, result, spaces = counted(model, tmp_path)
    what, verdict, detail = bytecount.check_bytes(log, result)
    assert what == "seed42.txt: bytes of text" and verdict
    assert detail == f"{result.bytes:,}, as many as the decoded text has"
    excess = f"(+{100 * spaces / result.bytes:.2f} %): a space is counted twice (#1719)"
    result.bytes += spaces
    _, verdict, detail = bytecount.check_bytes(log, result)
    assert verdict is False and excess in detail
    result.bytes -= 1  # within a document only
    assert bytecount.check_bytes(log, result)[1] is False
    result.bytes += 7
    _, verdict, detail = bytecount.check_bytes(log, result)
    assert verdict is None and "the shards here are others than the run's, or" in detail


def test_a_tokenizer_without_a_piece_for_a_space_is_found(model, tmp_path):
    """It writes a space as the three bytes of U+2581, and each byte token counts (#897)."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(Path(model).read_bytes())
    for number, piece in enumerate(proto.pieces):
        if bytecount.SPACE in piece.piece:
            piece.piece = chr(0x4E00 + number)
    (tmp_path / "without.model").write_bytes(proto.SerializeToString())
    log, result, _ = counted(tmp_path / "without.model", tmp_path)
    _, verdict, detail = bytecount.check_bytes(log, result)
    assert verdict is False and "a space counts as three bytes" in detail


def test_other_shards_are_not_counted_for_the_logs(model, tmp_path):
    log, result, _ = counted(model, tmp_path)
    result.tokens += 1
    _, verdict, detail = bytecount.check_bytes(log, result)
    assert verdict is None and "its text is not here" in detail
    (tmp_path / "fineweb_val_000000.bin").write_bytes(b"\xff" * 2000)
    bytecount.recount.cache_clear()
    _, verdict, detail = bytecount.check_bytes(log, result)
    assert verdict is None and "cannot be counted anew" in detail


@pytest.mark.parametrize(
    "told,loss,bpb,verdict,words",
    [
        ({"tokens": "62021632"}, 1.8885, 1.11850, True, "151.08 million"),
        (
            {"tokens": "62021632"},
            1.8885,
            1.1185 / 1.17,
            False,
            "+17.0 %): is a byte counted twice (#1719, #897)?",
        ),
        ({"val_tokens": "40540160"}, 2.7909, 1.0804, True, "3.7268 a token"),
        ({"tokens": "63779840"}, 2.07269931, 1.2243657, True, "has 155.77"),
        ({"tokens": "55000000", "pattern": "fineweb10B_sp998/x"}, 2.0, 1.0072, False, "+4.3 %"),
        ({}, 2.7909, 1.0804, True, "with one of its tokenizers"),
        ({"tokenizer_path": "fineweb_8192_bpe.model"}, 3.1434, 1.0339, False, "(+17.7 %)"),
        ({}, 3.1434, 1.0339, None, "neither how many tokens nor which tokenizer"),
        ({"tokens": "68608"}, 2.73, 1.57, None, "not the challenge's"),
        ({}, 2.0, float("nan"), None, "not said"),
    ],
)
def test_bytes_a_token_show_a_fault_in_a_log_alone(told, loss, bpb, verdict, words):
    """3.1434 nats and 1.0339 bits are what #1791 says of a tokenizer of 8,192 pieces."""
    log = SimpleNamespace(path=ROOT / "logs/x.txt", settings=told, style="lineage")
    _, found, detail = bytecount.check_bytes(log, Result("roundtrip", "x", loss, bpb))
    assert found is verdict and words in detail, detail


@pytest.mark.skipif(not PARITY.exists(), reason="the public logs are not part of the repository")
def test_the_public_logs_count_their_bytes_well():
    paths = [
        *PARITY.glob("lineage/published_logs/*.log"),
        *PARITY.glob("records_logs/*/*/*seed*.log"),
    ]
    verdicts = []
    for path in paths:
        try:
            log = read_log(path)
        except LogError:
            continue
        verdicts.append(bytecount.check_bytes(log, log.score)[1])
    assert len(verdicts) > 60 and False not in verdicts and verdicts.count(True) > 50
