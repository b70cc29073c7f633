"""Saving without a moment in which neither the old checkpoint nor the new one is whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_prune.errors import CheckpointError


ARTIFACTS = "_hf_prune_artifacts"
MARKER = "hf_prune_complete.json"
MODELLING_FILE = "modeling_hf_prune.py"


def save_staged(
    save: Callable[..., Any], model: Any, directory: Path, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Write the checkpoint into a folder beside `directory`, then move it in: weights, index, the rest, config last.

    Until the move starts the old checkpoint is untouched; the completeness marker is taken off first and put back
    last, so that a checkpoint cut off in between can be told.

    Raises:
        CheckpointError: `directory` is a file, or writing failed (a full disk); the old checkpoint is as it was.
    """
    if kwargs.get("safe_serialization") is False:
        raise CheckpointError("pruned checkpoints are saved as safetensors only; drop safe_serialization=False")
    if directory.is_file():
        raise CheckpointError(f"{directory} is a file; give a directory")
    is_main = kwargs.get("is_main_process", args[0] if args else True)
    if not is_main:
        return save(directory, *args, **kwargs)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", suffix=".partial", dir=directory.parent))
    try:
        result = save(staging, *args, **kwargs)
        for name, text in (model.__dict__.get(ARTIFACTS) or {}).items():
            (staging / name).write_text(text, encoding="utf-8")
        if getattr(model.config, "hf_prune", None) is not None:
            shutil.copyfile(Path(__file__).with_name(MODELLING_FILE), staging / MODELLING_FILE)
        sizes = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
        (staging / MARKER).write_text(json.dumps({"version": 1, "files": sizes}, indent=2), encoding="utf-8")
        _move_in(staging, directory)
    except OSError as error:
        raise CheckpointError(
            f"saving to {directory} failed: {error}. Free some space or choose another directory, and save again."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return result


def is_complete(directory: Path) -> bool:
    """Whether every file that the marker lists is there with its size."""
    try:
        files = json.loads((directory / MARKER).read_text(encoding="utf-8"))["files"]
        return all((directory / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _move_in(staging: Path, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    files = sorted((path.name for path in staging.iterdir()), key=_order)
    (directory / MARKER).unlink(missing_ok=True)
    for name in files:
        with open(staging / name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(staging / name, directory / name)
    stale = [path for path in directory.glob("model*.safetensors*") if path.name not in files]
    for path in stale:  # shards and index of a larger checkpoint that was here before
        path.unlink()
    if MODELLING_FILE not in files:
        (directory / MODELLING_FILE).unlink(missing_ok=True)


def _order(name: str) -> tuple[int, str]:
    if name.endswith(".safetensors"):
        return 0, name
    if name.endswith(".index.json"):
        return 1, name
    return {"config.json": 3, MARKER: 4}.get(name, 2), name
