"""After removal: make the config say the new sizes, or write the manifest that does.

Expressible is tested, never assumed: an edited config is built on the meta device and every size compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_prune.apply.replace import add_bias_, takes_bias
from hf_prune.checkpoint.edits import (
    DEPTH_FIELDS,
    FIELDS,
    WIDTH_FIELDS,
    Edit,
    Kept,
    at,
    bias_edits,
    build,
    configs,
    depth_edit,
    edited,
    entries_by_site,
    limits,
    plain_copy,
    scaling_edits,
    width_edits,
)
from hf_prune.checkpoint.format import (
    differing,
    drop_manifest_,
    kept_blocks,
    manifest_of,
    put_manifest_,
    sizes,
    view_fields,
    without_drift,
)
from hf_prune.checkpoint.modeling_hf_prune import ConfigView, ManifestError, absent_returns, resize_
from hf_prune.errors import UnsupportedModelError
from hf_prune.structure import Site
from hf_prune.structure.layouts import DEPTH_NAMES, LAYER_NUMBER_NAMES, OWNED_BY_FIRST_BLOCK
from hf_prune.structure.source import reads_config, source_of


@dataclass(frozen=True)
class Verdict:
    """How the checkpoint will load: `loads_with` is "transformers" or "hf_prune", `why` one sentence."""

    loads_with: str
    why: str
    edits: dict[str, Any] = field(default_factory=dict)


def settle_config_(model: nn.Module, kept_layers: Mapping[str, Sequence[int]]) -> Verdict:
    """Edit `model.config` so that it builds the model as it is now; where no stock field can, add the manifest.

    Args:
        model: after `remove_masked_`; a plain `nn.Module` without a config is left alone.
        kept_layers: for each stack that lost layers, the old numbers of those that stay.

    Raises:
        UnsupportedModelError: not even a manifest says the model as it is (something other than sizes was changed).
    """
    if not isinstance(model, PreTrainedModel):
        return Verdict("torch", "not a Transformers model: save its state dict yourself")
    earlier = kept_blocks(model.config)
    if not earlier:
        try:
            return _settle(model, kept_layers, {})
        except UnsupportedModelError:
            if not kept_layers:
                raise
    # no config builds so few blocks, or such: then it goes on building all, and the manifest says which are kept
    now = {
        stack: [earlier[stack][n] for n in kept] if stack in earlier else list(kept)
        for stack, kept in kept_layers.items()
        if len(model.get_submodule(stack))
        == len(kept)  # but for a shared block, whose number of calls the config says
    }
    for stack, kept in now.items():
        _tell_depth_(model.get_submodule(stack.rpartition(".")[0]), len(kept))
    return _settle(model, {}, {**earlier, **now})


def in_place(model: nn.Module, kept_layers: Mapping[str, Sequence[int]]) -> set[str]:
    """The stacks, of those that lose layers, of which no stock config says what they are left with.

    Fewer layers by the config would be others than those that stay (what a block is follows from its number), or leave
    something else out (heads beside each layer). Steps over what left keep all numbers.

    Args:
        model: before removal.
        kept_layers: for each stack that loses layers, the numbers of those that stay.
    """
    if not isinstance(model, PreTrainedModel) or kept_blocks(model.config):
        return set()
    return {stack for stack, kept in kept_layers.items() if not _says_fewer(model, {stack: kept})}


def _says_fewer(model: PreTrainedModel, kept_layers: Mapping[str, Sequence[int]]) -> bool:
    config = plain_copy(model.config)
    try:
        depth = depth_edit(model, config, kept_layers)
    except UnsupportedModelError:
        return False
    full, fewer = build(model, config), build(model, edited(config, depth))
    if full is None or fewer is None or not depth:
        return full is not None and not depth  # a shared block
    if _constant_of_depth(full, fewer, kept_layers):
        return False
    before, after = dict(full.named_parameters()), dict(fewer.named_parameters())
    gone = tuple(
        f"{stack}.{number}."
        for stack, kept in kept_layers.items()
        for number in range(len(full.get_submodule(stack)))
        if number not in kept
    )
    old = {_old_name(name, kept_layers): parameter for name, parameter in after.items()}
    stays = {name for name in before if not name.startswith(gone)}
    first = tuple(owned for owned, _ in OWNED_BY_FIRST_BLOCK)  # handed on
    differing = {name for name in stays ^ old.keys() if not any(f".{owned}." in name for owned in first)}
    return not differing and all(before[name].shape == old[name].shape for name in stays & old.keys())


def _tell_depth_(caller: Any, n_blocks: int) -> None:
    """What goes through its blocks by a number of the config gets a view of the config with their number."""
    fields = [name for name in DEPTH_FIELDS if reads_config(source_of(caller), name)]
    if fields and not isinstance(caller, PreTrainedModel):
        caller.config = ConfigView(caller.config, dict.fromkeys(fields, n_blocks))


def _settle(model: PreTrainedModel, kept_layers: Mapping[str, Sequence[int]], listed: Kept) -> Verdict:
    """Stacks in `kept_layers` get their depth by an edit of the config, those in `listed` by the manifest."""
    config = plain_copy(model.config)
    depth = depth_edit(model, config, kept_layers)
    with_depth = edited(config, depth)
    base = build(model, with_depth, listed)
    if base is None:
        raise UnsupportedModelError(f"{type(model).__name__} can't be built from its config once layers are dropped")
    if depth and (full := build(model, config)) is not None and (name := _constant_of_depth(full, base, kept_layers)):
        raise UnsupportedModelError(
            f"{name} follows from the number of layers, so that a config of fewer builds another"
        )
    views = view_fields(model)
    wanted = without_drift(sizes(model, views), sizes(base, views))
    widths: Edit = {}
    has_new_biases = any(name.endswith(".bias") for name in wanted.keys() - sizes(base, views).keys())
    missing, zeros = _missing(model, wanted, sizes(base, views), has_new_biases)
    may_help = chain(width_edits(model, base, with_depth), bias_edits(with_depth) if has_new_biases else ())
    for edit in may_help if missing else ():
        if not missing:
            break
        built = build(model, edited(with_depth, {**widths, **edit}), listed)
        if built is None:
            continue
        remaining, unset = _missing(model, wanted, sizes(built, views), has_new_biases)
        if remaining < missing:
            widths, missing, zeros = {**widths, **edit}, remaining, unset
    if missing:
        # where parts of layers have left, no config says all; the neurons' widths that one can say are worth saying
        # (numbers of heads aren't: head sizes and rotary angles may follow from them)
        widths = {key: value for key, value in widths.items() if key[1] in WIDTH_FIELDS and _has_absent(model)}
        widths = widths if widths and _fits(model, edited(with_depth, widths), wanted, views, listed) else {}
    edits = {**depth, **widths}
    final = build(model, edited(config, edits), listed)
    assert final is not None
    manifest = manifest_of(model, final)
    if missing or listed:
        _prove(final, manifest, wanted, views)
    manifest["modules"] |= {stack: {"kept": kept} for stack, kept in listed.items()}
    _adopt(model, final, edits)
    said = {f"{path}.{name}" if path else name: value for (path, name), value in edits.items()}
    if not missing and zeros:
        for name in zeros:
            add_bias_(model.get_submodule(name.rpartition(".")[0]))
        wanted = without_drift(sizes(model, views), sizes(final, views))
        assert not differing(wanted, sizes(final, views))
    if not missing and not listed:
        drop_manifest_(model.config)
        for module in model.modules():
            if isinstance(view := module.__dict__.get("config"), ConfigView):
                module.config = view.__dict__["_config"]
        why = "its config says every size" if said else "its sizes are as they were"
        if zeros:
            why += f", with {len(zeros)} biases of zeros beside those that were added"
        return Verdict("transformers", why, said)
    put_manifest_(model, manifest)
    if listed:
        return Verdict("hf_prune", f"no stock config says which blocks {', '.join(listed)} are left with", said)
    if n_absent := sum("absent" in entry for entry in manifest["modules"].values()):
        return Verdict("hf_prune", f"no stock config says which {n_absent} layers, or parts of them, have left", said)
    n_modules = len(manifest["modules"])
    which = "some of which have a bias more" if has_new_biases else "which differ by layer"
    return Verdict("hf_prune", f"no stock config says the sizes of {n_modules} modules, {which}", said)


# Numbers that follow from a place or the depth and make no difference to what is computed, or are set right by themselves.
_FREE = {*LAYER_NUMBER_NAMES, *DEPTH_NAMES, *DEPTH_FIELDS, *(flag for _, flag in OWNED_BY_FIRST_BLOCK)}


def _constant_of_depth(full: nn.Module, fewer: nn.Module, kept_layers: Mapping[str, Sequence[int]]) -> str | None:
    """A plain number that a kept module has by its old place, or by the old depth, and wouldn't have when loaded again."""
    before = dict(full.named_modules())
    for name, module in fewer.named_modules():
        old = before.get(_old_name(name, kept_layers), module)
        for own, value in module.__dict__.items():
            is_free = own in _FREE or own.startswith("_") or "drop" in f"{type(module).__name__}.{own}".lower()
            if type(value) in (int, float, bool) and not is_free and value != old.__dict__.get(own, value):
                return f"{name}.{own}"
    return None


