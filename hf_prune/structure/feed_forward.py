"""Feed-forward sites: a neuron is one row of each input projection and one column of the output projection."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_prune.structure.layouts import (
    FEED_FORWARD_WIDTH_NAMES,
    NORM_EPSILON_NAMES,
    FeedForwardLayout,
    feed_forward_layouts,
)
from hf_prune.structure.naming import ModuleNames, d_in, d_out, is_linear, weight_of
from hf_prune.structure.projections import reading_slice, writing_slices
from hf_prune.structure.sites import Attribute, FullWidthNorm, Read, Refusal, Site, Span, TensorSlice
from hf_prune.structure.source import reads_config, source_of


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


class _Refused(Exception):
    """This feed-forward can't be pruned soundly; the message is the reason."""


def find_sites(names: ModuleNames) -> Iterator[Site | Refusal]:
    """One site for each module that matches a feed-forward layout by names and shapes."""
    for name in names.modules:
        layout = matching(names, name)
        if layout is not None:
            try:
                yield _site(names, name, layout)
            except _Refused as reason:
                yield Refusal("ffn_neurons", name, str(reason))


def matching(names: ModuleNames, name: str) -> FeedForwardLayout | None:
    """The layout of the feed-forward `name`, if it is one by names and widths: d_model -> d_ff -> d_model."""
    children = names.modules[name]._modules.keys()
    for layout in feed_forward_layouts() if children else ():
        if layout.children <= children and all(
            _is_projection(names.get(name, part), layout.convolved) for part in layout.parts
        ):
            *inputs, output = (names.modules[names.resolve(name, part)] for part in layout.parts)
            widths = {d_out(module) for module in inputs}
            d_ff = d_in(output)
            alike = widths == {d_ff} or (len(inputs) == 1 and widths == {2 * d_ff})
            if (
                alike
                and d_in(inputs[0]) == d_out(output)
                and _is_alone(names.modules[name], layout, d_out(output) < d_ff or not is_linear(output))
            ):
                return layout
    return None


def _is_projection(module: nn.Module | None, may_be_convolved: bool) -> bool:
    return is_linear(module) or (may_be_convolved and isinstance(module, _CONVOLUTIONS) and module.groups == 1)


def _is_alone(module: nn.Module, layout: FeedForwardLayout, widens: bool) -> bool:
    """Of names that mean little: whether nothing else is there, and what is there widens (an adapter narrows), or is convolved."""
    others = (child for own, child in module.named_children() if own not in layout.parts)
    return not layout.alone or (
        widens and not module._parameters and not any(True for child in others for _ in child.parameters())
    )


def _site(names: ModuleNames, name: str, layout: FeedForwardLayout) -> Site:
    module, output_name = names.modules[name], names.resolve(name, layout.output)
    output = names.modules[output_name]
    d_ff = d_in(output)
    inputs = [(names.resolve(name, part), names.modules[names.resolve(name, part)]) for part in layout.inputs]
    spans = tuple(Span(part * d_ff, 1) for part in range(d_out(inputs[0][1]) // d_ff))
    slices = [piece for part, linear in inputs for piece in writing_slices(part, linear, spans)]
    slices.append(reading_slice(output_name, output, Span(0, 1)))
    norms, buffers = [], []
    if d_ff != d_out(output):  # where widths can tell what is over neurons from what is over d_model
        for path, child in _beside(module, {names.resolve("", part) for part in layout.parts}, d_ff):
            full, weight = names.resolve(name, path), weight_of(child)
            if _is_by_channel(child, d_ff):
                slices += writing_slices(full, child, (Span(0, 1),))  # by channel: (d_ff, 1, …) and (d_ff,)
                kept = [own for own, each in child.named_buffers() if each.dim()]  # the statistics of a batch norm
                buffers += [TensorSlice(full, own, 0, (Span(0, 1),), writes=True) for own in kept]
            elif weight.numel() == d_ff:
                norms.append(_folded(full, child))
                slices.append(TensorSlice(full, "weight", 0, (Span(0, 1),), writes=True))
            elif d_ff in weight.shape:
                raise _Refused(
                    f"it also holds {path} ({type(child).__name__}) over all neurons, whose role is unknown"
                )
    source = source_of(module)
    attributes = [
        Attribute(name, field, 1) for field in FEED_FORWARD_WIDTH_NAMES if module.__dict__.get(field) == d_ff
    ] + [
        Attribute(name, field, 1, of_config=True) for field in FEED_FORWARD_WIDTH_NAMES if reads_config(source, field)
    ]
    return Site(
        name,
        "ffn_neurons",
        d_ff,
        tuple(slices),
        tuple(attributes),
        tuple(norms),
        # of a convolution no hook sees where units are read as its last dimension
        reads=(Read(output_name, Span(0, 1)),) if is_linear(output) else (),
        holder="" if is_linear(output) else name,
        buffers=tuple(buffers),
    )


def _beside(module: nn.Module, parts: set[str], d_ff: int) -> Iterator[tuple[str, nn.Module]]:
    """Modules with a weight beside the projections: the module's own, what wraps one such, a projection's or a channel's norm."""
    for name, child in module.named_children():
        inside = [(f"{name}.{path}" if path else name, inner) for path, inner in child.named_modules()]
        weighted = [(path, inner) for path, inner in inside if inner._parameters.get("weight") is not None]
        others = [(path, inner) for path, inner in weighted if path not in parts]
        by_channel = all(_is_by_channel(inner, d_ff) for _, inner in weighted)
        if len(weighted) == 1 or by_channel or len(others) < len(weighted):
            yield from others


def _is_by_channel(module: nn.Module, d_ff: int) -> bool:
    """A depthwise convolution, or a batch norm, over the neurons."""
    if isinstance(module, _CONVOLUTIONS):
        return module.groups == module.in_channels == d_ff
    return isinstance(module, _BatchNorm) and module.num_features == d_ff


def _folded(name: str, norm: nn.Module) -> FullWidthNorm:
    """The norm over all neurons, if it is one that can be folded.

    Raises:
        _Refused: it isn't.
    """
    epsilon = next((key for key in NORM_EPSILON_NAMES if isinstance(getattr(norm, key, None), float)), None)
    if "RMS" not in type(norm).__name__ or norm._parameters.get("bias") is not None or epsilon is None:
        own = name.rpartition(".")[2]
        raise _Refused(f"{own} normalises over all neurons, so removing some changes the rest")
    return FullWidthNorm(name, epsilon)
