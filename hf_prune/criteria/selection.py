"""The lowest of many scores."""

from __future__ import annotations

import numpy as np
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


def lowest_by_row(score: Tensor, present: Tensor, gone: Tensor, n_removed: Tensor) -> tuple[Tensor, int]:
    """`lowest` of each row of `score` (rows, n) by itself, `n_removed` (rows,) of it; rows that ask for as many at once."""
    removed = gone & present
    candidates = present & ~removed
    left = (n_removed - removed.sum(1)).clamp(min=0).minimum(candidates.sum(1))
    near = 0
    for count in torch.unique(left[left > 0]).tolist():
        rows = torch.nonzero(left == count).reshape(-1)
        there = candidates[rows]
        values = score[rows].masked_fill(~there, torch.inf)
        # NumPy's selection takes a tenth of the time of torch.kthvalue
        cut = torch.from_numpy(np.partition(values.numpy(), count - 1, axis=1)[:, count - 1 : count])
        taken, equal = values < cut, (values == cut) & there
        ties = count - taken.sum(1, keepdim=True)
        tied = torch.nonzero(equal.sum(1) > ties[:, 0]).reshape(-1)  # not all of them leave: the first do
        equal[tied] &= equal[tied].cumsum(1) <= ties[tied]
        taken |= equal
        near += int((((values - cut).abs() <= NEAR_TIE * cut.abs()) & there & ~taken).sum())
        removed[rows] |= taken
    return removed, near
