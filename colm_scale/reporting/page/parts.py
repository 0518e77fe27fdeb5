"""Sections, tables and cells of a page, and helpers of all sections. Text is plain: the template escapes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from colm_scale.reporting.page.charts import Chart
from colm_scale.reporting.page.read import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A cell of a table.

    Attributes:
        bar, inner: Length of a bar below the text and of its darker part, as shares from 0 to 1.
        run: Number of the run, from 1, whose colour the cell shows.
    """

    text: str
    bar: float | None = None
    inner: float = 0.0
    run: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table. The first cell of each row is its heading.

    Attributes:
        folded: Show the caption only, until the reader opens the table.
        words: Align cells as text rather than numbers.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    folded: bool = False
    words: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A section of a page.

    Attributes:
        text: Sentences that explain how to read the section.
        legend: Pairs of a style class and its meaning.
        missing: Sentences that name missing data.
    """

    id: str
    title: str
    text: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    legend: Sequence[tuple[str, str]] = ()
    missing: Sequence[str] = ()


def colour_of(number: int) -> str:
    """The colour of the run with this number, from 1."""
    return f"run-{number}"


def by_run(caption: str, what: str, runs: Sequence[Run], rows: Sequence[Sequence[Cell | str]], **style: bool) -> Table:
    """A table with a column for each run; ``what`` is the heading of the first column."""
    return Table(caption=caption, head=[what, *(run.name for run in runs)], rows=rows, **style)


def mixed(runs: Iterable[Run], names: Callable[[Run], Iterable[str]]) -> list[str]:
    """The names of all runs, each once, in the order of the runs."""
    return list(dict.fromkeys(name for run in runs for name in names(run)))


def middle(values: np.ndarray, at: float = 50) -> float:
    """A percentile of the values other than NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(np.percentile(known, at)) if len(known) else np.nan
