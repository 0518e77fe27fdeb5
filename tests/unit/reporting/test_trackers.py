"""TensorBoard for real; the others, which want servers or accounts, with fakes of the packages that are called."""

from __future__ import annotations

import json
import math
import sys
from types import ModuleType, SimpleNamespace

import accelerate.tracking
import pytest
import torch
from support.runs import SIZES, SOURCES, evaluation, report
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from colm_scale.config import RunConfig, TrackConfig
from colm_scale.errors import UserError
from colm_scale.randomness import generator
from colm_scale.records import StepReport
from colm_scale.reporting.trackers import Trackers, check_trackers, evaluation_numbers, step_numbers

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def step(number: int) -> StepReport:
    return report(number, SIZES, 2, ("nvml", "allocator"), 1.0, generator(number, "trackers test"))


def following(folder, *names: str, done: int = 0, said: list | None = None, **options) -> Trackers:
    """Trackers that have begun."""
    config = RunConfig(track=TrackConfig(to=list(names), **options))
    trackers = Trackers(config, folder, (said if said is not None else []).append)
    trackers.start(done)
    return trackers


def scalars(folder, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True).Reload()
    return [(event.step, round(event.value, 6)) for event in events.Scalars(name)]


# TensorBoard


def test_tensorboard_holds_every_step_and_evaluation(tmp_path):
    said = []
    trackers = following(tmp_path, "tensorboard", said=said)
    trackers.evaluation(evaluation(0, SOURCES))
    for number in (1, 2, 4):
        trackers.step(step(number))
    trackers.evaluation(evaluation(4, SOURCES))
    trackers.close()
    assert not said
    assert scalars(tmp_path, "train/loss") == [(1, 4.0), (2, 2.0), (4, 1.0)]
    assert scalars(tmp_path, "train/measured_over_floor") == [(2, 1.25), (4, 1.25)]
    assert scalars(tmp_path, "seconds/sketch")[0] == (1, 0.3)
    assert scalars(tmp_path, "peak_gib/nvml/rank1")[0] == (1, 2.251)
    assert scalars(tmp_path, "eval/losses/geometry") == [(0, 4.0), (4, 0.8)]
    assert scalars(tmp_path, "eval/loss_by_source") == [(0, 4.0), (4, 0.8)]


def test_tensorboard_goes_on_without_duplicates(tmp_path):
    before = following(tmp_path, "tensorboard")
    before.evaluation(evaluation(0, SOURCES))
    for number in (1, 2, 3):
        before.step(step(number))
    before.close()
    after = following(tmp_path, "tensorboard", done=2)
    for number in (3, 4):
        after.step(step(number))
    after.close()
    assert scalars(tmp_path, "train/loss") == [(1, 4.0), (2, 2.0), (3, 1.333333), (4, 1.0)]
    assert scalars(tmp_path, "eval/loss") == [(0, 3.5)]


def test_a_run_that_begins_again_begins_its_history_again(tmp_path):
    for _ in range(2):
        trackers = following(tmp_path, "tensorboard")
        trackers.step(step(1))
        trackers.close()
    assert scalars(tmp_path, "train/loss") == [(1, 4.0)]


