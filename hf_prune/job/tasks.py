"""What differs between the tasks of `hf-prune run`: Auto class, preparation of samples, metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_prune.errors import CheckpointError, RecipeError
from hf_prune.job.sources import resolve
from hf_prune.recipe import Recipe


@dataclass
class Prepared:
    """A task on its data: everything that a Trainer needs but the model."""

    train: Any
    evaluation: Any
    processor: Any
    collator: Any
    load_model: Callable[[], Any]
    compute_metrics: Callable[[Any], dict[str, float]] | None = None

    def batch(self, size: int) -> dict[str, torch.Tensor]:
        """The first `size` samples of the evaluation data, collated; repeated where there are fewer."""
        samples = [self.evaluation[i % len(self.evaluation)] for i in range(size)]
        return dict(self.collator(samples))


def prepare(recipe: Recipe, train: Any, evaluation: Any) -> Prepared:
    """Ready both splits for the recipe's task.

    Raises:
        RecipeError: a column is missing, or the model and the data don't fit.
        CheckpointError: the model can't be loaded.
    """
    assert recipe.model is not None and recipe.data is not None
    return _TASKS[recipe.model.task](recipe, train, evaluation)


def metrics_of(evaluated: Mapping[str, float]) -> dict[str, float]:
    """Of what `Trainer.evaluate` says: accuracy where there is one, else loss and perplexity."""
    if "eval_accuracy" in evaluated:
        return {"accuracy": float(evaluated["eval_accuracy"]), "loss": float(evaluated["eval_loss"])}
    loss = float(evaluated["eval_loss"])
    return {"perplexity": math.exp(min(loss, 700.0)), "loss": loss}


def model_class(task: str) -> Any:
    """The Auto class of a task."""
    import transformers

    return getattr(transformers, _AUTO_CLASSES[task])


def _text_classification(recipe: Recipe, train: Any, evaluation: Any) -> Prepared:
    from transformers import AutoTokenizer, DataCollatorWithPadding

    data = recipe.data
    assert data is not None
    tokenizer = _pretrained(AutoTokenizer, recipe)
    labels = Labels(train, evaluation, data.label_column)
    _require_column(train, data.text_column, "text_column")

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(batch[data.text_column], truncation=True, max_length=data.max_length)
        return {**encoded, "labels": labels.numbers(batch[data.label_column])}

    train, evaluation = _mapped(encode, train, evaluation)
    return Prepared(
        train,
        evaluation,
        tokenizer,
        DataCollatorWithPadding(tokenizer),
        lambda: _pretrained(model_class("text-classification"), recipe, **labels.config()),
        accuracy,
    )


def _text_generation(recipe: Recipe, train: Any, evaluation: Any) -> Prepared:
    from transformers import AutoTokenizer, default_data_collator

    data = recipe.data
    assert data is not None
    tokenizer = _pretrained(AutoTokenizer, recipe)
    _require_column(train, data.text_column, "text_column")

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        # texts one after the other, in blocks of equal length; the rest of a batch of texts is dropped
        ids = [token for text in tokenizer(batch[data.text_column])["input_ids"] for token in text]
        blocks = [ids[i : i + data.max_length] for i in range(0, len(ids) - data.max_length + 1, data.max_length)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    train, evaluation = _mapped(encode, train, evaluation)
    for name, split in (("training", train), ("evaluation", evaluation)):
        if not len(split):
            raise RecipeError(f"the {name} data give no block of {data.max_length} tokens; lower data.max_length")
    return Prepared(
        train,
        evaluation,
        tokenizer,
        default_data_collator,
        lambda: _pretrained(model_class("text-generation"), recipe),
    )


def _image_classification(recipe: Recipe, train: Any, evaluation: Any) -> Prepared:
    from transformers import AutoImageProcessor, default_data_collator

    data = recipe.data
    assert data is not None
    processor = _pretrained(AutoImageProcessor, recipe)
    labels = Labels(train, evaluation, data.label_column)
    _require_column(train, data.image_column, "image_column")

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[data.image_column]]
        return {**processor(images), "labels": labels.numbers(batch[data.label_column])}

    train, evaluation = _mapped(encode, train, evaluation)
    return Prepared(
        train,
        evaluation,
        processor,
        default_data_collator,
        lambda: _pretrained(model_class("image-classification"), recipe, **labels.config()),
        accuracy,
    )


_TASKS: dict[str, Callable[[Recipe, Any, Any], Prepared]] = {
    "text-classification": _text_classification,
    "text-generation": _text_generation,
    "image-classification": _image_classification,
}
_AUTO_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
}


class Labels:
    """The classes of a data set, whether it names them (ClassLabel) or holds strings or numbers."""

    def __init__(self, train: Any, evaluation: Any, column: str):
        _require_column(train, column, "label_column")
        names = getattr(train.features[column], "names", None)
        self._is_numbered = names is not None
        found = names or sorted({*train.unique(column), *evaluation.unique(column)}, key=str)
        self.names = [str(name) for name in found]
        self._number_of = {name: number for number, name in enumerate(found)}

    def numbers(self, values: list[Any]) -> list[int]:
        return list(values) if self._is_numbered else [self._number_of[value] for value in values]

    def config(self) -> dict[str, Any]:
        """What a classifier's config says of its classes."""
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: number for number, name in enumerate(self.names)},
        }


def _pretrained(auto: Any, recipe: Recipe, **options: Any) -> Any:
    """`auto.from_pretrained` of the recipe's model, with a user's mistakes told in one line."""
    section = recipe.model
    assert section is not None
    path = resolve(section.name_or_path, "model.name_or_path")
    if "num_labels" in options or auto.__name__ == "AutoModelForCausalLM":
        options["dtype"] = getattr(torch, section.dtype or "float32")
    try:
        return auto.from_pretrained(path, revision=section.revision or "main", **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"model.name_or_path: {auto.__name__} can't load {section.name_or_path!r}: {reason[:400]}"
        ) from error


def _mapped(encode: Any, *splits: Any) -> list[Any]:
    return [split.map(encode, batched=True, remove_columns=split.column_names) for split in splits]


def _require_column(split: Any, column: str, key: str) -> None:
    if column not in split.column_names:
        raise RecipeError(f"data.{key}: the data have no column {column!r}; they have {', '.join(split.column_names)}")


def accuracy(prediction: Any) -> dict[str, float]:
    """`compute_metrics` of a classifier."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids).mean())}
