"""The damped Gram matrix of a projection's inputs, and its inverse: what takes the place of the Hessian.

Axes: G (d_in, d_in), Σ a aᵀ over tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_prune.errors import CalibrationError, RecipeError


class Damped(NamedTuple):
    """G with a ridge, its inverse (both float64), and which inputs never fire: bool (d_in,)."""

    gram: Tensor
    inverse: Tensor
    dead: Tensor


def require_damping(criterion: str, damping: float) -> None:
    """Refuse a ridge that is none."""
    if not damping > 0:
        raise RecipeError(f"damping of criterion {criterion} is {damping}; expected a number above 0, such as 0.01")


def damped(gram: Tensor, damping: float, criterion: str) -> Damped:
    """With a ridge of `damping` times the mean diagonal; where an input never fires the mean stands for its square.

    Raises:
        CalibrationError: the ridge is too small for the Gram matrix.
    """
    ridged = gram.double().clone()
    dead = ridged.diagonal() <= 0
    scale = ridged.diagonal()[~dead].mean() if not dead.all() else 1.0
    ridged.diagonal()[dead] = scale
    ridged.diagonal().add_(damping * scale)
    try:
        return Damped(ridged, torch.cholesky_inverse(torch.linalg.cholesky(ridged)), dead)
    except torch.linalg.LinAlgError as error:
        raise CalibrationError(
            f"the Gram matrix of the {len(gram)} inputs is singular with damping {damping}; give more calibration data, or "
            f"a larger damping of criterion {criterion}, such as 0.01"
        ) from error
