"""Which single weights leave: unstructured, N:M groups, blocks.

Axes: a weight seen as (rows, columns) = (d_out, d_in), a product sums over the columns; Conv1D is transposed for it, and a
convolution's columns are its inputs, each with its kernel's entries one after the other. Rows and columns of removed units
are left out first: groups and blocks are those of the matrix that stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_prune.allocation.choice import Choice
from hf_prune.allocation.compare import cut_of, normalised
from hf_prune.allocation.room import Allocate, Room, apportioned, bounds_of, by_scope, check_floors, share_for
from hf_prune.criteria.selection import lowest, lowest_by_row
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
    as_they_are: bool = True,
    allocate: Allocate | None = None,
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
        as_they_are: scores compare between matrices without normalising.
        allocate: who competes, and how much leaves; by the step's scope if None.

    Raises:
        RecipeError: a size that N:M or the block does not divide, by name.
    """
    choice = Choice({})
    seen = {}
    for site in sites:
        there = eligible[site.name] if present is None else present[site.name]
        seen[site.key] = _Seen(site, step.pattern, there)
        gone = removed_before.get(site.name)
        notes = choice.notes if progress < 1 or gone is not None else None
        score = scores[site.name]
        if step.scope == "global":
            score = normalised(score, eligible[site.name], step, as_they_are)
        seen[site.key].look(score, eligible[site.name], gone, notes)
        seen[site.key].bound(step, progress)
    room = _room(step, sites, {key: each.n_present for key, each in seen.items()}, allocate is not None)
    pools = allocate(room) if allocate else by_scope(room, "global" if step.scope == "global" else "layer")
    members = [[seen[site.key] for site in pool.sites] for pool in pools]
    if allocate:
        whole = apportioned(
            [progress * pool.amount for pool in pools],
            [sum(max(each.least, each.n_gone) for each in pool) for pool in members],
            [sum(max(each.limit, each.n_gone) for each in pool) for pool in members],
        )
    else:
        whole = [round(progress * _share(step) * sum(each.n_present for each in pool)) for pool in members]
    for pool, each, n in zip(pools, members, whole, strict=True):
        if step.scope == "output":
            share = pool.amount / (each[0].n_present or 1) if allocate else _share(step)
            _choose_rows(step, each[0], share, progress, choice)
        else:
            _choose(step, each, n, progress, choice)
    choice.keep = {each.site.name: each.keep() for each in seen.values()}
    return choice


def count_weights(
    step: Any,
    sites: Sequence[WeightSite],
    eligible: Mapping[str, Tensor],
    removed_before: Mapping[str, Tensor],
    *,
    progress: float,
    allocate: Allocate | None = None,
) -> dict[str, int]:
    """By parameter name, how many entries are to be out by then, for a method that chooses which by itself.

    Raises:
        RecipeError: floors or shares that can't be.
    """
    there = {site.key: int(eligible[site.name].sum()) for site in sites}
    room = _room(step, sites, there, allocate is not None)
    pools = allocate(room) if allocate else by_scope(room, "layer")
    out = {
        site.key: int((removed_before[site.name] & eligible[site.name]).sum()) if site.name in removed_before else 0
        for site in sites
    }
    of = [pool.sites[0] for pool in pools]
    most = [max(out[site.key], int(room.most[site.key])) for site in of]
    if allocate:
        counts = apportioned([progress * pool.amount for pool in pools], [out[site.key] for site in of], most)
    else:
        counts = [round(progress * _share(step) * there[site.key]) for site in of]
    return {site.name: min(n, limit) for site, n, limit in zip(of, counts, most, strict=True)}


def _room(step: Any, sites: Sequence[WeightSite], there: Mapping[str, int], is_allocated: bool) -> Room:
    """What may leave, in entries or in what leaves together."""
    sizes = {key: float(n) for key, n in there.items()}
    bounds = {site.key: _bounds(step, site, there[site.key]) for site in sites}
    least, most = ({key: float(pair[end]) for key, pair in bounds.items()} for end in (0, 1))
    room = Room(sites, sizes, least, most, _share(step) * sum(sizes.values()), dict.fromkeys(sizes, 1.0))
    if step.pattern.kind != "n_m":
        check_floors(step, room, is_each_by_itself=not is_allocated and step.scope != "global")
    return room


def _share(step: Any) -> float:
    """Of what leaves together, how much; of N:M all groups."""
    return 1.0 if step.pattern.kind == "n_m" else step.sparsity or 0.0


