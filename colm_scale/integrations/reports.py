"""Metrics of the selection for a trainer's logs and for the run directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from statistics import fmean

import torch

from colm_scale.records import StepReport

PREFIX = "coreset/"
_GIB = 2**30


class Reports:
    """Passes on each step's report, and averages metrics between the trainer's logs.

    Args:
        write: Called with each report; on the first rank it writes ``metrics.jsonl`` and ``selection.jsonl``.
    """

    def __init__(self, write: Callable[[StepReport], None]):
        self._write = write
        self._steps: list[dict[str, float]] = []
        self._peaks: list[tuple[int, ...]] = []
        self._dropped: Counter[str] = Counter()

    def add(self, report: StepReport, dropped: Mapping[str, int]) -> None:
        """Add a step, with the number of examples per source that had no token to learn."""
        self._write(report)
        self._steps.append(metrics(report))
        self._peaks.append(report.peak_bytes)
        self._dropped.update(dropped)

    def take(self) -> dict[str, float]:
        """Return means and each rank's peak memory since the last call, and dropped examples since the beginning."""
        if not self._steps:
            return {}
        found = {name: fmean(step[name] for step in self._steps) for name in self._steps[0]}
        found |= {f"peak_gib_rank{rank}": max(peaks) / _GIB for rank, peaks in enumerate(zip(*self._peaks))}
        found |= {f"dropped/{name}": count for name, count in self._dropped.items()}
        self._steps, self._peaks = [], []
        return {PREFIX + name: value for name, value in found.items()}


def metrics(report: StepReport) -> dict[str, float]:
    """The logged metrics of a step.

    ``selected_share`` of the candidates; ``kept_share`` of the coreset; ``coverage``: the share of the candidates'
    sources that the coreset has examples of; ``imbalance``: tokens of the busiest rank over the mean;
    ``seconds_select`` and ``seconds_step`` of the slowest rank, until training begins and in total; ``invalid``:
    candidates whose sketch was not finite; ``overflow``: kept candidates beyond the budget.
    """
    sources, selection, seconds = report.candidates.sources, report.selection, report.seconds
    there, trained = (torch.unique(of).numel() for of in (sources, sources[selection.positions]))
    return {
        "selected_share": len(selection) / len(report.candidates),
        "kept_share": selection.kept / max(1, len(selection)),
        "coverage": trained / there,
        "imbalance": report.imbalance,
        "invalid": selection.invalid,
        "overflow": selection.overflow,
        "seconds_select": seconds["step"] - seconds["train"],
        "seconds_step": seconds["step"],
    }
