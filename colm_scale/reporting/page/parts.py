"""What a page is made of. All text is plain: the template escapes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from colm_scale.reporting.page.charts import Chart


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A cell of a table.

    Attributes:
        bar, inner: Shares, 0 to 1, that are drawn below the text: how far the bar goes, and its darker part.
        run: Number of the run, from 1, whose colour it shows.
    """

    text: str
    bar: float | None = None
    inner: float = 0.0
    run: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table. The first cell of each row is its heading.

    Attributes:
        folded: Whether it is shown only when asked for.
        words: Whether its cells are words rather than numbers.
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
        text: How to read it, in sentences.
        legend: What shades and dashes mean: pairs of a class and a text.
        missing: What is not there, in sentences.
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
