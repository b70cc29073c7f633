"""The loss of what lies behind a place in a stack: only the blocks from there on run again, then the rest of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from hf_prune.calibration.batches import Batch
from hf_prune.calibration.blocks import Chain, answering
from hf_prune.calibration.loss import loss_sum, n_labels, require_labels
from hf_prune.calibration.reduction import raise_together, sum_over_processes
from hf_prune.errors import CalibrationError


def through(model: nn.Module, chain: Chain, number: int, hidden: Tensor, positions: Iterable[int]) -> Tensor:
    """Hidden states of batch `number` taken through the blocks at `positions`, as they are now."""
    for position in positions:
        hidden = chain.calls[number][position](model.get_submodule(chain.blocks[position]), hidden)
    return hidden


def loss_behind(model: nn.Module, chain: Chain, number: int, hidden: Tensor) -> Tensor:
    """The summed loss if the stack's output is `hidden`."""
    with answering(model, chain, hidden):
        return loss_of(model, chain.batches[number])


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The summed loss of one batch, float64 on the CPU."""
    return loss_sum(model(**batch.inputs), batch, n_labels(model, batch)).double().cpu()


def mean_losses(
    model: nn.Module, batches: Sequence[Batch], measure: Callable[[int], Iterable[Tensor]], n_losses: int
) -> Tensor:
    """The means by label, over the batches of all processes, of the `n_losses` sums that `measure` gives of each: float64."""
    total = torch.zeros(n_losses, dtype=torch.float64)
    error: CalibrationError | None = None
    try:
        for number in range(len(batches)):
            total += torch.stack([*measure(number)])
    except CalibrationError as caught:
        error = caught
    raise_together(error)
    count = torch.tensor([sum(n_labels(model, batch) for batch in batches)], dtype=torch.float64)
    sum_over_processes([total, count])
    require_labels(int(count))
    return total / count
