"""``colm-scale train``, which is also ``launchers/train.py``."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from colm_scale.config.command_line import parse_train


def run(arguments: Sequence[str]) -> NoReturn:
    """Parse the options of a run, run it, and exit: 0 done, 1 training failed, 143 told to stop. With ``--dry-run``
    say what it would do.

    Raises:
        UserError: The options are wrong; what else can be wrong, the run says and exits with 2.
    """
    config, only_says = parse_train(arguments)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost peer is told in a line, not in pages of C++ frames
    from colm_scale.run import dry_run, train

    code = dry_run.run(config) if only_says else train.run(config)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: now and then a thread that a library has left running ends a process that is being torn down.
    os._exit(code)
