"""What a model costs: parameters, and multiply-accumulate operations (MACs)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_prune.structure.sites import Site


def count_parameters(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """MACs of one forward pass on `inputs`, counted by PyTorch as it runs (its flops are two a MAC).

    Counts matrix products, convolutions and attention; not norms, activations and softmax.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**inputs)
    finally:
        model.train(was_training)
    return counter.get_total_flops() // 2


def unit_parameters(model: nn.Module, site: Site) -> float:
    """Parameters that leave with one unit of `site`. Layers of a stack may differ: their mean."""
    if site.target == "layers":
        blocks = dict.fromkeys(site.blocks)
        held = sum(p.numel() for block in blocks for p in model.get_submodule(block).parameters())
        return 0.0 if site.is_shared else held / site.n_units
    return float(sum(_entries(model, site)))


def unit_macs(model: nn.Module, site: Site, length: int) -> float:
    """Estimated MACs that leave with one unit of `site`, for each position of a sequence of `length` tokens.

    A weight matrix costs one MAC an entry and position; a head also 2 * d_head * length for scores and mixing.
    """
    if site.target == "layers":
        held = sum(p.numel() for block in site.blocks for p in model.get_submodule(block).parameters() if p.dim() > 1)
        widths = [
            module.out_features
            for block in site.blocks
            for module in model.get_submodule(block).modules()
            if isinstance(module, nn.Linear) and module.out_features == module.in_features
        ]
        return (held + 2 * length * (max(widths, default=0)) * len(site.blocks)) / site.n_units
    entries = sum(n for n, piece in zip(_entries(model, site), site.slices, strict=True) if piece.tensor == "weight")
    mixing = sum(2 * length * read.span.width for read in site.reads) if site.target == "attention_heads" else 0
    return float(entries + mixing)


def _entries(model: nn.Module, site: Site) -> list[int]:
    """For each slice, how many entries of the tensor one unit holds."""
    counts = []
    for piece in site.slices:
        tensor = getattr(model.get_submodule(piece.module), piece.tensor)
        counts.append(tensor.numel() // tensor.shape[piece.dim] * piece.entries_per_unit)
    return counts
