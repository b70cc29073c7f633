"""A pruner's state beside a checkpoint: masks as safetensors, the rest as JSON, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_prune.errors import CheckpointError


TENSORS, PLAIN = "pruning_state.safetensors", "pruning_state.json"


def save_state(state: Mapping[str, Any], directory: Path) -> None:
    """Write beside, then rename; the JSON file last, so that where it is the masks are too."""
    beside = directory / f".{TENSORS}"
    save_file({name: keep.contiguous() for name, keep in state["tensors"].items()}, beside)
    os.replace(beside, directory / TENSORS)
    plain = {name: value for name, value in state.items() if name != "tensors"}
    beside = directory / f".{PLAIN}"
    beside.write_text(json.dumps({"version": 1, **plain}, indent=2), encoding="utf-8")
    os.replace(beside, directory / PLAIN)


def load_state(directory: Path) -> dict[str, Any]:
    """What `save_state` wrote.

    Raises:
        CheckpointError: it isn't there, is damaged, or newer than this package reads.
    """
    try:
        plain = json.loads((directory / PLAIN).read_text(encoding="utf-8"))
        if plain["version"] != 1:
            raise CheckpointError(
                f"{directory / PLAIN} has version {plain['version']}; this reads 1. Upgrade hf_prune."
            )
        return {**plain, "tensors": load_file(directory / TENSORS)}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} has no {Path(error.filename or PLAIN).name}: it was saved without pruning, or not completely. "
            "Resume from another checkpoint, or train without a recipe."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"the pruning state in {directory} is damaged: {error}. Use another checkpoint."
        ) from error
