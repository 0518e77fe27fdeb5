"""Whether a model takes packed micro-batches: tried on its first blocks, before it is sharded."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from colm_scale.data.batching import make_batch
from colm_scale.errors import UserError
from colm_scale.modeling.attention import PACKED, PACKED_SDPA
from colm_scale.modeling.causal import moved
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import first_blocks, without_dropout
from colm_scale.records import Batch

_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}
"""Largest relative difference of the loss by another attention kernel."""


def use_packing(model: PreTrainedModel, wanted: str, device: torch.device) -> str | None:
    """Let a model take packed micro-batches, if its first blocks compute the same with them and keep examples apart.

    Args:
        model: A causal language model without adapters, anywhere.
        wanted: ``--train.packing``: auto, on or off.
        device: Where it will run.

    Returns:
        Why its micro-batches are padded; None if they are packed.

    Raises:
        UserError: They cannot be packed, but are to be.
    """
    if wanted == "off":
        return "--train.packing off"
    reason = _try(model, device)
    if reason is not None and wanted == "on":
        raise UserError(f"--train.packing on: {reason}; leave it out, or give --train.packing off")
    return reason


def _try(model: PreTrainedModel, device: torch.device) -> str | None:
    name, chosen = type(model).__name__, model.config._attn_implementation
    if chosen != "sdpa":
        return f"attention {chosen} takes no packed rows"
    if getattr(model.config.get_text_config(), "attention_chunk_size", None):
        return f"{name} attends within chunks, which packed rows do not keep apart"
    reason = None
    few = ExampleLoss(moved(first_blocks(model, 2), device))
    config = few.causal_model.config
    rows = [torch.arange(2, 2 + length) for length in (7, 3, 5)]
    others = [torch.arange(20, 27), *rows[1:]]
    with torch.no_grad(), without_dropout(few):
        padded = few(_batch(rows, device, packed=False))
        for attention in (PACKED, PACKED_SDPA):
            config._attn_implementation = attention
            try:
                packed, beside_others = (few(_batch(these, device, packed=True)) for these in (rows, others))
            except Exception as error:  # whatever a model does with what it does not expect
                reason = f"{name} does not take packed rows ({type(error).__name__})"
                continue
            if not torch.equal(packed[1:], beside_others[1:]):
                reason = f"in packed rows, the examples of {name} see each other"
            elif not torch.allclose(packed, padded, rtol=_ROUNDING[model.dtype]):
                reason = f"{name} computes something else with packed rows"
            else:
                model.config._attn_implementation = attention
                return None
    return reason


def _batch(rows: list[Tensor], device: torch.device, *, packed: bool) -> Batch:
    marks = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    return make_batch(rows, marks, torch.arange(len(rows)), 0, device, packed=packed)
