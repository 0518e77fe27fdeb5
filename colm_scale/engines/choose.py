"""The choice of a run's engine."""

from __future__ import annotations

import torch

from colm_scale.config import RunConfig
from colm_scale.distributed.group import Group
from colm_scale.engines.base import Engine
from colm_scale.engines.ds_config import zero_stage
from colm_scale.engines.single_and_ddp import TorchEngine
from colm_scale.errors import UserError
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.optimizers import NEED_WHOLE_MATRICES
from colm_scale.modeling.weights import META, WHOLE, Weights
from colm_scale.records import Json


def make_engine(
    config: RunConfig, ds_config: Json, module: ExampleLoss, group: Group, weights: Weights = WHOLE
) -> Engine:
    """Make the engine of ``--engine`` and ``--ds_config``, for a module on the device of `loading_device`.

    Args:
        weights: Of the base model. An engine that shards them fills one part after the other.
    """
    if ds_config:
        from colm_scale.engines.zero import ZeroEngine

        return ZeroEngine(module, config.train, group, ds_config, weights)
    if config.engine == "fsdp":
        from colm_scale.engines.fsdp import FsdpEngine, mesh_of

        return FsdpEngine(module, config.train, config.fsdp, group, mesh_of(group), weights)
    return TorchEngine(module, config.train, group)


def check_optimizer(config: RunConfig, ds_config: Json) -> None:
    """Check that the engine leaves adapters whole for an optimizer that needs whole matrices.

    Raises:
        UserError: The engine shards them, as FSDP2 and ZeRO do.
    """
    stage = zero_stage(ds_config)
    sharded_by = f"ZeRO-{stage} (--ds_config {config.ds_config})" if stage else "--engine fsdp"
    if config.train.optimizer in NEED_WHOLE_MATRICES and (stage or config.engine == "fsdp"):
        raise UserError(
            f"--train.optimizer {config.train.optimizer} needs each adapter's whole matrix, and under {sharded_by} a "
            f"rank has only a part: use --train.optimizer adamw, sgd or lion, or the engine single or ddp (leave "
            f"--engine and --ds_config out)"
        )


def sharding(config: RunConfig, ds_config: Json) -> str | None:
    """Return what shards the frozen weights: "fsdp", "zero3", or None."""
    if config.engine == "fsdp":
        return "fsdp"
    return "zero3" if zero_stage(ds_config) == 3 else None


def loading_device(config: RunConfig, ds_config: Json, group: Group) -> torch.device:
    """Return where to load the model: on the meta device if it is sharded, because no rank may have room for it."""
    return META if sharding(config, ds_config) else group.device
