"""Whole runs: logs and labels, what is never overwritten, bad input as a process sees it, and the lineage's own artifacts."""

import contextlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    PARITY,
    ROOT,
    TINY,
    process,
    random_model,
    read_metrics,
    t,
    timeless,
    write_shard,
)

RESULT = re.compile(
    r"final_(artifact|float)_(roundtrip|sliding_window|ttt|ttt_slot|slot|ttt_ctw|ctw) val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8} tokens:\d+ bytes:\d+ "
    r"causal:(yes|no) eval_time:\d+ms( breaks:C\d(,C\d)*)?"
)
TRAIN = re.compile(r"step:\d+/\d+ train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms")
VALIDATION = re.compile(
    r"step:\d+/\d+ val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms"
)


@pytest.fixture
def finished(tiny, capsys):
    metrics = tiny(RUN_ID="one", EVALS="roundtrip,sliding_window,ttt,ttt_slot", SAVE_NLL="1")
    return metrics, Path("logs/one.txt").read_text(), capsys.readouterr().out


def test_log_opens_with_the_source_and_holds_settings_and_all_lines(finished):
    metrics, log, console = finished
    source = (ROOT / "train_gpt.py").read_text()
    assert log.startswith(source) and log[len(source) :].startswith(
        "\n" + "=" * 100 + "\nsettings: PRESET=pr1084 RUN_ID=one "
    )
    assert log.endswith(console) and console.startswith("log:logs/one.txt\npython:")
    settings = dict(
        word.split("=", 1) for word in re.search("^settings: (PRESET.*)", log, re.M)[1].split()
    )
    assert settings.keys() == set(t.SETTINGS) and settings["EVAL_STRIDE"] == "8"


def test_lines_have_the_fields_format_and_labels_are_unique(finished):
    metrics, log, console = finished
    lines = console.splitlines()
    results = [line for line in lines if line.startswith("final_")]
    assert [line.split()[0] for line in results] == [
        "final_float_roundtrip",
        "final_artifact_roundtrip",
        "final_artifact_sliding_window",
        "final_artifact_ttt",
        "final_artifact_ttt_slot",
    ]
    assert all(RESULT.fullmatch(line) for line in results), results
    assert [line.split("causal:")[1].split()[0] for line in results] == ["yes"] * 4 + ["no"]
    steps = [line for line in lines if line.startswith("step:")]
    assert (
        sum(bool(TRAIN.fullmatch(x)) for x in steps) == 10
        and sum(bool(VALIDATION.fullmatch(x)) for x in steps) == 5 == len(steps) - 10
    )
    code, source = t.code_bytes(), len((ROOT / "train_gpt.py").read_bytes())
    size = Path("logs/one/final_model.ptz").stat().st_size
    for line in (
        f"Code size: {code} bytes (packed; source {source} bytes)",
        f"Serialized model rd+rans+lzma: {size} bytes",
        f"Total submission size rd+rans+lzma: {size + code} bytes",
    ):
        assert lines.count(line) == 1
    labels = [
        (line.split()[0], line.split()[1].split(":")[0])
        for line in lines
        if re.match(r"(final_|step:|average_|training |quantised )", line)
    ]
    assert len(labels) == len(set(labels))


def test_counts_are_those_of_the_split_and_bpb_follows_from_them(finished):
    for label, row in finished[0].items():
        if label.startswith("final_"):
            assert (row["tokens"], row["bytes"]) == (576, 712)
            assert row["val_bpb"] == pytest.approx(
                row["val_loss"] / math.log(2) * 576 / 712, abs=1e-12
            )


def test_saved_nats_are_the_result(finished):
    for label in ("roundtrip", "sliding_window", "ttt", "ttt_slot"):
        nats = np.load(f"logs/one/nll_{label}.npy")
        assert nats.dtype == np.float64 and nats.shape == (576,)
        assert nats.mean() == pytest.approx(
            finished[0][f"final_artifact_{label}"]["val_loss"], abs=1e-9
        )


