"""Host time of a step beside its model, on up to 1,024 ranks, simulated by one.

python benchmarks/host_time.py                measure; rows are appended to benchmarks/results/host_time.jsonl
python benchmarks/host_time.py --profile      show the functions that take most of it instead

What the first rank's host does in a step besides forwards, backwards, the network and the ranking itself: everything
that loops over ranks or candidates. The parts are those of the package, in the order of a step; `SimulatedGroup`
answers each collective. Sketches have few columns, because more would time copies of memory, which a GPU makes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import rows
import torch
from base_model.mixture import SOURCES
from scale import CPU, STEP, SimulatedGroup, draw_candidates, draw_rows

from colm_scale.config import SelectionConfig
from colm_scale.data.batching import Batching
from colm_scale.data.examples import Examples, offsets_of
from colm_scale.data.sampler import CandidateSampler
from colm_scale.distributed.exchange import share_selection
from colm_scale.engines.base import Update
from colm_scale.estimators.last_layer import LastLayer
from colm_scale.profiling.spans import Spans
from colm_scale.records import Candidates, StepReport
from colm_scale.reporting.run_directory import RunDirectory
from colm_scale.reporting.summary import RunSummary
from colm_scale.selection.moments import AdamMoments
from colm_scale.selection.quota import kept_sources
from colm_scale.selection.rule import SelectionRule
from colm_scale.sketch.plan import held_inputs, plan_sketch
from colm_scale.sketch.store import SketchStore
from colm_scale.step.measure import Measurement
from colm_scale.step.select import Chosen
from colm_scale.step.sketch import Sketched
from colm_scale.step.source_refresh import DIMENSIONS, ReclusteredSources, SeenStates
from colm_scale.step.step import PHASES
from colm_scale.step.train import Trained, route_coreset

COLUMNS = 16
PROBE_NUMBERS = 4096
CANDIDATES_PER_RANK = 8
TOKENS_PER_RANK = 1024
"""Most tokens of a micro-batch, so that every rank has one or two."""
ROUNDS = 9
WIDTH = 64
NAMES = tuple(SOURCES)
STAGES = ("sample", "plan", "gather", "broadcast", "learn", "route", "report", "write")
OPTIONAL = ("reuse", "re-cluster")
"""Stages that are off by default, and not part of the total."""


class NoMeter:
    """Measures nothing: the meter of a CPU takes long, that of a GPU does not."""

    primary, label, device_name = "allocator", "GPU memory", ""

    def start(self) -> None:
        """Begin nothing."""

    def stop(self) -> dict[str, int]:
        return {"allocator": 1, "nvml": 1}


class HostTime:
    """CPU milliseconds of this thread by stage, of each round."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, list[float]] = defaultdict(list)
        self.profile = cProfile.Profile()
        self.profiles = False

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self.profiles:
            self.profile.enable()
        started = time.thread_time()
        yield
        self.milliseconds[stage].append((time.thread_time() - started) * 1e3)
        self.profile.disable()


def draw_examples(count: int) -> Examples:
    """Examples of the built-in sources; the second half of each carries loss."""
    drawn = draw_candidates(count)
    offsets = offsets_of(drawn.lengths)
    within = torch.arange(int(offsets[-1])) - offsets[:-1].repeat_interleave(drawn.lengths)
    labelled = within >= drawn.lengths.clamp(min=2).div(2, rounding_mode="floor").repeat_interleave(drawn.lengths)
    return Examples(
        tokens=torch.ones(len(within), dtype=torch.int32),
        labelled=labelled,
        offsets=offsets,
        ids=drawn.ids,
        sources=drawn.sources,
        protected=torch.zeros(count, dtype=torch.bool),
        source_names=NAMES,
    )


