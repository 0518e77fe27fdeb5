"""A write that is killed, or that the disk refuses, leaves a whole checkpoint: the one before or the new one."""

from __future__ import annotations

import errno
import io
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from support.checkpoints import mark_of, names, newest_mark, write

from colm_scale.checkpoint import files
from colm_scale.checkpoint.store import CheckpointFolder
from colm_scale.errors import TrainingError


class Killed(BaseException):
    """As no handler of errors sees it."""


def spy_on(monkeypatch, name: str, calls: list, fail_at: int | None, after: bool, error: BaseException) -> None:
    real = getattr(os, name)

    def wrapped(*arguments, **keywords):
        calls.append((name, arguments))
        if len(calls) - 1 != fail_at:
            return real(*arguments, **keywords)
        if after:
            with suppress(FileExistsError):  # of the folder of all checkpoints, which may be there
                real(*arguments, **keywords)
        raise error

    monkeypatch.setattr(os, name, wrapped)


DURABLE = ("rename", "fsync", "mkdir", "unlink", "rmdir")
"""Every call of the operating system that a write makes to change or settle a folder."""


def calls_of(write_once, monkeypatch, fail_at: int | None = None, after: bool = False, error=None) -> list:
    """The calls of a write, the ``fail_at``-th of which raises, before or after it has done its work."""
    calls: list = []
    with monkeypatch.context() as patch:
        for name in DURABLE:
            spy_on(patch, name, calls, fail_at, after, error)
        write_once()
    return calls


def prepare(path: Path, case: str) -> tuple[int, float | None, int]:
    """A folder before a write; the step to write, the mark of the newest before it, and how many are kept."""
    folder = CheckpointFolder(path, 3)
    match case:
        case "first":
            return 20, None, 2
        case "same step, the only one":
            write(folder, 20, 1.0)
            return 20, 1.0, 1
        case "same step, one of two":
            write(folder, 10, 0.5)
            write(folder, 20, 1.0)
            return 20, 1.0, 2
        case "next, one goes":
            write(folder, 5, 0.5)
            write(folder, 10, 1.0)
            return 20, 1.0, 2
        case "next, the only one goes":
            write(folder, 10, 1.0)
            return 20, 1.0, 1
        case "after a kill in a replacement":
            write(folder, 20, 1.0)
            (path / "step-00000020").rename(path / ".step-00000020.old")
            (path / ".step-00000020.new").mkdir()
            return 20, 1.0, 1
    raise AssertionError(case)


CASES = (
    "first",
    "same step, the only one",
    "same step, one of two",
    "next, one goes",
    "next, the only one goes",
    "after a kill in a replacement",
)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("case", CASES)
def test_killed_at_any_point_the_newest_is_the_one_before_or_this_one(tmp_path, monkeypatch, case, after):
    probe = tmp_path / "probe"
    step, _, keep = prepare(probe, case)
    count = len(calls_of(lambda: write(CheckpointFolder(probe, keep), step, 2.0), monkeypatch))
    assert count >= 8
    found = []
    for point in range(count):
        path = tmp_path / str(point)
        _, before, _ = prepare(path, case)
        with pytest.raises(Killed):
            calls_of(lambda: write(CheckpointFolder(path, keep), step, 2.0), monkeypatch, point, after, Killed())  # noqa: B023
        found.append(newest_mark(path))
        assert found[-1] in (before, 2.0), point
        write(CheckpointFolder(path, keep), step, 3.0)  # the run begins again
        assert newest_mark(path) == 3.0
        assert names(path) == names(probe)
        shutil.rmtree(path)
    assert found == sorted(found, key=lambda mark: mark == 2.0)  # once it is there it stays there
    assert {before, 2.0} == set(found) | {2.0}


def test_between_the_two_renames_of_a_replacement_the_replaced_one_counts(path, monkeypatch):
    folder = CheckpointFolder(path, 1)
    write(folder, 20, 1.0)
    real = os.rename

    def die_at_the_second(source, target):
        if Path(source).suffix == ".new":
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", die_at_the_second)
        with pytest.raises(Killed):
            write(folder, 20, 2.0)
    assert names(path) == [".step-00000020.new", ".step-00000020.old"]
    assert newest_mark(path) == 1.0
    assert mark_of(CheckpointFolder.read(path.parent)) == 1.0
    assert names(path) == [".step-00000020.new", ".step-00000020.old"]  # reading changes nothing


