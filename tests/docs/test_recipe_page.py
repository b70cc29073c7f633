"""docs/recipe.md against the models that read recipes: every key, value and default, and what the page says of them."""

import typing

import pytest
import torch
import yaml

import hf_prune
from hf_prune.criteria import get
from hf_prune.recipe import Recipe, schema
from hf_prune.recipe.mistakes import LATER
from hf_prune.recipe.training import SAID_ELSEWHERE
from hf_prune.structure import inspect_model
from tests import zoo
from tests.docs.pages import ROOT, blocks, sections, table


PAGE = ROOT / "docs" / "recipe.md"
SECTIONS = {
    "Document": schema.RecipeDocument,
    "Steps": schema.Step,
    "schedule": schema.Schedule,
    "distillation": schema.Distillation,
    "calibration": schema.Calibration,
    "model": schema.ModelSection,
    "data": schema.DataSection,
    "output": schema.OutputSection,
}
YAML = [block for block in blocks(PAGE) if block.language == "yaml"]


def recipe(*steps, **rest):
    return Recipe.from_dict({"version": 1, "prune": list(steps), **rest})


@pytest.mark.parametrize("heading", SECTIONS)
def test_the_tables_hold_every_key_with_a_default_and_a_meaning(heading):
    rows = table(sections(PAGE)[heading])
    assert rows.keys() == SECTIONS[heading].model_fields.keys()
    for value, default, meaning in rows.values():
        assert value and default and meaning


@pytest.mark.parametrize(
    ("heading", "name"),
    [(heading, name) for heading, section in SECTIONS.items() for name in section.model_fields],
)
def test_the_tables_hold_every_word_that_a_key_accepts(heading, name):
    annotation = SECTIONS[heading].model_fields[name].annotation
    literals = [a for a in (annotation, *typing.get_args(annotation)) if typing.get_origin(a) is typing.Literal]
    row = " ".join(table(sections(PAGE)[heading])[name])
    for word in (word for literal in literals for word in typing.get_args(literal)):
        assert f"`{word}`" in row


def test_the_defaults_that_depend_on_the_target():
    units, weights = recipe({"target": "layers", "sparsity": 0.5}, {"target": "weights", "sparsity": 0.5}).prune
    assert (units.criterion.name, weights.criterion.name) == ("l2", "l1")
    assert weights.pattern.kind == "unstructured"
    step = {"target": "weights", "sparsity": 0.5}
    assert [recipe(step | {"criterion": name}).prune[0].scope for name in ("wanda", "ria")] == ["output", "layer"]
    assert recipe(step | {"criterion": "wanda", "scope": "layer"}).prune[0].scope == "layer"


def test_the_threshold_rules():
    rules = typing.get_args(schema.Threshold.model_fields["rule"].annotation)
    assert tuple(table(sections(PAGE)["Threshold"])) == rules


def test_the_scopes():
    scopes = typing.get_args(schema.Step.model_fields["scope"].annotation)
    assert tuple(table(sections(PAGE)["Scope and normalize"])) == scopes


def test_what_is_not_in_this_version():
    text = sections(PAGE)["Not in this version"]
    for key, value in LATER:
        assert f"`{key}`" in text if value is None else f"`{key}: {value}`" in text


def test_training_fields_that_have_a_place_elsewhere():
    assert all(f"`{name}`" in sections(PAGE)["training"] for name in SAID_ELSEWHERE)


