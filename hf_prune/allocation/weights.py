"""Which single weights leave: unstructured, N:M groups, blocks.

Axes: a weight seen as (rows, columns) = (d_out, d_in), a product sums over the columns; Conv1D is transposed for it. Rows
and columns of removed units are left out first: groups and blocks are those of the matrix that stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_prune.allocation.choice import Choice
from hf_prune.allocation.units import cut_of
from hf_prune.criteria.selection import lowest
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
    present: Mapping[str, Tensor] | None = None,
) -> Choice:
    """Keep-masks by parameter name, of the weights' shapes.

    Args:
        step: of the recipe; its pattern says what leaves together.
        sites: the weights that the step is about.
        scores: by name, float32 of the weight's shape.
        eligible: by name, False for entries that earlier steps removed: they don't count and aren't touched.
        removed_before: by name, entries that an earlier update of this step removed; they stay out.
        progress: the part of the final sparsity to reach now, in (0, 1].
        present: by name, False for the rows and columns of removed units and for dropped layers; all there if None.

    Raises:
        RecipeError: a size that N:M or the block does not divide, by name.
    """
    choice = Choice({})
    seen = {}
    for site in sites:
        there = eligible[site.name] if present is None else present[site.name]
        seen[site.name] = _Seen(site, step.pattern, there)
        gone = removed_before.get(site.name)
        notes = choice.notes if progress < 1 or gone is not None else None
        seen[site.name].look(scores[site.name], eligible[site.name], gone, notes)
    pools = [list(seen.values())] if step.scope == "global" else [[each] for each in seen.values()]
    for pool in pools:
        if step.scope == "output":
            _choose_rows(step, pool[0], progress, choice)
        else:
            _choose(step, pool, progress, choice)
    choice.keep = {name: each.keep() for name, each in seen.items()}
    return choice


class _Seen:
    """One weight as (row groups, column groups) of what leaves together, with a score for each."""

    def __init__(self, site: WeightSite, pattern: Any, present: Tensor):
        self.site, self.pattern = site, pattern
        self.transposed = site.reduction_dim == 0
        there = self._turned(present)
        self.rows = torch.nonzero(there.any(1)).reshape(-1)
        self.columns = torch.nonzero(there.any(0)).reshape(-1)

    def look(self, scores: Tensor, eligible: Tensor, gone: Tensor | None, notes: list[str] | None) -> None:
        """Group what is there. Groups that an earlier update removed stay removed.

        A size that isn't divided is refused; on the way of a schedule, where units still leave, it goes to `notes`.
        """
        score, there = self._compact(scores.float()), self._compact(eligible)
        out = self._compact(gone) & there if gone is not None else torch.zeros_like(there)
        rows, columns = score.shape
        height, width = self._sides()
        if rows % height or columns % width:
            self._refuse_or_note(height, width, notes)
        # on the way of a schedule, what is left over stays whole
        self.shape = (rows // height, columns // width, height, width)
        score, there, out = (self._grouped(tensor) for tensor in (score, there, out))
        if self.pattern.kind == "n_m":
            # of each group the m - n lowest leave: those that are out already, then by score; stable: ties by index
            order = torch.argsort(score.masked_fill(~there | out, -torch.inf), dim=-1, stable=True)
            n_leaving = self.pattern.m - self.pattern.n
            lowest = torch.zeros_like(there).scatter_(-1, order[..., :n_leaving], True)
            self.members = lowest & there
            self.score = score.masked_fill(~self.members | out, 0.0).sum(-1)  # what a group loses
        else:
            self.members = there
            self.score = score.masked_fill(~there, 0.0).sum(-1) / there.sum(-1).clamp(min=1)
        self.present = self.members.any(-1)
        self.gone = (out | ~self.members).all(-1) & self.present
        self.removed = torch.zeros_like(self.present)

    @property
    def limit(self) -> int:
        """How many groups may leave: no weight is emptied. An N:M group keeps its N."""
        n_present = int(self.present.sum())
        return n_present if self.pattern.kind == "n_m" else max(0, n_present - 1)

    def keep(self) -> Tensor:
        """The keep-mask in the weight's own shape."""
        rows, columns, height, width = self.shape
        gone = (self.removed[..., None] & self.members).reshape(rows, columns, height, width).transpose(1, 2)
        keep = torch.ones(self.site.shape, dtype=torch.bool)
        grouped_rows, grouped_columns = self.rows[: rows * height], self.columns[: columns * width]
        self._turned(keep)[grouped_rows[:, None], grouped_columns] = ~gone.reshape(rows * height, columns * width)
        return keep

    def _sides(self) -> tuple[int, int]:
        if self.pattern.kind == "n_m":
            return 1, self.pattern.m
        return self.pattern.block if self.pattern.kind == "block" else (1, 1)

    def _refuse_or_note(self, height: int, width: int, notes: list[str] | None) -> None:
        rows, columns = len(self.rows), len(self.columns)
        left = "" if (rows, columns) == tuple(self._turned(torch.empty(self.site.shape)).shape) else " that are left"
        what = (
            f"{self.site.name}: {self.pattern.m} of {self.pattern.n}:{self.pattern.m} does not divide its {columns} "
            f"inputs{left}"
            if self.pattern.kind == "n_m"
            else f"{self.site.name}: blocks of {height} x {width} don't divide its {rows} outputs x {columns} inputs{left}"
        )
        if not left or notes is None:
            raise RecipeError(f"{what}; exclude it{f', or give the steps before round_to: {width}' if left else ''}")
        notes.append(f"{what}; the rest stays whole. Give the steps before round_to: {width}")

    def _turned(self, tensor: Tensor) -> Tensor:
        return tensor.t() if self.transposed else tensor

    def _compact(self, tensor: Tensor) -> Tensor:
        """(d_out, d_in) or (d_in, d_out) -> (rows, columns) that are there."""
        return self._turned(tensor)[self.rows[:, None], self.columns]

    def _grouped(self, tensor: Tensor) -> Tensor:
        """(rows, columns) -> (row groups, column groups, entries)."""
        rows, columns, height, width = self.shape
        tensor = tensor[: rows * height, : columns * width].reshape(rows, height, columns, width)
        return tensor.transpose(1, 2).reshape(rows, columns, height * width)


