"""The engine that needs no DeepSpeed, on one rank."""

from __future__ import annotations

import math

import torch
from support.families import adapted_model, batch_of

from colm_scale.config import TrainConfig
from colm_scale.distributed.engine import TorchEngine, trainable
from colm_scale.distributed.group import Group
from colm_scale.modeling.losses import ExampleLoss


def engine_of(**options) -> TorchEngine:
    group = Group(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
    return TorchEngine(ExampleLoss(adapted_model("llama")), TrainConfig(**options), group)


def weights(engine: TorchEngine) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainable(engine.module).values()]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, left, right))


def test_a_gradient_that_is_not_finite_updates_nothing():
    engine, batch = engine_of(), batch_of([6, 4])
    before = weights(engine)
    engine.backward(engine.forward(batch).sum() * math.inf, last=True)
    update = engine.step(1e-2)
    assert not math.isfinite(update.norm)
    assert not update.applied
    assert equal(weights(engine), before)


def test_a_step_is_undone_by_its_snapshot_bit_for_bit():
    engine, batch = engine_of(), batch_of([6, 4])
    trajectories = []
    for _ in range(2):
        engine.backward(engine.forward(batch).sum(), last=True)
        engine.step(1e-2)
    restore, before = engine.snapshot(), weights(engine)
    for _ in range(2):
        engine.backward(engine.forward(batch).sum(), last=True)
        engine.step(1e-2)
        trajectories.append(weights(engine))
        assert not equal(trajectories[-1], before)
        restore()
        assert equal(weights(engine), before)
    assert equal(*trajectories), "the optimizer's moments and step count went back too"


def test_no_limit_clips_nothing():
    norms = []
    for limit in (0.0, 1e-3):
        engine = engine_of(max_grad_norm=limit)
        engine.backward(engine.forward(batch_of([6, 4])).sum(), last=True)
        norms.append(engine.step(0.0).norm)
    assert norms[0] == norms[1] > 1e-3, "the norm is that before clipping"
