"""Rewinding: the mask of the end on the weights of an early step."""

import copy

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

import hf_prune
from hf_prune.apply.masks import masks_of
from hf_prune.errors import CheckpointError, RecipeError
from tests import zoo
from tests.training.data import RECIPE, trainer
from tests.training.test_trainer import weights_equal


WEIGHTS = {
    "version": 1,
    "prune": [{"target": "weights", "sparsity": 0.5}],
    "schedule": {"name": "linear", "begin": 0.25, "end": 0.5, "updates": 2, "rewind": 0.125},
    "calibration": {"samples": 4, "batch_size": 4},
}


class History(TrainerCallback):
    """The weights before each step and after the last, by the number of steps done."""

    def __init__(self):
        self.weights = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights.setdefault(state.global_step, copy.deepcopy(model.state_dict()))


@pytest.mark.parametrize("fraction", [0.0, 0.125])
def test_kept_weights_return_and_the_others_are_zero(tmp_path, fraction):
    """16 steps: begins at 4, the last update is at 8, so before step 9 (8 done) they are those of step 0 or 2."""
    history = History()
    recipe = {**WEIGHTS, "schedule": {**WEIGHTS["schedule"], "rewind": fraction}}
    run = trainer(tmp_path, recipe=recipe, callbacks=[history])
    run.train()
    early, rewound = history.weights[round(fraction * 16)], history.weights[8]
    masks = masks_of(run.model).weights
    assert (
        masks
        and sum(int((~keep).sum()) for keep in masks.values()) == sum(keep.numel() for keep in masks.values()) // 2
    )
    assert not any(torch.equal(early[name], history.weights[7][name]) for name in masks)
    for name, tensor in rewound.items():
        expected = early[name] * masks[name] if name in masks else early[name]
        assert torch.equal(tensor, expected), name
    assert not torch.equal(run.model.state_dict()["classifier.weight"], rewound["classifier.weight"])


def test_the_moments_begin_anew():
    """The step after rewinding is the first one of a new optimizer from those weights."""
    torch.manual_seed(0)
    model = zoo.build("bert")
    ids, labels = torch.randint(3, 99, (4, 6)), torch.tensor([0, 1, 0, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = hf_prune.Pruner(model, optimizer, WEIGHTS, n_steps=8)
    for _ in range(4):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    assert pruner.is_final
    other = copy.deepcopy(model)
    fresh = torch.optim.AdamW(other.parameters(), lr=1e-3)
    for each, stepper in ((model, optimizer), (other, fresh)):
        each(input_ids=ids, labels=labels).loss.backward()
        stepper.step()
    kept = masks_of(model).weights
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        keep = kept.get(name, torch.ones_like(ours, dtype=torch.bool))
        assert torch.equal(ours[keep], theirs[keep]), name


@pytest.mark.parametrize("stop", [1, 3, 6, 9])
def test_resuming(tmp_path, stop):
    """Before the step that is returned to (2), between, inside the schedule, after it."""
    recipe = {**RECIPE, "schedule": {**WEIGHTS["schedule"]}}
    whole = trainer(tmp_path / "whole", recipe=recipe, save_strategy="steps", save_steps=stop)
    whole.train()
    rest = trainer(tmp_path / "rest", recipe=recipe)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert weights_equal(rest.model, whole.model)
    assert masks_of(rest.model) == masks_of(whole.model)


def test_what_does_not_go_with_it():
    model = zoo.build("bert")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = {"target": "ffn_neurons", "sparsity": 0.5, "compensation": "least_squares"}
    with pytest.raises(RecipeError, match=r"prune\.0\.compensation .* schedule\.rewind"):
        hf_prune.Pruner(model, optimizer, {**WEIGHTS, "prune": [step]}, n_steps=8)
    pruner = hf_prune.Pruner(model, optimizer, WEIGHTS, n_steps=16)
    pruner.n_done = 2
    pruner._rewinding.look(2, model)
    state = pruner.state_dict()
    other = hf_prune.Pruner(zoo.build("bert", hidden_size=16), optimizer, WEIGHTS, n_steps=16)
    with pytest.raises(CheckpointError, match="would rewind"):
        other.load_state_dict(state)


def test_frozen_parameters_are_not_remembered():
    model = zoo.build("bert")
    model.bert.embeddings.requires_grad_(False)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.1)
    pruner = hf_prune.Pruner(model, optimizer, {**WEIGHTS, "schedule": {"rewind": 0}}, n_steps=16)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen and not frozen & pruner._rewinding.kept.keys()
    assert isinstance(model.classifier, nn.Linear) and "classifier.weight" in pruner._rewinding.kept
