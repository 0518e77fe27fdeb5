"""A run that is killed, told to stop, stuck or out of disk ends in time, says why, and goes on as if nothing had been.

Ordinary tests break one run of each kind; those marked ``faults`` break it everywhere and under every engine.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.commands import SABOTAGED, Command, Forked, Outcome, deepspeed, rows, torchrun, wait_until, write_rows
from support.faults import (
    ENGINES,
    PHASES,
    SECONDS,
    NoMounts,
    Workshop,
    mount_disk,
    newest_checkpoint,
    own_mounts,
    result,
    steps_written,
)
from support.sabotage import BAD_ID, WRITING

EVERY = 2
SHARDED = ("ddp", "zero2", "zero3", "fsdp")


@pytest.fixture(scope="module")
def mounts() -> tuple[str, ...] | NoMounts:
    """What starts a process with mounts of its own, or why there is no such thing."""
    try:
        return own_mounts()
    except NoMounts as error:
        return error


@pytest.fixture(scope="module")
def workshop(mounts, tmp_path_factory) -> Iterator[Workshop]:
    folder = tmp_path_factory.mktemp("faults")
    with Forked(folder / "forked", *(() if isinstance(mounts, NoMounts) else mounts)) as forked:
        yield Workshop(forked, folder)


@pytest.fixture(scope="module")
def long(workshop) -> Workshop:
    """The same with runs of 20 steps."""
    return Workshop(workshop.forked, workshop.folder, steps=20)


def assert_broken(workshop: Workshop, run: Path, step: int, outcome: Outcome, behind: int = 0) -> None:
    """The run ended by itself in that step, said why in its first line, and lost no more than it may.

    ``behind``: steps that it may have made while the checkpoint that broke was written.
    """
    assert outcome.code != 0
    assert outcome.stderr.startswith("error: "), outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not workshop.forked.left()
    assert step - 1 <= steps_written(run) <= step + behind
    assert steps_written(run) - newest_checkpoint(run) <= EVERY + behind


def assert_goes_on(workshop: Workshop, run: Path, engine: str) -> None:
    """From its newest checkpoint to the result of a run that nothing broke, bit by bit."""
    after = newest_checkpoint(run)
    outcome = workshop.go_on(run, engine).succeeded()
    assert (f"resuming after step {after}," in outcome.stdout) == (after > 0)
    assert result(run) == workshop.unbroken(engine)


# Killed


def places() -> Iterator[object]:
    """Engine, phase, step and rank; in step 6 there are old checkpoints to remove."""
    quick = {("ddp", "train", 1), ("ddp", "writing", 0), ("zero2", "gather", 0)}
    for engine in SHARDED:
        for phase in (*PHASES, *WRITING):
            for rank in (0,) if phase in WRITING else (0, 1):
                marks = () if (engine, phase, rank) in quick else pytest.mark.faults
                yield pytest.param(engine, phase, 6 if phase == "pruning" else 4, rank, marks=marks)


@pytest.mark.parametrize(("engine", "phase", "step", "rank"), places())
def test_a_run_of_which_a_rank_is_killed(engine, phase, step, rank, workshop, tmp_path):
    run = tmp_path / "run"
    ranks = workshop.start(run, engine, "--sabotage", "kill", phase, str(step), str(rank))
    outcome = ranks.outcome(SECONDS)
    assert ranks.codes()[rank] == -signal.SIGKILL
    assert f"rank {1 - rank}, in phase" in outcome.errors[0]
    assert "lost another rank" in outcome.errors[0]
    assert_broken(workshop, run, step, outcome, behind=EVERY if phase in WRITING else 0)
    assert newest_checkpoint(run) == {"naming": 2, "writing": 2, "pruning": 6}.get(phase, newest_checkpoint(run))
    assert_goes_on(workshop, run, engine)


@pytest.mark.parametrize(
    ("engine", "phase", "rank"),
    [
        ("single", "train", 0),
        *(pytest.param(engine, "sketch", rank, marks=pytest.mark.faults) for engine in SHARDED for rank in (0, 1)),
    ],
)
def test_killed_in_a_step_while_a_checkpoint_is_half_written_a_run_has_the_one_before(
    engine, phase, rank, workshop, tmp_path
):
    run, ranks = tmp_path / "run", 1 if engine == "single" else 2
    kill = ("--sabotage", "behind", "60", "kill", phase, "2", str(rank))
    broken = workshop.start(run, engine, "--checkpoint.every", "1", *kill, ranks=ranks)
    assert broken.outcome(SECONDS).code != 0
    assert (steps_written(run), newest_checkpoint(run)) == (1, 0)
    assert [path.name for path in (run / "checkpoints").iterdir()] == [".step-00000001.new"]
    workshop.go_on(run, engine, ranks=ranks).succeeded()
    assert result(run) == workshop.unbroken(engine, ranks)
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.parametrize("engine", ["single", pytest.param("fsdp", marks=pytest.mark.faults)])
def test_the_next_checkpoint_waits_for_the_one_before_and_says_so(engine, workshop, tmp_path):
    run, ranks = tmp_path / "run", 1 if engine == "single" else 2
    workshop.start(run, engine, "--sabotage", "slow", "writing", "2", "0", ranks=ranks).outcome(SECONDS).succeeded()
    assert result(run) == workshop.unbroken(engine, ranks)
    saved = rows(run / "checkpoints.jsonl")
    assert [row["step"] for row in saved] == [2, 4, 6]
    assert all(row["stall_seconds"] > 0 for row in saved)
    files = (run / "checkpoints" / "step-00000006").iterdir()
    assert saved[-1]["bytes"] == sum(file.stat().st_size for file in files)
    assert newest_checkpoint(run) == 6


def test_a_failure_elsewhere_lets_the_checkpoint_be_finished(workshop, tmp_path):
    run = tmp_path / "run"
    fault = ("--sabotage", "behind", "8", "raise", "train", "2", "1")
    outcome = workshop.start(run, "ddp", "--checkpoint.every", "1", *fault).outcome(SECONDS)
    assert "the disk of rank 1 burns" in outcome.stderr
    assert newest_checkpoint(run) == 1
    workshop.go_on(run, "ddp").succeeded()
    assert result(run) == workshop.unbroken("ddp")


@pytest.mark.faults
@pytest.mark.parametrize("step", [1, 7, 19])
@pytest.mark.parametrize("engine", ENGINES)
def test_killed_after_any_step_of_twenty_a_run_resumes_bit_by_bit(engine, step, long, tmp_path):
    run, ranks = tmp_path / "run", 1 if engine == "single" else 2
    every = ("--checkpoint.every", str(step))
    kill = ("--sabotage", "kill", "sample", str(step + 1), "0")
    assert long.start(run, engine, *every, *kill, ranks=ranks).outcome(SECONDS).code != 0
    assert (steps_written(run), newest_checkpoint(run)) == (step, step)
    outcome = long.go_on(run, engine, *every, ranks=ranks).succeeded()
    assert f"resuming after step {step}," in outcome.stdout
    assert result(run) == long.unbroken(engine, ranks)


def test_torchrun_starts_a_killed_run_again_and_it_ends_as_if_nothing_had_been(workshop, tmp_path):
    run = tmp_path / "run"
    *launcher, script = torchrun(2, SABOTAGED)
    options = workshop.options(run, "ddp", "--resume", "auto", "--sabotage", "kill", "train", "4", "1")
    with Command([*launcher, "--max-restarts", "3", script, *options], tmp_path / "output") as command:
        outcome = command.outcome().succeeded()
        assert not command.alive()
    assert "resuming after step 2," in outcome.stdout
    assert result(run) == workshop.unbroken("ddp")


# Told to stop


@pytest.mark.parametrize(
    "told", [(1,), pytest.param((0,), marks=pytest.mark.faults), pytest.param((0, 1), marks=pytest.mark.faults)]
)
@pytest.mark.parametrize("engine", ["ddp", *(pytest.param(e, marks=pytest.mark.faults) for e in SHARDED[1:])])
def test_a_run_saves_itself_when_ranks_are_told_to_stop(engine, told, workshop, tmp_path):
    run = tmp_path / "run"
    ranks = workshop.start(run, engine, "--sabotage", "wait", "train", "3", str(told[0]))
    wait_until((run / "waiting").exists, SECONDS)
    ranks.send(signal.SIGTERM, *told)
    outcome = ranks.outcome(SECONDS)
    assert ranks.codes() == [143, 143]
    assert "stopped after step 3, as requested: resume with --resume auto" in " ".join(outcome.stdout.split())
    assert newest_checkpoint(run) == 3
    assert not workshop.forked.left()
    assert_goes_on(workshop, run, engine)


def the_launcher(command: Command) -> psutil.Process:
    return psutil.Process(command.process.pid)


def the_one_below(command: Command) -> psutil.Process:
    """DeepSpeed's launcher is two processes, of which the upper one passes nothing on."""
    (child,) = the_launcher(command).children()
    return child


