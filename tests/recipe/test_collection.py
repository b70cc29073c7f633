"""Each recipe of the collection does what its description says on a small model of the family in its name."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageClassification

import hf_prune
from hf_prune.recipe import Recipe
from hf_prune.recipe.shipped import shipped_recipes
from hf_prune.structure.inputs import example_inputs
from tests import zoo


# the longest prefix of a recipe's name decides
FAMILIES = {"encoder": "bert", "encoder-decoder": "t5", "vision": "vit", "speech": "whisper"}
COLLECTION = [name for name in shipped_recipes() if name.startswith(tuple(FAMILIES))]


def small(name):
    family = FAMILIES[max((prefix for prefix in FAMILIES if name.startswith(prefix)), key=len)]
    model = zoo.build(family)
    if family == "vit":
        torch.manual_seed(0)
        model = AutoModelForImageClassification.from_config(model.config)
    return model.eval()


def outputs(model, inputs):
    with torch.no_grad():
        return model(**{key: value for key, value in inputs.items() if key != "labels"})[0]


@pytest.mark.parametrize("name", COLLECTION)
def test_it_prunes_its_family_as_much_as_it_says_and_loads_again(name, tmp_path):
    recipe, model = Recipe.from_yaml(shipped_recipes()[name]), small(name)
    inputs = example_inputs(model, batch_size=2)
    labels = torch.tensor([0, 1])
    batches = [inputs if "decoder_input_ids" in inputs else {**inputs, "labels": labels}]
    found = hf_prune.prune_(model, recipe, calibration=batches).to_dict()
    for step in recipe.prune:
        sites = [site for site in found["sites"] if site["target"] == step.target]
        n_units = len(found["weights"]) if step.target == "weights" else sum(site["n_units"] for site in sites)
        # half a unit of each site, and what rounding to multiples may add
        slack = (len(sites) * (0.5 + step.round_to / 2) + 0.5) / n_units if sites else 1e-3
        assert found["sparsity"][step.target] == pytest.approx(step.sparsity, abs=slack)
    totals = found["totals"]
    only_zeros = {step.target for step in recipe.prune} == {"weights"}
    assert (totals["pruned"]["parameters"] < totals["dense"]["parameters"]) is not only_zeros
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path).eval(), inputs), outputs(model, inputs))


@pytest.mark.parametrize("name", COLLECTION)
def test_its_head_is_the_command_that_runs_it(name):
    head = shipped_recipes()[name].read_text().split("version: 1")[0]
    assert head.startswith("# python ") and name in head.splitlines()[0] + head.splitlines()[1]
