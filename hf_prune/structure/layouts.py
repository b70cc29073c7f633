"""Layouts: how the blocks of Transformer models name and order their parts. Data only; matched by what a block holds.

A new model usually needs one entry here. Paths are relative to the module that is matched; `../` climbs one level.
The order of a fused projection along its output axis:

    stacked      [q q q | k k k | v v v]      each part holds all heads             (GPT-2, Phi-3)
    interleaved  [q k v | q k v | q k v]      each head holds its three parts       (GPT-NeoX, BLOOM)
    grouped      [q q k v | q q k v]          each key/value head with its queries  (Falcon, new)
    multi_query  [q q q q | k | v]            one key/value head for all            (Falcon-7B)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

from hf_prune.errors import PruneError


FusedOrder = Literal["stacked", "interleaved", "grouped", "multi_query"]


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """Names of an attention's projections: `query`, `key`, `value`, or `query`, `key_value`, or one `fused`; then `output`.

    Names are paths from the module that holds the projections; `../` climbs one level.

    Args:
        output: the projection that reads what the heads give.
        query: the projection of queries.
        key: the projection of keys.
        value: the projection of values.
        key_value: one projection of keys and values, beside `query`.
        fused: one projection of all three, in place of them.
        orders: of what is fused, tried in turn: (flag of the attention module that must be true, or "", order).
        latent: what makes the low-rank states that all heads read and that stays; the projections then differ in entries a
            head, and each is laid out head by head.
        extra: further per-head projections that may be there.
        bias_table: a per-head embedding that block 0 owns and hands to the whole stack, so that its heads leave every block of
            the stack together.
        flag: of the module that holds them, that must be true; of attentions that take another's keys, without `key` and `value`.
    """

    output: str
    query: str = ""
    key: str = ""
    value: str = ""
    key_value: str = ""
    fused: str = ""
    orders: tuple[tuple[str, FusedOrder], ...] = ()
    latent: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    bias_table: str = ""
    flag: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        """The children that must be there for the layout to match."""
        inputs = (self.query, self.key, self.value, self.key_value, self.fused)
        return (*(part for part in inputs if part), *self.latent, self.output)


@dataclass(frozen=True)
class FeedForwardLayout:
    """Names of a feed-forward's projections. An input twice as wide as the output reads holds gate and up, one after the other.

    Args:
        inputs: the projection that widens, or gate and up.
        output: the projection back.
        alone: for names that other modules have too (state space mixers): nothing else with a weight may be beside them.
        convolved: the projections may be convolutions.
    """

    inputs: tuple[str, ...]
    output: str
    alone: bool = False
    convolved: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The modules that must be there for the layout to match."""
        return (*self.inputs, self.output)

    @cached_property
    def children(self) -> frozenset[str]:
        """The children in which they are, of those below the feed-forward: quick to look for."""
        return frozenset(part.partition(".")[0] for part in self.parts if not part.startswith("../"))


# Separate projections. Each set of names goes with any of the outputs; one inside the module comes first.
_INPUTS = (
    ("query", "key", "value"),  # BERT, RoBERTa, ELECTRA
    ("q_proj", "k_proj", "v_proj"),  # Llama and most others
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT, XLM
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa-v2, ProphetNet
    ("linear_q", "linear_k", "linear_v"),  # conformers
    ("project_q", "project_k", "project_v"),  # CPM-Ant
    ("q_proj.linear", "k_proj.linear", "v_proj.linear"),  # Moshi, Gemma 4's towers
    ("to_q", "to_k", "to_v"),
    ("Wq", "Wk", "Wv"),  # CTRL
    ("projection_query", "projection_key", "projection_value"),  # CvT
    ("q_head", "k_head", "v_head"),  # Funnel
    ("q", "k", "v"),  # MPNet, Qwen2.5-Omni's tower
)
_OUTPUTS = (
    *("o_proj", "out_proj", "dense", "proj", "projection", "projection_layer", "out_lin", "linear_out", "output_proj"),
    *("Wo", "o_proj.linear", "to_out", "attention_out", "o", "post.linear", "output_projection.o_proj", "output"),
    "post_proj",
)
_SIBLING_OUTPUTS = ("../output.dense", "../output", "../post")

