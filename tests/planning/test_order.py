"""Steps that repair and steps that update weights, in turn; what planning leaves of the model; training."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_prune import Pruner, apply_, make_plan, prune_
from hf_prune.apply.masks import masks_of
from hf_prune.apply.present import present_entries
from hf_prune.errors import CalibrationError
from hf_prune.structure import inspect_model
from tests import zoo
from tests.planning.test_repair import batches_of, distances, outputs, recipe, repaired, step
from tests.training.data import Tokens, trainer


NEURONS = step("ffn_neurons", sparsity=0.5)
SPARSEGPT = {"target": "weights", "sparsity": 0.5, "criterion": "sparsegpt"}


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_as_it_was(model, before):
    hooks = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    wrapped = any("forward" in module.__dict__ for module in model.modules())
    return (
        not hooks
        and not wrapped
        and before.keys() == model.state_dict().keys()
        and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_repaired_weights_are_what_sparsegpt_prunes(name, pattern):
    model = zoo.build(name, torch.float64)
    weights = {**SPARSEGPT, "pattern": pattern} if pattern else SPARSEGPT
    if pattern:
        del (weights := dict(weights))["sparsity"]
    batches = batches_of(model)
    both = make_plan(model, recipe(NEURONS, weights), calibration=batches)
    alone = make_plan(model, recipe(NEURONS), calibration=batches)
    unrepaired = make_plan(model, recipe({**NEURONS, "compensation": "none"}, weights), calibration=batches)
    assert both.steps[0] == alone.steps[0]
    assert any("refitted" in note for note in both.notes)

    pruned = repaired(model, both)
    structure = inspect_model(model)
    for site in structure.weights:
        keep, weight = both.masks.weights[site.name], pruned.get_parameter(site.name)
        there = present_entries(structure, both.steps[0], site)
        assert not weight[~keep].any() and not weight[~there].any()
        n_kept = int((keep & there).sum())
        assert n_kept == (int(there.sum()) // 2 if pattern else int(there.sum()) - round(0.5 * int(there.sum())))
        if pattern:  # of the columns that are there, two of every four
            turned = (keep, there) if site.reduction_dim == 1 else (keep.T, there.T)
            rows, columns = (torch.nonzero(turned[1].any(dim)).reshape(-1) for dim in (1, 0))
            inner = turned[0][rows[:, None], columns]
            assert (inner.reshape(len(rows), -1, 4).sum(-1) == 2).all()
    held_out = batches_of(model, 2, seed=100)
    out = structure.of("ffn_neurons")[0].reads[0].module + ".weight"
    # what was pruned is the repaired projection: its values come from the refit, not from the model
    assert not torch.equal(both.replacements[out], unrepaired.replacements[out])
    assert distances(model, both, held_out)[1] < distances(model, both, held_out)[0]


def test_sparsegpt_then_neurons_keeps_what_sparsegpt_gave():
    model = zoo.build("llama", torch.float64)
    batches = batches_of(model)
    weights = make_plan(model, recipe(SPARSEGPT), calibration=batches)
    both = make_plan(model, recipe(SPARSEGPT, NEURONS), calibration=batches)
    gate = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(both.replacements[gate], weights.replacements[gate])
    pruned = repaired(model, both)
    for name, keep in both.masks.weights.items():
        assert not pruned.get_parameter(name)[~keep].any()
    unrepaired = copy.deepcopy(both)
    unrepaired.replacements = {**both.replacements, **weights.replacements}
    held_out = batches_of(model, 2, seed=100)
    assert distances(model, both, held_out)[1] < distances(model, unrepaired, held_out)[1]


def test_masked_weights_of_a_projection_stay_out_of_its_refit():
    model = zoo.build("llama", torch.float64)
    magnitude = {"target": "weights", "sparsity": 0.5, "criterion": "l1"}
    for steps in ((NEURONS, magnitude), (magnitude, NEURONS)):
        plan = make_plan(model, recipe(*steps), calibration=batches_of(model, 20))
        for name, tensor in plan.replacements.items():
            if name in plan.masks.weights:
                assert not tensor[~plan.masks.weights[name]].any()
        without, with_repair = distances(model, plan, batches_of(model, 4, seed=100))
        assert with_repair < without


@pytest.mark.parametrize(
    "steps",
    [(NEURONS, SPARSEGPT), (step("layers", sparsity=0.34, criterion="loss_change"),)],
    ids=["weights", "layers"],
)
def test_planning_leaves_the_model_as_it_was(steps):
    model = zoo.build("llama").train()
    before = snapshot(model)
    make_plan(model, recipe(*steps), calibration=batches_of(model, 3))
    assert is_as_it_was(model, before) and model.training and model.config.use_cache


@pytest.mark.parametrize(
    "steps", [(NEURONS,), (SPARSEGPT,), (step("layers", sparsity=0.34, criterion="loss_change"),)],
    ids=["neurons", "weights", "layers"],
)  # fmt: skip
def test_an_error_half_way_leaves_the_model_as_it_was(steps):
    model = zoo.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    before = snapshot(model)
    with pytest.raises(CalibrationError, match=r"not finite|is nan|is inf"):
        make_plan(model, recipe(*steps), calibration=batches_of(model, 3))
    assert is_as_it_was(model, before) and not model.training


def test_new_values_that_do_not_fit_into_the_dtype_are_refused():
    model = zoo.build("llama")
    mlp = model.model.layers[0].mlp
    with (
        torch.no_grad()
    ):  # neuron 1 is a thousandth of neuron 0, which writes a hundredfold: it would have to write 1e5
        mlp.gate_proj.weight[1] = mlp.gate_proj.weight[0]
        mlp.up_proj.weight[1:] *= 1e-3
        mlp.up_proj.weight[1] = mlp.up_proj.weight[0] * 1e-3
        mlp.down_proj.weight[:, 0] = 100.0
    plan_of = recipe(step("ffn_neurons", remove={"*.layers.0.*": [0]}))
    batches = batches_of(model, 6)
    new = make_plan(model, plan_of, calibration=batches).replacements["model.layers.0.mlp.down_proj.weight"]
    assert new.abs().max() > torch.finfo(torch.float16).max
    with pytest.raises(CalibrationError, match=r"layers\.0\.mlp\.down_proj\.weight don't fit into torch\.float16"):
        make_plan(model.half(), plan_of, calibration=batches)


def test_pruned_in_one_shot_with_repair_is_verified_and_saved(tmp_path):
    model = zoo.build("llama")
    batches = batches_of(model, 6)
    report = prune_(
        model, recipe({**NEURONS, "uniform": True}, step("layers", "linear", remove=[1])), calibration=batches
    )
    assert "refitted" in str(report)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(outputs(loaded, batches), outputs(model, batches), atol=1e-5)


# --------------------------------------------------------------------------------------------------------------
# training

TRAINED = {
    **recipe(
        {**NEURONS, "sparsity": 0.5}, step("attention_heads", sparsity=0.5), {"target": "weights", "sparsity": 0.3}
    ),
    "schedule": {"name": "cubic", "begin": 0.1, "end": 0.8, "updates": 3},
}


def test_a_schedule_of_several_updates_with_repair():
    model = zoo.build("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    data = [
        {key: torch.stack([torch.as_tensor(Tokens()[n + k][key]) for k in range(4)]) for key in Tokens()[0]}
        for n in range(0, 16, 4)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = Pruner(model, optimizer, TRAINED, n_steps=10, calibration=data)
    n_updates = 0
    for number in range(10):
        model(**data[number % 4]).loss.backward()
        optimizer.step()
        changed = pruner.step()
        optimizer.zero_grad()
        n_updates += changed
        for name, keep in masks_of(model).weights.items():
            assert not model.get_parameter(name)[~keep].any()
        structure = inspect_model(model)
        for key, keep in masks_of(model).units.items():
            gone = torch.nonzero(~keep).reshape(-1)
            for piece in structure[key].slices:
                assert not model.get_parameter(piece.name).index_select(piece.dim, piece.index(gone)).any()
        if changed:
            assert pruner.plan.replacements
    assert n_updates == 3
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    kept = masks_of(model).units
    assert all(int(keep.sum()) == len(keep) // 2 for keep in kept.values())
    report = pruner.finish()
    assert report.to_dict()["verification"]


def test_the_trainer_repairs_at_each_update(tmp_path):
    run = trainer(tmp_path, model=zoo.build("bert"), recipe=TRAINED)
    run.train()
    assert {site.n_units for site in inspect_model(run.model).of("ffn_neurons")} == {24}
    assert all(torch.isfinite(tensor).all() for tensor in run.model.state_dict().values())


def test_a_layer_that_left_at_an_earlier_update_is_not_there_when_the_next_one_scores():
    model = zoo.build("llama", torch.float64, num_hidden_layers=4)
    batches = batches_of(model, 3)
    neurons = {"target": "ffn_neurons", "sparsity": 0.25, "criterion": "activation"}
    steps = recipe(neurons, {"target": "layers", "remove": [1]})
    first = make_plan(model, steps, calibration=batches, progress=[0.0, 1.0])
    apply_(model, first)
    second = make_plan(model, steps, calibration=batches, progress=1.0, previous=first)
    without = make_plan(model, recipe(neurons), calibration=batches)  # scored as the model is now, layer 1 bypassed
    whole = make_plan(zoo.build("llama", torch.float64, num_hidden_layers=4), recipe(neurons), calibration=batches)
    assert second.steps[0].units.keys() > without.steps[0].units.keys()
    assert all(torch.equal(second.steps[0].units[key], keep) for key, keep in without.steps[0].units.items())
    assert any(not torch.equal(whole.steps[0].units[key], keep) for key, keep in without.steps[0].units.items())
