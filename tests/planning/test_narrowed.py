"""While a block learns it holds only the neurons that stay: it puts out the same, and ends with all of its sizes."""

from contextlib import nullcontext

import pytest
import torch

import hf_prune
from hf_prune.planning.scratch import masked_copy, masked_within, narrowed
from hf_prune.structure import inspect_model
from tests import zoo
from tests.planning.test_repair import batches_of, recipe, step


BLOCKS = {
    "llama": "model.layers.1",
    "bert": "encoder.layer.1",
    "gpt2": "transformer.h.1",  # Conv1D, whose weights lie the other way round
    "t5": "encoder.block.1",
    "phi3": "model.layers.1",  # gate and up in one
}
RECONSTRUCT = {"name": "reconstruct", "epochs": 2, "learning_rate": 0.002}


def sizes(block):
    """What modules say of their own widths."""
    numbers = ("in_features", "nf", "nx", "intermediate_size")
    return [vars(module).get(number) for module in block.modules() for number in numbers]


def of(name):
    """A model, its structure, its masks and the name of a block."""
    model = zoo.build(name, torch.float64)
    names = dict(model.named_modules())
    block = next(each for each in names if each.endswith(BLOCKS[name]))
    plan = hf_prune.make_plan(model, recipe(step("ffn_neurons", "none", 0.5), step("attention_heads", "none", 0.5)))
    return model, inspect_model(model), plan.masks, block


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_what_is_kept_is_slices_of_its_weights_and_goes_back_to_its_places(name):
    model, structure, masks, block = of(name)
    copied = masked_copy(model, structure, masks, block, {})
    before = {key: tensor.clone() for key, tensor in copied.state_dict().items()}
    said = sizes(copied)
    (site,) = [site for site in structure.of("ffn_neurons") if site.name.startswith(block)]
    keep = masks.units[site.key]
    neurons = {piece.name.removeprefix(f"{block}.") for piece in site.slices}
    with narrowed(copied, structure, masks, block) as masked:
        left = {entry.name.removeprefix(f"{block}.") for entry, _ in masked}
        assert left and not left & neurons, "heads are masked still, neurons have left"
        for key in neurons:
            assert copied.get_parameter(key).numel() * len(keep) == before[key].numel() * int(keep.sum())
            copied.get_parameter(key).add_(1)
    after = copied.state_dict()
    assert after.keys() == before.keys()
    entries = {
        entry.name.removeprefix(f"{block}."): entry for entry, _ in masked_within(copied, structure, masks, block)
    }
    for key, tensor in before.items():
        if key in neurons:
            assert not entries[key].values(after[key]).any()
            tensor = tensor + 1
            entries[key].zero_(tensor)
        assert torch.equal(after[key], tensor), key
    assert sizes(copied) == said


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_learned_is_what_is_learned_with_zeros(name, monkeypatch):
    steps = recipe(step("ffn_neurons", RECONSTRUCT, 0.5))
    model = zoo.build(name, torch.float64)
    found = hf_prune.make_plan(model, steps, calibration=batches_of(model)).replacements
    monkeypatch.setattr("hf_prune.planning.repair.narrowed", lambda *args: nullcontext(masked_within(*args)))
    with_zeros = hf_prune.make_plan(model, steps, calibration=batches_of(model)).replacements
    assert found.keys() == with_zeros.keys() and any(key.endswith("weight") for key in found)
    for key, values in found.items():
        assert torch.allclose(values, with_zeros[key], rtol=1e-6, atol=1e-9), key


@torch.no_grad()
def test_neurons_whose_weights_are_masked_singly_too_stay():
    model, structure, masks, block = of("llama")
    name = f"{block}.mlp.up_proj.weight"
    masks.weights[name] = torch.rand(model.get_parameter(name).shape) < 0.5
    copied = masked_copy(model, structure, masks, block, {})
    before = copied.mlp.up_proj.weight.shape
    with narrowed(copied, structure, masks, block) as masked:
        assert copied.mlp.up_proj.weight.shape == before
        assert name in {entry.name for entry, _ in masked}
