"""What passes block by block share: a copy of a block to try a plan on, and its linear layers as the algebra has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_prune.apply.masks import MaskedTensor, choose_kept_, masked_entries
from hf_prune.apply.replace import replace_
from hf_prune.calibration.blocks import Chain, Place, scratch_copy
from hf_prune.calibration.residual import Junction
from hf_prune.errors import RecipeError
from hf_prune.plan import KeepMasks
from hf_prune.structure import ModelStructure
from hf_prune.structure.naming import weight_of


@torch.no_grad()
def masked_copy(
    model: nn.Module, structure: ModelStructure, masks: KeepMasks, block: str, replacements: Mapping[str, Tensor]
) -> nn.Module:
    """A copy of the module `block`, without its hooks, with `replacements` in place, in which `masks` are zeros."""
    scratch = scratch_copy(model.get_submodule(block))
    replace_(
        scratch,
        {name[len(block) + 1 :]: tensor for name, tensor in replacements.items() if name.startswith(f"{block}.")},
    )
    for entry, parameter in masked_within(scratch, structure, masks, block):
        entry.zero_(parameter)
    choose_kept_(scratch, structure, masks, f"{block}.")
    return scratch


def masked_within(
    scratch: nn.Module, structure: ModelStructure, masks: KeepMasks, block: str
) -> list[tuple[MaskedTensor, Tensor]]:
    """What `masks` take from a copy of the module `block`, each with its parameter."""
    parameters = dict(scratch.named_parameters(remove_duplicate=False))
    inside = {name: keep for name, keep in masks.weights.items() if name.startswith(f"{block}.")}
    return [
        (entry, parameters[entry.name[len(block) + 1 :]])
        for entry in masked_entries(structure, KeepMasks(masks.units, inside))
        if entry.name.startswith(f"{block}.")
    ]


def require_in_stacks(modules: Iterable[str], stacks: Mapping[str, Sequence[str]], who: str) -> None:
    """Refuse modules that are in no block of a stack.

    Raises:
        RecipeError: naming the first of them; `who` works block by block.
    """
    prefixes = tuple(f"{block}." for blocks in stacks.values() for block in blocks)
    if outside := sorted(name for name in modules if not name.startswith(prefixes)):
        raise RecipeError(f"{who} works block by block, and {outside[0]} is in no stack of blocks; exclude it")


@dataclass
class Linear:
    """A linear layer as the algebra has it: y = matrix x + bias, `matrix` (d_out, d_in) a view of its weight."""

    weight: Tensor
    bias: Tensor | None
    matrix: Tensor

    @classmethod
    def of(cls, module: nn.Module) -> Linear:
        weight, bias = weight_of(module), module.bias
        assert bias is None or isinstance(bias, Tensor)
        return cls(weight, bias, weight.T if isinstance(module, Conv1D) else weight)


def wanted_of(
    chain: Chain, number: int, junction: Junction, seen: Mapping[Place, Tensor], target: Tensor, dtype: torch.dtype
) -> Tensor:
    """What a layer should put out, so that the sum at its junction comes to what it is in the dense model: s - r.

    Args:
        chain, number: the batch, whose padding is left out.
        junction: of the layer.
        seen: at the junction's sources.
        target: s, (B, T, d_out).

    Returns:
        (n_tokens, d_out), of `dtype`.
    """
    wanted = chain.tokens(number, target).to(dtype)
    rest = junction.rest(seen)
    return wanted if rest is None else wanted - chain.tokens(number, rest).to(dtype)
