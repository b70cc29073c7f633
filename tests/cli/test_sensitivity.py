"""`hf-prune sensitivity` in this process: a model, a recipe, what it writes, mistakes."""

import json
import sys

import pytest
import yaml

from hf_prune.recipe import Recipe
from tests.job import inputs


SHORT = ("--target", "ffn_neurons", "--sparsity", 0.5, "--samples", 2)


@pytest.fixture
def language_model(folder):
    return inputs.text_model(folder / "llama", "llama")


def test_a_model_and_data_are_enough(cli, folder, language_model):
    done = cli("sensitivity", "llama", "--data", "data.csv", "data.max_length=8", *SHORT, "--json", "out/curves.json")
    assert done.code == 0, done.err
    assert "ffn_neurons by activation" in done.out and "model.layers.2.mlp" in done.out
    found = json.loads((folder / "out" / "curves.json").read_text(encoding="utf-8"))
    assert [site["key"] for site in found["sites"]] == [f"ffn_neurons:model.layers.{n}.mlp" for n in range(3)]
    assert found["n_samples"] == 2
    assert not list((folder / "out").glob(".*")), "something half-written is left"
    step = {"target": "ffn_neurons", "sparsity": 0.3, "allocation": {"name": "sensitivity", "file": "out/curves.json"}}
    inputs.write_recipe(
        folder / "next.yaml",
        model={"name_or_path": "llama", "task": "text-generation"},
        data={"name_or_path": "data.csv", "max_length": 8},
        training=None,
        prune=[step],
    )
    planned = cli("run", "next.yaml", "--plan-only")
    assert planned.code == 0, planned.err


def test_a_recipe_s_steps_say_what_to_scan(cli, folder):
    """With the criteria that score a model as it is."""
    steps = [
        {"target": "attention_heads", "sparsity": 0.5, "criterion": "taylor"},
        {"target": "weights", "sparsity": 0.5, "criterion": "sparsegpt", "exclude": ["*pooler*"]},
    ]
    inputs.write_recipe(folder / "recipe.yaml", prune=steps)
    done = cli("sensitivity", "recipe.yaml", "--sparsity", 0.5, "--samples", 2, "--json", "curves.json")
    assert done.code == 0, done.err
    assert "attention_heads by taylor" in done.out and "weights by wanda" in done.out
    assert {site["target"] for site in json.loads((folder / "curves.json").read_text())["sites"]} == {
        "attention_heads",
        "weights",
    }


def test_options_go_before_the_recipe_s_steps(cli, folder):
    done = cli("sensitivity", "recipe.yaml", *SHORT, "--criterion", "ffn_neurons=l2")
    assert done.code == 0, done.err
    assert "ffn_neurons by l2" in done.out and "attention_heads" not in done.out


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture(cli, folder, ending):
    pytest.importorskip("matplotlib")
    done = cli("sensitivity", "recipe.yaml", *SHORT, "--picture", f"curves.{ending}")
    assert done.code == 0, done.err
    begins = {"png": b"\x89PNG", "svg": b"<?xml"}[ending]
    assert (folder / f"curves.{ending}").read_bytes().startswith(begins)


def test_a_picture_without_matplotlib_is_refused_before_the_work(cli, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = cli("sensitivity", "recipe.yaml", *SHORT, "--picture", "curves.png")
    assert done.code == 2 and "pip install 'hf_prune[plot]'" in done.err and not done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model"], "the scan of model measures a loss and needs data: --data"),
        (["recipe.yaml", "--data", "x.csv"], "--task and --data go with a model; a recipe says both"),
        (["missing.yaml"], "missing.yaml"),
        (["./missing", "--data", "data.csv"], "there is no ./missing"),
        (["recipe.yaml", "--sparsity", "1.5"], "the sparsities are [1.5]; expected fractions between 0 and 1"),
        (["recipe.yaml", "--samples", "0"], "samples is 0; expected at least 1"),
        (["recipe.yaml", "--criterion", "wanda"], "--criterion wanda: expected TARGET=NAME, such as weights=ria"),
        (["recipe.yaml", "--target", "neurons"], "'neurons' is not allowed; expected one of"),
        (["recipe.yaml", "data.max_lenght=8"], "did you mean 'max_length'?"),
        (["model", "--data", "data.csv", "--task", "masked-lm"], "'masked-lm' is not allowed; expected one of"),
    ],
)
def test_mistakes_are_one_message_and_exit_2(cli, folder, arguments, message):
    done = cli("sensitivity", *arguments)
    assert done.code == 2, (done.out, done.err)
    assert message in " ".join(done.err.split()) and "Traceback" not in done.err


def test_a_model_without_a_trained_head_is_refused(cli, folder):
    """Its loss would be that of random numbers, whatever the recipe trains later."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder / "model")
    transformers.AutoModel.from_config(config).save_pretrained(folder / "model")
    done = cli("sensitivity", "recipe.yaml", *SHORT)
    assert done.code == 2
    assert "would stay random" in done.err and "give a trained model" in done.err


def test_a_recipe_may_lack_its_model(cli, folder):
    document = yaml.safe_load((folder / "recipe.yaml").read_text())
    del document["model"]
    Recipe.from_dict(document).to_yaml(folder / "recipe.yaml")
    done = cli("sensitivity", "recipe.yaml")
    assert done.code == 2 and "needs the recipe's sections 'model' and 'data'" in done.err


def test_figures_that_are_not_there_are_missed_before_any_weight_is_read(cli, folder):
    steps = [{"target": "weights", "sparsity": 0.5, "allocation": {"name": "sensitivity", "file": "curves.json"}}]
    inputs.write_recipe(folder / "recipe.yaml", prune=steps)
    (folder / "model" / "model.safetensors").unlink()
    done = cli("run", "recipe.yaml", "--plan-only")
    assert done.code == 2
    assert "there is no curves.json; `hf-prune sensitivity MODEL --json curves.json` writes it" in done.err
