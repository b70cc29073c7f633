"""Masks on a live model: what is masked is zero (weights, neurons, heads, parts) or bypassed (layers), and stays so.

The masks are kept on the model object, outside its parameters and buffers: they are not in its state dict, and they
survive `copy.deepcopy`. A masked entry is remembered, never told by being zero: a kept weight may underflow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_prune.apply.parts import check_parts
from hf_prune.apply.shards import local_part, local_slices
from hf_prune.errors import PruneError
from hf_prune.plan import KeepMasks
from hf_prune.structure import ModelStructure, Site, inspect_model
from hf_prune.structure.routing import KeptExperts


_ATTRIBUTE = "_hf_prune_masked"


@dataclass
class MaskedTensor:
    """Removed entries of one parameter: slices `index` along `dim`, entries where `keep` is False, or all (neither)."""

    name: str
    dim: int = 0
    index: Tensor | None = None
    keep: Tensor | None = None
    _local: MaskedTensor | None = field(default=None, repr=False, compare=False)  # of a sharded parameter

    @property
    def is_whole(self) -> bool:
        """Whether the parameter leaves as it is."""
        return self.index is None and self.keep is None

    def zero_(self, tensor: Tensor) -> None:
        """Zero the removed entries of `tensor`: the parameter, its gradient, or an optimizer's moment."""
        if isinstance(tensor, DTensor):
            self._local = self._local or self._within(tensor)
            self._local.zero_(tensor.to_local())
            return
        if self.index is not None:
            if self.index.device != tensor.device:
                self.index = self.index.to(tensor.device)
            tensor.index_fill_(self.dim, self.index, 0)
        if self.keep is not None:
            if self.keep.device != tensor.device:
                self.keep = self.keep.to(tensor.device)
            _zero_but_(tensor, self.keep)
        if self.is_whole:
            tensor.zero_()

    def values(self, tensor: Tensor) -> Tensor:
        """A copy of the removed entries of `tensor`."""
        if self.index is not None:
            return tensor.detach().index_select(self.dim, self.index.to(tensor.device))
        if self.keep is not None:
            gone = ~self.keep.to(tensor.device)
            # allocated before the larger buffers of the selection, which then leave no gap in memory
            values = tensor.new_empty(int(gone.sum()))
            return torch.masked_select(tensor.detach(), gone, out=values)
        return tensor.detach().clone()

    def _within(self, tensor: DTensor) -> MaskedTensor:
        """The same entries of the part of `tensor` that this process holds."""
        return MaskedTensor(
            self.name,
            self.dim,
            None if self.index is None else local_slices(tensor, self.dim, self.index),
            None if self.keep is None else local_part(tensor, self.keep),
        )

    def restore_(self, tensor: Tensor, values: Tensor) -> None:
        """Put back what `values` copied."""
        if self.index is not None:
            tensor.index_copy_(self.dim, self.index.to(tensor.device), values)
        elif self.keep is not None:
            tensor[~self.keep.to(tensor.device)] = values
        else:
            tensor.copy_(values)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their size in bytes


def _zero_but_(tensor: Tensor, keep: Tensor) -> None:
    """Zero what `keep`, bool, doesn't keep, whatever is there: bits times 0 or 1, where a product would make NaN of infinity.

    On a CPU `masked_fill_` takes 25 times as long, and this runs twice a step over all weights.
    """
    if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_complex():
        tensor.detach().view(_INTEGERS[tensor.element_size()]).mul_(keep.view(torch.int8))
    else:
        tensor.masked_fill_(~keep, 0)


@dataclass
class _Masked:
    masks: KeepMasks = field(default_factory=KeepMasks)
    tensors: list[MaskedTensor] = field(default_factory=list)


def masks_of(model: nn.Module) -> KeepMasks:
    """The keep-masks on `model`; empty if it has none."""
    masked = model.__dict__.get(_ATTRIBUTE)
    return masked.masks if masked is not None else KeepMasks()


def set_masks(model: nn.Module, masks: KeepMasks, structure: ModelStructure | None = None) -> None:
    """Put `masks` on `model` in place of those that it has, zero the masked entries and bypass the masked layers.

    What left stays zero: a mask that is taken off does not bring the old weight back.

    Raises:
        PruneError: a mask names no site or parameter of the model, or has another shape.
    """
    structure = structure or inspect_model(model)
    check_masks(model, masks, structure)
    carry_masks(model, masks, structure)
    enforce_(model)
    _forget(model)


def _forget(model: nn.Module) -> None:
    """Empty what modules remember of earlier inputs: weights that have left went into it (OmDet-Turbo's embeddings of texts)."""
    for module in model.modules():
        for value in vars(module).values():
            if type(value).__name__.endswith("LRUCache") and isinstance(getattr(value, "cache", None), dict):
                value.cache.clear()


def carry_masks(model: nn.Module, masks: KeepMasks, structure: ModelStructure) -> None:
    """`set_masks` for masks that are known to fit `structure`, on a model whose parameters may be sharded; zeroes nothing yet."""
    clear_masks(model)
    for site in structure.of("layers"):
        if site.key in masks.units:
            _bypass(model, site, masks.units[site.key])
    choose_kept_(model, structure, masks)
    model.__dict__[_ATTRIBUTE] = _Masked(masks, masked_entries(structure, masks))