@pytest.mark.parametrize(
    ("launcher", "engine", "told"),
    [
        (torchrun, "ddp", the_launcher),
        (deepspeed, "zero2", the_launcher),
        pytest.param(deepspeed, "zero2", the_one_below, marks=pytest.mark.faults),
        pytest.param(torchrun, "fsdp", the_launcher, marks=pytest.mark.faults),
    ],
)
def test_a_run_saves_itself_when_its_launcher_is_told_to_stop(launcher, engine, told, workshop, tmp_path):
    run = tmp_path / "run"
    options = workshop.options(run, engine, "--sabotage", "wait", "train", "3", "0")
    with Command([*launcher(2, SABOTAGED), *options], tmp_path / "output") as command:
        wait_until((run / "waiting").exists, SECONDS)
        told(command).send_signal(signal.SIGTERM)
        wait_until(lambda: not command.alive(), SECONDS)
        outcome = command.outcome(1)
    assert outcome.code != 0
    assert "stopped after step 3, as requested" in " ".join(outcome.stdout.split())
    assert newest_checkpoint(run) == 3
    assert_goes_on(workshop, run, engine)


@pytest.mark.parametrize(("launcher", "engine"), [(torchrun, "ddp"), (deepspeed, "zero2")])
def test_a_run_saves_itself_when_its_launcher_is_killed(launcher, engine, workshop, tmp_path):
    run = tmp_path / "run"
    options = workshop.options(run, engine, "--sabotage", "wait", "train", "3", "0")
    with Command([*launcher(2, SABOTAGED), *options], tmp_path / "output") as command:
        wait_until((run / "waiting").exists, SECONDS)
        command.process.kill()
        wait_until(lambda: not command.alive(), SECONDS)
    assert newest_checkpoint(run) == 3
    assert_goes_on(workshop, run, engine)


