"""How an attention's projections hold its heads: head sizes, numbers of heads, and the order of what is fused.

Axes: d_head entries a head, n_heads query heads, n_kv_heads key/value heads, n_rep = n_heads / n_kv_heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_prune.structure import layouts
from hf_prune.structure.layouts import AttentionLayout
from hf_prune.structure.naming import ModuleNames, d_out, is_linear, number, read_number
from hf_prune.structure.projections import writing_slices
from hf_prune.structure.sites import Span, TensorSlice


_Spans = dict[str, tuple[Span, ...]]  # by part


class Refused(Exception):
    """This attention can't be pruned soundly; the message is the reason."""


@dataclass(frozen=True)
class Heads:
    """The heads of one attention, and where its input projections hold them."""

    n_heads: int
    n_kv_heads: int
    d_head: int  # of queries and keys
    d_value: int  # of values, and of what the output projection reads
    slices: list[TensorSlice]
    n_groups: int = 1  # of the output projection, which reads each by itself

    @property
    def n_units(self) -> int:
        """With one key/value head for all, the unit is a query head; where the output is grouped, one of each group."""
        return (self.n_heads if self.n_kv_heads == 1 else self.n_kv_heads) // self.n_groups

    def spans(self, entries: int) -> tuple[Span, ...]:
        """Where the units are along a dimension whose `entries` all heads share evenly."""
        return _in_groups(entries, self.n_groups, self.n_units)


def heads_of(names: ModuleNames, name: str, layout: AttentionLayout, width: int) -> Heads:
    """The heads of the attention `name`, whose output projection reads `width` = n_heads d_value entries, or those of a group.

    Raises:
        Refused: the widths don't fit the layout.
    """
    if layout.latent and not layout.key_value:
        return _grouped(names, name, layout, width)
    n_heads = _n_heads(names, name, layout, width)
    if layout.latent:
        return _headwise(names, name, layout, n_heads, width // n_heads)
    if layout.fused:
        return _fused(names, name, layout, n_heads, width // n_heads)
    return _separate(names, name, layout, n_heads, width // n_heads)


def _n_heads(names: ModuleNames, name: str, layout: AttentionLayout, width: int) -> int:
    """From the module's own head size, else from its, its parent's or its config's number of heads."""
    module = names.modules[name]
    size = number(module, layouts.VALUE_SIZE_NAMES if layout.latent else layouts.HEAD_SIZE_NAMES)
    if size and width % size[1] == 0:
        return width // size[1]
    holders = [module, *(names.modules[parent] for parent in [names.parent(name)] if parent)]
    found = next((count for holder in holders if (count := number(holder, layouts.HEAD_COUNT_NAMES))), None)
    n_heads = found[1] if found else read_number(names.config_of(name), layouts.HEAD_COUNT_NAMES)
    if not n_heads or width % n_heads:
        raise Refused(f"the head size can't be told: the output projection reads {width} entries")
    return n_heads


def _separate(names: ModuleNames, name: str, layout: AttentionLayout, n_heads: int, d_value: int) -> Heads:
    if not layout.value and not layout.key_value:
        return _queries(names, name, layout, n_heads, d_value)
    query, d_values = names.modules[names.resolve(name, layout.query)], _d_values(names, name, layout)
    n_kv_heads = _kv_heads(d_values, d_value, n_heads)
    d_keys = d_values if layout.key_value else d_out(names.modules[names.resolve(name, layout.key)])
    d_head, rest = divmod(d_keys, n_kv_heads)
    # twice as many query entries are queries and a gate, head by head (Qwen3-Next)
    if rest or d_out(query) not in (n_heads * d_head, 2 * n_heads * d_head):
        raise Refused("keys and values differ in width, or queries from the output: not multi-head attention")
    size = number(names.modules[name], layouts.HEAD_SIZE_NAMES)
    if size and d_head < d_value == size[1]:
        raise Refused(f"keys have {d_keys // d_value} heads of {d_value}, values {n_kv_heads}")
    n_rep = n_heads // n_kv_heads
    spans: _Spans = {layout.query: (Span(0, n_rep * d_out(query) // n_heads),)}
    if layout.key_value:
        spans[layout.key_value] = (Span(0, d_head), Span(d_keys, d_value))
    else:
        spans |= {layout.key: (Span(0, d_head),), layout.value: (Span(0, d_value),)}
    if n_kv_heads == 1:  # multi-query: only the queries leave; of a single head nothing can
        spans = {layout.query: (Span(0, d_out(query) // n_heads),)}
    spans |= {
        extra: (Span(0, d_head * (n_rep if n_kv_heads > 1 else 1)),)
        for extra in layout.extra
        if is_linear(names.get(name, extra))
    }
    return Heads(n_heads, n_kv_heads, d_head, d_value, _written(names, name, spans))


def _queries(names: ModuleNames, name: str, layout: AttentionLayout, n_heads: int, d_head: int) -> Heads:
    """Of an attention that takes another's keys and values, which leave there."""
    groups = number(names.modules[name], layouts.KV_GROUPS_NAMES)
    n_kv_heads = n_heads // (groups[1] if groups else 1)
    spans: _Spans = {layout.query: (Span(0, (n_heads // n_kv_heads if n_kv_heads > 1 else 1) * d_head),)}
    return Heads(n_heads, n_kv_heads, d_head, d_head, _written(names, name, spans))


def _d_values(names: ModuleNames, name: str, layout: AttentionLayout) -> int:
    """How many entries the values of all heads have."""
    return d_out(names.modules[names.resolve(name, layout.value or layout.key_value)]) // (1 if layout.value else 2)


def _headwise(names: ModuleNames, name: str, layout: AttentionLayout, n_heads: int, d_value: int) -> Heads:
    """Latent attention: each head has its entries in one piece, of its own length in each projection."""
    parts = {part: d_out(names.modules[names.resolve(name, part)]) for part in (layout.query, layout.key_value)}
    if any(entries % n_heads for entries in parts.values()):
        raise Refused(f"a projection from the latent state is no multiple of {n_heads} heads")
    spans: _Spans = {part: (Span(0, entries // n_heads),) for part, entries in parts.items()}
    return Heads(n_heads, n_heads, parts[layout.query] // n_heads, d_value, _written(names, name, spans))


def _grouped(names: ModuleNames, name: str, layout: AttentionLayout, width: int) -> Heads:
    """One key/value head, and an output projection that reads `width` entries of each group of heads by itself."""
    groups = number(names.modules[names.resolve(name, layout.output)], layouts.OUTPUT_GROUPS_NAMES)
    n_groups = groups[1] if groups else 1
    n_heads = _n_heads(names, name, layout, n_groups * width)
    d_head = n_groups * width // n_heads
    if n_heads % n_groups or d_out(names.modules[names.resolve(name, layout.query)]) != n_heads * d_head:
        raise Refused(f"{n_heads} heads don't fit the output's {n_groups} groups")
    spans: _Spans = {layout.query: _in_groups(n_heads * d_head, n_groups, n_heads // n_groups)}
    return Heads(n_heads, 1, d_head, d_head, _written(names, name, spans), n_groups)


def _in_groups(entries: int, n_groups: int, n_units: int) -> tuple[Span, ...]:
    of_group = entries // n_groups
    return tuple(Span(group * of_group, of_group // n_units) for group in range(n_groups))


def _fused(names: ModuleNames, name: str, layout: AttentionLayout, n_heads: int, d_head: int) -> Heads:
    module, fused = names.modules[name], names.modules[names.resolve(name, layout.fused)]
    order = next(order for flag, order in layout.orders if not flag or getattr(module, flag, False))
    # d_out = (n_heads + 2 n_kv_heads) d_head in every order
    n_kv_heads = _kv_heads((d_out(fused) - n_heads * d_head) // 2, d_head, n_heads)
    n_rep = n_heads // n_kv_heads
    if order == "interleaved" and n_rep != 1:
        raise Refused(f"{layout.fused} interleaves {n_heads} query with {n_kv_heads} key heads in an unknown order")
    if n_kv_heads == 1:
        spans: tuple[Span, ...] = (Span(0, d_head),)
    elif order == "stacked":
        queries, keys = n_heads * d_head, n_kv_heads * d_head
        spans = (Span(0, n_rep * d_head), Span(queries, d_head), Span(queries + keys, d_head))
    else:  # interleaved is grouped with one query head a group
        spans = (Span(0, (n_rep + 2) * d_head),)
    return Heads(n_heads, n_kv_heads, d_head, d_head, _written(names, name, {layout.fused: spans}))


def _written(names: ModuleNames, name: str, spans: _Spans) -> list[TensorSlice]:
    return [
        piece
        for part, of_part in spans.items()
        for piece in writing_slices(names.resolve(name, part), names.modules[names.resolve(name, part)], of_part)
    ]


def _kv_heads(width: int, d_head: int, n_heads: int) -> int:
    n_kv_heads, rest = divmod(width, d_head)
    if rest or n_kv_heads < 1 or n_heads % n_kv_heads:
        raise Refused(f"a key width of {width} is no divisor of {n_heads} heads of {d_head}")
    return n_kv_heads
