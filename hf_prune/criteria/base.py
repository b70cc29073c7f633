"""What a criterion is, and the few sums that several of them take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hf_prune.calibration.statistics import Statistics, is_parameter, output_slice
from hf_prune.errors import RecipeError
from hf_prune.structure.naming import weight_of
from hf_prune.structure.sites import Read, Site, Span, Target, TensorSlice, WeightSite


class Criterion(Protocol):
    """Scores units or weights; a higher score is kept.

    `loss_units` says that scores estimate a change of the loss, so that they compare between kinds of sites as they are.
    """

    loss_units: ClassVar[bool]

    def needs(self, target: Target) -> frozenset[str]:
        """The statistics that `target` needs, fields of `Statistics`."""

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        """Float32 (n_units,) on the CPU."""

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        """Float32 of the weight's shape, on the CPU."""


@runtime_checkable
class RanksUnits(Criterion, Protocol):
    """A criterion that runs the model by itself, with the number of units that will leave in mind."""

    def rank_units(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        batches: Sequence[Mapping[str, Any]],
        n_removed: Mapping[str, int],
        there: Mapping[str, Tensor],
        seed: int,
    ) -> dict[str, Tensor]:
        """Float32 scores (n_units,) on the CPU, by site key, given how many leave each site of the units that are `there`."""


class PrunedMatrix(NamedTuple):
    """What `PrunesMatrices.prune` makes of a matrix (d_out, d_in)."""

    keep: Tensor  # bool
    values: Tensor  # float32, zero where not kept
    n_near_ties: int  # entries that stay and that another machine's rounding might take instead


@runtime_checkable
class PrunesMatrices(Criterion, Protocol):
    """A criterion that chooses the entries of a matrix and gives new values to those that stay."""

    dense_target: bool  # aim at the dense model's outputs

    def prune(
        self, matrix: Tensor, gram: Tensor, there: Tensor, n_leaving: int, group: tuple[int, int] | None
    ) -> PrunedMatrix:
        """Keep-mask and values (d_out, d_in), from the Gram matrix (d_in, d_in) of the inputs."""


class RemovedUnits(NamedTuple):
    """What `RemovesUnits.remove_units` makes of the projection (d_out, d_in) that reads the units."""

    keep: Tensor  # bool (n_units,)
    values: Tensor  # float32 (d_out, d_in), zero in the columns of units that left
    n_near_ties: int  # units that stay and that another machine's rounding might take instead


@runtime_checkable
class RemovesUnits(Criterion, Protocol):
    """A criterion that chooses the units that a projection reads, and gives new values to the columns that stay."""

    dense_target: bool  # aim at the dense model's outputs

    def remove_units(
        self, matrix: Tensor, gram: Tensor, columns: Tensor, there: Tensor, n_leaving: int
    ) -> RemovedUnits:
        """What stays of the units `there` (n_units,), whose inputs are `columns` (n_units, width)."""


def mean_by_unit(model: nn.Module, site: Site, of: Callable[[str, Tensor], Tensor]) -> Tensor:
    """The mean of `of(parameter name, parameter)`, elementwise, over all entries of each unit: float64 (n_units,).

    For heads and neurons over every slice that leaves together, biases in; for layers and their parts over all parameters.
    """
    if site.branches:
        held = [
            [of(name, model.get_parameter(name)).double().reshape(-1).cpu() for name in b.parameters]
            for b in site.branches
        ]
        return torch.stack([torch.cat(values).mean() for values in held])
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
    for name, tensor, piece in _slices(model, site):
        values = of(name, tensor).double()
        total += sum_of_slice(site, piece, values).cpu()
        n_entries += values.numel() // values.shape[piece.dim] * piece.entries_per_unit
    return total / n_entries


def sum_of_slice(site: Site, piece: TensorSlice, values: Tensor) -> Tensor:
    """The sum over the entries of each unit in `values`, of the shape of the tensor that `piece` is of: (n_units,)."""
    other = [dim for dim in range(values.dim()) if dim != piece.dim]
    along = values.sum(other) if other else values  # (entries along dim,)
    return torch.stack([_by_unit(site, span, along) for span in piece.spans]).sum(0)


def squared_columns(model: nn.Module, site: Site, read: Read) -> Tensor:
    """|W_out[:, j]|² for each input j of the output projection that reads a site's units: float64 (d_in,)."""
    weight = weight_of(model.get_submodule(read.module))
    return weight.detach().double().square().sum(1 - output_slice(site, read).dim).cpu()


def sum_by_unit(site: Site, read: Read, values: Tensor) -> Tensor:
    """(d_in,) by input of the output projection -> (n_units,): the sum over each unit's entries."""
    return _by_unit(site, read.span, values)


def no_weights(name: str) -> RecipeError:
    """The error of a criterion that scores units only."""
    return RecipeError(f"criterion {name} is not defined for weights")


def _by_unit(site: Site, span: Span, along: Tensor) -> Tensor:
    inside = along.narrow(0, span.start, site.n_units * span.width)
    return inside.reshape(site.n_units, span.width).sum(1)


def _slices(model: nn.Module, site: Site) -> Iterator[tuple]:
    for piece in site.slices:
        if is_parameter(model, piece):
            yield piece.name, getattr(model.get_submodule(piece.module), piece.tensor).detach(), piece
