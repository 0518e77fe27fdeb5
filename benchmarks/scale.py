"""The selection of one step on up to 1,024 ranks, simulated by one: bytes, time and memory.

python benchmarks/scale.py                measure; rows are appended to benchmarks/results/scale.jsonl

The candidates, 64 per rank, pass through the product's own stages from plan to route, on rank 0. Only forward
passes and the network are missing: `SimulatedGroup` answers each collective with what the other ranks would send.
"""

from __future__ import annotations

import argparse
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import psutil
import rows
import torch
from base_model.mixture import SOURCES
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.distributed.exchange import share_selection
from colm_scale.distributed.group import Group
from colm_scale.estimators.base import Estimator
from colm_scale.estimators.last_layer import LastLayer
from colm_scale.estimators.zeroth_order import ZerothOrder
from colm_scale.profiling.memory import MemoryMeter, ResidentMeter
from colm_scale.randomness import generator
from colm_scale.records import Candidates, SketchPlan, long_tensor
from colm_scale.selection.moments import AdamMoments
from colm_scale.selection.quota import kept_sources
from colm_scale.selection.ranking import facility
from colm_scale.selection.ranking.partition import partitioned_greedy
from colm_scale.selection.ranking.similarity import similarities
from colm_scale.selection.route import route
from colm_scale.selection.rule import SelectionRule
from colm_scale.sketch.plan import plan_sketch

CPU = torch.device("cpu")
CANDIDATES_PER_RANK = 64
MICRO_BATCH_TOKENS = 4096
COLUMNS = 2560
PROBE_NUMBERS = 2560 * 128
"""The probe tensor of Phi-2 at LoRA rank 128."""
STEP = 101
GROUPS = (2, 4, 8, 16)
COMPARED = 4
"""Groups in the other ways to partition."""
STAGES = ("plan", "gather", "select", "broadcast", "learn", "route")


@dataclass(slots=True)
class SimulatedGroup(Group):
    """Rank 0 of a group whose other ranks are simulated.

    Attributes:
        plan: Rows of the sketches that each rank would send.
        sketches: ``[W, rows of a rank, c]`` as all ranks would send them, by c.
    """

    plan: SketchPlan | None = None
    sketches: dict[int, Tensor] = field(default_factory=dict)

    def all_gather(self, tensor: Tensor, label: str) -> Tensor:
        if label == "gather":
            gathered = self.sketches[tensor.shape[1]].clone()
        else:
            gathered = tensor.expand(self.world_size, *tensor.shape).clone()
        self._count(label, gathered)
        return gathered

    def receives(self, *sketches: Tensor) -> None:
        """Let the other ranks send these sketches ``[s, c]``, each from the rank that computes it."""
        rows = [self.plan.rows_of(rank) for rank in range(self.world_size)]
        for of_all in sketches:
            laid_out = of_all.new_zeros(self.world_size, int(self.plan.counts.max()), of_all.shape[1])
            for rank, of_rank in enumerate(rows):
                laid_out[rank, : len(of_rank)] = of_all[of_rank]
            self.sketches[of_all.shape[1]] = laid_out

    def reduce_scatter(self, tensor: Tensor, label: str) -> Tensor:
        self._count(label, tensor)
        return tensor[: len(tensor) // self.world_size]

    def all_reduce(self, tensor: Tensor, label: str, *, largest: bool = False) -> Tensor:
        self._count(label, tensor)
        return tensor

    def broadcast(self, tensor: Tensor, label: str, source: int = 0) -> Tensor:
        self._count(label, tensor)
        return tensor


class Stages:
    """Seconds, CPU seconds of all threads, and growth of resident bytes since the start, by stage."""

    def __init__(self, meter: MemoryMeter):
        self._meter = meter
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str):
        before, started, computed = psutil.Process().memory_info().rss, time.perf_counter(), time.process_time()
        self._meter.start()
        yield
        self.seconds[name] = time.perf_counter() - started
        self.cpu_seconds[name] = time.process_time() - computed
        self.peak_bytes[name] = max(0, self._meter.stop()["resident"] - before)


def draw_candidates(n: int) -> Candidates:
    """Candidates of the built-in sources in proportion to their sizes, with lengths around 150 tokens."""
    draw = generator(0, "scale")
    sizes = torch.tensor([float(rows) for rows, _ in SOURCES.values()])
    lengths = torch.randn(n, generator=draw).mul(0.5).add(5).exp().long().clamp(8, 2048)
    order = torch.arange(n)
    return Candidates(STEP, order, order, torch.multinomial(sizes, n, True, generator=draw), lengths)


