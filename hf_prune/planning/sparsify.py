"""Weights chosen and updated together, layer by layer in the order in which the model runs them.

Each matrix sees its inputs as the pruned matrices before it make them. What shares an input shares its Gram matrix. Its
target is what it computes itself on these inputs; or, with `dense_target`, what the dense model has in its place, so that
it makes up for what those before it left over, as a repair does. A matrix outside the stacks of blocks, such as a pooler,
is a stack of one block, itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.apply.masks import masked_entries
from hf_prune.calibration.batches import Batch, dealt, without_logits
from hf_prune.calibration.blocks import Chain, Place, record_chain, recorded
from hf_prune.calibration.collect import evaluation
from hf_prune.calibration.memory import give_back
from hf_prune.calibration.reduction import as_first_rank
from hf_prune.calibration.residual import Junction, find_junctions
from hf_prune.calibration.shelf import States, open_shelf
from hf_prune.calibration.walk import Walk
from hf_prune.compensation.least_squares import Moments, is_test, reduce_, refit
from hf_prune.errors import RecipeError
from hf_prune.plan import KeepMasks
from hf_prune.planning.scratch import Linear, masked_copy, wanted_of
from hf_prune.structure import ModelStructure, WeightSite, stacks_of
from hf_prune.structure.naming import is_within


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
    offload: str = "none",
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
        offload: where what passes between blocks is kept: "none" (in memory) or "disk".
        seed: of a private random state.

    Raises:
        CalibrationError: an input is not finite.
        RecipeError: a matrix is not run once in a pass over the model.
        UnsupportedModelError: the blocks are no chain.
    """
    mine = list(dealt(batches, next(model.parameters()).device))
    done = Sparsified({}, {})
    changed = _changed(structure, masks, replacements)
    replaced: dict[str, States] = {}
    with evaluation(model, seed), torch.no_grad(), open_shelf(offload) as shelf:
        for name, blocks in _in_order(model, sites, changed, mine).items():
            inside = {site.module: site for site in sites if is_within(site.module, name)}
            is_shared = len(set(blocks)) < len(blocks)
            if not inside and (is_shared or not any(is_within(module, name) for module in changed)):
                continue
            if is_shared:
                raise RecipeError(
                    f"this criterion works block by block, and the block of {name} is called {len(blocks)} times; "
                    "use another, such as wanda"
                )
            chain = record_chain(model, name, blocks, mine, replaced, shelf)
            dense = None
            if dense_target:
                dense = record_chain(model, name, blocks, mine, {}, shelf) if replaced else chain.fork()
            keep = masks.units.get(f"layers:{name}", torch.ones(len(blocks), dtype=torch.bool))
            for position, block in enumerate(blocks):
                live = model.get_submodule(block)
                if keep[position]:
                    scratch = masked_copy(model, structure, masks, block, replacements)
                    reference = None if dense is None else _Reference(live, dense, position)
                    _prune_block(scratch, chain, position, reference, inside, there, prune, done, len(batches))
                    give_back()  # what waited in the block
                elif dense is not None:
                    dense.run_(position, live)
            replaced[blocks[-1]] = chain.hidden
    return done


def _changed(structure: ModelStructure, masks: KeepMasks, replacements: Mapping[str, Tensor]) -> set[str]:
    """The modules that earlier steps changed."""
    parameters = {entry.name for entry in masked_entries(structure, masks)} | replacements.keys()
    dropped = {site.name for site in structure.of("layers") if not masks.units.get(site.key, torch.ones(1)).all()}
    return dropped | {name.rpartition(".")[0] for name in parameters}


