"""Verification: the smaller model computes what the masked one computes, site by site and end to end."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.apply.masks import masks_of
from hf_prune.apply.shrink import ShrinkRecord
from hf_prune.calibration.blocks import first_tensor, without_cache
from hf_prune.errors import CalibrationError, VerificationError
from hf_prune.structure import ModelStructure, Site


# max|difference| / max|logit|, end to end
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
# relative L2 of a site's output on its own captured input, in float32 or better
SITE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Verification:
    """How far the smaller model is from the masked one. Differences are relative, and at most the tolerances."""

    max_difference: float
    tolerance: float
    dtype: str
    inputs: str
    n_batches: int
    site_difference: float
    worst_site: str


@torch.no_grad()
def verify(
    masked: nn.Module,
    smaller: nn.Module,
    structure: ModelStructure,
    record: ShrinkRecord,
    batches: Iterable[Mapping[str, Any]],
    inputs: str,
) -> Verification:
    """Compare the two models on `batches`, in evaluation mode.

    Args:
        masked: the model with its masks on.
        smaller: the same after removal.
        structure: of the masked model.
        record: what the removal did.
        batches: keyword inputs of both models.
        inputs: where the batches come from: "calibration", "training", "evaluation" or "generated".

    Raises:
        VerificationError: they differ by more than a tolerance, or an output is not finite.
        CalibrationError: there is no batch.
    """
    masked.eval()
    smaller.eval()
    dtype = next(masked.parameters()).dtype
    tolerance = TOLERANCES[dtype]
    watcher = _SiteWatcher(masked, smaller, structure, record)
    worst, n_batches = 0.0, 0
    for batch in batches:
        with (
            watcher if n_batches == 0 else _Nothing(),
            _running(f"the masked {type(masked).__name__}"),
            _same_chance(masked),
        ):
            expected = _outputs(masked(**batch))
        with _running(f"the smaller {type(smaller).__name__}"), _same_chance(smaller):
            actual = _outputs(smaller(**batch))
        for name, reference in expected.items():
            worst = _worse(worst, _relative_max(actual.get(name), reference))
        n_batches += 1
    if not n_batches:
        raise CalibrationError("verification got no batch; pass calibration data with at least one")
    if watcher.is_blind:
        raise VerificationError(
            "none of what left shows in what the model does with the inputs at hand, so that nothing is verified; pass "
            "calibration data that reaches it, or exclude it"
        )
    site, difference = max(watcher.differences.items(), key=lambda item: _sortable(item[1]), default=("", 0.0))
    if not difference <= SITE_TOLERANCE:
        raise VerificationError(
            f"{site} computes something else once its masked units are removed: relative L2 {difference:.2e}, at most "
            f"{SITE_TOLERANCE:.0e}. The model is as it was; exclude this site, or report its layout."
        )
    if not worst <= tolerance:
        raise VerificationError(
            f"the smaller {type(masked).__name__} differs from the masked one: max|difference| / max|output| is "
            f"{worst:.2e}, at most {tolerance:.0e} in {dtype}. The model is as it was."
        )
    return Verification(worst, tolerance, str(dtype).removeprefix("torch."), inputs, n_batches, difference, site)


@contextmanager
def _running(name: str) -> Iterator[None]:
    """What doesn't run without its masked units computes something else too. (The whole model did: its cost was counted.)"""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, NameError) as error:
        raise VerificationError(
            f"{name} doesn't run without its masked units ({type(error).__name__}: {error}). The model is as it "
            "was; exclude this site, choose sizes with `round_to`, or report its layout."
        ) from error


