"""What a model costs, and what each unit of it does: parameters, and multiply-accumulate operations (MACs).

Axes: B samples, H heads, Q and K positions of queries and keys, d entries.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_prune.structure.layouts import OWNED_BY_FIRST_BLOCK
from hf_prune.structure.naming import is_within
from hf_prune.structure.sites import ModelStructure, Site
from hf_prune.structure.source import forward_of


UnitMasks = Mapping[str, Tensor]  # by site key, bool (n_units,): True is still there


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module's own as before."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


@dataclass(frozen=True)
class UnitCosts:
    """What is there: `total` of the model, and of each unit by site key, float64 (n_units,)."""

    total: float
    per_unit: Mapping[str, Tensor]


def count_parameters(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """MACs of one forward pass on `inputs`, counted by PyTorch as it runs (its flops are two a MAC).

    Counts matrix products, convolutions and attention; not norms, activations and softmax.
    """
    return int(_macs_by_module(model, inputs)[""])


def parameter_costs(model: nn.Module, structure: ModelStructure, there: UnitMasks) -> UnitCosts:
    """Parameters of the model and of each unit, without the units that are no longer `there`.

    A shared block costs nothing: fewer calls leave its parameters where they are.
    """
    sizes = _Present(model, structure, there)
    named = dict(model.named_parameters(remove_duplicate=False))
    per_unit = {}
    for site in structure:
        if site.target != "layers":
            per_unit[site.key] = _same(site, sum(sizes.of_unit(model, site)))
        elif site.branches:
            held = [sum(sizes.of_tensor(name, named[name]) for name in b.parameters) for b in site.branches]
            per_unit[site.key] = torch.tensor(held, dtype=torch.float64)
        elif site.is_shared:
            per_unit[site.key] = _same(site, 0)
        else:
            held = [sum(sizes.of_tensor(*each) for each in sizes.of_block(model, block)) for block in site.blocks]
            per_unit[site.key] = torch.tensor(held, dtype=torch.float64)
    return UnitCosts(sum(sizes.of_tensor(*each) for each in model.named_parameters()), per_unit)


def mac_costs(model: nn.Module, structure: ModelStructure, there: UnitMasks, inputs: Mapping[str, Any]) -> UnitCosts:
    """MACs on `inputs` of the model and of each unit, without the units that are no longer `there`.

    A matrix product's MACs belong to the entries of its weight alike; all else that an attention computes, to its
    heads; a layer's are those of its block, at each call, and a part's those of what leaves with it.
    """
    counted = _macs_by_module(model, inputs)
    calls = _calls_kept(structure, there)  # of each block, what part of its calls
    total = counted[""] - sum(counted.get(block, 0) * (1 - kept) for block, kept in calls.items())
    for block, kept in calls.items():
        inside = [name for name in counted if is_within(name, block)]
        counted |= {name: counted[name] * kept for name in inside}
    for module in _modules_gone(structure, there):
        gone = counted.get(module, 0)
        total -= gone
        around = [name for name in counted if name and module.startswith(f"{name}.")]
        counted |= {name: counted[name] - gone for name in around}
        counted |= {name: 0 for name in counted if is_within(name, module)}
    sizes = _Present(model, structure, there)
    parts = {
        site.key: [*_products(model, site, sizes, counted), *_mixing(model, site, counted)]
        for site in structure
        if site.target != "layers"
    }
    n_gone = {key: int((~keep).sum()) for key, keep in there.items() if key in parts}

    def left(path: str) -> float:
        """What has left the inside of a module."""
        return sum(n * macs for key, n in n_gone.items() for name, macs in parts[key] if f"{name}.".startswith(path))

    per_unit = {key: _same(structure[key], sum(macs for _, macs in of_site)) for key, of_site in parts.items()}
    for site in structure:
        if site.branches:
            by_part = [
                sum(counted.get(module, 0) - left(f"{module}.") for module in branch.modules)
                for branch in site.branches
            ]
            per_unit[site.key] = torch.tensor(by_part, dtype=torch.float64)
    for site in structure.of("layers"):
        by_call = [
            (counted.get(block, 0) - left(f"{block}.")) / (calls.get(block, 1) * site.blocks.count(block) or 1)
            for block in site.blocks
        ]
        per_unit[site.key] = torch.tensor(by_call, dtype=torch.float64)
    return UnitCosts(total - left(""), per_unit)


def _products(
    model: nn.Module, site: Site, sizes: _Present, counted: Mapping[str, float]
) -> Iterator[tuple[str, float]]:
    """For each linear layer and convolution of a site, its name and the MACs of one unit in it."""
    for piece, entries in zip(site.slices, sizes.of_unit(model, site), strict=True):
        if piece.tensor == "weight":
            yield piece.module, counted.get(piece.module, 0) * entries / model.get_parameter(piece.name).numel()


def _mixing(model: nn.Module, site: Site, counted: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """For each attention of a site, its name and the MACs of one unit outside what has a weight."""
    for name, module in model.named_modules():
        if site.target == "attention_heads" and fnmatchcase(name, site.name):
            products = sum(
                counted.get(f"{name}.{path}", 0) for path, inner in module.named_modules() if hasattr(inner, "weight")
            )
            yield name, (counted.get(name, 0) - products) / site.n_units


class _Present:
    """Sizes of tensors once the units that aren't there have left."""

    def __init__(self, model: nn.Module, structure: ModelStructure, there: UnitMasks):
        self._handed_on = _handed_on(model)
        dropped = [block for block, kept in _calls_kept(structure, there).items() if not kept]
        self._dropped = tuple(f"{module}." for module in (*dropped, *_modules_gone(structure, there)))
        self._gone: dict[tuple[str, int], int] = {}
        for key, keep in there.items():
            for piece in structure[key].slices:
                n_entries = int((~keep).sum()) * piece.entries_per_unit
                self._gone[piece.name, piece.dim] = self._gone.get((piece.name, piece.dim), 0) + n_entries

    def of_tensor(self, name: str, tensor: Tensor, without: int | None = None) -> int:
        """The number of entries; of one along the dimension `without`. None in a layer that has left."""
        if name.startswith(self._dropped) and name not in self._handed_on:
            return 0
        size = 1
        for dim, length in enumerate(tensor.shape):
            if dim != without:
                size *= length - self._gone.get((name, dim), 0)
        return size

    def of_block(self, model: nn.Module, block: str) -> Iterator[tuple[str, Tensor]]:
        """What leaves with a block: not what it hands on to the next."""
        for name, parameter in model.get_submodule(block).named_parameters(block):
            if name not in self._handed_on:
                yield name, parameter

    def of_unit(self, model: nn.Module, site: Site) -> list[int]:
        """For each slice, how many entries of its tensor one unit holds."""
        return [
            self.of_tensor(piece.name, model.get_parameter(piece.name), piece.dim) * piece.entries_per_unit
            for piece in site.slices
        ]


