"""One HTML page about runs: no script, nothing from the network, all numbers from their run directories."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from colm_scale.errors import UserError


def write_page(paths: Sequence[str], output: Path) -> list[str]:
    """Write the page of these runs, side by side.

    Args:
        paths: Run directories.
        output: The HTML file; its folder must be there.

    Returns:
        What is missing in the runs, in sentences.

    Raises:
        UserError: No run directory, a damaged file, a place that cannot be written, or the extra ``report`` is not
            installed.
    """
    try:
        from colm_scale.reporting.page.build import page
    except ModuleNotFoundError as error:
        raise UserError(f"a report needs {error.name}: pip install 'colm_scale[report]'") from None
    from colm_scale.reporting.page.read import read_runs

    runs = read_runs(paths)
    try:
        output.write_text(page(runs), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from None
    return [f"{run.name}: {sentence}" for run in runs for sentence in run.missing]


def resource(name: str) -> str:
    """The text of a file of this package."""
    return files(__package__).joinpath(name).read_text("utf-8")
