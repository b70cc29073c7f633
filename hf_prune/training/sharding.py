"""Pruning where no process holds whole parameters: FSDP2 here, DeepSpeed in `zero.py`.

Deciding needs the whole model: at each update every process gathers it, makes the plan that all make, and lets it go again. Between
updates each holds its part of the masks along with its part of the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_prune.apply.masks import carry_masks, masks_of, set_masks
from hf_prune.apply.shards import local_part
from hf_prune.errors import RecipeError
from hf_prune.planning import RecipeLike
from hf_prune.planning.step import scores_training
from hf_prune.recipe import Recipe
from hf_prune.report import PruningReport
from hf_prune.structure import inspect_model
from hf_prune.training.pruner import Pruner, unwrap
from hf_prune.training.shrinking import SHARDED


def require_shardable(recipe: Recipe, model: nn.Module | None) -> None:
    """Refuse at the start what needs whole parameters while it trains.

    Raises:
        RecipeError: with the remedy.
    """
    if recipe.schedule.shrink == "when_final":
        raise RecipeError(SHARDED)
    if recipe.schedule.rewind is not None:
        raise RecipeError(f"schedule.rewind remembers whole weights; drop it, {_OR_WHOLE}")
    for number, step in enumerate(recipe.prune):
        if scores_training(step):
            raise RecipeError(
                f"prune.{number}.criterion: {step.criterion.name} gathers whole weights and gradients at each step; take taylor, "
                f"which looks at the updates only, {_OR_WHOLE}"
            )
    if hasattr(model, "peft_config"):
        raise RecipeError(f"adapters are masked where their product is whole; train without adapters, {_OR_WHOLE}")


_OR_WHOLE = "or train under DistributedDataParallel or on one process: under FSDP and DeepSpeed no process holds them"


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy of a model that is not wrapped yet, with its structure and buffers, and without memory for its parameters."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 may have taken the weights away while loading
        empty = torch.empty(shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


class ShardedPruner(Pruner):
    """`Pruner` of a model whose parameters are DTensors (FSDP2). When training ends `model` is the whole, smaller model.

    Args:
        model: as the optimizer trains it.
        optimizer: over its parameters.
        recipe: as `Pruner` takes it.
        skeleton: `skeleton_of` the model, before it was wrapped.
        named: of `Pruner`.

    Raises:
        RecipeError: the recipe asks for what needs whole parameters all the time.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: RecipeLike,
        *,
        skeleton: nn.Module,
        **named: Any,
    ):
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
            raise RecipeError("FSDP1 flattens parameters into one; use FSDP2, `version: 2` of fsdp_config")
        self._parts, self._skeleton = unwrap(model), skeleton
        super().__init__(self._gathered(), optimizer, recipe, **named)
        self.model, self._wrapped = self._parts, model
        if masks_of(skeleton):
            self._deal_out(skeleton)

    def step(self) -> bool:
        if not self._is_update():
            return super().step()
        with self._whole():
            has_changed = super().step()
        if has_changed:
            self._zero_moments()
        return has_changed

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with self._whole():
            super().load_state_dict(state)

    def finish(self, **named: Any) -> PruningReport:
        self.detach()
        self.model = self._gathered()
        return super().finish(**named)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Inside, the model is whole on each process; what has changed in it is then dealt out."""
        self.model = whole = self._gathered()
        try:
            yield
        finally:
            self.model = self._parts
        self._deal_out(whole)

    @torch.no_grad()
    def _gathered(self) -> nn.Module:
        """The whole model, masked, on each process; every process has to ask for it."""
        memo: dict[int, Any] = {}
        for name, parameter in self._skeleton.named_parameters():
            memo[id(parameter)] = nn.Parameter(self._full(name), requires_grad=parameter.requires_grad)
        for name, buffer in self._skeleton.named_buffers():
            memo[id(buffer)] = self._parts.get_buffer(name).clone()
        whole = copy.deepcopy(self._skeleton, memo).train(self._parts.training)
        set_masks(whole, masks_of(self._parts) & masks_of(self._skeleton))
        return whole

    def _deal_out(self, whole: nn.Module) -> None:
        carry_masks(self._parts, masks_of(whole), inspect_model(whole))
        for name in self.plan.replacements if self.plan else ():
            self._put(name, whole.get_parameter(name))
        self._watch_gradients()
        self._enforce()

    def _watch_gradients(self) -> None:
        if self.model is self._parts:  # those of the whole model that there is for an update are nobody's
            super()._watch_gradients()

    def _zero_moments(self) -> None:
        if self.model is self._parts:
            super()._zero_moments()

    # what a way of sharding knows

    def _full(self, name: str) -> Tensor:
        """A copy of the whole parameter."""
        parameter = self._parts.get_parameter(name)
        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach().clone()

    @torch.no_grad()
    def _put(self, name: str, whole: Tensor) -> None:
        """Let a parameter be `whole`, which is the same on all processes."""
        parameter = self._parts.get_parameter(name)
        if isinstance(parameter, DTensor):
            parameter.to_local().copy_(local_part(parameter, whole.detach()))
        else:
            parameter.copy_(whole)
