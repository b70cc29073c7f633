"""A tiny config of any model type: its default config with every size that names one made small, through sub-configs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig


VOCABULARY = 160
# Ids of text are drawn below this, ids of special tokens lie above it or are the default ones below `FIRST_WORD`.
WORDS = 90
FIRST_WORD = 5

# What a config's field is called -> its size. The first pattern that matches the whole name counts; a list keeps its
# length and takes the size in every place. A field that no pattern matches keeps its default.
SIZES: tuple[tuple[str, int | float], ...] = (
    (r"type_vocab_size|.*_layer_idx|.*_layers_(offset|period)", -1),
    (r".*vocab_size.*", VOCABULARY),
    (r"num_hidden_layers|num_layers|n_layers?|(en|de)code[r_]+layers|num_(en|de)coder_layers|depth", 3),
    (r".*_(num_)?(hidden_)?layers|num_.*_layers", 2),
    (r"depths|.*_depths|stage_num_blocks", 2),
    (r"(num_key_value_heads|num_kv_heads|.*_num_key_value_heads|.*kv_heads|multi_query_group_num)", 2),
    (r"mamba_(n|num)_heads", 8),
    (r"mamba_d_state|ssm_state_size|state_size|.*mamba_d_head", 8),
    (r"linear_num_(key|value)_heads|(.*_)?(num_)?(attention_)?heads?|n_heads?|num_.*attention_heads", 4),
    (r".*head_dim|d_kv|dim_head|attention_head_size|kv_channels|d_head|.*head_size", 8),
    (r"moe_intermediate_size|expert_ffn_hidden_size|.*expert.*(size|dim)|moe_hidden_size", 24),
    (r".*intermediate_(size|dim).*|.*ffn_(hidden_)?(dim|size)|ffn_hidden_size|d_ff|dff|mlp_dim|dim_ff|d_inner", 48),
    (r"dim_feedforward|.*feed_?forward_(dim|size|hidden_size)|n_inner|inner_dim", 48),
    (r"q_lora_rank|kv_lora_rank|.*_rank|o_lora_rank", 16),
    (r"(n_routed|num|num_local|moe_num)_experts|n_experts|.*num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|.*top_?k(_experts)?|moe_top_k|router_top_k", 2),
    (r"n_group|topk_group|num_groups|(.*_)?n_groups", 1),
    (r"max_2d_position_embeddings|max_(xpath|grid).*|.*position_buckets|position_bias_.*", -1),
    (r"max_.*position.*|n_positions|n_ctx|max_seq_len|.*max_position_embeddings|num_position_embeddings", 256),
    (r"(.*_)?image_size|img_size|pretrain_image_size|max_img_size|input_resolution", 32),
    (r"(.*_)?patch_size", 8),
    (r"num_mel_bins|n_mels|feature_size|input_feat_per_channel|n_mel_bins|mel_bins|input_feat_size", 16),
    (r"hidden_size_per_layer_input", 8),
    (r"hidden_sizes?|.*_hidden_sizes?|hidden_dim|.*hidden_dim|d_model|dim|emb_dim|n_embd|embed_dims?|.*embed_dim", 32),
    (r".*projection_(dim|size)|output_dim|embedding_(size|dim)|.*_embedding_(size|dim)|out_dim|project_dim", 32),
    (r"hidden_size_\w+|\w+_width|lru_width|pooler_output_size|.*_hidden_channels|d_latents|.*embeddings_dim", 32),
    (r".*num_queries|num_detection_tokens|max_num_bins|num_latents", 8),
    (r"encoder_in_channels|decoder_in_channels|stem_channels|out_channels|conv_dim|.*_out_channels", 32),
    (r"(.*_)?conv_channels|num_filters|(.*_)?channels|upsample_groups|fusion_.*dim|.*_feature_size", 32),
    (r".*codebook_size|codebook_dim|num_embeddings", 32),
    (r"num_codebooks|num_quantizers|num_code_groups", 4),
    (r"attention_chunk_size|.*sliding_window|.*sliding_window_size|local_attention", 8),
)  # fmt: skip
# Fields whose small value is no single number.
HEADS = 4
VALUES: dict[str, Any] = {"mrope_section": [2, 1, 1], "window_size": 4, "temporal_patch_size": 2}
# Fields derived from others when left out that are given all the same: groups of query heads that share keys.
GIVEN = {"num_key_value_heads", "num_kv_heads"}
KEEP = "keep"  # a change that leaves a sub-config as large as it is by default
# Sub-configs of a package that is not here -> what takes their place.
INSTEAD: dict[str, dict[str, Any]] = {
    "timm_backbone": {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"]},
    "timm_wrapper": {"model_type": "resnet", "hidden_size": 32, "num_labels": 32},
}
TOKEN = re.compile(
    r".*token_(id|index)|.*_token|.*_(pad|bos|eos|start|end|think|nothink|newline|patch)_ids?|.*_token_ids"
)
COMMON = (
    {field.name for field in dataclasses.fields(PretrainedConfig)}
    if dataclasses.is_dataclass(PretrainedConfig)
    else set()
)


def shrunken(
    config: PretrainedConfig, changes: Mapping[str, Any], tokens: dict[str, int], own: PretrainedConfig | None = None
) -> PretrainedConfig:
    """The config's class again with small sizes; `changes` (nested as sub-configs are) win, `tokens` gives special ids."""
    values: dict[str, Any] = {}
    for name, value in _fields(config, own or config):
        change = changes.get(name)
        if isinstance(value, PretrainedConfig):
            if change is KEEP:
                values[name] = value
            elif name not in changes or isinstance(change, Mapping):
                values[name] = _sub_config(value, change or {}, tokens)
        elif name not in changes:
            values[name] = _small(name, value, tokens)
    old, new = config.__dict__.get("num_hidden_layers"), values.get("num_hidden_layers")
    for name, value in values.items():
        if isinstance(value, (list, tuple)) and len(value) == old and name not in changes:
            values[name] = value[:new]
    stages = values.get("out_features")
    if stages and new and isinstance(new, int) and "stage_names" in dir(config):
        values["num_hidden_layers"] = max(new, len(stages))
        first = values["num_hidden_layers"] - len(stages) + 1  # the last, so that every block shows
        values["out_features"] = [f"stage{i}" for i in range(first, first + len(stages))]
        values.pop("out_indices", None)
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = HEADS  # latent attention expands its keys to all heads
    values |= {name: change for name, change in changes.items() if name not in values}
    return type(config)(**values)


