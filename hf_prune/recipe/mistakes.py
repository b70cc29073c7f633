"""One message a mistake: key, value, what is allowed, the nearest known key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from hf_prune.recipe.rules import step_mistakes
from hf_prune.recipe.schema import RecipeDocument
from hf_prune.recipe.training import training_mistakes
from hf_prune.recipe.words import NOT_YET, nearest, shown
from hf_prune.recipe.yaml import KeyPath, Mistake


# What the language knows and this version does not: (last key, value or None for any).
LATER: tuple[tuple[str, Any], ...] = ()
# Pydantic's kinds of mistakes in our words; braces are filled from its context
_TEXTS = {
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "bool_type": "expected true or false",
    "string_type": "expected text; put it in quotes",
    "tuple_type": "expected a list, such as [{0}]",
    "dict_type": "expected keys with values",
    "finite_number": "expected a finite number",
    "greater_than": "expected more than {gt}",
    "greater_than_equal": "expected {ge} or more",
    "less_than": "expected less than {lt}",
    "less_than_equal": "expected at most {le}",
    "too_short": "expected at least {min_length}",
}


def schema_mistakes(error: ValidationError) -> Iterator[Mistake]:
    """What Pydantic found, key by key."""
    for mistake in error.errors(include_url=False):
        path: KeyPath = tuple(mistake["loc"])
        if mistake["type"] == "too_short" and mistake["input"]:
            continue  # Pydantic counts broken elements as missing; they have messages of their own
        for text in _texts(mistake, path):
            yield Mistake(path, text)


def rule_mistakes(document: Mapping[str, Any]) -> Iterator[Mistake]:
    """What is wrong between the keys of a step, and in `training`."""
    steps = document.get("prune")
    for number, step in enumerate(steps if isinstance(steps, (list, tuple)) else ()):
        if isinstance(step, Mapping):
            for key, text in step_mistakes(step):
                yield Mistake(("prune", number, key) if key else ("prune", number), text)
    training = document.get("training")
    if isinstance(training, Mapping):
        for key, text in training_mistakes(training):
            yield Mistake(("training", key), text)


def _texts(mistake: Any, path: KeyPath) -> Iterator[str]:
    kind, value, context = mistake["type"], mistake["input"], mistake.get("ctx", {})
    name = path[-1] if path else ""
    if any(name == key and (late is None or late == value) for key, late in LATER):
        yield f"{value!r} {NOT_YET}" if kind != "extra_forbidden" else f"the key {NOT_YET}"
    elif kind in ("extra_forbidden", "invalid_key"):
        known = _known_keys(path[:-1])
        yield f"unknown key; known here: {', '.join(known)}{nearest(str(name), known)}"
    elif kind == "missing":
        yield "this key is required" + ("; write version: 1" if path == ("version",) else "")
    elif kind == "literal_error":
        allowed = context["expected"].replace(" or ", ", ")
        near = nearest(str(value), [word.strip("'") for word in allowed.split(", ")])
        yield f"{shown(value)} is not allowed; expected one of {allowed}{near}"
    elif kind == "value_error":
        for line in str(context["error"]).split("\n"):
            # a whole section's value would drown the message
            yield line if isinstance(value, (Mapping, BaseModel)) else f"{shown(value)}: {line}"
    elif kind.startswith("model_"):
        yield f"{shown(value)}: expected a section with the keys {', '.join(_known_keys(path))}"
    else:
        text = _TEXTS[kind].format(shown(value), **context) if kind in _TEXTS else mistake["msg"]
        if kind in ("int_type", "float_type") and isinstance(value, str) and value[:1].isdigit():
            text += ", in plain digits without quotes"
        if kind == "bool_type" and value in ("yes", "no", "on", "off"):
            text += f"; {value} is only a word here"
        yield f"{shown(value)}: {text}"


def _known_keys(path: KeyPath) -> list[str]:
    """The keys of the section at `path`."""
    section: Any = RecipeDocument
    for part in path:
        if not isinstance(part, int):
            section = _section_of(section, part)
    return list(section.model_fields) if section is not None else []


def _section_of(section: Any, name: str) -> Any:
    field = section.model_fields.get(name) if section is not None else None
    for candidate in _types(field.annotation) if field else ():
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _types(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _types(argument)
