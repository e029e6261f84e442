"""The shape of train_gpt.py that no linter holds: lengths, nesting, arguments, sections."""

import ast
import itertools
import re

from conftest import ROOT, t

SOURCE = (ROOT / "train_gpt.py").read_text()
TREE = ast.parse(SOURCE)
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
LONGER = {"train": 90, "score": 90}
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)


def depth(node, level=0):
    """Levels of nested blocks in a function; an elif is no level."""
    deepest = level
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.Lambda)):
            continue
        chained = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        deepest = max(deepest, depth(child, level + (isinstance(child, BLOCKS) and not chained)))
    return deepest


def test_functions_are_short_and_flat():
    for f in FUNCTIONS:
        lines = f.end_lineno - f.lineno + 1
        assert lines <= LONGER.get(f.name, 50), f"{f.name}: {lines} lines"
        assert depth(f) <= 3, f"{f.name}: {depth(f)} levels"


def test_functions_take_at_most_five_positional_arguments():
    for f in FUNCTIONS:
        names = [a.arg for a in f.args.posonlyargs + f.args.args if a.arg not in ("self", "cls")]
        assert len(names) <= 5, (f.name, names)


def test_one_statement_a_line_and_none_that_is_an_expression():
    for node in ast.walk(TREE):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                for one, other in itertools.pairwise(block):
                    assert one.end_lineno < other.lineno, f"line {other.lineno}"
        if isinstance(node, ast.Expr):
            called = isinstance(node.value, (ast.Call, ast.Constant, ast.Yield, ast.YieldFrom))
            assert called, f"line {node.lineno}: an expression as a statement"


def test_public_names_have_docstrings_and_config_is_c():
    for node in ast.walk(TREE):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            inner = isinstance(node, ast.FunctionDef) and node.name in ("attend", "stream", "parts")
            assert ast.get_docstring(node) or inner, node.name
        if isinstance(node, ast.arg) and node.arg == "c":
            assert isinstance(node.annotation, ast.Name) and node.annotation.id == "Config"


def test_sections_are_those_of_the_map_in_order():
    banners = re.findall(r"^# =+\n# (\d+)\. (.+)\n#\n", SOURCE, re.M)
    assert [int(number) for number, _ in banners] == list(range(2, 18))
    legend = ast.get_docstring(TREE)
    for number in range(1, 18):
        assert re.search(rf"\b{number} [a-z]", legend), number
    assert all(line == line.rstrip() and "\t" not in line for line in SOURCE.splitlines())


def test_every_setting_says_what_it_is_and_families_are_their_words():
    for s in t.SETTINGS.values():
        assert s.text.endswith(".") and len(s.text) > 10, s.name
        assert s.kind in ("str", "bool", "choice", "names") or s.low <= s.high
    assert {"SLOT", "TTT", "CTW", "MUON", "EMA", "SWA", "VE"} <= set(t.FAMILIES)
