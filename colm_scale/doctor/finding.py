"""What a check has found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Literal, TypeVar

T = TypeVar("T")
Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        about: What was looked at.
        status: problem: a run that needs this fails. warning: it may fail, or be slow.
        what: What was found.
        way_out: What to do about it.
        link: Where it is explained.
    """

    about: str
    status: Status
    what: str
    way_out: str = ""
    link: str = ""


def guarded(about: str, check: Callable[[], Sequence[Finding]], seconds: float) -> list[Finding]:
    """What a check finds; one that fails or does not end by then (a file system that is gone, a driver that hangs) is a
    warning of its own."""
    found = within(check, seconds)
    if isinstance(found, BaseException):
        why = f"did not end within {seconds:g} s" if isinstance(found, TimeoutError) else f"failed: {found!r}"
        return [Finding(about, "warning", f"this check {why}")]
    return list(found)


def within(action: Callable[[], T], seconds: float) -> T | Exception:
    """What ``action`` returns or raises, or a TimeoutError; then it is left behind, in a thread that keeps no process
    alive."""
    done: list[T | Exception] = []

    def run() -> None:
        try:
            done.append(action())
        except Exception as error:
            done.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return done[0] if done else TimeoutError()
