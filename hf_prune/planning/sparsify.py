"""Weights chosen and updated together, layer by layer in the order in which the model runs them.

Each matrix sees its inputs as the pruned matrices before it make them. What shares an input shares its Gram matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.batches import Batch
from hf_prune.calibration.blocks import Chain, record_chain, recorded
from hf_prune.calibration.collect import evaluation
from hf_prune.calibration.reduction import rank_and_world, sum_over_processes
from hf_prune.errors import CalibrationError, RecipeError
from hf_prune.plan import KeepMasks
from hf_prune.planning.scratch import Linear, masked_copy
from hf_prune.structure import ModelStructure, WeightSite, stacks_of


@dataclass
class Sparsified:
    """Keep-masks and new values by parameter name, of the parameters' own shapes; values in their own dtype."""

    keep: dict[str, Tensor]
    values: dict[str, Tensor]


# (site, matrix (d_out, d_in), gram, there) -> keep-mask and values of the matrix
Prune = Callable[[WeightSite, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def sparsify(
    model: nn.Module,
    structure: ModelStructure,
    masks: KeepMasks,
    replacements: Mapping[str, Tensor],
    sites: Sequence[WeightSite],
    there: Mapping[str, Tensor],
    prune: Prune,
    batches: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
) -> Sparsified:
    """Prune `sites` one after the other; the model is left as it is.

    Args:
        model: as it was before pruning.
        structure: of the model.
        masks: what earlier steps removed.
        replacements: the new values that earlier steps gave, by parameter name.
        sites: the matrices to prune.
        there: by parameter name, the entries that may be kept.
        prune: the algorithm for one matrix.
        batches: calibration; every process passes the same.
        seed: of a private random state.

    Raises:
        CalibrationError: an input is not finite.
        RecipeError: a matrix is outside the stacks of blocks.
        UnsupportedModelError: the blocks are no chain.
    """
    rank, world = rank_and_world()
    device = next(model.parameters()).device
    mine = [Batch.of(index, batches[index], device) for index in range(rank, len(batches), world)]
    stacks = stacks_of(model)
    prefixes = tuple(f"{block}." for blocks in stacks.values() for block in blocks)
    outside = [site.module for site in sites if not site.module.startswith(prefixes)]
    if outside:
        raise RecipeError(
            f"this criterion works block by block, and {outside[0]} is in no stack of blocks; exclude it"
        )
    done = Sparsified({}, {})
    replaced: dict[str, list[Tensor]] = {}
    with evaluation(model, seed), torch.no_grad():
        for name, blocks in stacks.items():
            inside = {site.module: site for site in sites if site.module.startswith(f"{name}.")}
            if inside:
                chain = record_chain(model, name, blocks, mine, replaced)
                keep = masks.units.get(f"layers:{name}", torch.ones(len(blocks), dtype=torch.bool))
                for position in torch.nonzero(keep).reshape(-1).tolist():
                    scratch = masked_copy(model, structure, masks, blocks[position], replacements)
                    _prune_block(scratch, chain, position, inside, there, prune, done)
                    for number, calls in enumerate(chain.calls):
                        chain.hidden[number] = calls[position](scratch, chain.hidden[number])
                replaced[blocks[-1]] = chain.hidden
    return done


def _prune_block(
    scratch: nn.Module,
    chain: Chain,
    position: int,
    sites: Mapping[str, WeightSite],
    there: Mapping[str, Tensor],
    prune: Prune,
    done: Sparsified,
) -> None:
    block = chain.blocks[position]
    names = [site[len(block) + 1 :] for site in sites if site.startswith(f"{block}.")]
    for together in _by_input(scratch, chain, position, names):
        gram = _gram(scratch, chain, position, together[0])
        for name in together:
            site = sites[f"{block}.{name}"]
            linear = Linear.of(scratch.get_submodule(name))
            transposed = site.reduction_dim == 0
            mask = there[site.name].to(linear.weight.device)
            keep, values = prune(site, linear.matrix, gram, mask.T if transposed else mask)
            linear.matrix.copy_(values)
            done.keep[site.name] = (keep.T if transposed else keep).contiguous().cpu()
            done.values[site.name] = linear.weight.detach().cpu().clone()


def _by_input(scratch: nn.Module, chain: Chain, position: int, names: Sequence[str]) -> list[list[str]]:
    """`names` in the order in which the block runs them, those with the same input together."""
    if not chain.calls or not names:
        return [[name] for name in names]
    with recorded(scratch, [(name, "input") for name in names]) as seen:
        chain.calls[0][position](scratch, chain.hidden[0])
    groups: dict[int, list[str]] = {}
    for (name, _), tensor in seen.items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _gram(scratch: nn.Module, chain: Chain, position: int, name: str) -> Tensor:
    """Σ a aᵀ over the tokens of all processes: float64 (d_in, d_in); products in float32 or better."""
    matrix = Linear.of(scratch.get_submodule(name)).matrix
    d_in = matrix.shape[1]
    gram = torch.zeros(d_in, d_in, dtype=torch.float64, device=matrix.device)
    for number, calls in enumerate(chain.calls):
        seen = calls[position].until(scratch, chain.hidden[number], [(name, "input")])
        inputs = chain.tokens(number, seen[name, "input"])
        inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        gram += inputs.T @ inputs
    sum_over_processes([gram])
    if not torch.isfinite(gram).all():
        raise CalibrationError(
            f"what goes into {chain.blocks[position]}.{name} is not finite on the calibration data. Look for broken "
            "samples, or load the model in bfloat16 or float32."
        )
    return gram