# Stuck


def stuck() -> Iterator[object]:
    for engine in SHARDED:
        for phase in ("sketch", "gather", "train", "optimizer", "checkpoint"):
            for rank in (0, 1):
                marks = () if (engine, phase, rank) == ("ddp", "gather", 1) else pytest.mark.faults
                yield pytest.param(engine, phase, rank, marks=marks)


@pytest.mark.parametrize(("engine", "phase", "rank"), stuck())
def test_a_rank_that_hangs_is_named_with_its_phase(engine, phase, rank, workshop, tmp_path):
    run = tmp_path / "run"
    hang = ("--train.timeout", "6", "--sabotage", "hang", phase, "4", str(rank))
    outcome = workshop.start(run, engine, *hang).outcome(SECONDS)
    said = f"error: step 4: rank {rank} hangs in phase {phase}, others wait for it in phase"
    assert outcome.errors[0].startswith(said)
    assert "--train.timeout (now 6 seconds)" in outcome.errors[0]
    assert_broken(workshop, run, 4, outcome)
    assert_goes_on(workshop, run, engine)


@pytest.mark.faults
@pytest.mark.parametrize("engine", SHARDED)
def test_a_disk_that_hangs_is_noticed_by_the_next_checkpoint(engine, workshop, tmp_path):
    run = tmp_path / "run"
    hang = ("--train.timeout", "6", "--sabotage", "hang", "writing", "4", "0")
    outcome = workshop.start(run, engine, *hang).outcome(SECONDS)
    assert outcome.errors[0].startswith("error: step 6: rank 0 hangs in phase checkpoint, others wait for it in phase")
    assert_broken(workshop, run, 4, outcome, behind=EVERY)
    assert newest_checkpoint(run) == 2
    assert_goes_on(workshop, run, engine)


