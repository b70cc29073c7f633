"""Loggers get sparsity, what left in each update, and the loss around it, under names that stay."""

import pytest
import torch
from transformers import TrainerCallback

import hf_prune
from hf_prune.apply.masks import masks_of
from hf_prune.training.seeing import loss_on
from tests import zoo
from tests.training.data import RECIPE, Tokens, trainer


UPDATES = [5, 8, 11]  # of 16 steps: from 0.1 to 0.7 in three
SPARSITY = {"sparsity/ffn_neurons", "sparsity/attention_heads", "sparsity/weights"}
OF_UPDATES = {f"pruning/left/{kind}" for kind in ("ffn_neurons", "attention_heads", "weights")} | {
    "pruning/loss_before",
    "pruning/loss_after",
    "pruning/seconds",
}


class Log(TrainerCallback):
    """What every logger of Trainer is given, by step."""

    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append((state.global_step, dict(logs)))


def test_every_logger_is_given_what_each_update_did(tmp_path):
    log = Log()
    run = trainer(tmp_path, callbacks=[log], logging_steps=6)
    run.train()
    updates = [(step, logs) for step, logs in log.entries if "pruning/seconds" in logs]
    assert [step for step, _ in updates] == UPDATES
    assert all(logs.keys() >= OF_UPDATES | SPARSITY for _, logs in updates)
    left = [logs["pruning/left/ffn_neurons"] for _, logs in updates]
    assert sum(left) == 72 and all(left)
    reached = [logs["sparsity/ffn_neurons"] for _, logs in updates]
    assert reached == pytest.approx([sum(left[: n + 1]) / 144 for n in range(3)])
    regular = {step: logs for step, logs in log.entries if "loss" in logs}
    assert [*regular] == [6, 12] and all(logs.keys() >= SPARSITY for logs in regular.values())
    assert not any(key.startswith("pruning/") for logs in regular.values() for key in logs)
    assert [entry for entry in run.state.log_history if "pruning/seconds" in entry]


def test_trainers_own_logs_come_as_often_as_without(tmp_path):
    ours, stock = trainer(tmp_path / "ours"), trainer(tmp_path / "stock", recipe=None)
    for run in (ours, stock):
        run.train()
    steps = [[entry["step"] for entry in run.state.log_history if "loss" in entry] for run in (ours, stock)]
    assert steps[0] == steps[1] == [*range(1, 17)]


def test_the_loss_around_an_update_is_that_of_the_same_samples():
    """By the plain loop: the model's own loss, in evaluation mode, over the first two samples of each batch."""
    model, tokens = zoo.build("bert").train(), Tokens(n=12)
    batches = [{"input_ids": tokens.ids[i : i + 4], "labels": tokens.ids[i : i + 4, 0] % 2} for i in range(0, 12, 4)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    recipe = {**RECIPE, "schedule": {"name": "one_shot", "begin": 0}}
    pruner = hf_prune.Pruner(model, optimizer, recipe, n_steps=1, calibration=batches)

    def expected():
        model.eval()
        with torch.no_grad():
            losses = [float(model(input_ids=b["input_ids"][:2], labels=b["labels"][:2]).loss) for b in batches]
        model.train()
        return sum(losses) / len(losses)

    assert pruner.scalars() == {}
    before, state = expected(), torch.get_rng_state()
    pruner.step()
    assert torch.equal(torch.get_rng_state(), state) and model.training
    seen = pruner.scalars()
    assert seen["pruning/loss_before"] == pytest.approx(before, abs=1e-6)
    assert seen["pruning/loss_after"] == pytest.approx(expected(), abs=1e-6)
    assert seen["pruning/loss_after"] != seen["pruning/loss_before"]
    assert seen["pruning/left/weights"] == sum(int((~keep).sum()) for keep in masks_of(model).weights.values())
    assert seen["pruning/left/ffn_neurons"] == 72 and seen["sparsity/ffn_neurons"] == 0.5


def test_without_labels_there_is_no_loss_and_without_data_either():
    batches = [{"input_ids": Tokens().ids[:4]}]
    assert loss_on(zoo.build("bert"), batches, 0) is None
    assert loss_on(zoo.build("bert"), None, 0) is None
    assert loss_on(zoo.build("llama"), batches, 0) > 0  # a causal language model's inputs are its labels


def test_a_real_event_file_of_tensorboard_has_them(tmp_path):
    pytest.importorskip("tensorboard", reason="in the extra `dev`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trainer(tmp_path, report_to=["tensorboard"])
    run.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    # Trainer's callback puts what is not of an evaluation under train/
    assert {f"train/{name}" for name in OF_UPDATES | SPARSITY} <= set(events.Tags()["scalars"])
    left = events.Scalars("train/pruning/left/ffn_neurons")
    assert [event.step for event in left] == UPDATES and sum(event.value for event in left) == 72
    assert events.Scalars("train/sparsity/weights")[-1].value == pytest.approx(0.4, abs=1e-3)
