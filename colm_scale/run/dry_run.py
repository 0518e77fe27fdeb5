"""``--dry-run``: prepares a run, and describes its next steps instead of making them. Nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor

from colm_scale.config import RunConfig
from colm_scale.config.commands import PlanConfig
from colm_scale.distributed.group import Group
from colm_scale.distributed.watch import Watch
from colm_scale.errors import UserError
from colm_scale.plan.memory import Batches
from colm_scale.plan.plan import make_plan
from colm_scale.plan.show import shown
from colm_scale.reporting.preview import arithmetic, by_source
from colm_scale.run import process
from colm_scale.run.assemble import batching_of
from colm_scale.run.prepare import Prepared, prepare
from colm_scale.run.reports import Reports
from colm_scale.run.session import Session
from colm_scale.step.preview import Preview, preview

_STEPS = 3
"""Number of steps described."""
_WIDTH = 110


@dataclass(frozen=True, slots=True)
class Sight:
    """Rank 0's view of a run.

    Attributes:
        config: Resolved.
        lines: Lines printed before the first step.
        names: ``[Q]`` sources.
        done: Steps that are complete.
        steps: Of the whole run.
        previews: Of the next steps.
        label_share: Share of the first candidates' tokens that carries loss.
        places: What would be written, and where.
    """

    config: RunConfig
    world_size: int
    lines: list[str]
    names: tuple[str, ...]
    done: int
    steps: int
    previews: list[Preview]
    label_share: float
    places: dict[str, str]


def run(config: RunConfig) -> int:
    """Prepare a run and print on rank 0 what it would do; return the exit code of `process.run`."""
    seen: list[Sight] = []
    code = process.run(config, partial(_look, seen=seen))
    for sight in seen:  # after the process group is closed, because planning FSDP2 opens another
        _show(sight, Console(width=_WIDTH, highlight=False, markup=False))
    return code


def _look(config: RunConfig, group: Group, watch: Watch, seen: list[Sight]) -> bool:
    """Look at the next steps, in place of `train`. All ranks call it together."""
    prepared = prepare(config, group, watch)
    with Session(prepared.engine, prepared.evaluator, Reports(), group) as session:
        done = prepared.state(session).load(prepared.found)
    batching = batching_of(config, prepared.inputs, prepared.engine.module, group)
    previews, label_share = [], 0.0
    for number in range(done + 1, min(done + _STEPS, prepared.steps) + 1):
        watch.begin(number)
        previews.append(preview(prepared.step, number, batching, group.world_size))
        if number == done + 1:
            candidates = previews[0].candidates
            labels = prepared.inputs.sampler.examples.label_counts(candidates.indices)
            label_share = float(labels.sum() / candidates.lengths.sum())
    if group.is_first:
        sight = Sight(
            config=config,
            world_size=group.world_size,
            lines=prepared.lines(done),
            names=prepared.inputs.source_names,
            done=done,
            steps=prepared.steps,
            previews=previews,
            label_share=label_share,
            places=_places(config, prepared),
        )
        seen.append(sight)
    group.barrier()
    return True


def _places(config: RunConfig, prepared: Prepared) -> dict[str, str]:
    folder = Path(config.output_dir or "runs/DATE-TIME")
    every, evaluates = config.checkpoint.every, prepared.evaluator.evaluates
    saved = f"{folder}/checkpoints: every {every} steps and at the end, the last {config.checkpoint.keep} are retained"
    best = ": the best by held-out loss, and the last in adapter_last" if config.eval.every != 0 and evaluates else ""
    examples = ", examples.parquet" if config.audit and not config.data.streaming else ""
    return {
        "the run": f"{folder}/config.yaml, environment.json, run.json, log.txt{examples}",
        "each step": f"{folder}/metrics.jsonl, selection.jsonl{', audit' if config.audit else ''}",
        "held-out data": f"{folder}/evaluations.jsonl" if evaluates else "there is none",
        "checkpoints": saved if every else "none (--checkpoint.every 0)",
        "adapter": f"{folder}/adapter{best}",
    }


def _show(sight: Sight, console: Console) -> None:
    for line in sight.lines:
        console.print(line, soft_wrap=True)
    if sight.previews:
        console.print(by_source(sight.previews[0], sight.names))
    for coming in sight.previews:
        console.print(arithmetic(coming), soft_wrap=True)
    if any(len(coming.plan.positions) for coming in sight.previews):
        console.print("picks depend on sketches: here the coreset is drawn at random with the step's quotas")
    if sight.previews:
        console.print(_planned(sight), soft_wrap=True, end="")
    table = Table(title="What would be written", title_justify="left", show_header=False, box=None)
    for what, where in sight.places.items():
        table.add_row(what, where)
    console.print(table)
    console.print(f"dry run: {sight.steps - sight.done} of {sight.steps} steps remain; nothing was written")


def _planned(sight: Sight) -> str:
    """Plan the step with the longest micro-batch, or say why this run cannot be planned."""
    found = []
    for coming in sight.previews:
        lengths = coming.candidates.lengths
        found.append(Batches(_busiest(coming.plan.shares, lengths), _busiest(coming.routed.micro_batches, lengths)))
    widest = max(found, key=lambda batches: max(map(sum, chain(batches.sketched, batches.trained))))
    candidates, plan = sight.previews[0].candidates, sight.previews[0].plan
    options = PlanConfig(
        world_size=sight.world_size,
        tokens=max(2, round(float(candidates.lengths.double().mean()))),
        sources=max(1, plan.num_groups),
        label_share=sight.label_share,
    )
    try:
        return shown(make_plan(sight.config, options, batches=widest))
    except UserError as error:
        return f"memory is not planned: {error}\n"


def _busiest(shares: Sequence[Sequence[tuple[int, ...]]], lengths: Tensor) -> tuple[tuple[int, ...], ...]:
    """Return the lengths of each micro-batch's examples, of the rank with the most tokens."""
    of_rank = [tuple(tuple(lengths[[*members]].tolist()) for members in share if members) for share in shares]
    return max(of_rank, key=lambda micro_batches: sum(map(sum, micro_batches)), default=())
