"""What the general rules of shrinking and of inputs get wrong, by model type: config fields, and arguments of `forward`."""

from __future__ import annotations

from typing import Any

import torch

from .inputs import (
    BATCH,
    LENGTH,
    Make,
    channels_first,
    constant,
    flat,
    floats,
    ids,
    ones,
    several_images,
    text_with,
    video,
    wave,
)
from .shrinking import KEEP


MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
HALF_MROPE = {
    "rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
BY_LAYER = {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}
SWIN = {"image_size": 32, "patch_size": 2, "window_size": 2}
HIERA = {
    "image_size": [32, 32], "hidden_size": 32, "embed_dim_per_stage": [32, 64, 128, 256], "blocks_per_stage": [1, 1, 2, 1],
    "num_attention_heads_per_stage": [1, 2, 4, 8], "global_attention_blocks": [], "window_size_per_stage": [4, 4, 4, 4],
    "window_positional_embedding_background_size": [4, 4],
}  # fmt: skip
SAM2 = {"backbone_config": HIERA, "backbone_channel_list": [256, 128, 64, 32]}
# Linear attention, or a convolution, and full attention in turns: two of each, so that one of each can leave.
HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
CONVOLUTIONS = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
RESNET = {
    "model_type": "resnet", "embedding_size": 32, "hidden_sizes": [32, 32, 32, 32], "depths": [2, 2, 2, 2],
    "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
SEQUENCES = {"prediction_length": 4, "num_time_features": 1, "context_length": 12, "lags_sequence": [1, 2, 3]}
HEAD_DIM = {"head_dim": 8}
QWEN_VISION = {"fullatt_block_indexes": [1], "window_size": 32, "out_hidden_size": 32}

# Kernels, strides and paddings of a block that looks along lines of text.
INTRACLASS = {
    "reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0],
    **{
        f"{name}_{ratio}ratio": [[k if up else 1, k if across else 1], [1, 1], [k // 2 if up else 0, k // 2 if across else 0]]
        for name, up, across in (
            ("vertical_long_to_small_conv", True, False), ("horizontal_small_to_long_conv", False, True),
            ("symmetric_conv_long", True, True),
        )
        for ratio, k in (("long", 7), ("mid", 5), ("short", 3))
    },
}  # fmt: skip
SERVER_DET = {
    "intraclass_block_config": INTRACLASS, "scale_factor_list": [1, 2, 4, 8], "kernel_list": [3, 2, 2],
    "neck_out_channels": 32,
}  # fmt: skip
# Stages of blocks: kernel, channels in and out, stride, whether it squeezes.
LCNET = {
    "model_type": "pp_lcnet_v4", "stem_channels": [3, 16, 32], "out_features": ["stage1", "stage2", "stage3", "stage4"],
    "block_configs": [
        [[3, 32, 32, 1, True]],
        [[3, 32, 32, 2, False], [3, 32, 32, 1, False]],
        [[3, 32, 48, 2, False], [3, 48, 48, 1, True]],
        [[3, 48, 64, 2, False], [3, 64, 64, 1, True]],
    ],
}  # fmt: skip
VIBEVOICE = {"num_filters": 8, "downsampling_ratios": [2, 2, 4], "depths": [2, 2, 2, 2], "hidden_size": 32}
INDEXED = {
    "num_hidden_layers": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 4, "layer_types": ["linear_attention", "indexed_attention"] * 2,
}  # fmt: skip
TRANSCRIBE_AUDIO = {
    "asr_config": {"num_key_value_heads": 4},
    "diarization_config": {"audio_config": {"num_key_value_heads": 4}},
}
# model type -> fields of its config, nested as its sub-configs are
CONFIGS: dict[str, dict[str, Any]] = {
    "autoformer": SEQUENCES,
    "informer": SEQUENCES,
    "time_series_transformer": SEQUENCES,
    "bailing_hybrid": {"num_hidden_layers": 4, "layer_group_size": 2},
    "align": {"projection_dim": 64},
    "efficientnet": {"hidden_dim": 1280, "width_coefficient": 1.0},
    "colqwen2": {"vlm_config": {"text_config": MROPE}},
    "deepseek_ocr2": {
        "text_config": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse", "sparse"]},
        "vision_config": {"sam_config": {"downsample_channels": [32, 32]}},
    },
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "efficientloftr": {"hidden_size": 256, "num_attention_heads": 8},
    "ernie4_5_vl_moe": {"text_config": {"moe_k": 2, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}},
    "exaone4_5_vision": QWEN_VISION,
    "fastspeech2_conformer_with_hifigan": {"model_config": {"num_mel_bins": 80}},
    "chmv2": {
        "backbone_config": {"reshape_hidden_states": True, "apply_layernorm": True, "return_class_token": True},
        "patch_size": 8,
        "post_process_channels": [16, 16, 32, 32],
    },
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "spatial_target_layers": [0, 1, 1, 2],
        "image_grid_pinpoints": [[32, 32]],
        "vision_config": {"hidden_size": 128, "num_attention_heads": 4},
        "text_config": {"num_hidden_layers": 3},
    },
    "granite_docling": {
        "vision_config": {
            "out_hidden_size": 32,
            "scale_factor": 2,
            "deepstack_visual_indexes": [0, 1],
            "use_fine_route": False,
        }
    },
    "jev": {"hidden_size": 32, "text_config": HYBRID},
    "granite_speech": {"window_size": 15},
    "granite_speech_plus": {"window_size": 15},
    "granite_speech5_ctc": {"encoder_config": {"num_key_value_heads": 4}},
    "granite_speech5_encoder": {"num_key_value_heads": 4},
    "kosmos-2": {"latent_query_num": 8},
    "mllama": {
        "vision_config": {"intermediate_layers_indices": [0, 1, 2], "vision_output_dim": 128},
        "text_config": {"cross_attention_layers": [1]},
    },
    "oneformer": {"mask_dim": 32},
    "sam2": {
        "vision_config": {**SAM2, "backbone_feature_sizes": [[8, 8], [4, 4], [2, 2]]},
        "prompt_encoder_config": {"image_size": 32, "patch_size": 16},
    },
    "sam2_vision_model": SAM2,
    "sam2_hiera_det_model": HIERA,
    "seggpt": {"image_size": [64, 32]},
    "perception_lm": {"vision_config": {"model_type": "vit", "hidden_size": 32, "model_args": {"embed_dim": 32}}},
    "superglue": {
        "keypoint_detector_config": {"descriptor_decoder_dim": 32, "keypoint_decoder_dim": 65},
        "keypoint_encoder_sizes": [16, 32],
        "gnn_layers_types": ["self", "cross"] * 2,
    },
    "tvp": {"num_frames": 4, "visual_prompt_size": 4, "max_img_size": 64},
    "upernet": {"backbone_config": {**RESNET, "out_features": ["stage1", "stage2", "stage3", "stage4"]}},
    "zamba": {"num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "hybrid_layer_ids": [1, 3],
    },
    "zoedepth": {"bottleneck_features": 32},
    "kimi_k25": {"vision_config": {"pos_emb_height": 8, "pos_emb_width": 8}},
    "kimi_k25_vision": {"pos_emb_height": 8, "pos_emb_width": 8},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}},
    "dots3_note": {
        "text_config": {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "index_n_heads": 4,
            "shared_experts_intermediate_size": 24,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 16,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 16,
            "swa_qk_nope_head_dim": 8,
            "swa_v_head_dim": 8,
        },
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "pyramid_num_routed": [-1, 4, 4]},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 32},
    },
    "omdet-turbo": {
        "backbone_config": {"model_type": "swin", **SWIN, "out_features": ["stage2", "stage3", "stage4"]},
        "apply_layernorm_after_vision_backbone": False,
        "encoder_in_channels": [64, 128, 256],
        "image_size": 32,
        "vision_features_channels": [32] * 3,
        "text_config": {"hidden_size": 64, "projection_dim": 64},
        "text_projection_in_dim": 64,
        "text_projection_out_dim": 64,
        "class_embed_dim": 64,
        "num_queries": 4,
        "encoder_dim_feedforward": 48,
        "decoder_dim_feedforward": 48,
    },
    "moonshine_streaming": {"num_key_value_heads": 4},
    "paddleocr_vl": {"text_config": MROPE},
    "neucodec": {"encoder_hidden_size": 4, "quantization_dim": 64, "num_key_value_heads": 4},
    "xcodec2": {"encoder_hidden_size": 4, "quantization_dim": 64, "num_key_value_heads": 4},
    "pp_ocrv5_server_det": SERVER_DET,
    "pp_ocrv6_medium_det": {**SERVER_DET, "backbone_config": LCNET},
    "pp_doclayout_v2": {"class_thresholds": [0.0] * 25, "class_order": [*range(20)] * 2},
    "muse_glimmer": {"out_hidden_size": 128},
    "musicflamingo": {"audio_token_id": 150},
    "neomme": {"head_dim": 16},
    "nemotron_h_omni": {
        "image_token_id": 150,
        "audio_token_id": 151,
        "vision_hidden_size": 32,
        "projector_hidden_size": 32,
        "audio_config": {
            "model_type": "parakeet_encoder",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "num_mel_bins": 16,
            "subsampling_conv_channels": 32,
            "projection_hidden_size": 32,
            "projection_bias": True,
            "attention_bias": False,
            "scale_input": False,
        },
    },
    "pp_doclayout_v3": {"backbone_config": KEEP},
    "pp_ocrv6_small_rec": {"backbone_config": KEEP},
    "pp_ocrv6_tiny_rec": {"backbone_config": KEEP},
    "pp_ocrv6_small_det": {
        "backbone_config": LCNET,
        "layer_list_out_channels": [32, 32, 48, 64],
        "neck_out_channels": 32,
    },
    "uvdoc": {
        "backbone_config": {
            "resnet_head": [[3, 8], [8, 8]],
            "resnet_configs": [
                [[8, 8, 1, False], [8, 8, 3, False]],
                [[8, 16, 1, True], [16, 16, 3, False]],
                [[16, 32, 1, True], [32, 32, 3, False]],
            ],
            "stage_configs": [[[32, 1]], [[32, 2]], [[32, 5], [32, 3]]],
            "out_features": ["stage1", "stage2", "stage3"],
        },
        "bridge_connector": [32, 32],
        "out_point_positions2D": [[32, 16], [16, 2]],
    },
    "vibevoice": {"audio_config": VIBEVOICE, "semantic_model_config": VIBEVOICE},
    "vibevoice_acoustic_tokenizer": VIBEVOICE,
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": VIBEVOICE,
        "semantic_tokenizer_encoder_config": VIBEVOICE,
        "acoustic_tokenizer_chunk_size": 64,
    },
    "sam3_tracker": {"vision_config": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "audio-spectrogram-transformer": {"max_length": 64},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "blip-2": {"image_token_index": 150},
    "instructblip": {"image_token_index": 150},
    "instructblipvideo": {"video_token_index": 150},
    "bridgetower": {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "text_config": {"hidden_size": 128},
        "vision_config": {"hidden_size": 128},
    },
    "bros": {"hidden_size": 128},
    "chameleon": {
        "vocabulary_map": {
            "<image>": 150,
            **{f"IMGIMG{chr(65 + i // 10)}{chr(65 + i % 10)}Z": 100 + i for i in range(32)},
        }
    },
    "emu3": {
        "vq_config": {"channel_multiplier": [1, 1]},
        "vocabulary_map": {
            "<image>": 150,
            "<|extra_200|>": 149,
            **{f"<|visual token {i:06}|>": 100 + i for i in range(32)},
        },
    },
    "clap": {
        "audio_config": {"hidden_size": 128, "num_mel_bins": 64, "spec_size": 256, "patch_size": 4, "window_size": 8}
    },
    "clvp": {
        "projection_dim": 128,
        "text_config": {"hidden_size": 128, "projection_dim": 128},
        "speech_config": {"hidden_size": 128, "projection_dim": 128},
        "decoder_config": {"hidden_size": 128},
    },
    "cohere_compass": {"text_config": BY_LAYER},
    "cohere_compass_text": BY_LAYER,
    "decision_transformer": {"n_head": 4},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}},
    "deepseek_v4": {"o_groups": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "depth_pro": {"patch_size": 32, "intermediate_hook_ids": [2, 1]},
    "donut-swin": SWIN,
    "swin": SWIN,
    "eomt": {"num_blocks": 2},
    "eomt_dinov3": {"num_blocks": 2},
    "ernie4_5_moe": {"moe_k": 2},
    "esmc": {"num_key_value_heads": 4},
    "nemotron3_diarization": {"audio_config": {"num_key_value_heads": 4}},
    "nemotron3_diarization_audio": {"num_key_value_heads": 4},
    "nemotron3_5_transcribe_audio": TRANSCRIBE_AUDIO,
    "nemo_speechlm": {"audio_config": TRANSCRIBE_AUDIO, "word_timestamp_config": {"num_key_value_heads": 4}},
    "nemotron3_5_transcribe_asr_audio": {"num_key_value_heads": 4},
    "nemotron3_5_transcribe_word_timestamp": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "glm5_next": {"text_config": {"index_kpool": 2, "num_hidden_layers": 4}},
    "glm5_next_text": {"index_kpool": 2, "num_hidden_layers": 4},
    "glmasr": {"audio_config": {"intermediate_size": 128}},
    "voxtral": {"audio_token_id": 150, "audio_config": {"intermediate_size": 128}},
    "gradium_phonon_tts": {"flow_head_config": {"condition_dim": 32}},
    "pocket_tts": {"flow_head_config": {"condition_dim": 32}},
    "granitemoehybrid": HYBRID,
    "grounding-dino": {"max_text_len": 12, "num_queries": 4, "backbone_config": SWIN},
    "mm-grounding-dino": {"max_text_len": 12, "num_queries": 4, "backbone_config": SWIN},
    "layoutlmv3": {"input_size": 32, "coordinate_size": 6, "shape_size": 4},
    "led": {"attention_window": 4},
    "levit": {"image_size": 64, "patch_size": 16},
    "lilt": {"hidden_size": 48},
    "llama4": {
        "vision_config": {
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "intermediate_size": 128,
        }
    },
    "llava_next": {"image_grid_pinpoints": [[32, 32]]},
    "llava_next_video": {"image_grid_pinpoints": [[32, 32]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 32]]},
    "lw_detr": {"projector_scale_factors": [1.0], "backbone_config": {"num_windows": 4, "image_size": 32}},
    "lxmert": {"visual_feat_dim": 16},
    "mask2former": {"feature_size": 32, "mask_feature_size": 32},
    "mimi": {"vector_quantization_hidden_dimension": 32},
    "mobilevitv2": {"image_size": 64},
    "molmo2": {"adapter_config": {"vision_feature_layer": [2, 1]}},
    "sam": {"vision_config": {"num_pos_feats": 16, "output_channels": 32}},
    "sam_hq": {"vision_config": {"num_pos_feats": 16, "output_channels": 32}, "mask_decoder_config": {"vit_dim": 32}},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}, "mm_tokens_per_image": 4},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "vitmatte": {
        "backbone_config": {"num_channels": 4, "patch_size": 16},
        "fusion_hidden_sizes": [32, 32, 32, 32],
        "convstream_hidden_sizes": [48, 96, 192],
    },
    "wav2vec2-bert": {"vocab_size": 160},
    "xcodec": {"acoustic_model_config": {"encoder_hidden_size": 4, "decoder_hidden_size": 64, "hidden_size": 64}},
    "wav2vec2-conformer": {"vocab_size": 160},
    "xmod": {"default_language": "en_XX"},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "detr": {"backbone_config": {**RESNET, "out_features": ["stage4"]}},
    "dinov3_convnext": {"hidden_sizes": [16, 16, 32, 32], "depths": [2, 2, 2, 2]},
    "dots1": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0,
    },
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
    "hunyuan_vl": {"text_config": {**HEAD_DIM, **MROPE}},
    "hunyuan_vl_text": {**HEAD_DIM, **MROPE},
    "jamba": {"num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 1},
    "kimi_linear": HYBRID,
    "lfm2_moe": CONVOLUTIONS,
    "lfm3": CONVOLUTIONS,
    "lfm3_vl": {"text_config": CONVOLUTIONS},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "moe", "full_attention", "mlp"]},
    "recurrent_gemma": {"num_hidden_layers": 4, "block_types": ["recurrent", "attention"]},
    "mamba2": {"num_heads": 8},
    "minicpm_ocr": {"text_config": HYBRID},
    "minicpmv4_6": {"text_config": HYBRID},
    "minicpmv4_7": {"text_config": HYBRID},
    "ministral": HEAD_DIM,
    "muse_spark": {"out_hidden_size": 128, "audio_config": {"num_hidden_layers": 4}},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "qwen2_5_vl": {"text_config": MROPE, "vision_config": QWEN_VISION},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 151},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 151, "text_config": MROPE, "vision_config": QWEN_VISION},
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
    "qwen4_exp": {"text_config": INDEXED},
    "qwen4_exp_text": INDEXED,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 4}},
}
# Patches of images of several sizes in one tensor.
PADDED: dict[str, Make | None] = {
    "pixel_values": floats(16, 192), "pixel_attention_mask": ones(16),
    "spatial_shapes": constant(torch.tensor([[4, 4]] * BATCH)),
}  # fmt: skip
# model type -> arguments of `forward`; None leaves one out
INPUTS: dict[str, dict[str, Make | None]] = {
    **{
        name: {"input_values": wave}
        for name in (
            "encodec", "dac", "mimi", "mimi_encoder", "pe_audio", "pe_audio_encoder",
            "pocket_tts_audio_tokenizer", "pocket_tts_audio_tokenizer_encoder",
        )
    },
    **{
        name: {"pixel_values": several_images}
        for name in (
            "idefics", "idefics2", "idefics3", "smolvlm", "modernvbert", "colmodernvbert", "ultravbert", "lightglue", "superglue",
            "timesformer", "llava_next", "llava_onevision", "llava_next_video",
        )
    },
    **{
        name: {"input_features": floats(64, 160)}
        for name in ("granite_speech", "granite_speech_plus", "neucodec", "seamless_m4t", "wav2vec2-bert", "seamless_m4t_v2", "xcodec2")
    },
    **{name: {"pixel_values": flat(1)} for name in ("hunyuan_vl", "hunyuan_vl_vision")},
    **{name: {"pixel_values": flat(2)} for name in ("muse_glimmer", "muse_glimmer_vision", "muse_spark", "muse_spark_vision")},
    **{name: {"pixel_values": video} for name in ("videomae", "vivit", "xclip", "timesformer")},
    **dict.fromkeys(("siglip2", "siglip2_vision_model", "lfm2_vl"), PADDED),
    **{
        name: {"past_values": floats(15), "past_time_features": floats(15, 1), "past_observed_mask": ones(15), "future_time_features": floats(4, 1)}
        for name in ("autoformer", "informer", "time_series_transformer")
    },
    "audio-spectrogram-transformer": {"input_values": floats(64, 16)},
    "blip_2_qformer": {"encoder_hidden_states": floats(5, 32), "query_embeds": floats(8, 32)},
    "blt": {"use_cache": constant(False)},
    "clap": {"input_features": floats(1, 100, 64), "is_longer": lambda d: torch.zeros(BATCH, 1, dtype=torch.bool)},
    "colqwen2": {"pixel_values": lambda d: flat(2)(d).reshape(BATCH, 16, -1)},
    "csm": {"input_ids": ids(LENGTH, 4, high=30)},
    "decision_transformer": {
        "states": floats(LENGTH, 17), "actions": floats(LENGTH, 4), "rewards": floats(LENGTH, 1),
        "returns_to_go": floats(LENGTH, 1), "timesteps": lambda d: torch.arange(LENGTH).expand(BATCH, LENGTH), "attention_mask": ones(LENGTH),
    },
    "deepseek_vl_hybrid": {"high_res_pixel_values": floats(3, 32, 32)},
    "depth_pro": {"pixel_values": floats(3, 128, 128)},
    "dia": {"decoder_input_ids": ids(7, 9)},
    "embedding_gemma2": {"pixel_values": None, "input_features": None},
    "fun_asr_nano": {"input_features": floats(20, 112)},
    "fun_asr_nano_encoder": {"input_features": floats(20, 112)},
    "fuyu": {"pixel_values": floats(4, 192)},
    "gemma3n_audio": {"audio_mel": floats(64, 16), "audio_mel_mask": lambda d: torch.zeros(BATCH, 64, dtype=torch.bool)},
    "granite_speech5_ctc": {"input_features": floats(64, 64)},
    "granite_speech5_encoder": {"input_features": floats(64, 64)},
    "instructblip": {"qformer_input_ids": ids(6)},
    "instructblipvideo": {"pixel_values": several_images, "qformer_input_ids": ids(6)},
    "kimi_k25": {"pixel_values": lambda d: d.floats(32, 3, 8, 8)},
    "kimi_k25_vision": {"pixel_values": lambda d: d.floats(32, 3, 8, 8)},
    "kosmos-2": {"image_embeds_position_mask": lambda d: (torch.arange(LENGTH) < 8).expand(BATCH, LENGTH)},
    "kyutai_speech_to_text": {"input_ids": lambda d: d.ids(BATCH, LENGTH, d.size("num_codebooks") + 1, high=30)},
    "lxmert": {"visual_feats": floats(5, 16), "visual_pos": floats(5, 4)},
    "mimi_decoder": {"latents": floats(32, 6)},
    "pocket_tts_audio_tokenizer_decoder": {"latents": floats(32, 6)},
    "minicpm_ocr_vision": {"pixel_values": lambda d: d.floats(1, 3, 8, 256), "target_sizes": constant(torch.tensor([[4, 4]] * BATCH))},
    "minicpmv4_7_vision": {"pixel_values": lambda d: d.floats(1, 3, 8, 256), "target_sizes": constant(torch.tensor([[4, 4]] * BATCH))},
    "gemma4": {"pixel_values": None, "input_features": None},
    "gemma4_unified": {"pixel_values": None, "input_features": None},
    "gemma4_vision": {
        "pixel_values": floats(16, 192),
        "pixel_position_ids": lambda d: torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(BATCH, 16, 2),
    },
    "mllama": {
        "pixel_values": floats(1, 4, 3, 32, 32), "aspect_ratio_ids": ones(1), "aspect_ratio_mask": ones(1, 4),
        "cross_attention_mask": ones(LENGTH, 1, 4),
    },
    "inkling2": {"pixel_values": lambda d: d.floats(32, 16, 16, 3)},
    "inkling2_vision": {"pixel_values": lambda d: d.floats(32, 16, 16, 3)},
    "inkling_mm_model": {"pixel_values": lambda d: d.floats(4, 2, 8, 8, 3)},
    "vibevoice_acoustic_tokenizer": {"input_values": floats(1, 64)},
    "vibevoice_acoustic_tokenizer_encoder": {"hidden_states": floats(1, 6400)},
    "vibevoice_acoustic_tokenizer_decoder": {"hidden_states": floats(32, 2)},
    "pp_ocrv6_small_rec": {"pixel_values": floats(3, 48, 64)},
    "pp_ocrv6_tiny_rec": {"pixel_values": floats(3, 48, 64)},
    "efficientloftr": {"pixel_values": several_images},
    "glm_image": {"pixel_values": None, "image_grid_thw": None},
    "granite4_vision": {"input_ids": text_with(10, "image_token_index"), "pixel_values": several_images},
    "granite_docling": {
        "input_ids": text_with(4, "image_token_id"), "pixel_values": floats(1, 3, 32, 32),
        "pixel_attention_mask": lambda d: torch.ones(BATCH, 1, dtype=torch.bool),
    },
    "granite_speech": {"input_features": floats(64, 160), "input_features_mask": None},
    "granite_speech_plus": {"input_features": floats(64, 160), "input_features_mask": None},
    "molmo2": {"pixel_values": None},
    "moss_transcribe_diarize": {"padding_mask": ones(64)},
    "nemotron_h_omni": {"pixel_values": flat(1), "image_grid_hw": constant(torch.tensor([[4, 4]] * BATCH))},
    "llava": {"image_sizes": None},
    "musicflamingo": {"input_ids": text_with(128, "audio_token_id"), "input_features": channels_first},
    "neomme": {"pixel_values": flat(1)},
    "dots3_note": {"input_features": floats(16, 64), "chunk_sample_lengths": constant(torch.tensor([64 * 160] * BATCH))},
    "omdet-turbo": {
        "classes_input_ids": lambda d: d.ids(2 * BATCH, 6), "classes_attention_mask": lambda d: torch.ones(2 * BATCH, 6, dtype=torch.long),
        "tasks_input_ids": ids(6), "tasks_attention_mask": ones(6), "classes_structure": constant(torch.tensor([2] * BATCH)),
    },
    "gemma4_audio": {"input_features": floats(64, 32)},
    "jev": {
        "input_ids": lambda d: d.ids(1, LENGTH), "marks": constant(torch.tensor([[4, 8, 12]])),
        "num_options": constant(torch.tensor([[2, 3, 4]])), "question_type_ids": constant(torch.tensor([[0, 1, 2]])),
    },
    "neucodec": {"input_features": floats(24, 160), "input_values": floats(1, 7680)},
    "xcodec2": {"input_features": floats(24, 160), "input_values": floats(1, 7680)},
    "pi0": {"input_ids": text_with(16, "image_token_id"), "pixel_values": floats(1, 3, 32, 32), "pixel_attention_mask": lambda d: torch.ones(BATCH, 1, dtype=torch.bool), "state": floats(32), "actions": floats(50, 32), "noise": floats(50, 32), "timestep": constant(torch.tensor([0.3, 0.7]))},
    "qwen3_asr": {"input_features": floats(16, 200)},
    "qwen3_asr_encoder": {"input_features": floats(16, 200)},
    "tvp": {"pixel_values": lambda d: d.floats(1, 4, 3, 64, 64), "input_ids": lambda d: d.ids(1, LENGTH)},
    **{name: {"pixel_values": floats(3, 64, 64)} for name in ("pp_ocrv6_medium_det", "pp_ocrv6_small_det", "uvdoc")},
    "evolla": {
        "protein_input_ids": lambda d: d.ids(BATCH, 8, high=30), "protein_attention_mask": ones(8),
    },
    "vibevoice": {"input_values": floats(1, 64), "padding_mask": lambda d: torch.ones(BATCH, 64, dtype=torch.bool), "sample": constant(False)},
    "vibevoice_asr": {"input_values": floats(1, 64), "sample": constant(False)},
    "pe_audio_video": {"input_values": wave, "pixel_values_videos": video},
    "perception_lm": {"pixel_values": floats(1, 3, 32, 32)},
    "muse_spark": {"pixel_values": flat(2), "input_values": floats(3840)},
    "voxtral_realtime": {"input_ids": ids(8), "input_features": channels_first},
    "muse_glimmer_assistant": {"noise_embeds": floats(4, 32), "context_hidden_states": floats(6, 160)},
    "muse_spark_audio": {"input_values": floats(3840)},
    "musicgen": {"decoder_input_ids": lambda d: d.ids(4 * BATCH, 7, high=30)},
    "musicgen_melody": {"decoder_input_ids": lambda d: d.ids(4 * BATCH, 7, high=30), "input_features": floats(7, 12)},
    "paddleocr_vl": {"pixel_values": lambda d: d.floats(32, 3, 8, 8)},
    "pp_ocrv5_mobile_rec": {"pixel_values": floats(3, 96, 320)},
    "pp_ocrv5_server_rec": {"pixel_values": floats(3, 48, 64)},
    "qwen2_audio": {
        "input_ids": lambda d: torch.cat([torch.full((BATCH, 1), d.size("audio_token_index")), d.ids(BATCH, LENGTH)], 1)
    },
    "xlstm": {"use_cache": constant(False)},
    "oneformer": {"task_inputs": ids(77)},
    "pe_audio_video_encoder": {"input_values": wave, "pixel_values_videos": video},
    "pix2struct": {"flattened_patches": lambda d: torch.cat([torch.arange(1, 33).reshape(1, 16, 2).repeat(BATCH, 1, 1).float(), d.floats(BATCH, 16, 32)], -1)},
    "pop2piano": {"input_features": floats(LENGTH, 32), "input_ids": None},
    "seggpt": {"pixel_values": floats(3, 32, 32), "prompt_pixel_values": floats(3, 32, 32), "prompt_masks": floats(3, 32, 32)},
    "speech-encoder-decoder": {"input_features": None, "input_ids": None},
    "timesfm": {"past_values": floats(64)},
    "timesfm2_5": {"past_values": floats(64)},
    "idefics": {"pixel_values": several_images, "image_attention_mask": ones(LENGTH, 2)},
    "xcodec": {"input_values": wave},
    "video_llama_3": {"image_merge_sizes": constant(torch.tensor([1] * BATCH))},
    "video_llama_3_vision": {"merge_sizes": constant(torch.tensor([1] * BATCH))},
    "videomt": {"pixel_values_videos": video},
    "vitmatte": {"pixel_values": floats(4, 32, 32)},
    **{name: {"input_features": channels_first} for name in ("audioflamingo3", "clvp", "glmasr", "glmasr_encoder",   "voxtral_realtime_encoder")},
}  # fmt: skip
# Model types whose batch norms take the statistics of the inputs.
NORMALIZED = ("efficientnet", "mobilevit", "mobilevitv2")
# Model types whose codebooks take entries from the inputs.
FILLED = ("encodec", "xcodec")
# model type -> the Auto class that shows most of it, where the general order of heads is wrong, or the model's own class
AUTO: dict[str, str] = {
    "detr": "AutoModelForObjectDetection",
    "evolla": "EvollaForProteinText2Text",  # the Auto classes know it by another type than its config has
    "flava": "AutoModel",
    "sapiens2": "AutoModel",
    "musicgen": "AutoModelForTextToWaveform",
    "musicgen_melody": "AutoModelForTextToWaveform",
}
