"""Calibration batches: what a user may pass, cut to the samples asked for; which positions of a batch are padding.

Axes: B samples, T positions, d entries.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.reduction import rank_and_world
from hf_prune.errors import CalibrationError


Inputs = dict[str, Any]
IGNORED_LABEL = -100
PIECE_TOKENS = 1024  # what runs at once on a CPU: activations stay in its caches, and matrix products lose nothing


def take(calibration: Iterable[Mapping[str, Any]] | None, samples: int | None = None) -> list[Inputs]:
    """The first `samples` samples of `calibration` as keyword dicts, the last one cut to fit where it can be; all if None.

    Args:
        calibration: keyword dicts that the model takes, batch first: a list, a generator, a DataLoader.
        samples: how many samples are wanted.

    Raises:
        CalibrationError: there is no data, less of it than `samples`, or an item isn't a dict of tensors.
    """
    if calibration is None or isinstance(calibration, (Mapping, str, Tensor)):
        raise CalibrationError(
            f"calibration is {_kind(calibration)}; expected an iterable of the keyword dicts that the model takes. "
            "Pass a DataLoader, or a list such as [{'input_ids': …, 'attention_mask': …}]."
        )
    taken: list[Inputs] = []
    n_taken = 0
    for index, item in enumerate(calibration):
        if not isinstance(item, Mapping):
            raise CalibrationError(
                f"calibration batch {index} is {_kind(item)}; expected a dict of tensors by argument name. "
                "Give the DataLoader a collate function that returns one, such as DataCollatorWithPadding."
            )
        inputs = dict(item)
        size = n_samples(inputs, index)
        if samples is not None and n_taken + size > samples:
            inputs = _samples(inputs, size, 0, samples - n_taken)
            size = n_samples(inputs, index)
        taken.append(inputs)
        n_taken += size
        if samples is not None and n_taken >= samples:
            break
    if not n_taken or (samples is not None and n_taken < samples):
        wanted = f"{samples} samples were asked for" if samples is not None else "at least one sample is needed"
        raise CalibrationError(
            f"the calibration data ends after {n_taken} samples; {wanted}. Pass more data, or lower calibration.samples."
        )
    return taken


def at_most(batches: Sequence[Mapping[str, Any]], samples: int | None) -> list[Inputs]:
    """The first `samples` samples of what was taken already, or all there are."""
    n_given = sum(n_samples(batch, index) for index, batch in enumerate(batches))
    return take(batches, None if samples is None else min(samples, n_given))


def n_samples(inputs: Mapping[str, Any], index: int = 0) -> int:
    """B: the leading dimension of the ids where there are any, else of the first tensor.

    Raises:
        CalibrationError: the dict holds no tensor with a batch dimension.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.dim()}
    if not tensors:
        raise CalibrationError(
            f"calibration batch {index} holds no tensor with a batch dimension (keys: {sorted(inputs)}). "
            "Collate it to tensors, for instance with return_tensors='pt'."
        )
    return len(tensors.get("input_ids", next(iter(tensors.values()))))


def shortfall(batches: Sequence[Mapping[str, Any]], samples: int | None, length: int | None) -> list[str]:
    """What the data fall short of, in words: nothing where they do not.

    Args:
        batches: that were used.
        samples, length: how many samples, of how many tokens, were asked for; None where nobody did.
    """
    said = []
    n_there = sum(n_samples(batch, index) for index, batch in enumerate(batches))
    if samples is not None and n_there < samples:
        said.append(
            f"the calibration data ended after {n_there} samples, of {samples} that calibration.samples asks for"
        )
    longest = max((_n_tokens(batch) for batch in batches), default=0)
    if length is not None and 0 < longest < length:
        said.append(
            f"the longest calibration sample has {longest} tokens, of {length} that calibration.length asks for"
        )
    return said


def _n_tokens(batch: Mapping[str, Any]) -> int:
    """Of the longest sample, without padding; 0 where there are no tokens."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return 0
    is_mask = isinstance(mask, Tensor) and mask.shape == ids.shape
    return int((mask != 0).sum(1).max()) if is_mask else ids.shape[1]  # type: ignore[union-attr]


def _samples(inputs: Inputs, size: int, start: int, stop: int) -> Inputs:
    """Samples `start` to `stop` of `size`; `inputs` itself where that is all, or a tensor holds samples in another way.

    Patches of images one after the other (Qwen-VL), or codes of several books (MusicGen), can't be cut by sample.
    """
    if (start, min(stop, size)) == (0, size) or any(
        isinstance(value, Tensor) and value.dim() and len(value) != size for value in inputs.values()
    ):
        return inputs
    return {
        name: value[start:stop] if isinstance(value, Tensor) and value.dim() else value
        for name, value in inputs.items()
    }


def first_samples(batch: Mapping[str, Any], wanted: int) -> Inputs:
    """At most `wanted` samples of a batch, if it can be cut."""
    return _samples(dict(batch), n_samples(batch), 0, wanted)


def first_sample(batches: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The first sample of the first batch, with a batch dimension of 1, if it can be cut."""
    first = next(iter(batches), None)
    return None if first is None else first_samples(first, 1)


