"""What an update did, for loggers: what left, and the loss around it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.batches import Batch
from hf_prune.calibration.collect import evaluation
from hf_prune.calibration.loss import n_labels, with_labels
from hf_prune.pipeline import verification_batches
from hf_prune.plan import KeepMasks
from hf_prune.structure import ModelStructure


N_PAIRS = 8  # of samples, each run alone: training took more memory


@torch.no_grad()
def loss_on(model: nn.Module, batches: Sequence[Mapping[str, Any]] | None, seed: int) -> float | None:
    """The model's own mean loss by label, over two samples of each of the first batches; None where it gives none.

    Every process runs the same samples. In evaluation mode, and with a random state of its own.
    """
    if not batches:
        return None
    total, count = 0.0, 0
    with evaluation(model, seed):
        for index, inputs in enumerate(verification_batches(model, batches, "", at_most=N_PAIRS)[0]):
            batch = with_labels(model, Batch.of(index, inputs, next(model.parameters()).device))
            outputs = model(**batch.inputs)
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                return None
            n = n_labels(model, batch)
            if n:  # without labels the mean is no number
                total, count = total + float(loss) * n, count + n
    return total / count if count else None


def what_left(structure: ModelStructure, before: KeepMasks, after: KeepMasks) -> dict[str, int]:
    """How many units, by kind, and single weights are masked by `after` and weren't by `before`."""
    left: Counter[str] = Counter()
    for sign, masks in ((1, after), (-1, before)):
        for key, keep in masks.units.items():
            left[structure[key].kind] += sign * int((~keep).sum())
        for keep in masks.weights.values():
            left["weights"] += sign * int((~keep).sum())
    return dict(left)
