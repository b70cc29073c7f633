"""What passes block by block share: a copy of a block to try a plan on, and its linear layers as the algebra has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_prune.apply.masks import MaskedTensor, choose_kept_, masked_entries
from hf_prune.apply.replace import replace_
from hf_prune.apply.shrink import kept_index, narrow_
from hf_prune.calibration.blocks import Chain, Place, scratch_copy
from hf_prune.calibration.residual import Junction
from hf_prune.checkpoint.modeling_hf_prune import set_sizes
from hf_prune.errors import RecipeError
from hf_prune.plan import KeepMasks
from hf_prune.structure import ModelStructure, Site
from hf_prune.structure.naming import is_linear, weight_of
from hf_prune.structure.sites import TensorSlice


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


@contextmanager
def narrowed(
    scratch: nn.Module, structure: ModelStructure, masks: KeepMasks, block: str
) -> Iterator[list[tuple[MaskedTensor, Tensor]]]:
    """Let `scratch`, a `masked_copy`, hold only the neurons that stay, where they are slices of linear layers: nothing is computed
    for the others. At the end it has all of them again, those that left as zeros. The caller has gradients disabled.

    Yields:
        What else is masked, each with its parameter.
    """
    prefix = f"{block}."
    units = dict(masks.units)
    tensors: list[tuple[nn.Module, TensorSlice, nn.Parameter, Tensor]] = []
    numbers: list[tuple[nn.Module, str, int]] = []
    for site in structure.of("ffn_neurons"):
        keep = masks.units.get(site.key)
        if keep is None or keep.all() or not _is_narrowable(site, scratch, masks, prefix):
            continue
        del units[site.key]
        own = _inside(site, prefix)
        for piece in own.slices:
            module = scratch.get_submodule(piece.module)
            parameter = module.get_parameter(piece.tensor)
            index = kept_index(piece, keep, parameter.shape[piece.dim]).to(parameter.device)
            tensors.append((module, piece, parameter, index))
        for attribute in own.attributes:
            module = scratch.get_submodule(attribute.module)
            numbers.append((module, attribute.name, getattr(module, attribute.name)))
        narrow_(scratch, own, keep, {})
    yield masked_within(scratch, structure, KeepMasks(units, masks.weights), block)
    for module, piece, parameter, index in reversed(tensors):
        parameter.detach().index_copy_(piece.dim, index, module.get_parameter(piece.tensor).detach())
        setattr(module, piece.tensor, parameter)
        set_sizes(module)
    for module, name, number in numbers:
        setattr(module, name, number)


def _is_narrowable(site: Site, scratch: nn.Module, masks: KeepMasks, prefix: str) -> bool:
    """Whether the site's neurons are slices of linear layers of `scratch` and nothing else."""
    pieces = [piece for piece in site.slices if piece.module.startswith(prefix)]
    return (
        len(pieces) == len(site.slices)
        and not (site.norms or site.buffers or site.holder)
        and not any(attribute.of_config for attribute in site.attributes)
        and not any(piece.name in masks.weights for piece in pieces)
        and len({piece.name for piece in pieces}) == len(pieces)
        and all(is_linear(scratch.get_submodule(piece.module[len(prefix) :])) for piece in pieces)
    )


def _inside(site: Site, prefix: str) -> Site:
    """The site with names as they are in a copy of the block."""
    slices = (replace(each, module=each.module[len(prefix) :]) for each in site.slices)
    attributes = (replace(each, module=each.module[len(prefix) :]) for each in site.attributes)
    return replace(site, slices=tuple(slices), attributes=tuple(attributes))


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
