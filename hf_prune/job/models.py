"""A recipe's model: its config, its shapes without memory, its weights. Each mistake is told in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig

from hf_prune.checkpoint.saving import check_weights
from hf_prune.errors import CheckpointError, RecipeError
from hf_prune.job.sources import one_line, resolve
from hf_prune.recipe import Recipe
from hf_prune.recipe.schema import ModelSection


KEY = "model.name_or_path"
_AUTO_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
}
# what libraries below raise where files are missing, damaged or of something else
_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    SafetensorError,
    StrictDataclassError,
)


def model_class(task: str) -> Any:
    """The Auto class of a task."""
    import transformers

    return getattr(transformers, _AUTO_CLASSES[task])


def read_config(name_or_path: str, revision: str | None = None, key: str = KEY) -> Any:
    """The config of a model.

    Raises:
        RecipeError: a path was meant, and isn't there.
        CheckpointError: it can't be read.
    """
    path = Path(resolve(name_or_path, key))
    if path.is_dir() and not (path / "config.json").exists():
        raise CheckpointError(
            f"{key}: {name_or_path} has no config.json; expected a folder that save_pretrained wrote"
        )
    try:
        return AutoConfig.from_pretrained(str(path), revision=revision or "main")
    except _ERRORS as error:
        what = "" if path.exists() else ", and there is no such folder"
        raise CheckpointError(f"{key}: no config of {name_or_path!r} can be read{what}: {one_line(error)}") from error


def meta_model(name_or_path: str, task: str | None = None, revision: str | None = None, key: str = KEY) -> nn.Module:
    """The model that a config describes, on the meta device: shapes, no memory.

    Args:
        name_or_path: a Hub id, a directory, or `package:NAME/PATH`.
        task: of a recipe; None takes the class that the config names.
        revision: on the Hub.
        key: of the recipe, for messages.

    Raises:
        CheckpointError: the config can't be read, or builds no model.
    """
    import transformers

    config = read_config(name_or_path, revision, key)
    named = (getattr(config, "architectures", None) or [""])[0]
    if task is None and hasattr(transformers, named):
        build = getattr(transformers, named)
    else:
        auto = transformers.AutoModel if task is None else model_class(task)
        check_task(config, auto, task, name_or_path, key)
        build = auto.from_config
    try:
        with torch.device("meta"):
            return build(config).eval()
    except _ERRORS as error:
        raise CheckpointError(f"{key}: the config of {name_or_path} builds no model: {one_line(error)}") from error


def check_task(config: Any, auto: Any, task: str | None, name_or_path: str, key: str = KEY) -> None:
    """Refuse a model that is none of the task.

    Raises:
        CheckpointError: Transformers has no class for it, or it is a masked language model, which can't generate.
    """
    named = (getattr(config, "architectures", None) or ["a model without a class"])[0]
    if type(config) not in auto._model_mapping:
        fitting = [other for other in _AUTO_CLASSES if type(config) in model_class(other)._model_mapping]
        why = f"no model for {task}; tasks that fit it: {', '.join(fitting) or 'none'}" if task else "not one model"
        raise CheckpointError(f"{key}: {name_or_path} is {named} ({config.model_type}), which is {why}")
    if task == "text-generation" and named.endswith("ForMaskedLM"):
        raise CheckpointError(
            f"{key}: {name_or_path} is {named}, which reads both ways and can't generate text; give a causal language "
            "model, or another model.task"
        )


def check_files(section: ModelSection) -> None:
    """Look at a local model's files, their headers only, before anything long begins.

    Raises:
        CheckpointError: there are no weights, or they are damaged or cut short.
    """
    path = Path(resolve(section.name_or_path, KEY))
    if not path.is_dir():
        return
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise CheckpointError(
            f"{KEY}: {section.name_or_path} has no weights; expected model.safetensors, or its shards and their index, "
            "beside config.json"
        )
    check_weights(path)


def load_model(recipe: Recipe, **config: Any) -> Any:
    """The recipe's model in the recipe's dtype (float32 if it says none), with `config` changed.

    Raises:
        CheckpointError: it can't be loaded, lacks weights, or holds numbers that are not finite.
        RecipeError: its head is new and nothing would train it.
    """
    section = recipe.model
    assert section is not None
    auto = model_class(section.task)
    dtype = getattr(torch, section.dtype or "float32")
    model, found = _pretrained(auto, section, dtype=dtype, output_loading_info=True, **config)
    missing, parameters = sorted(found["missing_keys"]), dict(model.named_parameters())
    if len(missing) > len(parameters) / 2 or (missing and section.task == "text-generation"):
        raise CheckpointError(
            f"{KEY}: {section.name_or_path} has no weights for {missing[0]!r} and {len(missing) - 1} more of "
            f"{type(model).__name__}; it is no checkpoint of such a model"
        )
    if missing and recipe.training is None:
        raise RecipeError(
            f"{KEY}: {section.name_or_path} has no weights for {missing[0]!r}, which would stay random: add a section "
            "'training', or give a model that is trained for the task"
        )
    for name, parameter in parameters.items():
        if not parameter.isfinite().all():
            raise CheckpointError(
                f"{KEY}: the weights of {section.name_or_path} are not finite, first in {name!r} (NaN or infinity); "
                "download or save the model again, or load it with model.dtype: bfloat16 if it overflows in float16"
            )
    return model


def load_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer beside the recipe's model.

    Raises:
        CheckpointError: there is none; Transformers then makes one that knows no words.
    """
    from transformers import AutoTokenizer

    section = recipe.model
    assert section is not None
    tokenizer = _pretrained(AutoTokenizer, section)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise CheckpointError(
            f"{KEY}: {section.name_or_path} has no tokenizer (one without words is what came); save the model's tokenizer "
            "beside it: tokenizer.save_pretrained(…)"
        )
    return tokenizer


def load_image_processor(recipe: Recipe) -> Any:
    """The image processor beside the recipe's model.

    Raises:
        CheckpointError: it can't be loaded.
    """
    # not from the top: older Transformers hide it there without torchvision, which it doesn't need
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    assert recipe.model is not None
    return _pretrained(AutoImageProcessor, recipe.model)


def _pretrained(auto: Any, section: ModelSection, **options: Any) -> Any:
    path = resolve(section.name_or_path, KEY)
    try:
        return auto.from_pretrained(path, revision=section.revision or "main", **options)
    except _ERRORS as error:
        reason = one_line(error)
        if "ignore_mismatched_sizes" in reason:
            reason = "the weights have other shapes than the config says"
        raise CheckpointError(f"{KEY}: {auto.__name__} can't load {section.name_or_path!r}: {reason}") from error
