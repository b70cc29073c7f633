"""What a model holds and no layout matches: told, so that nothing is missed in silence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from hf_prune.structure.naming import ModuleNames, d_in, d_out, is_attention, is_linear, is_pointwise, is_within
from hf_prune.structure.sites import Part, Refusal, Site


HOW_TO_ADD = "hf_prune.register_layout teaches it one: docs/extending.md"


def find(names: ModuleNames, sites: Sequence[Site], refusals: Sequence[Refusal]) -> Iterator[Refusal]:
    """A refusal for each attention, feed-forward and group of experts that is neither a site nor refused already."""
    covered = {piece.module for site in sites for piece in site.slices}
    known = {refusal.name for refusal in refusals if refusal.part == "block"}
    of_heads = {piece.module for site in sites if site.target == "attention_heads" for piece in site.slices}
    attentions = _attentions(names, of_heads, {r.name for r in refusals if r.target == "attention_heads"})
    for name, held in attentions.items():
        said = ", ".join(held[:6]) + (", …" if len(held) > 6 else "")
        yield Refusal("attention_heads", name, f"its projections ({said}) match no known layout; {HOW_TO_ADD}")
    for name, module in names.modules.items():
        if name in known or any(is_within(name, attention) for attention in attentions):
            continue
        if len(stacked := _stacked(name, module, covered)) > 1:
            yield Refusal("ffn_neurons", name, f"its stacked experts ({', '.join(stacked)}) match no known layout")
        elif pair := _widening_pair(names, name, module, covered):
            yield Refusal("ffn_neurons", name, f"{pair[0]} and {pair[1]} match no known layout; {HOW_TO_ADD}")


def _stacked(name: str, module: nn.Module, covered: set[str]) -> list[str]:
    """Of what calls itself experts, 3-D parameters of its own or of its children that are in no site."""
    if "xpert" not in type(module).__name__:
        return []
    held = ((path, f"{name}.{path}".rpartition(".")[0]) for path, each in module.named_parameters() if each.dim() == 3)
    return [path for path, owner in held if path.count(".") < 2 and owner not in covered]


def of_parts(
    stacks: Mapping[str, Sequence[str]], sites: Sequence[Site], refusals: Sequence[Refusal]
) -> Iterator[Refusal]:
    """What of a stack's heads or neurons matches no layout is no part of its layers either: told for each stack by itself."""
    parts: dict[str, Part] = {"attention_heads": "attention", "ffn_neurons": "feed_forward"}
    told = {(site.name, site.part) for site in sites} | {
        (stack, refusal.part) for refusal in refusals for stack in stacks if is_within(refusal.name, stack)
    }
    for refusal in refusals:
        part = parts.get(refusal.target)
        stack = next((stack for stack in stacks if is_within(refusal.name, stack)), None)
        if part and stack and (stack, part) not in told:
            told.add((stack, part))
            yield Refusal("layers", stack, f"{refusal.name}: {refusal.reason}", part)


def _attentions(names: ModuleNames, covered: set[str], refused: set[str]) -> dict[str, list[str]]:
    """By the outermost module that calls itself an attention, its linear layers; none of which is in a site."""
    found: dict[str, list[str]] = {}
    for name, module in names.modules.items():
        if not is_attention(module) or any(is_within(name, other) for other in found):
            continue
        inside = [other for other in names.inside(name) if is_linear(names.modules[other])]
        is_torch = isinstance(module, nn.MultiheadAttention)
        known = any(other in covered for other in inside) or any(
            is_within(other, name) or is_within(name, other) for other in refused
        )
        if (len(inside) > 1 or is_torch) and not known and not isinstance(module, nn.ModuleList):
            found[name] = [other[len(name) + 1 :] for other in inside]
    return found


def _widening_pair(names: ModuleNames, name: str, module: nn.Module, covered: set[str]) -> tuple[str, str] | None:
    """Two linear maps of different children that lead from d to n and back, as a feed-forward does, and are in no site."""
    maps = {
        f"{own}.{path}" if path else own: each
        for own, child in module.named_children()
        for path, each in ((path, each) for path, each in child.named_modules() if path.count(".") < 2)
        if is_pointwise(each)
        and not (path and isinstance(module, nn.ModuleList))
        and names.resolve(name, f"{own}.{path}" if path else own) not in covered
    }
    for first, widens in maps.items():
        for second, narrows in maps.items():
            n, d = d_in(narrows), d_out(narrows)
            # of linear layers d -> n -> d with n <= d may be anything, unless it says; two convolutions of single positions are
            # one thing
            is_wide = n > d or "MLP" in type(module).__name__ or not (is_linear(widens) or is_linear(narrows))
            leads_back = d_in(widens) == d and (d_out(widens) == 2 * n >= 2 * d or (d_out(widens) == n and is_wide))
            if first.partition(".")[0] != second.partition(".")[0] and leads_back:
                return first, second
    return None
