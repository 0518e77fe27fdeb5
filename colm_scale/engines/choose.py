"""The choice of a run's engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from colm_scale.config import EXPERTS, RunConfig
from colm_scale.config.rules import Rule, check
from colm_scale.distributed.group import Group
from colm_scale.engines.base import Engine
from colm_scale.engines.ds_config import NO_EXPERTS, read_ds_config, zero_stage
from colm_scale.engines.single_and_ddp import TorchEngine
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


@dataclass(frozen=True, slots=True)
class Start:
    """A run's options, its ZeRO stage (0 without DeepSpeed) and its number of ranks."""

    config: RunConfig
    stage: int
    ranks: int

    @property
    def cuts_adapters(self) -> str:
        """What cuts adapters, so that a rank has only a part of each; empty if nothing does."""
        if self.stage:
            return f"ZeRO-{self.stage} (--ds_config {self.config.ds_config})"
        return "--engine fsdp" if self.config.engine == "fsdp" else ""


_PLANNED: tuple[Rule[Start], ...] = (
    Rule(
        "--selection.candidates 65",
        lambda of: of.config.selection.method != "replay" and of.config.selection.candidates % of.ranks,
        lambda of: f"--selection.candidates is {of.config.selection.candidates}, which {of.ranks} ranks cannot share "
        f"evenly: use a multiple of {of.ranks}",
        ranks=2,
    ),
    Rule(
        "--train.optimizer muon --engine fsdp",
        lambda of: of.config.train.optimizer in NEED_WHOLE_MATRICES and of.cuts_adapters,
        lambda of: f"--train.optimizer {of.config.train.optimizer} needs each adapter's whole matrix, and under "
        f"{of.cuts_adapters} a rank has only a part: use --train.optimizer adamw, sgd or lion, or the engine single "
        "or ddp (leave --engine and --ds_config out)",
        ranks=2,
    ),
    Rule(
        f"--lora.targets '[v_proj, {EXPERTS}]' --ds_config zero3",
        lambda of: of.stage == 3 and EXPERTS in (of.config.lora.targets or ()),
        lambda of: NO_EXPERTS,
    ),
)
START: tuple[Rule[Start], ...] = (
    Rule(
        "--engine single",
        lambda of: of.config.engine == "single" and of.ranks > 1,
        lambda of: f"--engine single runs one process, but there are {of.ranks}: leave --engine out",
        ranks=2,
    ),
    Rule(
        "--engine ddp",
        lambda of: of.config.engine == "ddp" and of.ranks == 1,
        lambda of: "--engine ddp needs several processes: start it with torchrun, or leave --engine out",
    ),
    *_PLANNED,
)
"""What depends on the number of ranks and on DeepSpeed's configuration."""


def checked_ds_config(config: RunConfig, ranks: int, *, planned: bool = False) -> Json:
    """Read the configuration of DeepSpeed, and check that the run can start on this number of ranks.

    Args:
        planned: The ranks are not there yet.

    Raises:
        UserError: It cannot, or as `read_ds_config`.
    """
    ds_config = read_ds_config(config, ranks)
    check(Start(config, zero_stage(ds_config), ranks), _PLANNED if planned else START)
    return ds_config


def sharding(config: RunConfig, ds_config: Json) -> str | None:
    """Return what shards the frozen weights: "fsdp", "zero3", or None."""
    if config.engine == "fsdp":
        return "fsdp"
    return "zero3" if zero_stage(ds_config) == 3 else None


def loading_device(config: RunConfig, ds_config: Json, group: Group) -> torch.device:
    """Return where to load the model: on the meta device if it is sharded, because no rank may have room for it."""
    return META if sharding(config, ds_config) else group.device