def _old_name(name: str, kept_layers: Mapping[str, Sequence[int]]) -> str:
    """What a module was called before layers left."""
    for stack, kept in kept_layers.items():
        number, dot, rest = name.removeprefix(f"{stack}.").partition(".")
        if name.startswith(f"{stack}.") and number.isdigit() and int(number) < len(kept):
            return f"{stack}.{kept[int(number)]}{dot}{rest}"
    return name


def _missing(
    model: nn.Module, wanted: Mapping[str, Any], found: Mapping[str, Any], may_add: bool
) -> tuple[int, list[str]]:
    """How many sizes differ from those wanted, and, if so allowed, the biases that the model could be given as zeros."""
    names = differing(wanted, found)
    zeros = [name for name in names if may_add and name not in wanted and takes_bias(model, name) == found[name][0]]
    return len(names) - len(zeros), zeros


def _has_absent(model: nn.Module) -> bool:
    return any(absent_returns(module) is not None for module in model.modules())


def _fits(
    model: PreTrainedModel, config: Any, wanted: Mapping[str, Any], views: Sequence[tuple[str, str]], listed: Kept
) -> bool:
    """Whether a manifest gives what `config` builds the sizes of the live model."""
    built = build(model, config, listed)
    try:
        if built is not None:
            _prove(built, manifest_of(model, built), wanted, views)
    except UnsupportedModelError:
        return False
    return built is not None


