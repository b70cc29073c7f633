"""What training does to the weights, gathered for criteria that score it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_prune.allocation import select_sites
from hf_prune.apply.present import kept_entries
from hf_prune.calibration.statistics import is_parameter
from hf_prune.criteria.base import sum_of_slice
from hf_prune.errors import CheckpointError, RecipeError
from hf_prune.plan import KeepMasks
from hf_prune.planning.step import scores_training
from hf_prune.recipe import Recipe
from hf_prune.structure import ModelStructure, Site, WeightSite, require_sites
from hf_prune.structure.sites import TensorSlice


class Movement:
    """S = -Σ w dL/dw over an optimizer's steps, for the sites that a recipe's criteria score by it; entry by entry for weights,
    for heads and neurons at once summed over all that leaves together, biases in.

    Read as the optimizer's step begins: w is what dL/dw was taken at, and dL/dw what the optimizer gets: accumulated over
    micro-batches, averaged over processes (so that S is equal on all), without a loss scale, clipped. Clipping shrinks all
    gradients of a step alike, so that one bad batch has no more say in S than in the weights. A step that is left out
    since gradients overflowed counts for nothing.

    What is masked has no weight and no gradient, so that it gathers nothing; what it had is forgotten when it leaves.

    Args:
        model: whose masks and weights it looks at.
        structure: of the model.
        recipe: whose steps say for which sites, if for any.
        optimizer: torch's own, over the model's parameters.

    Raises:
        RecipeError: a site that is to be scored has nothing that the optimizer trains.
    """

    def __init__(self, model: nn.Module, structure: ModelStructure, recipe: Recipe, optimizer: torch.optim.Optimizer):
        self.structure = structure
        self.sums: dict[str, Tensor] = {}  # by site key, float32: of the weight's shape, or (n_units,)
        self._weights: dict[str, nn.Parameter] = {}  # by site key
        self._slices: list[tuple[Site, nn.Parameter, TensorSlice]] = []
        self._hook: RemovableHandle | None = None
        steps = [step for step in recipe.prune if scores_training(step)]
        if not steps:
            return
        trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for step in steps:
            if step.target == "weights":
                for weight in select_sites(step, structure.weights):
                    parameter = model.get_parameter(weight.name)
                    _require_trained(weight, {parameter} & trained)
                    self._weights[weight.key] = parameter
                    self.sums[weight.key] = torch.zeros(weight.shape, dtype=torch.float32, device=parameter.device)
                continue
            require_sites(structure, step.target)
            for site in select_sites(step, structure.of(step.target)):
                if site.key in self.sums:
                    continue
                slices = [piece for piece in site.slices if is_parameter(model, piece)]
                parts = [(site, model.get_parameter(piece.name), piece) for piece in slices]
                _require_trained(site, {parameter for _, parameter, _ in parts} & trained)
                self._slices += parts
                self.sums[site.key] = torch.zeros(site.n_units, dtype=torch.float32, device=parts[0][1].device)
        self._hook = optimizer.register_step_pre_hook(self._gather)

    def detach(self) -> None:
        """Gather no more."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def forget(self, masks: KeepMasks) -> None:
        """Keep nothing for what has left."""
        for site in self.structure.weights:
            if site.key in self._weights:
                self._zero_but(site.key, kept_entries(self.structure, masks, site))
        for key, keep in masks.units.items():
            if key in self.sums:
                self._zero_but(key, keep)

    def load(self, sums: Mapping[str, Tensor]) -> None:
        """Go on from `sums`.

        Raises:
            CheckpointError: they are of other sites.
        """
        found = {key: tuple(values.shape) for key, values in sums.items()}
        expected = {key: tuple(values.shape) for key, values in self.sums.items()}
        if found != expected:
            differ = sorted(key for key in found | expected if found.get(key) != expected.get(key))
            raise CheckpointError(
                f"the checkpoint has other movement than this training: {differ[0]} is {found.get(differ[0])} there and "
                f"{expected.get(differ[0])} here. Resume with the same model and recipe, or start anew."
            )
        for key, values in sums.items():
            self.sums[key].copy_(values)

    @torch.no_grad()
    def _gather(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # fused optimizers divide by the loss scale and leave out what overflowed by themselves, so do as they do
        overflowed, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        if overflowed is not None and overflowed.item():
            return
        for key, parameter in self._weights.items():
            if parameter.grad is not None:
                self.sums[key].addcmul_(_unscaled(parameter.grad, scale), parameter.float(), value=-1)
        for site, parameter, piece in self._slices:
            if parameter.grad is not None:
                products, total = _unscaled(parameter.grad, scale) * parameter.float(), self.sums[site.key]
                total.sub_(sum_of_slice(site, piece, products).to(total.device))

    def _zero_but(self, key: str, keep: Tensor) -> None:
        total = self.sums[key]
        total.masked_fill_(~keep.to(total.device), 0)


def _unscaled(gradient: Tensor, scale: Tensor | None) -> Tensor:
    gradient = gradient.float()
    return gradient if scale is None else gradient / scale.to(gradient.device)


def _require_trained(site: Site | WeightSite, trained: set[nn.Parameter]) -> None:
    if not any(parameter.requires_grad for parameter in trained):
        raise RecipeError(
            f"{site.name}: its criterion scores how training moves it, and the optimizer trains nothing of it; train it, or "
            "leave it out with `exclude`"
        )
