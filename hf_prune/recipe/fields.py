"""Keys that are written in more than one way: as a number or a section, as a name or with options."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from hf_prune.recipe.vocabulary import (
    ALLOCATIONS,
    COMBINABLE,
    COMPENSATIONS,
    CRITERIA,
    AllocationEntry,
    CompensationEntry,
    CriterionEntry,
)
from hf_prune.recipe.words import nearest, shown


# kind of an option -> what Python has for it, how to say it, and what JSON Schema says
_OPTION_TYPES: dict[str, tuple[type | tuple[type, ...], str, dict[str, Any]]] = {
    "integer": (int, "a whole number", {"type": "integer"}),
    "count": (int, "a whole number of at least 1", {"type": "integer", "minimum": 1}),
    "number": ((int, float), "a number", {"type": "number"}),
    "positive": ((int, float), "a number above 0", {"type": "number", "exclusiveMinimum": 0}),
    "boolean": (bool, "true or false", {"type": "boolean"}),
    "string": (str, "text", {"type": "string"}),
}
ABOVE_0 = {"count", "positive"}


class Section(BaseModel):
    """Closed, unchanging, and strict: no word becomes a number, no number a truth value."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class ParameterBudget(Section):
    """The model's parameters shrink by this fraction."""

    parameters: float = Field(gt=0, lt=1)


class MacBudget(Section):
    """The model's MACs shrink by this fraction."""

    macs: float = Field(gt=0, lt=1)


class Criterion(Section):
    """A criterion's name and options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class Allocation(Section):
    """How much leaves where: by an allocation's name and options, or by `shares`, glob by glob."""

    name: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    shares: dict[str, float] = Field(default_factory=dict)


class Compensation(Section):
    """A repair's name; `add`: projections that have no bias get one; how often `reconstruct` goes through the data, and its first
    step in units of each parameter's root mean square."""

    name: str = "none"
    add: bool = False
    epochs: int = 2
    learning_rate: float = 0.03


class Pattern(Section):
    """Which entries of a weight leave together: single ones, all but n of every m, or blocks (outputs, inputs)."""

    kind: Literal["unstructured", "n_m", "block"]
    n: int | None = None
    m: int | None = None
    block: tuple[int, int] | None = None


