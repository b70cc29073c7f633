"""Dropped parts of layers: what must stay for the rest to work, and their physical removal.

A masked part's parameters are zeros, so that the residual stream passes it unchanged. In its place comes a module that
gives what the masked one gives: zeros, or an argument (BLOOM's attention adds the residual stream by itself).
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.apply.present import dropped_blocks, dropped_modules
from hf_prune.checkpoint.modeling_hf_prune import ZEROS, Returns, absent
from hf_prune.errors import PruneError, VerificationError
from hf_prune.plan import KeepMasks
from hf_prune.structure import ModelStructure, Site, layouts
from hf_prune.structure.cost import evaluating
from hf_prune.structure.inputs import example_inputs
from hf_prune.structure.naming import ModuleNames, is_linear
from hf_prune.structure.parts import own_attentions


def check_parts(model: nn.Module, masks: KeepMasks, structure: ModelStructure) -> None:
    """Refuse masks that leave the parts of a stack without one that the others depend on.

    Raises:
        PruneError: no part of a kind is left, or none that block 0 could hand its position bias to.
    """
    dropped = dropped_blocks(structure, masks)
    for site in structure:
        if site.part != "attention" or not (site.key in masks.units or any(block in dropped for block in site.blocks)):
            continue
        keep = masks.units.get(site.key, torch.ones(site.n_units, dtype=torch.bool)).tolist()
        gone = {number for number, is_kept in zip(site.numbers, keep, strict=True) if not is_kept}
        kinds, there = _kinds(model, site), own_attentions(model, site.blocks).keys()
        stays = [number for number, block in enumerate(site.blocks) if block not in dropped]
        left = {number for number in stays if number in there and number not in gone}
        lacking = sorted({kinds[number] for number in stays if number in there} - {kinds[n] for n in left})
        if there and not left:  # they left with their blocks, and others stay, of another kind (linear attention)
            lacking = lacking or [""]
        if lacking:
            raise PruneError(
                f"{site.name}: {f'no {lacking[0]}' if lacking[0] else 'no attention'} is left in its {len(stays)} blocks, "
                "and a cache counts positions by one; keep one"
            )
        if stays[0] > 0 and stays[0] not in left and _owns(model.get_submodule(site.blocks[0])):
            raise PruneError(
                f"{site.name}: block {stays[0]} would inherit the position bias of block 0, but its attention leaves too; "
                "keep one of them"
            )


def absent_modules(
    model: nn.Module,
    masks: KeepMasks,
    structure: ModelStructure,
    sample: Mapping[str, Any] | None = None,
    in_place: Collection[str] = (),
) -> dict[str, Returns]:
    """By module that leaves with a dropped part, or whole from a stack of `in_place`: what the one in its place has to return.

    Found by running the masked model once: arguments and outputs of the module are looked at.

    Args:
        sample: keyword inputs of the model; made up if not given.

    Raises:
        VerificationError: a module gives something else than zeros or one of its arguments, or isn't reached.
    """
    blocks = dropped_blocks(structure, masks)
    inside = tuple(f"{block}." for block in blocks)
    of_parts = KeepMasks({key: keep for key, keep in masks.units.items() if structure[key].branches})
    leaving = [name for name in dropped_modules(structure, of_parts) if not f"{name}.".startswith(inside or ("\0",))]
    stepped_over = [block for block in blocks if block.rpartition(".")[0] in in_place]
    for block in stepped_over:
        _refuse_swapped(model, block)
    leaving += stepped_over
    found: dict[str, Returns] = {name: ZEROS for name in leaving if is_linear(model.get_submodule(name))}
    handles = []
    for name in leaving:
        module = model.get_submodule(name)
        if name not in found:
            handles.append(module.register_forward_hook(_looking(name, module, found), with_kwargs=True))
    if handles:
        try:
            with evaluating(model), torch.no_grad():
                model(**(sample or example_inputs(model)))
        finally:
            for handle in handles:
                handle.remove()
    if unreached := [name for name in leaving if name not in found]:
        raise VerificationError(
            f"{unreached[0]} isn't reached by the inputs at hand, so that what it returns can't be told; pass calibration "
            "data that reaches it, or exclude its stack"
        )
    return found


def _refuse_swapped(model: nn.Module, block: str) -> None:
    """Refuse to step over a block that gets new attentions as the model runs (BigBird)."""
    swap = next((own for own in layouts.ATTENTION_SWAPS if hasattr(model.get_submodule(block), own)), None)
    if swap:
        raise VerificationError(
            f"{swap} puts new attentions into {block} as the model runs, so that nothing can take its place. The model is as it "
            "was; exclude its stack"
        )


def put_absent_(model: nn.Module, leaving: Mapping[str, Returns]) -> None:
    """Put a module that holds nothing in place of each that leaves."""
    for name, returns in leaving.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, absent(model.get_submodule(name), returns))


class Caches:
    """The attentions of a stack by their places in a cache of keys: the ones that are left fill it without a gap.

    Models take the length of what is cached from the first place, and the config says the kind of each place (sliding or
    full), so that the k-th attention of a kind takes the k-th place of that kind.
    """

    def __init__(self, model: nn.Module, site: Site):
        self.kinds = _kinds(model, site)
        self.attentions = {
            number: model.get_submodule(name) for number, name in own_attentions(model, site.blocks).items()
        }

    def renumber_(self, kept_blocks: Sequence[int], gone: Collection[int]) -> None:
        """Number the attentions of `kept_blocks` that aren't in `gone`, both by old numbers."""
        if len(self.attentions) == len(self.kinds) and not gone:
            return  # each has the number of its block
        free: dict[str, list[int]] = {}
        for place, number in enumerate(kept_blocks):
            free.setdefault(self.kinds[number], []).append(place)
        for number in kept_blocks:
            if number in self.attentions and number not in gone:
                place = free[self.kinds[number]].pop(0)
                for module in self.attentions[number].modules():
                    for name in layouts.LAYER_NUMBER_NAMES:
                        if type(module.__dict__.get(name)) is int:
                            setattr(module, name, place)


