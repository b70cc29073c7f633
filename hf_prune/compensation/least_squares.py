"""Refit of a projection in closed form.

Axes: a (n,) the projection's inputs, e (d_out,) what its output lacks, both by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_prune.calibration.reduction import sum_over_processes


# ridge as a fraction of the mean diagonal of the Gram matrix
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
RIDGE_WITHOUT_TEST = 1e-2
TEST_EVERY = 5  # of the calibration batches every fifth chooses the ridge


@dataclass
class Moments:
    """Sums over tokens, float64: `gram` of a aᵀ (n, n), `cross` of e aᵀ (d_out, n), `n_tokens`."""

    gram: Tensor
    cross: Tensor
    n_tokens: int = 0

    @classmethod
    def zeros(cls, n: int, d_out: int, device: torch.device | None = None) -> Moments:
        options = {"dtype": torch.float64, "device": device}
        return cls(torch.zeros(n, n, **options), torch.zeros(d_out, n, **options))  # type: ignore[arg-type]

    def add_(self, inputs: Tensor, lacking: Tensor) -> None:
        """One batch: `inputs` (n_tokens, n), `lacking` (n_tokens, d_out); products in float32 or better."""
        inputs, lacking = _at_least_float32(inputs), _at_least_float32(lacking)
        self.gram += inputs.T @ inputs
        self.cross += lacking.T @ inputs
        self.n_tokens += len(inputs)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.gram + other.gram, self.cross + other.cross, self.n_tokens + other.n_tokens)

    def at(self, index: Tensor) -> Moments:
        """Of the inputs `index` alone."""
        return Moments(self.gram[index][:, index], self.cross[:, index], self.n_tokens)


def is_test(index: int, n_batches: int) -> bool:
    """Whether batch `index` of all processes' `n_batches` tests the ridge: every fifth, the last of fewer, never the only one."""
    if n_batches < TEST_EVERY:
        return n_batches > 1 and index == n_batches - 1
    return index % TEST_EVERY == TEST_EVERY - 1


def reduce_(moments: Sequence[Moments]) -> None:
    """Sum over processes, in place."""
    counts = torch.tensor([each.n_tokens for each in moments], dtype=torch.float64)
    sum_over_processes([*(total for each in moments for total in (each.gram, each.cross)), counts])
    for each, count in zip(moments, counts.tolist(), strict=True):
        each.n_tokens = int(count)


@dataclass(frozen=True)
class Refit:
    """`change` (d_out, n) to add to the weight; the `ridge` that was chosen, None where there was nothing to fit."""

    change: Tensor
    ridge: float | None


def refit(fit: Moments, test: Moments | None, ridges: Sequence[float] = RIDGES) -> Refit:
    """The change D that minimises Σ |e - D a|² + λ |D|²: D = C (G + λI)⁻¹.

    λ is the one of `ridges` (times the mean of G's diagonal) whose D, fitted on `fit`, leaves least on `test`; D is then
    fitted on both. Changing nothing competes too. Without `test` λ is `RIDGE_WITHOUT_TEST`. Inputs that never fire get
    no change.
    """
    both = fit if test is None else fit + test
    scale = both.gram.diagonal().mean()
    if not scale > 0:
        return Refit(torch.zeros_like(both.cross), None)
    chosen: float | None = RIDGE_WITHOUT_TEST
    if test is not None:
        best, chosen = torch.zeros((), dtype=torch.float64, device=fit.gram.device), None
        for ridge in ridges:
            change = _solve(fit, ridge)
            # Σ |e - D a|² on the test tokens, less what it is for D = 0
            left = ((change @ test.gram) * change).sum() - 2 * (change * test.cross).sum()
            if left < best:
                best, chosen = left, ridge
    if chosen is None:
        return Refit(torch.zeros_like(both.cross), None)
    return Refit(_solve(both, chosen), chosen)


def _solve(moments: Moments, ridge: float) -> Tensor:
    # in float64, and with a ridge of at least 1e-4 of the mean diagonal, the factor exists however singular G is
    gram = moments.gram.clone()
    gram.diagonal().add_(ridge * moments.gram.diagonal().mean())
    return torch.cholesky_solve(moments.cross.T, torch.linalg.cholesky(gram)).T


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
