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


# Sizes that can't be any number: the budget is met within half a per cent of the model, or as near as they allow.

TOLERANCE = 0.005
# a whole step of the sizes has to be small beside the model for half a per cent to be in reach
WIDE = {
    "bert": dict(intermediate_size=480),
    "llama": dict(intermediate_size=480),
    "gpt2": dict(n_inner=480),
    "opt": dict(ffn_dim=480),
    "bart": dict(encoder_ffn_dim=480, decoder_ffn_dim=320),
    "t5": dict(d_ff=480),
    "vit": dict(intermediate_size=480),
    "qwen2": dict(intermediate_size=480),
}


@pytest.mark.parametrize("kind", ["parameters", "macs"])
@pytest.mark.parametrize(
    "sizes",
    [{"uniform": True}, {"uniform": True, "round_to": 4}, {"round_to": 8}, {"round_to": 8, "scope": "global"}],
    ids=str,
)
@pytest.mark.parametrize("name", WIDE)
def test_budgets_with_sizes_that_are_no_free_choice(name, sizes, kind):
    model = zoo.build(name, **WIDE[name])
    before = counted(model, kind)
    found = hf_prune.make_plan(model, recipe({"target": "ffn_neurons", "sparsity": {kind: 0.2}, **sizes}))
    shrink(model, found)
    kept = {key: int(keep.sum()) for key, keep in found.masks.units.items()}
    off = abs(before - counted(model, kind) - 0.2 * before)
    assert all(n % sizes.get("round_to", 1) == 0 for n in kept.values())
    if sizes.get("uniform"):
        by_size = {}
        for key, keep in found.masks.units.items():
            by_size.setdefault(len(keep), set()).add(kept[key])
        assert all(len(each) == 1 for each in by_size.values())
    assert off <= TOLERANCE * before, f"{off / before:.2%} off: {kept}"
    assert not found.notes


@pytest.mark.parametrize("kind", ["parameters", pytest.param("macs", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", sorted(zoo.MODELS))
def test_where_sizes_are_too_coarse_the_nearest_is_taken_and_said(name, kind):
    """No other equal size, tried one by one on the model itself, comes nearer."""
    model = zoo.build(name)
    structure = inspect_model(model)
    sites = structure.of("ffn_neurons")
    asked, before = 0.07, counted(model, kind)
    step = {"target": "ffn_neurons", "sparsity": {kind: asked}, "uniform": True, "round_to": 12}
    try:
        found = hf_prune.make_plan(model, recipe(step))
    except hf_prune.RecipeError as error:
        assert "can't say a smaller equal size" in str(error) or "can save at most" in str(error)
        return
    kept = {key: int(keep.sum()) for key, keep in found.masks.units.items()}
    shrink(model, found)
    off = abs(before - counted(model, kind) - asked * before)
    if len({site.n_units for site in sites}) == 1:
        for size in range(12, sites[0].n_units + 1, 12):
            other = zoo.build(name)
            remove = {site.name: list(range(site.n_units - size)) for site in sites if size < site.n_units}
            if remove:
                shrink(other, hf_prune.make_plan(other, recipe({"target": "ffn_neurons", "remove": remove})))
            assert off <= abs(before - counted(other, kind) - asked * before) + 1e-6, (size, kept)
    assert (off > TOLERANCE * before) == any("the nearest that their sizes and limits allow" in n for n in found.notes)


def test_limits_of_a_site_leave_the_budget_to_the_others():
    model = zoo.build("bert", intermediate_size=480)
    before = counted(model, "parameters")
    step = {"target": "ffn_neurons", "sparsity": {"parameters": 0.3}, "scope": "global", "round_to": 8}
    step |= {"max_sparsity": {"*.layer.0": 0.1}, "min_sparsity": {"*.layer.1": 0.5}}
    found = hf_prune.make_plan(model, recipe(step))
    lost = [float((~keep).double().mean()) for keep in found.masks.units.values()]
    shrink(model, found)
    assert lost[0] <= 0.1 and lost[1] >= 0.5
    assert abs(before - counted(model, "parameters") - 0.3 * before) <= TOLERANCE * before
