"""The tools as their users see them: examples of their help, audit and ablate, refusals."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, process, read_metrics, t, without_pauses, write_shard

from tools import ablate, audit, ladder

TOOLS = (
    "report",
    "record",
    "ablate",
    "ladder",
    "audit",
    "quantise",
    "bench",
    "gpu",
)  # with examples


@pytest.fixture(scope="module")
def made(tiny_data, tmp_path_factory):
    """(folder, settings, artifact) of a tiny run."""
    folder = tmp_path_factory.mktemp("made")
    env = {
        **TINY,
        **tiny_data,
        "RUN_ID": "my_run",
        "EVALS": "none",
        "EVAL_SEQ_LEN": "16",
        "TTT_CHUNK_TOKENS": "64",
    }
    assert process(env, folder).returncode == 0
    return (
        folder,
        {k: v for k, v in env.items() if k not in ("RUN_ID", "EVALS")},
        str(folder / "logs/my_run/final_model.ptz"),
    )


def tool(name, words, env, cwd, ranks=0):
    command = [
        sys.executable,
        *(
            ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            if ranks
            else []
        ),
        "-m",
        f"tools.{name}",
        *words,
    ]
    clean = {k: v for k, v in os.environ.items() if k not in set(t.SETTINGS)}
    done = subprocess.run(
        command, env={**clean, **env}, cwd=cwd, capture_output=True, text=True, timeout=300
    )
    return without_pauses(done)


@pytest.fixture
def refused(made, monkeypatch, capsys):
    """A function (tool's main, words) -> its error, in this process and the folder of the tiny run."""
    folder, env, _ = made
    monkeypatch.chdir(folder)
    for name, value in env.items():
        monkeypatch.setenv(name, value)

    def call(main, words):
        assert main(words) == 2
        return capsys.readouterr().err

    return call


def examples(name):
    """Commands in a tool's help, those over several lines as one."""
    page = tool(name, ["--help"], {}, ROOT).stdout.replace("\\\n", " ")
    return re.findall(rf"^    ((?:[A-Z]+=\w+ )?[\w -=]*-m tools\.{name} .*)$", page, re.M)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOOLS)
