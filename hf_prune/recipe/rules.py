"""Rules between the keys of a step. Each is said twice, for us and in JSON Schema; a test holds the two together.

They look at the step as it was written, so that a mistake in one key doesn't hide those between others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hf_prune.recipe.fields import (
    N_M,
    Allocation,
    Criterion,
    MacBudget,
    ParameterBudget,
    Pattern,
    parse_allocation,
    parse_compensation,
    parse_criterion,
    parse_pattern,
    parse_sparsity,
)
from hf_prune.recipe.vocabulary import ALLOCATIONS, COMPENSATIONS, CRITERIA, EVERY_TARGET


AMOUNTS = ("sparsity", "threshold", "remove")
PARTS = ("attention", "feed_forward")  # of a block
# keys that mean nothing for single weights, with their defaults
OF_UNITS: dict[str, Any] = {"uniform": False, "round_to": 1, "min_keep": 1}
# limits of a site, with the defaults that say nothing
LIMITS: dict[str, Any] = {"min_sparsity": 0, "max_sparsity": 1}
_WHY_NOT: dict[type, str] = {
    MacBudget: "{macs: …} is for layers, heads and neurons: zeros in a dense weight save no operation",
    ParameterBudget: "{parameters: …} is for layers, heads and neurons: zeros stay in the tensor; give a plain fraction",
}


def step_mistakes(step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for every rule that a step, as written, breaks; values that can't be read are passed over."""
    target, scope = step.get("target"), step.get("scope", "layer")
    given = [name for name in AMOUNTS if step.get(name) is not None]
    sparsity, criterion, pattern = (
        _parsed(parse, step.get(name))
        for name, parse in (("sparsity", parse_sparsity), ("criterion", parse_criterion), ("pattern", parse_pattern))
    )
    is_n_m = isinstance(pattern, Pattern) and pattern.kind == "n_m"
    if is_n_m and given:
        yield given[0], f"pattern {step['pattern']} says the sparsity already; drop {', '.join(given)}"
    elif not is_n_m and len(given) != 1:
        key = given[1] if given else ""
        yield key, f"expected exactly one of {', '.join(AMOUNTS)}; found {', '.join(given) or 'none'}"
    if target == "weights":
        if step.get("remove") is not None:
            yield "remove", "remove is for layers, heads and neurons; weights leave by sparsity, threshold or N:M"
        if type(sparsity) in _WHY_NOT:
            yield "sparsity", _WHY_NOT[type(sparsity)]
        for key, default in OF_UNITS.items():
            if key in step and step[key] != default:
                yield key, f"{key} is for layers, heads, neurons and experts, not single weights; drop it"
    elif isinstance(target, str):
        if step.get("pattern") is not None:
            yield "pattern", f"pattern is for target weights, not {target}"
        if scope == "output":
            yield "scope", f"scope output is for target weights, not {target}; use layer or global"
        if isinstance(step.get("remove"), (list, tuple)) and target != "layers":
            yield "remove", 'remove of heads, neurons or experts says where: {"*.layer.0.*": [1, 4]}'
    is_part = step.get("part") in PARTS
    if is_part and isinstance(target, str) and target in EVERY_TARGET - {"layers"}:
        yield "part", f"part {step['part']} is for target layers, not {target}"
    if step.get("uniform") is True and target != "weights":
        if target == "layers":
            yield "uniform", "uniform is for heads, neurons and experts; layers are of one size already"
        if scope == "global":
            yield "uniform", "uniform asks for equal sites and scope global lets them differ; drop one"
        if given and given != ["sparsity"]:
            yield "uniform", f"uniform goes with a sparsity, not with {', '.join(given)}"
        if step.get("allocation") is not None:
            yield "uniform", "uniform asks for equal sites and an allocation lets them differ; drop one"
    said = "N:M says for each group of weights" if is_n_m else f"{' and '.join(given)} says"
    for key, default in LIMITS.items():
        if step.get(key, default) != default and (is_n_m or (key == "min_sparsity" and given != ["sparsity"])):
            yield key, f"{key} goes with a sparsity; {said} what leaves; drop one"
    yield from _allocation_mistakes(step, given, is_n_m)
    if isinstance(criterion, Criterion) and isinstance(target, str):
        entry = CRITERIA[criterion.name]
        for name in (criterion.name, *criterion.options.get("of", ())):
            if target in EVERY_TARGET - CRITERIA[name].targets:
                yield (
                    "criterion",
                    f"criterion {name} is not defined for {target}; it is for {', '.join(sorted(CRITERIA[name].targets))}",
                )
        if is_part and not entry.of_parts:
            yield (
                "criterion",
                f"criterion {criterion.name} is for whole layers; for a part take loss_change or another",
            )
        if entry.is_blockwise:
            if step.get("threshold") is not None or (isinstance(pattern, Pattern) and pattern.kind == "block"):
                yield "criterion", f"criterion {criterion.name} goes with a sparsity or a pattern N:M"
            if scope != "layer":
                yield "scope", f"criterion {criterion.name} prunes matrix by matrix, scope layer; drop {scope}"
        if entry.by_threshold and step.get("threshold") is None:
            yield "threshold", f"criterion {criterion.name} goes with a threshold; for a share or N:M take movement"
        may_choose = "greedy" in entry.options
        if entry.is_greedy and criterion.options.get("greedy", not may_choose or target == "layers"):
            instead = f"with {{name: {criterion.name}, greedy: false}} it goes" if may_choose else "else take another"
            if step.get("threshold") is not None:
                yield (
                    "threshold",
                    f"criterion {criterion.name} has to know how many leave, so give a sparsity; {instead}",
                )
            if scope == "global":
                yield "scope", f"criterion {criterion.name} goes through one site at a time, scope layer; {instead}"
    compensation = _parsed(parse_compensation, step.get("compensation"))
    if isinstance(target, str) and compensation is not None and compensation.name in COMPENSATIONS:
        repaired = COMPENSATIONS[compensation.name].targets
        if target in EVERY_TARGET - repaired:
            yield (
                "compensation",
                f"compensation {compensation.name} is for {', '.join(sorted(repaired))}, not {target}",
            )
        elif is_part and not COMPENSATIONS[compensation.name].of_parts:
            yield (
                "compensation",
                f"compensation {compensation.name} is for whole layers; for a part take least_squares",
            )
        if compensation.add and target in ("layers", "weights"):
            yield "compensation", f"add gives a bias to what lost heads or neurons; drop it from a step of {target}"
    schedule = step.get("schedule")
    if isinstance(schedule, Mapping) and schedule.get("shrink") in ("never", "when_final"):
        yield "schedule", "shrink is said once for all steps, in the recipe's own schedule"
    if isinstance(schedule, Mapping) and schedule.get("rewind") is not None:
        yield "schedule", "rewind is said once for all steps, in the recipe's own schedule"


