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
    CountFromZero,
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

    rule: Literal["absolute", "relative_to_max", "mean_minus_std"] = Field(
        description="score < value; < value × the highest score; < mean − value × standard deviation"
    )
    value: float = Field(description="see `rule`")


class Schedule(Section):
    """When sparsity grows: `begin` and `end` are fractions of training, `updates` how often in between.

    one_shot prunes once at `begin`; constant asks for the final sparsity from `begin` on and chooses anew at each
    update; linear and cubic (Zhu & Gupta 2017, equation 1) ramp up to it. `rewind`: once the last update is made, what is kept
    returns to the values that it had at this fraction of training (Frankle et al. 2020, arXiv 1912.05671).
    """

    name: Literal["one_shot", "linear", "cubic", "constant"] = Field("cubic", description="how sparsity grows")
    begin: float = Field(0.1, ge=0, le=1, description="when pruning begins")
    end: float = Field(0.6, ge=0, le=1, description="when the final sparsity is reached; what follows is recovery")
    updates: Count = Field(20, description="how often, from begin to end")
    shrink: Literal["at_end", "when_final", "never"] = Field(
        "at_end",
        description="remove masked units physically when training ends, as soon as the schedule does (the rest of the run is faster: docs/training.md), or leave them masked",
    )
    rewind: float | None = Field(
        None,
        ge=0,
        le=1,
        description="not after `begin`: once the last update is made, what is kept returns to its values at this point of training",
    )

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

    temperature: float = Field(2.0, gt=0, description="T: how soft both distributions are")
    weight: float = Field(0.5, ge=0, le=1, description="of the logits' term; what is left of 1 is the task's")
    hidden_states: float = Field(0.0, ge=0, description="weight of the layers' term")

    @model_validator(mode="after")
    def _of_something(self) -> Distillation:
        if not self.weight and not self.hidden_states:
            raise ValueError("nothing is distilled: expected a weight or hidden_states above 0; else drop the section")
        return self


class Calibration(Section):
    """The data that criteria look at: how many samples, their length in tokens, how many at a time, where what passes
    between blocks is kept."""

    samples: Count = Field(
        128, description="how many; in the trainer the first of `calibration_dataset`, else of the training set"
    )
    length: Count = Field(
        512,
        description="tokens at which `{macs: …}` is counted, and of self-generated samples; it cuts no sample (`data.max_length` does)",
    )
    batch_size: Count = Field(8, description="how many at a time; results don't depend on it, memory does")
    self_generated: CountFromZero = Field(
        0, description="so many more, of `length` tokens, that a causal language model writes itself"
    )
    offload: Literal["none", "disk"] = Field(
        "none",
        description="where repair and sparsegpt keep what passes between blocks: in memory, or in a temporary folder",
    )


