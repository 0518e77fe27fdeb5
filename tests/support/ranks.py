"""The ranks of a test: processes forked from a server that has imported what they run, like those of a launcher."""

from __future__ import annotations

import functools
import gc
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
import torch.multiprocessing as mp

from colm_scale.distributed.connect import connect
from colm_scale.distributed.group import Group


def join(rank: int, world_size: int, port: int) -> Group:
    """Become a rank; a single one runs without a launcher."""
    torch.set_num_threads(1)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    if world_size > 1:
        place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        # Graphs are traced under every engine; that a compiler keeps what they compute is tested on one process.
        torch.compile = functools.partial(torch.compile, backend="eager")
    group = connect()
    gc.freeze()
    return group


def launch_ranks(main: Callable, world_size: int, jobs: object, folder: Path, timeout_seconds: float) -> None:
    """Run ``main(rank, world_size, port, jobs, folder)`` on new processes. A failure of one ends them all.

    Raises:
        TimeoutError: They did not end in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.get_context("forkserver").set_forkserver_preload([main.__module__])
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}):
        forkserver.ensure_running()  # does nothing if it does
    arguments = (world_size, port, jobs, str(folder))
    context = mp.start_processes(main, arguments, nprocs=world_size, join=False, start_method="forkserver")
    deadline = time.monotonic() + timeout_seconds
    while not context.join(max(0, deadline - time.monotonic())):  # returns whenever a process has ended
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
                process.join()
            raise TimeoutError(f"{world_size} ranks did not end {jobs} within {timeout_seconds} seconds")
