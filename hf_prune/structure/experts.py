"""Mixtures of experts whose weights are stacked in 3-D parameters: their experts, and the neurons inside of all of them.

Axes: E experts, d_ff neurons of each, d_model. A unit of `experts` is one expert with its row of the router. A unit of
`ffn_neurons` is the same place in every expert, so that all keep equally many.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

from hf_prune.structure import layouts
from hf_prune.structure.naming import ModuleNames, is_linear
from hf_prune.structure.sites import Attribute, Refusal, Site, Span, TensorSlice
from hf_prune.structure.source import forward_of, reads_config, source_of


class _Refused(Exception):
    """These experts can't be pruned soundly; the message is the reason."""


def stacked_experts(names: ModuleNames) -> Iterator[str]:
    """Modules that hold experts as 3-D parameters, by the output that all of them have."""
    for name, module in names.modules.items():
        output = module._parameters.get(layouts.EXPERT_OUTPUT)
        if (
            output is not None
            and output.dim() == 3
            and any(each in module._parameters for each in layouts.EXPERT_INPUTS)
        ):
            yield name


def find_sites(names: ModuleNames) -> Iterator[Site | Refusal]:
    """For each such module its neurons, and, where it has a router beside it, its experts."""
    for name in stacked_experts(names):
        for target, site in (("ffn_neurons", _neurons), ("experts", _experts)):
            try:
                yield site(names, name)
            except _Refused as reason:
                yield Refusal(target, name, str(reason))  # type: ignore[arg-type]


def _neurons(names: ModuleNames, name: str) -> Site:
    module = names.modules[name]
    inputs = [
        (own, module._parameters[own]) for own in layouts.EXPERT_INPUTS if module._parameters.get(own) is not None
    ]
    output = module._parameters[layouts.EXPERT_OUTPUT]
    assert output is not None
    widest = inputs[0][1]
    assert widest is not None
    # (E, d_out, d_in) as in Linear, or (E, d_in, d_out): the output leads from the neurons to d_model
    d_model, d_ff, transposed = _sizes(tuple(widest.shape), tuple(output.shape), forward_of(module))
    writing, reading = (2, 1) if transposed else (1, 2)
    slices = []
    for own, tensor in inputs:
        assert tensor is not None
        n_parts = tensor.shape[writing] // d_ff
        spans = tuple(Span(part * d_ff, 1) for part in range(n_parts))
        if n_parts == 2 and re.search(r"\[\.\.\., 1?::2\]", source_of(module)):
            spans = (Span(0, 2),)  # gate and up in turns
        slices.append(TensorSlice(name, own, writing, spans, writes=True))
        if (bias := module._parameters.get(f"{own}_bias")) is not None:
            slices.append(TensorSlice(name, f"{own}_bias", bias.dim() - 1, spans, writes=True))
    slices.append(TensorSlice(name, layouts.EXPERT_OUTPUT, reading, (Span(0, 1),), writes=False))
    _refuse_others(module, {piece.tensor for piece in slices} | {f"{layouts.EXPERT_OUTPUT}_bias"})
    source = source_of(module)
    attributes = [
        Attribute(name, own, 1) for own in layouts.EXPERT_WIDTH_NAMES if module.__dict__.get(own) == d_ff != d_model
    ] + [Attribute(name, own, 1, of_config=True) for own in layouts.EXPERT_WIDTH_NAMES if reads_config(source, own)]
    return Site(name, "ffn_neurons", d_ff, tuple(slices), tuple(attributes), holder=name)


def _sizes(inputs: tuple[int, ...], output: tuple[int, ...], forward: str) -> tuple[int, int, bool]:
    """d_model, d_ff, and whether the weights are (E, d_in, d_out).

    Raises:
        _Refused: the shapes fit neither.
    """
    _, first, second = output
    fits = {
        False: first == inputs[2] and inputs[1] in (second, 2 * second),
        True: second == inputs[1] and inputs[2] in (first, 2 * first),
    }
    if all(fits.values()):  # an input of one part is as good as turned round: the code says which product it takes
        fits = {False: "linear(" in forward, True: " @ self." in forward}
    if fits[False] == fits[True]:
        raise _Refused(f"weights {inputs} and {output} don't tell which of their axes the neurons are on")
    return (second, first, True) if fits[True] else (first, second, False)


