"""What was selected: coverage of every source, its share over time, and what the selection was worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from colm_scale.reporting.page.charts import Chart, Line, binned
from colm_scale.reporting.page.learning import mixed
from colm_scale.reporting.page.parts import Cell, Section, Table, colour_of
from colm_scale.reporting.page.read import Run
from colm_scale.reporting.worth import Worth

_SHARES = 12
"""Points of a share over time: single steps hold too few examples to tell."""
_COMPARED: dict[str, Literal["dashed"]] = {"stratified": "dashed", "candidates": "dashed", "by_chance": "dashed"}
"""Endings of numbers that another one is compared with, and how they are drawn."""
_TITLES = {
    "effective_sources": "effective number of sources",
    "rank": "effective rank of the sketches",
    "overlap": "picks in common with a random draw",
    "sketch_error": "error to the candidates' mean, by sketches",
    "sketch_cosine": "cosine to the candidates' mean, by sketches",
}


def coverage(runs: Sequence[Run]) -> Section:
    """How much of each source was ever a candidate, and trained on."""
    names = mixed(runs, lambda run: run.composition.names)
    groups = {_marked(runs, name): [name] for name in names} | {"all sources": names}
    rows: list[list[Cell | str]] = [
        [title, _size(runs, of_group), *(_covered(run, of_group, place) for place, run in enumerate(runs, 1))]
        for title, of_group in groups.items()
    ]
    return Section(
        id="coverage",
        title="Coverage",
        text="Different examples of each source that were candidates at least once, and of those, trained on at least "
        "once, as shares of the source's training examples.",
        legend=[("bar-outer", "were candidates"), ("bar-inner", "were trained on")],
        tables=[
            Table(
                caption="Candidates / trained on, as shares of a source's examples",
                head=["source", "examples", *(run.name for run in runs)],
                rows=rows,
            )
        ],
        missing=[f"{run.name} does not say how large its sources are: counts in place of shares." for run in runs
                 if not run.sizes],
    )


def shares(runs: Sequence[Run]) -> Section:
    """What part of the coreset each source had, over time."""
    names = mixed(runs, lambda run: run.composition.names)
    charts = [
        Chart(title=name, what="Share of the coreset", percent=True, from_zero=True, lines=_share_lines(runs, name))
        for name in names
    ]
    rows = [[name, *(_mean_shares(run, name) for run in runs)] for name in names]
    return Section(
        id="shares",
        title="Selected share over time",
        text=f"Part of the coreset that came from each source, as the mean of neighbouring steps (at most {_SHARES} "
        "points). Where the solid line is above the dotted one, the source was favoured.",
        legend=[("solid", "of the coreset"), ("dotted", "of the candidates")],
        charts=charts,
        tables=[
            Table(
                caption="Mean share of the candidates → of the coreset",
                head=["source", *(run.name for run in runs)],
                rows=rows,
            )
        ],
    )


def worth(runs: Sequence[Run]) -> Section:
    """The telemetry of the selection."""
    bases = [name for name in mixed(runs, lambda run: run.below("telemetry")) if _base(name) == name]
    charts = [
        Chart(
            title=_TITLES.get(base, base.replace("_", " ")),
            what="Telemetry of the selection",
            lines=[line for place, run in enumerate(runs, 1) for line in _telemetry_lines(run, base, place)],
        )
        for base in bases
    ]
    added = [_worth(run) for run in runs]
    measured = [of_run.rows() for of_run in added]
    titles = list(dict.fromkeys(title for found in measured for title in found))
    rows = [[title, *(found.get(title, "-") for found in measured)] for title in titles]
    verdicts: list[list[Cell | str]] = [
        [Cell(text=run.name, run=place), sentence]
        for place, (run, of_run) in enumerate(zip(runs, added), 1)
        for sentence in of_run.sentences() or ["There are too few comparisons with a random draw to tell."]
    ]
    return Section(
        id="worth",
        title="What the selection was worth",
        text="Whether the coreset was nearer to the mean of all candidates than a random draw with the same quotas. "
        "Lower errors and higher cosines are nearer.",
        legend=[("solid", "the selection"), ("dashed", "a random draw with the same quotas, or the candidates"),
                ("dotted", "a uniform draw")],
        charts=charts,
        tables=[
            Table(caption="Verdicts", head=["run", "verdict"], rows=verdicts, words=True),
            Table(caption="Means over the steps", head=["number", *(run.name for run in runs)], rows=rows, words=True),
        ],
    )


def _counts(run: Run, names: Sequence[str]) -> tuple[int, int]:
    """Different examples of these sources that were candidates, and trained on."""
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
    """Examples of these sources; of runs on different data the range."""
    sizes = {sum(run.sizes.get(name, 0) for name in names) for run in runs if run.sizes}
    return " to ".join(f"{size:,}" for size in sorted({min(sizes), max(sizes)})) if sizes else "-"


def _marked(runs: Sequence[Run], name: str) -> str:
    return f"{name} (kept)" if any(name in run.kept for run in runs) else name


def _share_lines(runs: Sequence[Run], name: str) -> list[Line]:
    """A solid line per run for the coreset, and dotted ones for the candidates; one for all runs that drew the same."""
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
    """Steps, and percent of their examples that are of one source."""
    steps = min(len(run.steps), len(counts))  # a run under way may have written a row of one file and not of the other
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
    """The number that this one is a comparison for, or itself."""
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


def _worth(run: Run) -> Worth:
    worth = Worth()
    columns = {name: run.column("telemetry", name) for name in run.below("telemetry")}
    for row in range(len(run.steps)):
        worth.add({name: float(column[row]) for name, column in columns.items()})
    return worth
