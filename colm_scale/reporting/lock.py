"""The lock of a run directory: one run writes to it at a time.

The lock is a file with the process that holds it, which touches the file as long as it lives. A holder on this machine
is looked up among its processes; of another machine, only the file's age tells, because locks of the file system are
unreliable over networks. Ages are differences of times that the file system itself gave, so clocks may differ.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

from colm_scale.errors import TrainingError, UserError

_BEAT_SECONDS = 20.0
_STALE_SECONDS = 120.0
"""Age at which the holder on another machine counts as dead."""
_POLL_SECONDS = 2.0
_SETTLE_SECONDS = 1.0
"""Time for others that take over the same dead lock to have written their names."""
_SAME_START_SECONDS = 2.0
"""Processes of the same id that start within this time are one: the kernel's clock is adjusted."""


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        machine: Name of the boot of its machine and of its process namespace, in which ``pid`` is unique.
        started: When the process started, in seconds since the epoch.
        job: Name that a launcher gives to all starts of one job; empty if it gives none.
        token: Name of this taking of the lock.
    """

    host: str
    pid: int
    started: float
    machine: str
    job: str
    since: str
    token: str

    def is_same_process(self, other: Holder) -> bool:
        same_start = abs(self.started - other.started) < _SAME_START_SECONDS
        return (self.machine, self.pid) == (other.machine, other.pid) and same_start

    def lives_here(self) -> bool:
        """Return whether it is alive, for a holder on this machine."""
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            same_start = abs(process.create_time() - self.started) < _SAME_START_SECONDS
            return same_start and process.status() != psutil.STATUS_ZOMBIE
        return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def this_process() -> Holder:
    """Describe this process as a holder."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    machine = uuid.uuid4().hex  # where the kernel does not say, no two are the same
    with suppress(OSError):
        machine = f"{boot.read_text().strip()} {os.readlink(space)}"
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    names = (os.environ.get("SLURM_JOB_ID", ""), "" if run == "none" else run)  # torchrun's default is "none"
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        machine=machine,
        job=" ".join(filter(None, names)),
        since=datetime.now().astimezone().isoformat(timespec="seconds"),
        token=uuid.uuid4().hex,
    )


class RunLock:
    """The lock of one folder. Nothing is written before `take`.

    Args:
        say: Shows a line while this process waits or takes over.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)):
        self._folder, self._file, self._say = folder, folder / ".lock", say
        self._own = this_process()
        self._released = threading.Event()

    def wait(self) -> None:
        """Return once no other run holds the lock.

        Raises:
            UserError: One does: a process of this machine, or one of another machine that goes on touching the file.
            OSError: The folder cannot be written.
        """
        first, told = self._touched(), False
        while (holder := self.holder()) is not None and not self._may_follow(holder):
            touched = self._touched()
            if holder.machine == self._own.machine or touched != first:
                raise UserError(
                    f"--output_dir {self._folder} is in use by another run ({holder}): use another folder, or wait for "
                    f"its end"
                )
            age = self._now() - touched
            if age > _STALE_SECONDS:
                self._say(
                    f"{self._folder}: the run before ({holder}) has been silent for {age:.0f} seconds: continuing"
                )
                return
            if not told:
                self._say(f"{self._folder} may be in use ({holder}): waiting up to {_STALE_SECONDS - age:.0f} seconds")
            told = True
            time.sleep(_POLL_SECONDS)

    def take(self) -> None:
        """Take the lock, and touch it until `release`. The folder must exist.

        Raises:
            UserError: See `wait`.
            OSError: The folder cannot be written.
        """
        text = json.dumps(dataclasses.asdict(self._own))
        try:
            with self._file.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            self.wait()
            new = self._file.with_name(f".lock.{self._own.token}")
            new.write_text(text, "utf-8")
            new.replace(self._file)
            time.sleep(_SETTLE_SECONDS)
            self.wait()  # another that found the same dead holder may have it now
        threading.Thread(target=self._beat, name="colm_scale-lock", daemon=True).start()

    def check(self) -> None:
        """Check that this process still has the lock.

        Raises:
            TrainingError: Another run has taken over.
        """
        holder = self.holder()
        if holder is not None and holder.token != self._own.token:
            raise TrainingError(
                f"{self._folder} was taken over by another run ({holder}), because this one was silent for more than "
                f"{_STALE_SECONDS:g} seconds"
            )

    def release(self) -> None:
        """Give the lock up, if this process has it."""
        self._released.set()
        with suppress(OSError):
            holder = self.holder()
            if holder is not None and holder.token == self._own.token:
                self._file.unlink()

    def holder(self) -> Holder | None:
        """Return who holds the lock, or None; one that has not yet written its name is a stranger."""
        try:
            text = self._file.read_text("utf-8")
        except FileNotFoundError:
            return None
        try:
            return Holder(**json.loads(text))
        except (ValueError, TypeError):
            return Holder("an unknown host", 0, 0.0, "", "", "an unknown time", "")

    def _may_follow(self, holder: Holder) -> bool:
        """Return whether the holder is dead, this process, or an earlier start of this job."""
        if holder.machine == self._own.machine:
            return self._own.is_same_process(holder) or not holder.lives_here()
        return bool(self._own.job) and holder.job == self._own.job

    def _beat(self) -> None:
        while not self._released.wait(_BEAT_SECONDS):
            with suppress(OSError):  # the next step that is written reports it
                os.utime(self._file)

    def _touched(self) -> float:
        """Return when the holder last touched the file. Opening it makes network file systems look anew."""
        try:
            with self._file.open("rb") as file:
                return os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return 0.0

    def _now(self) -> float:
        """Return the file system's time."""
        probe = self._file.with_name(f".lock.{self._own.token}.now")
        try:
            probe.write_text("")
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)
