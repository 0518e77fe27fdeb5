"""Checkpoints are written behind the steps, one at a time, and no error is lost."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from support.checkpoints import contents, newest_mark

from colm_scale.checkpoint import background
from colm_scale.checkpoint.background import BackgroundWriter, Snapshot
from colm_scale.checkpoint.store import CheckpointFolder
from colm_scale.errors import TrainingError


class SlowFolder(CheckpointFolder):
    """Writes when it may, or fails."""

    def __init__(self, path: Path, keep: int = 1, error: BaseException | None = None):
        super().__init__(path, keep)
        self.may_write, self.threads, self._error = threading.Event(), [], error

    def write(self, step, state, tensors) -> Path:
        self.threads.append(threading.current_thread())
        self.may_write.wait()
        if self._error:
            raise self._error
        return super().write(step, state, tensors)


def snapshot(step: int, mark: float, landed=lambda: None) -> Snapshot:
    return Snapshot(step, {"mark": mark}, contents(mark), time.perf_counter(), landed)


def test_steps_go_on_while_a_checkpoint_is_written(path):
    folder = SlowFolder(path)
    writer = BackgroundWriter(folder)
    writer.begin(snapshot(5, 5.0))
    assert (writer.saved(), writer.failed, newest_mark(path)) == ([], False, None)
    folder.may_write.set()
    writer.wait()
    assert newest_mark(path) == 5.0
    (saved,) = writer.saved()
    assert (saved.step, saved.notes) == (5, ())
    assert saved.bytes == sum(file.stat().st_size for file in (path / "step-00000005").iterdir())
    assert min(saved.stall_seconds, saved.seconds) > 0
    assert writer.saved() == []
    assert folder.threads[0] is not threading.current_thread()


def test_a_checkpoint_that_is_done_is_told_without_waiting(path):
    folder = SlowFolder(path)
    folder.may_write.set()
    writer = BackgroundWriter(folder)
    for step in (5, 10):
        writer.begin(snapshot(step, step))
        while not (saved := writer.saved()):
            time.sleep(0.001)
        assert [one.step for one in saved] == [step]


def test_tensors_are_read_only_when_they_have_landed(path):
    """As from a GPU: until then they have other values."""
    tensors, event = contents(0.0), threading.Event()

    def land() -> None:
        event.wait()
        for named in tensors.values():
            for tensor in named.values():
                tensor.fill_(3)

    writer = BackgroundWriter(CheckpointFolder(path, 1))
    writer.begin(Snapshot(1, {"mark": 3.0}, tensors, time.perf_counter(), land))
    event.set()
    writer.wait()
    assert CheckpointFolder.read(path / "step-00000001").tensors["adapter"]["b"].tolist() == [3, 3, 3]


@pytest.mark.parametrize("error", [TrainingError("disk full"), RuntimeError("a fault of ours")])
def test_an_error_is_known_and_raised_once(path, error):
    folder = SlowFolder(path, error=error)
    writer = BackgroundWriter(folder)
    writer.begin(snapshot(5, 5.0))
    assert not writer.failed
    folder.may_write.set()
    while not writer.failed:
        time.sleep(0.001)
    assert writer.saved() == []
    with pytest.raises(type(error), match=str(error)):
        writer.wait()
    writer.wait()
    assert not writer.failed


def test_a_run_that_fails_waits_for_the_write_but_not_long_and_not_for_its_error(path, monkeypatch):
    folder = SlowFolder(path, error=TrainingError("disk full"))
    writer = BackgroundWriter(folder)
    writer.finish()
    writer.begin(snapshot(5, 5.0))
    with monkeypatch.context() as patch:
        patch.setattr(background, "_LEAVE_SECONDS", 0.01)
        writer.finish()
    assert not writer.failed, "it has not ended"
    threading.Timer(0.05, folder.may_write.set).start()
    writer.finish()
    assert writer.failed


def test_what_the_file_system_refuses_is_told_with_the_checkpoint(path, monkeypatch):
    folder = CheckpointFolder(path, 1)
    folder.notes.append("it refuses")
    writer = BackgroundWriter(folder)
    for step in (1, 2):
        writer.begin(snapshot(step, step))
        writer.wait()
    assert [saved.notes for saved in writer.saved()] == [("it refuses",), ()]


def test_a_plain_tensor_is_written_without_a_copy(path, monkeypatch):
    """And in the bytes of the library."""
    import safetensors.torch

    from colm_scale.checkpoint import files

    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1, 2]), "half": torch.ones(3).bfloat16()}
    parts = [*files._safetensors(tensors)]
    assert b"".join(parts) == safetensors.torch.save(tensors)
    tensors["b"].fill_(9)
    assert b"".join(parts) == safetensors.torch.save(tensors)
