"""data/prepare.py: exact round trips, whole files or none, resuming, and one clear line for bad input."""

import errno
import hashlib
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import prepare
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt


def run(capsys, *argv, fetch=None):
    """(exit status, last line on stdout, stderr) of the command line."""
    capsys.readouterr()
    status = prepare.main([str(a) for a in argv], fetch)
    out, err = capsys.readouterr()
    return status, out.strip().split("\n")[-1], err.strip()


def refused(capsys, *argv, fetch=None):
    """The message, of one line or, if it is long, two, of a run that must end with exit status 2."""
    status, _, err = run(capsys, *argv, fetch=fetch)
    first, *rest = err.split("\n  ")
    assert status == 2 and first.startswith("prepare.py: ") and len(rest) < 2, (status, err)
    assert "\n" not in first and "\n" not in "".join(rest), err
    return " ".join((first, *rest))


def hashes(folder):
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def documents_of(folder, split, sp):
    """The documents of a split, decoded."""
    ids = np.concatenate(
        [
            train_gpt.open_shard(p, sp.vocab_size(), True)
            for p in sorted(folder.glob(f"fineweb_{split}_*.bin"))
        ]
    )
    assert ids[0] == sp.bos_id()
    return [
        sp.decode(d[1:].tolist()) for d in np.split(ids, np.flatnonzero(ids == sp.bos_id())[1:])
    ]


def byte_count(path, model, vocab_size=1024):
    ids = np.asarray(train_gpt.open_shard(path, vocab_size, True)).astype(np.int64)
    return int(train_gpt.ByteCounts(model, vocab_size).count(ids[:-1], ids[1:]).sum())


# ------------------------------------------------------------------------------------------------------------------ demo


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library: 30 real modules, and files that must not be taken."""
    root, real = tmp_path / "lib", Path(prepare.sysconfig.get_paths()["stdlib"])
    (root / "test").mkdir(parents=True)
    for path in sorted(real.glob("[a-d]*.py"))[:30]:
        (root / path.name).write_bytes(path.read_bytes())
    (root / "test" / "test_x.py").write_text("excluded = 1\n" * 500)
    (root / "latin.py").write_bytes(b"# caf\xe9\n" * 500)
    (root / "empty.py").touch()
    monkeypatch.setattr(prepare.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    monkeypatch.setattr(prepare, "DEMO_VAL", 30_000)
    return root


def test_demo_is_deterministic_lossless_and_kept(tmp_path, library, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    status, line, _ = run(capsys, "demo", "--out", one)
    assert status == 0 and "tokens" in line and "documents" in line and "bytes a token" in line
    assert run(capsys, "demo", "--out", two)[0] == 0
    assert hashes(one) == hashes(two)
    assert not list(tmp_path.rglob("*.part"))

    model, folder = one / "tokenizers" / "demo_1024_bpe.model", one / "datasets" / "demo_sp1024"
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert [sp.id_to_piece(i) for i in range(5)] == [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        "<0x00>",
    ] and sp.vocab_size() == 1024
    texts = {p.read_text() for p in library.glob("*.py") if p.name not in ("latin.py", "empty.py")}
    train, val = (documents_of(folder, split, sp) for split in ("train", "val"))
    assert set(train) | set(val) == texts and not set(train) & set(val)
    assert (
        byte_count(folder / "fineweb_val_000000.bin", model)
        == sum(len(t.encode()) for t in val)
        >= 30_000
    )

    before = hashes(one)
    (library / "new.py").write_text(
        "x = 1\n" * 100
    )  # a finished demo outlives an upgrade of Python
    assert "nothing to do" in run(capsys, "demo", "--out", one)[1] and hashes(one) == before
    assert "wrote" in run(capsys, "demo", "--out", one, "--force")[1] and hashes(one) != before


# ---------------------------------------------------------------------------------------------------------------- shards


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65535), max_size=20), min_size=1, max_size=8))
def test_shard_round_trip(tmp_path_factory, arrays):
    path, flat = (
        tmp_path_factory.mktemp("s") / "fineweb_val_000000.bin",
        [i for ids in arrays for i in ids],
    )
    if not flat:
        with pytest.raises(prepare.BadInput):
            prepare.write_shard(path, [np.array([], np.uint16)])
        assert not any(path.parent.iterdir())
        return
    assert (
        prepare.write_shard(path, [np.array(ids, np.uint16) for ids in arrays])
        == len(flat)
        == prepare.check_shard(path)
    )
    assert train_gpt.open_shard(path, 65536, True).tolist() == flat
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(prepare.BadInput, match="header says"):
        prepare.check_shard(path)


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.bin"
    prepare.write_shard(path, [[1, 2]])
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), None)

    monkeypatch.setattr(prepare.os, "fsync", full)
    with pytest.raises(OSError):
        prepare.write_shard(path, [[3] * 100])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.bin"]


@pytest.fixture(scope="module")
def model():
    """A small lossless tokenizer."""
    text = "the cat sat on the mat; a dog ran to the house.\n\tif x == 1:\n        return y\n" * 40
    return prepare.train_tokenizer([text], len(text), 320)


@pytest.mark.parametrize("dummy_prefix", [True, False])
@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\ta"), min_size=1),
        max_size=4,
    )
)
def test_every_text_is_encoded_exactly(model, dummy_prefix, texts, tmp_path_factory):
    """Also texts cut into parts; only U+2581 and no-prefix texts that start with a space may differ in what is counted."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    proto.normalizer_spec.add_dummy_prefix = dummy_prefix
    sp = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    old, prepare.PART = prepare.PART, 5
    try:
        found = list(prepare.encode(sp, texts))
    finally:
        prepare.PART = old
    for text, (ids, size, changed) in zip(texts, found, strict=True):
        said = text.replace("\u2581", " ")
        assert (
            sp.decode(ids[1:].tolist()) == said
            and size == len(said.encode())
            and changed == ("\u2581" in text)
        )


