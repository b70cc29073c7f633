"""Loss change: take a unit out, and see what the loss becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_prune.calibration.batches import Batch, dealt, n_samples, take
from hf_prune.calibration.blocks import Chain, answering, record_chain
from hf_prune.calibration.collect import evaluation
from hf_prune.calibration.loss import loss_sum, n_labels, with_labels
from hf_prune.calibration.reduction import raise_together, sum_over_processes
from hf_prune.calibration.statistics import Statistics
from hf_prune.criteria.base import no_weights
from hf_prune.errors import CalibrationError, RecipeError
from hf_prune.structure.sites import Site, Target, WeightSite


@dataclass(frozen=True)
class LossChange:
    """L(without the layer) - L, measured; greedy: once a layer is chosen to leave, the others are measured without it.

    Against the whole model it is the perplexity criterion of Kim et al. 2024 (Shortened LLaMA), who remove all in one shot;
    greedy, the iterated check of SLEB (Song et al. 2024). Perplexity is the exponential of the loss, and ranks alike.

    Args:
        greedy: measure anew after each removal; else all against the whole model.
        samples: how many calibration samples to measure on; each costs about half a forward pass for each layer tried.
    """

    greedy: bool = True
    samples: int = 8
    loss_units: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RecipeError(f"samples of criterion loss_change is {self.samples}; expected at least 1")

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset()

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        raise AssertionError("loss_change measures by itself; see `rank_units`")

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        raise no_weights("loss_change")

    def rank_units(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        batches: Sequence[Mapping[str, Any]],
        n_removed: Mapping[str, int],
        seed: int,
    ) -> dict[str, Tensor]:
        """Scores by site key, float32 (n_units,): the loss change; greedy: those that leave first score lowest.

        Args:
            n_removed: by site key, how many will leave.
            batches: calibration, with labels where the model needs them for a loss.

        Raises:
            CalibrationError: there is no loss, or it is not finite.
            RecipeError: a layer is called several times.
        """
        n_there = sum(n_samples(batch, index) for index, batch in enumerate(batches))
        chosen = take(batches, min(self.samples, n_there))
        mine = [with_labels(model, batch) for batch in dealt(chosen, next(model.parameters()).device)]
        with evaluation(model, seed), torch.no_grad():
            return {site.key: self._rank(model, site, mine, n_removed[site.key]) for site in sites}

    def _rank(self, model: nn.Module, site: Site, batches: Sequence[Batch], n_removed: int) -> Tensor:
        if site.is_shared:
            raise RecipeError(
                f"criterion loss_change: {site.name} is one block called {site.n_units} times; use another"
            )
        chain = record_chain(model, site.name, site.blocks, batches, {})
        scores = _losses(model, chain, []) - _loss(model, chain, n_units=site.n_units)
        order: list[int] = []
        while self.greedy and len(order) < n_removed:
            order.append(int(scores.masked_fill(_at(order, site.n_units), torch.inf).argmin()))
            if len(order) < n_removed:
                scores = _losses(model, chain, order)
        # those chosen come first, in their order, below all others
        for place, unit in enumerate(reversed(order)):
            scores[unit] = scores.min() - 1 - place
        return scores.float()


def _losses(model: nn.Module, chain: Chain, dropped: Sequence[int]) -> Tensor:
    """The mean loss without `dropped` and one further layer: float64 (n_units,), zero for the dropped."""
    losses = torch.zeros(len(chain.blocks), dtype=torch.float64)
    kept = [position for position in range(len(chain.blocks)) if position not in dropped]

    def measure(number: int) -> None:
        hidden = chain.hidden[number]
        for position in kept:
            later = [other for other in kept if other > position]
            losses[position] += _loss_of(model, chain, number, _through(model, chain, number, hidden, later))
            hidden = _through(model, chain, number, hidden, [position])

    return _by_label(losses, model, chain, measure)


def _loss(model: nn.Module, chain: Chain, n_units: int) -> Tensor:
    """The mean loss of the whole model, float64 (1,)."""
    total = torch.zeros(1, dtype=torch.float64)

    def measure(number: int) -> None:
        hidden = _through(model, chain, number, chain.hidden[number], range(n_units))
        total.add_(_loss_of(model, chain, number, hidden))

    return _by_label(total, model, chain, measure)


def _through(model: nn.Module, chain: Chain, number: int, hidden: Tensor, positions: Iterable[int]) -> Tensor:
    for position in positions:
        hidden = chain.calls[number][position](model.get_submodule(chain.blocks[position]), hidden)
    return hidden


def _loss_of(model: nn.Module, chain: Chain, number: int, hidden: Tensor) -> Tensor:
    """The summed loss if the stack's output is `hidden`."""
    batch = chain.batches[number]
    with answering(model, chain, hidden):
        return loss_sum(model(**batch.inputs), batch, n_labels(model, batch)).double().cpu()


def _by_label(total: Tensor, model: nn.Module, chain: Chain, measure: Callable[[int], None]) -> Tensor:
    """`total` once `measure` has added each batch to it, of all processes, by label."""
    error: CalibrationError | None = None
    try:
        for number in range(len(chain.batches)):
            measure(number)
    except CalibrationError as caught:
        error = caught
    raise_together(error)
    count = torch.tensor([sum(n_labels(model, batch) for batch in chain.batches)], dtype=torch.float64)
    sum_over_processes([total, count])
    return total / count.clamp(min=1)


def _at(units: Sequence[int], n_units: int) -> Tensor:
    return torch.isin(torch.arange(n_units), torch.tensor(units, dtype=torch.int64))
