"""Attention sites. A unit is a head; under grouped-query attention a key/value head with all its query heads.

Axes: d_head entries a head, n_heads query heads, n_kv_heads key/value heads, n_rep = n_heads / n_kv_heads.
With one key/value head for all (multi-query), the unit is a query head and key and value stay.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

from torch import nn

from hf_prune.structure import layouts
from hf_prune.structure.layouts import ATTENTION_LAYOUTS, AttentionLayout
from hf_prune.structure.naming import ModuleNames, d_in, d_out, is_linear, number, weight_of
from hf_prune.structure.projections import reading_slice, writing_slices
from hf_prune.structure.sites import Attribute, FullWidthNorm, Read, Refusal, Site, Span, TensorSlice


class _Refused(Exception):
    """This attention can't be pruned soundly; the message is the reason."""


def find_sites(names: ModuleNames, stacks: dict[str, tuple[str, ...]]) -> Iterator[Site | Refusal]:
    """One site for each attention, or one for all blocks of a stack where block 0 owns their position bias."""
    found: list[Site | Refusal] = []
    tied: dict[str, list[Site]] = {}
    for name, module in names.modules.items():
        layout = matching(names, name)
        if layout is None:
            continue
        try:
            site = _site(names, name, module, layout)
        except _Refused as reason:
            found.append(Refusal("attention_heads", name, str(reason)))
            continue
        if layout.bias_table:
            tied.setdefault(_path_in_stack(name, stacks), []).append(site)
        else:
            found.append(site)
    return iter([*found, *(_merged(path, sites) for path, sites in tied.items())])


def matching(names: ModuleNames, name: str) -> AttentionLayout | None:
    """The layout of the attention `name`, if it is one."""
    for layout in ATTENTION_LAYOUTS:
        if all(is_linear(names.get(name, part)) for part in layout.parts):
            return layout
    return None


