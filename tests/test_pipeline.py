"""One call prunes a model, or leaves it as it was."""

import copy

import pytest
import torch

import hf_prune
from hf_prune.apply.masks import masks_of
from hf_prune.structure import inspect_model
from hf_prune.structure.inputs import example_inputs
from tests import zoo


def calibration(model, n_batches=2):
    return [example_inputs(model, seed=seed) for seed in range(n_batches)]


def recipe(*steps):
    return {"version": 1, "prune": list(steps)}


@pytest.mark.parametrize("criterion", ["l2", "taylor", "activation"])
def test_prune_every_target_of_a_decoder(criterion, tmp_path):
    model = zoo.build("llama", torch.float64)
    batches = calibration(model)
    report = hf_prune.prune_(
        model,
        recipe(
            {"target": "layers", "sparsity": 0.34, "criterion": criterion},
            {"target": "ffn_neurons", "sparsity": 0.5, "criterion": criterion, "scope": "global", "round_to": 4},
            {"target": "attention_heads", "sparsity": 0.5, "criterion": criterion},
            {"target": "weights", "pattern": "2:4"},
        ),
        calibration=batches,
    )
    content = report.to_dict()
    assert len(model.model.layers) == 2
    assert sum(layer.mlp.up_proj.out_features for layer in model.model.layers) == 48  # half of 2 * 48
    assert content["verification"]["max_difference"] <= 1e-6
    groups = model.model.layers[0].self_attn.o_proj.weight.reshape(32, -1, 4)
    assert ((groups == 0).sum(-1) >= 2).all(), "2:4 keeps two of every four"
    assert content["totals"]["pruned"]["macs"] < content["totals"]["dense"]["macs"]
    assert "zeros make no dense kernel faster" in str(report)
    with torch.no_grad():
        expected = model(**batches[0]).logits
    model.save_pretrained(tmp_path)
    assert {"recipe.yaml", "pruning_report.json", "README.md"} <= {path.name for path in tmp_path.iterdir()}
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        assert (loaded(**batches[0]).logits - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert hf_prune.Recipe.from_pretrained(tmp_path).to_dict() == content["recipe"]


def test_make_plan_leaves_the_model_untouched_and_repeats():
    model = zoo.build("bert")
    before = copy.deepcopy(model.state_dict())
    wanted = recipe({"target": "ffn_neurons", "sparsity": 0.5}, {"target": "weights", "sparsity": 0.3})
    first, second = hf_prune.make_plan(model, wanted), hf_prune.make_plan(model, wanted)
    assert first.masks == second.masks
    assert not masks_of(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    sites = inspect_model(model).of("ffn_neurons")
    assert [int(first.masks.units[site.key].sum()) for site in sites] == [24, 24, 24]


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        ({"target": "ffn_neurons", "sparsity": 0.5, "criterion": "taylor"}, hf_prune.CalibrationError, "pass `calib"),
        ({"target": "layers", "remove": [7]}, hf_prune.RecipeError, "units 0 to 2"),
        ({"target": "layers", "remove": [0, 1, 2]}, hf_prune.RecipeError, "none of its 3 units"),
        ({"target": "ffn_neurons", "sparsity": {"parameters": 0.9}}, hf_prune.RecipeError, "can save at most"),
        ({"target": "weights", "pattern": "3:7"}, hf_prune.RecipeError, "does not divide its 32 inputs"),
        ({"target": "ffn_neurons", "sparsity": 0.5, "include": ["*.nowhere"]}, hf_prune.RecipeError, "matches no"),
        ({"target": "attention_heads", "sparsity": 0.5, "uniform": True}, hf_prune.RecipeError, "Drop `uniform`"),
    ],
)
def test_what_can_not_be_is_refused_and_changes_nothing(step, error, message):
    model = zoo.build("bert")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        hf_prune.prune_(model, recipe(step))
    assert not masks_of(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_without_the_target_is_refused():
    with pytest.raises(hf_prune.UnsupportedModelError, match="ALiBi"):
        hf_prune.prune_(zoo.build("bloom"), recipe({"target": "attention_heads", "sparsity": 0.5}))


def test_a_failed_verification_restores_the_model(monkeypatch):
    model = zoo.build("bert")
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr("hf_prune.apply.verify.TOLERANCES", dict.fromkeys([torch.float32], -1.0))
    with pytest.raises(hf_prune.VerificationError, match="differs from the masked one"):
        hf_prune.prune_(model, recipe({"target": "ffn_neurons", "sparsity": 0.5}))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("criterion", ["l1", "sparsegpt"])
def test_new_values_and_zeros_are_taken_back_after_a_failure(monkeypatch, criterion):
    model = zoo.build("llama")
    steps = [
        {"target": "ffn_neurons", "sparsity": 0.25},
        {"target": "weights", "sparsity": 0.5, "criterion": criterion},
    ]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())

    def fails(masked, *args, **kwargs):
        name = "model.layers.0.self_attn.q_proj.weight"
        assert not torch.equal(masked.get_parameter(name), before[name])
        raise hf_prune.VerificationError("no")

    monkeypatch.setattr("hf_prune.pipeline.verify_models", fails)
    with pytest.raises(hf_prune.VerificationError):
        hf_prune.prune_(model, recipe(*steps), calibration=calibration(model, 4))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(parameters[name] is value for name, value in model.named_parameters()) and not masks_of(model)


def test_uniform_sizes_load_with_plain_transformers():
    model = zoo.build("llama")
    report = hf_prune.prune_(model, recipe({"target": "ffn_neurons", "sparsity": 0.4, "uniform": True, "round_to": 8}))
    assert report.to_dict()["checkpoint"]["loads_with"] == "transformers"
    assert model.config.intermediate_size == 32  # the multiple of 8 nearest to 0.6 * 48
    assert not hasattr(model.config, "hf_prune")


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "phi3", "deberta-v2"])
def test_what_was_pruned_and_loaded_is_pruned_again(name, tmp_path):
    model = zoo.build(name, torch.float64)
    inputs = calibration(model, 1)[0]
    steps = [
        {"target": "layers", "sparsity": 0.34, "criterion": "random"},
        {"target": "attention_heads", "sparsity": 0.3, "criterion": "random"},
        {"target": "ffn_neurons", "sparsity": 0.3, "criterion": "random", "scope": "global"},
    ]
    for number in range(2):
        before = sum(parameter.numel() for parameter in model.parameters())
        hf_prune.prune_(model, recipe(*steps), calibration=[inputs])
        assert sum(parameter.numel() for parameter in model.parameters()) < before
        model.save_pretrained(tmp_path / str(number))
        loaded = type(model).from_pretrained(tmp_path / str(number), dtype=torch.float64)
        with torch.no_grad():
            expected, actual = model(**inputs)[0], loaded(**inputs)[0]
        assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()
        model = loaded
