"""Explicit: shares by glob; what no glob names takes the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hf_prune.allocation.room import Look, Pool, Room, by_scope, name_of, share_for, shared_out
from hf_prune.errors import RecipeError
from hf_prune.structure.sites import Target


@dataclass(frozen=True)
class ByGlob:
    """The sites that a glob names lose its share, by the first glob that fits; the others lose so much that the step's
    `sparsity` holds in total: all alike, or under scope global by their scores.

    Args:
        shares: fraction by glob on module names.
        scope: of the step.
    """

    shares: Mapping[str, float]
    scope: str

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset()

    def pools(self, room: Room, look: Look) -> list[Pool]:
        given = {site.key: share_for(self.shares, site, -1.0) for site in room.sites}
        named = [site for site in room.sites if given[site.key] >= 0]
        others = [site for site in room.sites if given[site.key] < 0]
        for site in named:
            self._require_within(room, site.key, given[site.key], name_of(site))
        fixed = [Pool((site,), given[site.key] * room.sizes[site.key]) for site in named]
        left = room.total - sum(pool.amount for pool in fixed)
        size, most = (sum(part[site.key] for site in others) for part in (room.sizes, room.most))
        slack = sum(room.unit[site.key] for site in named) / 2  # what rounding excuses
        if not others:
            if abs(left) > slack:
                share = sum(pool.amount for pool in fixed) / (room.size or 1.0)
                raise RecipeError(
                    f"allocation names every site, and its shares come to {share:.4g} in all, where "
                    f"{room.total / (room.size or 1.0):.4g} is asked for; say sparsity: {share:.4g}, or leave some sites out"
                )
            return fixed
        if left < -slack or left > most + slack:
            raise RecipeError(
                f"allocation leaves {left / (size or 1.0):.1%} to take from the {len(others)} sites that it doesn't name, "
                f"which can lose 0 to {most / (size or 1.0):.1%}; change its shares or the sparsity"
            )
        rest = replace(room, sites=others, total=max(0.0, left))
        if self.scope == "global":
            return [*fixed, *by_scope(rest, "global")]
        return [*fixed, *shared_out(rest, dict.fromkeys((site.key for site in others), 1.0))]

    def _require_within(self, room: Room, key: str, share: float, name: str) -> None:
        least, most = (part[key] / (room.sizes[key] or 1.0) for part in (room.least, room.most))
        unit = room.unit[key] / (room.sizes[key] or 1.0)
        if not least - unit < share < most + unit:
            raise RecipeError(
                f"allocation takes {share:.4g} of {name}, whose limits are {least:.4g} to {most:.4g} (min_keep, "
                "min_sparsity, max_sparsity); change one of them"
            )
