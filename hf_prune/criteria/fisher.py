"""Fisher information of a gate on each unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from hf_prune.calibration.statistics import SQUARED_GATE_GRADIENTS, SQUARED_TOKEN_GATES, Statistics
from hf_prune.criteria.base import no_weights
from hf_prune.errors import RecipeError
from hf_prune.structure.sites import Site, Target, WeightSite


LABELS = ("given", "drawn", "both")


@dataclass(frozen=True)
class Fisher:
    """Sum over samples of (dL/dg)², g a gate on the unit: the diagonal of the empirical Fisher information, which stands for
    the Hessian in the second-order loss change of closing the gate (Kwon et al. 2022; there the mean over samples, which
    ranks alike).

    Args:
        per_token: a gate for each position of a sample, in place of the paper's one for all; the sum then has as many terms
            as there are positions, so that it takes fewer samples to tell units apart.
        samples: on how many calibration samples to measure, the first; all if None. Backward passes are most of what
            pruning by this criterion costs.
        labels: of the loss. "given": the empirical Fisher information. "drawn" from the model's own distribution, one in the
            place of each given: an estimate of the Fisher information itself, which is nearer to the Hessian where the model
            errs (Kunstner et al. 2019). "both": the sum of the two, of one forward and two backward passes.
    """

    per_token: bool = False
    samples: int | None = None
    labels: str = "given"
    loss_units: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.labels not in LABELS:
            raise RecipeError(f"labels of criterion fisher is {self.labels!r}; expected one of {', '.join(LABELS)}")
        if self.samples is not None and self.samples < 1:
            raise RecipeError(f"samples of criterion fisher is {self.samples}; expected at least 1")

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset({SQUARED_TOKEN_GATES if self.per_token else SQUARED_GATE_GRADIENTS})

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        assert statistics is not None
        found = statistics.squared_token_gates if self.per_token else statistics.squared_gate_gradients
        return found[site.key].float()

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        raise no_weights("fisher")
