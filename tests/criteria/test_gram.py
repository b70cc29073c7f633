"""The damped Gram matrix and its inverse, at sizes that are worked on in parts."""

import pytest
import torch

from hf_prune.compensation.least_squares import GRAM_ROWS, Moments, reduce_
from hf_prune.criteria.gram import SMALL, damped
from hf_prune.errors import CalibrationError


SIZES = [1, 7, SMALL, SMALL + 1, 2 * SMALL + 3, 4 * SMALL - 5]


def inputs(n, n_tokens):
    torch.manual_seed(n)
    return torch.randn(n_tokens, n, dtype=torch.float64) * torch.logspace(-2, 2, n, dtype=torch.float64)


@pytest.mark.parametrize("n", SIZES)
def test_the_factor_is_the_triangle_whose_square_is_the_inverse(n):
    x = inputs(n, 2 * n)
    x[:, n // 2] = 0  # never fires
    found = damped(x.T @ x, 0.01, "sparsegpt")
    factor = found.inverse_factor()
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()
    identity = torch.eye(n, dtype=torch.float64)
    assert torch.allclose(factor.T @ factor @ found.gram, identity, atol=1e-9)
    assert torch.allclose(found.inverse() @ found.gram, identity, atol=1e-9)
    assert found.dead.tolist() == [j == n // 2 for j in range(n)]


@pytest.mark.parametrize("of", ["inverse", "inverse_factor"])
def test_a_ridge_that_rounding_swallows_is_told_with_its_remedy(of):
    found = damped(torch.ones(300, 300, dtype=torch.float64), 1e-30, "sparsegpt")
    with pytest.raises(
        CalibrationError, match=r"300 inputs is singular with damping 1e-30.*a larger damping of criterion sparsegpt"
    ):
        getattr(found, of)()


@pytest.mark.parametrize("n", [1, GRAM_ROWS - 1, GRAM_ROWS, 2 * GRAM_ROWS + 1])
def test_sums_of_batches_are_the_whole_gram_matrix(n):
    batches = [inputs(n, n_tokens) for n_tokens in (5, 64)]
    moments = Moments.zeros(n, 0)
    for batch in batches:
        moments.add_(batch, batch[:, :0])
    reduce_([moments], "a module")
    whole = torch.cat(batches)
    assert torch.allclose(moments.gram, whole.T @ whole, rtol=1e-12)
    assert torch.equal(moments.gram, moments.gram.T)
    assert moments.n_tokens == 69