def test_quantising_and_reading_back_costs_little(finished):
    assert (
        abs(
            finished[0]["final_artifact_roundtrip"]["val_bpb"]
            - finished[0]["final_float_roundtrip"]["val_bpb"]
        )
        < 0.02
    )


def test_everything_of_a_run_lies_in_its_own_place(finished, tmp_path):
    assert sorted(p.name for p in tmp_path.iterdir()) == ["logs"] and sorted(
        p.name for p in Path("logs").iterdir()
    ) == ["one", "one.txt"]
    assert {p.name for p in Path("logs/one").iterdir()} == {
        "metrics.jsonl",
        "checkpoint.000000012.ckpt",
        "final_model.ptz",
        "train_gpt.py",
        *(f"nll_{e}.npy" for e in ("roundtrip", "sliding_window", "ttt", "ttt_slot")),
    }


def test_a_run_id_is_never_overwritten(finished, tiny):
    before = {p: p.read_bytes() for p in Path("logs").rglob("*") if p.is_file()}
    with pytest.raises(
        t.BadInput, match="RUN_ID=one: exists in logs/; choose another, or RESUME=1"
    ):
        tiny(RUN_ID="one")
    assert before == {p: p.read_bytes() for p in Path("logs").rglob("*") if p.is_file()}


def test_a_run_id_may_name_one_folder(tiny):
    short = dict(EVALS="roundtrip", ITERATIONS="2")
    first, again = tiny(RUN_ID="slot/a", **short), tiny(RUN_ID="slot/b", **short)
    assert timeless(first) == timeless(again)
    assert sorted(p.name for p in Path("logs/slot").iterdir()) == ["a", "a.txt", "b", "b.txt"]
    assert "\nlog:logs/slot/a.txt\n" in Path("logs/slot/a.txt").read_text()
    with pytest.raises(t.BadInput, match="RUN_ID=slot/a: exists in logs/"):
        tiny(RUN_ID="slot/a", **short)
    tiny(RUN_ID="slot/a", RESUME="1", **short)


def test_without_run_id_two_runs_have_names_of_their_own(tiny):
    with contextlib.suppress(
        FileNotFoundError
    ):  # the fixture looks for the metrics of a run without a name
        tiny(RUN_ID="", EVALS="none", ITERATIONS="1")
    (name,) = (p.stem for p in Path("logs").glob("*.txt"))
    assert re.fullmatch(r"\d{8}_\d{6}_seed1337", name)


