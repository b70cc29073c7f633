"""Physical removal: what is masked leaves, and the tensors become smaller dense ones."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.apply.masks import clear_masks, masks_of, set_masks
from hf_prune.apply.parts import Caches, absent_modules, put_absent_
from hf_prune.apply.present import dropped_blocks, dropped_modules, is_inside
from hf_prune.checkpoint.modeling_hf_prune import ConfigView, set_sizes
from hf_prune.plan import KeepMasks
from hf_prune.structure import ModelStructure, Site, inspect_model, layouts
from hf_prune.structure.naming import parents
from hf_prune.structure.sites import TensorSlice


@dataclass
class ShrinkRecord:
    """What was removed: for each stack the kept blocks' old numbers, for each site how many units were kept."""

    kept_layers: dict[str, list[int]] = field(default_factory=dict)
    kept_units: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def remove_masked_(
    model: nn.Module,
    structure: ModelStructure | None = None,
    sample: Mapping[str, Any] | None = None,
    in_place: Collection[str] = (),
) -> ShrinkRecord:
    """Remove masked neurons, heads, layers and their parts from `model`, in place. Masked single weights stay zeros, and masked.

    Parameters become new `nn.Parameter`s, so an optimizer made before still holds the old ones.

    Args:
        sample: keyword inputs of the model, to see what the parts that leave return; made up if not given.
        in_place: stacks whose layers are stepped over where they were, so that those behind them keep their numbers; beside
            those that discovery found to be told by their places.

    Returns:
        What was removed; the config is not touched (`hf_prune.checkpoint.settle_config_` does that).

    Raises:
        VerificationError: nothing can take the place of a part; the model is as it was.
    """
    structure = structure or inspect_model(model)
    masks = masks_of(model)
    in_place = {*in_place, *(site.name for site in structure.of("layers") if site.in_place)}
    absent = absent_modules(model, masks, structure, sample, in_place)
    stepped_over = [block for block in dropped_blocks(structure, masks) if block in absent]
    gone = dropped_modules(structure, masks)
    weights = {
        name: mask for name, mask in masks.weights.items() if not name.startswith(tuple(f"{m}." for m in absent))
    }
    record = ShrinkRecord()
    removed = {key: keep for key, keep in masks.units.items() if not keep.all()}
    caches = [(site, Caches(model, site)) for site in structure if site.part == "attention"] if removed else []
    for key, keep in removed.items():
        site = structure[key]
        if site.target != "layers" and not is_inside(site, gone):
            narrow_(model, site, keep, weights)
            record.kept_units[key] = int(keep.sum())
    _count_experts(model, structure, masks)
    clear_masks(model)
    put_absent_(model, absent)
    for key, keep in removed.items():
        site = structure[key]
        if site.target == "layers":
            record.kept_units[key] = int(keep.sum())
        if site.target == "layers" and not site.branches and site.name not in in_place:
            record.kept_layers[site.name] = torch.nonzero(keep).reshape(-1).tolist()
            weights = _drop_layers(model, site, record.kept_layers[site.name], weights)
    for site, cache in caches:
        left = ~masks.units.get(site.key, torch.ones(site.n_units, dtype=torch.bool))
        cache.renumber_(
            record.kept_layers.get(site.name, range(len(site.blocks))),
            [
                number
                for number, is_gone in zip(site.numbers, left.tolist(), strict=True)
                if is_gone or site.blocks[number] in stepped_over
            ],
        )
    if weights:
        set_masks(model, KeepMasks(weights=weights))
    return record


def kept_index(piece: TensorSlice, keep: Tensor, size: int) -> Tensor:
    """Of a dimension of `size` entries, those that stay; those that belong to no unit too: multi-query attention's key and value."""
    gone = torch.nonzero(~keep).reshape(-1)
    stays = torch.ones(size, dtype=torch.bool).index_fill_(0, piece.index(gone), False)
    return torch.nonzero(stays).reshape(-1)


