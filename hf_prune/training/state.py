"""A pruner's state beside a checkpoint: masks as safetensors, the rest as JSON, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_prune.errors import CheckpointError
from hf_prune.plan import read_files, write_files


TENSORS, PLAIN, VERSION = "pruning_state.safetensors", "pruning_state.json", 1


def save_state(state: Mapping[str, Any], directory: Path) -> None:
    """Write `Pruner.state_dict()`; the JSON file last, so that where it is the masks are too."""
    plain = {name: value for name, value in state.items() if name != "tensors"}
    write_files(directory, PLAIN, {"version": VERSION, **plain}, {TENSORS: state["tensors"]})


def load_state(directory: Path) -> dict[str, Any]:
    """What `save_state` wrote.

    Raises:
        CheckpointError: it isn't there, is damaged, or newer than this package reads.
    """
    if not (directory / PLAIN).is_file():
        raise CheckpointError(
            f"{directory} has no {PLAIN}: it was saved without pruning, or not completely. "
            "Resume from another checkpoint, or train without a recipe."
        )
    plain, tensors = read_files(directory, PLAIN, VERSION, (TENSORS,))
    return {**plain, "tensors": tensors.get(TENSORS, {})}
