"""Support of a model for packed micro-batches and for flash attention, tried out on a few of its blocks before it is
sharded.

A trial makes what training makes: a forward and a backward through every kind of block, on the run's device, in the
model's types and shapes. So a kernel that a version of a library lacks, or calls otherwise, is found here.
"""

from __future__ import annotations

import copy
import textwrap
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from colm_scale.errors import UserError
from colm_scale.modeling.attention import PACKED, PACKED_SDPA
from colm_scale.modeling.causal import hooked, moved
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import few_blocks, kinds_of_blocks, trial_batch, without_dropout
from colm_scale.records import Batch

_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}
"""Largest relative difference of a loss between attention kernels."""
_OF_SHAPE = 16
"""Rounding of a loss in float32 when shapes inside the blocks change, in units in the last place."""
_WINDOW = 3
"""Sliding window in a trial, in tokens: shorter than the longest row, for a model may give it to its masks alone."""
_OF_GRADIENT = 3
"""Rounding of a gradient, as a multiple of that of the loss: it goes through the blocks twice."""


class Tried(NamedTuple):
    """Result of a trial.

    Attributes:
        padded_because: Why micro-batches are padded; empty if they are packed.
        sdpa_because: Why attention runs in sdpa, though there is a flash kernel; empty if it does not.
    """

    padded_because: str = ""
    sdpa_because: str = ""


def use_packing(model: PreTrainedModel, wanted: str, device: torch.device) -> Tried:
    """Switch a model to packed micro-batches if its blocks compute the same with them and keep examples apart.

    Args:
        model: A causal language model without adapters, on any device.
        wanted: ``--train.packing``: auto, on or off.
        device: The device it will run on.

    Raises:
        UserError: ``wanted`` is on, and they cannot be packed.
    """
    if wanted == "off":
        return Tried("--train.packing off")
    tried = _try_packing(model, device)
    if tried.padded_because and wanted == "on":
        raise UserError(f"--train.packing on: {tried.padded_because}; leave it out, or use --train.packing off")
    return tried


def check_flash(model: PreTrainedModel, wanted: str, device: torch.device) -> str:
    """Try a model that was loaded with flash-attn, and switch it to sdpa if that fails.

    Args:
        wanted: ``--model.attention``.

    Returns:
        Why it runs in sdpa; empty if it runs as it was loaded.

    Raises:
        UserError: Flash attention fails, and ``wanted`` names it.
    """
    chosen = model.config._attn_implementation
    if chosen is None or "flash" not in chosen:
        return ""
    few = _few(model, device)
    try:
        for rows in (_rows(), _rows()[:1]):  # without padding, transformers calls another kernel
            _losses_and_gradient(few, trial_batch(rows, device))
    except Exception as error:  # kernels fail in many ways
        failed = f"{type(model).__name__} fails with {chosen} ({_said(error)})"
        if wanted != "auto":
            way_out = "use sdpa, or another version of flash-attn"
            raise UserError(f"--model.attention {wanted}: {failed}: {way_out}") from None
        model.config._attn_implementation = "sdpa"
        return f"{failed}; another version of flash-attn may not"
    return ""


def _try_packing(model: PreTrainedModel, device: torch.device) -> Tried:
    name, chosen = type(model).__name__, model.config._attn_implementation
    if chosen != "sdpa":
        return Tried(f"attention {chosen} takes no packed rows")
    if getattr(model.config.get_text_config(), "attention_chunk_size", None):
        return Tried(f"{name} attends within chunks, which packed rows do not keep apart")
    few = _few(model, device)
    _shorten_windows(few)
    padded = _losses_and_gradient(few, trial_batch(_rows(), device))
    reasons = []
    for attention in (PACKED, PACKED_SDPA):
        few.causal_model.config._attn_implementation = attention
        reasons.append(_differs(few, padded, device))
        if not reasons[-1]:
            model.config._attn_implementation = attention
            flash = f"{reasons[0]}; another version of torch may not" if len(reasons) > 1 else ""
            return Tried(sdpa_because=flash)
    return Tried(reasons[-1])


def _differs(few: ExampleLoss, padded: tuple[Tensor, Tensor], device: torch.device) -> str:
    """How packed rows differ from ``padded`` ones; empty if they do not."""
    name, dtype = type(few.causal_model).__name__, few.causal_model.dtype
    try:
        losses, gradient = _losses_and_gradient(few, trial_batch(_rows(), device, packed=True))
        apart = _see_nothing_of_others(few, losses, device)
    except Exception as error:  # models and kernels fail in many ways on rows they do not support
        return f"{name} does not take packed rows ({_said(error)})"
    if not apart:
        return f"in packed rows, the examples of {name} see each other"
    distance, most = (gradient - padded[1]).norm(), _OF_GRADIENT * _ROUNDING[dtype] * padded[1].norm()
    if not torch.allclose(losses, padded[0], rtol=_ROUNDING[dtype]) or not distance <= most:
        return f"{name} computes something else with packed rows"
    return ""


def _see_nothing_of_others(few: ExampleLoss, losses: Tensor, device: torch.device) -> bool:
    """Whether the losses of packed examples do not change with the example before them, in exact arithmetic.

    Other neighbours may send another number of tokens to an expert, whose product then rounds otherwise. In half
    precision that cannot be told from a faint sight of them, so float32 decides.
    """
    beside_others, _ = _losses_and_gradient(few, trial_batch(_rows(first=20), device, packed=True))
    if torch.equal(losses[1:], beside_others[1:]):
        return True
    precise = copy.deepcopy(few).float()
    precise.causal_model.config._attn_implementation = PACKED_SDPA
    one, other = (
        _losses_and_gradient(precise, trial_batch(_rows(first), device, packed=True))[0][1:] for first in (2, 20)
    )
    return torch.allclose(one, other, rtol=_OF_SHAPE * torch.finfo(torch.float32).eps, atol=0)


def _few(model: PreTrainedModel, device: torch.device) -> ExampleLoss:
    return ExampleLoss(moved(few_blocks(model, kinds_of_blocks(model), device), device))


def _shorten_windows(few: ExampleLoss) -> None:
    """Let the sliding windows of a model for trials, if it has any, end within the trial's rows."""
    owners: list[Any] = [few.causal_model.config.get_text_config(), *few.modules()]
    for owner in owners:
        if getattr(owner, "sliding_window", None):
            owner.sliding_window = min(owner.sliding_window, _WINDOW)


def _rows(first: int = 2) -> list[Tensor]:
    return [torch.arange(start, start + length) for start, length in ((first, 7), (2, 3), (2, 5))]


def _losses_and_gradient(few: ExampleLoss, batch: Batch) -> tuple[Tensor, Tensor]:
    """Losses ``[B]``, and the gradient of their sum for all tokens' embeddings, float32 ``[sum of lengths, c]``."""
    embedded: list[Tensor] = []

    def keep(_layer: nn.Module, _args: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    layer = few.causal_model.get_input_embeddings()
    with torch.enable_grad(), without_dropout(few), hooked(layer.register_forward_hook(keep)):
        losses = few(batch)
        (gradient,) = torch.autograd.grad(losses.sum(), embedded[-1:])
    tokens = gradient[batch.attention_mask.bool()] if batch.attention_mask is not None else gradient[0]
    return losses.detach(), tokens.float()


def _said(error: Exception) -> str:
    """An error's type and the start of its message."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