@pytest.mark.faults
@pytest.mark.parametrize(("launcher", "engine"), [(torchrun, "ddp"), (deepspeed, "zero2")])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_frozen_is_named_and_ended(launcher, engine, rank, workshop, tmp_path):
    """Not even its threads run; under DeepSpeed rank 0 holds the store that the ranks ask about each other."""
    run = tmp_path / "run"
    options = workshop.options(run, engine, "--train.timeout", "6", "--sabotage", "freeze", "train", "4", str(rank))
    with Command([*launcher(2, SABOTAGED), *options], tmp_path / "output") as command:
        wait_until(lambda: not command.alive(), SECONDS)
        outcome = command.outcome(1)
    assert outcome.code != 0
    assert f"rank {rank} hangs" in outcome.errors[0]
    assert_goes_on(workshop, run, engine)


def test_a_lone_process_that_hangs_ends_itself(workshop, tmp_path):
    hang = ("--train.timeout", "3", "--sabotage", "hang", "sketch", "4", "0")
    outcome = workshop.start(tmp_path / "run", "single", *hang, ranks=1).outcome(SECONDS)
    assert outcome.errors[0].startswith("error: step 4: rank 0, in phase sketch, hangs")
    assert outcome.code != 0


# Out of disk


@pytest.fixture(scope="module")
def small_disk(mounts, workshop) -> tuple[Path, Path]:
    """A small disk that only the runs of the workshop see, and where we see it."""
    if isinstance(mounts, NoMounts):
        pytest.skip(str(mounts))
    place = workshop.folder / "small"
    return place, mount_disk(workshop.forked, place, megabytes=16)


@pytest.mark.parametrize(
    ("deed", "phase", "step", "file"),
    [
        ("fill", "checkpoint", 4, "checkpoint .*step-00000004"),
        ("fill", "checkpoint", 6, "checkpoint .*step-00000006"),  # the last
        ("flood", "train", 4, r".*metrics\.jsonl"),
        pytest.param("flood", "checkpoint", 4, r".*(audit|step-00000004)", marks=pytest.mark.faults),
    ],
)
def test_a_full_disk_ends_a_run_and_room_lets_it_go_on(deed, phase, step, file, workshop, small_disk):
    (place, seen), name = small_disk, f"{deed}-{phase}-{step}"
    outcome = workshop.start(place / name, "ddp", "--sabotage", deed, phase, str(step), "0").outcome(SECONDS)
    (error,) = outcome.errors
    assert re.match(f"error: {file} cannot be written: .*No space left on device", error)
    assert_broken(workshop, seen / name, step, outcome, behind=EVERY if phase == "checkpoint" else 0)
    assert newest_checkpoint(seen / name) == step - 2
    (seen / name / "filler").unlink()
    workshop.go_on(place / name, "ddp").succeeded()
    assert result(seen / name) == workshop.unbroken("ddp")


