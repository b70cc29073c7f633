"""Real processes (torchrun, gloo): the plan of two is the plan of one; in training all hold the same masks."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hf_prune.checkpoint import is_complete
from tests.processes import launch


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The directory in which one process, and two, have written what each came to."""
    directory = tmp_path_factory.mktemp("written")
    for n_processes in (1, 2):
        launch(Path(__file__).with_name("program.py"), directory, n_processes=n_processes)
    return directory


def masks(directory, name, n_processes):
    """By rank."""
    found = [load_file(directory / f"{name}-of-{n_processes}-rank{rank}.safetensors") for rank in range(n_processes)]
    assert all(mask.dtype == torch.bool for tensors in found for mask in tensors.values())
    return found


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_one_shot_plans_are_those_of_one_process(written):
    names = sorted({path.name.split("-of-")[0] for path in written.glob("plan-*.safetensors")})
    assert len(names) == 10
    for name in names:
        (alone,), (first, second) = masks(written, name, 1), masks(written, name, 2)
        assert any(not keep.all() for keep in alone.values())
        assert equal(first, second), name
        assert equal(first, alone), name


@pytest.mark.parametrize("what", ["train", "loop"])
def test_masks_in_training_are_equal_on_both_ranks_and_those_of_one_process(written, what):
    (alone,), (first, second) = masks(written, what, 1), masks(written, what, 2)
    assert equal(first, second)
    assert equal(first, alone)
    if what == "train":
        assert (written / "run-2" / "checkpoint-16" / "pruning_state.safetensors").exists()


def test_movement_is_gathered_from_the_gradients_of_all_processes(written):
    (alone,), (first, second) = masks(written, "movement", 1), masks(written, "movement", 2)
    assert equal(first, second)
    assert equal(first, alone)
    gathered = [
        load_file(written / f"gathered-of-{world}-rank{rank}.safetensors") for world, rank in ((1, 0), (2, 0), (2, 1))
    ]
    assert equal(gathered[1], gathered[2]), "bit for bit"
    assert gathered[0].keys() == gathered[1].keys() and len(gathered[0]) > 3
    for name, sums in gathered[0].items():
        assert sums.any()
        assert torch.allclose(gathered[1][name], sums, rtol=1e-3, atol=1e-7), name


def test_two_processes_end_with_one_small_model(written):
    first, second = (load_file(written / f"shrunk-of-2-rank{rank}.safetensors") for rank in (0, 1))
    assert equal(first, second)
    assert is_complete(written / "saved-2")
    loaded = AutoModelForSequenceClassification.from_pretrained(written / "saved-2")
    assert equal(loaded.state_dict(), first)
