"""Where people take Trainer: other optimizers, data without a length, generation, saves and stops on the way."""

import logging
import random

import numpy
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    default_data_collator,
)

import hf_prune.pipeline
from hf_prune import PruningSeq2SeqTrainer
from hf_prune.apply.masks import masked_tensors, masks_of
from hf_prune.structure import inspect_model
from tests import zoo
from tests.training.data import RECIPE, Tokens, arguments, trainer
from tests.training.test_trainer import Watch, weights_equal


WITH_LAYERS = {
    **RECIPE,
    "prune": [{"target": "layers", "sparsity": 0.34, "criterion": "random"}, *RECIPE["prune"]],
}


def neurons(model):
    return [layer.intermediate.dense.out_features for layer in model.bert.encoder.layer]


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "adamw_torch_fused", "weight_decay": 0.3},
        {"optim": "adafactor", "gradient_accumulation_steps": 2, "max_grad_norm": 0.05},
        {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True", "weight_decay": 0.2, "learning_rate": 0.05},
        {"optim": "rmsprop", "bf16": True},
        {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "warmup_steps": 3, "label_smoothing_factor": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_entries_stay_zero_with_every_optimizer(tmp_path, options, dtype):
    if dtype is torch.bfloat16 and options.get("bf16"):
        pytest.skip("autocast is for float32 parameters")
    watch = Watch()
    run = trainer(tmp_path, recipe=WITH_LAYERS, model=zoo.build("bert", dtype), callbacks=[watch], **options)
    run.train()
    assert watch.n_masked > 0
    assert len(run.model.bert.encoder.layer) == 2 and sum(neurons(run.model)) == 48
    assert {parameter.dtype for parameter in run.model.parameters()} == {dtype}
    masked = [entry.values(parameter) for entry, parameter in masked_tensors(run.model)]
    assert masked and not any(values.any() for values in masked)
    verification = run.pruning_report.to_dict()["verification"]
    assert verification["max_difference"] <= verification["tolerance"]
    assert verification["dtype"] == str(dtype).removeprefix("torch.")


def require_alike(whole, rest):
    """A resumed run came to the result of the uninterrupted one."""
    assert weights_equal(rest.model, whole.model)
    assert masks_of(rest.model) == masks_of(whole.model)
    first, second = (run.pruning_report.to_dict() for run in (whole, rest))
    for key in ("sites", "weights", "sparsity", "totals", "checkpoint", "notes"):
        assert first[key] == second[key], key


@pytest.mark.parametrize("stop", [1, 5, 11, 16])
def test_resuming_with_layers_and_dropout(tmp_path, stop):
    """At the first step, between updates, at the last update, and after training's end."""
    whole = trainer(tmp_path / "whole", recipe=WITH_LAYERS, save_strategy="steps", save_steps=stop, weight_decay=0.1)
    whole.train()
    rest = trainer(tmp_path / "rest", recipe=WITH_LAYERS, weight_decay=0.1)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    require_alike(whole, rest)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize(("stop", "reached"), [(1, 0.0), (6, 0.3), (12, 0.5)])
def test_a_training_stopped_early_says_what_it_did_not_reach(tmp_path, caplog, stop, reached):
    """The schedule runs from step 2 to 11 of 16."""
    with caplog.at_level(logging.WARNING):
        run = trainer(tmp_path, callbacks=[StopAt(stop)])
        run.train()
    report = run.pruning_report.to_dict()
    achieved = report["sparsity"].get("ffn_neurons", 0.0)
    early = f"stopped at step {stop}, before the schedule's end at 11"
    assert any(early in note for note in report["notes"]) == (stop < 11) == (early in caplog.text)
    assert (achieved == 0.5) == (reached == 0.5) and (achieved == 0.0) == (reached == 0.0)
    left = sum(site["n_kept"] for site in report["sites"] if site["target"] == "ffn_neurons")
    assert left == sum(neurons(run.model)) == round((1 - achieved) * 144)
    run.save_model(tmp_path / "saved")
    assert weights_equal(AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved"), run.model)


def test_stopped_before_any_checkpoint_could_be_the_best(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run = trainer(tmp_path, callbacks=[StopAt(5)], load_best_model_at_end=True, **options)
    run.train()
    assert run.state.best_model_checkpoint is None
    assert any("stopped at step 5" in note for note in run.pruning_report.to_dict()["notes"])
    assert 72 < sum(neurons(run.model)) < 144


class Chance:
    """A collator that draws from every source of random numbers."""

    def __call__(self, features):
        batch = default_data_collator(features)
        drawn = [random.random(), float(numpy.random.random()), float(torch.rand(()))]
        self.last = drawn
        return batch


def test_calibration_draws_alike_each_time_and_gives_random_numbers_back(tmp_path):
    """Else the ranks would see other batches, and training other random numbers than without updates."""
    run = trainer(tmp_path)
    run.data_collator = collator = Chance()
    seen = []
    for _ in range(2):
        before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        run._calibration_batches()
        seen.append(collator.last)
        after = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        assert before == after
        random.random(), numpy.random.random(), torch.rand(())
    assert seen[0] == seen[1]


def test_verification_runs_in_the_models_own_precision(tmp_path, monkeypatch):
    """Autocast would hide a difference in rounding, or make one up: outputs inside are float32 while verifying."""
    seen, stock = [], hf_prune.pipeline.verify_models

    def verify(masked, smaller, *args, **kwargs):
        for model in (masked, smaller):
            inner = model.bert.encoder.layer[0].intermediate.dense
            inner.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        return stock(masked, smaller, *args, **kwargs)

    monkeypatch.setattr("hf_prune.pipeline.verify_models", verify)
    run = trainer(tmp_path, bf16=True)
    run.train()
    assert set(seen) == {torch.float32}
    reference = trainer(tmp_path / "stock", recipe=None, kind=Trainer, bf16=True)
    reference.train()
    ids = Tokens().ids[:2]
    assert run.model(input_ids=ids).logits.dtype == reference.model(input_ids=ids).logits.dtype


class Stream(IterableDataset):
    def __init__(self, n):
        self.tokens = Tokens(n)

    def __iter__(self):
        return (self.tokens[index] for index in range(len(self.tokens)))


@pytest.mark.parametrize("n", [32, 6], ids=["long", "shorter than the calibration"])
def test_data_without_a_length(tmp_path, n):
    run = trainer(tmp_path, max_steps=10)
    run.train_dataset = Stream(n)
    run.train()
    assert run.state.global_step == 10
    assert sum(neurons(run.model)) == 72


def test_a_batch_size_that_is_too_large_starts_anew_and_prunes_as_asked(tmp_path):
    """The first attempt runs out of memory after masks were put on."""
    run = trainer(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=8)
    step, attempts = run.training_step, []

    def training_step(model, inputs, *args, **kwargs):
        attempts.append(len(inputs["input_ids"]))
        if len(inputs["input_ids"]) > 4 and len(attempts) > 5:
            raise RuntimeError("CUDA out of memory.")
        return step(model, inputs, *args, **kwargs)

    run.training_step = training_step
    run.train()
    assert attempts[0] == 8 and attempts[-1] <= 4
    assert sum(neurons(run.model)) == 72
    assert run.pruning_report.to_dict()["sparsity"]["weights"] == pytest.approx(0.4, abs=1e-3)


def test_a_training_that_broke_off_goes_on_to_what_was_asked(tmp_path):
    run = trainer(tmp_path)
    step, calls = run.training_step, []

    def training_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    run.training_step = training_step
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert masks_of(run.model)
    run.train()
    assert sum(neurons(run.model)) == 72


class SaveOnTheWay(TrainerCallback):
    def __init__(self, step):
        self.step, self.weights = step, None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.run.save_model(f"{args.output_dir}/on-the-way")
            self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_model_saved_on_the_way_loads_masked(tmp_path):
    save = SaveOnTheWay(7)
    run = trainer(tmp_path, callbacks=[save])
    save.run = run
    run.train()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "on-the-way")
    assert neurons(loaded) == [48] * 3
    assert all(torch.equal(save.weights[name], tensor) for name, tensor in loaded.state_dict().items())
    assert any((tensor == 0).sum() > 100 for tensor in loaded.state_dict().values())


def test_checkpoints_are_rotated_and_the_best_eligible_one_is_kept(tmp_path):
    run = trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="wanted",
        greater_is_better=True,
    )
    run.compute_metrics = lambda _: {"wanted": -abs(run.state.global_step - 13.0)}
    run.train()
    assert run.state.best_global_step == 13
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-13", "checkpoint-16"]
    assert (tmp_path / "checkpoint-13" / "pruning_state.json").exists()


def test_predict_and_evaluate_run_on_the_small_model(tmp_path):
    run = trainer(tmp_path, recipe=WITH_LAYERS, eval_strategy="steps", eval_steps=4)
    run.train()
    predictions = run.predict(Tokens(seed=1)).predictions
    run.model.eval()
    with torch.no_grad():
        expected = run.model(input_ids=Tokens(seed=1).ids).logits
    assert torch.allclose(torch.tensor(predictions), expected, atol=1e-6)
    assert run.evaluate()["eval_loss"] == pytest.approx(run.evaluate()["eval_loss"])
    assert [site.n_units for site in inspect_model(run.model).of("layers")] == [2]


class Pairs(torch.utils.data.Dataset):
    def __init__(self, n=16):
        self.ids = torch.randint(3, 99, (n, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index].tolist()
        return {"input_ids": ids, "attention_mask": [1] * 8, "labels": ids[:4]}


def collate(features):
    return {name: torch.tensor([feature[name] for feature in features]) for name in features[0]}


def seq2seq(directory, kind, **named):
    model = T5ForConditionalGeneration(zoo.build("t5").config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    options = {
        name: value
        for name, value in arguments(directory).to_dict().items()
        if name in ("per_device_train_batch_size", "num_train_epochs", "learning_rate", "save_strategy", "use_cpu", "seed", "disable_tqdm", "logging_steps")
    }  # fmt: skip
    args = Seq2SeqTrainingArguments(
        output_dir=str(directory), report_to=[], predict_with_generate=True, generation_max_length=6, **options
    )
    return kind(
        model=model,
        args=args,
        train_dataset=Pairs(),
        eval_dataset=Pairs(),
        data_collator=collate,
        **named,
    )


def test_seq2seq_with_generation(tmp_path):
    recipe = {
        "version": 1,
        "prune": [
            {"target": "layers", "sparsity": 0.34, "scope": "layer"},
            {"target": "attention_heads", "sparsity": 0.5, "criterion": "taylor"},
            {"target": "ffn_neurons", "sparsity": 0.5, "criterion": "activation", "scope": "global"},
        ],
        "calibration": {"samples": 8, "batch_size": 4},
    }
    run = seq2seq(tmp_path / "ours", PruningSeq2SeqTrainer, recipe=recipe)
    run.train()
    predicted = torch.tensor(run.predict(Pairs(), max_length=6).predictions)
    expected = run.model.generate(Pairs().ids, max_length=6)
    assert torch.equal(predicted[:, : expected.shape[1]], expected)
    assert run.evaluate()["eval_loss"] > 0
    assert len(run.model.encoder.block) == 2
    run.save_model(tmp_path / "saved")
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path / "saved")
    ids = Pairs().ids[:2]
    assert torch.equal(loaded.generate(ids, max_length=6), run.model.generate(ids, max_length=6))


def test_seq2seq_without_a_recipe_is_its_trainer(tmp_path):
    ours = seq2seq(tmp_path / "a", PruningSeq2SeqTrainer)
    loss = ours.train().training_loss
    stock = seq2seq(tmp_path / "b", Seq2SeqTrainer)
    assert stock.train().training_loss == loss
    assert weights_equal(ours.model, stock.model)


def test_never_shrinking_says_that_masked_layers_come_back_on_loading(tmp_path):
    recipe = {**WITH_LAYERS, "schedule": {**RECIPE["schedule"], "shrink": "never"}}
    run = trainer(tmp_path, recipe=recipe)
    run.train()
    assert len(run.model.bert.encoder.layer) == 3
    assert any("masked layer" in note and "shrink_" in note for note in run.pruning_report.to_dict()["notes"])


def test_what_is_sharded_has_the_structure_of_the_model_that_a_search_tries_now(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    run._is_sharded = True
    monkeypatch.setattr(Trainer, "_prepare_for_training", lambda *args: None)
    run._prepare_for_training(1, None, None)
    first = run._skeleton
    assert all(parameter.is_meta for parameter in first.parameters())
    run._prepare_for_training(1, None, None)  # anew, with a smaller batch: the model may be wrapped by now
    assert run._skeleton is first
    run.model = zoo.build("bert", num_hidden_layers=2)
    run._prepare_for_training(1, None, None)
    assert len(run._skeleton.bert.encoder.layer) == 2 < len(first.bert.encoder.layer)
