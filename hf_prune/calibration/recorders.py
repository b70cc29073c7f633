"""Hooks that record one statistic each while calibration batches pass through the model.

A recorder hooks the modules it needs, adds up one batch at a time, and keeps float64 sums of the same shapes on
every process, so that those can be added up too.

Axes: B samples, T positions, d entries, n_units, width entries a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_prune.calibration.batches import Batch, decoder_modules
from hf_prune.calibration.statistics import parameter_names
from hf_prune.errors import CalibrationError
from hf_prune.structure.naming import d_in
from hf_prune.structure.sites import Read, Site, WeightSite


class Recorder(Protocol):
    """What `collect` asks of a recorder."""

    # by module, site key or parameter name; float64
    sums: dict[str, Tensor]
    # what each sum was taken over, (1,) float64: tokens or calls; 0 means never reached
    counts: dict[str, Tensor]

    def attach(self) -> Iterator[RemovableHandle]:
        """Hook the modules; the caller removes the handles."""

    def begin(self, batch: Batch) -> None:
        """A forward pass over `batch` starts."""

    def end(self) -> None:
        """Its forward pass, and backward pass if any, are over."""


class InputSums:
    """Sums over tokens of a function of the input of modules, (d_in,); counts are tokens."""

    def __init__(
        self, model: nn.Module, sites: Sequence[Site | WeightSite], of: Callable[[Tensor], Tensor] = torch.square
    ):
        self._model, self._of = model, of
        self._decoder = decoder_modules(model)
        self._last: tuple[_Seen, Tensor, int] | None = None  # an input, its sum, its tokens
        self.sums = {name: zeros(size) for name, size in _input_sizes(model, sites)}
        self.counts = {name: zeros(1) for name in self.sums}

    def attach(self) -> Iterator[RemovableHandle]:
        for name in self.sums:
            module = self._model.get_submodule(name)
            yield module.register_forward_pre_hook(self._hook(name, id(module) in self._decoder), with_kwargs=True)

    def begin(self, batch: Batch) -> None:
        self._batch = batch

    def end(self) -> None:
        self._last = None
        require_finite(self.sums, self._batch, "inputs")

    def _hook(self, name: str, in_decoder: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            total, n_tokens = self._sum(_first_tensor(args, kwargs), in_decoder)
            self.sums[name] += total
            self.counts[name] += n_tokens

        return hook

    def _sum(self, x: Tensor, in_decoder: bool) -> tuple[Tensor, int]:
        """Of an input, and over how many tokens; once for modules in a row that share it, as query, key and value do."""
        if self._last is not None and self._last[0].is_same(x):
            return self._last[1], self._last[2]
        tokens = self._batch.tokens(x.detach(), in_decoder)  # (n_tokens, d_in)
        total = float64(self._of(at_least_float32(tokens)), dim=(0,))
        self._last = _Seen.of(x), total, len(tokens)
        return total, len(tokens)


@dataclass
class _Seen:
    """A tensor, and how often it was changed in place by then; None where nobody counts (inference mode)."""

    tensor: Tensor
    version: int | None

    @classmethod
    def of(cls, tensor: Tensor) -> _Seen:
        return cls(tensor, None if tensor.is_inference() else tensor._version)

    def is_same(self, tensor: Tensor) -> bool:
        return self.version is not None and tensor is self.tensor and tensor._version == self.version


class LayerSums:
    """Sums over tokens of a function of the input and output of layers, (n_units,); counts are tokens a unit."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], of: Callable[[Tensor, Tensor], Tensor]):
        self._model, self._of = model, of
        self._decoder = decoder_modules(model)
        self._positions = {site.key: _CallPositions(site) for site in sites}
        self.sums = {site.key: zeros(site.n_units) for site in sites}
        self.counts = {site.key: zeros(site.n_units) for site in sites}

    def attach(self) -> Iterator[RemovableHandle]:
        for key, positions in self._positions.items():
            for name in positions.blocks:
                block = self._model.get_submodule(name)
                yield block.register_forward_hook(self._hook(key, name, id(block) in self._decoder), with_kwargs=True)

    def begin(self, batch: Batch) -> None:
        self._batch = batch
        for positions in self._positions.values():
            positions.begin()

    def end(self) -> None:
        require_finite(self.sums, self._batch, "layers")

    def _hook(self, key: str, name: str, in_decoder: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            unit = self._positions[key].next(name)
            before, after = (
                at_least_float32(self._batch.tokens(x.detach(), in_decoder))  # (n_tokens, d_model)
                for x in (_first_tensor(args, kwargs), _first_tensor((output,), {}))
            )
            self.sums[key][unit] += float64(self._of(before, after))
            self.counts[key][unit] += len(before)

        return hook


class UnitGates:
    """Sums of a function of dL/dg, as `gates` has it, g a factor on what a unit hands to every module that reads it; (n_units,).

    By the chain rule dL/dg is the sum of a · dL/da over all that the unit hands on. One gate a unit: all reads, calls
    and positions are added up before the absolute value. Counts are calls.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], gates: Callable[[], GateSums]):
        self._model = model
        self._sites = sites
        self._gates = gates()
        self.sums = {site.key: zeros(site.n_units) for site in sites}
        self.counts = {site.key: zeros(1) for site in sites}

    def attach(self) -> Iterator[RemovableHandle]:
        for site in self._sites:
            for read in site.reads:
                module = self._model.get_submodule(read.module)
                yield module.register_forward_pre_hook(start_graph, with_kwargs=True)
                yield module.register_forward_pre_hook(self._hook(site, read), with_kwargs=True)

    def begin(self, batch: Batch) -> None:
        self._batch = batch
        self._gates.clear()

    def end(self) -> None:
        self._gates.fold_into(self.sums)
        require_finite(self.sums, self._batch, "gate gradients")

    def _hook(self, site: Site, read: Read) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _first_tensor(args, kwargs)
            value = self._batch.by_sample(_units(x.detach(), site, read), read.module)
            self.counts[site.key] += 1

            def on_gradient(gradient: Tensor) -> None:
                product = at_least_float32(value) * self._batch.by_sample(_units(gradient, site, read), read.module)
                self._gates.add(site.key, product.unflatten(-1, (site.n_units, read.span.width)))

            x.register_hook(on_gradient)

        return hook


class LayerGates:
    """Sums of a function of dL/dg, as `gates` has it, with output = input + g (block(input) - input); (n_units,). Counts are calls."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], gates: Callable[[], GateSums]):
        self._model = model
        self._gates = gates()
        self._positions = {site.key: _CallPositions(site) for site in sites}
        self.sums = {site.key: zeros(site.n_units) for site in sites}
        self.counts = {site.key: zeros(site.n_units) for site in sites}

    def attach(self) -> Iterator[RemovableHandle]:
        for key, positions in self._positions.items():
            for name in positions.blocks:
                block = self._model.get_submodule(name)
                yield block.register_forward_pre_hook(start_graph, with_kwargs=True)
                yield block.register_forward_hook(self._hook(key, name), with_kwargs=True)

    def begin(self, batch: Batch) -> None:
        self._batch = batch
        self._gates.clear()
        for positions in self._positions.values():
            positions.begin()

    def end(self) -> None:
        self._gates.fold_into(self.sums)
        require_finite(self.sums, self._batch, "gate gradients")

    def _hook(self, key: str, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            positions = self._positions[key]
            unit = positions.next(name)
            update = self._batch.by_sample(_update(args, kwargs, output), name)
            self.counts[key][unit] += 1

            def on_gradient(gradient: Tensor) -> None:
                self._gates.add_one(key, unit, positions.n_units, update * self._batch.by_sample(gradient, name))

            _first_tensor((output,), {}).register_hook(on_gradient)

        return hook


class WeightGradients:
    """Sums of dL/dw, shaped like the parameter. Held on the CPU: only one gradient at a time is on the device."""

    def __init__(self, model: nn.Module, sites: Sequence[Site | WeightSite]):
        self.parameters = {name: model.get_parameter(name) for name in parameter_names(model, sites)}
        self.sums = {name: zeros(*parameter.shape) for name, parameter in self.parameters.items()}
        self.counts: dict[str, Tensor] = {}
        self._broken: set[str] = set()

    def attach(self) -> Iterator[RemovableHandle]:
        for name, parameter in self.parameters.items():
            yield parameter.register_post_accumulate_grad_hook(self._hook(name))

    def begin(self, batch: Batch) -> None:
        self._batch = batch

    def end(self) -> None:
        if self._broken:
            raise _not_finite(sorted(self._broken)[0], self._batch, "weight gradients")

    def _hook(self, name: str) -> Any:
        def hook(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            if not torch.isfinite(gradient).all():
                self._broken.add(name)
            self.sums[name] += gradient.detach().cpu()

        return hook


class GateSums:
    """Gate gradients of one batch by key, (B, n_units) float64, or (B, T, n_units): signed until all of a sample's, or of a
    position's, are added up; of the sums a function is then taken.

    Args:
        of: the function.
        per_token: a gate for each position, not one for a whole sample.
    """

    def __init__(self, of: Callable[[Tensor], Tensor], per_token: bool = False) -> None:
        self._of, self._per_token = of, per_token
        self._held: dict[tuple[str, torch.Size], Tensor] = {}

    def clear(self) -> None:
        self._held.clear()

    def add(self, key: str, product: Tensor) -> None:
        """Of all units: what their gates are multiplied with times the gradients there, (B, T, n_units, width)."""
        self._add(key, float64(product, dim=(3,) if self._per_token else (1, 3)))

    def add_one(self, key: str, unit: int, n_units: int, product: Tensor) -> None:
        """Of one unit, (B, T, d_model)."""
        gate = float64(product, dim=(2,) if self._per_token else (1, 2))
        by_unit = zeros(*gate.shape, n_units)
        by_unit[..., unit] = gate
        self._add(key, by_unit)

    def fold_into(self, sums: dict[str, Tensor]) -> None:
        for (key, _), gates in self._held.items():
            sums[key] += self._of(gates).flatten(end_dim=-2).sum(0)

    def _add(self, key: str, gates: Tensor) -> None:
        place = key, gates.shape  # what is read at other positions is another gate
        self._held[place] = self._held[place] + gates if place in self._held else gates


class _CallPositions:
    """Which unit of a layer site a call is: the k-th call of a block is the k-th place where the site names it."""

    def __init__(self, site: Site):
        # what a fixed block gives can't be compared with what it gets
        fixed = {site.blocks[number] for number, _ in site.fixed}
        self.blocks = tuple(block for block in dict.fromkeys(site.blocks) if block not in fixed)
        self.n_units = site.n_units
        self._units = {name: [u for u, block in enumerate(site.blocks) if block == name] for name in self.blocks}
        self.begin()

    def begin(self) -> None:
        self._n_calls = dict.fromkeys(self.blocks, 0)

    def next(self, block: str) -> int:
        units = self._units[block]
        call = self._n_calls[block]
        self._n_calls[block] += 1
        return units[call % len(units)]  # a model that runs the whole stack twice starts again from its first unit


def _input_sizes(model: nn.Module, sites: Sequence[Site | WeightSite]) -> Iterator[tuple[str, int]]:
    for site in sites:
        if isinstance(site, WeightSite):
            yield site.module, site.shape[site.reduction_dim]
        else:
            for read in site.reads:
                yield read.module, d_in(model.get_submodule(read.module))


def _units(x: Tensor, site: Site, read: Read) -> Tensor:
    """(…, d) -> (…, n_units * width): the entries that belong to units."""
    return x.narrow(-1, read.span.start, site.n_units * read.span.width)


def _update(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
    """What a block adds to its input, at least float32."""
    before, after = _first_tensor(args, kwargs).detach(), _first_tensor((output,), {}).detach()
    return at_least_float32(after) - at_least_float32(before)


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among a module's arguments or outputs, which come first by convention."""
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"]
    value = args[0] if args else next(iter(kwargs.values()))
    if isinstance(value, (tuple, list)):
        value = value[0]
    elif isinstance(value, Mapping):
        value = next(iter(value.values()))
    assert isinstance(value, Tensor), f"expected hidden states first, found a {type(value).__name__}"
    return value


def start_graph(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Where nothing upstream needs a gradient, record from this input on: weights then need none either."""
    x = _first_tensor(args, kwargs)
    if x.requires_grad:
        return None
    # the clone is no leaf, so that the module may still change it in place
    started = x.detach().requires_grad_().clone()
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": started}
    return (started, *args[1:]), kwargs


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def float64(x: Tensor, dim: Iterable[int] | None = None) -> Tensor:
    """The sum over `dim` (all if None) in float64, by way of the CPU where the device has none (Apple's)."""
    x = x.cpu() if x.device.type == "mps" else x
    dims = tuple(range(x.dim())) if dim is None else tuple(dim)
    return x.sum(dims, dtype=torch.float64).cpu()


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def require_finite(sums: Mapping[str, Tensor], batch: Batch, what: str) -> None:
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise _not_finite(name, batch, what)


def _not_finite(name: str, batch: Batch, what: str) -> CalibrationError:
    return CalibrationError(
        f"{what} at {name} are not finite after calibration batch {batch.index}; expected numbers. "
        "Look for broken samples, or load the model in bfloat16 or float32."
    )
