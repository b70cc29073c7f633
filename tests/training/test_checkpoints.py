"""The newest complete checkpoint is taken, whatever the one behind it lacks."""

import pytest

from hf_prune.errors import CheckpointError
from hf_prune.training.checkpoints import last_complete
from tests.training.data import trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints 4, 8, 12 and 16 of one run."""
    directory = tmp_path_factory.mktemp("run")
    trainer(directory, save_strategy="steps", save_steps=4).train()
    return directory


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("trainer_state.json", lambda path: path.unlink()),
        ("trainer_state.json", cut_short),
        ("optimizer.pt", cut_short),
        ("scheduler.pt", lambda path: path.unlink()),
        ("rng_state.pth", lambda path: path.unlink()),
        ("model.safetensors", cut_short),
        ("pruning_state.json", lambda path: path.unlink()),
        ("pruning_state.safetensors", cut_short),
    ],
)
def test_what_was_cut_off_is_passed_over(name, damage, saved):
    whole = (saved / "checkpoint-16" / name).read_bytes()
    assert last_complete(saved, 1).name == "checkpoint-16"
    damage(saved / "checkpoint-16" / name)
    try:
        assert last_complete(saved, 1).name == "checkpoint-12"
    finally:
        (saved / "checkpoint-16" / name).write_bytes(whole)


def test_a_run_without_a_recipe_needs_no_pruning_state(tmp_path):
    trainer(tmp_path, recipe=None, save_strategy="steps", save_steps=8).train()
    assert last_complete(tmp_path, 1, is_pruned=False).name == "checkpoint-16"
    with pytest.raises(CheckpointError, match=r"checkpoint-16: .* has no pruning_state\.json"):
        last_complete(tmp_path, 1)


def test_none_is_an_error_that_says_what_each_lacks(saved, tmp_path):
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        last_complete(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"checkpoint-8: rng_state_0\.pth is not there"):
        last_complete(saved, 2)
