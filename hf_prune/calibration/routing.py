"""What a router makes of the tokens: how often it takes each expert, and how much an expert then adds.

Axes: T tokens, K experts a token, E experts, d_model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_prune.calibration.batches import Batch, decoder_modules
from hf_prune.calibration.recorders import at_least_float32, float64, require_finite, zeros
from hf_prune.structure.sites import Site


class RoutedShares:
    """How many tokens are sent to each expert, (E,); counts are tokens. Padding is left out."""

    def __init__(self, model: nn.Module, sites: Sequence[Site]):
        self._model = model
        self._sites = sites
        self._decoder = decoder_modules(model)
        self.sums = {site.key: zeros(site.n_units) for site in sites}
        self.counts = {site.key: zeros(1) for site in sites}

    def attach(self) -> Iterator[RemovableHandle]:
        for site in self._sites:
            holder = self._model.get_submodule(site.holder)
            yield holder.register_forward_pre_hook(self._hook(site, id(holder) in self._decoder), with_kwargs=True)

    def begin(self, batch: Batch) -> None:
        self._batch = batch

    def end(self) -> None:
        require_finite(self.sums, self._batch, "routed tokens")

    def _hook(self, site: Site, in_decoder: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, chosen, weights = (
                self._batch.tokens(x.detach(), in_decoder) for x in _routed(module, args, kwargs)
            )
            self.look(module, site, hidden, chosen, weights)

        return hook

    def look(self, module: nn.Module, site: Site, hidden: Tensor, chosen: Tensor, weights: Tensor) -> None:
        """(T, d_model), (T, K) int64, (T, K): adds up what is asked of them."""
        self.sums[site.key] += (
            torch.bincount(chosen.reshape(-1), minlength=site.n_units)[: site.n_units].double().cpu()
        )
        self.counts[site.key] += len(hidden)


class RoutedNorms(RoutedShares):
    """Sums over the tokens sent to an expert of the router's weight times |expert(x)|, (E,); counts are those tokens."""

    def __init__(self, model: nn.Module, sites: Sequence[Site]):
        super().__init__(model, sites)
        self.counts = {site.key: zeros(site.n_units) for site in sites}

    def look(self, module: nn.Module, site: Site, hidden: Tensor, chosen: Tensor, weights: Tensor) -> None:
        """The same; each expert is asked once more, alone and with a weight of one."""
        for expert in range(site.n_units):
            tokens, place = torch.where(chosen == expert)
            if len(tokens):
                alone = torch.full((len(tokens), 1), expert, dtype=chosen.dtype, device=chosen.device)
                with torch.no_grad():
                    output = module.forward(hidden[tokens], alone, torch.ones_like(alone, dtype=weights.dtype))
                norms = at_least_float32(output).norm(dim=-1)
                self.sums[site.key][expert] += float64(at_least_float32(weights[tokens, place]) * norms)
                self.counts[site.key][expert] += len(tokens)


def _routed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, numbers of the chosen experts, their weights: the arguments of every module of stacked experts."""
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    hidden, chosen, weights = list(given.values())[:3]
    return hidden, chosen, weights
