"""Every criterion on every target that it is defined for, and oracles written as plain loops."""

from dataclasses import fields

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from hf_prune.calibration import collect
from hf_prune.calibration.statistics import NEEDS_OF_TRAINING, Statistics
from hf_prune.criteria import get
from hf_prune.criteria.base import PrunesMatrices, RanksUnits, RemovesUnits
from hf_prune.recipe.vocabulary import CRITERIA
from hf_prune.structure import WeightSite, inspect_model
from hf_prune.structure.naming import weight_of
from tests import zoo


def labelled(name, n_batches=2, size=2, padded=False):
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(n_batches):
        ids = torch.randint(3, 99, (size, 8), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if padded:
            batch["attention_mask"][:, 6:] = 0
        if name == "bert":
            batch["labels"] = torch.randint(0, 2, (size,), generator=generator)
        batches.append(batch)
    return batches


# what a criterion without defaults is tried with; of any target
OPTIONS = {"combined": {"of": {"l2": 0.7, "taylor": {"weight": 0.3}}}}
OF_EXPERTS = {"combined": {"of": {"l2": 0.7, "routing": {"weight": 0.3}}}}
CASES = [
    (criterion, target, name)
    for criterion, entry in CRITERIA.items()
    for target in sorted(entry.targets)
    for name in (["mixtral"] if target == "experts" else ["bert", "llama", "gpt2"])
]


@pytest.mark.parametrize(("name", "entry"), CRITERIA.items())
def test_a_criterion_takes_the_options_that_its_entry_lists(name, entry):
    assert {field.name for field in fields(get(name, OPTIONS.get(name)))} == set(entry.options)
    assert (name in OPTIONS) == bool(entry.required)


def pruned(criterion, model, sites):
    """(keep, values) of each matrix, from inputs made up, as the parameter is laid out."""
    found = []
    for site in sites:
        weight = model.get_parameter(site.name).detach()
        matrix = weight if site.reduction_dim == 1 else weight.T
        x = torch.randn(64, matrix.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        there = torch.ones(matrix.shape, dtype=torch.bool)
        keep, values, _ = criterion.prune(matrix, x.T @ x, there, matrix.numel() // 2, None)
        assert keep.dtype == torch.bool and int((~keep).sum()) == matrix.numel() // 2 and not values[~keep].any()
        found.append((keep, values if site.reduction_dim == 1 else values.T))
    return found


def removed(criterion, model, site):
    """Half of a site's units, from inputs made up."""
    (read,) = site.reads
    weight = weight_of(model.get_submodule(read.module)).detach()
    matrix = weight.T if isinstance(model.get_submodule(read.module), Conv1D) else weight
    x = torch.randn(64, matrix.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    columns = torch.arange(site.n_units * read.span.width).reshape(site.n_units, -1) + read.span.start
    there = torch.ones(site.n_units, dtype=torch.bool)
    found = criterion.remove_units(matrix, x.T @ x, columns, there, site.n_units // 2)
    assert int((~found.keep).sum()) == site.n_units // 2 and torch.isfinite(found.values).all()
    assert not found.values[:, columns[~found.keep].reshape(-1)].any()
    return found


def trained(sites):
    """What training might have gathered."""
    generator = torch.Generator().manual_seed(0)
    shapes = {site.key: site.shape if isinstance(site, WeightSite) else (site.n_units,) for site in sites}
    return Statistics(movement={key: torch.randn(shape, generator=generator) for key, shape in shapes.items()})


@pytest.mark.parametrize(("criterion", "target", "name"), CASES)
def test_scores_are_finite_float32_and_deterministic(criterion, target, name):
    model = zoo.build(name)
    structure = inspect_model(model)
    sites = structure.weights if target == "weights" else structure.of(target)
    scorer = get(criterion, (OF_EXPERTS if target == "experts" else OPTIONS).get(criterion))
    needs = scorer.needs(target)

    def scores():
        batches = labelled(name)
        if isinstance(scorer, RanksUnits):
            with pytest.raises(AssertionError):
                scorer.score_units(model, sites[0], None)
            there = {site.key: torch.ones(site.n_units, dtype=torch.bool) for site in sites}
            by_key = scorer.rank_units(model, sites, batches, {site.key: 1 for site in sites}, there, seed=0)
            return [by_key[site.key] for site in sites]
        if isinstance(scorer, RemovesUnits):
            return [removed(scorer, model, site).keep.float() for site in sites]
        if isinstance(scorer, PrunesMatrices):
            return [values for _, values in pruned(scorer, model, sites)]
        if needs & NEEDS_OF_TRAINING:
            statistics = trained(sites)
        else:
            statistics = collect(model, batches, needs, sites) if needs else None
        score = scorer.score_weights if target == "weights" else scorer.score_units
        return [score(model, site, statistics) for site in sites]

    first, second = scores(), scores()
    for site, score, again in zip(sites, first, second, strict=True):
        assert score.shape == (site.shape if target == "weights" else (site.n_units,))
        assert score.dtype == torch.float32
        assert torch.isfinite(score).all()
        assert torch.equal(score, again)
    assert any(score.unique().numel() > 1 for score in first), "all scores are alike"


def test_l1_and_l2_of_a_gpt2_head_by_hand():
    model = zoo.build("gpt2")
    site = inspect_model(model).of("attention_heads")[0]
    attention = model.transformer.h[0].attn
    for head in range(4):
        rows = slice(8 * head, 8 * head + 8)
        parts = []
        for start in (0, 32, 64):  # Conv1D (d_in, d_out): q, k and v side by side
            columns = slice(start + rows.start, start + rows.stop)
            parts += [attention.c_attn.weight[:, columns].flatten(), attention.c_attn.bias[columns]]
        parts.append(attention.c_proj.weight[rows].flatten())
        entries = torch.cat(parts).detach().double()
        assert get("l1").score_units(model, site, None)[head] == pytest.approx(entries.abs().mean().item(), rel=1e-6)
        expected = entries.square().mean().sqrt().item()
        assert get("l2").score_units(model, site, None)[head] == pytest.approx(expected, rel=1e-6)


def test_taylor_of_neurons_is_the_gate_gradient_sample_by_sample():
    model = zoo.build("bert", torch.float64)
    site = inspect_model(model).of("ffn_neurons")[1]
    batches = labelled("bert", n_batches=1, size=3)
    statistics = collect(model, batches, get("taylor").needs("ffn_neurons"), [site])
    gate = torch.ones(48, dtype=torch.float64, requires_grad=True)
    output = model.bert.encoder.layer[1].output.dense
    handle = output.register_forward_pre_hook(lambda module, args: (args[0] * gate,))
    expected = torch.zeros(48, dtype=torch.float64)
    for sample in range(3):
        loss = model(**{key: value[sample : sample + 1] for key, value in batches[0].items()}).loss
        expected += torch.autograd.grad(loss, gate)[0].abs() / 3
    handle.remove()
    score = get("taylor").score_units(model, site, statistics)
    assert torch.allclose(score.double(), expected, rtol=1e-5)


def test_activation_is_the_norm_of_what_a_neuron_writes():
    model = zoo.build("llama", torch.float64)
    site = inspect_model(model).of("ffn_neurons")[0]
    batches = labelled("llama", padded=True)
    statistics = collect(model, batches, get("activation").needs("ffn_neurons"), [site])
    down = model.model.layers[0].mlp.down_proj
    seen = []
    handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, :6].reshape(-1, 48)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    x = torch.cat(seen)
    written = torch.stack([(x[:, [j]] * down.weight[:, j]).square().sum(1).mean().sqrt() for j in range(48)])
    assert torch.allclose(get("activation").score_units(model, site, statistics).double(), written.detach(), rtol=1e-5)


def test_taylor_of_weights_is_weight_times_gradient():
    model = zoo.build("llama", torch.float64)
    site = inspect_model(model).weights[0]
    batches = labelled("llama", n_batches=1)
    statistics = collect(model, batches, get("taylor").needs("weights"), [site])
    loss = model(**batches[0], labels=batches[0]["input_ids"]).loss
    weight = model.get_parameter(site.name)
    expected = (weight * torch.autograd.grad(loss, weight)[0]).abs()
    score = get("taylor").score_weights(model, site, statistics)
    assert torch.allclose(score.double(), expected.detach(), rtol=1e-5, atol=1e-9)
