"""Attention sites. A unit is a head; under grouped-query attention a key/value head with all its query heads.

Axes: d_head entries a head, n_heads query heads, n_kv_heads key/value heads, n_rep = n_heads / n_kv_heads.
With one key/value head for all (multi-query), the unit is a query head and key and value stay.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from torch import Tensor, nn

from hf_prune.structure import layouts
from hf_prune.structure.heads import Heads, Refused, heads_of
from hf_prune.structure.layouts import AttentionLayout
from hf_prune.structure.naming import ModuleNames, d_in, is_attention, is_linear, parents
from hf_prune.structure.per_head import full_width_norms, sees_no_head, side_slices
from hf_prune.structure.projections import reading_slice
from hf_prune.structure.sites import Attribute, Read, Refusal, Site, Span, TensorSlice
from hf_prune.structure.source import forward_of, reads_config, reshapes_by, source_of


def find_sites(names: ModuleNames, stacks: dict[str, tuple[str, ...]]) -> Iterator[Site | Refusal]:
    """One site for each attention, or one for all blocks of a stack that share a bias by head, or keys and values."""
    groups: dict[str, list[Site]] = {}
    tied: set[str] = set()
    keepers: dict[tuple[str, str], str] = {}  # by place in the blocks and kind, whose keys others take
    for name, module in names.modules.items():
        layout = matching(names, name)
        if layout is None:
            if is_convolutional(module):
                yield Refusal("attention_heads", name, "its projections are convolutions")
            continue
        try:
            site = _site(names, name, module, layout)
            path = _path_in_stack(name, stacks)
            if tables := _shared_tables(names, path, module, site):
                site = replace(site, slices=(*site.slices, *tables))
            hands_on = _hands_on_bias(module)
            kind = path, str(getattr(module, layouts.KIND_OF_LAYER, ""))
            if getattr(module, layouts.STORES_KEYS, False) and not layout.latent:
                path = keepers[kind] = name
            elif layout.flag:
                if kind not in keepers:
                    raise Refused("it takes the keys and values of another attention, which isn't known")
                path = keepers[kind]
                tied.add(path)
        except Refused as reason:
            yield Refusal("attention_heads", name, str(reason))
            continue
        groups.setdefault(path, []).append(site)
        if tables or layout.bias_table or hands_on:
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
    reads = bool(handed) or path.rpartition(".")[2] in layouts.SHARED_BIAS_READERS
    if not reads or any(piece.module.endswith(_OWNED) for piece in site.slices):
        return []
    stack = path.partition(".*")[0]
    tables = _tables_in(names, names.parent(stack), stack)
    is_handed = handed and handed[0].default is inspect.Parameter.empty
    if not tables and (is_handed or not handed):
        tables = next(filter(None, (_tables_in(names, around, stack, own=True) for around in parents(stack))), [])
    if not tables and is_handed:
        raise Refused(f"it is handed a {handed[0].name} by head, which comes from somewhere unknown")
    return [piece for piece in tables if _length(names, piece) == site.n_units]


def _tables_in(names: ModuleNames, around: str, stack: str, *, own: bool = False) -> list[TensorSlice]:
    """The known tables in `around`, or its `own` alone, that aren't in the stack."""
    return [
        TensorSlice(other, tensor, dim, (Span(0, 1),), writes=True)
        for other in (names.inside(around) if around else names.modules)
        if not other.startswith(f"{stack}.")
        for table, tensors in layouts.SHARED_TABLES.items()
        if (other == names.resolve(around, table) if own else f".{other}".endswith(f".{table}"))
        for tensor, dim in tensors
        if isinstance(getattr(names.modules[other], tensor, None), Tensor)
    ]


def _hands_on_bias(module: nn.Module) -> bool:
    """Whether it takes the bias by head of the block before, or makes one, if only of zeros (T5, Pix2Struct)."""
    takes = layouts.SHARED_BIAS_ARGUMENTS[0] in inspect.signature(type(module).forward).parameters
    return takes and any(flag in module.__dict__ for _, flag in layouts.OWNED_BY_FIRST_BLOCK)


def matching(names: ModuleNames, name: str) -> AttentionLayout | None:
    """The layout of the attention `name`, if it is one."""
    for first, candidates in layouts.attention_by_first_part() if names.modules[name]._modules else ():
        if is_linear(names.get(name, first)):
            for layout in candidates:
                flagged = not layout.flag or getattr(names.modules[name], layout.flag, False)
                if flagged and all(is_linear(names.get(name, part)) for part in layout.parts):
                    return layout
    return None


def is_convolutional(module: nn.Module) -> bool:
    """An attention whose queries, keys, values and output are convolutions of single positions (in VQ-GAN's encoder)."""
    convolutions = [each for each in module.children() if isinstance(each, (nn.Conv1d, nn.Conv2d))]
    alone = [each for each in convolutions if set(each.kernel_size) == {1}]
    return len(alone) == 4 and is_attention(module)


