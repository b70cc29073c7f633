"""Weights chosen and updated together, layer by layer in the order in which the model runs them.

Each matrix sees its inputs as the pruned matrices before it make them. What shares an input shares its Gram matrix. Its
target is what it computes itself on these inputs; or, with `dense_target`, what the dense model has in its place, so that
it makes up for what those before it left over, as a repair does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.batches import dealt
from hf_prune.calibration.blocks import Chain, Place, record_chain, recorded
from hf_prune.calibration.collect import evaluation
from hf_prune.calibration.reduction import as_first_rank
from hf_prune.calibration.residual import Junction, find_junctions
from hf_prune.compensation.least_squares import Moments, is_test, reduce_, refit
from hf_prune.errors import RecipeError
from hf_prune.plan import KeepMasks
from hf_prune.planning.scratch import Linear, masked_copy, require_in_stacks
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
    dense_target: bool = False,
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
        dense_target: move each matrix towards the dense model's outputs before it is pruned.
        seed: of a private random state.

    Raises:
        CalibrationError: an input is not finite.
        RecipeError: a matrix is outside the stacks of blocks.
        UnsupportedModelError: the blocks are no chain.
    """
    mine = list(dealt(batches, next(model.parameters()).device))
    stacks = stacks_of(model)
    require_in_stacks((site.module for site in sites), stacks, "this criterion")
    done = Sparsified({}, {})
    replaced: dict[str, list[Tensor]] = {}
    with evaluation(model, seed), torch.no_grad():
        for name, blocks in stacks.items():
            inside = {site.module: site for site in sites if site.module.startswith(f"{name}.")}
            if inside:
                if len(set(blocks)) < len(blocks):
                    raise RecipeError(
                        f"this criterion works block by block, and the block of {name} is called {len(blocks)} times; "
                        "use another, such as wanda"
                    )
                chain = record_chain(model, name, blocks, mine, replaced)
                dense = None
                if dense_target:
                    dense = record_chain(model, name, blocks, mine, {}) if replaced else chain.fork()
                keep = masks.units.get(f"layers:{name}", torch.ones(len(blocks), dtype=torch.bool))
                for position, block in enumerate(blocks):
                    live = model.get_submodule(block)
                    if keep[position]:
                        scratch = masked_copy(model, structure, masks, block, replacements)
                        reference = None if dense is None else _Reference(live, dense, position)
                        _prune_block(scratch, chain, position, reference, inside, there, prune, done, len(batches))
                        chain.run_(position, scratch)
                    if dense is not None:
                        dense.run_(position, live)
                replaced[blocks[-1]] = chain.hidden
    return done


@dataclass
class _Reference:
    """The dense model's block, on the dense model's hidden states."""

    block: nn.Module
    chain: Chain
    position: int


def _prune_block(
    scratch: nn.Module,
    chain: Chain,
    position: int,
    reference: _Reference | None,
    sites: Mapping[str, WeightSite],
    there: Mapping[str, Tensor],
    prune: Prune,
    done: Sparsified,
    n_batches: int,
) -> None:
    block = chain.blocks[position]
    names = [site[len(block) + 1 :] for site in sites if site.startswith(f"{block}.")]
    for together in as_first_rank(lambda: _by_input(scratch, chain, position, names)):
        fit, test = _moments(scratch, chain, position, together, reference, n_batches)
        gram = fit.gram + test.gram
        change = refit(fit, test if test.n_tokens else None).change if reference else None  # (sum of d_out, d_in)
        for name in together:
            site = sites[f"{block}.{name}"]
            linear = Linear.of(scratch.get_submodule(name))
            transposed = site.reduction_dim == 0
            mask = there[site.name].to(linear.weight.device)
            matrix = linear.matrix
            if change is not None:
                matrix, change = matrix.double() + change[: len(matrix)], change[len(matrix) :]
            keep, values = prune(site, matrix, gram, mask.T if transposed else mask)
            linear.matrix.copy_(values)
            done.keep[site.name] = (keep.T if transposed else keep).contiguous().cpu()
            done.values[site.name] = linear.weight.detach().cpu().clone()


def _by_input(scratch: nn.Module, chain: Chain, position: int, names: Sequence[str]) -> list[list[str]]:
    """`names` in the order in which the block runs them, those with the same input together."""
    if not names:
        return []
    with recorded(scratch, [(name, "input") for name in names]) as seen:
        chain.calls[0][position](scratch, chain.hidden[0])
    groups: dict[int, list[str]] = {}
    for (name, _), tensor in seen.items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _moments(
    scratch: nn.Module,
    chain: Chain,
    position: int,
    together: Sequence[str],
    reference: _Reference | None,
    n_batches: int,
) -> tuple[Moments, Moments]:
    """Of the common input of the modules `together`: the sums that fit, and those that test the fit.

    With a reference, `cross` is of what the modules' outputs, one after the other, lack of the dense model's; without,
    it is empty.
    """
    linears = [Linear.of(scratch.get_submodule(name)) for name in together]
    first, d_out = linears[0].matrix, sum(len(linear.matrix) for linear in linears)
    junctions: list[Junction] = []
    if reference is not None:
        block, dense = reference.block, reference.chain
        junctions = as_first_rank(
            lambda: find_junctions(block, dense.calls[0][position], dense.hidden[0], list(together))
        )
        junctions.sort(key=lambda junction: together.index(junction.projection))
    moments = [Moments.zeros(first.shape[1], d_out if reference else 0, first.device) for _ in range(2)]
    wide = torch.promote_types(first.dtype, torch.float32)
    source: Place = (together[0], "input")
    for number, calls in enumerate(chain.calls):
        rests = [place for junction in junctions for place in junction.rests]
        seen = calls[position].until(scratch, chain.hidden[number], [source, *rests])
        inputs = chain.tokens(number, seen[source]).to(wide)
        lacking = inputs[:, :0]
        if reference is not None:
            dense = reference.chain
            targets = dense.calls[number][position].until(
                reference.block, dense.hidden[number], [junction.target for junction in junctions]
            )
            lacking = torch.cat(
                [
                    linear.lacking(chain, number, junction, seen, inputs, targets[junction.target])
                    for linear, junction in zip(linears, junctions, strict=True)
                ],
                1,
            )
        moments[is_test(chain.batches[number].index, n_batches)].add_(inputs, lacking)
    reduce_(moments, f"{chain.blocks[position]}.{together[0]}")
    fit, test = moments
    return fit, test