class SimulatedStep:
    """The parts of a run's step that take host time, with ``ranks`` ranks."""

    def __init__(self, ranks: int, *, packed: bool, folder: str):
        n = ranks * CANDIDATES_PER_RANK
        self.examples, self.stage = draw_examples(2 * n), HostTime()
        self.config = SelectionConfig(candidates=n, budget=n // 2, columns=COLUMNS)
        kept = kept_sources(self.examples.sizes, list(NAMES), None)
        self.rule = SelectionRule(self.config, kept, seed=0)
        self.sampler = CandidateSampler(self.examples, n, seed=0)
        self.group = SimulatedGroup(0, ranks, 0, 1, CPU)
        self.batching = Batching(0, TOKENS_PER_RANK, packed, CPU)
        self.spans = Spans(CPU, NoMeter())
        self.measure = Measurement(self.group, self.spans, 0, packed=packed, audits=False)
        self.store = SketchStore(4, min(4 * n, len(self.examples)))
        width = SimpleNamespace(in_features=WIDTH)
        module = SimpleNamespace(causal_model=SimpleNamespace(get_output_embeddings=lambda: width))
        seen = SeenStates(module, 0, self.group)
        self.refresh = ReclusteredSources(seen, NAMES, self.examples.sizes, kept, self.config, 10)
        self.refresh._move(torch.stack([torch.arange(0, 2 * n, 2), torch.zeros(n, dtype=torch.int64)], dim=1))
        self.directory = RunDirectory(folder)
        self.directory.create("", {})
        self.summary = RunSummary(NAMES, self.examples.sizes, kept, NoMeter.label, {})

    def __call__(self, number: int) -> None:
        """One step, from sample to report."""
        stage, config, group, batching = self.stage, self.config, self.group, self.batching
        with stage("sample"):
            candidates = self.sampler(number)
            quota = self.rule.quota(candidates)
        with stage("re-cluster"):
            self.refresh.relabelled(candidates)
        with stage("reuse"):
            self.store.find(candidates.ids, number)
        with stage("plan"):
            plan = plan_sketch(candidates, quota, group.world_size, TOKENS_PER_RANK, packed=batching.packed)
            held_on, _ = held_inputs(plan, candidates.lengths, TOKENS_PER_RANK)
            batching.share(self.examples, candidates, plan.shares, 0)
        group.plan = plan
        estimator = self._estimator(candidates)
        estimator.sketch(plan, [])
        with stage("gather"):
            matrix = estimator.gather()
        with stage("reuse"):
            forwarded = plan.forwarded
            ids = candidates.ids[plan.positions[forwarded]]
            self.store.add(ids, torch.full_like(ids, number), matrix.rows[forwarded])
        selection = self.rule.select(candidates, quota, matrix)
        with stage("broadcast"):
            selection = share_selection(selection, config.budget, candidates, group)
        with stage("learn"):
            estimator.learn(selection)
        sketched = Sketched(plan, matrix, [], held_on)
        chosen = Chosen(candidates, self.examples, self.rule, quota, sketched, selection, estimator.moments)
        with stage("route"):
            routed = route_coreset(chosen, batching, "example", group)
        with stage("re-cluster"):
            self.refresh._seen._local = torch.ones(len(candidates), DIMENSIONS + 1)
            self.refresh.gather(candidates)
        for phase in PHASES[:-1]:
            with self.spans(phase):
                pass
        with stage("report"):
            trained = Trained(routed, torch.ones(len(candidates)), Update(1.0, True, 1.0), 1e-3)
            report = self.measure(chosen, trained, self.measure.describe(chosen), {})
        self._write(report)

    def _write(self, report: StepReport) -> None:
        with self.stage("write"):
            self.directory.report(report, NAMES)
            self.summary.report(report)

    def _estimator(self, candidates: Candidates) -> LastLayer:
        positions = self.group.plan.positions
        drawn = draw_rows(len(positions), COLUMNS, candidates.sources[positions])
        self.group.receives(torch.ones(len(drawn), 2), drawn)
        moments = AdamMoments(torch.zeros(PROBE_NUMBERS), torch.ones(PROBE_NUMBERS), STEP - 1, (0.9, 0.999), 1e-8)
        return LastLayer(SimpleNamespace(size=PROBE_NUMBERS), self.group, moments, COLUMNS)


def measure(ranks: int, *, packed: bool, profiles: bool) -> dict:
    """Measure the stages with ``ranks`` ranks; returns the row."""
    with tempfile.TemporaryDirectory() as folder:
        step = SimulatedStep(ranks, packed=packed, folder=str(Path(folder) / "run"))
        step(1)
        step.stage.milliseconds.clear()
        step.stage.profiles = profiles
        for number in range(2, ROUNDS + 2):
            step(number)
    if profiles:
        pstats.Stats(step.stage.profile).sort_stats("tottime").print_stats(25)
    milliseconds = {}
    for stage, found in step.stage.milliseconds.items():
        visits = len(found) // ROUNDS
        milliseconds[stage] = median(sum(found[at : at + visits]) for at in range(0, len(found), visits))
    return {
        "benchmark": "host_time",
        "ranks": ranks,
        "candidates": ranks * CANDIDATES_PER_RANK,
        "packed": packed,
        "milliseconds": milliseconds | {"all": sum(milliseconds[stage] for stage in STAGES)},
    }


def table() -> str:
    """CPU milliseconds by stage: the first and the last rows of each number of ranks."""
    names = (*STAGES, "all", *OPTIONAL)
    lines = [
        f"| ranks | candidates | micro-batches | loops | {' | '.join(names)} |",
        "|---:|---:|---|---|" + "---:|" * len(names),
    ]
    found = defaultdict(list)
    for row in rows.read("host_time"):
        found[row["ranks"], row["packed"]].append(row)
    for (ranks, packed), of_kind in sorted(found.items()):
        for what, row in {"before": of_kind[0], "now": of_kind[-1]}.items():
            cells = [f"{row['milliseconds'][name]:.1f}" for name in names]
            kind = "packed" if packed else "padded"
            lines.append(f"| {ranks:,} | {row['candidates']:,} | {kind} | {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {"host time": table}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="*", type=int, default=[64, 1024])
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for ranks in given.ranks:
        for packed in (False, True):
            row = measure(ranks, packed=packed, profiles=given.profile)
            print({name: round(value, 2) for name, value in row["milliseconds"].items()}, flush=True)
            if not given.profile:
                rows.append("host_time", row | {"environment": rows.here()})


if __name__ == "__main__":
    main()
