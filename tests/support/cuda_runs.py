"""Steps of every method on a CUDA device, beside the same steps on the CPU, with the places where the host waits.

The cases are those of `support.strict_runs`. Everything here runs on the CPU too, where no copy waits.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from colm_scale.config import RunConfig
from colm_scale.distributed.group import Group
from colm_scale.engines.base import Engine
from colm_scale.engines.choose import make_engine
from colm_scale.engines.ds_config import read_ds_config
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.plan.fake import fake_model, tried
from colm_scale.plan.memory import Batches, Peaks, peaks
from colm_scale.records import CPU
from colm_scale.selection.ranking import rank
from support import strict_device, strict_runs, worker
from support.cases import _selection
from support.worker import Case

strict_device.NOT_THE_PRODUCT.add(__file__)
WAITED = "called a synchronizing CUDA operation"
"""What torch warns of; not of events, of streams that are waited for, or of a copy from memory that is not pinned."""
ENGINES = ("ddp", "fsdp", "zero2", "zero3")
LARGE = Case(
    _selection(),
    train={"micro_batch_tokens": 4096},
    model={"hidden_size": 1024, "intermediate_size": 4096},
)
"""A case whose memory is weights and activations (some 70 million parameters), not the buffers of kernels."""


@contextmanager
def waits(device: torch.device) -> Iterator[tuple[Callable[[str], None], list[strict_device.Read]]]:
    """What enters a phase, and the reads so far: every warning of torch that the host waits, with file and line."""
    recorder = strict_device.Recorder()
    recorder.enter("")

    def shown(message: object, *_: object) -> None:
        if WAITED in str(message):
            recorder.note("wait")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = shown
        if device != CPU:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield recorder.enter, recorder.reads
        finally:
            if device != CPU:
                torch.cuda.set_sync_debug_mode("default")


@functools.cache
def on_cpu(name: str) -> dict[str, Any]:
    """A case on the CPU, in one process."""
    torch.set_num_threads(1)
    return strict_runs.run_case(strict_runs.CASES[name], CPU, lambda _: None)


@functools.cache
def on_device(name: str, device: torch.device) -> dict[str, Any]:
    """A case, or the first one under one of `ENGINES`, on a device, with its reads."""
    case = strict_runs.CASES["last_layer" if name in ENGINES else name]
    engine = {"ddp": "auto"}.get(name, name) if name in ENGINES else ""
    most = mock.patch.object(rank, "MOST_ON_HOST", 0) if name == "large source" else nullcontext()
    with waits(device) as (entered, reads), most:
        engine_of = ddp_of_one if name == "ddp" else one_rank_engine
        found = strict_runs.run_case(case, device, entered, engine, engine_of)
    return found | {"reads": [read for read in reads if read.phase]}


def one_rank_engine(config: RunConfig, module: ExampleLoss, group: Group) -> Engine:
    """An engine of one process, with a process group of its own if it needs one."""
    if config.engine == "auto" and config.ds_config is None:
        return make_engine(config, {}, module, group)
    group.ensure_process_group()
    return make_engine(config, read_ds_config(config, 1), module, group)


def ddp_of_one(config: RunConfig, module: ExampleLoss, group: Group) -> Engine:
    """DDP, which a run takes for several processes only, in a process group of one."""
    group.ensure_process_group()
    engine = make_engine(config, {}, module, replace(group, world_size=2))
    engine._ranks = 1
    return engine


def missing(engine: str) -> bool:
    """Whether an engine's library is not installed."""
    return engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None


def more_than_allowed(found: list[strict_device.Read], allowed: dict[str, list[str]]) -> list[str]:
    """The reads, with file and line, of places that wait oftener in a phase than allowed."""
    most = Counter((phase, read.split()[-1]) for phase, reads in allowed.items() for read in reads)
    counts = Counter((read.phase, read.site) for read in found)
    return [
        f"{read.phase} {read.site} {read.where}"
        for read in found
        if counts[read.phase, read.site] > most[read.phase, read.site]
    ]


def planned(case: Case, found: dict[str, Any]) -> Peaks:
    """The peaks that `colm-scale plan` predicts of a case's last step."""
    config = worker.run_config(case)
    config = replace(config, selection=config.selection.resolved())
    of = worker.model(config, **case.model)[0].causal_model.config
    data = worker.examples()
    share = float(data.labelled.double().mean())
    fake = fake_model(config, of, tried(config, of))
    return peaks(config, {}, fake, 1, Batches(found["sketched"], found["trained"]), share)
