"""The result of a check, its presentation, and a time limit for checks that may hang."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Literal, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

T = TypeVar("T")
Status = Literal["ok", "warning", "problem"]

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}
_WIDTH = 140


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        about: The thing that was checked.
        status: problem: a run that needs this fails. warning: it may fail, or be slow.
        what: The result.
        way_out: Advice.
        link: Page with an explanation.
    """

    about: str
    status: Status
    what: str
    way_out: str = ""
    link: str = ""


def guarded(about: str, check: Callable[[], Sequence[Finding]], seconds: float) -> list[Finding]:
    """Run a check; one that raises or exceeds the time limit (a lost file system, a hung driver) becomes a warning."""
    found = within(check, seconds)
    if isinstance(found, BaseException):
        why = f"did not end within {seconds:g} s" if isinstance(found, TimeoutError) else f"failed: {found!r}"
        return [Finding(about, "warning", f"this check {why}")]
    return list(found)


def within(action: Callable[[], T], seconds: float) -> T | Exception:
    """Return what ``action`` returns or raises, or a TimeoutError; it then stays behind in a daemon thread."""
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


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if there is a problem, else 0."""
    return int(any(finding.status == "problem" for finding in findings))


def as_json(findings: Sequence[Finding]) -> str:
    """A list of objects with the fields of `Finding`."""
    return json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2)


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print a table of all findings with advice, then the counts."""
    if not console.is_terminal:
        console = Console(file=console.file, width=_WIDTH, color_system=None)
    table = Table(box=box.SIMPLE, show_edge=False)
    for heading in ("check", "", "result"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        advice = [f"-> {finding.way_out}"] if finding.way_out else []
        lines = "\n".join([finding.what, *advice, *([finding.link] if finding.link else [])])
        table.add_row(Text(finding.about), Text(finding.status, style=_COLOURS[finding.status]), Text(lines))
    console.print(table)
    counts = Counter(finding.status for finding in findings)
    console.print(f"{counts['problem']} problem(s), {counts['warning']} warning(s)", highlight=False)