def test_threads_stay_as_they_are(tmp_path, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    torch.set_num_threads(2)
    following(tmp_path, "tensorboard").close()
    assert torch.get_num_threads() == 2


# The others


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """Calls of the fake packages."""
    made: list[tuple] = []

    def recording(name: str, result: object = None):
        return lambda *words, **options: made.append((name, *words, options)) or result

    for name in ("wandb", "trackio"):
        run = SimpleNamespace(log=recording(f"{name}.log"), finish=recording(f"{name}.finish"))
        config = SimpleNamespace(update=recording(f"{name}.config"))
        _fake(monkeypatch, name, init=recording(f"{name}.init", run), config=config)
    started = SimpleNamespace(info=SimpleNamespace(run_id="chosen by mlflow"))
    limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
    _fake(
        monkeypatch,
        "mlflow",
        search_experiments=recording("mlflow.search", []),
        create_experiment=recording("mlflow.create", "7"),
        start_run=recording("mlflow.start", started),
        log_params=recording("mlflow.params"),
        log_metrics=recording("mlflow.metrics"),
        end_run=recording("mlflow.end"),
        utils=SimpleNamespace(validation=limits),
    )
    return made


def _fake(monkeypatch, name: str, **content) -> None:
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def options_of(calls: list[tuple], name: str) -> list[dict]:
    return [call[-1] for call in calls if call[0] == name]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_has_a_project_and_a_name(tmp_path, calls, name):
    folder = tmp_path / "first try"
    folder.mkdir()
    trackers = following(folder, name, project="maths")
    trackers.step(step(1))
    trackers.close()
    (given,) = options_of(calls, f"{name}.init")
    assert given["project"] == "maths"
    assert given["name"].startswith("first try")
    (config,) = [call for call in calls if call[0] == f"{name}.config"]
    assert config[1]["train.seed"] == 0
    assert config[1]["track.to"] == f'["{name}"]'
    (log,) = [call for call in calls if call[0] == f"{name}.log"]
    assert (log[1]["train/loss"], log[-1]["step"]) == (4.0, 1)
    assert calls[-1][0] == f"{name}.finish"


def test_mlflow(tmp_path, calls):
    trackers = following(tmp_path, "mlflow", project="maths")
    trackers.evaluation(evaluation(0, ("a/b-c.d e:f", "x(y)", "x[y]", "ζ")))
    trackers.close()
    assert options_of(calls, "mlflow.create")[0]["name"] == "maths"
    assert options_of(calls, "mlflow.start")[0]["run_name"] == tmp_path.name
    (metrics,) = [call for call in calls if call[0] == "mlflow.metrics"]
    assert (metrics[1]["eval/losses/a/b-c.d e:f"], metrics[-1]["step"]) == (3.0, 0)
    assert metrics[1]["eval/losses/x_28_y_29_"] == 4.0
    assert metrics[1]["eval/losses/x_5b_y_5d_"] == 5.0


@pytest.mark.parametrize(
    ("name", "started", "logged", "id"),
    [
        ("wandb", "wandb.init", "wandb.log", "id"),
        ("trackio", "trackio.init", "trackio.log", "name"),
        ("mlflow", "mlflow.start", "mlflow.metrics", "run_id"),
    ],
)
def test_a_resumed_run_goes_on_in_its_history(tmp_path, calls, name, started, logged, id):
    before = following(tmp_path, name)
    for number in (1, 2, 3):
        before.step(step(number))
    before.evaluation(evaluation(3, SOURCES))
    before.close()
    after = following(tmp_path, name, done=1)
    for number in (2, 3, 4):
        after.step(step(number))
    after.close()
    assert [given["step"] for given in options_of(calls, logged)] == [1, 2, 3, 3, 4]
    first, second = (given[id] for given in options_of(calls, started))
    assert second == ("chosen by mlflow" if name == "mlflow" else first)
    made = [call[0] for call in calls]
    last_start = len(made) - made[::-1].index(started)
    assert not {f"{name}.config", "mlflow.params"} & set(made[last_start:])  # the options are there already


def test_one_that_fails_is_told_of_once_and_the_others_go_on(tmp_path, calls, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no way to the server\nand more")

    said = []
    trackers = following(tmp_path, "wandb", "tensorboard", "trackio", said=said)
    monkeypatch.setattr(sys.modules["wandb"].init(), "log", fail)
    for number in (1, 2):
        trackers.step(step(number))
    trackers.close()
    assert said == ["warning: --track.to wandb failed and is disabled; the run continues: no way to the server"]
    assert scalars(tmp_path, "train/loss") == [(1, 4.0), (2, 2.0)]
    assert len(options_of(calls, "trackio.log")) == 2
    assert json.loads((tmp_path / "trackers.json").read_text())["wandb"]["sent"] == -1


def test_one_that_cannot_begin(tmp_path, calls, monkeypatch):
    def fail(**_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    said = []
    trackers = following(tmp_path, "wandb", said=said)
    trackers.step(step(1))
    trackers.close()
    assert said == ["warning: --track.to wandb failed and is disabled; the run continues: RuntimeError"]


# What is sent, and what is refused


def test_numbers_are_finite_and_flat():
    numbers = step_numbers(step(1))
    assert all(type(value) is float and math.isfinite(value) for value in numbers.values())
    assert {"train/loss", "train/kept", "telemetry/sketch_error", "exchanged_bytes/gather"} < set(numbers)
    assert "train/measured_over_floor" not in numbers
    bad = evaluation(0, SOURCES)
    bad.losses["algebra"] = math.nan
    assert "eval/losses/algebra" not in evaluation_numbers(bad)


def test_a_series_is_of_the_same_examples_throughout():
    """The means of all examples and those of a sample have names of their own."""
    whole, part = (evaluation_numbers(evaluation(3, SOURCES, whole=whole)) for whole in (True, False))
    assert (whole["eval/loss"], whole["eval/sample/loss"]) == (0.875, 1.75)
    assert set(part) == {name for name in whole if name.startswith("eval/sample/")}
    assert part["eval/sample/losses/algebra"] == whole["eval/sample/losses/algebra"] == 1.5
    assert not [name for name in whole if "count" in name or "whole" in name]


def test_off_by_default(tmp_path):
    trackers = following(tmp_path)
    trackers.step(step(1))
    trackers.close()
    assert not list(tmp_path.iterdir())
    check_trackers(TrackConfig())


def test_one_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    with pytest.raises(UserError, match=r"--track\.to mlflow: mlflow is not installed: pip install mlflow"):
        check_trackers(TrackConfig(to=["mlflow"]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": ["tensorboad"]}, "--track.to is 'tensorboad', but must be one or more of tensorboard, wandb"),
        ({"to": ["wandb", "wandb"]}, "each tracker once"),
        ({"project": ""}, "--track.project is ''"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(UserError) as caught:
        TrackConfig(**options)
    assert words in str(caught.value)
