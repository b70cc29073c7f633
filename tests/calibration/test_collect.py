"""Collection leaves no trace, does not depend on batch size, and says what is wrong with the data."""

from dataclasses import fields

import pytest
import torch

from hf_prune.calibration import collect
from hf_prune.calibration.statistics import MOVEMENT, ROUTED_NORMS, ROUTED_SHARES, Statistics
from hf_prune.errors import CalibrationError
from hf_prune.plan import KeepMasks
from hf_prune.planning.sparsify import sparsify
from hf_prune.structure import inspect_model
from tests import zoo


# all but what training gathers as the optimizer steps
NEEDS = frozenset(field.name for field in fields(Statistics) if not field.name.startswith("n_"))
NEEDS -= {MOVEMENT, ROUTED_SHARES, ROUTED_NORMS}  # of training, and of mixtures of experts


def data(size, n_samples=4):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 99, (n_samples, 8), generator=generator)
    mask = torch.ones_like(ids)
    for sample in range(n_samples):
        mask[sample, 8 - sample :] = 0  # samples of unequal length
    whole = {"input_ids": ids, "attention_mask": mask}
    return [{key: value[at : at + size] for key, value in whole.items()} for at in range(0, n_samples, size)]


def statistics(size, dtype=torch.float64):
    model = zoo.build("llama", dtype)
    structure = inspect_model(model)
    return collect(model, data(size), NEEDS, [*structure.sites, *structure.weights])


def test_batch_size_does_not_matter():
    one, four = statistics(1), statistics(4)
    for name in NEEDS:
        a, b = getattr(one, name), getattr(four, name)
        assert a.keys() == b.keys() and a
        for key in a:
            assert torch.allclose(a[key], b[key], rtol=1e-5, atol=1e-12), key


def test_the_model_is_as_it_was():
    model = zoo.build("llama").train()
    model.model.layers[0].eval()
    frozen = model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    marked = model.model.layers[2].mlp.up_proj.weight
    marked.grad = torch.ones_like(marked)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    structure = inspect_model(model)
    collect(model, data(2), NEEDS, structure.sites)
    assert model.training and not model.model.layers[0].training
    assert not frozen.requires_grad and marked.requires_grad
    assert torch.equal(marked.grad, torch.ones_like(marked)) and model.lm_head.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_labels_that_are_missing_are_asked_for():
    model = zoo.build("bert")
    with pytest.raises(CalibrationError, match=r"gave no loss .* Add the labels"):
        collect(model, data(2), frozenset({"gate_gradients"}), inspect_model(model).sites)


def test_no_data_and_broken_data():
    model = zoo.build("vit")
    sites = inspect_model(model).of("ffn_neurons")
    with pytest.raises(CalibrationError, match="ends after 0 samples"):
        collect(model, [], frozenset({"squared_inputs"}), sites)
    with pytest.raises(CalibrationError, match="a list; expected a dict"):
        collect(model, [[1, 2]], frozenset({"squared_inputs"}), sites)
    pixels = torch.full((1, 3, 16, 16), float("nan"))
    with pytest.raises(CalibrationError, match="not finite after calibration batch 0"):
        collect(model, [{"pixel_values": pixels}], frozenset({"squared_inputs"}), sites)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_matrices_and_float32_statistics_do_not_depend_on_batch_size(dtype):
    def grams(size):
        model = zoo.build("llama", dtype)
        structure, found = inspect_model(model), {}

        def prune(site, matrix, gram, there):
            found[site.name] = gram.clone()
            return there, matrix

        there = {site.name: torch.ones(site.shape, dtype=torch.bool) for site in structure.weights}
        sparsify(model, structure, KeepMasks(), {}, structure.weights, there, prune, data(size))
        return found

    one, four = grams(1), grams(4)
    assert len(one) == 3 * 7
    for name, gram in one.items():
        assert gram.dtype == torch.float64
        assert (gram - four[name]).abs().max() <= 1e-5 * gram.abs().max(), name
    one, four = statistics(1, dtype), statistics(4, dtype)
    for need in NEEDS:
        for key, value in getattr(one, need).items():
            assert (value - getattr(four, need)[key]).abs().max() <= 1e-5 * value.abs().max(), (need, key)
