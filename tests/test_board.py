"""tools/board.py and tools/page.py: a row a configuration, what is known of it, significance, what differs from a folder's pages, and the page in a browser."""

import base64
import csv
import hashlib
import html.parser
import json
import math
import os
import re
import statistics
import subprocess
import sys

import browser
import pytest
from conftest import PARITY
from scipy import stats

from tools import board, report
from tools.page import page

RECORDS = PARITY / "records_logs"
needs_records = pytest.mark.skipif(
    not RECORDS.exists(), reason="the logs of the challenge's records are not in the repository"
)


def run(path, seed=1, score=1.1, slot=None, lr=0.1, code=900, tokenizer=1024, prequant=False):
    """A log of the lineage's kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        f"logs/{seed}.txt",
        f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./data/fineweb_{tokenizer}_bpe.model",
        f"model_params:5000 matrix_lr:{lr}",
        "world_size:8 grad_accum_steps:1",
        f"seed:{seed}",
        "step:200/900 train_loss:2.0 train_time:20ms step_avg:1ms",
        "step:300/900 val_loss:2.4 val_bpb:1.4 train_time:3000ms step_avg:10ms",
        "prequant_ttt:done elapsed=5.0s" if prequant else "",
        f"Code size: {code} bytes",
        f"Total submission size int6: {15_000_000 + seed} bytes",
        f"final_int6_roundtrip val_loss:{2 * score + 0.02:.4f} val_bpb:{score + 0.01:.4f} eval_time:1000ms",
        f"final_int6_sliding_window val_loss:{2 * score:.4f} val_bpb:{score:.4f} stride:64 eval_time:70000ms",
        f"final_int6_sliding_window_exact val_loss:{2 * score:.8f} val_bpb:{score:.8f}",
    ]
    if slot:
        lines.append(f"final_slot val_loss:{2 * slot:.4f} val_bpb:{slot:.4f} eval_time:5000ms")
    path.write_text("\n".join(lines) + "\n")
    return path


def rows_of(folder, **options):
    return board.board(board.collect([folder]).logs, **options)


def tree(folder):
    """Three records and a stray file."""
    for seed, score in ((1, 1.1000), (2, 1.1010), (3, 1.1020)):
        run(folder / "b" / f"train_seed{seed}.log", seed, score)
    for seed, score in ((1, 1.0800), (2, 1.0810)):
        run(folder / "a" / f"train_seed{seed}.log", seed, score, tokenizer=8192)
    run(folder / "c" / "train.log", 1, 1.2, slot=0.9)
    (folder / "c" / "requirements.txt").write_text("torch==2.9\n")
    for name in "abc":
        (folder / name / "README.md").write_text("# a record\n")
    return folder


def test_a_row_a_configuration_with_its_seeds_merged_the_best_first(tmp_path):
    rows = rows_of(tree(tmp_path))
    assert [(row.name, row.stage, len(row.logs), row.seeds) for row in rows] == [
        ("c", "slot", 1, "1"),
        ("a", "sliding_window", 2, "1, 2"),
        ("b", "sliding_window", 3, "1, 2, 3"),
    ]
    assert [row.causal for row in rows] == [False, True, True]
    assert "C1" in rows[0].breaks and rows[0].how == rows[1].how == "by its stage's name"
    assert rows[2].mean == pytest.approx(1.101) and rows[2].std == pytest.approx(0.001)
    assert (rows[2].seconds, rows[2].bytes, rows[2].steps) == (71, (15000003, "15,000,003 B"), 300)
    assert [row.tokenizer for row in rows] == ["sp1024", "sp8192", "sp1024"]


def test_what_is_one_configuration_and_what_is_not(tmp_path):
    run(tmp_path / "train_seed1.log", 1, 1.10)
    run(tmp_path / "train.log", 1, 1.10)  # a copy
    run(tmp_path / "train_seed2.log", 2, 1.12, code=950)  # a comment changed between seeds
    run(tmp_path / "again_seed2.log", 2, 1.13, code=950)  # the same once more
    run(tmp_path / "fast_seed1.log", 1, 1.14, lr=0.2)
    run(tmp_path / "other_seed1.log", 1, 1.15, code=990)  # the same seed, other code
    run(tmp_path / "slot_seed3.log", 3, 1.11, slot=0.95)  # evaluated in one more way
    rows = rows_of(tmp_path)
    assert [len(row.logs) for row in rows] == [4, 1, 1]
    assert [row.name.split(": ")[1] for row in rows[1:]] == ["fast_seed1", "other_seed1"]
    merged = rows[0]
    assert merged.seeds == "1, 2 x2, 3" and merged.stage == "sliding_window"
    assert sorted(merged.scores) == [1.10, 1.11, 1.12, 1.13]
    assert "its runs had code of 900 and 950 bytes" in merged.differs
    found = board.collect([tmp_path])
    assert "1 copies left out" in board.counts(found, board.board(found.logs))


def test_only_causal_rows_by_the_best_stage_that_is(tmp_path):
    rows = rows_of(tree(tmp_path), causal=True)
    assert [(row.name, row.stage, row.mean) for row in rows][-1] == ("c", "sliding_window", 1.2)
    assert all(row.causal is True for row in rows)
    run(tmp_path / "d" / "train.log", 1, 1.0, prequant=True)
    assert "d" not in [row.name for row in rows_of(tmp_path, causal=True)]
    row = next(row for row in rows_of(tmp_path) if row.name == "d")
    assert row.causal is False and row.breaks == "C3" and "validation tokens" in row.how


def test_only_one_tokenizer(tmp_path, capsys):
    tree(tmp_path)
    assert [row.name for row in rows_of(tmp_path, tokenizer="sp8192")] == ["a"]
    assert report.main(["--board", str(tmp_path), "--tokenizer", "sp7"]) == 2
    assert "no run with the tokenizer sp7; there are sp1024, sp8192" in capsys.readouterr().err


def test_a_run_that_scored_no_artifact_comes_last(tmp_path):
    path = run(tree(tmp_path) / "d" / "train.log", 1, 0.5)
    path.write_text("\n".join(x for x in path.read_text().splitlines() if "final" not in x) + "\n")
    row = rows_of(tmp_path)[-1]
    assert (row.name, row.stage, row.mean, row.scored) == ("d", board.VALIDATION, 1.4, False)
    assert not row.against
    assert any("no artifact was scored" in line for line in board.lines(rows_of(tmp_path)))


def test_a_run_that_broke_off_takes_no_score_from_its_seeds(tmp_path):
    path = run(tree(tmp_path) / "b" / "train_seed4.log", 4, 1.1)
    text = path.read_text()
    path.write_text(text[: text.index("final_")])
    rows = [row for row in rows_of(tmp_path) if row.folder.name == "b"]
    assert [(row.seeds, row.scored) for row in rows] == [("1, 2, 3", True), ("4", False)]


def test_significance_is_welchs_in_nats_of_the_row_above(tmp_path):
    rows = rows_of(tree(tmp_path))
    a, b = rows[1], rows[2]
    assert not a.against or all(math.isnan(p) for p in a.against.values())  # one run above it
    # 0.005 nats are 0.0025 bits a byte where a bit a byte is two nats a token
    for margin, bits in ((0.005, 0.0025), (0.0, 0.0)):
        p = stats.ttest_ind(
            [x - bits for x in b.scores], a.scores, equal_var=False, alternative="greater"
        ).pvalue
        assert b.against[margin] == pytest.approx(p)
    told = board.cells(3, b)
    assert told["p"].endswith(" yes") and float(told["p"].split()[0]) < board.ACCEPTED
    near = tmp_path / "near"
    for seed, score in ((1, 1.1001), (2, 1.1012), (3, 1.1019)):
        run(near / f"train_seed{seed}.log", seed, score)
    last = rows_of(tmp_path)[-1]
    assert board.cells(4, last)["p"].endswith(" no")


def test_rows_of_other_texts_are_not_compared(tmp_path):
    logs = board.collect([tree(tmp_path)]).logs
    for name, size in (("a", 100), ("b", 200)):
        for log in logs[tmp_path / name]:
            log.results["sliding_window"].bytes = size
    assert not board.board(logs)[2].against


README = """# A record
| Seed | Steps | Sliding bpb | **Artifact** | ms/step | gain |
|---|---|---|---|---|---|
| 1 | 300 | 1.1000 | 15.00 MB | 10.0 | 7 |
| **2** | 310 | **1.1011** | 15,000,002 | 10.0ms | 7 |
| 3 | 300 | 1.1020 | 15,000,007 | 11.0 | 7 |
| 9 | 1 | 1.0 | 1 | 1 | 1 |
| mean | 300 | 1.1010 | | | |
"""


def test_what_differs_from_the_folders_own_pages(tmp_path):
    folder = tree(tmp_path) / "b"
    (folder / "README.md").write_text(README)
    seeds = {"1": {"val_bpb": 1.1, "steps": 300}, "2": {"val_bpb": 1.2, "note": "x", "ok": True}}
    (folder / "submission.json").write_text(json.dumps({"val_bpb": 1.1, "seed_results": seeds}))
    run(folder / "train_seed8.log", 4, 1.1010)
    row = next(row for row in rows_of(tmp_path) if row.folder == folder)
    assert row.differs == [
        "README, seed 2, Steps: 310, the log says 300",
        "README, seed 2, Sliding bpb: 1.1011, the log says 1.10100",
        "README, seed 3, Artifact: 15,000,007, the log says 15,000,003",
        "README, seed 3, ms/step: 11.0, the log says 10.00000",
        "submission.json: 1.1 is the sliding score of train_seed1.log alone",
        "submission.json, seed 2, val_bpb: 1.2000, the log says 1.11100",
        "train_seed8.log says seed 4",
    ]
    (folder / "submission.json").write_text('{"val_bpb": 1.15}')
    row = next(row for row in rows_of(tmp_path) if row.folder == folder)
    assert "submission.json: 1.15, the logs' mean is 1.10100" in row.differs
    for odd in ("{", "[1]", '{"val_bpb": true, "seed_results": [1]}', '{"val_bpb": NaN}'):
        (folder / "submission.json").write_text(odd)
        row = next(row for row in rows_of(tmp_path) if row.folder == folder)
        assert sum("submission.json" in s for s in row.differs) == (odd == "{")


def test_logs_below_a_record_are_the_records(tmp_path):
    folder = tree(tmp_path) / "b"
    run(folder / "logs" / "more" / "train_seed5.log", 5, 1.1030)
    (tmp_path / "README.md").write_text("of the tree itself\n")
    run(tmp_path / "stray" / "train.log", 1, 1.3)
    rows = {row.name: row for row in rows_of(tmp_path)}
    assert rows["b"].seeds == "1, 2, 3, 5" and len(rows["stray"].logs) == 1


def test_text_and_csv(tmp_path, capsys):
    tree(tmp_path / "t")
    target = tmp_path / "board.csv"
    assert report.main(["--board", str(tmp_path / "t"), "--csv", str(target)]) == 0
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if line.startswith("| ")]
    assert len(lines) == 4 and "TTT" not in captured.out and "| SLOT " in lines[1]
    assert "3 configurations, 6 of 6 runs in 6 logs; 1 file is no log." in captured.out
    assert "requirements.txt: is a list of packages" in captured.err
    with open(target, newline="") as file:
        (first, *_, last) = csv.DictReader(file)
    assert first["causal"] == "no" and first["how that is known"].endswith("(breaks C1,C2,C3)")
    assert (last["bits a byte"], last["bytes"], last["steps"]) == ("1.10100", "15000003", "300")


def test_bad_input_is_a_line_each_and_the_rest_goes_on(tmp_path, capsys):
    folder = tree(tmp_path / "t")
    big = folder / "a" / "big.log"
    with open(big, "wb") as file:
        os.truncate(file.fileno(), 200_000_000)  # a hole: no disk is written
    (folder / "b" / "binary.log").write_bytes(b"seed:1\n\0\1\2" * 99)
    (folder / "c" / "prose.log").write_text("once upon a time\n" * 9)
    assert report.main(["--board", str(folder)]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    for path, why in ((big, "has 200 MB"), ("binary.log", "is binary"), ("prose.log", "no line")):
        assert sum(str(path) in line and why in line for line in errors) == 1
    assert captured.out.count("\n| ") == 3 and "3 not read or not understood" in captured.out
    (tmp_path / "empty").mkdir()
    for args, why in (
        ([tmp_path / "empty"], "no training log there"),
        ([tmp_path / "none"], "No such file or directory"),
        ([folder, "--html", tmp_path / "empty"], "Is a directory"),
    ):
        assert report.main(["--board", *map(str, args)]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ") and why in last


# ---- the page

BAD = '<img src=x onerror="window.bad=1"><script>window.bad=1'


def written(tmp_path, records=False):
    """A page of a tree, or of all records."""
    folder = RECORDS if records else tree(tmp_path / "t")
    if not records:
        for seed in (1, 2):
            run(folder / BAD / f"{BAD}seed{seed}.log", seed, 1.15 + seed / 1000, lr=seed)
    target = tmp_path / "board.html"
    assert report.main(["--board", str(folder), "--html", str(target)]) in (0, 2)
    return target


class Tags(html.parser.HTMLParser):
    """Tags and scripts of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script"

    def handle_data(self, data):
        if self.inside:
            self.scripts.append(data)
        self.inside = False


