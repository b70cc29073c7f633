"""Recorders of the parts of layers: what a block's attention or feed-forward adds to the residual stream.

Axes: B samples, T positions, d_model, n_units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_prune.calibration.batches import Batch, decoder_modules, first_sample, to_device
from hf_prune.calibration.blocks import BlockCall, Place, watch
from hf_prune.calibration.recorders import GateSums, at_least_float32, float64, require_finite, start_graph, zeros
from hf_prune.calibration.residual import find_branches
from hf_prune.errors import UnsupportedModelError
from hf_prune.structure.sites import Site


@dataclass(frozen=True)
class Join:
    """Where to see what a part adds, y, and the sum that it adds to, x + y: names in the model."""

    key: str
    unit: int
    block: str
    end: str
    total: Place


@torch.no_grad()
def find_joins(model: nn.Module, sites: Sequence[Site], batches: Sequence[Mapping[str, Any]]) -> list[Join]:
    """One for each unit of `sites`, found by running the model on the first sample.

    Args:
        model: in evaluation mode.
        sites: of parts of layers.
        batches: calibration; every process passes the same.

    Raises:
        UnsupportedModelError: what a part adds can't be told, since it is no plain summand.
    """
    calls: dict[str, tuple[Tensor, BlockCall]] = {}

    def enter(name: str) -> Any:
        return lambda module, args, kwargs: calls.setdefault(name, BlockCall.of(args, kwargs)) and None

    blocks = dict.fromkeys(branch.block for site in sites for branch in site.branches)
    handles = [model.get_submodule(b).register_forward_pre_hook(enter(b), with_kwargs=True) for b in blocks]
    try:
        model(**to_device(first_sample(batches) or {}, next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    joins = []
    for site in sites:
        for unit, branch in enumerate(site.branches):
            block, (hidden, call) = branch.block, calls[branch.block]
            own = branch.outputs[0][len(block) + 1 :]
            found = find_branches(model.get_submodule(block), call, hidden, [own]).get(own)
            if len(branch.outputs) > 1 or found is None or found.total is None:
                raise UnsupportedModelError(
                    f"what {branch.modules[0]} adds to the hidden states can't be told from what {block} makes of it; use "
                    "a criterion that looks at weights, or loss_change"
                )
            joins.append(Join(site.key, unit, block, f"{block}.{found.projection}", _at(block, found.total)))
    return joins


def _at(block: str, place: Place) -> Place:
    name, side = place
    return (f"{block}.{name}" if name else block), side


class PartSums:
    """Sums over tokens of a function of x and x + y, y what a part adds, (n_units,); counts are tokens a unit."""

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], joins: Sequence[Join], of: Callable[[Tensor, Tensor], Tensor]
    ):
        self._model, self._joins, self._of = model, joins, of
        self._decoder = decoder_modules(model)
        self.sums = {site.key: zeros(site.n_units) for site in sites}
        self.counts = {site.key: zeros(site.n_units) for site in sites}

    def attach(self) -> Iterator[RemovableHandle]:
        for join in self._joins:
            note = self._note(join)
            yield watch(self._model, (join.end, "output"), note)
            yield watch(self._model, join.total, note)

    def begin(self, batch: Batch) -> None:
        self._batch = batch
        self._added: dict[tuple[str, int], Tensor] = {}

    def end(self) -> None:
        require_finite(self.sums, self._batch, "layers")

    def _note(self, join: Join) -> Callable[[Place, Tensor], None]:
        in_decoder = id(self._model.get_submodule(join.block)) in self._decoder

        def note(place: Place, seen: Tensor) -> None:
            tokens = at_least_float32(self._batch.tokens(seen.detach(), in_decoder))  # (n_tokens, d_model)
            if place != join.total:
                self._added[join.key, join.unit] = tokens
                return
            before = tokens - self._added.pop((join.key, join.unit))
            self.sums[join.key][join.unit] += float64(self._of(before, tokens))
            self.counts[join.key][join.unit] += len(tokens)

        return note


class PartGates:
    """Sums of a function of dL/dg, as `gates` has it, with y + x as g y + x, y what a part adds; (n_units,). Counts are calls."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        joins: Sequence[Join],
        gates: Callable[[], GateSums],
    ):
        self._model, self._joins = model, joins
        self._gates = gates()
        self.sums = {site.key: zeros(site.n_units) for site in sites}
        self.counts = {site.key: zeros(site.n_units) for site in sites}

    def attach(self) -> Iterator[RemovableHandle]:
        for join in self._joins:
            yield self._model.get_submodule(join.block).register_forward_pre_hook(start_graph, with_kwargs=True)
            yield self._model.get_submodule(join.end).register_forward_hook(self._hook(join))

    def begin(self, batch: Batch) -> None:
        self._batch = batch
        self._gates.clear()

    def end(self) -> None:
        self._gates.fold_into(self.sums)
        require_finite(self.sums, self._batch, "gate gradients")

    def _hook(self, join: Join) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            added = at_least_float32(self._batch.by_sample(output.detach().clone(), join.end))
            self.counts[join.key][join.unit] += 1

            def on_gradient(gradient: Tensor) -> None:
                product = added * self._batch.by_sample(gradient, join.end)
                self._gates.add_one(join.key, join.unit, len(self.sums[join.key]), product)

            output.register_hook(on_gradient)

        return hook
