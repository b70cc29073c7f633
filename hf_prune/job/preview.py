"""What a recipe would do: sizes and verdict without weights, or the whole job on a tiny model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, default_data_collator

from hf_prune.checkpoint import allowed_sizes
from hf_prune.errors import CheckpointError, RecipeError
from hf_prune.job.fit import check_fit, totals
from hf_prune.job.models import meta_model, model_class, read_config
from hf_prune.job.progress import Stages
from hf_prune.job.run import compare
from hf_prune.job.tasks import Accuracy, Prepared
from hf_prune.pipeline import apply_, finish_
from hf_prune.recipe import Recipe
from hf_prune.recipe.fields import MacBudget
from hf_prune.report import PruningReport
from hf_prune.structure import inspect_model


# of a smoke test's model, where no config can be read
_DEFAULT_MODELS = {"text-classification": "bert", "text-generation": "llama", "image-classification": "vit"}
_D_HEAD, _N_CLASSES, _N_SAMPLES, _LENGTH, _N_STEPS = 8, 3, 48, 16, 12


def plan_only(recipe: Recipe) -> PruningReport:
    """What the model's config alone tells: sizes, parameters, MACs, how the checkpoint will load. Reads no weight.

    Scores are random numbers, so *which* units leave is made up, and under `scope: global` how many leave each site;
    how many leave in all is not. Thresholds depend on scores, and are left out.

    Raises:
        RecipeError: the recipe can't be met on this model.
        CheckpointError: the model's config can't be read.
    """
    if recipe.model is None:
        raise RecipeError("--plan-only needs the recipe's section 'model'")
    model = meta_model(recipe.model.name_or_path, recipe.model.task, recipe.model.revision)
    dense = totals(model)
    plan = check_fit(recipe, model, dense)
    notes = []
    for number, step in enumerate(recipe.prune):
        if step.target == "weights":
            notes.append(f"prune.{number}: single weights become zero; no size changes")
        elif step.threshold is not None:
            notes.append(f"prune.{number}: what a threshold removes depends on the weights or data; left out here")
        elif isinstance(step.sparsity, MacBudget) and dense.macs is None:
            notes.append(f"prune.{number}: this model's MACs can't be counted without its weights; left out here")
        elif step.scope == "global" and step.remove is None:
            notes.append(f"prune.{number}: under scope global the sizes of single sites follow the scores; made up")
        if step.target in ("ffn_neurons", "attention_heads"):
            sites = inspect_model(model).of(step.target)
            sizes = allowed_sizes(model, sites) if sites else []
            if sizes:
                said = f"{_ranges(sizes[:-1])} of {sizes[-1]}" if len(sizes) > 1 else f"no fewer than {sizes[-1]}"
                notes.append(f"prune.{number}: equal sites of {said} {step.target} load without hf_prune")
    if plan is not None:
        apply_(model, plan)
    report = finish_(model, recipe, plan=plan, verify=False, dense=dense)
    report.content["notes"] = [note for note in report.content["notes"] if not note.startswith("not verified")] + notes
    report.content["model"]["name_or_path"] = recipe.model.name_or_path
    return report


def smoke(recipe: Recipe, stages: Stages) -> PruningReport:
    """The recipe's own steps and schedule on a tiny random model and made-up data, saved and loaded in a scratch folder.

    The model has the layers and heads of the recipe's, where its config can be read, and narrow widths.

    Raises:
        PruneError: what the real run would stumble on too.
    """
    task = recipe.model.task if recipe.model else "text-classification"
    with tempfile.TemporaryDirectory(prefix="hf_prune-smoke-") as scratch:
        prepared = _made_up(recipe, task)
        batch_size = min(recipe.calibration.batch_size, 8)
        n_written = min(recipe.calibration.self_generated, 8)
        small: dict[str, Any] = {
            "model": {"name_or_path": scratch, "task": task},
            "data": {"name_or_path": scratch},
            "output": {"dir": scratch},
            "calibration": {"samples": 8, "length": _LENGTH, "batch_size": batch_size, "self_generated": n_written},
        }
        if smoke_trains(recipe):
            small["training"] = {"max_steps": _N_STEPS, "per_device_train_batch_size": 4}
        return compare(Recipe.from_dict(recipe.to_dict() | small), prepared, Path(scratch, "model"), stages)


def smoke_trains(recipe: Recipe) -> bool:
    """Whether `smoke` trains: the recipe does, or has no model either and so is for a trainer."""
    return recipe.training is not None or recipe.model is None


def _made_up(recipe: Recipe, task: str) -> Prepared:
    """Seeded random samples that the tiny model takes, and a processor that saves nothing."""
    config = _tiny_config(recipe, task)
    generator = torch.Generator().manual_seed(recipe.seed)
    samples = []
    for number in range(_N_SAMPLES):
        if task == "image-classification":
            shape = (getattr(config, "num_channels", 3), config.image_size, config.image_size)
            sample = {"pixel_values": torch.randn(shape, generator=generator)}
        else:
            ids = torch.randint(3, config.vocab_size, (_LENGTH,), generator=generator)
            sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        is_text_generation = task == "text-generation"
        sample["labels"] = sample["input_ids"].clone() if is_text_generation else torch.tensor(number % _N_CLASSES)
        samples.append(sample)
    metric = None if task == "text-generation" else Accuracy([str(number) for number in range(_N_CLASSES)])
    auto = model_class(task)
    return Prepared(
        samples, samples[:16], _NoProcessor(), default_data_collator, lambda: auto.from_config(config), metric
    )


class _NoProcessor:
    """Stands where a tokenizer would; made-up samples need none."""

    def save_pretrained(self, directory: Any) -> None: ...


def _tiny_config(recipe: Recipe, task: str) -> Any:
    """The recipe's config with narrow widths; that of a family with the same task where it can't be read."""
    config = None
    if recipe.model is not None:
        try:
            config = read_config(recipe.model.name_or_path, recipe.model.revision)
        except (CheckpointError, RecipeError):
            config = None
    if config is None:
        config = AutoConfig.for_model(_DEFAULT_MODELS[task], num_hidden_layers=4, num_attention_heads=4)
    n_heads = config.num_attention_heads
    for name, value in _tiny_fields(n_heads):
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    config.num_labels = _N_CLASSES
    return config


def _tiny_fields(n_heads: int) -> Iterator[tuple[str, Any]]:
    yield "hidden_size", n_heads * _D_HEAD
    yield "head_dim", _D_HEAD
    yield "intermediate_size", 4 * n_heads * _D_HEAD
    yield "vocab_size", 128
    yield "max_position_embeddings", 64
    yield "image_size", 32
    yield "patch_size", 16
    for name, token in (("pad", 0), ("bos", 1), ("eos", 2)):
        yield f"{name}_token_id", token


def _ranges(sizes: list[int]) -> str:
    """1, 2, 4 as "1, 2, 4"; a long run as "1 to 96"."""
    if sizes == list(range(sizes[0], sizes[-1] + 1)) and len(sizes) > 2:
        return f"{sizes[0]} to {sizes[-1]}"
    return ", ".join(map(str, sizes))
