"""Fluctuation: how much a unit's contribution varies about its mean, which a bias could replace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_prune.calibration.statistics import MEAN_INPUTS, SQUARED_INPUTS, Statistics
from hf_prune.criteria.base import no_weights, squared_columns, sum_by_unit
from hf_prune.structure.sites import Site, Target, WeightSite


@dataclass(frozen=True)
class Fluctuation:
    """Sum over the unit's entries j of var(x_j) |W_out[:, j]|², x the input of the output projection, var over tokens: the
    weighted input feature variance of FLAP (An et al. 2024). There sites compare by scores standardised within each; here
    `normalize` says how.
    """

    loss_units: ClassVar[bool] = False

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset({MEAN_INPUTS, SQUARED_INPUTS})

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        assert statistics is not None
        total = torch.zeros(site.n_units, dtype=torch.float64)
        for read in site.reads:
            mean, squared = statistics.mean_inputs[read.module], statistics.squared_inputs[read.module]
            variance = (squared - mean.square()).clamp(min=0)
            total += sum_by_unit(site, read, variance * squared_columns(model, site, read))
        return total.float()

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        raise no_weights("fluctuation")
