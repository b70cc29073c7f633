"""LoRA by PEFT: what is trained is (W + B A) ⊙ mask, so that merging changes nothing and what left stays zero.

Axes: d_out × d_in of a linear layer's weight (Conv1D: d_in × d_out), rank r.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_prune.apply.masks import enforce_, masked_tensors
from hf_prune.errors import RecipeError
from hf_prune.planning import RecipeLike
from hf_prune.recipe import Recipe
from hf_prune.report import PruningReport
from hf_prune.training.pruner import Pruner, unwrap


class Adapters:
    """The LoRA layers of a PEFT model, and the same model as if it had none.

    Args:
        model: a `PeftModel` with one LoRA adapter.
        recipe: that it is pruned by.

    Raises:
        RecipeError: other adapters than plain LoRA on linear layers, or a recipe that changes weights which no checkpoint of
            an adapter holds.
    """

    def __init__(self, model: Any, recipe: Recipe):
        from peft.tuners.lora import Linear
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper

        if recipe.schedule.shrink == "when_final":
            raise RecipeError(
                "adapters are merged when training ends, and only then can the model shrink; write shrink: at_end"
            )
        if any(step.compensation.name != "none" for step in recipe.prune) or recipe.schedule.rewind is not None:
            raise RecipeError(
                "the weights below adapters are frozen, and their checkpoints don't hold them: a compensation and "
                "schedule.rewind can't change them. Drop the key, or train without adapters."
            )
        self.peft = model
        self.model: nn.Module = model.get_base_model()
        self.layers: dict[str, Any] = {}
        self._others: dict[str, nn.Module] = {}  # what stands for a module that is trained whole
        module: Any
        for name, module in self.model.named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                self._others[name] = module.modules_to_save[str(module.active_adapter)]
            elif isinstance(module, BaseTunerLayer):
                _require_plain_lora(name, module, Linear)
                self.layers[name] = module

    @contextmanager
    def plain(self, *, merged: bool = False) -> Iterator[None]:
        """Inside, the model is that of Transformers, with its own names; if `merged` with the adapters in its weights."""
        weights = {name: layer.base_layer.weight.data for name, layer in self.layers.items()}
        if merged:
            for layer in self.layers.values():
                with torch.no_grad():
                    layer.base_layer.weight.data = layer.base_layer.weight + layer.get_delta_weight(
                        layer.active_adapters[0]
                    )
        wrapped = {name: self.model.get_submodule(name) for name in (*self.layers, *self._others)}
        for name, layer in self.layers.items():
            self._put(name, layer.base_layer)
        for name, module in self._others.items():
            self._put(name, module)
        try:
            yield
        finally:
            for name, data in weights.items():
                self.layers[name].base_layer.weight.data = data
            if merged:
                enforce_(self.model)  # the masks may have grown
            for name, module in wrapped.items():
                self._put(name, module)

    def mask(self) -> None:
        """Let the adapters add nothing where the model's masks, just put on, have something left."""
        keeps: dict[str, Tensor] = {}
        with self.plain():
            for entry, parameter in masked_tensors(self.model):
                module, _, tensor = entry.name.rpartition(".")
                if module in self.layers and tensor == "weight":
                    entry.zero_(keeps.setdefault(module, torch.ones_like(parameter, dtype=torch.bool)))
        for name, keep in keeps.items():
            _mask_layer(self.layers[name], keep)

    def merge(self) -> nn.Module:
        """The model of Transformers with the adapters in its weights; the PEFT model is used up."""
        return self.peft.merge_and_unload()

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        self.model.get_submodule(parent)._modules[child] = module


class AdaptedPruner(Pruner):
    """`Pruner` of a PEFT model: it plans on what the adapters make of the weights, and when training ends merges them, so that
    `model` is Transformers' own from then on. Arguments and errors are those of `Pruner` and of `Adapters`.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: RecipeLike, **named: Any):
        self._adapters = Adapters(unwrap(model), Recipe.load(recipe))
        with self._adapters.plain():
            super().__init__(self._adapters.model, optimizer, recipe, **named)

    def step(self) -> bool:
        with self._adapters.plain(merged=self._is_update()):
            has_changed = super().step()
        if has_changed:
            self._adapters.mask()
        return has_changed

    def finish(self, **named: Any) -> PruningReport:
        self.model = self._adapters.merge()
        return super().finish(**named)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with self._adapters.plain():
            super().load_state_dict(state)
        self._adapters.mask()


def _mask_layer(layer: Any, keep: Tensor) -> None:
    """Make a LoRA layer compute with (s B A) ⊙ keep: in its forward pass, and for whoever merges it."""
    kind, (adapter,) = type(layer), layer.active_adapters

    def get_delta_weight(name: str) -> Tensor:
        return kind.get_delta_weight(layer, name) * keep

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if layer.disable_adapters or layer.merged:
            return kind.forward(layer, x, *args, **kwargs)
        result = layer.base_layer(x, *args, **kwargs)
        delta = layer.get_delta_weight(adapter)  # of the weight's shape; it carries the gradient to A and B
        dropped = layer.lora_dropout[adapter](x.to(delta.dtype))
        added = dropped @ delta if layer.fan_in_fan_out else F.linear(dropped, delta)
        return result + added.to(result.dtype)

    keep = keep.to(layer.base_layer.weight.device)
    layer.get_delta_weight, layer.forward = get_delta_weight, forward


def _require_plain_lora(name: str, layer: Any, linear: Any) -> None:
    if layer.__class__ is not linear:
        raise RecipeError(
            f"{name} is adapted by {type(layer).__name__}; of PEFT's adapters LoRA on linear layers can be pruned"
        )
    adapters = layer.active_adapters
    if len(adapters) != 1 or layer.merged or layer.lora_variant or layer.lora_bias.get(adapters[0]):
        raise RecipeError(
            f"{name}: expected one plain LoRA adapter that isn't merged (no DoRA or other variant, no lora_bias); it has "
            f"{', '.join(adapters) or 'none'}"
        )
