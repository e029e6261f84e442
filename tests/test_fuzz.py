"""Damaged files, and forged ones with a valid checksum: each is refused in words, quickly, with little memory. tests/hostile_files.py forges
thousands."""

import copy
import hashlib
import io
import json
import lzma
import math
import random
import zipfile
from pathlib import Path

import hostile_files as hostile
import numpy as np
import pytest
import torch
from conftest import TINY, config, process, random_model, t, write_shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FILES = 30  # forged ones of a kind
ENV = dict(TINY, RUN_ID="fuzz", EVALS="none")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Honest files of every kind, by name, and how each is loaded."""
    return {kind.name: kind for kind in hostile.all_kinds(ENV, tmp_path_factory.mktemp("kinds"))}


KINDS = (
    "artifact, CODER=rans",
    "artifact, CODER=lzma",
    "the lineage's artifact",
    "checkpoint, RESUME=1",
    "checkpoint, LOAD_CHECKPOINT",
    "progress of an evaluation",
    "shard",
    "metrics.jsonl",
)


@pytest.mark.parametrize("name", KINDS)
def test_forged_files_are_refused_in_words_or_are_honest_others(name, kinds):
    """In a process that they cannot harm: words, memory and time are looked at there."""
    rows = [*hostile.forged(kinds[name], 7, range(FILES))]
    wrong = [row for row in rows if row[1] == "WRONG"]
    assert not wrong and len(rows) == 1 + FILES
    assert sum(row[1] == "refused" for row in rows) > FILES / 4


@pytest.mark.parametrize("name", KINDS[:2] + KINDS[3:4])
def test_without_its_checksum_no_file_is_read(name, kinds):
    data, rng = kinds[name].honest, random.Random(1)
    for _ in range(300):
        changed = hostile.mutate_bytes(data, rng)
        if changed != data:
            with pytest.raises(ValueError, match="wrong checksum"):
                t.unseal(bytearray(changed))
    kinds[name].path.write_bytes(changed)
    assert hostile.outcome(kinds[name].load)[0] == "refused"


def test_every_single_bit_of_an_artifact_is_guarded():
    c = config(NUM_LAYERS="1", MODEL_DIM="8", VE_ENABLED="0", XSA_LAST_N="0", ROPE_DIMS="2")
    artifact = t.GptqLite(c, random_model(c).state_dict()).pack(0.0)[0]
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


def test_mutated_shards_are_refused_in_words(tmp_path):
    """Damage that a shard can show: its header, its size, ids outside the vocabulary. Other ids are other text."""
    path, rng = tmp_path / "fineweb_val_000000.bin", random.Random(4)
    write_shard(path, np.arange(3000) % 384)
    whole, refused = path.read_bytes(), 0
    for k in range(600):
        data = hostile.mutate_bytes(whole[:12] if rng.random() < 0.3 else whole, rng)
        data = data + whole[12:] if len(data) < 200 else data
        path.write_bytes(data)
        try:
            found = t.open_shard(path, 384, True)
        except t.BadInput as why:
            refused += 1
            assert str(path) in str(why)
            continue
        tokens = np.frombuffer(data[1024:], "<u2")
        assert len(data) == len(whole) and data[:12] == whole[:12]
        assert tokens.max() < 384 and (found == tokens).all(), k
    assert refused > 300


# ---- one thing wrong


def sealed(kind, change):
    """Words of the refusal of a kind's honest file after change(header, tensors), or "" if it is taken."""
    packed = isinstance(kind, hostile.Artifact)
    raw = kind.raw if packed else kind.honest[40:]
    header, tensors = hostile.parts_of(raw)
    change(header, tensors)
    claims = header.pop("claims", {})
    body = hostile.body(header, tensors)
    if claims:  # what the header says of a tensor, which is as it was
        start = 4 + int.from_bytes(body[:4], "little")
        head = json.loads(body[4:start])
        head["tensors"] = [claims.get(row[0], row) for row in head["tensors"]]
        text = json.dumps(head).encode()
        body = len(text).to_bytes(4, "little") + text + body[start:]
    kind.path.write_bytes(hostile.resealed(body, packed))
    verdict, said = hostile.outcome(kind.load)
    assert verdict in ("refused", "accepted"), said
    return said


def put(path, value):
    """A change of the header: the value at keys a/b/c."""

    def change(header, tensors):
        *keys, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in keys:
            header = header[key]
        header[last] = value

    return change


