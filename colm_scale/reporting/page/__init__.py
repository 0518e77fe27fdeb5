"""One HTML page about runs, from their run directories; it has no script and needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import colm_scale
from colm_scale.errors import UserError
from colm_scale.reporting.page.read import Run, read_runs


def write_page(paths: Sequence[str], output: Path) -> list[str]:
    """Write a page that compares runs.

    Args:
        paths: Run directories.
        output: The HTML file, in an existing folder.

    Returns:
        Sentences that name what is missing in the runs.

    Raises:
        UserError: A folder is not a run directory, a file is damaged, the output cannot be written, or the extra
            ``report`` is not installed.
    """
    runs = read_runs(paths)
    try:
        output.write_text(_html(runs), encoding="utf-8")
    except ModuleNotFoundError as error:
        raise UserError(f"colm-scale report requires {error.name}: pip install 'colm_scale[report]'") from None
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from None
    return [f"{run.name}: {sentence}" for run in runs for sentence in run.missing]


def _html(runs: Sequence[Run]) -> str:
    """The page as text; raises ModuleNotFoundError without the extra ``report``."""
    from jinja2 import Environment
    from markupsafe import Markup

    from colm_scale.reporting.page import choice, costs, learning, noise, overview
    from colm_scale.reporting.page.parts import Cell

    sections = (
        *(overview.headlines, learning.held_out, learning.training, choice.coverage, choice.shares),
        *(costs.times, costs.memory, choice.nearness, noise.noise),
        *(overview.configuration, overview.environments),
    )
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = lambda cell: cell if isinstance(cell, Cell) else Cell(text=cell)
    environment.globals["draw"] = lambda chart, section, number: Markup(chart.svg(f"{section}-{number}"))
    return environment.from_string(_resource("page.html.jinja")).render(
        runs=runs,
        sections=[section(runs) for section in sections],
        style=Markup(_resource("style.css")),
        version=colm_scale.__version__,
    )


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")
