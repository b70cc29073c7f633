"""What units cost, against what is counted before and after they have physically left."""

import copy

import pytest
import torch

import hf_prune
from hf_prune.apply.masks import set_masks
from hf_prune.apply.shrink import remove_masked_
from hf_prune.plan import KeepMasks
from hf_prune.structure import inspect_model
from hf_prune.structure.cost import count_macs, count_parameters, mac_costs, parameter_costs
from hf_prune.structure.inputs import example_inputs
from tests import zoo
from tests.reach.zoo import build


def some_of(model, targets):
    """Uneven masks: units 0 and on of each site, the last block of each stack."""
    units = {}
    for number, site in enumerate(inspect_model(model).sites):
        if site.kind in targets and site.n_units > 1:
            keep = torch.ones(site.n_units, dtype=torch.bool)
            keep[-1 if site.target == "layers" else slice(1 + number % (site.n_units - 1))] = False
            units[site.key] = keep
    return units


def counted(model, inputs):
    return count_parameters(model), count_macs(model, inputs)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_macs_of_attention_are_counted_whatever_computes_it(implementation):
    model = zoo.build("llama")
    model.set_attn_implementation(implementation)
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    # 3 layers, 4 heads of 8 entries, 16 positions: scores and mixing are 16 * 16 * 8 each
    attention = 3 * 4 * 2 * 16 * 16 * 8
    expected = 16 * linear + attention + zoo.rotary_macs(model, 16)
    assert count_macs(model, example_inputs(model, batch_size=1, length=16)) == expected


def test_counting_leaves_training_flags_alone():
    model = zoo.build("bert").train()
    model.bert.embeddings.eval()
    flags = [module.training for module in model.modules()]
    count_macs(model, example_inputs(model))
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize(
    "target", ["ffn_neurons", "attention_heads", "layers", "layers.attention", "layers.feed_forward"]
)
@pytest.mark.parametrize("name", zoo.MODELS)
def test_costs_are_what_leaves(name, target):
    """Also after other units have left: the costs of what is there, no more."""
    model = zoo.build(name)
    inputs = example_inputs(model, batch_size=1)
    structure = inspect_model(model)
    first = some_of(model, ["ffn_neurons", "attention_heads"] if target.startswith("layers") else ["layers"])
    second = some_of(model, [target])
    if not second:
        pytest.skip(next(refusal.reason for refusal in structure.refusals if refusal.kind == target))
    inside_dropped = [
        f"{block}."
        for site in structure.of("layers")
        if site.key in first
        for block, kept in zip(site.blocks, first[site.key].tolist(), strict=True)
        if not kept and not site.is_shared
    ]
    second = {
        key: keep
        for key, keep in second.items()
        if not f"{structure[key].name}.".startswith(tuple(inside_dropped) or ("none",))
    }
    costs = parameter_costs(model, structure, first), mac_costs(model, structure, first, inputs)
    after_first, after_both = copy.deepcopy(model), copy.deepcopy(model)
    set_masks(after_first, KeepMasks(units=first))
    remove_masked_(after_first)
    set_masks(after_both, KeepMasks(units={**first, **second}))
    remove_masked_(after_both)
    for cost, before, after in zip(costs, counted(after_first, inputs), counted(after_both, inputs), strict=True):
        assert cost.total == pytest.approx(before, rel=1e-9)
        saved = sum(float(cost.per_unit[key][~keep].sum()) for key, keep in second.items())
        assert saved == pytest.approx(before - after, rel=1e-9)


@pytest.mark.parametrize(
    ("model_type", "target"),
    [
        ("segformer", "ffn_neurons"),  # a depthwise convolution between its projections
        ("segformer", "attention_heads"),  # a convolution inside that all heads share
        ("efficientnet", "ffn_neurons"),  # squeezes and expands by convolutions
        ("nystromformer", "attention_heads"),  # a convolution with a channel for each head
    ],
)
def test_costs_of_convolutions_are_what_leaves(model_type, target):
    built = build(model_type)
    units = some_of(built.model, [target])
    structure = inspect_model(built.model)
    costs = parameter_costs(built.model, structure, {}), mac_costs(built.model, structure, {}, built.inputs)
    before = counted(built.model, built.inputs)
    set_masks(built.model, KeepMasks(units=units))
    remove_masked_(built.model)
    for cost, full, smaller in zip(costs, before, counted(built.model, built.inputs), strict=True):
        saved = sum(float(cost.per_unit[key][~keep].sum()) for key, keep in units.items())
        assert saved == pytest.approx(full - smaller, rel=1e-9)


@pytest.mark.parametrize("model_type", ["t5", "switch_transformers"])
def test_what_a_first_block_hands_on_is_counted_where_it_is(model_type):
    """In Transformers 5.12 the blocks of SwitchTransformers hand nothing on."""
    model = build(model_type).model
    structure, before = inspect_model(model), count_parameters(model)
    first = parameter_costs(model, structure, {}).per_unit["layers:encoder.block"][0]
    step = {"target": "layers", "remove": {"encoder.block": [0]}}
    hf_prune.prune_(model, {"version": 1, "prune": [step]})
    assert count_parameters(model) == before - first
