"""The recipe's language: what is accepted, what is refused and with which words."""

import pytest

from hf_prune.errors import RecipeError
from hf_prune.recipe import Recipe, apply_overrides


STEP = {"target": "ffn_neurons", "sparsity": 0.5}


def recipe(**changes):
    return {"version": 1, "prune": [STEP], **changes}


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "step",
    [
        STEP,
        {"target": "layers", "remove": [0, 2]},
        {"target": "attention_heads", "remove": {"*.0.*": [1]}},
        {"target": "ffn_neurons", "sparsity": {"parameters": 0.2}, "criterion": {"name": "random", "seed": 3}},
        {"target": "attention_heads", "sparsity": {"macs": 0.2}, "scope": "global"},
        {"target": "weights", "pattern": "2:4"},
        {"target": "weights", "pattern": {"block": [4, 4]}, "sparsity": 0.5},
        {"target": "weights", "threshold": {"rule": "mean_minus_std", "value": 2}, "scope": "output"},
        {"target": "ffn_neurons", "sparsity": 0.3, "uniform": True, "round_to": 8, "schedule": {"name": "linear"}},
    ],
)
def test_round_trip_through_yaml(step, tmp_path):
    first = Recipe.from_dict({"version": 1, "prune": [step]})
    path = tmp_path / "recipe.yaml"
    first.to_yaml(path)
    assert Recipe.from_yaml(path) == first
    assert Recipe.from_dict(first.to_dict()) == first


def test_all_mistakes_come_together_with_their_places(tmp_path):
    path = write(
        tmp_path,
        """version: 1
seeed: 3
prune:
  - target: ffn_neuron
    sparsity: 1.5
  - {target: weights, sparsity: 0.5, criterion: activation}
training: {learning_rte: 1e-3}
""",
    )
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the recipe has 5 mistakes:"
    text = "\n".join(lines)
    assert f"{path}:2:1: seeed: unknown key" in text and "did you mean 'seed'?" in text
    assert f"{path}:4:5: prune.0.target: 'ffn_neuron' is not allowed" in text
    assert f"{path}:5:5: prune.0.sparsity: 1.5: expected a fraction from 0 to below 1" in text
    assert "prune.1: criterion activation is not defined for weights; it is for attention_heads" in text
    assert "training.learning_rte: no field of TrainingArguments; did you mean 'learning_rate'?" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version: 2 is not allowed"),
        ({"prune": []}, "at least 1 item"),
        ({"prune": [{"target": "weights", "pattern": "2:4", "sparsity": 0.5}]}, "says the sparsity already"),
        ({"prune": [{"target": "weights", "pattern": "4:2"}]}, "expected 0 < N < M"),
        ({"prune": [{"target": "ffn_neurons"}]}, "exactly one of sparsity, threshold, remove; found none"),
        ({"prune": [STEP | {"remove": {"*": [1]}}]}, "found sparsity, remove"),
        ({"prune": [STEP | {"uniform": True, "scope": "global"}]}, "drop one"),
        ({"prune": [STEP | {"scope": "output"}]}, "scope output is for target weights"),
        ({"prune": [STEP | {"pattern": "2:4", "sparsity": None}]}, "pattern is for target weights"),
        ({"prune": [{"target": "weights", "sparsity": {"macs": 0.5}}]}, "save no operation"),
        ({"prune": [{"target": "ffn_neurons", "remove": [1]}]}, "says where"),
        ({"prune": [STEP | {"criterion": "tailor"}]}, "did you mean 'taylor'"),
        ({"prune": [STEP | {"criterion": {"name": "l1", "p": 3}}]}, "takes no options; unknown: p"),
        ({"prune": [STEP | {"allocation": "owl"}]}, "is not supported in this version"),
        ({"prune": [STEP | {"compensation": "least_squares"}]}, "is not supported in this version"),
        ({"distillation": {"weight": 0.5}}, "is not supported in this version"),
        ({"schedule": {"shrink": "when_final"}}, "is not supported in this version"),
        ({"schedule": {"begin": 0.7, "end": 0.2}}, "is after end"),
        ({"training": {"output_dir": "x"}}, "say it as output.dir"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(RecipeError, match=message.replace("*", r"\*")):
        Recipe.from_dict(recipe(**changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 YAML documents"),
        ("- 1", "is a list"),
        ("version: 1\nversion: 1", ":2:1: the key 'version' is there twice, first at 1:1"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: !!python/object:os.system {}", "plain data"),
        ("a: [1", "not valid YAML"),
        ("a: 1\n---\nb: 2", "2 YAML documents"),
        ("[" * 40 + "]" * 40, "deep"),
    ],
)
def test_yaml_that_is_no_recipe(text, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(write(tmp_path, text))


def test_a_missing_file_is_named():
    with pytest.raises(RecipeError, match=r"can't read the recipe 'nowhere.yaml'.*hf-prune recipes"):
        Recipe.from_yaml("nowhere.yaml")


def test_yaml_surprises(tmp_path):
    path = write(
        tmp_path,
        "version: 1\nname: on\ntraining: {learning_rate: 1e-3}\nprune: [{target: weights, pattern: 2:4}]\n",
    )
    loaded = Recipe.from_yaml(path)
    assert loaded.name == "on"
    assert loaded.training == {"learning_rate": 0.001}
    assert (loaded.prune[0].pattern.n, loaded.prune[0].pattern.m) == (2, 4)


def test_overrides(tmp_path):
    path = write(tmp_path, "version: 1\nprune: [{target: ffn_neurons, sparsity: 0.5}]\n")
    changed = Recipe.from_yaml(path, ["prune.0.sparsity=0.3", "training.learning_rate=1e-4", "output.dir=here"])
    assert changed.prune[0].sparsity == 0.3
    assert changed.training == {"learning_rate": 1e-4}
    assert changed.output.dir == "here"
    for override, message in (("sparsity", "no override"), ("prune.3.sparsity=1", "elements 0 to 0")):
        with pytest.raises(RecipeError, match=message):
            apply_overrides({"prune": [{}]}, [override])


def test_json_schema_agrees_with_what_is_accepted():
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(Recipe.json_schema())
    good = [recipe(), recipe(prune=[{"target": "weights", "pattern": {"block": [2, 2]}, "sparsity": 0.1}])]
    bad = [
        recipe(seeed=1),
        recipe(version=2),
        recipe(prune=[]),
        recipe(prune=[STEP | {"sparsity": 1.5}]),
        recipe(prune=[STEP | {"criterion": "tailor"}]),
        recipe(prune=[STEP | {"criterion": {"name": "l1", "p": 3}}]),
        recipe(prune=[STEP | {"round_to": 0}]),
        recipe(schedule={"name": "square"}),
    ]
    for document in good:
        Recipe.from_dict(document)
        assert validator.is_valid(document)
    for document in bad:
        with pytest.raises(RecipeError):
            Recipe.from_dict(document)
        assert not validator.is_valid(document)
