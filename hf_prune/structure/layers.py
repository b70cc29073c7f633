"""Layer sites: a stack of blocks called one after the other; a unit is one call position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from hf_prune.structure import layouts
from hf_prune.structure.naming import ModuleNames
from hf_prune.structure.sites import Refusal, Site


Stacks = dict[str, tuple[str, ...]]


def find_stacks(names: ModuleNames) -> tuple[Stacks, list[Refusal]]:
    """Outermost lists of blocks of one class, by name -> the names of their blocks in call order.

    A block is a module with parameters and children of its own; lists of linear layers or norms aren't stacks.
    """
    stacks: Stacks = {}
    for name, module in names.modules.items():
        if not isinstance(module, nn.ModuleList) or not len(module) or _inside(name, stacks):
            continue
        classes = {type(block) for block in module}
        if len(classes) > 1 or not any(True for _ in module[0].children()) or "Attention" in classes.pop().__name__:
            continue
        blocks = tuple(f"{name}.{index}" for index in range(len(module)))
        field = layouts.REPEAT_FIELDS.get(name.rpartition(".")[2])
        if field and len(module) == 1:
            blocks *= int(getattr(names.config_of(name), field))
        stacks[name] = blocks
    return stacks, []


def find_sites(names: ModuleNames, stacks: Stacks, inner: Sequence[Site]) -> Iterator[Site | Refusal]:
    """One site for each stack whose blocks hold attention or feed-forward parts."""
    for name, blocks in stacks.items():
        if not any(piece.module.startswith(f"{name}.") for site in inner for piece in site.slices) and not any(
            _looks_like_transformer(names.modules[block]) for block in blocks[:1]
        ):
            continue
        reason = _order_matters(names, name, blocks)
        yield Refusal("layers", name, reason) if reason else Site(name, "layers", len(blocks), blocks=blocks)


def _looks_like_transformer(block: nn.Module) -> bool:
    """Blocks whose heads and neurons were all refused are layers still."""
    return any("Attention" in type(module).__name__ for module in block.modules())


def _order_matters(names: ModuleNames, name: str, blocks: tuple[str, ...]) -> str | None:
    config = names.config_of(name)
    for switch in layouts.LAYER_NUMBER_SWITCHES:
        if getattr(config, switch, None):
            return f"config.{switch} makes a layer's function depend on its number"
    for sibling in layouts.FIXED_POSITION_SIBLINGS:
        if isinstance(names.get(name, f"../{sibling}"), nn.Module):
            return f"{sibling} beside the stack is wired to a fixed layer"
    if name.rpartition(".")[2] in layouts.REPEAT_FIELDS and len(set(blocks)) > 1:
        return "several shared blocks take turns, so that dropping one changes which block is called where"
    return None


def _inside(name: str, stacks: Stacks) -> bool:
    return any(name.startswith(f"{stack}.") for stack in stacks)
