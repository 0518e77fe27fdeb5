"""The process of one rank: connect, do a job together with the others, and end with all of them."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable

import transformers

from colm_scale.config import RunConfig
from colm_scale.distributed.group import Group, PeerFailed, connect
from colm_scale.distributed.watch import STOPPED, Watch, peer_is_gone
from colm_scale.errors import TrainingError, UserError
from colm_scale.run.prepare import resolve

Job = Callable[[RunConfig, Group, Watch], bool]
"""Does the ranks' work together; returns whether it came to its end."""


def run(config: RunConfig, job: Job) -> int:
    """Do a ``job`` on this rank, and return the exit code of the process: 0 for done, 143 for told to stop, and saved.

    Otherwise the process ends with 2 (wrong input) or 1 (training failed); one rank says why, and all others end too.
    """
    watch = None
    try:
        quieten()
        group = connect()
        watch = Watch(group, config.train.timeout)
        with group.together():
            config = resolve(config)
        completed = job(config, group, watch)
    except BaseException as error:
        _end(error, watch)
    assert watch is not None
    watch.close()
    group.close()
    return 0 if completed else STOPPED


def quieten() -> None:
    """Keep the libraries' remarks to their developers out of the user's terminal."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    for library in ("DeepSpeed", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _end(error: BaseException, watch: Watch | None) -> None:
    """Say what went wrong, unless another rank has said it, and end this process without waiting for the others."""
    code = 2 if isinstance(error, UserError) else 1
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        code = error.code
    said_elsewhere = isinstance(error, PeerFailed) or (watch is not None and not watch.failed())
    if not said_elsewhere:
        if isinstance(error, (UserError, TrainingError)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif watch is not None and peer_is_gone(error):
            print(f"error: {watch.place()}, lost another rank: it was killed, or cut off", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: closing collectives that a peer is still in would wait for it.
    os._exit(code) if watch is None else watch.leave(code)
