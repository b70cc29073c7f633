"""The recipe: a closed vocabulary of plain data. DESIGN: unknown keys are errors, and all mistakes come together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_serializer, model_validator

from hf_prune.recipe.fields import (
    Allocation,
    AllocationField,
    CeilingField,
    Compensation,
    CompensationField,
    Count,
    Criterion,
    CriterionField,
    FloorField,
    Pattern,
    PatternField,
    Section,
    SparsityField,
    UnitsField,
    VersionField,
    whole,
)
from hf_prune.recipe.rules import step_schema
from hf_prune.recipe.training import REFUSED, SAID_ELSEWHERE
from hf_prune.recipe.vocabulary import CRITERIA


Target = Literal["weights", "ffn_neurons", "attention_heads", "layers", "experts"]
# the keys are those of the installed Transformers, which JSON Schema can't say; `training_mistakes` checks them
TrainingField = Annotated[
    dict[str, Any] | None,
    WithJsonSchema({"type": ["object", "null"], "properties": dict.fromkeys((*SAID_ELSEWHERE, *REFUSED), False)}),
]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1), BeforeValidator(whole)]  # NumPy takes no larger one


class Threshold(Section):
    """What scores below a value leaves."""

    rule: Literal["absolute", "relative_to_max", "mean_minus_std"]
    value: float


class Schedule(Section):
    """When sparsity grows: `begin` and `end` are fractions of training, `updates` how often in between.

    one_shot prunes once at `begin`; constant asks for the final sparsity from `begin` on and chooses anew at each
    update; linear and cubic (Zhu & Gupta 2017, equation 1) ramp up to it. `rewind`: once the last update is made, what is kept
    returns to the values that it had at this fraction of training (Frankle et al. 2020, arXiv 1912.05671).
    """

    name: Literal["one_shot", "linear", "cubic", "constant"] = "cubic"
    begin: float = Field(0.1, ge=0, le=1)
    end: float = Field(0.6, ge=0, le=1)
    updates: Count = 20
    shrink: Literal["at_end", "when_final", "never"] = "at_end"
    rewind: float | None = Field(None, ge=0, le=1)

    @model_validator(mode="after")
    def _in_order(self) -> Schedule:
        if self.begin > self.end:
            said = [
                f"{name} ({getattr(self, name)}{'' if name in self.model_fields_set else ' by default'})"
                for name in ("begin", "end")
            ]
            raise ValueError(f"{said[0]} is after {said[1]}")
        if self.rewind is not None and self.rewind > self.begin:
            raise ValueError(f"rewind ({self.rewind}) is after begin ({self.begin}): it goes back to before pruning")
        return self


class Distillation(Section):
    """What a teacher adds to the loss of training: (1 - `weight`) × task + `weight` × T² KL(teacher ‖ student) of the logits at
    `temperature` T (Hinton et al. 2015, arXiv 1503.02531) + `hidden_states` × mean squared difference of the layers' outputs.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"required": ["weight"], "properties": {"weight": {"const": 0}}},
            "then": {"required": ["hidden_states"], "properties": {"hidden_states": {"exclusiveMinimum": 0}}},
        }
    )

    temperature: float = Field(2.0, gt=0)
    weight: float = Field(0.5, ge=0, le=1)
    hidden_states: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _of_something(self) -> Distillation:
        if not self.weight and not self.hidden_states:
            raise ValueError("nothing is distilled: expected a weight or hidden_states above 0; else drop the section")
        return self


class Calibration(Section):
    """The data that criteria look at: how many samples, their length in tokens, how many at a time, where what passes
    between blocks is kept."""

    samples: Count = 128
    length: Count = 512
    batch_size: Count = 8
    offload: Literal["none", "disk"] = "none"


class Step(Section):
    """One step: what leaves (`target`), how much of it, chosen how. `rules` has what must hold between the keys."""

    model_config = ConfigDict(json_schema_extra=step_schema())

    target: Target
    part: Literal["block", "attention", "feed_forward"] = "block"
    sparsity: SparsityField = None
    threshold: Threshold | None = None
    remove: UnitsField = None
    criterion: CriterionField = None
    scope: Literal["output", "layer", "global"] = "layer"
    allocation: AllocationField = None
    normalize: Literal["auto", "none", "mean", "max"] = "auto"
    uniform: bool = False
    round_to: Count = 1
    min_keep: Count = 1
    min_sparsity: FloorField = 0.0
    max_sparsity: CeilingField = 1.0
    include: tuple[str, ...] = Field((), strict=False)
    exclude: tuple[str, ...] = Field((), strict=False)
    pattern: PatternField = None
    compensation: CompensationField = Compensation()
    schedule: Schedule | None = None

    @model_validator(mode="after")
    def _with_defaults(self) -> Step:
        if self.criterion is None:
            object.__setattr__(self, "criterion", Criterion(name="l1" if self.target == "weights" else "l2"))
        if self.pattern is None:
            object.__setattr__(self, "pattern", Pattern(kind="unstructured"))
        if "scope" not in self.model_fields_set and self.criterion is not None and self.target == "weights":
            object.__setattr__(self, "scope", CRITERIA[self.criterion.name].scope)
        return self

    @field_serializer("sparsity", "criterion", "pattern", "compensation", "allocation")
    def _as_written(self, value: Any) -> Any:
        match value:
            case Compensation(add=False):
                return value.name
            case Allocation(name=None):
                return dict(value.shares)
            case Criterion() | Allocation():
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


class ModelSection(Section):
    """What `hf-prune run` loads: a Hub id, a directory, or `package:NAME/PATH` inside an installed package."""

    name_or_path: str
    task: Literal["text-classification", "text-generation", "image-classification"]
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


class DataSection(Section):
    """What `hf-prune run` trains and evaluates on: a Hub id, a file, a folder of class folders, or a package's."""

    name_or_path: str
    config_name: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    image_column: str = "image"
    max_length: Count = 128
    max_train_samples: Count | None = None
    max_eval_samples: Count | None = None
    test_size: float = Field(0.2, gt=0, lt=1)


class OutputSection(Section):
    """Where `hf-prune run` writes, and whether it pushes."""

    dir: str = "outputs/pruned"
    push_to_hub: bool = False
    repo_id: str | None = None
    private: bool = True


class RecipeDocument(Section):
    """A whole recipe."""

    version: VersionField
    name: str | None = None
    description: str | None = None
    seed: Seed = 0
    model: ModelSection | None = None
    data: DataSection | None = None
    output: OutputSection | None = None
    training: TrainingField = None
    prune: tuple[Step, ...] = Field(min_length=1, strict=False)
    schedule: Schedule = Field(default_factory=Schedule)
    calibration: Calibration = Field(default_factory=Calibration)
    distillation: Distillation | None = None
