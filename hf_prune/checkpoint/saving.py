"""Saving without a moment in which neither the old checkpoint nor the new one is whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_prune.checkpoint.format import MODELLING_MODULE, refresh_auto_map_
from hf_prune.errors import CheckpointError
from hf_prune.files import replace_file


ARTIFACTS = "_hf_prune_artifacts"
MARKER = ".hf_prune_complete"
MODELLING_FILE = f"{MODELLING_MODULE}.py"
# `model.safetensors`, its shards and index, in each case with or without a variant's name
WEIGHTS = re.compile(r"(model(?:\.\w+)??)(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index(\.\w+)?\.json)?")


def is_pruned(model: Any) -> bool:
    """Whether the model carries pruning to save: a manifest in its config, or a recipe and report."""
    return ARTIFACTS in model.__dict__ or getattr(model.config, "hf_prune", None) is not None


def save_staged(save: Callable[..., Any], model: Any, directory: Path, options: Mapping[str, Any]) -> Any:
    """Write the checkpoint into a folder beside `directory`, then move it in: weights, index, the rest, config last.

    Until the move starts the old checkpoint is untouched; the completeness marker is taken off first and put back
    last, so that a checkpoint cut off in between can be told.

    Args:
        save: the stock `model.save_pretrained`.
        model: what is saved; its texts under `ARTIFACTS` go beside the weights.
        directory: the target; made if it isn't there. What else it holds stays.
        options: the arguments of `save` after the directory, by name.

    Raises:
        CheckpointError: `directory` is a file, or writing failed (a full disk); the old checkpoint is as it was.
    """
    if not options.get("safe_serialization", True):
        raise CheckpointError("pruned checkpoints are saved as safetensors only; drop safe_serialization=False")
    directory = directory.absolute()
    if directory.is_file():
        raise CheckpointError(f"{directory} is a file; give a directory")
    if getattr(model.config, "hf_prune", None) is not None:
        refresh_auto_map_(model)
    if not _writes(model, options.get("is_main_process", True)):
        # called all the same: gathering a sharded model takes every process
        with tempfile.TemporaryDirectory(prefix="hf_prune-") as scratch:
            return save(scratch, **options)
    staging = None
    try:
        staging = _staging(directory)
        result = save(staging, **options)
        add_side_files(model, staging)
        (staging / MARKER).write_text(_marker({path.name: path.stat().st_size for path in staging.iterdir()}))
        for path in staging.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _move_in(staging, directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"saving to {directory} failed: {error}. Free some space or choose another directory, and save again."
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return result


def add_side_files(model: Any, directory: Path) -> None:
    """Write recipe, report and card, and, where the config carries a manifest, the modelling file."""
    for name, text in (model.__dict__.get(ARTIFACTS) or {}).items():
        (directory / name).write_text(text, encoding="utf-8")
    if getattr(model.config, "hf_prune", None) is not None:
        shutil.copyfile(Path(__file__).with_name(MODELLING_FILE), directory / MODELLING_FILE)


def update_side_files(model: Any, directory: str | Path) -> None:
    """Replace recipe, report and card in a complete checkpoint, each at once; the weights stay where they are.

    Raises:
        CheckpointError: writing failed, or there is no complete checkpoint.
    """
    directory = Path(directory)
    if not is_complete(directory):
        raise CheckpointError(f"{directory} holds no complete checkpoint; save the model there first")
    files = json.loads((directory / MARKER).read_text(encoding="utf-8"))["files"]
    texts = model.__dict__[ARTIFACTS]
    files |= {name: len(text.encode()) for name, text in texts.items()}
    try:
        for name, text in {**texts, MARKER: _marker(files)}.items():
            replace_file(directory / name, text)
    except OSError as error:
        raise CheckpointError(f"writing to {directory} failed: {error}. Free some space, and save again.") from error


def _marker(sizes: Mapping[str, int]) -> str:
    files = {name: size for name, size in sizes.items() if name != "README.md"}  # people edit cards
    return json.dumps({"version": 1, "files": files}, indent=2, sort_keys=True)


def is_complete(directory: str | Path) -> bool:
    """Whether the last save into `directory` went through: every file that its marker lists is there, as long as said."""
    directory = Path(directory)
    try:
        files = json.loads((directory / MARKER).read_text(encoding="utf-8"))["files"]
        return all(name == Path(name).name and (directory / name).stat().st_size == files[name] for name in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_weights(directory: Path) -> None:
    """Compare the length of every weight file with its header, and the shards with their index. Reads headers only.

    Raises:
        CheckpointError: a file is missing, cut short or no safetensors file; the message names it.
    """
    files = {path.name for path in directory.iterdir() if WEIGHTS.fullmatch(path.name)}
    for index in sorted(name for name in files if name.endswith(".json")):
        try:
            shards = set(json.loads((directory / index).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{directory / index} is damaged. Save or download the model again.") from error
        if missing := sorted(shards - files, key=str):
            raise CheckpointError(f"{directory} lacks {missing[0]!r}, which {index} lists. Save or download it again.")
    for name in sorted(name for name in files if name.endswith(".safetensors")):
        try:
            with safe_open(directory / name, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{directory / name} is damaged or cut short ({error}). Save or download the model again."
            ) from error


def _writes(model: Any, is_main_process: bool) -> bool:
    """Whether this process writes files: asked of Transformers, where it knows (later releases do)."""
    asked = getattr(model, "should_save_on_this_rank", None)
    return asked(is_main_process) if asked else is_main_process


def _staging(directory: Path) -> Path:
    """A new folder on the file system of `directory`: beside it, or inside where beside can't be."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    inside = os.path.ismount(directory) or not os.access(directory.parent, os.W_OK)
    parent = directory if inside else directory.parent
    return Path(tempfile.mkdtemp(prefix=f".{directory.name}-", suffix=".partial", dir=parent))


def _move_in(staging: Path, directory: Path) -> None:
    """Rename every staged file into place, in the order in which a reader may come to depend on it."""
    directory.mkdir(exist_ok=True)
    staged = sorted((path.name for path in staging.iterdir()), key=_order)
    (directory / MARKER).unlink(missing_ok=True)
    shadowing = list(_shadowing(directory, staged))
    for name in staged:
        if name == "config.json":
            for stale in shadowing:
                stale.unlink(missing_ok=True)
        os.replace(staging / name, directory / name)


def _shadowing(directory: Path, staged: Sequence[str]) -> Iterator[Path]:
    """Files of an earlier checkpoint that would be loaded in place of the new ones, or do no longer belong to it."""
    variants = {_variant(name) for name in staged} - {None}
    for path in directory.iterdir():
        is_stale = _variant(path.name) in variants or path.name == MODELLING_FILE
        if is_stale and path.name not in staged:
            yield path


def _variant(name: str) -> str | None:
    """Of `model.fp16-00001-of-00002.safetensors` or `model.safetensors.index.fp16.json`: `model.fp16`."""
    found = WEIGHTS.fullmatch(name)
    return found[1] + (found[2] or "") if found else None


def _order(name: str) -> tuple[int, str]:
    if name.endswith(".safetensors"):
        return 0, name
    if ".safetensors.index" in name:
        return 1, name
    return {"config.json": 3, MARKER: 4}.get(name, 2), name