def _site(names: ModuleNames, name: str, module: nn.Module, layout: AttentionLayout) -> Site:
    output_name = names.resolve(name, layout.output)
    output = names.modules[output_name]
    width = d_in(output)  # n_heads * d_head
    _refuse_alibi(names, name, module)
    d_head = _head_size(names, name, module, width)
    n_heads = width // d_head
    slices, n_kv_heads = _input_slices(names, name, module, layout, n_heads, d_head)
    n_rep = n_heads // n_kv_heads
    n_units = n_heads if n_kv_heads == 1 else n_kv_heads
    unit = Span(0, width // n_units)
    slices += [reading_slice(output_name, output, unit), *_side_tables(names, name, layout, n_heads)]
    norms = _full_width_norms(names, name, n_kv_heads, d_head, n_heads)
    slices += [
        TensorSlice(
            norm.module, "weight", 0, (Span(0, weight_of(names.modules[norm.module]).numel() // n_units),), True
        )
        for norm in norms
    ]
    _refuse_unknown(name, module, {piece.name for piece in slices} | {f"{output_name}.bias"}, n_heads)
    multi_query = n_kv_heads == 1 and n_heads > 1
    counts = {
        **dict.fromkeys(layouts.HEAD_COUNT_NAMES, n_heads),
        **dict.fromkeys(layouts.ALL_HEADS_WIDTH_NAMES, width),
        # key and value heads leave with the units, except the one of multi-query, whose queries per key do
        **({"num_key_value_groups": n_rep} if multi_query else dict.fromkeys(layouts.KV_HEAD_COUNT_NAMES, n_kv_heads)),
    }
    attributes = [
        Attribute(name, attribute, value // n_units)
        for attribute, value in counts.items()
        if module.__dict__.get(attribute) == value
    ]
    attributes += [
        Attribute(name, field, value // n_units, of_config=True)
        for field, value in counts.items()
        if _reads_config(module, field)
    ]
    return Site(
        name,
        "attention_heads",
        n_units,
        tuple(slices),
        tuple(attributes),
        tuple(norms),
        reads=(Read(output_name, unit),),
    )


def _input_slices(
    names: ModuleNames, name: str, module: nn.Module, layout: AttentionLayout, n_heads: int, d_head: int
) -> tuple[list[TensorSlice], int]:
    """The slices of the input projections by unit, and n_kv_heads."""
    if not layout.fused:
        parts = {part: names.modules[names.resolve(name, part)] for part in (layout.query, layout.key, layout.value)}
        n_kv_heads = _kv_heads(d_out(parts[layout.key]), d_head, n_heads)
        if d_out(parts[layout.value]) != n_kv_heads * d_head or d_out(parts[layout.query]) != n_heads * d_head:
            raise _Refused("keys and values differ in width, or queries from the output: not multi-head attention")
        widths = dict.fromkeys(parts, d_head) | {layout.query: n_heads // n_kv_heads * d_head}
        if n_kv_heads == 1:  # multi-query: only the queries leave; of a single head nothing can
            parts, widths = {layout.query: parts[layout.query]}, {layout.query: d_head}
        for extra in layout.extra:
            if is_linear(names.get(name, extra)):
                parts[extra], widths[extra] = names.modules[names.resolve(name, extra)], d_head
        return [
            piece
            for part, linear in parts.items()
            for piece in writing_slices(names.resolve(name, part), linear, (Span(0, widths[part]),))
        ], n_kv_heads

    fused_name = names.resolve(name, layout.fused)
    fused = names.modules[fused_name]
    order = next(order for flag, order in layout.orders if not flag or getattr(module, flag, False))
    # d_out = (n_heads + 2 n_kv_heads) d_head in every order
    n_kv_heads = _kv_heads((d_out(fused) - n_heads * d_head) // 2, d_head, n_heads)
    n_rep = n_heads // n_kv_heads
    if order == "interleaved" and n_rep != 1:
        raise _Refused(f"{layout.fused} interleaves {n_heads} query with {n_kv_heads} key heads in an unknown order")
    if n_kv_heads == 1:
        spans: tuple[Span, ...] = (Span(0, d_head),)
    elif order == "stacked":
        queries, keys = n_heads * d_head, n_kv_heads * d_head
        spans = (Span(0, n_rep * d_head), Span(queries, d_head), Span(queries + keys, d_head))
    else:  # interleaved is grouped with one query head a group
        spans = (Span(0, (n_rep + 2) * d_head),)
    return list(writing_slices(fused_name, fused, spans)), n_kv_heads


def _kv_heads(width: int, d_head: int, n_heads: int) -> int:
    n_kv_heads, rest = divmod(width, d_head)
    if rest or n_kv_heads < 1 or n_heads % n_kv_heads:
        raise _Refused(f"a key width of {width} is no divisor of {n_heads} heads of {d_head}")
    return n_kv_heads


def _head_size(names: ModuleNames, name: str, module: nn.Module, width: int) -> int:
    """d_head from the module's own number, else from its (or the config's) number of heads."""
    size = number(module, layouts.HEAD_SIZE_NAMES)
    if size:
        d_head = size[1]
    else:
        heads = number(module, layouts.HEAD_COUNT_NAMES)
        n_heads = heads[1] if heads else getattr(names.config_of(name), "num_attention_heads", None)
        d_head = width // n_heads if isinstance(n_heads, int) and n_heads > 0 else 0
    if d_head < 1 or width % d_head:
        raise _Refused(f"the head size can't be told: the output projection reads {width} entries")
    return d_head


def _side_tables(names: ModuleNames, name: str, layout: AttentionLayout, n_heads: int) -> Iterator[TensorSlice]:
    """Embeddings with one column a head, such as T5's relative attention bias (n_buckets, n_heads)."""
    if layout.bias_table and isinstance(names.get(name, layout.bias_table), nn.Embedding):
        yield TensorSlice(names.resolve(name, layout.bias_table), "weight", 1, (Span(0, 1),), writes=True)


def _full_width_norms(
    names: ModuleNames, name: str, n_kv_heads: int, d_head: int, n_heads: int
) -> list[FullWidthNorm]:
    norms = []
    for child in layouts.FULL_WIDTH_NORM_NAMES:
        norm = names.get(name, child)
        weight = getattr(norm, "weight", None)
        if norm is None or weight is None or weight.numel() == d_head:
            continue
        epsilon = next(
            (key for key in layouts.NORM_EPSILON_NAMES if isinstance(getattr(norm, key, None), float)), None
        )
        is_rms = "RMS" in type(norm).__name__ and getattr(norm, "bias", None) is None
        if (
            not is_rms
            or epsilon is None
            or n_kv_heads == 1
            or weight.numel() not in (n_heads * d_head, n_kv_heads * d_head)
        ):
            raise _Refused(f"{child} ({type(norm).__name__}) normalises over all heads and can't be folded")
        norms.append(FullWidthNorm(names.resolve(name, child), epsilon))
    return norms


def _refuse_alibi(names: ModuleNames, name: str, module: nn.Module) -> None:
    """ALiBi's slopes come from the number of heads (Press et al. 2022), so fewer heads would get other slopes."""
    takes_alibi = layouts.ALIBI_ARGUMENT in inspect.signature(type(module).forward).parameters
    if takes_alibi and getattr(names.config_of(name), layouts.ALIBI_ARGUMENT, True):
        raise _Refused("ALiBi gives each head a slope by its number, which changes when heads leave")


def _refuse_unknown(name: str, module: nn.Module, known: set[str], n_heads: int) -> None:
    """Further linear layers, and parameters with a per-head dimension, have a role that the layout doesn't name."""
    for child, parameter in module.named_parameters(recurse=False):
        if n_heads > 1 and n_heads in parameter.shape:
            raise _Refused(f"its parameter {child} {tuple(parameter.shape)} may hold one entry a head")
    for child, linear in module.named_modules():
        full = f"{name}.{child}" if name else child
        kept_whole = child.rpartition(".")[2] in ("k_proj", "v_proj", "k", "v", "key", "value")  # multi-query
        if is_linear(linear) and f"{full}.weight" not in known and not kept_whole:
            raise _Refused(f"it also holds the linear layer {child}, whose role is unknown")


def _reads_config(module: nn.Module, field: str) -> bool:
    """Whether `forward` reads `self.config.<field>`: then the module needs a view of the config with its own number."""
    return re.search(rf"self\.config\.{field}\b", _source(type(module).forward)) is not None


@cache
def _source(function: Callable[..., object]) -> str:
    """Kept, because Python takes a whole file apart to find it."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""  # a generated class has no source; verification is the safety net


def _path_in_stack(name: str, stacks: dict[str, tuple[str, ...]]) -> str:
    """`encoder.block.3.layer.0.SelfAttention` -> `encoder.block.*.layer.0.SelfAttention`."""
    for stack, blocks in stacks.items():
        for block in blocks:
            if name.startswith(f"{block}."):
                return f"{stack}.*{name[len(block) :]}"
    return name


def _merged(path: str, sites: list[Site]) -> Site:
    """One site whose unit h is head h of every block: the bias of head h is handed from block to block."""
    first = sites[0]
    if any(site.n_units != first.n_units for site in sites):
        raise AssertionError(f"{path}: blocks that share a position bias have different numbers of heads")
    return replace(
        first,
        name=path,
        slices=tuple(piece for site in sites for piece in site.slices),
        attributes=tuple(piece for site in sites for piece in site.attributes),
        reads=tuple(piece for site in sites for piece in site.reads),
    )