def _allocation_mistakes(step: Mapping[str, Any], given: list[str], is_n_m: bool) -> Iterator[tuple[str, str]]:
    allocation, target, scope = (
        _parsed(parse_allocation, step.get("allocation")),
        step.get("target"),
        step.get("scope"),
    )
    if allocation is None:
        return
    if is_n_m or given != ["sparsity"]:
        yield "allocation", "an allocation shares out a sparsity; it goes with no threshold, list of units or N:M"
    if not isinstance(allocation, Allocation) or allocation.name is None:
        return
    entry = ALLOCATIONS[allocation.name]
    if isinstance(target, str) and target in EVERY_TARGET - entry.targets:
        yield "allocation", f"allocation {allocation.name} is for {', '.join(sorted(entry.targets))}, not {target}"
    if isinstance(scope, str | None) and (scope or "layer") not in entry.scopes:
        yield (
            "scope",
            f"allocation {allocation.name} goes with scope {' or '.join(sorted(entry.scopes))}, not {scope or 'layer'}",
        )


def _parsed(parse: Callable[[Any], Any], value: Any) -> Any:
    try:
        return parse(value)
    except ValueError:
        return None


def step_schema() -> dict[str, Any]:
    """The same rules in JSON Schema."""
    is_n_m = _is("pattern", {"type": "string", "pattern": f"^{N_M}$"})
    no_amount = {"not": {"anyOf": [_given(name) for name in AMOUNTS]}}
    return {
        "allOf": [
            {
                "if": is_n_m,
                "then": no_amount,
                "else": {"oneOf": [_given(name) for name in AMOUNTS]},
            },
            {
                "if": _is("target", {"const": "weights"}),
                "then": _where(
                    remove={"type": "null"},
                    sparsity={"type": ["number", "null"]},
                    **{key: {"const": default} for key, default in OF_UNITS.items()},
                ),
                "else": _where(pattern={"type": "null"}, scope={"not": {"const": "output"}}),
            },
            {
                "if": _is("target", {"enum": ["ffn_neurons", "attention_heads", "experts"]}),
                "then": _where(remove={"not": {"type": "array"}}),
            },
            {
                "if": _is("uniform", {"const": True}),
                "then": {
                    "required": ["sparsity"],
                    **_where(
                        target={"not": {"const": "layers"}},
                        scope={"not": {"const": "global"}},
                        allocation={"type": "null"},
                    ),
                },
            },
            *(
                {
                    "if": _is("target", {"enum": sorted(lacking)}),
                    "then": {
                        "not": _is("criterion", {"anyOf": [_named(name), _named("combined", of=_is(name, True))]})
                    },
                }
                for name, entry in CRITERIA.items()
                if (lacking := EVERY_TARGET - entry.targets)
            ),
            *(
                {
                    "if": _is("criterion", _named(name)),
                    "then": _where(
                        threshold={"type": "null"}, pattern={"not": {"type": "object"}}, scope={"const": "layer"}
                    ),
                }
                for name, entry in CRITERIA.items()
                if entry.is_blockwise
            ),
            *(
                {"if": when, "then": _where(threshold={"type": "null"}, scope={"not": {"const": "global"}})}
                for name, entry in CRITERIA.items()
                if entry.is_greedy
                for when in (
                    (
                        _is("criterion", {"type": "object", "allOf": [_named(name), _is("greedy", {"const": True})]}),
                        {
                            "allOf": [
                                _is("criterion", _named(name, greedy={"not": {"const": False}})),
                                _is("target", {"const": "layers"}),
                            ]
                        },
                    )
                    if "greedy" in entry.options
                    else (_is("criterion", _named(name)),)
                )
            ),
            *(
                {"if": _is("criterion", _named(name)), "then": _given("threshold")}
                for name, entry in CRITERIA.items()
                if entry.by_threshold
            ),
            *(
                {"if": _is(key, {"not": {"const": default}}), "then": then}
                for key, default, then in (
                    ("min_sparsity", LIMITS["min_sparsity"], {**_given("sparsity"), "not": is_n_m}),
                    ("max_sparsity", LIMITS["max_sparsity"], {"not": is_n_m}),
                )
            ),
            {"if": _given("allocation"), "then": {**_given("sparsity"), "not": is_n_m}},
            *(
                {
                    "if": _is("allocation", _named(name)),
                    "then": {
                        "required": [] if "layer" in entry.scopes else ["scope"],
                        **_where(target={"enum": sorted(entry.targets)}, scope={"enum": sorted(entry.scopes)}),
                    },
                }
                for name, entry in ALLOCATIONS.items()
            ),
            *(
                {"if": _is("compensation", _named(name)), "then": _where(target={"enum": sorted(entry.targets)})}
                for name, entry in COMPENSATIONS.items()
            ),
            {"if": _is("part", {"enum": [*PARTS]}), "then": _where(target={"const": "layers"})},
            *(
                {"if": _is(key, _named(name)), "then": _where(part={"const": "block"})}
                for key, entries in (("criterion", CRITERIA), ("compensation", COMPENSATIONS))
                for name, entry in entries.items()
                if not entry.of_parts
            ),
            {
                "if": _is("compensation", {"type": "object", **_is("add", {"const": True})}),
                "then": _where(target={"not": {"enum": ["layers", "weights"]}}),
            },
            _where(schedule=_where(shrink={"const": "at_end"}, rewind={"type": "null"})),
        ]
    }


def _where(**properties: Any) -> dict[str, Any]:
    """These keys, where they are there."""
    return {"properties": properties}


def _is(key: str, schema: Any) -> dict[str, Any]:
    """This key is there, and so."""
    return {"required": [key], "properties": {key: schema}}


def _given(key: str) -> dict[str, Any]:
    return _is(key, {"not": {"type": "null"}})


def _named(name: str, **options: Any) -> dict[str, Any]:
    """This criterion or compensation, by its name alone or with options that fit these."""
    properties = {"name": {"const": name}, **options}
    return {"anyOf": [{"const": name}, {"type": "object", "required": ["name"], "properties": properties}]}