ATTENTION_LAYOUTS: tuple[AttentionLayout, ...] = (
    # T5
    AttentionLayout(query="q", key="k", value="v", output="o", bias_table="relative_attention_bias"),
    *(
        AttentionLayout(query=query, key=key, value=value, output=output)
        for (query, key, value), output in product(_INPUTS, (*_OUTPUTS, *_SIBLING_OUTPUTS))
    ),
    # Gemma 3n's last layers
    AttentionLayout(query="q_proj", output="o_proj", flag="is_kv_shared_layer"),
    # DeepSeek's latent attention
    *(
        AttentionLayout(query=query, key_value="kv_b_proj", output="o_proj", latent=latent)
        for query, latent in (
            ("q_b_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
            ("q_gate_proj", ("q_a_proj", "kv_a_proj_with_mqa")),  # A.X K2
            ("q_proj", ("kv_a_proj_with_mqa",)),
        )
    ),
    # DeepSeek V4's, with one key/value head and a grouped output
    AttentionLayout(query="q_b_proj", output="o_a_proj", latent=("q_a_proj", "kv_proj", "o_b_proj")),
    # the same from a latent state of another block (Mistral Large 4)
    AttentionLayout(query="q_proj", key_value="kv_b_proj", output="o_proj", latent=("kv_b_proj",)),
    # Granite's speech encoder
    AttentionLayout(query="to_q", key_value="to_kv", output="to_out", orders=(("", "stacked"),)),
    # GPT-2
    AttentionLayout(fused="c_attn", output="c_proj", orders=(("multi_query", "multi_query"), ("", "stacked"))),
    # GPT-NeoX, BLOOM, Falcon
    AttentionLayout(
        fused="query_key_value",
        output="dense",
        orders=(("new_decoder_architecture", "grouped"), ("multi_query", "multi_query"), ("", "interleaved")),
    ),
    # DeBERTa
    AttentionLayout(fused="in_proj", output="../output.dense", orders=(("", "interleaved"),)),
    # Phi-3, ModernBERT, MPT, Bark, the towers of Qwen-VL, BLIP, TimeSformer
    *(
        AttentionLayout(fused=fused, output=output, orders=(("", "stacked"),))
        for fused, output in product(
            ("qkv_proj", "qkv", "Wqkv", "att_proj"),
            ("o_proj", "out_proj", "proj", "projection", "Wo", "dense", "../output.dense"),
        )
    ),
)

FEED_FORWARD_LAYOUTS: tuple[FeedForwardLayout, ...] = (
    FeedForwardLayout(inputs=("gate_proj", "up_proj"), output="down_proj"),  # Llama and most decoders
    FeedForwardLayout(inputs=("gate_up_proj",), output="down_proj"),  # Phi-3, GLM
    FeedForwardLayout(inputs=("up_proj",), output="down_proj"),  # Apertus, Nemotron
    FeedForwardLayout(inputs=("gate_proj.linear", "up_proj.linear"), output="down_proj.linear"),  # Gemma 4's towers
    FeedForwardLayout(inputs=("intermediate.dense",), output="output.dense"),  # BERT
    FeedForwardLayout(inputs=("fc1",), output="fc2", convolved=True),  # OPT, BART, ViT, CLIP, Whisper
    FeedForwardLayout(inputs=("fc1.proj",), output="fc2"),  # CLVP, whose input is gate and up
    FeedForwardLayout(inputs=("c_fc",), output="c_proj"),  # GPT-2
    FeedForwardLayout(inputs=("c_fc_0", "c_fc_1"), output="c_proj"),  # EXAONE
    FeedForwardLayout(inputs=("dense_h_to_4h",), output="dense_4h_to_h"),  # GPT-NeoX, BLOOM, Falcon
    FeedForwardLayout(inputs=("lin1",), output="lin2"),  # DistilBERT
    FeedForwardLayout(inputs=("ffn",), output="ffn_output"),  # ALBERT
    FeedForwardLayout(inputs=("wi_0", "wi_1"), output="wo"),  # T5 v1.1
    FeedForwardLayout(inputs=("wi",), output="wo"),  # T5
    FeedForwardLayout(inputs=("Wi",), output="Wo"),  # ModernBERT
    FeedForwardLayout(inputs=("w1", "w3"), output="w2"),  # LFM2
    FeedForwardLayout(inputs=("w1",), output="w2"),
    FeedForwardLayout(inputs=("weights_in",), output="weights_out"),  # DINOv2's SwiGLU
    FeedForwardLayout(inputs=("linear1",), output="linear2"),  # conformers
    FeedForwardLayout(inputs=("linear_1",), output="linear_2"),
    FeedForwardLayout(inputs=("linear_fc1",), output="linear_fc2"),  # Qwen3-VL's tower
    FeedForwardLayout(inputs=("linear_in",), output="linear_out"),
    FeedForwardLayout(inputs=("intermediate_dense",), output="output_dense"),  # wav2vec 2
    FeedForwardLayout(inputs=("intermediate",), output="output"),  # ProphetNet
    FeedForwardLayout(inputs=("proj_in",), output="proj_out", alone=True),  # SAM 2
    FeedForwardLayout(inputs=("in_proj",), output="out_proj", alone=True),  # Bark
    FeedForwardLayout(inputs=("dense1",), output="dense2"),  # PVT, SegFormer, GLPN
    FeedForwardLayout(inputs=("dense_in",), output="dense_out"),
    FeedForwardLayout(inputs=("fc_in",), output="fc_out"),  # GPT-J, CodeGen
    FeedForwardLayout(inputs=("layer1",), output="layer2"),  # SAM 3
    FeedForwardLayout(inputs=("layer_1",), output="layer_2"),  # XLNet
    FeedForwardLayout(inputs=("ffw_layer_1",), output="ffw_layer_2"),  # Gemma 3n's conformer
    FeedForwardLayout(inputs=("ffw_layer_1.linear",), output="ffw_layer_2.linear"),  # Gemma 4's conformer
    FeedForwardLayout(inputs=("proj_up_gate", "proj_up"), output="proj_down"),  # xLSTM
    FeedForwardLayout(inputs=("input_linear",), output="output_linear"),  # Granite's shared experts
    FeedForwardLayout(inputs=("pwconv1",), output="pwconv2"),  # ConvNeXt
    FeedForwardLayout(inputs=("pointwise_conv1",), output="pointwise_conv2"),  # DINOv3's ConvNeXt
    FeedForwardLayout(inputs=("up_conv",), output="down_conv"),
    FeedForwardLayout(inputs=("intermediate_query.dense",), output="output_query.dense"),  # BLIP-2's queries
    FeedForwardLayout(inputs=("lang_inter.dense",), output="lang_output.dense"),  # LXMERT's two streams
    FeedForwardLayout(inputs=("visn_inter.dense",), output="visn_output.dense"),
    FeedForwardLayout(inputs=("dense.dense",), output="output.dense"),  # Reformer
    FeedForwardLayout(inputs=("gate_proj",), output="down_proj"),  # TimesFM, which has no other input
    # PoolFormer, FastSpeech 2, squeeze and excitation
    FeedForwardLayout(inputs=("conv1",), output="conv2", alone=True, convolved=True),
    FeedForwardLayout(
        inputs=("channel_conv1.convolution",), output="channel_conv2.convolution", convolved=True
    ),  # PP-OCR
    FeedForwardLayout(inputs=("reduce",), output="expand", convolved=True),  # EfficientNet's squeeze and excitation
    FeedForwardLayout(
        inputs=("expand_1x1.convolution",), output="reduce_1x1.convolution", convolved=True
    ),  # MobileNet v2
    FeedForwardLayout(inputs=("point_wise_conv1",), output="point_wise_conv2", convolved=True),  # SwiftFormer
    FeedForwardLayout(inputs=("linear_up.linear",), output="linear_down.linear"),  # LeViT
    FeedForwardLayout(inputs=("w_in.w_0", "w_in.w_1"), output="w_out"),  # CPM-Ant
    FeedForwardLayout(
        inputs=("0",), output="2", alone=True, convolved=True
    ),  # a plain sequence: CTRL, perceivers, X-CLIP
    FeedForwardLayout(inputs=("0",), output="3", alone=True),  # with dropout between
)

# What attention modules call their numbers.
HEAD_SIZE_NAMES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "dim_head")
VALUE_SIZE_NAMES = ("v_head_dim",)  # of latent attention, where keys are longer
HEAD_COUNT_NAMES = (
    *("num_attention_heads", "num_heads", "n_heads", "n_head", "num_attn_heads", "heads", "nhead", "h"),
    *("num_global_attention_heads", "encoder_attention_heads", "decoder_attention_heads"),
)
KV_HEAD_COUNT_NAMES = ("num_key_value_heads", "num_kv_heads")
OUTPUT_GROUPS_NAMES = ("n_groups",)  # of an output projection
KV_GROUPS_NAMES = ("num_key_value_groups",)  # queries per key
KV_WIDTH_NAMES = ("kv_dim", "key_value_dim")
# Widths that count all query heads' entries and are used to split or reshape.
ALL_HEADS_WIDTH_NAMES = ("all_head_size", "inner_dim", "split_size", "q_dim", "head_size")
# The same where code reshapes by them; elsewhere they are the width of the model.
PERHAPS_WIDTH_NAMES = (
    "embed_dim",
    "hidden_size",
    "d_model",
    "dim",
    "hidden_dim",
    "qkv_dim",
    "attention_dim",
    "hidden_size_output",
)

