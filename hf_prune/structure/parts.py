"""Sites of the parts of layers: a stack's attentions, or its feed-forwards; a unit is one block's.

What leaves is what holds the projections: of a Llama block `self_attn`, of BERT's `attention.self` and
`attention.output.dense`, whose norm stays. A block without such a part (it left before) has no unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from hf_prune.structure import attention, experts, feed_forward, layers, layouts
from hf_prune.structure.layers import Stacks
from hf_prune.structure.naming import ModuleNames, d_in, d_out, is_linear, is_within, weight_of
from hf_prune.structure.sites import Branch, Part, Refusal, Site


def own_attentions(model: nn.Module, blocks: Sequence[str]) -> dict[int, str]:
    """By number of the block, the module that is its own attention; none where it has left, or where there are several."""
    names = ModuleNames(model)
    found = {number: _attentions(names, block) for number, block in enumerate(blocks)}
    return {number: in_block[0][0] for number, in_block in found.items() if len(in_block) == 1}


class _Refused(Exception):
    """This block's part can't be dropped soundly; the message is the reason."""


def find_sites(names: ModuleNames, stacks: Stacks, refused: Sequence[Refusal] = ()) -> Iterator[Site | Refusal]:
    """For each stack at most one site of attentions (a block's own, not those to another stack) and one of feed-forwards.

    Args:
        refused: lists of blocks that are no stacks, and why; it goes for their parts as well.
    """
    parts: tuple[Part, ...] = ("attention", "feed_forward")
    for name, blocks in stacks.items():
        for part in parts:
            yield from _sites(names, name, blocks, part)
    for refusal in refused:
        for part in parts:
            yield Refusal("layers", refusal.name, refusal.reason, part)


def _sites(names: ModuleNames, name: str, blocks: tuple[str, ...], part: Part) -> Iterator[Site | Refusal]:
    is_shared = len(set(blocks)) < len(blocks)
    resizing = {blocks[number]: reason for number, reason in layers.resizing(names, name, blocks)}
    branches, is_told = [], False
    for block in dict.fromkeys(blocks):
        found = _attentions(names, block) if part == "attention" else _feed_forwards(names, block)
        if not found:
            continue
        try:
            if is_shared:
                raise _Refused(f"{block} is called {len(blocks)} times, so that its parts are one for all calls")
            if block in resizing:
                raise _Refused(f"the block {resizing[block]}")
            branches.append(_branch(names, block, part, found))
        except _Refused as reason:
            is_told = True
            yield Refusal("layers", block, str(reason), part)
    if branches:
        yield Site(name, "layers", len(branches), blocks=blocks, part=part, branches=tuple(branches))
    elif (
        part == "attention"
        and not is_told
        and any("Attention" in type(names.modules[each]).__name__ for each in (blocks[0], *names.inside(blocks[0])))
    ):
        yield Refusal(
            "layers", name, "the attentions of its blocks match no known layout, or read another stack", part
        )


def _attentions(names: ModuleNames, block: str) -> list[tuple[str, list[str], str]]:
    """The block's own attentions: the module, what holds its projections, the one that writes last."""
    found = []
    for name in names.inside(block):
        layout = attention.matching(names, name)
        within = name[len(block) + 1 :].lower()
        if layout and within and not any(word in within for word in layouts.CROSS_ATTENTION_WORDS):
            output = names.resolve(name, layout.output)
            held = [name] if output.startswith(f"{name}.") else [name, output]
            found.append((name, held, output))
    return found


def _feed_forwards(names: ModuleNames, block: str) -> list[tuple[str, list[str], str]]:
    # a mixture of experts leaves whole, with its router and what all tokens share
    mixtures = [names.parent(name) for name in experts.stacked_experts(names) if is_within(name, block)]
    found = [(name, [name], name) for name in mixtures if name != block]
    for name in (block, *names.inside(block)):
        layout = feed_forward.matching(names, name)
        if layout and not any(is_within(name, mixture) for mixture in mixtures):
            projections = [names.resolve(name, part) for part in layout.parts]
            output = names.modules[projections[-1]]
            if not is_linear(output) and (name == block or d_in(output) < d_out(output)):
                continue  # convolutions of the block itself; a gate (squeeze and excitation), which adds nothing
            whole = name != block and not _holds_norm(names.modules[name], d_out(output))
            found.append((name, [name] if whole else projections, projections[-1]))
    return found


def _holds_norm(module: nn.Module, d_model: int) -> bool:
    """Whether a norm over d_model is in it, as of the sum with the residual stream (MobileBERT): that has to stay."""
    norms = [child for child in module.modules() if "Norm" in type(child).__name__]
    return any(
        isinstance(norm._parameters.get("weight"), Tensor) and weight_of(norm).numel() == d_model for norm in norms
    )


def _branch(names: ModuleNames, block: str, part: Part, found: list[tuple[str, list[str], str]]) -> Branch:
    """All that a block holds of a part, which leaves together: a conformer has two feed-forwards, others experts beside one."""
    held = list(dict.fromkeys(module for _, modules, _ in found for module in modules))
    held = [module for module in held if not any(module != other and is_within(module, other) for other in held)]
    prefixes = tuple(f"{module}." for module in held)
    for name, _, _ in found:
        if part == "attention":
            _refuse_odd_attention(names, block, name)
        around = names.parent(name)
        while around != block and name != block:
            if not isinstance(names.modules[around], nn.ModuleList):
                for other, parameter in names.modules[around].named_parameters(around):
                    if parameter.dim() > 1 and not other.startswith(prefixes):
                        raise _Refused(f"{around} also holds {other}, which would stay")
            around = names.parent(around)
    parameters = tuple(
        other for module in held for other, _ in names.modules[module].named_parameters(module, remove_duplicate=False)
    )
    return Branch(block, tuple(held), tuple(dict.fromkeys(output for _, _, output in found)), parameters)


def _refuse_odd_attention(names: ModuleNames, block: str, name: str) -> None:
    try:
        attention.refuse_swapped(names, name)
    except attention.Refused as reason:
        raise _Refused(str(reason)) from reason
    for switch in layouts.LAYER_NUMBER_SWITCHES:
        if getattr(names.config_of(block), switch, None):
            raise _Refused(
                f"config.{switch} makes an attention's function depend on its number, which caches count by"
            )
    for owned, _ in layouts.OWNED_BY_FIRST_BLOCK:
        if isinstance(names.get(name, owned), nn.Module):
            raise _Refused(
                f"its {owned} serves all blocks of the stack; drop the whole block, and the next inherits it"
            )