def test_the_examples_of_each_tools_help_run(name, made):
    """In a folder with the committed logs and a tiny run, whose last step is another than the demo's."""
    folder, env, _ = made
    for question in ("demo", "speed"):
        if not (folder / "logs" / question).exists():
            shutil.copytree(ROOT / "logs" / question, folder / "logs" / question)
    (folder / "README.md").write_text(
        "<!-- demo/seed1337 demo/seed2025 demo/seed42 -->\n<!-- end -->\n"
    )
    (folder / "docs").mkdir(exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if name == "ablate":  # presets have a stride of 96
        env = {**env, "EVAL_SEQ_LEN": "128", "TTT_CHUNK_TOKENS": "128"}
    if name == "ladder":  # rates are chosen on another text
        other = folder / "data" / "datasets" / "other"
        other.mkdir(parents=True, exist_ok=True)
        training = Path(env["DATA_PATH"]) / "fineweb_train_000000.bin"
        tokens = np.fromfile(training, "<u2", 200, offset=1024)
        write_shard(other / "fineweb_val_000000.bin", tokens)
        env = {**env, "TTT_LORA_CHUNK": "8"}
    if name == "audit":  # of all evaluators one
        env = {**env, "EVALS": "slot"}
        score = "def score(tokens):\n    return np.full(len(tokens) - 1, np.log(8))\n"
        (folder / "my_eval.py").write_text(f"import numpy as np\nvocab_size = 8\n{score}")
    commands = examples(name)
    assert len(commands) >= 2
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", command.replace("000000400", "000000012")],
            env={**os.environ, **env, "PATH": path, "COMPILE": "0"},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        failed_check = command.endswith("line each")  # the demo's last score is not causal
        assert done.returncode == failed_check, (command, done.stdout, done.stderr)
    written = {
        "report": ("table.csv", "figure.png", "figure.svg", "submission.json"),
        "record": ("records/track_10min_16mb/2026-04-01_my_record/README.md",),
        "ablate": ("logs/my_ablation/ablate.png", "logs/slot/my_sweep.txt"),
        "ladder": ("logs/ladder/mine/ladder.csv", "logs/ladder/mine/ladder.png"),
        "audit": (),
        "quantise": ("logs/my_quantisers/metrics.jsonl",),
        "bench": ("logs/my_bench.json", "docs/benchmarks.md"),
        "gpu": ("logs/gpu/my_gpu_step.json", "logs/gpu/rehearsal_run.txt"),
    }[name]
    assert all((folder / file).is_file() for file in written)


@pytest.mark.parametrize("name", TOOLS)
def test_the_file_of_a_tool_says_how_to_start_it(name):
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / f"{name}.py", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"error: the tools are a package: python -m tools.{name} ...\n"


@pytest.mark.parametrize("ranks", [0, 2])
def test_audit_of_an_artifact_ends_with_0_when_claims_hold(ranks, made):
    folder, env, artifact = made
    words = [
        "--artifact",
        artifact,
        "--targets",
        "192",
        "--probes",
        "8",
        "EVALS=sliding_window,ttt,slot",
        "SLOT_DELTA=window",
        "SLOT_LOSS=scored",
    ]
    before = sorted(folder.rglob("*"))
    done = tool("audit", words, env, folder, ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if "as claimed" in line}
    assert (
        set(lines) == {"sliding_window", "ttt", "slot"}
        and "C1,C2,C3" in lines["slot"]
        and "NOT" not in done.stdout
    )
    assert (
        f"192 targets, {ranks or 1} rank(s)" in done.stdout
        and sorted(folder.rglob("*")) == before  # an audit writes nothing
    )


def test_audit_ends_with_1_when_a_claim_is_false(made, monkeypatch, capsys):
    folder, env, artifact = made
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    words = [
        "--artifact",
        artifact,
        "--targets",
        "96",
        "--probes",
        "6",
        "--sums",
        "0",
        "EVALS=slot",
    ]
    assert audit.main(words) == 0 and "NOT" not in capsys.readouterr().out
    monkeypatch.setattr(t, "broken_conditions", lambda c, label: "")
    assert audit.main(words) == 1 and "NOT AS CLAIMED" in capsys.readouterr().out


@pytest.mark.parametrize(
    "mode",
    [
        ("SLOT_DELTA=window", "SLOT_LOSS=context"),
        ("SLOT_DELTA=shared", "SLOT_LOSS=past"),
        ("SLOT_DELTA=window", "SLOT_LOSS=past"),
    ],
)
def test_causal_slot_survives_two_hundred_probes_on_two_ranks(mode, made):
    folder, env, artifact = made
    done = tool(
        "audit",
        [
            "--artifact",
            artifact,
            "--targets",
            "192",
            "--probes",
            "200",
            "--sums",
            "0",
            "EVALS=slot",
            *mode,
        ],
        env,
        folder,
        2,
    )
    assert done.returncode == 0 and " 0/191 " in done.stdout and "2 rank(s)" in done.stdout, (
        done.stdout + done.stderr
    )


@pytest.mark.parametrize(
    "words,message",
    [
        (["--artifact", "none.ptz"], "LOAD_ARTIFACT=none.ptz"),
        (["--artifact", "none.ptz", "SLOT_STEPS"], "SLOT_STEPS: not a setting"),
        (["--artifact", "x", "--preset", "pr1"], "PRESET=pr1: allowed: a comma list of pr1"),
        (["--artifact", "x", "SLOT_STEPS=0"], "SLOT_STEPS=0"),
    ],
)
def test_audit_refuses_bad_input_with_one_message(words, message, refused):
    error = refused(audit.main, words)
    assert error.startswith("error: ") and message in error and error.count("\n") < 3


def test_ablate_gives_what_runs_of_the_script_give(made, monkeypatch):
    folder, env, artifact = made
    rows = [
        "sliding_window",
        "ttt",
        "mine=slot SLOT_DELTA=window SLOT_LOSS=context SLOT_STEPS=5",
        "pr1313 EVAL_STRIDE=8",
        "roundtrip",
        "eight=slot SLOT_BATCH_SEQS=8",
        "two=slot SLOT_BATCH_SEQS=2",
    ]
    done = tool(
        "ablate", ["--artifact", artifact, "--run-id", "rows", "--title", "a", *rows], env, folder
    )
    assert done.returncode == 0, done.stderr
    found = {row["row"]: row for row in ablate.read_results(folder / "logs" / "rows")}
    assert list(found) == [
        "sliding_window",
        "ttt",
        "mine",
        "pr1313 EVAL_STRIDE=8",
        "roundtrip",
        "eight",
        "two",
    ]
    alone = {
        "sliding_window": ("sliding_window", {}),
        "ttt": ("ttt", {}),
        "eight": ("slot", dict(SLOT_BATCH_SEQS="8")),
        "two": ("slot", dict(SLOT_BATCH_SEQS="2")),
        "mine": ("slot", dict(SLOT_DELTA="window", SLOT_LOSS="context", SLOT_STEPS="5")),
    }
    monkeypatch.chdir(folder)
    for name, (label, more) in alone.items():
        run_id = f"alone_{name}"
        t.run_all(
            t.load_config(
                {**env, "LOAD_ARTIFACT": artifact, "RUN_ID": run_id, "EVALS": label, **more}
            )
        )
        row = read_metrics(folder / "logs" / run_id)[f"final_artifact_{label}"]
        assert row["val_loss"] == pytest.approx(found[name]["val_loss"], abs=1e-6)
    assert [row["causal"] for row in found.values()] == [
        True,
        True,
        True,
        False,
        True,
        False,
        False,
    ]
    assert abs(found["eight"]["val_loss"] - found["two"]["val_loss"]) > 1e-5
    assert found["pr1313 EVAL_STRIDE=8"]["diff"] == pytest.approx(
        found["pr1313 EVAL_STRIDE=8"]["val_bpb"] - found["sliding_window"]["val_bpb"]
    )
    assert (folder / "logs/rows/ablate.png").stat().st_size > 10_000
    assert (
        "| mine |" in done.stdout and (folder / "logs/rows.txt").read_text().count("\nablate_") == 7
    )
    again = tool(
        "ablate", ["--artifact", artifact, "--run-id", "rows", "sliding_window"], env, folder
    )
    assert again.returncode == 2 and "RUN_ID=rows" in again.stderr


def test_a_ladder_stacks_and_mixes_what_was_best_on_the_other_text(made):
    folder, env, _ = made
    chosen = {name: row for name, (row, _) in ladder.RUNGS.items()} | {
        "TTT": "ttt TTT_LR=0.02",
        "SLOT context": "slot SLOT_LOSS=context SLOT_DELTA=window SLOT_STEPS=8",
    }
    rows = ladder.ladder_rows(chosen)
    stack = "ttt_slot TTT_LR=0.02 SLOT_LOSS=context SLOT_DELTA=window SLOT_STEPS=8"
    assert rows["TTT + SLOT context"] == stack
    env = {**env, "TTT_LORA_CHUNK": "8"}
    c = t.load_config({**env, "EVALS": "none"})
    parsed = [(*ablate.parse_row(f"{n}={row}", env, c), n, {}) for n, row in rows.items()]
    mixed = {
        parsed[k][0]: [parsed[j][0] for j in ablate.mixed_rows(parsed, k, of)]
        for k, of in ((k, ladder.MIXES.get(row[0])) for k, row in enumerate(parsed))
        if parsed[k][1] == "mix"
    }
    four = ["sliding", "SLOT context", "TTT", "TTT + SLOT context"]
    assert mixed["mix of TTT, SLOT context"] == four
    assert not set(mixed["mix of all"]) & set(ladder.LEAKS) and len(mixed["mix of all"]) == 16


def test_a_ladder_of_some_rungs_has_the_stacks_and_mixtures_of_these_alone():
    chosen = {name: ladder.RUNGS[name][0] for name in ("sliding", "SLOT context", "TTT, control")}
    added = [name for name in ladder.ladder_rows(chosen) if name not in chosen]
    stack, mix = "TTT, control + SLOT context", "mix of TTT, control, SLOT context"
    assert added == [stack, *ladder.LEAKS, mix, "mix of all"]


def test_the_frontier_has_what_nothing_causal_beats_in_less_time():
    rows = [(1, 2.0, True), (2, 1.0, False), (3, 1.9, True), (4, 1.95, True), (5, 1.8, True)]
    rows = [dict(seconds=s, val_bpb=bpb, causal=causal) for s, bpb, causal in rows]
    assert [row["seconds"] for row in ladder.frontier(rows)] == [1, 3, 5]


def test_a_ladder_refuses_before_it_writes_anything(made, refused, monkeypatch):
    _, env, artifact = made
    words = ["--run-id", "bad", "--artifact", artifact]
    assert "--artifact and --tune are needed" in refused(ladder.main, words)
    told = refused(ladder.main, [*words, "--tune", env["DATA_PATH"]])
    assert "begins as the text to score does" in told
    monkeypatch.setenv("TTT_LORA_CHUNK", "64")
    other = Path("other")
    other.mkdir()
    shutil.copy(Path(env["DATA_PATH"]) / "fineweb_train_000000.bin", other / "fineweb_val_0.bin")
    told = refused(ladder.main, [*words, "--tune", str(other)])
    assert "TTT_LORA_CHUNK=64: at most EVAL_SEQ_LEN=16" in told and not Path("logs/bad").exists()


def test_ablate_on_two_ranks_gives_the_same_and_writes_once(made):
    folder, env, artifact = made
    for ranks in (0, 2):
        done = tool(
            "ablate",
            [
                "--artifact",
                artifact,
                "--run-id",
                f"ranks{ranks}",
                "sliding_window",
                "slot SLOT_LOSS=past",
            ],
            env,
            folder,
            ranks,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("| slot SLOT_LOSS=past |") == 1
    one, two = (
        [row["val_loss"] for row in ablate.read_results(folder / "logs" / f"ranks{ranks}")]
        for ranks in (0, 2)
    )
    assert one == pytest.approx(two, abs=1e-6)


def test_ablate_crosses_rows_with_a_grid_and_redraws(made):
    folder, env, artifact = made
    words = [
        "--artifact",
        artifact,
        "--run-id",
        "grid",
        "--grid",
        "SLOT_STEPS=1,2",
        "--grid",
        "SLOT_LR=0.01,0.1",
        "sliding_window",
        "a=slot",
        "b=slot SLOT_LOSS=past",
    ]
    done = tool("ablate", words, env, folder)
    assert done.returncode == 0, done.stderr
    rows = ablate.read_results(folder / "logs" / "grid")
    assert [r["row"] for r in rows][:3] == [
        "sliding_window",
        "a SLOT_STEPS=1 SLOT_LR=0.01",
        "a SLOT_STEPS=1 SLOT_LR=0.1",
    ] and len(rows) == 9
    picture = folder / "logs/grid/ablate.png"
    picture.unlink()
    assert (
        tool("ablate", ["--run-id", "grid", "--redraw"], env, folder).returncode == 0
        and picture.exists()
    )


@pytest.mark.parametrize(
    "words,message",
    [
        ([], "--artifact and at least one row"),
        (["--redraw"], "logs/bad: has no ablate.csv"),
        (
            ["--run-id", "../bad", "--artifact", "ART", "slot"],
            "RUN_ID=../bad: a name, or FOLDER/NAME",
        ),
        (["--artifact", "x.ptz", "slot"], "LOAD_ARTIFACT=x.ptz"),
        (["--artifact", "ART", "slott"], "'slott': a row is"),
        (["--artifact", "ART", "slot SLOT_STEPS=0"], "SLOT_STEPS=0"),
        (["--artifact", "ART", "slot MODEL_DIM=8"], "MODEL_DIM is no setting of evaluation"),
        (["--artifact", "ART", "slot SLOT_STEP=2"], "SLOT_STEP"),
        (["--artifact", "ART", "--grid", "SEED=1,2", "slot"], "--grid SEED=1,2"),
        (["--artifact", "ART", "--grid", "EVAL_STRIDE=64", "sliding_window"], "EVAL_STRIDE=64"),
        (
            ["--artifact", "ART", "--grid", "SLOT_STEPS=1,0", "slot"],
            "--grid SLOT_STEPS=0: allowed: integer, 1 to 1,000",
        ),
    ],
)
def test_ablate_refuses_bad_input_before_it_writes(words, message, made, refused):
    folder, _, artifact = made
    error = refused(
        ablate.main, ["--run-id", "bad", *(artifact if w == "ART" else w for w in words)]
    )
    assert error.startswith("error: ") and message in error
    assert not (folder / "logs" / "bad").exists()


def test_documents_begin_at_their_first_token():
    assert ablate.documents(np.array([1, 5, 6, 1, 7, 1, 8])).tolist() == [0, 0, 1, 1, 2, 2]


def test_intervals_hold_the_truth_about_95_times_in_100():
    """Simulated documents whose true difference is known; and a difference that is the same everywhere has an interval of no width."""
    rng, size, hits = np.random.default_rng(1), np.full(2000, 2), 0
    doc = np.repeat(np.arange(40), 50)
    for _ in range(60):
        d = (0.1 + 0.3 * rng.standard_normal(40))[doc] + rng.standard_normal(2000) * 0.1
        point, low, high = ablate.interval(d, np.zeros(2000), doc, size)
        assert point == pytest.approx(d.mean() / math.log(2) / 2) and low < point < high
        hits += low <= 0.1 / math.log(2) / 2 <= high
    assert 50 <= hits <= 60
    assert ablate.interval(np.full(2000, 0.1), np.zeros(2000), doc, size) == pytest.approx(
        [0.1 / math.log(2) / 2] * 3
    )
