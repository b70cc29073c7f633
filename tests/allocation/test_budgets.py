"""Budgets of parameters and MACs: the smaller model, counted, against what was asked for."""

import pytest

import hf_prune
from hf_prune.apply.masks import set_masks
from hf_prune.apply.shrink import remove_masked_
from hf_prune.structure import inspect_model
from hf_prune.structure.cost import count_macs, count_parameters, mac_costs, parameter_costs
from hf_prune.structure.inputs import example_inputs
from tests import zoo


LENGTH = 12


def counted(model, kind):
    inputs = example_inputs(model, batch_size=1, length=LENGTH)
    return count_parameters(model) if kind == "parameters" else count_macs(model, inputs)


def half_a_unit(model, target, kind):
    structure = inspect_model(model)
    inputs = example_inputs(model, batch_size=1, length=LENGTH)
    costs = parameter_costs(model, structure, {}) if kind == "parameters" else mac_costs(model, structure, {}, inputs)
    return max(float(costs.per_unit[site.key].max()) for site in structure.of(target)) / 2


def shrink(model, plan):
    set_masks(model, plan.masks)
    remove_masked_(model)


def recipe(*steps):
    return {"version": 1, "prune": list(steps), "calibration": {"length": LENGTH}}


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("kind", ["parameters", "macs"])
@pytest.mark.parametrize("target", ["ffn_neurons", "attention_heads", "layers"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bert", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {}),
        ("deberta-v2", {}),
        ("t5", {}),
        ("vit", {}),
    ],
)
def test_the_model_shrinks_by_what_was_asked(name, changes, target, kind, scope):
    model = zoo.build(name, **changes)
    before, unit = counted(model, kind), half_a_unit(model, target, kind)
    asked = 0.06 if target != "layers" else 0.2
    shrink(model, hf_prune.make_plan(model, recipe({"target": target, "sparsity": {kind: asked}, "scope": scope})))
    assert abs(before - counted(model, kind) - asked * before) <= unit + 1e-6


@pytest.mark.parametrize("kind", ["parameters", "macs"])
@pytest.mark.parametrize("targets", [("ffn_neurons", "layers", "attention_heads"), ("layers", "ffn_neurons")])
def test_each_step_shrinks_the_model_that_it_finds(kind, targets):
    model = zoo.build("llama", num_hidden_layers=6, num_key_value_heads=4)
    steps = [{"target": target, "sparsity": {kind: 0.1}, "scope": "global"} for target in targets]
    for n, target in enumerate(targets, 1):
        found, after = zoo.build("llama", num_hidden_layers=6, num_key_value_heads=4), None
        if n > 1:
            shrink(found, hf_prune.make_plan(found, recipe(*steps[: n - 1])))
        after = zoo.build("llama", num_hidden_layers=6, num_key_value_heads=4)
        shrink(after, hf_prune.make_plan(after, recipe(*steps[:n])))
        saved = counted(found, kind) - counted(after, kind)
        assert abs(saved - 0.1 * counted(found, kind)) <= half_a_unit(model, target, kind) + 1e-6


def test_a_layers_own_price_counts_when_blocks_differ():
    """After neurons have left unevenly, dropping a block saves what that block still holds."""
    model = zoo.build("llama", num_hidden_layers=4)
    uneven = {"target": "ffn_neurons", "remove": {"model.layers.0.mlp": list(range(40))}}
    dropped = {"target": "layers", "sparsity": {"parameters": 0.2}, "criterion": "random"}
    found, after = zoo.build("llama", num_hidden_layers=4), zoo.build("llama", num_hidden_layers=4)
    shrink(found, hf_prune.make_plan(model, recipe(uneven)))
    shrink(after, hf_prune.make_plan(model, recipe(uneven, dropped)))
    before = count_parameters(found)
    blocks = [sum(p.numel() for p in block.parameters()) for block in found.model.layers]
    assert abs(before - count_parameters(after) - 0.2 * before) <= max(blocks) / 2


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_budget_ramps_and_what_left_stays_out(scope):
    model = zoo.build("bert")
    step = recipe({"target": "ffn_neurons", "sparsity": {"parameters": 0.1}, "scope": scope, "criterion": "random"})
    previous = None
    for progress in (0.3, 0.7, 1.0):
        plan = hf_prune.make_plan(model, step, progress=progress, previous=previous)
        if previous is not None:
            assert plan.masks & previous.masks == plan.masks
        previous = plan
        smaller = zoo.build("bert")
        shrink(smaller, plan)
        saved = count_parameters(model) - count_parameters(smaller)
        assert abs(saved - 0.1 * progress * count_parameters(model)) <= half_a_unit(model, "ffn_neurons", "parameters")


def test_what_can_not_be_saved_is_refused_with_the_most_that_can():
    model = zoo.build("bert")
    step = {"target": "ffn_neurons", "sparsity": {"parameters": 0.3}, "max_sparsity": 0.5}
    # 3 layers of 24 neurons of 65 entries (row, bias, column) of 43 thousand
    most = 3 * 24 * 65 / count_parameters(model)
    with pytest.raises(hf_prune.RecipeError, match=f"at most {most:.1%} .* 30.0% is asked for"):
        hf_prune.make_plan(model, recipe(step))
    with pytest.raises(hf_prune.RecipeError, match=r"at most 0\.0%"):
        hf_prune.make_plan(zoo.build("albert"), recipe({"target": "layers", "sparsity": {"parameters": 0.3}}))