# What feed-forward modules call d_ff.
FEED_FORWARD_WIDTH_NAMES = ("intermediate_size", "ffn_dim", "hidden_dim", "d_ff")

# Experts stacked in 3-D parameters: what their inputs and their output are called, and their numbers.
EXPERT_INPUTS = ("gate_up_proj", "gate_proj", "up_proj")
EXPERT_OUTPUT = "down_proj"
EXPERT_WIDTH_NAMES = ("intermediate_dim", "intermediate_size", "expert_dim", "moe_intermediate_size")
EXPERT_COUNT_NAMES = (
    *(
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "num_routed_experts",
        "moe_num_experts",
        "total_experts",
    ),
    *("n_experts",),
)
EXPERT_GROUP_NAMES = ("num_group", "n_group", "num_expert_group", "n_groups")
TOP_K_NAMES = ("top_k", "num_experts_per_tok", "moe_k", "moe_topk", "num_selected_experts")
ROUTER_NAMES = ("gate", "router")

# What modules that hold a stack call its depth, and what blocks call their own number.
DEPTH_NAMES = ("n_layers", "num_layers", "num_hidden_layers")
LAYER_NUMBER_NAMES = ("layer_idx", "layer_id", "layer_number", "block_idx", "layer_index")

# Norms inside an attention, by words in their names: those of queries and keys are over one head (nothing to do) or over
# all of them (folded, or refused), those of the output's input over all. Any other is of the model's or a latent state.
UNIT_NORM_WORDS = (
    "q_norm",
    "k_norm",
    "q_layernorm",
    "k_layernorm",
    "query_norm",
    "key_norm",
    "layer_norm_q",
    "layer_norm_k",
)
OUTPUT_NORM_WORDS = ("attn_ln", "sub_norm", "out_norm", "o_norm", "output_norm")
NORM_EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon")

