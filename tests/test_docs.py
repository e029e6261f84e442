"""What README.md, LOG.md, docs/ and submission.json say is what the committed logs say."""

import json
import re
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT, read_metrics, t
from scipy import stats

sys.path.insert(0, str(ROOT / "tests/cheats"))
import own

from tools import blocks, settings_page
from tools.logs import read_log
from tools.submission import submission

PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in blocks.pages()}
README = PAGES["README.md"]
SEEDS = [ROOT / "logs" / f"demo/seed{seed}" for seed in blocks.SEEDS]
PUBLISHED = {  # figures of others outside tables, which the text says are theirs
    "4.1296",  # the lineage's script, trained as artifact a: docs/lineage.md
    "5.3599",
    "0.0017",  # score-first TTT of #549 and #1493: docs/adaptation.md
    "0.0025",
    "2.4359",  # bytes a token in the challenge's records: docs/reading-logs.md
}


def result_lines(log):
    """The lines of a log after the source and settings that open it."""
    return log.read_text().rsplit("=" * 100, 1)[1]


def metrics(name):
    """Metrics of a committed run by label."""
    return read_metrics(ROOT / "logs" / name)


def words(page):
    """A page's text in one line."""
    return " ".join(PAGES[page].split())


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_what_the_logs_give(page):
    assert PAGES[page] == blocks.rendered(PAGES[page])


def test_every_block_stands_on_one_page_and_has_its_end():
    text = "".join(PAGES.values())
    found = [name for _, name, _, _ in blocks.BLOCK.findall(text)]
    assert sorted(found) == sorted(blocks.MAKERS) and text.count("\n<!-- block ") == len(found)


def test_blocks_write_and_list_what_is_stale(tmp_path, monkeypatch, capsys):
    page = tmp_path / "a.md"
    page.write_text("x\n<!-- block landing -->\nold\n<!-- end -->\ny\n")
    monkeypatch.setattr(blocks, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["blocks"])
    assert blocks.main() == 1 and "a.md: not what logs/ says" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["blocks", "--write"])
    assert blocks.main() == 0 and page.read_text().startswith("x\n<!-- block landing -->\n| seed")
    monkeypatch.setattr("sys.argv", ["blocks"])
    assert blocks.main() == 0 and page.read_text().endswith("<!-- end -->\ny\n")


def test_settings_page_is_what_the_script_says():
    page = settings_page.page()
    assert PAGES["docs/settings.md"] == page
    for name in [*t.SETTINGS, *t.EVALUATORS, *t.PRESETS]:
        assert page.count(f"\n| `{name}` |") == 1, name


def test_settings_page_is_written_by_its_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(settings_page, "ROOT", tmp_path)
    monkeypatch.setattr(settings_page, "PAGE", tmp_path / "settings.md")
    monkeypatch.setattr("sys.argv", ["settings_page"])
    settings_page.main()
    assert (tmp_path / "settings.md").read_text() == PAGES["docs/settings.md"]
    assert capsys.readouterr().out == "settings.md: written\n"


def test_the_demos_logs_are_whole_and_of_a_cpu():
    for prefix in ("seed", "best_seed"):
        for log in blocks.seed_logs(prefix):
            assert log.finished and not log.mislabelled and log.hardware.startswith("cpu")


def test_submission_is_what_the_logs_give():
    found = json.loads((ROOT / "submission.json").read_text())
    told = {key: found[key] for key in ("name", "author", "github_id", "date", "track", "blurb")}
    logs = [read_log(seed) for seed in SEEDS]
    assert found == json.loads(json.dumps(submission(logs, **told)))
    assert found["causal"] and found["compliance"]["three_seeds"] and "cpu" in found["hardware"]


def test_metrics_and_text_logs_agree():
    for folder in SEEDS:
        text = result_lines(folder.with_suffix(".txt"))
        for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
            if row["label"].startswith("final_"):
                assert (
                    f"{row['label']} val_loss:{row['val_loss']:.8f} val_bpb:{row['val_bpb']:.8f}"
                    f" tokens:{row['tokens']} bytes:{row['bytes']}"
                ) in text


