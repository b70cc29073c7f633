"""A user's mistakes: exit 2, one message that names value and remedy, no traceback, nothing written."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.conftest import snapshot
from tests.job import inputs


def without(folder, pattern):
    shutil.copytree(folder / "model", folder / "other")
    for path in (folder / "other").glob(pattern):
        path.unlink()


def cut_short(folder):
    without(folder, "nothing")
    path = folder / "other" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:90_000])


def with_nan(folder):
    without(folder, "nothing")
    path = folder / "other" / "model.safetensors"
    tensors = load_file(path)
    tensors["bert.encoder.layer.1.output.dense.weight"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def of_other_words(folder):
    without(folder, "nothing")
    inputs.text_model(folder / "other", vocab_size=20)


def rows(*pairs):
    return lambda folder: inputs.write_csv(folder / "other.csv", [{"text": t, "label": y} for t, y in pairs])


def three_classes(folder):
    rows(*[("w1 w2", "a"), ("w3", "b"), ("w4", "c")] * 8)(folder)


def pictures(folder):
    (folder / "other.csv" / "a").mkdir(parents=True)
    (folder / "other.csv" / "a" / "1.png").write_bytes(b"no picture")


MODEL, DATA = "model.name_or_path=./other", "data.name_or_path=./other.csv"
# id: (what is made first, overrides, message)
MISTAKES = {
    "no such model": (
        None,
        [MODEL],
        "model.name_or_path: there is no ./other; expected a file or directory, or a Hub id",
    ),
    "not on the Hub": (
        None,
        ["model.name_or_path=nobody/nothing"],
        "no config of 'nobody/nothing' can be read, and there",
    ),
    "an empty folder": (lambda f: (f / "other").mkdir(), [MODEL], "./other has no config.json"),
    "no weights": (
        lambda f: without(f, "*.safetensors"),
        [MODEL],
        "./other has no weights; expected model.safetensors",
    ),
    "no tokenizer": (lambda f: without(f, "tok*"), [MODEL], "./other has no tokenizer"),
    "another tokenizer": (of_other_words, [MODEL], "but the model knows 20 tokens: they don't belong together"),
    "weights cut short": (cut_short, [MODEL], "other/model.safetensors is damaged or cut short"),
    "NaN weights": (with_nan, [MODEL], "not finite, first in 'bert.encoder.layer.1.output.dense.weight'"),
    "an image task": (
        None,
        ["model.task=image-classification"],
        "tasks that fit it: text-classification, text-generation",
    ),
    "no language model": (
        None,
        ["model.task=text-generation"],
        "has no weights for 'cls.predictions.bias' and 5 more",
    ),
    "no such package": (None, ["model.name_or_path=package:nowhere/x"], "package 'nowhere', which is not installed"),
    "no such data": (None, [DATA], "data.name_or_path: there is no ./other.csv"),
    "data of no kind": (None, ["data.name_or_path=./recipe.yaml"], "'.yaml' is none of .csv, .json"),
    "no rows": (lambda f: (f / "other.csv").write_text("text,label\n"), [DATA], "./other.csv' can't be read"),
    "an empty file": (lambda f: (f / "other.csv").write_text(""), [DATA], "No columns to parse from file"),
    "one row": (rows(("w1", "a")), [DATA], "has 1 sample, too few to train and evaluate on"),
    "one class": (rows(*[("w1", "a")] * 9), [DATA], "'label' holds one class only ('a'); expected two or more"),
    "classes of others": (
        three_classes,
        [DATA],
        "the data have 3 classes, such as 'a'; the model's head has 2 (LABEL_0",
    ),
    "missing labels": (rows(*[("w1", "a"), ("w2", "")] * 9), [DATA], "samples have no 'label'; drop or label them"),
    "fractions as labels": (
        rows(*[("w1", 0.5), ("w2", 1.5)] * 9),
        [DATA],
        ".5; expected classes, as text or whole numbers",
    ),
    "missing texts": (rows(*[("w1", "a"), ("", "b")] * 9), [DATA], "samples have no 'text'; drop them"),
    "numbers as texts": (rows(*[(1, "a"), (2, "b")] * 9), [DATA], "'text' holds int64; expected text"),
    "no such column": (
        None,
        ["data.text_column=sentence"],
        "the data have no column 'sentence'; they have text, label",
    ),
    "no label column": (None, ["data.label_column=kind"], "data.label_column: the data have no column 'kind'"),
    "no such split": (None, ["data.eval_split=test"], "data.eval_split: 'test' is not among train"),
    "too long": (
        None,
        ["data.max_length=1000"],
        "data.max_length: 1000 tokens are more than the model's 512 positions",
    ),
    "all layers": (None, ["prune=[{target: layers, remove: [0, 1, 2]}]"], "none of its 3 units; keep one"),
    "all heads": (None, ["prune.0={target: attention_heads, remove: {'*.0.*': [0, 1, 2, 3]}}"], "none of its 4 units"),
    "no such layer": (
        None,
        ["prune=[{target: layers, remove: [9]}]"],
        "remove names [9] of bert.encoder.layer, which has",
    ),
    "no such site": (
        None,
        ["prune.0.include=['*.nowhere']"],
        "'*.nowhere' matches no attention_heads site; one is named",
    ),
    "no such weight": (
        None,
        ["prune=[{target: weights, sparsity: 0.5, exclude: [x]}]"],
        "'x' matches no weights site",
    ),
    "too large a budget": (None, ["prune.1.sparsity={macs: 0.9}"], "ffn_neurons can save at most"),
    "N:M of another width": (
        None,
        ["prune=[{target: weights, pattern: '2:5'}]"],
        "5 of 2:5 does not divide the 32 inputs",
    ),
    "sizes that can't be": (None, ["prune.0.scope=layer", "prune.0.uniform=true"], "Drop `uniform`"),
    "no data section": (None, ["data=null"], "needs the recipe's section 'data'"),
    "no model section": (None, ["model=null"], "needs the recipe's section 'model'"),
    "arguments together": (None, ["training.fp16=true", "training.bf16=true"], "training: TrainingArguments says: "),
    "movement without training": (
        None,
        ["training=null", "prune.0={target: weights, sparsity: 0.5, criterion: movement}"],
        "prune.0.criterion: movement scores what training does to the weights, and there is none here; use",
    ),
    "diverged training": (
        None,
        ["training.learning_rate=1e30"],
        "weights that are inf or nan, as after training with too high a learning rate",
    ),
    "a bad repository": (
        None,
        ["output.push_to_hub=true", "output.repo_id='a b'"],
        "output.repo_id: Repo id must use",
    ),
    "a file as output": (None, ["output.dir=data.csv"], "output.dir: data.csv is a file; give a directory"),
    "output in a file": (None, ["output.dir=data.csv/x"], "data.csv/x can't be written"),
    "output nowhere": (None, ["output.dir=/proc/x"], "output.dir: /proc/x can't be written"),
    "output is not empty": (None, ["output.dir=model"], "holds something else (config.json, model.safetensors"),
    "output is here": (None, ["output.dir=."], "output.dir: . holds something else"),
    "a wrong value": (
        None,
        ["prune.0.sparsity=2"],
        "override 'prune.0.sparsity=2': prune.0.sparsity: 2: expected a fraction",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_run(name, cli, folder):
    make, overrides, message = MISTAKES[name]
    if make is not None:
        make(folder)
    before = snapshot(folder)
    there = {path for path in folder.rglob("*") if path.is_dir()}
    done = cli("run", "recipe.yaml", *overrides)
    assert done.code == 2, done.err
    assert message in done.err
    assert done.err.count("hf-prune: ") == 1 and "Traceback" not in done.err
    assert done.out == ""
    assert snapshot(folder) == before
    assert {path for path in folder.rglob("*") if path.is_dir()} == there


def test_mistakes_in_the_recipe_come_all_at_once(cli, folder):
    text = (folder / "recipe.yaml").read_text().replace("sparsity: 0.25", "sparsty: 0.25").replace("taylor", "tailor")
    (folder / "recipe.yaml").write_text(text)
    for command in ("validate", "run"):
        done = cli(command, "recipe.yaml")
        assert done.code == 2
        assert (
            "recipe.yaml:" in done.err
            and "did you mean 'sparsity'?" in done.err
            and "did you mean 'taylor'?" in done.err
        )


def test_a_model_without_the_target(cli, folder):
    inputs.text_model(folder / "bloom", "bloom")
    recipe = inputs.write_recipe(
        folder / "bloom.yaml",
        model={"name_or_path": "./bloom", "task": "text-generation"},
        prune=[{"target": "attention_heads", "sparsity": 0.5}],
    )
    done = cli("run", recipe)
    assert done.code == 2
    assert "has no attention_heads that can be pruned" in done.err and "ALiBi" in done.err
    assert not (folder / "out").exists()


def test_a_random_head_is_not_evaluated_untrained(cli, folder):
    from transformers import AutoModel

    AutoModel.from_pretrained(folder / "model").save_pretrained(folder / "bare")
    for path in (folder / "model").glob("tok*"):
        shutil.copy(path, folder / "bare")
    done = cli("run", "recipe.yaml", "model.name_or_path=./bare", "training=null")
    assert done.code == 2
    assert "'classifier.bias', which would stay random: add a section 'training'" in done.err


def test_pictures_that_are_none(cli, folder):
    inputs.image_model(folder / "vit")
    inputs.images(folder / "pictures", 8)
    (folder / "pictures" / "dark" / "3.png").write_bytes(b"no picture")
    recipe = inputs.write_recipe(
        folder / "vit.yaml",
        model={"name_or_path": "./vit", "task": "image-classification"},
        data={"name_or_path": "./pictures"},
    )
    done = cli("run", recipe)
    assert done.code == 2
    assert "data.name_or_path: a sample can't be read" in done.err


def test_checkpoints_of_an_earlier_training_are_not_mixed_up(cli, folder):
    kept = folder / "out" / "training" / "dense" / "checkpoint-7"
    kept.mkdir(parents=True)
    done = cli("run", "recipe.yaml")
    assert done.code == 2
    assert "Go on from them with training.resume_from_checkpoint=true" in done.err
    assert kept.is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "can't read the recipe 'nowhere.yaml': No such file or directory"),
        (["run", "model"], "recipe.yaml"),
        (["run", "recipe.yaml", "--plan-only", "--smoke"], "give one of them"),
        (["run", "recipe.yaml", "--plan-only", "model=null"], "--plan-only needs the recipe's section 'model'"),
        (["validate"], "which recipe?"),
        (["validate", "recipe.yaml", "sparsity"], "'sparsity' is no override"),
        (["inspect", "./nowhere"], "MODEL: there is no ./nowhere"),
        (["inspect", "some/model"], "MODEL: no config of 'some/model' can be read"),
        (["inspect", "."], "MODEL: . has no config.json"),
        (["inspect", "package:nowhere"], "which is not installed"),
        (["report", "nowhere"], "there is no nowhere/pruning_report.json"),
        (["report", "model"], "expected the directory of a model pruned by hf_prune"),
        (["push", "nowhere", "me/it"], "nowhere is not a folder"),
        (["push", "model", "a b"], "Repo id must"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_in_other_commands(cli, folder, arguments, message):
    before = snapshot(folder)
    done = cli(*arguments)
    assert done.code == 2
    assert message in done.err and "Traceback" not in done.err
    assert done.out == ""
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not a valid JSON file"),
        ("{}", "Should have a `model_type` key"),
        ('{"model_type": "frobnicate"}', "does not recognize this architecture"),
        ('{"model_type": "colpali"}', "which is not one model"),
        ('{"model_type": "bert", "hidden_size": "big"}', "Field 'hidden_size' expected int"),
        (
            '{"model_type": "bert", "hidden_size": 30, "num_attention_heads": 7}',
            "builds no model: The hidden size (30)",
        ),
    ],
)
def test_configs_that_build_no_model(cli, tmp_path: Path, config, message):
    (tmp_path / "config.json").write_text(config)
    done = cli("inspect", tmp_path)
    assert done.code == 2
    assert message in done.err and len(done.err) < 600


@pytest.mark.parametrize("arguments", [["frobnicate"], ["run"], ["run", "x", "--frobnicate"], ["push", "x"]])
def test_what_is_no_command_is_explained(cli, arguments):
    done = cli(*arguments)
    assert done.code == 2
    assert "Usage: hf-prune" in done.err and "Traceback" not in done.err
