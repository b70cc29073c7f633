"""Each example script, run as a process on small real data for a few steps: what it writes is whole and as it says."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

import hf_prune
from tests.hub_server import HubServer
from tests.scripts import oracle
from tests.scripts.conftest import SCRIPTS, TRAINING


TEXT, IMAGE, LANGUAGE = "run_text_classification.py", "run_image_classification.py", "run_causal_lm.py"
LOOP = "run_text_classification_no_trainer.py"
ALL = (TEXT, IMAGE, LANGUAGE, LOOP)


def pushed(hub: HubServer, repo_id: str) -> dict[str, bytes]:
    return {name: blob.data for name, blob in hub.store.repos[repo_id].commit_at("main").files.items()}


def test_text_classification_with_its_arguments_in_a_file(run, news, bert, recipe, tmp_path):
    arguments = {
        "model_name_or_path": str(bert),
        **{f"{name}_file": str(news / f"{name}.csv") for name in ("train", "validation", "test")},
        "recipe": str(recipe),
        **dict.fromkeys(("do_train", "do_eval", "do_predict"), True),
        "max_seq_length": 16,
        "max_train_samples": 100,
        "max_predict_samples": 30,
        "max_steps": 6,
        "learning_rate": 0.01,
        "output_dir": str(tmp_path / "out"),
        "report_to": "none",
        "save_strategy": "no",
    }
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump(arguments), encoding="utf-8")
    done = run(TEXT, tmp_path / "arguments.yaml")
    assert "accuracy, computed here" in done.stderr  # no Hub, so no metric of `evaluate`
    assert "what left" in done.stdout

    model = oracle.load_pruned(AutoModelForSequenceClassification, tmp_path / "out", bert)
    assert sorted(model.config.id2label.values()) == ["business", "entertainment", "politics", "sports", "tech"]
    predicted, true = oracle.classify_news(model, tmp_path / "out", news / "validation.csv", 16)
    assert oracle.results(tmp_path / "out")["eval_accuracy"] == pytest.approx(oracle.share_equal(predicted, true))
    predicted, _ = oracle.classify_news(model, tmp_path / "out", news / "test.csv", 16)
    lines = (tmp_path / "out" / "predict_results.txt").read_text(encoding="utf-8").splitlines()
    assert lines == ["index\tprediction", *(f"{index}\t{name}" for index, name in enumerate(predicted[:30]))]


def test_image_classification_with_a_local_metric(run, digits, vit, recipe, local_metric, tmp_path):
    run(
        IMAGE,
        *("--model_name_or_path", vit, "--train_dir", digits / "train", "--validation_dir", digits / "validation"),
        *("--recipe", recipe, "--do_train", "--do_eval", "--metric_name", local_metric),
        *("--max_train_samples", 100, "--max_steps", 4, "--output_dir", tmp_path, *TRAINING),
    )
    model = oracle.load_pruned(AutoModelForImageClassification, tmp_path, vit)
    assert model.config.label2id == {f"digit-{number}": number for number in range(10)}
    predicted, true = oracle.classify_digits(tmp_path, digits / "validation")
    assert len(true) == 397
    found = oracle.results(tmp_path)["eval_n_wrong"]
    assert found == sum(p != t for p, t in zip(predicted, true, strict=True))


def test_causal_lm(run, english, llama, recipe, tmp_path):
    run(
        LANGUAGE,
        *("--model_name_or_path", llama, "--train_file", english / "train.txt"),
        *("--validation_file", english / "validation.txt", "--recipe", recipe, "--do_train", "--do_eval"),
        *("--block_size", 32, "--max_train_samples", 60, "--max_eval_samples", 40, "--max_steps", 4),
        *("--learning_rate", 0.01, "--output_dir", tmp_path, *TRAINING),
    )
    model = oracle.load_pruned(AutoModelForCausalLM, tmp_path, llama)
    blocks = oracle.token_blocks(tmp_path, english / "validation.txt", 32)[:40]
    found = oracle.results(tmp_path)
    assert found["eval_loss"] == pytest.approx(oracle.mean_loss(model, blocks), rel=1e-5)
    right = model(blocks).logits[:, :-1].argmax(-1) == blocks[:, 1:]
    assert found["eval_accuracy"] == pytest.approx(float(right.double().mean()))


def test_the_plain_loop_accumulates_gradients_and_pushes(run, news, bert, recipe, tmp_path):
    with HubServer() as hub:
        run(
            LOOP,
            *("--model_name_or_path", bert, "--train_file", news / "train.csv"),
            *("--validation_file", news / "validation.csv", "--recipe", recipe, "--max_seq_length", 16),
            *("--max_train_samples", 100, "--gradient_accumulation_steps", 2, "--num_train_epochs", 1),
            *("--learning_rate", 0.01, "--checkpoint_every_epoch", "--output_dir", tmp_path / "out"),
            *("--push_to_hub", "--hub_model_id", "small"),
            **hub.env(tmp_path / "home"),
        )
        files = pushed(hub, "ada/small")
    model = oracle.load_pruned(AutoModelForSequenceClassification, tmp_path / "out", bert)
    predicted, true = oracle.classify_news(model, tmp_path / "out", news / "validation.csv", 16)
    accuracy = oracle.share_equal(predicted, true)
    assert oracle.results(tmp_path / "out") == {"accuracy": pytest.approx(accuracy)}
    assert files.keys() >= {"model.safetensors", "config.json", "tokenizer.json", *oracle.PRUNED}
    assert not any(name.startswith("epoch_") for name in files)
    card = files["README.md"].decode()
    assert re.search(rf"^\| accuracy \|.*{re.escape(f'{accuracy:,.4g}')}", card, re.MULTILINE)
    assert 'from_pretrained("ada/small")' in card


def test_push_to_hub_keeps_the_card_of_the_pruned_model(run, news, bert, recipe, tmp_path):
    with HubServer() as hub:
        run(
            TEXT,
            *("--model_name_or_path", bert, "--train_file", news / "train.csv"),
            *("--validation_file", news / "validation.csv", "--recipe", recipe, "--do_train", "--do_eval"),
            *("--max_seq_length", 16, "--max_train_samples", 40, "--max_eval_samples", 40, "--max_steps", 3),
            *("--output_dir", tmp_path / "small-bert", "--push_to_hub", *TRAINING),
            **hub.env(tmp_path / "home"),
        )
        files = pushed(hub, "ada/small-bert")
    card = files["README.md"].decode()
    assert "## What left" in card and "hf_prune" in card
    assert "generated automatically according to the information the Trainer had access to" not in card
    assert files.keys() >= {"model.safetensors", "config.json", "tokenizer.json", *oracle.PRUNED}
    assert files["model.safetensors"] == (tmp_path / "small-bert" / "model.safetensors").read_bytes()


def test_without_a_recipe_it_is_plain_training(run, digits, vit, tmp_path):
    run(
        IMAGE,
        *("--model_name_or_path", vit, "--train_dir", digits / "train", "--do_train", "--do_eval"),
        *("--max_train_samples", 40, "--max_steps", 2, "--output_dir", tmp_path, *TRAINING),
    )
    assert not any((tmp_path / name).exists() for name in ("recipe.yaml", "pruning_report.json"))
    dense = AutoModelForImageClassification.from_pretrained(vit)
    assert AutoModelForImageClassification.from_pretrained(tmp_path).num_parameters() == dense.num_parameters()
    assert oracle.results(tmp_path)["eval_samples"] == 140  # a tenth of 1,400 was held out


def test_a_mistake_ends_the_process_with_one_message(run, tmp_path):
    done = run(
        TEXT,
        *("--model_name_or_path", "nowhere", "--train_file", "nowhere.csv", "--do_train"),
        *("--recipe", tmp_path / "nothing.yaml", "--output_dir", tmp_path / "out"),
        fails=True,
    )
    assert done.stderr.splitlines()[-1].startswith("RecipeError: can't read the recipe")
    assert "nothing.yaml" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def ended(monkeypatch, script: str, *arguments: object) -> str | int | None:
    """What `script` hands to `sys.exit`, run in this process: importing Transformers anew takes seconds."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    return caught.value.code


