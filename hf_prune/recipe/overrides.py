"""`key=value` on the command line: keys of a recipe set after it was read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_prune.errors import RecipeError
from hf_prune.recipe.words import dotted, shown
from hf_prune.recipe.yaml import Document, KeyPath, Mistake, scalar


def override_(document: Document, overrides: Sequence[str]) -> None:
    """Set each `key.path=value` in `document`; values are read as YAML. Elements of lists go by number and must exist,
    sections that aren't there are made. What can't be set is added to the document's mistakes.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        path: KeyPath = tuple(key.split("."))
        if not equals or not all(path):
            said: str | None = f"{override!r} is no override; expected key=value, such as prune.0.sparsity=0.3"
        else:
            try:
                said = _set(document, path, scalar(text), override)
            except RecipeError as error:
                said = str(error)
        if said:
            document.mistakes.append(Mistake((), said, origin=override))


def _set(document: Document, path: KeyPath, value: Any, override: str) -> str | None:
    """What is wrong, if it can't be set."""
    if document.content is None:
        document.content = {}
    at: Any = document.content
    walked: KeyPath = ()
    for part in path[:-1]:
        place = _place(at, part)
        if place is None:
            return _no_way(at, walked, part)
        walked = (*walked, place)
        if isinstance(at, dict) and at.get(place) is None:
            at[place] = {}
            document.origins[walked] = override
        at = at[place]
    last = _place(at, path[-1])
    if last is None:
        return _no_way(at, walked, path[-1])
    at[last] = value
    walked = (*walked, last)
    # what the file said at and below this key is gone
    for places in (document.places, document.origins):
        for below in [path for path in places if path[: len(walked)] == walked]:
            del places[below]
    document.origins[walked] = override
    return None


def _place(at: Any, part: str | int) -> str | int | None:
    """`part` as a key of `at`; None if it can't be one."""
    if isinstance(at, dict):
        return part
    if isinstance(at, list) and str(part).isdecimal() and int(part) < len(at):
        return int(part)
    return None


def _no_way(at: Any, walked: KeyPath, part: str | int) -> str:
    if isinstance(at, list):
        there = f"elements 0 to {len(at) - 1}" if at else "no elements"
        return f"{dotted(walked)} has {there}, not {part!r}; what isn't there can't be set by an override"
    return f"{dotted(walked)} is {shown(at)} and has no keys; set it whole: {dotted(walked)}={{{part}: …}}"
