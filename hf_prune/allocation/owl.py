"""OWL: blocks with more outliers lose fewer weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_prune.allocation.room import Look, Pool, Room, shared_out
from hf_prune.calibration.statistics import SQUARED_INPUTS
from hf_prune.criteria.wanda import Wanda
from hf_prune.errors import RecipeError
from hf_prune.structure import stacks_of
from hf_prune.structure.naming import is_within
from hf_prune.structure.sites import Target, WeightSite


@dataclass(frozen=True)
class Owl:
    """Outlier-weighed layerwise sparsity (Yin et al. 2023, arXiv 2310.05175). The outliers of a block are its entries of
    A = |W| ‖X‖ above M times their mean; D is their share. Sparsities fall linearly with D, within S ± λ and with the mean
    S, the step's sparsity. All matrices of a block lose the same share; one outside the blocks is a block of its own.

    (The paper's code lets the sparsities spread over 2 λ, which may lie unevenly about S; here the bound is kept.) The mean
    is weighed by what is there in each block, so that the total holds.

    Args:
        multiple: M. 5, as the paper has it for most models.
        spread: λ. 0.08, as the paper has it for most models.
    """

    multiple: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        for name, value, holds, said in (
            ("multiple", self.multiple, self.multiple > 0, "above 0"),
            ("spread", self.spread, 0 <= self.spread < 1, "from 0 to below 1"),
        ):
            if not holds:
                raise RecipeError(f"{name} of allocation owl is {value}; expected a number {said}")

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset({SQUARED_INPUTS})

    def pools(self, room: Room, look: Look) -> list[Pool]:
        blocks: dict[str, list[WeightSite]] = {}
        names = [block for stack in stacks_of(look.model).values() for block in stack]
        for site in room.sites:
            assert isinstance(site, WeightSite)
            inside = next((block for block in names if is_within(site.module, block)), site.module)
            blocks.setdefault(inside, []).append(site)
        sizes = {block: sum(room.sizes[site.key] for site in sites) for block, sites in blocks.items()}
        outliers = {block: self._outliers(sites, look) for block, sites in blocks.items() if sizes[block]}
        whole = sum(sizes.values()) or 1.0
        mean = sum(sizes[block] * share for block, share in outliers.items()) / whole
        widest = max((abs(share - mean) for share in outliers.values()), default=0.0)
        sparsity = room.total / whole
        shares: dict[str, float] = {}
        for block, sites in blocks.items():
            away = (mean - outliers.get(block, mean)) / widest if widest else 0.0
            share = min(max(sparsity + self.spread * away, 0.0), 1.0)
            shares |= {site.key: share for site in sites}
        return shared_out(room, shares)

    def _outliers(self, sites: list[WeightSite], look: Look) -> float:
        """D: the share of a block's entries that are more than `multiple` times their mean."""
        wanda = Wanda()
        entries = torch.cat(
            [wanda.score_weights(look.model, site, look.statistics)[look.eligible[site.name]] for site in sites]
        )
        mean = entries.double().mean()
        return float((entries > (self.multiple * mean).float()).double().mean())
