"""Wanda and RIA: a weight's magnitude times how strong its input is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_prune.calibration.statistics import SQUARED_INPUTS, Statistics
from hf_prune.errors import RecipeError
from hf_prune.structure.sites import Site, Target, WeightSite


@dataclass(frozen=True)
class Wanda:
    """|w_ij| ‖x_j‖, ‖x_j‖ the root of the mean square of input j over tokens (Sun et al. 2024, equation 1; there the sum over
    tokens, which ranks alike). Compared within each output, as in the paper: `scope` is `output` if not given.
    """

    loss_units: ClassVar[bool] = False

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset({SQUARED_INPUTS})

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        raise RecipeError(f"criterion wanda is for weights; for {site.target} it is `activation`")

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        assert statistics is not None
        weight = model.get_parameter(site.name).detach().float().abs().cpu()
        return weight * _input_norms(site, statistics)


@dataclass(frozen=True)
class Ria:
    """(|w_ij| / Σ_j |w_ij| + |w_ij| / Σ_i |w_ij|) ‖x_j‖^a: relative importance and activations (Zhang et al.
    2024, "Plug-and-Play").

    Args:
        power: a.
    """

    power: float = 0.5
    loss_units: ClassVar[bool] = False

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset({SQUARED_INPUTS})

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        raise RecipeError(f"criterion ria is for weights, not {site.target}")

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        assert statistics is not None
        weight = model.get_parameter(site.name).detach().float().abs().cpu()
        tiny = torch.finfo(weight.dtype).tiny  # of a row or column of zeros each entry is worth nothing
        relative = weight / weight.sum(0, keepdim=True).clamp(min=tiny) + weight / weight.sum(1, keepdim=True).clamp(
            min=tiny
        )
        return relative * _input_norms(site, statistics) ** self.power


def _input_norms(site: WeightSite, statistics: Statistics) -> Tensor:
    """Root mean square of each input, float32, to multiply the weight with: (d_in,), or (d_in, 1) for Conv1D."""
    norms = statistics.squared_inputs[site.module].sqrt().float()
    return norms if site.reduction_dim == 1 else norms[:, None]
