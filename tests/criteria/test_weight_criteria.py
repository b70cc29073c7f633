"""Wanda, RIA and SparseGPT against cases by hand, plain loops and exact solutions."""

import itertools

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_prune.calibration.statistics import Statistics
from hf_prune.criteria import get
from hf_prune.criteria.support import swap_
from hf_prune.errors import RecipeError
from hf_prune.structure.sites import WeightSite


WEIGHT = torch.tensor([[1.0, -2.0, 3.0], [4.0, 0.5, -1.0]])
SQUARED = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)  # norms 2, 1, 1/2


def scored(criterion, weight, squared, conv1d=False, **options):
    """Scores as (d_out, d_in), whichever way the layer holds its weight."""
    d_out, d_in = weight.shape
    layer = Conv1D(d_out, d_in) if conv1d else nn.Linear(d_in, d_out)
    with torch.no_grad():
        layer.weight.copy_(weight.T if conv1d else weight)
    model = nn.Sequential(layer)
    site = WeightSite("0.weight", "0", tuple(layer.weight.shape), 0 if conv1d else 1)
    score = get(criterion, options).score_weights(model, site, Statistics(squared_inputs={"0": squared}))
    assert score.shape == layer.weight.shape
    return score.T if conv1d else score


@pytest.mark.parametrize("conv1d", [False, True])
def test_wanda_by_hand(conv1d):
    expected = torch.tensor([[2.0, 2.0, 1.5], [8.0, 0.5, 0.5]])
    assert torch.equal(scored("wanda", WEIGHT, SQUARED, conv1d), expected)


@pytest.mark.parametrize("conv1d", [False, True])
def test_ria_by_hand(conv1d):
    # the rows' sums are 6 and 5.5, the columns' 5, 2.5 and 4
    expected = torch.zeros(2, 3)
    rows, columns, norms = (6.0, 5.5), (5.0, 2.5, 4.0), (2.0, 1.0, 0.5)
    for i, j in itertools.product(range(2), range(3)):
        size = abs(WEIGHT[i, j].item())
        expected[i, j] = (size / rows[i] + size / columns[j]) * norms[j] ** 0.5
    assert torch.allclose(scored("ria", WEIGHT, SQUARED, conv1d), expected)
    squarely = scored("ria", WEIGHT, SQUARED, conv1d, power=1.0)
    assert torch.allclose(squarely, expected * torch.tensor(norms).sqrt())


