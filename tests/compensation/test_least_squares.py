"""The refit against NumPy's least squares, and on sums that have no plain solution."""

import numpy as np
import pytest
import torch

from hf_prune.calibration.batches import Batch
from hf_prune.compensation.least_squares import RIDGES, Moments, is_test, reduce_, refit


def data(n_tokens=60, n=7, d_out=4, seed=0, noise=0.1):
    """(inputs, lacking) with a linear connection and noise."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n_tokens, n, generator=generator, dtype=torch.float64)
    weight = torch.randn(d_out, n, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    lacking = inputs @ weight.T + noise * torch.randn(n_tokens, d_out, generator=generator, dtype=torch.float64)
    return inputs, lacking


def moments(inputs, lacking, size=None):
    total = Moments.zeros(inputs.shape[1], lacking.shape[1])
    for start in range(0, len(inputs), size or len(inputs)):
        total.add_(inputs[start : start + (size or len(inputs))], lacking[start : start + (size or len(inputs))])
    reduce_([total], "a module")
    return total


def numpy_ridge(inputs, lacking, ridge, n_free=0):
    """Σ |e - D a|² + λ Σ_j (Σ a_j²) |D_j|² by rows added to the data; the last `n_free` columns of D cost nothing."""
    n = inputs.shape[1]
    squares = (inputs[:, : n - n_free] ** 2).sum(0).numpy()
    penalty = np.diag([*np.sqrt(ridge * squares), *[0.0] * n_free])
    a = np.concatenate([inputs.numpy(), penalty])
    e = np.concatenate([lacking.numpy(), np.zeros((n, lacking.shape[1]))])
    return torch.from_numpy(np.linalg.lstsq(a, e, rcond=None)[0].T)


@pytest.mark.parametrize("n_free", [0, 1])
def test_without_a_held_out_part_it_is_ridge_regression(n_free):
    inputs, lacking = data()
    found = refit(moments(inputs, lacking), None, n_free=n_free)
    assert torch.allclose(found.change, numpy_ridge(inputs, lacking, found.ridge, n_free), atol=1e-10)


def test_the_ridge_is_the_one_that_does_best_on_the_held_out_part_and_both_are_fitted():
    for noise in (0.01, 1.0, 5.0):
        inputs, lacking = data(n_tokens=12, noise=noise)
        test_inputs, test_lacking = data(n_tokens=40, seed=1, noise=noise)
        left = {
            ridge: (test_lacking - test_inputs @ numpy_ridge(inputs, lacking, ridge).T).square().sum().item()
            for ridge in RIDGES
        }
        best = min(left, key=left.get)
        assert left[best] < test_lacking.square().sum()
        found = refit(moments(inputs, lacking), moments(test_inputs, test_lacking))
        assert found.ridge == best
        whole = torch.cat([inputs, test_inputs]), torch.cat([lacking, test_lacking])
        assert torch.allclose(found.change, numpy_ridge(*whole, best), atol=1e-8)


def test_noise_that_needs_a_ridge_gets_a_large_one_and_exact_data_the_least():
    exact = [moments(*data(seed=seed, noise=0.0)) for seed in (0, 1)]
    assert refit(*exact).ridge == min(RIDGES)
    noisy = [moments(*data(n_tokens=8, seed=seed, noise=5.0)) for seed in (0, 1)]
    assert refit(*noisy).ridge is None or refit(*noisy).ridge >= 1e-1


def test_changing_nothing_competes():
    inputs, lacking = data(noise=0.0)
    found = refit(moments(inputs, lacking), moments(inputs, -lacking))  # what fits here is wrong there
    assert found.ridge is None and not found.change.any()


def test_units_of_the_inputs_do_not_matter():
    """Inputs in other units give the same fit: a ridge in each input's own."""
    inputs, lacking = data(n_tokens=12, noise=1.0)
    scales = torch.tensor([1e-3, 1.0, 1e3, 7.0, 1.0, 1e-2, 50.0], dtype=torch.float64)
    one = refit(moments(inputs, lacking), None)
    other = refit(moments(inputs * scales, lacking), None)
    assert torch.allclose(one.change, other.change * scales, rtol=1e-6)


