"""Two real processes find what one finds: curves to the bit, and the plans of allocations that look at data."""

import json
from pathlib import Path

import pytest
import torch

from tests.processes import launch
from tests.sensitivity.program import STEPS


PROGRAM = Path(__file__).with_name("program.py")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("curves")
    for n_processes in (1, 2):
        launch(PROGRAM, directory, n_processes=n_processes)
    return directory


def test_the_curves_are_those_of_one(directory):
    alone, *two = (
        json.loads((directory / f"curves-of-{name}.json").read_text(encoding="utf-8"))
        for name in ("1-rank0", "2-rank0", "2-rank1")
    )
    assert two[0] == two[1] == alone


@pytest.mark.parametrize("name", STEPS)
def test_the_plan_is_that_of_one(directory, name):
    alone, *two = (torch.load(directory / f"{name}-of-{which}.pt") for which in ("1-rank0", "2-rank0", "2-rank1"))
    for each in two:
        assert each.keys() == alone.keys()
        assert all(torch.equal(each[key], alone[key]) for key in alone)