def _bounds(step: Any, site: WeightSite, n_there: int) -> tuple[int, int]:
    """How many of what leaves together have to, and may: no weight is emptied. An N:M group keeps its N."""
    return (0, n_there) if step.pattern.kind == "n_m" else bounds_of(step, site, n_there)


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

        self.n_present, self.n_gone = int(self.present.sum()), int(self.gone.sum())

    def bound(self, step: Any, progress: float) -> None:
        """How many have to leave by now, and may at most."""
        least, self.limit = _bounds(step, self.site, self.n_present)
        self.ceiling = share_for(step.max_sparsity, self.site, 1.0)
        self.least = int(progress * least)  # on the way of a schedule the floor rises too
        if step.scope == "global" and self.least > self.n_gone:  # the lowest of them leave in any case
            self.gone = _lowest_of(self, self.least)
            self.n_gone = int(self.gone.sum())

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
        return tensor.t() if self.transposed else tensor.flatten(1)

    def _compact(self, tensor: Tensor) -> Tensor:
        """(d_out, d_in) or (d_in, d_out) -> (rows, columns) that are there."""
        return self._turned(tensor)[self.rows[:, None], self.columns]

    def _grouped(self, tensor: Tensor) -> Tensor:
        """(rows, columns) -> (row groups, column groups, entries)."""
        rows, columns, height, width = self.shape
        tensor = tensor[: rows * height, : columns * width].reshape(rows, height, columns, width)
        return tensor.transpose(1, 2).reshape(rows, columns, height * width)


def _choose(step: Any, pool: Sequence[_Seen], n_asked: int, progress: float, choice: Choice) -> None:
    """The lowest of a pool: so many, or those below a threshold."""
    score = torch.cat([each.score.reshape(-1) for each in pool])
    present = torch.cat([each.present.reshape(-1) for each in pool])
    asked = n_asked if step.threshold is None else _n_below(step, score, present, progress)
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
        full = [each for each in left if int(each.removed.sum()) > max(each.limit, each.n_gone)]
        if not full:
            choice.n_near_ties += near
            break
        for each in full:  # as many as may leave it, and the others make up for the rest
            each.removed = _lowest_of(each, each.limit)
            wanted -= int(each.removed.sum())
        left = [each for each in left if each not in full]
    achieved = sum(int(each.removed.sum()) for each in pool)
    if achieved < asked:
        choice.notes.append(f"{_name(pool)}: {asked} were to leave, {achieved} could ({_limits(step)})")


def _choose_rows(step: Any, each: _Seen, share: float, progress: float, choice: Choice) -> None:
    """Each output by itself."""
    if step.threshold is not None:
        asked = [_n_below(step, *row, progress) for row in zip(each.score, each.present, strict=True)]
    else:
        asked = [round(progress * min(share, each.ceiling) * n) for n in each.present.sum(1).tolist()]
    each.removed, near = lowest_by_row(each.score, each.present, each.gone, torch.tensor(asked, dtype=torch.int64))
    choice.n_near_ties += near
    if step.threshold is not None and not each.removed.any():
        choice.notes.append(f"threshold {step.threshold.rule} removes nothing from {each.site.name}")
    if share > each.ceiling:
        choice.notes.append(f"{each.site.name}: {share:.4g} were to leave each output, {each.ceiling:g} could")
    if int(each.removed.sum()) > max(each.limit, each.n_gone):
        each.removed = _lowest_of(each, each.limit)
        choice.notes.append(f"{each.site.name}: more were to leave than could ({_limits(step)})")


def _n_below(step: Any, score: Tensor, present: Tensor, progress: float) -> int:
    """How many of what is there lie below the threshold, ramped."""
    values = score[present]
    return round(progress * int((values < cut_of(step.threshold, values)).sum())) if len(values) else 0


def _limits(step: Any) -> str:
    return f"each weight keeps at least one, max_sparsity {step.max_sparsity}"


def _lowest_of(each: _Seen, n_removed: int) -> Tensor:
    removed, _ = lowest(each.score.reshape(-1), each.present.reshape(-1), each.gone.reshape(-1), n_removed)
    return removed.reshape(each.removed.shape)


def _name(pool: Sequence[_Seen]) -> str:
    return pool[0].site.name if len(pool) == 1 else f"{len(pool)} weights"
