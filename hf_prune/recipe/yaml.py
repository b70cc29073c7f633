"""Reading YAML as people mean it: 1e-3 is a number, `on` is a word, 2:4 is a pattern; duplicate keys are mistakes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hf_prune.errors import RecipeError


LARGEST = 1 << 20  # bytes; a recipe is a page, and a hostile one should not fill memory
DEEPEST = 32
KeyPath = tuple[str | int, ...]
Place = tuple[int, int]  # line and column, from 1


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's plain scalars."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what `_Loader` would take for something else than text."""


_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {first: [*pairs] for first, pairs in yaml.SafeDumper.yaml_implicit_resolvers.items()}
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
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


class Mistake(NamedTuple):
    """What is wrong at a key; `place` or `origin` only where they aren't the key's own."""

    path: KeyPath
    text: str
    place: Place | None = None
    origin: str | None = None


@dataclass
class Document:
    """A recipe before it is checked: plain data, where each key was written, which override set it, and what no recipe
    may hold. `source` is the file.
    """

    content: Any = None
    source: str | None = None
    places: dict[KeyPath, Place] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)


def read_yaml(path: str | Path) -> Document:
    """The document at `path`.

    Raises:
        RecipeError: no such file, not UTF-8, too large, or not YAML; the message has the line.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"can't read the recipe {str(path)!r}: {getattr(error, 'strerror', None) or error}. Give the path of a YAML "
            "file; `hf-prune recipes` lists those that are shipped."
        ) from error
    if len(raw) > LARGEST:
        raise RecipeError(f"{path} has more than {LARGEST:,} bytes; is it a recipe?")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is no text in UTF-8 (byte {error.start}); give a YAML file saved as UTF-8"
        ) from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Document:
    """As `read_yaml`, of a string; `source` names it in messages."""
    try:
        nodes = list(yaml.compose_all(text, Loader=_Loader))
    except RecursionError as error:
        raise RecipeError(f"{source} is nested more than {DEEPEST} deep; a recipe is flat") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{source}:{line}: the character {chr(error.character)!r} is not allowed in YAML") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        said = " ".join(filter(None, (getattr(error, "context", None), getattr(error, "problem", None))))
        raise RecipeError(f"{place}: not valid YAML: {said or error}") from error
    if len(nodes) > 1:
        line = nodes[1].start_mark.line + 1
        raise RecipeError(f"{source}:{line}: holds {len(nodes)} YAML documents; a recipe is one, without --- inside")
    document = Document(source=source)
    if nodes:
        document.content = _construct(nodes[0], (), document, set())
    return document


def scalar(text: str) -> Any:
    """One value by the same rules, as in an override `key=value`.

    Raises:
        RecipeError: it is not YAML, or holds what no recipe may.
    """
    document = parse_yaml(text, f"the value {text!r}")
    if document.mistakes:
        raise RecipeError("; ".join(mistake.text for mistake in document.mistakes))
    return document.content if text.strip() else ""


def write_yaml(content: Any) -> str:
    """Plain data as YAML that `read_yaml` reads as the same."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _construct(node: yaml.Node, path: KeyPath, document: Document, seen: set[int]) -> Any:
    document.places.setdefault(path, (node.start_mark.line + 1, node.start_mark.column + 1))
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    said = None
    if isinstance(node, yaml.ScalarNode) and kind in ("str", "int", "float", "bool", "null"):
        try:
            return _scalar(kind, node.value)
        except (ValueError, KeyError):
            said = f"{node.value[:40]!r} is no {kind}"
    elif id(node) in seen:
        said = "aliases (*name) are not allowed in a recipe; write the value out"
    elif len(path) >= DEEPEST:
        said = f"nested more than {DEEPEST} deep; a recipe is flat"
    elif isinstance(node, yaml.MappingNode) and kind == "map":
        seen.add(id(node))
        return _mapping(node, path, document, seen)
    elif isinstance(node, yaml.SequenceNode) and kind == "seq":
        seen.add(id(node))
        return [_construct(item, (*path, number), document, seen) for number, item in enumerate(node.value)]
    else:
        said = f"the YAML tag {node.tag} is not allowed: a recipe is plain data"
    document.mistakes.append(Mistake(path, said))
    return None


def _scalar(kind: str, text: str) -> Any:
    match kind:
        case "int":
            return int(text)
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        case "bool":
            return {"true": True, "false": False}[text.lower()]
        case "null":
            return None
    return text


def _mapping(node: yaml.MappingNode, path: KeyPath, document: Document, seen: set[int]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
        if not isinstance(key_node, yaml.ScalarNode):
            document.mistakes.append(Mistake(path, f"a key is a word, not a {key_node.id}", place))
            continue
        key = (*path, key_node.value)
        if key_node.value in result:
            line, column = document.places[key]
            document.mistakes.append(
                Mistake(key, f"the key is there twice, first at {line}:{column}; keep one", place)
            )
            continue
        document.places[key] = place
        result[key_node.value] = _construct(value_node, key, document, seen)
    return result
