"""What of a model is still there: outside removed units, outside dropped layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_prune.plan import KeepMasks
from hf_prune.structure import ModelStructure, Site, WeightSite


def dropped_blocks(structure: ModelStructure, masks: KeepMasks) -> list[str]:
    """Names of the blocks that the masks bypass at every call."""
    dropped = []
    for site in structure.of("layers"):
        keep = masks.units.get(site.key)
        if keep is not None and not site.is_shared:
            dropped += [block for block, is_kept in zip(site.blocks, keep.tolist(), strict=True) if not is_kept]
    return dropped


def dropped_modules(structure: ModelStructure, masks: KeepMasks) -> list[str]:
    """Names of the modules that leave whole: blocks, and what holds a part of one."""
    dropped = dropped_blocks(structure, masks)
    for site in structure:
        if site.branches and site.key in masks.units:
            gone = torch.nonzero(~masks.units[site.key]).reshape(-1).tolist()
            dropped += [module for unit in gone for module in site.branches[unit].modules]
    return dropped


def is_inside(site: Site | WeightSite, modules: Sequence[str]) -> bool:
    """Whether a site lies in `modules`: its matrix does, or all that read its units."""
    prefixes = tuple(f"{module}." for module in modules)
    places = [site.module] if isinstance(site, WeightSite) else site.places
    return bool(places) and all(f"{place}.".startswith(prefixes) for place in places)


def units_there(structure: ModelStructure, masks: KeepMasks, site: Site) -> Tensor:
    """The units of a site that are kept, and of parts whose block is: bool, (n_units,)."""
    there = masks.units.get(site.key, torch.ones(site.n_units, dtype=torch.bool))
    if site.branches:
        dropped = dropped_blocks(structure, masks)
        there = there & torch.tensor([branch.block not in dropped for branch in site.branches])
    return there


def present_entries(structure: ModelStructure, masks: KeepMasks, site: WeightSite) -> Tensor:
    """Entries of a weight outside removed units and dropped layers: bool, the weight's shape. Zeros count as there.

    Not to be changed in place: where all or none are there, one element stands for them.
    """
    all_, none = (torch.tensor(value).expand(site.shape) for value in (True, False))
    if is_inside(site, dropped_modules(structure, masks)):
        return none
    present = all_
    for key, keep in masks.units.items():
        gone = torch.nonzero(~keep).reshape(-1)
        for piece in structure[key].slices if len(gone) else ():
            if piece.name == site.name:
                present = present.clone() if present is all_ else present
                present.index_fill_(piece.dim, piece.index(gone), False)
    return present


def kept_entries(structure: ModelStructure, masks: KeepMasks, site: WeightSite) -> Tensor:
    """Entries of a weight that are there and not masked themselves: bool, the weight's shape."""
    present = present_entries(structure, masks, site)
    return present & masks.weights[site.name] if site.name in masks.weights else present


def sparsity(structure: ModelStructure, masks: KeepMasks) -> dict[str, float]:
    """The fraction removed, by kind, where there are masks, of what dropped layers and removed units left there."""
    fractions, dropped = {}, dropped_modules(structure, masks)
    without_parts = KeepMasks({key: keep for key, keep in masks.units.items() if not structure[key].branches})
    for kind in dict.fromkeys(site.kind for site in structure):
        there = [site for site in structure if site.kind == kind and not is_inside(site, dropped)]
        if any(site.key in masks.units for site in there):
            before = sum(
                int(units_there(structure, without_parts, site).sum()) if site.branches else site.n_units
                for site in there
            )
            fractions[kind] = 1 - sum(int(units_there(structure, masks, site).sum()) for site in there) / max(
                before, 1
            )
    n_present = n_kept = 0
    for site in structure.weights:
        if site.name in masks.weights:
            present = present_entries(structure, masks, site)
            n_present += int(present.sum())
            n_kept += int((present & masks.weights[site.name]).sum())
    if n_present:
        fractions["weights"] = 1 - n_kept / n_present
    return fractions
