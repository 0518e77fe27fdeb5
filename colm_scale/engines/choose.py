"""Which engine a run gets."""

from __future__ import annotations

import torch

from colm_scale.config import RunConfig
from colm_scale.distributed.group import Group
from colm_scale.engines.base import Engine, TorchEngine
from colm_scale.errors import UserError
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.optimizers import NEED_WHOLE_MATRICES
from colm_scale.records import Json


def make_engine(config: RunConfig, ds_config: Json | None, module: ExampleLoss, group: Group) -> Engine:
    """The engine that ``--engine`` and ``--ds_config`` ask for; the module is where `loading_device` says."""
    if ds_config is not None:
        from colm_scale.engines.zero import ZeroEngine

        return ZeroEngine(module, config.train, group, ds_config)
    if config.engine == "fsdp":
        from colm_scale.engines.fsdp import FsdpEngine

        return FsdpEngine(module, config.train, config.fsdp, group)
    return TorchEngine(module, config.train, group)


def check_optimizer(config: RunConfig, ds_config: Json | None) -> None:
    """Whether the engine leaves adapters whole for an optimizer that needs them so.

    Raises:
        UserError: It cuts them, as FSDP2 does, or joins them in one row of numbers that it cuts, as ZeRO does.
    """
    stage = (ds_config or {}).get("zero_optimization", {}).get("stage", 0)
    cutting = f"ZeRO-{stage} (--ds_config {config.ds_config})" if stage else "--engine fsdp"
    if config.train.optimizer in NEED_WHOLE_MATRICES and (stage or config.engine == "fsdp"):
        raise UserError(
            f"--train.optimizer {config.train.optimizer} needs each adapter's whole matrix, of which a rank has only a "
            f"part under {cutting}: use --train.optimizer adamw, sgd or lion, or the engine single or ddp (leave "
            f"--engine and --ds_config out)"
        )


def sharding(config: RunConfig, ds_config: Json | None) -> str | None:
    """What cuts the frozen weights into shards: "fsdp", "zero3", or nothing."""
    if config.engine == "fsdp":
        return "fsdp"
    return "zero3" if (ds_config or {}).get("zero_optimization", {}).get("stage") == 3 else None


def loading_device(config: RunConfig, ds_config: Json | None, group: Group) -> torch.device:
    """Where a model is loaded: on the CPU if it is to be cut into shards, for whole it need not fit into a GPU."""
    return torch.device("cpu") if sharding(config, ds_config) else group.device
