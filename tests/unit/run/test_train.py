"""The pure decisions of the trainer: how long, how fast, with which defaults."""

from __future__ import annotations

import pytest

from colm_scale.config import EvalConfig, ModelConfig, RunConfig, SelectionConfig, TrainConfig
from colm_scale.run.banner import rounding_lines
from colm_scale.run.prepare import resolve
from colm_scale.run.schedule import evaluation_period, learning_rate, total_steps
from colm_scale.sketch.zeroth_order import PERTURBATION


def rates(steps: int, **options) -> list[float]:
    config = TrainConfig(learning_rate=8.0, **options)
    return [learning_rate(config, step, steps) for step in range(1, steps + 1)]


def test_warm_up_is_linear_and_reaches_the_peak():
    assert rates(8, warmup_ratio=0.5, schedule="constant") == [2, 4, 6, 8, 8, 8, 8, 8]


def test_without_warm_up_the_first_step_has_the_peak():
    assert rates(4, warmup_ratio=0.0, schedule="linear") == [8, 6, 4, 2]


def test_cosine_falls_from_the_peak_through_its_half():
    assert rates(4, warmup_ratio=0.0, schedule="cosine") == pytest.approx([8, 6.8284271, 4, 1.1715729])


def test_no_step_trains_at_zero():
    for schedule in ("cosine", "linear", "constant"):
        for steps in (1, 2, 7, 100):
            assert min(rates(steps, schedule=schedule)) > 0


def test_an_epoch_shows_every_example_once_as_a_candidate():
    selection = SelectionConfig(candidates=64, budget=32)
    assert total_steps(RunConfig(selection=selection, train=TrainConfig(epochs=1)), 640) == 10
    assert total_steps(RunConfig(selection=selection, train=TrainConfig(epochs=1)), 641) == 11
    assert total_steps(RunConfig(selection=selection, train=TrainConfig(epochs=0.5)), 640) == 5
    assert total_steps(RunConfig(selection=selection, train=TrainConfig(steps=3)), 640) == 3


def test_a_run_is_evaluated_six_times_unless_it_is_told_how_often():
    assert [evaluation_period(EvalConfig(), steps) for steps in (80, 82, 5, 2)] == [16, 17, 1, 1]
    for steps in (5, 80, 82, 1000):
        every = evaluation_period(EvalConfig(), steps)
        assert len({0, steps, *range(every, steps, every)}) == 6
    assert [evaluation_period(EvalConfig(every=every), 80) for every in (0, 7)] == [0, 7]


def test_the_paper_s_preset_wins_over_the_options_it_decides():
    selection = SelectionConfig(preset="paper", estimator="last_layer", num_probes=7, metric="l2", weights="cluster")
    resolved = resolve(RunConfig(selection=selection)).selection
    assert (resolved.estimator, resolved.num_probes, resolved.metric) == ("zeroth_order", 1, "l1")
    assert (resolved.columns, resolved.weights, PERTURBATION) == (2560, "uniform", 1e-3)


def test_the_default_learning_rate_is_the_built_in_base_s_only_there():
    assert resolve(RunConfig()).train.learning_rate == 1e-2
    assert resolve(RunConfig(train=TrainConfig(optimizer="sgd"))).train.learning_rate == 0.5
    assert resolve(RunConfig(model=ModelConfig(name="a/b"))).train.learning_rate == 2e-4
    given = RunConfig(train=TrainConfig(learning_rate=0.5))
    assert resolve(given).train.learning_rate == 0.5


BF16 = {"train": TrainConfig(dtype="bfloat16")}
NF4 = {**BF16, "model": ModelConfig(quantize="nf4")}


@pytest.mark.parametrize(
    ("selection", "options", "told"),
    [
        ({}, {}, None),
        ({}, BF16, None),
        ({"estimator": "last_layer"}, NF4, None),
        ({"method": "stratified"}, NF4, None),
        ({}, NF4, "nf4 in bfloat16, finite differences"),
    ],
)
def test_finite_differences_that_are_rounding_are_told(selection, options, told):
    config = RunConfig(selection=SelectionConfig(**{"estimator": "zeroth_order", **selection}), **options)
    found = rounding_lines(config)
    assert found == [] if told is None else told in found[0]
