"""What an attention holds beside its projections: biases, scales, gates and norms, by head or over all heads."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from torch import Tensor, nn

from hf_prune.structure import layouts
from hf_prune.structure.heads import Heads, Refused
from hf_prune.structure.naming import ModuleNames, d_in, d_out, is_linear, is_within, weight_of
from hf_prune.structure.projections import reading_slice, writing_slices
from hf_prune.structure.sites import FullWidthNorm, Span, TensorSlice
from hf_prune.structure.source import forward_of


def side_slices(names: ModuleNames, name: str, heads: Heads, known: set[str]) -> Iterator[TensorSlice]:
    """Parameters and further projections with entries for each query head.

    Args:
        known: tensors that the projections' slices and the output have.

    Raises:
        Refused: one whose role isn't known.
    """
    module = names.modules[name]
    for child, parameter in module._parameters.items():
        if parameter is not None:
            yield from _of_parameter(name, child, parameter, heads)
    for path, children in layouts.PER_HEAD_MODULES.items():
        for child, dim in children:
            parameter = getattr(names.get(name, path), child, None)
            if isinstance(parameter, Tensor):
                yield _slice(names.resolve(name, path), child, parameter, dim, heads)
    for path, linear in module.named_modules():
        full = names.resolve(name, path) if path else name
        if not path or f"{full}.weight" in known or _is_headless(path, heads):
            continue
        if is_linear(linear):
            if path not in layouts.PER_HEAD_PROJECTIONS or d_out(linear) % heads.n_units:
                raise Refused(f"it also holds the linear layer {path}, whose role is unknown")
            yield from writing_slices(full, linear, heads.spans(d_out(linear)))
            if path in layouts.OF_ALL_VALUES:
                yield reading_slice(full, linear, Span(0, d_in(linear) // heads.n_units))
        elif isinstance(linear, (nn.Conv1d, nn.Conv2d)) and _is_by_head(path, linear, heads):
            yield from writing_slices(full, linear, (Span(0, linear.in_channels // heads.n_units),))
        elif (
            isinstance(linear, (nn.Conv1d, nn.Conv2d))
            and linear.in_channels in _widths(heads)
            and path.rpartition(".")[2] not in layouts.CONVOLUTIONS_OF_INPUTS
        ):
            raise Refused(f"it also holds the convolution {path}, whose role is unknown")


def _of_parameter(name: str, child: str, parameter: Tensor, heads: Heads) -> Iterator[TensorSlice]:
    dim = layouts.PER_HEAD_PARAMETERS.get(child)
    if dim is not None and parameter.shape[dim] % heads.n_units == 0:
        yield _slice(name, child, parameter, dim, heads)
    elif heads.n_heads > 1 and heads.n_heads in parameter.shape:
        raise Refused(f"its parameter {child} {tuple(parameter.shape)} may hold one entry a head")


def _slice(module: str, child: str, parameter: Tensor, dim: int, heads: Heads) -> TensorSlice:
    """(…, n_heads pieces, …) -> the pieces of a unit's query heads."""
    return TensorSlice(module, child, dim, heads.spans(parameter.shape[dim]), writes=True)


def sees_no_head(path: str) -> bool:
    """Whether what is at `path` in an attention is, or is inside of, what stays whole."""
    return any(is_within(path, known) for known in layouts.HEADLESS_PROJECTIONS)


def _is_headless(path: str, heads: Heads) -> bool:
    kept_whole = heads.n_kv_heads == 1 and path.rpartition(".")[2] in ("k_proj", "v_proj", "k", "v", "key", "value")
    return kept_whole or sees_no_head(path)


def _is_of_inputs(path: str, module: nn.Module) -> bool:
    """Whether forward calls what is at `path` with one of its own arguments, before there are heads (Blt's norms)."""
    source = forward_of(module)
    call = re.search(rf"(\w+) = self\.{re.escape(path)}\((\w+)\)", source)
    if not path or call is None or call[2] not in inspect.signature(type(module).forward).parameters:
        return False
    return not re.search(rf"^ *[\w, ]*\b{call[2]}\b[\w, ]* = ", source[: call.start()], re.MULTILINE)


def _is_by_head(path: str, convolution: nn.Conv1d | nn.Conv2d, heads: Heads) -> bool:
    """Depthwise, over the entries of all heads (Inkling's keys and values), or with a channel for each head (Nyströmformer)."""
    channels = convolution.in_channels
    alone = heads.n_kv_heads == 1 and channels == heads.d_head
    is_depthwise = channels == convolution.groups == convolution.out_channels
    if path.rpartition(".")[2] in layouts.CONVOLUTIONS_OF_INPUTS or channels == 1:
        return False
    return is_depthwise and not alone and channels in (*_widths(heads), heads.n_heads)


def _widths(heads: Heads) -> tuple[int, ...]:
    return heads.n_heads * heads.d_value, heads.n_kv_heads * heads.d_head


def full_width_norms(names: ModuleNames, name: str, heads: Heads) -> tuple[list[FullWidthNorm], list[TensorSlice]]:
    """Norms over all heads at once, that have to be folded, and the slices of norms.

    Raises:
        Refused: one that can't be folded.
    """
    norms, slices = [], []
    for path, norm in names.modules[name].named_modules():
        if _is_headless(path, heads) or _is_of_inputs(path, names.modules[name]):
            continue
        words, weight = path.rpartition(".")[2], norm._parameters.get("weight")
        over_output = any(word in words for word in layouts.OUTPUT_NORM_WORDS)
        if not isinstance(weight, Tensor) or not (over_output or any(w in words for w in layouts.UNIT_NORM_WORDS)):
            continue
        full = names.resolve(name, path)
        if weight.numel() in (heads.d_head, heads.d_value):
            continue  # each head by itself, with the same weights
        n_of_its_heads = heads.n_heads if weight.shape[0] == heads.n_heads else heads.n_kv_heads
        if weight.dim() == 2 and weight.shape[0] == n_of_its_heads and heads.n_kv_heads > 1:
            span = Span(0, n_of_its_heads // heads.n_units)
            slices += [
                TensorSlice(full, own, 0, (span,), True) for own, each in norm._parameters.items() if each is not None
            ]
            continue
        epsilon = next(
            (key for key in layouts.NORM_EPSILON_NAMES if isinstance(getattr(norm, key, None), float)), None
        )
        widths = (heads.n_heads * heads.d_head, heads.n_kv_heads * heads.d_head, heads.n_heads * heads.d_value)
        is_rms = "RMS" in type(norm).__name__ and norm._parameters.get("bias") is None
        if not is_rms or epsilon is None or weight.numel() not in widths:
            raise Refused(f"{path} ({type(norm).__name__}) normalises over all heads and can't be folded")
        if heads.n_kv_heads == 1 and weight.numel() == heads.d_head:
            continue
        norms.append(FullWidthNorm(full, epsilon))
        slices.append(TensorSlice(full, "weight", 0, (Span(0, weight_of(norm).numel() // heads.n_units),), True))
    return norms, slices
