"""Every rank fails together, and none waits for ever: a thread on each rank that ends it when it must not go on.

A rank that fails announces it in the rendezvous store before it closes anything. The others look there every second,
also while they wait in a collective that will never complete, and end. Ranks say there, too, where in the step they
are, so that one that hangs can be named by those that wait for it. A rank whose launcher is gone has nobody left to
report to (DeepSpeed's launcher leaves its ranks running as orphans): it is told to stop, as by SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

from colm_scale.distributed.group import Group, launched

STOPPED = 143
"""Exit code of a run that was told to stop and has saved what it had: that of SIGTERM."""
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 3.0
"""How long the main thread of a peer gets to end by itself once a failure is known."""
_STOP_SECONDS = 60.0
"""How long an orphan gets to finish its step and save it."""
_START_SECONDS = 3600.0
"""How long reading data or loading a model may take; rank 0 alone may have a whole stream to read."""


class Watch:
    """Started once per process, after `connect`. Alone in a process that no launcher started it has little to watch.

    Args:
        timeout: Seconds a rank may spend in one phase of a step.
    """

    def __init__(self, group: Group, timeout: float):
        self._group, self._timeout = group, timeout
        self._stop = threading.Event()
        self._prefix = f"colm_scale/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._store = None
        self._launchers = _launchers() if launched() else []
        self._step = 0
        self._place = (0, "start", time.monotonic())
        self._orphan_since: float | None = None
        self.stop_requested = False
        """Whether this rank was told to stop: the run saves itself after the step, on all ranks, and ends."""
        if group.world_size > 1:
            self._store = TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=30)
            )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._told_to_stop)
        threading.Thread(target=self._run, name="colm_scale-watch", daemon=True).start()

    def begin(self, step: int) -> None:
        """A step begins; before the first, being told to stop ends the process at once."""
        self._step = step

    def enter(self, phase: str) -> None:
        """This rank is now in ``phase``. All ranks call this equally often, in the same order."""
        count, _, _ = self._place
        self._place = (count + 1, phase, time.monotonic())

    def failed(self, message: str) -> bool:
        """Tell the peers that this rank has failed. False if a peer was first, so that only one message is shown."""
        if self._store is None:
            return True
        try:
            return self._store.add(f"{self._prefix}/failure", 1) == 1
        except RuntimeError:  # the store is gone with the rank that held it: say what is known
            return True

    def close(self) -> None:
        self._stop.set()

    def _told_to_stop(self, number: int, _frame: object) -> None:
        if not self._step or (number == signal.SIGINT and self.stop_requested):
            os._exit(128 + number)
        self.stop_requested = True

    def _run(self) -> None:
        published = -1
        while not self._stop.wait(_POLL_SECONDS):
            place = self._place
            try:
                if self._store is not None and place[0] != published:
                    self._store.set(self._key(self._group.rank), f"{place[0]} {self._step} {place[1]}")
                    published = place[0]
                reason = self._reason_to_end() or self._hang(place)
            except RuntimeError:
                reason = "the rank that holds the rendezvous store is gone or hangs"
            if reason and not self._stop.wait(_GRACE_SECONDS):
                print(f"rank {self._group.rank}: ended because {reason}", file=sys.stderr, flush=True)
                os._exit(1)

    def _reason_to_end(self) -> str | None:
        if self._store is not None and self._store.check([f"{self._prefix}/failure"]):
            return "another rank failed"
        gone = [pid for pid, started in self._launchers if _start_time(pid) != started]
        if not gone:
            return None
        self._orphan_since = self._orphan_since or time.monotonic()
        self.stop_requested = True
        if self._step and time.monotonic() - self._orphan_since < _STOP_SECONDS:
            return None
        return f"its launcher (process {gone[0]}) is gone"

    def _hang(self, place: tuple[int, str, float]) -> str | None:
        """If this rank has been in one place for too long, end it; who announces it first says which rank is stuck."""
        limit = self._timeout if self._step else max(self._timeout, _START_SECONDS)
        if place is not self._place or time.monotonic() - place[2] < limit:
            return None
        message = self._diagnosis(limit)
        if self.failed(message):
            print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(1)

    def _diagnosis(self, limit: float) -> str:
        way_out = f"raise --train.timeout (now {limit:g} seconds) if that is not long enough"
        if self._store is None:
            return f"step {self._step} is stuck in phase {self._place[1]}; {way_out}"
        ranks = range(self._group.world_size)
        places = {rank: self._place_of(rank) for rank in ranks}
        count = min(int(place[0]) for place in places.values())
        stuck = [rank for rank, place in places.items() if int(place[0]) == count]
        _, step, phase = places[stuck[0]]
        if len(stuck) == len(ranks):
            return f"step {step}: all ranks are stuck in phase {phase}; {way_out}"
        waiting = next(place[2] for place in places.values() if int(place[0]) > count)
        names = ", ".join(map(str, stuck))
        return f"step {step}: rank {names} hangs in phase {phase}, others wait for it in phase {waiting}; {way_out}"

    def _place_of(self, rank: int) -> list[str]:
        """Phases entered so far, step, and phase, as a rank last said; one that has said nothing has not begun."""
        key = self._key(rank)
        return self._store.get(key).decode().split(" ", 2) if self._store.check([key]) else ["0", "0", "start"]

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/place/{rank}"


def _start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None if it is gone (or where there is no /proc)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _launchers() -> list[tuple[int, str | None]]:
    """The processes that must live for this rank to go on: its parent, and for DeepSpeed the runner above it."""
    pids = [os.getppid()]
    try:
        grandparent = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
        if b"deepspeed" in Path(f"/proc/{grandparent}/cmdline").read_bytes():
            pids.append(grandparent)
    except OSError:
        pass
    return [(pid, started) for pid in pids if (started := _start_time(pid)) is not None]
