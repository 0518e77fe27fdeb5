"""Sections on costs: seconds by phase with the bare floor, memory by rank and kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from colm_scale.reporting.page.charts import Chart, Line, binned, number
from colm_scale.reporting.page.parts import Cell, Section, Table, by_run, colour_of, middle, mixed
from colm_scale.reporting.page.read import Run
from colm_scale.reporting.summary import gib

_GROUPS = {
    "sketch": ("sketch",),
    "choose": ("gather", "select", "broadcast", "learn", "route"),
    "train": ("train",),
    "optimizer": ("optimizer",),
}
"""Phases that share a colour; all others are ``other``."""
_OTHER = "other"
_MEANING = {group: ", ".join(phases) for group, phases in _GROUPS.items()} | {_OTHER: "sample, report and others"}
_POINTS = 60
_HEADROOM = 1.2
"""Top of the panels over the slowest run's 95th percentile, since a first step can take many times as long."""
_STYLES: tuple[Literal["solid", "dashed", "dotted"], ...] = ("solid", "dashed", "dotted")
_MOST_RANKS = 8
"""Ranks up to which each is drawn; beyond, the range."""


def times(runs: Sequence[Run]) -> Section:
    """Seconds of a step by phase, with the bare floor."""
    phases = [phase for phase in mixed(runs, lambda run: run.below("seconds")) if phase != "step"]
    rows = [[phase, *(_phase_time(run, phase) for run in runs)] for phase in phases]
    rows += [
        ["step", *(_phase_time(run, "step") for run in runs)],
        ["bare floor", *(_with_range(run.floor_seconds()) for run in runs)],
        ["step / bare floor", *(_with_range(run.column("measured_over_floor")) for run in runs)],
    ]
    slowest = [middle(run.column("seconds", "step"), 95) for run in runs]
    top = _HEADROOM * max((seconds for seconds in slowest if seconds > 0), default=1.0)
    caption = "Median seconds of each phase (share of the step); bare floor with 20th and 80th percentiles"
    without = [run.name for run in runs if np.isnan(run.column("measured_over_floor")).all()]
    return Section(
        id="time",
        title="Time of a step",
        text="Seconds of each phase on its slowest rank, so the phases may add up to slightly more than the step. The "
        "bare floor is the minimum work on the step's tokens, measured in the same process. The panels share a scale; "
        "single slow steps may exceed it.",
        legend=[*((f"fill phase-{group}", meaning) for group, meaning in _MEANING.items()), ("floor", "bare floor")],
        charts=[_time_chart(run, top) for run in runs],
        tables=[by_run(caption, "phase", runs, rows), *_start(runs)],
        missing=[f"{name} has not measured the bare floor yet." for name in without],
    )


def memory(runs: Sequence[Run]) -> Section:
    """Peak memory by rank, with a panel for each kind."""
    kinds = mixed(runs, lambda run: run.below("phase_peak_bytes"))
    charts = [
        Chart(
            title=f"{kind}, GiB",
            what="Peak memory of each rank",
            lines=[line for place, run in enumerate(runs, 1) for line in _memory_lines(run, kind, place)],
            from_zero=True,
            wide=len(kinds) == 1,
        )
        for kind in kinds
    ]
    rows: list[list[Cell | str]] = [
        [Cell(text=run.name, run=place), kind, rank, *_peaks(run, kind, rank)]
        for place, run in enumerate(runs, 1)
        for kind in run.below("phase_peak_bytes")
        for rank in run.below("phase_peak_bytes", kind, "step")
    ]
    head = ["run", "kind", "rank", "peak GiB", "median step, GiB", "highest phase"]
    return Section(
        id="memory",
        title="Memory of each rank",
        text="Peak of every step, by kind: allocator is torch's, device adds what the driver counts beyond it (nvml in "
        "older runs: the driver's figure, which never falls), resident is the process's memory in a run on CPUs. "
        f"One line per rank; the range beyond {_MOST_RANKS} ranks.",
        charts=charts,
        tables=[Table(caption="Peak memory of the run", head=head, rows=rows, folded=len(rows) > 16)],
    )


