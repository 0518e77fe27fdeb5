"""Which engine a run gets."""

from __future__ import annotations

import torch

from colm_scale.config import RunConfig
from colm_scale.distributed.engine import Engine, TorchEngine
from colm_scale.distributed.group import Group
from colm_scale.modeling.losses import ExampleLoss


def make_engine(config: RunConfig, ds_config: dict | None, module: ExampleLoss, group: Group) -> Engine:
    """The engine that ``--engine`` and ``--ds_config`` ask for; the module is where `loading_device` says."""
    if ds_config is not None:
        from colm_scale.distributed.zero import ZeroEngine

        return ZeroEngine(module, config.train, group, ds_config)
    if config.engine == "fsdp":
        from colm_scale.distributed.fsdp import FsdpEngine

        return FsdpEngine(module, config.train, config.fsdp, group)
    return TorchEngine(module, config.train, group)


def sharding(config: RunConfig, ds_config: dict | None) -> str | None:
    """What cuts the frozen weights into shards: "fsdp", "zero3", or nothing."""
    if config.engine == "fsdp":
        return "fsdp"
    return "zero3" if (ds_config or {}).get("zero_optimization", {}).get("stage") == 3 else None


def loading_device(config: RunConfig, ds_config: dict | None, group: Group) -> torch.device:
    """Where a model is loaded: on the CPU if it is to be cut into shards, for whole it need not fit into a GPU."""
    return torch.device("cpu") if sharding(config, ds_config) else group.device
