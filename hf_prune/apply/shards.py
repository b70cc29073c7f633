"""Masks on sharded parameters (`DTensor`, as FSDP2 makes them): what of the removed entries this process holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor


def local_slices(tensor: DTensor, dim: int, index: Tensor) -> Tensor:
    """Of slices `index` along `dim` of the whole tensor, those that lie in this process's part, counted within it."""
    gone = torch.zeros(tensor.shape[dim], dtype=torch.bool)
    gone[index.cpu()] = True
    # the vector is dealt out as the dimension is, whole where another dimension is sharded
    along: list[Placement] = [
        Shard(0) if isinstance(p, Shard) and p.dim == dim else Replicate() for p in tensor.placements
    ]
    return torch.nonzero(_part(gone, tensor, along)).reshape(-1)


def local_part(tensor: DTensor, whole: Tensor) -> Tensor:
    """Of `whole`, of the same shape on all processes, what lies where this process's part of `tensor` does."""
    return _part(whole, tensor, tensor.placements)


def _part(whole: Tensor, tensor: DTensor, placements: Sequence[Placement]) -> Tensor:
    device = tensor.to_local().device
    # no source: each process takes its part of what it has itself, and nothing is sent
    return distribute_tensor(whole.to(device), tensor.device_mesh, placements, src_data_rank=None).to_local()
