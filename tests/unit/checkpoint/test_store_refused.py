"""What a file system refuses without harm to the newest checkpoint does not end a run: it is noted once."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from support.checkpoints import mark_of, names, newest_mark, write
from support.families import adapted_model

from colm_scale.checkpoint.store import CheckpointFolder
from colm_scale.config import ModelConfig, RunConfig
from colm_scale.errors import TrainingError
from colm_scale.modeling.load import load_tokenizer
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.reporting.run_directory import RunDirectory
from colm_scale.run.reports import WrittenReports

REFUSALS = ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "EBADF", "EACCES")
STUCK = ("ENOTEMPTY", "EBUSY", "EACCES")


def refuse(patch, name: str, code: str, what) -> None:
    """Let a call of the operating system raise for those arguments of which ``what`` is true."""
    real = getattr(os, name)

    def call(*arguments, **keywords):
        if what(*arguments, **keywords):
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
        return real(*arguments, **keywords)

    patch.setattr(os, name, call)


def is_folder(descriptor: int) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").is_dir()


# Folders that cannot be settled


@pytest.mark.parametrize("code", REFUSALS)
def test_a_file_system_that_cannot_fsync_folders_is_noted_once(path, monkeypatch, code):
    folder = CheckpointFolder(path, 1)
    refuse(monkeypatch, "fsync", code, is_folder)
    for step in (10, 20):
        write(folder, step, step)
    assert newest_mark(path) == 20
    (note,) = folder.notes
    assert f"the file system of {path} cannot fsync folders ({os.strerror(getattr(errno, code))})" in note


def test_a_folder_that_cannot_be_opened_to_settle_it_is_noted(path, monkeypatch):
    folder = CheckpointFolder(path, 1)
    refuse(monkeypatch, "open", "EACCES", lambda _, flags, **__: flags & os.O_DIRECTORY)
    write(folder, 10, 1.0)
    assert newest_mark(path) == 1.0
    assert "(Permission denied)" in folder.notes[0]


@pytest.mark.parametrize("code", REFUSALS)
def test_a_file_that_cannot_be_settled_is_an_error(path, monkeypatch, code):
    refuse(monkeypatch, "fsync", code, lambda descriptor: not is_folder(descriptor))
    with pytest.raises(TrainingError, match=os.strerror(getattr(errno, code))):
        write(CheckpointFolder(path, 1), 10, 1.0)
    assert names(path) == []


def test_another_error_of_a_folder_is_an_error(path, monkeypatch):
    refuse(monkeypatch, "fsync", "EIO", is_folder)
    with pytest.raises(TrainingError, match="Input/output error"):
        write(CheckpointFolder(path, 1), 10, 1.0)


# Old ones that will not go


def of_old(call: str):
    """Calls that would remove the checkpoint of step 10, or rename it."""
    places = {"rmdir": lambda path, **_: "0010." in str(path), "unlink": lambda path, **_: path == "manifest.json"}
    return places.get(call, lambda source, _: Path(source).name == "step-00000010")


@pytest.mark.parametrize("call", ["rename", "rmdir", "unlink"])
@pytest.mark.parametrize("code", STUCK)
def test_an_old_one_that_will_not_go_is_noted_once_and_tried_again(path, monkeypatch, code, call):
    folder = CheckpointFolder(path, 1)
    write(folder, 10, 1.0)
    with monkeypatch.context() as patch:
        refuse(patch, call, code, of_old(call))
        for step in (20, 30, 40):
            write(folder, step, step)
        assert newest_mark(path) == 40
    (note,) = folder.notes
    assert note.startswith(f"1 old checkpoint in {path} cannot be removed ({os.strerror(getattr(errno, code))})")
    left = names(path)
    assert len(left) == (4 if call == "unlink" else 2)
    assert "step-00000040" in left
    write(folder, 50, 5.0)
    assert names(path) == ["step-00000050"]
    assert len(folder.notes) == 1


def test_as_much_of_an_old_one_is_removed_as_will_go(path, monkeypatch):
    folder = CheckpointFolder(path, 1)
    write(folder, 10, 1.0)
    with monkeypatch.context() as patch:
        refuse(patch, "unlink", "EBUSY", lambda name, **_: name == "adapter.safetensors")
        write(folder, 20, 2.0)
    assert names(path / ".step-00000010.gone") == ["adapter.safetensors"]


@pytest.mark.parametrize("kind", ["new", "gone", "old"])
def test_what_will_not_go_is_not_in_the_way_of_the_same_step(path, monkeypatch, kind):
    """Not even twice."""
    folder = CheckpointFolder(path, 1)
    write(folder, 20, 1.0)
    aside = path / f".step-00000020.{kind}"
    aside.mkdir()
    (aside / ".nfs0001").touch()
    with monkeypatch.context() as patch:
        refuse(patch, "unlink", "EBUSY", lambda name, **_: name == ".nfs0001")
        refuse(patch, "rename", "EBUSY", lambda source, _: source == aside and kind == "old")
        for mark in (2.0, 3.0):
            write(folder, 20, mark)
            assert newest_mark(path) == mark
            assert mark_of(CheckpointFolder.read(path / "step-00000020")) == mark
    assert len(names(path)) == 2
    assert len(folder.notes) == 1
    write(folder, 20, 4.0)
    assert names(path) == ["step-00000020"]


def test_of_two_that_were_being_replaced_the_newer_counts(path):
    folder = CheckpointFolder(path, 1)
    for mark, kind in ((1.0, "old"), (2.0, "old2")):
        write(folder, 20, mark).rename(path.parent / kind)
    for kind in ("old", "old2"):
        (path.parent / kind).rename(path / f".step-00000020.{kind}")
    assert newest_mark(path) == 2.0
    write(folder, 10, 3.0)  # goes back, and clears up
    assert names(path) == ["step-00000010"]


def test_an_adapter_is_replaced_though_what_it_replaced_before_will_not_go(tmp_path, monkeypatch):
    module = ExampleLoss(adapted_model("llama"))
    reports = WrittenReports.__new__(WrittenReports)
    reports._directory = RunDirectory(str(tmp_path))
    reports._config, reports._tokenizer = RunConfig(), load_tokenizer(ModelConfig())
    for kind in ("new", "old"):
        (tmp_path / f".adapter.{kind}").mkdir()
        (tmp_path / f".adapter.{kind}" / ".nfs0001").touch()
    refuse(monkeypatch, "unlink", "EBUSY", lambda name, **_: name == ".nfs0001")
    for _ in range(2):
        reports.adapter("adapter", module, {})
    assert "adapter_config.json" in names(tmp_path / "adapter")
    assert names(tmp_path) == [".adapter.new", ".adapter.old", "adapter"]


def test_a_later_one_that_will_not_go_is_an_error(path, monkeypatch):
    """A run that is resumed would go on from there."""
    folder = CheckpointFolder(path, 3)
    write(folder, 40, 4.0)
    refuse(monkeypatch, "rename", "EBUSY", lambda source, _: Path(source).name == "step-00000040")
    with pytest.raises(TrainingError, match=r"step-00000040 cannot be removed: Device or resource busy.*step 20"):
        write(folder, 20, 2.0)