@pytest.fixture
def data(news, digits, english):
    """For each script the arguments of its data, and the names of its columns."""
    csv = ("--train_file", news / "train.csv", "--validation_file", news / "validation.csv")
    return {
        TEXT: (*csv, "--do_train"),
        LOOP: csv,
        IMAGE: ("--train_dir", digits / "train", "--validation_dir", digits / "validation", "--do_train"),
        LANGUAGE: (
            "--train_file",
            english / "train.txt",
            "--validation_file",
            english / "validation.txt",
            "--do_train",
        ),
    }


@pytest.mark.parametrize("script", ALL)
def test_a_recipe_that_is_not_there(monkeypatch, tmp_path, data, script):
    common = ("--model_name_or_path", "nowhere", "--output_dir", tmp_path / "out", *data[script])
    message = ended(monkeypatch, script, *common, "--recipe", "heads-and-neuron")
    assert "can't read the recipe 'heads-and-neuron'" in message and "hf-prune recipes" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "option", "columns"),
    [
        (TEXT, "--text_column_name", "text, label"),
        (TEXT, "--label_column_name", "text, label"),
        (LOOP, "--label_column_name", "text, label"),
        (IMAGE, "--label_column_name", "image, label"),
        (LANGUAGE, "--text_column_name", "text"),
    ],
)
def test_a_column_that_is_not_there(monkeypatch, tmp_path, data, script, option, columns):
    common = ("--model_name_or_path", "nowhere", "--output_dir", tmp_path / "out", *data[script])
    message = ended(monkeypatch, script, *common, option, "colour")
    assert f"the data have no column 'colour'; they have {columns}: choose with" in message and option in message


