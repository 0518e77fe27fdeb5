"""``colm-scale explain RUN``: what a run has trained on, left out, and favoured."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from colm_scale.config.command_line import parse_own
from colm_scale.config.commands import ExplainConfig
from colm_scale.errors import UserError


def run(arguments: Sequence[str]) -> None:
    """Print it, and write its files.

    Raises:
        UserError: Wrong input.
    """
    config = parse_own("explain", ExplainConfig, arguments)
    from rich.console import Console

    from colm_scale.explain.explain import explain
    from colm_scale.explain.plots import check_drawable, draw
    from colm_scale.explain.show import as_json, tables, write

    if config.plots:
        check_drawable()
    found = explain(Path(config.run), config.alpha)
    folder = Path(config.out or f"{config.run}/explain")
    try:
        write(found, config.top, folder)
        if config.plots:
            draw(found, folder)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror or error}") from None
    if config.format == "json":
        print(json.dumps(as_json(found, config.top), indent=2, ensure_ascii=False))
        return
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(tables(found, config.top), soft_wrap=True)
    console.print(f"written to {folder}", markup=False, highlight=False, soft_wrap=True)
