"""docs/coming-from.md against torch.nn.utils.prune itself, and against formulas of the others."""

import copy

import torch
from torch import nn
from torch.nn.utils import prune

import hf_prune
from hf_prune.recipe import Schedule
from hf_prune.training.schedule import updates
from tests import zoo


def linears(model):
    return {name: module for name, module in model.bert.encoder.named_modules() if isinstance(module, nn.Linear)}


def pruned(model, step):
    model = copy.deepcopy(model)
    hf_prune.prune_(model, {"version": 1, "prune": [{"target": "weights", "include": ["bert.encoder.*"], **step}]})
    return linears(model)


def test_l1_of_each_matrix_and_of_all_are_those_of_torch():
    model = zoo.build("bert")
    theirs = copy.deepcopy(model)
    for module in linears(theirs).values():
        prune.l1_unstructured(module, "weight", 0.3)
        prune.remove(module, "weight")
    ours = pruned(model, {"sparsity": 0.3})
    assert all(torch.equal(module.weight, ours[name].weight) for name, module in linears(theirs).items())
    theirs = copy.deepcopy(model)
    pairs = [(module, "weight") for module in linears(theirs).values()]
    prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=0.3)
    ours = pruned(model, {"sparsity": 0.3, "scope": "global"})
    for name, module in linears(theirs).items():
        assert torch.equal(module.weight, ours[name].weight), name


def test_a_second_amount_is_of_what_is_left_as_in_torch():
    model = zoo.build("bert")
    theirs = linears(copy.deepcopy(model))
    for module in theirs.values():
        prune.l1_unstructured(module, "weight", 0.5)
        prune.l1_unstructured(module, "weight", 0.5)
    ours = copy.deepcopy(model)
    step = {"target": "weights", "sparsity": 0.5, "include": ["bert.encoder.*"]}
    hf_prune.prune_(ours, {"version": 1, "prune": [step, step]})
    assert all(torch.equal(module.weight, linears(ours)[name].weight) for name, module in theirs.items())


def test_polynomial_decay_is_the_cubic_schedule():
    """Keras: s_f + (s_i - s_f) (1 - (t - begin) / (end - begin))^3 at every `frequency` steps from begin to end."""
    ours = updates(Schedule(name="cubic", begin=0.1, end=0.6, updates=20), 10_000)
    steps = range(1000, 6001, 250)
    theirs = {step: 1 - (1 - (step - 1000) / 5000) ** 3 for step in steps}
    assert theirs.pop(1000) == 0
    assert ours.keys() == theirs.keys()
    assert all(abs(ours[step] - theirs[step]) < 1e-12 for step in ours)
    constant = updates(Schedule(name="constant", begin=0.1, end=1.0, updates=90), 10_000)
    assert list(constant) == list(range(1000, 10_001, 100)) and set(constant.values()) == {1.0}
