"""Sections on the selection: coverage of every source, its share over time, and nearness to the candidates' mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from colm_scale.reporting.nearness import TITLES, Nearness
from colm_scale.reporting.page.charts import Chart, Line, binned
from colm_scale.reporting.page.parts import Cell, Section, Table, by_run, colour_of, mixed
from colm_scale.reporting.page.read import Run

_SHARES = 12
"""Points of a curve over time: single steps have too few examples."""
_COMPARED: dict[str, Literal["dashed"]] = {"stratified": "dashed", "candidates": "dashed", "by_chance": "dashed"}
"""Name endings of figures for comparison, and how they are drawn."""


def coverage(runs: Sequence[Run]) -> Section:
    """Share of each source that was ever a candidate, and trained on."""
    names = mixed(runs, lambda run: run.composition.names)
    groups = {_marked(runs, name): [name] for name in names} | {"all sources": names}
    rows: list[list[Cell | str]] = [
        [title, _size(runs, of_group), *(_covered(run, of_group, place) for place, run in enumerate(runs, 1))]
        for title, of_group in groups.items()
    ]
    head = ["source", "examples", *(run.name for run in runs)]
    return Section(
        id="coverage",
        title="Coverage",
        text="Share of each source's training examples that were candidates at least once, and share that was trained "
        "on at least once.",
        legend=[("bar-outer", "were candidates"), ("bar-inner", "were trained on")],
        tables=[Table(caption="Candidates / trained on, as shares of a source's examples", head=head, rows=rows)],
        missing=[f"{run.name} does not record the size of its sources: counts instead of shares." for run in runs
                 if not run.sizes],
    )


def shares(runs: Sequence[Run]) -> Section:
    """Share of the coreset of each source, over time."""
    names = mixed(runs, lambda run: run.composition.names)
    charts = [
        Chart(title=name, what="Share of the coreset", percent=True, from_zero=True, lines=_share_lines(runs, name))
        for name in names
    ]
    rows = [[name, *(_mean_shares(run, name) for run in runs)] for name in names]
    return Section(
        id="shares",
        title="Selected share over time",
        text=f"Share of the coreset that came from each source, averaged over neighbouring steps (at most {_SHARES} "
        "points). A source was favoured where the solid line is above the dotted one.",
        legend=[("solid", "of the coreset"), ("dotted", "of the candidates")],
        charts=charts,
        tables=[by_run("Mean share of the candidates → of the coreset", "source", runs, rows)],
    )


def nearness(runs: Sequence[Run]) -> Section:
    """Telemetry of the selection, compared with random draws."""
    bases = [name for name in mixed(runs, lambda run: run.below("telemetry")) if _base(name) == name]
    charts = [
        Chart(
            title=TITLES.get(base, base.replace("_", " ")),
            what="Telemetry of the selection",
            lines=[line for place, run in enumerate(runs, 1) for line in _telemetry_lines(run, base, place)],
        )
        for base in bases
    ]
    totals = [_total(run) for run in runs]
    measured = [total.rows() for total in totals]
    titles = list(dict.fromkeys(title for found in measured for title in found))
    rows = [[title, *(found.get(title, "-") for found in measured)] for title in titles]
    verdicts: list[list[Cell | str]] = [
        [Cell(text=run.name, run=place), sentence]
        for place, (run, total) in enumerate(zip(runs, totals), 1)
        for sentence in total.sentences() or ["Too few steps were compared with a random draw."]
    ]
    return Section(
        id="nearness",
        title="Nearness to the candidates",
        text="How near the mean of the coreset is to the mean of all candidates, compared with a random draw with the "
        "same quotas. Lower errors and higher cosines are nearer.",
        legend=[("solid", "the selection"), ("dashed", "a random draw with the same quotas, or the candidates"),
                ("dotted", "a uniform draw")],
        charts=charts,
        tables=[
            Table(caption="Verdicts", head=["run", "verdict"], rows=verdicts, words=True),
            by_run("Means over the steps", "figure", runs, rows, words=True),
        ],
    )


def _counts(run: Run, names: Sequence[str]) -> tuple[int, int]:
    """Distinct examples of these sources that were candidates, and that were trained on."""
    places = [place for place, name in enumerate(run.composition.names) if name in names]
    return int(run.composition.seen[places].sum()), int(run.composition.trained[places].sum())


def _covered(run: Run, names: Sequence[str], place: int) -> Cell:
    seen, trained = _counts(run, names)
    size = sum(run.sizes.get(name, 0) for name in names)
    if not size:
        return Cell(text=f"{seen:,} / {trained:,}")
    drawn, picked = seen / size, trained / size
    return Cell(text=f"{drawn:.1%} / {picked:.1%}", bar=min(1.0, drawn), inner=min(1.0, picked), run=place)


def _size(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Training examples of these sources; a range if the runs have different data."""
    sizes = {sum(run.sizes.get(name, 0) for name in names) for run in runs if run.sizes}
    return " to ".join(f"{size:,}" for size in sorted({min(sizes), max(sizes)})) if sizes else "-"


