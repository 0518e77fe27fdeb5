"""Seconds to a given held-out loss: CoLM, its baselines, and full batches of n and 2n by accumulation.

python benchmarks/time_to_loss.py cost              a step of every arm, interleaved in one process, on a quiet machine
python benchmarks/time_to_loss.py run --seeds 0 1   the steps it takes

All arms have the same micro-batches, and hence the same peak memory except for the sketch; the rows record it. The loss
is the mean over sources on the built-in mixture, evaluated every --every steps. Seconds are steps times the measured
cost of a step, so that parallel runs do not affect each other's time. Rows are appended to
benchmarks/results/time_to_loss.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import mean

import rows
import runs
from arms import ARMS
from learning import QUIET, interleaved, prepared

STEPS = {"stratified": 120, "last_layer": 80, "paper": 80, "full n": 90, "full 2n": 50}
TARGETS = (0.8, 0.5, 0.3)
_ALL = 10_000
"""Score all held-out examples in every evaluation."""


def cost(rounds: int) -> None:
    """Time a step of every arm in turn, round after round."""
    seconds = interleaved({arm: prepared([*QUIET, *ARMS[arm]]) for arm in STEPS}, rounds)
    for arm, taken in seconds.items():
        row = {"benchmark": "time_to_loss", "kind": "cost", "arm": arm, "step_seconds": runs.quantiles(taken)}
        rows.append("time_to_loss", row | {"rounds": rounds, "environment": rows.here()})
        print(arm, row["step_seconds"], flush=True)


def run(arm: str, seed: int, every: int) -> dict[str, object]:
    """Run the product once; returns seconds and loss at each evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        options = [*QUIET, *ARMS[arm], "--train.steps", str(STEPS[arm]), "--train.seed", str(seed)]
        options += ["--eval.every", str(every), "--eval.generate", "0", "--output_dir", str(out)]
        options += ["--eval.sample", str(_ALL)]
        options += ["--train.schedule", "constant", "--train.learning_rate", "3e-3"]
        command = [sys.executable, str(rows.ROOT / "launchers" / "train.py"), *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        steps = [json.loads(line) for line in (out / "metrics.jsonl").open()]
        evaluations = [json.loads(line) for line in (out / "evaluations.jsonl").open()]
        environment = json.loads((out / "environment.json").read_text())
    environment.pop("command", None)
    passed = [0.0, *accumulate(step["seconds"]["step"] for step in steps)]
    return {
        "benchmark": "time_to_loss",
        "kind": "run",
        "arm": arm,
        "seed": seed,
        "curve": [[e["step"], passed[e["step"]], e["loss_by_source"], e["loss"]] for e in evaluations],
        "peak_bytes": max(max(step["peak_bytes"]) for step in steps),
        "environment": environment,
    }


def steps_to(curve: list[list[float]], target: float) -> float | None:
    """Seconds to a loss, interpolated linearly between evaluations; None if never reached."""
    for (before, _, high, _), (after, _, low, _) in pairwise(curve):
        if low <= target:
            return after if high <= target else before + (after - before) * (high - target) / (high - low)
    return None


def table() -> str:
    """Mean seconds over seeds to each loss, and relative to full 2n."""
    found: dict[str, dict[int, dict]] = {}
    each = {}
    for row in rows.read("time_to_loss"):
        if row["kind"] == "cost":
            each[row["arm"]] = row["step_seconds"]["p50"]
        else:
            found.setdefault(row["arm"], {})[row["seed"]] = row
    headings = " | ".join(f"to {target}: s | of `full 2n`" for target in TARGETS)
    lines = [f"| arm | s per step | seeds | peak, GiB | {headings} |", "|---|" + "---:|" * (3 + 2 * len(TARGETS))]
    for arm in STEPS:
        of_arm = found[arm]
        cells = []
        for target in TARGETS:
            own, other = ([steps_to(of[s]["curve"], target) for s in of_arm] for of in (of_arm, found["full 2n"]))
            if None in own:
                cells += ["not reached", "-"]
                continue
            taken = mean(own) * each[arm]
            cells.append(f"{taken:.1f}")
            cells.append("-" if None in other else f"{taken / (mean(other) * each['full 2n']):.2f}")
        peak = max(row["peak_bytes"] for row in of_arm.values()) / 2**30
        lines.append(f"| `{arm}` | {each[arm]:.2f} | {len(of_arm)} | {peak:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {"time to loss": table}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "run"))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    if given.what == "cost":
        cost(given.rounds)
        return
    jobs = [(arm, seed) for seed in given.seeds for arm in STEPS]
    with ThreadPoolExecutor(given.workers) as pool:
        for row in pool.map(lambda job: run(*job, given.every), jobs):
            rows.append("time_to_loss", row)
            print(row["arm"], row["seed"], [round(point[2], 3) for point in row["curve"]], flush=True)


if __name__ == "__main__":
    main()
