"""l1 and l2: how large the weights are (Han et al. 2015; Li et al. 2017 for structures)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_prune.calibration.statistics import Statistics
from hf_prune.criteria.base import mean_by_unit
from hf_prune.structure.sites import Site, Target, WeightSite


@dataclass(frozen=True)
class L1:
    """Units: mean |w| over all that leaves together. Weights: |w|."""

    loss_units: ClassVar[bool] = False

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset()

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        return mean_by_unit(model, site, lambda name, w: w.detach().abs()).float()

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        return model.get_parameter(site.name).detach().abs().float().cpu()


@dataclass(frozen=True)
class L2:
    """Units: root of the mean w² over all that leaves together. Weights: w², which ranks as |w| does."""

    loss_units: ClassVar[bool] = False

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset()

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        return torch.sqrt(mean_by_unit(model, site, lambda name, w: w.detach().double().square())).float()

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        return model.get_parameter(site.name).detach().float().square().cpu()
