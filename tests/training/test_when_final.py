"""`schedule.shrink: when_final`: the run goes on as the masked one, on a smaller model."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, TrainerCallback

from hf_prune import Pruner, PruningCallback, PruningTrainer
from hf_prune.apply.masks import masked_tensors
from hf_prune.errors import RecipeError, VerificationError
from hf_prune.structure.inputs import example_inputs
from tests import zoo
from tests.training.data import RECIPE, trainer
from tests.training.test_trainer import weights_equal
from tests.training.test_trainer_corners import StopAt, neurons, require_alike


STEPS = [{"target": "layers", "sparsity": 0.34, "criterion": "random"}, *RECIPE["prune"]]


def recipe(shrink, **schedule):
    """Masks are final after step 8 of 32: at least 20 follow."""
    return {
        **RECIPE,
        "prune": STEPS,
        "schedule": {"name": "linear", "begin": 0.1, "end": 0.25, "updates": 2, "shrink": shrink, **schedule},
    }


def without_dropout():
    return zoo.build("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def run(directory, shrink, **options):
    one = trainer(
        directory,
        recipe=recipe(shrink),
        model=options.pop("model", None) or without_dropout(),
        num_train_epochs=4,
        **options,
    )
    one.train()
    return one


def losses(one):
    return [entry["loss"] for entry in one.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1, "max_grad_norm": 0.1},
        {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True", "learning_rate": 0.05, "max_grad_norm": 0.2},
        {"optim": "rmsprop", "max_grad_norm": 0.5, "learning_rate": 1e-4},
        {"optim": "adamw_torch_fused", "gradient_checkpointing": True, "max_grad_norm": 0.1},
    ],
    ids=str,
)
def test_the_loss_is_the_masked_run_s(tmp_path, options):
    shrunk = run(tmp_path / "shrunk", "when_final", **options)
    masked = run(tmp_path / "masked", "at_end", **options)
    ours, theirs = losses(shrunk), losses(masked)
    assert ours[:8] == theirs[:8], "before, it is the same run"
    assert len(ours) == 32 and ours[8:] != ours[:24]
    assert max(abs(a - b) for a, b in zip(ours[8:28], theirs[8:28], strict=True)) < 1e-4
    assert neurons(shrunk.model) == neurons(masked.model)
    assert [entry["grad_norm"] for entry in shrunk.state.log_history if "loss" in entry][8:] == pytest.approx(
        [entry["grad_norm"] for entry in masked.state.log_history if "loss" in entry][8:], rel=1e-3
    )


class Sizes(TrainerCallback):
    def __init__(self):
        self.seen = {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        groups = optimizer.param_groups
        self.seen[state.global_step] = sum(p.numel() for p in model.parameters())
        assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.parameters()}
        for group in groups:
            for parameter in group["params"]:
                state_of = optimizer.state[parameter]
                assert state_of["exp_avg"].shape == state_of["exp_avg_sq"].shape == parameter.shape
                assert int(state_of["step"]) == state.global_step
        self.masked = [entry.values(parameter) for entry, parameter in masked_tensors(model)]
        assert not any(values.any() for values in self.masked)


def test_it_is_small_once_the_schedule_ends_and_the_report_says_how_much_faster(tmp_path):
    sizes = Sizes()
    one = run(tmp_path, "when_final", callbacks=[sizes])
    assert len(set(sizes.seen.values())) == 2
    assert (
        sizes.seen[7]
        == sizes.seen[1]
        > sizes.seen[8]
        == sizes.seen[32]
        == sum(p.numel() for p in one.model.parameters())
    )
    assert sizes.masked, "single weights stay masked"
    report = one.pruning_report.to_dict()
    pace = report["measured"]["step_seconds"]
    assert pace["masked_over_shrunk"] == pace["masked"] / pace["shrunk"] > 0
    assert (pace["n_masked"], pace["n_shrunk"]) == (5, 24), "not the first, not updates"
    assert report["verification"]["inputs"] == "training"
    logged = [entry["sparsity/ffn_neurons"] for entry in one.state.log_history if "loss" in entry]
    assert logged[7:] == [0.5] * 25
    one.save_model(tmp_path / "saved")
    assert weights_equal(AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved"), one.model)


def test_moments_are_sliced_and_not_reset():
    """Against a plain loop: what is kept of each moment is what it was."""
    model = without_dropout().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = Pruner(
        model,
        optimizer,
        recipe("when_final", begin=0, end=0.5, updates=1) | {"prune": RECIPE["prune"][1:2]},
        n_steps=2,
    )
    batch = {**example_inputs(model), "labels": torch.tensor([0, 1])}
    batch["labels"] = batch["labels"][: len(batch["input_ids"])]
    model(**batch).loss.backward()
    optimizer.step()
    query = model.bert.encoder.layer[1].attention.self.query
    before, order = (
        optimizer.state[query.weight]["exp_avg"].clone(),
        [id(p) for p in optimizer.param_groups[0]["params"]],
    )
    assert pruner.step()
    (keep,) = (mask for key, mask in pruner.plan.masks.units.items() if ".layer.1." in key)
    d_head = before.shape[0] // len(keep)
    rows = [unit * d_head + n for unit in range(len(keep)) if keep[unit] for n in range(d_head)]
    assert 0 < len(rows) < len(before)
    assert torch.equal(optimizer.state[query.weight]["exp_avg"], before[rows])
    now = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert now == [id(p) for p in model.parameters()] and len(now) == len(order)


@pytest.mark.parametrize("stop", [5, 8, 20])
def test_resuming_across_the_shrink(tmp_path, stop):
    options = {"weight_decay": 0.1, "model": zoo.build("bert")}
    whole = run(tmp_path / "whole", "when_final", save_strategy="steps", save_steps=stop, **options)
    rest = trainer(tmp_path / "rest", recipe=recipe("when_final"), num_train_epochs=4, weight_decay=0.1)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    require_alike(whole, rest)


def test_the_best_model_is_loaded_into_the_small_one(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    one = trainer(tmp_path, recipe=recipe("when_final"), num_train_epochs=4, load_best_model_at_end=True,
                  metric_for_best_model="wanted", greater_is_better=True, **options)  # fmt: skip
    one.compute_metrics = lambda _: {"wanted": -float(one.state.global_step)}
    one.train()
    assert one.state.best_global_step == 8
    assert weights_equal(AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-8"), one.model)


def test_an_optimizer_that_can_t_follow_is_shrunk_at_the_end(tmp_path):
    one = run(tmp_path / "a", "when_final", optim="adafactor")
    assert any("Adafactor holds 'exp_avg_sq_row'" in note for note in one.pruning_report.to_dict()["notes"])
    assert weights_equal(one.model, run(tmp_path / "b", "at_end", optim="adafactor").model)


def test_a_training_stopped_before_is_shrunk_as_it_is(tmp_path):
    one = run(tmp_path, "when_final", callbacks=[StopAt(6)])
    assert 0 < sum(neurons(one.model)) < 144
    assert any("stopped at step 6" in note for note in one.pruning_report.to_dict()["notes"])


def test_when_verification_fails_the_masked_model_is_on_disk(tmp_path, monkeypatch):
    def differs(*args, **kwargs):
        raise VerificationError("they differ")

    monkeypatch.setattr("hf_prune.pipeline.verify_models", differs)
    with pytest.raises(VerificationError):
        run(tmp_path, "when_final")
    assert neurons(AutoModelForSequenceClassification.from_pretrained(tmp_path / "masked-model")) == [48] * 3


def test_it_is_refused_where_no_process_has_the_whole(tmp_path, monkeypatch):
    make = PruningTrainer.create_accelerator_and_postprocess

    def sharded(one):
        make(one)
        one.is_fsdp_enabled = True

    monkeypatch.setattr(PruningTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(RecipeError, match=r"under FSDP and DeepSpeed .*; write shrink: at_end"):
        trainer(tmp_path, recipe=recipe("when_final"))


def test_hidden_states_of_layers_that_leave_on_the_way_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="write shrink: at_end, or hidden_states: 0"):
        trainer(tmp_path, recipe={**recipe("when_final"), "distillation": {"hidden_states": 1.0}})


def test_resuming_with_a_teacher_that_is_the_dense_model(tmp_path):
    with_teacher = {**recipe("when_final"), "distillation": {"weight": 0.5}}
    options = {"recipe": with_teacher, "num_train_epochs": 4}
    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=16, **options)
    whole.train()
    rest = trainer(tmp_path / "rest", **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-16"))
    assert weights_equal(rest.model, whole.model)


def test_a_callback_on_several_processes_refuses_it():
    callback = PruningCallback(recipe("when_final"))
    with pytest.raises(RecipeError, match="write shrink: at_end, or use PruningTrainer"):
        callback.on_train_begin(SimpleNamespace(world_size=2), None, None)
