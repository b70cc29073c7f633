"""Which units leave: heads, neurons, layers. Higher scores are kept, ties fall by index, counts round half to even."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from hf_prune.allocation.choice import Choice
from hf_prune.allocation.compare import cut_of, normalised
from hf_prune.allocation.room import Allocate, Pool, Room, apportioned, bounds_of, by_scope, check_floors
from hf_prune.allocation.sizes import check_reachable, dearest, equal_sizes, name_of_group, note_of_budget, rounded
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
    allocate: Allocate | None = None,
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
        allocate: who competes, and how much leaves; by the step's scope if None.

    Raises:
        RecipeError: a budget, size or unit number that can't be, or a site that would be emptied.
    """
    before = {
        s.key: removed_before.get(s.key, torch.zeros(s.n_units, dtype=torch.bool)) & eligible[s.key] for s in sites
    }
    if step.remove is not None:
        return Choice({key: ~gone for key, gone in _named_units(step, sites, eligible).items()})
    choice = Choice({})
    counts: dict[str, int] = {}
    there = {site.key: int(eligible[site.key].sum()) for site in sites}
    out = {key: int(gone.sum()) for key, gone in before.items()}
    bounds = {site.key: bounds_of(step, site, there[site.key], _n_kept(step, site)) for site in sites}
    room = _room(step, sites, eligible, bounds, costs)
    check_floors(step, room, is_each_by_itself=costs is None and allocate is None and step.scope == "layer")
    if step.uniform:
        final = equal_sizes(step, sites, there, bounds, allowed_sizes, costs, room.total, choice.notes)
        counts = {key: max(out[key], round(progress * n)) for key, n in final.items()}
    pools = allocate(room) if allocate else _by_scope(step, room)
    # on the way of a schedule the floors rise too
    now = {key: (int(progress * least), max(most, out[key])) for key, (least, most) in bounds.items()}
    rankings = [
        _Ranking(
            pool.sites,
            {s.key: normalised(scores[s.key].float(), eligible[s.key], step, loss_units) for s in pool.sites},
            eligible,
            before,
            now,
        )
        for pool in pools
    ]
    if not step.uniform:
        chosen = _counts(step, pools, rankings, scores, eligible, costs, progress, allocate is not None, choice.notes)
        for pool, ranking, of_pool in zip(pools, rankings, chosen, strict=True):
            choice.n_near_ties += ranking.n_near_ties(sum(of_pool))
            counts |= dict(zip([site.key for site in pool.sites], of_pool, strict=True))
        # what rounding takes from a site is given to others, where they share a total
        together = [list(sites)] if allocate or costs else [list(pool.sites) for pool in pools]
        for group in together if step.round_to > 1 else ():
            counts |= rounded(step, group, counts, there, now, out, room.unit, choice.notes)
    for pool, ranking in zip(pools, rankings, strict=True):
        choice.keep |= ranking.keep_masks([counts[site.key] for site in pool.sites])
    if costs is not None and progress == 1:
        saved = sum(float(costs.per_unit[key][~keep].sum()) for key, keep in choice.keep.items())
        choice.notes += note_of_budget(step, saved, room.total, costs.total)
    return choice


def _n_kept(step: Any, site: Site) -> int:
    """Of the units that can leave, how many stay at least."""
    return max(0, max(1, step.min_keep) - len(site.fixed))


def _room(
    step: Any,
    sites: Sequence[Site],
    eligible: Mapping[str, Tensor],
    bounds: Mapping[str, tuple[int, int]],
    costs: UnitCosts | None,
) -> Room:
    """What may leave, in units, or in what the budget counts."""
    if costs is None:
        sizes = {site.key: float(eligible[site.key].sum()) for site in sites}
        least, most = ({key: float(pair[end]) for key, pair in bounds.items()} for end in (0, 1))
        room = Room(sites, sizes, least, most, (step.sparsity or 0.0) * sum(sizes.values()), dict.fromkeys(sizes, 1.0))
    else:
        prices = {site.key: costs.per_unit[site.key][eligible[site.key]] for site in sites}
        sizes = {key: float(price.sum()) for key, price in prices.items()}
        least = {key: -dearest(-price, bounds[key][0]) for key, price in prices.items()}
        most = {key: dearest(price, bounds[key][1]) for key, price in prices.items()}
        fraction = step.sparsity.parameters if hasattr(step.sparsity, "parameters") else step.sparsity.macs
        unit = {key: float(price.mean()) if len(price) else 0.0 for key, price in prices.items()}
        room = Room(sites, sizes, least, most, costs.total * fraction, unit)
        check_reachable(step, room, costs)
    return room


def _by_scope(step: Any, room: Room) -> list[Pool]:
    if step.scope == "layer" and not isinstance(step.sparsity, float | None):
        # of a budget, each site the same share of what it can save
        whole = sum(room.most.values()) or 1.0
        return [Pool((site,), room.total * room.most[site.key] / whole) for site in room.sites]
    return by_scope(room, step.scope)


