"""Real processes (torchrun, gloo): the plan of two is the plan of one; in training all hold the same masks."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hf_prune.checkpoint import is_complete
from tests.processes import launch


launched = partial(launch, Path(__file__).with_name("program.py"), timeout=120)


def masks(directory, name, n_processes):
    """By rank."""
    found = [load_file(directory / f"{name}-of-{n_processes}-rank{rank}.safetensors") for rank in range(n_processes)]
    assert all(mask.dtype == torch.bool for tensors in found for mask in tensors.values())
    return found


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_one_shot_plans_are_those_of_one_process(tmp_path):
    launched("plan", tmp_path, n_processes=1)
    launched("plan", tmp_path, n_processes=2)
    names = sorted({path.name.split("-of-")[0] for path in tmp_path.iterdir()})
    assert len(names) == 10
    for name in names:
        (alone,), (first, second) = masks(tmp_path, name, 1), masks(tmp_path, name, 2)
        assert any(not keep.all() for keep in alone.values())
        assert equal(first, second), name
        assert equal(first, alone), name


@pytest.mark.parametrize("what", ["train", "loop"])
def test_masks_in_training_are_equal_on_both_ranks_and_those_of_one_process(tmp_path, what):
    launched(what, tmp_path, n_processes=1)
    launched(what, tmp_path, n_processes=2)
    (alone,), (first, second) = masks(tmp_path, what, 1), masks(tmp_path, what, 2)
    assert equal(first, second)
    assert equal(first, alone)
    if what == "train":
        assert (tmp_path / "run-2" / "checkpoint-16" / "pruning_state.safetensors").exists()


def test_movement_is_gathered_from_the_gradients_of_all_processes(tmp_path):
    launched("movement", tmp_path, n_processes=1)
    launched("movement", tmp_path, n_processes=2)
    (alone,), (first, second) = masks(tmp_path, "movement", 1), masks(tmp_path, "movement", 2)
    assert equal(first, second)
    assert equal(first, alone)
    gathered = [
        load_file(tmp_path / f"gathered-of-{world}-rank{rank}.safetensors") for world, rank in ((1, 0), (2, 0), (2, 1))
    ]
    assert equal(gathered[1], gathered[2]), "bit for bit"
    assert gathered[0].keys() == gathered[1].keys() and len(gathered[0]) > 3
    for name, sums in gathered[0].items():
        assert sums.any()
        assert torch.allclose(gathered[1][name], sums, rtol=1e-3, atol=1e-7), name


def test_two_processes_end_with_one_small_model(tmp_path):
    launched("shrink", tmp_path, n_processes=2)
    first, second = (load_file(tmp_path / f"shrunk-of-2-rank{rank}.safetensors") for rank in (0, 1))
    assert equal(first, second)
    assert is_complete(tmp_path / "saved-2")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved-2")
    assert equal(loaded.state_dict(), first)
