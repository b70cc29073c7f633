"""Tiny random models of every family that the tests cross with targets, criteria and checkpoints."""

from __future__ import annotations

import torch
import transformers
from packaging.version import Version
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)


TEXT = dict(vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2)
BERT = dict(**TEXT, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
LLAMA = dict(**BERT, num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
VISION = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
)

# name -> (model type, config, Auto class)
MODELS: dict[str, tuple[str, dict, type]] = {
    "bert": ("bert", BERT, AutoModelForSequenceClassification),
    "roberta": ("roberta", BERT, AutoModelForSequenceClassification),
    "distilbert": (
        "distilbert",
        dict(vocab_size=99, dim=32, n_layers=3, n_heads=4, hidden_dim=48, pad_token_id=0),
        AutoModelForSequenceClassification,
    ),
    "electra": ("electra", dict(**BERT, embedding_size=16), AutoModelForSequenceClassification),
    "deberta-v2": (
        "deberta-v2",
        dict(**BERT, relative_attention=True, position_buckets=8, pos_att_type=["c2p", "p2c"], share_att_key=False),
        AutoModelForSequenceClassification,
    ),
    "albert": ("albert", dict(**BERT, embedding_size=16), AutoModelForSequenceClassification),
    "gpt2": (
        "gpt2",
        dict(vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
        AutoModelForCausalLM,
    ),
    "opt": (
        "opt",
        dict(**TEXT, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32),
        AutoModelForCausalLM,
    ),
    "gpt_neox": ("gpt_neox", BERT, AutoModelForCausalLM),
    "bloom": ("bloom", dict(vocab_size=99, hidden_size=32, n_layer=3, n_head=4), AutoModelForCausalLM),
    "falcon-old": (
        "falcon",
        dict(**TEXT, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_hidden_size=48, multi_query=True),
        AutoModelForCausalLM,
    ),
    "falcon-heads": (
        "falcon",
        dict(**TEXT, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, multi_query=False),
        AutoModelForCausalLM,
    ),
    "falcon-new": (
        "falcon",
        dict(
            **TEXT,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
        ),
        AutoModelForCausalLM,
    ),
    "llama": ("llama", LLAMA, AutoModelForCausalLM),
    "mistral": ("mistral", LLAMA, AutoModelForCausalLM),
    "qwen2": ("qwen2", LLAMA, AutoModelForCausalLM),
    "qwen3": ("qwen3", LLAMA, AutoModelForCausalLM),
    "gemma2": ("gemma2", LLAMA, AutoModelForCausalLM),
    "gemma3": ("gemma3_text", LLAMA, AutoModelForCausalLM),
    "phi3": ("phi3", {**LLAMA, "head_dim": None}, AutoModelForCausalLM),
    "olmo2": ("olmo2", LLAMA, AutoModelForCausalLM),
    "t5": (
        "t5",
        dict(
            vocab_size=99, d_model=32, d_ff=48, d_kv=8, num_layers=3, num_decoder_layers=2, num_heads=4,
            decoder_start_token_id=0,
        ),
        AutoModel,
    ),
    "bart": (
        "bart",
        dict(
            **TEXT, d_model=32, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=40, max_position_embeddings=64,
        ),
        AutoModel,
    ),
    "vit": ("vit", VISION, AutoModel),
    "deit": ("deit", VISION, AutoModel),
    "clip": (
        "clip",
        dict(
            text_config={**BERT, "max_position_embeddings": 32, "projection_dim": 16},
            vision_config={**VISION, "projection_dim": 16},
            projection_dim=16,
        ),
        AutoModel,
    ),
    "whisper": (
        "whisper",
        dict(
            vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=40, num_mel_bins=8, max_source_positions=12,
            max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        ),
        AutoModel,
    ),
}  # fmt: skip


EXPERTS = dict(**{**LLAMA, "head_dim": None}, num_experts_per_tok=2)
# Mixtures of experts, apart since they need eager experts in float64; the expert counts have names of their own
MIXTURES: dict[str, tuple[str, dict, type]] = {
    "mixtral": ("mixtral", dict(**EXPERTS, num_local_experts=6), AutoModelForCausalLM),
    "qwen2_moe": (
        "qwen2_moe",
        dict(**EXPERTS, num_experts=6, moe_intermediate_size=24, shared_expert_intermediate_size=40),
        AutoModelForCausalLM,
    ),
    # the bias of each expert's score is a buffer
    "glm4_moe": (
        "glm4_moe",
        dict(
            **EXPERTS, n_routed_experts=6, moe_intermediate_size=24, first_k_dense_replace=1, n_group=1, topk_group=1
        ),
        AutoModelForCausalLM,
    ),
    # gate and up in turns, (E, d_in, d_out), with biases
    "gpt_oss": (
        "gpt_oss",
        dict(**{**EXPERTS, "head_dim": 8}, num_local_experts=6, sliding_window=8),
        AutoModelForCausalLM,
    ),
}


def is_before(version: str) -> bool:
    """Whether the Transformers at hand is older."""
    return Version(transformers.__version__) < Version(version)


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> PreTrainedModel:
    """The tiny model `name`, with random weights large enough that every part shows in the output; config `changes`."""
    model_type, config, auto = (MODELS | MIXTURES)[name]
    torch.manual_seed(seed)
    values = {key: value for key, value in {**config, **changes}.items() if value is not None}
    eager = {"experts_implementation": "eager"} if name in MIXTURES else {}
    model = auto.from_config(CONFIG_MAPPING[model_type](**values), **eager)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.to(dtype).eval()


def build_on_meta(name: str) -> PreTrainedModel:
    """The same model without storage."""
    model_type, config, auto = MODELS[name]
    with torch.device("meta"):
        return auto.from_config(CONFIG_MAPPING[model_type](**{k: v for k, v in config.items() if v is not None}))


def rotary_macs(model: PreTrainedModel, length: int) -> int:
    """MACs of the angles of a tiny Llama's rotary embedding: a matrix product in older Transformers, else none."""
    with FlopCounterMode(display=False) as counter:
        model.model.rotary_emb(torch.zeros(1, length, 32), position_ids=torch.arange(length)[None])
    assert counter.get_total_flops() in (
        0,
        2 * length * 4,
    )  # positions times frequencies, one for each pair of entries
    return counter.get_total_flops() // 2