def _refuse_others(module: nn.Module, known: set[str]) -> None:
    for own, tensor in module.named_parameters(recurse=False):
        if own not in known:
            raise _Refused(f"it also holds {own} {tuple(tensor.shape)}, whose role is unknown")


def _experts(names: ModuleNames, name: str) -> Site:
    module, around = names.modules[name], names.parent(name)
    n_experts = int(module.get_parameter(layouts.EXPERT_OUTPUT).shape[0])
    router_name = _router(names, around, n_experts)
    router, block = names.modules[router_name], names.modules[around]
    slices = [
        TensorSlice(name, own, 0, (Span(0, 1),), writes=True) for own, _ in module.named_parameters(recurse=False)
    ]
    buffers: list[TensorSlice] = []
    for path, inner in router.named_modules():
        full = names.resolve(router_name, path) if path else router_name
        for own, tensor in (*inner._parameters.items(), *inner._buffers.items()):
            if not isinstance(tensor, Tensor) or n_experts not in tensor.shape:
                continue
            if list(tensor.shape).count(n_experts) != 1 or not tensor.is_floating_point():
                raise _Refused(
                    f"its router holds {own} {tuple(tensor.shape)}, of which the axis of experts can't be told"
                )
            piece = TensorSlice(full, own, list(tensor.shape).index(n_experts), (Span(0, 1),), writes=True)
            (slices if isinstance(tensor, nn.Parameter) else buffers).append(piece)
    for own, tensor in (*block._parameters.items(), *block._buffers.items()):
        if isinstance(tensor, Tensor) and n_experts in tensor.shape:
            raise _Refused(f"beside them is {own} {tuple(tensor.shape)}, whose role is unknown")
    attributes = []
    for holder in (name, router_name, around):
        source = source_of(names.modules[holder])
        for own in layouts.EXPERT_COUNT_NAMES:
            if names.modules[holder].__dict__.get(own) == n_experts:
                attributes.append(Attribute(holder, own, 1))
            if reads_config(source, own):
                attributes.append(Attribute(holder, own, 1, of_config=True))
        for own in layouts.TOP_K_NAMES:
            if isinstance(names.modules[holder].__dict__.get(own), int):
                attributes.append(Attribute(holder, own, 1, is_limit=True))
            if reads_config(source, own):
                attributes.append(Attribute(holder, own, 1, of_config=True, is_limit=True))
    return Site(
        name,
        "experts",
        n_experts,
        tuple(slices),
        tuple(attributes),
        holder=name,
        router=router_name,
        buffers=tuple(buffers),
        n_least=2 if re.search(r"\.topk\(2\b", forward_of(router)) else 1,
    )


def _router(names: ModuleNames, around: str, n_experts: int) -> str:
    """The router beside the experts: it gives (logits, weights of the chosen, their numbers).

    Raises:
        _Refused: there is none that works like that.
    """
    found = next((own for own in layouts.ROUTER_NAMES if names.get(around, own) is not None), None)
    if found is None or is_linear(names.get(around, found)):
        raise _Refused("no module beside the experts chooses among them by itself")
    name = names.resolve(around, found)
    router = names.modules[name]
    returned = re.findall(r"^ +return \w+, [^,\n]+, \w+$", forward_of(router), re.MULTILINE)
    if "topk" not in forward_of(router) or len(returned) != 1:
        raise _Refused(
            f"{found} ({type(router).__name__}) doesn't give logits, weights and numbers of the chosen experts"
        )
    weight = router._parameters.get("weight")
    n_rows = next((each.shape[0] for each in [weight] if each is not None), None)
    if n_rows != n_experts:
        raise _Refused(f"{found} chooses among {n_rows or 'an unknown number'}, not among the {n_experts} experts")
    n_groups = next((router.__dict__[own] for own in layouts.EXPERT_GROUP_NAMES if own in router.__dict__), 1)
    if n_groups not in (None, 1):
        raise _Refused(f"{found} chooses among {n_groups} groups of experts, which would have to stay alike")
    return name
