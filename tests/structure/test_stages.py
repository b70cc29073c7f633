"""Models in stages: the stacks are those of each stage, and a dropped block is one less in the config's list of depths."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel

import hf_prune
from hf_prune.apply.masks import set_masks
from hf_prune.apply.shrink import remove_masked_
from hf_prune.checkpoint import settle_config_
from hf_prune.plan import KeepMasks
from hf_prune.structure import inspect_model
from hf_prune.structure.naming import is_absent


PYRAMID = dict(
    hidden_sizes=[16, 32], depths=[2, 3], num_attention_heads=[2, 2], num_encoder_blocks=2, sr_ratios=[2, 1],
    patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], image_size=32,
)  # fmt: skip
FOCAL = dict(
    embed_dim=16, depths=[2, 3], hidden_sizes=[16, 32], focal_levels=[2, 2], focal_windows=[3, 3], image_size=32, patch_size=4
)  # fmt: skip


def build(model_type, config):
    torch.manual_seed(0)
    return AutoModel.from_config(CONFIG_MAPPING[model_type](**config)).double().eval()


@pytest.mark.parametrize(("model_type", "config"), [("pvt_v2", PYRAMID), ("focalnet", FOCAL)])
@pytest.mark.parametrize("target", ["layers", "ffn_neurons"])
def test_each_stage_is_a_stack_and_loses_blocks_and_neurons_exactly(model_type, config, target, tmp_path):
    model = build(model_type, config)
    structure = inspect_model(model)
    assert [site.n_units for site in structure.of("layers")] == [2, 3]
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    units = {site.key: torch.arange(site.n_units) != 1 for site in structure.of(target)}
    with torch.no_grad():
        dense = model(x).last_hidden_state
        set_masks(model, KeepMasks(units=units))
        masked = model(x).last_hidden_state
        verdict = settle_config_(model, remove_masked_(model).kept_layers)
        assert (masked - dense).abs().max() > 1e-4
        assert torch.allclose(model(x).last_hidden_state, masked, rtol=1e-9)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
        assert torch.allclose(loaded(x).last_hidden_state, masked, rtol=1e-9)
    if target == "layers":
        assert verdict.loads_with == "transformers" and list(model.config.depths) == [1, 2]


def test_blocks_that_take_turns_keep_their_places():
    swin = dict(embed_dim=16, depths=[2, 2], num_heads=[2, 4], image_size=64, patch_size=4, window_size=4)
    model = build("swin", swin)
    structure = inspect_model(model)
    assert [site.name for site in structure.of("layers")] == ["encoder.layers.0.blocks", "encoder.layers.1.blocks"]
    assert len(structure.of("attention_heads")) == len(structure.of("ffn_neurons")) == 4
    shifts = [block.shift_size for block in model.encoder.layers[0].blocks]
    assert shifts[0] != shifts[1]
    hf_prune.prune_(model, {"version": 1, "prune": [{"target": "layers", "remove": {"encoder.layers.0.blocks": [0]}}]})
    assert [block.shift_size for block in model.encoder.layers[0].blocks] == shifts
    assert is_absent(model.encoder.layers[0].blocks[0]) and not is_absent(model.encoder.layers[0].blocks[1])
