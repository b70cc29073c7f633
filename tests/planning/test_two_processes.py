"""Two real processes plan what one plans: exactly, and by Gram matrices but for rounding and near-ties."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.calibration.test_collect import NEEDS
from tests.planning.program import RECIPES
from tests.processes import launch


PROGRAM = Path(__file__).with_name("program.py")


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """name -> (of one process, of two by rank), each masks and new values by name."""
    directory = tmp_path_factory.mktemp("plans")
    for n_processes in (1, 2):
        launch(PROGRAM, directory, n_processes=n_processes)

    def read(name, world, rank):
        return load_file(directory / f"{name}-of-{world}-rank{rank}.safetensors")

    return {name: (read(name, 1, 0), [read(name, 2, rank) for rank in (0, 1)]) for name in (*RECIPES, "statistics")}


@pytest.mark.parametrize("name", RECIPES)
def test_the_plan_of_two_is_the_plan_of_one(plans, name):
    alone, (first, second) = plans[name]
    assert first.keys() == second.keys() == alone.keys()
    assert all(torch.equal(first[key], second[key]) for key in first), "the ranks differ"
    masks = {key for key in alone if not key.startswith("new|")}
    assert any(not alone[key].all() for key in masks)
    n_differ = sum(int((alone[key] != first[key]).sum()) for key in masks)
    n_entries = sum(alone[key].numel() for key in masks)
    if not name.startswith("sparsegpt"):
        assert n_differ == 0
    assert n_differ <= 1e-3 * n_entries, f"{n_differ} of {n_entries}: more than near-ties"
    assert bool(alone.keys() - masks) == name.startswith(("least", "linear", "reconstruct", "sparsegpt"))
    for key in alone.keys() - masks:
        same = (alone[key] != 0) == (first[key] != 0)
        close = torch.isclose(alone[key], first[key], rtol=1e-5, atol=1e-5 * alone[key].abs().max().item())
        rows = same.all(1) if same.dim() > 1 else same  # a near-tie moves the values of its row too
        assert close[rows].all()


@pytest.mark.parametrize("need", sorted(NEEDS))
def test_the_statistics_of_two_are_those_of_one(plans, need):
    alone, (first, second) = plans["statistics"]
    keys = [key for key in alone if key.startswith(f"{need}|")]
    assert keys and first.keys() == second.keys() == alone.keys()
    assert torch.equal(first["counts"], alone["counts"])
    for key in keys:
        assert torch.equal(first[key], second[key])
        # what a criterion is handed: rounded to float32
        assert torch.equal(first[key].float(), alone[key].float()), key
