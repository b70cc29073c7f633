"""Repairs that add biases: where the stock config can say them the checkpoint is stock, else the manifest does."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_prune
from hf_prune.apply.masks import masks_of
from hf_prune.errors import CheckpointError, PruneError, RecipeError, VerificationError
from hf_prune.plan import PruningPlan
from hf_prune.structure import inspect_model
from tests import zoo
from tests.planning.test_repair import batches_of, distances, outputs, recipe, step
from tests.processes import python


ADD = {"name": "bias", "add": True}


def biases(model):
    return {name: value.detach() for name, value in model.named_parameters() if name.endswith(".bias")}


def test_a_new_bias_is_the_mean_of_what_left():
    model = zoo.build("llama", torch.float64)
    site = inspect_model(model).of("ffn_neurons")[0]
    batches = batches_of(model, 6)
    plan = hf_prune.make_plan(
        model, recipe(step("ffn_neurons", ADD, 0.5, include=[f"{site.name}*"])), calibration=batches
    )
    assert list(plan.replacements) == plan.added == [f"{site.name}.down_proj.bias"]
    assert not biases(model), "the plan changed the model"
    seen = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    outputs(model, batches)
    handle.remove()
    weight = model.model.layers[0].mlp.down_proj.weight.detach()
    gone = torch.nonzero(~plan.masks.units[site.key]).reshape(-1).tolist()
    lost, n_tokens = torch.zeros(32, dtype=torch.float64), 0
    for x in torch.cat([x.reshape(-1, 48) for x in seen]):
        n_tokens += 1
        for j in gone:
            lost += x[j] * weight[:, j]
    assert torch.allclose(plan.replacements[plan.added[0]], lost / n_tokens, atol=1e-10)


@pytest.mark.parametrize("compensation", [ADD, {"name": "least_squares", "add": True}])
def test_a_new_bias_brings_the_model_nearer(compensation):
    model = zoo.build("llama", torch.float64)
    with torch.no_grad():  # neurons that are never zero on average: there is a mean to make up for
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.mul_(3)
    plan = hf_prune.make_plan(model, recipe(step("ffn_neurons", compensation, 0.5)), calibration=batches_of(model))
    without, with_repair = distances(model, plan, batches_of(model, 2, seed=100))
    assert with_repair < without


STOCK = {
    "ffn_neurons": {"intermediate_size": 24, "mlp_bias": True},
    "attention_heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "attention_bias": True},
}


@pytest.mark.parametrize("target", STOCK)
def test_what_the_stock_config_can_say_is_a_stock_checkpoint(target, tmp_path):
    model = zoo.build("llama")
    batches = batches_of(model, 5)
    report = hf_prune.prune_(model, recipe(step(target, ADD, 0.5, uniform=True)), calibration=batches)
    assert report.content["checkpoint"]["loads_with"] == "transformers"
    assert "biases of zeros" in report.content["checkpoint"]["why"]
    expected = outputs(model, batches)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "hf_prune" not in config and "auto_map" not in config
    assert {name: config[name] for name in STOCK[target]} == STOCK[target]
    # by Transformers alone
    program = f"""
