"""Masked experts: a router that chooses among those that are kept, as the one without the others will."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.structure.sites import Site


class KeptExperts:
    """A forward hook on a router: its answer is that of a router without the masked experts' rows.

    A row of zeros won't do: it is a logit of zero, which may be the largest.
    """

    def __init__(self, site: Site, keep: Tensor):
        self.pieces = [
            (piece.module.removeprefix(site.router).removeprefix("."), piece.tensor, piece.dim)
            for piece in (*site.slices, *site.buffers)
            if f"{piece.module}.".startswith(f"{site.router}.")
        ]
        self.numbers = [
            attribute.name
            for attribute in site.attributes
            if attribute.module == site.router and not attribute.of_config
        ]
        self.keep = keep
        self.is_asking = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.is_asking:
            return output
        kept = torch.nonzero(self.keep).reshape(-1)
        smaller = {}
        for path, own, dim in self.pieces:
            tensor = getattr(module.get_submodule(path), own)
            smaller[f"{path}.{own}" if path else own] = tensor.index_select(dim, kept.to(tensor.device))
        self.is_asking = True
        try:
            with _counting(module, self.numbers, len(kept)):
                logits, weights, chosen = torch.func.functional_call(module, smaller, args, kwargs)
        finally:
            self.is_asking = False
        # the logits of those that have left: none chooses them, and a softmax gives them nothing
        shape = (*logits.shape[:-1], len(self.keep))
        spread = logits.new_full(shape, torch.finfo(logits.dtype).min)
        index = kept.to(logits.device)
        return spread.index_copy(-1, index, logits), weights, index[chosen]


@contextmanager
def _counting(module: nn.Module, names: list[str], n_kept: int) -> Iterator[None]:
    """The router's own numbers, no larger than what is kept."""
    before = {name: module.__dict__[name] for name in names}
    try:
        for name, number in before.items():
            setattr(module, name, min(number, n_kept))
        yield
    finally:
        for name, number in before.items():
            setattr(module, name, number)
