"""Routing: how often an expert is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from hf_prune.calibration.statistics import ROUTED_SHARES, Statistics
from hf_prune.criteria.base import no_weights
from hf_prune.structure.sites import Site, Target, WeightSite


@dataclass(frozen=True)
class Routing:
    """The share of tokens that the router sends to an expert, whatever weight it gives it: the frequency that REAP
    (Lasby et al. 2025) is compared with.
    """

    loss_units: ClassVar[bool] = False

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset({ROUTED_SHARES})

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        assert statistics is not None
        return statistics.routed_shares[site.key].float()

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        raise no_weights("routing")