# Parameters of an attention with an entry, or entries, for each query head: name -> the dimension of heads.
PER_HEAD_PARAMETERS = {
    "sinks": 0,  # GPT-OSS
    "attention_biases": 0,  # LeViT
    "relative_position_bias_table": 1,  # Swin, and what BEiT calls by a module
    "logit_scale": 0,  # Swin v2
    "gru_rel_pos_const": 1,  # WavLM
    "r_w_bias": 0,  # Transformer-XL's two
    "r_r_bias": 0,
    "bias_u": 0,
    "bias_v": 0,
    "pos_bias_u": 0,
    "pos_bias_v": 0,
    "q_bias": 0,  # DeBERTa, BEiT
    "v_bias": 0,
    "k_bias": 0,
    "lambda_per_head": 0,
    "head_scale": 0,
    "gate_bias": 0,
    "r_kernel": 1,  # Funnel
    "r_s_bias": 0,
    "seg_embed": 1,
    "A": 0,  # Doge, of key/value heads
}
# Modules inside an attention, or beside it, that hold such parameters: path -> (parameter, dimension of heads), each.
PER_HEAD_MODULES = {
    "relative_position_bias": (("relative_position_bias_table", 1),),
    "../relative_position_bias": (("relative_position_bias_table", 1),),  # BEiT
    "relative_attention_bias": (("weight", 1),),
    "rel_attn_embed": (("weight", 1),),
    "softmax_scaling": (("scale", 0), ("bias", 0)),  # Mistral Large 4
    "q_l2_clip": (("scale", 0),),  # Inkling 2
    "rel_l2_clip": (("scale", 0),),
    "k_sconv": (("static_weight", 1),),
    "v_sconv": (("static_weight", 1),),
}
# Tables beside a stack whose bias all its attentions take as one of these arguments, or those of one of these names; then
# heads leave all blocks together.
SHARED_TABLES = {
    "relative_attention_bias": (("weight", 1),),
    "shared_position_bias": (("relative_position_bias_table", 1),),
    "relative_position_bias": (("relative_position_bias_table", 1),),
    "rel_pos_bias": (("weight", 0),),  # LayoutLMv3
    "rel_pos_x_bias": (("weight", 0),),
    "rel_pos_y_bias": (("weight", 0),),
    "box_rpb_embed_x.layer2": (("weight", 0), ("bias", 0)),  # SAM 3
    "box_rpb_embed_y.layer2": (("weight", 0), ("bias", 0)),
    "position_bias": (("relative_attention_bias", 1),),  # CPM-Ant
}
SHARED_BIAS_ARGUMENTS = ("position_bias", "relative_position_bias", "shared_relative_position_bias", "rel_pos")
SHARED_BIAS_READERS = ("vision_cross_attn", "attention")  # SAM 3, BEiT, as a mask
# Further projections with one output, or d_head, for each query head: gates, relative positions, global attention.
PER_HEAD_PROJECTIONS = (
    *("g_proj", "gate_proj", "r_proj", "linear_pos", "pos_proj", "relative_k_proj", "pos_key_proj", "pos_query_proj"),
    *("query_global", "key_global", "value_global", "relative_position_embedding.pos_proj"),
    *("continuous_position_bias_mlp.2", "output_projection.gate_proj", "gate", "head_gate", "attn_gate", "sink_proj"),
    *("w2e_query", "e2w_query", "e2e_query"),  # LUKE's words and entities
    *("layout_query", "layout_key", "layout_value"),  # LiLT's second stream
    *("k_sconv.weight_proj", "v_sconv.weight_proj"),  # Inkling 2
    "dt_proj",  # Doge
)
# Those of them that read the values of all heads, and further projections that read what the heads give.
OF_ALL_VALUES = ("dt_proj",)
FURTHER_OUTPUTS = ("../layout_output.dense",)
# Modules inside an attention that add its values, of all heads, to what it gives (SAN-M's memory).
VALUE_READERS = ("fsmn",)
# Convolutions inside an attention over the model's states, before keys and values are made: they stay.
CONVOLUTIONS_OF_INPUTS = ("sr", "sequence_reduction", "spatial_reduction", "convolution")
# Linear layers inside an attention that see no head: they stay.
HEADLESS_PROJECTIONS = (
    "gru_rel_pos_linear",
    "indexer",
    "compressor",
    "continuous_position_bias_mlp.0",
    "sr",
    "q_a_proj",
)

