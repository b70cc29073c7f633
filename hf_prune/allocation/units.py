"""Which units leave: heads, neurons, layers. Higher scores are kept, ties fall by index, counts round half to even."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from hf_prune.allocation.choice import Choice
from hf_prune.criteria.selection import NEAR_TIE
from hf_prune.errors import RecipeError
from hf_prune.structure.cost import UnitCosts
from hf_prune.structure.sites import Site


Masks = dict[str, Tensor]


def choose_units(
    step: Any,
    sites: Sequence[Site],
    scores: Mapping[str, Tensor],
    eligible: Mapping[str, Tensor],
    removed_before: Mapping[str, Tensor],
    *,
    progress: float,
    costs: UnitCosts | None = None,
    loss_units: bool = False,
    allowed_sizes: Callable[[Sequence[Site]], Sequence[int]] | None = None,
) -> Choice:
    """Keep-masks for the sites of one step.

    Args:
        step: of the recipe.
        sites: that the step is about.
        scores: by site key, float32 (n_units,).
        eligible: by site key, True where a unit was there when the step began.
        removed_before: by site key, True where an earlier update of this step removed a unit; it stays out.
        progress: the part of the final sparsity to reach now, in (0, 1].
        costs: of the model and its units as the step finds them, for a budget.
        loss_units: scores compare between sites as they are.
        allowed_sizes: for `uniform`: the kept sizes that the stock config can say for these sites.

    Raises:
        RecipeError: a budget, size or unit number that can't be, or a site that would be emptied.
    """
    before = {
        s.key: removed_before.get(s.key, torch.zeros(s.n_units, dtype=torch.bool)) & eligible[s.key] for s in sites
    }
    if step.remove is not None:
        return Choice({key: ~gone for key, gone in _named_units(step, sites, eligible).items()})
    pools = [list(sites)] if step.scope == "global" else [[site] for site in sites]
    normalised = {
        site.key: _normalised(scores[site.key].float(), eligible[site.key], step, loss_units) for site in sites
    }
    limits = {site.key: _limit(step, int(eligible[site.key].sum())) for site in sites}
    choice = Choice({})
    if step.uniform:
        wanted = _uniform_counts(step, sites, eligible, progress, allowed_sizes, limits, choice.notes)
    budget, owed = 0.0, 0.0
    if costs is not None:
        budget = costs.total * _fraction(step.sparsity)
        most = {site.key: _dearest(costs.per_unit[site.key][eligible[site.key]], limits[site.key]) for site in sites}
        _check_reachable(step, sites, costs, most, budget)
    for pool in pools:
        ranking = _Ranking(pool, normalised, eligible, before, limits)
        if step.uniform:
            choice.keep |= ranking.keep_masks([wanted[site.key] for site in pool])
            continue
        if costs is not None:
            # each site its share; what one saved too little or too much is made up for by the next
            owed += progress * budget * sum(most[site.key] for site in pool) / (sum(most.values()) or 1.0)
            counts, saved = ranking.counts_for_cost(costs, owed)
            owed -= saved
        else:
            asked, most_of = progress * (step.sparsity or 0.0) * ranking.n_eligible, ranking.limits
            if step.threshold is not None:
                below = _n_below(step.threshold, pool, scores, eligible)
                asked = progress * sum(below)
                most_of = [min(limit, n) for limit, n in zip(ranking.limits, below, strict=True)]
                if not sum(below):
                    choice.notes.append(f"threshold {step.threshold.rule} removes nothing from {_name(pool)}")
            counts = ranking.counts_for(round(asked), most_of)
            if sum(counts) < round(asked):
                choice.notes.append(
                    f"{_name(pool)}: {round(asked)} of {ranking.n_eligible} units were to leave, {sum(counts)} could "
                    f"(min_keep {step.min_keep}, max_sparsity {step.max_sparsity})"
                )
        choice.n_near_ties += ranking.n_near_ties(sum(counts))
        counts = _rounded(step, pool, counts, eligible, limits, ranking, choice.notes)
        choice.keep |= ranking.keep_masks(counts)
    return choice


class _Ranking:
    """The units of one pool from the first to leave to the last: those already out, then by score, then by place."""

    def __init__(self, pool: Sequence[Site], scores: Masks, eligible: Mapping, before: Masks, limits: Mapping):
        self.pool = pool
        self.limits = [limits[site.key] for site in pool]
        self.before = [int(before[site.key].sum()) for site in pool]
        owners, units, values, out = [], [], [], []
        for number, site in enumerate(pool):
            there = torch.nonzero(eligible[site.key]).reshape(-1)
            owners.append(torch.full_like(there, number))
            units.append(there)
            values.append(scores[site.key][there])
            out.append(before[site.key][there])
        owner, unit, value, gone = map(torch.cat, (owners, units, values, out))
        order = torch.argsort(torch.where(gone, -torch.inf, value), stable=True)
        self.owner, self.unit, self.value = owner[order].tolist(), unit[order].tolist(), value[order]
        self.n_eligible = len(self.owner)

    def counts_for(self, n_removed: int, limits: Sequence[int]) -> list[int]:
        """How many leave each site if `n_removed` of the pool do, none more than its limit."""
        n_removed = max(n_removed, sum(self.before))
        counts = [0] * len(self.pool)
        for owner in self.owner:
            if n_removed == 0:
                break
            if counts[owner] < max(limits[owner], self.before[owner]):
                counts[owner] += 1
                n_removed -= 1
        return counts

    def counts_for_cost(self, costs: UnitCosts, budget: float) -> tuple[list[int], float]:
        """As few as save `budget`, or one fewer if that is nearer; and what they save."""
        counts, saved = [0] * len(self.pool), 0.0
        for owner, unit in zip(self.owner, self.unit, strict=True):
            if counts[owner] >= max(self.limits[owner], self.before[owner]):
                continue
            price = float(costs.per_unit[self.pool[owner].key][unit])
            if counts[owner] >= self.before[owner] and saved + price / 2 > budget:
                break
            counts[owner] += 1
            saved += price
        return counts, saved

    def keep_masks(self, counts: Sequence[int]) -> Masks:
        """Of each site the `counts` first to leave."""
        keep = {site.key: torch.ones(site.n_units, dtype=torch.bool) for site in self.pool}
        left = [max(count, before) for count, before in zip(counts, self.before, strict=True)]
        for owner, unit in zip(self.owner, self.unit, strict=True):
            if left[owner]:
                keep[self.pool[owner].key][unit] = False
                left[owner] -= 1
        return keep

    def n_near_ties(self, n_removed: int) -> int:
        """Units on the other side of the cut whose score another machine's rounding may put on this one."""
        if not 0 < n_removed < self.n_eligible:
            return 0
        cut = self.value[n_removed - 1]
        return int(((self.value[n_removed:] - cut).abs() <= NEAR_TIE * cut.abs()).sum())


