"""After removal: make the config say the new sizes, or write the manifest that does.

Expressible is tested, never assumed: an edited config is built on the meta device and every size compared.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_prune.apply.replace import add_bias_, takes_bias
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
from hf_prune.checkpoint.modeling_hf_prune import ConfigView, ManifestError, absent_returns, keep_blocks_, resize_
from hf_prune.errors import UnsupportedModelError
from hf_prune.structure import Site, inspect_model
from hf_prune.structure.layouts import LAYER_INDEX_LISTS, TOP_K_NAMES
from hf_prune.structure.naming import read_list
from hf_prune.structure.source import reads_config, source_of


# Config fields that may hold a depth, a feed-forward width, numbers of heads. Which one does is found by building.
DEPTH_FIELDS = (
    "num_hidden_layers",
    "encoder_layers",
    "decoder_layers",
    "num_layers",
    "num_decoder_layers",
    "n_layer",
    "n_layers",
    "depth",
)
STAGE_DEPTH_FIELDS = ("depths", "num_blocks", "depth", "num_layers", "layers_per_stage", "num_hidden_layers")
WIDTH_FIELDS = (
    "intermediate_size",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "ffn_dim",
    "ffn_hidden_size",
    "hidden_dim",
    "d_ff",
    "n_inner",
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
)
HEAD_FIELDS = (
    "num_attention_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "num_heads",
    "n_heads",
    "n_head",
    "num_key_value_heads",
    "num_kv_heads",
)
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
FIELDS = {"ffn_neurons": WIDTH_FIELDS, "attention_heads": HEAD_FIELDS, "experts": EXPERT_FIELDS}
# Lists of a config with one entry a layer have one of these in their name.
PER_LAYER_WORDS = ("layer", "block", "_types")

Kept = dict[str, list[int]]  # name of a stack -> the old numbers of its blocks
Edit = dict[tuple[str, str], Any]  # (path of the nested config, field) -> value


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


def _tell_depth_(caller: Any, n_blocks: int) -> None:
    """What goes through its blocks by a number of the config gets a view of the config with their number."""
    fields = [name for name in DEPTH_FIELDS if reads_config(source_of(caller), name)]
    if fields and not isinstance(caller, PreTrainedModel):
        caller.config = ConfigView(caller.config, dict.fromkeys(fields, n_blocks))


def _settle(model: PreTrainedModel, kept_layers: Mapping[str, Sequence[int]], listed: Kept) -> Verdict:
    """Stacks in `kept_layers` get their depth by an edit of the config, those in `listed` by the manifest."""
    config = _plain_copy(model.config)
    depth = _depth_edit(model, config, kept_layers)
    with_depth = _edited(config, depth)
    base = _build(model, with_depth, listed)
    if base is None:
        raise UnsupportedModelError(f"{type(model).__name__} can't be built from its config once layers are dropped")
    views = view_fields(model)
    wanted = without_drift(sizes(model, views), sizes(base, views))
    widths: Edit = {}
    has_new_biases = any(name.endswith(".bias") for name in wanted.keys() - sizes(base, views).keys())
    missing, zeros = _missing(model, wanted, sizes(base, views), has_new_biases)
    for edit in chain(_width_edits(model, base, with_depth), _bias_edits(with_depth) if has_new_biases else ()):
        if not missing:
            break
        built = _build(model, _edited(with_depth, {**widths, **edit}), listed)
        if built is None:
            continue
        remaining, unset = _missing(model, wanted, sizes(built, views), has_new_biases)
        if remaining < missing:
            widths, missing, zeros = {**widths, **edit}, remaining, unset
    if missing:
        # where parts of layers have left, no config says all; the neurons' widths that one can say are worth saying
        # (numbers of heads aren't: head sizes and rotary angles may follow from them)
        widths = {key: value for key, value in widths.items() if key[1] in WIDTH_FIELDS and _has_absent(model)}
        widths = widths if widths and _fits(model, _edited(with_depth, widths), wanted, views, listed) else {}
    edits = {**depth, **widths}
    final = _build(model, _edited(config, edits), listed)
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
        return Verdict("hf_prune", f"no stock config says that {n_absent} modules have left layers that stay", said)
    n_modules = len(manifest["modules"])
    which = "some of which have a bias more" if has_new_biases else "which differ by layer"
    return Verdict("hf_prune", f"no stock config says the sizes of {n_modules} modules, {which}", said)


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
    built = _build(model, config, listed)
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
    config = _plain_copy(model.config)
    tried = range(1, largest) if sites[0].target == "attention_heads" else range(largest - 1, largest)
    allowed = [size for size in tried if _says(model, config, sites, size, leaving)]
    if sites[0].target != "attention_heads" and allowed:
        allowed = list(range(1, largest))
    return [*allowed, largest]


def _says(model: nn.Module, config: Any, sites: Sequence[Site], size: int, leaving: Collection[str]) -> bool:
    """Whether some edit gives every site of `sites`, and no other site that stays, `size` units."""
    before = {key: n for key, n in _entries_by_site(model).items() if key not in leaving}
    wanted = before | {site.key: before[site.key] // site.n_units * size for site in sites}
    fields = FIELDS[sites[0].target]
    edit: Edit = {}
    for one in _scaling_edits(config, fields, sites[0].n_units, size):
        one = {**one, **_limits(config, size)} if sites[0].target == "experts" else one
        built = _build(model, _edited(config, {**edit, **one}))
        if built is None:
            continue
        # a part that left before is in what a config builds all the same
        found = {key: n for key, n in _entries_by_site(built).items() if key in before}
        if found == wanted:
            return True
        if all(found.get(key) in (before[key], wanted[key]) for key in before) and found != before:
            edit = {**edit, **one}
    return False


# --------------------------------------------------------------------------------------------------------------
# building and comparing


def _build(model: PreTrainedModel, config: Any, listed: Kept | None = None) -> PreTrainedModel | None:
    """The model's class on the meta device, with the blocks that are listed; None where the config's own checks refuse.

    Some checks are made when a config is read only: of a backbone's stages, which follow from the depth.
    """
    try:
        type(config).from_dict(config.to_dict())
        with torch.device("meta"):
            built = type(model)(copy.deepcopy(config))
        for stack, kept in (listed or {}).items():
            keep_blocks_(built, stack, kept)
        return built
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, AssertionError):
        return None
    except StrictDataclassError:
        return None


# --------------------------------------------------------------------------------------------------------------
# edits


def _configs(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The config and its nested ones, with their paths."""
    yield path, config
    for name, value in list(config.__dict__.items()):
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value, f"{path}.{name}" if path else name)


