"""docs/allocation.md against the table of allocations, the options of the scan, and recipes that are planned."""

from dataclasses import fields
from importlib import import_module

import pytest
import yaml
from typer.main import get_command

import hf_prune
from hf_prune.cli.main import app
from hf_prune.recipe import Recipe
from hf_prune.recipe.vocabulary import ALLOCATIONS
from hf_prune.sensitivity import DEFAULT_SPARSITIES
from hf_prune.sensitivity.scan import CRITERIA
from tests import zoo
from tests.docs.pages import ROOT, blocks, sections, table


PAGE = ROOT / "docs" / "allocation.md"
YAML = [block for block in blocks(PAGE) if block.language == "yaml"]


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_every_allocation_has_its_section_with_its_options(name):
    entry = ALLOCATIONS[name]
    text = sections(PAGE)[name]
    kind = getattr(import_module(f"hf_prune.allocation.{entry.module}"), entry.class_name)
    assert {each.name for each in fields(kind)} == set(entry.options)
    for each in fields(kind):
        assert f"`{each.name}`" in text
        if each.name not in entry.required:
            assert table(text)[each.name][1] == f"`{each.default:g}`"


@pytest.mark.parametrize("block", [block for block in YAML if block.info == "yaml"], ids=str)
def test_recipes_are_accepted(block, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(block.text, encoding="utf-8")
    assert Recipe.from_yaml(path).prune[0].allocation is not None


@pytest.mark.parametrize("block", [block for block in YAML if block.info == "yaml step"], ids=str)
def test_steps_can_be_planned(block):
    model = zoo.build("bert", num_hidden_layers=8, num_attention_heads=8)
    plan = hf_prune.make_plan(model, {"version": 1, "prune": yaml.safe_load(block.text)})
    assert plan.masks, "nothing leaves"


def test_every_yaml_block_is_of_a_kind_that_is_checked():
    assert {block.info for block in YAML} == {"yaml", "yaml step"}


def test_the_options_of_the_scan_and_their_defaults():
    text = sections(PAGE)["Measuring sensitivity"]
    options = {
        each.name: each for each in get_command(app).commands["sensitivity"].params if each.param_type_name == "option"
    }
    assert len(options) == 8
    for option in options.values():
        assert f"`{option.opts[0]}" in text
    rows = table(text)
    assert rows["--samples"][0] == str(options["samples"].default)
    assert rows["--sparsity"][0] == ", ".join(f"{share:g}" for share in DEFAULT_SPARSITIES)
    for criterion in CRITERIA.values():
        assert criterion in rows["--criterion TARGET=NAME"][0]
