"""The section `training`: its keys are the fields of `transformers.TrainingArguments`, as installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from hf_prune.recipe.fields import is_number, is_whole
from hf_prune.recipe.words import NOT_YET, nearest, shown


# fields that a recipe has a place of its own for
SAID_ELSEWHERE = {
    "output_dir": "output.dir",
    "push_to_hub": "output.push_to_hub",
    "hub_model_id": "output.repo_id",
    "hub_private_repo": "output.private",
}
REFUSED = dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), f"the key {NOT_YET}") | {
    "hub_token": "a recipe is shared, a token never: run `hf auth login` or set HF_TOKEN"
}
# fields that training can't do with less of
_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_ABOVE_ZERO = ("num_train_epochs", "learning_rate")


def training_mistakes(training: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for what `TrainingArguments` has no field for, or a field of another type."""
    if not training:
        return
    from dataclasses import fields

    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    known = {field.name for field in fields(TrainingArguments) if field.init} - SAID_ELSEWHERE.keys() - REFUSED.keys()
    for name, value in training.items():
        if name in SAID_ELSEWHERE:
            yield name, f"say it as {SAID_ELSEWHERE[name]}"
        elif name in REFUSED:
            yield name, REFUSED[name]
        elif name not in known:
            yield name, f"no field of TrainingArguments{nearest(str(name), known)}"
        elif text := _mistake(name, value, hints[name]):
            yield name, f"{shown(value)}: {text}"


def _mistake(name: str, value: Any, hint: Any) -> str | None:
    if name == "resume_from_checkpoint":
        is_fine = value is None or isinstance(value, bool)
        return None if is_fine else "expected true or false; the last checkpoint in output.dir is found by itself"
    kinds = get_args(hint) or (hint,)
    choices = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)), None)
    if choices is not None:
        allowed = [member.value for member in choices]
        near = nearest(str(value), allowed)
        return None if value in allowed else f"expected one of {', '.join(allowed)}{near}"
    if not any(_fits(value, kind) for kind in kinds):
        return f"expected {' or '.join(_NAMES.get(get_origin(kind) or kind, str(kind)) for kind in kinds)}"
    if name in _AT_LEAST_ONE and value < 1:
        return "expected 1 or more"
    if name in _ABOVE_ZERO and value <= 0:
        return "expected more than 0"
    return None


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "keys with values",
    list: "a list",
    NoneType: "null",
}


def _fits(value: Any, kind: Any) -> bool:
    kind = get_origin(kind) or kind
    if kind is float:
        return is_number(value)
    if kind is int:
        return is_whole(value)
    # a type that isn't named here is left to TrainingArguments
    return isinstance(value, kind) if kind in _NAMES else True
