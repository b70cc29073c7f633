"""Sums over processes. Whole batches are dealt to ranks in turn, so that every rank agrees on the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from hf_prune.errors import CalibrationError, PruneError


T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """(0, 1) where torch.distributed isn't running."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def raise_together(error: CalibrationError | None) -> None:
    """Raise the first rank's error on all ranks: one that raised alone would leave the others waiting for ever.

    Raises:
        CalibrationError: some rank has one.
    """
    rank, world = rank_and_world()
    if world == 1:
        if error is not None:
            raise error
        return
    messages = from_all_processes(None if error is None else str(error))
    first = next((message for message in messages if message is not None), None)
    if first is not None:
        raise error if error is not None and messages[rank] == first else CalibrationError(first)


def from_all_processes(own: T) -> list[T]:
    """What each process has, by rank, on all of them."""
    world = rank_and_world()[1]
    if world == 1:
        return [own]
    found: list[Any] = [None] * world
    dist.all_gather_object(found, own)
    return found


def as_first_rank(find: Callable[[], Any]) -> Any:
    """What `find` returns on the first rank, on all of them; its error too. For what every rank must decide alike."""
    rank, world = rank_and_world()
    if world == 1:
        return find()
    found: list[Any] = [None, None]
    if rank == 0:
        try:
            found[0] = find()
        except PruneError as error:
            found[1] = error
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    return found[0]


def sum_over_processes(sums: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place; every rank passes the same shapes.

    A sum of float32 numbers in float64 is exact, in any order, unless they differ by some 2**28 in size. So
    what is left after rounding to float32 doesn't depend on how many processes there are. Of float32 tensors, as gradients are,
    the sum does, by its rounding.
    """
    if rank_and_world()[1] == 1:
        return
    # nccl sends from the GPU only; the sums stay where they are
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else None
    for total in sums:
        sent = total.to(device) if device else total.contiguous()
        dist.all_reduce(sent, op=dist.ReduceOp.SUM)
        total.copy_(sent)
