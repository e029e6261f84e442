"""Each folder of logs/ says what was asked, how it was run, by which version of the script, and what came out."""

import contextlib
import re
import subprocess

import pytest
from conftest import ROOT

from tools.logs import NoLog, read_logs

SEPARATOR = "\n" + "=" * 100 + "\n"  # after the source that a log opens with


def git(*words):
    """What git says, "" where there is no repository or no such commit."""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout


def committed(pattern):
    """Paths of the evidence, which git knows; runs of a user are none."""
    return [ROOT / path for path in git("ls-files", pattern).splitlines()]


FOLDERS = sorted({path.parents[-len(ROOT.parts) - 2] for path in committed("logs/*/*")})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_of_evidence_says_what_is_in_it(folder):
    text = (folder / "README.md").read_text()
    assert re.match(r"# .*\?\n\n", text)
    assert re.findall(r"^- \*\*(\w+)\*\*: .+$", text, re.M) == [
        "Question",
        "Command",
        "Script",
        "Result",
    ]
    for log in [*folder.glob("*.txt"), *folder.glob("*.json")]:
        if log in committed(f"logs/{folder.name}"):
            pattern = re.sub(r"(demo|6x192)$", r"(?:\1|\\*_\1)", log.stem)
            assert re.search(rf"`{pattern}`", text), log.name


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_commits_that_it_names_hold_the_scripts_that_wrote_the_logs(folder):
    """A log opens with its script. What no commit holds is said to be so."""
    if git("rev-parse", "--is-shallow-repository").strip() != "false":
        pytest.skip("without the history")
    text = (folder / "README.md").read_text()
    told = re.search(r"^- \*\*Script\*\*: (.*)$", text, re.M)[1]
    commits = re.findall(r"`([0-9a-f]{7})`", told)
    scripts = {git("show", f"{commit}:train_gpt.py") for commit in commits}
    assert commits and "" not in scripts
    for log in committed(f"logs/{folder.name}/*.txt"):
        source, separator, _ = log.read_text().partition(SEPARATOR)
        if separator and source not in scripts:
            assert "not committed" in told and f"`{log.stem}`" in told, log.name


def test_a_board_of_all_evidence_knows_every_file():
    """As a run, or as what else it is: what a command said opens with `$ `."""
    for log in committed("logs/*/*.txt"):
        with contextlib.suppress(NoLog):
            read_logs(log)