def _marked(runs: Sequence[Run], name: str) -> str:
    return f"{name} (kept)" if any(name in run.kept for run in runs) else name


def _share_lines(runs: Sequence[Run], name: str) -> list[Line]:
    """A solid line per run for the coreset, and a dotted one for each distinct course of the candidates."""
    picked: list[Line] = []
    drawn: dict[tuple[bytes, bytes], list[Line]] = {}
    for place, run in enumerate(runs, 1):
        composition, colour = run.composition, colour_of(place)
        if name not in composition.names or not len(composition.selected):
            continue
        column = composition.names.index(name)
        x, y = _share(run, composition.selected, column)
        picked.append(Line(x=x, y=y, colour=colour, label=f"{run.name}, of the coreset"))
        x, y = _share(run, composition.candidates, column)
        line = Line(x=x, y=y, colour=colour, label=f"{run.name}, of the candidates", style="dotted")
        drawn.setdefault((x.tobytes(), y.tobytes()), []).append(line)
    shared = [replace(same[0], colour="ink-2", label="of the candidates") for same in drawn.values() if len(same) > 1]
    return [*shared, *(same[0] for same in drawn.values() if len(same) == 1), *picked]


def _share(run: Run, counts: np.ndarray, column: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the percentage of their examples that belong to one source."""
    steps = min(len(run.steps), len(counts))  # a running run may be one row ahead in one of the files
    percent = 100 * counts[:steps, column] / np.maximum(1, counts[:steps].sum(1))
    return binned(run.steps[:steps], percent, _SHARES)


def _mean_shares(run: Run, name: str) -> str:
    composition = run.composition
    if name not in composition.names or not len(composition.selected):
        return "-"
    column = composition.names.index(name)
    drawn, picked = (100 * counts[:, column].sum() / max(1, counts.sum()) for counts in
                     (composition.candidates, composition.selected))
    return f"{drawn:.1f}% → {picked:.1f}%"


def _base(name: str) -> str:
    """The figure that this one is compared with, or its own name."""
    return next((name.removesuffix(f"_{end}") for end in _COMPARED if name.endswith(f"_{end}")), name)


def _telemetry_lines(run: Run, base: str, place: int) -> list[Line]:
    lines = []
    for name in run.below("telemetry"):
        if _base(name) == base:
            ending = name.removeprefix(base).strip("_")
            x, y = binned(run.steps, run.column("telemetry", name), _SHARES)
            label = f"{run.name}, {ending.replace('_', ' ')}" if ending else run.name
            lines.append(Line(x=x, y=y, colour=colour_of(place), label=label, style=_COMPARED.get(ending, "solid")))
    return lines


def _total(run: Run) -> Nearness:
    total = Nearness()
    columns = {name: run.column("telemetry", name) for name in run.below("telemetry")}
    for row in range(len(run.steps)):
        total.add({name: float(column[row]) for name, column in columns.items()})
    return total