def _choose(step: Any, pool: Sequence[_Seen], progress: float, choice: Choice) -> None:
    score = torch.cat([each.score.reshape(-1) for each in pool])
    present = torch.cat([each.present.reshape(-1) for each in pool])
    asked = _asked(step, score, present, progress)
    if step.threshold is not None and not asked:
        choice.notes.append(f"threshold {step.threshold.rule} removes nothing from {_name(pool)}")
    left, wanted = list(pool), asked
    while left:
        gone = torch.cat([each.gone.reshape(-1) for each in left])
        score = torch.cat([each.score.reshape(-1) for each in left])
        present = torch.cat([each.present.reshape(-1) for each in left])
        removed, near = lowest(score, present, gone, wanted)
        parts = removed.split([each.removed.numel() for each in left])
        for each, part in zip(left, parts, strict=True):
            each.removed = part.reshape(each.removed.shape)
        full = [each for each in left if int(each.removed.sum()) > max(each.limit, int(each.gone.sum()))]
        if not full:
            choice.n_near_ties += near
            break
        for each in full:  # as many as may leave it, and the others make up for the rest
            each.removed = _lowest_of(each, each.limit)
            wanted -= int(each.removed.sum())
        left = [each for each in left if each not in full]
    achieved = sum(int(each.removed.sum()) for each in pool)
    if achieved < asked:
        choice.notes.append(f"{_name(pool)}: {asked} were to leave, {achieved} could; each weight keeps at least one")


def _choose_rows(step: Any, each: _Seen, progress: float, choice: Choice) -> None:
    """Each output by itself."""
    for row in range(each.score.shape[0]):
        score, present = each.score[row], each.present[row]
        asked = _asked(step, score, present, progress)
        each.removed[row], near = lowest(score, present, each.gone[row], asked)
        choice.n_near_ties += near
    if step.threshold is not None and not each.removed.any():
        choice.notes.append(f"threshold {step.threshold.rule} removes nothing from {each.site.name}")
    if int(each.removed.sum()) > max(each.limit, int(each.gone.sum())):
        each.removed = _lowest_of(each, each.limit)
        choice.notes.append(f"{each.site.name}: all were to leave; it keeps one")


def _asked(step: Any, score: Tensor, present: Tensor, progress: float) -> int:
    """How many groups are to leave now; halves to even."""
    n_present = int(present.sum())
    if not n_present:
        return 0
    if step.pattern.kind == "n_m":
        return round(progress * n_present)
    if step.threshold is not None:
        values = score[present]
        return round(progress * int((values < cut_of(step.threshold, values)).sum()))
    return round(progress * step.sparsity * n_present)


def _lowest_of(each: _Seen, n_removed: int) -> Tensor:
    removed, _ = lowest(each.score.reshape(-1), each.present.reshape(-1), each.gone.reshape(-1), n_removed)
    return removed.reshape(each.removed.shape)


def _name(pool: Sequence[_Seen]) -> str:
    return pool[0].site.name if len(pool) == 1 else f"{len(pool)} weights"
