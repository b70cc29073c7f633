"""docs/criteria.md and docs/extending.md against the table of criteria."""

import re

import pytest
import torch
import yaml

import hf_prune
from hf_prune.calibration.statistics import NEEDS_OF_GRADIENTS, NEEDS_OF_TRAINING
from hf_prune.criteria import get
from hf_prune.criteria.base import PrunesMatrices, RanksUnits, RemovesUnits
from hf_prune.recipe import Recipe
from hf_prune.recipe.vocabulary import CRITERIA
from hf_prune.structure import inspect_model
from tests import zoo
from tests.criteria.test_contract import OPTIONS
from tests.docs.pages import ROOT, blocks, sections, table


PAGE, EXTENDING = ROOT / "docs" / "criteria.md", ROOT / "docs" / "extending.md"
NEEDS = {
    "nothing": set(),
    "inputs": {"squared_inputs", "mean_inputs", "firing", "squared_updates", "turns", "routed_shares", "routed_norms"},
    "inputs and a loss": NEEDS_OF_GRADIENTS,
    "training": NEEDS_OF_TRAINING,
}


@pytest.mark.parametrize(("name", "entry"), CRITERIA.items())
def test_each_criterion_has_a_section_with_its_targets_and_options(name, entry):
    section = sections(PAGE)[name]
    targets = re.search(r"^Targets: (.+)$", section, re.MULTILINE)
    assert targets is not None
    assert set(re.findall(r"`(\w+)`", targets[1])) == entry.targets
    for option in entry.options:
        assert f"`{option}` (option" in section
    assert "Cost: " in section


def test_there_is_no_section_for_what_is_no_criterion():
    told = {name for name, text in sections(PAGE).items() if "Targets: " in text}
    assert told == CRITERIA.keys()


@pytest.mark.parametrize(("name", "entry"), CRITERIA.items())
def test_the_table_says_what_data_each_needs(name, entry):
    (row,) = (cells for names, cells in table(sections(PAGE)["Criteria"]).items() if f"[`{name}`]" in f"`{names}`")
    criterion = get(name, OPTIONS.get(name))
    if name == "combined":
        assert row[0] == "what its parts need"
        return
    needs = set().union(*(criterion.needs(target) for target in entry.targets))
    assert needs <= NEEDS[row[0]]
    if isinstance(criterion, RanksUnits):  # these collect by themselves
        assert row[0] == ("inputs and a loss" if criterion.loss_units else "inputs")
    elif isinstance(criterion, (PrunesMatrices, RemovesUnits)):
        assert row[0] == "inputs"
    else:
        assert bool(needs) == bool(NEEDS[row[0]])


@pytest.mark.parametrize("name", CRITERIA)
def test_loss_units_are_said(name):
    said = sections(PAGE)["Criteria"].split("**Loss units.**")[1].split("\n\n")[0]
    assert get(name, OPTIONS.get(name)).loss_units == (f"`{name}`" in said.split("The others")[0])


@pytest.mark.parametrize("block", [block for block in blocks(PAGE) if block.language == "yaml"], ids=str)
def test_examples_are_accepted(block):
    assert block.info == "yaml step"
    assert Recipe.from_dict({"version": 1, "prune": yaml.safe_load(block.text)}).prune


@pytest.mark.parametrize(("name", "entry"), CRITERIA.items())
def test_what_an_option_is_if_not_given(name, entry):
    for option, value in re.findall(r"`(\w+)` \(option, (\w[\w.]*) if not given\)", sections(PAGE)[name]):
        assert yaml.safe_load(value) == getattr(get(name), option)
        assert option in entry.options


def test_data_that_lack_labels_are_an_error():
    model = zoo.build("bert")
    step = {"target": "ffn_neurons", "sparsity": 0.5, "criterion": "taylor"}
    batch = {"input_ids": torch.randint(3, 99, (2, 8))}
    with pytest.raises(hf_prune.CalibrationError):
        hf_prune.make_plan(model, {"version": 1, "prune": [step]}, calibration=[batch])


def test_the_example_criterion_scores_heads_neurons_and_weights():
    names: dict = {}
    for block in (block for block in blocks(EXTENDING) if block.language == "python"):
        exec(compile(block.text, str(block), "exec"), names)
    criterion = names["Largest"]()
    structure = inspect_model(model := zoo.build("bert"))
    site = structure.of("ffn_neurons")[0]
    layer = model.bert.encoder.layer[0]
    into, bias, out = layer.intermediate.dense.weight, layer.intermediate.dense.bias, layer.output.dense.weight
    expected = [max(into[n].abs().max(), bias[n].abs(), out[:, n].abs().max()) for n in range(48)]
    assert torch.equal(criterion.score_units(model, site, None), torch.stack(expected).detach())
    assert criterion.score_units(model, structure.of("attention_heads")[0], None).shape == (4,)
    weight = structure.weights[0]
    assert torch.equal(criterion.score_weights(model, weight, None), get("l1").score_weights(model, weight, None))


def test_the_example_layout_is_there():
    from hf_prune.structure import layouts

    said = re.search(r"`(AttentionLayout\(.+?\))`", EXTENDING.read_text(encoding="utf-8"))
    assert said is not None
    assert eval(said[1], vars(layouts)) in layouts.ATTENTION_LAYOUTS
