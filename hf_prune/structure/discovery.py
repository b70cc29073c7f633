"""Discovery: from a model to its sites. Everything that differs between models is in `layouts`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import partial

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import UnsupportedModelError
from hf_prune.structure import attention, experts, feed_forward, layers, parts, tied, unmatched
from hf_prune.structure.cost import count_macs
from hf_prune.structure.inputs import example_inputs
from hf_prune.structure.naming import ModuleNames, attribute_at
from hf_prune.structure.sites import ModelStructure, Part, Refusal, Site, Target, WeightSite, kind_of


def inspect_model(model: nn.Module) -> ModelStructure:
    """Find what can be pruned in `model`, and what was found but can't be, with the reason.

    Reads names, shapes and plain attributes; never a weight, so a model on the meta device will do.

    Args:
        model: a Transformers model, or any module built of blocks that `layouts` knows.

    Returns:
        The structure; print it for a table.
    """
    names = ModuleNames(model)
    refusals: list[Refusal] = []
    stacks, stack_refusals = layers.find_stacks(names)

    def sound(results: Iterable[Site | Refusal]) -> list[Site]:
        return list(_found(tied.refuse(names, _found(results, refusals)), refusals))

    heads = sound(attention.find_sites(names, stacks))
    neurons = sound(feed_forward.find_sites(names))
    in_experts = sound(experts.find_sites(names))
    mixtures = [site for site in in_experts if site.target == "experts"]
    neurons += [site for site in in_experts if site.target != "experts"]
    blocks = sound(layers.find_sites(names, stacks, [*heads, *neurons]))
    refusals += stack_refusals
    of_blocks = sound(parts.find_sites(names, stacks, stack_refusals))
    refusals += unmatched.find(names, [*heads, *neurons, *mixtures], refusals)
    refusals += unmatched.of_parts(stacks, of_blocks, refusals)
    config = getattr(model, "config", None)
    return ModelStructure(
        model_class=type(model).__name__,
        model_type=getattr(config, "model_type", "") or "",
        sites=(*blocks, *of_blocks, *heads, *mixtures, *neurons),
        weights=tuple(_weight_sites(names)),
        refusals=tuple(refusals),
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        count_macs=partial(_count_macs, model),
    )


def _count_macs(model: nn.Module) -> tuple[int, dict[str, list[int]]] | None:
    try:
        sample = example_inputs(model, batch_size=1, length=128)
        sample.pop("attention_mask", None)  # all ones, and code looks into it, which the meta device has no answer to
        return count_macs(model, sample), {name: list(value.shape) for name, value in sample.items()}
    except (AttributeError, RuntimeError, ValueError, TypeError, LookupError, AssertionError, UnsupportedModelError):
        return None  # no config, code that asks for a number that only real tensors have, or sizes that don't suit it


def require_sites(structure: ModelStructure, target: Target, part: Part = "block") -> tuple[Site, ...]:
    """The sites of `target`, of layers those of a part.

    Raises:
        UnsupportedModelError: there are none; the message says what was found instead.
    """
    sites, kind = structure.of(target, part), kind_of(target, part)
    if sites:
        return sites
    refused = [f"{refusal.name}: {refusal.reason}" for refusal in structure.refusals if refusal.kind == kind]
    found = ", ".join(sorted({site.kind for site in structure.sites})) or "no units"
    reason = "; ".join(dict.fromkeys(refused)) or f"no block matches a known layout ({unmatched.HOW_TO_ADD})"
    raise UnsupportedModelError(
        f"{structure.model_class} has no {kind} that can be pruned: {reason}. Found: {found}. "
        "Target `weights` works on every model."
    )


def stacks_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The model's stacks of blocks, by name: the names of the blocks in call order."""
    return layers.find_stacks(ModuleNames(model))[0]


def _found(results: Iterable[Site | Refusal], refusals: list[Refusal]) -> Iterator[Site]:
    for result in results:
        if isinstance(result, Refusal):
            refusals.append(result)
        else:
            yield result


def _weight_sites(names: ModuleNames) -> Iterator[WeightSite]:
    """Matrices of linear layers; embeddings, output heads, biases and norms are left out (DESIGN, section 5).

    In a model whose blocks hold no linear layer (ResNet, SqueezeBERT), also its convolutions: (d_out, d_in, …).
    """
    embeddings = {id(parameter) for parameter in names.embedding_parameters()}
    heads = names.output_head_modules()
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    inner = {name: module for name, module in names.modules.items() if name not in heads}
    is_convolutional = not any(
        _is_linear_map(module) and re.search(r"\.\d+(\.|$)", name) for name, module in inner.items()
    )
    seen: set[int] = set()
    for name, module in inner.items():
        if not (_is_linear_map(module) or (is_convolutional and isinstance(module, convolutions))):
            continue
        own = next((own for own in _WEIGHTS if isinstance(attribute_at(module, own), nn.Parameter)), None)
        weight = None if own is None else attribute_at(module, own)
        if weight is None or id(weight) in embeddings or id(weight) in seen:
            continue  # tied weights are planned once, and never by way of an embedding
        seen.add(id(weight))
        reduction_dim = 0 if isinstance(module, Conv1D) else 1
        yield WeightSite(f"{name}.{own}", name, tuple(weight.shape), reduction_dim)


# What a linear layer's or a convolution's matrix is called; under weight normalisation the part that gives the direction,
# whose zeros are those of the matrix.
_WEIGHTS = ("weight", "parametrizations.weight.original1")


def _is_linear_map(module: nn.Module) -> bool:
    """A linear layer, or one of a model's own class that holds the same (I-BERT's quantised ones)."""
    weight = module._parameters.get("weight")
    return isinstance(module, (nn.Linear, Conv1D)) or (
        "Linear" in type(module).__name__ and weight is not None and weight.dim() == 2
    )
