"""Stacks run one block at a time, and where projections join the residual stream, on every family."""

import copy

import pytest
import torch

from hf_prune.calibration.batches import Batch
from hf_prune.calibration.blocks import answering, record_chain, recorded, scratch_copy
from hf_prune.calibration.collect import evaluation
from hf_prune.calibration.residual import find_junctions
from hf_prune.errors import UnsupportedModelError
from hf_prune.structure import inspect_model, stacks_of
from hf_prune.structure.inputs import example_inputs
from tests import zoo


def ready(name, dtype=torch.float64):
    model = zoo.build(name, dtype)
    batches = [Batch.of(n, example_inputs(model, seed=n, length=8), torch.device("cpu")) for n in range(2)]
    return model, batches


def outputs(model, batch):
    found = model(**batch.inputs)
    return [value for value in found.to_tuple() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("name", zoo.MODELS)
@torch.no_grad()
def test_replaying_a_chain_is_running_the_model(name):
    model, batches = ready(name)
    with evaluation(model, 0):
        expected = [outputs(model, batch) for batch in batches]
        stacks = stacks_of(model)
        assert stacks
        for stack, blocks in stacks.items():
            chain = record_chain(model, stack, blocks, batches, {})
            for number, calls in enumerate(chain.calls):
                start = hidden = chain.hidden[number]
                untouched = start.clone()
                for position, block in enumerate(blocks):
                    hidden = calls[position](scratch_copy(model.get_submodule(block)), hidden)
                assert torch.equal(start, untouched), "a block changes its input in place"
                with answering(model, chain, hidden):
                    found = outputs(model, batches[number])
                for a, b in zip(found, expected[number], strict=True):
                    assert torch.allclose(a, b, rtol=0, atol=1e-12)
                with answering(model, chain, hidden.flip(-1)):  # the answer is what the rest of the model reads
                    other = outputs(model, batches[number])
                assert any(not torch.allclose(a, b) for a, b in zip(other, expected[number], strict=True))
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in model.modules())


def test_a_forward_that_was_put_on_a_block_is_there_again():
    model, batches = ready("llama")
    block = model.model.layers[1]
    block.forward = wrapped = lambda *args, **kwargs: type(block).forward(block, *args, **kwargs)
    with torch.no_grad(), evaluation(model, 0):
        chain = record_chain(model, "model.layers", stacks_of(model)["model.layers"], batches, {})
        with answering(model, chain, chain.hidden[0]):
            assert block.forward is not wrapped
    assert block.forward is wrapped and "forward" not in model.model.layers[0].__dict__


def test_an_encoder_that_changed_is_seen_by_the_decoder():
    model, batches = ready("bart")
    with torch.no_grad(), evaluation(model, 0):
        stacks = stacks_of(model)
        new = [torch.zeros(2, batches[0].inputs["input_ids"].shape[1], 32, dtype=torch.float64) for _ in batches]
        chain = record_chain(
            model, "decoder.layers", stacks["decoder.layers"], batches, {stacks["encoder.layers"][-1]: new}
        )
    read = [call.kwargs.get("encoder_hidden_states", None) for call in chain.calls[0]]
    read = [value if value is not None else call.args[1] for value, call in zip(read, chain.calls[0], strict=True)]
    assert all(torch.equal(value, new[0]) for value in read)


def test_a_model_that_works_between_its_blocks_is_no_chain():
    model, batches = ready("llama")
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    with evaluation(model, 0), pytest.raises(UnsupportedModelError, match="changes what passes between its blocks"):
        record_chain(model, "model.layers", stacks_of(model)["model.layers"], batches, {})
    assert not model.model.layers[0]._forward_hooks


