"""Section on the gradient's noise: the batch at which it equals the signal, over time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from colm_scale.reporting.noise import ENOUGH, NoiseScale, RecentVariance
from colm_scale.reporting.page.charts import Chart, Line, binned
from colm_scale.reporting.page.parts import Cell, Section, Table, by_run, colour_of
from colm_scale.reporting.page.read import Run

_POINTS = 20
_UNKNOWN = "Too few steps, or the gradients were not read."


def noise(runs: Sequence[Run]) -> Section:
    """Gradient noise scale, and the batch that each step is worth."""
    totals = [_total(run) for run in runs]
    rows = [[title, *(total.rows().get(title, "-") for total in totals)] for title in _titles(totals)]
    verdicts: list[list[Cell | str]] = [
        [Cell(text=run.name, run=place), sentence]
        for place, (run, total) in enumerate(zip(runs, totals), 1)
        for sentence in total.sentences(ranks=len(run.below("peak_bytes"))) or [_UNKNOWN]
    ]
    return Section(
        id="noise",
        title="Noise of the gradient",
        text="The gradient noise scale is the batch at which the variance of the step's gradient equals the squared "
        "length of the mean gradient, within the sources and at one adapter of the last block. Well below it, larger "
        f"batches save steps; above it, they do not. Averaged over neighbouring steps (at most {_POINTS} points).",
        legend=[("solid", "noise scale"), ("dashed", "random examples that the step's coreset is worth")],
        charts=[
            Chart(
                title="gradient noise scale, examples",
                what="Gradient noise scale",
                lines=[line for place, run in enumerate(runs, 1) for line in _lines(run, place)],
                from_zero=True,
                wide=True,
            )
        ]
        if any(run.below("noise") for run in runs)
        else [],
        tables=[
            Table(caption="Verdicts on the size of a step", head=["run", "verdict"], rows=verdicts, words=True),
            by_run("Noise scale of the run", "figure", runs, rows, words=True),
        ],
    )


def _lines(run: Run, place: int) -> list[Line]:
    steps, inverse = binned(run.steps, run.column("noise", "signal") / _variances(run), _POINTS)
    scale = np.divide(1, inverse, out=np.full_like(inverse, np.nan), where=inverse > 0)
    colour = colour_of(place)
    compared, worth = binned(run.steps, run.column("noise", "worth"), _POINTS)  # known before the scale is
    return [
        Line(x=steps, y=scale, colour=colour, label=f"{run.name}, noise scale", style="solid"),
        Line(x=compared, y=worth, colour=colour, label=f"{run.name}, worth of a step", style="dashed"),
    ]


def _variances(run: Run) -> np.ndarray:
    """``[S]`` variance of an example's gradient; NaN where it is unknown."""
    recent, variances = RecentVariance(), run.column("noise", "noise").copy()
    freedom = np.nan_to_num(run.column("noise", "freedom"), nan=ENOUGH)  # earlier versions did not record it
    known = np.isfinite(variances)
    variances[known] = [recent.add(*step) for step in zip(variances[known].tolist(), freedom[known].tolist())]
    return variances


def _titles(totals: Sequence[NoiseScale]) -> list[str]:
    return list(dict.fromkeys(title for total in totals for title in total.rows()))


def _total(run: Run) -> NoiseScale:
    total = NoiseScale()
    columns = {name: run.column("noise", name) for name in run.below("noise")}
    for row in range(len(run.steps)):
        total.add({name: float(column[row]) for name, column in columns.items() if not np.isnan(column[row])})
    return total
