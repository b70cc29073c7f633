"""The output directory: what may be there already, and writing that leaves all of it or none."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hf_prune.checkpoint.saving import MARKER
from hf_prune.errors import CheckpointError, PruneError
from hf_prune.job.measure import weight_bytes
from hf_prune.job.sources import one_line
from hf_prune.recipe import Recipe
from hf_prune.report import PruningReport


_TORCH_WRITER = ("PytorchStreamWriter", "inline_container")
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}
TRAINING = "training"  # the folder for checkpoints of training, inside the output directory


def check_output(directory: Path, *, resuming: bool = False) -> None:
    """Refuse a directory that holds something else than an earlier run of ours.

    Args:
        directory: of the output; it may not be there yet.
        resuming: checkpoints of training that lie there will be gone on with.

    Raises:
        PruneError: it does, or it is a file, or it can't be written.
    """
    if directory.exists() and not directory.is_dir():
        raise PruneError(f"output.dir: {directory} is a file; give a directory")
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryDirectory(prefix=".hf_prune-", dir=existing).cleanup()
    except OSError as error:
        raise PruneError(
            f"output.dir: {directory} can't be written ({existing}: {error.strerror}); choose another one"
        ) from error
    held = {path.name for path in directory.iterdir()} if directory.exists() else set()
    is_ours = held <= {TRAINING} or held & {MARKER, "pruning_report.json"}
    if not is_ours:
        raise PruneError(
            f"output.dir: {directory} holds something else ({', '.join(sorted(held)[:3])}); nothing was touched. "
            "Choose another directory (output.dir=…) or empty this one."
        )
    if not resuming and any((directory / TRAINING).glob("*/checkpoint-*")):
        raise PruneError(
            f"output.dir: {directory / TRAINING} holds checkpoints of an earlier training. Go on from them with "
            "training.resume_from_checkpoint=true, or remove them, or choose another output.dir."
        )


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Says of a failed write what to do about it.

    Raises:
        CheckpointError: the disk is full, or the like.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # PyTorch's writer has no class of its own
        of_torch = isinstance(error, RuntimeError) and any(name in str(error) for name in _TORCH_WRITER)
        of_disk = isinstance(error, OSError) and error.errno in _DISK
        if not (of_torch or of_disk or isinstance(error, SafetensorError)):
            raise
        raise CheckpointError(
            f"writing to {directory} failed: {one_line(error)}. Free some space. If training.save_strategy has written a "
            "checkpoint, training.resume_from_checkpoint=true goes on from it."
        ) from error


def save(models: Mapping[str, Any], processor: Any, report: PruningReport, recipe: Recipe, directory: Path) -> None:
    """The pruned model and its processor into `directory`, the bytes of both models' files into the report.

    What may fail for want of space comes first, into folders beside; what is in `directory` is replaced at the end.

    Raises:
        CheckpointError: writing failed; what was in `directory` is as it was.
    """
    assert recipe.model is not None
    if not Path(recipe.model.name_or_path).exists():
        report.content["model"]["name_or_path"] = recipe.model.name_or_path
    directory = directory.absolute()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix="hf_prune-") as scratch,
            tempfile.TemporaryDirectory(prefix=".hf_prune-", suffix=".partial", dir=directory.parent) as beside,
        ):
            models["dense"].save_pretrained(scratch)
            dense = weight_bytes(scratch)
            shutil.rmtree(scratch)
            Path(scratch).mkdir()
            processor.save_pretrained(beside)
            models["pruned"].save_pretrained(directory)
            for path in Path(beside).iterdir():
                os.replace(path, directory / path.name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"saving to {directory} failed: {one_line(error)}. What was there is as it was. Free some space (there and "
            f"in {tempfile.gettempdir()}) and run it again."
        ) from error
    report.content["measured"]["bytes_on_disk"] = {"dense": dense, "pruned": weight_bytes(directory)}
