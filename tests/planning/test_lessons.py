"""What a block learns from: single tokens where what learns sees each by itself, and then the same error as the whole block's."""

import pytest
import torch
from torch import nn

from hf_prune.calibration.batches import dealt, turns
from hf_prune.calibration.blocks import record_chain
from hf_prune.planning import lessons
from hf_prune.planning.lessons import Batchwise, Tokenwise
from hf_prune.structure import stacks_of
from tests import zoo
from tests.planning.test_repair import batches_of


CPU = torch.device("cpu")


def of_block(name, dtype=torch.float64, n_batches=3):
    """Of the first block of a model, which is to put out what it never does."""
    model = zoo.build(name, dtype)
    batches = batches_of(model, n_batches)
    stack, blocks = next(iter(stacks_of(model).items()))
    with torch.no_grad():
        chain = record_chain(model, stack, blocks, list(dealt(batches, CPU)), {})
        wanted = chain.hidden.like()
        for number in range(len(chain.calls)):
            wanted.append(torch.randn_like(chain.hidden[number]))
    block = model.get_submodule(blocks[0]).requires_grad_(False)
    return Batchwise(block, chain, 0, wanted, turns(batches, CPU))


def tokenwise(whole, name):
    with torch.no_grad():
        return Tokenwise.of(whole, name)


def error_and_gradients(taught, parameters):
    """Of one epoch."""
    errors = []
    for step in taught.epoch(torch.Generator().manual_seed(0)):
        put_out = taught.put_out(step)
        errors.append(taught.error(step, put_out))
    total = torch.stack(errors).sum()
    return total, torch.autograd.grad(total, parameters)


@pytest.mark.parametrize(
    ("name", "module"),
    [("llama", "mlp"), ("gpt2", "mlp"), ("t5", "layer.1.DenseReluDense"), ("vit", "mlp"), ("falcon-old", "mlp")],
)
def test_of_all_tokens_it_is_the_error_of_the_block(name, module, monkeypatch):
    monkeypatch.setattr(lessons, "STEP_TOKENS", 20)
    whole = of_block(name)
    single = tokenwise(whole, module)
    parameters = [parameter.requires_grad_() for parameter in whole.block.get_submodule(module).parameters()]
    expected, gradients = error_and_gradients(whole, parameters)
    found, of_tokens = error_and_gradients(single, parameters)
    torch.testing.assert_close(found, expected)
    for each, other in zip(of_tokens, gradients, strict=True):
        torch.testing.assert_close(each, other)


def test_an_epoch_has_each_token_once_in_steps_of_one_length(monkeypatch):
    monkeypatch.setattr(lessons, "STEP_TOKENS", 20)
    whole = of_block("llama")
    n_tokens = sum(len(whole.chain.tokens(number, whole.wanted[number])) for number in range(len(whole.chain.calls)))
    single, generator = tokenwise(whole, "mlp"), torch.Generator().manual_seed(0)
    first, second = single.epoch(generator), single.epoch(generator)
    assert torch.cat(list(first)).sort().values.tolist() == list(range(n_tokens))
    assert len(first) == round(n_tokens / 20) > 3
    assert {len(step) for step in first} <= {n_tokens // len(first), n_tokens // len(first) + 1}
    assert not torch.equal(first[0], second[0])
    (step, *_) = first
    assert len(single.put_out(step)) == len(step)


class Mixing(nn.Module):
    """A feed-forward whose tokens see the one before."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + x.roll(1, dims=-2))


class Told(nn.Module):
    """One that is told something beside its inputs."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, scale=None):
        return self.inner(x) if scale is None else self.inner(x) * scale


def test_not_where_tokens_see_each_other_or_more_goes_in_or_the_sum_is_not_the_end():
    for name, module in (("bert", ""), ("llama", ""), ("gemma3", "mlp"), ("mixtral", "mlp.experts")):
        assert tokenwise(of_block(name), module) is None, name
    whole = of_block("llama")
    assert tokenwise(whole, "mlp") is not None
    assert tokenwise(whole, "mlp.gate_proj") is None
    inner = whole.block.mlp
    whole.block.mlp = Mixing(inner)
    assert tokenwise(whole, "mlp") is None
    whole.block.mlp = Told(inner)
    assert tokenwise(whole, "mlp") is not None
    handle = whole.block.mlp.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {"scale": 2.0}), with_kwargs=True
    )
    assert tokenwise(whole, "mlp") is None
    handle.remove()
