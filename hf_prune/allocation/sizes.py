"""Sizes that can't be any number: multiples, equal ones, those that a config can say; and how near a budget they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from hf_prune.allocation.room import Room
from hf_prune.errors import RecipeError
from hf_prune.structure.cost import UnitCosts
from hf_prune.structure.sites import Site


Bounds = Mapping[str, tuple[int, int]]  # by site key: how many units have to leave, and may at most
BUDGET_TOLERANCE = 0.005  # of the model's total; what is further off is said


def dearest(prices: Tensor, n: int) -> float:
    """What the `n` units that save most would save."""
    return float(prices.sort(descending=True).values[:n].sum())


def check_reachable(step: Any, room: Room, costs: UnitCosts) -> None:
    """Refuse a budget that the target can't save.

    Raises:
        RecipeError: with the most that it can.
    """
    unit = max(float(costs.per_unit[site.key].max()) for site in room.sites)
    most = sum(room.most.values())
    if room.total > most + unit / 2:
        raise RecipeError(
            f"{step.target} can save at most {most / costs.total:.1%} of the {costs.total:,.0f} "
            f"{kind_of(step.sparsity)} that are there, but {room.total / costs.total:.1%} is asked for; lower it, or let "
            "another target leave too"
        )


def note_of_budget(step: Any, saved: float, budget: float, total: float) -> list[str]:
    """What to say where sizes come no nearer to a budget than half a per cent of the model."""
    if abs(saved - budget) <= BUDGET_TOLERANCE * total:
        return []
    return [
        f"{budget / total:.1%} of the {total:,.0f} {kind_of(step.sparsity)} were to leave with {step.target}; the nearest "
        f"that their sizes and limits allow is {saved / total:.1%}"
    ]


def kind_of(budget: Any) -> str:
    """What a budget counts, in words."""
    return "parameters" if hasattr(budget, "parameters") else "MACs"


def rounded(
    step: Any,
    sites: Sequence[Site],
    counts: Mapping[str, int],
    there: Mapping[str, int],
    bounds: Bounds,
    out: Mapping[str, int],
    prices: Mapping[str, float],
    notes: list[str],
) -> dict[str, int]:
    """How many leave so that kept sizes are multiples of `round_to`, or whole; the total as near to what it was as that allows.

    Args:
        step: of the recipe.
        sites: that share the total.
        counts: by site key, how many units would leave.
        there: how many are there.
        bounds: how many have to leave, and may.
        out: how many left earlier.
        prices: of one unit, in the measure of the total.
        notes: what the user should hear.
    """
    options: dict[str, list[int]] = {}
    for site in sites:
        n, (least, most) = there[site.key], bounds[site.key]
        sizes = [kept for kept in range(step.round_to, n + 1, step.round_to) if least <= n - kept <= most]
        if not sizes:
            notes.append(f"{site.name}: no multiple of round_to {step.round_to} lies within its {n} units and limits")
        choices = {n - kept for kept in sizes if n - kept >= out[site.key]}
        if not out[site.key] and not least:
            choices.add(0)
        options[site.key] = sorted(choices) or [counts[site.key]]
    missing, found = 0.0, {}
    for key, allowed in options.items():
        # what rounding took from the sites before is given to this one
        wanted = counts[key] + missing / (prices[key] or 1.0)
        found[key] = _nearest(allowed, wanted)
        missing += (counts[key] - found[key]) * prices[key]
    while True:  # and what the last sites couldn't take, to whichever comes nearest with it
        moves = [
            (abs(missing - (new - found[key]) * prices[key]), abs(new - counts[key]), place, new, key)
            for place, (key, allowed) in enumerate(options.items())
            for new in allowed
        ]
        left, _, _, new, key = min(moves)
        if left >= abs(missing) * (1 - 1e-9):
            return found
        missing -= (new - found[key]) * prices[key]
        found[key] = new


def _nearest(allowed: Sequence[int], wanted: float) -> int:
    """Of two as near, the smaller."""
    return min(allowed, key=lambda n: (abs(n - wanted), n))


def equal_sizes(
    step: Any,
    sites: Sequence[Site],
    there: Mapping[str, int],
    bounds: Bounds,
    allowed_sizes: Callable[[Sequence[Site]], Sequence[int]] | None,
    costs: UnitCosts | None,
    budget: float,
    notes: list[str],
) -> dict[str, int]:
    """By site key, how many units leave so that all sites of a size keep equally many.

    Of a budget, the equal sizes that come nearest to it, sites of other sizes losing about the same share.

    Raises:
        RecipeError: the config can say no smaller size.
    """
    groups: dict[int, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.n_units, []).append(site)
    fitting = {
        n_units: _fitting(step, n_units, group, there, bounds, allowed_sizes) for n_units, group in groups.items()
    }
    mean = {n: sum(there[site.key] for site in group) / len(group) for n, group in groups.items()}

    def kept(sparsity: float) -> dict[int, int]:
        # of two as near, the larger
        return {n: -_nearest([-size for size in fitting[n]], mean[n] * (sparsity - 1)) for n in groups}

    if costs is None:
        sizes = kept(step.sparsity)
        for n_units, size in sizes.items():
            final = mean[n_units] * (1 - step.sparsity)
            if abs(size - final) > 0.5:
                notes.append(
                    f"{name_of_group(groups[n_units])}: {final:g} of {n_units} units were to stay; the nearest size "
                    f"allowed is {size}"
                )
    else:
        price = {site.key: float(costs.per_unit[site.key].mean()) for site in sites}

        def saved(sizes: Mapping[int, int]) -> float:
            return sum((there[s.key] - sizes[n]) * price[s.key] for n, group in groups.items() for s in group)

        shares = sorted({1 - size / mean[n] for n in groups for size in fitting[n]})
        shares += [(a + b) / 2 for a, b in pairwise(shares)]
        sizes = min((kept(share) for share in shares), key=lambda sizes: (abs(saved(sizes) - budget), saved(sizes)))
    return {site.key: there[site.key] - sizes[n] for n, group in groups.items() for site in group}


def _fitting(
    step: Any,
    n_units: int,
    group: Sequence[Site],
    there: Mapping[str, int],
    bounds: Bounds,
    allowed_sizes: Callable[[Sequence[Site]], Sequence[int]] | None,
) -> list[int]:
    """The equal sizes that the config can say for `group` and the step's limits allow."""
    smallest = max(there[site.key] - bounds[site.key][1] for site in group)
    largest = min(there[site.key] - bounds[site.key][0] for site in group)
    sizes = range(1, n_units + 1) if allowed_sizes is None else allowed_sizes(group)
    fitting = [
        size for size in sizes if smallest <= size <= largest and (size % step.round_to == 0 or size == n_units)
    ]
    if not fitting or (min(fitting) == max(there[site.key] for site in group) and step.sparsity):
        narrowed = f" (round_to {step.round_to}, min_keep {step.min_keep} and max_sparsity {step.max_sparsity} leave {fitting})"
        raise RecipeError(
            f"the stock config can't say a smaller equal size for {name_of_group(group)} of {n_units} units; it allows "
            f"{list(sizes)}{narrowed if fitting != list(sizes) else ''}. Drop `uniform`: the checkpoint then loads "
            "with hf_prune or trust_remote_code"
        )
    return fitting


def name_of_group(pool: Sequence[Site]) -> str:
    """How messages call some sites."""
    return pool[0].name if len(pool) == 1 else f"{len(pool)} {pool[0].target} sites"