@contextmanager
def _same_chance(model: nn.Module) -> Iterator[None]:
    """Models that draw in evaluation too (ViT-MAE's mask) draw the same."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


class _SiteWatcher:
    """While the masked model runs, runs each narrowed site's counterpart on the same captured input."""

    def __init__(self, masked: nn.Module, smaller: nn.Module, structure: ModelStructure, record: ShrinkRecord):
        self.differences: dict[str, float] = {}
        self._has_seen = False
        self._pairs: list[tuple[str, nn.Module, nn.Module]] = []
        self._readers: list[nn.Module] = []
        self._hooks: list[Any] = []
        for key in record.kept_units:
            site = structure[key]
            if site.branches:
                gone = torch.nonzero(~masks_of(masked).units[key]).reshape(-1).tolist()
                containers = [site.branches[unit].block for unit in gone]
            else:
                containers = [] if site.target == "layers" else [_container(masked, site)]
            for container in containers:
                renamed = _after_removal(container, record.kept_layers)
                if renamed is not None:
                    self._readers += [masked.get_submodule(read.module) for read in site.reads] or [
                        masked.get_submodule(container)
                    ]
                    self._pairs.append((container, masked.get_submodule(container), smaller.get_submodule(renamed)))

    @property
    def is_blind(self) -> bool:
        """Whether sites were narrowed, and nothing but zeros came to what reads the units that are left."""
        return bool(self._pairs) and not self._has_seen

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        self._has_seen |= any(each.is_meta or bool(each.any()) for each in given)

    def __enter__(self) -> None:
        for reader in self._readers:
            self._hooks.append(reader.register_forward_pre_hook(self._look, with_kwargs=True))
        for name, module, counterpart in self._pairs:
            self._hooks.append(
                module.register_forward_hook(self._compare(name, module, counterpart), with_kwargs=True)
            )

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _compare(self, name: str, original: nn.Module, counterpart: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if module is not original:
                return  # a float32 copy of a container around this one
            args, kwargs = without_cache(args), without_cache(kwargs)
            reference = first_tensor(output)
            if reference.dtype in (torch.float32, torch.float64):
                with _running(name):
                    actual = first_tensor(counterpart.forward(*args, **kwargs))
            else:  # half precision hides a real difference behind rounding: compare float32 copies
                args, kwargs = _to_float32(args), _to_float32(kwargs)
                reference = first_tensor(copy.deepcopy(module).float().forward(*args, **kwargs))
                with _running(name):
                    actual = first_tensor(copy.deepcopy(counterpart).float().forward(*args, **kwargs))
            self.differences[name] = _worse(self.differences.get(name, 0.0), _relative_l2(actual, reference))

        return hook


def _container(model: nn.Module, site: Site) -> str:
    """The smallest module that holds all of a site's tensors and numbers and can be called."""
    shared = []
    held = [piece.module for piece in site.slices] + [number.module for number in site.attributes]
    for parts in zip(*(name.split(".") for name in held), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    while isinstance(model.get_submodule(".".join(shared)), nn.ModuleList):
        shared.pop()
    return ".".join(shared)


def _after_removal(name: str, kept_layers: Mapping[str, list[int]]) -> str | None:
    """The name that a module has once layers are dropped and renumbered; None if it is in a dropped one."""
    for stack, kept in kept_layers.items():
        if name.startswith(f"{stack}."):
            number, *rest = name[len(stack) + 1 :].split(".")
            if not number.isdigit() or len(kept) == 0:
                return name
            if int(number) not in kept:
                return None
            return ".".join([stack, str(kept.index(int(number))), *rest])
    return name


def _outputs(output: Any) -> dict[str, Tensor]:
    """The floating tensors of a model's output, but for the loss, which is made of them."""
    items = (
        output.items() if isinstance(output, Mapping) else enumerate(output if isinstance(output, tuple) else [output])
    )
    return {
        str(name): value
        for name, value in items
        if isinstance(value, Tensor) and value.is_floating_point() and name != "loss"
    }


def _to_float32(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.float() if values.is_floating_point() else values
    if isinstance(values, dict):
        return {name: _to_float32(value) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_to_float32(value) for value in values)
    return values


def _relative_max(actual: Tensor | None, reference: Tensor) -> float:
    if actual is None or actual.shape != reference.shape:
        return float("inf")
    if not reference.numel():
        return 0.0
    scale = reference.double().abs().max().item()
    difference = (actual.double() - reference.double()).abs().max().item()
    return difference / scale if scale else difference


def _relative_l2(actual: Tensor, reference: Tensor) -> float:
    if actual.shape != reference.shape:
        return float("inf")
    scale = reference.double().norm().item()
    difference = (actual.double() - reference.double()).norm().item()
    return difference / scale if scale else difference


def _worse(a: float, b: float) -> float:
    """The greater; NaN is worse than all."""
    return max(a, b, key=_sortable)


def _sortable(value: float) -> float:
    return float("inf") if value != value else value
