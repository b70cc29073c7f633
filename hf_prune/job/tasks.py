"""What differs between the tasks of `hf-prune run`: preparation of samples, metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hf_prune.errors import RecipeError
from hf_prune.job.labels import Labels
from hf_prune.job.models import load_image_processor, load_model, load_tokenizer, read_config
from hf_prune.job.sources import one_line, require_column
from hf_prune.recipe import Recipe


MOST_DOMAINS = 100  # each is evaluated by itself


@dataclass
class Prepared:
    """A task on its data: everything that a Trainer needs but the model."""

    train: Any
    evaluation: Any
    processor: Any
    collator: Any
    load_model: Callable[[], Any]
    compute_metrics: Accuracy | None = None
    domains: Mapping[str, Any] = field(default_factory=dict)  # the evaluation data again, by domain

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


def by_part(task: Prepared, trainer: Any) -> dict[str, Any]:
    """By class or domain, of a trainer that has just evaluated: `of`, `metric`, and how many and what value of each."""
    if task.compute_metrics is not None:
        return {"of": "class", "metric": "accuracy", **task.compute_metrics.by_class}
    measured = {name: metrics_of(trainer.evaluate(data))["perplexity"] for name, data in task.domains.items()}
    n_samples = {name: len(data) for name, data in task.domains.items()}
    return {"of": "domain", "metric": "perplexity", "n_samples": n_samples, "values": measured}


def metrics_of(evaluated: Mapping[str, float]) -> dict[str, float]:
    """Of what `Trainer.evaluate` says: accuracy where there is one, else loss and perplexity."""
    if "eval_accuracy" in evaluated:
        return {"accuracy": float(evaluated["eval_accuracy"]), "loss": float(evaluated["eval_loss"])}
    loss = float(evaluated["eval_loss"])
    return {"perplexity": math.exp(min(loss, 700.0)), "loss": loss}


def _text_classification(recipe: Recipe, train: Any, evaluation: Any) -> Prepared:
    from transformers import DataCollatorWithPadding

    data = recipe.data
    assert data is not None
    config, tokenizer = _config(recipe), load_tokenizer(recipe)
    _require_length(recipe, tokenizer, config)
    labels = Labels(train, evaluation, data.label_column, config)
    _require_text(data.text_column, train, evaluation)

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(batch[data.text_column], truncation=True, max_length=data.max_length)
        _require_known(encoded["input_ids"], config, tokenizer)
        return {**encoded, "labels": labels.numbers(batch[data.label_column])}

    train, evaluation = _mapped(encode, train, evaluation)
    return Prepared(
        train,
        evaluation,
        tokenizer,
        DataCollatorWithPadding(tokenizer),
        lambda: load_model(recipe, **labels.config()),
        Accuracy(labels.names),
    )


def _text_generation(recipe: Recipe, train: Any, evaluation: Any) -> Prepared:
    from transformers import default_data_collator

    data = recipe.data
    assert data is not None
    config, tokenizer = _config(recipe), load_tokenizer(recipe)
    _require_length(recipe, tokenizer, config)
    _require_text(data.text_column, train, evaluation)

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        # texts one after the other, in blocks of equal length; the rest of a batch of texts is dropped
        ids = [token for text in tokenizer(batch[data.text_column])["input_ids"] for token in text]
        blocks = [ids[i : i + data.max_length] for i in range(0, len(ids) - data.max_length + 1, data.max_length)]
        _require_known(blocks, config, tokenizer)
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    domains = _domains(evaluation, data.label_column)
    train, evaluation, *each = _mapped(encode, train, evaluation, *domains.values())
    for name, split in (("training", train), ("evaluation", evaluation)):
        if not len(split):
            raise RecipeError(
                f"data.max_length: the {name} data are shorter than one block of {data.max_length} tokens; lower it, or "
                "give more text"
            )
    return Prepared(
        train,
        evaluation,
        tokenizer,
        default_data_collator,
        lambda: load_model(recipe),
        domains={name: blocks for name, blocks in zip(domains, each, strict=True) if len(blocks)},
    )


def _image_classification(recipe: Recipe, train: Any, evaluation: Any) -> Prepared:
    from transformers import default_data_collator

    data = recipe.data
    assert data is not None
    config, processor = _config(recipe), load_image_processor(recipe)
    labels = Labels(train, evaluation, data.label_column, config)
    for split in (train, evaluation):
        require_column(split, data.image_column, "image_column")
        if type(split.features[data.image_column]).__name__ != "Image":
            raise RecipeError(
                f"data.image_column: {data.image_column!r} holds {split.features[data.image_column]}; expected images"
            )

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[data.image_column]]
        return {**processor(images), "labels": labels.numbers(batch[data.label_column])}

    train, evaluation = _mapped(encode, train, evaluation)
    return Prepared(
        train,
        evaluation,
        processor,
        default_data_collator,
        lambda: load_model(recipe, **labels.config()),
        Accuracy(labels.names),
    )


_TASKS: dict[str, Callable[[Recipe, Any, Any], Prepared]] = {
    "text-classification": _text_classification,
    "text-generation": _text_generation,
    "image-classification": _image_classification,
}


def _config(recipe: Recipe) -> Any:
    assert recipe.model is not None
    return read_config(recipe.model.name_or_path, recipe.model.revision)


def _mapped(encode: Any, *splits: Any) -> list[Any]:
    try:
        return [split.map(encode, batched=True, remove_columns=split.column_names) for split in splits]
    except OSError as error:  # also of pictures that are none
        raise RecipeError(f"data.name_or_path: a sample can't be read: {one_line(error)}") from error


def _require_text(column: str, *splits: Any) -> None:
    for split in splits:
        require_column(split, column, "text_column")
        dtype = getattr(split.features[column], "dtype", None)
        if dtype not in ("string", "large_string"):
            raise RecipeError(f"data.text_column: {column!r} holds {dtype or split.features[column]}; expected text")
        missing = sum(text is None for text in split[column][:])
        if missing:
            raise RecipeError(f"data.text_column: {missing} of {len(split)} samples have no {column!r}; drop them")


def _require_length(recipe: Recipe, tokenizer: Any, config: Any) -> None:
    assert recipe.data is not None
    limits = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
    most = min(limit for limit in (*limits, math.inf) if isinstance(limit, (int, float)) and limit > 0)
    if recipe.data.max_length > most:
        raise RecipeError(
            f"data.max_length: {recipe.data.max_length} tokens are more than the model's {most} positions; lower it"
        )


def _require_known(blocks: list[list[int]], config: Any, tokenizer: Any) -> None:
    largest = max((max(ids) for ids in blocks if ids), default=0)
    if largest >= config.vocab_size:
        raise RecipeError(
            f"model.name_or_path: the tokenizer gives the token {tokenizer.convert_ids_to_tokens(largest)!r} the number "
            f"{largest}, but the model knows {config.vocab_size} tokens: they don't belong together"
        )


def _domains(evaluation: Any, column: str) -> dict[str, Any]:
    """Texts by what a column says of them; none where it isn't there, or says something else of nearly each."""
    values = evaluation[column][:] if column in evaluation.column_names else []
    if not all(isinstance(value, (str, int)) for value in values):
        return {}
    rows: dict[str | int, list[int]] = {}
    for number, value in enumerate(values):
        rows.setdefault(value, []).append(number)
    if not 2 <= len(rows) <= MOST_DOMAINS:
        return {}
    names = getattr(evaluation.features[column], "names", None)
    return {str(names[value] if names else value): evaluation.select(rows[value]) for value in sorted(rows)}


class Accuracy:
    """`compute_metrics` of a classifier; `by_class` is that of the last evaluation.

    Args:
        names: of the classes, by number.
    """

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.by_class: dict[str, dict[str, Any]] = {"n_samples": {}, "values": {}}

    def __call__(self, prediction: Any) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        right, labels = np.argmax(logits, axis=-1) == prediction.label_ids, prediction.label_ids
        of_class = {name: labels == number for number, name in enumerate(self.names) if (labels == number).any()}
        self.by_class = {
            "n_samples": {name: int(rows.sum()) for name, rows in of_class.items()},
            "values": {name: float(right[rows].mean()) for name, rows in of_class.items()},
        }
        return {"accuracy": float(right.mean())}