def _counts(
    step: Any,
    pools: Sequence[Pool],
    rankings: Sequence[_Ranking],
    scores: Mapping[str, Tensor],
    eligible: Mapping[str, Tensor],
    costs: UnitCosts | None,
    progress: float,
    is_allocated: bool,
    notes: list[str],
) -> list[list[int]]:
    """How many units leave each site of each pool."""
    if costs is not None:
        counts, owed = [], 0.0
        for pool, ranking in zip(pools, rankings, strict=True):
            # what one pool saved too little or too much is made up for by the next
            owed += progress * pool.amount
            of_pool, saved = ranking.counts_for_cost(costs, owed)
            owed -= saved
            counts.append(of_pool)
        return counts
    most = [ranking.most for ranking in rankings]
    asked = [progress * (step.sparsity or 0.0) * ranking.n_eligible for ranking in rankings]
    if step.threshold is not None:
        for number, (pool, ranking) in enumerate(zip(pools, rankings, strict=True)):
            below = _n_below(step.threshold, pool.sites, scores, eligible)
            asked[number] = progress * sum(below)
            most[number] = [min(limit, n) for limit, n in zip(ranking.most, below, strict=True)]
            if not sum(below):
                notes.append(f"threshold {step.threshold.rule} removes nothing from {name_of_group(pool.sites)}")
    whole = [round(each) for each in asked]
    if is_allocated:
        asked = [progress * pool.amount for pool in pools]
        whole = apportioned(asked, [sum(r.least) for r in rankings], [sum(r.most) for r in rankings])
    counts = [ranking.counts_for(n, limits) for ranking, n, limits in zip(rankings, whole, most, strict=True)]
    for pool, ranking, n, of_pool in zip(pools, rankings, whole, counts, strict=True):
        if sum(of_pool) < n:
            notes.append(
                f"{name_of_group(pool.sites)}: {n} of {ranking.n_eligible} units were to leave, {sum(of_pool)} could "
                f"(min_keep {step.min_keep}, max_sparsity {step.max_sparsity})"
            )
    return counts


class _Ranking:
    """The units of one pool from the first to leave to the last: those already out, then by score, then by place."""

    def __init__(
        self, pool: Sequence[Site], scores: Masks, eligible: Mapping, before: Masks, bounds: Mapping[str, tuple]
    ):
        self.pool = pool
        self.before = [int(before[site.key].sum()) for site in pool]
        self.least = [max(gone, bounds[site.key][0]) for site, gone in zip(pool, self.before, strict=True)]
        self.most = [bounds[site.key][1] for site in pool]
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
        counts = [*self.least]
        left = n_removed - sum(counts)
        for is_forced, owner, _ in self._in_order(self.least):
            if left <= 0:
                break
            if not is_forced and counts[owner] < max(limits[owner], self.before[owner]):
                counts[owner] += 1
                left -= 1
        return counts

    def counts_for_cost(self, costs: UnitCosts, budget: float) -> tuple[list[int], float]:
        """As few as save `budget`, or one fewer if that is nearer; and what they save."""
        counts = [*self.least]
        ranked = [*self._in_order(self.least)]  # each site's floor leaves in any case
        saved = sum(self._price(costs, owner, unit) for is_forced, owner, unit in ranked if is_forced)
        for is_forced, owner, unit in ranked:
            if is_forced or counts[owner] >= self.most[owner]:
                continue
            price = self._price(costs, owner, unit)
            if saved + price / 2 > budget:
                break
            counts[owner] += 1
            saved += price
        return counts, saved

    def _in_order(self, counts: Sequence[int]) -> Iterator[tuple[bool, int, int]]:
        """(whether it is among the `counts` first of its site, site, unit), from the first to leave to the last."""
        left = [*counts]
        for owner, unit in zip(self.owner, self.unit, strict=True):
            left[owner] -= 1
            yield left[owner] >= 0, owner, unit

    def _price(self, costs: UnitCosts, owner: int, unit: int) -> float:
        return float(costs.per_unit[self.pool[owner].key][unit])

    def keep_masks(self, counts: Sequence[int]) -> Masks:
        """Of each site the `counts` first to leave."""
        keep = {site.key: torch.ones(site.n_units, dtype=torch.bool) for site in self.pool}
        counts = [max(count, before) for count, before in zip(counts, self.before, strict=True)]
        for is_leaving, owner, unit in self._in_order(counts):
            if is_leaving:
                keep[self.pool[owner].key][unit] = False
        return keep

    def n_near_ties(self, n_removed: int) -> int:
        """Units on the other side of the cut whose score another machine's rounding may put on this one."""
        if not 0 < n_removed < self.n_eligible:
            return 0
        cut = self.value[n_removed - 1]
        return int(((self.value[n_removed:] - cut).abs() <= NEAR_TIE * cut.abs()).sum())


def _n_below(
    threshold: Any, pool: Sequence[Site], scores: Mapping[str, Tensor], eligible: Mapping[str, Tensor]
) -> list[int]:
    """How many of each site lie below the threshold, which looks at the raw scores of the whole pool."""
    values = [scores[site.key].float()[eligible[site.key]] for site in pool]
    cut = cut_of(threshold, torch.cat(values))
    return [int((of_site < cut).sum()) for of_site in values]


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
            wrong = [unit for unit in units if unit not in site.numbers]
            if wrong:
                raise RecipeError(f"remove names {wrong} of {site.name}, which has {_range(site.numbers)}")
            for number, reason in site.fixed:
                if number in units:
                    raise RecipeError(f"remove names {number} of {site.name}, which has to stay: it {reason}")
            gone[site.key][[site.numbers.index(unit) for unit in units]] = True
            if not (eligible[site.key] & ~gone[site.key]).any() and not site.fixed:
                raise RecipeError(f"remove would leave {site.name} with none of its {site.n_units} units; keep one")
    return gone


def _range(numbers: Sequence[int]) -> str:
    """What the units of a site may be called."""
    ends = numbers[0], numbers[-1]
    whole = len(numbers) == ends[1] - ends[0] + 1
    return f"units {ends[0]} to {ends[1]}" if whole else f"units {', '.join(map(str, numbers))}"
