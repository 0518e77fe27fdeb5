"""Support of a model for packed micro-batches, tried out on its first blocks before it is sharded."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from colm_scale.errors import UserError
from colm_scale.modeling.attention import PACKED, PACKED_SDPA
from colm_scale.modeling.causal import moved
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import first_blocks, trial_batch, without_dropout

_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}
"""Largest relative difference of a loss between attention kernels."""


def use_packing(model: PreTrainedModel, wanted: str, device: torch.device) -> str:
    """Switch a model to packed micro-batches if its first blocks compute the same and keep examples apart.

    Args:
        model: A causal language model without adapters, on any device.
        wanted: ``--train.packing``: auto, on or off.
        device: The device it will run on.

    Returns:
        Why its micro-batches are padded; empty if they are packed.

    Raises:
        UserError: ``wanted`` is on, and they cannot be packed.
    """
    if wanted == "off":
        return "--train.packing off"
    reason = _try(model, device)
    if reason and wanted == "on":
        raise UserError(f"--train.packing on: {reason}; leave it out, or use --train.packing off")
    return reason


def _try(model: PreTrainedModel, device: torch.device) -> str:
    name, chosen = type(model).__name__, model.config._attn_implementation
    if chosen != "sdpa":
        return f"attention {chosen} takes no packed rows"
    if getattr(model.config.get_text_config(), "attention_chunk_size", None):
        return f"{name} attends within chunks, which packed rows do not keep apart"
    reason = ""
    few = ExampleLoss(moved(first_blocks(model, 2), device))
    config = few.causal_model.config
    rows = [torch.arange(2, 2 + length) for length in (7, 3, 5)]
    others = [torch.arange(20, 27), *rows[1:]]
    with torch.no_grad(), without_dropout(few):
        padded = few(trial_batch(rows, device))
        for attention in (PACKED, PACKED_SDPA):
            config._attn_implementation = attention
            try:
                packed, beside_others = (few(trial_batch(these, device, packed=True)) for these in (rows, others))
            except Exception as error:  # models fail in many ways on rows they do not support
                reason = f"{name} does not take packed rows ({type(error).__name__})"
                continue
            if not torch.equal(packed[1:], beside_others[1:]):
                reason = f"in packed rows, the examples of {name} see each other"
            elif not torch.allclose(packed, padded, rtol=_ROUNDING[model.dtype]):
                reason = f"{name} computes something else with packed rows"
            else:
                model.config._attn_implementation = attention
                return ""
    return reason
