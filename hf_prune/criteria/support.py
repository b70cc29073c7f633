"""A matrix on a support: the best values for given places, and better places.

Axes: W, X (d_out, d_in); G (d_in, d_in) a Gram matrix of inputs, with a ridge. What counts is tr (X - W) G (X - W)ᵀ, by how
much the outputs differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_prune.criteria.selection import NEAR_TIE


SHARE_SWAPPED = 0.05  # of what stays in a row, or of the groups of a matrix, at most, in the first round


def solve_on_support(start: Tensor, wanted: Tensor, keep: Tensor, gram: Tensor, n_steps: int) -> Tensor:
    """argmin over X on `keep` of tr (X - W) G (X - W)ᵀ: each row by itself, by the conjugate gradient from `start`."""
    x, diagonal = start.clone(), gram.diagonal()
    residual = ((wanted - x) @ gram).masked_fill_(~keep, 0.0)
    step = residual / diagonal
    energy = (residual * step).sum(1, keepdim=True)
    for _ in range(n_steps):
        image = (step @ gram).masked_fill_(~keep, 0.0)
        length = energy / (step * image).sum(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        x += length * step
        residual -= length * image
        scaled = residual / diagonal
        energy, before = (residual * scaled).sum(1, keepdim=True), energy
        step = scaled + energy / before.clamp(min=torch.finfo(x.dtype).tiny) * step
    return x


def swap_(
    x: Tensor,
    wanted: Tensor,
    keep: Tensor,
    there: Tensor,
    gram: Tensor,
    inverse: Tensor,
    group: tuple[int, int] | None,
    *,
    n_rounds: int,
    n_steps: int,
) -> int:
    """Better places for the entries of `x`, the best values on `keep`; both in place. As many stay in each row or group.

    An entry that left would gain at least R²_ij / G_jj, R = (W - X) G, if it came back alone; one that stays costs at least
    X²_ik / [G⁻¹]_kk. Where the gain is larger they change places, most first, and values are solved for anew. A round that
    made it worse is taken back, and the next takes half as many.

    Args:
        there: bool (d_out, d_in): entries that may be kept.
        inverse: of `gram`.
        group: (n, m): n of every m along d_in stay.
        n_rounds: how often.
        n_steps: of the conjugate gradient in each.

    Returns:
        How many pairs were so near that another machine's rounding might decide otherwise.
    """
    n_near = 0
    share, least = SHARE_SWAPPED, _lost(x, wanted, gram)
    for _ in range(n_rounds):
        gain = (((wanted - x) @ gram).square() / gram.diagonal()).masked_fill_(keep | ~there, -1.0)
        cost = (x.square() / inverse.diagonal()).masked_fill_(~keep, torch.inf)
        swapped, near = (
            _in_rows(gain, cost, keep, share) if group is None else _in_groups(gain, cost, keep, share, group)
        )
        n_near += near
        values = solve_on_support(x * swapped, wanted, swapped, gram, n_steps)
        lost = _lost(values, wanted, gram)
        if lost < least:
            least = lost
            x.copy_(values)
            keep.copy_(swapped)
        else:
            share /= 2
    return n_near


def _in_rows(gain: Tensor, cost: Tensor, keep: Tensor, share: float) -> tuple[Tensor, int]:
    """The dearest to leave out against the cheapest to keep, in each row."""
    n = max(1, int(share * keep.sum(1).double().mean()))
    gains, ins = gain.topk(min(n, gain.shape[1]), dim=1)
    costs, outs = cost.topk(min(n, cost.shape[1]), dim=1, largest=False)
    better = gains > costs
    swapped = keep.scatter(1, ins, keep.gather(1, ins) | better)
    return swapped.scatter(1, outs, keep.gather(1, outs) & ~better), _near(gains, costs)


def _in_groups(gain: Tensor, cost: Tensor, keep: Tensor, share: float, group: tuple[int, int]) -> tuple[Tensor, int]:
    """The same in each group of `group[1]` columns: one pair, and that only where it pays most."""
    shape = (len(keep), -1, group[1])
    gains, ins = gain.reshape(shape).max(-1, keepdim=True)
    costs, outs = cost.reshape(shape).min(-1, keepdim=True)
    pays = torch.where(gains > costs, gains - costs, 0.0)
    n = max(1, int(share * pays.numel()))
    better = pays > (pays.reshape(-1).kthvalue(pays.numel() - n).values if n < pays.numel() else 0.0)
    grouped = keep.reshape(shape)
    grouped = grouped.scatter(-1, ins, grouped.gather(-1, ins) | better)
    swapped = grouped.scatter(-1, outs, grouped.gather(-1, outs) & ~better)
    return swapped.reshape(keep.shape), _near(gains, costs)


def _near(gains: Tensor, costs: Tensor) -> int:
    return int(((gains - costs).abs() <= NEAR_TIE * costs).sum())


def _lost(x: Tensor, wanted: Tensor, gram: Tensor) -> float:
    """tr (X - W) G (X - W)ᵀ, summed in float64."""
    missing = x - wanted
    return float(((missing @ gram) * missing).sum(dtype=torch.float64))