def _prove(built: nn.Module, manifest: Any, wanted: Mapping[str, Any], views: Sequence[tuple[str, str]]) -> None:
    """Apply the manifest to the stock model: it must give the sizes of the live one."""
    try:
        resize_(built, manifest)
    except ManifestError as error:
        raise UnsupportedModelError(
            f"the model as it is can't be saved so that it loads again: {error.problem}"
        ) from error
    if names := differing(wanted, sizes(built, views)):
        raise UnsupportedModelError(
            f"the model as it is can't be saved so that it loads again: {names[0]} and {len(names) - 1} more differ from "
            "what its config builds, by more than pruned sizes. Merge adapters and undo other changes first."
        )


def allowed_sizes(model: nn.Module, sites: Sequence[Site], leaving: Collection[str] = ()) -> list[int]:
    """The numbers of kept units, the same in all `sites`, that the stock config can say; ascending.

    A feed-forward width is free once one smaller width is; numbers of heads are tried one by one. The sites with keys in
    `leaving` go with their layers, so that any size will do for them.
    """
    largest = min(site.n_units for site in sites)
    config = plain_copy(model.config)
    tried = range(1, largest) if sites[0].target == "attention_heads" else range(largest - 1, largest)
    allowed = [size for size in tried if _says(model, config, sites, size, leaving)]
    if sites[0].target != "attention_heads" and allowed:
        allowed = list(range(1, largest))
    return [*allowed, largest]


def _says(model: nn.Module, config: Any, sites: Sequence[Site], size: int, leaving: Collection[str]) -> bool:
    """Whether some edit gives every site of `sites`, and no other site that stays, `size` units."""
    before = {key: n for key, n in entries_by_site(model).items() if key not in leaving}
    wanted = before | {site.key: before[site.key] // site.n_units * size for site in sites}
    fields = FIELDS[sites[0].target]
    edit: Edit = {}
    for one in scaling_edits(config, fields, sites[0].n_units, size):
        one = {**one, **limits(config, size)} if sites[0].target == "experts" else one
        built = build(model, edited(config, {**edit, **one}))
        if built is None:
            continue
        # a part that left before is in what a config builds all the same
        found = {key: n for key, n in entries_by_site(built).items() if key in before}
        if found == wanted:
            return True
        if all(found.get(key) in (before[key], wanted[key]) for key in before) and found != before:
            edit = {**edit, **one}
    return False


def _adopt(model: PreTrainedModel, built: PreTrainedModel, edit: Edit) -> None:
    """Write the edit into the live config, and into the copies of it that parts of the model hold."""
    for (path, name), value in edit.items():
        setattr(at(model.config, path), name, value)
    known = {id(config) for _, config in configs(model.config)}
    names = {name for _, name in edit} | set(DEPTH_FIELDS)
    others = dict(built.named_modules())
    for path, module in model.named_modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig) and id(config) not in known and path in others:
            known.add(id(config))
            for name in names & config.__dict__.keys():
                setattr(config, name, getattr(others[path].config, name))
