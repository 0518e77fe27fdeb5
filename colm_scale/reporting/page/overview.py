"""Sections on the runs as a whole: headlines, configuration, environment. Differences come first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np

from colm_scale.reporting.page.charts import number
from colm_scale.reporting.page.learning import MEANS, change
from colm_scale.reporting.page.parts import Cell, Section, Table, by_run, middle
from colm_scale.reporting.page.read import START, Run
from colm_scale.reporting.summary import gib

_OF_EACH_RUN = ("output_dir", "command", START)
"""Beginnings of the names of facts that differ between any two runs."""


def headlines(runs: Sequence[Run]) -> Section:
    """One row per run."""
    head = [
        "run", "selection", "engine", "steps", "natural mixture", "mean over sources", "small sources", "accuracy",
        "s per step", "step / floor", "peak GiB",
    ]
    rows: list[list[Cell | str]]
    rows = [[Cell(text=run.name, run=place), *_headlines(run)] for place, run in enumerate(runs, 1)]
    return Section(
        id="runs",
        title="Runs",
        text="Held-out losses are of the last evaluation. Seconds per step and step / bare floor are medians; the peak "
        "is the highest of all ranks.",
        tables=[Table(caption="The runs", head=head, rows=rows)],
        missing=[f"{run.name}: {sentence}" for run in runs for sentence in (*run.missing, *_of_a_sample(run))],
    )


def configuration(runs: Sequence[Run]) -> Section:
    """Every option."""
    return _compared("Configuration", "option", [run.config for run in runs], runs)


def environments(runs: Sequence[Run]) -> Section:
    """Versions, devices, commit."""
    return _compared("Environment", "fact", [run.environment for run in runs], runs)


def _compared(title: str, what: str, found: Sequence[Mapping[str, object]], runs: Sequence[Run]) -> Section:
    names = dict.fromkeys(name for of_run in found for name in of_run)
    rows = [[name, *(_shown(of_run, name) for of_run in found)] for name in names]
    different = [row for row in rows if len(set(row[1:])) > 1 and not str(row[0]).startswith(_OF_EACH_RUN)]
    tables = [by_run("Differences between the runs", what, runs, different, words=True)] if different else []
    if rows:
        tables.append(by_run(f"All {what}s", what, runs, rows, folded=True, words=True))
    same = " The runs do not differ here." if len(runs) > 1 and rows and not different else ""
    return Section(id=title.lower(), title=title, text=f"{len(rows)} {what}s.{same}", tables=tables)


def _shown(found: Mapping[str, object], name: str) -> str:
    value = found.get(name)
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _headlines(run: Run) -> list[str]:
    config, done = run.config, int(run.steps[-1]) if len(run.steps) else 0
    candidates, budget = config.get("selection.candidates", "?"), config.get("selection.budget", "?")
    method = config.get("selection.method", "?")
    share = f"all {candidates}" if method == "full" else f"{budget} of {candidates}"
    last = run.evaluations[-1:]
    peaks = [run.column("peak_bytes", rank) for rank in run.below("peak_bytes")]
    highest = float(np.nanmax(peaks)) if peaks else np.nan
    return [
        f"{method}, {share}",
        f"{run.environment.get('engine', '?')} on {run.environment.get('world_size', '?')} rank(s)",
        f"{done} of {run.planned}" if run.planned else str(done),
        *(change(map(value, last)) for value in MEANS.values()),
        change([evaluation.accuracy for evaluation in last], percent=True),
        number(middle(run.column("seconds", "step"))),
        number(middle(run.column("measured_over_floor"))),
        "-" if np.isnan(highest) else gib(highest),
    ]


def _of_a_sample(run: Run) -> list[str]:
    """A sentence if the last evaluation scored only the sample."""
    if not run.evaluations or run.evaluations[-1].whole:
        return []
    counted = sum(run.evaluations[-1].counts.values())
    return [f"Its last evaluation so far scored only a sample of {counted:,} held-out examples."]
