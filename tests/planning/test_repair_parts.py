"""least_squares after dropped parts of layers: what it may touch, and that it brings the outputs nearer to the dense model's."""

import copy

import pytest
import torch

import hf_prune
from hf_prune.structure import inspect_model
from hf_prune.structure.inputs import example_inputs
from tests import zoo


# what writes to the hidden states beside and behind block 1's attention, then beside and behind its feed-forward
BEHIND = {
    "llama": (
        {"1.mlp.down_proj", "2.self_attn.o_proj", "2.mlp.down_proj"},
        {"1.self_attn.o_proj", "2.self_attn.o_proj", "2.mlp.down_proj"},
    ),
    "bert": (
        {"1.output.dense", "2.attention.output.dense", "2.output.dense"},
        {"1.attention.output.dense", "2.attention.output.dense", "2.output.dense"},
    ),
    "gpt_neox": (
        {"1.mlp.dense_4h_to_h", "2.attention.dense", "2.mlp.dense_4h_to_h"},
        {"1.attention.dense", "2.attention.dense", "2.mlp.dense_4h_to_h"},
    ),
}


@pytest.mark.parametrize("part", ["attention", "feed_forward"])
@pytest.mark.parametrize("name", BEHIND)
def test_the_projections_beside_and_behind_are_refitted(name, part):
    model = zoo.build(name, torch.float64)
    stack = inspect_model(model).of("layers", part)[0].name
    batches = [example_inputs(model, batch_size=8, length=32, seed=seed) for seed in range(6)]

    def pruned(compensation):
        twin = copy.deepcopy(model)
        step = {"target": "layers", "part": part, "remove": [1], "compensation": compensation}
        plan = hf_prune.make_plan(twin, {"version": 1, "prune": [step]}, calibration=batches)
        hf_prune.apply_(twin, plan)
        return twin, plan

    def lost(twin):
        with torch.no_grad():
            return sum((twin(**inputs).logits - model(**inputs).logits).square().sum().item() for inputs in batches)

    (without, _), (repaired, plan) = pruned("none"), pruned("least_squares")
    touched = {replaced.rpartition(".")[0].removeprefix(f"{stack}.") for replaced in plan.replacements}
    assert touched and touched <= BEHIND[name][part == "feed_forward"]
    assert any(end.startswith("2.") for end in touched), "behind the block as well"
    assert lost(repaired) < 0.8 * lost(without)
