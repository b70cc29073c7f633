"""Wrong removals are caught, and the model is then as it was, down to its parameter objects."""

import copy

import pytest
import torch

import hf_prune
from hf_prune.apply import shrink
from hf_prune.apply.masks import masks_of, set_masks
from hf_prune.apply.verify import verify
from hf_prune.pipeline import apply_, finish_
from hf_prune.plan import KeepMasks
from hf_prune.planning import make_plan
from hf_prune.structure import inspect_model
from hf_prune.structure.inputs import example_inputs
from tests import zoo


STEPS = {
    "ffn_neurons": {"target": "ffn_neurons", "sparsity": 0.5},
    "attention_heads": {"target": "attention_heads", "sparsity": 0.5},
    "layers": {"target": "layers", "remove": [1]},
    "t5 layers": {"target": "layers", "remove": {"encoder.block": [0]}},
}


def recipe(target):
    return {"version": 1, "prune": [STEPS[target]]}


@torch.no_grad()
def roll_(weight, dim=0):
    weight.copy_(weight.roll(1, dim))


# what a faulty removal may leave: (model, target, what is wrong with the smaller model)
FAULTS = {
    "a projection that doesn't fit": (
        "llama",
        "attention_heads",
        lambda m: setattr(m.model.layers[1].self_attn, "o_proj", torch.nn.Linear(5, 32)),
    ),
    "rows of other neurons": (
        "bert",
        "ffn_neurons",
        lambda m: roll_(m.bert.encoder.layer[1].intermediate.dense.weight),
    ),
    "columns of others": ("llama", "ffn_neurons", lambda m: roll_(m.model.layers[2].mlp.down_proj.weight, 1)),
    "rows of other heads": ("llama", "attention_heads", lambda m: roll_(m.model.layers[0].self_attn.k_proj.weight)),
    "a part of a fused projection": ("gpt2", "attention_heads", lambda m: roll_(m.transformer.h[0].attn.c_attn.bias)),
    "another block": ("llama", "layers", lambda m: m.model.layers.__setitem__(1, copy.deepcopy(m.model.layers[0]))),
    "T5's position bias": (
        "t5",
        "t5 layers",
        lambda m: [
            roll_(each.relative_attention_bias.weight, 1)
            for each in m.encoder.modules()
            if hasattr(each, "relative_attention_bias")
        ],
    ),
    "the scale of a folded norm": (
        "olmo2",
        "attention_heads",
        lambda m: m.model.layers[0].self_attn.k_norm.weight.data.mul_(1.1),
    ),
    "a number beside the tensors": (
        "qwen3",
        "attention_heads",
        lambda m: setattr(m.model.layers[1].self_attn, "scaling", 0.3),
    ),
}


def spoil(monkeypatch, fault):
    """Every removal from now on makes the fault."""
    removed = shrink.remove_masked_

    def wrong(model, *args, **kwargs):
        record = removed(model, *args, **kwargs)
        FAULTS[fault][2](model)
        return record

    monkeypatch.setattr("hf_prune.pipeline.remove_masked_", wrong)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_removal_is_caught_and_undone(fault, monkeypatch):
    name, target, _ = FAULTS[fault]
    model = zoo.build(name).train()
    next(model.children()).eval()
    objects, values = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    config, flags = model.config.to_dict(), [module.training for module in model.modules()]
    spoil(monkeypatch, fault)
    with pytest.raises(hf_prune.VerificationError):
        hf_prune.prune_(model, recipe(target))
    assert not masks_of(model)
    found = dict(model.named_parameters())
    assert found.keys() == objects.keys()
    assert all(found[key] is objects[key] for key in objects), "an optimizer would hold other parameters"
    assert all(torch.equal(values[key], value) for key, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize("fault", FAULTS)
def test_in_a_loop_the_masked_model_stays(fault, monkeypatch):
    name, target, _ = FAULTS[fault]
    model = zoo.build(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = hf_prune.Pruner(model, optimizer, {**recipe(target), "schedule": {"name": "one_shot"}}, n_steps=1)
    pruner.step()
    masks, values = masks_of(model), copy.deepcopy(model.state_dict())
    assert masks
    spoil(monkeypatch, fault)
    with pytest.raises(hf_prune.VerificationError):
        pruner.finish()
    assert masks_of(model) == masks
    assert all(torch.equal(values[key], value) for key, value in model.state_dict().items())
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert all(id(parameter) in held for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "gpt2"])
def test_half_precision_passes_and_is_told(name, dtype):
    model = zoo.build(name, dtype)
    targets = [STEPS["ffn_neurons"], STEPS["attention_heads"]]
    report = hf_prune.prune_(model, {"version": 1, "prune": targets}).to_dict()["verification"]
    assert report["dtype"] == str(dtype).removeprefix("torch.")
    assert report["max_difference"] <= report["tolerance"] == 5e-2
    assert report["site_difference"] <= 1e-5
    assert report["inputs"] == "generated"
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("fault", ["rows of other neurons", "rows of other heads"])
def test_half_precision_does_not_hide_a_wrong_removal(fault, monkeypatch):
    name, target, _ = FAULTS[fault]
    model = zoo.build(name, torch.bfloat16)
    spoil(monkeypatch, fault)
    with pytest.raises(hf_prune.VerificationError):
        hf_prune.prune_(model, recipe(target))


def test_a_small_error_in_one_site_is_caught_where_the_whole_would_hide_it():
    """A thousandth of one neuron's column: below what the logits show in bfloat16, above 1e-5 of the site's output."""
    model = zoo.build("bert", torch.bfloat16)
    apply_(model, make_plan(model, recipe("ffn_neurons")))
    smaller, structure = copy.deepcopy(model), inspect_model(model)
    record = shrink.remove_masked_(smaller)
    batches = [example_inputs(model)]
    verify(model, smaller, structure, record, batches, "generated")
    with torch.no_grad():
        smaller.bert.encoder.layer[1].output.dense.weight[0, 0] += 0.02
    with pytest.raises(hf_prune.VerificationError, match=r"layer\.1.* relative L2"):
        verify(model, smaller, structure, record, batches, "generated")


def test_where_the_inputs_come_from_is_said():
    batches = [example_inputs(zoo.build("bert"), seed=seed) for seed in range(2)]
    report = hf_prune.prune_(zoo.build("bert"), recipe("ffn_neurons"), calibration=batches).to_dict()
    assert report["verification"]["inputs"] == "calibration" and report["verification"]["n_batches"] == 2
    model = zoo.build("bert")
    apply_(model, make_plan(model, recipe("ffn_neurons")))
    report = finish_(model, recipe("ffn_neurons"), batches=iter(batches), inputs="evaluation").to_dict()
    assert report["verification"]["inputs"] == "evaluation"
    report = hf_prune.prune_(zoo.build("bert"), recipe("ffn_neurons"), verify=False).to_dict()
    assert report["verification"] is None
    assert any("not verified" in note for note in report["notes"])


def test_outputs_that_are_not_finite_are_no_proof():
    model = zoo.build("bert")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.fill_(float("nan"))
    with pytest.raises(hf_prune.VerificationError):
        hf_prune.prune_(model, recipe("ffn_neurons"))


def test_what_a_model_remembers_of_earlier_inputs_is_forgotten():
    """OmDet-Turbo keeps the embeddings of texts that it has seen, which weights went into that have left since."""

    class LRUCache:
        def __init__(self):
            self.cache = {"a text": torch.ones(3)}

    model = zoo.build("llama")
    model.model.remembered = LRUCache()
    set_masks(model, KeepMasks(units={"layers:model.layers": torch.tensor([True, False, True])}))
    assert not model.model.remembered.cache
