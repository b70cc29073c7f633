"""The lowest of many scores."""

from __future__ import annotations

import torch
from torch import Tensor


NEAR_TIE = 1e-6  # of a score: what another machine's rounding may turn round


def lowest(score: Tensor, present: Tensor, gone: Tensor, n_removed: int) -> tuple[Tensor, int]:
    """The `n_removed` lowest of `score` (n,) among `present`, those `gone` first; ties by index; and the near-ties.

    By selection, not by sorting: linear in n.
    """
    removed = gone & present
    left = n_removed - int(removed.sum())
    candidates = present & ~removed
    if left <= 0 or not candidates.any():
        return removed, 0
    values = score[candidates]
    left = min(left, len(values))
    cut = torch.kthvalue(values, left).values
    taken = values < cut
    taken[torch.nonzero(values == cut).reshape(-1)[: left - int(taken.sum())]] = True
    removed[torch.nonzero(candidates).reshape(-1)[taken]] = True
    return removed, int((((values - cut).abs() <= NEAR_TIE * cut.abs()) & ~taken).sum())
