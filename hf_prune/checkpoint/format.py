"""The manifest, written: what of a model its stock config can't say. `docs/checkpoint-format.md` is the contract.

Reading it is in `modeling_hf_prune`, which has to stand by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune.checkpoint.modeling_hf_prune import MANIFEST_VERSION, ConfigView, absent_returns


MODELLING_MODULE = "modeling_hf_prune"
# Numbers that follow from a layer's weight: `set_sizes` brings them along.
SIZES_OF_LAYERS = (
    *("in_features", "out_features", "nx", "nf", "num_embeddings", "embedding_dim"),
    *("in_channels", "out_channels", "groups"),
)


# Numbers that no run changes, and that are never a matter of size: what differs in them computes something else.
OF_FUNCTION = ("window_size", "shift_size", "sliding_window", "stride", "dilation", "padding")


def sizes(model: nn.Module, views: Collection[tuple[str, str]] = ()) -> dict[str, Any]:
    """Every size that must agree: saved tensors, the plain numbers of modules (heads, widths, layer numbers).

    Args:
        model: live, or on the meta device.
        views: (module, field) pairs of config fields that a module reads by itself, as `view_fields` gives them.
    """
    found: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    for path, module in model.named_modules():
        # buffers that aren't saved are made when the model is built, and may grow as it runs
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}"] = tuple(buffer.shape)
        found |= {f"{path}:{name}": value for name, value in numbers(module).items()}
    found |= {f"{path}:config.{name}": getattr(model.get_submodule(path).config, name) for path, name in views}
    return found


def numbers(module: nn.Module) -> dict[str, float]:
    """The plain numbers of a module that pruning may change: whole ones, and epsilons (of folded norms). None of an absent one."""
    if absent_returns(module) is not None:
        return {}
    return {
        name: value
        for name, value in module.__dict__.items()
        if not name.startswith("_") and (type(value) is int or (type(value) is float and "eps" in name))
    }


def view_fields(model: nn.Module) -> list[tuple[str, str]]:
    """(module, config field) for every field that a module sees by itself."""
    return [
        (path, name)
        for path, module in model.named_modules()
        if isinstance(view := module.__dict__.get("config"), ConfigView)
        for name in view.__dict__["_overrides"]
    ]


def without_drift(wanted: Mapping[str, Any], stock: Mapping[str, Any]) -> dict[str, Any]:
    """`wanted` but for numbers that running a model changes (a rotary embedding's cached length): pruning only lowers."""
    return {
        name: value
        for name, value in wanted.items()
        if ":" not in name or name.rpartition(":")[2] in OF_FUNCTION or not _drifted(value, stock.get(name))
    }


def _drifted(value: float, stock: float | None) -> bool:
    return stock is None or (type(value) is int and value > stock)


def differing(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that differ or are in one of the two only, and of the wanted numbers that differ."""
    names = [*wanted, *(name for name in found if name not in wanted and ":" not in name)]
    return [name for name in names if wanted.get(name) != found.get(name)]


def manifest_of(model: PreTrainedModel, built: PreTrainedModel) -> dict[str, Any]:
    """What differs between the live model and what its config builds, by module.

    Args:
        model: the model after removal.
        built: the stock model of the same class and config, on the meta device.
    """
    stock = dict(built.named_modules())
    modules = {name: _entry(module, stock[name]) for name, module in model.named_modules() if name in stock}
    return {
        "version": MANIFEST_VERSION,
        "class": type(model).__name__,
        "base_model_prefix": model.base_model_prefix if model.base_model is not model else "",
        "modules": {name: entry for name, entry in modules.items() if entry},
    }


def _entry(module: nn.Module, stock: nn.Module) -> dict[str, Any]:
    if (returns := absent_returns(module)) is not None:
        return {"absent": returns}
    shapes = {
        name: list(parameter.shape)
        for name, parameter in (*module._parameters.items(), *_saved_buffers(module, stock))
        if parameter is not None and _differs(parameter, stock, name)
    }
    theirs = numbers(stock)
    changed = {
        name: value
        for name, value in numbers(module).items()
        if theirs.get(name, value) != value
        and not _drifted(value, theirs[name])
        and not (shapes and name in SIZES_OF_LAYERS)
    }
    view = module.__dict__.get("config")
    overrides = dict(view.__dict__["_overrides"]) if isinstance(view, ConfigView) else {}
    parts = {"tensors": shapes, "attributes": changed, "config": overrides}
    return {key: part for key, part in parts.items() if part}


def _saved_buffers(module: nn.Module, stock: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Those that both have: what stands for a part that has left holds an empty one in place of a parameter."""
    both = module._buffers.keys() & stock._buffers.keys() - module._non_persistent_buffers_set
    return ((name, module._buffers[name]) for name in sorted(both))


def _differs(parameter: Tensor, stock: nn.Module, name: str) -> bool:
    built = stock._parameters.get(name, stock._buffers.get(name))
    if built is None:
        return name == "bias" and isinstance(stock, nn.Linear)  # all that a manifest can add
    return parameter.shape != built.shape


def put_manifest_(model: PreTrainedModel, manifest: dict[str, Any]) -> None:
    """Write the manifest into the model's config, and where Transformers finds the class that reads it."""
    model.config.hf_prune = manifest
    refresh_auto_map_(model)


def refresh_auto_map_(model: PreTrainedModel) -> None:
    """Name the modelling file beside the weights; once loaded from the Hub, a config names the one in its repository.

    A model whose class isn't Transformers' own keeps the code it came with, and loads where hf_prune is imported.
    """
    if hasattr(transformers, type(model).__name__):
        model.config.auto_map = {
            **(getattr(model.config, "auto_map", None) or {}),
            **auto_map(model.config.model_type),
        }


def kept_blocks(config: Any) -> dict[str, list[int]]:
    """The stacks of which an earlier manifest says the blocks that are left, by their numbers in the stock model."""
    modules = (getattr(config, "hf_prune", None) or {}).get("modules", {})
    return {name: entry["kept"] for name, entry in modules.items() if "kept" in entry}


def drop_manifest_(config: Any) -> None:
    """Take every trace of the manifest out of a config."""
    config.__dict__.pop("hf_prune", None)
    references = config.__dict__.pop("auto_map", None) or {}
    theirs = {
        name: reference for name, reference in references.items() if f"{MODELLING_MODULE}." not in str(reference)
    }
    if theirs:
        config.auto_map = theirs


def auto_map(model_type: str) -> dict[str, str]:
    """Auto class -> class in the modelling file, for every task that the model type knows."""
    # imported here because the load hook is installed while Transformers is being imported
    from transformers.models.auto import modeling_auto

    found = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if mapping is None or not name.startswith("AutoModel"):
            continue
        names = mapping._model_mapping.get(model_type)
        if names:
            found[name] = f"{MODELLING_MODULE}.{names[0] if isinstance(names, (tuple, list)) else names}"
    return found


def auto_class(model: nn.Module) -> str:
    """The Auto class that loads the model's class, else the class itself, by name."""
    name = type(model).__name__
    mapping = auto_map(model.config.model_type) if isinstance(model, PreTrainedModel) else {}
    return next((auto for auto, reference in mapping.items() if reference.endswith(f".{name}")), name)
