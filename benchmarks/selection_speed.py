"""Time of picking: greedy facility location, matching, and the exact solution on the line.

python benchmarks/selection_speed.py                      on the CPU
python benchmarks/selection_speed.py --device cuda        greedy on the GPU too
PYTHONPATH=... python benchmarks/selection_speed.py       with submodlib-py 0.0.3 and its requirements on the path

Picks half of n candidates from L1 similarities in float64, which are computed in advance. `colm_scale` is compared with
submodlib's lazy greedy in C++, if available, and a plain lazy greedy in numpy: in one process on one thread, in turn,
round after round. Matching is compared with our facility location in the same way, from the pairs and from the rows.
Rows are appended to benchmarks/results/selection_speed.jsonl.
"""

from __future__ import annotations

import argparse
import heapq
import importlib
import time
from collections.abc import Callable

import numpy as np
import rows
import torch
from runs import quantiles
from scale import draw_rows
from torch import Tensor

from colm_scale.randomness import generator
from colm_scale.selection.ranking import facility, matching
from colm_scale.selection.ranking.line import medoids_on_line
from colm_scale.selection.ranking.similarity import similarities

COLUMNS = 64
DATA = {
    "around centres": lambda n: draw_rows(n, COLUMNS),
    "normal": lambda n: torch.randn(n, COLUMNS, generator=generator(0, "selection speed", n)),
}
ROUNDS = {128: 100, 1024: 20, 4096: 10, 16384: 3}
ON_LINE = 65536
SHARES = (2, 4, 16, 64, ON_LINE // 16)
OTHERS = ("submodlib: build", "submodlib", "numpy", "GPU")


def lazy_greedy(similarity: np.ndarray, k: int) -> list[int]:
    """Facility location with a heap of upper bounds of the gains (Minoux 1978)."""
    covered = np.zeros(len(similarity))
    heap = [(-gain, candidate, 0) for candidate, gain in enumerate(similarity.sum(0))]
    heapq.heapify(heap)
    picks: list[int] = []
    while len(picks) < k:
        gain, candidate, known = heap[0]
        if known == len(picks):
            heapq.heappop(heap)
            picks.append(candidate)
            covered = np.maximum(covered, similarity[candidate])
        else:
            gain = np.maximum(similarity[candidate] - covered, 0).sum()
            heapq.heapreplace(heap, (-gain, candidate, len(picks)))
    return picks


class Submodlib:
    """submodlib's facility location: copies the similarities, then maximises."""

    def __init__(self, similarity: np.ndarray, k: int):
        self._make, self._similarity, self._k = find_submodlib(), similarity, k
        self._function = None

    def build(self) -> None:
        n = len(self._similarity)
        self._function = self._make(n=n, mode="dense", sijs=self._similarity, separate_rep=False)

    def maximise(self) -> list[int]:
        options = {"stopIfZeroGain": False, "stopIfNegativeGain": False, "show_progress": False}
        return [pick for pick, _ in self._function.maximize(self._k, optimizer="LazyGreedy", **options)]


def find_submodlib() -> Callable | None:
    """submodlib's facility location, if it can be imported."""
    try:
        return importlib.import_module("submodlib").FacilityLocationFunction
    except ImportError:
        return None


def on_gpu(similarity: Tensor, k: int) -> list[int]:
    """Greedy on the device; copies the picks back."""
    return facility.greedy(similarity, k).tolist()


def timed(work: dict[str, Callable[[], object]], rounds: int) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Elapsed and CPU seconds ``[rounds, 2]`` of each, and its result."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    returned = {}
    for _ in range(rounds):
        for name, once in work.items():
            started, computed = time.perf_counter(), time.process_time()
            returned[name] = once()
            seconds[name].append((time.perf_counter() - started, time.process_time() - computed))
    return {name: np.array(of) for name, of in seconds.items()}, returned


def measure_greedy(data: str, n: int, device: str, rounds: int) -> dict:
    """Measure half of ``n`` candidates; returns the row."""
    similarity, k = similarities(DATA[data](n).double(), "l1"), n // 2
    work: dict[str, Callable[[], object]] = {"colm_scale": lambda: facility.greedy(similarity, k).tolist()}
    if find_submodlib():
        other = Submodlib(similarity.numpy(), k)
        work |= {"submodlib: build": other.build, "submodlib": other.maximise}
    work["numpy"] = lambda: lazy_greedy(similarity.numpy(), k)
    if device == "cuda":
        there = similarity.cuda()
        work["GPU"] = lambda: on_gpu(there, k)
    seconds, picks = timed(work, rounds)
    picks.pop("submodlib: build", None)
    values = {name: facility.objective(similarity, torch.tensor(of)) for name, of in picks.items()}
    ours, mine = values["colm_scale"], seconds["colm_scale"]
    row = {
        "benchmark": "greedy",
        "data": data,
        "candidates": n,
        "selected": k,
        "rounds": rounds,
        "seconds": {name: quantiles(of[:, 0]) for name, of in seconds.items()},
        "cpu_seconds": {name: quantiles(of[:, 1]) for name, of in seconds.items()},
        "same_picks": {name: of == picks["colm_scale"] for name, of in picks.items()},
        "objective_over_ours": {name: value / ours for name, value in values.items()},
    }
    if "submodlib" in seconds:
        whole = seconds["submodlib"] + seconds["submodlib: build"]
        ratios = mine / whole
        row["over_submodlib"] = {"seconds": quantiles(ratios[:, 0]), "cpu_seconds": quantiles(ratios[:, 1])}
    if device == "cuda":
        row["gpu"] = torch.cuda.get_device_name()
    return row


def measure_matching(data: str, n: int, rounds: int) -> dict:
    """Compare matching with facility location, for half of ``n`` candidates; returns the row."""
    rows_, k = DATA[data](n), n // 2
    left = torch.zeros(rows_.shape[1], dtype=torch.float64)
    similarity, products = similarities(rows_.double(), "l1"), matching.products_of_deviations(rows_, left)
    seconds, _ = timed(
        {
            "facility": lambda: facility.greedy(similarity, k),
            "matching": lambda: matching.match_by_swaps(products, k),
            "facility, from rows": lambda: facility.greedy(similarities(rows_.double(), "l1"), k),
            "matching, from rows": lambda: matching.match_in_parts(rows_, k, matching.LARGEST_PART, left),
        },
        rounds,
    )
    ratios = {end: seconds[f"matching{end}"] / seconds[f"facility{end}"] for end in ("", ", from rows")}
    return {
        "benchmark": "matching",
        "data": data,
        "candidates": n,
        "selected": k,
        "rounds": rounds,
        "cpu_seconds": {name: quantiles(of[:, 1]) for name, of in seconds.items()},
        "over_facility": {f"pairs{end}": quantiles(of[:, 1]) for end, of in ratios.items()},
    }


def measure_line(share: int, rounds: int) -> dict:
    """Measure one in ``share`` of many numbers on the line; returns the row."""
    values = draw_rows(ON_LINE, 1).flatten()
    seconds, returned = timed({"colm_scale": lambda: medoids_on_line(values, ON_LINE // share)}, rounds)
    picks = values[returned["colm_scale"][0]].double().sort().values
    middles = (picks[1:] + picks[:-1]) / 2
    apart = (values.double() - picks[torch.searchsorted(middles, values.double())]).abs().sum()
    return {
        "benchmark": "line",
        "candidates": ON_LINE,
        "selected": ON_LINE // share,
        "rounds": rounds,
        "seconds": quantiles(seconds["colm_scale"][:, 0]),
        "cpu_seconds": quantiles(seconds["colm_scale"][:, 1]),
        "distance": float(apart),
    }


def stored(benchmark: str, *key: str) -> list[dict]:
    """Rows of a benchmark in ascending order of ``key``; the last measurement of each."""
    found = {
        tuple(row[name] for name in key): row for row in rows.read("selection_speed") if row["benchmark"] == benchmark
    }
    return [found[values] for values in sorted(found)]


def greedy_table() -> str:
    """CPU seconds of each, and of ours relative to submodlib."""
    lines = [
        "| rows | candidates | `colm_scale` | submodlib: build | submodlib: maximise | plain numpy | GPU | "
        "of submodlib's time | its objective over ours, less 1 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in stored("greedy", "data", "candidates"):
        cpu = row["cpu_seconds"]
        cells = [row["data"], f"{row['candidates']:,}", milliseconds(cpu["colm_scale"])]
        cells += [milliseconds(row["seconds" if name == "GPU" else "cpu_seconds"].get(name)) for name in OTHERS]
        ratio, value = row.get("over_submodlib"), row["objective_over_ours"].get("submodlib")
        cells.append(f"{ratio['cpu_seconds']['p50']:.2f} ({ranged(ratio['cpu_seconds'], '.2f')})" if ratio else "-")
        cells.append(f"{value - 1:+.0e}" if value else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def matching_table() -> str:
    """CPU seconds of facility location and matching, and their ratios."""
    names = ("facility", "matching", "facility, from rows", "matching, from rows")
    lines = [
        f"| rows | candidates | {' | '.join(names)} | ratio | ratio, from rows |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in stored("matching", "data", "candidates"):
        cells = [row["data"], f"{row['candidates']:,}", *(milliseconds(row["cpu_seconds"][name]) for name in names)]
        cells += [f"{ratio['p50']:.2f} ({ranged(ratio, '.2f')})" for ratio in row["over_facility"].values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def line_table() -> str:
    """CPU seconds by the number selected."""
    lines = ["| candidates | selected | ms |", "|---:|---:|---:|"]
    for row in stored("line", "candidates", "selected"):
        lines.append(f"| {row['candidates']:,} | {row['selected']:,} | {milliseconds(row['cpu_seconds'])} |")
    return "\n".join(lines)


def milliseconds(seconds: dict[str, float] | None) -> str:
    """Median and spread, to three digits."""
    if seconds is None:
        return "-"
    thousandths = {name: 1000 * value for name, value in seconds.items()}
    form = ",.0f" if thousandths["p50"] >= 100 else ".3g"
    return f"{thousandths['p50']:{form}} ({ranged(thousandths, form)})"


def ranged(of: dict[str, float], form: str) -> str:
    """20th to 80th percentile."""
    return f"{of['p20']:{form}} to {of['p80']:{form}}"


TABLES = {"greedy speed": greedy_table, "matching speed": matching_table, "line speed": line_table}


def save(row: dict) -> None:
    """Append a row with its environment."""
    rows.append("selection_speed", row | {"environment": rows.here()})
    print(row, flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", nargs="*", type=int, default=list(ROUNDS), help="empty: skip greedy")
    parser.add_argument("--matching", nargs="*", type=int, default=[128, 1024, 4096], help="candidates; empty: skip")
    parser.add_argument("--data", nargs="*", choices=DATA, default=list(DATA))
    parser.add_argument(
        "--shares", nargs="*", type=int, default=list(SHARES), help="select one in SHARE on the line; empty: skip"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, help="default: more for fewer candidates")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not find_submodlib():
        print("submodlib cannot be imported: its columns stay empty (pip install submodlib-py==0.0.3, PYTHONPATH)")
    measure_greedy("normal", 512, given.device, 2)  # warm-up
    for n in given.candidates:
        for data in given.data:
            save(measure_greedy(data, n, given.device, given.rounds or ROUNDS.get(n, 5)))
    for n in given.matching:
        for data in given.data:
            save(measure_matching(data, n, given.rounds or ROUNDS.get(n, 5)))
    for share in given.shares:
        save(measure_line(share, given.rounds or 5))


if __name__ == "__main__":
    main()