def _kinds(model: nn.Module, site: Site) -> list[str]:
    """Of each block, the kind of its attention as caches see it; all alike where the config doesn't say."""
    kinds = getattr(ModuleNames(model).config_of(site.name), layouts.LAYER_KINDS, None)
    if isinstance(kinds, (list, tuple)) and len(kinds) == len(site.blocks):
        return list(kinds)
    return [""] * len(site.blocks)


def _owns(block: nn.Module) -> bool:
    return any(
        isinstance(getattr(module, owned, None), nn.Module)
        for module in block.modules()
        for owned, _ in layouts.OWNED_BY_FIRST_BLOCK
    )


def _looking(name: str, module: nn.Module, found: dict[str, Returns]) -> Any:
    """A hook that notes what the masked `module` returns."""
    names = list(inspect.signature(module.forward).parameters)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        first, *rest = output if isinstance(output, tuple) else (output,)
        hands_on = next((key for key, value in given.items() if _same(first, value)), None)
        # without storage only the kinds of what is returned can be told, and sizes are all that is asked
        if not (isinstance(first, Tensor) and (hands_on or first.is_meta or not first.any())):
            raise VerificationError(
                f"{name} returns something of its own once its parameters are zero, so that nothing can take its place. "
                "The model is as it was; exclude its stack, or report its layout."
            )
        others = [
            next((key for key, value in given.items() if each is value and each is not None), None) for each in rest
        ]
        found[name] = [hands_on or ZEROS, *others] if isinstance(output, tuple) else hands_on or ZEROS

    return hook


def _same(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape) or a.is_meta:
        return a is b
    return bool(a.any()) and torch.equal(a, b)