# Flags of an attention whose keys and values others of its kind take, and what a kind is called.
STORES_KEYS = "store_full_length_kv"
KIND_OF_LAYER = "layer_type"

# What the first block owns and hands to the others; it moves to the first kept block. (module, flag beside it)
OWNED_BY_FIRST_BLOCK: tuple[tuple[str, str], ...] = (
    ("relative_attention_bias", "has_relative_attention_bias"),
    ("rel_attn_embed", "has_relative_position_bias"),
)

# What blocks call an attention that reads another stack's outputs; a block's own has none of these in its name.
CROSS_ATTENTION_WORDS = ("cross", "encoder_attn", "encdec")

# Arguments by which an attention gets a bias by head number (ALiBi): slopes would change with the count.
ALIBI_ARGUMENT = "alibi"

# Methods of what holds an attention that put another in its place.
ATTENTION_SWAPS = ("set_attention_type",)

# Config switches that make a layer's function depend on its number.
LAYER_NUMBER_SWITCHES = ("scale_attn_by_inverse_layer_idx", "num_kv_shared_layers")
# The config's list of each layer's kind, by which caches of keys differ.
LAYER_KINDS = "layer_types"
# Modules beside a stack that are wired to a fixed position in it (DeBERTa-v2's convolution after block 0).
FIXED_POSITION_SIBLINGS = ("conv", "gated_cross_attn_layers")
# Stacks whose blocks come in between the layers of another.
PLACED_STACKS = ("gated_cross_attn_layers",)
# Arguments of blocks that change two streams.
TWO_STREAMS = (
    ("queries", "keys"),
    ("hidden_states", "global_hidden_states"),
    ("hidden_states", "layout_inputs"),
    ("vision_features", "text_features"),
    ("prev_attn_output", "hidden_states"),
    ("lang_feats", "visual_feats"),
)
# Lists of a config with the numbers of layers that something else reads, and with those of a kind, which are renumbered.
HIDDEN_STATE_READERS = ("intermediate_hook_ids", "deepstack_visual_indexes", "backbone_out_indices")
LAYER_INDEX_LISTS = (
    *(
        "cross_attention_layers",
        "hybrid_layer_ids",
        "attn_layer_indices",
        "global_attn_indexes",
        "global_attn_indices",
    ),
    *("window_block_indices", "fullatt_block_indexes", "full_attn_idxs", "no_rope_layer_indices"),
)
# Where one block is called several times, the config field that holds the number of calls, read in forward (ALBERT).
REPEAT_FIELDS = {"albert_layer_groups": "num_hidden_layers"}