def _calls_kept(structure: ModelStructure, there: UnitMasks) -> dict[str, float]:
    """For each block of a stack that lost layers, what part of its calls is left."""
    kept: dict[str, list[bool]] = {}
    for site in structure.of("layers"):
        for block, is_kept in zip(site.blocks, there[site.key].tolist(), strict=True) if site.key in there else ():
            kept.setdefault(block, []).append(is_kept)
    return {block: sum(calls) / len(calls) for block, calls in kept.items()}


def _modules_gone(structure: ModelStructure, there: UnitMasks) -> list[str]:
    """The modules of the parts that aren't there any more."""
    return [
        module
        for site in structure
        if site.branches and site.key in there
        for branch, is_kept in zip(site.branches, there[site.key].tolist(), strict=True)
        if not is_kept
        for module in branch.modules
    ]


def _handed_on(model: nn.Module) -> set[str]:
    """The parameters of a first block that go to the next when it leaves: of what it alone has."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    owned = (name for name in names if any(f".{own}." in name for own, _ in OWNED_BY_FIRST_BLOCK))
    places = ((name, re.match(r"(\D*)\.0\.(.*)", name)) for name in owned)
    alone = {name: place[1] for name, place in places if place and f"{place[1]}.1.{place[2]}" not in names}
    return {name for name, stack in alone.items() if _hands_on(model.get_submodule(stack.rpartition(".")[0]))}


def _hands_on(caller: nn.Module) -> bool:
    """Whether what runs the blocks gives each the bias that the one before returned (SwitchTransformers' in Transformers 5.12
    doesn't)."""
    source = forward_of(caller)
    return not source or re.search(r"\bposition_bias = (?!None)", source) is not None


def _macs_by_module(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, float]:
    """MACs of each module in one forward pass, those of its children in; the model's own under the empty name."""
    # without gradients by detached parameters: the counter stumbles over those that want one under `no_grad`
    detached = {name: parameter.detach() for name, parameter in model.named_parameters()}
    counter = FlopCounterMode(display=False, custom_mapping=_NOT_COUNTED_BY_PYTORCH)
    with evaluating(model), torch.no_grad(), counter:
        torch.func.functional_call(model, detached, (), dict(inputs))
    root = f"{type(model).__name__}."
    counts = {name: sum(by_operation.values()) / 2 for name, by_operation in counter.get_flop_counts().items()}
    return {name.removeprefix(root): n for name, n in counts.items()} | {"": counter.get_total_flops() / 2}


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """(B, H, Q, d) with (B, ., K, d) and (B, ., K, d): scores and mixing."""
    samples, heads, positions, width = query
    return 2 * samples * heads * positions * key[-2] * (width + value[-1])


# PyTorch 2.13 counts the attention kernels of GPUs only.
_NOT_COUNTED_BY_PYTORCH = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def _same(site: Site, cost: float) -> Tensor:
    return torch.full((site.n_units,), float(cost), dtype=torch.float64)
