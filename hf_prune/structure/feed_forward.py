"""Feed-forward sites: a neuron is one row of each input projection and one column of the output projection."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from hf_prune.structure.layouts import FEED_FORWARD_LAYOUTS, FEED_FORWARD_WIDTH_NAMES, FeedForwardLayout
from hf_prune.structure.naming import ModuleNames, d_in, d_out, is_linear
from hf_prune.structure.projections import reading_slice, writing_slices
from hf_prune.structure.sites import Attribute, Read, Refusal, Site, Span


def find_sites(names: ModuleNames) -> Iterator[Site | Refusal]:
    """One site for each module that matches a feed-forward layout by names and shapes."""
    for name in names.modules:
        layout = matching(names, name)
        if layout is not None:
            yield _site(names, name, layout)


def matching(names: ModuleNames, name: str) -> FeedForwardLayout | None:
    """The layout of the feed-forward `name`, if it is one by names and widths: d_model -> d_ff -> d_model."""
    for layout in FEED_FORWARD_LAYOUTS:
        if all(is_linear(names.get(name, part)) for part in layout.parts):
            *inputs, output = (names.modules[names.resolve(name, part)] for part in layout.parts)
            alike = all(d_out(module) == d_in(output) * layout.stacked for module in inputs)
            return layout if alike else None
    return None


def _site(names: ModuleNames, name: str, layout: FeedForwardLayout) -> Site | Refusal:
    output_name = names.resolve(name, layout.output)
    output = names.modules[output_name]
    d_ff = d_in(output)
    inputs = [(names.resolve(name, part), names.modules[names.resolve(name, part)]) for part in layout.inputs]
    norm = _norm_over_units(names.modules[name], d_ff, d_out(output))
    if norm:
        return Refusal("ffn_neurons", name, f"{norm} normalises over all neurons, so removing some changes the rest")
    spans = tuple(Span(part * d_ff, 1) for part in range(layout.stacked))
    slices = [piece for part, module in inputs for piece in writing_slices(part, module, spans)]
    slices.append(reading_slice(output_name, output, Span(0, 1)))
    attributes = tuple(
        Attribute(name, attribute, 1)
        for attribute in FEED_FORWARD_WIDTH_NAMES
        if names.modules[name].__dict__.get(attribute) == d_ff
    )
    return Site(name, "ffn_neurons", d_ff, tuple(slices), attributes, reads=(Read(output_name, Span(0, 1)),))


def _norm_over_units(module: nn.Module, d_ff: int, d_model: int) -> str | None:
    """The name of a child norm whose width is d_ff; None where widths can't tell it from a norm over d_model."""
    if d_ff == d_model:
        return None
    for name, child in module.named_children():
        weight = getattr(child, "weight", None)
        if "Norm" in type(child).__name__ and weight is not None and weight.numel() == d_ff:
            return name
    return None
