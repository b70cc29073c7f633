"""docs/support.md: a row a type, a column a target, what was counted in the head, the reasons below."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
import transformers

from tests.reach.census import KINDS, reviewed
from tests.reach.proof import SCOPES, TARGETS, held_of
from tests.reach.results import FILE, Row, read, word
from tests.reach.zoo import model_types


PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "support.md"
SIGNS = {"proven": "✓", "refused": "refused", "WRONG": "wrong", "none": "–"}
HEAD = """# What is supported

Written by `python scripts/support.py`, which builds a tiny random model of each model type of Transformers {transformers} (PyTorch
{torch}), watches it run to see what it holds (the census), takes half of each target away (scope {scopes}; a
third where one of each kind of blocks has to stay), and checks that

- what is to be pruned was found, and nothing that the census holds was left out in silence;
- the smaller model gives what the masked one gives;
- its parameters are as many as estimated;
- it is saved, and loaded by its class and by an Auto class, with equal outputs;
- it generates where the whole model does, and trains one step.

| sign | meaning |
|---|---|
| ✓ | each check passed; a number is the note below that says which check the whole model fails as well |
| refused, and a number | an error of hf_prune with the reason below, raised before the model was changed |
| wrong, and a number | a fault of hf_prune, below |
| – | the model holds no such thing |

"""


def write(results: Path = FILE, page: Path = PAGE) -> None:
    """Write the page from what runs left."""
    page.write_text(text(read(results)), encoding="utf-8")


def text(by_type: dict[str, Row]) -> str:
    """The page."""
    notes: dict[str, int] = {}
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    seen = {scope for row in by_type.values() for scope in row.scopes}
    versions["scopes"] = " and ".join(scope for scope in SCOPES if scope in seen)
    lines = [HEAD.format(**versions) + "\n".join(_counts(by_type)), ""]
    lines += [f"| type | {' | '.join(f'`{target}`' for target in TARGETS)} |", "|---" * (len(TARGETS) + 1) + "|"]
    for name, row in by_type.items():
        if row.outcomes:
            cells = [_cell(row.outcomes[target], notes) for target in TARGETS]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "## Notes", "", *(f"{number}. {_plain(note)}" for note, number in notes.items())]
    unbuilt = {name: row.not_built for name, row in by_type.items() if not row.outcomes}
    if unbuilt:
        lines += ["", "## Types that no tiny model was made of", ""]
        lines += [f"- {name}: {_plain(why)}" for name, why in unbuilt.items()]
    return "\n".join(lines) + "\n"


def _counts(by_type: dict[str, Row]) -> list[str]:
    built = {name: row for name, row in by_type.items() if row.outcomes}
    lines = [
        f"Of {len(model_types())} model types {len(by_type)} were tried and {len(built)} built. {_ages(by_type)}",
        "",
        "| target | types that hold it | proven | refused | wrong |",
        "|---|---|---|---|---|",
    ]
    for target in TARGETS:
        held = [row for name, row in built.items() if holds(name, row, target)]
        words = Counter(word(row.outcomes[target]) for row in held)
        share = f" ({100 * words['proven'] / len(held):.0f} %)" if held else ""
        wrong = words["WRONG"] + words["none"]
        lines.append(f"| `{target}` | {len(held)} | {words['proven']}{share} | {words['refused']} | {wrong} |")
    return lines


def _ages(by_type: dict[str, Row]) -> str:
    """How many rows were tried with the sources that the newest row was tried with, and how old the others are."""
    newest = max(by_type.values(), key=lambda row: row.tried)
    older = sorted(row.tried for row in by_type.values() if row.sources != newest.sources)
    if not older:
        return "All rows are of the same sources."
    return f"{len(by_type) - len(older)} rows are of the newest sources, {len(older)} of older ones: tried {older[0]} to {older[-1]}."


def holds(model_type: str, row: Row, target: str) -> bool:
    """By the reviewed census; every model holds weights."""
    entry = reviewed(model_type) or row.census or {kind: [] for kind in KINDS}
    return bool(held_of(target, entry))


def _cell(outcome: str, notes: dict[str, int]) -> str:
    sign, (_, _, why) = SIGNS[word(outcome)], outcome.partition(" ")
    if not why:
        return sign
    return f"{sign} {notes.setdefault(why.strip('()'), len(notes) + 1)}"


def _plain(text: str) -> str:
    """As Markdown shows it: names with stars and underscores are no emphasis."""
    return text.replace("*", r"\*").replace("_", r"\_").replace("<", "&lt;").replace("|", r"\|")
