"""`key=value` on the command line."""

import pytest

from hf_prune.errors import RecipeError
from hf_prune.recipe import Recipe


TEXT = """version: 1
output:
prune:
  - {target: ffn_neurons, sparsity: 0.5, include: ["*.0.*", "*.1.*"]}
  - {target: layers, remove: [1], criterion: l1}
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("prune.0.sparsity=0.3", lambda r: r.prune[0].sparsity == 0.3),
        ("prune.0.sparsity={parameters: 0.2}", lambda r: r.prune[0].sparsity.parameters == 0.2),
        ("prune.0.include=[a, b]", lambda r: r.prune[0].include == ("a", "b")),
        ("prune.0.include.1=c", lambda r: r.prune[0].include == ("*.0.*", "c")),
        ("prune.1.remove.0=2", lambda r: r.prune[1].remove == [2]),
        ("prune.1.criterion={name: random, seed: 4}", lambda r: r.prune[1].criterion.options == {"seed": 4}),
        ("prune.1.schedule.name=linear", lambda r: r.prune[1].schedule.name == "linear"),
        ("prune=[{target: layers, remove: [0]}]", lambda r: len(r.prune) == 1),
        ("training.learning_rate=1e-4", lambda r: r.training == {"learning_rate": 1e-4}),
        ("output.dir=here", lambda r: r.output.dir == "here"),
        ("output.dir=a=b", lambda r: r.output.dir == "a=b"),
        ("name=on", lambda r: r.name == "on"),
        ("name='5'", lambda r: r.name == "5"),
        ("name=", lambda r: r.name == ""),
        ("output=null", lambda r: r.output is None),
    ],
)
def test_what_is_set(path, override, found):
    assert found(Recipe.from_yaml(path, [override]))


def test_later_ones_win_and_the_file_is_left_alone(path):
    assert Recipe.from_yaml(path, ["seed=1", "seed=2"]).seed == 2
    assert path.read_text() == TEXT


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "sparsity",
            "override 'sparsity': 'sparsity' is no override; expected key=value, such as prune.0.sparsity=0.3",
        ),
        ("=3", "is no override"),
        ("prune..sparsity=3", "is no override"),
        ("prune.3.sparsity=0.1", "override 'prune.3.sparsity=0.1': prune has elements 0 to 1, not '3'"),
        ("prune.-1.sparsity=0.1", "not '-1'"),
        ("prune.x=1", "not 'x'"),
        ("prune.1.criterion.name=l2", "prune.1.criterion is 'l1' and has no keys; set it whole"),
        ("version.x=2", "version is 1 and has no keys"),
        ("prune.0.sparsity=2", "override 'prune.0.sparsity=2': prune.0.sparsity: 2: expected a fraction"),
        (
            "prune.0.sparsty=0.1",
            "override 'prune.0.sparsty=0.1': prune.0.sparsty: unknown key.*did you mean 'sparsity'",
        ),
        ("prun.0.sparsity=0.1", "override 'prun.0.sparsity=0.1': prun: unknown key.*did you mean 'prune'"),
        ("prune.0.include=[a, 1]", r"override 'prune.0.include=\[a, 1\]': prune.0.include.1: 1: expected text"),
        ("prune.1.schedule.begin=x", "override 'prune.1.schedule.begin=x': prune.1.schedule.begin: 'x'"),
        ("training.lr=1", "override 'training.lr=1': training.lr: no field of TrainingArguments"),
        ("prune.0.remove={'*': [1]}", "override .*exactly one of sparsity"),
        ("seed=[1", "override 'seed=.1': the value .* not valid YAML"),
        ("seed=!!python/name:os.system", "override .* the YAML tag .* is not allowed"),
    ],
)
def test_what_is_refused_says_that_it_comes_from_the_override(path, override, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(path, [override])


def test_all_wrong_overrides_come_with_all_that_is_wrong_in_the_file(path):
    path.write_text(TEXT + "seed: x\n")
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(path, ["sparsity", "prune.7.x=1", "name=3"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "the recipe has 4 mistakes:"
    assert lines[1].startswith(f"  {path}:6:1: seed")
    assert all(line.startswith("  override ") for line in lines[2:])


def test_an_empty_file_can_be_filled(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    filled = Recipe.from_yaml(tmp_path / "empty.yaml", ["version=1", "prune=[{target: layers, remove: [0]}]"])
    assert filled.prune[0].target == "layers"
