"""Writing checkpoints in a thread of the first rank, while the steps go on.

One at a time: the next begins when the one before is on the disk, and the steps wait for that. A queue would hide a
disk that is too slow until the memory is full, and a crash would lose every checkpoint in it.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass

from colm_scale.checkpoint.files import Tensors
from colm_scale.checkpoint.store import CheckpointFolder
from colm_scale.records import Json

_LEAVE_SECONDS = 20.0
"""Time for a write to end after a failure; less than the 30 seconds after which torchrun kills a rank."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint on the disk.

    Attributes:
        bytes: Size of its files.
        stall_seconds: Time for which the steps waited: for the copy of the state, and where the next checkpoint or the
            end came before this one was written.
        seconds: Time from the begin of the copy until the checkpoint was complete on the disk.
        notes: See `CheckpointFolder`.
    """

    step: int
    bytes: int
    stall_seconds: float
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state after a step, which nothing changes any more.

    Attributes:
        started: Value of `time.perf_counter` when the copy began.
        landed: Waits until all tensors have their values.
    """

    step: int
    state: Json
    tensors: Tensors
    started: float
    landed: Callable[[], None]


class Writer:
    """Writes no checkpoint: on all ranks but the first."""

    @property
    def failed(self) -> bool:
        """Whether the last write failed. `wait` raises its error."""
        return False

    def begin(self, snapshot: Snapshot) -> None:
        """Begin to write a checkpoint; the one before must be written."""

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            TrainingError: It could not be.
        """

    def saved(self) -> list[Saved]:
        """Return the checkpoints that were completed since the last call."""
        return []

    def finish(self) -> None:
        """Wait for the last write, but not long and whatever becomes of it: the run ends after a failure."""


class BackgroundWriter(Writer):
    """Writes checkpoints into a folder."""

    def __init__(self, folder: CheckpointFolder):
        self._folder = folder
        self._pending: list[Future[Saved]] = []
        self._stall = 0.0
        self._saved: list[Saved] = []

    @property
    def failed(self) -> bool:
        return any(write.done() and write.exception() for write in self._pending)

    def begin(self, snapshot: Snapshot) -> None:
        assert not self._pending, "a checkpoint is being written"
        write: Future[Saved] = Future()
        self._pending.append(write)
        # No executor: a hanging disk would keep its thread, and so the process, from ending.
        threading.Thread(target=self._write, args=(write, snapshot), name="colm_scale-checkpoint", daemon=True).start()
        self._stall = time.perf_counter() - snapshot.started

    def wait(self) -> None:
        started = time.perf_counter()
        try:
            for write in self._pending:
                saved = write.result()
                stall = self._stall + time.perf_counter() - started
                self._saved.append(dataclasses.replace(saved, stall_seconds=stall))
        finally:
            self._pending = []

    def saved(self) -> list[Saved]:
        if not self.failed and all(write.done() for write in self._pending):
            self.wait()
        saved, self._saved = self._saved, []
        return saved

    def finish(self) -> None:
        wait(self._pending, timeout=_LEAVE_SECONDS)

    def _write(self, write: Future[Saved], snapshot: Snapshot) -> None:
        try:
            snapshot.landed()
            path = self._folder.write(snapshot.step, snapshot.state, snapshot.tensors)
            size = sum(file.stat().st_size for file in path.iterdir())
            notes, self._folder.notes = tuple(self._folder.notes), []
            write.set_result(Saved(snapshot.step, size, 0.0, time.perf_counter() - snapshot.started, notes))
        except BaseException as error:
            write.set_exception(error)