def _in_order(
    model: nn.Module, sites: Sequence[WeightSite], changed: Collection[str], batches: Sequence[Batch]
) -> dict[str, tuple[str, ...]]:
    """The stacks of blocks, and the matrices outside of them that are to be pruned or are changed already, each as a stack
    of one block; in the order in which the model runs them, up to the last that is to be pruned."""
    stacks = stacks_of(model)
    blocks = tuple(f"{block}." for of_stack in stacks.values() for block in of_stack)
    wanted = {site.module for site in sites}
    outside = {
        name
        for name in sorted(wanted | {*changed})
        if not name.startswith(blocks) and hasattr(model.get_submodule(name), "weight")
    }
    stages = {**stacks, **{name: (name,) for name in outside}}
    if len(stacks) == 1 and not outside:
        return stages

    def count_calls() -> dict[str, int]:
        n_calls: dict[str, int] = {}
        handles = [
            model.get_submodule(first).register_forward_pre_hook(
                lambda module, args, name=name: n_calls.update({name: n_calls.get(name, 0) + 1})
            )
            for name, (first, *_) in stages.items()
        ]
        try:
            model(**without_logits(model, batches[0].inputs))
        finally:
            for handle in handles:
                handle.remove()
        return n_calls

    n_calls = as_first_rank(count_calls)
    for name in sorted(outside & wanted):
        if n_calls.get(name) != 1:
            raise RecipeError(
                f"{name} is called {n_calls.get(name, 0)} times in a pass over the calibration data; this criterion goes "
                "through the model in order, once: exclude it"
            )
    in_order = [name for name in (*n_calls, *stacks.keys() - n_calls) if name in stacks or n_calls[name] == 1]
    while in_order and not any(is_within(module, in_order[-1]) for module in wanted):
        in_order.pop()
    return {name: stages[name] for name in in_order}


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
    """Prune the matrices of `scratch` in the order in which it runs them, and take the chain through it."""
    block = chain.blocks[position]
    inside = {name[len(block) + 1 :]: site for name, site in sites.items() if is_within(name, block)}
    groups = as_first_rank(lambda: _by_input(scratch, chain, position, list(inside)))
    junctions = reference.junctions(list(inside)) if reference and inside else {}
    with ExitStack() as walks:
        sources = [_sources(together, junctions) for together in groups]
        pruned = walks.enter_context(Walk(chain, position, scratch, [place for places in sources for place in places]))
        dense = None
        if reference:
            targets = [junction.target for junction in junctions.values()]
            dense = walks.enter_context(Walk(reference.chain, position, reference.block, targets))
        for together, places in zip(groups, sources, strict=True):
            linears = [Linear.of(scratch.get_submodule(name)) for name in together]
            joins = [junctions[name] for name in together if name in junctions]
            moments = _moments(linears, joins, places, chain, pruned, dense, n_batches)
            reduce_(moments, f"{block}.{together[0]}".removesuffix("."))
            gram = sum((each.gram for each in moments[1:]), moments[0].gram)
            change = None
            if dense:
                now = torch.cat([linear.matrix for linear in linears])
                fit, test = (each.lacking(now) for each in moments)
                change = refit(fit, test if test.n_tokens else None).change  # (sum of d_out, d_in)
            for name, linear in zip(together, linears, strict=True):
                site = inside[name]
                transposed = site.reduction_dim == 0
                mask = there[site.name].to(linear.weight.device)
                matrix = linear.matrix
                if change is not None:
                    matrix, change = matrix.double() + change[: len(matrix)], change[len(matrix) :]
                keep, values = prune(site, matrix, gram, mask.T if transposed else mask)
                linear.matrix.copy_(values)
                done.keep[site.name] = (keep.T if transposed else keep).contiguous().cpu()
                done.values[site.name] = chain.hidden.shelf.outlasting(linear.weight.detach().cpu().clone())
        pruned.finish()
        if dense:
            dense.finish()


@dataclass
class _Reference:
    """The dense model's block, on the dense model's hidden states."""

    block: nn.Module
    chain: Chain
    position: int

    def junctions(self, names: list[str]) -> dict[str, Junction]:
        """Where what the modules `names` put out goes."""
        call, hidden = self.chain.calls[0][self.position], self.chain.hidden[0]
        found = as_first_rank(lambda: find_junctions(self.block, call, hidden, names))
        return {junction.projection: junction for junction in found}


def _sources(together: Sequence[str], junctions: Mapping[str, Junction]) -> list[Place]:
    """What is read of the pruned block for the modules `together`: their input first."""
    rests = (place for name in together if name in junctions for place in junctions[name].rests)
    return [*dict.fromkeys([(together[0], "input"), *rests])]


def _by_input(scratch: nn.Module, chain: Chain, position: int, names: Sequence[str]) -> list[list[str]]:
    """`names` in the order in which the block runs them, those with the same input together."""
    if not names:
        return []
    with recorded(scratch, [(name, "input") for name in names]) as seen:
        chain.calls[0][position](scratch, chain.hidden[0])
    if idle := sorted({*names} - {name for name, _ in seen}):
        raise RecipeError(f"{chain.blocks[position]}.{idle[0]} is not run on the calibration data; exclude it")
    groups: dict[int, list[str]] = {}
    for (name, _), tensor in seen.items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _moments(
    linears: Sequence[Linear],
    junctions: Sequence[Junction],
    places: Sequence[Place],
    chain: Chain,
    pruned: Walk,
    dense: Walk | None,
    n_batches: int,
) -> list[Moments]:
    """Sums of the common input of `linears`, of this process. With `dense` two: those that fit, and those that test the fit;
    `cross` is of what their outputs, one after the other, should be but for biases.
    """
    first, d_out = linears[0].matrix, sum(len(linear.matrix) for linear in linears) if dense else 0
    moments = [Moments.zeros(first.shape[1], d_out, first.device) for _ in range(2 if dense else 1)]
    wide = torch.promote_types(first.dtype, torch.float32)
    for number, batch in enumerate(chain.batches):
        seen = pruned.until(number, places)
        inputs = chain.tokens(number, seen[places[0]]).to(wide)
        wanted = inputs[:, :0]
        if dense:
            targets = dense.until(number, [junction.target for junction in junctions])
            each = [
                wanted_of(chain, number, junction, seen, targets[junction.target], wide)
                - (0 if linear.bias is None else linear.bias.to(wide))
                for linear, junction in zip(linears, junctions, strict=True)
            ]
            wanted = torch.cat(each, 1)
        moments[dense is not None and is_test(batch.index, n_batches)].add_(inputs, wanted)
    return moments