def _start(runs: Sequence[Run]) -> list[Table]:
    """A table of the time before the first step, if any run has recorded it."""
    taken = [run.start_seconds() for run in runs]
    rows = [
        [part, *("-" if part not in of_run else f"{of_run[part]:.2f}" for of_run in taken)]
        for part in dict.fromkeys(part for of_run in taken for part in of_run)
    ]
    whole = [f"{sum(of_run.values()):.2f}" if of_run else "-" for of_run in taken]
    caption = "Seconds from the start of the process to the first step, before any evaluation (rank 0)"
    return [by_run(caption, "part", runs, [*rows, ["whole", *whole]])] if rows else []


def _time_chart(run: Run, top: float) -> Chart:
    total = np.zeros(0)
    lines = []
    for group in [*_GROUPS, _OTHER]:
        x, y = binned(run.steps, _group_seconds(run, group), _POINTS)
        below = total if len(total) else np.zeros(len(y))
        total = below + y
        shown = f"{group}: {number(float(np.median(y)))} s" if len(y) else group
        lines.append(Line(x=x, y=total, down_to=below, colour=f"phase-{group}", label=shown))
    x, y = binned(run.steps, run.floor_seconds(), _POINTS)
    if len(x):
        lines.append(Line(x=x, y=y, colour="ink", label="bare floor, s", points=len(x) <= 20))
    return Chart(title=run.name, what="Seconds of a step by phase", lines=lines, from_zero=True, top=top)


def _group_seconds(run: Run, group: str) -> np.ndarray:
    named = {phase for phases in _GROUPS.values() for phase in phases} | {"step"}
    others = [phase for phase in run.below("seconds") if phase not in named]
    phases = _GROUPS.get(group, others)
    return sum((np.nan_to_num(run.column("seconds", phase)) for phase in phases), np.zeros(len(run.steps)))


def _phase_time(run: Run, phase: str) -> str:
    seconds, step = middle(run.column("seconds", phase)), middle(run.column("seconds", "step"))
    if np.isnan(seconds):
        return "-"
    return number(seconds) if phase == "step" else f"{seconds:.4f} ({seconds / step:.1%})"


def _with_range(values: np.ndarray) -> str:
    low, median, high = (middle(values, at) for at in (20, 50, 80))
    return "-" if np.isnan(median) else f"{number(median)} ({number(low)} to {number(high)})"


def _memory_lines(run: Run, kind: str, place: int) -> list[Line]:
    ranks = run.below("phase_peak_bytes", kind, "step")
    by_rank = {rank: run.column("phase_peak_bytes", kind, "step", rank) / 2**30 for rank in ranks}
    if len(ranks) > _MOST_RANKS:
        stacked = np.array(list(by_rank.values()))
        by_rank = {"lowest": np.fmin.reduce(stacked), "highest": np.fmax.reduce(stacked)}
    lines = []
    for order, (rank, gibibytes) in enumerate(by_rank.items()):
        x, y = binned(run.steps, gibibytes)
        name = rank if rank in ("lowest", "highest") else f"rank {rank}"
        lines.append(Line(x=x, y=y, colour=colour_of(place), label=f"{run.name}, {name}", style=_STYLES[order % 3]))
    return lines


def _peaks(run: Run, kind: str, rank: str) -> list[str]:
    steps = run.column("phase_peak_bytes", kind, "step", rank)
    phases = [phase for phase in run.below("phase_peak_bytes", kind) if phase != "step"]
    highest = {phase: middle(run.column("phase_peak_bytes", kind, phase, rank), 100) for phase in phases}
    at = max(highest, key=lambda phase: np.nan_to_num(highest[phase]), default="-")
    return [gib(middle(steps, 100)), gib(middle(steps)), at]
