"""Loading a pruned Transformers checkpoint whose sizes its stock config can't express.

This file is self-contained: it needs PyTorch and Transformers only. hf_prune uses it, and copies it beside the weights
so that `from_pretrained(..., trust_remote_code=True)` works where hf_prune is not installed. The config carries a
manifest, `hf_prune`, that lists modules with the sizes that were kept; nothing in it is code.
"""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn


MANIFEST_VERSION = 1


ZEROS = "zeros"
Returns = str | list[str | None]  # a tensor, or a tuple of them: zeros, an argument by name, or None


class ManifestError(ValueError):
    """The manifest is damaged, hostile, made for another model, or newer than this file reads."""

    def __init__(self, problem: str, remedy: str = "download the checkpoint again, or save it again from its model"):
        super().__init__(f"{problem}; {remedy}")
        self.problem = problem


class ConfigView:
    """A module's own view of the shared config: a few numbers differ, all else is the config's, now and later."""

    def __init__(self, config: Any, overrides: Mapping[str, int]):
        if isinstance(config, ConfigView):  # a second pruning: one view, not a view of a view
            config, overrides = config.__dict__["_config"], {**config.__dict__["_overrides"], **overrides}
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


class _Zeros(torch.autograd.Function):
    """(..., d_in) -> zeros (..., d_out), with a gradient of zeros: what feeds a part that has left (its norm) gets that and
    not none, for which DistributedDataParallel would wait.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, d_out: int) -> Tensor:
        ctx.shape = x.shape
        return x.new_zeros(*x.shape[:-1], d_out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_zeros(ctx.shape), None


class Absent(nn.Module):
    """In place of a module that has left: it computes nothing.

    It keeps one empty tensor under the name of a parameter that has left: Transformers by itself would fill in random
    weights for a name that is missing, with no more than a warning, but stops at a tensor of another shape.

    Args:
        replaced: the module that was there, for the names of its arguments and, of a linear layer, its width.
        returns: what its call gives.
    """

    def __init__(self, replaced: nn.Module, returns: Returns):
        nn.Module.__init__(self)  # of none of the classes between
        self._is_hf_initialized = True  # so that nothing looks for the weights of one that it stands for
        self._returns = returns
        self._arguments = argument_names(replaced)
        weight = replaced._parameters.get("weight")
        is_transposed = isinstance(replaced, transformers.pytorch_utils.Conv1D)
        is_linear = weight is not None and (is_transposed or isinstance(replaced, nn.Linear))
        self._d_out = weight.shape[1 if is_transposed else 0] if weight is not None and is_linear else None
        # what the model reads of it as it passes by: the kind of its attention, its number
        plain = {own: value for own, value in vars(replaced).items() if type(value) in (bool, int, float, str)}
        vars(self).update({own: value for own, value in plain.items() if not own.startswith("_")})
        named = dict(replaced.named_parameters())
        # the last matrix, an output projection: not stacked experts, query, key nor gate, which some models save joined
        matrices = [each for each, parameter in named.items() if parameter.dim() == 2 and "gate" not in each]
        flat = [each for each, parameter in named.items() if parameter.dim() < 3]
        kept = (matrices or flat[:1] or list(named))[-1]
        for name, parameter in named.items():  # the others for code that looks into blocks; they are not saved
            *path, last = name.split(".")
            holder: nn.Module = self
            for child in path:
                if child not in holder._modules:
                    holder.add_module(child, nn.Module())
                holder = holder.get_submodule(child)
            holder.register_buffer(last, parameter.detach().new_empty(0), persistent=name == kept)
        self.train(replaced.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """(..., d_in), ... -> (..., d_out), and what else the one that was there gave."""
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        hidden = given["hidden_states"] if "hidden_states" in given else next(iter(given.values()))

        d_out = self._d_out or hidden.shape[-1]
        zeros = _Zeros.apply(hidden, d_out) if hidden.requires_grad else hidden.new_zeros(*hidden.shape[:-1], d_out)

        def one(what: str | None) -> Tensor | None:
            return zeros if what == ZEROS else None if what is None else given.get(what)

        first, *others = [self._returns] if isinstance(self._returns, str) else self._returns
        output = one(first)
        if output is not zeros and output is not None and hidden.requires_grad:
            output = output + zeros
        return output if isinstance(self._returns, str) else (output, *(one(each) for each in others))

    def extra_repr(self) -> str:
        return f"returns={self._returns!r}"

    def __reduce__(self) -> tuple[Any, ...]:
        stands_for = None if type(self) is Absent else type(self).__bases__[1]
        return _blank, (stands_for,), dict(self.__dict__)


def absent(replaced: nn.Module, returns: Returns) -> Absent:
    """What takes the place of a module that has left.

    One that hands on its input is a whole block, which stays one of its class, and keeps its hooks: by either hidden states
    are noted behind it.
    """
    if (returns[0] if isinstance(returns, list) else returns) == ZEROS:
        return Absent(replaced, returns)
    placed = _absent_kind(type(replaced))(replaced, returns)
    placed._forward_hooks.update(replaced._forward_hooks)
    placed._forward_hooks_with_kwargs.update(replaced._forward_hooks_with_kwargs)
    return placed


def _absent_kind(stands_for: type[nn.Module] | None) -> type[Absent]:
    return Absent if stands_for is None else type("Absent", (Absent, stands_for), {"__module__": __name__})


def _blank(stands_for: type[nn.Module] | None) -> Absent:
    kind = _absent_kind(stands_for)
    return kind.__new__(kind)


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """What the arguments of a module's call are called."""
    known = module.__dict__.get("_arguments") if absent_returns(module) is not None else None
    return known or tuple(inspect.signature(module.forward).parameters)


