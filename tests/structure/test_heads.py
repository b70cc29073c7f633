"""What attention heads share beside their projections: keys of another layer, tables and masks around the blocks, groups of the output."""

import re

import pytest
import torch
from torch import nn

from hf_prune.apply.masks import set_masks
from hf_prune.apply.shrink import remove_masked_
from hf_prune.plan import KeepMasks
from hf_prune.structure import inspect_model
from tests.reach import zoo


def _sites(model_type):
    return inspect_model(zoo.build(model_type).model).of("attention_heads")


def test_heads_leave_layers_that_share_keys_together():
    shared = [site for site in _sites("gemma3n_text") if len(site.reads) > 1]
    assert shared, "no layer takes another's keys, so this proves nothing"
    for site in shared:
        modules = {read.module.rpartition(".")[0] for read in site.reads}
        keys = {piece.module for piece in site.slices if piece.module.endswith("k_proj")}
        assert keys == {f"{site.name}.k_proj"} and site.name in modules


def test_of_a_grouped_output_one_head_of_each_group_is_a_unit():
    model = zoo.build("deepseek_v4").model
    site = inspect_model(model).of("attention_heads")[0]
    attention = model.get_submodule(site.name)
    n_groups = attention.o_a_proj.n_groups
    assert n_groups > 1 and site.n_units * n_groups == attention.num_heads
    queries = next(piece for piece in site.slices if piece.module.endswith("q_b_proj"))
    assert [span.start for span in queries.spans] == [
        group * site.n_units * attention.head_dim for group in range(n_groups)
    ]


def test_tables_beside_the_blocks_shrink_with_the_heads_of_all():
    (site,) = _sites("layoutlmv3")
    tables = {piece.module.rpartition(".")[2] for piece in site.slices if "rel_pos" in piece.module}
    assert tables == {"rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"}


def test_a_norm_of_what_comes_in_stays():
    for site in _sites("blt"):
        assert not site.norms and not any("norm" in piece.module for piece in site.slices)


def test_a_norm_by_head_keeps_the_size_that_it_normalises_over():
    model = zoo.build("chameleon").model
    site = inspect_model(model).of("attention_heads")[0]
    norm = model.get_submodule(f"{site.name}.q_norm")
    whole, size = norm.weight.shape, norm.normalized_shape
    keep = [unit > 0 for unit in range(site.n_units)]
    set_masks(model, KeepMasks({site.key: torch.tensor(keep)}))
    remove_masked_(model)
    norm = model.get_submodule(f"{site.name}.q_norm")
    assert isinstance(norm, nn.LayerNorm) and norm.weight.shape == norm.bias.shape
    assert norm.weight.shape[0] < whole[0] and norm.normalized_shape == size


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("eomt", "repeats its mask for config.num_attention_heads"),
        ("wavlm", "gives each head a part of its input"),
        ("codegen", "splits its heads into as many parts"),
        ("autoformer", "takes a mean over all heads"),
        ("fun_asr_nano_encoder", "fsmn adds the values of all heads"),
    ],
)
def test_what_depends_on_all_heads_is_refused(model_type, reason):
    structure = inspect_model(zoo.build(model_type).model)
    said = [refusal.reason for refusal in structure.refusals if refusal.target == "attention_heads"]
    assert not structure.of("attention_heads") and all(re.search(reason, each) for each in said)
