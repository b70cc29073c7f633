"""What `inspect_model` says of a model as a whole, and how it prints."""

import pytest
import torch
from torch import nn

import hf_prune
from tests import zoo


def test_parameters_and_macs_are_those_of_the_model():
    structure = hf_prune.inspect_model(zoo.build("opt"))
    model = zoo.build("opt")
    assert structure.n_parameters == sum(p.numel() for p in model.parameters())
    length = structure.macs_of["input_ids"][1]
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    # 3 layers of 4 heads with 8 entries: scores, and mixing
    assert structure.macs == length * linear + 3 * 4 * 2 * length * length * 8
    assert f"{structure.n_parameters:,} parameters, {structure.macs:,} MACs (input_ids 1 × {length})" in str(structure)


@pytest.mark.parametrize("name", ["bert", "t5", "vit", "whisper", "clip"])
def test_macs_need_no_weights(name):
    assert hf_prune.inspect_model(zoo.build_on_meta(name)).macs == hf_prune.inspect_model(zoo.build(name)).macs > 0


def test_a_module_without_a_config_has_no_inputs_to_count_on():
    structure = hf_prune.inspect_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert structure.macs is None and structure.macs_of == {}
    assert "20 parameters, MACs not counted" in str(structure)


def test_counting_leaves_the_model_as_it_was():
    model = zoo.build("bert").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert hf_prune.inspect_model(model).macs
    assert model.training and all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_names_stay_whole():
    lines = str(hf_prune.inspect_model(zoo.build_on_meta("albert"))).splitlines()
    assert any("albert.encoder.albert_layer_groups.*.albert_layers.*.attention " in line for line in lines)
    assert all(line == line.rstrip() for line in lines)
