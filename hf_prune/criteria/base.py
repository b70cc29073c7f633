"""What a criterion is, and the few sums that several of them take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from hf_prune.calibration.statistics import Statistics, is_parameter
from hf_prune.structure.sites import Site, Target, WeightSite


class Criterion(Protocol):
    """Scores units or weights; a higher score is kept.

    `loss_units` says that scores estimate a change of the loss, so that they compare between kinds of sites as they are.
    """

    loss_units: ClassVar[bool]

    def needs(self, target: Target) -> frozenset[str]:
        """The statistics that `target` needs, of `hf_prune.calibration.statistics.NEEDS`."""

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        """Float32 (n_units,) on the CPU."""

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        """Float32 of the weight's shape, on the CPU."""


def mean_by_unit(model: nn.Module, site: Site, of: Callable[[str, Tensor], Tensor]) -> Tensor:
    """The mean of `of(parameter name, parameter)`, elementwise, over all entries of each unit: float64 (n_units,).

    For heads and neurons over every slice that leaves together, biases in; for layers over the block's parameters.
    """
    if site.target == "layers":
        means: dict[str, Tensor] = {}
        for block in dict.fromkeys(site.blocks):
            parts = [
                of(f"{block}.{name}", parameter).double().reshape(-1).cpu()
                for name, parameter in model.get_submodule(block).named_parameters()
            ]
            means[block] = torch.cat(parts).mean()
        return torch.stack([means[block] for block in site.blocks])
    total = torch.zeros(site.n_units, dtype=torch.float64)
    n_entries = 0
    units = torch.arange(site.n_units)
    for name, tensor, piece in _slices(model, site):
        index = piece.index(units).to(tensor.device)
        values = of(name, tensor).index_select(piece.dim, index).double()  # spans x units x width along dim
        other = [dim for dim in range(values.dim()) if dim != piece.dim]
        along = (values.sum(other) if other else values).cpu()
        start = 0
        for span in piece.spans:
            size = site.n_units * span.width
            total += along[start : start + size].reshape(site.n_units, span.width).sum(1)
            start += size
        n_entries += values.numel() // site.n_units
    return total / n_entries


def _slices(model: nn.Module, site: Site) -> Iterator[tuple]:
    for piece in site.slices:
        if is_parameter(model, piece):
            yield piece.name, getattr(model.get_submodule(piece.module), piece.tensor).detach(), piece
