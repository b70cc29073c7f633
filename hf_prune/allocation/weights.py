"""Which single weights leave: unstructured, N:M groups, blocks.

Axes: a weight seen as (rows, columns) = (d_out, d_in), a product sums over the columns; Conv1D is transposed for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_prune.allocation.choice import Choice
from hf_prune.allocation.units import NEAR_TIE, cut_of
from hf_prune.errors import RecipeError
from hf_prune.structure.sites import WeightSite


def choose_weights(
    step: Any,
    sites: Sequence[WeightSite],
    scores: Mapping[str, Tensor],
    eligible: Mapping[str, Tensor],
    removed_before: Mapping[str, Tensor],
    *,
    progress: float,
) -> Choice:
    """Keep-masks by parameter name, of the weights' shapes.

    Args:
        step: of the recipe; its pattern says what leaves together.
        sites: the weights that the step is about.
        scores: by name, float32 of the weight's shape.
        eligible: by name, False for entries that earlier steps removed: they don't count and aren't touched.
        removed_before: by name, entries that an earlier update of this step removed; they stay out.
        progress: the part of the final sparsity to reach now, in (0, 1].

    Raises:
        RecipeError: a size that N:M or the block does not divide, by name.
    """
    seen = {site.name: _Seen(site, step.pattern, scores, eligible, removed_before) for site in sites}
    choice = Choice({})
    pools = [list(seen.values())] if step.scope == "global" else [[each] for each in seen.values()]
    for pool in pools:
        if step.scope == "output":
            _choose_rows(step, pool[0], progress, choice)
        else:
            _choose(step, pool, progress, choice)
    choice.keep = {name: each.keep() for name, each in seen.items()}
    return choice


class _Seen:
    """One weight as (rows, groups) of what leaves together, with a score and a price (entries) for each group."""

    def __init__(self, site: WeightSite, pattern: Any, scores: Mapping, eligible: Mapping, before: Mapping):
        self.site, self.pattern = site, pattern
        self.transposed = site.reduction_dim == 0
        score = self._rows(scores[site.name].float())
        there = self._rows(eligible[site.name])
        gone = self._rows(before.get(site.name, torch.zeros(site.shape, dtype=torch.bool))) & there
        rows, columns = score.shape
        if pattern.kind == "n_m":
            n, m = pattern.n, pattern.m
            if columns % m:
                raise RecipeError(f"{site.name}: {m} of {n}:{m} does not divide its {columns} inputs; exclude it")
            groups = score.masked_fill(~there, torch.inf).reshape(rows, columns // m, m)
            # of each group the m - n lowest leave; stable, so that ties fall by index
            order = torch.argsort(groups, dim=-1, stable=True)
            lowest = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., : m - n], True)
            self.members = lowest.reshape(rows, columns) & there
            self.members |= gone
            self.shape = (rows, columns // m, 1, m)
            kept_elsewhere = groups.masked_fill(~self.members.reshape(groups.shape), 0.0)
            self.score = kept_elsewhere.masked_fill(torch.isinf(kept_elsewhere), 0.0).sum(-1)  # what a group loses
        else:
            height, width = pattern.block if pattern.kind == "block" else (1, 1)
            if rows % height or columns % width:
                raise RecipeError(
                    f"{site.name}: blocks of {height} x {width} don't divide its {rows} outputs x {columns} inputs; "
                    "exclude it or choose another block"
                )
            self.members = there
            self.shape = (rows // height, columns // width, height, width)
            weighted = self._grouped(score.masked_fill(~there, 0.0)).sum(-1)
            self.score = weighted / self._grouped(there).sum(-1).clamp(min=1)
        self.present = self._grouped(there).any(-1)
        self.gone = self._grouped(gone).any(-1)
        self.removed = torch.zeros_like(self.present)

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor.t() if self.transposed else tensor

    def _grouped(self, tensor: Tensor) -> Tensor:
        """(d_out, d_in) -> (row groups, column groups, entries)."""
        rows, columns, height, width = self.shape
        return tensor.reshape(rows, height, columns, width).transpose(1, 2).reshape(rows, columns, height * width)

    def keep(self) -> Tensor:
        """The keep-mask in the weight's own shape."""
        rows, columns, height, width = self.shape
        gone = self.removed[..., None].expand(-1, -1, height * width).reshape(rows, columns, height, width)
        gone = gone.transpose(1, 2).reshape(rows * height, columns * width) & self.members
        return ~self._rows(gone).contiguous()


def _choose(step: Any, pool: Sequence[_Seen], progress: float, choice: Choice) -> None:
    score = torch.cat([each.score.reshape(-1) for each in pool])
    present = torch.cat([each.present.reshape(-1) for each in pool])
    gone = torch.cat([each.gone.reshape(-1) for each in pool])
    n_present = int(present.sum())
    if step.pattern.kind == "n_m":
        n_removed = round(progress * n_present)
    elif step.threshold is not None:
        values = score[present]
        below = int((values < cut_of(step.threshold, values)).sum())
        if below == 0:
            name = pool[0].site.name if len(pool) == 1 else f"{len(pool)} weights"
            choice.notes.append(f"threshold {step.threshold.rule} removes nothing from {name}")
        n_removed = round(progress * below)
    else:
        n_removed = round(progress * step.sparsity * n_present)
    removed, near = lowest(score, present, gone, n_removed)
    choice.n_near_ties += near
    for each, part in zip(pool, removed.split([each.removed.numel() for each in pool]), strict=True):
        each.removed = part.reshape(each.removed.shape)


def _choose_rows(step: Any, each: _Seen, progress: float, choice: Choice) -> None:
    """Each output by itself."""
    for row in range(each.score.shape[0]):
        score, present = each.score[row], each.present[row]
        n_present = int(present.sum())
        if not n_present:
            continue
        if step.pattern.kind == "n_m":
            n_removed = round(progress * n_present)
        elif step.threshold is not None:
            values = score[present]
            n_removed = round(progress * int((values < cut_of(step.threshold, values)).sum()))
        else:
            n_removed = round(progress * step.sparsity * n_present)
        each.removed[row], near = lowest(score, present, each.gone[row], n_removed)
        choice.n_near_ties += near
    if step.threshold is not None and not each.removed.any():
        choice.notes.append(f"threshold {step.threshold.rule} removes nothing from {each.site.name}")


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
    below = values < cut
    ties = torch.nonzero(values == cut).reshape(-1)[: left - int(below.sum())]
    taken = below
    taken[ties] = True
    near = int(((values - cut).abs() <= NEAR_TIE * cut.abs()).sum()) - len(ties)
    removed[torch.nonzero(candidates).reshape(-1)[taken]] = True
    return removed, max(0, near - int((below & ((cut - values) <= NEAR_TIE * cut.abs())).sum()))