def _kind(value: object) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def to_device(inputs: Mapping[str, Any], device: torch.device) -> Inputs:
    """The same keyword inputs with their tensors on `device`."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


@dataclass(frozen=True)
class Batch:
    """One batch on the model's device, and how the inputs of its modules are laid out."""

    index: int
    inputs: Inputs
    n_samples: int

    @classmethod
    def of(cls, index: int, inputs: Mapping[str, Any], device: torch.device) -> Batch:
        moved = to_device(inputs, device)
        return cls(index, moved, n_samples(moved, index))

    def kept_mask(self, in_decoder: bool) -> Tensor | None:
        """Where the input isn't padding, (B, T) bool; None if the batch doesn't say.

        In the decoder of an encoder-decoder that is its own mask, else the positions that carry a label: the
        decoder's inputs are the labels moved on by one.
        """
        if not in_decoder:
            mask = self.inputs.get("attention_mask")
        elif "decoder_attention_mask" in self.inputs:
            mask = self.inputs["decoder_attention_mask"]
        else:
            labels = self.inputs.get("labels")
            mask = labels != IGNORED_LABEL if isinstance(labels, Tensor) else None
        return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def tokens(self, x: Tensor, in_decoder: bool) -> Tensor:
        """(…, d) -> (n_tokens, d) without padding. Shapes that the mask doesn't fit count whole."""
        mask = self.kept_mask(in_decoder)
        rows = x.reshape(-1, x.shape[-1])
        if mask is None or x.shape[:-1] not in (mask.shape, (mask.numel(),)):
            return rows
        return rows[mask.reshape(-1)]

    def by_sample(self, x: Tensor, module: str) -> Tensor:
        """(B, …, d) or (B * T, d) -> (B, positions, d).

        Raises:
            CalibrationError: the rows can't be told apart by sample.
        """
        rows, d = x.shape[0], x.shape[-1]
        if x.dim() == 2:
            # flattened, batch first; other counts (tokens routed to an expert) have no order that is known
            lengths = {v.shape[1] for v in self.inputs.values() if isinstance(v, Tensor) and v.dim() > 1}
            known = {self.n_samples, *(self.n_samples * length for length in lengths)}
        else:
            known = {rows} if rows % self.n_samples == 0 else set()  # windows and the like: batch first
        if rows not in known and self.n_samples > 1:
            raise CalibrationError(
                f"{module} takes an input of shape {tuple(x.shape)}, whose rows can't be told apart by sample in a "
                f"batch of {self.n_samples}. Use calibration.batch_size 1, or a criterion without gates."
            )
        return x.reshape(self.n_samples, -1, d)


def dealt(batches: Sequence[Mapping[str, Any]], device: torch.device) -> Iterator[Batch]:
    """This process's share of what all processes pass alike: every world-th batch, on `device`.

    On a CPU a batch of texts comes in pieces of `PIECE_TOKENS`, which are faster and hold less at once; all have its index.
    """
    rank, world = rank_and_world()
    for index in range(rank, len(batches), world):
        for piece in _pieces(batches[index], index, device):
            yield Batch.of(index, piece, device)


def turns(batches: Sequence[Mapping[str, Any]], device: torch.device) -> list[tuple[int, int]]:
    """What `dealt` deals to all processes, in the order of `batches`: to which, and as which of its own."""
    n_dealt = [0] * rank_and_world()[1]
    order = []
    for index, batch in enumerate(batches):
        rank = index % len(n_dealt)
        for _ in _pieces(batch, index, device):
            order.append((rank, n_dealt[rank]))
            n_dealt[rank] += 1
    return order


def _pieces(batch: Mapping[str, Any], index: int, device: torch.device) -> list[Inputs]:
    inputs = dict(batch)
    at_once = size = n_samples(inputs, index)
    ids = inputs.get("input_ids")
    if device.type == "cpu" and isinstance(ids, Tensor) and ids.dim() == 2:
        at_once = max(1, PIECE_TOKENS // max(1, ids.shape[1]))
    pieces = [_samples(inputs, size, start, start + at_once) for start in range(0, size, at_once)]
    return pieces[:1] if pieces and pieces[0] is inputs else pieces


def without_logits(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """`inputs` such that a language model puts out the logits of one token a sample, if it can: all of them would take more
    memory than the rest of the pass.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return inputs
    return {name: value for name, value in inputs.items() if name != "labels"} | {"logits_to_keep": 1}


def decoder_modules(model: nn.Module) -> frozenset[int]:
    """The ids of the modules that see the decoder's positions; empty unless the model is an encoder-decoder."""
    if not is_encoder_decoder(model):
        return frozenset()
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
    return frozenset(id(module) for module in decoder.modules())


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
