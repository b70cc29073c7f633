"""`hf-prune run` of a recipe that adds biases: what --plan-only says is what comes out; with training it is refused at once."""

import pytest
from transformers import LlamaForCausalLM

import hf_prune
from hf_prune.errors import RecipeError
from hf_prune.job.preview import plan_only
from hf_prune.job.run import check
from tests.job import inputs
from tests.planning.test_repair import batches_of


def written(folder, *, training=None, **step):
    inputs.text_model(folder / "model", "llama")
    path = inputs.write_recipe(
        folder / "recipe.yaml",
        model={"name_or_path": str(folder / "model"), "task": "text-generation"},
        training=training,
        prune=[
            {"target": "ffn_neurons", "sparsity": 0.5, "compensation": {"name": "bias", "add": True}, **step},
            {"target": "attention_heads", "sparsity": 0.5, "compensation": "least_squares", **step},
        ],
    )
    return hf_prune.Recipe.from_yaml(path)


@pytest.mark.parametrize(
    ("step", "loads_with"), [({"uniform": True}, "transformers"), ({"scope": "global"}, "hf_prune")]
)
def test_what_plan_only_says_comes_out(step, loads_with, tmp_path):
    recipe = written(tmp_path, **step)
    said = plan_only(recipe).content
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    done = hf_prune.prune_(model, recipe, calibration=batches_of(model, 5)).content
    assert said["checkpoint"]["loads_with"] == done["checkpoint"]["loads_with"] == loads_with
    if loads_with == "transformers":  # under scope global sizes follow scores, which --plan-only makes up
        assert said["totals"]["pruned"]["parameters"] == done["totals"]["pruned"]["parameters"]
        assert done["totals"]["pruned"]["parameters"] == sum(p.numel() for p in model.parameters())


def test_with_training_it_is_refused_before_weights_are_read(tmp_path):
    recipe = written(tmp_path, training=inputs.TRAINING)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"prune\.0\.compensation: add makes new biases"):
        check(recipe)