@pytest.mark.parametrize("conv1d", [False, True])
def test_ria_of_a_row_and_a_column_of_zeros(conv1d):
    weight = torch.tensor([[1.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
    score = scored("ria", weight, SQUARED, conv1d)
    assert torch.isfinite(score).all()
    assert torch.equal(score != 0, weight != 0)


# --------------------------------------------------------------------------------------------------------------
# SparseGPT


def correlated(n_tokens=200, d_in=16, d_out=8, seed=0, dtype=torch.float64):
    """(matrix, inputs): inputs that are mixtures of fewer causes, so that columns can stand in for each other."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(n_tokens, d_in // 2, generator=generator, dtype=dtype)
    mixed = causes @ torch.randn(d_in // 2, d_in, generator=generator, dtype=dtype)
    inputs = mixed + 0.3 * torch.randn(n_tokens, d_in, generator=generator, dtype=dtype)
    return torch.randn(d_out, d_in, generator=generator, dtype=dtype), inputs


def gram_of(inputs):
    return inputs.T @ inputs


def ones(matrix):
    return torch.ones(matrix.shape, dtype=torch.bool)


def error(matrix, values, gram):
    lost = matrix.double() - values.double()
    return torch.trace(lost @ gram @ lost.T).item()


def algorithm_1(matrix, gram, n_leaving, block, damping):
    """Frantar & Alistarh 2023, algorithm 1, entry by entry; as many leave each block of columns as its share."""
    matrix, gram = matrix.clone().double(), gram.clone()
    d_out, d_in = matrix.shape
    gram += damping * gram.diagonal().mean() * torch.eye(d_in, dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(gram)).T  # upper
    keep = torch.ones(d_out, d_in, dtype=torch.bool)
    for start in range(0, d_in, block):
        stop = min(start + block, d_in)
        n_here = round(n_leaving * stop / d_in) - round(n_leaving * start / d_in)
        scores = {
            (i, j): (matrix[i, j] ** 2 / inverse[j, j] ** 2).item()
            for i, j in itertools.product(range(d_out), range(start, stop))
        }
        for i, j in sorted(scores, key=scores.get)[:n_here]:
            keep[i, j] = False
        for j in range(start, stop):
            for i in range(d_out):
                if not keep[i, j]:
                    lost = matrix[i, j] / inverse[j, j]
                    for k in range(j, d_in):
                        matrix[i, k] -= lost * inverse[j, k]
                    matrix[i, j] = 0
    return keep, matrix


@pytest.mark.parametrize("block", [4, 6, 128])
def test_sparsegpt_without_refinement_is_algorithm_1(block):
    matrix, inputs = correlated()
    gram = gram_of(inputs)
    expected, values = algorithm_1(matrix, gram, 51, block, 0.01)
    keep, found, _ = get("sparsegpt", {"block": block, "refine": 0}).prune(matrix, gram, ones(matrix), 51)
    assert torch.equal(keep, expected)
    assert torch.allclose(found.double(), values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group", [None, (2, 4), (1, 4)])
def test_refined_values_are_the_exact_solution_on_the_support(group):
    matrix, inputs = correlated()
    gram = gram_of(inputs)
    keep, found, _ = get("sparsegpt", {"refine": 100}).prune(matrix, gram, ones(matrix), 64, group)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    for i in range(8):
        support = torch.nonzero(keep[i]).reshape(-1)
        exact = torch.linalg.solve(damped[support][:, support], damped[support] @ matrix[i])
        assert torch.allclose(found[i, support].double(), exact, rtol=1e-3, atol=1e-3)
    assert not found[~keep].any()


@pytest.mark.parametrize("group", [None, (2, 4)])
def test_swaps_bring_the_outputs_nearer_and_leave_counts_alone(group):
    matrix, inputs = correlated(d_out=40)
    gram = gram_of(inputs)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    before, values, _ = get("sparsegpt", {"refine": 50}).prune(matrix, gram, ones(matrix), 320, group)
    errors = [error(matrix, values, damped)]
    for rounds in (1, 4, 12):
        keep, values, _ = get("sparsegpt", {"refine": 50, "swaps": rounds}).prune(
            matrix, gram, ones(matrix), 320, group
        )
        errors.append(error(matrix, values, damped))
        assert torch.equal(keep.sum(1), before.sum(1)) and not values[~keep].any()
        assert group is None or (keep.reshape(40, -1, 4).sum(-1) == 2).all()
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.97 * errors[0]


def test_a_swap_that_pays_is_found_by_hand():
    # inputs 0 and 1 are one, 2 is for itself: keeping 0 and 1 wastes a place, 2 is worth more than either
    gram = torch.tensor([[1.0, 0.999, 0.0], [0.999, 1.0, 0.0], [0.0, 0.0, 1.0]])
    wanted, keep = torch.tensor([[1.0, 1.0, 0.5]]), torch.tensor([[True, True, False]])
    x = wanted * keep
    swap_(x, wanted, keep, ones(keep), gram, torch.linalg.inv(gram), None, n_rounds=1, n_steps=20)
    assert keep.sum() == 2 and keep[0, 2]
    assert torch.allclose(x.sum(), torch.tensor(2.5), atol=1e-2)  # the twin that stays has what both had


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_n_m_keeps_n_of_every_m(n, m):
    matrix, inputs = correlated()
    for block in (1, 4, 6, 128):
        keep, values, _ = get("sparsegpt", {"block": block}).prune(matrix, gram_of(inputs), ones(matrix), 0, (n, m))
        assert (keep.reshape(8, -1, m).sum(-1) == n).all()
        assert not values[~keep].any() and torch.isfinite(values).all()


@pytest.mark.parametrize("n_leaving", [0, 1, 37, 64, 100])
@pytest.mark.parametrize("block", [1, 3, 128])
def test_exactly_as_many_leave_and_what_left_stays_out(n_leaving, block):
    matrix, inputs = correlated()
    there = torch.rand(matrix.shape, generator=torch.Generator().manual_seed(1)) < 0.8
    assert n_leaving < there.sum()
    keep, values, _ = get("sparsegpt", {"block": block}).prune(matrix, gram_of(inputs), there, n_leaving)
    assert not (keep & ~there).any() and not values[~there].any()
    assert int((there & ~keep).sum()) == n_leaving


def test_n_m_takes_what_left_before_first():
    matrix, inputs = correlated()
    there = ones(matrix)
    there[:, [0, 1, 2]] = False  # three of the first four, one of the others' none
    keep, _, _ = get("sparsegpt").prune(matrix, gram_of(inputs), there, 0, (2, 4))
    assert torch.equal(keep[:, :4], there[:, :4])
    assert (keep[:, 4:].reshape(8, -1, 4).sum(-1) == 2).all()


@pytest.mark.parametrize("group", [None, (2, 4)])
def test_a_column_that_never_fires_leaves_first_and_what_stays_of_it_is_as_it_was(group):
    matrix, inputs = correlated()
    inputs[:, 5] = 0
    gram = gram_of(inputs) * 1e-6  # small numbers, so that a 1 put on the diagonal would rule the ridge
    keep, values, _ = get("sparsegpt").prune(matrix, gram, ones(matrix), 4, group)
    assert torch.isfinite(values).all()
    left = (~keep).nonzero()
    if group is None:
        assert left[:, 1].tolist() == [5] * 4
        assert torch.allclose(values[keep[:, 5], 5], matrix[keep[:, 5], 5].float())
        # nothing that fires left, so nothing had to move
        others = [j for j in range(16) if j != 5]
        assert torch.allclose(values[:, others], matrix[:, others].float(), atol=1e-5)
    else:
        assert not keep[:, 5].any()


def test_all_columns_dead_and_a_singular_gram_matrix():
    matrix, inputs = correlated()
    keep, values, _ = get("sparsegpt").prune(matrix, torch.zeros(16, 16, dtype=torch.float64), ones(matrix), 64)
    assert int((~keep).sum()) == 64 and torch.allclose(values, matrix.float() * keep)
    few = inputs[:3]  # rank 3 of 16
    keep, values, _ = get("sparsegpt").prune(matrix, gram_of(few), ones(matrix), 64)
    assert int((~keep).sum()) == 64 and torch.isfinite(values).all()
    assert error(matrix, values, gram_of(few)) < error(matrix, matrix * keep, gram_of(few))


@pytest.mark.parametrize("conditioning", [1.0, 1e4])
def test_near_ties_of_sparsegpt_by_hand(conditioning):
    # with independent inputs a score is w² times the mean square of its input, and nothing moves
    matrix = torch.tensor([[1.0, 3.0, 2.0, 4.0], [2.0, 2.0 + 1e-7, 5.0, 6.0]])
    gram = conditioning * torch.eye(4, dtype=torch.float64)
    prune = get("sparsegpt").prune
    assert prune(matrix, gram, ones(matrix), 1).n_near_ties == 0  # the 1 leaves, and nothing is near it
    assert prune(matrix, gram, ones(matrix), 2).n_near_ties == 2  # of three twos one leaves
    assert prune(matrix, gram, ones(matrix), 4).n_near_ties == 0  # all of them do
    assert prune(matrix, gram, ones(matrix), 0, (2, 4)).n_near_ties == 0  # 1, 2 and 2, 2 leave
    assert prune(matrix, gram, ones(matrix), 0, (3, 4)).n_near_ties == 1  # 1, and the first 2 of the second row
    there = ones(matrix)
    there[1, 0] = False  # the group has lost its one already
    assert prune(matrix, gram, there, 0, (3, 4)).n_near_ties == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("group", [None, (2, 4)])
def test_sparsegpt_loses_less_than_wanda_and_magnitude(seed, group):
    matrix, inputs = correlated(seed=seed, d_in=32, d_out=24)
    gram = gram_of(inputs)
    _, values, _ = get("sparsegpt", {"block": 8}).prune(matrix, gram, ones(matrix), matrix.numel() // 2, group)
    _, unrefined, _ = get("sparsegpt", {"block": 8, "refine": 0}).prune(
        matrix, gram, ones(matrix), matrix.numel() // 2, group
    )
    sparse = error(matrix, values, gram)
    assert sparse < error(matrix, unrefined, gram)
    for score in (matrix.abs(), matrix.abs() * gram.diagonal().sqrt()):
        groups = score.reshape(24, -1, group[1]) if group else score
        kept = torch.zeros_like(groups, dtype=torch.bool)
        kept.scatter_(-1, groups.topk(groups.shape[-1] // 2, dim=-1).indices, True)
        assert sparse < error(matrix, matrix * kept.reshape(matrix.shape), gram)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"block": 0}, "block of criterion sparsegpt is 0"), ({"refine": -1}, "refine"), ({"damping": 0.0}, "damping")],
)
def test_options_that_make_no_sense(options, said):
    with pytest.raises(RecipeError, match=said):
        get("sparsegpt", options)


def test_loss_change_needs_a_sample():
    with pytest.raises(RecipeError, match="samples of criterion loss_change is 0"):
        get("loss_change", {"samples": 0})
