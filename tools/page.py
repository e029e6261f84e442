"""A board as one HTML page that needs nothing else: DataTables (tools/vendor) sorts and filters it, from the file system too."""

import base64
import hashlib
import html
import string
from pathlib import Path

from tools.board import ACCEPTED, cells, probability
from tools.significance import MARGIN
from tools.submission import LIMIT, SECONDS

HERE = Path(__file__).parent
LAST = 1e99  # what is not known sorts below what is
HEAD = (  # a column's name, what it is called, what it is, whether it is a number
    ("rank", "#", "place on the board", True),
    ("score", "bits a byte", "mean over the runs of the best stage that all of them have", True),
    ("std", "std", "sample standard deviation over runs", True),
    ("run", "run", "its folder, and what differs from that folder's own pages", False),
    ("stage", "stage", "what the score is of", False),
    (
        "causal",
        "causal",
        "does each prediction depend on the text before it alone, and how is that known?",
        False,
    ),
    (
        "margin",
        "p, 0.005 nats",
        "that the row above is better by 0.005 nats: one-sided Welch",
        True,
    ),
    (
        "p",
        "p, #1902",
        "that the row above is better at all; below 0.25 the organisers took a row as a step forward",
        True,
    ),
    ("seconds", "evaluation", "seconds of all stages together, of the run that took longest", True),
    ("bytes", "bytes", "artifact and code of the largest run", True),
    ("runs", "runs", "runs, and their seeds", True),
    ("steps", "steps", "training steps, the most of a run", True),
    ("tokenizer", "tokenizer", "of the run", False),
)


def hashed(script):
    """A script as a Content-Security-Policy names it: nothing else may run on the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def cell(text, order=None, kind="", search=None):
    """A table cell; text is HTML, what it is sorted and searched by is not."""
    more = f' class="{kind}"' if kind else ""
    more += f' data-order="{html.escape(str(order))}"' if order is not None else ""
    more += f' data-search="{html.escape(search)}"' if search is not None else ""
    return f"<td{more}>{text}</td>"


def number(text, value, kind=""):
    """A cell of a number that may not be known."""
    unknown = value is None or value != value
    return cell(html.escape(text), LAST if unknown else value, f"n {kind}".strip())


def details(sentences):
    """What differs, folded away."""
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    many = f"{len(sentences)} {'things differ' if len(sentences) > 1 else 'thing differs'}"
    return f"<details><summary>{many}</summary><ul>{items}</ul></details>" if items else ""


def broken(name):
    """A name that may be broken after its underscores."""
    return html.escape(name).replace("_", "_<wbr>")


def under(text, small):
    """A word, and smaller ones under it."""
    return f'{text}<span class="small">{html.escape(small)}</span>'


def line(rank, row):
    """A row of the table."""
    told = cells(rank, row)
    size, text = row.bytes or (None, "")
    p, margin = row.against.get(0.0), row.against.get(MARGIN)
    name = f'<span title="{html.escape(str(row.folder))}">{broken(row.name)}</span>'
    verdict = f'<span class="{told["causal"]}">{told["causal"]}</span>'
    made = dict(
        rank=number(told["rank"], rank),
        score=number(told["score"], row.mean, "score"),
        std=number(told["std"], row.std),
        run=cell(name + details(row.differs), row.name, "run"),
        stage=cell(html.escape(told["stage"]), kind="wrap"),
        causal=cell(
            under(verdict, told["how"]), told["causal"], "known", f"{told['causal']} {told['how']}"
        ),
        seconds=number(
            told["seconds"] and told["seconds"] + " s",
            row.seconds,
            "over" if row.seconds and row.seconds > SECONDS else "",
        ),
        bytes=number(text.removesuffix(" B"), size, "over" if size and size >= LIMIT else ""),
        runs=cell(under(told["runs"], told["seeds"]), len(row.logs), "n"),
        steps=number(told["steps"], row.steps),
        tokenizer=cell(html.escape(told["tokenizer"]), search=told["tokenizer"]),
        margin=number(probability(margin), margin),
        p=number(told["p"], p, "yes" if p is not None and p < ACCEPTED else ""),
    )
    return f"<tr>{''.join(made[key] for key, *_ in HEAD)}</tr>"


def page(rows, title, notes):
    """The page as text. Everything out of logs is escaped, and no script runs but the two that stand in it."""
    library = (HERE / "vendor" / "dataTables.min.js").read_text()
    script = (HERE / "page.js").read_text()
    head = "".join(
        f'<th scope="col" data-name="{name}" title="{html.escape(what)}"{" class=n" * is_number}>{html.escape(shown)}</th>'
        for name, shown, what, is_number in HEAD
    )
    tokenizers = sorted({row.tokenizer for row in rows if row.tokenizer})
    return string.Template((HERE / "page.html").read_text()).substitute(
        title=html.escape(title),
        notes="\n".join(f"<p>{html.escape(note)}</p>" for note in notes),
        head=head,
        rows="\n".join(line(rank, row) for rank, row in enumerate(rows, 1)),
        tokenizers="".join(f"<option>{html.escape(t)}</option>" for t in tokenizers),
        policy=f"{hashed(library)} {hashed(script)}",
        library=library,
        script=script,
    )
