"""What a rewrite must not change: the figures of tests/matrix.json, on any CPU."""

import json

import matrix
import pytest
from conftest import t

# Where the cap binds, a rounding elsewhere moves the step size, and with it what is exported.
BINDING = {name for name, case in matrix.CASES.items() if "budget" in case}
QUICK = ("default", "cut", "gptq", "qat_budget", "slot_window_scored_1", "ctw", "preset_best")


def compare(found):
    """Figures that differ by more than another CPU's rounding."""
    expected, lines = json.loads(matrix.RECORD.read_text()), []
    for name in found:
        coarse = name in BINDING or "qat" in name or name in ("cut", "preset_best")
        tolerance = 2e-3 if coarse else 1e-5
        ours, theirs = ({name: clean(x[name])} for x in (found, expected))
        lines += matrix.differences(ours, theirs, tolerance)
    return lines


def clean(rows):
    """Without counts of bytes and step sizes, which the last bit of a weight can move."""
    return {
        label: {k: v for k, v in row.items() if not k.endswith("_bytes") and k != "step"}
        for label, row in rows.items()
    }


def test_every_preset_and_mode_has_a_case():
    assert {f"preset_{name}" for name in t.PRESETS} <= set(matrix.CASES)
    assert json.loads(matrix.RECORD.read_text()).keys() == matrix.CASES.keys()


def test_a_few_figures_are_those_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compare(matrix.run_matrix(t, tmp_path, QUICK)) == []


@pytest.mark.slow
def test_all_figures_are_those_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rest = [name for name in matrix.CASES if name not in QUICK or name == "default"]
    assert compare(matrix.run_matrix(t, tmp_path, rest)) == []


def test_a_changed_figure_is_named():
    one = {"a": {"final": {"val_loss": 1.0, "tokens": 3}}}
    other = {"a": {"final": {"val_loss": 1.0 + 1e-6, "tokens": 4}}}
    assert matrix.differences(one, one) == []
    assert len(matrix.differences(one, other)) == 2
    assert matrix.differences(one, other, 1e-5) == ["a final tokens: 3, recorded 4"]
