"""The process of one rank: connects, runs a job together with the others, and ends with them."""

from __future__ import annotations

import logging
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable

import transformers

from colm_scale.config import RunConfig
from colm_scale.distributed.connect import connect
from colm_scale.distributed.group import Group, PeerFailed
from colm_scale.distributed.watch import Watch, peer_is_gone
from colm_scale.errors import TrainingError, UserError
from colm_scale.run.prepare import resolve

Job = Callable[[RunConfig, Group, Watch], bool]
"""Runs on all ranks together; returns False if it was asked to stop."""


def run(config: RunConfig, job: Job) -> int:
    """Run a ``job`` on this rank; return the exit code of the process: 0 if done, 143 if asked to stop, and saved
    (0 if asked by SIGUSR1).

    After an error the process ends with 2 (wrong input) or 1 (training failed). One rank prints it, and all ranks end.
    """
    quieten()
    try:
        group = connect()
        watch = Watch(group, config.train.timeout)
    except BaseException as error:
        if not isinstance(error, PeerFailed):
            _print(error)
        os._exit(_exit_code(error))
    try:
        with group.together():
            config = resolve(config)
        completed = job(config, group, watch)
    except BaseException as error:
        if not isinstance(error, PeerFailed) and watch.failed():
            lost = TrainingError(f"{watch.place()}, lost another rank: it was killed or disconnected")
            expected = isinstance(error, (UserError, TrainingError))
            _print(lost if not expected and peer_is_gone(error) else _located(error, group))
        sys.stdout.flush()
        watch.leave(_exit_code(error))  # not sys.exit: closing a collective would wait for peers that are still in it
    watch.close()
    group.close()
    return 0 if completed else watch.stopped_code


def _located(error: BaseException, group: Group) -> BaseException:
    """Add the host to an error of input that rank 0 does not have: a file may be missing there alone."""
    if isinstance(error, UserError) and not group.is_first:
        return UserError(f"rank {group.rank} on {socket.gethostname()}: {error}")
    return error


def quieten() -> None:
    """Silence warnings that libraries address to developers."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    for library in ("DeepSpeed", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _print(error: BaseException) -> None:
    if isinstance(error, (UserError, TrainingError)):
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 2 if isinstance(error, UserError) else 1