def claim(name, *row):
    """A change of what the header says of a tensor."""
    return put("claims", {name: list(row)})


def fill(name, value, at=0):
    """A change of one number of a tensor."""

    def change(header, tensors):
        tensors[name].flat[at] = value

    return change


def make(name, function):
    """A change of a tensor to what a function makes of it."""

    def change(header, tensors):
        tensors[name] = function(tensors[name])

    return change


def both(header, tensors):
    """A matrix among the tensors that are kept."""
    tensors[header["matrices"][0][0]] = np.ones((384, 32), "f4")


def large(header, tensors):
    """Settings of a model of terabytes."""
    header["model"] |= dict(MODEL_DIM=65536, NUM_LAYERS=50, NUM_HEADS=512, NUM_KV_HEADS=256)


def more(header, tensors):
    """As many rows and columns in all, of far more levels."""
    sizes = [shape for _, shape in header["matrices"]]
    header["matrices"] = [["a", [sum(s[0] for s in sizes), sum(s[1] for s in sizes)]]]


TABLE = np.tile(np.eye(1, 1023, dtype="i2") * 16384, (8000, 1))
GATE = "smear.gate", "float32", [32]
ARTIFACTS = {
    "step NaN": (put("step", math.nan), "NaN for a number"),
    "step infinite": (put("step", math.inf), "Infinity for a number"),
    "step of 1e999": (put("step", hostile.Raw("1e999")), "its step is inf"),
    "step below 0": (put("step", -0.5), "its step is -0.5"),
    "step in words": (put("step", "0.02"), "its step is 0.02"),
    "step true": (put("step", True), "its step is True"),
    "step nested": (put("step", hostile.Raw("[" * 5000 + "]" * 5000)), "too many values"),
    "a row's step NaN": (make("rows", lambda x: np.full(x.shape, math.nan, "f2")), "not finite"),
    "a weight NaN": (fill("smear.gate", math.nan), "smear.gate has a number that is not finite"),
    "a weight infinite": (fill("blocks.0.resid_mix", -math.inf), "that is not finite"),
    "steps that overflow": (put("step", 1e300), "has a number that is not finite"),
    "a weight of doubles": (
        make("smear.gate", lambda x: x + np.float64(1e300)),
        "of torch.float64",
    ),
    "a table of 8,000 rows": (make("table", lambda x: TABLE), "its table is"),
    "a table turned": (make("table", lambda x: x.T.copy()), "its table is"),
    "a frequency below 0": (fill("table", -1), "wrong frequencies"),
    "no frequencies": (make("table", lambda x: x * 0), "wrong frequencies"),
    "spreads of int16": (make("spreads", lambda x: x.astype("i2") * 300), "its spreads is"),
    "spreads too few": (make("spreads", lambda x: x[1:]), "its spreads is"),
    "codes too few": (make("codes", lambda x: x[:2]), "its codes is"),
    "codes of an odd number": (make("codes", lambda x: x[1:]), "its codes is"),
    "codes of nothing": (make("codes", lambda x: x * 0), "damaged"),
    "levels beside codes": (
        lambda _, tensors: tensors.update(levels=np.zeros(9, "i1")),
        "of torch.int8",
    ),
    "a name that is a number": (claim("smear.gate", 5, *GATE[1:]), "has the tensor [5,"),
    "a name for a terminal": (
        claim("smear.gate", "a\x1b[2J", *GATE[1:]),
        r"has the tensor ['a\x1b[2J'",
    ),
    "a name twice": (claim("smear.gate", "codes", *GATE[1:]), "has the tensor ['codes'"),
    "a matrix's name a list": (put("matrices/0/0", ["a"]), "has the matrix"),
    "a matrix twice": (lambda head, _: head["matrices"].append(head["matrices"][0]), "the matrix"),
    "a matrix and not": (both, "is a matrix too"),
    "a shape below 0": (put("matrices/0/1", [-1, -384]), "has the matrix"),
    "a shape of true": (put("matrices/0/1/1", True), "has the matrix"),
    "a shape of 32.0": (claim("smear.gate", *GATE[:2], [32.0]), "has the tensor"),
    "a shape beyond all": (claim("smear.gate", *GATE[:2], [2**39] * 8), "does not fit"),
    "a shape of none": (claim("smear.gate", *GATE[:2], [0]), "has the tensor"),
    "a dtype in a list": (claim("smear.gate", "smear.gate", ["float32"], [32]), "has the tensor"),
    "no matrices": (put("matrices", {}), "has the matrix"),
    "many more levels": (more, "does not fit"),
    "no settings": (put("model", [1]), "other settings than this version"),
    "one setting less": (lambda head, _: head["model"].pop("XSA_LAST_N"), "other settings"),
    "a setting in words": (put("model/MODEL_DIM", "32"), "its MODEL_DIM is '32'"),
    "a setting true": (put("model/NUM_LAYERS", True), "its NUM_LAYERS is True"),
    "a setting an object": (put("model/MODEL_DIM", {"a": [1]}), "other settings"),
    "a setting out of bounds": (put("model/MODEL_DIM", 10**8), "MODEL_DIM=100000000: allowed"),
    "a setting of 5,000 digits": (put("model/MODEL_DIM", hostile.Raw("9" * 5000)), "damaged"),
    "a model of terabytes": (large, "does not fit"),
    "layers by number only": (put("model/NUM_LAYERS", 1000), "does not fit"),
    "a setting against another": (put("model/VE_LAYERS", [7] * 500), "different layers from 0 to"),
    "a long sequence": (put("model/TRAIN_SEQ_LEN", 786432), ""),
    "nothing": (lambda header, tensors: None, ""),
}