def _limit(step: Any, n_eligible: int) -> int:
    """How many units of a site may leave at most; never all."""
    by_keep = n_eligible - max(1, step.min_keep)
    return max(0, min(by_keep, int(step.max_sparsity * n_eligible + 1e-9)))


def _normalised(scores: Tensor, eligible: Tensor, step: Any, loss_units: bool) -> Tensor:
    how = ("none" if loss_units else "mean") if step.normalize == "auto" else step.normalize
    # a threshold is on raw scores: what lies below it is what has to leave
    if how == "none" or step.threshold is not None or not eligible.any():
        return scores
    there = scores[eligible].double()
    scale = there.mean() if how == "mean" else there.max()
    return (scores.double() / scale).float() if scale > 0 else scores


def _fraction(budget: Any) -> float:
    return budget.parameters if hasattr(budget, "parameters") else budget.macs


def _kind(budget: Any) -> str:
    return "parameters" if hasattr(budget, "parameters") else "MACs"


def _dearest(prices: Tensor, n: int) -> float:
    """What the `n` units that save most would save."""
    return float(prices.sort(descending=True).values[:n].sum())


def _check_reachable(
    step: Any, sites: Sequence[Site], costs: UnitCosts, most: Mapping[str, float], budget: float
) -> None:
    unit = max(float(costs.per_unit[site.key].max()) for site in sites)
    if budget > sum(most.values()) + unit / 2:
        raise RecipeError(
            f"{step.target} can save at most {sum(most.values()) / costs.total:.1%} of the {costs.total:,.0f} "
            f"{_kind(step.sparsity)} that are there, but {budget / costs.total:.1%} is asked for; lower it, or let another "
            "target leave too"
        )


def _n_below(
    threshold: Any, pool: Sequence[Site], scores: Mapping[str, Tensor], eligible: Mapping[str, Tensor]
) -> list[int]:
    """How many of each site lie below the threshold, which looks at the raw scores of the whole pool."""
    values = [scores[site.key].float()[eligible[site.key]] for site in pool]
    cut = cut_of(threshold, torch.cat(values))
    return [int((of_site < cut).sum()) for of_site in values]


def cut_of(threshold: Any, values: Tensor) -> Tensor | float:
    """The score below which things leave; `values` are all that the rule looks at together."""
    if threshold.rule == "absolute":
        return threshold.value
    if threshold.rule == "relative_to_max":
        return threshold.value * values.max()
    return values.mean() - threshold.value * values.std(correction=0)


