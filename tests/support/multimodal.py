"""Tiny models that see or hear, with random weights: the text part of `families`, and small towers beside it."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PretrainedConfig

_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 8,
    "out_hidden_size": 32,
}
_SPLIT_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}}
"""Positions in time, height and width."""
_QWEN_TOKENS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": [1, 1, 0],
        "partial_rotary_factor": 0.5,
    },
}

_PARTS: dict[str, tuple[dict, dict]] = {
    "gemma3": (
        {"query_pre_attn_scalar": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        {
            "vision_config": {**_TOWER, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "image_token_index": 90,
        },
    ),
    "mistral3": (
        {"model_type": "mistral", "sliding_window": None},
        {"vision_config": {**_TOWER, "model_type": "pixtral", "head_dim": 8}, "image_token_index": 90},
    ),
    "llama4": (
        {
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 32,
            "pad_token_id": 0,
        },
        {
            "vision_config": {
                **_TOWER,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            },
            "image_token_index": 90,
        },
    ),
    "qwen2_5_vl": (
        _SPLIT_ROPE,
        {"vision_config": {**_QWEN_TOWER, "fullatt_block_indexes": [1]}, **_QWEN_TOKENS},
    ),
    "qwen3_vl": (
        _SPLIT_ROPE,
        {
            "vision_config": {**_QWEN_TOWER, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            **_QWEN_TOKENS,
        },
    ),
    "qwen3_5": (
        {**_LINEAR, "layer_types": ["linear_attention", "full_attention"]},
        {"vision_config": {**_QWEN_TOWER, "num_position_embeddings": 16}, **_QWEN_TOKENS},
    ),
    "idefics3": (
        {"model_type": "llama"},
        {"vision_config": _TOWER, "image_token_id": 90, "scale_factor": 1},
    ),
    "qwen2_audio": (
        {"model_type": "qwen2"},
        {
            "audio_config": {
                "model_type": "qwen2_audio_encoder",
                "d_model": 16,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 24,
                "num_mel_bins": 8,
            },
            "audio_token_index": 90,
        },
    ),
}
EVERY = tuple(_PARTS)
_BROKEN = {"5.24.0": ("llama4",)}
"""By version of transformers, the families whose own class fails on every call, with or without text alone."""
FAMILIES = tuple(family for family in EVERY[:-1] if family not in _BROKEN.get(transformers.__version__, ()))
"""Those that run on text without their towers."""
NOT_LOADED = {
    **dict.fromkeys(("gemma3", "mistral3"), ("vision_tower", "multi_modal_projector")),
    **dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "qwen3_5"), ("visual",)),
    "llama4": ("vision_model", "multi_modal_projector"),
    "idefics3": ("vision_model", "connector"),
}
"""The parts that text never runs."""


def config_of(family: str, **text: Any) -> PretrainedConfig:
    """A configuration with these options of its text part."""
    own, parts = _PARTS[family]
    if "layer_types" in own:
        own = {**own, "layer_types": own["layer_types"] * (text["num_hidden_layers"] // 2)}
    return transformers.AutoConfig.for_model(family, text_config={"head_dim": 8, **text, **own}, **parts)
