"""Sections on learning: held-out loss and training loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np

from colm_scale.reporting.page.charts import Chart, Line, binned, number
from colm_scale.reporting.page.parts import Cell, Section, Table, by_run, colour_of, mixed
from colm_scale.reporting.page.read import Run
from colm_scale.reporting.summary import Evaluation, HeldOutLoss

Value = Callable[[Evaluation | HeldOutLoss], float | None]

MEANS: dict[str, Value] = {
    "natural mixture": lambda evaluation: evaluation.loss,
    "mean over sources": lambda evaluation: evaluation.loss_by_source,
    "small sources": lambda evaluation: evaluation.small_loss,
}
_SMOOTHED = 40
"""Points of the smoothed training loss."""


def held_out(runs: Sequence[Run]) -> Section:
    """Held-out loss: the means, then every source."""
    sources = mixed(runs, lambda run: [name for evaluation in run.evaluations for name in evaluation.losses])
    values = MEANS | {name: _loss_of(name) for name in sources}
    rows = [[title, *(_change(run, value) for run in runs)] for title, value in values.items()]
    accuracies = (change([evaluation.accuracy for evaluation in run.evaluations], percent=True) for run in runs)
    rows.append(["accuracy, mean over sources", *accuracies])
    tables = [by_run("First and last evaluation", "source", runs, rows)]
    if not all(evaluation.whole for run in runs for evaluation in run.evaluations):
        rows = [[title, *(change(map(value, _samples(run))) for run in runs)] for title, value in values.items()]
        tables.append(by_run("First and last point of the curves", "source", runs, rows, folded=True))
    return Section(
        id="held-out",
        title="Held-out loss",
        text="Mean token loss of held-out examples: first the means, then every source. The curves show the examples "
        "that every evaluation of a run scores (--eval.sample); each line states how many. The first and the last "
        "evaluation score all examples. Each panel has its own logarithmic scale.",
        charts=[_held_out_chart(runs, title, value) for title, value in values.items()],
        tables=tables if sources else [],
        missing=[f"{run.name} has no evaluations." for run in runs if not run.evaluations],
    )


def training(runs: Sequence[Run]) -> Section:
    """Training loss and learning rate."""
    loss, rate = [], []
    for place, run in enumerate(runs, 1):
        y, colour = run.column("loss"), colour_of(place)
        raw, smooth = binned(run.steps, y, 400), binned(run.steps, y, _SMOOTHED)
        if len(run.steps) > _SMOOTHED:
            loss.append(Line(x=raw[0], y=raw[1], colour=colour, label=f"{run.name}, each step", faint=True))
        loss.append(Line(x=smooth[0], y=smooth[1], colour=colour, label=run.name))
        x, y = binned(run.steps, run.column("learning_rate"))
        rate.append(Line(x=x, y=y * 1e3, colour=colour, label=run.name))
    rows: list[list[Cell | str]]
    rows = [[Cell(text=run.name, run=place), *_training_numbers(run)] for place, run in enumerate(runs, 1)]
    head = ["run", "first step", "last step", "mean of last tenth", "steps without update", "largest gradient norm"]
    return Section(
        id="training",
        title="Training loss",
        text="Loss on the coreset of each step. Methods select different examples, so compare runs by their held-out "
        f"loss. Beyond {_SMOOTHED} steps, the heavy line averages neighbouring steps.",
        charts=[
            Chart(title="training loss", what="Loss of the coreset", lines=loss, wide=True, ratios=True),
            Chart(title="learning rate × 1000", what="Schedule", lines=rate, from_zero=True),
        ],
        tables=[Table(caption="Training loss", head=head, rows=rows)],
    )


def _loss_of(name: str) -> Value:
    return lambda evaluation: evaluation.losses.get(name)


def _held_out_chart(runs: Sequence[Run], title: str, value: Value) -> Chart:
    lines = [line for place, run in enumerate(runs, 1) for line in _held_out_lines(run, place, title, value)]
    return Chart(title=title, what="Held-out loss", lines=lines, ratios=True)


def _held_out_lines(run: Run, place: int, title: str, value: Value) -> Iterator[Line]:
    """The curve over the sample; one for each sample if it changed, as it may after a resume."""
    for counts, alike in groupby(run.evaluations, lambda evaluation: evaluation.sample.counts):
        found = [(evaluation.step, value(evaluation.sample)) for evaluation in alike]
        known = [(step, loss) for step, loss in found if loss is not None]
        if known:
            x, y = map(np.array, zip(*known))
            label = f"{run.name}, {counts.get(title, sum(counts.values())):,} examples"
            yield Line(x=x, y=y, colour=colour_of(place), label=label, points=len(x) <= 20)


def _samples(run: Run) -> list[HeldOutLoss]:
    return [evaluation.sample for evaluation in run.evaluations]


def _change(run: Run, value: Value) -> str:
    """A figure of the first and of the last evaluation, over the sample if the last one is only of the sample."""
    last_is_whole = not run.evaluations or run.evaluations[-1].whole
    return change(map(value, run.evaluations if last_is_whole else _samples(run)))


def change(values: Iterable[float | None], percent: bool = False) -> str:
    """The first and the last number; ``-`` if there is none."""
    known = [value for value in values if value is not None]
    shown = [number(found * 100 if percent else found, percent) for found in [*known[:1], *known[1:][-1:]]]
    return " → ".join(shown) or "-"


def _training_numbers(run: Run) -> list[str]:
    loss, norm = run.column("loss"), run.column("gradient_norm")
    if not len(loss):
        return ["-"] * 5
    last = loss[-max(1, len(loss) // 10) :]
    largest = norm[~np.isnan(norm)].max(initial=0.0)
    without = int((run.column("applied") == 0).sum())
    return [number(loss[0]), number(loss[-1]), number(_mean(last)), str(without), number(largest)]


def _mean(values: np.ndarray) -> float:
    """The mean of the values other than NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan
