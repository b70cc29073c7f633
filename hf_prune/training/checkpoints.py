"""Which of a run's checkpoints is whole. Trainer writes its own file by file, and may be cut off between any two."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_prune.checkpoint.saving import check_weights
from hf_prune.errors import CheckpointError
from hf_prune.training.state import load_state


LAST = "trainer_state.json"  # what Trainer writes last, before it deletes older checkpoints


def begin_checkpoint(folder: Path) -> None:
    """Where a checkpoint is written over another: from now on until Trainer ends, it is not whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LAST).unlink(missing_ok=True)


@contextmanager
def without_token(arguments: Any) -> Iterator[None]:
    """Trainer pickles its arguments beside the weights, and pushes them: meanwhile `hub_token` isn't pickled."""
    kind: Any = type(arguments)
    own = vars(kind).get("__getstate__")

    def without(self: Any) -> dict[str, Any]:
        return {**self.__dict__, "hub_token": None}

    kind.__getstate__ = without
    try:
        yield
    finally:
        if own is None:
            del kind.__getstate__
        else:
            kind.__getstate__ = own


def last_complete(directory: Path, n_processes: int, *, is_pruned: bool = True, with_optimizer: bool = True) -> Path:
    """The newest checkpoint of a run that was written to its end.

    Args:
        directory: `output_dir` of the run.
        n_processes: that go on from it, each with random numbers of its own.
        is_pruned: whether the run has a recipe, so that a checkpoint holds the pruning state too.
        with_optimizer: whether the run saves its optimizer too.

    Raises:
        CheckpointError: there is none; the message says what each lacks.
    """
    found = [(int(match[1]), path) for path in directory.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    lacking = []
    for _, path in sorted(found, reverse=True):
        missing = what_is_missing(path, n_processes, is_pruned=is_pruned, with_optimizer=with_optimizer)
        if missing is None:
            return path
        lacking.append(f"\n  {path.name}: {missing}")
    raise CheckpointError(
        f"{directory} holds no complete checkpoint to resume from{''.join(lacking)}\nTrain without resume_from_checkpoint to start "
        "anew."
    )


def what_is_missing(
    folder: Path, n_processes: int = 1, *, is_pruned: bool = True, with_optimizer: bool = True
) -> str | None:
    """The first thing that a checkpoint lacks, in words; None if it is complete."""
    try:
        json.loads((folder / LAST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{LAST} is not there or cut short: it was not written to its end"
    try:
        if is_pruned:
            load_state(folder)
        check_weights(folder)
    except CheckpointError as error:
        return str(error)
    names = {path.name for path in folder.iterdir()}
    sharded = any(path.is_dir() for path in folder.iterdir())  # FSDP's and DeepSpeed's own formats
    if sharded:
        return None
    random = ["rng_state.pth"] if n_processes == 1 else [f"rng_state_{rank}.pth" for rank in range(n_processes)]
    optimizer = (
        "optimizer.bin" if "optimizer.bin" in names else "optimizer.pt"
    )  # FSDP's, gathered, and everybody else's
    for name in (optimizer, "scheduler.pt", *random) if with_optimizer else ():
        # the archive's directory is at its end
        if name not in names or not zipfile.is_zipfile(folder / name):
            return f"{name} is not there or cut short"
    if not any(name.endswith((".safetensors", ".bin")) and name not in _NO_WEIGHTS for name in names):
        return "there are no weights"
    return None


_NAME = re.compile(r"checkpoint-(\d+)")
_NO_WEIGHTS = {"pruning_state.safetensors", "pruning_teacher.safetensors", "training_args.bin"}
