"""Edits of a config that may make it build other sizes: which field holds what is found by building, on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_prune.checkpoint.format import drop_manifest_
from hf_prune.checkpoint.modeling_hf_prune import keep_blocks_
from hf_prune.errors import UnsupportedModelError
from hf_prune.structure import Site, inspect_model
from hf_prune.structure.layouts import LAYER_INDEX_LISTS, TOP_K_NAMES
from hf_prune.structure.naming import read_list


# Config fields that may hold a depth, a feed-forward width, numbers of heads. Which one does is found by building.
DEPTH_FIELDS = (
    "num_hidden_layers",
    "encoder_layers",
    "decoder_layers",
    "num_layers",
    "num_encoder_layers",
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


def build(model: PreTrainedModel, config: Any, listed: Kept | None = None) -> PreTrainedModel | None:
    """The model's class on the meta device, with the blocks that are listed; None where the config's own checks refuse.

    Of the config as it is read again from a file: some check and compute only then, as a width that follows from a ratio. One
    that is read as another class, made by hand of parts that its file can't tell, is taken as it is.
    """
    try:
        again = type(config).from_dict(config.to_dict())
        config = again if _classes(again) == _classes(config) else copy.deepcopy(config)
        for _, nested in configs(config):
            if isinstance(dtype := nested.__dict__.get("dtype"), str):  # as `save_pretrained` leaves it
                nested.dtype = getattr(torch, dtype)
        with torch.device("meta"):
            built = type(model)(config)
        for stack, kept in (listed or {}).items():
            keep_blocks_(built, stack, kept)
        return built
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, AssertionError):
        return None
    except StrictDataclassError:
        return None


def configs(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The config and its nested ones, with their paths."""
    yield path, config
    for name, value in list(config.__dict__.items()):
        if isinstance(value, PreTrainedConfig):
            yield from configs(value, f"{path}.{name}" if path else name)


def _classes(config: Any) -> dict[str, type]:
    return {path: type(each) for path, each in configs(config)}


def at(config: Any, path: str) -> Any:
    """The nested config at a path."""
    for name in path.split(".") if path else ():
        config = getattr(config, name)
    return config


def read(config: Any, name: str) -> Any:
    """A field; None where there is none."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # configs with per-layer values refuse to say one for all
        return None


def edited(config: Any, edit: Edit) -> Any:
    """A copy of the config with the edit in it."""
    copied = copy.deepcopy(config)
    for (path, name), value in edit.items():
        setattr(at(copied, path), name, copy.deepcopy(value))
    return copied


def plain_copy(config: Any) -> Any:
    """The config without an earlier manifest, so that it builds stock sizes."""
    plain = copy.deepcopy(config)
    drop_manifest_(plain)
    return plain


def depth_edit(model: PreTrainedModel, config: Any, kept_layers: Mapping[str, Sequence[int]]) -> Edit:
    """For each stack the depth field that it follows, and every per-layer list beside it cut to what is kept."""
    edit: Edit = {}
    built = build(model, config)
    for stack, kept in kept_layers.items():
        depth = _length(built, stack)
        if depth is None or len(kept) == depth or kept[-1] >= depth:
            continue  # a shared block: the number of calls is already in the config
        for path, nested in configs(config):
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
                try:
                    shorter = build(model, edited(config, attempt))
                except NotImplementedError:  # a sum of two depths, which says itself that it can't be set
                    continue
                if _length(shorter, stack) == len(kept):
                    edit = attempt
                    break
            else:
                continue
            break
        else:
            raise UnsupportedModelError(f"no field of {type(config).__name__} holds the depth of {stack} ({depth})")
    return edit


def _length(model: nn.Module | None, stack: str) -> int | None:
    """How many blocks a stack has; None where the model couldn't be built, or has no such stack."""
    try:
        return None if model is None else len(model.get_submodule(stack))  # type: ignore[arg-type]
    except AttributeError:
        return None


def _depths(config: Any, depth: int, n_kept: int, said: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Fields that may hold the depth, each with what it would be: a number, or a list with one for each stage."""
    for name in DEPTH_FIELDS:
        if read(config, name) == depth:
            yield name, n_kept
    for name in STAGE_DEPTH_FIELDS:
        values = said.get(name, read(config, name))
        for place, value in enumerate(values if isinstance(values, (list, tuple)) else ()):
            if value == depth:
                yield name, [*values[:place], n_kept, *values[place + 1 :]]


def width_edits(model: PreTrainedModel, built: PreTrainedModel, config: Any) -> Iterator[Edit]:
    """Edits that may bring the config's widths to the model's: from what each kind of site has now and had before."""
    before, now = {site.key: site for site in inspect_model(built).sites}, inspect_model(model)
    for target, fields in FIELDS.items():
        # by entries and not by units: with one key/value head left, a unit is another thing than with two
        changes = dict.fromkeys(
            (_n_entries(before[site.key]), _n_entries(site))
            for site in now.of(target)  # type: ignore[arg-type]
            if site.key in before and _n_entries(site) != _n_entries(before[site.key])
        )
        for old, new in changes:
            for edit in scaling_edits(config, fields, old, new):
                yield {**edit, **limits(config, new)} if target == "experts" else edit


def limits(config: Any, n_experts: int) -> Edit:
    """Experts a token, no more than there are."""
    limits = {(path, name): read(nested, name) for path, nested in configs(config) for name in TOP_K_NAMES}
    return {key: n_experts for key, value in limits.items() if type(value) is int and value > n_experts}


def bias_edits(config: Any) -> Iterator[Edit]:
    """Edits that make a config build biases that it now leaves out."""
    for path, nested in configs(config):
        for name, value in nested.__dict__.items():
            if value is False and "bias" in name:
                yield {(path, name): True}


def entries_by_site(model: nn.Module) -> dict[str, int]:
    """By site key, how many entries its output projection reads."""
    return {site.key: _n_entries(site) for site in inspect_model(model).sites if site.target != "layers"}


def _n_entries(site: Site) -> int:
    """Entries that the output projection reads."""
    return (site.reads[0].span.width if site.reads else 1) * site.n_units


def scaling_edits(config: Any, fields: Sequence[str], old: int, new: int) -> Iterator[Edit]:
    """`old` units become `new`: each field that counts them by itself, then all fields of one config together."""
    for path, nested in configs(config):
        scaled: Edit = {}
        for name in fields:
            value = read(nested, name)
            if isinstance(value, int) and value and value * new % old == 0:
                scaled[path, name] = value * new // old
            elif value is None and name in nested.__dict__ and fields is WIDTH_FIELDS:
                scaled[path, name] = new  # a width that the model derives when none is given (GPT-2's n_inner)
        pinned: Edit = {}
        if fields is HEAD_FIELDS and "head_dim" in nested.__dict__:
            heads, width = read(nested, "num_attention_heads"), read(nested, "hidden_size")
            size = read(nested, "head_dim") or (width // heads if heads and width else None)
            pinned = {(path, "head_dim"): size} if size else {}
        for key, value in scaled.items():
            yield {key: value, **pinned}
        if len(scaled) > 1:
            yield {**scaled, **pinned}
