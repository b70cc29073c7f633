"""Weights that have other names on disk than in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open


def load_renamed_(model: Any, directory: str | Path) -> bool:
    """Load a checkpoint into `model` if its weights have other names than the model's; do nothing if they are the same.

    Transformers 5 saves ViT and many others under their former names, which `from_pretrained` translates. Resuming and
    loading the best model don't: they keep the weights that are there, with a warning (transformers issue 43701).

    Args:
        model: a Transformers model, unwrapped.
        directory: what `save_pretrained` wrote for the same class.

    Returns:
        Whether there was something to load.
    """
    names: set[str] = set()
    for file in Path(directory).glob("model*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    if names <= model.state_dict().keys():
        return False
    saved = type(model).from_pretrained(directory, dtype=next(model.parameters()).dtype)
    model.load_state_dict(saved.state_dict())
    return True
