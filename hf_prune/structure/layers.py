"""Layer sites: a stack of blocks called one after the other; a unit is one call position."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence

from torch import nn

from hf_prune.structure import layouts
from hf_prune.structure.naming import (
    ModuleNames,
    d_in,
    d_out,
    is_absent,
    is_attention,
    is_linear,
    is_within,
    parents,
    read_list,
)
from hf_prune.structure.sites import Refusal, Site
from hf_prune.structure.source import forward_of


Stacks = dict[str, tuple[str, ...]]

HAS_LEFT = "has left already"
_LAYER = "GradientCheckpointingLayer"  # by name, since importing it imports all of Transformers' model code


def find_stacks(names: ModuleNames) -> tuple[Stacks, list[Refusal]]:
    """Lists of blocks that are called one after the other, by name -> the names of their blocks in call order.

    A block is a module with parameters and children of its own; lists of linear layers or norms aren't stacks. The outermost
    lists count, but where those hold stages, each with blocks of its own, the stages' are the stacks.
    """
    stacks: Stacks = {}
    refusals: list[Refusal] = []
    for name, module in names.modules.items():
        if _inside(name, stacks):
            continue
        if not _is_list_of_blocks(module):
            if _is_list_of_attentions(module):
                refusals.append(
                    Refusal("layers", name, "its blocks are attentions alone, without what is around them")
                )
            elif _is_mixed_list(module):
                refusals.append(Refusal("layers", name, "its blocks are of several kinds"))
            continue
        blocks = tuple(f"{name}.{own}" for own, _ in module.named_children())
        field = layouts.REPEAT_FIELDS.get(name.rpartition(".")[2])
        if not field and any(_holds_stack(names, block) for block in blocks):
            continue  # stages
        if field and len(blocks) == 1:
            blocks *= int(getattr(names.config_of(name), field))
        stacks[name] = blocks
    return stacks, refusals


def _is_list_of_blocks(module: nn.Module) -> bool:
    """Whether all in it are blocks that may follow each other: of one class, or all layers of a model with several kinds."""
    blocks = list(module.children()) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
    blocks = [block for block in blocks if not is_absent(block)]
    if not blocks or not any(True for _ in blocks[0].children()):
        return False
    classes = {type(block) for block in blocks}
    if isinstance(module, nn.Sequential) and not all(_is_whole_layer(block) for block in blocks):
        return False
    if len(classes) > 1 and not all(_LAYER in (each.__name__ for each in kind.__mro__) for kind in classes):
        return False
    return "Attention" not in type(blocks[0]).__name__ or len(classes) > 1 or _is_whole_layer(blocks[0])


def _is_mixed_list(module: nn.Module) -> bool:
    """Whether blocks of one class come again and again, with others between (the flows of VITS)."""
    kinds = [type(block) for block in module.children()] if isinstance(module, nn.ModuleList) else []
    again = next((block for block in module.children() if kinds.count(type(block)) > 1), None)
    return len(set(kinds)) > 1 and again is not None and _is_whole_layer(again)


def _is_list_of_attentions(module: nn.Module) -> bool:
    blocks = list(module.children()) if isinstance(module, nn.ModuleList) else []
    return len(blocks) > 1 and all(map(is_attention, blocks))


def _is_whole_layer(block: nn.Module) -> bool:
    """A residual block by itself: it mixes positions, and has a norm of its own beside that.

    One convolution with its norm is no block yet, but a part of one (ResNet's).
    """
    inside = [each for each in block.modules() if each is not block]
    if any(map(is_attention, inside)):
        return any("Norm" in type(each).__name__ for each in block.children())
    maps = [each for each in inside if _is_map(each)]
    mixes = any(isinstance(each, (nn.Conv1d, nn.Conv2d)) for each in maps)
    return mixes and len(maps) > 1 and any("Norm" in type(each).__name__ for each in inside)


def _holds_stack(names: ModuleNames, block: str) -> bool:
    """Whether a list inside of it holds residual blocks, so that it is a stage and no block with an attention of its own."""
    if any(map(is_attention, names.modules[block].children())):
        return False
    return any(
        _is_list_of_blocks(each)
        and len({type(one) for one in each.children()}) == 1
        and _is_whole_layer(next(each.children()))
        # what each gives is kept and put side by side (HGNet): no residual stream
        and not re.search(r"torch\.cat\(\w+,", forward_of(names.modules[names.parent(other)]))
        for other in (block, *names.inside(block))
        if isinstance(each := names.modules[other], (nn.ModuleList, nn.Sequential))
    )


def find_sites(names: ModuleNames, stacks: Stacks, inner: Sequence[Site]) -> Iterator[Site | Refusal]:
    """One site for each stack, but for those that none of the blocks of could leave."""
    for name, blocks in stacks.items():
        there = tuple(block for block in blocks if not is_absent(names.modules[block]))
        held = [
            names.modules[piece.module] for site in inner for piece in site.slices if is_within(piece.module, name)
        ]
        is_transformer = any(map(is_linear, held)) or _looks_like_transformer(names.modules[there[0]])
        reason = _order_matters(names, name, there) or (None if is_transformer else _no_block(names, there))
        if reason:
            yield Refusal("layers", name, reason)
            continue
        fixed = tuple(resizing(names, name, blocks, is_transformer))
        if len(fixed) == len(blocks):
            yield Refusal("layers", name, f"each of its blocks has to stay: the first {fixed[0][1]}")
        else:
            yield Site(
                name, "layers", len(blocks), blocks=blocks, fixed=fixed, in_place=_has_places(names, name, fixed)
            )


def _is_of_stage(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _has_places(names: ModuleNames, name: str, fixed: Sequence[tuple[int, str]]) -> bool:
    """Whether something outside the stack goes by the numbers of its blocks, as far as names tell."""
    return (
        name.rpartition(".")[2] in layouts.PLACED_STACKS
        or any(read_list(names.config_of(name), field) for field in layouts.HIDDEN_STATE_READERS)
        or (
            not _is_of_stage(name)
            and any(isinstance(names.get(name, f"../{other}"), nn.Module) for other in layouts.FIXED_POSITION_SIBLINGS)
        )
        or any(reason == HAS_LEFT for _, reason in fixed)
    )


def _no_block(names: ModuleNames, blocks: tuple[str, ...]) -> str | None:
    """Why blocks that aren't a transformer's are no residual blocks."""
    kind = type(names.modules[blocks[0]])
    if "Quantiz" in kind.__name__:
        return "its blocks quantise what those before them left over, and pass nothing on"
    if not all(_is_whole_layer(names.modules[block]) for block in blocks):
        return f"no {kind.__name__} in it holds an attention or a feed-forward of a known layout, or two convolutions"
    return None


def resizing(
    names: ModuleNames, stack: str, blocks: tuple[str, ...], is_transformer: bool = True
) -> Iterator[tuple[int, str]]:
    """Blocks that change the sizes of what passes them, by their numbers, with the reason.

    The first norm of a transformer's block says how many entries come in, else the first linear layer or convolution; the
    last of these writes what goes out. A plain stack of a transformer's blocks, of one width, changes none.
    """
    widths = {_width(names.modules[block]) for block in blocks if not is_absent(names.modules[block])}
    is_plain = is_transformer and len(widths) == 1 and not _is_of_stage(stack)
    for number, block in enumerate(blocks):
        if is_absent(names.modules[block]):
            yield number, HAS_LEFT
            continue
        if "sampl" in type(names.modules[block]).__name__.lower():
            yield number, "changes the number of positions"
            continue
        if is_plain:
            continue
        inside = [other for other in names.inside(block) if _is_map(names.modules[other])]
        maps = [names.modules[other] for other in inside]
        outside = [names.modules[other] for other in inside if not (is_transformer and _is_in_attention(names, other))]
        entries = (_width(names.modules[block]) if is_transformer else None) or (_entries_in(maps[0]) if maps else 0)
        if maps and entries != (leaving := _entries_out(maps[-1])):
            yield number, f"makes {leaving} entries of {entries}"
        elif any(set(getattr(each, "stride", (1,))) - {1} or isinstance(each, _TRANSPOSED) for each in outside):
            yield number, "changes the number of positions"


def _is_in_attention(names: ModuleNames, name: str) -> bool:
    return any(is_attention(names.modules[around]) for around in parents(name))


def _is_map(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, _CONVOLUTIONS)


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def _entries_in(module: nn.Module) -> int:
    return int(module.in_channels) if isinstance(module, _CONVOLUTIONS) else d_in(module)


def _entries_out(module: nn.Module) -> int:
    return int(module.out_channels) if isinstance(module, _CONVOLUTIONS) else d_out(module)


def _looks_like_transformer(block: nn.Module) -> bool:
    """Blocks whose heads and neurons were all refused are layers still, and so are those that mix positions by other means.

    A convolution of the block itself isn't beside a residual stream, but makes another one (wav2vec 2's features).
    """
    is_layer = any(each.__name__ == _LAYER for each in type(block).__mro__)
    holds_linear = any(is_linear(each) for each in block.modules())
    if is_layer and holds_linear and not any(isinstance(child, (nn.Conv1d, nn.Conv2d)) for child in block.children()):
        return True
    return any("Attention" in type(module).__name__ for module in block.modules())


def _order_matters(names: ModuleNames, name: str, blocks: tuple[str, ...]) -> str | None:
    config = names.config_of(name)
    arguments = inspect.signature(type(names.modules[blocks[0]]).forward).parameters
    for streams in layouts.TWO_STREAMS:
        if all(stream in arguments for stream in streams):
            return f"its blocks hand on {' and '.join(streams)}, of which only one would pass a masked block"
    if re.search(r"\.forward\(", forward_of(names.modules[names.parent(name)])):
        return "its blocks are run by their forward alone, so that no hook can make one be passed by"
    if owned := _owned_by_first(names, blocks):
        return f"its first block alone has {owned}, so that no other can come first"
    for switch in layouts.LAYER_NUMBER_SWITCHES:
        if getattr(config, switch, None):
            return f"config.{switch} makes a layer's function depend on its number"
    if name.rpartition(".")[2] in layouts.REPEAT_FIELDS and len(set(blocks)) > 1:
        return "several shared blocks take turns, so that dropping one changes which block is called where"
    return None


def _width(block: nn.Module) -> int | None:
    """How many entries the states have that a block takes, by its first norm; None where it has none of its own."""
    norms = (child for child in block.children() if "Norm" in type(child).__name__)
    weights = (norm._parameters.get("weight") for norm in norms)
    return next((weight.numel() for weight in weights if weight is not None), None)


def _owned_by_first(names: ModuleNames, blocks: tuple[str, ...]) -> str | None:
    """A module of the first block for which all others have None; what can be handed on is named in `layouts`."""
    first, *others = (
        {path[len(block) + 1 :]: names.modules[path] for path in (block, *names.inside(block))}
        for block in dict.fromkeys(blocks)
    )
    known = {owned for owned, _ in layouts.OWNED_BY_FIRST_BLOCK}
    for path, module in first.items():
        for own, child in module._modules.items():
            lacking = [other[path]._modules.get(own, child) is None for other in others if path in other]
            if (
                isinstance(child, nn.Module)
                and own not in known
                and lacking
                and len(lacking) == len(others)
                and all(lacking)
            ):
                return f"{path}.{own}".removeprefix(".")
    return None


def _inside(name: str, stacks: Stacks) -> bool:
    return any(name.startswith(f"{stack}.") for stack in stacks)
