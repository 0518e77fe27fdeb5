"""Progress of a run on rank 0, on the terminal and in the run's log."""

from __future__ import annotations

import math
import os
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
from colm_scale.reporting.nearness import nearness
from colm_scale.reporting.noise import NoiseScale
from colm_scale.reporting.summary import Evaluation, gib

_MOST_LINES = 100
_MOST_RANKS = 8
"""Ranks up to which the memory of each is shown; beyond, the range."""
_TEXT_WIDTH = 160
_LEAST_SHARE = 0.01


class Display:
    """Shows the progress of a run. Use it as a context manager, which restores the terminal after an error.

    Args:
        mode: live: update in place. plain: print a line per step, about a hundred lines in a long run. off: print
            nothing. auto: live on a terminal, else plain.
        memory_label: Name of the memory figure, e.g. "GPU memory (torch allocator)".
        log: File for the lines of the plain mode, which are written in every mode.
        console: Standard output by default.
    """

    def __init__(
        self,
        mode: Literal["auto", "live", "plain", "off"],
        memory_label: str = "memory",
        log: Path = Path(os.devnull),
        console: Console | None = None,
    ):
        self._console = console or Console(width=None if sys.stdout.isatty() else _TEXT_WIDTH)
        self._mode = mode if mode != "auto" else "live" if self._console.is_interactive else "plain"
        self._memory_label, self._log = memory_label, log
        self._live: Live | None = None
        self._total, self._every = 0, 1
        self._seconds: list[float] = []
        self._floor, self._noise = "not measured yet", NoiseScale()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, total_steps: int, done: int = 0) -> None:
        """Start at step ``done`` of 1 to ``total_steps``."""
        self._total, self._every = total_steps, math.ceil(total_steps / _MOST_LINES)
        if self._mode == "live":
            self._progress = _progress()
            self._task = self._progress.add_task("step", total=total_steps, completed=done)
            self._live = Live(self._progress, console=self._console)
            self._live.start()

    def step(self, report: StepReport) -> None:
        """Show a step."""
        self._seconds.append(report.seconds["step"])
        self._noise.add(report.noise)
        if report.floor is not None:
            self._floor = f"{report.floor:.3f}"
        if self._live:
            self._progress.update(self._task, completed=report.step)
            self._live.update(Group(self._progress, self._facts(report)))
        if report.step % self._every == 0 or report.step in (1, self._total):
            self._write(self._line(report), shown=self._mode == "plain")

    def message(self, message: RenderableType) -> None:
        """Print a text or a table on the terminal, and as plain text in the log."""
        self._write(message, shown=self._mode != "off")

    def evaluation(self, evaluation: Evaluation) -> None:
        """Print held-out loss and accuracy."""
        parts = [
            ("natural mixture", evaluation.loss, ".3f"),
            ("mean over sources", evaluation.loss_by_source, ".3f"),
            ("small sources", evaluation.small_loss, ".3f"),
            ("accuracy", evaluation.accuracy, ".1%"),
        ]
        known = [f"{name} {value:{form}}" for name, value, form in parts if value is not None]
        examples = f"{sum(evaluation.counts.values()):,} {'' if evaluation.whole else 'sampled '}examples"
        self.message(f"held-out loss at step {evaluation.step} ({examples}): {', '.join(known)}")

    def close(self) -> None:
        """Restore the terminal; a second call has no effect."""
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
            *self._noise.recent(),
            f"peak {rank_memory(report.peak_bytes)}",
            f"left {timedelta(seconds=round(left))}",
        ]
        return "  ".join(parts)

    def _facts(self, report: StepReport) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, value in (
            ("loss", f"{report.loss:.4f}"),
            ("learning rate", f"{report.learning_rate:.2e}"),
            ("selection", "  ".join([*nearness(report.telemetry), *self._noise.recent()]) or "-"),
            ("time per step", f"{report.seconds['step']:.3f} s: {phase_shares(report.seconds)}"),
            ("step / bare floor", self._floor),
            (self._memory_label, rank_memory(report.peak_bytes)),
        ):
            table.add_row(Text(name, style="dim"), value)
        return table

    def _write(self, renderable: RenderableType, *, shown: bool) -> None:
        if shown:
            _print(self._console, renderable)
        with self._log.open("a", encoding="utf-8") as file:
            _print(Console(file=file, width=_TEXT_WIDTH, force_terminal=False, color_system=None), renderable)


def phase_shares(seconds: dict[str, float]) -> str:
    """Share of the step of each phase with 1 % or more, longest first."""
    shares = {phase: taken / seconds["step"] for phase, taken in seconds.items() if phase != "step"}
    longest_first = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{phase} {share:.0%}" for phase, share in longest_first if share >= _LEAST_SHARE)


def rank_memory(peak_bytes: Sequence[int]) -> str:
    """Peak of each rank in GiB; the lowest and highest of many ranks."""
    if len(peak_bytes) <= _MOST_RANKS:
        return f"{' '.join(map(gib, peak_bytes))} GiB"
    return f"{gib(min(peak_bytes))} to {gib(max(peak_bytes))} GiB on {len(peak_bytes)} ranks"


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn()
    return Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), expand=True)


def _print(console: Console, renderable: RenderableType) -> None:
    # Text is printed verbatim: brackets are not markup, and long lines are not wrapped.
    console.print(renderable, markup=False, highlight=False, soft_wrap=isinstance(renderable, str))
