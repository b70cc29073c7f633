"""How much there is to take and where: what an allocation decides on, and how its answer becomes whole numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol

from torch import Tensor, nn

from hf_prune.calibration.statistics import Statistics
from hf_prune.errors import RecipeError
from hf_prune.structure.sites import ModelStructure, Site, Target, WeightSite


_SAME = 1e-9  # of an amount: what rounding in float64 may leave


@dataclass(frozen=True)
class Room:
    """What a step may take, site by site, all in one measure: units, entries, or the parameters or MACs of a budget.

    Attributes:
        sites: that the step is about.
        sizes: by site key, what is eligible.
        least, most: by site key, what has to leave at least, and may at most (`min_sparsity`, `max_sparsity`, `min_keep`).
        total: what is to leave in all, once the schedule has ended.
        unit: by site key, what one unit is.
    """

    sites: Sequence[Site | WeightSite]
    sizes: Mapping[str, float]
    least: Mapping[str, float]
    most: Mapping[str, float]
    total: float
    unit: Mapping[str, float]

    @property
    def size(self) -> float:
        """What is eligible in all."""
        return sum(self.sizes[site.key] for site in self.sites)


@dataclass(frozen=True)
class Pool:
    """Sites whose units compete with each other, and how much of them leaves, in the room's measure."""

    sites: tuple[Any, ...]
    amount: float


Allocate = Callable[[Room], list[Pool]]


@dataclass(frozen=True)
class Look:
    """What else an allocation may look at: the model as the steps before left it, and what calibration says of it."""

    model: nn.Module
    structure: ModelStructure
    eligible: Mapping[str, Tensor]  # by site key, weights by parameter name: True for what is still there
    statistics: Statistics | None = None


class Allocation(Protocol):
    """Decides how much leaves where. Frozen dataclasses whose fields are its options in a recipe."""

    def needs(self, target: Target) -> frozenset[str]:
        """The statistics that it needs, fields of `Statistics`."""

    def pools(self, room: Room, look: Look) -> list[Pool]:
        """Each site in one pool; the amounts add up to the room's total, within its bounds."""


def by_scope(room: Room, scope: str) -> list[Pool]:
    """Without an allocation: each site the same share of its size; under scope global all compete."""
    share = room.total / (room.size or 1.0)
    if scope == "global":
        return [Pool(tuple(room.sites), room.total)]
    return [Pool((site,), share * room.sizes[site.key]) for site in room.sites]


def shared_out(room: Room, shares: Mapping[str, float]) -> list[Pool]:
    """One pool a site: its share of its size, all times one factor so that the total holds within the bounds."""
    keys = [site.key for site in room.sites]
    amounts = fitted(
        [shares[key] * room.sizes[key] for key in keys],
        [room.least[key] for key in keys],
        [room.most[key] for key in keys],
        room.total,
    )
    return [Pool((site,), amount) for site, amount in zip(room.sites, amounts, strict=True)]


def fitted(wanted: Sequence[float], least: Sequence[float], most: Sequence[float], total: float) -> list[float]:
    """`wanted` times one factor, each within its bounds, so that they come to `total`, as near as the bounds allow."""

    def at(factor: float) -> list[float]:
        return [min(max(factor * w, low), high) for w, low, high in zip(wanted, least, most, strict=True)]

    def is_met(amounts: Sequence[float]) -> bool:
        return math.isclose(sum(amounts), total, rel_tol=_SAME, abs_tol=_SAME)

    if is_met(at(1.0)):
        return at(1.0)
    reach = [high if w else low for w, low, high in zip(wanted, least, most, strict=True)]
    if sum(reach) <= total:
        return reach
    low, high = 0.0, 1.0
    while sum(at(high)) < total:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if is_met(at(middle)):
            return at(middle)
        low, high = (middle, high) if sum(at(middle)) < total else (low, middle)
    return at(high)


def apportioned(wanted: Sequence[float], least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Whole numbers near `wanted`, within their bounds, whose sum is that of `wanted`, rounded half to even.

    What is furthest below what it wants gains first; ties go by position.
    """
    total = round(sum(wanted))
    values = fitted(wanted, least, most, total)
    counts = [
        min(max(math.floor(v + _SAME * (1 + v)), low), high) for v, low, high in zip(values, least, most, strict=True)
    ]
    missing = min(max(total, sum(least)), sum(most), round(sum(values))) - sum(counts)
    order = sorted(range(len(counts)), key=lambda i: (counts[i] - values[i], i))
    for i in order[:missing] if missing > 0 else ():
        counts[i] = min(counts[i] + 1, most[i])
    return counts


def share_for(value: float | Mapping[str, float], site: Site | WeightSite, otherwise: float) -> float:
    """A limit of a step that is one number, or numbers by glob of which the first that fits counts."""
    if not isinstance(value, Mapping):
        return value
    return next((share for pattern, share in value.items() if fnmatchcase(name_of(site), pattern)), otherwise)


def name_of(site: Site | WeightSite) -> str:
    """What globs are matched on: the module's name."""
    return site.module if isinstance(site, WeightSite) else site.name


def bounds_of(step: Any, site: Site | WeightSite, n_there: int, n_kept: int = 1) -> tuple[int, int]:
    """How many of the `n_there` units or entries of a site have to leave, and may at most; `n_kept` stay."""
    ceiling, floor = share_for(step.max_sparsity, site, 1.0), share_for(step.min_sparsity, site, 0.0)
    most = max(0, min(n_there - n_kept, int(ceiling * n_there + _SAME)))
    return min(round(floor * n_there), most), most


def check_floors(step: Any, room: Room, is_each_by_itself: bool) -> None:
    """Refuse floors that come to more than is asked for.

    Raises:
        RecipeError: naming the site whose own share is below its floor, or the sum.
    """
    floors = {site.key: share_for(step.min_sparsity, site, 0.0) for site in room.sites}
    for site in room.sites:
        if floors[site.key] > (ceiling := share_for(step.max_sparsity, site, 1.0)):
            raise RecipeError(
                f"min_sparsity {floors[site.key]} of {name_of(site)} is above its max_sparsity {ceiling}"
            )
    share, least = room.total / (room.size or 1.0), sum(floors[key] * room.sizes[key] for key in floors)
    if is_each_by_itself:
        for site in room.sites:
            if floors[site.key] > share + _SAME:
                raise RecipeError(
                    f"min_sparsity {floors[site.key]} of {name_of(site)} is more than the {share:.4g} that leaves each site; "
                    "raise the sparsity, or let others lose less: scope global or an allocation"
                )
    if least > room.total * (1 + _SAME):
        raise RecipeError(
            f"min_sparsity comes to {least / (room.size or 1.0):.1%} of the {step.target}, but {share:.1%} are to leave; "
            "lower it or raise the sparsity"
        )
