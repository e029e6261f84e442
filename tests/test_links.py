"""Every relative link, anchor and image of the Markdown files leads somewhere, and what is asked for most is near."""

import re

import pytest
from conftest import ROOT

FILES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("logs/**/README.md")])
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# What two clicks from README must reach: a page and words on it.
WANTED = (
    ("docs/slot.md", "| fitted to | steps, rate | demo | FineWeb | causal |"),
    ("docs/settings.md", "| `TRAIN_BATCH_TOKENS` |"),
    ("docs/format.md", "## Artifact"),
    ("CONTRIBUTING.md", "| an evaluator |"),
    ("LOG.md", "# What was tried and did not help"),
    ("docs/resume.md", "## Slurm"),
)


def text_of(path):
    """A file's Markdown without code."""
    text = re.sub(r"^    .*$", "", path.read_text(), flags=re.M)
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


def anchors(path):
    """Anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading).strip().lower() for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def targets(path):
    """(file or folder, anchor) of each relative link of a page."""
    for link in LINK.findall(text_of(path)):
        if not re.match(r"https?:|mailto:", link):
            place, _, anchor = link.partition("#")
            yield (path.parent / place).resolve() if place else path, anchor


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_links_lead_somewhere(path):
    for target, anchor in targets(path):
        assert target.exists() and target.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(target), f"{target.name}#{anchor}"


def test_every_page_is_linked_and_what_is_wanted_is_two_clicks_away():
    one = {target for target, _ in targets(ROOT / "README.md")}
    two = one | {t for page in one if page.suffix == ".md" for t, _ in targets(page)}
    for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")):
        assert path in one or path.name == "README.md", f"README does not link {path.name}"
    for name, words in WANTED:
        assert ROOT / name in two and words in (ROOT / name).read_text(), name


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "a.md"
    page.write_text(
        "# Some `title`, here\n[a](b.md) ![c](d.png#e) `[f](g)` [h](#some-title-here)\n"
    )
    found = [(target.name, anchor) for target, anchor in targets(page)]
    assert found == [("b.md", ""), ("d.png", "e"), ("a.md", "some-title-here")]
    assert anchors(page) == {"some-title-here"}
