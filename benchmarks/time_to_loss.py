"""Time to a given held-out loss: CoLM, its baselines, and full batches of n and 2n by accumulation.

python benchmarks/time_to_loss.py --seeds 0 1

All arms have the same micro-batches, and hence the same peak memory except for the sketch; the rows record it. The loss
is the mean over sources on the built-in mixture, evaluated every --every steps. Time is steps times the cost of a step
that `learning.py cost` has measured, so that parallel runs do not affect each other's: without activation checkpointing
and with it, which changes no loss. Rows are appended to benchmarks/results/time_to_loss.jsonl.
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

import learning_tables
import rows
from arms import ARMS
from learning import QUIET

STEPS = {"stratified": 120, "colm": 80, "last_layer": 80, "paper": 80, "full n": 90, "full 2n": 50}
TARGETS = (0.8, 0.5, 0.3)
_ALL = 10_000
"""Score all held-out examples in every evaluation."""


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
    """Mean steps over seeds to each loss, and their time relative to full 2n, without and with checkpointing."""
    found: dict[str, dict[int, dict]] = {}
    for row in rows.read("time_to_loss"):
        found.setdefault(row["arm"], {})[row["seed"]] = row
    targets = " | ".join(f"to {target}" for target in TARGETS)
    lines = [
        f"| arm | seeds | peak, GiB | steps {targets} | time {targets} | checkpointed: time {targets} |",
        "|---|" + "---:|" * (2 + 3 * len(TARGETS)),
    ]
    prices = [learning_tables.costs(data) for data in ("built-in", "built-in, checkpointed")]
    for arm, of_arm in found.items():
        steps = [[steps_to(run["curve"], target) for run in of_arm.values()] for target in TARGETS]
        whole = [[steps_to(found["full 2n"][seed]["curve"], target) for seed in of_arm] for target in TARGETS]
        cells = [f"`{arm}`", str(len(of_arm)), f"{max(run['peak_bytes'] for run in of_arm.values()) / 2**30:.2f}"]
        cells += ["not reached" if None in own else f"{mean(own):.0f}" for own in steps]
        for price in prices:
            for own, other in zip(steps, whole):
                known = None not in own and None not in other
                cells.append(f"{mean(own) * price[arm] / (mean(other) * price['full 2n']):.2f}" if known else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {"time to loss": table}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    done = {(row["arm"], row["seed"]) for row in rows.read("time_to_loss")}
    jobs = [(arm, seed) for seed in given.seeds for arm in STEPS if (arm, seed) not in done]
    with ThreadPoolExecutor(given.workers) as pool:
        for row in pool.map(lambda job: run(*job, given.every), jobs):
            rows.append("time_to_loss", row)
            print(row["arm"], row["seed"], [round(point[2], 3) for point in row["curve"]], flush=True)


if __name__ == "__main__":
    main()
