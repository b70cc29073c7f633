"""Gradient magnitude: how fast the loss changes with a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from hf_prune.calibration.statistics import WEIGHT_GRADIENTS, Statistics
from hf_prune.criteria.base import mean_by_unit
from hf_prune.structure.sites import Site, Target, WeightSite


@dataclass(frozen=True)
class Gradient:
    """Weights: |dL/dw|, the signed gradients summed over the data first. Units: its mean over all that leaves together."""

    loss_units: ClassVar[bool] = False

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset({WEIGHT_GRADIENTS})

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        assert statistics is not None
        return mean_by_unit(model, site, lambda name, w: statistics.weight_gradients[name].abs()).float()

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        assert statistics is not None
        return statistics.weight_gradients[site.name].abs().float()
