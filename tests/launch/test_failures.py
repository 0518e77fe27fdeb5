"""When something breaks while a run is under way: it ends on all ranks, says why once, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import (
    SABOTAGED,
    SMALL,
    Command,
    Outcome,
    deepspeed,
    rows,
    run,
    run_many,
    torchrun,
    wait_until,
    write_rows,
)
from support.sabotage import BAD_ID

ENDED_SECONDS = 45
"""How long after a rank has failed the last process of the run may live."""
STARTED_SECONDS = 150
"""How long a run may take to get to its second step on a busy machine."""
ZERO = ("--ds_config", "ds_configs/zero2.json")
EXAMPLES = [{"instruction": f"What is {i} + {i}?", "output": f"{2 * i}"} for i in range(16)]


def reached(metrics: Path, step: int) -> Callable[[], bool]:
    """Whether a run has written a step."""
    return lambda: metrics.exists() and len(metrics.read_text("utf-8").splitlines()) >= step


def assert_ends(command: Command, metrics: Path) -> Outcome:
    """The run gets through step 1, and then its launcher and every rank end in time."""
    wait_until(reached(metrics, 1), STARTED_SECONDS)
    wait_until(lambda: not command.alive(), ENDED_SECONDS)
    outcome = command.outcome(1)
    assert outcome.code != 0
    assert len(rows(metrics)) == 1, "a step was written that not all ranks have made"
    assert not (metrics.parent / "adapter").exists()
    return outcome


def start(launcher: list[str], deed: str, tmp_path: Path, *options: str) -> Command:
    """Rank 1 does that in step 2, when rank 0 is on its way into a collective."""
    run = ("--output_dir", str(tmp_path / "run"), "--sabotage", deed, "train", "2", "1")
    options = (*SMALL, "--train.steps", "4", *options, *run)
    return Command([*launcher, *options], tmp_path / "output")


@pytest.mark.parametrize(("launcher", "options"), [(torchrun, ()), (deepspeed, ZERO)])
def test_an_error_on_one_rank_ends_all_and_is_said_once(launcher, options, tmp_path):
    with start(launcher(2, SABOTAGED), "raise", tmp_path, *options) as command:
        outcome = assert_ends(command, tmp_path / "run/metrics.jsonl")
    said = [line for line in outcome.stderr.splitlines() if line.endswith("RuntimeError: the disk of rank 1 burns")]
    assert len(said) == 1, outcome.stderr


def test_a_rank_that_vanishes_ends_all(tmp_path):
    with start(deepspeed(2, SABOTAGED), "exit", tmp_path, *ZERO) as command:
        assert_ends(command, tmp_path / "run/metrics.jsonl")


def test_ranks_that_read_different_data_are_told_which(tmp_path):
    write_rows(tmp_path / "train-0.jsonl", EXAMPLES)
    write_rows(tmp_path / "train-1.jsonl", [*EXAMPLES[:-1], EXAMPLES[0]])
    data = ("--data.train", str(tmp_path / "train-@RANK.jsonl"))
    command = [*torchrun(2, SABOTAGED), *SMALL, *data, "--output_dir", str(tmp_path / "run")]
    outcome = run(command, tmp_path / "output")
    assert outcome.errors == ["error: rank 1 has other training data than rank 0: every rank must read the same input"]
    assert outcome.code != 0
    assert not (tmp_path / "run").exists()


# Losses that are not finite


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("not_finite")


@pytest.fixture(scope="module")
def outcomes(folder) -> dict[str, Outcome]:
    data = str(write_rows(folder / "train.jsonl", EXAMPLES))
    full = ("--selection.method", "full", "--data.eval", data, "--eval.every", "1", "--train.schedule", "constant")
    options = {
        "candidate": ("--train.steps", "3", "--sabotage", "nan", "candidate"),
        "training": (*full, "--train.steps", "3", "--sabotage", "nan", "training"),
        "one step": (*full, "--train.steps", "1"),
    }
    return run_many(
        {
            name: [*SMALL, "--data.train", data, "--train.warmup_ratio", "0", "--output_dir", str(folder / name), *more]
            for name, more in options.items()
        },
        folder / "output",
    )


def test_a_candidate_whose_loss_is_nan_is_counted_and_never_selected(outcomes, folder):
    outcomes["candidate"].succeeded()
    steps = rows(folder / "candidate/selection.jsonl")
    assert len(steps) == 3
    for step in steps:
        assert sorted(step["candidates"]) == list(range(16))
        assert len(step["selected"]) == 8
        assert BAD_ID not in step["selected"]
    assert [step["invalid"] for step in rows(folder / "candidate/metrics.jsonl")] == [1, 1, 1]


def test_a_training_loss_that_is_nan_ends_the_run_with_step_and_ids(outcomes, folder):
    outcome = outcomes["training"]
    assert outcome.code == 1
    (error,) = outcome.errors
    assert "step 2" in error
    assert f"ids [{BAD_ID}]" in error
    assert "Traceback" not in outcome.stderr
    assert len(rows(folder / "training/metrics.jsonl")) == 1


def test_what_was_saved_before_the_nan_is_left_as_it_was(outcomes, folder):
    outcomes["one step"].succeeded()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "training/adapter" / name).read_bytes() == (folder / "one step/adapter" / name).read_bytes()
    assert not (folder / "training/adapter_last").exists()