def test_the_page_is_one_file_and_what_logs_say_is_text_in_it(tmp_path):
    text = written(tmp_path).read_text()
    found = Tags(text)
    names = [tag for tag, _ in found.tags]
    assert "img" not in names and names.count("script") == 2 and names.count("tr") == 6
    assert not any({"src", "href"} & set(attrs) for _, attrs in found.tags)
    assert BAD not in text and len(text) < 250_000
    policy = next(a["content"] for tag, a in found.tags if a.get("http-equiv"))
    for script in found.scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and policy.count("sha256-") == 2


def test_a_page_of_rows_without_figures(tmp_path):
    path = run(tmp_path / "train.log")
    path.write_text("step:9/9 val_loss:2.4 val_bpb:1.4\n")
    text = page(rows_of(tmp_path), "A & B", [])
    assert (
        "<h1>A &amp; B</h1>" in text and "nan" not in text.split("</thead>")[1].split("<script")[0]
    )


@pytest.mark.slow
@pytest.mark.skipif(not browser.FOUND, reason="no Chromium on this machine")
@pytest.mark.parametrize("records", [False, pytest.param(True, marks=needs_records)])
def test_the_page_sorts_and_filters_in_a_browser(records, tmp_path):
    target = written(tmp_path, records)
    column = (
        "[...document.querySelectorAll('#board tbody td:nth-child({})')].map(x => x.textContent)"
    )
    head = "document.querySelector('#board th[data-name={}]')"
    with browser.Browser(tmp_path / "profile") as tab:
        tab.open(target)
        scores = [float(x) for x in tab.run(column.format(2))]
        count = len(scores)
        assert count == (81 if records else 5)
        assert scores == sorted(scores) or records  # unscored rows come last there
        for name, at in (("score", 2), ("bytes", 10)):
            for order in ("ascending", "descending"):
                tab.run(head.format(name) + ".click()")
                assert tab.run(head.format(name) + ".ariaSort") == order
                told = [x.replace(",", "").removesuffix(" MB") for x in tab.run(column.format(at))]
                values = [
                    float(x) * (1e6 if "." in x and name == "bytes" else 1) for x in told if x
                ]
                assert values == sorted(values, reverse=order == "descending")
        tab.run("document.querySelector('input[type=search]').focus()")
        tab.type("slot" if not records else "parallelresid")
        left = tab.run(column.format(4))
        assert 0 < len(left) < count
        assert all(re.search("parallelresid", x, re.I) for x in left) if records else left == ["c"]
        tab.run("document.querySelector('input[type=search]').select()")
        tab.call(
            "Input.dispatchKeyEvent",
            type="keyDown",
            key="Delete",
            code="Delete",
            windowsVirtualKeyCode=46,
        )
        assert len(tab.run(column.format(2))) == count
        choose = "(([e, v]) => {{ e.value = v; e.dispatchEvent(new Event('change')); }})([document.getElementById('{}'), '{}'])"
        tab.run(choose.format("tokenizer", "sp8192"))
        chosen = tab.run(column.format(13))
        assert set(chosen) == {"sp8192"} and len(chosen) < count
        tab.run(choose.format("tokenizer", ""))
        tab.run(choose.format("causal", "unknown" if records else "no"))
        verdicts = tab.run(column.format(6))
        assert 0 < len(verdicts) < count
        assert all(x.startswith("unknown" if records else "no") for x in verdicts)
        tab.run(choose.format("causal", "no" if records else "unknown"))
        assert tab.run("document.querySelectorAll('#board tbody td').length") == 1  # says so
        assert tab.run("window.bad") is None and tab.errors == []
        tab.run(choose.format("causal", ""))
        assert len(tab.run(column.format(2))) == count


