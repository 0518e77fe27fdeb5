"""The pure decisions of the trainer: how long, how fast, with which defaults."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from colm_scale.config import CheckpointConfig, EvalConfig, ModelConfig, RunConfig, SelectionConfig, TrainConfig
from colm_scale.run import train
from colm_scale.run.banner import rounding_lines
from colm_scale.run.prepare import resolve
from colm_scale.run.reports import Reports
from colm_scale.run.schedule import evaluation_period, learning_rate, total_steps
from colm_scale.run.session import Session
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
    assert (resolved.ranking, resolved.columns, resolved.weights) == ("facility", 2560, "uniform")
    assert PERTURBATION == 1e-3


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


def stopped_in(step: int, last: int = 6, *, every: int = 50, state: dict | None = None) -> tuple[list, bool, dict]:
    """Evaluate every second step and stop in a step (0: never); returns what happens, whether it ended, and the state
    that the last checkpoint holds. Or continue from such a state, after that step."""
    happened, saved = [], {}
    session = Session(SimpleNamespace(module=None), Mock(evaluates=False), Reports(), group=None)
    evaluate, done = session.evaluate, step if state else 0
    session.evaluate = lambda number, whole: (
        happened.append(("evaluate", number, whole)),
        evaluate(number, whole=whole),
    )
    session.finish = lambda steps: happened.append(("finish", steps))
    session.load(state) if state else None
    watch = SimpleNamespace(stop_requested=False, begin=lambda number: None, enter=lambda phase: None)

    def make(number: int, rate: float) -> tuple[None, None]:
        watch.stop_requested = number == step and not state
        return None, None

    def save(number: int) -> None:
        happened.append(("save", number))
        saved.update(session.state())

    config = RunConfig(
        eval=EvalConfig(every=2), checkpoint=CheckpointConfig(every=every), train=TrainConfig(steps=last)
    )
    make.refresh_sources = lambda number: None
    group = SimpleNamespace(any=bool)
    writer = SimpleNamespace(failed=False, saved=list)
    run = SimpleNamespace(config=resolve(config), watch=watch, steps=last, step=make, group=group, writer=writer)
    ended = train._run_steps(run, session, SimpleNamespace(save=save, wait=lambda: None), done)
    return happened, ended, saved


def test_a_run_that_is_to_stop_saves_first_and_the_resumed_one_evaluates():
    happened, ended, state = stopped_in(4)
    assert happened == [("evaluate", 0, True), ("evaluate", 2, False), ("save", 4)]
    assert not ended
    happened, ended, _ = stopped_in(4, state=state)
    assert happened == [("evaluate", 4, False), ("evaluate", 6, True), ("save", 6), ("finish", 6)]
    assert ended
    _, _, state = stopped_in(3)
    assert stopped_in(3, state=state)[0][0] == ("evaluate", 4, False)


def test_a_run_that_is_to_stop_in_its_last_step_saves_if_it_can():
    happened, ended, state = stopped_in(6)
    assert (happened[-1], ended) == (("save", 6), False)
    assert stopped_in(6, state=state)[:2] == ([("evaluate", 6, True), ("finish", 6)], True)
    assert stopped_in(6, every=0)[0][-2:] == [("evaluate", 6, True), ("finish", 6)]
