"""Shards, the loader's order, and the byte counts, on the tiny data set and, where it is at hand, on the official tokenizer."""

import numpy as np
import pytest
import sentencepiece
from conftest import PARITY, config, t, write_shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def loader(tiny_data, **changes):
    c = config(tiny_data, **changes)
    return t.TrainData(c, t.Ranks(c))


def test_an_epoch_serves_every_sequence_once_and_never_the_held_out_text(tiny_data, monkeypatch):
    data = loader(tiny_data)
    whole, names = [np.array(s) for s in data.shards], [s.filename for s in data.shards]
    read, reads = np.fromfile, []
    monkeypatch.setattr(
        np,
        "fromfile",
        lambda path, dtype, count, offset: (
            reads.append((names.index(path), offset // 2 - 512))
            or read(path, dtype, count, offset=offset)
        ),
    )
    n = sum(data.counts)
    for epoch in range(2):
        reads.clear()
        rows = [data.sequence(i) for i in range(epoch * n, (epoch + 1) * n)]
        starts = list(reads)
        assert len(set(starts)) == n and all(
            (row == whole[k][s : s + data.T + 1]).all() for row, (k, s) in zip(rows, starts)
        )
        for k, shard in enumerate(whole):
            mine = sorted(s for base, s in starts if base == k)
            assert np.diff(mine).min() >= data.T and mine[-1] + data.T < len(shard)
    monkeypatch.undo()
    assert len(data.held_out) % data.T == 1 and any(
        (np.array(s)[-len(data.held_out) :] == data.held_out).all()
        for s in t.open_split(data.c, "train")
    )


@pytest.fixture
def many_shards(tiny_data, tmp_path):
    """Settings of a data set of 40 training shards of 41 sequences or so, the last ones shorter."""
    for k in range(40):
        n = 42 * 32 + 2 if k < 36 else 20 * 32
        write_shard(tmp_path / f"fineweb_train_{k:06}.bin", np.arange(n) % 300 + 4)
    return {**tiny_data, "DATA_PATH": str(tmp_path), "DATA_ORDER": "shards", "EVALS": "none"}


def plain_draws(counts, size, steps, seed):
    """(epoch, shard, how many before) of every sequence of the first steps, one after the other, by the rule in words."""
    left, epoch, rows = list(counts), 0, []
    for step in range(steps):
        rng = np.random.default_rng((seed, step, 2))
        power = 0.9 - 0.4 * min(step, 1800) / 1800
        wanted = size
        while wanted > 0:
            if sum(left) == 0:
                left, epoch = list(counts), epoch + 1
            chances = np.array([float(x) ** power for x in left])
            n = min(8 + round(24 * min(step, 1800) / 1800), sum(x > 0 for x in left), wanted)
            chosen = rng.choice(len(left), n, replace=False, p=chances / chances.sum())
            more = rng.multinomial(wanted - n, chances[chosen] / chances[chosen].sum())
            for k, extra in zip(chosen, more):
                for _ in range(min(1 + extra, left[k])):
                    rows.append((epoch, k, counts[k] - left[k]))
                    left[k] -= 1
                    wanted -= 1
    return rows


def test_steps_draw_from_8_to_32_shards_by_what_these_have_left(many_shards):
    data = loader(many_shards, TRAIN_BATCH_TOKENS="2048")  # 64 sequences
    for step in (0, 900, 1800, 2500):  # the plain rule is slow: only the number of shards, later
        shards = {row[1] for row in data.draws.of_step(step)}
        assert len(shards) >= min(32, 8 + round(24 * step / 1800))
    counts, steps = data.counts, 60  # more than two epochs
    expected = np.array(plain_draws(counts, 64, steps, data.c.seed))
    found = np.concatenate([data.draws.of_step(s) for s in range(steps)])
    assert (found == expected).all() and found[-1, 0] >= 2
    assert len(set(found[:64, 1].tolist())) == 8


def test_an_epoch_over_many_shards_serves_every_sequence_once(many_shards):
    data, places = loader(many_shards), []
    data.read = lambda shard, start: places.append((shard, start))
    n = sum(data.counts)
    for epoch in range(3):
        places.clear()
        for i in range(epoch * n, (epoch + 1) * n):
            data.sequence(i)
        assert len(set(places)) == n
        for k, count in enumerate(data.counts):
            starts = sorted(start for shard, start in places if shard == k)
            assert len(starts) == count and set(np.diff(starts)) == {data.T}
            assert starts[-1] + data.T < len(data.shards[k])


def test_drawn_sequences_are_the_same_from_any_step(many_shards):
    whole, later = loader(many_shards), loader(many_shards)
    rows = [whole.load(step) for step in range(30)]
    assert all((later.load(step) == rows[step]).all() for step in (17, 18, 29, 3))
    assert not (loader(many_shards, SEED="2").load(17) == rows[17]).all()


@pytest.mark.parametrize("order", ["shuffled", "coprime"])
def test_an_epoch_goes_through_all_shards_at_once(order, tiny_data):
    """Shards of different text: every part of an epoch has of each what it has in the whole."""
    data = loader(tiny_data, DATA_ORDER=order)
    total, shards = sum(data.counts), []
    data.read = lambda shard, start: shards.append(shard)
    for i in range(3 * total):
        data.sequence(i)
    share = data.counts[1] / total
    for begin in range(0, 3 * total, total // 4):
        part = shards[begin : begin + total // 4]
        assert abs(np.mean(part) - share) < 4 * (share * (1 - share) / len(part)) ** 0.5


def test_order_follows_the_seed_and_differs_between_epochs(tiny_data):
    a, same, other = (loader(tiny_data, SEED=s) for s in "112")
    n = sum(a.counts)
    first, again, third = ([d.sequence(i).tolist() for i in range(20)] for d in (a, same, other))
    assert first == again != third and first != [a.sequence(n + i).tolist() for i in range(20)]


@pytest.mark.parametrize("order", ["shuffled", "shards"])
def test_ranks_share_out_the_same_tokens(order, tiny_data):
    whole, parts = loader(tiny_data, DATA_ORDER=order), []
    for rank in range(3):
        part = loader(tiny_data, DATA_ORDER=order)
        part.ranks.rank, part.ranks.world = rank, 3
        parts.append(part.load(5))
    assert (np.concatenate(parts) == whole.load(5).numpy()).all()


def test_batches_are_inputs_and_their_next_tokens_from_any_step(tiny_data):
    data = loader(tiny_data)
    feed, later = data.batches(), data.batches(2)
    batches = [next(feed) for _ in range(3)]
    assert all((x[:, 1:] == y[:, :-1]).all() and x.shape == (12, 32) for x, y in batches)
    assert (next(later)[0] == batches[2][0]).all()


def shard_problem(path, vocab=384):
    with pytest.raises(t.BadInput) as caught:
        t.open_shard(path, vocab, True)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_damaged_shards_are_named_with_what_is_wrong(tmp_path):
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, [1, 5, 383])
    whole = path.read_bytes()
    assert t.open_shard(path, 384, True).tolist() == [1, 5, 383]
    for wrong, word in (
        (whole[:-1], "bytes"),
        (whole + b"x", "bytes"),
        (whole[:1023], "header"),
        (b"", "header"),
        (b"\0" * 4 + whole[4:], "magic"),
        (whole[:4] + b"\2" + whole[5:], "version"),
        (whole[:8] + b"\0" * 4 + whole[12:1024], "0 tokens"),
        (whole[:8] + b"\xff" * 4 + whole[12:], "-1 tokens"),
    ):
        path.write_bytes(wrong)
        assert word in shard_problem(path)
    path.write_bytes(whole)
    assert "token id 383 at position 2; VOCAB_SIZE=300 allows 0 to 299" in shard_problem(path, 300)


def test_a_later_shard_is_checked_at_the_start_too(tiny_data, tmp_path):
    for i in range(3):
        write_shard(tmp_path / f"fineweb_train_{i:06}.bin", [1] * 500)
    last = tmp_path / "fineweb_train_000002.bin"
    last.write_bytes(last.read_bytes()[:-2])
    with pytest.raises(t.BadInput, match="fineweb_train_000002.bin"):
        loader({**tiny_data, "DATA_PATH": str(tmp_path)})


def test_ids_are_checked_again_as_they_are_read(tiny_data):
    data = loader(tiny_data, VOCAB_SIZE="384")
    data.c = config(tiny_data, VOCAB_SIZE="20")
    with pytest.raises(t.BadInput, match="DATA_PATH=.*step 0: token id .* VOCAB_SIZE=20"):
        data.load(0)


@pytest.mark.parametrize(
    "changes,word",
    [
        (dict(DATA_PATH="/nowhere"), "DATA_PATH=/nowhere: no fineweb_"),
        (dict(TOKENIZER_PATH="/nowhere.model"), "TOKENIZER_PATH=/nowhere.model: no such file"),
        (dict(TOKENIZER_PATH=__file__), "not a SentencePiece model"),
        (dict(VOCAB_SIZE="385"), "has 384 pieces, VOCAB_SIZE=385"),
        (
            dict(EVAL_SEQ_LEN="1024", VAL_BATCH_SIZE="1024", TTT_CHUNK_TOKENS="1024"),
            "EVAL_SEQ_LEN=1024",
        ),
        (dict(TRAIN_SEQ_LEN="65536", TRAIN_BATCH_TOKENS="65536"), "TRAIN_SEQ_LEN=65536"),
    ],
)
def test_data_that_does_not_fit_is_refused_by_name(changes, word, tiny_data):
    c = config(tiny_data, **changes)
    with pytest.raises(t.BadInput, match=".*".join(word.split("*"))):
        t.ValData(c, t.Ranks(c)), t.TrainData(c, t.Ranks(c))


def test_documents_that_begin_with_another_token_are_not_masked(tiny_data, monkeypatch):
    monkeypatch.setattr(t, "DOCUMENT_START", 2)
    for documents in ("joined", "mask"):
        c = config(tiny_data, DOCUMENTS=documents)
        if documents == "joined":
            t.ValData(c, t.Ranks(c))
            continue
        with pytest.raises(t.BadInput, match="TOKENIZER_PATH=.*begin with token 1;.*needs 2"):
            t.ValData(c, t.Ranks(c))


def test_the_other_tokenizer_of_the_same_name_is_recognised(tmp_path):
    path = tmp_path / "fineweb_1024_bpe.model"
    path.write_bytes(b"\0" * 253847)
    with pytest.raises(t.BadInput, match="253,847 bytes is a lookalike"):
        t.ByteCounts(path, 1024)


def counted(counts, ids):
    ids = np.array(ids)
    return int(counts.count(ids[:-1], ids[1:]).sum(dtype=np.int64))


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=4))
def test_bytes_of_a_stream_are_the_bytes_of_its_text(texts, tiny_data):
    sp = sentencepiece.SentencePieceProcessor(model_file=tiny_data["TOKENIZER_PATH"])
    counts = t.ByteCounts(tiny_data["TOKENIZER_PATH"], 384)
    ids = [i for text in texts for i in [1, *sp.encode(text)]]
    assert counted(counts, [1, *ids]) == sum(
        len(sp.decode(sp.encode(text)).encode()) for text in texts
    )


@pytest.mark.skipif(
    not (PARITY / "fineweb_1024_bpe.model").exists(),
    reason="the official tokenizer is not part of the repository",
)
def test_bytes_with_the_official_tokenizer_and_text():
    path = PARITY / "fineweb_1024_bpe.model"
    sp, counts = (
        sentencepiece.SentencePieceProcessor(model_file=str(path)),
        t.ByteCounts(path, 1024),
    )
    ids = np.array(t.open_shard(PARITY / "fineweb_val_head_sp1024.bin", 1024, True)[:200_000])
    docs = np.split(ids, np.flatnonzero(ids == 1))[1:-1]
    assert counted(counts, np.concatenate([[1], *docs])) == sum(
        len(sp.decode(d[1:].tolist()).encode()) for d in docs
    )
    assert (counts.size[3], counts.size[1], counts.size[4]) == (0, 0, 1)


def test_validation_stream_is_cut_to_whole_windows_and_says_so(tiny_data):
    c = config(tiny_data)
    val = t.ValData(c, t.Ranks(c))
    assert (val.n, val.dropped, len(val.tokens), len(val.bytes)) == (
        576,
        24,
        577,
        576,
    ) and val.total_bytes == val.bytes.sum(dtype=int)
