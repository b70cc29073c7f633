"""Greedy removal against solving for every choice anew."""

import pytest
import torch

from hf_prune import make_plan, prune_
from hf_prune.criteria.greedy import Greedy
from hf_prune.structure import inspect_model
from hf_prune.structure.cost import count_parameters
from tests import zoo
from tests.criteria.test_contract import labelled


def best(matrix, gram, kept):
    """The matrix on the columns `kept` whose outputs are nearest to those of `matrix`, and what it lacks of them."""
    solved = torch.zeros_like(matrix)
    solved[:, kept] = torch.linalg.solve(gram[kept][:, kept], (matrix @ gram)[:, kept], left=False)
    lost = matrix - solved
    return solved, float(((lost @ gram) * lost).sum())


@pytest.mark.parametrize("width", [1, 3])
def test_it_is_the_greedy_choice_of_what_can_be_made_up_for_best(width):
    torch.manual_seed(0)
    n_units, damping = 8, 1e-3
    inputs = torch.randn(60, n_units * width, dtype=torch.float64)
    inputs[:, 1:] += 0.7 * inputs[:, :-1]
    matrix, gram = torch.randn(5, n_units * width, dtype=torch.float64), inputs.T @ inputs
    columns = torch.arange(n_units * width).reshape(n_units, width)
    there = torch.ones(n_units, dtype=torch.bool)
    there[2] = False
    ridged = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    present = matrix.clone()
    present[:, columns[2]] = 0
    left = [unit for unit in range(n_units) if unit != 2]
    for _ in range(4):
        costs = {unit: best(present, ridged, columns[[u for u in left if u != unit]].reshape(-1))[1] for unit in left}
        left.remove(min(costs, key=costs.get))
    expected, _ = best(present, ridged, columns[left].reshape(-1))
    removed = Greedy(damping=damping).remove_units(matrix, gram, columns, there, 4)
    assert torch.nonzero(removed.keep).reshape(-1).tolist() == left
    assert torch.allclose(removed.values.double(), expected, atol=1e-5)


def test_two_by_three_by_hand():
    # input 1 is twice input 0, so that unit 0 leaves at no cost and its column goes over; 2 is for itself
    gram = torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    matrix = torch.tensor([[2.0, 1.0, 1.0], [0.0, 3.0, 5.0]])
    removed = Greedy(damping=1e-9).remove_units(
        matrix, gram, torch.arange(3)[:, None], torch.ones(3, dtype=torch.bool), 1
    )
    assert removed.keep.tolist() == [False, True, True]
    assert torch.allclose(removed.values, torch.tensor([[0.0, 2.0, 1.0], [0.0, 3.0, 5.0]]), atol=1e-4)


def test_what_never_fires_leaves_first_and_what_stays_of_it_is_as_it_was():
    gram = torch.diag(torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64))
    matrix = torch.ones(2, 4)
    columns, there = torch.arange(4)[:, None], torch.ones(4, dtype=torch.bool)
    removed = Greedy().remove_units(matrix, gram, columns, there, 1)
    assert removed.keep.tolist() == [True, False, True, True]
    assert torch.equal(removed.values, matrix * removed.keep)


@pytest.mark.parametrize("target", ["ffn_neurons", "attention_heads"])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("dense_target", [False, True])
def test_units_leave_and_the_model_is_verified(name, target, dense_target):
    model = zoo.build(name)
    structure = inspect_model(model)
    step = {"target": target, "sparsity": 0.5, "criterion": {"name": "greedy", "dense_target": dense_target}}
    batches = labelled(name)
    plan = make_plan(model, {"version": 1, "prune": [step]}, calibration=batches)
    for site in structure.of(target):
        assert int((~plan.masks.units[site.key]).sum()) == round(site.n_units / 2)
        assert f"{site.reads[0].module}.weight" in plan.replacements
    prune_(model, {"version": 1, "prune": [step]}, calibration=batches)
    assert count_parameters(model) < structure.n_parameters  # and verified: what is left computes the same
