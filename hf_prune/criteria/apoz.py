"""APoZ: how seldom a neuron fires."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_prune.calibration.statistics import FIRING, Statistics
from hf_prune.criteria.base import no_weights, sum_by_unit
from hf_prune.structure.sites import Site, Target, WeightSite


@dataclass(frozen=True)
class Apoz:
    """1 - APoZ: the share of tokens in which the neuron is not zero where the output projection reads it (Hu et al. 2016,
    equation 1).

    A smooth activation is never exactly zero, so that "zero" is at most a tenth of the token's root mean square over all
    neurons of the layer. With ReLU that adds small values to exact zeros.
    """

    loss_units: ClassVar[bool] = False

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset({FIRING})

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        assert statistics is not None
        total = torch.zeros(site.n_units, dtype=torch.float64)
        for read in site.reads:
            total += sum_by_unit(site, read, statistics.firing[read.module])
        return (total / len(site.reads)).float()

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        raise no_weights("apoz")
