"""Every way that people use Trainer: without a recipe the same to the bit, with one pruned as asked.

One table, `ROWS`; docs/training.md shows it.
"""

from pathlib import Path

import numpy
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_prune import PruningTrainer
from hf_prune.apply.masks import masked_tensors
from tests import zoo
from tests.training.data import RECIPE, Tokens, arguments
from tests.training.test_trainer import Watch, weights_equal


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Tokens())


class TooLarge(TrainerCallback):
    """Memory ends in the ninth step, after the first update, of a batch of more than four."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.train_batch_size > 4 and state.global_step == 4:
            raise RuntimeError("CUDA out of memory.")


def own_loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / (
        num_items_in_batch if num_items_in_batch is not None else len(labels)
    )


def accuracy(prediction):
    return {"accuracy": float(numpy.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def train(run):
    run.train()


def predict(run):
    run.train()
    output = run.predict(Tokens(seed=1))
    return output.predictions.tolist(), output.metrics["test_loss"]


def search(run):
    """Two whole trials, one that Optuna stops on the way, and one whole again; then a training with the best."""
    optuna = pytest.importorskip("optuna", reason="in the extra `dev`")

    class StopsTheThird(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number == 2

    best = run.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)},
        backend="optuna",
        direction="minimize",
        n_trials=4,
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=StopsTheThird(),
    )
    for name, value in best.hyperparameters.items():
        setattr(run.args, name, value)
    run.train()
    return best.objective, best.hyperparameters


EVALUATED = dict(eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)

# what is used -> arguments of Trainer and TrainingArguments, and what is done where it isn't just `train()`
ROWS = {
    "nothing": ({}, train),
    "gradient accumulation": (dict(gradient_accumulation_steps=2, max_grad_norm=0.1, num_train_epochs=4), train),
    "bf16 autocast": (dict(bf16=True), train),
    "gradient checkpointing": (dict(gradient_checkpointing=True), train),
    "torch_compile": (dict(torch_compile=True, torch_compile_backend="eager"), train),
    "torch_compile by inductor": (dict(torch_compile=True), train),
    "label smoothing": (dict(label_smoothing_factor=0.1), train),
    "compute_loss_func": (dict(compute_loss_func=own_loss), train),
    "optim: fused AdamW": (dict(optim="adamw_torch_fused", weight_decay=0.1), train),
    "optim: Adafactor": (dict(optim="adafactor"), train),
    "optim: SGD with momentum": (
        dict(optim="sgd", optim_args="momentum=0.9,nesterov=True", learning_rate=0.05),
        train,
    ),
    "optim: RMSprop": (dict(optim="rmsprop"), train),
    "optim: Adagrad": (dict(optim="adagrad", learning_rate=0.01), train),
    "optimizer_cls_and_kwargs": (dict(optimizer_cls_and_kwargs=(torch.optim.NAdam, {"lr": 1e-3})), train),
    "learning rate schedule": (dict(lr_scheduler_type="cosine", warmup_steps=3), train),
    "model_init": (dict(model_init=lambda: zoo.build("bert")), train),
    "IterableDataset": (dict(train_dataset=Stream(), max_steps=16), train),
    "incomplete batches left out": (dict(dataloader_drop_last=True, per_device_train_batch_size=5), train),
    "auto_find_batch_size": (
        dict(auto_find_batch_size=True, per_device_train_batch_size=5, callbacks=[TooLarge()], num_train_epochs=3),
        train,
    ),
    "evaluation on the way": (dict(**EVALUATED, compute_metrics=accuracy, save_total_limit=2), train),
    "load_best_model_at_end": (dict(**EVALUATED, load_best_model_at_end=True), train),
    "early stopping": (
        dict(
            **EVALUATED,
            load_best_model_at_end=True,
            learning_rate=0.1,
            callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        ),
        train,
    ),
    "NEFTune": (dict(neftune_noise_alpha=5.0), train),
    "predict": ({}, predict),
    "hyperparameter_search": (dict(eval_strategy="epoch", model_init=lambda: zoo.build("bert")), search),
}
SLOW = {"torch_compile by inductor"}
NAMED = (
    "callbacks",
    "compute_loss_func",
    "compute_metrics",
    "model_init",
    "optimizer_cls_and_kwargs",
    "train_dataset",
)
CASES = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in ROWS]


def make(name, directory, kind, callbacks=(), **recipe):
    options = dict(ROWS[name][0])
    named = {key: options.pop(key) for key in NAMED if key in options}
    named["callbacks"] = [*named.get("callbacks", ()), *callbacks]
    return kind(
        model=None if "model_init" in named else zoo.build("bert"),
        args=arguments(directory, **options),
        eval_dataset=Tokens(seed=1),
        **{"train_dataset": Tokens(), **named},
        **recipe,
    )


def history(run):
    timed = ("runtime", "per_second")
    return [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in run.state.log_history]


@pytest.mark.parametrize("name", CASES)
def test_without_a_recipe_it_is_trainer_bit_for_bit(tmp_path, name):
    ours = make(name, tmp_path / "ours", PruningTrainer)  # making it sets the seed
    said = ROWS[name][1](ours)
    stock = make(name, tmp_path / "stock", Trainer)
    assert ROWS[name][1](stock) == said
    assert weights_equal(ours.model, stock.model)
    assert history(ours) == history(stock)
    assert not weights_equal(ours.model, zoo.build("bert"))


@pytest.mark.parametrize("name", CASES)
def test_with_a_recipe_it_prunes_as_asked(tmp_path, name):
    watch = Watch()
    run = make(name, tmp_path, PruningTrainer, callbacks=[watch], recipe=RECIPE)
    ROWS[name][1](run)
    assert watch.n_masked > 0
    layers = run.model.bert.encoder.layer
    assert sum(layer.intermediate.dense.out_features for layer in layers) == 72
    assert [layer.attention.self.query.out_features for layer in layers] == [24] * 3
    masked = [entry.values(parameter) for entry, parameter in masked_tensors(run.model)]
    assert masked and not any(values.any() for values in masked)
    report = run.pruning_report.to_dict()
    assert report["sparsity"]["ffn_neurons"] == 0.5 and report["sparsity"]["weights"] == pytest.approx(0.4, abs=1e-3)
    assert report["verification"]["max_difference"] <= report["verification"]["tolerance"]
    assert not [note for note in report["notes"] if "stopped at step" in note]
    assert all("pruning/left/ffn_neurons" not in entry or "loss" not in entry for entry in run.state.log_history)


def test_the_page_shows_the_table():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    table = page.split("## With Trainer's features")[1].split("\n## ")[0]
    named = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    assert named == [*ROWS]