import sys, torch
sys.modules["hf_prune"] = None
from transformers import LlamaForCausalLM
model, info = LlamaForCausalLM.from_pretrained({str(tmp_path)!r}, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
torch.save(model.state_dict(), {str(tmp_path / "state.pt")!r})
"""
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    stock = LlamaForCausalLM(type(model.config).from_pretrained(tmp_path)).eval()
    stock.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(outputs(stock, batches), expected)


def test_the_zeros_that_a_config_asks_for_are_zeros():
    model = zoo.build("llama")
    half = list(range(24))
    repaired = step("ffn_neurons", ADD, remove={"*.0.*": half, "*.2.*": half})
    plain = step("ffn_neurons", "none", remove={"*.1.*": half})
    report = hf_prune.prune_(model, recipe(repaired, plain), calibration=batches_of(model, 5))
    assert report.content["checkpoint"]["loads_with"] == "transformers"
    found = biases(model)
    assert len(found) == 9
    for name, bias in found.items():
        is_new = name.endswith("down_proj.bias") and ".1." not in name
        assert bool(bias.any()) == is_new, name


@pytest.mark.parametrize(
    ("name", "more"),
    [("llama", {"scope": "global"}), ("mistral", {"uniform": True}), ("qwen2", {"scope": "global"})],
)
def test_else_the_manifest_says_which_modules_have_one(name, more, tmp_path):
    model = zoo.build(name)
    batches = batches_of(model, 5)
    report = hf_prune.prune_(model, recipe(step("ffn_neurons", ADD, 0.5, **more)), calibration=batches)
    assert report.content["checkpoint"]["loads_with"] == "hf_prune"
    expected = outputs(model, batches)
    model.save_pretrained(tmp_path / "one")
    manifest = json.loads((tmp_path / "one" / "config.json").read_text())["hf_prune"]
    added = {path for path, entry in manifest["modules"].items() if "bias" in entry.get("tensors", {})}
    assert added == {f"model.layers.{number}.mlp.down_proj" for number in range(3)}
    for folder in ("one", "two"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(outputs(loaded, batches), expected)
        if folder == "one":
            loaded.save_pretrained(tmp_path / "two")
            # a second pruning starts from the biases that are there
            again = hf_prune.prune_(
                loaded, recipe(step("ffn_neurons", "bias", 0.25, scope="global")), calibration=batches
            )
            assert again.content["checkpoint"]["loads_with"] == "hf_prune" and len(biases(loaded)) >= 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda entry: entry["tensors"].update(bias=[10**9]), r"bias has size \[1000000000\]; expected \[32\]"),
        (lambda entry: entry["tensors"].update(bias=[31]), r"expected \[32\], one for each output"),
        (lambda entry: entry["tensors"].update(bias=[32, 1]), "one for each output"),
        (lambda entry: entry["tensors"].update(bias=[]), "one for each output"),
        (lambda entry: entry["tensors"].update(bias=32), "one for each output"),
        (lambda entry: entry["tensors"].update(bias=[True]), "one for each output"),
        (lambda entry: entry["tensors"].update(weight=[True, 24], bias=[True]), "positive integers"),
        (lambda entry: entry["tensors"].update(weight="x"), "positive integers"),
        (lambda entry: entry["tensors"].update(weight=[], bias=[]), "positive integers"),
        (lambda entry: entry["tensors"].update(scale=[32]), "no such tensor"),
    ],
)
def test_a_bad_bias_is_refused(damage, message, tmp_path):
    model = zoo.build("llama")
    hf_prune.prune_(model, recipe(step("ffn_neurons", ADD, 0.5, scope="global")), calibration=batches_of(model, 2))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    damage(config["hf_prune"]["modules"]["model.layers.0.mlp.down_proj"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_module_that_is_no_linear_layer_gets_none(tmp_path):
    model = zoo.build("llama")
    hf_prune.prune_(model, recipe(step("ffn_neurons", ADD, 0.5, scope="global")), calibration=batches_of(model, 2))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["hf_prune"]["modules"]["model.norm"] = {"tensors": {"bias": [32]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no such tensor"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------------------------
# the plan as data, and what happens when things fail


def test_a_plan_with_new_biases_is_saved_loaded_and_applied_twice(tmp_path):
    model = zoo.build("llama")
    batches = batches_of(model, 3)
    plan = hf_prune.make_plan(model, recipe(step("ffn_neurons", ADD, 0.5)), calibration=batches)
    plan.save(tmp_path)
    loaded = PruningPlan.load(tmp_path)
    assert loaded.added == plan.added and loaded.to_dict() == plan.to_dict()
    other = copy.deepcopy(model)
    hf_prune.apply_(model, plan)
    for _ in range(2):
        hf_prune.apply_(other, loaded)
    assert biases(model).keys() == set(plan.added)
    assert torch.equal(outputs(model, batches), outputs(other, batches))


def test_a_plan_from_before_new_biases_loads(tmp_path):
    PruningPlan([]).save(tmp_path)
    assert "added" not in json.loads((tmp_path / "pruning_plan.json").read_text())
    assert PruningPlan.load(tmp_path).added == []


def test_a_bias_that_the_plan_does_not_add_is_not_made():
    model = zoo.build("llama")
    plan = hf_prune.make_plan(model, recipe(step("ffn_neurons", ADD, 0.5)), calibration=batches_of(model, 2))
    plan.added.pop()
    with pytest.raises(PruneError, match=r"replaces model\.layers\.2\.mlp\.down_proj\.bias \(32,\), which this model"):
        hf_prune.apply_(model, plan)
    assert not biases(model) and not masks_of(model)


def test_after_a_failure_the_model_is_as_it_was(monkeypatch):
    model = zoo.build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fails(*args, **kwargs):
        raise VerificationError("no")

    monkeypatch.setattr("hf_prune.pipeline.verify_models", fails)
    with pytest.raises(VerificationError):
        hf_prune.prune_(model, recipe(step("ffn_neurons", ADD, 0.5)), calibration=batches_of(model, 2))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not masks_of(model) and not model.config.mlp_bias


def test_steps_that_follow_start_from_a_new_bias():
    """A repair before SparseGPT makes the bias; the one after it finds it there."""
    model = zoo.build("llama")
    steps = [
        step("ffn_neurons", ADD, 0.25),
        {"target": "weights", "sparsity": 0.5, "criterion": "sparsegpt", "include": ["*.mlp.*"]},
        step("attention_heads", {"name": "bias", "add": True}, 0.5),
    ]
    plan = hf_prune.make_plan(model, recipe(*steps), calibration=batches_of(model, 4))
    assert sorted(plan.added) == sorted(name for name in plan.replacements if name.endswith(".bias"))
    assert len(plan.added) == len(set(plan.added)) == 6
    hf_prune.apply_(model, plan)


def test_training_refuses_new_parameters(tmp_path):
    model = zoo.build("llama")
    wanted = recipe(step("ffn_neurons", "none"), step("ffn_neurons", ADD))
    with pytest.raises(RecipeError, match=r"prune\.1\.compensation: add makes new biases, which the optimizer"):
        hf_prune.Pruner(model, torch.optim.SGD(model.parameters(), 0.1), wanted, n_steps=4)
    with pytest.raises(RecipeError, match="prune in one shot"):
        hf_prune.PruningTrainer(model=model, recipe=wanted)
