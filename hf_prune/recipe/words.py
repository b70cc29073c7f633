"""Words that messages about recipes share."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


# of keys and values that are known to the language but not to this version
NOT_YET = "is not supported in this version of hf_prune"
_LONGEST = 80  # characters of a value in a message


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message that suggests the known word nearest to `word`, if one is near."""
    near = get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def shown(value: Any) -> str:
    """A value as a message shows it: in one line that is not too long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def dotted(path: Iterable[str | int]) -> str:
    """prune.0.sparsity; "recipe" for the whole."""
    return ".".join(str(part) for part in path) or "recipe"
