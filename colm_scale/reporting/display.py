"""What rank 0 shows while it trains, on the terminal and in the run's log."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from colm_scale.records import StepReport
from colm_scale.reporting.summary import Evaluation, gib

_MOST_LINES = 100
_MOST_RANKS = 8
"""Ranks whose memory is written out; of more, the range."""
_TEXT_WIDTH = 160
_LEAST_SHARE = 0.01


class Display:
    """Shows a run as it goes. Use it as a context, so that the terminal is restored whatever happens.

    Args:
        mode: live: updates in place. plain: a line per step, in long runs every so many steps, so that there are about
            a hundred. off: nothing on the terminal. auto: live on a terminal, else plain.
        memory_label: What the reports' peaks are, for people.
        log: File that gets the lines of the plain mode, whatever the mode.
        console: Where to show it; by default standard output.
    """

    def __init__(
        self,
        mode: Literal["auto", "live", "plain", "off"],
        memory_label: str = "memory",
        log: Path | None = None,
        console: Console | None = None,
    ):
        self._console = console or Console(width=None if sys.stdout.isatty() else _TEXT_WIDTH)
        self._mode = mode if mode != "auto" else "live" if self._console.is_interactive else "plain"
        self._memory_label, self._log = memory_label, log
        self._live: Live | None = None
        self._total, self._every = 0, 1
        self._seconds: list[float] = []
        self._floor: float | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, total_steps: int, done: int = 0) -> None:
        """Begin; the steps are numbered 1 to ``total_steps``, and ``done`` of them were made before."""
        self._total, self._every = total_steps, math.ceil(total_steps / _MOST_LINES)
        if self._mode == "live":
            self._progress = _progress()
            self._task = self._progress.add_task("step", total=total_steps, completed=done)
            self._live = Live(self._progress, console=self._console)
            self._live.start()

    def step(self, report: StepReport) -> None:
        """Show a step."""
        self._seconds.append(report.seconds["step"])
        self._floor = self._floor if report.floor is None else report.floor
        if self._live:
            self._progress.update(self._task, completed=report.step)
            self._live.update(Group(self._progress, self._facts(report)))
        if report.step % self._every == 0 or report.step in (1, self._total):
            self._write(self._line(report), shown=self._mode == "plain")

    def message(self, message: RenderableType) -> None:
        """Print a text or a table, on the terminal and as plain text into the log."""
        self._write(message, shown=self._mode != "off")

    def evaluation(self, evaluation: Evaluation) -> None:
        """Say how the held-out data does."""
        parts = [
            ("natural mixture", evaluation.loss, ".3f"),
            ("mean over sources", evaluation.loss_by_source, ".3f"),
            ("small sources", evaluation.small_loss, ".3f"),
            ("right answers", evaluation.accuracy, ".1%"),
        ]
        known = [f"{name} {value:{form}}" for name, value, form in parts if value is not None]
        examples = f"{sum(evaluation.counts.values()):,} examples{'' if evaluation.whole else ', a sample'}"
        self.message(f"held-out loss at step {evaluation.step} ({examples}): {', '.join(known)}")

    def close(self) -> None:
        """Leave the terminal as it was; nothing happens the second time."""
        if self._live:
            self._live.stop()
            self._live = None

    def _line(self, report: StepReport) -> str:
        left = sum(self._seconds) / len(self._seconds) * (self._total - report.step)
        parts = [
            f"step {report.step:>{len(str(self._total))}}/{self._total}",
            f"loss {report.loss:.4f}",
            *([] if report.applied else [f"no update: overflow at loss scale {report.loss_scale:g}"]),
            f"lr {report.learning_rate:.2e}",
            f"{report.seconds['step']:.3f} s ({phase_shares(report.seconds)})",
            *([] if report.floor is None else [f"step/floor {report.floor:.3f}"]),
            *nearness(report.telemetry),
            f"peak {rank_memory(report.peak_bytes)}",
            f"left {timedelta(seconds=round(left))}",
        ]
        return "  ".join(parts)

    def _facts(self, report: StepReport) -> Table:
        floor = "not measured yet" if self._floor is None else f"{self._floor:.3f}"
        table = Table.grid(padding=(0, 2))
        for name, value in (
            ("loss", f"{report.loss:.4f}"),
            ("learning rate", f"{report.learning_rate:.2e}"),
            ("selection", "  ".join(nearness(report.telemetry)) or "-"),
            ("time per step", f"{report.seconds['step']:.3f} s: {phase_shares(report.seconds)}"),
            ("step / bare floor", floor),
            (self._memory_label, rank_memory(report.peak_bytes)),
        ):
            table.add_row(Text(name, style="dim"), value)
        return table

    def _write(self, renderable: RenderableType, *, shown: bool) -> None:
        if shown:
            _print(self._console, renderable)
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as file:
                _print(Console(file=file, width=_TEXT_WIDTH, force_terminal=False, color_system=None), renderable)


def phase_shares(seconds: dict[str, float]) -> str:
    """What share of the step each phase took, the longest first, those of 1 % and more."""
    shares = {phase: taken / seconds["step"] for phase, taken in seconds.items() if phase != "step"}
    longest_first = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{phase} {share:.0%}" for phase, share in longest_first if share >= _LEAST_SHARE)


def nearness(telemetry: dict[str, float]) -> list[str]:
    """How far the coreset's mean is from the candidates', beside that of a random draw with the same quotas."""
    if "sketch_error" not in telemetry:
        return []
    return [f"sketch error {telemetry['sketch_error']:.2f} (random {telemetry['sketch_error_stratified']:.2f})"]


def rank_memory(peak_bytes: Sequence[int]) -> str:
    """Each rank's peak in GiB, or of many ranks the lowest and the highest."""
    if len(peak_bytes) <= _MOST_RANKS:
        return f"{' '.join(map(gib, peak_bytes))} GiB"
    return f"{gib(min(peak_bytes))} to {gib(max(peak_bytes))} GiB on {len(peak_bytes)} ranks"


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn()
    return Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), expand=True)


def _print(console: Console, renderable: RenderableType) -> None:
    # Text goes out as it is: brackets are not markup, and a long line is one line.
    console.print(renderable, markup=False, highlight=False, soft_wrap=isinstance(renderable, str))