# ---- findings that pages draw from blocks


def test_quantisers_reach_their_figures():
    rows = {label: row for label, row in metrics("quantisers/q1").items() if "damage" in row}
    for size in (15880000, 13500000, 11500000):
        lite, rd, gptq = (
            rows[f"{name}@{size}"]
            for name in ("QUANT=gptq_lite,CODER=lzma", "QUANT=rd", "QUANT=gptq")
        )
        assert 0.998 * size < rd["model_bytes"] <= size
        assert rd["damage"] <= 0.5 * lite["damage"] and gptq["damage"] < rd["damage"]
        assert rd["level_bytes"] <= 1.015 * rd["entropy_bytes"]
        assert max(rd["load"], gptq["load"]) < 20
    fewer, more = rows["QUANT=rd@11500000"], rows["QUANT=gptq_lite,CODER=lzma@15880000"]
    assert fewer["damage"] < more["damage"]
    assert round(100 * (1 - fewer["model_bytes"] / more["model_bytes"])) == 28


def test_late_qat_takes_off_what_the_page_says():
    off, on = (
        metrics(f"quantisers/qat_{k}")["final_artifact_roundtrip"]["val_loss"]
        - metrics(f"quantisers/qat_{k}")["final_float_roundtrip"]["val_loss"]
        for k in (0, 1)
    )
    assert f"takes {100 * (1 - on / off):.0f} % off" in words("docs/quantisation.md")


def test_every_seed_of_the_full_size_lands_under_the_cap():
    for seed in blocks.SEEDS:
        size = metrics(f"quantisers/full_seed{seed}")["artifact"]["total_bytes"]
        assert 15_968_000 <= size <= 15_999_999


def test_best_is_better_in_no_more_time():
    scores, seconds = {}, {}
    for prefix in ("seed", "best_seed"):
        results = [log.results["ttt"] for log in blocks.seed_logs(prefix)]
        assert all(result.causal for result in results)
        scores[prefix] = [result.val_bpb for result in results]
        seconds[prefix] = statistics.mean(
            metrics(f"demo/{prefix}{seed}")["training"]["train_time"] for seed in blocks.SEEDS
        )
    new, old = scores["best_seed"], scores["seed"]
    assert stats.ttest_ind(new, old, equal_var=False, alternative="less").pvalue < 0.01
    assert seconds["best_seed"] <= 1.02 * seconds["seed"]
    assert f"scores {statistics.mean(new):.4f} instead of {statistics.mean(old):.4f}" in words(
        "docs/ablations.md"
    )


def test_scores_equal_the_lineages():
    for _, what, theirs, log, label in blocks.EQUALITY:
        ours = read_log(ROOT / "logs" / "equality" / f"{log}.txt").results[label].val_loss
        assert abs(theirs - ours) < (2e-5 if "SLOT" in what else 4e-7), (log, label)


def test_findings_on_slot_are_those_of_the_pages():
    kept, honest, best, _, gross = blocks.finding_lines()[2:]
    text = words("docs/slot.md")
    assert re.findall(r"(\d+) to (\d+) %", kept) == [("98", "99"), ("97", "99")]
    assert "97 to 99 % of the gain" in words("README.md")
    demo, fineweb = re.findall(r"(\d+) %", honest)
    assert f"{fineweb} % (FineWeb) to {demo} % (demo)" in words("README.md")
    rows = [row for name in blocks.SPLITS for row in blocks.ablation(name).values()]
    assert len(rows) == 2 * 91 and "All 91 rows" in text
    best, gross = ([float(x) for x in re.findall(r"[+-]\d\.\d{4}", line)] for line in (best, gross))
    assert gross[1] / best[1] == pytest.approx(100, abs=10) and "a hundred times" in text
    assert all(b / g < 0.3 for b, g in zip(best, gross))  # "nearly all" is leak
    assert all(row["high"] > 0 for row in rows[91:] if row["base"] == "past")  # not told from 0


