"""The bare floor of a step: the time any implementation needs for its tokens (docs/method.md, Report)."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from colm_scale.distributed.group import Group
from colm_scale.engines.base import Engine
from colm_scale.modeling.probe import without_dropout
from colm_scale.profiling.memory import free_cached
from colm_scale.randomness import global_draws
from colm_scale.records import Batch, MicroBatch


@dataclass(frozen=True, slots=True)
class Work:
    """The batches of a step on this rank, for the floor to run again."""

    sketched: list[Batch]
    trained: list[MicroBatch]


def bare_floor_seconds(
    work: Work, engine: Engine, group: Group, seed: int, sketch: Callable[[Batch], object] | None = None
) -> float:
    """Measure the bare floor on the slowest rank, in seconds. All ranks call it together.

    Runs one forward of the sketched candidates, then forward, backward and optimizer of the coreset, without hooks.
    Adapters and optimizer are restored.

    Args:
        seed: Seed of the run, for dropout.
        sketch: Replaces the bare forward of a sketched micro-batch, for the floor of an estimator.
    """
    restore = engine.snapshot()
    group.barrier()
    started = _now(group.device)
    with nullcontext() if sketch else torch.no_grad(), without_dropout(engine.module):
        for batch in work.sketched:
            (sketch or engine.module)(batch)
    with global_draws(group.device, seed, "floor"):
        for number, micro_batch in enumerate(work.trained, 1):
            with engine.micro_batch(last=number == len(work.trained)):
                losses = engine.forward(micro_batch.batch)
                engine.backward((losses * micro_batch.shares).sum())
    engine.step(0.0)
    seconds = torch.full((1,), _now(group.device) - started, dtype=torch.float64, device=group.device)
    restore()
    free_cached(group.device)
    slowest = group.all_reduce(seconds, "floor", largest=True)
    group.take_traffic()
    return float(slowest)


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
    return time.perf_counter()
