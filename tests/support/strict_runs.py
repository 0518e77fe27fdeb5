"""Steps of every method on the strict device, with the places where the host waits for it.

``launch`` runs cases in a new process, because the device cannot be removed from one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, replace
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from colm_scale.checkpoint.background import Snapshot, Writer
from colm_scale.checkpoint.run_state import RunState
from colm_scale.config import EvalConfig, RunConfig
from colm_scale.data.batching import make_batch
from colm_scale.data.sampler import CandidateSampler
from colm_scale.distributed.group import Group
from colm_scale.engines.base import Engine
from colm_scale.engines.choose import make_engine
from colm_scale.engines.tensors import collect, landing
from colm_scale.modeling.forward_reuse import HeldBlockInputs
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import find_probe
from colm_scale.profiling.memory import MemoryMeter, ResidentMeter
from colm_scale.profiling.spans import Spans
from colm_scale.records import CPU
from colm_scale.run.assemble import build_step
from colm_scale.run.evaluate import HeldOut, HeldOutEvaluator
from colm_scale.run.inputs import Inputs
from colm_scale.selection.ranking import rank
from colm_scale.sketch.tap import Tap
from colm_scale.step.floor import bare_floor_seconds
from colm_scale.step.measure import Measurement
from colm_scale.step.step import CoresetStep
from support import cases, worker
from support.cases import MEDOIDS, _selection
from support.families import base_model, with_adapters
from support.worker import Case

EXAMPLES = cases.ROOT / "docs" / "examples"
CASES: dict[str, Case] = {
    "last_layer": Case(_selection()),
    "paper": Case(_selection(preset="paper")),
    "stratified": Case(_selection(method="stratified")),
    "random": Case(_selection(method="random")),
    "full": Case(_selection(method="full")),
    "zeroth_order 3": Case(_selection(estimator="zeroth_order", num_probes=3)),
    "columns": Case(_selection(compression="columns")),
    "reused sketches": Case(_selection(reuse=3)),
    "length": Case(_selection(estimator="length")),
    "own estimator": Case(_selection(estimator=cases.LOSS)),
    "own estimator 2": Case(_selection(estimator=f"{EXAMPLES}/own_estimator.py:mean_hidden_state", metric="cosine")),
    "own ranking": Case(_selection(ranking=f"{EXAMPLES}/own_ranking.py:farthest_first")),
    "facility": Case(_selection(ranking="facility")),
    "systematic": Case(_selection(ranking="systematic", weights="unbiased")),
    "cosine cluster": Case(_selection(metric="cosine", **MEDOIDS)),
    "padded": Case(_selection(), train={"packing": "off"}),
    "probe k": Case(_selection(probe="k")),
    "bfloat16": Case(_selection(), train={"dtype": "bfloat16"}),
    "float16": Case(_selection(), train={"dtype": "float16"}),
    "checkpointed": Case(_selection(), train={"activation_checkpointing": True, "forward_reuse": "off"}),
    "reuse device": Case(_selection(), train={"activation_checkpointing": True, "forward_reuse": "device"}),
    "reuse cpu": Case(_selection(), train={"activation_checkpointing": True, "forward_reuse": "cpu"}),
    "large source": Case(_selection(ranking="facility"), train={"max_grad_norm": 2.0}),
    "re-clustered": Case(_selection(), refresh_sources=2),
    **{name: Case(_selection(), train={"optimizer": name}) for name in ("sgd", "lion", "adafactor", "muon")},
}
WHOLE = [CASES[name] for name in ("last_layer", "padded", "re-clustered")]
"""Cases with a floor, a re-clustering if they have one, and an evaluation."""
ENGINES = {"ddp": "auto", "fsdp": "fsdp"}
"""Engines that run as the first of two ranks, the other of which is absent: what it would send is made up."""
STEPS = 2
"""The reads of the last one count."""


class _Ending:
    """A measurement that enters a phase of its own for the end of the step."""

    def __init__(self, inner: Measurement, entered: Callable[[str], None]):
        self.describe, self._inner, self._entered = inner.describe, inner, entered

    def __call__(self, *args: Any) -> Any:
        self._entered("end")
        return self._inner(*args)


def two_ranks_engine(config: RunConfig, module: ExampleLoss, group: Group) -> Engine:
    """The engine of a case in `ENGINES`; DDP asks the absent rank for nothing."""
    engine = make_engine(config, {}, module, group)
    if engine.name == "ddp":
        engine._wrapped.register_comm_hook(None, _nothing_to_add)
    return engine


def run_case(
    case: Case,
    device: torch.device,
    entered: Callable[[str], None],
    engine_name: str = "",
    engine_of: Callable[[RunConfig, ExampleLoss, Group], Engine] = two_ranks_engine,
    meter_of: Callable[[Group], MemoryMeter] = lambda _: ResidentMeter(),
) -> dict[str, Any]:
    """A run of two steps, and on the device what else belongs to the cases in `WHOLE`: ids, losses, peaks."""
    config = worker.run_config(case, engine_name or "auto")
    config = replace(config, selection=config.selection.resolved())
    ranks = 2 if engine_name and engine_of is two_ranks_engine else 1
    group = Group(rank=0, world_size=ranks, local_rank=0, local_world_size=1, device=device)
    data, (module, tap) = worker.examples(), worker.model(config, device, **case.model)
    tokenizer = SimpleNamespace(
        pad_token_id=worker.PAD,
        eos_token_id=2,
        decode=lambda tokens, **_: " ".join(map(str, tokens)),
        batch_decode=lambda rows, **_: [" ".join(map(str, row)) for row in rows.tolist()],
    )
    sampler = CandidateSampler(data, config.selection.candidates, config.train.seed)
    kept = worker.kept(config.selection, data)
    inputs = Inputs(tokenizer, sampler, data.source_names, data.sizes, kept, data.protected_sizes, "", None, {})
    engine = engine_of(config, module, group)
    spans = Spans(device, meter_of(group), lambda _: None)
    step = build_step(config, inputs, engine, tap if config.selection.sketches else None, spans, group)
    step.measure = _Ending(step.measure, lambda phase: spans._entered(phase))
    ids, losses = [], []
    for number in range(1, STEPS + 1):
        spans._entered = entered if number == STEPS else lambda _: None
        report, work = step(number, worker.RATE)
        ids.append(report.candidates.ids[report.selection.positions].tolist())
        losses.append(report.loss)
    found = {"ids": ids, "losses": losses, "telemetry": dict(report.telemetry), "peaks": report.phase_peak_bytes}
    found["sketched"] = [batch.lengths for batch in work.sketched]
    found["trained"] = [micro.batch.lengths for micro in work.trained]
    if case in WHOLE and device != CPU and not engine_name:
        entered("floor")
        bare_floor_seconds(work, engine, group, config.train.seed)
        entered("sources")
        step.refresh_sources(STEPS)
        options = EvalConfig(generate=2, max_new_tokens=3, limit=8)
        held_out = HeldOut(data, data.sizes, data.sizes < 10, tokenizer)
        HeldOutEvaluator(held_out, options, config.train, group, entered)(module, STEPS)
        entered("")
        found["snapshot"] = _snapshot(step, spans, group, entered)
    return found


class _Keeping(Writer):
    """Keeps the last snapshot, and does not write it."""

    def begin(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot


def _snapshot(step: CoresetStep, spans: Spans, group: Group, entered: Callable[[str], None]) -> dict[str, bool]:
    """Whether a snapshot's copies were in flight, and are what the state was although another step has changed it."""
    engine, writer, session = step.train.engine, _Keeping(), SimpleNamespace(state=dict)
    state = RunState(writer, {}, {}, step, session, group)
    collected = collect(engine, group)
    landing(group.device)()
    was = {
        file: {name: value.cpu().clone() for name, value in named.items()}
        for file, named in (collected | state._selection.tensors(STEPS)).items()
    }
    entered("checkpoint")
    state.save(STEPS)
    spans._entered = lambda _: None
    entered("")
    found = writer.snapshot.tensors
    in_flight = all(value.isnan().all() for value in found["adapter"].values())
    step(STEPS + 1, worker.RATE)
    writer.snapshot.landed()
    same = all(torch.equal(found[file][name], value) for file in was for name, value in was[file].items())
    return {"in flight": bool(in_flight), "same": same and found.keys() >= was.keys()}