@pytest.mark.parametrize("case", ARTIFACTS)
def test_a_forged_artifact_is_refused_by_what_is_wrong(case, kinds):
    change, words = ARTIFACTS[case]
    kind = kinds["artifact, CODER=" + ("lzma" if "row's" in case else "rans")]
    said = sealed(kind, change)
    assert words in said and bool(said) == bool(words), said
    assert not said or said.startswith(f"LOAD_ARTIFACT={kind.path}: ")


CHECKPOINTS = {
    "a step NaN": (fill("counters", math.nan), "counters has a number that is not finite"),
    "a step below 0": (fill("counters", -1), "its counters are"),
    "half a step": (fill("counters", 2.5), "its counters are"),
    "a step past the end": (fill("counters", 13), "its counters are"),
    "a step of 1e300": (fill("counters", 1e300), "its counters are"),
    "a time below 0": (fill("counters", -1.0, 1), "its counters are"),
    "a step size below 0": (fill("counters", -1.0, 2), "its counters are"),
    "more snapshots than steps": (fill("counters", 4.0, 3), "its counters are"),
    "time up by half": (fill("counters", 0.5, 4), "its counters are"),
    "six counters": (make("counters", lambda x: np.resize(x, 6)), "no counters of a training"),
    "counters of int8": (make("counters", lambda x: x.astype("i1")), "no counters of a training"),
    "no counters": (lambda _, tensors: tensors.pop("counters"), "no counters of a training"),
    "AdamW before its start": (fill("step.smear.gate", -1.0), "step.smear.gate is not of AdamW"),
    "a square below 0": (fill("exp_avg_sq.smear.gate", -1.0), "exp_avg_sq.smear.gate is not of"),
    "a momentum NaN": (fill("momentum.qo_bank", math.nan), "momentum.qo_bank has a number"),
    "a tensor of doubles": (
        make("qo_bank", lambda x: x + np.float64(1e300)),
        "qo_bank is torch.float64",
    ),
    "a tensor less": (lambda _, tensors: tensors.pop("ema.qo_bank"), "ema.qo_bank is missing"),
    "no tensors": (lambda _, tensors: tensors.clear(), "no counters of a training"),
    "nothing": (lambda header, tensors: None, ""),
}


LOADED = {  # what LOAD_CHECKPOINT says instead; what a file has not begins anew
    "a tensor less": "",
    "a step past the end": "ITERATIONS=12: the checkpoint is of step 13",
}


@pytest.mark.parametrize("name", ["checkpoint, RESUME=1", "checkpoint, LOAD_CHECKPOINT"])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_forged_checkpoint_is_refused_by_what_is_wrong(case, name, kinds):
    change, words = CHECKPOINTS[case]
    if "LOAD" in name:
        words = LOADED.get(case, words)
    said = sealed(kinds[name], change)
    assert words in said and bool(said) == bool(words), said