def _rounded(
    step: Any,
    pool: Sequence[Site],
    counts: list[int],
    eligible: Mapping[str, Tensor],
    limits: Mapping[str, int],
    ranking: _Ranking,
    notes: list[str],
) -> list[int]:
    """Kept sizes to multiples of `round_to`, or whole; the pool's total as near to what it was as that allows."""
    if step.round_to == 1:
        return counts
    options = []
    for number, site in enumerate(pool):
        there = int(eligible[site.key].sum())
        sizes = [kept for kept in range(step.round_to, there + 1, step.round_to) if there - kept <= limits[site.key]]
        choices = {there - kept for kept in sizes if there - kept >= ranking.before[number]} | (
            {0} if not ranking.before[number] else set()
        )
        if not sizes:
            notes.append(
                f"{site.name}: no multiple of round_to {step.round_to} lies within its {there} units and limits"
            )
        options.append(sorted(choices) or [counts[number]])
    error, rounded = 0, []
    for allowed, count in zip(options, counts, strict=True):
        # what rounding took from the sites before is given to this one
        best = min(allowed, key=lambda removed: (abs(removed - count - error), removed))
        error += count - best
        rounded.append(best)
    return rounded


def _uniform_counts(
    step: Any,
    sites: Sequence[Site],
    eligible: Mapping[str, Tensor],
    progress: float,
    allowed_sizes: Callable[[Sequence[Site]], Sequence[int]] | None,
    limits: Mapping[str, int],
    notes: list[str],
) -> dict[str, int]:
    """How many units leave each site so that all of a size keep equally many."""
    if not isinstance(step.sparsity, float):
        raise RecipeError("uniform goes with a plain sparsity; drop the budget, threshold or list of units")
    wanted: dict[str, int] = {}
    by_size: dict[int, list[Site]] = {}
    for site in sites:
        by_size.setdefault(site.n_units, []).append(site)
    for n_units, group in by_size.items():
        there = {site.key: int(eligible[site.key].sum()) for site in group}
        least = max(n - limits[key] for key, n in there.items())
        sizes = range(1, n_units + 1) if allowed_sizes is None else allowed_sizes(group)
        fitting = [
            size
            for size in sizes
            if least <= size <= min(there.values()) and (size % step.round_to == 0 or size == n_units)
        ]
        final = sum(there.values()) / len(group) * (1 - step.sparsity)
        if not fitting or (min(fitting) == max(there.values()) and step.sparsity > 0):
            narrowed = f" (round_to {step.round_to}, min_keep {step.min_keep} and max_sparsity {step.max_sparsity} leave {fitting})"
            raise RecipeError(
                f"the stock config can't say a smaller equal size for {_name(group)} of {n_units} units; it allows "
                f"{list(sizes)}{narrowed if fitting != list(sizes) else ''}. Drop `uniform`: the checkpoint then loads "
                "with hf_prune or trust_remote_code"
            )
        kept = min(fitting, key=lambda size: (abs(size - final), -size))
        if abs(kept - final) > 0.5:
            notes.append(
                f"{_name(group)}: {final:g} of {n_units} units were to stay; the nearest size allowed is {kept}"
            )
        wanted |= {key: round(progress * (n - kept)) for key, n in there.items()}
    return wanted


def _named_units(step: Any, sites: Sequence[Site], eligible: Mapping[str, Tensor]) -> Masks:
    """True where the recipe names a unit."""
    gone = {site.key: torch.zeros(site.n_units, dtype=torch.bool) for site in sites}
    named = {"*": step.remove} if isinstance(step.remove, list) else step.remove
    for pattern, units in named.items():
        matching = [site for site in sites if fnmatchcase(site.name, pattern)]
        if not matching:
            raise RecipeError(f"remove names {pattern!r}, which matches no {step.target} site such as {sites[0].name}")
        if isinstance(step.remove, list) and len(matching) > 1:
            raise RecipeError(f"the model has {len(matching)} stacks; say of which: {{{matching[0].name}: {units}}}")
        for site in matching:
            wrong = [unit for unit in units if not 0 <= unit < site.n_units]
            if wrong:
                raise RecipeError(f"remove names {wrong} of {site.name}, which has units 0 to {site.n_units - 1}")
            gone[site.key][units] = True
            if not (eligible[site.key] & ~gone[site.key]).any():
                raise RecipeError(f"remove would leave {site.name} with none of its {site.n_units} units; keep one")
    return gone


def _name(pool: Sequence[Site]) -> str:
    return pool[0].name if len(pool) == 1 else f"{len(pool)} {pool[0].target} sites"
