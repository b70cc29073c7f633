"""Greedy removal of units with an update of those that stay: the optimal brain surgeon.

Axes: W (d_out, d_in) the output projection that reads the units; G (d_in, d_in) the Gram matrix of its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_prune.calibration.statistics import Statistics
from hf_prune.criteria.base import RemovedUnits, no_weights
from hf_prune.criteria.gram import damped, require_damping
from hf_prune.criteria.selection import lowest
from hf_prune.structure.sites import Site, Target, WeightSite


AT_ONCE = 64  # of that many units one leaves at a time


@dataclass(frozen=True)
class Greedy:
    """tr W_S ([H⁻¹]_SS)⁻¹ W_Sᵀ, S the columns of a unit: by how much the output changes at least if it leaves, all others
    making up for it as well as they can. The lowest leaves, they make up for it, and so on (ZipLM, Kurtic et al. 2023, after
    Hassibi & Stork 1993).

    Of many units 1/64 leave at a time; the paper takes one. H is G with a ridge.

    Args:
        damping: the ridge, as a fraction of the mean diagonal of G.
        dense_target: aim at the dense model's outputs, not at the projection's own on the inputs that it now gets.
    """

    damping: float = 0.01
    dense_target: bool = False
    loss_units: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_damping("greedy", self.damping)

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset()

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        raise AssertionError("greedy chooses block by block; see `remove_units`")

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        raise no_weights("greedy")

    def remove_units(
        self, matrix: Tensor, gram: Tensor, columns: Tensor, there: Tensor, n_leaving: int
    ) -> RemovedUnits:
        """Which units stay, and what the projection then is.

        Args:
            matrix: (d_out, d_in).
            gram: (d_in, d_in), float64.
            columns: (n_units, width), the inputs that each unit makes.
            there: bool (n_units,): the units that may be kept.
            n_leaving: how many of them leave.

        Raises:
            CalibrationError: the Gram matrix is singular in spite of its ridge.
        """
        n_units = len(columns)
        hessian = damped(gram, self.damping, "greedy")
        inverse, dead = hessian.inverse(), hessian.dead
        values = matrix.double().clone()
        values[:, columns[~there].reshape(-1)] = 0.0
        original = values.clone()
        values[:, dead] = 0.0  # what never fires changes nothing
        keep, n_near_ties = there.clone(), 0
        _eliminate_(values, inverse, columns[~there].reshape(-1))
        n_left = min(n_leaving, int(there.sum()))
        while n_left > 0:
            own = values[:, columns]  # (d_out, n_units, width)
            squares = torch.einsum("ouv,ouw->uvw", own, own)
            blocks = inverse[columns[:, :, None], columns[:, None, :]]  # (n_units, width, width)
            score = (torch.linalg.inv(blocks) * squares).sum((1, 2))
            leaving, near = lowest(score, keep, torch.zeros_like(keep), min(n_left, max(1, n_units // AT_ONCE)))
            n_near_ties, n_left = n_near_ties + near, n_left - int(leaving.sum())
            _eliminate_(values, inverse, columns[leaving].reshape(-1))
            keep &= ~leaving
        values = torch.where(dead, original, values)
        values[:, columns[~keep].reshape(-1)] = 0.0
        return RemovedUnits(keep, values.float(), n_near_ties)


def _eliminate_(values: Tensor, inverse: Tensor, columns: Tensor) -> None:
    """Take `columns` out of W and of H⁻¹, in place: the other columns make up for what they did."""
    if not len(columns):
        return
    handed = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
    values -= values[:, columns] @ handed
    inverse -= inverse[:, columns] @ handed
    values[:, columns] = 0.0
    inverse[columns] = 0.0
    inverse[:, columns] = 0.0
    inverse[columns, columns] = 1.0
