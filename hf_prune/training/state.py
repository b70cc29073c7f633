"""A pruner's state beside a checkpoint: masks as safetensors, the rest as JSON, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_prune.errors import CheckpointError
from hf_prune.plan import read_files, write_files
from hf_prune.recipe import Recipe


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


def require_same_recipe(theirs: Mapping[str, Any], mine: Recipe) -> None:
    """Refuse a checkpoint of another recipe.

    Raises:
        CheckpointError: showing what differs.
    """
    if theirs != mine.to_dict():
        raise CheckpointError(
            "the checkpoint was made with another recipe:\n"
            + "\n".join(f"  {line}" for line in _differences(theirs, mine.to_dict()))
            + "\nResume with the checkpoint's recipe, or start anew in another output directory."
        )


def _differences(theirs: Any, mine: Any, path: str = "") -> list[str]:
    """One line for each value that differs."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        keys = dict.fromkeys([*theirs, *mine])
        nested = [_differences(theirs.get(key), mine.get(key), f"{path}.{key}" if path else str(key)) for key in keys]
        return [line for lines in nested for line in lines]
    if isinstance(theirs, list) and isinstance(mine, list) and len(theirs) == len(mine):
        return [
            line
            for n, (a, b) in enumerate(zip(theirs, mine, strict=True))
            for line in _differences(a, b, f"{path}.{n}")
        ]
    return [] if theirs == mine else [f"{path}: the checkpoint has {theirs!r}, this run {mine!r}"]
