"""``colm-scale report``: a page about runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from colm_scale.config.command_line import parse_own


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write one HTML page about one or several runs, side by side. It needs no network, and holds no script."""

    runs: list[str]
    """Folders of runs, at most 8; of one that is still under way, what is there so far."""
    output: str = "report.html"
    """The page. One that is there already is replaced."""


def run(arguments: Sequence[str]) -> None:
    """Write it.

    Raises:
        UserError: Wrong input.
    """
    options = parse_own("report", ReportOptions, arguments)
    from colm_scale.reporting.page import write_page

    output = Path(options.output)
    for sentence in write_page(options.runs, output):
        print(sentence)
    print(f"report: {output} ({output.stat().st_size / 1e3:,.0f} kB)")
