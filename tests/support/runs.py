"""Run directories with known numbers, written by the product's own code without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from colm_scale.config import RunConfig, SelectionConfig, TrainConfig, as_yaml
from colm_scale.randomness import generator
from colm_scale.records import Candidates, Selection, StepReport, long_tensor
from colm_scale.reporting.run_directory import RunDirectory
from colm_scale.reporting.summary import Evaluation, HeldOutLoss

SOURCES = ("algebra", "geometry", "trivia")
SIZES = (40, 20, 4)
PHASES = {"sketch": 0.3, "gather": 0.1, "select": 0.05, "train": 0.5, "optimizer": 0.04, "report": 0.01}
GIB = 2**30


def write_run(
    path: Path,
    *,
    steps: int = 4,
    planned: int | None = None,
    sources: Sequence[str] = SOURCES,
    sizes: Sequence[int] = SIZES,
    method: str = "colm",
    ranks: int = 2,
    kinds: Sequence[str] = ("nvml", "allocator"),
    faster: float = 1.0,
    evaluated: bool = True,
    seed: int = 0,
) -> Path:
    """Write a run directory: step ``s`` has loss 4 / s, 8 candidates and, if even, a floor of 0.8 of its seconds."""
    directory = RunDirectory(str(path))
    config = RunConfig(
        train=TrainConfig(steps=planned or steps, seed=seed),
        selection=SelectionConfig(method=method, candidates=8, budget=4),
        output_dir=str(path),
    )
    table = [{"name": name, "examples": size, "kept": size < 10} for name, size in zip(sources, sizes)]
    facts = {"schedule": {"steps": planned or steps}, "sources": table}
    environment = {"versions": {"torch": "2.13.0"}, "engine": "ddp", "world_size": ranks, "command": ["train.py"]}
    directory.create(as_yaml(config), environment, facts=facts)
    draws = generator(seed, "support runs")
    evaluations = {0, steps // 2, steps} if evaluated else set()
    for step in range(steps + 1):
        if step:
            directory.report(report(step, sizes, ranks, kinds, faster, draws), sources)
        if step in evaluations:
            directory.evaluation(evaluation(step, sources, whole=step in (0, steps)))
    return path


def candidates_of(sources: torch.Tensor, protected: torch.Tensor | None = None) -> Candidates:
    """Candidates of these sources ``[n]``, of which only sources and protection matter."""
    number = torch.arange(len(sources))
    return Candidates(1, number, number, sources, number, protected)


def report(
    step: int, sizes: Sequence[int], ranks: int, kinds: Sequence[str], faster: float, draws: torch.Generator
) -> StepReport:
    """One step, whose coreset is every second candidate."""
    ids = torch.randperm(sum(sizes), generator=draws)[:8]
    ends = long_tensor(sizes).cumsum(0)
    candidates = Candidates(step, ids, ids, torch.searchsorted(ends, ids, right=True), long_tensor([9] * 8))
    seconds = {phase: taken / faster for phase, taken in PHASES.items()} | {"step": 1 / faster}
    peaks = {
        kind: {
            "train": tuple((2 + rank / 4 - number) * GIB for rank in range(ranks)),
            "step": tuple((2 + rank / 4 - number + 0.001 * step) * GIB for rank in range(ranks)),
        }
        for number, kind in enumerate(kinds)
    }
    peaks = {kind: {phase: tuple(map(int, by_rank)) for phase, by_rank in of.items()} for kind, of in peaks.items()}
    wobble = float(torch.rand((), generator=draws)) / 10
    return StepReport(
        step=step,
        loss=4 / step,
        learning_rate=1e-3,
        gradient_norm=0.5,
        candidates=candidates,
        selection=Selection(long_tensor([0, 2, 4, 6]), torch.ones(4), kept=1),
        seconds=seconds,
        peak_bytes=peaks[kinds[0]]["step"],
        phase_peak_bytes=peaks,
        exchanged_bytes={"gather": 128},
        imbalance=1.0,
        telemetry={
            "effective_sources": 2.5 + wobble,
            "effective_sources_candidates": 2.25,
            "sketch_error": 0.4 + wobble,
            "sketch_error_stratified": 0.6 - wobble,
        },
        noise={"noise": 120.0, "signal": 6 + wobble, "trained": 4.0, "worth": 5.0},
        floor=1.25 if step % 2 == 0 else None,
    )


def evaluation(step: int, sources: Sequence[str], *, whole: bool = True) -> Evaluation:
    """Losses 3, 4, 5, ... divided by step + 1; twice as large on the sample."""
    sample = held_out(step, sources, scale=2, each=2)
    found = held_out(step, sources, scale=1, each=8) if whole else sample
    return Evaluation(
        step=step,
        losses=found.losses,
        accuracies=dict.fromkeys(sources, 0.25 if whole else None),
        counts=found.counts,
        loss=found.loss,
        loss_by_source=found.loss_by_source,
        small_loss=found.small_loss,
        accuracy=0.25 if whole else None,
        whole=whole,
        sample=sample,
    )


def held_out(step: int, sources: Sequence[str], scale: float, each: int) -> HeldOutLoss:
    losses = {name: scale * (3 + place) / (1 + step) for place, name in enumerate(sources)}
    return HeldOutLoss(
        losses=losses,
        counts=dict.fromkeys(sources, each),
        loss=scale * 3.5 / (1 + step),
        loss_by_source=sum(losses.values()) / len(losses),
        small_loss=losses[sources[-1]],
    )
