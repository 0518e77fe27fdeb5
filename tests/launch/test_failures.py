"""When something breaks while a run is under way: it ends on all ranks, says why once, and leaves nothing behind."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import SABOTAGED, SMALL, Command, Outcome, deepspeed, rows, torchrun, wait_until

ENDED_SECONDS = 45
"""How long after a rank has failed the last process of the run may live."""
STARTED_SECONDS = 150
"""How long a run may take to get to its second step on a busy machine."""
ZERO = ("--ds_config", "ds_configs/zero2.json")


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


MISSED = [
    (3, "rank 3 did not arrive within 3 seconds; here: rank 0-2 on "),
    (0, "reaches nothing at MASTER_ADDR:MASTER_PORT, 127.0.0.1:"),
]


@pytest.mark.parametrize(("absent", "said"), MISSED)
def test_a_rank_that_does_not_arrive_is_missed_after_the_limit(absent, said, forked, tmp_path):
    """Rank 0 says it for all; without it there is no place to agree, and each of the others says it."""
    options = (*SMALL, "--output_dir", str(tmp_path / "run"))
    ranks = forked.start(options, tmp_path / "output", 4, absent=[absent], RDZV_SECONDS="3")
    outcome = ranks.outcome(ENDED_SECONDS)
    assert outcome.code == 1
    assert len(outcome.errors) == (1 if absent else 3), outcome.stderr
    assert len(outcome.stderr.splitlines()) == len(outcome.errors)
    assert all(said in error and "RDZV_SECONDS" in error for error in outcome.errors)
    assert not (tmp_path / "run").exists()


def test_a_second_run_in_the_folder_of_a_living_one_is_refused_and_of_a_dead_one_not(forked, tmp_path):
    options = ("--output_dir", str(tmp_path / "run"), "--resume", "auto", *SMALL)
    endless = forked.start((*options, "--train.steps", "100000"), tmp_path / "first")
    wait_until(reached(tmp_path / "run/metrics.jsonl", 1), STARTED_SECONDS)
    refused = forked.start(options, tmp_path / "second").outcome(ENDED_SECONDS)
    (error,) = refused.errors
    assert refused.code == 2
    assert f"in use by another run (process {endless.pids[0]} on " in error
    endless.send(signal.SIGKILL)
    forked.start(options, tmp_path / "third").outcome(STARTED_SECONDS).succeeded()
    assert [row["step"] for row in rows(tmp_path / "run/metrics.jsonl")] == [1, 2]
    assert not (tmp_path / "run/.lock").exists()