def _nothing_to_add(_state, bucket):  # DDP refuses annotations that are not evaluated
    """The sum of the gradients over the ranks, of which the others are absent."""
    found: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    found.set_result(bucket.buffer())
    return found


@contextmanager
def _absent_ranks() -> Iterator[None]:
    """Collectives on the device that return at once; FSDP2 keeps the memory of gathered weights."""
    import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from support import strict_device

    dist.init_process_group("cpu:fake,strict:fake", store=FakeStore(), rank=0, world_size=2)
    with (
        mock.patch.object(fsdp, "free_storage"),
        mock.patch.object(fsdp, "alloc_storage"),
        mock.patch.object(torch.accelerator, "current_stream", strict_device.Stream),
    ):
        yield
    dist.destroy_process_group()


def reads_of(names: Sequence[str], out: str) -> None:
    """Run cases on the CPU and on the strict device, and write their results and reads as JSON."""
    from support import strict_device

    torch.set_num_threads(1)
    recorder, device = strict_device.recorder, strict_device.install()
    results = {}
    for name in names:
        case = CASES.get(name, CASES["large source"])
        on_cpu = run_case(case, CPU, lambda _: None)
        recorder.reads.clear()
        recorder.enter("")
        # Larger than what is picked on the CPU.
        with mock.patch.object(rank, "MOST_ON_HOST", 0) if name == "large source" else nullcontext():
            if name in ENGINES:
                with _absent_ranks():
                    on_device = run_case(case, device, recorder.enter, ENGINES[name])
            else:
                on_device = run_case(case, device, recorder.enter)
        reads = [astuple(read) for read in recorder.reads if read.phase]
        results[name] = {"cpu": on_cpu, "device": on_device, "reads": reads}
    Path(out).write_text(json.dumps(results), encoding="utf-8")


