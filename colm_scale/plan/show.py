"""The text of a plan."""

from __future__ import annotations

import io
import math

from rich.console import Console
from rich.table import Table

from colm_scale.plan.plan import GIB, Plan
from colm_scale.plan.trace import MicroBatches

_WIDTH = 110
_RANKS_OF_HOST = 8
"""Most ranks that are counted on a host."""


def shown(plan: Plan) -> str:
    """Render a plan as tables for a terminal."""
    out = io.StringIO()
    console = Console(file=out, width=_WIDTH)
    for line in _lines(plan):
        console.print(line, highlight=False)
    console.print(_memory(plan))
    console.print(_further(plan))
    console.print(
        "Not included: CUDA context and NCCL buffers (about 1 GiB), fragments. In real data lengths differ: an example "
        "longer than a micro-batch's tokens sets the peak.",
        highlight=False,
    )
    return out.getvalue()


def _lines(plan: Plan) -> list[str]:
    config, sizes = plan.config, plan.sizes
    selection, train = config.selection, config.train
    trained = selection.candidates if selection.method == "full" else selection.budget
    lines = [
        f"model      {sizes.frozen / 1e9:.3f} B parameters, {sizes.frozen_bytes / GIB:.2f} GiB in {train.dtype}; "
        f"adapters {sizes.adapters / 1e6:.2f} M",
        f"step       {trained} of {selection.candidates} candidates ({selection.method}), {plan.plan.tokens} tokens "
        f"each, on {plan.plan.world_size} rank(s) under {plan.engine}",
        f"per rank   sketch {_micro_batches(plan.batches.sketched)}; training {_micro_batches(plan.batches.trained)}",
    ]
    if plan.padded_because:
        lines.append(f"           micro-batches are padded: {plan.padded_because}")
    return lines


def _micro_batches(micro_batches: MicroBatches) -> str:
    if not micro_batches:
        return "nothing"
    return f"{len(micro_batches)} micro-batch(es) of up to {max(map(sum, micro_batches)):,} tokens"


def _memory(plan: Plan) -> Table:
    engine = plan.peaks.engine
    table = Table(title="Peak memory of a rank, GiB", title_justify="left")
    table.add_column("phase")
    for heading in ("weights", "optimizer", "engine", "gathered", "micro-batches", "peak"):
        table.add_column(heading, justify="right")
    for phase, peak in plan.peaks.phases.items():
        reducing = engine.reducing if phase == "train" else 0
        gathered = 0 if phase == "optimizer" else engine.gathered
        held = (engine.weights, engine.optimizer, engine.buffers + reducing, gathered)
        if phase == "load":
            held = (engine.weights, 0, 0, engine.part)
        table.add_row(phase, *(f"{size / GIB:.2f}" for size in (*held, peak - sum(held), peak)))
    return table


def _further(plan: Plan) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(justify="right")
    together = min(plan.plan.world_size, _RANKS_OF_HOST)
    for when, size in plan.host.items():
        of_host = f" ({together} ranks: {together * size / GIB:.2f})" if together > 1 else ""
        table.add_row(f"host memory of a rank {when}, GiB", f"{size / GIB:.2f}{of_host}")
    for purpose, count in plan.exchanged.items():
        table.add_row(f"bytes a rank sends per step: {purpose}", f"{count:,}")
    table.add_row("FLOP per step and rank: candidates' forward", f"{plan.forward_flops:.3g}")
    table.add_row("FLOP per step and rank: training", f"{plan.training_flops:.3g}")
    if plan.floor_seconds:
        table.add_row(f"bare floor of a step at {plan.plan.tflops:g} TFLOP/s", f"{plan.floor_seconds:.3g} s")
    keep = plan.config.checkpoint.keep if plan.config.checkpoint.every else 0
    table.add_row(
        f"disk for {keep} checkpoints and the next", f"{plan.checkpoint_bytes * (keep + 1 if keep else 0) / 1e9:.3g} GB"
    )
    for what, most in plan.largest.items():
        table.add_row(
            f"fits into {plan.plan.memory_gib:g} GiB: {what}", "unlimited" if most == math.inf else f"{most:,}"
        )
    return table