def narrow_(model: nn.Module, site: Site, keep: Tensor, weights: dict[str, Tensor]) -> None:
    """Slice every tensor of the site to its kept units, along with the masks of its single weights."""
    n_kept = int(keep.sum())
    for piece in site.slices:
        module = model.get_submodule(piece.module)
        parameter = getattr(module, piece.tensor)
        index = kept_index(piece, keep, parameter.shape[piece.dim])
        smaller = parameter.detach().index_select(piece.dim, index.to(parameter.device))
        setattr(module, piece.tensor, nn.Parameter(smaller, requires_grad=parameter.requires_grad))
        if piece.name in weights:
            weights[piece.name] = weights[piece.name].index_select(piece.dim, index)
        set_sizes(module)
    for piece in site.buffers:
        module = model.get_submodule(piece.module)
        buffer = getattr(module, piece.tensor)
        kept = torch.nonzero(keep).reshape(-1).to(buffer.device)
        setattr(module, piece.tensor, buffer.index_select(piece.dim, kept))
    for norm in site.norms:
        module = model.get_submodule(norm.module)
        grown = site.n_units / n_kept  # N / K
        module.get_parameter("weight").mul_(math.sqrt(grown))
        setattr(module, norm.epsilon, getattr(module, norm.epsilon) * grown)
    views: dict[str, dict[str, int]] = {}
    for attribute in site.attributes:
        counter: Any = model.get_submodule(attribute.module)
        number = attribute.per_unit * n_kept
        if attribute.is_limit:
            now = getattr(counter.config if attribute.of_config else counter, attribute.name)
            number = min(number, now)
        if attribute.of_config:
            views.setdefault(attribute.module, {})[attribute.name] = number
        else:
            setattr(counter, attribute.name, number)
    for name, overrides in views.items():
        reader: Any = model.get_submodule(name)
        reader.config = ConfigView(reader.config, overrides)


def _count_experts(model: nn.Module, structure: ModelStructure, masks: KeepMasks) -> None:
    """Where all mixtures keep equally many experts, the modules around them (that weigh a balancing loss) count those."""
    sites = structure.of("experts")
    kept = {int(masks.units[site.key].sum()) if site.key in masks.units else site.n_units for site in sites}
    before = {site.n_units for site in sites}
    if len(kept) != 1 or len(before) != 1 or kept == before:
        return
    n_kept, n_before = kept.pop(), before.pop()
    around = {name for site in sites for name in parents(site.holder)}
    for module in (model.get_submodule(name) for name in sorted(around)):
        for own in layouts.EXPERT_COUNT_NAMES:
            if module.__dict__.get(own) == n_before:
                setattr(module, own, n_kept)
        for own in layouts.TOP_K_NAMES:
            if type(module.__dict__.get(own)) is int:
                setattr(module, own, min(module.__dict__[own], n_kept))


def _drop_layers(model: nn.Module, site: Site, kept: list[int], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Delete blocks, hand on what the first one owned, renumber. Returns the weight masks under their new names."""
    if site.is_shared:
        field_name = layouts.REPEAT_FIELDS[site.name.rpartition(".")[2]]
        parent = model.get_submodule(site.name.rpartition(".")[0])
        setattr(parent.config, field_name, len(kept))
        return weights
    stack = model.get_submodule(site.name)
    assert isinstance(stack, (nn.ModuleList, nn.Sequential))
    blocks = list(stack)
    _hand_on(blocks[0], blocks[kept[0]])
    for new, old in enumerate(kept):
        for module in blocks[old].modules():
            for name in layouts.LAYER_NUMBER_NAMES:
                if module.__dict__.get(name) == old:
                    setattr(module, name, new)
    parent_name, _, child = site.name.rpartition(".")
    parent = model.get_submodule(parent_name)
    left = [blocks[old] for old in kept]
    setattr(parent, child, nn.ModuleList(left) if isinstance(stack, nn.ModuleList) else nn.Sequential(*left))
    for name in layouts.DEPTH_NAMES:
        if parent.__dict__.get(name) == len(blocks):
            setattr(parent, name, len(kept))
    renamed = {f"{site.name}.{old}.": f"{site.name}.{new}." for new, old in enumerate(kept)}
    moved = {}
    for name, mask in weights.items():
        if not name.startswith(f"{site.name}."):
            moved[name] = mask
            continue
        for old_prefix, new_prefix in renamed.items():
            if name.startswith(old_prefix):
                moved[new_prefix + name[len(old_prefix) :]] = mask
    return moved


def _hand_on(first: nn.Module, heir: nn.Module) -> None:
    """Move what only the first block owns (T5's relative position bias) to the block that becomes the first."""
    if heir is first:
        return
    for owned, flag in layouts.OWNED_BY_FIRST_BLOCK:
        for path, module in first.named_modules():
            if not isinstance(getattr(module, owned, None), nn.Module):
                continue
            target = heir.get_submodule(path)
            if getattr(target, owned, None) is None:  # in UMT5 each block has its own
                setattr(target, owned, getattr(module, owned))
                setattr(target, flag, True)
