"""The calibration loss: a sum over label tokens (or samples), so that the size of batches doesn't matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_prune.calibration.batches import IGNORED_LABEL, Batch, is_encoder_decoder
from hf_prune.errors import CalibrationError


def with_labels(model: nn.Module, batch: Batch) -> Batch:
    """The batch with labels: a causal language model without any learns its own inputs, padding left out."""
    ids = batch.inputs.get("input_ids")
    if "labels" in batch.inputs or ids is None or not predicts_next_token(model):
        return batch
    mask = batch.kept_mask(in_decoder=False)
    labels = ids.clone() if mask is None else ids.masked_fill(~mask, IGNORED_LABEL)
    return replace(batch, inputs={**batch.inputs, "labels": labels})


def n_labels(model: nn.Module, batch: Batch) -> int:
    """Over how many terms the model's mean loss runs: label tokens, or samples where each has one label.

    A causal language model compares position t with the label of t + 1, so the first label counts for nothing.
    """
    labels = batch.inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return batch.n_samples  # regression, several labels a sample, spans: one term a sample
    if labels.dim() > 1 and predicts_next_token(model):
        labels = labels[..., 1:]
    return int((labels != IGNORED_LABEL).sum())


def require_labels(count: int) -> None:
    """Refuse data without a single label.

    Raises:
        CalibrationError: `count` is 0.
    """
    if not count:
        raise CalibrationError(
            f"the calibration data hold no label (all are {IGNORED_LABEL}), and the criterion needs a loss. Pass labels, or "
            "use a criterion without a loss: l1, l2, activation."
        )


def loss_sum(outputs: Any, batch: Batch, count: int) -> Tensor:
    """The model's mean loss times the `count` of its terms, float32 scalar; 0 of none, whose mean is no number.

    Raises:
        CalibrationError: the model returned no loss, or one that isn't finite.
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor):
        raise CalibrationError(
            f"calibration batch {batch.index} gave no loss (keys: {sorted(batch.inputs)}), and the criterion needs "
            "one. Add the labels that the model takes, or use a criterion without a loss: l1, l2, activation."
        )
    if not count:
        return torch.zeros_like(loss)
    if not torch.isfinite(loss).all():
        raise CalibrationError(
            f"the loss of calibration batch {batch.index} is {loss.item()}; expected a finite number. Look for broken "
            "samples or labels, or load the model in bfloat16 or float32."
        )
    return loss.float() * count if loss.dtype != torch.float64 else loss * count


def predicts_next_token(model: nn.Module) -> bool:
    """Whether the model's own loss moves the labels on by one position."""
    can_generate = getattr(model, "can_generate", None)
    if not callable(can_generate) or not can_generate() or is_encoder_decoder(model):
        return False
    return getattr(model, "loss_function", None) is ForCausalLMLoss