def absent_returns(module: nn.Module) -> Returns | None:
    """What an absent module gives; None of one that is there. (Two copies of this file may have made the model.)"""
    return module.__dict__.get("_returns") if type(module).__name__ == "Absent" else None


def resize_(model: nn.Module, manifest: Any) -> None:
    """Give the modules named in `manifest` their kept sizes, with empty tensors, before weights are loaded.

    Everything is checked against the modules as the config built them before anything is allocated: sizes can only
    be smaller, and all that is new is a bias of a linear layer. Called for a model of which only a part is there (the base of
    a task model), it resizes that part; called twice, it does nothing the second time.

    Raises:
        ManifestError: the message names what is wrong.
    """
    _check_top(manifest)
    _check_architecture(model, manifest["class"])
    prefix, is_whole = manifest["base_model_prefix"], type(model).__name__ == manifest["class"]
    own = dict(model.named_modules())

    def here(name: str) -> str:
        """The name as saved, or, where this is the base model of the class that was saved, without its prefix."""
        return name if name in own or not prefix else name.removeprefix(f"{prefix}.")

    fewer = {name: entry for name, entry in manifest["modules"].items() if isinstance(entry, dict) and "kept" in entry}
    for name, entry in fewer.items():  # first, since other names count the blocks that are left
        is_ours = is_whole or (prefix and name.startswith(f"{prefix}."))
        if is_ours and here(name) in own:
            _check_kept(name, own[here(name)], entry)
            keep_blocks_(model, here(name), entry["kept"])
    if fewer:
        own = dict(model.named_modules())
    entries: list[tuple[str, nn.Module, Any]] = []
    for name, entry in manifest["modules"].items():
        module = own.get(here(name))
        if module is not None and name not in fewer:
            _check_entry(name, module, entry)
            entries.append((here(name), module, entry))
        elif module is None and is_whole:
            raise ManifestError(f"the manifest names module {_short(name)}, which {type(model).__name__} has not")
    for name, module, entry in entries:
        if "absent" not in entry:
            _resize_module(module, entry)
        elif absent_returns(module) is None:
            parent, _, child = name.rpartition(".")
            setattr(own[parent], child, absent(module, entry["absent"]))


def keep_blocks_(model: nn.Module, name: str, kept: list[int]) -> None:
    """Leave the blocks of these numbers in the list `name`; once only, since parts of a model come here by themselves."""
    blocks: Any = model.get_submodule(name)
    if getattr(blocks, "_kept", None) is not None:
        return
    left = [blocks[number] for number in kept]
    fewer: Any = nn.Sequential(*left) if isinstance(blocks, nn.Sequential) else nn.ModuleList(left)
    fewer._kept = tuple(kept)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, fewer)


def _check_kept(name: str, module: nn.Module, entry: Any) -> None:
    kept = entry["kept"]
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(entry) > 1:
        raise ManifestError(
            f"the manifest's entry for {_name(name)!r} may hold kept alone, and that of a list of blocks"
        )
    n_blocks = max(getattr(module, "_kept", None) or [len(module) - 1]) + 1
    numbers = isinstance(kept, list) and all(type(number) is int for number in kept)
    if not numbers or not kept or sorted(set(kept)) != kept or kept[0] < 0 or kept[-1] >= n_blocks:
        raise ManifestError(
            f"{_name(name)}.kept is {_short(kept)}; expected ascending numbers of its {n_blocks} blocks"
        )


