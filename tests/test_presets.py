"""Every preset, shrunk, on one rank and on two: trains, is cut off, goes on, exports and evaluates, with labels that are true.

torchrun --standalone --nproc_per_node=2 tests/test_presets.py FOLDER    what the test of two ranks starts
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import matrix
import pytest
from conftest import read_metrics, t

CUT = 8  # the training step in which a run is cut off


def run_presets(folder):
    """Cut off and resume a run of each preset; all in this process, under torchrun in each of them."""
    data = {1: json.loads((folder / "data.json").read_text())}
    os.chdir(folder)
    for name in t.PRESETS:
        env = matrix.settings_of(f"preset_{name}", data, t.code_bytes()) | dict(SAVE_EVERY="3")
        with contextlib.redirect_stdout(None):
            matrix.run_cut(t, env, CUT)


@pytest.fixture(scope="module", params=[1, 2])
def runs(request, tmp_path_factory):
    """{preset: its figures by label} on so many ranks."""
    folder = tmp_path_factory.mktemp(f"presets{request.param}")
    data = matrix.make_data(folder)[1]
    (folder / "data.json").write_text(json.dumps(data))
    command = [sys.executable, __file__, str(folder)]
    if request.param > 1:
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command[1:1] = ranks
    clean = {key: value for key, value in os.environ.items() if key not in t.SETTINGS}
    done = subprocess.run(
        command, env={**clean, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: read_metrics(folder / "logs" / f"preset_{name}") for name in t.PRESETS}


@pytest.mark.slow
@pytest.mark.parametrize("name", t.PRESETS)
def test_a_preset_trains_goes_on_exports_and_evaluates(name, runs):
    found = runs[name]
    settings = found["settings"]
    assert found["training"]["steps"] == settings["ITERATIONS"] == 12
    assert found["step:12/12"]["val_loss"] < found["step:0/12"]["val_loss"] - 0.3
    results = {label: row for label, row in found.items() if label.startswith("final_")}
    assert len(results) == 1 + len(settings["EVALS"])
    adapted = settings["PREQUANT_TTT_ENABLED"] or settings["CALIBRATION"] == "validation"
    for label, row in results.items():
        assert 0 < row["val_loss"] < found["step:0/12"]["val_loss"]
        told = row.get("breaks", "").split(",")
        assert ("C3" in told) == (adapted or "slot" in label), label


@pytest.mark.slow
def test_both_ran_recurrence_where_the_preset_has_it(runs):
    for name, found in runs.items():
        assert bool(found["settings"]["RECUR_LAYERS"]) == (
            name in ("best", "pr1278", "pr1435", "pr1042", "pr1498")
        ), name


if __name__ == "__main__":
    run_presets(Path(sys.argv[1]))
    os._exit(0)  # taking gloo down aborts some ranks
