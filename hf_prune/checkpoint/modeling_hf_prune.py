"""Loading a pruned Transformers checkpoint whose sizes its stock config can't express.

This file is self-contained: it needs PyTorch and Transformers only. hf_prune uses it, and copies it beside the weights
so that `from_pretrained(..., trust_remote_code=True)` works where hf_prune is not installed. The config carries a
manifest, `hf_prune`, that lists modules with the sizes that were kept; nothing in it is code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import transformers
from torch import nn


MANIFEST_VERSION = 1
CLASS_PREFIX = "HfPruned"


class ManifestError(ValueError):
    """The manifest is damaged, hostile, made for another model, or newer than this file reads."""


class ConfigView:
    """A module's own view of the shared config: a few numbers differ, all else is the config's, now and later."""

    def __init__(self, config: Any, overrides: Mapping[str, int]):
        self.__dict__["_config"] = config
        self.__dict__["_overrides"] = dict(overrides)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_config" not in self.__dict__:
            raise AttributeError(name)  # deepcopy and pickle ask before the view is filled
        overrides = self.__dict__["_overrides"]
        return overrides[name] if name in overrides else getattr(self.__dict__["_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_config"], name, value)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def resize_(model: nn.Module, manifest: Any) -> None:
    """Give the modules named in `manifest` their kept sizes, with empty tensors, before weights are loaded.

    Everything is checked against the modules as the config built them before anything is allocated: sizes can only
    be smaller. Called for a model of which only a part is there (the base of a task model), it resizes that part;
    called twice, it does nothing the second time.

    Raises:
        ManifestError: the message names what is wrong.
    """
    modules = _checked(manifest)
    own = dict(model.named_modules())
    prefix = str(manifest.get("base_model_prefix") or "")
    plans = []
    for name, entry in modules.items():
        found = _find(own, name, prefix)
        if found is None:
            if type(model).__name__ == manifest.get("class"):
                raise ManifestError(f"the manifest names module {name!r}, which {type(model).__name__} has not")
            continue
        plans.append((name, own[found], entry))
    for name, module, entry in plans:
        _check_entry(name, module, entry)
    for _, module, entry in plans:
        _resize_module(module, entry)


def _checked(manifest: Any) -> dict[str, Any]:
    if not isinstance(manifest, dict):
        raise ManifestError(f"config.hf_prune is a {type(manifest).__name__}; expected a mapping")
    version = manifest.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ManifestError(f"config.hf_prune.version is {version!r}; expected an integer from 1")
    if version > MANIFEST_VERSION:
        raise ManifestError(
            f"the checkpoint has manifest version {version}; this reads up to {MANIFEST_VERSION}. Upgrade hf_prune."
        )
    modules = manifest.get("modules")
    if not isinstance(modules, dict) or not all(isinstance(name, str) for name in modules):
        raise ManifestError("config.hf_prune.modules is missing or no mapping of module names")
    return modules


def _find(own: Mapping[str, nn.Module], name: str, prefix: str) -> str | None:
    """The module's name here: as saved, without the base model's prefix, or with it."""
    for candidate in (name, name.removeprefix(f"{prefix}.") if prefix else name, f"{prefix}.{name}"):
        if candidate in own:
            return candidate
    return None


def _check_entry(name: str, module: nn.Module, entry: Any) -> None:
    if not isinstance(entry, dict) or not set(entry) <= {"tensors", "attributes", "config"}:
        raise ManifestError(f"the manifest's entry for {name!r} may hold tensors, attributes and config only")
    for part in entry.values():
        if not isinstance(part, dict):
            raise ManifestError(f"the manifest's entry for {name!r} holds a {type(part).__name__}, not a mapping")
    for tensor, shape in entry.get("tensors", {}).items():
        built = module._parameters.get(tensor)
        if built is None:
            raise ManifestError(f"the manifest gives {name}.{tensor} a size, but the module has no such parameter")
        if not isinstance(shape, list) or len(shape) != built.dim() or not all(_is_count(size) for size in shape):
            raise ManifestError(f"{name}.{tensor} has size {shape!r}; expected {built.dim()} positive integers")
        if any(size > whole for size, whole in zip(shape, built.shape, strict=True)):
            raise ManifestError(
                f"{name}.{tensor} has size {shape}, more than the {list(built.shape)} that the config builds"
            )
    for attribute, value in entry.get("attributes", {}).items():
        built_value = module.__dict__.get(attribute)
        same_type = type(value) is type(built_value) and type(value) in (int, float)
        if not same_type or not math.isfinite(value) or value < 0 or attribute.startswith("_"):
            raise ManifestError(f"{name}.{attribute} is {value!r}; expected a number in place of {built_value!r}")
    for field, value in entry.get("config", {}).items():
        config = getattr(module, "config", None)
        if not _is_count(value) or not isinstance(getattr(config, field, None), int):
            raise ManifestError(f"{name}.config.{field} is {value!r}; expected a positive integer field of the config")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _resize_module(module: nn.Module, entry: Mapping[str, Any]) -> None:
    for name, shape in entry.get("tensors", {}).items():
        built = module._parameters[name]
        if list(built.shape) != shape:
            # a slice of the built tensor: right device and dtype, and no memory on the meta device
            smaller = built.detach()[tuple(slice(size) for size in shape)].clone()
            setattr(module, name, nn.Parameter(smaller, requires_grad=built.requires_grad))
    set_sizes(module)
    for name, value in entry.get("attributes", {}).items():
        setattr(module, name, value)
    overrides = entry.get("config")
    if overrides and not isinstance(module.config, ConfigView):
        module.config = ConfigView(module.config, overrides)


def set_sizes(module: nn.Module) -> None:
    """Bring the numbers that a layer says of its own weight in line with the weight."""
    weight = module._parameters.get("weight")
    if weight is None:
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, transformers.pytorch_utils.Conv1D):
        module.nx, module.nf = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape


def __getattr__(name: str) -> Any:
    """`HfPruned<Class>`: the stock class with its modules resized as soon as they are built.

    The classes are made when asked for, so that this one file serves every architecture.
    """
    stock = getattr(transformers, name[len(CLASS_PREFIX) :], None) if name.startswith(CLASS_PREFIX) else None
    if not (isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def post_init(self: Any) -> None:
        if getattr(self.config, "hf_prune", None):
            resize_(self, self.config.hf_prune)
        stock.post_init(self)

    # it keeps the stock name, so that a copy saved again says the stock architecture
    made = type(stock.__name__, (stock,), {"post_init": post_init, "__module__": __name__, "__doc__": stock.__doc__})
    globals()[name] = made
    return made
