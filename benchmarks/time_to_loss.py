"""Seconds to a given held-out loss: CoLM, its baselines, and full batches of n and 2n by accumulation.

python benchmarks/time_to_loss.py --seeds 0 1

Every arm has the same micro-batches, so the same peak memory but for what the sketch holds; it is in the rows. The loss
is the mean over sources on the built-in mixture, evaluated every --every steps; seconds are the steps' own, without
evaluation. Rows are appended to benchmarks/results/time_to_loss.jsonl.
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
from arms import ARMS
from learning import QUIET

STEPS = {"stratified": 120, "last_layer": 80, "paper": 80, "full n": 90, "full 2n": 50}
TARGETS = (0.5, 0.2, 0.15)


def run(arm: str, seed: int, every: int) -> dict[str, object]:
    """One run of the product: seconds passed and loss at each evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        options = [*QUIET, *ARMS[arm], "--train.steps", str(STEPS[arm]), "--train.seed", str(seed)]
        options += ["--eval.every", str(every), "--eval.generate", "0", "--output_dir", str(out)]
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


def seconds_to(curve: list[list[float]], target: float) -> float | None:
    """When a loss was first reached, between the evaluations around it by a straight line; None: never."""
    for (_, before, high, _), (_, after, low, _) in pairwise(curve):
        if low <= target:
            return after if high <= target else before + (after - before) * (high - target) / (high - low)
    return None


def table() -> str:
    """Mean seconds over seeds to each loss, and of those of full 2n."""
    found: dict[str, dict[int, dict]] = {}
    for row in rows.read("time_to_loss"):
        found.setdefault(row["arm"], {})[row["seed"]] = row
    headings = " | ".join(f"to {target}: s | of `full 2n`" for target in TARGETS)
    lines = [f"| arm | seeds | peak, GiB | {headings} |", "|---|---:|---:|" + "---:|---:|" * len(TARGETS)]
    for arm in STEPS:
        of_arm = found[arm]
        cells = []
        for target in TARGETS:
            own, other = ([seconds_to(of[s]["curve"], target) for s in of_arm] for of in (of_arm, found["full 2n"]))
            reached = None not in own
            cells.append(f"{mean(own):.1f}" if reached else "not reached")
            cells.append(f"{mean(own) / mean(other):.2f}" if reached and None not in other else "-")
        peak = max(row["peak_bytes"] for row in of_arm.values()) / 2**30
        lines.append(f"| `{arm}` | {len(of_arm)} | {peak:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {"time to loss": table}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    jobs = [(arm, seed) for seed in given.seeds for arm in STEPS]
    with ThreadPoolExecutor(given.workers) as pool:
        for row in pool.map(lambda job: run(*job, given.every), jobs):
            rows.append("time_to_loss", row)
            print(row["arm"], row["seed"], [round(point[2], 3) for point in row["curve"]], flush=True)


if __name__ == "__main__":
    main()
