"""Every rank fails together, and none waits for ever: a thread on each rank that ends it when it must not go on.

A rank that fails announces it in the rendezvous store before it closes anything. The others look there every second,
also while they wait in a collective that will never complete, and end. Ranks say there, too, where in the step they
are, so that one that hangs can be named by those that wait for it. The store is held by torchrun's agent or by rank 0,
which may itself be gone or hang. A rank whose launcher is gone has nobody left to
report to (DeepSpeed's launcher leaves its ranks running as orphans): it is told to stop, as by SIGTERM.
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
from torch.distributed import TCPStore

from colm_scale.distributed.group import Group, launched

STOPPED = 143
"""Exit code of a run that was told to stop and has saved what it had: that of SIGTERM."""
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 3.0
"""How long the main thread of a peer gets to end by itself once a failure is known."""
_ANSWER_SECONDS = 10.0
"""How long the store gets to answer a rank that is about to end."""
_LEAVE_SECONDS = 3.0
"""How long the rank that holds the store waits for its peers before it ends: they look every second."""
_START_SECONDS = 3600.0
"""How long reading data or loading a model may take; rank 0 alone may have a whole stream to read."""

_Answer = TypeVar("_Answer")


class Watch:
    """Started once per process, after `connect`. Alone in a process that no launcher started it has little to watch.

    Args:
        timeout: Seconds a rank may spend in one phase of a step.
    """

    def __init__(self, group: Group, timeout: float):
        self._group, self._timeout = group, timeout
        self._stop = threading.Event()
        self._prefix = f"colm_scale/{group.attempt}"
        self._published = ""
        self._counted = False
        self._store: TCPStore | None = None
        self._holder = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
        self._launchers = _launchers() if launched() else []
        self._step = 0
        self._place = (0, "start", time.monotonic())
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

    def failed(self) -> bool:
        """Tell the peers that this rank has failed. False if a peer was first, so that only one message is shown."""
        store = self._store
        if store is None or self._counted:
            return not self._counted
        self._counted = True
        try:
            return self._ask(lambda: store.add(f"{self._prefix}/failure", 1), _ANSWER_SECONDS) == 1
        except (RuntimeError, TimeoutError):  # the store is gone with the rank that held it: say what is known
            return True

    def leave(self, code: int) -> NoReturn:
        """End this process at once. The rank that holds the store first waits for its peers to have heard of a failure,
        for a store that is gone would be all they know of it."""
        self._stop.set()
        store = self._store
        holds = store is not None and self._holder == f"rank {self._group.rank}"
        deadline = time.monotonic() + (_LEAVE_SECONDS if holds else 0.0)
        heard = 0
        with suppress(RuntimeError, TimeoutError):
            while store is not None and heard < self._group.world_size and time.monotonic() < deadline:
                time.sleep(0.1)
                heard = self._ask(lambda: store.add(f"{self._prefix}/failure", 0), _ANSWER_SECONDS)
        os._exit(code)

    def place(self) -> str:
        """Where this rank is, for people."""
        return f"step {self._step}: rank {self._group.rank}, in phase {self._place[1]}"

    def close(self) -> None:
        self._stop.set()

    def _told_to_stop(self, number: int, _frame: object) -> None:
        if not self._step or (number == signal.SIGINT and self.stop_requested):
            os._exit(128 + number)
        self.stop_requested = True

    def _run(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            place = self._place
            try:
                # Asked twice: the main thread of a rank that fails with its peer may have something better to say.
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
        """Why this rank must end now. Without a launcher it is told to stop, and may end by itself after its step."""
        gone = [process.pid for process in self._launchers if _has_ended(process)]
        self.stop_requested = self.stop_requested or bool(gone)
        if gone and not self._step:
            return f"its launcher (process {gone[0]}) is gone"
        store = self._store
        if store is None:
            return None
        try:
            if not self._ask(lambda: self._exchange(store), self._limit()):
                return None
            self.failed()  # counted as one that has heard of it
            return "another rank failed"
        except RuntimeError:  # torchrun's store is gone with it, and nobody needs it to finish the step
            return None if gone else f"{self._holder}, which holds the rendezvous store, is gone"

    def _exchange(self, store: TCPStore) -> bool:
        """Say where this rank is; whether another has failed."""
        count, phase, _ = self._place
        place = f"{count} {self._group.collectives()} {self._step} {phase}"
        if place != self._published:
            store.set(self._key(self._group.rank), place)
            self._published = place
        return store.check([f"{self._prefix}/failure"])

    def _ask(self, question: Callable[[], _Answer], seconds: float) -> _Answer:
        """Ask the store: in a thread, which is given up if the process that holds it is frozen and never answers.

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
        """Seconds that a rank may stay in one place."""
        return self._timeout if self._step else max(self._timeout, _START_SECONDS)

    def _diagnosis(self) -> str:
        """Who is stuck: the ranks that have come least far, by phases and then by collectives."""
        alone = f"error: {self.place()}, hangs; {self._way_out()}"
        store = self._store
        if store is None:
            return alone
        ranks = range(self._group.world_size)
        try:
            places = self._ask(lambda: [self._place_of(rank, store) for rank in ranks], _ANSWER_SECONDS)
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

    def _place_of(self, rank: int, store: TCPStore) -> tuple[int, int, int, str]:
        """Phases entered and collectives begun so far, step, and phase, as a rank last said; one that has said nothing
        has not begun."""
        key = self._key(rank)
        if not store.check([key]):
            return 0, 0, 0, "start"
        count, collectives, step, phase = store.get(key).decode().split(" ", 3)
        return int(count), int(collectives), int(step), phase

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/place/{rank}"


def peer_is_gone(error: BaseException) -> bool:
    """Whether all that an error of a collective says is that another rank is gone."""
    return any(words in str(error) for words in ("by peer", "ncclRemoteError"))


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _launchers() -> list[psutil.Process]:
    """The processes that must live for this rank to go on: its parent, and for DeepSpeed the runner above it."""
    found: list[psutil.Process] = []
    with suppress(psutil.Error):
        found.append(psutil.Process(os.getppid()))
        if any("deepspeed.launcher.launch" in word for word in found[0].cmdline()):
            found.append(psutil.Process(found[0].ppid()))
    return [process for process in found if not _has_ended(process)]


def _has_ended(process: psutil.Process) -> bool:
    """Whether a process is gone, also if nobody has asked for its exit code yet."""
    with suppress(psutil.NoSuchProcess):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True
