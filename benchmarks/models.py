"""Published models from their configurations, with random weights, in full or reduced to what a CPU can run.

The numbers are those of each model's config.json; nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    StableLmConfig,
)

from colm_scale.randomness import global_draws

CONFIGS: dict[str, PretrainedConfig] = {
    "Phi-2": PhiConfig(
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
        partial_rotary_factor=0.4,
        hidden_act="gelu_new",
        resid_pdrop=0.0,
    ),
    "Phi-3-mini": Phi3Config(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        sliding_window=2047,
        pad_token_id=32000,
    ),
    "StableLM-Zephyr-3B": StableLmConfig(
        vocab_size=50304,
        hidden_size=2560,
        intermediate_size=6912,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        partial_rotary_factor=0.25,
    ),
    "Llama-3-8B": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    ),
}
_HEAD = 32
"""Head dimension of a reduced model."""


def cut_down(config: PretrainedConfig, by: int, blocks: int) -> PretrainedConfig:
    """The same architecture with widths and vocabulary divided by ``by``, and fewer blocks."""
    cut = type(config)(**config.to_dict())
    grouped = config.num_attention_heads // config.num_key_value_heads
    cut.hidden_size = config.hidden_size // by // (_HEAD * grouped) * _HEAD * grouped
    cut.intermediate_size = config.intermediate_size // by
    cut.vocab_size = config.vocab_size // by
    cut.num_attention_heads = cut.hidden_size // _HEAD
    cut.num_key_value_heads = cut.num_attention_heads // grouped
    cut.num_hidden_layers = blocks
    cut.pad_token_id = cut.bos_token_id = cut.eos_token_id = None
    if hasattr(cut, "head_dim"):
        cut.head_dim = _HEAD
    return cut


def write(config: PretrainedConfig, folder: Path, tokenizer) -> None:
    """Write a model of this configuration with reproducible random weights; returns a folder that a run can load."""
    with global_draws(torch.device("cpu"), 0, "published model"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
