"""SparseGPT through a model: matrices outside the stacks of blocks, and what earlier steps changed."""

import copy

import pytest
import torch
from torch import nn

from hf_prune import apply_, make_plan
from hf_prune.calibration.batches import dealt
from hf_prune.calibration.blocks import record_chain
from hf_prune.criteria import get
from hf_prune.errors import CalibrationError, RecipeError
from hf_prune.planning.sparsify import _by_input
from hf_prune.structure import inspect_model
from tests import zoo
from tests.planning.test_repair import batches_of, recipe


def step(*, sparsity=0.5, criterion="sparsegpt", **keys):
    return {"target": "weights", "sparsity": sparsity, "criterion": criterion, **keys}


def applied(model, plan):
    pruned = copy.deepcopy(model)
    apply_(pruned, plan)
    return pruned


def passed(model, module, batches):
    """What goes into `module` and what comes out: (rows, d_in), (rows, d_out)."""
    seen = []
    handle = model.get_submodule(module).register_forward_hook(lambda m, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return (torch.cat([each.reshape(-1, each.shape[-1]) for each in side]) for side in zip(*seen, strict=True))


@pytest.mark.parametrize(("name", "outside"), [("bert", "bert.pooler.dense"), ("vit", "pooler.dense")])
def test_a_matrix_behind_the_blocks_is_pruned_on_what_the_pruned_blocks_give_it(name, outside):
    model = zoo.build(name, torch.float64)
    batches = batches_of(model)
    plan = make_plan(model, recipe(step()), calibration=batches)
    before = applied(model, make_plan(model, recipe(step(exclude=[outside])), calibration=batches))
    x, _ = passed(before, outside, batches)
    weight = model.get_submodule(outside).weight.detach()
    n_leaving = weight.numel() // 2
    keep, values, _ = get("sparsegpt").prune(weight, x.T @ x, torch.ones_like(weight, dtype=torch.bool), n_leaving)
    assert torch.equal(plan.masks.weights[f"{outside}.weight"], keep)
    assert torch.allclose(plan.replacements[f"{outside}.weight"].float(), values, rtol=1e-4, atol=1e-5)
    assert plan.masks.weights.keys() == {site.name for site in inspect_model(model).weights}


def test_what_shares_an_input_is_pruned_together():
    model = zoo.build("llama")
    (batch,) = batches_of(model, 1)
    block = model.model.layers[0]
    linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        chain = record_chain(model, "model.layers", ["model.layers.0"], list(dealt([batch], torch.device("cpu"))), {})
        together = _by_input(block, chain, 0, linears)
    short = [[name.rpartition(".")[2] for name in names] for names in together]
    assert short == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_the_blocks_are_pruned_on_what_a_pruned_matrix_before_them_gives():
    model = zoo.build("electra", torch.float64)
    batches, outside = batches_of(model), "electra.embeddings_project"
    both = make_plan(model, recipe(step()), calibration=batches)
    first = applied(model, make_plan(model, recipe(step(include=[outside])), calibration=batches))
    rest = make_plan(first, recipe(step(exclude=[outside])), calibration=batches)
    assert all(torch.equal(both.masks.weights[name], keep) for name, keep in rest.masks.weights.items())
    assert all(torch.allclose(both.replacements[name], value) for name, value in rest.replacements.items())


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("name", ["bert", "electra", "clip"])
def test_a_matrix_outside_the_blocks_can_aim_at_the_dense_outputs(name, pattern):
    model = zoo.build(name, torch.float64)
    batches = batches_of(model, 12)
    outside = {"bert": "bert.pooler.dense", "electra": "electra.embeddings_project", "clip": "visual_projection"}[name]
    _, wanted = passed(model, outside, batches)
    keys = step(pattern=pattern) if pattern else step()
    if pattern:
        del keys["sparsity"]
    errors = []
    for dense_target in (False, True):
        criterion = {"name": "sparsegpt", "dense_target": dense_target}
        plan = make_plan(model, recipe({**keys, "criterion": criterion}), calibration=batches)
        _, found = passed(applied(model, plan), outside, batches)
        errors.append((found - wanted).square().sum())
    if name == "electra":  # nothing is pruned before it: its own outputs are the dense model's
        assert torch.allclose(errors[1], errors[0], rtol=1e-3)
    else:
        assert errors[1] < errors[0]


def test_matrices_see_what_an_earlier_step_left_of_those_outside():
    model = zoo.build("electra", torch.float64)
    batches, outside = batches_of(model), "electra.embeddings_project"
    halved = step(include=[outside], criterion="l1")
    both = make_plan(model, recipe(halved, step(exclude=[outside])), calibration=batches)
    first = applied(model, make_plan(model, recipe(halved), calibration=batches))
    rest = make_plan(first, recipe(step(exclude=[outside])), calibration=batches)
    masks = rest.steps[0].weights
    assert all(torch.equal(both.steps[1].weights[name], keep) for name, keep in masks.items())


def test_a_decoder_is_pruned_on_what_the_pruned_encoder_gives_it():
    model = zoo.build("bart", torch.float64)
    batches = batches_of(model)
    encoder = {"target": "ffn_neurons", "sparsity": 0.5, "include": ["encoder.*"]}
    both = make_plan(model, recipe(encoder, step(include=["decoder.*"])), calibration=batches)
    first = applied(model, make_plan(model, recipe(encoder), calibration=batches))
    rest = make_plan(first, recipe(step(include=["decoder.*"])), calibration=batches)
    whole = make_plan(model, recipe(step(include=["decoder.*"])), calibration=batches)
    masks = rest.steps[0].weights
    assert all(torch.equal(both.steps[1].weights[name], keep) for name, keep in masks.items())
    assert any(not torch.equal(whole.steps[0].weights[name], keep) for name, keep in masks.items())


@pytest.mark.parametrize("n_calls", [0, 2])
def test_a_matrix_that_is_not_called_once_is_refused(n_calls):
    model = zoo.build("llama")
    model.model.extra = nn.Linear(32, 32)
    model.model.norm.register_forward_hook(
        lambda module, args, output: [model.model.extra(output) for _ in range(n_calls)][:0] or None
    )
    with pytest.raises(RecipeError, match=rf"model\.extra is called {n_calls} times .* exclude it"):
        make_plan(model, recipe(step()), calibration=batches_of(model, 2))
    assert make_plan(model, recipe(step(exclude=["*.extra"])), calibration=batches_of(model, 2)).masks


def test_a_matrix_in_a_block_that_is_never_run_is_refused():
    model = zoo.build("llama")
    model.model.layers[1].mlp.extra = nn.Linear(32, 32)
    with pytest.raises(RecipeError, match=r"model\.layers\.1\.mlp\.extra is not run on the calibration data"):
        make_plan(model, recipe(step()), calibration=batches_of(model, 2))


def test_a_damping_that_leaves_a_gram_matrix_singular_is_an_error_that_names_the_matrix():
    model = zoo.build("llama", torch.float64)
    criterion = {"name": "sparsegpt", "damping": 1e-30}
    (batch,) = batches_of(model, 1, length=4)  # 16 tokens, fewer than the 32 inputs
    with pytest.raises(
        CalibrationError, match=r"q_proj\.weight: the Gram matrix of the 32 inputs is singular with damping"
    ):
        make_plan(model, recipe(step(criterion=criterion)), calibration=[batch])


@pytest.mark.parametrize(("n_leaving", "n_near_ties"), [(768, 0), (769, 1)])
def test_near_ties_are_reported(n_leaving, n_near_ties):
    model = zoo.build("llama")
    up = model.model.layers[0].mlp.up_proj
    with torch.no_grad():  # of neurons that are alike a pair parts only where the cut falls between them
        up.weight[1::2] = up.weight[::2]
    steps = recipe(step(include=["*.0.mlp.up_proj"], sparsity=n_leaving / up.weight.numel()))
    plan = make_plan(model, steps, calibration=batches_of(model, 4))
    (keep,) = plan.masks.weights.values()
    assert int((~keep).sum()) == n_leaving
    assert plan.n_near_ties == int((keep[1::2] != keep[::2]).sum()) == n_near_ties
