"""The damped Gram matrix of a projection's inputs, and its inverse: what takes the place of the Hessian.

Axes: G (d_in, d_in), Σ a aᵀ over tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_prune.errors import CalibrationError, RecipeError


SMALL = 192  # a triangular matrix of as many rows is inverted at once


@dataclass(frozen=True)
class Damped:
    """G with a ridge (float64), and which inputs never fire: bool (d_in,)."""

    gram: Tensor
    dead: Tensor
    damping: float
    criterion: str

    def inverse(self) -> Tensor:
        """(d_in, d_in), float64.

        Raises:
            CalibrationError: the ridge is too small for the Gram matrix.
        """
        return self._of_factor(self.gram, torch.cholesky_inverse)

    def inverse_factor(self) -> Tensor:
        """The upper triangular U of the inverse UᵀU, float64; at two thirds of the work of making the inverse first.

        Raises:
            CalibrationError: the ridge is too small for the Gram matrix.
        """
        # with rows and columns in reverse order L Lᵀ is R Rᵀ, R upper triangular: U is R⁻¹
        return self._of_factor(self.gram.flip(0, 1), _inverse_of_lower).flip(0, 1)

    def _of_factor(self, gram: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        try:
            return of(torch.linalg.cholesky(gram))
        except torch.linalg.LinAlgError as error:
            raise CalibrationError(
                f"the Gram matrix of the {len(gram)} inputs is singular with damping {self.damping}; give more calibration "
                f"data, or a larger damping of criterion {self.criterion}, such as 0.01"
            ) from error


def require_damping(criterion: str, damping: float) -> None:
    """Refuse a ridge that is none."""
    if not damping > 0:
        raise RecipeError(f"damping of criterion {criterion} is {damping}; expected a number above 0, such as 0.01")


def damped(gram: Tensor, damping: float, criterion: str) -> Damped:
    """With a ridge of `damping` times the mean diagonal; where an input never fires the mean stands for its square."""
    ridged = gram.double().clone()
    dead = ridged.diagonal() <= 0
    scale = ridged.diagonal()[~dead].mean() if not dead.all() else 1.0
    ridged.diagonal()[dead] = scale
    ridged.diagonal().add_(damping * scale)
    return Damped(ridged, dead, damping, criterion)


def _inverse_of_lower(lower: Tensor) -> Tensor:
    """L⁻¹ by halves, a third of the work of solving for the identity."""
    n = len(lower)
    if n <= SMALL:
        return torch.linalg.solve_triangular(lower, torch.eye(n, dtype=lower.dtype, device=lower.device), upper=False)
    half = n // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = _inverse_of_lower(lower[:half, :half])
    inverse[half:, half:] = _inverse_of_lower(lower[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half])
    return inverse
