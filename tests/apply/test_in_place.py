"""Layers that are stepped over where they were, so that those behind them keep their numbers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

import hf_prune
from hf_prune.apply.shrink import remove_masked_
from hf_prune.checkpoint import settle_config_
from hf_prune.pipeline import apply_, make_plan
from hf_prune.structure import inspect_model
from hf_prune.structure.naming import is_absent
from tests import zoo


CLOSE = dict(rtol=1e-5, atol=1e-5)  # rotary angles are float32 when they are loaded
IDS = torch.arange(3, 15).reshape(2, 6)
SLIDING = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2, num_hidden_layers=4)


def dropped(model, numbers):
    """(masked, without these layers in place)"""
    recipe = {"version": 1, "prune": [{"target": "layers", "remove": numbers}]}
    apply_(model, make_plan(model, recipe))
    smaller = copy.deepcopy(model)
    record = remove_masked_(smaller, in_place={"model.layers"})
    assert not record.kept_layers
    settle_config_(smaller, {})
    return model, smaller


@pytest.mark.parametrize(
    ("name", "changes", "numbers", "places"), [("llama", {}, [0], [0, 1]), ("gemma3", SLIDING, [1, 2], [0, 1])]
)
def test_it_computes_and_generates_what_the_masked_model_does(name, changes, numbers, places, tmp_path):
    masked, smaller = dropped(zoo.build(name, torch.float64, **changes), numbers)
    layers = smaller.model.layers
    assert [number for number, layer in enumerate(layers) if is_absent(layer)] == numbers
    # the first place of a cache says how long it is, and each place has its kind: those that are left fill them from the first
    assert [layer.self_attn.layer_idx for layer in layers if not is_absent(layer)] == places
    smaller.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for again in (smaller, loaded, copy.deepcopy(smaller), pickle.loads(pickle.dumps(smaller))):
        with torch.no_grad():
            given, expected = (m.eval()(IDS, output_hidden_states=True) for m in (again, masked))
        torch.testing.assert_close(given.logits, expected.logits, **CLOSE)
        assert len(given.hidden_states) == len(expected.hidden_states) == len(layers) + 1
        for one, other in zip(given.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
        wanted = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
        cached = again.generate(IDS, **wanted)
        assert torch.equal(cached, masked.generate(IDS, use_cache=False, **wanted))


def test_what_left_can_not_leave_again_and_the_rest_can():
    _, model = dropped(zoo.build("llama", torch.float64), [1])
    (site,) = inspect_model(model).of("layers")
    assert site.fixed == ((1, "has left already"),) and site.in_place
    with pytest.raises(hf_prune.RecipeError, match="which can't leave: it has left already"):
        hf_prune.prune_(model, {"version": 1, "prune": [{"target": "layers", "remove": [1]}]})
    hf_prune.prune_(model, {"version": 1, "prune": [{"target": "layers", "remove": [2]}]})
    assert [is_absent(layer) for layer in model.model.layers] == [False, True, True]


def test_it_is_chosen_where_a_stock_config_of_fewer_layers_builds_others(tmp_path):
    """ModernBERT's first block has no norm, so that no other can be the first of a stock model."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING["modernbert"](
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    model = AutoModel.from_config(config)
    report = hf_prune.prune_(model, {"version": 1, "prune": [{"target": "layers", "remove": [0, 2]}]})
    assert [is_absent(layer) for layer in model.layers] == [True, False, True, False]
    assert report.content["checkpoint"]["loads_with"] == "hf_prune"
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(IDS).last_hidden_state, model.eval()(IDS).last_hidden_state)


def test_a_stock_checkpoint_is_preferred():
    model = zoo.build("llama")
    report = hf_prune.prune_(model, {"version": 1, "prune": [{"target": "layers", "remove": [0]}]})
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    assert report.content["checkpoint"]["loads_with"] == "transformers"