@pytest.mark.parametrize("block", [block for block in YAML if block.info == "yaml"], ids=str)
def test_recipes_are_accepted(block, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(block.text, encoding="utf-8")
    assert Recipe.from_yaml(path).prune


@pytest.mark.parametrize("block", [block for block in YAML if block.info == "yaml step"], ids=str)
def test_steps_are_accepted_and_can_be_planned(block):
    model = zoo.build("bert", num_hidden_layers=8, num_attention_heads=8)
    masks = hf_prune.make_plan(model, recipe(*yaml.safe_load(block.text))).masks
    assert masks, "nothing leaves"


@pytest.mark.parametrize("number", [n for n, block in enumerate(blocks(PAGE)) if block.info == "yaml fails"])
def test_mistakes_read_as_the_page_says(number, tmp_path):
    bad, message = blocks(PAGE)[number : number + 2]
    assert message.language == "text"
    path = tmp_path / "recipe.yaml"
    path.write_text(bad.text, encoding="utf-8")
    with pytest.raises(hf_prune.RecipeError) as caught:
        Recipe.from_yaml(path)
    for line in message.text.splitlines():
        assert line in str(caught.value)


def test_every_yaml_block_is_of_a_kind_that_is_checked():
    assert {block.info for block in YAML} == {"yaml", "yaml step", "yaml fails"}


# What the prose says, tried.


def test_half_the_neurons_of_the_layers_that_stay_leave():
    model = zoo.build("bert")
    plan = hf_prune.make_plan(
        model,
        recipe({"target": "layers", "remove": [1]}, {"target": "ffn_neurons", "sparsity": 0.5, "scope": "global"}),
    )
    gone = {key: int((~keep).sum()) for key, keep in plan.steps[1].units.items()}
    assert sum(gone.values()) == 48  # of 2 * 48
    assert not gone.get("ffn_neurons:bert.encoder.layer.1")


def test_a_threshold_is_on_raw_scores():
    model = zoo.build("bert")
    with torch.no_grad():  # one layer far larger: its scores over their mean would be like the others'
        for name, parameter in model.bert.encoder.layer[0].named_parameters():
            if "attention" not in name:
                parameter.mul_(5)
    sites = inspect_model(model).of("ffn_neurons")
    scores = {site.key: get("l2").score_units(model, site, None) for site in sites}
    value = float(torch.cat(list(scores.values())).sort().values[40])
    step = {"target": "ffn_neurons", "threshold": {"rule": "absolute", "value": value}, "scope": "global"}
    keep = hf_prune.make_plan(model, recipe(step)).masks.units
    assert all(torch.equal(~keep[key], score < value) for key, score in scores.items())


def test_what_is_named_leaves_at_the_first_update():
    step = {"target": "ffn_neurons", "remove": {"*.layer.0": [0, 5]}}
    plan = hf_prune.make_plan(zoo.build("bert"), recipe(step), progress=0.01)
    assert torch.nonzero(~plan.masks.units["ffn_neurons:bert.encoder.layer.0"]).reshape(-1).tolist() == [0, 5]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"target": "weights", "sparsity": {"parameters": 0.2}}, "zeros stay in the tensor"),
        ({"target": "weights", "pattern": "2:4", "max_sparsity": 0.3}, "max_sparsity goes with a sparsity"),
        ({"target": "weights", "sparsity": 0.5, "round_to": 8, "min_keep": 2}, "min_keep is for layers"),
        ({"target": "layers", "sparsity": 0.5, "uniform": True}, "uniform is for heads, neurons and experts"),
        ({"target": "layers", "sparsity": 0.5, "schedule": {"shrink": "never"}}, "shrink is said once"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(step, message):
    with pytest.raises(hf_prune.RecipeError, match=message):
        recipe(step)


def test_parameters_shrink_by_what_was_asked_to_within_half_a_unit():
    model = zoo.build("bert")
    before = sum(parameter.numel() for parameter in model.parameters())
    step = {"target": "ffn_neurons", "sparsity": {"parameters": 0.1}, "scope": "global"}
    hf_prune.prune_(model, recipe(step))
    after = sum(parameter.numel() for parameter in model.parameters())
    one_neuron = 2 * 32 + 1  # a row and its bias, and a column
    assert abs(before - after - 0.1 * before) <= one_neuron / 2


def repaired(name, *steps, **sizes):
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 99, (4, 12), generator=generator)} for _ in range(3)]
    return hf_prune.make_plan(zoo.build(name, **sizes), recipe(*steps), calibration=batches)


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        ("llama", {"target": "layers", "remove": [2, 3], "compensation": "linear"}, {"1.mlp.down_proj.weight"}),
        ("llama", {"target": "layers", "remove": [0], "compensation": "linear"}, set()),
        (
            "llama",
            {"target": "layers", "remove": [2, 3], "compensation": "least_squares"},
            {f"{n}.{name}.weight" for n in (1, 4) for name in ("mlp.down_proj", "self_attn.o_proj")},
        ),
        (
            "bert",
            {"target": "ffn_neurons", "sparsity": 0.5, "compensation": "bias"},
            {f"{n}.output.dense.bias" for n in range(5)},
        ),
        (
            "bert",
            {"target": "attention_heads", "sparsity": 0.5, "compensation": "least_squares"},
            {f"{n}.attention.output.dense.{name}" for n in range(5) for name in ("weight", "bias")},
        ),
    ],
)
def test_what_a_compensation_refits(name, step, expected):
    stack = {"llama": "model.layers", "bert": "bert.encoder.layer"}[name]
    new = repaired(name, step, num_hidden_layers=5).replacements
    assert new.keys() == {f"{stack}.{tensor}" for tensor in expected}


@pytest.mark.parametrize(
    ("name", "step", "message"),
    [
        ("llama", {"target": "ffn_neurons", "sparsity": 0.5, "compensation": "bias"}, "has no bias to take what left"),
        ("bert", {"target": "layers", "remove": [1], "compensation": "linear"}, "its blocks end in a norm"),
        ("albert", {"target": "ffn_neurons", "sparsity": 0.5, "compensation": "least_squares"}, "is called 3 times"),
    ],
)
def test_what_can_not_be_repaired_says_why(name, step, message):
    with pytest.raises(hf_prune.PruneError, match=message):
        repaired(name, step)


def test_the_report_says_what_was_refitted_and_what_nothing_makes_up_for():
    step = {"target": "layers", "remove": [0, 3], "compensation": "linear"}
    notes = " ".join(repaired("llama", step, num_hidden_layers=5).notes)
    assert "nothing makes up for the first" in notes
    assert "output projections were refitted on 144 tokens" in notes  # 3 * 4 * 12


def test_repair_needs_data():
    step = {"target": "ffn_neurons", "sparsity": 0.5, "compensation": "least_squares"}
    with pytest.raises(hf_prune.CalibrationError, match="compensation least_squares of ffn_neurons is fitted on data"):
        hf_prune.make_plan(zoo.build("llama"), recipe(step))