def _site(names: ModuleNames, name: str, module: nn.Module, layout: AttentionLayout) -> Site:
    output_name = names.resolve(name, layout.output)
    output = names.modules[output_name]
    width = d_in(output)  # n_heads * d_value, of a group
    _refuse_alibi(names, name, module)
    heads = heads_of(names, name, layout, width)
    _refuse_fixed_width(module)
    _refuse_repeated_mask(names, name)
    refuse_swapped(names, name)
    n_units, unit = heads.n_units, Span(0, width // heads.n_units)
    slices = [*heads.slices, reading_slice(output_name, output, unit)]
    others = list(_further_outputs(names, name, n_units))
    slices += [reading_slice(read.module, names.modules[read.module], read.span) for read in others]
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
        (*_attributes(name, module, heads, heads.n_heads * heads.d_value), *_counts_around(names, name, heads)),
        tuple(norms),
        reads=(Read(output_name, unit), *others),
    )


def _further_outputs(names: ModuleNames, name: str, n_units: int) -> Iterator[Read]:
    """Projections of a second stream that the same heads give."""
    for path in layouts.FURTHER_OUTPUTS:
        output = names.get(name, path)
        if output is not None:
            yield Read(names.resolve(name, path), Span(0, d_in(output) // n_units))


def _latent_weights(names: ModuleNames, name: str, layout: AttentionLayout) -> Iterator[str]:
    for part in layout.latent:
        yield f"{names.resolve(name, part)}.weight"


def _attributes(name: str, module: nn.Module, heads: Heads, width: int) -> Iterator[Attribute]:
    """The module's numbers that follow its heads, its own or read from the config."""
    multi_query = heads.n_kv_heads == 1 and heads.n_heads > 1
    source = source_of(module)
    reshaped = [
        field
        for field in layouts.PERHAPS_WIDTH_NAMES
        if reshapes_by(source, field) or re.search(rf"= self\.{field} // self\.(?:{_COUNTS})\b", source)
    ]
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
            count = inner.__dict__.get(field)
            if path and not sees_no_head(path) and (count == heads.n_heads or count == heads.n_kv_heads > 1):
                yield Attribute(f"{name}.{path}", field, count // heads.n_units)


def _counts_around(names: ModuleNames, name: str, heads: Heads) -> Iterator[Attribute]:
    """What holds this attention alone may count its heads as it runs (Grounding DINO's, to repeat a mask)."""
    around = names.parent(name)
    module = names.modules[around]
    source = source_of(module) if around and not isinstance(module, nn.ModuleList) else ""
    counts = [own for own in layouts.HEAD_COUNT_NAMES if module.__dict__.get(own) == heads.n_heads]
    counts = [own for own in counts if re.search(rf"self\.{own}\b", source)]
    if counts and not any(matching(names, other) for other in names.inside(around) if other != name):
        yield from (Attribute(around, own, heads.n_heads // heads.n_units) for own in counts)


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
    if re.search(r"\.mean\(\w+, dim=\(1, -1\)\)", source):
        raise Refused("its forward takes a mean over all heads, which others change by leaving")
    if re.search(r"(\w+) = \d+\n[^\n]*\.reshape\([^\n]*\(\1, -1\)", source):
        raise Refused("its forward splits its heads into as many parts as its code says")
    for own in layouts.VALUE_READERS:
        if getattr(module, own, None) is not None:
            raise Refused(f"its {own} adds the values of all heads to what it gives, which is as wide as the model")
    if re.search(r"\.view\([^()]*\bdim\.\w+", source):
        raise Refused("its forward reshapes to sizes of its input, whatever the number of heads")
    by_heads = rf"{first}\.(?:view|reshape)\([^\n]*self\.(?:{_COUNTS}), -1\)"
    if (split := re.search(by_heads, source)) and not re.search(rf"\b{first} = ", source[: split.start()]):
        raise Refused("its forward gives each head a part of its input, which is as wide as the model")
    source = re.sub(rf"\b{first}(?:\.permute\([^()]*\))?\.(?:view|reshape)\(", "", source)
    for last in re.findall(rf"^ +(?:\w+, )+(\w+) = {first}\.(?:size\(\)|shape)$", source, re.MULTILINE):
        if last != "_" and re.search(rf"\.(?:view|reshape)\((?:[^()]|\([^()]*\))*\b{last}\b", source):
            raise Refused(f"its forward reshapes to {last}, the width of its input, whatever the number of heads")


def _refuse_repeated_mask(names: ModuleNames, name: str) -> None:
    """A model may repeat a mask for as many heads as its config says, for all its blocks."""
    own = name.rpartition(".")[2]
    call = re.search(rf"self\.{own}\(({_INNER})\)", forward_of(names.modules[names.parent(name)]))
    given = call[1] if call else ""
    for around in parents(name) if given else ():
        for mask, count in _repeated(source_of(names.modules[around])):
            if re.search(rf"\b{mask}\b", given):
                holder = type(names.modules[around]).__name__
                raise Refused(f"{holder} repeats its mask for {count}, whatever the number of heads")


@cache  # of a model's source once, not for each of its attentions
def _repeated(source: str) -> tuple[tuple[str, str], ...]:
    """What code repeats for as many heads as the config says: names, each with the field."""
    found = re.findall(rf"^ +(\w+) = [^\n]*\.(?:repeat|expand)\(({_INNER})\)", source, re.MULTILINE)
    counts = ((mask, re.search(rf"self\.(config\.(?:{_COUNTS}))\b", sizes)) for mask, sizes in found)
    return tuple((mask, count[1]) for mask, count in counts if count)


_COUNTS = "|".join(layouts.HEAD_COUNT_NAMES)
_INNER = r"(?:[^()]|\([^()]*\))*"


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