def _at(config: Any, path: str) -> Any:
    for name in path.split(".") if path else ():
        config = getattr(config, name)
    return config


def _read(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # configs with per-layer values refuse to say one for all
        return None


def _edited(config: Any, edit: Edit) -> Any:
    edited = copy.deepcopy(config)
    for (path, name), value in edit.items():
        setattr(_at(edited, path), name, copy.deepcopy(value))
    return edited


def _plain_copy(config: Any) -> Any:
    """The config without an earlier manifest, so that it builds stock sizes."""
    plain = copy.deepcopy(config)
    drop_manifest_(plain)
    return plain


def _depth_edit(model: PreTrainedModel, config: Any, kept_layers: Mapping[str, Sequence[int]]) -> Edit:
    """For each stack the depth field that it follows, and every per-layer list beside it cut to what is kept."""
    edit: Edit = {}
    built = _build(model, config)
    for stack, kept in kept_layers.items():
        depth = None if built is None else len(built.get_submodule(stack))
        if depth is None or len(model.get_submodule(stack)) == depth:
            continue  # a shared block: the number of calls is already in the config
        for path, nested in _configs(config):
            lists = {
                (path, name): [value[number] for number in kept]
                for name, value in nested.__dict__.items()
                if isinstance(value, (list, tuple)) and len(value) == depth and any(w in name for w in PER_LAYER_WORDS)
            }
            lists |= {
                (path, name): [list(kept).index(number) for number in value if number in kept]
                for name in LAYER_INDEX_LISTS
                if (value := read_list(nested, name)) and all(type(n) is int and 0 <= n < depth for n in value)
            }
            for name, value in _depths(
                nested, depth, len(kept), {key[1]: edit[key] for key in edit if key[0] == path}
            ):
                attempt = {**edit, (path, name): value, **lists}
                shorter = _build(model, _edited(config, attempt))
                if shorter is not None and len(shorter.get_submodule(stack)) == len(kept):
                    edit = attempt
                    break
            else:
                continue
            break
        else:
            raise UnsupportedModelError(f"no field of {type(config).__name__} holds the depth of {stack} ({depth})")
    return edit


def _depths(config: Any, depth: int, n_kept: int, said: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Fields that may hold the depth, each with what it would be: a number, or a list with one for each stage."""
    for name in DEPTH_FIELDS:
        if _read(config, name) == depth:
            yield name, n_kept
    for name in STAGE_DEPTH_FIELDS:
        values = said.get(name, _read(config, name))
        for place, value in enumerate(values if isinstance(values, (list, tuple)) else ()):
            if value == depth:
                yield name, [*values[:place], n_kept, *values[place + 1 :]]


def _width_edits(model: PreTrainedModel, built: PreTrainedModel, config: Any) -> Iterator[Edit]:
    """Edits that may bring the config's widths to the model's: from what each kind of site has now and had before."""
    before = {site.key: site for site in inspect_model(built).sites}
    for target, fields in FIELDS.items():
        # by entries and not by units: with one key/value head left, a unit is another thing than with two
        changes = dict.fromkeys(
            (_n_entries(before[site.key]), _n_entries(site))
            for site in inspect_model(model).of(target)  # type: ignore[arg-type]
            if site.key in before and _n_entries(site) != _n_entries(before[site.key])
        )
        for old, new in changes:
            for edit in _scaling_edits(config, fields, old, new):
                yield {**edit, **_limits(config, new)} if target == "experts" else edit


def _limits(config: Any, n_experts: int) -> Edit:
    """Experts a token, no more than there are."""
    limits = {(path, name): _read(nested, name) for path, nested in _configs(config) for name in TOP_K_NAMES}
    return {key: n_experts for key, value in limits.items() if type(value) is int and value > n_experts}


def _bias_edits(config: Any) -> Iterator[Edit]:
    """Edits that make a config build biases that it now leaves out."""
    for path, nested in _configs(config):
        for name, value in nested.__dict__.items():
            if value is False and "bias" in name:
                yield {(path, name): True}


def _entries_by_site(model: nn.Module) -> dict[str, int]:
    return {site.key: _n_entries(site) for site in inspect_model(model).sites if site.target != "layers"}


def _n_entries(site: Site) -> int:
    """Entries that the output projection reads."""
    return (site.reads[0].span.width if site.reads else 1) * site.n_units


def _scaling_edits(config: Any, fields: Sequence[str], old: int, new: int) -> Iterator[Edit]:
    """`old` units become `new`: each field that counts them by itself, then all fields of one config together."""
    for path, nested in _configs(config):
        scaled: Edit = {}
        for name in fields:
            value = _read(nested, name)
            if isinstance(value, int) and value and value * new % old == 0:
                scaled[path, name] = value * new // old
            elif value is None and name in nested.__dict__ and fields is WIDTH_FIELDS:
                scaled[path, name] = new  # a width that the model derives when none is given (GPT-2's n_inner)
        pinned: Edit = {}
        if fields is HEAD_FIELDS and "head_dim" in nested.__dict__:
            heads, width = _read(nested, "num_attention_heads"), _read(nested, "hidden_size")
            size = _read(nested, "head_dim") or (width // heads if heads and width else None)
            pinned = {(path, "head_dim"): size} if size else {}
        for key, value in scaled.items():
            yield {key: value, **pinned}
        if len(scaled) > 1:
            yield {**scaled, **pinned}


def _adopt(model: PreTrainedModel, built: PreTrainedModel, edit: Edit) -> None:
    """Write the edit into the live config, and into the copies of it that parts of the model hold."""
    for (path, name), value in edit.items():
        setattr(_at(model.config, path), name, value)
    known = {id(config) for _, config in _configs(model.config)}
    names = {name for _, name in edit} | set(DEPTH_FIELDS)
    others = dict(built.named_modules())
    for path, module in model.named_modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig) and id(config) not in known and path in others:
            known.add(id(config))
            for name in names & config.__dict__.keys():
                setattr(config, name, getattr(others[path].config, name))