@needs_records
def test_the_board_of_all_records_takes_little_time_and_memory(tmp_path):
    """In a process of its own: under 20 s and 300 MB, and its scores are the leaderboard's."""
    code = (
        "import sys, time; began = time.perf_counter(); from tools import report; status = report.main(sys.argv[1:]); "
        "print(status, time.perf_counter() - began, open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    target = tmp_path / "b.csv"
    args = ["--board", str(RECORDS), "--csv", str(target), "--html", str(tmp_path / "b.html")]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    status, seconds, memory = done.stdout.splitlines()[-1].split()
    assert status == "0" and float(seconds) < 20 and float(memory) / 1024 < 300
    with open(target, newline="") as file:
        rows = list(csv.DictReader(file))
    found = {row["run"]: row for row in rows}
    for name, score in (  # merged seeds, from the folders' names and pages
        ("2026-04-27_SP8192_LQER_SparseGate_BOSSmearFix_9HpStack_1.0611", "1.06108"),
        ("2026-04-19_SP8192_CaseOps_GatedAttn_QuantGate_Loop45_PhasedTTT", "1.06549"),
        ("2026-04-09_SP8192_3LayerRecur_ParResid_QK525_LegalTTT", "1.08100"),
        ("2026-04-04_SP4096_DepthRecurrence_ParallelResid_MuonEqR", "1.08972"),
        ("2026-03-24_74M_Ternary_UNet_FP8_10L_8192BPE_YaRN_NeoMuon", "1.15703"),
        ("2026-03-17_NaiveBaseline", "1.22437"),
    ):
        assert found[name]["bits a byte"] == score
    scored = [float(row["bits a byte"]) for row in rows if row["stage"] != board.VALIDATION]
    assert scored == sorted(scored) and len(rows) - len(scored) == 3
    assert statistics.median(scored) < 1.25 and all(row["how that is known"] for row in rows)