class Step(Section):
    """One step: what leaves (`target`), how much of it, chosen how. `rules` has what must hold between the keys."""

    model_config = ConfigDict(json_schema_extra=step_schema())

    target: Target = Field(description="what leaves")
    part: Literal["block", "attention", "feed_forward"] = Field(
        "block", description="for layers: the whole block, or what its attention or its feed-forward adds"
    )
    sparsity: SparsityField = Field(
        None,
        description="the share that leaves: of the units, or as much as saves this share of the model's parameters or MACs",
    )
    threshold: Threshold | None = Field(None, description="what scores below a value leaves")
    remove: UnitsField = Field(None, description="these leave, whatever their score")
    criterion: CriterionField = Field(None, description="what scores: docs/criteria.md")
    scope: Literal["output", "layer", "global"] = Field("layer", description="who competes with whom")
    allocation: AllocationField = Field(
        None, description="how the sparsity is shared out between sites: docs/allocation.md"
    )
    normalize: Literal["auto", "none", "mean", "max"] = Field(
        "auto", description="how scores of different sites compare under `scope: global`"
    )
    uniform: bool = Field(False, description="equal sizes that the stock config can say")
    round_to: Count = Field(1, description="kept sizes are multiples of it")
    min_keep: Count = Field(1, description="units that stay in each site")
    min_sparsity: FloorField = Field(0.0, description="the smallest share that leaves a single site")
    max_sparsity: CeilingField = Field(1.0, description="the largest share that leaves a single site")
    include: tuple[str, ...] = Field((), strict=False, description="only sites whose module is named so")
    exclude: tuple[str, ...] = Field((), strict=False, description="no sites whose module is named so")
    pattern: PatternField = Field(None, description="for weights: which entries leave together")
    compensation: CompensationField = Field(Compensation(), description="repair of what is left, without labels")
    schedule: Schedule | None = Field(None, description="the step's own")

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
            case Compensation():
                written = value.model_dump(exclude_defaults=True)
                return written if written.keys() - {"name"} else value.name
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

    name_or_path: str = Field(
        description="a Hub id, a directory, or `package:NAME/PATH` inside an installed Python package"
    )
    task: Literal["text-classification", "text-generation", "image-classification"] = Field(
        description="the Auto class, how samples are prepared, the metric"
    )
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="in which the model is loaded")


class DataSection(Section):
    """What `hf-prune run` trains and evaluates on: a Hub id, a file, a folder of class folders, or a package's."""

    name_or_path: str = Field(
        description="a Hub id, a file (csv, json, jsonl, parquet, txt), a folder saved by `datasets`, a folder with one folder a class (of .txt files or images), a folder of data files, or `package:NAME/PATH`"
    )
    config_name: str | None = Field(None, description="the data set's configuration on the Hub")
    train_split: str = Field("train", description="what is trained on, and calibrated on")
    eval_split: str | None = Field(
        None, description="if not given: validation, test or dev, whichever is there, else cut from the training split"
    )
    text_column: str = Field("text", description="where the texts are")
    label_column: str = Field(
        "label",
        description="the class; for text-generation the domain of a text, if the data have such a column. The report says quality by it",
    )
    image_column: str = Field("image", description="where the images are")
    max_length: Count = Field(
        128, description="tokens at which texts are cut; for text-generation the length of blocks"
    )
    max_train_samples: Count | None = Field(None, description="the first after shuffling")
    max_eval_samples: Count | None = Field(None, description="likewise")
    test_size: float = Field(0.2, gt=0, lt=1, description="what is cut for evaluation if there is no such split")


class OutputSection(Section):
    """Where `hf-prune run` writes, and whether it pushes."""

    dir: str = Field("outputs/pruned", description="a new or empty directory, or that of an earlier run")
    push_to_hub: bool = Field(False, description="push when all is saved")
    repo_id: str | None = Field(None, description="owner/name; if not given the name of `dir`, under your account")
    private: bool = Field(True, description="of a repository that pushing creates")


class RecipeDocument(Section):
    """A whole recipe."""

    version: VersionField = Field(description="of the language")
    name: str | None = Field(None, description="for people")
    description: str | None = Field(None, description="for people; it goes on the model card")
    seed: Seed = Field(
        0,
        description="of criterion `random`, of collation and shuffling, and of training unless `training.seed` says otherwise",
    )
    model: ModelSection | None = Field(None, description="what `hf-prune run` loads")
    data: DataSection | None = Field(None, description="what `hf-prune run` trains and evaluates on")
    output: OutputSection | None = Field(None, description="where `hf-prune run` writes")
    training: TrainingField = Field(None, description="fields of `transformers.TrainingArguments`, for `hf-prune run`")
    prune: tuple[Step, ...] = Field(min_length=1, strict=False, description="what leaves, in order")
    schedule: Schedule = Field(default_factory=Schedule, description="when, for all steps that have none of their own")
    calibration: Calibration = Field(default_factory=Calibration, description="the data that criteria look at")
    distillation: Distillation | None = Field(None, description="what a teacher adds to the loss of training")