def test_what_slot_costs_is_in_the_logs():
    text = words("docs/slot.md")
    speed = re.findall(
        r"added time ([\d.]+) times less", (ROOT / "logs/slot/speed.txt").read_text()
    )
    said = re.search(
        r"own time is ([\d.]+) times less .*? and ([\d.]+) times less .*?; ([\d.]+) times less than",
        text,
    )
    assert list(said.groups()) == speed
    systems = blocks.ablation("slot/systems_demo")
    ratio = systems["pr1313"]["seconds"] / systems["sliding, stride 96"]["seconds"]
    assert f"takes {ratio:.1f} times as long as sliding" in text
    same = {f"{systems[name]['val_bpb']:.4f}" for name in ("pr1313", "hypergradient")}
    assert len(same) == 1 and f"in all four digits, {same.pop()}" in words("LOG.md")


def test_ranks_from_which_sending_takes_longer():
    for line in blocks.traffic_lines()[2:]:
        ranks, *_, sending, computing = (cell.strip() for cell in line.strip("|").split("|"))
        at_50, compute = float(sending), float(computing)
        assert (at_50 > compute) == (int(ranks) >= 64)
        assert (4 * at_50 > compute) == (int(ranks) >= 32)


def test_kills_and_the_cost_of_checkpoints_are_in_the_logs():
    log, text = (ROOT / "logs/resume/soak.txt").read_text(), words("docs/resume.md")
    found = re.search(r"^kills:(\d+) chains:(\d+) failed:(\d+)$", log, re.M)
    kills, chains, failed = map(int, found.groups())
    ends = re.findall(r"^chain \d+ ranks:\d (.*) -> (.*)$", log, re.M)
    assert kills >= 200 and failed == 0
    assert len(ends) == chains and {end for _, end in ends} == {"same"}
    assert sum(len(re.findall("SIGKILL |SIGTERM ", told)) for told, _ in ends) == kills
    assert f"Of {kills} kills in {chains} runs none" in text
    phases = "training,writing a file,exporting,TTT,an evaluation that went on,one rank"
    for phase in ("sliding, slot, ctw", *phases.split(",")):
        assert phase in log, phase
    cost = (ROOT / "logs/resume/checkpoint_cost.txt").read_text()
    share = re.search(r"costs (-?[\d.]+) % of training time", cost)[1]
    assert float(share) < 3 and f"training time by {share} % over six pairs" in text


def test_errors_of_frequent_tokens_cost_what_the_page_says():
    log = (ROOT / "logs/best_demo/frequent.txt").read_text()
    first, share, cost, step = re.search(
        r"frequent:(\d+) of_text:(\S+) cost_ratio:(\S+) step_ratio:(\S+)", log
    ).groups()
    assert (
        f"{float(cost):.1f} times as high in the embeddings of the {first} most frequent tokens,"
        f" which are {100 * float(share):.0f} % of the text, as in the others, and their steps are"
        f" {1 / float(step):.1f} times as fine"
    ) in words("docs/lineage.md")


def test_audits_of_the_demo_found_what_was_claimed():
    names = ("context", "past", "systems")
    logs = {name: (ROOT / f"logs/audits/{name}.txt").read_text() for name in names}
    for name, text in logs.items():
        assert "NOT AS CLAIMED" not in text
        assert text.count("exit status 0") == text.count("exit status") > 0
        verdicts = [line.split() for line in text.splitlines() if line.endswith("as claimed")]
        assert {row[0] for row in verdicts} <= set(t.EVALUATORS)
        if name != "systems":  # 200 probes on one rank and on two
            assert [row[1:4] for row in verdicts] == [["causal", "causal", "0/200"]] * 2
            assert "1 rank(s)" in text and "2 rank(s)" in text


@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks"])
def test_cheats_in_our_own_evaluators_were_found_and_nothing_else_suspected(ranks):
    told = (ROOT / f"logs/audits/own_{ranks}.txt").read_text()
    found = dict(re.findall(r"^(.*): (\d+) of 20 as expected", told, re.M))  # the last of each
    assert found == dict.fromkeys(own.CASES, "20")


def test_planted_cheats_were_found_and_honest_evaluators_not_suspected():
    rows = [json.loads(line) for line in (ROOT / "logs/audits/cheats.jsonl").open()]
    assert len(rows) > 40
    for row in rows:
        assert row["seeds"] >= 20 and row["found"] == (0 if row["honest"] else row["seeds"]), row


