"""Thousands of damaged and hostile artifacts, checkpoints and shards: each is refused in words, quickly, with little memory."""

import hashlib
import io
import json
import lzma
import math
import os
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, config, random_model, t, write_shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MUTATIONS = 5400  # of all three kinds together
DICTIONARY = 2**23  # what LZMA's decoder takes for the smallest file


def mutate(data, rng):
    """The bytes with one thing wrong: bits, bytes, a hole, a repeat, an end, a piece of something else."""
    data, at = bytearray(data), rng.randrange(len(data))
    n = rng.choice((1, 1, 2, 4, 16, 300))
    kind = rng.randrange(7)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at : at + n] = rng.randbytes(n)
    elif kind == 2:
        del data[at : at + n]
    elif kind == 3:
        data[at:at] = data[max(0, at - n) : at] or b"\0"
    elif kind == 4:
        del data[at:]
    elif kind == 5:
        data += rng.randbytes(n)
    else:
        data[at : at + n] = rng.choice((b"\xff", b"\0", b"9", b"]")) * len(data[at : at + n])
    return bytes(data)


def resealed(raw, packed):
    """A file with a right checksum over these raw bytes."""
    body = (
        lzma.compress(raw, lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=t.LZMA_FILTERS)
        if packed
        else raw
    )
    return t.MAGIC + hashlib.sha256(body).digest() + body


def peak(function):
    """(what it raised or returned, the largest allocation meanwhile in bytes; torch's own are counted by the caller's bound)."""
    tracemalloc.start()
    try:
        found = function()
    except Exception as why:
        found = why
    size = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found, size


@pytest.fixture(scope="module")
def whole():
    """A Config, an artifact of it, and a checkpoint."""
    c = config(RUN_ID="fuzz")
    model = random_model(c)
    run = t.Run(c)
    tensors = t.TrainingState(c, run.ranks, model).tensors(3, 1.0)
    parts = t.seal({"settings": run.log.settings}, {n: x.detach() for n, x in tensors.items()})
    return c, t.GptqLite(c, model.state_dict()).pack(0.0)[0], b"".join(bytes(p) for p in parts)


def load_artifact(path):
    env = {
        name: value
        for name, value in TINY.items()
        if name not in (*t.MODEL_SETTINGS, "TRAIN_BATCH_TOKENS")
    }  # those are the file's
    c, state = t.read_artifact(t.load_config({**env, "LOAD_ARTIFACT": str(path)}))
    t.load_state(t.GPT(c), state, f"LOAD_ARTIFACT={path}")


def load_checkpoint(folder):
    """What RESUME=1 does with the checkpoint in a folder."""
    c = config(RUN_ID="fuzz")
    run, model = t.Run(c), t.GPT(c)
    run.store.folder, run.log.settings = folder, json.loads(json.dumps(run.log.settings))
    return t.TrainingState(c, run.ranks, model).resume(run)


