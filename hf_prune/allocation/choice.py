"""What allocation gives back, and which sites a step is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import Tensor

from hf_prune.allocation.room import name_of
from hf_prune.errors import RecipeError
from hf_prune.structure.sites import Site, WeightSite


AnySite = TypeVar("AnySite", Site, WeightSite)


@dataclass
class Choice:
    """Keep-masks by site key (weights: by parameter name), what the user should hear, and how many near-ties."""

    keep: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    n_near_ties: int = 0

    def __iadd__(self, other: Choice) -> Choice:
        """With the choice for other sites."""
        self.keep |= other.keep
        self.notes += other.notes
        self.n_near_ties += other.n_near_ties
        return self


def select_sites(step: Any, sites: Sequence[AnySite]) -> list[AnySite]:
    """The sites that `include` names (all if empty) less those that `exclude` does; globs on module names.

    Raises:
        RecipeError: a glob of the step matches nothing, or nothing is left.
    """
    names = [name_of(site) for site in sites]
    require_matches((*step.include, *step.exclude), names, step.target)

    def wanted(name: str) -> bool:
        included = not step.include or any(fnmatchcase(name, pattern) for pattern in step.include)
        return included and not any(fnmatchcase(name, pattern) for pattern in step.exclude)

    chosen = [site for site, name in zip(sites, names, strict=True) if wanted(name)]
    if not chosen:
        raise RecipeError(f"no {step.target} site is left after include and exclude; the model has {len(names)}")
    by_glob = [step.min_sparsity, step.max_sparsity, step.allocation.shares if step.allocation is not None else None]
    for shares in by_glob:
        require_matches(shares if isinstance(shares, Mapping) else (), map(name_of, chosen), step.target)
    return chosen


def require_matches(patterns: Iterable[str], names: Iterable[str], target: str) -> None:
    """Refuse globs that match no name.

    Raises:
        RecipeError: with the nearest name.
    """
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(pattern.strip("*."), names, 1, 0) or names[:1]
            raise RecipeError(f"{pattern!r} matches no {target} site; one is named {near[0] if near else '-'}")
