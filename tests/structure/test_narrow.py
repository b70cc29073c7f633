"""A feed-forward that pruning left narrower than the model is still one."""

import pytest

import hf_prune
from hf_prune.structure import inspect_model
from tests import zoo


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "opt", "t5", "vit"])
def test_a_pruned_feed_forward_is_found_again(name):
    model = zoo.build(name)
    n_sites = len(inspect_model(model).of("ffn_neurons"))
    hf_prune.prune_(model, {"version": 1, "prune": [{"target": "ffn_neurons", "sparsity": 0.8, "criterion": "l1"}]})
    sites = inspect_model(model).of("ffn_neurons")
    assert len(sites) == n_sites > 0
    assert all(site.n_units < 32 for site in sites), "as wide as the model, so this proves nothing"
