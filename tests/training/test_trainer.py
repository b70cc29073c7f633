"""`PruningTrainer` is Trainer, and prunes on schedule where it has a recipe."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback, Trainer, TrainerCallback

import hf_prune
from hf_prune import VerificationError
from hf_prune.apply.masks import masked_tensors, masks_of
from hf_prune.errors import CheckpointError
from tests.training.data import RECIPE, trainer


def weights_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


class Watch(TrainerCallback):
    """After every step: is what is masked zero?"""

    n_masked = 0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for entry, parameter in masked_tensors(model):
            values = entry.values(parameter)
            assert not values.any()
            self.n_masked = max(self.n_masked, values.numel())


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05, "weight_decay": 0.1},
        {"weight_decay": 0.5, "gradient_accumulation_steps": 2},
        {"bf16": True, "max_grad_norm": 0.01},
        {"gradient_checkpointing": True},
        {"optim": "adafactor"},
    ],
    ids=str,
)
def test_masks_survive_training(tmp_path, options):
    watch = Watch()
    run = trainer(tmp_path, callbacks=[watch], **options)
    run.train()
    assert watch.n_masked > 0
    assert sum(layer.intermediate.dense.out_features for layer in run.model.bert.encoder.layer) == 72
    assert [layer.attention.self.query.out_features for layer in run.model.bert.encoder.layer] == [24] * 3
    assert run.pruning_report.to_dict()["verification"]["inputs"] == "training"


def test_after_training_the_small_model_is_the_model(tmp_path):
    run = trainer(tmp_path / "run")
    run.train()
    metrics = run.evaluate()
    assert metrics["eval_loss"] == metrics["eval_loss"]
    run.save_model(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert weights_equal(loaded, run.model)
    report = json.loads((tmp_path / "saved" / "pruning_report.json").read_text())
    assert report["sparsity"]["ffn_neurons"] == 0.5
    assert hf_prune.Recipe.from_pretrained(tmp_path / "saved").to_dict() == run.recipe.to_dict()
    again = trainer(tmp_path / "again", recipe=None, model=loaded)
    again.model.eval()
    assert again.evaluate()["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-6)


def test_sparsity_is_logged_by_target_and_rises(tmp_path):
    run = trainer(tmp_path)
    run.train()
    logged = [entry["sparsity/ffn_neurons"] for entry in run.state.log_history if "loss" in entry]
    assert logged[0] == 0 and logged[-1] == 0.5 and logged == sorted(logged) and len(set(logged)) == 4
    assert {"sparsity/attention_heads", "sparsity/weights"} <= run.state.log_history[0].keys()


@pytest.mark.parametrize("stop", [2, 7, 14])
def test_resuming_gives_the_weights_of_the_uninterrupted_run(tmp_path, stop):
    """16 steps; the schedule runs from 2 to 11: a stop before, inside and after it."""
    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=stop)
    whole.train()
    rest = trainer(tmp_path / "rest")
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert weights_equal(rest.model, whole.model)
    assert masks_of(rest.model) == masks_of(whole.model)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    trainer(tmp_path / "run", save_strategy="steps", save_steps=8).train()
    other = {**RECIPE, "schedule": {**RECIPE["schedule"], "end": 0.9}}
    with pytest.raises(CheckpointError, match=r"schedule\.end: the checkpoint has 0\.7, this run 0\.9"):
        trainer(tmp_path / "run", recipe=other).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_masks_is_refused(tmp_path):
    trainer(tmp_path / "run", recipe=None, save_strategy="steps", save_steps=8).train()
    with pytest.raises(CheckpointError, match="saved without pruning"):
        trainer(tmp_path / "run").train(resume_from_checkpoint=True)


def test_the_best_model_is_as_sparse_as_asked_for(tmp_path):
    """The metric is best before the schedule's end; it counts from there on."""
    run = trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="wanted",
        greater_is_better=True,
    )
    run.compute_metrics = lambda _: {"wanted": -float(run.state.global_step)}  # falls from step to step
    run.train()
    assert run.state.best_global_step == 11
    assert run.pruning_report.to_dict()["sparsity"]["ffn_neurons"] == 0.5


def test_early_stopping_waits_for_the_final_sparsity(tmp_path):
    run = trainer(
        tmp_path,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="wanted",
        greater_is_better=True,
    )
    run.compute_metrics = lambda _: {"wanted": -float(run.state.global_step)}
    run.train()
    assert run.state.global_step == 12
    assert run.pruning_report.to_dict()["sparsity"]["ffn_neurons"] == 0.5


def test_when_verification_fails_the_trained_masked_model_is_on_disk(tmp_path, monkeypatch):
    def differs(*args, **kwargs):
        raise VerificationError("they differ")

    monkeypatch.setattr("hf_prune.pipeline.verify_models", differs)
    run = trainer(tmp_path)
    with pytest.raises(VerificationError):
        run.train()
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "masked-model")
    assert weights_equal(saved, run.model)
    assert saved.bert.encoder.layer[0].intermediate.dense.out_features == 48


def test_a_second_training_keeps_what_was_pruned_and_prunes_no_more(tmp_path):
    run = trainer(tmp_path)
    run.train()
    sizes = {name: tuple(p.shape) for name, p in run.model.named_parameters()}
    run.train()
    assert {name: tuple(p.shape) for name, p in run.model.named_parameters()} == sizes
    masked = [entry.values(parameter) for entry, parameter in masked_tensors(run.model)]
    assert masked and not any(values.any() for values in masked)


def test_what_evaluate_measures_of_the_pruned_model_is_in_its_report_and_card(tmp_path):
    run = trainer(tmp_path)
    before = run.evaluate()
    assert run.pruning_report is None and before["eval_loss"]
    run.train()
    loss = run.evaluate()["eval_loss"]
    assert run.pruning_report.to_dict()["measured"]["metrics"] == {"pruned": {"loss": loss}}
    run.save_model(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "pruning_report.json").read_text())["measured"]["metrics"]
    card = (tmp_path / "saved" / "README.md").read_text()
    assert f"{loss:,.4g}" in card
    assert "No metric was recorded" not in card


def test_never_shrinking_leaves_a_masked_model(tmp_path):
    run = trainer(tmp_path, recipe={**RECIPE, "schedule": {**RECIPE["schedule"], "shrink": "never"}})
    run.train()
    assert run.model.bert.encoder.layer[0].intermediate.dense.out_features == 48
    assert masks_of(run.model).units
    run.save_model(tmp_path / "saved")
    assert weights_equal(AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved"), run.model)


def test_trainers_card_does_not_overwrite_ours(tmp_path):
    run = trainer(tmp_path)
    run.train()
    run.save_model()
    card = (tmp_path / "README.md").read_text()
    run.create_model_card(model_name="mine")
    assert (tmp_path / "README.md").read_text() == card and "hf_prune" in card


def test_a_mixin_and_a_callback_for_other_trainers(tmp_path):
    class Mine(hf_prune.PruningMixin, Trainer):
        pass

    run = trainer(tmp_path / "mixin", kind=Mine)
    run.train()
    reference = trainer(tmp_path / "reference")
    reference.train()
    assert weights_equal(run.model, reference.model)
    callback = hf_prune.PruningCallback(RECIPE, calibration=reference._calibration_batches())
    stock = trainer(tmp_path / "callback", recipe=None, kind=Trainer, callbacks=[callback])
    stock.train()
    assert weights_equal(stock.model, reference.model)
    assert callback.pruning_report.to_dict()["sparsity"]["ffn_neurons"] == 0.5
