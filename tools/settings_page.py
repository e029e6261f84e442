"""Write docs/settings.md: every setting, evaluator and preset of train_gpt.py, from its own tables.

    python -m tools.settings_page

A test compares the page with what this writes.
"""

import sys

if not __package__:
    print("error: the tools are a package: python -m tools.settings_page ...", file=sys.stderr)
    sys.exit(2)

from tools import console

if __name__ == "__main__":
    console.begin()

import re
from pathlib import Path

import train_gpt as t

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "settings.md"
INTRODUCTION = """\
# Settings

A setting is an environment variable, or an argument `NAME=value`, which wins. Written by
`python -m tools.settings_page` from the tables of `train_gpt.py`; `python train_gpt.py --help`
prints the same, and `--help slot` only the settings whose names begin with SLOT.

    PRESET=demo python train_gpt.py                                    # a preset
    python train_gpt.py PRESET=demo SLOT_ENABLED=0 RUN_ID=mine         # settings as arguments
    EMA_ENABLED=0 LATE_QAT=0 SEED=42 torchrun ... train_gpt.py         # an ablation of training
    LOAD_ARTIFACT=logs/ID/final_model.ptz SLOT_STEPS=5 torchrun ...    # of evaluation: no training
    LOAD_CHECKPOINT=logs/ID/checkpoint.STEP.ckpt QUANT=gptq torchrun ...   # export a run anew

All settings are checked together before anything starts. A misspelt name, a value out of bounds
or two settings that do not go together end the run with exit status 2 and a line for each, which
says what is allowed. The run commands of #549 and #1084 work as they were published.

The defaults are #1084's record. "kept" in the last column: an artifact carries the
setting with it, and LOAD_ARTIFACT takes it from the file and refuses another value.
"""


def groups() -> dict[str, list[str]]:
    """Names of settings by the headings that stand in Config."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in Path(t.__file__).read_text().splitlines():
        title = re.fullmatch(r"    # ---- (.+)", line)
        field = re.match(r"    (\w+): .+ = setting\(", line)
        if title:
            heading = title[1]
        if field:
            found.setdefault(heading, []).append(field[1].upper())
    return found


def cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|")


def code(text: str) -> str:
    """Text as code, if there is any."""
    return f"`{text}`" if text else "empty"


def setting_row(s: t.Setting) -> str:
    """A setting as a row of its table."""
    short = {"names": "comma list of names below", "bool": "0 or 1"}
    allowed = short.get(s.kind, s.allowed())
    kept = "kept" if s.in_artifact else ""
    return f"| `{s.name}` | {code(t.shown(s.default))} | {allowed} | {cell(s.text)} | {kept} |"


def evaluator_row(name: str, evaluator: t.Evaluator) -> str:
    """An evaluator as a row of its table."""
    windows = "sliding" if evaluator.sliding else "side by side"
    needs = ", ".join(sorted(need.upper() for need in evaluator.needs())) or "nothing"
    method = evaluator.method.upper() if evaluator.method != "Plain" else "the model alone"
    learns = "after each chunk" if evaluator.ttt else "no"
    return f"| `{name}` | {windows} | {method} | {learns} | {needs} |"


def page() -> str:
    """Text of docs/settings.md."""
    lines = [INTRODUCTION]
    for heading, names in groups().items():
        lines += [f"## {heading.capitalize().replace('qat', 'QAT')}", ""]
        lines += [
            "| setting | default | allowed | what it does | artifact |",
            "|---|---|---|---|---|",
        ]
        lines += [setting_row(t.SETTINGS[name]) for name in names]
        lines.append("")
    lines += ["## Evaluators", ""]
    lines += [
        "What `EVALS` names. Which conditions one breaks follows from the settings and stands"
    ]
    lines += ["behind `causal:` and `breaks:` on its line; [honesty.md](honesty.md) says how.", ""]
    lines += ["| evaluator | windows | scored by | trains | needs |", "|---|---|---|---|---|"]
    lines += [evaluator_row(name, evaluator) for name, evaluator in t.EVALUATORS.items()]
    lines += ["", "## Presets", ""]
    lines += [
        "What differs from the defaults; of a comma list later ones win. In a name, pr1313 is"
    ]
    lines += ["pull request #1313.", "", "| preset | settings |", "|---|---|"]
    for name, values in t.PRESETS.items():
        words = " ".join(f"{key}={value}" for key, value in values.items())
        lines.append(f"| `{name}` | {code(words) if words else 'none: the defaults'} |")
    return "\n".join(lines) + "\n"


@console.tool
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    console.Parser("settings_page", __doc__).parse_args(argv)
    PAGE.write_text(page())
    print(f"{PAGE.relative_to(ROOT)}: written")


if __name__ == "__main__":
    console.run(main)
