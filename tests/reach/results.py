"""What the proof said of each type, kept in `results.json`: one line a type, so that a change shows as the types it is about."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.reach import proof
from tests.reach.census import Entry, reviewed, seen
from tests.reach.zoo import NotBuildable, build


FILE = Path(__file__).parent / "results.json"
ROOT = Path(__file__).resolve().parent.parent.parent
ORDER = ("WRONG", "refused", "proven", "none")


@dataclass
class Row:
    """A type's outcomes by target, the worst of the scopes, and what they were tried with."""

    tried: str  # when, to the minute, UTC
    sources: str = ""  # see `sources`; empty where it isn't known
    scopes: list[str] = field(default_factory=list)
    outcomes: dict[str, str] = field(default_factory=dict)
    not_built: str = ""
    census: Entry | None = None  # of a type that the reviewed census lacks

    @classmethod
    def of(cls, model_type: str, scopes: list[str], *, quick: bool = False) -> Row:
        """Build and try a type."""
        row = cls(f"{datetime.now(UTC):%Y-%m-%d %H:%M}", sources(), list(scopes))
        try:
            built = build(model_type)
            held = reviewed(model_type)
            if held is None:
                held = row.census = seen(built)
            subject = proof.Subject.of(built, quick=quick)
            for target in proof.TARGETS:
                row.outcomes[target] = worst([proof.prove(subject, target, scope, held) for scope in scopes])
            found = [target for target in proof.TARGETS if row.outcomes[target].startswith("proven")]
            if found and not quick and (said := proof.one_shot(subject, found[0])) != "proven":
                row.outcomes[found[0]] = said
        except NotBuildable as reason:
            row.not_built = str(reason)
        except Exception as error:  # of models' own code, of any kind: the page says it
            row.outcomes, row.not_built = {}, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return row


def worst(outcomes: list[str]) -> str:
    """Of several outcomes the one that says least good."""
    return min(outcomes, key=lambda outcome: ORDER.index(word(outcome)))


def word(outcome: str) -> str:
    """The sign of an outcome, without its reason."""
    return outcome.split(" ")[0].rstrip(":")


@cache
def sources() -> str:
    """A hash of all that an outcome depends on: the library's code, the proof's, and the versions below them."""
    digest = hashlib.sha256(f"{transformers.__version__} {torch.__version__}".encode())
    for path in [*sorted((ROOT / "hf_prune").rglob("*.py")), Path(proof.__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def read(file: Path = FILE) -> dict[str, Row]:
    """The rows, by type."""
    if not file.exists():
        return {}
    return {name: Row(**row) for name, row in json.loads(file.read_text(encoding="utf-8")).items()}


def put(model_type: str, row: Row, file: Path = FILE) -> None:
    """Put the row of a type in place of its older one; safe beside others that do the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write({**read(file), model_type: row}, file)
    finally:
        os.close(lock)


def write(rows: dict[str, Row], file: Path = FILE) -> None:
    """One line a type, in the order of names."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(_said(row))}" for name, row in sorted(rows.items()))
    beside = file.with_suffix(".partial")
    beside.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    os.replace(beside, file)


def _said(row: Row) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if value}
