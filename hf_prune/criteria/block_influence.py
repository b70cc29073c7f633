"""Block influence: how much a layer turns its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from hf_prune.calibration.statistics import TURNS, Statistics
from hf_prune.criteria.base import no_weights
from hf_prune.structure.sites import Site, Target, WeightSite


@dataclass(frozen=True)
class BlockInfluence:
    """Mean over tokens of 1 - cos(input, output) of the layer (ShortGPT, Men et al. 2024)."""

    loss_units: ClassVar[bool] = False

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset({TURNS})

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        assert statistics is not None
        return statistics.turns[site.key].float()

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        raise no_weights("block_influence")