def test_mutated_artifacts_are_refused_in_words(whole, tmp_path):
    _, artifact, _ = whole
    path, rng = tmp_path / "a.ptz", random.Random(1)
    path.write_bytes(artifact)
    nothing, honest = peak(lambda: load_artifact(path))
    assert nothing is None
    for k in range(MUTATIONS // 3):
        data = mutate(artifact, rng)
        if data == artifact:
            continue
        path.write_bytes(data)
        error, size = peak(lambda: load_artifact(path))
        assert (
            isinstance(error, t.BadInput) and str(path) in str(error) and "\n" not in str(error)
        ), (k, error)
        assert size <= 2 * honest + 2**16, (k, size, honest)


def test_mutations_under_a_right_checksum_are_refused_or_are_an_artifact(whole, tmp_path):
    """The content of the LZMA is changed and sealed again. What passes must be other weights of the same shapes, nothing else."""
    _, artifact, _ = whole
    raw, path, rng = lzma.decompress(artifact[40:]), tmp_path / "a.ptz", random.Random(2)
    path.write_bytes(artifact)
    honest, start = peak(lambda: load_artifact(path))[1], 4 + int.from_bytes(raw[:4], "little")
    for k in range(300):
        head = mutate(raw[:start], rng) + raw[start:]
        path.write_bytes(resealed(head, True))
        error, size = peak(lambda: load_artifact(path))
        assert error is None or isinstance(error, t.BadInput), (k, error)
        assert size <= 2 * honest + 2**16, (k, size, honest)
        if error is None:
            changed, header = (
                json.loads(x[4 : 4 + int.from_bytes(x[:4], "little")]) for x in (head, raw)
            )
            assert [row[1:] for row in changed["tensors"]] == [row[1:] for row in header["tensors"]]


def test_mutated_checkpoints_are_refused_in_words(whole, tmp_path):
    c, _, checkpoint = whole
    path, rng = tmp_path / "checkpoint.000000003.ckpt", random.Random(3)
    path.write_bytes(checkpoint)
    counters, honest = peak(lambda: load_checkpoint(tmp_path))
    assert counters == (3, 1)
    for k in range(MUTATIONS // 9):
        data = mutate(checkpoint, rng)
        if data == checkpoint:
            continue
        path.write_bytes(data)
        error, size = peak(lambda: load_checkpoint(tmp_path))
        assert isinstance(error, t.BadInput) and "no checkpoint of it is whole" in str(error), (
            k,
            error,
        )
        assert size <= 2 * honest + 2**16, (k, size, honest)
    for k in range(
        2 * MUTATIONS // 9
    ):  # most of them in the header, which says how the rest is read
        raw = bytearray(checkpoint[40:])
        start = 4 + int.from_bytes(raw[:4], "little")
        path.write_bytes(resealed(mutate(bytes(raw[:start]), rng) + bytes(raw[start:]), False))
        error, size = peak(lambda: load_checkpoint(tmp_path))
        assert isinstance(error, t.BadInput) or error == counters, (k, error)
        assert size <= 2 * honest + 2**16, (k, size, honest)


def test_mutated_shards_are_refused_in_words(tmp_path):
    """Damage that a shard can show: its header, its size, ids outside the vocabulary. Other ids are other text."""
    path, rng = tmp_path / "fineweb_val_000000.bin", random.Random(4)
    write_shard(path, np.arange(3000) % 384)
    whole, refused = path.read_bytes(), 0
    for k in range(MUTATIONS // 3):
        data = mutate(whole[:12] if rng.random() < 0.3 else whole, rng)
        data = data + whole[12:] if len(data) < 200 else data
        path.write_bytes(data)
        found, size = peak(lambda: t.open_shard(path, 384, True))
        if isinstance(found, t.BadInput):
            refused += 1
            assert str(path) in str(found)
        else:
            tokens = np.frombuffer(data[1024:], "<u2")
            assert (
                len(data) == len(whole)
                and data[:12] == whole[:12]
                and tokens.max() < 384
                and (found == tokens).all()
            ), (k, found)
        assert size < 2**17
    assert refused > MUTATIONS / 6


@pytest.mark.slow
def test_every_single_bit_of_an_artifact_is_guarded(whole):
    _, artifact, _ = whole
    data = bytearray(artifact)
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        try:
            t.unpack(bytes(data) if bit < 64 else data)
        except Exception:
            pass
        else:
            pytest.fail(f"bit {bit} can be flipped")
        data[bit // 8] ^= 1 << bit % 8
    assert t.unpack(data)[1] == t.unpack(artifact)[1]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4),
    max_leaves=12,
)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    header=st.fixed_dictionaries(
        {},
        optional=dict(
            model=JSON
            | st.fixed_dictionaries(
                {},
                optional=dict(
                    NUM_LAYERS=st.integers(-1, 10**6) | JSON,
                    MODEL_DIM=st.integers(-1, 2**40) | JSON,
                    VE_LAYERS=JSON,
                ),
            ),
            quantisation=JSON,
            tensors=JSON
            | st.lists(
                st.tuples(
                    st.text(max_size=8) | st.just("tok_emb.weight"),
                    st.sampled_from(["int8", "float16", "float32"]) | JSON,
                    st.lists(st.integers(-3, 2**62), max_size=4) | JSON,
                ),
                max_size=4,
            ),
        ),
    ),
    size=st.integers(-5, 5),
    payload=st.binary(max_size=64),
)
def test_any_header_gives_a_clean_error(header, size, payload, tmp_path):
    text = json.dumps(header).encode()
    path = tmp_path / "a.ptz"
    path.write_bytes(
        resealed(max(0, len(text) + size).to_bytes(4, "little") + text + payload, True)
    )
    error, memory = peak(lambda: load_artifact(path))
    assert isinstance(error, t.BadInput) and memory < DICTIONARY + 2**21, (header, error, memory)


def test_a_bomb_is_not_unpacked(tmp_path):
    """39 kB of LZMA that would become 268 MB."""
    path, packer = tmp_path / "bomb.ptz", lzma.LZMACompressor(lzma.FORMAT_XZ, lzma.CHECK_NONE)
    body = b"".join([packer.compress(bytes(2**24)) for _ in range(16)] + [packer.flush()])
    path.write_bytes(t.MAGIC + hashlib.sha256(body).digest() + body)
    assert len(body) < 2**16
    error, size = peak(lambda: load_artifact(path))
    assert (
        isinstance(error, t.BadInput)
        and "grows over 64 times" in str(error)
        and size < 2 * 2**25 + DICTIONARY + 2**20
    )


def test_small_files_of_large_tensors_are_refused(whole, tmp_path):
    """Steps that would make an outer product, codes of more levels than they hold, and the lineage's format with one number many times."""
    path, n = tmp_path / "a.ptz", 60_000
    steps = {name: torch.zeros(n, dtype=torch.int8) for name in ("rows", "columns")}
    coded = dict(
        codes=torch.zeros(100, dtype=torch.uint8),
        spreads=torch.zeros(2 * n, dtype=torch.int8),
        table=torch.zeros(64, 1023, dtype=torch.int16),
    )
    for more, words in (
        (dict(levels=torch.zeros(9, dtype=torch.int8)), "split"),
        (coded, "more levels than codes of this size may claim"),
    ):
        path.write_bytes(
            b"".join(
                bytes(x)
                for x in t.seal(
                    {"model": {}, "step": 1.0, "matrices": [["a", [n, n]]]},
                    {**steps, **more},
                    lambda raw: lzma.compress(raw, lzma.FORMAT_XZ, lzma.CHECK_NONE),
                )
            )
        )
        before = int(Path("/proc/self/statm").read_text().split()[1])
        assert isinstance(peak(lambda: load_artifact(path))[0], t.BadInput)
        with pytest.raises((RuntimeError, ValueError), match=words):
            t.unpack(path.read_bytes())
        assert (int(Path("/proc/self/statm").read_text().split()[1]) - before) * os.sysconf(
            "SC_PAGE_SIZE"
        ) < 2**27
    buffer = io.BytesIO()
    torch.save({"w": {"a": torch.zeros(1).expand(10**9)}, "m": {}}, buffer)
    path.write_bytes(lzma.compress(buffer.getvalue()))
    error, size = peak(lambda: load_artifact(path))
    assert isinstance(error, t.BadInput) and "a tensor overlaps itself" in str(error)


def test_an_artifact_of_a_large_and_empty_table_can_be_read_back():
    c = config(BIGRAM_VOCAB_SIZE="1000000")
    artifact = t.GptqLite(c, t.GPT(c).state_dict()).pack(0.0)[0]
    assert len(artifact) < 100_000 and t.unpack(artifact)[0]["bigram.embed.weight"].shape == (
        1_000_000,
        8,
    )


def test_sizes_that_a_file_only_claims_are_not_allocated(whole, tmp_path):
    """An honest checksum over a header that claims a model of terabytes."""
    _, artifact, _ = whole
    raw = lzma.decompress(artifact[40:])
    start = 4 + int.from_bytes(raw[:4], "little")
    header = json.loads(raw[4:start])
    header["model"] |= {"MODEL_DIM": 65536, "NUM_LAYERS": 50, "NUM_HEADS": 512, "NUM_KV_HEADS": 256}
    text, path = json.dumps(header).encode(), tmp_path / "a.ptz"
    path.write_bytes(resealed(len(text).to_bytes(4, "little") + text + raw[start:], True))
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    error, size = peak(lambda: load_artifact(path))
    after = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert (
        isinstance(error, t.BadInput)
        and "does not fit" in str(error)
        and size < 2**24
        and after - before < 2**28
    )
    assert math.isfinite(torch.zeros(1).item())
