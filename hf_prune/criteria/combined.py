"""Combined: several criteria at once, each by the order in which it puts the units or weights of a site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_prune import criteria
from hf_prune.calibration.statistics import Statistics
from hf_prune.criteria.base import Criterion
from hf_prune.recipe.fields import weighted_criteria
from hf_prune.structure.sites import Site, Target, WeightSite


@dataclass(frozen=True)
class Combined:
    """Σ weight · rank / (n - 1), rank the place of the score among the n of its site, from 0 on; what ties shares the mean of
    its places. No paper: Borda's count with weights.

    Ranks are taken within each site, also where sites compete: they say nothing of how much two sites differ. What
    left before has a place too, by its score.

    Args:
        of: by criterion, its weight; or its `weight` and options.
    """

    of: Mapping[str, Any]
    loss_units: ClassVar[bool] = False

    @cached_property
    def _parts(self) -> list[tuple[float, Criterion]]:
        parts = weighted_criteria(self.of).items()
        return [(weight, criteria.get(name, options)) for name, (weight, options) in parts]

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset().union(*(criterion.needs(target) for _, criterion in self._parts))

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        return _sum((weight, part.score_units(model, site, statistics)) for weight, part in self._parts)

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        return _sum((weight, part.score_weights(model, site, statistics)) for weight, part in self._parts)


def _sum(parts: Iterable[tuple[float, Tensor]]) -> Tensor:
    """The sum of weight · ranks, in float64, then float32."""
    total = torch.zeros((), dtype=torch.float64)
    for weight, score in parts:
        total = total + weight * ranks(score)
    return total.float()


def ranks(scores: Tensor) -> Tensor:
    """The place of each entry from the lowest (0) to the highest (1), float64 of the same shape; ties share the mean of theirs."""
    _, place, count = torch.unique(scores, return_inverse=True, return_counts=True)
    below = count.cumsum(0) - count
    mean = below + (count - 1).double() / 2
    n = scores.numel()
    return mean[place] / (n - 1) if n > 1 else torch.full(scores.shape, 0.5, dtype=torch.float64)
