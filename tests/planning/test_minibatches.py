"""The steps of a block's training: single tokens where what learns sees each by itself, with the same loss as the whole block."""

import pytest
import torch
from torch import nn

from hf_prune.calibration.batches import dealt, turns
from hf_prune.calibration.blocks import record_chain
from hf_prune.calibration.residual import find_tokenwise
from hf_prune.planning import minibatches
from hf_prune.planning.minibatches import SingleTokens, WholeBatches
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
    return WholeBatches(block, chain, 0, wanted, turns(batches, CPU))


def tokenwise(whole, name):
    with torch.no_grad():
        return SingleTokens.of(whole, name)


def error_and_gradients(steps, parameters):
    """Of one epoch."""
    errors = []
    for step in steps.epoch(torch.Generator().manual_seed(0)):
        output = steps.forward(step)
        errors.append(steps.loss(step, output))
    total = torch.stack(errors).sum()
    return total, torch.autograd.grad(total, parameters)


@pytest.mark.parametrize(
    ("name", "module"),
    [("llama", "mlp"), ("gpt2", "mlp"), ("t5", "layer.1.DenseReluDense"), ("vit", "mlp"), ("falcon-old", "mlp")],
)
def test_of_all_tokens_it_is_the_error_of_the_block(name, module, monkeypatch):
    monkeypatch.setattr(minibatches, "STEP_TOKENS", 20)
    whole = of_block(name)
    single = tokenwise(whole, module)
    parameters = [parameter.requires_grad_() for parameter in whole.block.get_submodule(module).parameters()]
    expected, gradients = error_and_gradients(whole, parameters)
    found, of_tokens = error_and_gradients(single, parameters)
    torch.testing.assert_close(found, expected)
    for each, other in zip(of_tokens, gradients, strict=True):
        torch.testing.assert_close(each, other)


def test_an_epoch_has_each_token_once_in_steps_of_one_length(monkeypatch):
    monkeypatch.setattr(minibatches, "STEP_TOKENS", 20)
    whole = of_block("llama")
    n_tokens = sum(len(whole.chain.tokens(number, whole.wanted[number])) for number in range(len(whole.chain.calls)))
    single, generator = tokenwise(whole, "mlp"), torch.Generator().manual_seed(0)
    first, second = single.epoch(generator), single.epoch(generator)
    tokens = [[(number, row) for number, rows in step for row in rows.tolist()] for step in first]
    everything = {(n, row) for n, norms in enumerate(single.squared_norms) for row in range(len(norms))}
    assert sum(map(len, tokens)) == n_tokens and {token for step in tokens for token in step} == everything
    assert len(first) == round(n_tokens / 20) > 3
    assert {len(step) for step in tokens} <= {n_tokens // len(first), n_tokens // len(first) + 1}
    assert tokens[0] != [(number, row) for number, rows in second[0] for row in rows.tolist()]
    assert len(single.forward(first[0])) == len(tokens[0])


def test_little_data_make_as_many_steps_as_they_have_batches():
    single = tokenwise(of_block("llama", n_batches=5), "mlp")
    assert len(single.epoch(torch.Generator().manual_seed(0))) == 5


class Changed(nn.Module):
    """A feed-forward with another forward pass around it."""

    def __init__(self, inner, forward):
        super().__init__()
        self.inner, self._forward = inner, forward

    def forward(self, *args, **kwargs):
        return self._forward(self.inner, *args, **kwargs)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("bert", ""),
        ("bert", "output.dense"),
        ("gemma3", "mlp"),
        ("mixtral", "mlp.experts"),
        ("llama", "mlp.gate_proj"),
    ],
)
def test_not_where_its_output_is_not_the_last_term_or_more_goes_in(name, module):
    assert tokenwise(of_block(name), module) is None


@pytest.mark.parametrize(
    ("forward", "suits"),
    [
        (lambda inner, x: inner(x), True),
        (lambda inner, x: inner(x + x.roll(1, dims=-2)), False),
        (lambda inner, x: inner(x + x.mean(-2, keepdim=True)), False),  # equal for tokens in another order
        (lambda inner, x: inner(x) * (torch.arange(x.shape[-2]) < 8)[:, None], False),  # no room for the ninth
        (lambda inner, x: inner(x.reshape(len(x), 2, x.shape[1] // 2, x.shape[2])).reshape(x.shape), False),
    ],
    ids=["plain", "the one before", "the mean", "room for eight", "even lengths"],
)
def test_only_where_tokens_do_not_see_each_other(forward, suits):
    whole = of_block("llama")
    whole.block.mlp = Changed(whole.block.mlp, forward)
    assert (tokenwise(whole, "mlp") is not None) == suits


def test_not_where_it_is_called_with_more_or_by_another_name():
    whole = of_block("llama")
    whole.block.mlp = Changed(whole.block.mlp, lambda inner, x, scale=1.0: inner(x) * scale)
    for change in (
        lambda module, args, kwargs: (args, {"scale": 2.0}),
        lambda module, args, kwargs: ((), {"x": args[0]}),
    ):
        handle = whole.block.mlp.register_forward_pre_hook(change, with_kwargs=True)
        assert tokenwise(whole, "mlp") is None
        handle.remove()
    assert tokenwise(whole, "mlp") is not None


def test_a_block_that_adds_in_place():
    whole = of_block("llama")
    block = whole.block
    parameters = [parameter.requires_grad_() for parameter in block.mlp.parameters()]
    expected, _ = error_and_gradients(whole, parameters)

    def forward(hidden, position_embeddings, attention_mask, **kwargs):
        attended, _ = block.self_attn(block.input_layernorm(hidden), position_embeddings, attention_mask)
        hidden = hidden + attended
        hidden += block.mlp(block.post_attention_layernorm(hidden))
        return hidden

    block.forward = forward
    found, _ = error_and_gradients(tokenwise(whole, "mlp"), parameters)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_large_coordinate_hides_no_other_from_half_precision(dtype):
    model = zoo.build("llama", dtype)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 300
        chain = record_chain(model, "model.layers", ["model.layers.0"], list(dealt(batches_of(model, 1), CPU)), {})
        found = find_tokenwise(model.model.layers[0], chain.calls[0][0], chain.hidden[0], "mlp")
    assert found.rests == (("post_attention_layernorm", "input"),)
