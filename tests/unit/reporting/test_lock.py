"""Who may write to a run directory: processes of this machine are real ones, those of others are made up."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import threading
import time

import psutil
import pytest

from colm_scale.errors import TrainingError, UserError
from colm_scale.reporting import lock
from colm_scale.reporting.lock import Holder, RunLock, this_process


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in {"_BEAT": 0.05, "_STALE": 1.0, "_POLL": 0.05, "_SETTLE": 0.01}.items():
        monkeypatch.setattr(lock, f"{name}_SECONDS", seconds)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


def parent(**other) -> Holder:
    """A process of this machine that lives: the one that started the tests."""
    process = psutil.Process(os.getppid())
    values = {"pid": process.pid, "started": process.create_time(), "token": "theirs", **other}
    return dataclasses.replace(this_process(), **values)


def held(folder, holder: Holder) -> None:
    (folder / ".lock").write_text(json.dumps(dataclasses.asdict(holder)), "utf-8")


def taken(folder, said: list[str]) -> RunLock:
    found = RunLock(folder, said.append)
    found.take()
    return found


def test_a_lock_is_there_while_it_is_held_and_is_touched(tmp_path):
    held_one = taken(tmp_path, [])
    assert held_one.holder() == this_process_of(held_one)
    first = (tmp_path / ".lock").stat().st_mtime_ns
    deadline = time.monotonic() + 10
    while (tmp_path / ".lock").stat().st_mtime_ns == first:
        assert time.monotonic() < deadline
    held_one.release()
    assert not list(tmp_path.iterdir())


def this_process_of(held_one: RunLock) -> Holder:
    return dataclasses.replace(this_process(), since=held_one._own.since, token=held_one._own.token)


def test_a_living_process_of_this_machine_is_named(tmp_path):
    held(tmp_path, parent(host="node7", since="2026-01-01T10:00:00+00:00"))
    with pytest.raises(UserError) as refused:
        RunLock(tmp_path).wait()
    assert f"in use by another run (process {os.getppid()} on node7, since 2026-01-01T10:00:00+00:00)" in str(
        refused.value
    )
    with pytest.raises(UserError, match="in use"):
        RunLock(tmp_path).take()


def test_a_dead_process_of_this_machine_is_followed_at_once(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    said: list[str] = []
    held(tmp_path, parent(pid=ended.pid))
    taken(tmp_path, said).release()
    held(tmp_path, parent(started=5.0))  # the number was given to another process since
    taken(tmp_path, said).release()
    assert said == []


def test_a_silent_process_of_another_machine_is_followed_after_a_while(tmp_path):
    held(tmp_path, parent(machine="another", host="node8"))
    said: list[str] = []
    started = time.monotonic()
    taken(tmp_path, said).release()
    assert time.monotonic() - started > 0.9
    assert [line.split(str(tmp_path))[1].split(" (process")[0] for line in said] == [
        " may be in use",
        ": the run before",
    ]
    assert all("on node8" in line for line in said)
    assert not list(tmp_path.iterdir())


def test_a_process_of_another_machine_that_goes_on_touching_the_file_lives(tmp_path):
    held(tmp_path, parent(machine="another"))
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.2):
            os.utime(tmp_path / ".lock")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use by another run"):
            RunLock(tmp_path, lambda line: None).take()
    finally:
        ended.set()
        thread.join()


def test_a_lock_whose_holder_is_not_yet_written_is_a_stranger_s(tmp_path):
    (tmp_path / ".lock").write_text("", "utf-8")
    said: list[str] = []
    taken(tmp_path, said).release()
    assert "unknown host" in said[0]


@pytest.mark.parametrize("variable", ["SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"])
def test_an_earlier_start_of_the_job_is_followed_at_once_on_any_machine(variable, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, "4242")
    said: list[str] = []
    held(tmp_path, parent(machine="another"))
    taken(tmp_path, said).release()
    assert said == []
    held(tmp_path, parent(machine="another", job="4243"))
    taken(tmp_path, said).release()
    assert len(said) == 2


def test_runs_of_torchrun_s_default_name_are_not_one_job(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert this_process().job == ""


def test_of_two_that_follow_the_same_dead_run_one_gets_the_folder(tmp_path, monkeypatch):
    held(tmp_path, parent(started=5.0))
    monkeypatch.setattr(time, "sleep", lambda seconds: held(tmp_path, parent()))  # the other is a little later
    with pytest.raises(UserError, match="in use"):
        RunLock(tmp_path).take()


def test_a_run_whose_folder_was_taken_over_ends(tmp_path):
    slept = taken(tmp_path, [])
    slept.check()
    held(tmp_path, parent())
    with pytest.raises(TrainingError, match="was taken over by another run"):
        slept.check()
    slept.release()
    assert (tmp_path / ".lock").exists()


def test_a_process_follows_itself(tmp_path):
    taken(tmp_path, [])
    taken(tmp_path, []).release()
