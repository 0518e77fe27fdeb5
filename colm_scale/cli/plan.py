"""``colm-scale plan``: what a run with these options will need."""

from __future__ import annotations

import os
from collections.abc import Sequence

from colm_scale.config.command_line import parse_plan


def run(arguments: Sequence[str]) -> None:
    """Print it.

    Raises:
        UserError: Wrong input.
    """
    config, plan_config = parse_plan(arguments)
    from colm_scale.plan.plan import make_plan
    from colm_scale.plan.show import shown
    from colm_scale.run.prepare import resolve
    from colm_scale.run.process import quieten

    quieten()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing runs here, so DeepSpeed need not look for a GPU
    print(shown(make_plan(resolve(config), plan_config)), end="")
