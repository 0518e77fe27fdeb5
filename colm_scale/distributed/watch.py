"""Every rank fails together: a thread on each rank that ends it when a peer or its launcher is gone.

A rank that fails announces it in the rendezvous store before it closes anything. The others look there every
second, also while they wait in a collective that will never complete, and end. A rank whose launcher was killed has
nobody left to report to, and ends too (DeepSpeed's launcher would otherwise leave its ranks running as orphans).
"""

from __future__ import annotations

import os
import sys
import threading
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

from colm_scale.distributed.group import Group, launched

_POLL_SECONDS = 1.0
_GRACE_SECONDS = 3.0
"""How long the main thread of a peer gets to end by itself once a failure is known."""


class Watch:
    """Started once per process, after `connect`. Does nothing in a process that no launcher started."""

    def __init__(self, group: Group):
        self._group = group
        self._stop = threading.Event()
        self._key = f"colm_scale/failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._store = None
        self._launchers = _launchers() if launched() else []
        if group.world_size > 1:
            self._store = TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=30)
            )
        if self._store is not None or self._launchers:
            threading.Thread(target=self._run, name="colm_scale-watch", daemon=True).start()

    def failed(self, message: str) -> bool:
        """Tell the peers that this rank has failed. False if a peer was first, so that only one message is shown."""
        if self._store is None:
            return True
        try:
            return self._store.add(self._key, 1) == 1
        except RuntimeError:  # the store is gone with the rank that held it: say what is known
            return True

    def close(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            reason = self._reason_to_end()
            if reason and not self._stop.wait(_GRACE_SECONDS):
                print(f"rank {self._group.rank}: ended because {reason}", file=sys.stderr, flush=True)
                os._exit(1)

    def _reason_to_end(self) -> str | None:
        gone = [pid for pid, started in self._launchers if _start_time(pid) != started]
        if gone:
            return f"its launcher (process {gone[0]}) is gone"
        try:
            if self._store is not None and self._store.check([self._key]):
                return "another rank failed"
        except RuntimeError:
            return "the rank that holds the rendezvous store is gone"
        return None


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
