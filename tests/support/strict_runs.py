"""Steps of every method on the strict device, with the places where the host waits for it.

``launch`` runs cases in a new process, because the device cannot be removed from one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing as mp

from colm_scale.config import EvalConfig
from colm_scale.data.sampler import CandidateSampler
from colm_scale.distributed.group import Group
from colm_scale.engines.choose import make_engine
from colm_scale.profiling.memory import ResidentMeter
from colm_scale.profiling.spans import Spans
from colm_scale.run.assemble import build_step
from colm_scale.run.evaluate import HeldOut, HeldOutEvaluator
from colm_scale.run.inputs import Inputs
from colm_scale.step.floor import bare_floor_seconds
from support import worker
from support.worker import Case, _selection

OWN = f"{worker.ROOT / 'docs' / 'examples'}"
METHODS: dict[str, Case] = {
    "last_layer": Case(_selection()),
    "paper": Case(_selection(preset="paper")),
    "stratified": Case(_selection(method="stratified")),
    "random": Case(_selection(method="random")),
    "full": Case(_selection(method="full")),
    "zeroth_order 3": Case(_selection(estimator="zeroth_order", num_probes=3)),
    "countsketch": Case(_selection(compression="countsketch")),
    "countsketch reuse": Case(_selection(compression="countsketch", reuse=3)),
    "length": Case(_selection(estimator="length")),
    "own estimator": Case(_selection(estimator=worker.LOSS)),
    "own estimator 2": Case(_selection(estimator=f"{OWN}/own_estimator.py:mean_hidden_state", metric="cosine")),
    "own ranking": Case(_selection(ranking=f"{OWN}/own_ranking.py:farthest_first")),
    "matching": Case(_selection(ranking="matching")),
    "systematic": Case(_selection(ranking="systematic", weights="unbiased")),
    "cosine cluster": Case(_selection(metric="cosine", weights="cluster")),
    "padded": Case(_selection(), train={"packing": "off"}),
    "probe k": Case(_selection(probe="k")),
    "bfloat16": Case(_selection(), train={"dtype": "bfloat16"}),
    "float16": Case(_selection(), train={"dtype": "float16"}),
    "checkpointed": Case(_selection(), train={"activation_checkpointing": True}),
    "reuse device": Case(_selection(), train={"activation_checkpointing": True, "forward_reuse": "device"}),
    "reuse cpu": Case(_selection(), train={"activation_checkpointing": True, "forward_reuse": "cpu"}),
    "re-clustered": Case(_selection(), refresh_sources=2),
    **{name: Case(_selection(), train={"optimizer": name}) for name in ("sgd", "lion", "adafactor", "muon")},
}
STEPS = 2


def run_case(case: Case, device: torch.device, entered: Callable[[str], None]) -> dict[str, Any]:
    """A run of two steps, then a floor, an evaluation and, if the case has one, a re-clustering: ids and losses."""
    config = worker.run_config(case)
    config = config.__class__(**{**vars(config), "selection": config.selection.resolved()})
    data = worker.examples()
    group = Group(rank=0, world_size=1, local_rank=0, local_world_size=1, device=device)
    module, tap = worker.model(config, device)
    sampler = CandidateSampler(data, config.selection.candidates, config.train.seed)
    tokenizer = SimpleNamespace(
        pad_token_id=worker.PAD,
        eos_token_id=2,
        decode=lambda tokens, **_: " ".join(map(str, tokens)),
        batch_decode=lambda rows, **_: [" ".join(map(str, row)) for row in rows.tolist()],
    )
    kept = worker.kept(config.selection, data)
    inputs = Inputs(tokenizer, sampler, data.source_names, data.sizes, kept, data.protected_sizes, "", None, {})
    engine = make_engine(config, {}, module, group)
    spans = Spans(device, ResidentMeter(), entered)
    step = build_step(config, inputs, engine, tap if config.selection.sketches else None, spans, group)
    found: dict[str, Any] = {"ids": [], "losses": []}
    for number in range(1, STEPS + 1):
        spans._entered = entered if number == STEPS else lambda _: None
        report, work = step(number, worker.RATE)
        found["ids"].append(report.candidates.ids[report.selection.positions].tolist())
        found["losses"].append(report.loss)
        found["telemetry"] = dict(report.telemetry)
    entered("floor")
    bare_floor_seconds(work, engine, group, config.train.seed)
    entered("sources")
    step.refresh_sources(STEPS)
    entered("")
    held_out = HeldOut(data, data.sizes, data.sizes < 10, tokenizer)
    evaluator = HeldOutEvaluator(held_out, EvalConfig(generate=2, max_new_tokens=3, limit=8), config.train, group)
    entered("evaluate")
    found["evaluation"] = evaluator(module, STEPS).loss
    entered("generate")
    entered("")
    return found


def reads_of(names: list[str], out: str) -> None:
    """Run cases on the CPU and on the strict device, and write their results and reads as JSON."""
    from support import strict_device

    torch.set_num_threads(1)
    device = strict_device.install()
    results = {}
    for name in names:
        on_cpu = run_case(METHODS[name], worker.CPU, lambda _: None)
        strict_device.recorder.reads.clear()
        on_device = run_case(METHODS[name], device, strict_device.recorder.enter)
        reads = [astuple(read) for read in strict_device.recorder.reads if read.phase]
        results[name] = {"cpu": on_cpu, "device": on_device, "reads": reads}
    Path(out).write_text(json.dumps(results), encoding="utf-8")


def launch(names: Sequence[str], folder: Path) -> dict[str, dict[str, Any]]:
    """`reads_of` in a process of its own, forked from a server that has imported this module."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    out = folder / "reads.json"
    process = context.Process(target=reads_of, args=(list(names), str(out)))
    process.start()
    process.join()
    assert process.exitcode == 0, f"exit code {process.exitcode}"
    found: dict[str, dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    reads_of(sys.argv[2:] or [*METHODS], sys.argv[1])
