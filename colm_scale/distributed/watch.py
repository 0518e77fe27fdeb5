"""A thread on each rank that ends all ranks when one fails or hangs.

A rank that fails announces it in the rendezvous store. The others poll the store every second, even while they wait in
a collective, and end. Ranks also publish their place in the step, so that the others can name a rank that hangs. The
store is held by torchrun's agent or by rank 0, and its holder may be gone or hang too. A rank whose launcher is gone is
asked to stop, as by SIGTERM: DeepSpeed's launcher leaves orphaned ranks running.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn, TypeVar

import psutil
from torch.distributed import HashStore, Store, TCPStore

from colm_scale.distributed.group import Group, launched

STOPPED = 143
"""Exit code of a run that was asked to stop and has saved a checkpoint: that of SIGTERM."""
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 3.0
"""Time for the main thread of a peer to end on its own after a failure."""
_ANSWER_SECONDS = 10.0
"""Time for the store to answer a rank that is about to end."""
_LEAVE_SECONDS = 3.0
"""Time for the peers, which poll every second, to notice before the rank with the store ends."""
_START_SECONDS = 3600.0
"""Time limit for reading data or loading a model; rank 0 may have a whole stream to read."""

_Answer = TypeVar("_Answer")


class Watch:
    """Watches this rank and its peers. Start it once per process, after `connect`.

    Args:
        timeout: Seconds a rank may spend in one phase of a step.
    """

    def __init__(self, group: Group, timeout: float):
        self._group, self._timeout = group, timeout
        self._stop = threading.Event()
        self._prefix = f"colm_scale/{group.attempt}"
        self._published = ""
        self._counted = False
        self._holder = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
        self._launchers = _launchers() if launched() else []
        self._step = 0
        self._place = (0, "start", time.monotonic())
        self.stop_requested = False
        """Set when this rank is asked to stop. All ranks then save a checkpoint after the step and end."""
        self.last_act: Callable[[], None] = lambda: None
        """Called before this process ends after a failure; returns by itself."""
        self.stopped_code = STOPPED
        """Exit code of a run that has stopped so; 0 after SIGUSR1, so that torchrun does not restart the ranks."""
        self._alone = group.world_size == 1
        self._store: Store = HashStore() if self._alone else _rendezvous_store()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._told_to_stop)
        threading.Thread(target=self._run, name="colm_scale-watch", daemon=True).start()

    def begin(self, step: int) -> None:
        """Note that a step begins. Before the first step, a signal to stop ends the process at once."""
        self._step = step

    def enter(self, phase: str) -> None:
        """Note that this rank enters a phase. All ranks enter the same phases in the same order."""
        count, _, _ = self._place
        self._place = (count + 1, phase, time.monotonic())

    def failed(self) -> bool:
        """Announce that this rank failed. Return False if a peer did first, so that only one message is printed."""
        if self._counted:
            return self._alone
        self._counted = True
        try:
            return self._count_failures(1) == 1
        except (RuntimeError, TimeoutError):  # the store is gone with its rank: print what is known
            return True

    def leave(self, code: int) -> NoReturn:
        """End this process, at once after its last act. The rank that holds the store first waits until its peers know
        of the failure; otherwise they would only see that the store is gone."""
        self._stop.set()
        self.last_act()
        holds_store = not self._alone and self._holder == f"rank {self._group.rank}"
        deadline = time.monotonic() + (_LEAVE_SECONDS if holds_store else 0.0)
        heard = 0
        with suppress(RuntimeError, TimeoutError):
            while heard < self._group.world_size and time.monotonic() < deadline:
                time.sleep(0.1)
                heard = self._count_failures(0)
        os._exit(code)

    def place(self) -> str:
        """Describe where this rank is, for messages."""
        return f"step {self._step}: rank {self._group.rank}, in phase {self._place[1]}"

    def close(self) -> None:
        self._stop.set()

    def _told_to_stop(self, number: int, _frame: object) -> None:
        if number == signal.SIGUSR1:
            self.stopped_code = 0
        if not self._step or (number == signal.SIGINT and self.stop_requested):
            os._exit(self.stopped_code and 128 + number)
        self.stop_requested = True

    def _run(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            place = self._place
            try:
                # Asked twice, because the main thread of a rank that fails with its peer may have a better message.
                if self._reason_to_end() and not self._stop.wait(_GRACE_SECONDS) and (why := self._reason_to_end()):
                    _say(f"rank {self._group.rank}: ended because {why}")
                    self.leave(1)
            except TimeoutError:
                silent = f"{self._holder} hangs: it has not answered for {self._limit():g} seconds"
                _say(f"error: {silent}, {self.place()}, waits; {self._way_out()}")
                os._exit(1)
            if place is self._place and time.monotonic() - place[2] > self._limit():
                message = self._diagnosis()
                if self.failed():
                    _say(message)
                self.leave(1)

    def _reason_to_end(self) -> str | None:
        """Return why this rank must end now, or None. If its launcher is gone it may still finish its step."""
        gone = [process.pid for process in self._launchers if _has_ended(process)]
        self.stop_requested = self.stop_requested or bool(gone)
        if gone and not self._step:
            return f"its launcher (process {gone[0]}) is gone"
        if self._alone:
            return None
        try:
            if not self._ask(self._exchange, self._limit()):
                return None
            self.failed()  # counts this rank among those that know
            return "another rank failed"
        except RuntimeError:  # torchrun's store is gone with it; the step can finish without
            return None if gone else f"{self._holder}, which holds the rendezvous store, is gone"

    def _count_failures(self, more: int) -> int:
        return self._ask(lambda: self._store.add(f"{self._prefix}/failure", more), _ANSWER_SECONDS)

    def _exchange(self) -> bool:
        """Publish this rank's place; return whether another rank has failed."""
        count, phase, _ = self._place
        place = f"{count} {self._group.collectives()} {self._step} {phase}"
        if place != self._published:
            self._store.set(self._key(self._group.rank), place)
            self._published = place
        return self._store.check([f"{self._prefix}/failure"])

    def _ask(self, question: Callable[[], _Answer], seconds: float) -> _Answer:
        """Query the store in a thread, which is abandoned if the store's process is frozen.

        Raises:
            RuntimeError: That process is gone.
            TimeoutError: It does not answer.
        """
        answer: Future[_Answer] = Future()

        def ask() -> None:
            try:
                answer.set_result(question())
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=ask, name="colm_scale-store", daemon=True).start()
        return answer.result(seconds)

    def _limit(self) -> float:
        """Return the seconds that a rank may spend in one place."""
        return self._timeout if self._step else max(self._timeout, _START_SECONDS)

    def _diagnosis(self) -> str:
        """Name the ranks that are stuck: those with the fewest phases, then the fewest collectives."""
        alone = f"error: {self.place()}, hangs; {self._way_out()}"
        if self._alone:
            return alone
        ranks = range(self._group.world_size)
        try:
            places = self._ask(lambda: [self._place_of(rank) for rank in ranks], _ANSWER_SECONDS)
        except (RuntimeError, TimeoutError):
            return alone
        least = min(place[:2] for place in places)
        stuck = [rank for rank in ranks if places[rank][:2] == least]
        _, _, step, phase = places[stuck[0]]
        if len(stuck) == len(ranks):
            return f"error: step {step}: all ranks are stuck in phase {phase}; {self._way_out()}"
        waiting = next(place[3] for place in places if place[:2] > least)
        hangs = f"rank {', '.join(map(str, stuck))} hangs in phase {phase}"
        return f"error: step {step}: {hangs}, others wait for it in phase {waiting}; {self._way_out()}"

    def _way_out(self) -> str:
        return f"raise --train.timeout (now {self._timeout:g} seconds) if that is not long enough"

    def _place_of(self, rank: int) -> tuple[int, int, int, str]:
        """Return the last published place of a rank: phases entered, collectives started, step, and phase."""
        key = self._key(rank)
        if not self._store.check([key]):
            return 0, 0, 0, "start"
        count, collectives, step, phase = self._store.get(key).decode().split(" ", 3)
        return int(count), int(collectives), int(step), phase

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/place/{rank}"


def peer_is_gone(error: BaseException) -> bool:
    """Return whether a collective failed only because another rank is gone."""
    return any(words in str(error) for words in ("by peer", "ncclRemoteError"))


def _rendezvous_store() -> Store:
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=30))


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _launchers() -> list[psutil.Process]:
    """Return the processes that this rank depends on: its parent, and for DeepSpeed the runner above it."""
    found: list[psutil.Process] = []
    with suppress(psutil.Error):
        found.append(psutil.Process(os.getppid()))
        if any("deepspeed.launcher.launch" in word for word in found[0].cmdline()):
            found.append(psutil.Process(found[0].ppid()))
    return [process for process in found if not _has_ended(process)]


def _has_ended(process: psutil.Process) -> bool:
    """Return whether a process is gone or a zombie."""
    with suppress(psutil.NoSuchProcess):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True
