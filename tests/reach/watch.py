"""What a model holds, told by watching a run: no name of a module and nothing of discovery is looked at.

    attention       a softmax over a product of two activations (a softmax over a router's logits is none), or a fused kernel for one
    feed-forward    two linear maps d -> n -> d around a nonlinearity, position by position: nothing mixes positions in between
    layers          two blocks of one class in one list, each holding two linear maps or more, one called on what the other gave;
                    or one block called on what it gave itself

A linear map is a product with a weight of two axes, or a 1x1 convolution. Axes: d and n are the last axis of a product's
operands, the channels of a convolution's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "addbmm", "linear"}
SOFTMAXES = {"_softmax", "_safe_softmax", "softmax", "_masked_softmax", "_softmax_forward"}
FUSED_ATTENTION = {
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"),
    *("_native_multi_head_attention", "_transformer_encoder_layer_fwd", "_fused_sdp_choice", "flex_attention"),
}
# not powers: a norm that is written out has one, and relu² has the relu
NONLINEAR = {
    *("gelu", "silu", "relu", "sigmoid", "tanh", "mish", "softplus", "erf", "hardswish", "hardsigmoid", "hardtanh"),
    *("leaky_relu", "elu", "clamp", "clamp_min", "glu", "log_sigmoid_forward", "_prelu_kernel", "threshold", "expm1"),
}
PICKING = {"index", "index_select", "gather"}
MIXING = {"cumsum", "_fft_r2c", "_fft_c2c", "_fft_c2r", "lstm", "mkldnn_rnn_layer", "flip"}


@dataclass(frozen=True)
class LinearMap:
    module: str
    d_in: int
    d_out: int


@dataclass
class Mark:
    """What is known of a tensor: made of weights alone, a product of activations, since when mixed, and its linear maps.

    `maps` are the numbers of the linear maps it comes from with nothing but work entry by entry since; True where a
    nonlinearity is among it.
    """

    is_weight: bool = False
    is_product: bool = False
    is_mixed: bool = False
    maps: Mapping[int, bool] = field(default_factory=dict)


@dataclass
class Found:
    """Names of the modules that hold each; of layers those of the lists."""

    attention: set[str] = field(default_factory=set)
    feed_forward: set[str] = field(default_factory=set)
    layers: set[str] = field(default_factory=set)


def watch(model: nn.Module, inputs: Mapping[str, Any]) -> Found:
    """Run `model(**inputs)` once and tell what it holds."""
    watcher = _Watcher(model)
    with _inside(model, watcher), torch.no_grad(), watcher:
        model(**inputs)
    found = watcher.found
    found.layers |= set(_stacks(model, watcher))
    return found


class _Watcher(TorchDispatchMode):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.found = Found()
        self.weights = {id(parameter) for parameter in model.parameters()}
        self.holders = {name for name, module in model.named_modules() if any(True for _ in module.parameters())}
        self.maps: list[LinearMap] = []
        self.where: list[str] = [""]
        self.calls: dict[str, list[tuple[int, Any, Any]]] = defaultdict(list)  # of a list: child, shapes in and out

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        mark = self._mark(operation.__name__.partition(".")[0].rstrip("_"), tensors, result, args)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf) not in self.weights:
                leaf._watched = mark
        return result

    def of(self, tensor: Tensor) -> Mark:
        if id(tensor) in self.weights:
            return Mark(is_weight=True)
        return getattr(tensor, "_watched", None) or Mark()

    def _mark(self, name: str, tensors: list[Tensor], result: Any, args: Any) -> Mark:
        marks = [self.of(tensor) for tensor in tensors]
        if name in FUSED_ATTENTION:
            self.found.attention.add(self._holder())
            return Mark(is_product=True, is_mixed=True)
        if name in PRODUCTS and len(tensors) >= 2 and isinstance(result, Tensor):
            first, second = tensors[1:3] if name in ("addmm", "baddbmm", "addbmm") else tensors[:2]
            return self._product(first, second, result)
        if name == "convolution":
            return self._convolution(tensors[0], tensors[1], result, args)
        if name in SOFTMAXES and any(mark.is_product for mark in marks):
            self.found.attention.add(self._holder())
        if name in PICKING and marks[0].is_weight:
            return Mark(is_weight=True)  # the biases of some experts
        if marks and all(mark.is_weight for mark in marks):
            return Mark(is_weight=True)
        active = [mark for mark in marks if not mark.is_weight]
        maps = _union(active, is_sum=name in ("add", "sub") and len(active) > 1)
        return Mark(
            is_product=any(mark.is_product for mark in active),
            is_mixed=name in MIXING or name in SOFTMAXES or any(mark.is_mixed for mark in active),
            maps=dict.fromkeys(maps, True) if name in NONLINEAR else maps,
        )

    def _product(self, first: Tensor, second: Tensor, result: Tensor) -> Mark:
        marks = self.of(first), self.of(second)
        if not (marks[0].is_weight or marks[1].is_weight):
            return Mark(is_product=True, is_mixed=True)
        if marks[1].is_weight or first.dim() < 2:
            return self._linear(marks[0], first.shape[-1], result.shape[-1])
        return self._linear(marks[1], second.shape[-2], result.shape[-2])  # weight times columns

    def _convolution(self, states: Tensor, weight: Tensor, result: Tensor, args: Any) -> Mark:
        groups = args[8]
        if groups == 1 and weight.dim() > 2 and math.prod(weight.shape[2:]) == 1:
            return self._linear(self.of(states), states.shape[1], result.shape[1])
        return self.of(states) if groups == states.shape[1] == result.shape[1] else Mark()

    def _linear(self, states: Mark, d_in: int, d_out: int) -> Mark:
        """Note the map; with one before it that it leads back from, it makes a feed-forward."""
        here = self._holder()
        for number, is_nonlinear in states.maps.items():
            before = self.maps[number]
            if is_nonlinear and not states.is_mixed and before.d_in == d_out and before.d_out in (d_in, 2 * d_in):
                self.found.feed_forward.add(self._common(before.module, here))
        self.maps.append(LinearMap(here, d_in, d_out))
        return Mark(maps={len(self.maps) - 1: False})

    def _holder(self) -> str:
        """The innermost module at work that holds a parameter."""
        return next((name for name in reversed(self.where) if name in self.holders), "")

    def _common(self, first: str, second: str) -> str:
        """The module around both maps."""
        if first == second:
            return first
        parts = []
        for one, other in zip(first.split("."), second.split("."), strict=False):
            if one != other:
                break
            parts.append(one)
        return ".".join(parts)


def _union(marks: list[Mark], is_sum: bool) -> dict[int, bool]:
    """Where a sum brings together what comes from different maps, it is a residual stream: no map's output any more."""
    if is_sum and not set.intersection(*(set(mark.maps) for mark in marks)):
        return {}
    maps: dict[int, bool] = {}
    for mark in marks:
        for number, is_nonlinear in mark.maps.items():
            maps[number] = maps.get(number, False) or is_nonlinear
    return maps