SETTINGS = {
    "a list": (put("settings", [1]), "its settings are no settings"),
    "missing": (lambda header, tensors: header.pop("settings"), "damaged: 'settings'"),
    "nested": (put("settings/SEED", {"a": {"b": 1}}), "its settings are no settings"),
    "of a terminal": (put("settings/SEED", "1\n\x1b[2J"), "SEED=1337 (there 1 ?[2J)"),
    "very long": (put("settings/SEED", "1" * 10**5), "(there 1111"),
    "none": (put("settings", {}), " more. Set them as they were"),
}


@pytest.mark.parametrize("name", ["checkpoint, RESUME=1", "progress of an evaluation"])
@pytest.mark.parametrize("case", SETTINGS)
def test_forged_settings_are_named_in_one_line(case, name, kinds):
    change, words = SETTINGS[case]
    assert words in sealed(kinds[name], change)


PROGRESS = {
    "a window below 0": (fill("counters", -1), "its counters are"),
    "a window beyond the plan": (fill("counters", 99), "its counters are"),
    "half a window": (fill("counters", 8.5), "its counters are"),
    "a window NaN": (fill("counters", math.nan), "not finite"),
    "another window": (fill("counters", 8), "its nats are not those of the windows before"),
    "a time below 0": (fill("counters", -1.0, 1), "its counters are"),
    "a method's time below 0": (fill("counters", -1.0, 3), "its counters are"),
    "more nats than targets": (
        make("nats", lambda x: np.resize(x, (2, 999))),
        "nats is not of this",
    ),
    "nats NaN": (fill("nats", math.nan), "nats has a number that is not finite"),
    "nats of doubles": (make("nats", lambda x: x.astype("f8")), "nats is not of this pass"),
    "no nats": (lambda _, tensors: tensors.pop("nats"), "'nats'"),
    "a tensor more": (lambda _, tensors: tensors.update(x=np.ones(3, "f4")), "x is not of this"),
    "nothing": (lambda header, tensors: None, ""),
}


@pytest.mark.parametrize("case", PROGRESS)
def test_a_forged_progress_file_costs_what_it_held(case, kinds):
    """The pass begins anew, and says why."""
    change, words = PROGRESS[case]
    said = sealed(kinds["progress of an evaluation"], change)
    assert words in said and bool(said) == bool(words), said


