"""Activation: the norm of what a unit adds to the residual stream, on data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_prune.calibration.statistics import ROUTED_NORMS, SQUARED_INPUTS, SQUARED_UPDATES, Statistics
from hf_prune.criteria.base import no_weights, squared_columns, sum_by_unit
from hf_prune.structure.sites import Site, Target, WeightSite


@dataclass(frozen=True)
class Activation:
    """Heads and neurons: sqrt(sum over the unit's entries j of mean x_j² |W_out[:, j]|²), x the input of the output
    projection: Wanda's |w| |x| (Sun et al. 2024, equation 1) in the squared norm over all that the unit writes.
    Layers: root of the mean (output - input)². Experts: mean over the tokens sent to one of the router's weight times the norm
    of its output: the router-weighted expert activation of REAP (Lasby et al. 2025).
    """

    loss_units: ClassVar[bool] = False

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset({{"layers": SQUARED_UPDATES, "experts": ROUTED_NORMS}.get(target, SQUARED_INPUTS)})

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        assert statistics is not None
        if site.target == "layers":
            return statistics.squared_updates[site.key].sqrt().float()
        if site.target == "experts":
            return statistics.routed_norms[site.key].float()
        total = torch.zeros(site.n_units, dtype=torch.float64)
        for read in site.reads:
            written = squared_columns(model, site, read) * statistics.squared_inputs[read.module]
            total += sum_by_unit(site, read, written)
        return total.sqrt().float()

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        raise no_weights("activation")
