"""By kind: each kind of site loses the same share, and within a kind the lowest scores leave."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hf_prune.allocation.room import Look, Pool, Room, fitted, name_of
from hf_prune.structure.sites import ModelStructure, Site, Target, WeightSite


@dataclass(frozen=True)
class ByKind:
    """Scores compete between sites of one kind only, so that no kind starves another because its scores are smaller.

    Sites are of one kind if their names differ by numbers alone: the feed-forwards of the encoder are one, its attentions
    another, those of the decoder two more. A weight is of the kind of the attention or feed-forward that it is a part of.
    """

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset()

    def pools(self, room: Room, look: Look) -> list[Pool]:
        kinds: dict[str, list[Site | WeightSite]] = {}
        for site in room.sites:
            kinds.setdefault(kind_of(site, look.structure), []).append(site)
        sizes, least, most = (
            [sum(part[site.key] for site in sites) for sites in kinds.values()]
            for part in (room.sizes, room.least, room.most)
        )
        amounts = fitted(sizes, least, most, room.total)
        return [Pool(tuple(sites), amount) for sites, amount in zip(kinds.values(), amounts, strict=True)]


def kind_of(site: Site | WeightSite, structure: ModelStructure) -> str:
    """The name of what the site is, with the numbers out."""
    whole: Site | WeightSite = site
    if isinstance(site, WeightSite):
        owners = [
            each
            for each in structure.sites
            if each.target != "layers" and any(piece.name == site.name for piece in each.slices)
        ]
        # a query norm's width may be shared; a weight itself is of one
        whole = owners[0] if owners else site
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name_of(whole))
