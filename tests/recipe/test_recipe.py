"""The recipe's language: what is accepted, what is refused and with which words."""

import math

import pytest

from hf_prune.errors import RecipeError
from hf_prune.recipe import Recipe


STEP = {"target": "ffn_neurons", "sparsity": 0.5}
LOSSES = {"target": "layers", "criterion": "loss_change"}


def combined(**of):
    return {"name": "combined", "of": of}


def recipe(**changes):
    return {"version": 1, "prune": [STEP], **changes}


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


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
    assert [line.removeprefix(f"  {path}:").split(":")[0] for line in lines[1:]] == ["2", "4", "5", "6", "7"]
    text = "\n".join(lines)
    assert f"{path}:2:1: seeed: unknown key" in text and "did you mean 'seed'?" in text
    assert f"{path}:4:5: prune.0.target: 'ffn_neuron' is not allowed" in text
    assert f"{path}:5:5: prune.0.sparsity: 1.5: expected a fraction from 0 to below 1" in text
    assert "prune.1.criterion: criterion activation is not defined for weights; it is for attention_heads" in text
    assert "training.learning_rte: no field of TrainingArguments; did you mean 'learning_rate'?" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version: 2: expected 1"),
        ({"prune": []}, "expected at least 1"),
        ({"prune": [{"target": "weights", "pattern": "2:4", "sparsity": 0.5}]}, "says the sparsity already"),
        ({"prune": [{"target": "weights", "pattern": "4:2"}]}, "expected 0 < N < M"),
        ({"prune": [{"target": "ffn_neurons"}]}, "exactly one of sparsity, threshold, remove; found none"),
        ({"prune": [STEP | {"remove": {"*": [1]}}]}, "found sparsity, remove"),
        ({"prune": [STEP | {"uniform": True, "scope": "global"}]}, "drop one"),
        (
            {"prune": [{"target": "ffn_neurons", "remove": {"*": [1]}, "uniform": True}]},
            "goes with a sparsity, not with remove",
        ),
        ({"prune": [{"target": "layers", "remove": []}]}, "at least one"),
        ({"prune": [STEP | {"schedule": {"shrink": "never"}}]}, "said once for all steps"),
        ({"prune": [{"target": "weights", "sparsity": 0.5, "round_to": 8}]}, "round_to is for layers, heads"),
        ({"prune": [{"target": "weights", "sparsity": {"parameters": 0.5}}]}, "stay in the tensor"),
        ({"prune": [STEP | {"criterion": {"name": "random", "seed": "x"}}]}, "seed of criterion random is 'x'"),
        ({"prune": [STEP | {"criterion": {"name": "random", "sed": 1}}]}, "did you mean 'seed'"),
        ({"prune": [STEP | {"criterion": {"seed": 1}}]}, "expected a criterion's name"),
        ({"prune": [STEP | {"part": "attention"}]}, "part attention is for target layers, not ffn_neurons"),
        (
            {"prune": [{"target": "layers", "part": "feed_forward", "sparsity": 0.2, "compensation": "linear"}]},
            "linear is for whole layers; for a part take least_squares",
        ),
        ({"prune": [STEP | {"exclude": "*.0.*"}]}, r"expected a list, such as \['*.0.*'\]"),
        ({"prune": [STEP | {"sparsity": True}]}, "prune.0.sparsity: True: expected a fraction"),
        ({"prune": [STEP | {"sparsity": "0.5"}]}, "prune.0.sparsity: '0.5': expected a fraction"),
        ({"prune": [STEP | {"sparsity": math.nan}]}, "prune.0.sparsity: nan: expected a fraction"),
        ({"prune": [STEP | {"max_sparsity": math.inf}]}, "inf: expected a fraction above 0, to 1"),
        ({"prune": [STEP | {"round_to": True}]}, "round_to: True: expected a whole number"),
        (
            {"prune": [STEP | {"round_to": "8"}]},
            "round_to: '8': expected a whole number, in plain digits without quotes",
        ),
        ({"prune": [STEP | {"uniform": "yes"}]}, "'yes': expected true or false; yes is only a word here"),
        ({"prune": [{"target": "weights", "threshold": {"rule": "absolute", "value": "1"}}]}, "expected a number"),
        ({"prune": [{"target": "weights", "threshold": 0.1}]}, "a section with the keys rule, value"),
        ({"prune": "weights"}, "prune: 'weights': expected a list"),
        ({"name": 5}, "name: 5: expected text"),
        ({"seed": 2**32}, "seed: 4294967296: expected at most 4294967295"),
        ({"calibration": {"samples": -1}}, "calibration.samples: -1: expected 1 or more"),
        ({"output": {"push_to_hub": 1}}, "output.push_to_hub: 1: expected true or false"),
        ({"data": {"name_or_path": "x", "test_size": 1}}, "data.test_size: 1: expected less than 1"),
        ({"model": {"name_or_path": "x", "task": "text-clasification"}}, "did you mean 'text-classification'"),
        ({"model": {"task": "text-generation"}}, "model.name_or_path: this key is required"),
        ({"prune": [STEP | {"scope": "output"}]}, "scope output is for target weights"),
        ({"prune": [STEP | {"pattern": "2:4", "sparsity": None}]}, "pattern is for target weights"),
        ({"prune": [{"target": "weights", "sparsity": {"macs": 0.5}}]}, "save no operation"),
        ({"prune": [{"target": "ffn_neurons", "remove": [1]}]}, "says where"),
        ({"prune": [STEP | {"criterion": "tailor"}]}, "did you mean 'taylor'"),
        ({"prune": [STEP | {"criterion": {"name": "l1", "p": 3}}]}, "takes no options; unknown: p"),
        ({"prune": [STEP | {"allocation": "owl"}]}, "allocation owl is for weights, not ffn_neurons"),
        ({"prune": [STEP | {"allocation": "kin"}]}, "; did you mean 'kind'"),
        (
            {"prune": [STEP | {"allocation": "kind"}]},
            "prune.0.scope: allocation kind goes with scope global, not layer",
        ),
        ({"prune": [STEP | {"allocation": {"name": "sensitivity"}}]}, "needs its option file"),
        ({"prune": [STEP | {"allocation": {"*.0.*": 1}}]}, "*.0.*: expected a fraction from 0 to below 1"),
        (
            {"prune": [STEP | {"allocation": {"*": 0.1}, "uniform": True}]},
            "uniform asks for equal sites and an allocation",
        ),
        ({"prune": [{"target": "weights", "pattern": "2:4", "max_sparsity": 0.4}]}, "N:M says for each group"),
        (
            {"prune": [{"target": "layers", "remove": [1], "min_sparsity": 0.4}]},
            "min_sparsity goes with a sparsity; remove says",
        ),
        ({"prune": [STEP | {"compensation": "linear"}]}, "compensation linear is for layers, not ffn_neurons"),
        ({"prune": [STEP | {"compensation": "least_square"}]}, "did you mean 'least_squares'"),
        ({"prune": [STEP | {"compensation": ["bias"]}]}, r"compensation: \['bias'\]: expected one of none, bias"),
        ({"prune": [STEP | {"compensation": {"name": "bias", "ad": True}}]}, "bias takes add; unknown: ad; did you"),
        (
            {"prune": [STEP | {"compensation": {"name": "bias", "add": 1}}]},
            "add of compensation bias is 1; expected true",
        ),
        (
            {"prune": [STEP | {"target": "layers", "compensation": {"name": "least_squares", "add": True}}]},
            "add gives a bias to what lost heads or neurons",
        ),
        ({"prune": [STEP | {"compensation": {"name": "none", "add": True}}]}, "none takes no options; unknown: add"),
        (
            {"calibration": {"offload": "dsk"}},
            "'dsk' is not allowed; expected one of 'none', 'disk'; did you mean 'disk'",
        ),
        ({"prune": [LOSSES | {"threshold": {"rule": "absolute", "value": 1}}]}, "how many leave, so give a sparsity"),
        ({"prune": [LOSSES | {"sparsity": 0.5, "scope": "global"}]}, "one site at a time, scope layer"),
        (
            {"prune": [STEP | {"criterion": {"name": "loss_change", "greedy": True}, "scope": "global"}]},
            "one site at a time, scope layer; with {name: loss_change, greedy: false} it goes",
        ),
        (
            {"prune": [{"target": "layers", "sparsity": 0.2, "criterion": "angular", "scope": "global"}]},
            "criterion angular goes through one site at a time, scope layer; else take another",
        ),
        (
            {"prune": [LOSSES | {"criterion": "angular", "threshold": {"rule": "absolute", "value": 1}}]},
            "angular has to know how many leave, so give a sparsity",
        ),
        ({"prune": [STEP | {"criterion": "angular"}]}, "angular is not defined for ffn_neurons; it is for layers"),
        (
            {"prune": [{"target": "layers", "part": "attention", "sparsity": 0.2, "criterion": "angular"}]},
            "criterion angular is for whole layers; for a part take loss_change",
        ),
        ({"prune": [STEP | {"criterion": "combined"}]}, "combined needs its option of: {name: combined, of: …}"),
        ({"prune": [STEP | {"criterion": combined(l1=1)}]}, "of of criterion combined: expected two or more criteria"),
        (
            {"prune": [STEP | {"criterion": combined(l1=1, tailor=1)}]},
            "'tailor' can't be combined; those that can: l1",
        ),
        ({"prune": [STEP | {"criterion": combined(l1=1, tailor=1)}]}, "did you mean 'taylor'"),
        ({"prune": [STEP | {"criterion": combined(l1=1, sparsegpt=1)}]}, "'sparsegpt' can't be combined"),
        ({"prune": [STEP | {"criterion": combined(l1=0, taylor=1)}]}, "l1: expected a weight above 0"),
        ({"prune": [STEP | {"criterion": combined(l1=1, random={"seed": 1})}]}, "random: expected a weight above 0"),
        (
            {"prune": [STEP | {"criterion": combined(l1=1, random={"weight": 1, "sed": 1})}]},
            "criterion random takes seed; unknown: sed; did you mean 'seed'",
        ),
        (
            {"prune": [STEP | {"target": "layers", "criterion": combined(fluctuation=1, fisher=1)}]},
            "criterion fluctuation is not defined for layers; it is for attention_heads, ffn_neurons",
        ),
        (
            {"prune": [{"target": "layers", "sparsity": 0.5, "compensation": "bias"}]},
            "compensation bias is for attention_heads, ffn_neurons, not layers",
        ),
        (
            {"prune": [STEP | {"criterion": "wanda"}]},
            "criterion wanda is not defined for ffn_neurons; it is for weights",
        ),
        (
            {"prune": [{"target": "weights", "sparsity": 0.5, "criterion": "sparsegpt", "scope": "global"}]},
            "criterion sparsegpt prunes matrix by matrix, scope layer; drop global",
        ),
        (
            {
                "prune": [
                    {"target": "weights", "threshold": {"rule": "absolute", "value": 1}, "criterion": "sparsegpt"}
                ]
            },
            "criterion sparsegpt goes with a sparsity or a pattern N:M",
        ),
        (
            {"prune": [{"target": "weights", "sparsity": 0.5, "criterion": {"name": "sparsegpt", "block": 1.5}}]},
            "block of criterion sparsegpt is 1.5",
        ),
        (
            {"prune": [{"target": "weights", "sparsity": 0.5, "criterion": "soft_movement"}]},
            "criterion soft_movement goes with a threshold; for a share or N:M take movement",
        ),
        (
            {"prune": [{"target": "weights", "pattern": "2:4", "criterion": "soft_movement"}]},
            "criterion soft_movement goes with a threshold",
        ),
        (
            {"prune": [{"target": "layers", "sparsity": 0.5, "criterion": "movement"}]},
            "criterion movement is not defined for layers; it is for attention_heads, ffn_neurons, weights",
        ),
        ({"distillation": {"weight": 0}}, "nothing is distilled: expected a weight or hidden_states above 0"),
        ({"distillation": {"temprature": 2}}, "did you mean 'temperature'"),
        ({"distillation": {"temperature": 0, "weight": 2}}, "temperature: 0: expected more than 0"),
        ({"schedule": {"rewind": 0.2}}, r"rewind \(0.2\) is after begin \(0.1\)"),
        ({"prune": [{"target": "weights", "sparsity": 0.5, "schedule": {"rewind": 0}}]}, "rewind is said once"),
        (
            {"schedule": {"shrink": "when_finl"}},
            "expected one of 'at_end', 'when_final', 'never'; did you mean 'when_final'",
        ),
        ({"prune": [STEP | {"schedule": {"shrink": "when_final"}}]}, "shrink is said once"),
        ({"schedule": {"begin": 0.7, "end": 0.2}}, "is after end"),
        ({"schedule": {"begin": 0.7}}, r"begin \(0.7\) is after end \(0.6 by default\)"),
        ({"training": {"output_dir": "x"}}, "say it as output.dir"),
        ({"training": {"hub_token": "x"}}, "a recipe is shared, a token never"),
        ({"training": {"deepspeed": "x.json"}}, "training.deepspeed: the key is not supported in this version"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate: 'fast': expected a number"),
        ({"training": {"save_strategy": "stepps"}}, "one of no, steps, epoch, best; did you mean 'steps'"),
        ({"training": {"num_train_epochs": 0}}, "num_train_epochs: 0: expected more than 0"),
        ({"training": {"per_device_train_batch_size": 0}}, "train_batch_size: 0: expected 1 or more"),
        ({"training": {"max_steps": 2.5}}, "max_steps: 2.5: expected a whole number"),
        ({"training": {"resume_from_checkpoint": "x"}}, "expected true or false; the last checkpoint"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(RecipeError, match=message.replace("*", r"\*")):
        Recipe.from_dict(recipe(**changes))


def test_mistakes_in_values_hide_no_mistake_between_keys():
    step = {"target": "weights", "sparsity": 2, "remove": [0], "round_to": "x", "scope": "everywhere"}
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(recipe(prune=[step]))
    text = str(caught.value)
    assert (
        "2: expected a fraction" in text and "'everywhere' is not allowed" in text and "'x': expected a whole" in text
    )
    assert "remove is for layers" in text and "found sparsity, remove" in text


@pytest.mark.parametrize("not_a_recipe", [5, None, [1]])
def test_what_is_no_recipe_at_all(not_a_recipe):
    with pytest.raises(RecipeError, match="a recipe is a Recipe, a mapping or the path of a YAML file"):
        Recipe.load(not_a_recipe)


def test_a_missing_file_is_named():
    with pytest.raises(RecipeError, match=r"can't read the recipe 'nowhere.yaml'.*hf-prune recipes"):
        Recipe.from_yaml("nowhere.yaml")
