"""Shrinking in the middle of training: the optimizer and the wrapper follow the model's new parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_prune.apply.masks import masks_of, set_masks
from hf_prune.apply.present import dropped_modules, is_inside
from hf_prune.apply.shrink import kept_index
from hf_prune.errors import RecipeError
from hf_prune.pipeline import shrink_
from hf_prune.plan import PruningPlan
from hf_prune.recipe import Recipe
from hf_prune.structure import inspect_model


N_STEPS_TIMED = 200  # of each kind: their median tells of a usual step, whatever was saved or evaluated in between


@dataclass
class _Sliced:
    """A parameter that becomes smaller: where its successor will be, and what is kept of it, dimension by dimension."""

    module: nn.Module
    tensor: str
    kept: list[tuple[int, Tensor]] = field(default_factory=list)

    @property
    def successor(self) -> nn.Parameter:
        return self.module.get_parameter(self.tensor)

    def of(self, tensor: Tensor) -> Tensor:
        """What is kept of a moment."""
        for dim, index in self.kept:
            tensor = tensor.index_select(dim, index.to(tensor.device))
        return tensor


class Following:
    """What an optimizer holds of a masked model, to be sliced along once the model is shrunk.

    Made before the model is shrunk, `follow_` called after. Parameter groups keep their options and their order; what left
    the model leaves its group; moments of what became smaller are sliced as it was, all other state stays.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.model, self.optimizer = model, optimizer
        self._sliced: dict[nn.Parameter, _Sliced] = {}
        structure, masks = inspect_model(model), masks_of(model)
        gone = dropped_modules(structure, masks)
        for key, keep in masks.units.items():
            site = structure[key]
            if keep.all() or site.target == "layers" or is_inside(site, gone):
                continue
            for piece in site.slices:
                module = model.get_submodule(piece.module)
                tensor = getattr(module, piece.tensor)
                if isinstance(tensor, nn.Parameter):
                    sliced = self._sliced.setdefault(tensor, _Sliced(module, piece.tensor))
                    before = next((len(index) for dim, index in reversed(sliced.kept) if dim == piece.dim), None)
                    sliced.kept.append((piece.dim, kept_index(piece, keep, before or tensor.shape[piece.dim])))

    def obstacle(self) -> str | None:
        """What of the optimizer's state can't be sliced, if anything."""
        for parameter in self._sliced:
            for name, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.numel() != 1 and value.shape != parameter.shape:
                    return (
                        f"{type(self.optimizer).__name__} holds {name!r} of shape {tuple(value.shape)} for a parameter of "
                        f"{tuple(parameter.shape)}"
                    )
        return None

    def follow_(self) -> None:
        """Take up the parameters that the model has now."""
        present = set(self.model.parameters())
        for group in self.optimizer.param_groups:
            followed = []
            for parameter in group["params"]:
                sliced = self._sliced.get(parameter)
                successor = parameter if sliced is None else sliced.successor
                state = self.optimizer.state.pop(parameter, None)
                if successor not in present:
                    continue
                followed.append(successor)
                if state is not None:
                    if sliced is not None:
                        state = {
                            name: sliced.of(value)
                            if isinstance(value, Tensor) and value.shape == parameter.shape
                            else value
                            for name, value in state.items()
                        }
                    self.optimizer.state[successor] = state
            group["params"] = followed


def resize_(model: nn.Module, optimizer: torch.optim.Optimizer | None, plan: PruningPlan) -> None:
    """Give a dense model the shapes that it has after `plan`, whatever its weights are, and its optimizer, if any, along."""
    plan.require_model(model)
    set_masks(model, plan.masks)
    following = None if optimizer is None else Following(model, optimizer)
    shrink_(model)
    if following is not None:
        following.follow_()


def require_whole(wrapped: nn.Module, recipe: Recipe) -> None:
    """Refuse a model that no process has whole.

    Raises:
        RecipeError: with the remedy.
    """
    engine = any(
        type(module).__name__ in ("DeepSpeedEngine", "FullyShardedDataParallel") for module in wrapped.modules()
    )
    sharded = any(
        isinstance(p, DTensor) or hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in wrapped.parameters()
    )
    if engine or sharded:
        raise RecipeError(
            SHARDED
            if recipe.schedule.shrink == "when_final"
            else "under FSDP and DeepSpeed no process holds whole parameters, which Pruner needs; use PruningTrainer or PruningMixin"
        )


SHARDED = (
    "schedule.shrink: when_final makes parameters smaller in the middle of training, and under FSDP and DeepSpeed no process "
    "holds them whole; write shrink: at_end, or train under DistributedDataParallel or on one process"
)


def require_comparable_layers(recipe: Recipe) -> None:
    """Refuse to compare hidden states with a teacher's once layers are gone: a resumed run couldn't tell which.

    Raises:
        RecipeError: with the remedy.
    """
    hidden = recipe.distillation is not None and recipe.distillation.hidden_states > 0
    if hidden and recipe.schedule.shrink == "when_final" and any(step.target == "layers" for step in recipe.prune):
        raise RecipeError(
            "distillation.hidden_states pairs the layers with the teacher's, and schedule.shrink: when_final deletes some on the "
            "way; write shrink: at_end, or hidden_states: 0"
        )


def wrap_again_(wrapped: nn.Module) -> None:
    """Make a DistributedDataParallel in `wrapped`, the same object, anew for the parameters that its model has now."""
    for wrapper in wrapped.modules():
        if not isinstance(wrapper, DistributedDataParallel):
            continue
        options: dict[str, Any] = {
            "device_ids": wrapper.device_ids,
            "output_device": wrapper.output_device,
            "dim": wrapper.dim,
            "broadcast_buffers": wrapper.broadcast_buffers,
            "process_group": wrapper.process_group,
            "bucket_cap_mb": wrapper.bucket_bytes_cap / 2**20,
            "find_unused_parameters": wrapper.find_unused_parameters,
            "gradient_as_bucket_view": wrapper.gradient_as_bucket_view,
            "static_graph": wrapper.static_graph,
        }
        module, hooks, training = wrapper.module, list(wrapper._comm_hooks), wrapper.training
        # its hooks on parameters go with the reducer
        del wrapper.reducer, wrapper.logger
        DistributedDataParallel.__init__(wrapper, module, **options)
        wrapper.training = training
        for hook, state in hooks:
            wrapper.register_comm_hook(state, hook)
        return


class Pace:
    """Wall-clock seconds of optimizer steps, those of the masked model apart from those of the shrunk one."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"masked": [], "shrunk": []}
        self._since: float | None = None

    def lap(self, now: float, kind: str, *, counts: bool = True) -> None:
        """A step ended; where it was an update it doesn't count."""
        if counts and self._since is not None:
            self.seconds[kind] = [*self.seconds[kind], now - self._since][-N_STEPS_TIMED:]
        self._since = now

    def measured(self) -> dict[str, Any] | None:
        """Medians and their quotient; None where one of the two was never timed."""
        if not all(self.seconds.values()):
            return None
        masked, shrunk = (median(self.seconds[kind]) for kind in ("masked", "shrunk"))
        counts = {f"n_{kind}": len(seconds) for kind, seconds in self.seconds.items()}
        return {"masked": masked, "shrunk": shrunk, "masked_over_shrunk": masked / shrunk, **counts}
