"""Movement and soft movement: scores by hand, thresholds on them, and what is refused without training.

What training gathers is tested in tests/training/test_movement.py.
"""

import math

import pytest
import torch

import hf_prune
from hf_prune import CalibrationError, RecipeError
from hf_prune.calibration.statistics import Statistics
from hf_prune.criteria import get
from hf_prune.structure import inspect_model
from tests import zoo


HALF = {"target": "weights", "sparsity": 0.5, "criterion": "movement"}


def recipe(*steps):
    return {"version": 1, "prune": list(steps)}


@pytest.fixture
def model():
    return zoo.build("bert")


def gathered(sites, seed=0):
    """By site key, what training might have gathered."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {site.key: getattr(site, "shape", None) or (site.n_units,) for site in sites}
    return {key: 1e-3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def test_scores_are_what_training_gathered(model):
    structure = inspect_model(model)
    weight, heads = structure.weights[0], structure.of("attention_heads")[0]
    movement = gathered([weight, heads])
    statistics = Statistics(movement=movement)
    assert torch.equal(get("movement").score_weights(model, weight, statistics), movement[weight.key])
    assert torch.equal(get("movement").score_units(model, heads, statistics), movement[heads.key])


def test_soft_scores_by_hand(model):
    """2 x 3, one entry gone: mean |S| of the five that moved is (1 + 3 + 2 + 4 + 5) / 5 = 3."""
    site = inspect_model(model).weights[0]
    movement = torch.tensor([[1.0, -3.0, 0.0], [2.0, 4.0, -5.0]])
    statistics = Statistics(movement={site.key: movement})
    score = get("soft_movement").score_weights(model, site, statistics)
    expected = [[1 / (1 + math.exp(-s / 3)) for s in row] for row in movement.tolist()]
    assert torch.allclose(score, torch.tensor(expected))
    assert score[0, 2] == 0.5


@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_a_soft_threshold_means_the_same_at_every_scale(model, scale):
    site = inspect_model(model).of("ffn_neurons")[0]
    movement = gathered([site])
    soft = get("soft_movement")
    expected = soft.score_units(model, site, Statistics(movement=movement))
    score = soft.score_units(model, site, Statistics(movement={site.key: scale * movement[site.key]}))
    assert torch.allclose(score, expected, rtol=1e-5)


def test_what_did_not_move_at_all_scores_a_half(model):
    site = inspect_model(model).of("ffn_neurons")[0]
    score = get("soft_movement").score_units(model, site, Statistics(movement={site.key: torch.zeros(48)}))
    assert torch.equal(score, torch.full((48,), 0.5))


def test_what_moved_towards_zero_leaves_first(model):
    structure = inspect_model(model)
    movement = gathered(structure.weights)
    plan = hf_prune.make_plan(model, recipe(HALF), movement=movement)
    for site in structure.weights:
        entries = sorted(range(math.prod(site.shape)), key=lambda n: float(movement[site.key].flatten()[n]))
        gone = set(entries[: len(entries) // 2])
        keep = plan.masks.weights[site.name].flatten()
        assert {n for n in range(len(keep)) if not keep[n]} == gone


def test_units_of_different_sites_compare_as_they_are(model):
    """A mean of scores of both signs is no scale."""
    sites = inspect_model(model).of("ffn_neurons")
    movement = gathered(sites)
    movement[sites[1].key] *= 100
    step = {"target": "ffn_neurons", "sparsity": 0.25, "criterion": "movement", "scope": "global"}
    keep = hf_prune.make_plan(model, recipe(step), movement=movement).masks.units
    cut = torch.cat(list(movement.values())).sort().values[36]  # of 3 x 48
    assert all(torch.equal(keep[site.key], movement[site.key] >= cut) for site in sites)


@pytest.mark.parametrize("target", ["weights", "ffn_neurons", "attention_heads"])
def test_a_soft_threshold_says_how_much_leaves_each_site(model, target):
    structure = inspect_model(model)
    sites = structure.weights if target == "weights" else structure.of(target)
    movement = gathered(sites)
    step = {"target": target, "threshold": {"rule": "absolute", "value": 0.45}, "criterion": "soft_movement"}
    masks = hf_prune.make_plan(model, recipe(step), movement=movement).masks
    shares = set()
    for site in sites:
        values = movement[site.key].double()
        keep = masks.weights[site.name] if target == "weights" else masks.units[site.key]
        assert torch.equal(keep, torch.sigmoid(values / values.abs().mean()) >= 0.45)
        shares.add(float(keep.float().mean()))
    assert len(shares) > 1


@pytest.mark.parametrize("target", ["weights", "ffn_neurons"])
def test_what_has_left_counts_as_below_the_threshold(model, target):
    """It scores a half then, above this threshold; at the schedule's end all that is below has left nonetheless."""
    structure = inspect_model(model)
    sites = structure.weights if target == "weights" else structure.of(target)
    movement = gathered(sites)
    step = {"target": target, "threshold": {"rule": "absolute", "value": 0.45}, "criterion": "soft_movement"}
    half = hf_prune.make_plan(model, recipe(step), movement=movement, progress=0.5)
    final = {}
    for site in sites:
        keep = half.masks.weights[site.name] if target == "weights" else half.masks.units[site.key]
        movement[site.key] = movement[site.key] * keep
        values = movement[site.key].double()
        kept = torch.sigmoid(values / (values.abs().sum() / keep.sum())) >= 0.45
        final[site.key] = keep & kept
        assert 0 < int((~keep).sum()) < int((~final[site.key]).sum())
    whole = hf_prune.make_plan(model, recipe(step), movement=movement, previous=half)
    for site in sites:
        keep = whole.masks.weights[site.name] if target == "weights" else whole.masks.units[site.key]
        assert torch.equal(keep, final[site.key])