def test_a_label_used_twice_is_a_fault(tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = t.Run(t.load_config({**TINY, "RUN_ID": "x"}))
    run.log.metric("a", value=1.0)
    with pytest.raises(t.Fault, match="label a logged twice"):
        run.log.metric("a", value=2.0)


def test_evaluators_and_switches_choose_the_result_lines(tiny):
    for env, labels in (
        (dict(TTT_ENABLED="0"), ["roundtrip", "sliding_window", "slot"]),
        (dict(SLOT_ENABLED="0"), ["roundtrip", "sliding_window", "ttt"]),
        (dict(SLOT_ENABLED="0", TTT_ENABLED="0"), ["roundtrip", "sliding_window"]),
        (dict(EVALS="ttt_slot"), ["ttt_slot"]),
    ):
        assert [n for n in tiny(**env) if n.startswith("final_artifact")] == [
            f"final_artifact_{label}" for label in labels
        ]


# Bad input as a process sees it: one message that names the thing, status 2, nothing written, on one rank and on two.


def bad_shard(folder, split="train", **how):
    for name in ("fineweb_train_000000.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"):
        (folder / name).write_bytes((Path(how["DATA_PATH"]) / name).read_bytes())
    path = folder / f"fineweb_{split}_00000{int(split == 'train')}.bin"
    if how.get("tokens") is not None:
        write_shard(path, how["tokens"])
    else:
        path.write_bytes(path.read_bytes()[:-6])
    return {"DATA_PATH": str(folder)}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize(
    "case,word",
    [
        (lambda f, d: {"DATA_PATH": "/nowhere"}, "DATA_PATH=/nowhere"),
        (lambda f, d: bad_shard(f, **d), "fineweb_train_000001.bin"),
        (
            lambda f, d: bad_shard(f, "val", tokens=[1, 2, 400] * 100, **d),
            "token id 400 at position 2",
        ),
        (lambda f, d: {"TRAIN_BATCH_TOKENS": "96"}, "TRAIN_BATCH_TOKENS=96"),
        (lambda f, d: {"EVAL_STRIDE": "33", "SLOT_STEP": "1"}, "EVAL_STRIDE=33"),
        (lambda f, d: {"LOAD_ARTIFACT": str(ROOT / "README.md")}, "LOAD_ARTIFACT="),
    ],
)
def test_bad_input_ends_every_rank_at_once_with_one_message(ranks, case, word, tiny_data, tmp_path):
    if word.startswith("TRAIN_BATCH_TOKENS") and not ranks:
        pytest.skip("96 tokens can be split over one rank")
    folder = tmp_path / "data"
    folder.mkdir()
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    done = process(
        {**TINY, **tiny_data, "RUN_ID": "bad", **case(folder, tiny_data)}, cwd, ranks, timeout=60
    )
    assert (
        done.returncode == (1 if ranks else 2) and word in done.stderr
    )  # torchrun's own status is 1; it prints the ranks' 2
    assert "exitcode  : 2" in done.stderr if ranks else done.stderr.startswith("error: ")
    assert (
        done.stderr.count("error: ") == 1
        and 'train_gpt.py", line' not in done.stderr
        and not list(cwd.iterdir())
    )


# The lineage's own artifacts, scored by its own scripts from disk on a CPU; figures from the notes that come with them.
LINEAGE = PARITY / "lineage"
EXPECTED = {
    "a": dict(
        roundtrip=5.35985327,
        sliding_window=5.34953855,
        ttt=5.03121241,
        ttt_slot=5.02961052,
        strong=5.02339108,
    ),
    "c": dict(
        roundtrip=4.89638162,
        sliding_window=4.89579467,
        ttt=4.88200379,
        ttt_slot=4.87995638,
        strong=4.87228217,
    ),
    # of #1278's script, whose recurrence is on; SLOT-32 with the cosine that reaches its end
    "b1278": dict(roundtrip=4.10376346, sliding_window=4.09963864, slot=3.37324074),
    # of #1313's script; SLOT-24 with the cosine that reaches its end. Its validation split is a's.
    "b1313": dict(roundtrip=5.78774416, sliding_window=5.78530599, slot=5.47026901),
}


@pytest.mark.slow
@pytest.mark.skipif(
    not LINEAGE.exists(), reason="the lineage's artifacts are not part of the repository"
)
@pytest.mark.parametrize("name", EXPECTED)
def test_lineage_artifacts_score_as_the_lineage_scored_them(name, tmp_path):
    folder = LINEAGE / name
    env = dict(
        line.split("=", 1)
        for line in (folder / "settings.env").read_text().splitlines()
        if "=" in line
    )
    env |= dict(
        DATA_PATH=str(LINEAGE / "a" if name == "b1313" else folder),
        TOKENIZER_PATH=str(PARITY / "fineweb_1024_bpe.model"),
        LOAD_ARTIFACT=str(folder / "final_model.int6.ptz"),
    )
    runs = dict(
        plain=dict(EVALS="roundtrip,sliding_window,ttt,ttt_slot"),
        strong=dict(EVALS="ttt_slot", SLOT_STEPS="5", SLOT_LR="0.003"),
    )
    if name.startswith("b"):
        runs = dict(
            plain=dict(TTT_ENABLED="0", SLOT_DELTA="window", SLOT_BIAS="1", SLOT_LOSS="scored")
        )
    if name == "b1278":
        env |= dict(RECUR_STYLE="gated", RECUR_START=env.pop("RECUR_START_STEP"))
    for run_id, more in runs.items():
        done = process({**env, "RUN_ID": run_id, **more}, tmp_path, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        for label, row in read_metrics(tmp_path / "logs" / run_id).items():
            if label.startswith("final_artifact_"):
                key = "strong" if run_id == "strong" else label.removeprefix("final_artifact_")
                assert row["val_loss"] == pytest.approx(EXPECTED[name][key], abs=2e-5), label


# Settings of #1435's script by other names here, or that do not matter to a score.
NAMES_1435 = dict(
    ROPE_TRAIN_SEQ_LEN="ROPE_TRAIN_LEN",
    RECUR_START_STEP="RECUR_START",
    VAL_BATCH_TOKENS="VAL_BATCH_SIZE",
)


@pytest.mark.slow
@pytest.mark.skipif(
    not LINEAGE.exists(), reason="the lineage's artifacts are not part of the repository"
)
def test_the_model_of_1435_gives_its_logits_and_scores(tmp_path):
    """Its float weights, with recurrence and without; their names are ours."""
    folder = LINEAGE / "b1435"
    expected = json.loads((folder / "expected.json").read_text())
    lines = (folder / "settings.env").read_text().splitlines()
    env = {NAMES_1435.get(k, k): v for k, v in (line.split("=", 1) for line in lines)}
    env = {k: v for k, v in env.items() if k in t.SETTINGS and k != "RUN_ID"}
    env |= dict(RECUR_STYLE="shared", DATA_PATH=str(LINEAGE / "b1278"), DEVICE="cpu")
    c = t.load_config(env | dict(TOKENIZER_PATH=str(PARITY / "fineweb_1024_bpe.model")))
    state = torch.load(folder / "state_fp16.pt", weights_only=True)
    run, model = t.Run(c), t.GPT(c)
    t.load_state(model, {name: p.float() for name, p in state.items()}, folder)
    val = t.ValData(c, run.ranks)
    for model.recurring, name in ((False, "recurrence_inactive"), (True, "recurrence_active")):
        theirs = expected[name]
        assert [place.layer for place in model.plans[model.recurring]] == theirs["schedule"]
        for label, key in (("roundtrip",) * 2, ("sliding_window", "sliding_stride_64")):
            nats = t.score(run, model, val, [(label, c)])[0][0]
            loss, _ = t.mean_and_bpb(val, nats, label)
            assert loss == pytest.approx(theirs[key]["val_loss"], abs=1e-6), (name, label)
    with torch.no_grad():
        logits = model.cap(model.project(model.hidden(val.tokens[None, :256])))[0]
    theirs = expected["logits"]
    for rows in ("first", "last"):
        own = logits[theirs[f"{rows}_rows"]]
        torch.testing.assert_close(own, torch.tensor(theirs[rows]), rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.skipif(
    not LINEAGE.exists(),
    reason="the lineage's settings and real text are not part of the repository",
)
def test_training_with_the_lineages_settings_is_as_good_and_exports_what_it_trained(tmp_path):
    """The lineage's script: 4.1296 before averaging, 5.3599 exported."""
    for name, source in (
        ("train", PARITY / "fineweb_train_sample_sp1024.bin"),
        ("val", LINEAGE / "a" / "fineweb_val_000000.bin"),
    ):
        (tmp_path / f"fineweb_{name}_000000.bin").symlink_to(source)
    env = dict(
        line.split("=", 1)
        for line in (LINEAGE / "a" / "settings.env").read_text().splitlines()
        if "=" in line
    )
    env |= dict(
        DATA_PATH=str(tmp_path),
        TOKENIZER_PATH=str(PARITY / "fineweb_1024_bpe.model"),
        RUN_ID="trained",
        EVALS="roundtrip",
    )
    done = process(env, tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = read_metrics(tmp_path / "logs" / "trained")
    assert found["step:160/160"]["val_loss"] <= 4.18
    assert found["final_artifact_roundtrip"]["val_loss"] <= found["step:160/160"]["val_loss"] + 0.05


@pytest.mark.slow
@pytest.mark.skipif(
    not LINEAGE.exists(), reason="the lineage's artifacts are not part of the repository"
)
def test_damaged_lineage_artifact_is_refused(tmp_path):
    whole = (LINEAGE / "a" / "final_model.int6.ptz").read_bytes()
    for data in (
        whole[:-1],
        whole[:1000],
        whole + b"x",
        whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
    ):
        (tmp_path / "x.ptz").write_bytes(data)
        with pytest.raises(t.BadInput, match="LOAD_ARTIFACT=.*damaged"):
            t.read_artifact(t.load_config({"LOAD_ARTIFACT": str(tmp_path / "x.ptz")}))


def test_a_model_with_all_options_is_exported_and_evaluated_as_it_was_trained(tiny):
    """Recurrence that has begun or has not, and training on the validation tokens, travel with the artifact."""
    lanes = dict(SKIP_GATES_ENABLED="1", PARALLEL_START_LAYER="2")
    for start, adapted, style in (
        ("4", "0", {}),
        ("99", "0", dict(RECUR_STYLE="gated")),
        ("3", "0", dict(RECUR_STYLE="gated", RECUR_LOOPS="3")),
        ("5", "0", dict(RECUR_STYLE="shared", **lanes)),
        ("0", "1", {}),
    ):
        options = dict(
            VRL_ENABLED="1",
            GATED_ATTENTION="1",
            RECUR_LAYERS="1,2",
            RECUR_START=start,
            **style,
            PREQUANT_TTT_ENABLED=adapted,
            PREQUANT_TTT_EPOCHS="2",
            PREQUANT_TTT_FREEZE_BLOCKS="1",
            XSA_LAST_N="3",
            EVALS="roundtrip,sliding_window",
        )
        trained = tiny(RUN_ID=f"r{start}", **options)
        again = tiny(
            LOAD_ARTIFACT=f"logs/r{start}/final_model.ptz",
            XSA_LAST_N="3",
            EVALS="roundtrip,sliding_window",
        )
        for label in ("final_artifact_roundtrip", "final_artifact_sliding_window"):
            assert trained[label]["val_loss"] == again[label]["val_loss"]
            assert trained[label]["causal"] == again[label]["causal"] == (adapted == "0")
            assert again[label].get("breaks") == (None if adapted == "0" else "C3")
        lines = Path(f"logs/r{start}.txt").read_text().rsplit("=" * 100, 1)[1]
        assert (f"recurrence:on step:{start} layers:1,2" in lines) == (
            start != "99"
        ) and lines.count("prequant_ttt:epoch") == 2 * int(adapted)
        if adapted == "1":  # two passes over the text it is then scored on
            assert (
                trained["final_float_roundtrip"]["val_loss"]
                < trained["step:12/12"]["val_loss"] - 0.01
            )


def test_pre_quantisation_ttt_leaves_frozen_blocks_alone(stream):
    c = t.load_config(
        {
            **TINY,
            "PREQUANT_TTT_ENABLED": "1",
            "PREQUANT_TTT_FREEZE_BLOCKS": "2",
            "PREQUANT_TTT_EPOCHS": "1",
        }
    )
    (run, val), model = stream(c), random_model(c)
    before = {
        n: p.clone()
        for n, p in t.split_banks({n: p.detach() for n, p in model.named_parameters()}, 3).items()
    }
    t.train_on_validation(c, run, model, val)
    for name, p in t.split_banks({n: p.detach() for n, p in model.named_parameters()}, 3).items():
        assert torch.equal(p, before[name]) == name.startswith(("blocks.0.", "blocks.1.")), name


def test_metrics_file_is_json_lines(finished):
    rows = [json.loads(line) for line in Path("logs/one/metrics.jsonl").read_text().splitlines()]
    assert (
        rows[0]["label"] == "settings"
        and rows[0]["NUM_LAYERS"] == 3
        and rows[-1]["label"] == "eval_total"
    )
