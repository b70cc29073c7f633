"""Where activations wait between two passes: in memory, or in memory-mapped files of a temporary folder."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class OnDisk:
    """A tensor in a file of its own, which goes with the last reference to it."""

    def __init__(self, tensor: Tensor, path: Path):
        self._shape, self._dtype, self._device, self._path = tensor.shape, tensor.dtype, tensor.device, path
        # not by NumPy: a storage that it has seen can't be resized any more
        torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype).copy_(
            tensor.detach().reshape(-1)
        )
        weakref.finalize(self, _remove, path)

    def load(self, rows: Tensor | None = None) -> Tensor:
        """The tensor, or some of its rows, mapped from the file; changing it in place doesn't change the file."""
        flat = torch.from_file(str(self._path), shared=False, size=self._shape.numel(), dtype=self._dtype)
        whole = flat.reshape(self._shape)
        return (whole if rows is None else whole[rows]).to(self._device)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        return  # Windows keeps a file that is mapped; the folder goes in the end, with all that is in it


class Shelf:
    """Takes tensors and gives them back. `open_shelf` makes one.

    Args:
        directory: for files; None keeps tensors in memory.
    """

    def __init__(self, directory: Path | None = None):
        self._directory = directory
        self._n_files = 0

    @property
    def is_on_disk(self) -> bool:
        return self._directory is not None

    def put(self, tensor: Tensor) -> Tensor | OnDisk:
        """What to hold in place of `tensor` until it is needed; `taken` gives it back."""
        if self._directory is None or not tensor.numel():
            return tensor
        self._n_files += 1
        return OnDisk(tensor, self._directory / f"{self._n_files}.bin")

    def outlasting(self, tensor: Tensor) -> Tensor:
        """The tensor, to be used after the shelf is gone: on disk mapped from a file without a name, which goes with it."""
        if not self.is_on_disk or os.name == "nt":  # Windows keeps the name of what is mapped
            return tensor
        return taken(self.put(tensor))

    def states(self) -> States:
        """An empty list of tensors on this shelf."""
        return States(self)


class States:
    """Tensors on a shelf, by number, as in a list."""

    def __init__(self, shelf: Shelf, held: Iterable[Tensor | OnDisk] = ()):
        self.shelf, self._held = shelf, list(held)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, number: int) -> Tensor:
        return taken(self._held[number])

    def rows(self, number: int, rows: Tensor) -> Tensor:
        """Some rows of a tensor; from a file no others are read."""
        held = self._held[number]
        return held.load(rows) if isinstance(held, OnDisk) else held[rows.to(held.device)]

    def __setitem__(self, number: int, tensor: Tensor) -> None:
        self._held[number] = self.shelf.put(tensor)

    def append(self, tensor: Tensor) -> None:
        self._held.append(self.shelf.put(tensor))

    def like(self) -> States:
        """An empty list on the same shelf."""
        return self.shelf.states()

    def copy(self) -> States:
        """The same tensors, to be replaced apart."""
        return States(self.shelf, self._held)


@contextmanager
def open_shelf(offload: str) -> Iterator[Shelf]:
    """A shelf in memory ("none"), or in a temporary folder ("disk") that is gone afterwards, also after an error."""
    if offload == "none":
        yield Shelf()
        return
    with tempfile.TemporaryDirectory(prefix="hf_prune-", ignore_cleanup_errors=True) as directory:
        yield Shelf(Path(directory))


class Interned:
    """Arguments of calls with their tensors on a shelf. What is equal is held once: masks and position embeddings are the same
    for all blocks, and mostly for all batches."""

    def __init__(self, shelf: Shelf):
        self._shelf = shelf
        self._known: list[tuple[Tensor, Tensor | OnDisk]] = []  # of this batch and the one before
        self._last: list[tuple[Tensor, Tensor | OnDisk]] = []
        self._by_id: dict[int, tuple[Any, Any]] = {}  # the value is kept, so that its id stays its own

    def next_batch(self) -> None:
        self._last, self._known, self._by_id = self._known, [], {}

    def put(self, value: Any) -> Any:
        """`value` with its tensors put away; the same object for the same object of a batch."""
        if id(value) in self._by_id:
            return self._by_id[id(value)][1]
        put: Any = value
        if isinstance(value, Tensor):
            put = self._put_tensor(value)
        elif type(value) is dict:
            put = {name: self.put(each) for name, each in value.items()}
        elif type(value) in (tuple, list):
            put = type(value)(self.put(each) for each in value)
        self._by_id[id(value)] = value, put
        return put

    def _put_tensor(self, tensor: Tensor) -> Tensor | OnDisk:
        for there, held in (*self._known, *self._last):
            is_alike = (there.shape, there.dtype, there.device) == (tensor.shape, tensor.dtype, tensor.device)
            if is_alike and torch.equal(there, tensor):
                self._known.append((there, held))
                return held
        held = self._shelf.put(tensor)
        self._known.append((tensor, held))
        return held


def taken(value: Any) -> Any:
    """`value` with every tensor that was put away, also inside of containers."""
    if isinstance(value, OnDisk):
        return value.load()
    if type(value) is dict:
        return {name: taken(each) for name, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(taken(each) for each in value)
    return value