# -------------------------------------------------------------------------------------------------------------- fineweb


class Hub:
    """Stands in for the hub: repo path -> bytes, written where they are asked for. fail: a path that breaks off half-way."""

    def __init__(self, tmp_path, monkeypatch, shards=3, pieces=1024, model=None):
        """model: the tokenizer; without one a stand-in for the official one."""

        def shard(seed):
            path = tmp_path / "made.bin"
            ids = np.random.default_rng(seed).integers(4, pieces, 500)
            prepare.write_shard(path, [[1], ids, [1, 7 + seed]])
            return path.read_bytes()

        tokenizer = model or os.urandom(prepare.TOKENIZER_BYTES)
        if not model:
            digest = hashlib.sha256(tokenizer).hexdigest()
            monkeypatch.setattr(prepare, "TOKENIZER_SHA256", digest[:8])
        name = f"fineweb10B_sp{pieces}"
        model_path = f"tokenizers/fineweb_{pieces}_bpe.model"
        self.manifest = {
            "datasets": [
                {
                    "name": name,
                    "tokenizer_name": "sp",
                    "stats": {"files_train": shards, "files_val": 1},
                }
            ],
            "tokenizers": [{"name": "sp", "model_path": model_path}],
        }
        self.files = {
            f"datasets/datasets/{name}/fineweb_{s}_{i:06d}.bin": shard(i + 100 * (s == "val"))
            for s, n in (("train", shards), ("val", 1))
            for i in range(n)
        } | {f"datasets/{model_path}": tokenizer}
        self.fail, self.fetched = None, []

    def __call__(self, repo_path, folder):
        data = (
            json.dumps(self.manifest).encode()
            if repo_path.endswith("manifest.json")
            else self.files[repo_path]
        )
        path = folder / repo_path
        path.parent.mkdir(parents=True, exist_ok=True)
        if repo_path == self.fail:
            path.write_bytes(data[: len(data) // 2])
            raise KeyboardInterrupt
        path.write_bytes(data)
        self.fetched.append(repo_path)
        return path


def test_fineweb_is_fetched_once_and_resumed(tmp_path, monkeypatch, capsys):
    hub, out = Hub(tmp_path, monkeypatch), tmp_path / "data"
    folder = out / "datasets" / prepare.DATASET
    hub.fail = f"datasets/datasets/{prepare.DATASET}/fineweb_train_000001.bin"
    assert run(capsys, "fineweb", "--train-shards", 2, "--out", out, fetch=hub)[0] == 130
    assert sorted(p.name for p in folder.iterdir()) == [
        "fineweb_train_000000.bin",
        "fineweb_val_000000.bin",
    ]
    for path in folder.iterdir():
        prepare.check_shard(path)

    hub.fail, hub.fetched = None, []
    status, line, _ = run(capsys, "fineweb", "--train-shards", 2, "--out", out, fetch=hub)
    assert status == 0 and line.endswith("wrote 1 files, 503 tokens, 2 documents; 3 were there")
    assert [Path(p).name for p in hub.fetched] == ["manifest.json", "fineweb_train_000001.bin"]
    assert not (out / "datasets" / ".fetch").exists()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        Path(n).name: b
        for n, b in hub.files.items()
        if "/fineweb_" in n and "_000002" not in n and n.endswith(".bin")
    }
    (folder / "fineweb_train_000000.bin").write_bytes(b"damaged")  # is fetched again
    assert (
        "wrote 1 files" in run(capsys, "fineweb", "--train-shards", 2, "--out", out, fetch=hub)[1]
    )


def test_fineweb_refuses_what_is_not_official(tmp_path, monkeypatch, capsys):
    hub, out = Hub(tmp_path, monkeypatch), tmp_path / "data"
    command = ("fineweb", "--train-shards", 1, "--out", out)
    assert "the manifest offers 3" in refused(
        capsys, "fineweb", "--train-shards", 4, "--out", out, fetch=hub
    )
    shard, tokenizer = (
        f"datasets/datasets/{prepare.DATASET}/fineweb_train_000000.bin",
        "datasets/tokenizers/" + prepare.TOKENIZER,
    )
    whole = dict(hub.files)
    for name, data, words in (
        (tokenizer, b"x" * 253847, "decodes the official shards to garbage"),
        (tokenizer, b"x" * 254483, "the official tokenizer has 254483 and sha256"),
        (shard, whole[shard][:-2], "its header says 503 tokens, which take 2030"),
        (shard, b"\0" + whole[shard][1:], "without a shard's header"),
        (shard, b"", "without a shard's header"),
    ):
        hub.files = whole | {name: data}
        assert words in refused(capsys, *command, fetch=hub)
        assert (
            not (out / name.removeprefix("datasets/")).exists()
            and not (out / "datasets" / ".fetch" / name).exists()
        )
    hub.files = whole
    assert run(capsys, *command, fetch=hub)[0] == 0
    for damage in (
        lambda m: m["datasets"][0].pop("name"),
        lambda m: m.pop("datasets"),
        lambda m: m.update(datasets=7),
    ):
        damage(hub.manifest)
        assert "manifest.json: no complete entry" in refused(capsys, *command, fetch=hub)


def sp320(tmp_path, monkeypatch, model):
    """(stand-in hub, folder, command) of a data set of 320 pieces."""
    out = tmp_path / "data"
    command = ("fineweb", "--variant", "sp320", "--repo", "me/x", "--out", out, "--train-shards", 2)
    return Hub(tmp_path, monkeypatch, pieces=320, model=model), out, command


def test_fineweb_with_another_vocabulary(tmp_path, monkeypatch, capsys, model):
    hub, out, command = sp320(tmp_path, monkeypatch, model)
    hub.manifest["datasets"][0]["stats"]["tokens_val"] = 503
    folder, tokenizer = out / "datasets/fineweb10B_sp320", out / "tokenizers/fineweb_320_bpe.model"
    hub.fail = "datasets/datasets/fineweb10B_sp320/fineweb_train_000001.bin"
    assert run(capsys, *command, fetch=hub)[0] == 130
    hub.fail, hub.fetched = None, []
    capsys.readouterr()
    assert prepare.main([str(word) for word in command], hub) == 0
    said = capsys.readouterr().out.strip().split("\n")
    assert said[-1] == "fineweb10B_sp320: wrote 1 files, 503 tokens, 2 documents; 3 were there"
    assert [Path(p).name for p in hub.fetched] == ["manifest.json", "fineweb_train_000001.bin"]
    assert tokenizer.read_bytes() == model
    names = {path.name for path in folder.iterdir()}
    assert {name for name in names if name.endswith(".bin")} == {
        "fineweb_train_000000.bin",
        "fineweb_train_000001.bin",
        "fineweb_val_000000.bin",
    }
    # what it says is what training takes
    given = dict(word.split("=") for word in said[-2].removeprefix("to train with: ").split())
    c = train_gpt.load_config({**given, "EVAL_SEQ_LEN": "64", "TRAIN_SEQ_LEN": "64"})
    assert train_gpt.ValData(c, train_gpt.Ranks(c)).n == 448


@pytest.mark.parametrize("text", ["sp", "sp0", "sp260", "sp65537", "byte260", "SP4096", "4096"])
def test_an_unknown_variant_is_refused_before_anything_is_fetched(text, capsys):
    assert f"{text}: allowed are sp261 to sp65536, such as sp4096" in refused(
        capsys, "fineweb", "--variant", text
    )


def test_what_is_not_of_the_variant_is_refused(tmp_path, monkeypatch, capsys, model):
    hub, out, command = sp320(tmp_path, monkeypatch, model)
    folder, tokenizer = out / "datasets/fineweb10B_sp320", out / "tokenizers/fineweb_320_bpe.model"
    other = [word if word != "sp320" else "sp8192" for word in command]
    assert "no fineweb10B_sp8192 there; it has fineweb10B_sp320." in refused(
        capsys, *other, fetch=hub
    )
    assert [Path(p).name for p in hub.fetched] == ["manifest.json"]
    whole = dict(hub.files)
    for name, data, words in (
        ("tokenizers/fineweb_320_bpe.model", b"x", "not a SentencePiece model"),
        (
            "tokenizers/fineweb_320_bpe.model",
            prepare.train_tokenizer(["a b c d " * 999], 8000, 265),
            "265 pieces, BOS id 1; sp320 has 320 and 1",
        ),
        (
            "datasets/fineweb10B_sp320/fineweb_val_000000.bin",
            Hub(tmp_path, monkeypatch).files[
                "datasets/datasets/fineweb10B_sp1024/fineweb_val_000000.bin"
            ],
            "a vocabulary of 320 ends at 319",
        ),
    ):
        hub.files = whole | {f"datasets/{name}": data}
        assert words in refused(capsys, *command, fetch=hub)
        assert not (out / name).exists()
    hub.files = whole
    stats = hub.manifest["datasets"][0]["stats"]
    stats["tokens_val"] = 504
    assert "503 validation tokens, 504 in the manifest" in refused(capsys, *command, fetch=hub)
    del stats["tokens_val"]
    assert run(capsys, *command, fetch=hub)[0] == 0

    another = [word if word != "me/x" else "you/y" for word in command]
    assert "the shards in" in refused(capsys, *another, fetch=hub)
    folder.rename(tmp_path / "moved")
    assert f"{tokenizer}: is there, and is not known" in refused(capsys, *another, fetch=hub)
    tokenizer.unlink()
    assert run(capsys, *another, fetch=hub)[0] == 0
    hub.manifest["tokenizers"] = []
    assert "no complete entry for fineweb10B_sp320 (KeyError 'model_path')" in refused(
        capsys, *another, fetch=hub
    )


def test_a_vocabulary_of_65536_is_trained_and_scored(tmp_path, monkeypatch, capsys, model):
    from conftest import TINY
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for i in range(65536 - len(proto.pieces)):
        proto.pieces.add(piece=f"q{i}", score=-1e6 - i)
    hub = Hub(tmp_path, monkeypatch, pieces=65536, model=proto.SerializeToString())
    ids = [1, 65535, *range(4, 200), 65535]
    for name in hub.files:
        if "/fineweb_" in name and name.endswith(".bin"):
            prepare.write_shard(tmp_path / "made.bin", [ids])
            hub.files[name] = (tmp_path / "made.bin").read_bytes()
    prepare.write_shard(tmp_path / "made.bin", [[1, 65535, *range(199, 3, -1), 65534]])
    val = "datasets/datasets/fineweb10B_sp65536/fineweb_val_000000.bin"
    hub.files[val] = (tmp_path / "made.bin").read_bytes()
    command = ("fineweb", "--variant", "sp65536", "--train-shards", 1, "--out", tmp_path / "data")
    assert run(capsys, *command, fetch=hub)[0] == 0
    monkeypatch.chdir(tmp_path)
    c = train_gpt.load_config(
        {
            **TINY,
            "DATA_PATH": "data/datasets/fineweb10B_sp65536",
            "TOKENIZER_PATH": "data/tokenizers/fineweb_65536_bpe.model",
            "VOCAB_SIZE": "65536",
            "ITERATIONS": "1",
            "VAL_LOSS_EVERY": "0",
            "LATE_QAT": "0",
            "EVALS": "ttt_slot",
            "RUN_ID": "wide",
        }
    )
    train_gpt.run_all(c)
    assert "final_artifact_ttt_slot" in Path("logs/wide.txt").read_text()


def test_hub_errors_are_one_line(tmp_path, monkeypatch, capsys):
    def offline(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setitem(
        sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=offline)
    )
    assert "ConnectionError: no route to the hub" in refused(capsys, "fineweb", "--out", tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refused(capsys, "fineweb", "--out", tmp_path)


# ------------------------------------------------------------------------------------------------------------------ text


@pytest.fixture
def corpus(tmp_path):
    """200 documents in a .jsonl file, and two .txt files in a folder."""
    rng = np.random.default_rng(0)
    words = [
        "the",
        "a",
        "cat",
        "dog",
        "house",
        "tree\tif",
        "else:",
        "\n",
        "return",
        "",
        "naïve",
        "日本",
        "x",
        "=",
        "1",
        "(",
        ")",
    ]
    texts = [" ".join(rng.choice(words, 60)) + f" {i}" for i in range(200)]
    lines = [json.dumps(t if i % 2 else {"text": t, "id": i}) for i, t in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "more" / "deep").mkdir(parents=True)
    for i, name in enumerate(("one.txt", "deep/two.txt")):
        texts.append(f"file {i}\r\n" + "line of text\n" * 30)
        (tmp_path / "more" / name).write_bytes(texts[-1].encode())
    return tmp_path, texts


def test_text_shards_and_resume(corpus, capsys, monkeypatch):
    root, texts = corpus
    command = [
        "text",
        root / "a.jsonl",
        root / "more",
        "--name",
        "mine",
        "--vocab-size",
        320,
        "--val-fraction",
        0.2,
        "--shard-tokens",
        3000,
        "--out",
    ]
    assert run(capsys, *command, root / "whole")[0] == 0
    folder, model = (
        root / "whole" / "datasets" / "mine",
        root / "whole" / "tokenizers" / "mine.model",
    )
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    train, val = (documents_of(folder, split, sp) for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts) and 20 < len(val) < 65
    assert len(list(folder.glob("fineweb_train_*.bin"))) > 2
    assert sum(byte_count(p, model, 320) for p in folder.glob("fineweb_val_*")) == sum(
        len(t.encode()) for t in val
    )
    assert "nothing to do" in run(capsys, *command, root / "whole")[1]

    write, calls = prepare.write_shard, []

    def interrupted(path, arrays):
        calls.append(path.name)
        if len(calls) == 4:
            next(iter(arrays))
            raise KeyboardInterrupt
        return write(path, arrays)

    monkeypatch.setattr(prepare, "write_shard", interrupted)
    assert run(capsys, *command, root / "part")[0] == 130
    assert not (root / "part" / "datasets" / "mine").exists()
    assert run(capsys, *command, root / "part")[0] == 0
    assert calls[4] == calls[3] != calls[0]  # goes on where it stopped
    assert hashes(root / "part") == hashes(root / "whole")


def test_text_options(corpus, capsys):
    root, texts = corpus
    command = ["text", root / "a.jsonl", "--name", "v", "--out", root / "out", "--vocab-size", 320]
    assert run(capsys, *command, "--val", root / "more", "--max-tokens", 1000)[0] == 0
    folder, model = root / "out" / "datasets" / "v", root / "out" / "tokenizers" / "v.model"
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert sorted(documents_of(folder, "val", sp)) == sorted(texts[200:])
    assert (
        prepare.check_shard(folder / "fineweb_train_000000.bin") == 1000
        and len(list(folder.glob("*train*"))) == 1
    )

    before = hashes(root / "out")
    assert "--force replaces it" in refused(capsys, *command)  # other settings, same name
    assert "in --val and in the training text" in refused(
        capsys, *command, "--val", root / "a.jsonl"
    )
    assert hashes(root / "out") == before
    assert run(capsys, *command, "--force")[0] == 0 and hashes(root / "out") != before
    assert (
        run(
            capsys,
            "text",
            root / "a.jsonl",
            "--name",
            "w",
            "--out",
            root / "out",
            "--tokenizer",
            model,
        )[0]
        == 0
    )
    assert not (root / "out" / "tokenizers" / "w.model").exists() and model.is_file()


def test_text_with_zstandard(corpus, capsys, monkeypatch):
    root, texts = corpus
    packed, command = (
        root / "b.jsonl.zst",
        ["text", root / "b.jsonl.zst", "--name", "z", "--out", root / "out", "--vocab-size", 320],
    )
    packed.write_bytes(b"no frame")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "pip install zstandard; or unpack it with zstd -d" in refused(capsys, *command)
    monkeypatch.undo()
    zstandard = pytest.importorskip("zstandard")
    assert "b.jsonl.zst" in refused(capsys, *command)
    packed.write_bytes(zstandard.ZstdCompressor().compress((root / "a.jsonl").read_bytes()))
    assert run(capsys, *command, "--val-fraction", 0.1)[0] == 0


@pytest.mark.parametrize(
    "line,words",
    [
        ('{"text": "half', "bad.jsonl, line 2: "),
        ('{"body": "x"}', "line 2: neither a string nor an object"),
        ("[1]", "line 2: neither"),
        ('{"text": 5}', "line 2: neither"),
        ('"\\ud800"', "line 2: 'utf-8' codec can't encode"),
    ],
)
def test_bad_json_line(tmp_path, capsys, line, words):
    (tmp_path / "bad.jsonl").write_text('"good"\n' + line + '\n"good"\n')
    assert words in refused(
        capsys, "text", tmp_path / "bad.jsonl", "--name", "n", "--out", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists() or not hashes(tmp_path / "out")


def test_bad_input(tmp_path, capsys, model):
    out = ("--name", "n", "--out", tmp_path / "out")
    for name, data in (
        ("a.txt", b"some text " * 500),
        ("bad.txt", b"caf\xe9"),
        ("empty.txt", b""),
        ("a.csv", b"x"),
        ("a.model", model),
    ):
        (tmp_path / name).write_bytes(data)
    good = tmp_path / "a.txt"
    assert "no such file or folder" in refused(capsys, "text", tmp_path / "none.txt", *out)
    assert "no .txt, .py, .jsonl" in refused(capsys, "text", tmp_path / "a.csv", *out)
    assert "bad.txt: 'utf-8' codec" in refused(capsys, "text", tmp_path / "bad.txt", *out)
    assert "give more text" in refused(capsys, "text", tmp_path / "empty.txt", "--val", good, *out)
    assert "no such tokenizer" in refused(
        capsys, "text", good, "--tokenizer", tmp_path / "no.model", *out
    )
    assert "not a SentencePiece model" in refused(
        capsys, "text", good, "--tokenizer", tmp_path / "a.csv", *out
    )
    assert "no document for this split" in refused(
        capsys, "text", good, "--tokenizer", tmp_path / "a.model", *out
    )
    assert "--name" in refused(capsys, "text", good, "--name", "../x", "--out", tmp_path / "out")
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, "demo", "--out", tmp_path / "file")
    for size in ("65537", "many", "-1"):
        told = refused(capsys, "text", good, "--name", "n", "--vocab-size", size)
        assert f"{size}: allowed are 261 to 65536" in told


def test_large_tokenizer_is_refused(tmp_path, model):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for i in range(65537 - len(proto.pieces)):
        proto.pieces.add(piece=f"q{i}", score=-1e6 - i)
    (tmp_path / "big.model").write_bytes(proto.SerializeToString())
    with pytest.raises(prepare.BadInput, match="65537 pieces"):
        prepare.load_tokenizer(tmp_path / "big.model")
