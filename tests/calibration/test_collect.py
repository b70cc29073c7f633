"""Collection leaves no trace, does not depend on batch size, and says what is wrong with the data."""

from dataclasses import fields

import pytest
import torch
from torch import nn

from hf_prune.calibration import collect
from hf_prune.calibration.statistics import MOVEMENT, ROUTED_NORMS, ROUTED_SHARES, Statistics
from hf_prune.errors import CalibrationError
from hf_prune.plan import KeepMasks
from hf_prune.planning import make_plan
from hf_prune.planning.sparsify import sparsify
from hf_prune.structure import inspect_model
from hf_prune.structure.sites import WeightSite
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


def labelled(first):
    """One batch of four samples, of which the first `first` have no label."""
    (whole,) = data(4)
    labels = whole["input_ids"].masked_fill(whole["attention_mask"] == 0, -100)
    labels[:first] = -100
    return whole | {"labels": labels}


@pytest.mark.parametrize("split", [[1, 1, 1, 1], [3, 1]])
def test_pieces_of_a_batch_give_what_the_batch_gives(monkeypatch, split):
    def of(piece_tokens):
        monkeypatch.setattr("hf_prune.calibration.batches.PIECE_TOKENS", piece_tokens)
        model = zoo.build("llama", torch.float64)
        structure, sizes = inspect_model(model), []
        model.register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        return collect(model, [labelled(1)], NEEDS, [*structure.sites, *structure.weights]), sizes

    whole, sizes = of(1024)
    assert sizes[-1] == 4
    pieces, sizes = of(8 * split[0])  # samples are 8 tokens long; the first by itself is a piece without labels
    assert sizes[-len(split) :] == split
    assert (whole.n_samples, whole.n_labels) == (pieces.n_samples, pieces.n_labels)
    for name in NEEDS:
        for key, value in getattr(whole, name).items():
            assert torch.allclose(getattr(pieces, name)[key], value, rtol=1e-5, atol=1e-12), (name, key)


def test_data_without_any_label_are_refused():
    model = zoo.build("llama")
    with pytest.raises(CalibrationError, match=r"hold no label \(all are -100\)"):
        collect(model, [labelled(4)], frozenset({"gate_gradients"}), inspect_model(model).sites)
    step = {"target": "layers", "sparsity": 0.34, "criterion": "loss_change"}
    with pytest.raises(CalibrationError, match="hold no label"):
        make_plan(model, {"version": 1, "prune": [step]}, calibration=[labelled(4)])


def test_an_input_that_is_changed_in_place_is_looked_at_again():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x):
            y = self.first(x) + self.second(x)
            return y + self.third(x.mul_(2))

    model = Twice()
    sites = [WeightSite(f"{name}.weight", name, (3, 3), reduction_dim=1) for name in ("first", "second", "third")]
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            found = collect(model, [{"x": torch.ones(2, 5, 3)}], frozenset({"squared_inputs"}), sites).squared_inputs
        assert {name: values.tolist() for name, values in found.items()} == {
            "first": [1.0] * 3, "second": [1.0] * 3, "third": [4.0] * 3
        }  # fmt: skip


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
