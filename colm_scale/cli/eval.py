"""``colm-scale eval``: how well an adapter does on held-out data."""

from __future__ import annotations

from collections.abc import Sequence

from colm_scale.config.command_line import parse_own
from colm_scale.config.commands import ScoreConfig


def run(arguments: Sequence[str]) -> None:
    """Evaluate and show.

    Raises:
        UserError: Wrong input.
        SystemExit: With a code other than 0: the evaluation failed.
    """
    options = parse_own("eval", ScoreConfig, arguments)
    from colm_scale.adapter.score import score

    if code := score(options):
        raise SystemExit(code)
