"""What allocation gives back, and which sites a step is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import Tensor

from hf_prune.errors import RecipeError
from hf_prune.structure.sites import Site, WeightSite


AnySite = TypeVar("AnySite", Site, WeightSite)


@dataclass
class Choice:
    """Keep-masks by site key (weights: by parameter name), what the user should hear, and how many near-ties."""

    keep: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    n_near_ties: int = 0


def select_sites(step: Any, sites: Sequence[AnySite]) -> list[AnySite]:
    """The sites that `include` names (all if empty) less those that `exclude` does; globs on module names.

    Raises:
        RecipeError: a glob matches nothing, or nothing is left.
    """
    names = [site.module if isinstance(site, WeightSite) else site.name for site in sites]
    for pattern in (*step.include, *step.exclude):
        if not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(pattern.strip("*."), names, 1, 0) or names[:1]
            raise RecipeError(f"{pattern!r} matches no {step.target} site; one is named {near[0] if near else '-'}")

    def wanted(name: str) -> bool:
        included = not step.include or any(fnmatchcase(name, pattern) for pattern in step.include)
        return included and not any(fnmatchcase(name, pattern) for pattern in step.exclude)

    chosen = [site for site, name in zip(sites, names, strict=True) if wanted(name)]
    if not chosen:
        raise RecipeError(f"no {step.target} site is left after include and exclude; the model has {len(names)}")
    return chosen