ROWS = {
    "a list": ("[1]", "metrics.jsonl has the line [1]"),
    "a number": ("5", "metrics.jsonl has the line 5"),
    "no label": ('{"eval_time": 1.0}', "has the line"),
    "a label in a list": ('{"label": ["a"]}', "has the line"),
    "nested": ("[" * 5000 + "]" * 5000, "recursion"),
    "a time in words": ('{"label": "pass_artifact_x", "eval_time": "1"}', "eval_time:1 for pass"),
    "a time NaN": ('{"label": "pass_artifact_x", "eval_time": NaN}', "eval_time:nan for pass"),
    "a time below 0": ('{"label": "pass_artifact_x", "eval_time": -1.0}', "eval_time:-1.0 for"),
    "a score in words": ('{"label": "final_x", "val_loss": "1", "causal": true}', "val_loss:1 for"),
    "a score that is none": ('{"label": "final_artifact_x", "causal": true}', "has the line"),
    "a score of which nobody knows": ('{"label": "final_artifact_x", "val_loss": 1.5}', "the line"),
    "a time of 400 digits": ('{"label": "x", "eval_time": ' + "9" * 400 + "}", "for x"),
    "no time": ('{"label": "pass_artifact_x"}', ""),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_forged_line_of_figures_is_refused(case, kinds):
    line, words = ROWS[case]
    kind = kinds["metrics.jsonl"]
    kind.path.write_bytes(kind.honest + line.encode() + b"\n")
    verdict, said = hostile.outcome(kind.load)
    assert words in said and verdict == ("refused" if words else "accepted"), said
    assert not words or said.startswith("RUN_ID=fuzz: ")


# ---- what is only claimed is not allocated


def most_memory(load):
    """(its outcome, the most memory it took), from a process of its own."""
    (row,) = hostile.in_child(lambda: iter([hostile.measured(load)]))
    return row[:2], row[2]


def test_a_large_table_takes_no_memory(kinds):
    """8,000 rows of a table would be looked up in 262 MB, 60,000 in 2 GB."""
    kind = kinds["artifact, CODER=rans"]
    header, tensors = hostile.parts_of(kind.raw)
    tensors["table"] = TABLE
    kind.path.write_bytes(hostile.resealed(hostile.body(header, tensors), True))
    (verdict, said), most = most_memory(kind.load)
    assert verdict == "refused" and "its table is" in said and most < 2**25


@pytest.mark.parametrize("name", KINDS[:2] + KINDS[3:6])
def test_a_header_full_of_small_values_takes_little_memory(name, kinds):
    """JSON of such grows 10 to 25 times when it is read, and an artifact's was read three times."""
    kind = kinds[name]
    packed = isinstance(kind, hostile.Artifact)
    raw = kind.raw if packed else kind.honest[40:]
    kind.path.write_bytes(kind.honest)
    most_memory(kind.load)
    (verdict, said), honest = most_memory(kind.load)
    assert verdict == "accepted", said
    for value in ("[]", "[0]", '{"a":0}', '"abcd"'):
        header, tensors = hostile.parts_of(raw)
        header["x"] = hostile.Raw(f"[{','.join([value] * (350_000 // (1 + len(value))))}]")
        kind.path.write_bytes(hostile.resealed(hostile.body(header, tensors), packed))
        (verdict, said), most = most_memory(kind.load)
        assert verdict == "refused" and "its header has" in said, said
        assert most < 2 * honest + hostile.SMALL, value


def test_the_longest_headers_of_our_own_are_read():
    """The more layers and the fewer weights in each, the more of a file is header, and of that signs."""
    sizes = dict(NUM_LAYERS="1000", MODEL_DIM="8", NUM_HEADS="2", NUM_KV_HEADS="1", ROPE_DIMS="2")
    c = config(**sizes, BIGRAM_VOCAB_SIZE="0", VE_ENABLED="0")
    artifact = t.GptqLite(c, t.GPT(c).state_dict()).pack(0.0)[0]
    assert len(t.read_header(artifact, t.expand)[1]) > 4000
    layers = [*range(1000)]  # "settings" alone, before few tensors
    settings = t.Run(config()).log.settings | {"VE_LAYERS": layers, "RECUR_LAYERS": layers}
    sealed = t.seal({"settings": settings}, {"a": torch.zeros(1)})
    header, _ = t.unseal(bytearray(b"".join(bytes(part) for part in sealed)))
    assert header["settings"]["VE_LAYERS"] == layers


def test_a_bomb_is_not_unpacked(kinds):
    """9 kB of LZMA that would become 67 MB: behind a header, and as the lineage's format."""
    kind = kinds["artifact, CODER=rans"]
    for what in (bytes(2**26), kind.raw + bytes(2**26)):
        data = hostile.pack(what)
        for start in (t.MAGIC + hashlib.sha256(data).digest(), b""):
            kind.path.write_bytes(start + data)
            (verdict, said), most = most_memory(kind.load)
            assert verdict == "refused" and most < 2**25, said
    with pytest.raises(ValueError, match="grows over 64 times"):
        t.expand(data, 2**26)


def test_small_files_of_large_tensors_are_refused(kinds):
    """Steps that would make an outer product; the lineage's format with one number many times, packed in its zip, or named in its pickle."""
    n = 60_000
    claims = {
        "rows": (torch.int8, [n]),
        "columns": (torch.int8, [n]),
        "levels": (torch.int8, [n * n]),
    }
    header = {"step": 1.0, "matrices": [["a", [n, n]]]}
    with pytest.raises(ValueError, match="3600000000 levels, more than a file of 1000 bytes"):
        t.artifact_shapes(header, claims, 1000)
    kind = kinds["the lineage's artifact"]
    many = kind.save({"w": {"a": torch.zeros(1).expand(10**9)}, "m": {}})
    packed, code = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**20))
    with zipfile.ZipFile(io.BytesIO(kind.saved)) as whole, zipfile.ZipFile(code, "w") as archive:
        for name in whole.namelist():
            word = b"ccollections\nOrderedDict", b"cbuiltins\nbytearray"
            archive.writestr(name, whole.read(name).replace(*word))
    for raw, words in (
        (many, "tensors overlap"),
        (packed.getvalue(), "its archive is packed"),
        (code.getvalue(), "its pickle has builtins bytearray"),
    ):
        kind.path.write_bytes(lzma.compress(raw))
        (verdict, said), most = most_memory(kind.load)
        assert verdict == "refused" and words in said and most < 2**25, said


