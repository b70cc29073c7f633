"""What is exported: a pruned checkpoint, and the dense model that its report names."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from hf_prune.errors import CheckpointError


logger = logging.getLogger(__name__)


def read_config(directory_or_repo: str) -> Any:
    """The config of a checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory_or_repo)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory_or_repo!r} holds no model: {error}. Give the directory of a pruned model, or its id on the Hub"
        ) from error


def load(directory_or_repo: str) -> Any:
    """The model in float32, with the head that it was saved with, computing as graphs can hold it.

    Raises:
        CheckpointError: there is none, or its class isn't one of Transformers.
    """
    import transformers

    config = read_config(directory_or_repo)
    name = next(iter(config.architectures or ()), None)
    found: Any = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(f"{directory_or_repo!r} is a {name}, which Transformers doesn't have")
    model_class: Any = found
    return model_class.from_pretrained(directory_or_repo, dtype=torch.float32).eval()


def dense_of(directory_or_repo: str, model: Any, named: str | None) -> Any | None:
    """The model before pruning, of the same class: `named`, or what the report beside the weights names, if it is there."""
    where = named
    if where is None:
        report = Path(directory_or_repo) / "pruning_report.json"
        if report.is_file():
            where = (json.loads(report.read_text(encoding="utf-8")).get("model") or {}).get("name_or_path")
    if not where:
        return None
    try:
        return type(model).from_pretrained(where, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        if named:
            raise CheckpointError(f"--dense {named}: {error}") from error
        logger.warning("the dense model %s can't be read here, and isn't timed: say where it is with --dense", where)
        return None
