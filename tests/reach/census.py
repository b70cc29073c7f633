"""The census: which model type holds a feed-forward, attention, layers. The reviewed file is what reach is measured against.

`census.json` has for each type what a watched run of its tiny model found (`tests/reach/watch.py`; names of modules with `*` for
numbers), and, under `reasons`, why something of that is none: an entry leaves the file only with a written reason.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from tests.reach.proof import starred
from tests.reach.watch import watch
from tests.reach.zoo import Built


FILE = Path(__file__).parent / "census.json"
KINDS = ("feed_forward", "attention", "layers")
Entry = dict[str, list[str]]


@cache
def census() -> dict[str, Any]:
    """The reviewed file: `types` and `reasons`."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"types": {}, "reasons": []}


def reviewed(model_type: str) -> Entry | None:
    """What the file says that the type holds."""
    return census()["types"].get(model_type)


def reason(model_type: str, kind: str, name: str) -> str | None:
    """Why `name` of the type counts as none of its kind: written for it alone, or for all names that end so."""
    for rule in census()["reasons"]:
        ends = any(f".{name}".endswith(f".{one}") if one else not name for one in rule["names"])
        if rule["kind"] == kind and ends and model_type in rule.get("types", [model_type]):
            return rule["reason"]
    return None


def add(model_type: str, entry: Entry) -> None:
    """Put the entry of a type that has none into the file, without the names for which there is a reason."""
    census()["types"][model_type] = without_reasoned(model_type, entry)
    types = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(census()["types"].items()))
    reasons = ",\n".join(f"  {json.dumps(rule)}" for rule in census()["reasons"])
    beside = FILE.with_suffix(".partial")
    beside.write_text(f'{{"types": {{\n{types}\n}},\n"reasons": [\n{reasons}\n]}}\n', encoding="utf-8")
    os.replace(beside, FILE)


def without_reasoned(model_type: str, entry: Entry) -> Entry:
    """The names of an entry that no written reason takes out."""
    return {kind: [name for name in names if not reason(model_type, kind, name)] for kind, names in entry.items()}


def seen(built: Built) -> Entry:
    """What a watched run finds."""
    found = watch(built.model, built.inputs)
    return {kind: sorted({starred(name) for name in getattr(found, kind)}) for kind in KINDS}
