"""``colm-scale doctor``: what would keep a run from working here."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from colm_scale.config.command_line import parse_own
from colm_scale.config.tools import DoctorConfig


def run(arguments: Sequence[str]) -> NoReturn:
    """Look, show, and exit: 0 no problem, 1 a problem.

    Raises:
        UserError: Wrong options.
    """
    options = parse_own("doctor", DoctorConfig, arguments)
    from rich.console import Console

    from colm_scale.doctor.examine import examine
    from colm_scale.doctor.finding import as_json, exit_code, show

    findings = examine(options)
    if findings or os.environ.get("RANK", "0") == "0":
        if options.json:
            print(as_json(findings))
        else:
            show(findings, Console())
    sys.stdout.flush()
    os._exit(exit_code(findings))  # whatever a check has left hanging