def _check_top(manifest: Any) -> None:
    if not isinstance(manifest, dict):
        raise ManifestError(f"config.hf_prune is a {type(manifest).__name__}; expected a mapping")
    version = manifest.get("version")
    if type(version) is not int or version < 1:
        raise ManifestError(f"config.hf_prune.version is {_short(version)}; expected an integer from 1")
    if version > MANIFEST_VERSION:
        raise ManifestError(
            f"the checkpoint has manifest version {_short(version)}; this reads up to {MANIFEST_VERSION}. "
            "It was written by a newer hf_prune",
            "upgrade hf_prune",
        )
    for key, kind in (("class", str), ("base_model_prefix", str), ("modules", dict)):
        if not isinstance(manifest.get(key), kind):
            raise ManifestError(f"config.hf_prune.{key} is missing or no {'mapping' if kind is dict else 'text'}")
    unknown = manifest.keys() - {"version", "class", "base_model_prefix", "modules"}
    if unknown:
        raise ManifestError(f"config.hf_prune has unknown keys: {_short(sorted(unknown, key=str))}")


def _check_architecture(model: Any, name: str) -> None:
    """Whether class `name` of Transformers is one of the model's type. Only names are compared: nothing is imported by them."""
    from transformers.models.auto import configuration_auto, modeling_auto  # not while Transformers is being imported

    found = type(model.config).model_type  # what its class is for; the file may say another
    tables = [table for name, table in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    types = {
        known
        for table in tables
        for known, names in table.items()
        if name in ((names,) if type(names) is str else names)
    }
    # towers are known under the name that theirs begins with: class MusicgenModel, type musicgen_decoder
    if types and found in configuration_auto.CONFIG_MAPPING_NAMES and not any(map(found.startswith, types)):
        raise ManifestError(f"the manifest is of a {_name(name)}; expected a class of model_type {found!r}")


def _check_entry(name: str, module: nn.Module, entry: Any) -> None:
    if isinstance(entry, dict) and entry.keys() == {"absent"}:
        _check_absent(name, module, entry["absent"])
        return
    if not isinstance(entry, dict) or not entry or not entry.keys() <= {"tensors", "attributes", "config"}:
        raise ManifestError(
            f"the manifest's entry for {name!r} may hold tensors, attributes and config only, or absent alone"
        )
    for part in entry.values():
        if not isinstance(part, dict):
            raise ManifestError(f"the manifest's entry for {name!r} holds a {type(part).__name__}, not a mapping")
    tensors = entry.get("tensors", {})
    temporary = module._non_persistent_buffers_set
    saved = {**module._parameters, **{key: of for key, of in module._buffers.items() if key not in temporary}}
    adds_bias = "bias" in tensors and isinstance(module, nn.Linear) and module.bias is None
    for tensor, shape in tensors.items():
        built = saved.get(tensor)
        place = f"{name}.{_name(tensor)}"
        if tensor == "bias" and adds_bias:
            continue
        if built is None:
            raise ManifestError(f"the manifest gives {place} a size, but no such tensor of the module is saved")
        if not isinstance(shape, list) or len(shape) != built.dim() or not all(_is_count(size) for size in shape):
            raise ManifestError(f"{place} has size {_short(shape)}; expected {built.dim()} positive integers")
        if any(size > whole for size, whole in zip(shape, built.shape, strict=True)):
            raise ManifestError(
                f"{place} has size {_short(shape)}, more than the {list(built.shape)} that the config builds"
            )
    if adds_bias:
        n_outputs, bias = tensors.get("weight", module.weight.shape)[0], tensors["bias"]
        if bias != [n_outputs] or not _is_count(bias[0]):
            raise ManifestError(f"{name}.bias has size {_short(bias)}; expected [{n_outputs}], one for each output")
    for attribute, value in entry.get("attributes", {}).items():
        built_value: Any = None if attribute.startswith("_") else module.__dict__.get(attribute)
        if (
            type(value) is not type(built_value)
            or type(value) not in (int, float)
            or not 0 <= value < math.inf
            or (type(value) is int and value > built_value)
        ):
            raise ManifestError(
                f"{name}.{_name(attribute)} is {_short(value)}; expected a number in place of {_short(built_value)}, "
                "of its kind, not negative, and if it counts something no larger"
            )
    if isinstance(module, nn.Embedding) and (module.padding_idx or 0) >= tensors.get("weight", module.weight.shape)[0]:
        raise ManifestError(
            f"{name}.weight has size {_short(tensors['weight'])}, without row {module.padding_idx} of padding"
        )
    if entry.get("config") and isinstance(module, transformers.PreTrainedModel):
        raise ManifestError(
            f"the manifest gives {_name(name)!r} a config of its own; expected that of a part of a model"
        )
    for field, value in entry.get("config", {}).items():
        shared = _shared(module, field)
        if type(shared) is not int or not _is_count(value) or value > shared:
            raise ManifestError(
                f"{name}.config.{_name(field)} is {_short(value)}; expected a positive integer, at most the "
                f"{_short(shared)} of the config"
            )


def _shared(module: nn.Module, field: str) -> Any:
    """What the config that all modules share says; None of what it refuses to say."""
    config = getattr(module, "config", None)
    try:
        return getattr(config.__dict__["_config"] if isinstance(config, ConfigView) else config, field, None)
    except Exception:  # fields that are gone, or differ by layer, have errors of any kind
        return None


def _check_absent(name: str, module: nn.Module, returns: Any) -> None:
    is_of_a_block = any(part.isdigit() for part in name.split("."))
    if not is_of_a_block or (absent_returns(module) is None and next(module.parameters(), None) is None):
        raise ManifestError(
            f"the manifest says that {_name(name)!r} has left, which holds no parameter or is no block, nor part of one"
        )
    known = (ZEROS, *argument_names(module))
    each = returns if isinstance(returns, list) and 0 < len(returns) <= 16 else [returns]
    if not isinstance(each[0], str) or not all(what is None or what in known for what in each):
        raise ManifestError(
            f"{name}.absent is {_short(returns)}; expected what its call gives, of {', '.join(map(_name, known))}, or a list"
        )


def _short(value: Any) -> str:
    """A stranger's value in an error: its first characters."""
    return reprlib.repr(value)


def _name(text: str) -> str:
    return text if len(text) < 60 else f"{text[:56]}…"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _resize_module(module: Any, entry: Mapping[str, Any]) -> None:
    for name, shape in entry.get("tensors", {}).items():
        if name in module._buffers:  # a router's correction of each expert's score
            setattr(module, name, module._buffers[name][tuple(slice(size) for size in shape)].clone())
            continue
        built = module._parameters[name]
        if built is None:
            bias = module.weight.detach().new_zeros(shape)
            setattr(module, name, nn.Parameter(bias, requires_grad=module.weight.requires_grad))
        elif list(built.shape) != shape:
            # a slice of the built tensor: right device and dtype, and no memory on the meta device
            smaller = built.detach()[tuple(slice(size) for size in shape)].clone()
            setattr(module, name, nn.Parameter(smaller, requires_grad=built.requires_grad))
    set_sizes(module)
    for name, value in entry.get("attributes", {}).items():
        setattr(module, name, value)
    if entry.get("config"):
        module.config = ConfigView(module.config, entry["config"])


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
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(weight.shape)[-len(module.normalized_shape) :]
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        module.num_features = weight.shape[0]
    elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
        if module.groups == module.in_channels == module.out_channels:  # depthwise: a group for each channel
            module.groups = module.in_channels = weight.shape[0]
        module.out_channels = weight.shape[0]
        module.in_channels = weight.shape[1] * module.groups


def _auto_class(config: Any, name: str) -> str | None:
    """The Auto class for which `auto_map` names class `name` of this file."""
    places = (getattr(config, "auto_map", None) or {}).items()
    return next((auto for auto, place in places if isinstance(place, str) and place.endswith(f".{name}")), None)


def __getattr__(name: str) -> Any:
    """The stock class `name`, with its modules resized as soon as they are built.

    The classes are made when asked for, so that this one file serves every architecture. They keep the stock name: a copy
    saved again says the stock architecture, and a pickled model finds its class here.
    """
    stock = None if name.startswith("_") else getattr(transformers, name, None)
    if not (isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base: Any = stock  # narrowed to a bare `type` above, of which a type checker knows no `post_init`

    def post_init(self: Any) -> None:
        if getattr(self.config, "hf_prune", None) is not None:
            resize_(self, self.config.hf_prune)
        if self._auto_class is None:
            # by this `save_pretrained` sees that the file belongs beside a copy; earlier releases set it only for model
            # types that they don't know
            self._auto_class = _auto_class(self.config, name)
        base.post_init(self)

    def is_custom_code(cls: type) -> bool:
        # Transformers renames and converts the weights of its own classes only, and this is one, but for its sizes
        return False

    members = {"post_init": post_init, "is_custom_code": classmethod(is_custom_code)}
    # named once more, or the Auto classes would make a subclass to add it, which pickle doesn't find
    generates = (transformers.GenerationMixin,) if issubclass(stock, transformers.GenerationMixin) else ()
    made = type(name, (stock, *generates), members | {"__module__": __name__, "__doc__": stock.__doc__})
    globals()[name] = made
    return made
