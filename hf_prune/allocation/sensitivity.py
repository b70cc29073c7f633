"""By sensitivity: the sparsities that cost least, by measured curves of loss against sparsity."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hf_prune.allocation.room import Look, Pool, Room, name_of
from hf_prune.errors import RecipeError
from hf_prune.recipe.words import nearest, shown
from hf_prune.structure.sites import Site, Target, WeightSite


FORMAT, VERSION = "hf_prune.sensitivity", 1
_SAME = 1e-9

Point = tuple[float, float]  # (sparsity, loss)


@dataclass(frozen=True)
class BySensitivity:
    """Minimises the sum over sites of loss(sparsity) - loss(0) at the step's total: from nothing, what costs least loss for
    what it saves leaves next (marginal analysis), along the lower convex hull of each site's curve. Losses of several sites
    are taken to add up, which is an approximation.

    Args:
        file: what `hf-prune sensitivity --json` wrote.
    """

    file: str

    def __post_init__(self) -> None:
        read_curves(self.file)  # a file that can't be read is said before anything long begins

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset()

    def pools(self, room: Room, look: Look) -> list[Pool]:
        curves = read_curves(self.file)
        slopes = []
        amounts = {}
        for place, site in enumerate(room.sites):
            size = room.sizes[site.key]
            hull = lower_hull(_curve(curves, site, self.file))
            most = min(room.most[site.key], hull[-1][0] * size)
            amounts[site.key] = min(room.least[site.key], room.most[site.key])
            for begin, end, slope in _segments(hull):
                low, high = max(begin * size, amounts[site.key]), min(end * size, most)
                if high > low:
                    slopes.append((slope / size, place, low, high))
        left = room.total - sum(amounts.values())
        for _, place, low, high in sorted(slopes):
            taken = min(high - low, max(0.0, left))
            amounts[room.sites[place].key] += taken
            left -= taken
        if left > _SAME * (1 + room.total):
            raise RecipeError(
                f"allocation sensitivity: by what {self.file} measured and the step's limits allow, "
                f"{sum(amounts.values()) / (room.size or 1.0):.1%} can leave, and {room.total / (room.size or 1.0):.1%} is "
                "asked for; scan up to a higher sparsity, or ask for less"
            )
        return [Pool((site,), amounts[site.key]) for site in room.sites]


def lower_hull(curve: Sequence[Point]) -> list[Point]:
    """The corners of the lower convex hull, by sparsity."""
    hull: list[Point] = []
    for x, y in sorted(curve):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-1][0]) >= (y - hull[-1][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull


def _segments(hull: Sequence[Point]) -> Iterator[tuple[float, float, float]]:
    """(from, to, loss by sparsity) of each piece, steeper and steeper."""
    for (x0, y0), (x1, y1) in pairwise(hull):
        yield x0, x1, (y1 - y0) / (x1 - x0)


def _curve(curves: Mapping[str, list[Point]], site: Site | WeightSite, file: str) -> list[Point]:
    if site.key not in curves:
        raise RecipeError(
            f"allocation sensitivity: {file} has no figures for {name_of(site)}{nearest(site.key, curves)}; "
            f"scan the target ({site.key.partition(':')[0]}) of this model, or exclude the site"
        )
    return curves[site.key]


def read_curves(file: str | Path) -> dict[str, list[Point]]:
    """By site key, loss at each sparsity, that of the whole model (sparsity 0) included.

    Raises:
        RecipeError: the file isn't there, isn't of this format, or holds numbers that are none.
    """
    path = Path(file).expanduser()
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, Mapping) or found.get("format") != FORMAT:
            raise ValueError(f"it is {shown(found)}; expected the file that `hf-prune sensitivity --json` writes")
        if found["version"] != VERSION:
            raise ValueError(f"its version is {found['version']!r}; this reads {VERSION}")
        dense = float(found["loss"])
        curves = {
            site["key"]: sorted(
                # several sparsities that were asked for may have come to the same few units, or to none
                {(float(x), float(y)) for x, y in zip(site["sparsities"], site["losses"], strict=True)}
                | {(0.0, dense)}
            )
            for site in found["sites"]
        }
        for key, curve in curves.items():
            if not all(math.isfinite(y) and 0 <= x <= 1 for x, y in curve) or len({x for x, _ in curve}) < len(curve):
                raise ValueError(
                    f"the curve of {key} is {shown(curve)}; expected finite losses at sparsities above 0, to 1"
                )
    except FileNotFoundError as error:
        raise RecipeError(
            f"allocation sensitivity: there is no {file}; `hf-prune sensitivity MODEL --json {file}` writes it"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"allocation sensitivity: {file} can't be read: {error}") from error
    return curves
