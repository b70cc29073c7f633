"""Zeroing the masked entries of a tensor, against `masked_fill_`."""

import pytest
import torch
from torch import nn

from hf_prune.apply.masks import MaskedTensor


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64], ids=str
)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4)], ids=str)
def test_what_is_masked_is_zero_and_the_rest_is_what_it_was_bit_for_bit(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=generator).to(dtype)
    keep = torch.rand(shape, generator=generator) > 0.5
    if not dtype.is_complex:
        special = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0])
        tensor.view(-1)[:4], keep.view(-1)[:2] = special.to(dtype), False
        keep.view(-1)[2:4] = True
    for each in (tensor, tensor.transpose(0, 1).contiguous().transpose(0, 1)):
        expected, ours = each.clone().masked_fill_(~keep, 0), each.clone(memory_format=torch.preserve_format)
        entry = MaskedTensor("x", keep=keep)
        entry.zero_(ours)
        assert ours.equal(expected) and not entry.values(ours).any()
        assert torch.equal(torch.signbit(ours.real), torch.signbit(expected.real))


def test_a_parameter_keeps_its_gradient_and_its_mask_takes_no_memory():
    parameter, keep = nn.Parameter(torch.ones(2, 3)), torch.tensor([[True, False, True], [False, True, True]])
    (parameter * 2).sum().backward()
    entry = MaskedTensor("x", keep=keep)
    with torch.no_grad():
        entry.zero_(parameter)
    assert (
        parameter.tolist() == [[1, 0, 1], [0, 1, 1]]
        and parameter.requires_grad
        and parameter.grad.tolist() == [[2.0] * 3] * 2
    )
    assert entry.keep.data_ptr() == keep.data_ptr()
