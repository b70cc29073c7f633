"""The recipe: a closed vocabulary of plain data. DESIGN: unknown keys are errors, and all mistakes come together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_serializer, model_validator

from hf_prune.recipe.vocabulary import CRITERIA


# Keys and values that are known to the language but not to this version.
NOT_YET = "is not supported in this version of hf_prune"
Target = Literal["weights", "ffn_neurons", "attention_heads", "layers"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ParameterBudget(_Section):
    """The model's parameters shrink by this fraction."""

    parameters: float = Field(gt=0, lt=1)


class MacBudget(_Section):
    """The model's MACs shrink by this fraction."""

    macs: float = Field(gt=0, lt=1)


class Threshold(_Section):
    """What scores below a value leaves."""

    rule: Literal["absolute", "relative_to_max", "mean_minus_std"]
    value: float


class Criterion(_Section):
    """A criterion's name and options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class Pattern(_Section):
    """Which entries of a weight leave together: single ones, all but n of every m, or blocks (outputs, inputs)."""

    kind: Literal["unstructured", "n_m", "block"]
    n: int | None = None
    m: int | None = None
    block: tuple[int, int] | None = None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _sparsity(value: Any) -> Any:
    if value is None or isinstance(value, (ParameterBudget, MacBudget)):
        return value
    if _number(value):
        if not 0 <= value < 1:
            raise ValueError("expected a fraction from 0 to below 1")
        return float(value)
    if isinstance(value, Mapping) and len(value) == 1 and set(value) <= {"parameters", "macs"}:
        ((name, fraction),) = value.items()
        if not _number(fraction) or not 0 < fraction < 1:
            raise ValueError(f"{name}: expected a fraction between 0 and 1")
        return ParameterBudget(parameters=fraction) if name == "parameters" else MacBudget(macs=fraction)
    raise ValueError("expected a fraction, {parameters: fraction} or {macs: fraction}")


def _criterion(value: Any) -> Any:
    if value is None or isinstance(value, Criterion):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError("expected a criterion's name, or {name: …, option: …}")
    name, options = value["name"], {key: option for key, option in value.items() if key != "name"}
    if name not in CRITERIA:
        raise ValueError(f"unknown criterion {name!r}; known: {', '.join(CRITERIA)}{_near(name)}")
    unknown = set(options) - CRITERIA[name].options
    if unknown:
        takes = ", ".join(sorted(CRITERIA[name].options)) or "no options"
        raise ValueError(f"criterion {name} takes {takes}; unknown: {', '.join(sorted(unknown))}")
    return Criterion(name=name, options=options)


def _near(name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, CRITERIA, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _pattern(value: Any) -> Any:
    if value is None or isinstance(value, Pattern):
        return value
    if value == "unstructured":
        return Pattern(kind="unstructured")
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+):(\d+)", value)):
        n, m = int(match[1]), int(match[2])
        if not 0 < n < m:
            raise ValueError("N:M keeps N of every M: expected 0 < N < M")
        return Pattern(kind="n_m", n=n, m=m)
    if isinstance(value, Mapping) and set(value) == {"block"}:
        block = value["block"]
        if (
            isinstance(block, (list, tuple))
            and len(block) == 2
            and all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in block)
        ):
            return Pattern(kind="block", block=(block[0], block[1]))
    raise ValueError('expected "unstructured", "N:M" such as "2:4", or {block: [rows, columns]}')


def _units(value: Any) -> Any:
    if value is None:
        return None
    if _is_units(value):
        return list(value)
    if isinstance(value, Mapping) and value and all(isinstance(k, str) and _is_units(v) for k, v in value.items()):
        return {pattern: list(units) for pattern, units in value.items()}
    raise ValueError("expected a list of unit numbers, or {module glob: [numbers]}")


def _is_units(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(unit, int) and not isinstance(unit, bool) and unit >= 0 for unit in value
    )


_FRACTION = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
_NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
SparsityField = Annotated[
    Any,
    BeforeValidator(_sparsity),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
                *(
                    {"type": "object", "properties": {n: _FRACTION}, "required": [n], "additionalProperties": False}
                    for n in ("parameters", "macs")
                ),
                {"type": "null"},
            ]
        }
    ),
]
CriterionField = Annotated[
    Any,
    BeforeValidator(_criterion),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": list(CRITERIA)},
                *(
                    {
                        "type": "object",
                        "properties": {"name": {"const": name}} | {option: {} for option in sorted(entry.options)},
                        "required": ["name"],
                        "additionalProperties": False,
                    }
                    for name, entry in CRITERIA.items()
                ),
                {"type": "null"},
            ]
        }
    ),
]
PatternField = Annotated[
    Any,
    BeforeValidator(_pattern),
    WithJsonSchema(
        {
            "anyOf": [
                {"const": "unstructured"},
                {"type": "string", "pattern": r"^\d+:\d+$"},
                {
                    "type": "object",
                    "properties": {
                        "block": {
                            "type": "array",
                            "items": {"type": "integer", "minimum": 1},
                            "minItems": 2,
                            "maxItems": 2,
                        }
                    },
                    "required": ["block"],
                    "additionalProperties": False,
                },
                {"type": "null"},
            ]
        }
    ),
]
UnitsField = Annotated[
    Any,
    BeforeValidator(_units),
    WithJsonSchema(
        {
            "anyOf": [
                _NUMBERS,
                {"type": "object", "additionalProperties": _NUMBERS, "minProperties": 1},
                {"type": "null"},
            ]
        }
    ),
]


class Schedule(_Section):
    """When sparsity grows: `begin` and `end` are fractions of training, `updates` how often in between.

    one_shot prunes once at `begin`; constant asks for the final sparsity from `begin` on and chooses anew at each
    update; linear and cubic (Zhu & Gupta 2017, equation 1) ramp up to it.
    """

    name: Literal["one_shot", "linear", "cubic", "constant"] = "cubic"
    begin: float = Field(0.1, ge=0, le=1)
    end: float = Field(0.6, ge=0, le=1)
    updates: int = Field(20, ge=1)
    shrink: Literal["at_end", "never"] = "at_end"

    @model_validator(mode="after")
    def _in_order(self) -> Schedule:
        if self.begin > self.end:
            raise ValueError(f"begin ({self.begin}) is after end ({self.end})")
        return self


class Calibration(_Section):
    """The data that criteria look at: how many samples, their length in tokens, how many at a time."""

    samples: int = Field(128, ge=1)
    length: int = Field(512, ge=1)
    batch_size: int = Field(8, ge=1)


class Step(_Section):
    """One step: what leaves (`target`), how much of it, chosen how."""

    target: Target
    part: Literal["block"] = "block"
    sparsity: SparsityField = None
    threshold: Threshold | None = None
    remove: UnitsField = None
    criterion: CriterionField = None
    scope: Literal["output", "layer", "global"] = "layer"
    normalize: Literal["auto", "none", "mean", "max"] = "auto"
    uniform: bool = False
    round_to: int = Field(1, ge=1)
    min_keep: int = Field(1, ge=1)
    max_sparsity: float = Field(1.0, gt=0, le=1)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    pattern: PatternField = None
    compensation: Literal["none"] = "none"
    schedule: Schedule | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Step:
        mistakes = list(self._mistakes())
        if mistakes:
            raise ValueError("\n".join(mistakes))
        defaults: dict[str, _Section] = {}
        if self.criterion is None:
            defaults["criterion"] = Criterion(name="l1" if self.target == "weights" else "l2")
        if self.pattern is None:
            defaults["pattern"] = Pattern(kind="unstructured")
        for name, value in defaults.items():
            object.__setattr__(self, name, value)
        return self

    def _mistakes(self) -> Any:
        given = [name for name in ("sparsity", "threshold", "remove") if getattr(self, name) is not None]
        is_n_m = self.pattern is not None and self.pattern.kind == "n_m"
        if is_n_m and given:
            yield f"pattern {self.pattern.n}:{self.pattern.m} says the sparsity already; drop {', '.join(given)}"
        elif not is_n_m and len(given) != 1:
            yield f"expected exactly one of sparsity, threshold, remove; found {', '.join(given) or 'none'}"
        if self.target == "weights":
            if self.remove is not None:
                yield "remove is for layers, heads and neurons; weights leave by sparsity, threshold or N:M"
            if isinstance(self.sparsity, MacBudget):
                yield "{macs: …} is for layers, heads and neurons: zeros in a dense weight save no operation"
            if isinstance(self.sparsity, ParameterBudget):
                yield "{parameters: …} is for layers, heads and neurons: zeros stay in the tensor; give a plain fraction"
            for name in ("normalize", "uniform", "round_to", "min_keep", "max_sparsity"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    yield f"{name} is for layers, heads and neurons, not weights; drop it"
        else:
            if self.pattern is not None:
                yield f"pattern is for target weights, not {self.target}"
            if self.scope == "output":
                yield f"scope output is for target weights, not {self.target}; use layer or global"
        if isinstance(self.remove, list) and self.target not in ("layers", "weights"):
            yield 'remove of heads or neurons says where: {"*.layer.0.*": [1, 4]}'
        if self.uniform and self.target == "layers":
            yield "uniform is for heads and neurons; layers are of one size already"
        if self.uniform and self.scope == "global":
            yield "uniform asks for equal sites and scope global lets them differ; drop one"
        if self.criterion is not None and self.target not in CRITERIA[self.criterion.name].targets:
            defined = ", ".join(sorted(CRITERIA[self.criterion.name].targets))
            yield f"criterion {self.criterion.name} is not defined for {self.target}; it is for {defined}"

    @field_serializer("sparsity", "criterion", "pattern")
    def _as_written(self, value: Any) -> Any:
        match value:
            case Criterion():
                return {"name": value.name, **value.options} if value.options else value.name
            case Pattern(kind="n_m"):
                return f"{value.n}:{value.m}"
            case Pattern(kind="block", block=(rows, columns)):
                return {"block": [rows, columns]}
            case Pattern():
                return None if self.target != "weights" else value.kind
            case BaseModel():
                return value.model_dump()
        return value


class ModelSection(_Section):
    """What `hf-prune run` loads: a Hub id, a directory, or `package:NAME/PATH` inside an installed package."""

    name_or_path: str
    task: Literal["text-classification", "text-generation", "image-classification"]
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


class DataSection(_Section):
    """What `hf-prune run` trains and evaluates on: a Hub id, a file, a folder of class folders, or a package's."""

    name_or_path: str
    config_name: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    image_column: str = "image"
    max_length: int = Field(128, ge=1)
    max_train_samples: int | None = Field(None, ge=1)
    max_eval_samples: int | None = Field(None, ge=1)
    test_size: float = Field(0.2, gt=0, lt=1)


class OutputSection(_Section):
    """Where `hf-prune run` writes, and whether it pushes."""

    dir: str = "outputs/pruned"
    push_to_hub: bool = False
    repo_id: str | None = None
    private: bool = True


class RecipeDocument(_Section):
    """A whole recipe."""

    version: Literal[1]
    name: str | None = None
    description: str | None = None
    seed: int = Field(0, ge=0)
    model: ModelSection | None = None
    data: DataSection | None = None
    output: OutputSection | None = None
    training: dict[str, Any] | None = None
    prune: tuple[Step, ...] = Field(min_length=1)
    schedule: Schedule = Field(default_factory=Schedule)
    calibration: Calibration = Field(default_factory=Calibration)