def test_inputs_that_never_fire_and_no_inputs_at_all():
    inputs, lacking = data()
    inputs[:, 2] = 0
    found = refit(moments(inputs, lacking), moments(inputs, lacking))
    assert not found.change[:, 2].any() and found.change[:, 3].all()
    nothing = torch.zeros_like(inputs)
    for test in (None, moments(nothing, lacking)):
        found = refit(moments(nothing, lacking), test)
        assert found.ridge is None and not found.change.any()
    # only the part held out fires
    found = refit(moments(nothing, lacking), moments(inputs, lacking))
    assert torch.isfinite(found.change).all()
    none = moments(inputs[:, :0], lacking)
    assert refit(none, None).change.shape == (4, 0)


def test_inputs_that_repeat_each_other():
    inputs, lacking = data(noise=0.0)
    inputs = torch.cat([inputs, inputs, inputs[:, :1] + inputs[:, 1:2]], 1)  # rank 7 of 15
    for test in (None, moments(inputs, lacking)):
        found = refit(moments(inputs, lacking), test)
        assert torch.isfinite(found.change).all()
        left = (lacking - inputs @ found.change.T).square().mean()
        assert left < 1e-3 * lacking.square().mean()
    in_float32 = moments(inputs.float(), lacking.float())  # rounding leaves G with eigenvalues below zero
    found = refit(in_float32, in_float32)
    assert torch.isfinite(found.change).all()
    assert (lacking - inputs @ found.change.T).square().mean() < 1e-3 * lacking.square().mean()


def test_entries_that_may_not_change_do_not_and_the_rest_is_the_best_without_them():
    inputs, lacking = data()
    may_change = torch.rand(4, 7, generator=torch.Generator().manual_seed(2)) < 0.6
    assert may_change.any(1).all() and not may_change.all()
    both = moments(inputs, lacking)
    found = refit(both, None, may_change=may_change)
    ridged = both.gram + found.ridge * torch.diag(both.gram.diagonal())
    for row in range(4):
        there = torch.nonzero(may_change[row]).reshape(-1)
        gram = ridged[there][:, there]
        assert torch.allclose(found.change[row, there], torch.linalg.solve(gram, both.cross[row, there]), atol=1e-8)
        assert not found.change[row, ~may_change[row]].any()


def test_the_last_input_alone_is_the_mean():
    _, lacking = data(noise=1.0)
    found = refit(moments(torch.ones(60, 1, dtype=torch.float64), lacking), None, n_free=1)
    assert torch.allclose(found.change[:, 0], lacking.mean(0))


def test_moments_do_not_depend_on_batch_size():
    inputs, lacking = (tensor.float() for tensor in data(n_tokens=64))
    one, many = moments(inputs, lacking, 1), moments(inputs, lacking, 16)
    for a, b in ((one.gram, many.gram), (one.cross, many.cross)):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    assert one.n_tokens == many.n_tokens == 64
    assert one.gram.dtype == torch.float64


def test_every_fifth_batch_is_held_out_and_never_the_only_one():
    assert [n for n in range(12) if is_test(n, 12)] == [4, 9]
    assert [n for n in range(3) if is_test(n, 3)] == [2]
    assert not is_test(0, 1)


def test_padding_is_left_out_of_what_is_fitted():
    ids = torch.ones(2, 4, dtype=torch.int64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    batch = Batch.of(0, {"input_ids": ids, "attention_mask": mask}, torch.device("cpu"))
    x = torch.arange(16.0).reshape(2, 4, 2)
    expected = torch.stack([x[0, 0], x[0, 1], x[0, 2], x[1, 0]])
    assert torch.equal(batch.tokens(x, False), expected)
    assert torch.equal(batch.tokens(x.reshape(8, 2), False), expected)
