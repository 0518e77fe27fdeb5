"""The engine that needs no DeepSpeed, on one rank."""

from __future__ import annotations

import math

import pytest
import torch
from support.families import adapted_model, batch_of
from support.state import changed, leaves

from colm_scale.config import RunConfig, TrainConfig
from colm_scale.config.rules import refusal
from colm_scale.distributed.group import Group
from colm_scale.engines.base import trainable
from colm_scale.engines.choose import START, Start
from colm_scale.engines.single_and_ddp import TorchEngine
from colm_scale.engines.tensors import collect, restore
from colm_scale.modeling.losses import ExampleLoss

GROUP = Group(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
OPTIMIZERS = ("adamw", "sgd", "lion", "adafactor", "muon")


def engine_of(**options) -> TorchEngine:
    return TorchEngine(ExampleLoss(adapted_model("llama")), TrainConfig(**options), GROUP)


def trained(engine: TorchEngine, steps: int) -> None:
    for _ in range(steps):
        engine.backward(engine.forward(batch_of([6, 4])).sum())
        engine.step(1e-2)


def weights(engine: TorchEngine) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainable(engine.module).values()]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, left, right))


def test_a_gradient_that_is_not_finite_updates_nothing():
    engine, batch = engine_of(), batch_of([6, 4])
    before = weights(engine)
    engine.backward(engine.forward(batch).sum() * math.inf)
    update = engine.step(1e-2)
    assert not math.isfinite(update.norm)
    assert not update.applied
    assert equal(weights(engine), before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_is_undone_by_its_snapshot_bit_for_bit(optimizer):
    engine, batch = engine_of(optimizer=optimizer), batch_of([6, 4])
    trajectories = []
    for _ in range(2):
        engine.backward(engine.forward(batch).sum())
        engine.step(1e-2)
    restore, before = engine.snapshot(), weights(engine)
    for _ in range(2):
        engine.backward(engine.forward(batch).sum())
        engine.step(1e-2)
        trajectories.append(weights(engine))
        assert not equal(trajectories[-1], before)
        restore()
        assert equal(weights(engine), before)
    assert equal(*trajectories), "the optimizer's moments and step count went back too"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("factor", [1.0, math.inf], ids=["applied", "overflowing"])
def test_a_first_step_that_is_undone_leaves_no_trace(optimizer, dtype, factor):
    """Nor in the loss scale and its count, which a step that overflows changes too."""
    engine, never = (engine_of(optimizer=optimizer, dtype=dtype) for _ in range(2))
    engine.forward(batch_of([6, 4]))  # looks once at how the model makes its logits
    restore = engine.snapshot()
    before = leaves(engine, "engine")
    engine.backward(engine.forward(batch_of([6, 4])).sum() * factor)
    engine.step(1e-2)
    assert changed(before, leaves(engine, "engine"))
    restore()
    assert not changed(before, leaves(engine, "engine"))
    trained(engine, 2)
    trained(never, 2)
    assert not changed(leaves(never, "engine"), leaves(engine, "engine"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_collected_is_all_that_a_run_goes_on_with(optimizer):
    whole, other = engine_of(optimizer=optimizer), engine_of(optimizer=optimizer)
    trained(whole, 2)
    collected = collect(whole, GROUP)
    restore(other, collected, GROUP)
    other.updates = whole.updates
    assert whole.updates == (2 if optimizer in ("adamw", "adafactor") else 0)
    assert {label.split("/")[0] for label in collected["optimizer"]} == set(whole.state_keys)
    assert equal(weights(other), weights(whole))
    for engine in (whole, other):
        trained(engine, 2)
    assert equal(weights(other), weights(whole))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("engine", "stage", "where"),
    [
        ("auto", None, ""),
        ("auto", 0, ""),
        ("fsdp", None, "--engine fsdp"),
        ("auto", 1, "ZeRO-1"),
        ("auto", 3, "ZeRO-3"),
    ],
)
def test_optimizers_of_whole_matrices_are_refused_where_they_are_cut(optimizer, engine, stage, where):
    file = None if stage is None else "ds.json"
    config = RunConfig(engine=engine, ds_config=file, train=TrainConfig(optimizer=optimizer))
    found = refusal(Start(config, stage or 0, ranks=2), START)
    expected = [f"--train.optimizer {optimizer}", where, "whole matrix", "single or ddp"]
    assert bool(found) == (bool(where) and optimizer in ("adafactor", "muon"))
    assert not found or all(word in found for word in expected)


def test_no_limit_clips_nothing():
    norms = []
    for limit in (0.0, 1e-3):
        engine = engine_of(max_grad_norm=limit)
        engine.backward(engine.forward(batch_of([6, 4])).sum())
        norms.append(engine.step(0.0).norm)
    assert norms[0] == norms[1] > 1e-3, "the norm is that before clipping"
