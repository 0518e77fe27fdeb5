"""What was learned: the runs in a line each, held-out loss, training loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np

from colm_scale.reporting.page.charts import Chart, Line, binned, number
from colm_scale.reporting.page.parts import Cell, Section, Table, colour_of
from colm_scale.reporting.page.read import Run
from colm_scale.reporting.summary import Evaluation, HeldOutLoss, gib

Value = Callable[[Evaluation | HeldOutLoss], float | None]

_MEANS: dict[str, Value] = {
    "natural mixture": lambda evaluation: evaluation.loss,
    "mean over sources": lambda evaluation: evaluation.loss_by_source,
    "small sources": lambda evaluation: evaluation.small_loss,
}
_SMOOTHED = 40
"""Points of the smoothed training loss."""


def overview(runs: Sequence[Run]) -> Section:
    """One row per run."""
    head = [
        "run", "selection", "engine", "steps", "natural mixture", "mean over sources", "small sources", "right answers",
        "s per step", "step / floor", "peak GiB",
    ]
    rows: list[list[Cell | str]]
    rows = [[Cell(text=run.name, run=number), *_headlines(run)] for number, run in enumerate(runs, 1)]
    return Section(
        id="runs",
        title="Runs",
        text="Held-out losses are those of the last evaluation. Seconds per step and step over bare floor are medians; "
        "the peak is that of the rank that had the highest.",
        tables=[Table(caption="The runs", head=head, rows=rows)],
        missing=[f"{run.name}: {sentence}" for run in runs for sentence in (*run.missing, *_of_a_sample(run))],
    )


def held_out(runs: Sequence[Run]) -> Section:
    """Held-out loss: the means, then every source."""
    means = [_held_out_chart(runs, title, value) for title, value in _MEANS.items()]
    sources = _evaluated(runs)
    by_source = [_held_out_chart(runs, name, _loss_of(name)) for name in sources]
    values = _MEANS | {name: _loss_of(name) for name in sources}
    rows = [[title, *(_change(run, value) for run in runs)] for title, value in values.items()]
    right = (_change_of([evaluation.accuracy for evaluation in run.evaluations], percent=True) for run in runs)
    rows.append(["right answers, mean over sources", *right])
    head = ["source", *_names(runs)]
    tables = [Table(caption="First and last evaluation", head=head, rows=rows)]
    if not all(evaluation.whole for run in runs for evaluation in run.evaluations):
        rows = [[title, *(_change_of(map(value, _samples(run))) for run in runs)] for title, value in values.items()]
        tables.append(Table(caption="First and last point of the curves", head=head, rows=rows, folded=True))
    return Section(
        id="held-out",
        title="Held-out loss",
        text="Mean token loss of held-out examples, first the means, then every source. The curves are of the examples "
        "that every evaluation of a run scores (--eval.sample); how many, a line says. The first and the last "
        "evaluation score all. Each panel has its own scale, on which equal ratios are equally far apart.",
        charts=[*means, *by_source],
        tables=tables if sources else [],
        missing=[f"{run.name} has no evaluation." for run in runs if not run.evaluations],
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
    head = ["run", "first step", "last step", "mean of the last tenth", "steps without update", "largest gradient norm"]
    return Section(
        id="training",
        title="Training loss",
        text="Loss of the coreset that each step trained on. Methods choose different examples, so compare runs by "
        f"their held-out loss. Of more than {_SMOOTHED} steps the heavy line is the mean of neighbouring ones.",
        charts=[
            Chart(title="training loss", what="Loss of the coreset", lines=loss, wide=True, ratios=True),
            Chart(title="learning rate, in thousandths", what="Schedule", lines=rate, from_zero=True),
        ],
        tables=[Table(caption="Training loss in numbers", head=head, rows=rows)],
    )


def mixed(runs: Iterable[Run], names: Callable[[Run], Iterable[str]]) -> list[str]:
    """What any run has, in the order of the runs."""
    return list(dict.fromkeys(name for run in runs for name in names(run)))


def middle(values: np.ndarray, at: float = 50) -> float:
    """A percentile of what is known; NaN of nothing."""
    known = values[~np.isnan(values)]
    return float(np.percentile(known, at)) if len(known) else np.nan


def peak(run: Run) -> float:
    """Bytes: the highest peak of any rank."""
    peaks = [run.column("peak_bytes", rank) for rank in run.below("peak_bytes")]
    return float(np.nanmax(peaks)) if peaks else np.nan


def _names(runs: Sequence[Run]) -> list[str]:
    return [run.name for run in runs]


def _headlines(run: Run) -> list[str]:
    config, done = run.config, int(run.steps[-1]) if len(run.steps) else 0
    candidates, budget = config.get("selection.candidates", "?"), config.get("selection.budget", "?")
    method = config.get("selection.method", "?")
    share = f"all {candidates}" if method == "full" else f"{budget} of {candidates}"
    last = run.evaluations[-1] if run.evaluations else None
    losses = [number(value(last)) if last else "-" for value in _MEANS.values()]
    accuracy = "-" if last is None or last.accuracy is None else f"{last.accuracy:.1%}"
    highest = peak(run)
    return [
        f"{method}, {share}",
        f"{run.environment.get('engine', '?')} on {run.environment.get('world_size', '?')} rank(s)",
        f"{done} of {run.planned}" if run.planned else str(done),
        *losses,
        accuracy,
        number(middle(run.column("seconds", "step"))),
        number(middle(run.column("measured_over_floor"))),
        "-" if np.isnan(highest) else gib(highest),
    ]


def _evaluated(runs: Sequence[Run]) -> list[str]:
    return mixed(runs, lambda run: [name for evaluation in run.evaluations for name in evaluation.losses])


def _loss_of(name: str) -> Value:
    return lambda evaluation: evaluation.losses.get(name)


def _held_out_chart(runs: Sequence[Run], title: str, value: Value) -> Chart:
    lines = [line for place, run in enumerate(runs, 1) for line in _held_out_lines(run, place, title, value)]
    return Chart(title=title, what="Held-out loss", lines=lines, ratios=True)


def _held_out_lines(run: Run, place: int, title: str, value: Value) -> Iterator[Line]:
    """One of the sample; several where it changed, as after a resume, for points of other examples are not joined."""
    for counts, alike in groupby(run.evaluations, lambda evaluation: evaluation.sample.counts):
        found = [(evaluation.step, value(evaluation.sample)) for evaluation in alike]
        known = [(step, loss) for step, loss in found if loss is not None]
        if known:
            x, y = map(np.array, zip(*known))
            label = f"{run.name}, {counts.get(title, sum(counts.values())):,} examples"
            yield Line(x=x, y=y, colour=colour_of(place), label=label, points=len(x) <= 20)


def _samples(run: Run) -> list[HeldOutLoss]:
    return [evaluation.sample for evaluation in run.evaluations]


def _of_a_sample(run: Run) -> list[str]:
    """Says so where a run has got no further than an evaluation of a sample."""
    if not run.evaluations or run.evaluations[-1].whole:
        return []
    counted = sum(run.evaluations[-1].counts.values())
    return [f"The last evaluation so far is of {counted:,} held-out examples, and so are its held-out losses here."]


def _change(run: Run, value: Value) -> str:
    """A number of the first and of the last evaluation; of the sample, where the last is of no more."""
    last_is_whole = not run.evaluations or run.evaluations[-1].whole
    return _change_of(map(value, run.evaluations if last_is_whole else _samples(run)))


def _change_of(values: Iterable[float | None], percent: bool = False) -> str:
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
    """The mean of what is known; NaN of nothing."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan
