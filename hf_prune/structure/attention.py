"""Attention sites. A unit is a head; under grouped-query attention a key/value head with all its query heads.

Axes: d_head entries a head, n_heads query heads, n_kv_heads key/value heads, n_rep = n_heads / n_kv_heads.
With one key/value head for all (multi-query), the unit is a query head and key and value stay.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from hf_prune.structure import layouts
from hf_prune.structure.heads import Heads, Refused, heads_of
from hf_prune.structure.layouts import AttentionLayout
from hf_prune.structure.naming import ModuleNames, d_in, is_linear
from hf_prune.structure.per_head import full_width_norms, side_slices
from hf_prune.structure.projections import reading_slice
from hf_prune.structure.sites import Attribute, Read, Refusal, Site, Span, TensorSlice
from hf_prune.structure.source import forward_of, reads_config, reshapes_by, source_of


def find_sites(names: ModuleNames, stacks: dict[str, tuple[str, ...]]) -> Iterator[Site | Refusal]:
    """One site for each attention, or one for all blocks of a stack that share a bias by head."""
    groups: dict[str, list[Site]] = {}
    tied: set[str] = set()
    for name, module in names.modules.items():
        layout = matching(names, name)
        if layout is None:
            continue
        try:
            site = _site(names, name, module, layout)
            path = _path_in_stack(name, stacks)
            if tables := _shared_tables(names, path, module, site):
                site = replace(site, slices=(*site.slices, *tables))
        except Refused as reason:
            yield Refusal("attention_heads", name, str(reason))
            continue
        groups.setdefault(path, []).append(site)
        if tables or layout.bias_table:
            tied.add(path)
    for path, sites in groups.items():
        owners = sum(any(piece.module.endswith(_OWNED) for piece in site.slices) for site in sites)
        if path in tied or 0 < owners < len(sites):
            yield _merged(path, sites)
        else:
            yield from sites


_OWNED = tuple(f".{module}" for module, _ in layouts.OWNED_BY_FIRST_BLOCK)


def _shared_tables(names: ModuleNames, path: str, module: nn.Module, site: Site) -> list[TensorSlice]:
    """Tables outside the stack whose bias by head this attention is handed.

    Raises:
        Refused: a bias that it is handed comes from somewhere unknown.
    """
    arguments = inspect.signature(type(module).forward).parameters
    handed = [arguments[name] for name in layouts.SHARED_BIAS_ARGUMENTS if name in arguments]
    if not handed or any(piece.module.endswith(_OWNED) for piece in site.slices):
        return []
    stack = path.partition(".*")[0]
    around = names.parent(stack)
    tables = [
        TensorSlice(other, *layouts.SHARED_TABLES[own], (Span(0, 1),), writes=True)
        for other in names.inside(around)
        if (own := other.rpartition(".")[2]) in layouts.SHARED_TABLES and not other.startswith(f"{stack}.")
    ]
    if not tables and handed[0].default is inspect.Parameter.empty:
        raise Refused(f"it is handed a {handed[0].name} by head, which comes from somewhere unknown")
    return [piece for piece in tables if _length(names, piece) == site.n_units]


def matching(names: ModuleNames, name: str) -> AttentionLayout | None:
    """The layout of the attention `name`, if it is one."""
    for first, candidates in layouts.attention_by_first_part():
        if is_linear(names.get(name, first)):
            for layout in candidates:
                if all(is_linear(names.get(name, part)) for part in layout.parts):
                    return layout
    return None


def _site(names: ModuleNames, name: str, module: nn.Module, layout: AttentionLayout) -> Site:
    output_name = names.resolve(name, layout.output)
    output = names.modules[output_name]
    width = d_in(output)  # n_heads * d_value
    _refuse_alibi(names, name, module)
    heads = heads_of(names, name, layout, width)
    _refuse_fixed_width(module)
    refuse_swapped(names, name)
    n_units, unit = heads.n_units, Span(0, width // heads.n_units)
    slices = [*heads.slices, reading_slice(output_name, output, unit)]
    norms, of_norms = full_width_norms(names, name, heads)
    slices += of_norms
    slices += side_slices(
        names, name, heads, {piece.name for piece in slices} | set(_latent_weights(names, name, layout))
    )
    return Site(
        name,
        "attention_heads",
        n_units,
        tuple(slices),
        tuple(_attributes(name, module, heads, width)),
        tuple(norms),
        reads=(Read(output_name, unit),),
    )


def _latent_weights(names: ModuleNames, name: str, layout: AttentionLayout) -> Iterator[str]:
    for part in layout.latent:
        yield f"{names.resolve(name, part)}.weight"


def _attributes(name: str, module: nn.Module, heads: Heads, width: int) -> Iterator[Attribute]:
    """The module's numbers that follow its heads, its own or read from the config."""
    multi_query = heads.n_kv_heads == 1 and heads.n_heads > 1
    source = source_of(module)
    reshaped = [field for field in layouts.PERHAPS_WIDTH_NAMES if reshapes_by(source, field)]
    counts = {
        **dict.fromkeys(layouts.HEAD_COUNT_NAMES, heads.n_heads),
        **dict.fromkeys((*layouts.ALL_HEADS_WIDTH_NAMES, *reshaped), width),
        # key and value heads leave with the units, except the one of multi-query, whose queries per key do
        **(
            {"num_key_value_groups": heads.n_heads}
            if multi_query
            else dict.fromkeys(layouts.KV_HEAD_COUNT_NAMES, heads.n_kv_heads)
            | dict.fromkeys(layouts.KV_WIDTH_NAMES, heads.n_kv_heads * heads.d_head)
        ),
    }
    for field, value in counts.items():
        if module.__dict__.get(field) == value:
            yield Attribute(name, field, value // heads.n_units)
        if reads_config(source, field):
            yield Attribute(name, field, value // heads.n_units, of_config=True)
    for path, inner in module.named_modules():  # what is inside counts heads by itself (Gemma 3n's positions)
        for field in layouts.HEAD_COUNT_NAMES:
            if path and inner.__dict__.get(field) == heads.n_heads:
                yield Attribute(f"{name}.{path}", field, heads.n_heads // heads.n_units)


def _length(names: ModuleNames, piece: TensorSlice) -> int:
    return int(getattr(names.modules[piece.module], piece.tensor).shape[piece.dim])


def _refuse_alibi(names: ModuleNames, name: str, module: nn.Module) -> None:
    """ALiBi's slopes come from the number of heads (Press et al. 2022), so fewer heads would get other slopes."""
    takes_alibi = layouts.ALIBI_ARGUMENT in inspect.signature(type(module).forward).parameters
    if takes_alibi and getattr(names.config_of(name), layouts.ALIBI_ARGUMENT, True):
        raise Refused("ALiBi gives each head a slope by its number, which changes when heads leave")


def refuse_swapped(names: ModuleNames, name: str) -> None:
    """Whether what holds the attention may put a new one, of the config's sizes, in its place as it runs (BigBird).

    Raises:
        Refused: it may.
    """
    around = names.modules[names.parent(name)]
    swap = next((own for own in layouts.ATTENTION_SWAPS if hasattr(around, own)), None)
    if swap and name.rpartition(".")[2] == "self":
        raise Refused(
            f"{swap} puts a new attention of the config's sizes in its place, depending on the input's length"
        )


def _refuse_fixed_width(module: nn.Module) -> None:
    """A forward that gives what it mixed the width of its input has no room for fewer heads."""
    first = next((name for name in inspect.signature(type(module).forward).parameters if name != "self"), "")
    source = forward_of(module)
    if re.search(r"chunk\(\w+, 2, dim=1\)", source):
        raise Refused("its forward pairs the first half of its heads with the second")
    if re.search(r"\.view\([^()]*\bdim\.\w+", source):
        raise Refused("its forward reshapes to sizes of its input, whatever the number of heads")
    for last in re.findall(rf"^ +(?:\w+, )+(\w+) = {first}\.(?:size\(\)|shape)$", source, re.MULTILINE):
        if last != "_" and re.search(rf"\.(?:view|reshape)\((?:[^()]|\([^()]*\))*\b{last}\b", source):
            raise Refused(f"its forward reshapes to {last}, the width of its input, whatever the number of heads")


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
        slices=tuple(dict.fromkeys(piece for site in sites for piece in site.slices)),
        attributes=tuple(piece for site in sites for piece in site.attributes),
        reads=tuple(piece for site in sites for piece in site.reads),
    )