def _sub_config(config: PretrainedConfig, changes: Mapping[str, Any], tokens: dict[str, int]) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING

    changes = {**INSTEAD.get(config.model_type, {}), **changes}
    named = changes.get("model_type", config.model_type)
    if named != config.model_type:
        config = CONFIG_MAPPING[named]()
    changes = {key: value for key, value in changes.items() if key != "model_type"}
    return shrunken(config, changes, tokens, type(config)())


def _fields(config: PretrainedConfig, own: PretrainedConfig | None) -> Iterator[tuple[str, Any]]:
    """Fields and their values, but for those that are derived from others when they are left out.

    `own` is the class's own default config: what a parent's default differs in was given.
    """
    for field in dataclasses.fields(config):
        if field.name in COMMON:
            continue
        try:
            value, default = getattr(config, field.name), getattr(own, field.name)
        except RuntimeError:  # one value a layer: the default is what is shared
            value = default = field.default
        given = field.name in GIVEN or "mrope_section" in value if isinstance(value, dict) else field.name in GIVEN
        if isinstance(value, PretrainedConfig) or field.default is not None or given or value != default:
            yield field.name.removeprefix("_"), value


def _small(name: str, value: Any, tokens: dict[str, int]) -> Any:
    if isinstance(value, bool) or (value is None and name not in GIVEN):
        return value
    if name in VALUES and isinstance(value, type(VALUES[name])):
        return VALUES[name]
    if isinstance(value, dict):
        return {key: _small(str(key), item, tokens) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_small(name, item, tokens) for item in value)
    if isinstance(value, int) and TOKEN.fullmatch(name):
        return value if value < FIRST_WORD else tokens.setdefault(f"{name} {value}", WORDS + len(tokens))
    if value is None or (type(value) is int and value > 0):
        size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), -1)
        # A size doesn't grow, but for one that is a step below: two layers become three, three heads four.
        return size if value is None or 0 < max(size - 1, min(size, 2)) <= value else value
    return value