@contextmanager
def _inside(model: nn.Module, watcher: _Watcher) -> Iterator[None]:
    """Keep `watcher.where` at the modules that are running, and note the calls of what is in lists."""
    hooks = []

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            watcher.where.append(name)

        return hook

    def leave(name: str) -> Any:
        around, _, own = name.rpartition(".")
        listed = isinstance(model.get_submodule(around), (nn.ModuleList, nn.Sequential)) and own.isdigit()

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            watcher.where.pop()
            if listed:
                watcher.calls[around].append((int(own), _shape((args, kwargs)), _shape(output)))

        return hook

    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
        hooks.append(module.register_forward_hook(leave(name), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _shape(values: Any) -> tuple[int, ...] | None:
    """Of the first floating tensor."""
    return next(
        (tuple(leaf.shape) for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()),
        None,
    )


def _stacks(model: nn.Module, watcher: _Watcher) -> Iterator[str]:
    """The outermost lists of which blocks of one class followed each other."""
    found: list[str] = []
    for name, module in model.named_modules():
        calls = watcher.calls.get(name, [])
        if any(name.startswith(f"{other}.") for other in found):
            continue
        for (one, _, given), (other, taken, _) in pairwise(calls):
            alike = (
                (one != other or len(module) == 1)
                and type(module[one]) is type(module[other])
                and given == taken is not None
            )
            if alike and all(_n_maps(f"{name}.{child}", watcher) > 1 for child in (one, other)):
                found.append(name)
                break
    yield from found


def _n_maps(name: str, watcher: _Watcher) -> int:
    return sum(each.module.startswith(f"{name}.") for each in watcher.maps)
