"""Which dimension of a linear layer's tensors holds its outputs and its inputs."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_prune.structure.sites import Span, TensorSlice


def writing_slices(name: str, module: nn.Module, spans: tuple[Span, ...]) -> Iterator[TensorSlice]:
    """The tensors in which units are outputs: weight (d_out, d_in) along 0, (d_in, d_out) for Conv1D along 1; bias."""
    yield TensorSlice(name, "weight", 1 if isinstance(module, Conv1D) else 0, spans, writes=True)
    if getattr(module, "bias", None) is not None:
        yield TensorSlice(name, "bias", 0, spans, writes=True)


def reading_slice(name: str, module: nn.Module, span: Span) -> TensorSlice:
    """The tensor in which units are inputs; the bias belongs to no unit and stays."""
    return TensorSlice(name, "weight", 0 if isinstance(module, Conv1D) else 1, (span,), writes=False)
