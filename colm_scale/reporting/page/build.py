"""Puts the sections together."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment
from markupsafe import Markup

import colm_scale
from colm_scale.reporting.page import resource
from colm_scale.reporting.page.charts import Chart
from colm_scale.reporting.page.choice import coverage, shares, worth
from colm_scale.reporting.page.costs import memory, times
from colm_scale.reporting.page.learning import held_out, overview, training
from colm_scale.reporting.page.parts import Cell
from colm_scale.reporting.page.read import Run
from colm_scale.reporting.page.setup import configuration, environments

_SECTIONS = (overview, held_out, training, coverage, shares, times, memory, worth, configuration, environments)


def page(runs: Sequence[Run]) -> str:
    """The HTML of these runs."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = lambda cell: cell if isinstance(cell, Cell) else Cell(text=cell)
    environment.globals["draw"] = _draw
    return environment.from_string(resource("page.html.jinja")).render(
        runs=runs,
        sections=[section(runs) for section in _SECTIONS],
        style=Markup(resource("style.css")),
        version=colm_scale.__version__,
    )


def _draw(chart: Chart, section: str, number: int) -> Markup:
    return Markup(chart.svg(f"{section}-{number}"))
