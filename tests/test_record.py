"""tools/record.py: the folder of a record, what is refused, and the proof by scoring."""

import json
import shlex
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, TINY, make_tiny_data, t

from tools import checks, proof, record, report, scripts
from tools.logs import LogError, read_log

SEEDS = (1, 2, 3)
WHO = ["--author", "A. Name", "--github-id", "aname", "--blurb", "New.", "--date", "2026-04-01"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of three seeds of a tiny run, with artifacts, data and nats."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "data").mkdir()
    env = {**TINY, **make_tiny_data(folder / "data"), "EVALS": "roundtrip,ttt,ttt_slot"}
    env |= {"ITERATIONS": "3", "SAVE_NLL": "1", "SAVE_EVERY": "0"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed in SEEDS:
            t.run_all(t.load_config({**env, "SEED": str(seed), "RUN_ID": f"s{seed}"}))
    return folder


@pytest.fixture
def copy(runs, tmp_path, monkeypatch):
    """A copy of the runs' logs folder, where a record is made without scoring anything."""
    shutil.copytree(runs / "logs", tmp_path / "logs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        record, "prove", lambda log, *_, **__: (f"seed {log.seed}", None, "left out")
    )
    return tmp_path


def make(*words, logs=SEEDS, name="mine"):
    """The exit status of a record made of the seeds in logs/."""
    return record.main([name, *(f"logs/s{seed}" for seed in logs), *words])


def edit(path, old, new):
    """Replace text in a file that has it."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# ---- the folder


@pytest.mark.slow
def test_three_seeds_make_a_folder_in_which_all_is_well(runs, monkeypatch, capsys):
    """And its script scores an artifact as the log says, to 8 decimals; of the first seed, to save time, in a process of its own."""
    really = proof.score

    def score(log, *words, **more):
        return really(log, *words, **more) if log.seed == 1 else read_log(log.path)

    monkeypatch.setattr(proof, "score", score)
    monkeypatch.chdir(runs)
    others = [f"logs/s{seed}.txt" for seed in (1, 2)]
    assert make(*WHO, "--against", *others) == 0
    out = capsys.readouterr().out
    checks = [line for line in out.splitlines() if line[:6] in ("ok    ", "??    ", "FAIL  ")]
    assert len(checks) > 80 and all(line.startswith("ok") for line in checks)
    for seed in SEEDS:
        (line,) = (line for line in checks if f"of seed {seed}, scored by the script" in line)
        log = read_log(f"logs/s{seed}")
        assert f"TTT {log.results['ttt'].val_loss:.8f} nats of 576 targets, as the log says" in line
        assert f"ok    train_seed{seed}.log: bytes of text: " in out
    folder = runs / "records/track_10min_16mb/2026-04-01_mine"
    names = {"README.md", "submission.json", "requirements.txt", "train_gpt.py"}
    assert {p.name for p in folder.iterdir()} == names | {f"train_seed{s}.log" for s in SEEDS}
    assert (folder / "train_gpt.py").read_bytes() == t.packed_script()
    assert (folder / "requirements.txt").read_text() == (
        f"# Python {sys.version.split()[0]}, torch {t.torch.__version__}\n"
        f"torch=={t.torch.__version__.split('+')[0]}\nnumpy=={np.__version__}\nsentencepiece==0.2.3\n"
    )
    found = json.loads((folder / "submission.json").read_text())
    sizes = [(runs / f"logs/s{seed}/final_model.ptz").stat().st_size for seed in SEEDS]
    assert [file["bytes"] for file in found["artifacts"].values()] == sizes
    assert found["bytes_total"] == max(sizes) + t.code_bytes()
    assert (found["author"], found["track"], found["causal"]) == ("A. Name", "10min_16mb", True)
    text = (folder / "README.md").read_text()
    assert "Welch, one-sided" in text and "TODO" not in text
    assert "eight H100; the machine here: cpu" in text and "576 targets, " in text


def test_the_commands_of_a_folder_give_the_settings_of_its_runs(copy):
    assert make() == 0
    (readme,) = copy.glob("records/*/*/README.md")
    text = readme.read_text()
    export, first, second, *_ = (
        line.strip() for line in text.partition("-r requirements.txt\n")[2].splitlines()
    )
    assert second.startswith("SEED=2 RUN_ID=seed2 python train_gpt.py")
    words = [*shlex.split(export)[1:], *first.split()[:2]]
    c = t.load_config(dict(word.split("=", 1) for word in words))
    told = read_log("logs/s1").settings
    shown = {name: t.shown(getattr(c, name.lower())) for name in told}
    assert {**shown, "RUN_ID": "s1", "SAVE_EVERY": "0"} == told
    assert text.count("TODO") == 3 and "| NUM_LAYERS " in text and "| MUON_WD " not in text


def test_a_preset_gives_what_need_not_be_given():
    log = SimpleNamespace(settings=dict(PRESET="a,b", X="2", Y="4.0", Z="7", W="1", SEED="3"))
    defaults = dict(PRESET="c", X="1", Y="1", Z="7", W="1", SEED="9")
    rows = record.given(log, defaults, {"a": {"X": "9", "Y": "4"}, "b": {"X": "2", "W": "5"}})
    assert rows == [
        ("PRESET", "c", "a,b", "given"),
        ("X", "1", "2", "preset"),
        ("Y", "1", "4.0", "preset"),
        ("W", "1", "1", "given"),
    ]


def test_the_demos_logs_ship_the_older_script_that_they_count(tmp_path, monkeypatch, capsys):
    """Their script counted its readable source as code, and no artifact is here."""
    logs = [str(ROOT / f"logs/demo/seed{seed}.txt") for seed in (42, 1337, 2025)]
    monkeypatch.chdir(tmp_path)
    assert record.main(["demo", *logs, *WHO]) == 0
    lines = capsys.readouterr().out.splitlines()
    opened = [line for line in lines if line.startswith("??") and "bytes of text" not in line]
    assert len(opened) == 3 and all("final_model.ptz" in line for line in opened)
    assert not any(line.startswith("FAIL") for line in lines)
    (folder,) = tmp_path.glob("records/*/*")
    script = (folder / "train_gpt.py").read_text()
    assert (folder / "train_seed42.log").read_text().startswith(f"{script}\n{'=' * 100}\n")
    text = (folder / "README.md").read_text()
    assert "PRESET=demo\n    SEED=1337 " in text and "**val_bpb 1.5913** (mean of 3 seeds" in text
    assert "| ITERATIONS " in text and "not done, there is no " in text


def test_a_score_that_is_not_causal_makes_a_folder_only_off_the_leaderboard(copy, capsys):
    assert make("--stage", "ttt_slot") == 2
    said = capsys.readouterr().err.splitlines()
    assert (
        len(said) == 3
        and "not causal (breaks C1,C2,C3)" in said[0]
        and not (copy / "records").exists()
    )
    assert make("--stage", "ttt_slot", "--non-record") == 0
    out = capsys.readouterr().out
    assert "??    train_seed1.log: the score is causal: TTT+SLOT" in out and "FAIL" not in out
    (folder,) = copy.glob("records/track_non_record_16mb/*")
    found = json.loads((folder / "submission.json").read_text())
    assert found["causal"] is False and found["compliance"]["score_first"] is False
    text = (folder / "README.md").read_text()
    assert "not causal: no compression result" in text and text.count(" | no ") == 3
    for path in (folder / "README.md", folder / "submission.json"):
        edit(path, "false" if path.suffix == ".json" else "TTT+SLOT", "true")
    assert report.main([str(folder), "--check"]) == 1


# ---- what is refused


def no_log(path):
    path.write_bytes(b"\0" * 5000)


CHANGES = {
    "of another configuration": (
        lambda p: edit(p, "TTT_LR=0.05", "TTT_LR=0.06"),
        "not one configuration: TTT_LR",
    ),
    "of another script": (lambda p: edit(p, "1e-7", "1e-6"), "not one script: s1.txt and s2.txt"),
    "that did not finish": (
        lambda p: edit(p, "eval_total", "eval"),
        "s2.txt: the run did not finish",
    ),
    "of the same seed": (
        lambda p: edit(p, " SEED=2 ", " SEED=1 "),
        "seeds must be known and different",
    ),
    "that is binary": (no_log, "s2.txt: is binary"),
    "without its source": (
        lambda p: p.write_text(p.read_text().partition("=" * 100)[2]),
        "s2.txt: does not open with its source",
    ),
    "of an evaluation": (
        lambda p: p.write_text(
            "\n".join(x for x in p.read_text().splitlines() if "train_time" not in x)
        ),
        "s2.txt: evaluates an artifact",
    ),
    "with another artifact": (
        lambda p: (p.with_suffix("") / "final_model.ptz").write_bytes(b"x"),
        "final_model.ptz: has 1 bytes, the log says",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_log_that_does_not_belong_is_refused_with_a_line_and_nothing_is_made(what, copy, capsys):
    change, message = CHANGES[what]
    change(copy / "logs/s2.txt")
    assert make() == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and message in said[0], said
    assert not [p for p in copy.rglob("*") if "records" in p.parts and p.is_file()]


def test_what_is_too_large_exists_or_is_no_log_is_refused(copy, monkeypatch, capsys):
    size = (copy / "logs/s1/final_model.ptz").stat().st_size
    for limit, status in ((size + t.code_bytes(), 2), (16_000_000, 0)):
        monkeypatch.setattr(record, "LIMIT", limit)
        assert make() == status
    said = capsys.readouterr().err
    assert (
        f"logs/s1/final_model.ptz: artifact and script have {size + t.code_bytes():,} bytes" in said
    )
    assert make() == 2 and "exists; choose another NAME" in capsys.readouterr().err
    monkeypatch.setattr(record, "LOG_LIMIT", 1000)
    assert make(name="long") == 2 and "s3.txt: 0 MiB, GitHub takes 100" in capsys.readouterr().err
    assert make(name="../up") == 2 and "NAME ../up: letters" in capsys.readouterr().err
    assert make("--date", "today") == 2 and "--date today" in capsys.readouterr().err
    (copy / "empty").mkdir()
    assert record.main(["x", "empty", "none.txt", str(ROOT / "README.md")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "empty: a folder without a log" in said[0] and "none.txt" in said[1]


def test_a_script_that_does_not_score_as_the_log_says_makes_no_folder(copy, monkeypatch, capsys):
    monkeypatch.setattr(record, "prove", lambda log, *_, **__: ("scored", log.seed != 2, "x"))
    assert (
        make() == 1 and not list(copy.glob("records/*/*")) and "not made" in capsys.readouterr().err
    )


def test_the_script_is_the_one_that_was_counted(copy):
    logs = [read_log(f"logs/s{seed}") for seed in SEEDS]
    assert scripts.shipped_script(logs) == (
        t.packed_script(),
        "the packed copy that the runs wrote",
    )
    for seed in SEEDS:
        (copy / f"logs/s{seed}/train_gpt.py").unlink()
    packed, what = scripts.shipped_script(logs)
    assert packed == t.packed_script() and "packed from the source" in what
    logs[0].code_bytes += 1
    with pytest.raises(
        LogError, match="Put the packed copy that the run wrote at logs/s1/train_gpt"
    ):
        scripts.shipped_script(logs)


def test_a_script_is_read_without_being_run(monkeypatch):
    source = (ROOT / "train_gpt.py").read_text()
    assert scripts.readable(t.packed_script()) == t.stripped_script()
    assert scripts.same_code(source + "# more\n", t.stripped_script())
    assert scripts.same_code("x = 1", "x = 2") is False and scripts.same_code("x = (", "x") is None
    monkeypatch.setattr(scripts, "UNPACKED", 1000)  # whatever it would unpack to
    assert scripts.readable(t.packed_script()) == t.stripped_script()[:1000]
    for body in (t.packed_script()[len(t.PACKED_START) :][:500], b"5" * 500, b" "):
        with pytest.raises(ValueError):
            scripts.readable(t.PACKED_START + body + t.PACKED_END)


def test_a_changed_folder_fails_its_check(copy, capsys):
    assert make(*WHO) == 0
    (folder,) = copy.glob("records/*/*")
    good = {p: p.read_bytes() for p in folder.iterdir()}
    size = good[folder / "submission.json"].split(b'"bytes": ')[1].split(b",")[0].decode()
    other = t.pack_source("print('other')\n").ljust(t.code_bytes(), b"#")
    for name, old, new, told in (
        ("train_gpt.py", None, other, "train_gpt.py is the script that the logs open with: 0 of 3"),
        ("train_gpt.py", None, b"", "train_gpt.py is what the logs counted: 0 bytes"),
        ("submission.json", f'"bytes": {size}', '"bytes": 3', "artifact of seed 1: 3 bytes"),
        ("submission.json", '"seeds"', '"seeds": [1], "others"', "seeds: [1]"),
        ("train_seed2.log", " bytes:", " bytes:9", "settings equal over seeds: scored text"),
    ):
        path = folder / name
        path.write_bytes(new) if old is None else edit(path, old, new)
        assert report.main([str(folder), "--check"]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert any(line.startswith("FAIL") and told in line for line in lines), told
        path.write_bytes(good[path])
    assert report.main([str(folder), "--check"]) == 0


@pytest.mark.parametrize(
    "found,expected,same",
    [
        ("8xH100 80GB SXM", "NVIDIA H100 80GB HBM3, 8 processes", True),
        ("8xA100", "NVIDIA H100 80GB HBM3, 8 processes", False),
        ("cpu threads:4, 1 process", "cpu threads:2, 1 process", False),
        ([42, 1337, 2024], [1337, 2024, 42], True),
        ([42, 1337], [1337, 2024, 42], False),
        ({"1": {"val_bpb": 1.5, "steps": 7}}, {"1": {"val_bpb": 1.5, "val_loss": 2.0}}, True),
        ({"1": {"val_bpb": 1.6}}, {"1": {"val_bpb": 1.5}}, False),
        ({"three": True}, {"three_seeds": True}, None),
    ],
)
def test_words_order_and_keys_of_other_peoples_submissions(found, expected, same):
    assert checks.equal(found, expected) is same


def test_a_folder_without_a_log_that_can_be_read_is_checked_for_the_rest(tmp_path, capsys):
    (tmp_path / "train.log").write_text("nothing\n")
    (tmp_path / "submission.json").write_text('{"val_bpb": 1.1, "track": "10min_16mb"}')
    assert report.main([str(tmp_path), "--check"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert "FAIL  logs: there are none" in lines and not any("is JSON" in line for line in lines)
    assert any(line.endswith("lacks name, author, github_id, date, blurb") for line in lines)


# ---- the proof


@pytest.mark.slow
def test_a_few_windows_are_scored_as_the_source_does_and_as_the_run_did(copy):
    log = read_log("logs/s1")
    what, verdict, detail = proof.prove(log, t.packed_script(), "ttt", targets=0, windows=4)
    mean = np.load("logs/s1/nll_roundtrip.npy")[:128].mean()
    assert verdict and what == "artifact of seed 1, scored by the script", detail
    assert f"roundtrip {mean:.8f} nats of the first 128 targets, as the source" in detail
    assert detail.endswith("the nats that the run saved are 0.00000000 from it")


def test_what_scores_otherwise_is_wrong_on_this_machine_and_unknown_on_another(copy, monkeypatch):
    log, again = read_log("logs/s1"), read_log("logs/s1")
    monkeypatch.setattr(proof, "score", lambda *_, **__: again)

    def prove():
        return proof.prove(log, b"", "ttt", targets=1000, windows=1)[1:]

    assert prove()[0] is True
    again.results["ttt"].val_loss += 1e-6
    assert prove()[0] is False and "0.00000100 from the log" in prove()[1]
    again.hardware = "NVIDIA H100"
    assert prove()[0] is None and "this is NVIDIA H100, 1 ranks" in prove()[1]
    again.results["ttt"].val_loss += 0.01  # too much for another machine
    assert prove()[0] is False
    again.results["ttt"].bytes += 1
    assert prove() == (None, "not done, the shards here are others than the run's")


def test_a_script_that_does_not_run_scores_nothing(copy):
    script = b"import sys; sys.exit('error: broken')"
    verdict, detail = proof.prove(read_log("logs/s1"), script, "ttt", targets=1000, windows=1)[1:]
    assert verdict is False and detail == "error: broken"


def test_what_cannot_be_scored_is_said(copy, tmp_path):
    log = read_log("logs/s1")
    log.settings["DATA_PATH"] = str(tmp_path)
    _, verdict, detail = proof.prove(log, b"", "ttt", targets=0, windows=1)
    assert verdict is None and "shards or tokenizer are not here" in detail
    (copy / "logs/s1/final_model.ptz").unlink()
    _, verdict, detail = proof.prove(log, b"", "ttt", targets=0, windows=1)
    assert verdict is None and detail == "not done, there is no logs/s1/final_model.ptz"