def draw_rows(n: int, columns: int, sources: Tensor | None = None) -> Tensor:
    """``[n, columns]`` rows around 32 centres per source, a few of them frequent, with log-normal norms."""
    draw = generator(0, "scale rows", columns)
    sources = torch.zeros(n, dtype=torch.int64) if sources is None else sources
    frequencies = torch.rand(32, generator=draw) ** 3
    centre = sources * 32 + torch.multinomial(frequencies, n, True, generator=draw)
    norms = torch.randn(n, 1, generator=draw).mul_(0.7).exp_()
    rows = torch.randn(n, columns, generator=draw).mul_(0.5)
    centres = torch.randn((int(sources.max()) + 1) * 32, columns, generator=draw)
    for some in torch.arange(n).split(4096):
        rows[some] += centres[centre[some]]
    return rows.mul_(norms)


def make_estimator(config: SelectionConfig, group: SimulatedGroup, candidates: Candidates) -> Estimator:
    """The estimator after 100 steps; ``group`` gets the sketches that the ranks would exchange."""
    positions = group.plan.positions
    rows = draw_rows(len(positions), COLUMNS if config.estimator == "last_layer" else 1, candidates.sources[positions])
    if config.estimator == "last_layer":
        group.receives(torch.ones(len(rows), 2), rows)
        moments = AdamMoments(torch.zeros(PROBE_NUMBERS), torch.ones(PROBE_NUMBERS), STEP - 1, (0.9, 0.999), 1e-8)
        return LastLayer(SimpleNamespace(size=PROBE_NUMBERS), group, moments, COLUMNS)
    group.receives(torch.cat([rows, torch.ones(len(rows), 1)], dim=1))
    moments = AdamMoments(torch.tensor([0.1]), torch.ones(1), STEP - 1, (0.9, 0.999), 1e-8)
    return ZerothOrder(None, group, moments, torch.zeros(1, 1), COLUMNS)


