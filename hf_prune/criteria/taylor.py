"""First-order Taylor expansion of the loss in what would be removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from hf_prune.calibration.statistics import GATE_GRADIENTS, WEIGHT_GRADIENTS, Statistics
from hf_prune.structure.sites import Site, Target, WeightSite


@dataclass(frozen=True)
class Taylor:
    """Weights: |w dL/dw| (Molchanov et al. 2019, without its square).

    Units: sum over samples of |dL/dg|, g a gate on the unit (Michel et al. 2019, section 4.1; there the mean
    over samples, which ranks alike).
    """

    loss_units: ClassVar[bool] = True

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset({WEIGHT_GRADIENTS if target == "weights" else GATE_GRADIENTS})

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        assert statistics is not None
        return statistics.gate_gradients[site.key].float()

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        assert statistics is not None
        weight = model.get_parameter(site.name).detach().double().cpu()
        return (weight * statistics.weight_gradients[site.name]).abs().float()
