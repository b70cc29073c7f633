"""What discovery finds in each family, against sizes that the test's own configs state."""

import pytest
from torch import nn

from hf_prune.errors import UnsupportedModelError
from hf_prune.structure import inspect_model, require_sites
from tests import zoo


@pytest.mark.parametrize("name", zoo.MODELS)
def test_all_neurons_heads_and_layers_are_found(name):
    structure = inspect_model(zoo.build(name))
    refused = {refusal.target for refusal in structure.refusals if refusal.part == "block"}
    for target in ("ffn_neurons", "attention_heads", "layers"):
        assert structure.of(target) or target in refused, f"{target} neither found nor refused"
    for site in structure.of("ffn_neurons"):
        assert site.n_units in (40, 48, 128)  # d_ff of the tiny configs; GPT-2, BLOOM and Falcon derive 4 * 32
    for site in structure.of("attention_heads"):
        assert site.n_units in (2, 4)
    assert refused == ({"attention_heads"} if name == "bloom" else set())


def test_grouped_query_attention_leaves_by_whole_groups():
    site = inspect_model(zoo.build("llama")).of("attention_heads")[0]
    widths = {piece.module.rpartition(".")[2]: piece.entries_per_unit for piece in site.slices}
    # 4 query heads and 2 key/value heads of 8 entries: a unit is 2 query heads with their key and value
    assert site.n_units == 2
    assert widths == {"q_proj": 16, "k_proj": 8, "v_proj": 8, "o_proj": 16}


def test_encoder_decoder_has_self_and_cross_attention_of_both_stacks():
    names = [site.name for site in inspect_model(zoo.build("bart")).of("attention_heads")]
    assert sum("encoder.layers" in name for name in names) == 3
    assert sum(name.endswith("decoder.layers.0.self_attn") for name in names) == 1
    assert sum(name.endswith("encoder_attn") for name in names) == 2


def test_clip_has_both_towers():
    names = {site.name for site in inspect_model(zoo.build("clip")).of("layers")}
    assert names == {"text_model.encoder.layers", "vision_model.encoder.layers"}


def test_shared_layers_are_call_positions():
    (site,) = inspect_model(zoo.build("albert")).of("layers")
    assert site.is_shared and site.n_units == 3


def test_t5_heads_leave_every_block_of_a_stack_together():
    structure = inspect_model(zoo.build("t5"))
    names = [site.name for site in structure.of("attention_heads")]
    assert names == [
        "encoder.block.*.layer.0.SelfAttention",
        "decoder.block.*.layer.0.SelfAttention",
        "decoder.block.*.layer.1.EncDecAttention",
    ]
    tables = [piece.module for piece in structure.of("attention_heads")[0].slices if piece.dim == 1]
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias" in tables


def test_weights_leave_out_embeddings_heads_and_tied_weights():
    structure = inspect_model(zoo.build("llama"))
    names = {site.name for site in structure.weights}
    assert "lm_head.weight" not in names and not any("embed" in name for name in names)
    assert len(names) == 3 * 7  # q, k, v, o, gate, up, down in three layers
    gpt2 = inspect_model(zoo.build("gpt2"))
    assert {site.reduction_dim for site in gpt2.weights} == {0}, "Conv1D sums over dimension 0"


def test_discovery_needs_no_weights():
    model = zoo.build_on_meta("llama")
    assert len(inspect_model(model).of("ffn_neurons")) == 3


def test_a_model_without_blocks_is_refused_with_what_was_found():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UnsupportedModelError, match=r"Sequential has no ffn_neurons .* `weights` works"):
        require_sites(inspect_model(model), "ffn_neurons")


def test_an_attention_with_an_unknown_part_is_refused():
    model = zoo.build("llama")
    model.model.layers[1].self_attn.gate_by_head = nn.Linear(32, 4)
    structure = inspect_model(model)
    assert len(structure.of("attention_heads")) == 2
    assert "gate_by_head" in structure.refusals[0].reason


def test_structure_prints_as_a_table():
    text = str(inspect_model(zoo.build("bloom")))
    assert "ffn_neurons" in text and "128" in text
    assert "refused: attention_heads" in text and "ALiBi" in text