def refusals(out: str) -> None:
    """What the device says to operations that CUDA refuses or not, and the reads that each costs, as JSON."""
    from support import strict_device

    device = strict_device.install()
    here, there, mask = torch.ones(3), torch.ones(3, device=device), torch.ones(3, device=device) > 0
    first = torch.zeros(1, dtype=torch.int64)
    pinned, number = here.pin_memory(), torch.tensor(2.0)
    tried: dict[str, Callable[[], object]] = {
        "add": lambda: there + here,
        "where": lambda: torch.where(mask, there, here),
        "cat": lambda: torch.cat([there, here]),
        "index the host by the device": lambda: here[first.to(device)],
        "put into the device from the host": lambda: there.index_put_((first.to(device),), here[:1]),
        "generator of the host": lambda: torch.randn(3, device=device, generator=torch.Generator()),
        "fill from the host's generator": lambda: there.normal_(generator=torch.Generator()),
        "pin the device": there.pin_memory,
        "numpy": there.numpy,
        "add a number of the host": lambda: there + number,
        "random fill": lambda: there.clone().uniform_(),
        "fill where": lambda: there.clone().masked_fill_(mask, 0.0),
        "put a number where": lambda: there.clone().__setitem__(mask, 1.0),
        "pinned copy to the device": lambda: pinned.to(device, non_blocking=True),
        "copy to the device": lambda: here.to(device, non_blocking=True),
        "tensor on the device": lambda: torch.tensor([1.0], device=device),
        "index the device by the host": lambda: there[first],
        "mask": lambda: there[mask],
        "item": lambda: float(there[0]),
        "bool": lambda: bool(mask.all()),
        "tolist": there.tolist,
        "unique": there.unique,
        "nonzero": mask.nonzero,
        "repeat_interleave": lambda: there.repeat_interleave(torch.ones(3, dtype=torch.int64).to(device)),
        "repeat_interleave of known size": lambda: torch.repeat_interleave(there, mask.long(), output_size=3),
        "eigvalsh": lambda: torch.linalg.eigvalsh(torch.eye(2, device=device)),
    }
    found = {}
    for name, call in tried.items():
        strict_device.recorder.reads.clear()
        try:
            call()
            error = ""
        except (RuntimeError, TypeError) as raised:
            error = str(raised)
        found[name] = (error, [read.kind for read in strict_device.recorder.reads])
    copied = there.to("cpu", non_blocking=True)
    early, event = copied.isnan().all().item(), strict_device.Event()
    event.record()
    event.synchronize()
    found["late"] = (early, copied.tolist())
    found["held"] = _held_on_the_cpu(device)
    found["fused"] = _reads_of_fused_layers(device)
    Path(out).write_text(json.dumps(found), encoding="utf-8")


def _held_on_the_cpu(device: torch.device) -> list[bool]:
    """Whether block inputs held on the CPU are those held on the device, though nothing else has waited for it."""
    module, _ = worker.model(worker.run_config(Case(_selection(), train={"activation_checkpointing": True})), device)
    module.knows_logits()
    rows = [torch.arange(2, 9), torch.arange(3, 7)]
    batch = make_batch(rows, [torch.ones_like(row) > 0 for row in rows], torch.arange(2), 0, device, packed=True)
    arranged = []
    for store in ("device", "cpu"):
        held = HeldBlockInputs(module, worker.BLOCKS - 1, store)
        with torch.no_grad(), held.holding(1):
            module(batch)
        held.arrange([batch])
        arranged.append([tensor.clone() for tensor in held._arranged[id(batch)]])
    return [torch.equal(one.cpu(), other) for one, other in zip(*arranged)]


def _reads_of_fused_layers(device: torch.device) -> list[list[str]]:
    """The reads of two sketches of a model that computes Q, K and V in one layer."""
    from support import strict_device

    base = base_model("phi3").to(device)
    probe = find_probe(base)
    tap, found = Tap(ExampleLoss(with_adapters(base)), probe), []
    batch = make_batch([torch.arange(2, 9)] * 2, [torch.arange(7) > 2] * 2, torch.arange(2), 0, device)
    tap.model.knows_logits()
    for _ in range(2):
        strict_device.recorder.reads.clear()
        tap.factors(batch)
        found.append([f"{read.kind} {read.site}" for read in strict_device.recorder.reads])
    return found


def in_process(function: Callable[..., None], *args: object) -> None:
    """Call a function in a process of its own, forked from a server that has imported this module."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}):
        forkserver.ensure_running()  # does nothing if it does
    process = context.Process(target=function, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0, f"exit code {process.exitcode}"


def launch(names: Sequence[str], folder: Path) -> dict[str, dict[str, Any]]:
    """The results of `reads_of`."""
    in_process(reads_of, list(names), str(folder / "reads.json"))
    found: dict[str, dict[str, Any]] = json.loads((folder / "reads.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    reads_of(sys.argv[2:] or [*CASES, *ENGINES], sys.argv[1])