def measure_step(estimator_name: str, ranks: int) -> dict:
    """Measure one step's selection with ``ranks`` ranks; returns the row."""
    n = ranks * CANDIDATES_PER_RANK
    config = SelectionConfig(candidates=n, budget=n // 2, estimator=estimator_name, columns=COLUMNS)
    sizes = long_tensor([rows for rows, _ in SOURCES.values()])
    rule = SelectionRule(config, kept_sources(sizes, list(SOURCES), None), seed=0)
    group, candidates, stages = SimulatedGroup(0, ranks, 0, 1, CPU), draw_candidates(n), Stages(ResidentMeter())
    quota = rule.quota(candidates)
    with stages("plan"):
        group.plan = plan_sketch(candidates, quota, ranks, MICRO_BATCH_TOKENS)
    estimator = make_estimator(config, group, candidates)
    estimator.sketch(group.plan, [])
    with stages("gather"):
        matrix = estimator.gather()
    with stages("select"):
        selection = rule.select(candidates, quota, matrix)
    with stages("broadcast"):
        selection = share_selection(selection, rule.most_selected, candidates, group)
    with stages("learn"):
        estimator.learn(selection)
    with stages("route"):
        routed = route(candidates.lengths, selection.positions, ranks, MICRO_BATCH_TOKENS)
    return {
        "benchmark": "scale",
        "estimator": estimator_name,
        "ranks": ranks,
        "candidates": n,
        "selected": len(selection.positions.unique()),
        "columns": matrix.rows.shape[1],
        "largest_source": int(torch.bincount(candidates.sources[matrix.positions]).max()),
        "matrix_bytes": matrix.rows.numel() * matrix.rows.element_size(),
        "seconds": stages.seconds,
        "cpu_seconds": stages.cpu_seconds,
        "peak_bytes": stages.peak_bytes,
        "exchanged_bytes": group.take_traffic(),
        "imbalance": routed.imbalance,
    }


def measure_loss(n: int, columns: int, share: int) -> dict:
    """Measure the loss of partitioned against plain greedy for one in ``share`` of ``n``; returns the row."""
    rows, k = draw_rows(n, columns), n // share
    similarity = similarities(rows.double(), "l1")
    plain = facility.objective(similarity, facility.greedy(similarity, k))
    apart = n * float(similarity.max()) - plain

    def loss(picks: Tensor) -> dict[str, float]:
        value = facility.objective(similarity, picks)
        return {"objective": 1 - value / plain, "distance": (plain - value) / apart}

    found = {f"regions {g}": loss(partitioned_greedy(rows, k, "l1", -(-n // g))) for g in GROUPS}
    found["every g-th"] = loss(greedy_of_every_gth(rows, k // COMPARED, COMPARED))
    if k < n // COMPARED:  # otherwise every group passes on all its rows
        union = greedy_of_every_gth(rows, k, COMPARED)
        found["GreeDi"] = loss(union[facility.greedy(similarities(rows[union].double(), "l1"), k)])
    found["random"] = loss(torch.randperm(n, generator=generator(0, "scale"))[:k])
    return {"benchmark": "partition", "candidates": n, "columns": columns, "share": share, "loss": found}


def greedy_of_every_gth(rows: Tensor, count: int, groups: int) -> Tensor:
    """``count`` picks of each of ``groups`` groups; a group is every g-th row instead of a region."""
    every = [torch.arange(start, len(rows), groups) for start in range(groups)]
    return torch.cat([group[facility.greedy(similarities(rows[group].double(), "l1"), count)] for group in every])


def save(row: dict) -> None:
    """Append a row with its environment."""
    rows.append("scale", row | {"environment": rows.here()})
    print({key: value for key, value in row.items() if key != "environment"}, flush=True)


def stored(benchmark: str, *key: str) -> list[dict]:
    """Rows of a benchmark in ascending order of ``key``; the last measurement of each."""
    last = {tuple(row[name] for name in key): row for row in rows.read("scale") if row["benchmark"] == benchmark}
    return [last[values] for values in sorted(last)]


def bytes_table() -> str:
    """Bytes per rank and step, by label."""
    lines = [
        "| estimator | ranks | candidates | gather | columns | broadcast | moments | control | the matrix itself |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in stored("scale", "estimator", "ranks"):
        moved = [row["exchanged_bytes"].get(label, 0) for label in ("gather", "columns", "broadcast", "moments")]
        moved += [row["exchanged_bytes"]["control"], row["matrix_bytes"]]
        cells = [f"{row['ranks']:,}", f"{row['candidates']:,}", *(f"{number:,}" for number in moved)]
        lines.append(f"| `{row['estimator']}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def time_table() -> str:
    """CPU seconds of each stage, and growth of the resident memory of rank 0."""
    lines = [
        f"| estimator | ranks | columns | largest source | {' | '.join(STAGES)} | peak of gather | peak of select |",
        "|---|" + "---:|" * (5 + len(STAGES)),
    ]
    for row in stored("scale", "estimator", "ranks"):
        cells = [f"{row[name]:,}" for name in ("ranks", "columns", "largest_source")]
        cells += [f"{row['cpu_seconds'][stage]:.3g} s" for stage in STAGES]
        cells += [f"{row['peak_bytes'][stage] / 2**20:,.0f} MiB" for stage in ("gather", "select")]
        lines.append(f"| `{row['estimator']}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def loss_table() -> str:
    """Increase of the candidates' distance to their medoids over plain greedy."""
    names = [*(f"regions {g}" for g in GROUPS), "every g-th", "GreeDi", "random"]
    lines = [
        f"| columns | selected | candidates | {' | '.join(names)} | objective lost, regions {GROUPS[-1]} |",
        "|---:" * (4 + len(names)) + "|",
    ]
    for row in stored("partition", "columns", "share", "candidates"):
        loss = row["loss"]
        cells = [f"{loss[name]['distance']:+.1%}" if name in loss else "-" for name in names]
        objective = f"{loss[f'regions {GROUPS[-1]}']['objective']:.3%}"
        cells = [f"{row['columns']}", f"1 in {row['share']}", f"{row['candidates']:,}", *cells, objective]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {"bytes": bytes_table, "time": time_table, "loss": loss_table}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="*", type=int, default=[8, 64, 1024], help="ranks; empty: skip")
    parser.add_argument("--loss", nargs="*", type=int, default=[1024, 4096, 8192], help="candidates; empty: skip")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    measure_step("last_layer", 1)  # warm-up
    for n in given.loss:
        for columns in (1, 64):
            for share in (2, 16):
                save(measure_loss(n, columns, share))
    for ranks in given.ranks:
        for estimator in ("zeroth_order", "last_layer"):
            save(measure_step(estimator, ranks))


if __name__ == "__main__":
    main()
