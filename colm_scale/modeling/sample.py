"""A sample of a model: one block in its full width with random weights, to find out by trying what the whole is like.

For a model that cannot be tried itself: it has adapters already, or its weights are in shards or not there at all.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from colm_scale.modeling.probe import Probe, decoder_blocks
from colm_scale.randomness import global_draws

_FEW_TOKENS = 128
"""Vocabulary of a sample: of no account for its blocks."""


def sample_of(config: PretrainedConfig) -> PreTrainedModel:
    """One block and next to no vocabulary, frozen, in float32 on the CPU; the same numbers every time.

    Args:
        config: Of the whole model.
    """
    with global_draws(torch.device("cpu"), 0, "sample"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(_shortened(config), dtype=torch.float32)
    return model.requires_grad_(False)


def sample_of_model(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """The same of a model that is there, with the attention that is named."""
    config = _shortened(model.config)
    config._attn_implementation = attention
    with global_draws(torch.device("cpu"), 0, "sample"):
        sample = type(model)(config)  # ``from_config`` cuts weights into shards while a trainer runs under ZeRO-3
    in_float32: PreTrainedModel = sample.float()
    return in_float32.requires_grad_(False)


def in_last_block(model: nn.Module, found: Probe) -> Probe:
    """The probe of a sample's only block, in the last block of the whole model."""
    prefix, blocks = decoder_blocks(model)
    name = f"{prefix}.{len(blocks) - 1}"
    return Probe(name, name + found.layer.removeprefix(found.block), found.rows)


def _shortened(of: PretrainedConfig) -> PretrainedConfig:
    config = copy.deepcopy(of)
    config.num_hidden_layers, config.vocab_size = 1, _FEW_TOKENS
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    return config