# ---- prose


def prose(text):
    """A page's text without blocks, tables, code and what others tried."""
    text = blocks.BLOCK.sub("", text).split("## Tried by others")[0]
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    return re.sub(r"^(\||    ).*$", "", text, flags=re.M)


def test_scores_in_prose_are_in_the_logs():
    known = set(PUBLISHED)
    names = ("val_loss", "val_bpb", "diff", "low", "high", "damage", "heldout_train_loss")
    for path in (ROOT / "logs").glob("*/*/metrics.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            known |= {f"{abs(row[name]):.4f}" for name in names if name in row}
    for page in PAGES.values():
        for maker in blocks.BLOCK.findall(page):
            known |= set(re.findall(r"\d\.\d{4}", maker[2]))
    for name, page in PAGES.items():
        if name != "docs/benchmarks.md":
            numbers = set(re.findall(r"(?<![\d.])\d\.\d{4}(?!\d)", prose(page)))
            assert numbers <= known, (name, numbers - known)


def test_commands_and_settings_on_the_pages_exist():
    others = {"PYTHON", "TRAIN_SHARDS", "FIRST", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "NAME"}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for name, page in PAGES.items():
        for setting in re.findall(r"\b([A-Z][A-Z0-9_]{3,})=", page):
            assert setting in set(t.SETTINGS) | others, (name, setting)
        for target in re.findall(r"(?:`|^    )make (?:[A-Z]+=\S+ )?([a-z-]+)", page, re.M):
            assert target in targets, (name, target)
        for tool in re.findall(r"python -m tools\.(\w+)", page):
            assert (ROOT / "tools" / f"{tool}.py").exists() or (ROOT / "tools" / tool).is_dir()
        for path in re.findall(r"`((?:logs|tests|tools|data)/[\w/.]+)`", page):
            made = re.search(r"/(RUN_ID|ID|gpu|mine)\b", path)  # by the reader
            assert made or (ROOT / path).exists() or (ROOT / f"{path}.txt").exists(), (name, path)


def without_brackets(line):
    """A line without what it says in brackets."""
    return re.sub(r" \(.*?\)", "", line)


def line_pattern(template):
    """Regular expression of a line of docs/format.md: capitals and dots stand for anything."""
    pattern = re.escape(without_brackets(template)).replace(re.escape("..."), ".*")
    pattern = re.sub(r"[A-Z]{2,}|\b[NXVD]\b", ".+", pattern)
    pattern = pattern.replace("causal:yes", "causal:(?:yes|no)")
    return pattern + (r"(?: breaks:\S+)?" if template.startswith("final_") else "")


def test_every_line_of_a_log_is_described():
    lines = PAGES["docs/format.md"].split("## Log lines")[1]
    templates = re.findall(r"^\| `([^`]+)` \| ", lines, re.M)
    known = re.compile("|".join(map(line_pattern, templates)))
    assert not known.fullmatch("step:1/2 train_los:3 train_time:4ms step_avg:5ms")
    for log in (*SEEDS, *(ROOT / "logs/demo").glob("best_seed*.txt")):
        for line in result_lines(log.with_suffix(".txt")).splitlines()[1:]:
            assert known.fullmatch(without_brackets(line)), line


def test_first_screen_of_the_readme():
    lines = README.splitlines()
    assert len(lines) <= 120
    assert next(k for k, line in enumerate(lines, 1) if line.startswith("    make")) <= 25
    tables = re.findall(r"^\|-.*\n((?:\|.*\n)+)", README, re.M)
    assert len(tables[0].splitlines()) <= 6 and len(tables[1].splitlines()) <= 6


def test_nothing_large_or_private_is_committed():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    files = listed.stdout.split("\0")[:-1]
    if not files:
        pytest.skip("not a git checkout")
    for file in files:
        path = ROOT / file
        assert not path.exists() or path.stat().st_size <= 1_000_000, file
        assert not file.endswith((".bin", ".ptz", ".pt", ".model")), file
