"""A causal language model writes calibration text itself: drawn from its own distribution, the same every time."""

import copy

import pytest
import torch
from torch.nn.functional import softmax
from transformers import GenerationConfig

import hf_prune
from hf_prune.calibration import self_generated as module
from hf_prune.calibration.self_generated import self_generated
from hf_prune.errors import CalibrationError, RecipeError
from tests import zoo


BEGIN = 2
NEURONS = {"target": "ffn_neurons", "sparsity": 0.5, "criterion": "activation", "compensation": "least_squares"}


@pytest.fixture
def model():
    built = zoo.build("llama")
    built.generation_config = GenerationConfig(bos_token_id=BEGIN)
    return built.eval()


def text(model, samples=40, length=10, batch_size=4, seed=0):
    return torch.cat([batch["input_ids"] for batch in self_generated(model, samples, length, batch_size, seed)])


def test_each_text_has_its_length_and_batches_the_size_asked_for(model):
    batches = self_generated(model, 10, 9, 4, 0)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 9), (4, 9), (2, 9)]
    assert self_generated(model, 0, 9, 4, 0) == []
    assert text(model, 3, 2).shape == (3, 2)  # shorter than what is drawn at first


def test_tokens_are_drawn_from_the_models_own_distribution(model):
    """The first is at temperature 1; the ninth at 0.8, told by the mean probability of what was drawn."""
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from uniform
        expected = softmax(model(torch.tensor([[BEGIN]])).logits[0, -1], -1)
        ids = text(model, samples=2000, length=9, batch_size=500)
        found = torch.bincount(ids[:, 0], minlength=len(expected)) / len(ids)
        assert (found - expected).abs().max() < 5 * (0.25 / len(ids)) ** 0.5
        before = torch.cat([torch.full((len(ids), 1), BEGIN), ids[:, :8]], 1)
        logits = model(before).logits[:, -1]
    drawn = ids[:, 8, None]
    mean = {
        temperature: float(softmax(logits / temperature, -1).gather(1, drawn).mean())
        for temperature in (0.6, module.TEMPERATURE, 1.0)
    }
    wanted = {
        temperature: float(softmax(logits / temperature, -1).square().sum(1).mean())  # of draws from it itself
        for temperature in mean
    }
    gaps = {temperature: abs(mean[temperature] - wanted[temperature]) for temperature in mean}
    assert min(gaps, key=gaps.get) == module.TEMPERATURE, gaps


def test_the_same_seed_writes_the_same_whatever_the_batch_size(model):
    first = text(model)
    assert torch.equal(first, text(model, batch_size=5))
    assert torch.equal(first[: module.AT_ONCE], text(model, samples=module.AT_ONCE))
    assert not torch.equal(first, text(model, seed=1))
    assert len(torch.unique(first, dim=0)) == len(first)


def test_the_models_settings_for_generation_are_of_no_account_and_stay(model):
    plain = text(model)
    own = model.generation_config = GenerationConfig(
        bos_token_id=BEGIN,
        eos_token_id=list(range(50)),
        repetition_penalty=9.0,
        suppress_tokens=[5],
        num_beams=3,
        max_length=4,
    )
    before = copy.deepcopy(own.to_dict())
    assert torch.equal(text(model), plain)
    assert model.generation_config is own and own.to_dict() == before


def test_the_model_and_random_numbers_stay_as_they_were(model):
    model.train()
    model.config.use_cache = False
    state = torch.get_rng_state()
    text(model)
    assert model.training and model.config.use_cache is False
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_without_a_first_token_begins_with_its_last_or_is_refused(model):
    model.generation_config = GenerationConfig()
    model.config.bos_token_id, model.config.eos_token_id = None, [BEGIN, 7]
    expected = text(model)
    model.config.eos_token_id = None
    with pytest.raises(CalibrationError, match="neither bos_token_id nor eos_token_id"):
        text(model)
    model.generation_config.bos_token_id = BEGIN
    assert torch.equal(text(model), expected)


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_what_writes_no_text_is_refused(name):
    with pytest.raises(CalibrationError, match="isn't a causal language model"):
        text(zoo.build(name))


def test_more_tokens_than_positions_are_refused(model):
    n_positions = model.config.max_position_embeddings
    said = f"calibration.length is {n_positions + 1}.* to at most {n_positions}"
    with pytest.raises(CalibrationError, match=said):
        text(model, length=n_positions + 1)


@pytest.mark.parametrize(
    ("name", "changes"), [("gpt2", {"n_positions": 24}), ("opt", {"max_position_embeddings": 24})]
)
def test_positions_up_to_the_last_can_be_written(name, changes):
    built = zoo.build(name, **changes)
    built.generation_config = GenerationConfig(bos_token_id=BEGIN)
    assert text(built, samples=2, length=24).shape == (2, 24)
    with pytest.raises(CalibrationError, match="has 24 positions"):
        text(built, samples=2, length=25)


def recipe(step=NEURONS, **calibration):
    return {"version": 1, "prune": [step], "calibration": {"self_generated": 12, "length": 10, **calibration}}


def test_a_model_is_pruned_without_data(model):
    written = self_generated(model, 12, 10, 8, 0)
    by_hand = hf_prune.make_plan(model, {"version": 1, "prune": [NEURONS]}, calibration=written)
    plan = hf_prune.make_plan(model, recipe())
    assert plan.replacements.keys() == by_hand.replacements.keys()
    assert all(torch.equal(plan.replacements[name], by_hand.replacements[name]) for name in plan.replacements)
    report = hf_prune.prune_(model, recipe())
    assert report.content["sparsity"]["ffn_neurons"] == 0.5


def test_what_it_writes_comes_after_what_is_given(model):
    given = [{"input_ids": torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(3))}]
    expected = hf_prune.make_plan(
        model, {"version": 1, "prune": [NEURONS]}, calibration=given + self_generated(model, 12, 10, 8, 0)
    )
    plan = hf_prune.make_plan(model, recipe(samples=3, length=10), calibration=given)
    assert all(torch.equal(plan.replacements[name], expected.replacements[name]) for name in expected.replacements)
    assert any("the longest calibration sample has 7 tokens" in note for note in plan.notes)  # of those given


def test_nothing_is_written_for_a_recipe_that_looks_at_no_data(model, monkeypatch):
    monkeypatch.setattr(hf_prune.planning.make, "self_generated", None)
    hf_prune.make_plan(model, recipe({"target": "ffn_neurons", "sparsity": 0.5, "criterion": "l1"}))
    with pytest.raises(TypeError):
        hf_prune.make_plan(model, recipe())


@pytest.mark.parametrize("value", [-1, 1.5, "many", True])
def test_a_number_that_is_none_is_refused(value):
    with pytest.raises(RecipeError, match=r"calibration\.self_generated"):
        hf_prune.Recipe.from_dict(recipe(self_generated=value))
