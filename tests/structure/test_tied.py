"""Parameters that several modules hold are left whole, and it is said where they are shared."""

import pytest

from hf_prune.structure import inspect_model
from tests import zoo


def tied(path):
    """A Llama of which a parameter of layer 0 is layer 1's too."""
    model = zoo.build("llama")
    module, _, own = path.rpartition(".")
    setattr(model.model.layers[1].get_submodule(module), own, model.model.layers[0].get_parameter(path))
    return inspect_model(model)


@pytest.mark.parametrize(
    ("path", "target", "part"),
    [
        ("mlp.up_proj.weight", "ffn_neurons", "feed_forward"),
        ("self_attn.k_proj.weight", "attention_heads", "attention"),
    ],
)
def test_what_two_layers_hold_together_is_refused_and_all_else_is_found(path, target, part):
    whole, structure = inspect_model(zoo.build("llama")), tied(path)
    left = {site.name for site in structure.of(target)}
    of_layer_2 = {site.name for site in whole.of(target) if ".2." in site.name}
    assert left == of_layer_2
    assert not structure.of("layers")
    assert not structure.of("layers", part)
    for kind in (target, "layers", f"layers.{part}"):
        reason = next(refusal.reason for refusal in structure.refusals if refusal.kind == kind)
        assert "layers.0." in reason and "layers.1." in reason
    (other,) = {"ffn_neurons", "attention_heads"} - {target}
    assert len(structure.of(other)) == 3


def test_a_norm_that_is_shared_concerns_layers_alone():
    structure = tied("input_layernorm.weight")
    assert not structure.of("layers")
    assert len(structure.of("ffn_neurons")) == len(structure.of("attention_heads")) == 3
    assert structure.of("layers", "attention")


def test_a_module_that_is_shared_whole_is_one_module():
    model = zoo.build("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    assert len(inspect_model(model).of("ffn_neurons")) == 2
