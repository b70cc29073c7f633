"""Random scores: the baseline that a criterion has to beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_prune.calibration.statistics import Statistics
from hf_prune.structure.sites import Site, Target, WeightSite


@dataclass(frozen=True)
class Random:
    """Uniform in [0, 1), by `seed` and the site's key: the order of sites and the number of processes don't matter."""

    seed: int = 0
    loss_units: ClassVar[bool] = False

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset()

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        return torch.rand(site.n_units, generator=self._generator(site.key))

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        return torch.rand(site.shape, generator=self._generator(site.key))

    def _generator(self, key: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}:{key}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