def test_it_has_its_name_only_once_everything_is_on_the_disk(path, monkeypatch):
    """The manifest is the last file; every file and the folder are settled before the rename, the parent after it."""
    synced: list[str] = []
    real, real_rename = os.fsync, os.rename

    def note(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    def note_rename(source, target):
        synced.append(f"rename to {Path(target).name}")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", note_rename)
    write(CheckpointFolder(path, 1), 20, 1.0)
    assert synced == [
        "run",
        "state.json",
        "adapter.safetensors",
        "moments.safetensors",
        "manifest.json",
        ".step-00000020.new",
        "rename to step-00000020",
        "checkpoints",
    ]


def test_a_half_deleted_one_is_never_found(path, monkeypatch):
    folder = CheckpointFolder(path, 1)
    write(folder, 10, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda folder, **_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            write(folder, 20, 2.0)
    assert names(path) == [".step-00000010.gone", "step-00000020"]
    shutil.rmtree(path / "step-00000020")
    assert newest_mark(path) is None
    write(folder, 30, 3.0)
    assert names(path) == ["step-00000030"]


# The disk is full


class Failing(io.BufferedWriter):
    """Takes half of what it is given."""

    def write(self, content: bytes) -> int:
        super().write(content[: len(content) // 2])
        super().flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("case", CASES[:5])
@pytest.mark.parametrize("place", range(4))
def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(path, monkeypatch, case, place):
    step, before, keep = prepare(path, case)
    left = names(path) if path.exists() else []
    opened: list[Path] = []

    def open_one(file, mode):
        opened.append(file)
        return Failing(io.FileIO(file, "x")) if len(opened) == place + 1 else open(file, mode)

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", open_one, raising=False)
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1234))
        with pytest.raises(TrainingError) as error:
            write(CheckpointFolder(path, keep), step, 2.0)
    assert len(opened) == place + 1
    assert names(path) == left
    assert newest_mark(path) == before
    message = str(error.value)
    assert f"{path / 'step-00000020'}" in message
    assert "No space left on device" in message
    tensor_bytes, state_bytes = 6 * 4 + 3 * 8 + 4 * 4, len('{\n "mark": 2.0\n}')
    assert f"needs {tensor_bytes + state_bytes} bytes, and 1,234 are free" in message
    assert "untouched" in message
    write(CheckpointFolder(path, keep), step, 3.0)
    assert newest_mark(path) == 3.0


@pytest.mark.parametrize("case", CASES)
def test_an_error_of_the_disk_at_any_call_leaves_a_whole_checkpoint(tmp_path, monkeypatch, case):
    probe = tmp_path / "probe"
    step, _, keep = prepare(probe, case)
    there = probe.exists()  # then nobody needs the first call, which makes it
    count = len(calls_of(lambda: write(CheckpointFolder(probe, keep), step, 2.0), monkeypatch))
    for point in range(int(there), count):
        path = tmp_path / str(point)
        _, before, _ = prepare(path, case)
        error = OSError(errno.EIO, "Input/output error")
        folder = CheckpointFolder(path, keep)
        try:
            calls_of(lambda: write(folder, step, 2.0), monkeypatch, point, error=error)  # noqa: B023
        except TrainingError as raised:
            assert "Input/output error" in str(raised)  # noqa: PT017
            assert newest_mark(path) in (before, 2.0)
        else:  # only an old one stays
            assert "cannot be removed (Input/output error)" in folder.notes[0]
            assert newest_mark(path) == 2.0
        assert not case.startswith("same step") or (path / "step-00000020").exists()
        write(CheckpointFolder(path, keep), step, 3.0)  # on a disk that works again
        assert newest_mark(path) == 3.0
        assert names(path) == names(probe)
        shutil.rmtree(path)