def test_movement_may_say_which_of_a_group_leave(model):
    structure = inspect_model(model)
    movement = gathered(structure.weights)
    step = {"target": "weights", "pattern": "2:4", "criterion": "movement"}
    masks = hf_prune.make_plan(model, recipe(step), movement=movement).masks.weights
    for site in structure.weights:
        for scores, keep in zip(
            movement[site.key].reshape(-1, 4).tolist(), masks[site.name].reshape(-1, 4).tolist(), strict=True
        ):
            assert [kept for _, kept in sorted(zip(scores, keep, strict=True))] == [False, False, True, True]


def test_movement_may_be_one_of_several_criteria(model):
    sites = inspect_model(model).of("ffn_neurons")
    movement = gathered(sites)
    of = {"movement": 2, "l1": 1}
    step = {"target": "ffn_neurons", "sparsity": 0.5, "criterion": {"name": "combined", "of": of}}
    keep = hf_prune.make_plan(model, recipe(step), movement=movement).masks.units
    for site in sites:
        scores = movement[site.key].tolist(), get("l1").score_units(model, site, None).tolist()
        places = [[sorted(each).index(score) for score in each] for each in scores]
        total = [2 * a + b for a, b in zip(*places, strict=True)]
        below, above = (
            [t for t, k in zip(total, keep[site.key].tolist(), strict=True) if k == kept] for kept in (False, True)
        )
        assert len(below) == len(above) == 24 and max(below) <= min(above)
    with pytest.raises(RecipeError, match="combined scores what training does"):
        hf_prune.make_plan(model, recipe(step))


@pytest.mark.parametrize("criterion", ["movement", "soft_movement"])
def test_without_training_it_is_refused_before_anything_is_looked_at(criterion):
    amount = {"threshold": {"rule": "absolute", "value": 0.5}} if criterion == "soft_movement" else {"sparsity": 0.5}
    asked = recipe({"target": "layers", "sparsity": 0.3}, {"target": "weights", "criterion": criterion, **amount})
    with pytest.raises(
        RecipeError, match=rf"prune\.1\.criterion: {criterion} scores what training does.*PruningTrainer"
    ):
        hf_prune.make_plan(None, asked)
    model = zoo.build("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RecipeError, match="or in one shot taylor"):
        hf_prune.prune_(model, asked)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_movement_that_is_not_finite_is_an_error(model, value):
    weights = inspect_model(model).weights
    movement = gathered(weights)
    movement[weights[3].key][0, 0] = value
    with pytest.raises(CalibrationError, match=f"the movement of {weights[3].key} is not finite"):
        hf_prune.make_plan(model, recipe(HALF), movement=movement)


def test_no_movement_at_all_is_an_error(model):
    movement = {site.key: torch.zeros(site.shape) for site in inspect_model(model).weights}
    with pytest.raises(CalibrationError, match="'movement' has seen no gradient"):
        hf_prune.make_plan(model, recipe(HALF), movement=movement)
