"""A plan is data: saved, loaded and applied elsewhere it does what it would have done here."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_prune
from hf_prune.apply.masks import masks_of
from hf_prune.errors import CheckpointError, PruneError
from hf_prune.plan import MASKS, PLAIN, REPLACEMENTS, KeepMasks, PruningPlan
from hf_prune.structure.inputs import example_inputs
from hf_prune.training.state import load_state, save_state
from tests import zoo


RECIPE = {
    "version": 1,
    "prune": [
        {"target": "layers", "remove": [1]},
        {"target": "ffn_neurons", "sparsity": 0.5, "criterion": "activation", "scope": "global"},
        {"target": "attention_heads", "sparsity": 0.25},
        {"target": "weights", "sparsity": 0.4},
    ],
}


@pytest.fixture
def planned():
    model = zoo.build("bert")
    return model, hf_prune.make_plan(model, RECIPE, calibration=[example_inputs(model)])


def test_a_loaded_plan_does_what_the_original_does(planned, tmp_path):
    model, plan = planned
    plan.replacements = {"bert.pooler.dense.weight": torch.randn(32, 32)}
    plan.save(tmp_path / "plan")
    loaded = PruningPlan.load(tmp_path / "plan")
    assert loaded.steps == plan.steps and loaded.base == plan.base
    assert loaded.to_dict() == plan.to_dict() and loaded.recipe == hf_prune.Recipe.from_dict(RECIPE).to_dict()
    other = copy.deepcopy(model)
    hf_prune.apply_(model, plan)
    hf_prune.apply_(other, loaded)
    assert masks_of(other) == masks_of(model) and masks_of(model)
    weights = other.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    replaced = plan.replacements["bert.pooler.dense.weight"] * plan.masks.weights["bert.pooler.dense.weight"]
    assert torch.equal(weights["bert.pooler.dense.weight"], replaced)


def test_the_plain_part_is_json_that_counts_what_is_kept(planned, tmp_path):
    _, plan = planned
    plan.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {PLAIN, MASKS}
    plain = json.loads((tmp_path / PLAIN).read_text())
    assert (plain["format"], plain["version"], plain["model"]["class"]) == (
        "hf_prune.plan",
        1,
        "BertForSequenceClassification",
    )
    assert plain["steps"][0] == {"layers:bert.encoder.layer": {"of": 3, "kept": 2}}
    assert sum(site["kept"] for site in plain["steps"][1].values()) == 48  # half of the 2 × 48 in kept layers
    assert all(mask.dtype == torch.bool for mask in load_file(tmp_path / MASKS).values())


def test_masks_that_share_memory_are_saved_each(tmp_path):
    keep = torch.tensor([True, False, True])
    PruningPlan([KeepMasks(units={"a|b": keep, "c": keep})], base=KeepMasks(weights={"w": keep})).save(tmp_path)
    loaded = PruningPlan.load(tmp_path)
    assert loaded.masks == KeepMasks(units={"a|b": keep, "c": keep}, weights={"w": keep})


def test_a_resumed_run_still_has_to_say_what_the_plan_noted(planned, tmp_path):
    model, plan = planned
    plan.notes, plan.n_near_ties = ["rounding could not be met"], 3
    pruner = hf_prune.Pruner(model, torch.optim.SGD(model.parameters(), 0.1), RECIPE, n_steps=4, calibration=[])
    pruner.plan, pruner.n_done = plan, 2
    save_state(pruner.state_dict(), tmp_path)
    again = hf_prune.Pruner(model, torch.optim.SGD(model.parameters(), 0.1), RECIPE, n_steps=4, calibration=[])
    again.load_state_dict(load_state(tmp_path))
    assert (again.plan.notes, again.plan.n_near_ties, again.n_done) == (plan.notes, 3, 2)
    assert again.plan.masks == plan.masks == masks_of(model)


def test_near_ties_of_earlier_updates_count_too(planned):
    model, _ = planned
    batches = [example_inputs(model)]
    first = hf_prune.make_plan(model, RECIPE, calibration=batches, progress=0.5)
    second = hf_prune.make_plan(model, RECIPE, calibration=batches, previous=first)
    first.n_near_ties += 1000
    later = hf_prune.make_plan(model, RECIPE, calibration=batches, previous=first)
    assert later.n_near_ties == second.n_near_ties + 1000 and later.steps == second.steps


@pytest.mark.parametrize("name", ["pruning_state.json", "pruning_state.safetensors"])
def test_a_pruners_damaged_state_is_refused(planned, tmp_path, name):
    _, plan = planned
    save_state({"n_done": 2, "recipe": plan.recipe, "plan": plan.to_dict(), "tensors": plan.mask_tensors()}, tmp_path)
    _cut(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        load_state(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"no {name}|there is no .*{name}"):
        load_state(tmp_path)


def test_saving_again_replaces_the_plan_as_a_whole(planned, tmp_path):
    _, plan = planned
    plan.replacements = {"bert.pooler.dense.weight": torch.zeros(32, 32)}
    plan.save(tmp_path)
    plan.replacements = {}
    plan.save(tmp_path)
    assert not PruningPlan.load(tmp_path).replacements, "the file of an earlier plan was read"


def test_another_model_is_refused_before_anything_changes(planned):
    model, plan = planned
    wider = zoo.build("bert", hidden_size=64)  # as many layers, heads and neurons
    before = copy.deepcopy(wider.state_dict())
    with pytest.raises(PruneError, match=r"BertForSequenceClassification whose .*query\.weight is \[32, 32\]"):
        hf_prune.apply_(wider, plan)
    with pytest.raises(PruneError, match="not here, in LlamaForCausalLM"):
        hf_prune.apply_(zoo.build("llama"), plan)
    assert not masks_of(wider) and all(torch.equal(before[name], value) for name, value in wider.state_dict().items())
    hf_prune.apply_(model, plan)
    hf_prune.shrink_(model)
    with pytest.raises(PruneError, match="before that is shrunk"):
        hf_prune.apply_(model, plan)


def test_another_number_of_labels_is_no_other_model(planned):
    _, plan = planned
    model = zoo.build("bert", num_labels=7)
    hf_prune.apply_(model, plan)
    assert masks_of(model) == plan.masks


def _cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _other_masks(path):
    save_file({name: ~keep for name, keep in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (PLAIN, _cut, "damaged"),
        (PLAIN, lambda path: path.write_text("[1]"), "damaged"),
        (PLAIN, lambda path: path.unlink(), "there is no .*pruning_plan.json"),
        (PLAIN, lambda path: _edit(path, version=2), "version 2; this reads 1. Upgrade hf_prune"),
        (PLAIN, lambda path: _edit(path, version="1"), "damaged"),
        (PLAIN, lambda path: _edit(path, format="other"), "expected 'hf_prune.plan'"),
        (PLAIN, lambda path: _edit(path, steps=[]), "damaged"),
        (PLAIN, lambda path: _edit(path, base={"layers:x": {"of": 3, "kept": 2}}), "others than it describes"),
        (PLAIN, lambda path: _edit(path, files={}), "damaged"),
        (MASKS, _cut, "pruning_plan.safetensors is damaged"),
        (MASKS, _other_masks, "isn't the one"),
        (MASKS, lambda path: path.unlink(), "there is no .*pruning_plan.safetensors"),
        (REPLACEMENTS, _cut, "pruning_replacements.safetensors is damaged"),
    ],
)
def test_what_is_damaged_or_newer_is_refused(planned, tmp_path, file, damage, message):
    _, plan = planned
    plan.replacements = {"bert.pooler.dense.weight": torch.zeros(32, 32)}
    plan.save(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(CheckpointError, match=message):
        PruningPlan.load(tmp_path)


def test_masks_of_another_dtype_are_refused(tmp_path):
    PruningPlan([KeepMasks(units={"a": torch.ones(3)})]).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"the mask 0\|units\|a is torch.float32"):
        PruningPlan.load(tmp_path)


def test_what_can_not_be_written_says_so_and_leaves_no_part(planned, tmp_path, monkeypatch):
    _, plan = planned
    plan.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(CheckpointError, match="No space left"):
        plan.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