def test_an_artifact_of_a_large_and_empty_table_can_be_read_back():
    c = config(BIGRAM_VOCAB_SIZE="400000")
    artifact = t.GptqLite(c, t.GPT(c).state_dict()).pack(0.0)[0]
    assert len(artifact) < 400_000 * 8 / t.EXPANSION
    assert t.unpack(artifact)[0]["bigram.embed.weight"].shape == (400_000, 8)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4),
    max_leaves=12,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    header=st.fixed_dictionaries(
        {}, optional=dict(model=JSON, step=JSON, matrices=JSON, tensors=JSON)
    ),
    size=st.integers(-5, 5),
    payload=st.binary(max_size=64),
)
def test_any_header_gives_a_clean_error(header, size, payload, kinds):
    text, kind = json.dumps(header).encode(), kinds["artifact, CODER=rans"]
    raw = max(0, len(text) + size).to_bytes(4, "little") + text + payload
    kind.path.write_bytes(hostile.resealed(raw, True))
    assert hostile.outcome(kind.load)[0] == "refused"


# ---- what a user sees


@pytest.mark.slow
def test_a_forged_artifact_is_one_line_and_a_score_that_is_none_is_a_fault(tiny_data, tmp_path):
    """Exit status 2 for a file, 1 for finite weights whose logits overflow: no figures, no causal:yes."""
    c = config()
    honest = t.GptqLite(c, random_model(c).state_dict()).pack(0.0)[0]
    header, tensors = hostile.parts_of(lzma.decompress(honest[40:]))
    path, gone = tmp_path / "a.ptz", (*t.MODEL_SETTINGS, "TRAIN_BATCH_TOKENS")
    env = {n: v for n, v in TINY.items() if n not in gone} | tiny_data
    env |= {"LOAD_ARTIFACT": str(path), "RUN_ID": "it", "EVALS": "roundtrip,sliding_window"}
    for change, status, words in (
        (put("step", math.nan), 2, f"error: LOAD_ARTIFACT={path}: damaged, or no artifact: "),
        (fill("blocks.0.resid_mix", 3e38), 1, "error: final_artifact_roundtrip: no score: "),
    ):
        other = copy.deepcopy((header, tensors))
        change(*other)
        path.write_bytes(hostile.resealed(hostile.body(*other), True))
        done = process(env, tmp_path)
        assert done.returncode == status and done.stderr.startswith(words), done.stderr
        assert done.stderr.count("\n") < 3 and "Traceback" not in done.stderr
        assert "causal:yes" not in done.stdout
    assert "causal:yes" not in (tmp_path / "logs/it.txt").read_text().rsplit("=" * 100, 1)[1]
    rows = (tmp_path / "logs/it/metrics.jsonl").read_text()
    assert "pass_artifact_roundtrip" in rows and "final_" not in rows


def test_weights_that_give_no_score_are_not_exported(tiny, monkeypatch):
    """At a validation, and in the float score."""
    row_nll = t.row_nll
    monkeypatch.setattr(t, "row_nll", lambda *args: row_nll(*args) * math.nan)
    with pytest.raises(t.Fault, match="^step:0/2: no score: 576 of 576 targets have NaN"):
        tiny(RUN_ID="a", ITERATIONS="2")
    monkeypatch.setattr(t, "validate", lambda *args, **more: None)
    with pytest.raises(t.Fault, match="^final_float_roundtrip: no score"):
        tiny(RUN_ID="b", ITERATIONS="2")
    assert not Path("logs/b/final_model.ptz").exists()
    assert "final_" not in Path("logs/b/metrics.jsonl").read_text()


def test_a_run_that_goes_on_with_a_forged_artifact_says_so(tiny):
    """RESUME=1 reads back what was exported before the stop; here the log was forged with it."""
    tiny(RUN_ID="a", EVALS="none", ITERATIONS="2")
    path, figures = Path("logs/a/final_model.ptz"), Path("logs/a/metrics.jsonl")
    was = hashlib.sha256(path.read_bytes()).hexdigest()
    header, tensors = hostile.parts_of(lzma.decompress(path.read_bytes()[40:]))
    put("model/RECUR_START", "x")(header, tensors)
    path.write_bytes(hostile.resealed(hostile.body(header, tensors), True))
    now = hashlib.sha256(path.read_bytes()).hexdigest()
    figures.write_text(figures.read_text().replace(was, now))
    with pytest.raises(
        t.BadInput, match="^logs/a/final_model.ptz: damaged, or no artifact: RECUR_START=x: allowed"
    ):
        tiny(RUN_ID="a", EVALS="none", ITERATIONS="2", RESUME="1")