_registered: list[AttentionLayout | FeedForwardLayout] = []


def register_layout(layout: AttentionLayout | FeedForwardLayout) -> None:
    """Teach discovery a layout of your own, for this process; it comes before the built-in ones.

    Args:
        layout: the names of an attention's or a feed-forward's projections.

    Raises:
        PruneError: it is no layout.
    """
    if not isinstance(layout, (AttentionLayout, FeedForwardLayout)):
        raise PruneError(
            f"register_layout got a {type(layout).__name__}; expected an AttentionLayout or a FeedForwardLayout"
        )
    if layout not in _registered:
        _registered.insert(0, layout)


def feed_forward_layouts() -> Iterator[FeedForwardLayout]:
    """Those that were registered, the last one first, then the built-in ones."""
    yield from (layout for layout in _registered if isinstance(layout, FeedForwardLayout))
    yield from FEED_FORWARD_LAYOUTS


def attention_by_first_part() -> Iterator[tuple[str, list[AttentionLayout]]]:
    """(first part that must be there, layouts that begin with it): registered ones, then the built-in ones."""
    yield from ((layout.parts[0], [layout]) for layout in _registered if isinstance(layout, AttentionLayout))
    yield from _BY_FIRST_PART.items()


_BY_FIRST_PART: dict[str, list[AttentionLayout]] = {}
for _layout in ATTENTION_LAYOUTS:
    _BY_FIRST_PART.setdefault(_layout.parts[0], []).append(_layout)
