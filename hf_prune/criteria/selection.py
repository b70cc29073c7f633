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
    n_candidates = int(candidates.sum())
    if left <= 0 or not n_candidates:
        return removed, 0
    values = score if n_candidates == len(score) else score[candidates]
    left = min(left, n_candidates)
    cut = _kth(values[None], left)[0]
    taken = values < cut
    taken[torch.nonzero(values == cut).reshape(-1)[: left - int(taken.sum())]] = True
    removed[candidates] |= taken
    return removed, int((((values - cut).abs() <= NEAR_TIE * cut.abs()) & ~taken).sum())


def _kth(values: Tensor, count: int) -> Tensor:
    """(rows, n) -> (rows, 1), the `count`-th lowest of each row."""
    if values.device.type != "cpu":
        return values.kthvalue(count, dim=1, keepdim=True).values
    # NumPy's selection takes a tenth of the time of torch.kthvalue
    return torch.from_numpy(np.partition(values.numpy(), count - 1, axis=1)[:, count - 1 : count])


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
        cut = _kth(values, count)
        taken, equal = values < cut, (values == cut) & there
        ties = count - taken.sum(1, keepdim=True)
        tied = torch.nonzero(equal.sum(1) > ties[:, 0]).reshape(-1)  # not all of them leave: the first do
        equal[tied] &= equal[tied].cumsum(1) <= ties[tied]
        taken |= equal
        near += int((((values - cut).abs() <= NEAR_TIE * cut.abs()) & there & ~taken).sum())
        removed[rows] |= taken
    return removed, near
