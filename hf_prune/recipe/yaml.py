"""Reading YAML as people mean it: 1e-3 is a number, `on` is a word, 2:4 is a pattern; duplicate keys are mistakes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from hf_prune.errors import RecipeError


LARGEST = 1 << 20  # bytes; a recipe is a page, and a hostile one should not fill memory
DEEPEST = 32
Places = dict[tuple[str | int, ...], str]  # key path -> "line:column"


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's plain scalars."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def read_yaml(path: str | Path) -> tuple[Any, Places]:
    """The document at `path`, and the place of each key.

    Raises:
        RecipeError: no such file, not UTF-8, too large, or no recipe-like YAML; the message has the line.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RecipeError(
            f"can't read the recipe {str(path)!r}: {error.strerror}. Give the path of a YAML file; "
            "`hf-prune recipes` lists those that are shipped."
        ) from error
    if len(raw) > LARGEST:
        raise RecipeError(f"{path} has {len(raw):,} bytes; a recipe has at most {LARGEST:,}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> tuple[Any, Places]:
    """As `read_yaml`, of a string; `source` names it in messages."""
    try:
        documents = list(yaml.compose_all(text, Loader=_Loader))
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise RecipeError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if len(documents) != 1:
        raise RecipeError(f"{source} holds {len(documents)} YAML documents; a recipe is one")
    places: Places = {}
    return _construct(documents[0], (), places, source, set()), places


def scalar(text: str) -> Any:
    """One value by the same rules, as in an override `key=value`."""
    return parse_yaml(text, f"the value {text!r}")[0] if text.strip() else ""


def _construct(node: yaml.Node, path: tuple[str | int, ...], places: Places, source: str, seen: set[int]) -> Any:
    place = f"{node.start_mark.line + 1}:{node.start_mark.column + 1}"
    places.setdefault(path, place)
    if id(node) in seen and not isinstance(node, yaml.ScalarNode):
        raise RecipeError(f"{source}:{place}: aliases (*name) are not allowed in a recipe; write the value out")
    seen.add(id(node))
    if len(path) > DEEPEST:
        raise RecipeError(f"{source}:{place}: nested more than {DEEPEST} deep; a recipe is flat")
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        return _mapping(node, path, places, source, seen)
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_construct(item, (*path, n), places, source, seen) for n, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and node.tag.removeprefix("tag:yaml.org,2002:") in (
        "str", "int", "float", "bool", "null",
    ):  # fmt: skip
        if node.tag.endswith(":int"):
            return int(node.value)
        if node.tag.endswith(":float"):
            return float(node.value.replace(".inf", "inf").replace(".nan", "nan"))
        return yaml.constructor.SafeConstructor().construct_object(node)
    raise RecipeError(f"{source}:{place}: the YAML tag {node.tag} is not allowed: a recipe is plain data")


def _mapping(node: yaml.MappingNode, path: tuple[str | int, ...], places: Places, source: str, seen: set[int]) -> Any:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = f"{key_node.start_mark.line + 1}:{key_node.start_mark.column + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{source}:{place}: a key is a word, not a {key_node.id}")
        key = key_node.value
        if key in result:
            first = places[(*path, key)]
            raise RecipeError(f"{source}:{place}: the key {key!r} is there twice, first at {first}; keep one")
        places[(*path, key)] = place
        result[key] = _construct(value_node, (*path, key), places, source, seen)
    return result
