"""Parameters that several modules hold: what leaves one module would have to leave the others in the same step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hf_prune.structure.naming import ModuleNames, is_within
from hf_prune.structure.sites import Refusal, Site


def refuse(names: ModuleNames, sites: Iterable[Site]) -> Iterator[Site | Refusal]:
    """Each site, or why not: it, one of its blocks, or a part of one holds what another module holds too (Zamba)."""
    owners = _owners(names)
    for site in sites:
        pair = next(_shared_outside(site, owners), None)
        if pair is None:
            yield site
        else:
            reason = f"its {pair[0]} is {pair[1]} too, so that what leaves the one would leave the other"
            yield Refusal(site.target, site.name, reason, site.part)


def _owners(names: ModuleNames) -> dict[str, list[str]]:
    """By name of a parameter, all names of it; where a module is shared whole it has one."""
    by_id: dict[int, list[str]] = {}
    for path, module in names.modules.items():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                by_id.setdefault(id(parameter), []).append(f"{path}.{own}")
    return {name: held for held in by_id.values() if len(held) > 1 for name in held}


def _shared_outside(site: Site, owners: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    units: list[tuple[tuple[str, ...], list[str]]]
    inside: tuple[str, ...] = ()  # where blocks of other stacks may hold them too
    if site.target == "layers" and not site.branches:
        units = [
            ((block,), [name for name in owners if is_within(name, block)]) for block in dict.fromkeys(site.blocks)
        ]
        inside = tuple(site.blocks)
    else:
        units = [(branch.modules, [name for name in branch.parameters if name in owners]) for branch in site.branches]
        units.append(((), [piece.name for piece in site.slices if piece.name in owners]))
    own = {piece.name for piece in site.slices}
    for modules, held in units:
        for name in held:
            for other in owners[name]:
                elsewhere = not any(is_within(other, module) for module in modules) and other not in own
                if elsewhere and (not inside or any(is_within(other, block) for block in inside)):
                    yield name, other
