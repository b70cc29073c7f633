"""Layouts: how the blocks of Transformer models name and order their parts. Data only; matched by what a block holds.

A new model usually needs one entry here. Paths are relative to the module that is matched; `../` climbs one level.
The order of a fused projection along its output axis:

    stacked      [q q q | k k k | v v v]      each part holds all heads             (GPT-2, Phi-3)
    interleaved  [q k v | q k v | q k v]      each head holds its three parts       (GPT-NeoX, BLOOM)
    grouped      [q q k v | q q k v]          each key/value head with its queries  (Falcon, new)
    multi_query  [q q q q | k | v]            one key/value head for all            (Falcon-7B)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


FusedOrder = Literal["stacked", "interleaved", "grouped", "multi_query"]


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """Names of an attention's projections: `query`, `key`, `value`, or one `fused` projection; then `output`.

    `orders` are tried in turn: (flag of the attention module that must be true, or "", order).
    `extra` are further per-head projections that may be there. `bias_table` is a per-head embedding that block 0
    owns and hands to the whole stack, so that its heads leave every block of the stack together.
    """

    output: str
    query: str = ""
    key: str = ""
    value: str = ""
    fused: str = ""
    orders: tuple[tuple[str, FusedOrder], ...] = ()
    extra: tuple[str, ...] = ()
    bias_table: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        """The children that must be there for the layout to match."""
        return (self.fused, self.output) if self.fused else (self.query, self.key, self.value, self.output)


@dataclass(frozen=True, slots=True)
class FeedForwardLayout:
    """Names of a feed-forward's projections. `stacked` says how many parts a fused input holds: gate and up are 2."""

    inputs: tuple[str, ...]
    output: str
    stacked: int = 1

    @property
    def parts(self) -> tuple[str, ...]:
        """The children that must be there for the layout to match."""
        return (*self.inputs, self.output)


ATTENTION_LAYOUTS: tuple[AttentionLayout, ...] = (
    # BERT, RoBERTa, ELECTRA: the output projection is in a sibling
    AttentionLayout(query="query", key="key", value="value", output="../output.dense"),
    # ALBERT
    AttentionLayout(query="query", key="key", value="value", output="dense"),
    # DeBERTa-v2; the position projections exist unless they are shared with the content's
    AttentionLayout(
        query="query_proj",
        key="key_proj",
        value="value_proj",
        output="../output.dense",
        extra=("pos_key_proj", "pos_query_proj"),
    ),
    # DistilBERT
    AttentionLayout(query="q_lin", key="k_lin", value="v_lin", output="out_lin"),
    # Llama, Mistral, Qwen, Gemma, OLMo, ViT, DeiT
    AttentionLayout(query="q_proj", key="k_proj", value="v_proj", output="o_proj"),
    # OPT, BART, CLIP, Whisper
    AttentionLayout(query="q_proj", key="k_proj", value="v_proj", output="out_proj"),
    # T5
    AttentionLayout(query="q", key="k", value="v", output="o", bias_table="relative_attention_bias"),
    # GPT-2
    AttentionLayout(fused="c_attn", output="c_proj", orders=(("", "stacked"),)),
    # GPT-NeoX, BLOOM, Falcon
    AttentionLayout(
        fused="query_key_value",
        output="dense",
        orders=(("new_decoder_architecture", "grouped"), ("multi_query", "multi_query"), ("", "interleaved")),
    ),
    # Phi-3
    AttentionLayout(fused="qkv_proj", output="o_proj", orders=(("", "stacked"),)),
)

FEED_FORWARD_LAYOUTS: tuple[FeedForwardLayout, ...] = (
    FeedForwardLayout(inputs=("gate_proj", "up_proj"), output="down_proj"),  # Llama and most decoders
    FeedForwardLayout(inputs=("gate_up_proj",), output="down_proj", stacked=2),  # Phi-3
    FeedForwardLayout(inputs=("intermediate.dense",), output="output.dense"),  # BERT
    FeedForwardLayout(inputs=("fc1",), output="fc2"),  # OPT, BART, ViT, CLIP, Whisper
    FeedForwardLayout(inputs=("c_fc",), output="c_proj"),  # GPT-2
    FeedForwardLayout(inputs=("dense_h_to_4h",), output="dense_4h_to_h"),  # GPT-NeoX, BLOOM, Falcon
    FeedForwardLayout(inputs=("lin1",), output="lin2"),  # DistilBERT
    FeedForwardLayout(inputs=("ffn",), output="ffn_output"),  # ALBERT
    FeedForwardLayout(inputs=("wi_0", "wi_1"), output="wo"),  # T5 v1.1
    FeedForwardLayout(inputs=("wi",), output="wo"),  # T5
)

# What attention modules call their numbers.
HEAD_SIZE_NAMES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
HEAD_COUNT_NAMES = ("num_attention_heads", "num_heads", "n_heads", "n_head")
KV_HEAD_COUNT_NAMES = ("num_key_value_heads", "num_kv_heads")
# Widths that count all query heads' entries and are used to split or reshape.
ALL_HEADS_WIDTH_NAMES = ("all_head_size", "inner_dim", "split_size")

# What feed-forward modules call d_ff.
FEED_FORWARD_WIDTH_NAMES = ("intermediate_size", "ffn_dim", "hidden_dim", "d_ff")

# What modules that hold a stack call its depth, and what blocks call their own number.
DEPTH_NAMES = ("n_layers", "num_layers", "num_hidden_layers")
LAYER_NUMBER_NAMES = ("layer_idx", "layer_id", "layer_number", "block_idx", "layer_index")

# Query and key norms: over one head (nothing to do) or over all of them (folded, or refused).
FULL_WIDTH_NORM_NAMES = ("q_norm", "k_norm")
NORM_EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon")

# What the first block owns and hands to the others; it moves to the first kept block. (module, flag beside it)
OWNED_BY_FIRST_BLOCK: tuple[tuple[str, str], ...] = (("relative_attention_bias", "has_relative_attention_bias"),)

# What blocks call an attention that reads another stack's outputs; a block's own has none of these in its name.
CROSS_ATTENTION_WORDS = ("cross", "encoder_attn", "encdec")

# Config switches under which an attention adds a bias by head number (ALiBi): slopes would change with the count.
ALIBI_ARGUMENT = "alibi"

# Config switches that make a layer's function depend on its number.
LAYER_NUMBER_SWITCHES = ("scale_attn_by_inverse_layer_idx", "num_kv_shared_layers")
# The config's list of each layer's kind, by which caches of keys differ.
LAYER_KINDS = "layer_types"
# Modules beside a stack that are wired to a fixed position in it (DeBERTa-v2's convolution after block 0).
FIXED_POSITION_SIBLINGS = ("conv",)
# Where one block is called several times, the config field that holds the number of calls, read in forward (ALBERT).
REPEAT_FIELDS = {"albert_layer_groups": "num_hidden_layers"}
