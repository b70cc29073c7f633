"""SparseGPT: choose and update together, so that a matrix's output changes least on the calibration inputs.

Axes: W (d_out, d_in); G (d_in, d_in) the Gram matrix of its inputs, Σ a aᵀ over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_prune.calibration.statistics import Statistics
from hf_prune.criteria.base import PrunedMatrix
from hf_prune.criteria.gram import damped, require_damping
from hf_prune.criteria.selection import NEAR_TIE, lowest
from hf_prune.criteria.support import solve_on_support, swap_
from hf_prune.errors import RecipeError
from hf_prune.structure.sites import Site, Target, WeightSite


@dataclass(frozen=True)
class SparseGPT:
    """Frantar & Alistarh 2023, algorithm 1: columns from left to right; the least w² / [H⁻¹]²_jj leave, block by block,
    and what is lost moves to the columns behind.

    Three differences: what is kept is solved for once more at the end, all columns at a time (`refine` steps of the
    conjugate gradient on the support: the algorithm can't go back to columns on the left); with `swaps`, entries that left
    then change places with some that stayed where that brings the outputs nearer; and H is G with a ridge.

    Args:
        block: columns that are decided together.
        damping: the ridge, as a fraction of the mean diagonal of G.
        refine: conjugate-gradient steps; 0 is the paper's algorithm.
        swaps: rounds of swaps, each solved with `refine` steps.
        dense_target: aim at the dense model's outputs, not at the matrix's own on the inputs that it now gets. Nearer to
            the dense model, at two to three times the cost.
    """

    block: int = 128
    damping: float = 0.01
    refine: int = 10
    swaps: int = 0
    dense_target: bool = False
    loss_units: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, least in (("block", 1), ("refine", 0), ("swaps", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"{name} of criterion sparsegpt is {getattr(self, name)}; expected at least {least}")
        if self.swaps and not self.refine:
            raise RecipeError("swaps of criterion sparsegpt need refine, which gives those that stay their values")
        require_damping("sparsegpt", self.damping)

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset()

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        raise RecipeError(f"criterion sparsegpt is for weights, not {site.target}")

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        raise AssertionError("sparsegpt chooses block by block; see `prune`")

    def prune(
        self, matrix: Tensor, gram: Tensor, there: Tensor, n_leaving: int, group: tuple[int, int] | None = None
    ) -> PrunedMatrix:
        """Which entries stay, their new values, and the near-ties at the cuts of all blocks or groups of columns.

        Args:
            matrix: (d_out, d_in).
            gram: (d_in, d_in), float64.
            there: bool (d_out, d_in): entries that may be kept; the others are zero already.
            n_leaving: how many entries of `there` leave; of no account with `group`.
            group: (n, m): n of every m along d_in stay.

        Raises:
            CalibrationError: the ridge is too small for the Gram matrix.
        """
        original = matrix.float().masked_fill(~there, 0.0)
        hessian = damped(gram, self.damping, "sparsegpt")
        dead = hessian.dead
        wanted = original.masked_fill(dead, 0.0)  # columns whose input never fires leave first
        keep, values, n_near = self._sweep(wanted.clone(), hessian.inverse_factor().float(), there, n_leaving, group)
        if self.refine:
            gram32 = hessian.gram.float()
            values = solve_on_support(values, wanted, keep, gram32, self.refine)
            if self.swaps:
                n_near += swap_(
                    values,
                    wanted,
                    keep,
                    there,
                    gram32,
                    hessian.inverse().float(),
                    group,
                    n_rounds=self.swaps,
                    n_steps=self.refine,
                )
        # what stays of those columns is as it was: nothing is known about it
        return PrunedMatrix(keep, torch.where(keep & dead, original, values), n_near)

    def _sweep(
        self, matrix: Tensor, factor: Tensor, there: Tensor, n_leaving: int, group: tuple[int, int] | None
    ) -> PrunedMatrix:
        """Algorithm 1. `factor` is the upper Cholesky factor of H⁻¹: row j holds what column j hands on.

        Columns lie in memory one after the other here, since they are gone through one by one.
        """
        keep, matrix = _by_column(there.clone()), _by_column(matrix)
        n_columns = matrix.shape[1]
        width = self.block if group is None else self.block // group[1] * group[1] or group[1]
        n_there = int(there.count_nonzero())
        n_seen = n_removed = n_near = 0
        for start in range(0, n_columns, width):
            stop = min(start + width, n_columns)
            columns, handed = matrix[:, start:stop], factor[start:stop, start:stop]
            scale = handed.diagonal()
            if group is None:
                n_seen += int(there[:, start:stop].count_nonzero())
                n_here = round(n_leaving * n_seen / max(1, n_there)) - n_removed
                n_removed += n_here
                score, inside = (columns / scale).square().reshape(-1), there[:, start:stop].reshape(-1)
                leaving, near = lowest(score, inside, torch.zeros_like(inside), n_here)
                n_near += near
                keep[:, start:stop] &= ~leaving.reshape(columns.shape)
            lost = torch.empty_like(columns)
            if group is None:
                torch.div(~keep[:, start:stop], scale, out=lost)
            for j in range(stop - start):
                if group is not None and j % group[1] == 0:
                    each = slice(j, j + group[1])
                    score = (columns[:, each] / scale[each]).square().masked_fill(~there[:, start:stop][:, each], -1.0)
                    ranked, order = score.sort(dim=1, stable=True)
                    n_leave = group[1] - group[0]
                    keep[:, start:stop][:, each] = keep[:, start:stop][:, each].scatter(1, order[:, :n_leave], False)
                    cut = ranked[:, n_leave - 1 : n_leave]  # -1 where nothing that was there has to leave
                    n_near += int(((ranked[:, n_leave:] - cut <= NEAR_TIE * cut) & (cut >= 0)).sum())
                    torch.div(~keep[:, start:stop][:, each], scale[each], out=lost[:, each])
                error = lost[:, j].mul_(columns[:, j])
                columns[:, j + 1 :].T.addr_(handed[j, j + 1 :], error, alpha=-1.0)
            columns.masked_fill_(~keep[:, start:stop], 0.0)
            matrix[:, stop:].addmm_(lost, factor[start:stop, stop:], alpha=-1.0)
        return PrunedMatrix(keep.contiguous(), matrix.contiguous(), n_near)


def _by_column(matrix: Tensor) -> Tensor:
    """(rows, columns), equal, with each column's entries beside each other in memory."""
    return matrix.T.contiguous().T
