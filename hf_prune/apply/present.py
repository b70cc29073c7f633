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


def is_inside(site: Site | WeightSite, blocks: Sequence[str]) -> bool:
    """Whether a site lies in one of `blocks`."""
    return any(site.name == block or site.name.startswith(f"{block}.") for block in blocks)


def present_entries(structure: ModelStructure, masks: KeepMasks, site: WeightSite) -> Tensor:
    """Entries of a weight outside removed units and dropped layers: bool, the weight's shape. Zeros count as there."""
    present = torch.ones(site.shape, dtype=torch.bool)
    if is_inside(site, dropped_blocks(structure, masks)):
        return present.zero_()
    for key, keep in masks.units.items():
        gone = torch.nonzero(~keep).reshape(-1)
        for piece in structure[key].slices if len(gone) else ():
            if piece.name == site.name:
                present.index_fill_(piece.dim, piece.index(gone), False)
    return present


def kept_entries(structure: ModelStructure, masks: KeepMasks, site: WeightSite) -> Tensor:
    """Entries of a weight that are there and not masked themselves: bool, the weight's shape."""
    present = present_entries(structure, masks, site)
    return present & masks.weights[site.name] if site.name in masks.weights else present


def sparsity(structure: ModelStructure, masks: KeepMasks) -> dict[str, float]:
    """The fraction removed, for each target that has masks, of what dropped layers and removed units left there."""
    fractions, dropped = {}, dropped_blocks(structure, masks)
    for target in ("layers", "attention_heads", "ffn_neurons"):
        there = [site for site in structure.of(target) if target == "layers" or not is_inside(site, dropped)]
        if any(site.key in masks.units for site in there):
            kept = sum(int(masks.units[site.key].sum()) if site.key in masks.units else site.n_units for site in there)
            fractions[target] = 1 - kept / sum(site.n_units for site in there)
    n_present = n_kept = 0
    for site in structure.weights:
        if site.name in masks.weights:
            present = present_entries(structure, masks, site)
            n_present += int(present.sum())
            n_kept += int((present & masks.weights[site.name]).sum())
    if n_present:
        fractions["weights"] = 1 - n_kept / n_present
    return fractions
