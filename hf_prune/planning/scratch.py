"""A block to try a plan on: a copy with everything that leaves it zeroed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_prune.calibration.blocks import scratch_copy
from hf_prune.plan import KeepMasks
from hf_prune.structure import ModelStructure


@torch.no_grad()
def masked_copy(
    model: nn.Module, structure: ModelStructure, masks: KeepMasks, block: str, replacements: Mapping[str, Tensor]
) -> nn.Module:
    """A copy of the module `block`, without hooks, with `replacements` in place, in which `masks` are zeros."""
    scratch = scratch_copy(model.get_submodule(block))
    parameters = dict(scratch.named_parameters(remove_duplicate=False))
    for name, tensor in replacements.items():
        if name.startswith(f"{block}."):
            parameters[name[len(block) + 1 :]].copy_(tensor)
    for key, keep in masks.units.items():
        gone = torch.nonzero(~keep).reshape(-1)
        for piece in structure[key].slices if len(gone) else ():
            if piece.name.startswith(f"{block}."):
                tensor = parameters[piece.name[len(block) + 1 :]]
                tensor.index_fill_(piece.dim, piece.index(gone).to(tensor.device), 0)
    for name, keep in masks.weights.items():
        if name.startswith(f"{block}."):
            tensor = parameters[name[len(block) + 1 :]]
            tensor.masked_fill_(~keep.to(tensor.device), 0)
    return scratch


def kept_entries(structure: ModelStructure, masks: KeepMasks, tensor: Tensor, name: str) -> Tensor:
    """Where a parameter keeps its entries: bool of its shape, False for removed units and removed weights."""
    keep = masks.weights.get(name, torch.ones(tensor.shape, dtype=torch.bool)).clone()
    for key, units in masks.units.items():
        gone = torch.nonzero(~units).reshape(-1)
        for piece in structure[key].slices if len(gone) else ():
            if piece.name == name:
                keep.index_fill_(piece.dim, piece.index(gone), False)
    return keep


@dataclass
class Linear:
    """A linear layer as the algebra has it: y = matrix x + bias, `matrix` (d_out, d_in) a view of its weight."""

    weight: Tensor
    bias: Tensor | None
    matrix: Tensor

    @classmethod
    def of(cls, module: nn.Module) -> Linear:
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
        return cls(weight, bias, weight.T if isinstance(module, Conv1D) else weight)
