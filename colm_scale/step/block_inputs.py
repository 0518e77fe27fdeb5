"""Forward reuse in a run: whether block inputs are held, and for which blocks."""

from __future__ import annotations

import torch

from colm_scale.config import RunConfig
from colm_scale.distributed.group import Group
from colm_scale.modeling.forward_reuse import BlockInputs, HeldBlockInputs, dropout_of
from colm_scale.modeling.probe import decoder_blocks
from colm_scale.sketch.precision import FLOAT32_BLOCKS
from colm_scale.sketch.tap import Tap

AUTO_SHARE = 0.1
"""Largest share of a GPU's memory that ``--train.forward_reuse auto`` fills with block inputs."""


def blocks_alike(config: RunConfig, tap: Tap) -> int:
    """Count the first blocks that run in the same way in the sketch and in training."""
    blocks = list(decoder_blocks(tap.model.causal_model)[1])
    alike = blocks.index(tap.block)
    if config.selection.estimator == "zeroth_order":
        alike = min(alike, max(0, len(blocks) - FLOAT32_BLOCKS))
    return alike


def forward_reuse_excluded(config: RunConfig, tap: Tap | None) -> str:
    """Say why forward reuse is impossible for these options and this model; empty if it is possible."""
    if tap is None or config.forward_reuse_excluded:
        return config.forward_reuse_excluded
    if where := dropout_of(tap.model):
        return f"it needs a model without dropout, and this one has dropout in {where}"
    if not blocks_alike(config, tap):
        return "every block of this model runs otherwise in the sketch than in training"
    return ""


def forward_reuse_store(config: RunConfig, tap: Tap | None) -> str:
    """Return the memory in which a run holds block inputs, ``device`` or ``cpu``; empty if it holds none."""
    asked = config.train.forward_reuse
    if asked == "off" or forward_reuse_excluded(config, tap):
        return ""
    return "device" if asked == "auto" else asked


def make_block_inputs(config: RunConfig, tap: Tap | None, group: Group) -> BlockInputs:
    """Make the holder of block inputs. All ranks call it together.

    Raises:
        UserError: Forward reuse is asked for, and impossible.
    """
    train, store = config.train, forward_reuse_store(config, tap)
    if not store or tap is None:
        excluded = forward_reuse_excluded(config, tap)
        config.require_forward_reuse(excluded)
        wanted = train.forward_reuse == "auto" and train.activation_checkpointing
        return BlockInputs(excluded if wanted else "")
    most = train.forward_reuse_gib * 2**30
    if train.forward_reuse == "auto" and group.device.type == "cuda":
        most = min(most, AUTO_SHARE * torch.cuda.get_device_properties(group.device).total_memory)
        # The same on every rank, because all plan who holds what.
        least = group.all_reduce(torch.tensor([-most], device=group.device), "control", largest=True)
        most = -float(least)
    return HeldBlockInputs(tap.model, blocks_alike(config, tap), store, most)
