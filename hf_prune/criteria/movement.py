"""Movement and soft movement: whether training moved a weight away from zero or towards it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_prune.calibration.statistics import MOVEMENT, Statistics
from hf_prune.structure.sites import Site, Target, WeightSite


@dataclass(frozen=True)
class Movement:
    """S = -Σ w dL/dw over the optimizer's steps so far; for a unit the sum over all that leaves together, biases in. Each term
    is what the loss would gain to first order if w became zero, so that S says what removal costs.

    Movement pruning (Sanh et al. 2020), hard: what scores lowest leaves. There S is a parameter with a learning rate of its
    own, trained through a straight-through estimator, also for what is masked, which may come back. Here the rate, which
    changes no order, is 1, and what left stays out. Units: as the block movement of Lagunas et al. 2021, whose blocks are
    of one matrix. Not for layers: a block of zero weights is not a block that is left out.
    """

    loss_units: ClassVar[bool] = True

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset({MOVEMENT})

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        assert statistics is not None
        return statistics.movement[site.key].float().cpu()

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        assert statistics is not None
        return statistics.movement[site.key].float().cpu()


@dataclass(frozen=True)
class SoftMovement:
    """sigmoid(S / s), S as for `movement`, s the mean |S| of what moved in the site: what scores below the step's `threshold`
    leaves, however much that is. At 0.5 that is all that moved towards zero.

    Soft movement pruning (Sanh et al. 2020). There the rate and Adam set the scale of S, here s does, so that a threshold
    means the same for every learning rate and length of training; and a penalty on sigmoid(S) pulls scores below the
    threshold, here the threshold goes up instead.
    """

    loss_units: ClassVar[bool] = False

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset({MOVEMENT})

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        assert statistics is not None
        return _soft(statistics.movement[site.key])

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        assert statistics is not None
        return _soft(statistics.movement[site.key])


def _soft(movement: Tensor) -> Tensor:
    size, n_moved = movement.abs().sum(dtype=torch.float64), torch.count_nonzero(movement)
    scale = size / n_moved.clamp(min=1)
    return torch.sigmoid(movement / scale.clamp(min=torch.finfo(torch.float32).tiny)).float().cpu()
