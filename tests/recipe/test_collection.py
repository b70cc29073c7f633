"""Each recipe of the collection does what its description says on a small model of the family in its name."""

from __future__ import annotations

import re
import shlex

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
)

import hf_prune
from hf_prune.recipe import Recipe
from hf_prune.recipe.shipped import shipped_recipes
from hf_prune.structure.inputs import example_inputs
from scripts.pages import recipe_head
from tests import zoo


# the longest prefix of a recipe's name decides
FAMILIES = {
    "encoder": ("bert", AutoModelForSequenceClassification),
    "decoder": ("llama", AutoModelForCausalLM),
    "encoder-decoder": ("t5", AutoModelForSeq2SeqLM),
    "llm": ("llama", AutoModelForCausalLM),
    "vision": ("vit", AutoModelForImageClassification),
    "speech": ("whisper", AutoModelForSpeechSeq2Seq),
}
# what a family's recipes are for; a purpose that a family lacks is a gap in the collection
PURPOSES = {
    "encoder": {"gentle", "half", "aggressive", "heads", "layers", "weights", "mixed"},
    "decoder": {"gentle", "half", "aggressive", "heads"},
    "encoder-decoder": {"gentle", "half-neurons", "aggressive"},
    "llm": {"neurons", "drop-layers", "half-weights", "2-4"},
    "vision": {"gentle", "half", "aggressive", "heads", "layers"},
    "speech": {"gentle", "half"},
}
COLLECTION = [name for name in shipped_recipes() if name.startswith(tuple(f"{family}-" for family in FAMILIES))]


def small(name):
    family = max((family for family in FAMILIES if name.startswith(f"{family}-")), key=len)
    model_type, auto = FAMILIES[family]
    torch.manual_seed(0)
    return auto.from_config(zoo.build(model_type).config).eval()


def with_labels(model, inputs):
    """What a step of training would be handed: classes of samples, or the tokens to be written."""
    if "decoder_input_ids" in inputs:
        return {**inputs, "labels": inputs["decoder_input_ids"]}
    return {**inputs, "labels": inputs["input_ids"] if model.can_generate() else torch.tensor([0, 1])}


def outputs(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def slack(found, step):
    """Half a unit of each site and what rounding to multiples may add, as a share of all units."""
    if step.target == "weights":
        return 1e-3
    sites = [site for site in found["sites"] if site["target"] == step.target]
    return (len(sites) * (0.5 + step.round_to / 2) + 0.5) / sum(site["n_units"] for site in sites)


@pytest.mark.parametrize("name", COLLECTION)
def test_it_prunes_its_family_as_much_as_it_says_and_loads_again(name, tmp_path):
    recipe, model = Recipe.from_yaml(shipped_recipes()[name]), small(name)
    inputs = example_inputs(model, batch_size=2)
    found = hf_prune.prune_(model, recipe, calibration=[with_labels(model, inputs)] * 2).to_dict()
    for step in recipe.prune:
        if isinstance(step.sparsity, float) and step.part == "block":
            assert found["sparsity"][step.target] == pytest.approx(step.sparsity, abs=slack(found, step))
    only_zeros = {step.target for step in recipe.prune} == {"weights"}
    totals = found["totals"]
    assert (totals["pruned"]["parameters"] < totals["dense"]["parameters"]) is not only_zeros
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path).eval(), inputs), outputs(model, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_a_recipe_for_each_purpose(family):
    assert {f"{family}-{purpose}" for purpose in PURPOSES[family]} <= set(COLLECTION)


@pytest.mark.parametrize("name", COLLECTION)
def test_its_head_is_a_command_that_runs_it_and_says_for_whom_and_what_it_costs(name):
    command, said = recipe_head(shipped_recipes()[name])
    assert command.startswith(("python ", "hf-prune run ")) and name in command
    assert said


ONE_LINERS = [name for name in COLLECTION if recipe_head(shipped_recipes()[name])[0].startswith("python -c ")]


@pytest.mark.parametrize("name", ONE_LINERS)
def test_the_program_in_its_head_runs(name, tmp_path, monkeypatch):
    program = shlex.split(recipe_head(shipped_recipes()[name])[0])[2]
    (hub_id,) = re.findall(r"from_pretrained\('([^']+)'\)", program)
    small(name).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    exec(program.replace(hub_id, str(tmp_path / "model")), {})
    assert (tmp_path / "outputs" / name / "model.safetensors").is_file()


@pytest.mark.parametrize("name", [name for name in COLLECTION if not name.startswith("llm-")])
def test_a_cost_is_measured_or_said_not_to_be(name):
    said = recipe_head(shipped_recipes()[name])[1]
    assert ("Not measured" in said) is not ("accuracy" in said or "Perplexity" in said)
