"""What a trainer's logs and files are told about the selection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch

from colm_scale.records import StepReport
from colm_scale.reporting.run_directory import RunDirectory

PREFIX = "coreset/"
_GIB = 2**30


class Reports:
    """Writes each step's rows, and adds up what is logged less often.

    Args:
        directory: Where ``metrics.jsonl`` and ``selection.jsonl`` are written, already created; None on every rank but
            the first.
        names: ``[Q]`` the sources.
    """

    def __init__(self, directory: RunDirectory | None, names: Sequence[str]):
        self._directory, self._names = directory, names
        self._steps: list[dict[str, float]] = []
        self._peaks: list[tuple[int, ...]] = []
        self._dropped: Counter[str] = Counter()

    def add(self, report: StepReport, dropped: Mapping[str, int]) -> None:
        """Add a step, with the examples per source that had no token to learn."""
        if self._directory is not None:
            self._directory.report(report, self._names)
        self._steps.append(numbers(report))
        self._peaks.append(report.peak_bytes)
        self._dropped.update(dropped)

    def take(self) -> dict[str, float]:
        """Means over the steps since the last call, and each rank's peak memory; what was dropped is since the
        beginning."""
        if not self._steps:
            return {}
        found = {name: fmean(step[name] for step in self._steps) for name in self._steps[0]}
        found |= {f"peak_gib_rank{rank}": max(peaks) / _GIB for rank, peaks in enumerate(zip(*self._peaks))}
        found |= {f"dropped/{name}": count for name, count in self._dropped.items()}
        self._steps, self._peaks = [], []
        return {PREFIX + name: value for name, value in found.items()}


def numbers(report: StepReport) -> dict[str, float]:
    """What is logged of a step.

    ``selected_share``: of the candidates. ``kept_share``: of the coreset, those that no ranking had to pick.
    ``coverage``: of the sources among the candidates, those that the coreset has examples of. ``imbalance``: tokens of
    the busiest rank over the mean. ``seconds_select``, ``seconds_step``: of the slowest rank, until training begins and
    in all. ``invalid``, ``overflow``: candidates whose sketch was not finite, and kept ones that found no room.
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
