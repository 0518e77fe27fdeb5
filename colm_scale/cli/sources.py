"""``colm-scale sources``: the sub-populations of data that has no labels."""

from __future__ import annotations

from collections.abc import Sequence

from colm_scale.config.command_line import parse_own
from colm_scale.config.commands import SourcesOptions


def run(arguments: Sequence[str]) -> None:
    """Find them, write them down and report.

    Raises:
        UserError: Wrong input.
    """
    options = parse_own("sources", SourcesOptions, arguments)
    from colm_scale.run.process import quieten
    from colm_scale.sources.discover import discover

    quieten()
    print(discover(options), end="")
