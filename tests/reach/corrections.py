"""What the general rules of shrinking and of inputs get wrong, by model type: config fields, and arguments of `forward`."""

from __future__ import annotations

from typing import Any

from .inputs import Make, channels_first, several_images, wave


MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
HALF_MROPE = {
    "rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
}
# Linear attention in most layers, full attention in the last of four.
HYBRID = {"num_hidden_layers": 4}
RESNET = {
    "model_type": "resnet", "embedding_size": 32, "hidden_sizes": [32, 32, 32, 32], "depths": [2, 2, 2, 2],
    "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
SEQUENCES = {"prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2, 3]}
HEAD_DIM = {"head_dim": 8}
QWEN_VISION = {"fullatt_block_indexes": [1], "window_size": 32, "out_hidden_size": 32}

# model type -> fields of its config, nested as its sub-configs are
CONFIGS: dict[str, dict[str, Any]] = {
    "autoformer": SEQUENCES,
    "informer": SEQUENCES,
    "time_series_transformer": SEQUENCES,
    "bailing_hybrid": HYBRID,
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "detr": {"backbone_config": {**RESNET, "out_features": ["stage4"]}},
    "dinov3_convnext": {"hidden_sizes": [16, 16, 32, 32], "depths": [2, 2, 2, 2]},
    "dots1": {"n_routed_experts": 4},
    "esm": {"vocab_size": 160, "pad_token_id": 1, "mask_token_id": 100},
    "glm46v": {"text_config": MROPE},
    "glm4v": {"text_config": MROPE},
    "glm4v_text": MROPE,
    "glm4v_moe": {"text_config": HALF_MROPE},
    "glm4v_moe_text": HALF_MROPE,
    "glm_image": {"text_config": MROPE},
    "glm_image_text": MROPE,
    "glm_ocr": {"text_config": MROPE},
    "glm_ocr_text": MROPE,
    "glmga": {"text_config": MROPE},
    "gemma3n_text": {"intermediate_size": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "hunyuan_v1_dense": HEAD_DIM,
    "hunyuan_v1_moe": HEAD_DIM,
    "hunyuan_vl": {"text_config": HEAD_DIM},
    "hunyuan_vl_text": HEAD_DIM,
    "jamba": {"num_hidden_layers": 8},
    "kimi_linear": HYBRID,
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "minicpm_ocr": {"text_config": HYBRID},
    "minicpmv4_6": {"text_config": HYBRID},
    "minicpmv4_7": {"text_config": HYBRID},
    "ministral": HEAD_DIM,
    "muse_spark": {"audio_config": {"num_hidden_layers": 4}},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "qwen2_5_vl": {"text_config": MROPE, "vision_config": QWEN_VISION},
    "qwen2_5_omni_thinker": {"text_config": MROPE, "vision_config": QWEN_VISION},
    "qwen2_5_vl_text": MROPE,
    "qwen2_5_vl_vision": QWEN_VISION,
    "exaone4_5": {"vision_config": QWEN_VISION},
    "hyperclovax_vision_v2": {"vision_config": QWEN_VISION},
    "qwen2_vl": {"text_config": MROPE, "vision_config": {"hidden_size": 32}},
    "qwen2_vl_text": MROPE,
    "qwen3_5": {"text_config": HYBRID},
    "qwen3_5_moe": {"text_config": HYBRID},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp": {"text_config": HYBRID},
    "qwen4_exp_text": HYBRID,
    "reformer": {"is_decoder": True},
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 4}},
}
# model type -> arguments of `forward`; None leaves one out
INPUTS: dict[str, dict[str, Make | None]] = {
    **{
        name: {"input_values": wave}
        for name in (
            "encodec", "dac", "mimi", "mimi_encoder", "pe_audio", "pe_audio_encoder", "pe_audio_video",
            "pe_audio_video_encoder", "pocket_tts_audio_tokenizer", "pocket_tts_audio_tokenizer_encoder",
        )
    },
    **{
        name: {"pixel_values": several_images}
        for name in (
            "idefics", "idefics2", "idefics3", "smolvlm", "modernvbert", "colmodernvbert", "ultravbert", "lightglue", "superglue",
            "timesformer", "llava_next", "llava_onevision", "granite_docling",
        )
    },
    **{name: {"input_features": channels_first} for name in ("audioflamingo3", "clvp", "glmasr", "glmasr_encoder", "fun_asr_nano")},
}  # fmt: skip
# model type -> fields without which the default config itself can't be made
FIRST: dict[str, dict[str, Any]] = {}