# Numbers that are not finite, and ranks that differ


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_rank_all_of_whose_sketches_are_bad_is_left_out_and_counted(value, workshop, tmp_path):
    run = tmp_path / "run"
    workshop.start(run, "ddp", "--sabotage", value, "rank").outcome(SECONDS).succeeded()
    for row in rows(run / "metrics.jsonl"):
        assert 0 < row["invalid"] < 16
        assert row["selected"] == 8


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_candidate_with_a_bad_sketch_is_never_selected(value, workshop, tmp_path):
    run = tmp_path / "run"
    options = ("--selection.kept_sources", "[]", "--sabotage", value, "candidate")
    workshop.start(run, "ddp", *options).outcome(SECONDS).succeeded()
    drawn = [BAD_ID in row["candidates"] for row in rows(run / "selection.jsonl")]
    assert any(drawn)
    assert [row["invalid"] for row in rows(run / "metrics.jsonl")] == [int(was) for was in drawn]
    assert all(BAD_ID not in row["selected"] for row in rows(run / "selection.jsonl"))


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(
    ("whose", "said"),
    [
        ("matrix", "step 1: none of the 16 sketched candidates has a finite sketch; the adapter was not changed"),
        ("training", f"step 2: the training loss of 1 selected example(s) is not finite, ids [{BAD_ID}]"),
        ("gradient", "step 1: the norm of the gradient is nan, though every loss is finite"),
    ],
)
def test_numbers_that_are_not_finite_end_the_run_before_the_weights_change(whose, value, said, workshop, tmp_path):
    run = tmp_path / "run"
    options = ("--selection.method", "full") if whose == "training" else ("--selection.kept_sources", "[]")
    ranks = workshop.start(run, "ddp", *options, "--sabotage", value, whose)
    outcome = ranks.outcome(SECONDS)
    assert ranks.codes() == [1, 1]
    (error,) = outcome.errors
    assert error.startswith(f"error: {said}")
    assert "Traceback" not in outcome.stderr
    assert not (run / "adapter").exists()


def test_what_was_saved_before_a_loss_was_not_finite_is_left_as_it_was(workshop, tmp_path):
    scored = ("--data.eval", str(workshop.folder / "train.jsonl"), "--eval.every", "1", "--eval.generate", "0")
    options = ("--selection.method", "full", "--train.schedule", "constant", "--train.warmup_ratio", "0", *scored)
    broken, one = tmp_path / "broken", tmp_path / "one"
    spoilt = workshop.start(broken, "single", *options, "--sabotage", "nan", "training", ranks=1).outcome(SECONDS)
    assert spoilt.errors[0].startswith("error: step 2: ")
    workshop.start(one, "single", *options, "--train.steps", "1", ranks=1).outcome(SECONDS).succeeded()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (broken / "adapter" / name).read_bytes() == (one / "adapter" / name).read_bytes()
    assert not (broken / "adapter_last").exists()


def test_hosts_that_read_different_data_are_told_which(workshop, tmp_path):
    same = rows(workshop.folder / "train.jsonl")
    write_rows(tmp_path / "train-0.jsonl", same)
    write_rows(tmp_path / "train-1.jsonl", [*same[:-1], same[0]])
    data = ("--data.train", str(tmp_path / "train-@RANK.jsonl"))
    outcome = workshop.start(tmp_path / "run", "ddp", *data, hosts=2).outcome(SECONDS)
    assert outcome.errors == ["error: rank 1 and rank 0 differ in training data: every rank must read the same input"]
    assert outcome.code != 0
    assert not (tmp_path / "run").exists()


def test_a_rank_that_receives_another_selection_ends_the_run(workshop, tmp_path):
    outcome = workshop.start(tmp_path / "run", "ddp", "--sabotage", "selection").outcome(SECONDS)
    (error,) = outcome.errors
    assert error.startswith("error: step 1: rank 1 does not agree with rank 0 on the candidates or the selection")
    assert outcome.code != 0
    assert steps_written(tmp_path / "run") == 0
