"""From Pydantic's errors to one message a mistake: place, value, what is allowed, the nearest known key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from hf_prune.recipe.schema import NOT_YET, RecipeDocument


# What the language knows and this version does not: (last key, value or None for any).
LATER: tuple[tuple[str, Any], ...] = (
    ("allocation", None),
    ("distillation", None),
    ("part", "attention"),
    ("part", "feed_forward"),
    ("compensation", "bias"),
    ("compensation", "least_squares"),
    ("compensation", "linear"),
    ("shrink", "when_final"),
)

# Fields of TrainingArguments that a recipe has a place of its own for.
SAID_ELSEWHERE = {"output_dir": "output.dir", "push_to_hub": "output.push_to_hub", "hub_model_id": "output.repo_id"}


def messages(error: ValidationError, document: Any, where: Any) -> list[str]:
    """One line a mistake. `where(path)` gives the place of a key path, such as `recipe.yaml:3:5: `."""
    lines = []
    for mistake in error.errors(include_url=False):
        path = tuple(mistake["loc"])
        if mistake["type"] == "too_short" and mistake["input"]:
            continue  # Pydantic counts broken elements as missing; they have messages of their own
        for text in _texts(mistake, path):
            lines.append(f"{where(path)}{dotted(path)}: {text}")
    return lines


def training_mistakes(training: Mapping[str, Any] | None, where: Any) -> Iterator[str]:
    """Keys of `training` that `transformers.TrainingArguments` has not."""
    if not training:
        return
    from dataclasses import fields

    from transformers import TrainingArguments

    known = {field.name for field in fields(TrainingArguments) if field.init} - SAID_ELSEWHERE.keys()
    for name in training:
        path = ("training", name)
        if name in SAID_ELSEWHERE:
            yield f"{where(path)}training.{name}: say it as {SAID_ELSEWHERE[name]}"
        elif name not in known:
            yield f"{where(path)}training.{name}: no field of TrainingArguments{_suggestion(name, known)}"


def dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(str(part) for part in path) or "recipe"


def _texts(mistake: Any, path: tuple[str | int, ...]) -> Iterator[str]:
    kind, value, context = mistake["type"], mistake["input"], mistake.get("ctx", {})
    name = path[-1] if path else ""
    if any(name == key and (late is None or late == value) for key, late in LATER):
        yield f"{value!r} {NOT_YET}" if kind != "extra_forbidden" else f"the key {NOT_YET}"
    elif kind == "extra_forbidden":
        known = _known_keys(path[:-1])
        yield f"unknown key; known here: {', '.join(known)}{_suggestion(str(name), known)}"
    elif kind == "missing":
        yield "this key is required"
    elif kind == "literal_error":
        allowed = context["expected"].replace(" or ", ", ")
        near = _suggestion(str(value), [word.strip("'") for word in allowed.split(", ")])
        yield f"{value!r} is not allowed; expected one of {allowed}{near}"
    elif kind == "value_error":
        for line in str(context["error"]).split("\n"):
            # a whole section's value would drown the message
            yield line if isinstance(value, (Mapping, BaseModel)) else f"{value!r}: {line}"
    else:
        text = mistake["msg"]
        yield f"{value!r}: {text[0].lower()}{text[1:]}"


def _known_keys(path: tuple[str | int, ...]) -> list[str]:
    """The keys of the section at `path`."""
    section: Any = RecipeDocument
    for part in path:
        if isinstance(part, int):
            continue
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


def _suggestion(word: str, known: Any) -> str:
    near = get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