@pytest.mark.parametrize("script", ALL)
def test_a_data_file_that_is_not_there(monkeypatch, tmp_path, script):
    option = "--train_dir" if script == IMAGE else "--train_file"
    common = ("--model_name_or_path", "nowhere", "--output_dir", tmp_path / "out")
    message = ended(monkeypatch, script, *common, option, tmp_path / "nothing.csv")
    assert f"{option} {tmp_path / 'nothing.csv'}: expected" in message


def test_labels_that_are_no_classes(monkeypatch, tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n" + "a,0.5\nb,1.5\n" * 10, encoding="utf-8")
    common = ("--model_name_or_path", "nowhere", "--output_dir", tmp_path / "out", "--do_train")
    message = ended(monkeypatch, TEXT, *common, "--train_file", tmp_path / "train.csv")
    assert "--label_column_name label: expected one name or whole number a sample" in message


def test_a_recipe_without_training_is_refused(monkeypatch, tmp_path, recipe):
    common = ("--model_name_or_path", "nowhere", "--output_dir", tmp_path / "out")
    assert "add --do_train" in ended(monkeypatch, TEXT, *common, "--recipe", recipe, "--do_eval")


@pytest.mark.parametrize("script", ALL)
def test_the_commands_in_a_scripts_head_are_accepted(monkeypatch, tmp_path, script):
    """Each shows how it is run on one process and on two; with that command's arguments it gets as far as the data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    head = (SCRIPTS / script).read_text(encoding="utf-8").split('"""')[1]
    commands = re.findall(r"^    ((?:python|torchrun) (?:.*\\\n)*.*)", head, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["python", "torchrun"]
    Path("recipe.yaml").write_text("version: 1\nprune: [{target: weights, sparsity: 0.5}]\n", encoding="utf-8")
    spec = spec_from_file_location(script.removesuffix(".py"), SCRIPTS / script)
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    reached = []
    monkeypatch.setattr(module, "load_splits", lambda *_: reached.append(1) or sys.exit("here"))
    for command in commands:
        words = shlex.split(command.replace("\\\n", " "))
        arguments = words[words.index(f"scripts/{script}") + 1 :]
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit, match="here"):
            module.main()
    assert len(reached) == 2


def test_the_shipped_recipe_is_for_any_model():
    recipe = hf_prune.Recipe.load("heads-and-neurons").to_dict()
    assert not recipe.keys() & {"model", "data", "output", "training"}
    assert json.dumps(recipe)
