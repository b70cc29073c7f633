"""The calibration loss: a sum over label tokens (or samples), so that the size of batches doesn't matter."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
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


def drawn_loss_sum(model: nn.Module, outputs: Any, batch: Batch, seed: int) -> Tensor:
    """The summed loss with a label drawn from the model's own distribution in the place of each given one, float32 scalar.

    What is drawn for a sample depends on its own labels and the seed, not on the batch that it is in.

    Raises:
        CalibrationError: no logits, or not a row of them for each label.
    """
    logits, labels = getattr(outputs, "logits", None), batch.inputs.get("labels")
    if (
        not (isinstance(labels, Tensor) and isinstance(logits, Tensor))
        or labels.is_floating_point()
        or logits.shape[:-1] != labels.shape
    ):
        raise CalibrationError(
            f"calibration batch {batch.index}: labels can be drawn where the model has a row of logits for each label, a class; "
            "use labels: given"
        )
    if labels.dim() > 1 and predicts_next_token(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    wanted = labels != IGNORED_LABEL
    rows = logits[wanted].to(torch.promote_types(logits.dtype, torch.float32))
    shares = torch.cat([_shares(of_sample[keep].cpu(), seed) for of_sample, keep in zip(labels, wanted, strict=True)])
    with torch.no_grad():
        below = rows.softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(below, (shares.to(below) * below[:, -1])[:, None]).squeeze(1)
    return cross_entropy(rows, drawn.clamp(max=rows.shape[-1] - 1), reduction="sum")


def _shares(labels: Tensor, seed: int) -> Tensor:
    """As many numbers in [0, 1) as there are labels of a sample, (n,) or one, float64: the same for the same labels and seed."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(labels.long().contiguous().numpy().tobytes()))
    return torch.rand(labels.numel(), generator=generator, dtype=torch.float64)


def predicts_next_token(model: nn.Module) -> bool:
    """Whether the model's own loss moves the labels on by one position."""
    can_generate = getattr(model, "can_generate", None)
    if not callable(can_generate) or not can_generate() or is_encoder_decoder(model):
        return False
    return getattr(model, "loss_function", None) is ForCausalLMLoss
