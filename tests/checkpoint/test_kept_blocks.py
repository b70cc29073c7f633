"""Blocks that leave a stack whose depth no config field says: the manifest lists which are kept."""

import copy

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from hf_prune.apply.masks import set_masks
from hf_prune.apply.shrink import remove_masked_
from hf_prune.checkpoint import settle, settle_config_
from hf_prune.checkpoint.modeling_hf_prune import ManifestError, resize_
from hf_prune.errors import UnsupportedModelError
from hf_prune.plan import KeepMasks
from hf_prune.structure.inputs import example_inputs
from tests import zoo
from tests.checkpoint.shrunk import assert_close, outputs
from tests.reach.zoo import build as build_type


def drop_(model, keep):
    set_masks(model, KeepMasks(units={"layers:model.layers": torch.tensor(keep)}))
    return settle_config_(model, remove_masked_(model).kept_layers)


@pytest.fixture
def no_field(monkeypatch):
    """A config that has no field for the depth."""
    real = settle.depth_edit

    def none(model, config, kept_layers):
        if kept_layers:
            raise UnsupportedModelError("no field")
        return real(model, config, kept_layers)

    monkeypatch.setattr(settle, "depth_edit", none)


def test_they_are_left_in_what_is_loaded_and_a_second_pruning_counts_from_the_stock_model(no_field, tmp_path):
    model = zoo.build("llama", torch.float64, num_hidden_layers=4)
    inputs = example_inputs(model)
    verdict = drop_(model, [True, False, True, True])
    assert verdict.loads_with == "hf_prune"
    assert model.config.num_hidden_layers == 4
    assert model.config.hf_prune["modules"]["model.layers"] == {"kept": [0, 2, 3]}
    drop_(model, [False, True, True])
    assert model.config.hf_prune["modules"]["model.layers"] == {"kept": [2, 3]}
    expected = outputs(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert len(loaded.model.layers) == 2
    assert_close(expected, outputs(loaded, inputs))
    base = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert_close(outputs(model.model, inputs), outputs(base, inputs))


@pytest.mark.parametrize("kept", [[], [1, 0], [0, 0], [0, 3], [-1], ["0"], [True], 2, None, [0] * 99])
def test_a_reader_refuses_numbers_that_are_none_of_the_blocks(kept):
    model = zoo.build_on_meta("llama")
    manifest = {"version": 1, "class": "LlamaForCausalLM", "base_model_prefix": "model"}
    with pytest.raises(ManifestError, match=r"model.layers.kept is .*; expected ascending numbers of its 3 blocks"):
        resize_(model, manifest | {"modules": {"model.layers": {"kept": kept}}})
    assert len(model.model.layers) == 3


def test_a_reader_refuses_it_of_what_is_no_list_and_beside_other_keys():
    model = zoo.build_on_meta("llama")
    manifest = {"version": 1, "class": "LlamaForCausalLM", "base_model_prefix": "model"}
    for name, entry in (("model", {"kept": [0]}), ("model.layers", {"kept": [0], "config": {}})):
        with pytest.raises(ManifestError, match="may hold kept alone"):
            resize_(copy.deepcopy(model), manifest | {"modules": {name: entry}})


def test_what_goes_through_its_blocks_by_a_number_of_the_config_sees_theirs(tmp_path):
    """BLIP-2's queries: every second block has a cross-attention, so that no depth builds blocks 1 and 2 of three."""
    built = build_type("blip-2")
    model, name = built.model.double(), "qformer.encoder.layer"
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in built.inputs.items()}
    set_masks(model, KeepMasks(units={f"layers:{name}": torch.tensor([False, True, True])}))
    masked = outputs(model, inputs)
    settle_config_(model, remove_masked_(model).kept_layers)
    assert model.config.hf_prune["modules"][name] == {"kept": [1, 2]}
    assert_close(masked, outputs(model, inputs))
    model.save_pretrained(tmp_path)
    assert_close(masked, outputs(type(model).from_pretrained(tmp_path, dtype=torch.float64), inputs))