def whole(value: Any) -> Any:
    """8.0 is a whole number too, as JSON Schema has it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def is_whole(value: Any) -> bool:
    return isinstance(whole(value), int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    if isinstance(value, int):  # of any length, which `isfinite` would not take
        return not isinstance(value, bool)
    return isinstance(value, float) and math.isfinite(value)


def _version(value: Any) -> Any:
    if isinstance(value, bool) or value != 1:
        raise ValueError("expected 1, the version of the recipe language that this hf_prune reads")
    return 1


def parse_sparsity(value: Any) -> Any:
    if value is None or isinstance(value, (ParameterBudget, MacBudget)):
        return value
    if is_number(value):
        if not 0 <= value < 1:
            raise ValueError("expected a fraction from 0 to below 1")
        return float(value)
    if isinstance(value, Mapping) and len(value) == 1 and set(value) <= {"parameters", "macs"}:
        ((name, fraction),) = value.items()
        if not is_number(fraction) or not 0 < fraction < 1:
            raise ValueError(f"{name}: expected a fraction between 0 and 1")
        return ParameterBudget(parameters=fraction) if name == "parameters" else MacBudget(macs=fraction)
    raise ValueError("expected a fraction, {parameters: fraction} or {macs: fraction}")


def parse_criterion(value: Any) -> Any:
    if value is None or isinstance(value, Criterion):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError("expected a criterion's name, or {name: …, option: …}")
    name, options = value["name"], {key: option for key, option in value.items() if key != "name"}
    known = ", ".join(CRITERIA)
    if name not in CRITERIA:
        raise ValueError(f"unknown criterion {name!r}; known: {known}{nearest(name, CRITERIA)}")
    entry = CRITERIA[name]
    found = _options(f"criterion {name}", options, entry.options)
    if missing := sorted(entry.required - found.keys()):
        raise ValueError(f"criterion {name} needs its option {missing[0]}: {{name: {name}, {missing[0]}: …}}")
    return Criterion(name=name, options=found)


def weighted_criteria(of: Mapping[str, Any]) -> dict[str, tuple[float, dict[str, Any]]]:
    """The weight and the options of each criterion that `combined` is of."""
    found = {}
    for name, given in of.items():
        options = dict(given) if isinstance(given, Mapping) else {"weight": given}
        found[name] = (options.pop("weight"), options)
    return found


def _parse_criteria(value: Any) -> dict[str, Any]:
    """What `combined` is of, as it was written."""
    if not isinstance(value, Mapping) or len(value) < 2:
        raise ValueError("expected two or more criteria with their weights, such as {activation: 0.7, taylor: 0.3}")
    found, mistakes = {}, []
    for name, given in value.items():
        try:
            found[name] = _parse_weighted(name, given)
        except ValueError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return found


def _parse_weighted(name: Any, given: Any) -> Any:
    if name not in COMBINABLE:
        raise ValueError(
            f"{shown(name)} can't be combined; those that can: {', '.join(COMBINABLE)}{nearest(str(name), COMBINABLE)}"
        )
    options = dict(given) if isinstance(given, Mapping) else {"weight": given}
    weight = options.pop("weight", None)
    if not is_number(weight) or not weight > 0:
        raise ValueError(f"{name}: expected a weight above 0, or {{weight: …, option: …}}")
    options = _options(f"criterion {name}", options, CRITERIA[name].options)
    return {"weight": weight, **options} if isinstance(given, Mapping) else given


def parse_allocation(value: Any) -> Any:
    if value is None or isinstance(value, Allocation):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or not value:
        raise ValueError("expected an allocation's name, {name: …, option: …}, or {module glob: fraction}")
    if not isinstance(value.get("name"), str):
        return Allocation(shares=_by_glob(value, 0, "expected a fraction from 0 to below 1"))
    name, options = value["name"], {key: option for key, option in value.items() if key != "name"}
    if name not in ALLOCATIONS:
        raise ValueError(
            f"unknown allocation {shown(name)}; known: {', '.join(ALLOCATIONS)}, or {{module glob: fraction}}"
            f"{nearest(name, ALLOCATIONS)}"
        )
    entry = ALLOCATIONS[name]
    found = _options(f"allocation {name}", options, entry.options)
    if missing := sorted(entry.required - found.keys()):
        raise ValueError(f"allocation {name} needs its option {', '.join(missing)}: {{name: {name}, {missing[0]}: …}}")
    return Allocation(name=name, options=found)


def parse_floor(value: Any) -> Any:
    return _limit(value, 0, "expected a fraction from 0 to below 1")


def parse_ceiling(value: Any) -> Any:
    return _limit(value, 1, "expected a fraction above 0, to 1")


def _limit(value: Any, end: int, said: str) -> Any:
    if isinstance(value, Mapping) and value:
        return _by_glob(value, end, said)
    if not _is_share(value, end):
        raise ValueError(f"{said}, or {{module glob: fraction}}")
    return float(value)


def _by_glob(value: Mapping[Any, Any], end: int, said: str) -> dict[str, float]:
    wrong = [key for key, share in value.items() if not isinstance(key, str) or not _is_share(share, end)]
    if wrong:
        raise ValueError(f"{wrong[0]}: {said}")
    return {pattern: float(share) for pattern, share in value.items()}


def _is_share(value: Any, end: int) -> bool:
    """In [0, 1], of whose ends only `end` itself is in."""
    return is_number(value) and (0 < value < 1 or value == end)


def parse_compensation(value: Any) -> Any:
    if isinstance(value, Compensation):
        return value
    if isinstance(value, str):
        value = {"name": value}
    known = ("none", *COMPENSATIONS)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError(f"expected one of {', '.join(known)}, or {{name: …, option: …}}")
    name, options = value["name"], {key: option for key, option in value.items() if key != "name"}
    if name not in known:
        raise ValueError(f"unknown compensation {shown(name)}; known: {', '.join(known)}{nearest(name, known)}")
    known_options = COMPENSATIONS[name].options if name in COMPENSATIONS else {}
    return Compensation(name=name, **_options(f"compensation {name}", options, known_options))


def _options(who: str, options: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, Any]:
    """The options of `who`, of the types that `known` has for them; all mistakes in one error."""
    found, mistakes = dict(options), []
    for option, given in options.items():
        if option not in known:
            takes = ", ".join(sorted(known)) or "no options"
            mistakes.append(f"{who} takes {takes}; unknown: {option}{nearest(str(option), known)}")
            continue
        if known[option] == "criteria":
            try:
                found[option] = _parse_criteria(given)
            except ValueError as error:
                mistakes.append(f"{option} of {who}: {error}")
            continue
        kind, said, _ = _OPTION_TYPES[known[option]]
        found[option] = whole(given) if kind is int else given
        is_one = isinstance(found[option], kind) and isinstance(given, bool) == (kind is bool)
        if not is_one or (known[option] in ABOVE_0 and found[option] <= 0):
            mistakes.append(f"{option} of {who} is {shown(given)}; expected {said}")
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return found


def parse_pattern(value: Any) -> Any:
    if value is None or isinstance(value, Pattern):
        return value
    if value == "unstructured":
        return Pattern(kind="unstructured")
    if isinstance(value, str) and (match := re.fullmatch(N_M, value)):
        n, m = int(match[1]), int(match[2])
        if not n < m:
            raise ValueError("N:M keeps N of every M: expected 0 < N < M")
        return Pattern(kind="n_m", n=n, m=m)
    if isinstance(value, Mapping) and set(value) == {"block"}:
        block = value["block"]
        if isinstance(block, (list, tuple)) and len(block) == 2 and all(is_whole(s) and s > 0 for s in block):
            return Pattern(kind="block", block=(int(block[0]), int(block[1])))
        raise ValueError("block: expected [rows, columns], two whole numbers from 1 on")
    raise ValueError('expected unstructured, N:M such as "2:4" (0 < N < M), or {block: [rows, columns]}')


def parse_units(value: Any) -> Any:
    if value is None:
        return None
    if _is_units(value):
        return [int(unit) for unit in value]
    if isinstance(value, Mapping) and value and all(isinstance(k, str) and _is_units(v) for k, v in value.items()):
        return {pattern: [int(unit) for unit in units] for pattern, units in value.items()}
    raise ValueError("expected a list of unit numbers (from 0 on, at least one), or {module glob: [numbers]}")


def _is_units(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(is_whole(unit) and unit >= 0 for unit in value)


N_M = r"([1-9][0-9]{0,5}):([1-9][0-9]{0,5})"
_FRACTION = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
_FROM_0 = {"type": "number", "minimum": 0, "exclusiveMaximum": 1}
_BY_GLOB = {"type": "object", "minProperties": 1}
_NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}


def _one_of(parse: Any, *ways: dict[str, Any]) -> Any:
    """A field that `parse` reads and JSON Schema describes as any of `ways`, or null."""
    return Annotated[Any, BeforeValidator(parse), WithJsonSchema({"anyOf": [*ways, {"type": "null"}]})]


def _number_or(parse: Any, number: dict[str, Any]) -> Any:
    """A field that is a number, or numbers by glob."""
    ways = [number, _BY_GLOB | {"additionalProperties": number}]
    return Annotated[Any, BeforeValidator(parse), WithJsonSchema({"anyOf": ways})]


def _section(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [*required],
        "additionalProperties": False,
    }


def _ways(entries: Mapping[str, CriterionEntry | AllocationEntry | CompensationEntry]) -> list[dict[str, Any]]:
    """A name, or a name with the options that it takes; with those that it needs, where it does."""
    required = {name: sorted(getattr(entry, "required", ())) for name, entry in entries.items()}
    return [
        {"enum": [name for name in entries if not required[name]]},
        *(
            _section({"name": {"const": name}} | _option_schemas(entry.options), "name", *required[name])
            for name, entry in entries.items()
        ),
    ]


def _option_schemas(takes: Mapping[str, str]) -> dict[str, Any]:
    return {option: _CRITERIA if kind == "criteria" else _OPTION_TYPES[kind][2] for option, kind in takes.items()}


_WEIGHT = {"type": "number", "exclusiveMinimum": 0}
_CRITERIA = {
    **_section(
        {
            name: {
                "anyOf": [_WEIGHT, _section({"weight": _WEIGHT} | _option_schemas(CRITERIA[name].options), "weight")]
            }
            for name in COMBINABLE
        }
    ),
    "minProperties": 2,
}


Count = Annotated[int, Field(ge=1), BeforeValidator(whole)]
CountFromZero = Annotated[int, Field(ge=0), BeforeValidator(whole)]
VersionField = Annotated[int, BeforeValidator(_version), WithJsonSchema({"const": 1})]
SparsityField = _one_of(
    parse_sparsity,
    _FROM_0,
    _section({"parameters": _FRACTION}, "parameters"),
    _section({"macs": _FRACTION}, "macs"),
)
CriterionField = _one_of(parse_criterion, *_ways(CRITERIA))
AllocationField = _one_of(
    parse_allocation,
    *_ways(ALLOCATIONS),
    _BY_GLOB | {"additionalProperties": _FROM_0},
)
FloorField = _number_or(parse_floor, _FROM_0)
CeilingField = _number_or(parse_ceiling, {"type": "number", "exclusiveMinimum": 0, "maximum": 1})
CompensationField = Annotated[
    Any,
    BeforeValidator(parse_compensation),
    WithJsonSchema({"anyOf": _ways({"none": CompensationEntry(frozenset()), **COMPENSATIONS})}),
]
PatternField = _one_of(
    parse_pattern,
    {"const": "unstructured"},
    {"type": "string", "pattern": f"^{N_M}$"},
    _section(
        {"block": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2, "maxItems": 2}},
        "block",
    ),
)
UnitsField = _one_of(parse_units, _NUMBERS, {"type": "object", "additionalProperties": _NUMBERS, "minProperties": 1})