def choose_kept_(module: nn.Module, structure: ModelStructure, masks: KeepMasks, prefix: str = "") -> None:
    """Let the routers of `module`, whose names begin with `prefix` in the model, choose no expert that left."""
    for site in structure.of("experts"):
        if site.router.startswith(prefix) and not masks.units.get(site.key, torch.ones(1)).all():
            router = module.get_submodule(site.router[len(prefix) :])
            router.register_forward_hook(KeptExperts(site, masks.units[site.key]), with_kwargs=True)


def masked_entries(structure: ModelStructure, masks: KeepMasks) -> list[MaskedTensor]:
    """Where in the parameters the removed neurons, heads, parts of layers and single weights are."""
    entries = []
    for key, keep in masks.units.items():
        gone = torch.nonzero(~keep).reshape(-1)
        if len(gone):
            site = structure[key]
            entries += [MaskedTensor(piece.name, piece.dim, piece.index(gone)) for piece in site.slices]
            if site.branches:
                entries += [MaskedTensor(name) for unit in gone.tolist() for name in site.branches[unit].parameters]
    entries += [MaskedTensor(name, keep=keep) for name, keep in masks.weights.items() if not keep.all()]
    return entries


def clear_masks(model: nn.Module) -> None:
    """Forget the masks and remove the bypasses; weights stay as they are."""
    model.__dict__.pop(_ATTRIBUTE, None)
    for module in model.modules():
        for hook_id in [
            key for key, hook in module._forward_hooks.items() if isinstance(hook, (_Bypass, KeptExperts))
        ]:
            del module._forward_hooks[hook_id]
            module._forward_hooks_with_kwargs.pop(hook_id, None)
        for hook_id in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _Restart)]:
            del module._forward_pre_hooks[hook_id]


def masked_tensors(model: nn.Module) -> Iterator[tuple[MaskedTensor, nn.Parameter]]:
    """Each group of removed entries with the parameter that holds them; a parameter may come several times."""
    masked = model.__dict__.get(_ATTRIBUTE)
    if masked is None:
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for entry in masked.tensors:
        yield entry, parameters[entry.name]


@torch.no_grad()
def enforce_(model: nn.Module) -> None:
    """Zero all masked entries again, as after an optimizer's step."""
    for entry, parameter in masked_tensors(model):
        entry.zero_(parameter)


def check_masks(model: nn.Module, masks: KeepMasks, structure: ModelStructure) -> None:
    """Refuse masks that don't fit, as `set_masks` does, before anything is changed."""
    sites = {site.key: site.n_units for site in structure.sites}
    least = {site.key: site.n_least for site in structure.sites}
    for key, keep in masks.units.items():
        if key not in sites:
            raise PruneError(f"the mask names site {key!r}, which {structure.model_class} has not")
        if keep.shape != (sites[key],) or keep.dtype != torch.bool:
            raise PruneError(
                f"the mask of {key} is {keep.dtype} {tuple(keep.shape)}; expected torch.bool ({sites[key]},)"
            )
        if not keep.any():
            raise PruneError(f"the mask of {key} keeps none of {sites[key]} units; keep at least one")
        if int(keep.sum()) < least[key]:
            raise PruneError(
                f"the mask of {key} keeps {int(keep.sum())} of {sites[key]} units, and its router compares {least[key]}; set "
                f"min_keep to {least[key]}"
            )
    check_parts(model, masks, structure)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, keep in masks.weights.items():
        if shapes.get(name) != tuple(keep.shape) or keep.dtype != torch.bool:
            raise PruneError(
                f"the mask of {name} is {keep.dtype} {tuple(keep.shape)}; expected torch.bool {shapes.get(name)}"
            )


# --------------------------------------------------------------------------------------------------------------
# masked layers


def _bypass(model: nn.Module, site: Site, keep: Tensor) -> None:
    """Hook each masked block so that its output is its input; what else it returns (a position bias) stays."""
    positions: dict[str, list[bool]] = {}
    for block, kept in zip(site.blocks, keep.tolist(), strict=True):
        positions.setdefault(block, []).append(not kept)
    for block, skipped in positions.items():
        if any(skipped):
            bypass = _Bypass(skipped)
            # first, so that hooks that note hidden states (Transformers' own) see what the next block gets
            model.get_submodule(block).register_forward_hook(bypass, with_kwargs=True, prepend=True)
            if site.is_shared:
                caller = model.get_submodule(site.name.rpartition(".")[0])
                caller.register_forward_pre_hook(_Restart(bypass))


class _Bypass:
    """A forward hook that gives back the block's input at the calls that are masked."""

    def __init__(self, skipped: list[bool]):
        self.skipped = skipped
        self.n_calls = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = self.n_calls % len(self.skipped)
        self.n_calls += 1
        if not self.skipped[call]:
            return output
        tensors = (each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.is_floating_point())
        hidden = kwargs["hidden_states"] if not args and "hidden_states" in kwargs else next(tensors)
        if isinstance(output, Tensor):
            return _Skip.apply(hidden, output)
        return type(output)((_Skip.apply(hidden, output[0]), *output[1:]))


@dataclass
class _Restart:
    """A forward pre-hook on what calls a shared block: a pass that broke off half-way mustn't shift the calls of the next."""

    bypass: _Bypass

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.bypass.n_calls = 0


class _Skip(torch.autograd.Function):
    """x, f(x) -> x. The block's parameters get a zero gradient, not none: DistributedDataParallel waits for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.zeros_like(gradient)
