"""Refit of a projection in closed form.

Axes, by token: a (n,) the projection's inputs, y (d_out,) what it should put out, e = y - W a what it lacks of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_prune.calibration.recorders import at_least_float32
from hf_prune.calibration.reduction import sum_over_processes
from hf_prune.criteria.support import solve_on_support
from hf_prune.errors import CalibrationError


# ridge as a multiple of each input's own mean square (the Gram matrix' diagonal), since a few inputs are far larger than the
# others and one ridge for all would hold those still; the least is for what can be made up for exactly
RIDGES = (1e-12, 1e-3, 1e-2, 1e-1, 0.3, 1.0, 3.0)
RIDGE_WITHOUT_TEST = 1e-2
RESTRICTED_STEPS = 50  # of the conjugate gradient, where single weights are gone
GRAM_ROWS = 128  # of a Gram matrix at a time
TEST_EVERY = 5  # of the calibration batches every fifth chooses the ridge


@dataclass
class Moments:
    """Sums over tokens, float64: `gram` of a aᵀ (n, n), `cross` of y aᵀ or e aᵀ (d_out, n), `n_tokens`.

    While batches are added `gram` grows on and above its diagonal alone; `reduce_` makes it whole.
    """

    gram: Tensor
    cross: Tensor
    n_tokens: int = 0

    @classmethod
    def zeros(cls, n: int, d_out: int, device: torch.device | None = None) -> Moments:
        options = {"dtype": torch.float64, "device": device}
        return cls(torch.zeros(n, n, **options), torch.zeros(d_out, n, **options))  # type: ignore[arg-type]

    def add_(self, inputs: Tensor, outputs: Tensor) -> None:
        """One batch: `inputs` (n_tokens, n), y or e (n_tokens, d_out); products in float32 or better."""
        inputs, outputs = at_least_float32(inputs), at_least_float32(outputs)
        add_gram_(self.gram, inputs)
        self.cross += outputs.T @ inputs
        self.n_tokens += len(inputs)

    def lacking(self, matrix: Tensor) -> Moments:
        """From y to e, of the W that is there, (d_out, n): Σ e aᵀ = Σ y aᵀ - W Σ a aᵀ, which takes no pass over the tokens."""
        return Moments(self.gram, self.cross - matrix.double() @ self.gram, self.n_tokens)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.gram + other.gram, self.cross + other.cross, self.n_tokens + other.n_tokens)

    def at(self, index: Tensor) -> Moments:
        """Of the inputs `index` alone."""
        return Moments(self.gram[index][:, index], self.cross[:, index], self.n_tokens)


def add_gram_(gram: Tensor, inputs: Tensor) -> None:
    """gram += inputsᵀ inputs, (n, n), on and above the diagonal: what is below is the same."""
    for start in range(0, len(gram), GRAM_ROWS):
        rows = slice(start, start + GRAM_ROWS)
        gram[rows, start:] += inputs[:, rows].T @ inputs[:, start:]


def _mirror_(gram: Tensor) -> None:
    """Copy what is above the diagonal to below it, a part at a time: whole transposes go across memory."""
    for start in range(0, len(gram), GRAM_ROWS):
        rows = slice(start, start + GRAM_ROWS)
        gram[rows.stop :, rows] = gram[rows, rows.stop :].T
        corner = gram[rows, rows]
        corner.copy_(corner.triu() + corner.triu(1).T)


def is_test(index: int, n_batches: int) -> bool:
    """Whether batch `index` of all processes' `n_batches` tests the ridge: every fifth, the last of fewer, never the only one."""
    if n_batches < TEST_EVERY:
        return n_batches > 1 and index == n_batches - 1
    return index % TEST_EVERY == TEST_EVERY - 1


def reduce_(moments: Sequence[Moments], module: str) -> None:
    """Sum over processes and make Gram matrices whole, in place; `module` is the one whose inputs they are of.

    Raises:
        CalibrationError: they are not finite.
    """
    counts = torch.tensor([each.n_tokens for each in moments], dtype=torch.float64)
    sum_over_processes([*(total for each in moments for total in (each.gram, each.cross)), counts])
    for each, count in zip(moments, counts.tolist(), strict=True):
        each.n_tokens = int(count)
        _mirror_(each.gram)
        if not (torch.isfinite(each.gram).all() and torch.isfinite(each.cross).all()):
            raise CalibrationError(
                f"what goes into {module} is not finite on the calibration data. Look for broken samples, or load the "
                "model in bfloat16 or float32."
            )


@dataclass(frozen=True)
class Refit:
    """`change` (d_out, n) to add to the weight; the `ridge` that was chosen, None where there was nothing to fit."""

    change: Tensor
    ridge: float | None


def refit(
    fit: Moments,
    test: Moments | None,
    ridges: Sequence[float] = RIDGES,
    *,
    n_free: int = 0,
    may_change: Tensor | None = None,
) -> Refit:
    """The change D that minimises Σ |e - D a|² + λ Σ_j G_jj |D_j|², D_j what multiplies input j: D = C (G + λ diag G)⁻¹.

    λ is the one of `ridges` whose D, fitted on `fit`, leaves least on `test`; D is then fitted on both. Changing nothing competes too. Without `test` λ is `RIDGE_WITHOUT_TEST`. Inputs that never fire get
    no change.

    Args:
        n_free: the last inputs, which the ridge leaves alone: the 1 that a bias is multiplied with.
        may_change: bool (d_out, n); the other entries of D stay zero.
    """
    n = fit.gram.shape[0] - n_free
    none = Refit(torch.zeros_like(fit.cross), None)
    both = fit if test is None else fit + test
    candidates = [RIDGE_WITHOUT_TEST]
    if test is not None and fit.gram.diagonal()[:n].mean() > 0:
        candidates, best = [], torch.zeros((), dtype=torch.float64, device=fit.gram.device)
        for ridge in ridges:
            change = _solve(fit, ridge, n)
            if change is None:
                continue
            # Σ |e - D a|² on the test tokens, less what it is for D = 0
            left = ((change @ test.gram) * change).sum() - 2 * (change * test.cross).sum()
            if left < best:
                best, candidates = left, [each for each in ridges if each >= ridge]
    for ridge in candidates:  # the next, where rounding leaves G on both parts no factor
        change = _solve(both, ridge, n)
        if change is not None and may_change is not None and not may_change.all():
            change = _restricted(change, both, ridge, n, may_change)
        if change is not None:
            return Refit(change, ridge)
    return none


def _ridged(gram: Tensor, ridge: float, n: int) -> Tensor:
    gram = gram.clone()
    diagonal = gram.diagonal()[:n]
    diagonal += torch.where(
        diagonal > 0, ridge * diagonal, 1
    )  # an input that never fires: any number, its change is 0
    return gram


def _solve(moments: Moments, ridge: float, n: int) -> Tensor | None:
    """C (G + λ diag G)⁻¹; None where no input fires, or where G is singular and the ridge too small for rounding."""
    if not moments.gram.any():
        return None
    factor, failed = torch.linalg.cholesky_ex(_ridged(moments.gram, ridge, n))
    return None if failed else torch.cholesky_solve(moments.cross.T, factor).T


def _restricted(change: Tensor, moments: Moments, ridge: float, n: int, may_change: Tensor) -> Tensor:
    """The best D on the entries that may change: the nearest to the free one, by the norm that G + λ diag G makes."""
    gram = _ridged(moments.gram, ridge, n)
    return solve_on_support(torch.zeros_like(change), change, may_change, gram, RESTRICTED_STEPS)