INPUT, OUTPUT = ("", "input"), ("", "output")
# (family, stack, projection) -> (where the sum is seen, how many places make up the rest); None: not simply added
SUMS = {
    ("llama", "model.layers", "self_attn.o_proj"): ("inside", 1),
    ("llama", "model.layers", "mlp.down_proj"): (OUTPUT, 1),
    ("bert", "bert.encoder.layer", "attention.output.dense"): ("inside", 1),
    ("bert", "bert.encoder.layer", "output.dense"): ("inside", 1),
    ("gpt2", "transformer.h", "attn.c_proj"): ("inside", 1),
    ("gpt2", "transformer.h", "mlp.c_proj"): (OUTPUT, 1),
    ("opt", "model.decoder.layers", "self_attn.out_proj"): ("inside", 1),
    ("opt", "model.decoder.layers", "fc2"): (OUTPUT, 1),
    ("t5", "encoder.block", "layer.0.SelfAttention.o"): ("inside", 1),
    ("t5", "encoder.block", "layer.1.DenseReluDense.wo"): (OUTPUT, 1),
    ("t5", "decoder.block", "layer.1.EncDecAttention.o"): ("inside", 1),
    ("t5", "decoder.block", "layer.2.DenseReluDense.wo"): (OUTPUT, 1),
    ("bart", "encoder.layers", "fc2"): ("inside", 1),
    ("bart", "decoder.layers", "encoder_attn.out_proj"): ("inside", 1),
    ("gpt_neox", "gpt_neox.layers", "mlp.dense_4h_to_h"): (OUTPUT, 2),
    ("gpt_neox", "gpt_neox.layers", "attention.dense"): None,
    ("falcon-old", "transformer.h", "mlp.dense_4h_to_h"): (OUTPUT, 2),
    ("bloom", "transformer.h", "mlp.dense_4h_to_h"): (OUTPUT, 1),
    ("gemma2", "model.layers", "mlp.down_proj"): None,
    ("olmo2", "model.layers", "mlp.down_proj"): None,
}


@pytest.mark.parametrize(("name", "stack", "projection"), SUMS)
def test_where_a_projection_joins_the_stream(name, stack, projection):
    model, batches = ready(name)
    with torch.no_grad(), evaluation(model, 0):
        chain = record_chain(model, stack, stacks_of(model)[stack], batches, {})
        block = model.get_submodule(chain.blocks[0])
        (junction,) = find_junctions(block, chain.calls[0][0], chain.hidden[0], [projection])
    expected = SUMS[name, stack, projection]
    if expected is None:
        assert junction.total is None and not junction.rests
        assert junction.target == (projection, "output")
    else:
        where, n_rests = expected
        assert junction.total == where if where == OUTPUT else junction.total not in (None, OUTPUT)
        assert len(junction.rests) == n_rests


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_sum_found_holds_on_other_inputs(name):
    model, batches = ready(name)
    reads = {read.module for site in inspect_model(model).sites for read in site.reads}
    n_found = 0
    with torch.no_grad(), evaluation(model, 0):
        for stack, blocks in stacks_of(model).items():
            chain = record_chain(model, stack, blocks, batches, {})
            block, prefix = model.get_submodule(blocks[0]), f"{blocks[0]}."
            names = [read.removeprefix(prefix) for read in sorted(reads) if read.startswith(prefix)]
            for junction in find_junctions(block, chain.calls[0][0], chain.hidden[0], names):
                own = (junction.projection, "output")
                with recorded(block, [junction.target, own, *junction.rests]) as seen:
                    chain.calls[1][0](block, chain.hidden[1])
                rest = junction.rest(seen)
                total = seen[own] if rest is None else rest.reshape(seen[own].shape) + seen[own]
                assert torch.allclose(seen[junction.target].reshape(total.shape), total, rtol=0, atol=1e-9)
                # the projection moves the sum by what its own output moves, and the rest by nothing
                moved = copy.deepcopy(block)
                projection = moved.get_submodule(junction.projection)
                projection.register_forward_hook(lambda module, args, output: output + 1.0)
                places = [junction.target, *junction.rests]
                with recorded(moved, places) as after:
                    chain.calls[1][0](moved, chain.hidden[1])
                if junction.total is not None:
                    n_found += 1
                    assert torch.allclose(after[junction.target], seen[junction.target] + 1.0, rtol=0, atol=1e-9)
                    assert all(torch.equal(after[place], seen[place]) for place in junction.rests)
    assert n_found or name in ("gemma2", "gemma3", "olmo2")
