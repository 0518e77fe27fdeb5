"""Whole runs of the product, one row each: learning, time of a step, bytes between ranks.

python benchmarks/runs.py default                     the four methods, three seeds, on the built-in data
python benchmarks/runs.py mine -- --data.train F      the same on other data; options after -- go to the run

Each run is the product's own command under a launcher with ``--processes`` ranks. Rows are appended to
benchmarks/results/runs.jsonl; ``benchmarks/tables.py`` turns them into the tables of the README.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import rows
import yaml

ROOT = rows.ROOT
METHODS = ("colm", "stratified", "random", "full")


def run(method: str, seed: int, processes: int, options: list[str]) -> tuple[Path, tempfile.TemporaryDirectory]:
    """Run the product once; returns the run directory."""
    keep = tempfile.TemporaryDirectory()
    out = Path(keep.name) / "run"
    command = [
        sys.executable,
        *("-m", "deepspeed.launcher.runner", "--num_gpus", str(processes)),
        *(str(ROOT / "launchers" / "train.py"), "--ds_config", str(ROOT / "ds_configs" / "zero2.json")),
        *("--selection.method", method, "--train.seed", str(seed), "--output_dir", str(out)),
        *options,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out, keep


def row(out: Path, name: str) -> dict[str, object]:
    """The row of a run directory."""
    config = yaml.safe_load((out / "config.yaml").read_text())
    environment = json.loads((out / "environment.json").read_text())
    steps = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    evaluations = [json.loads(line) for line in (out / "evaluations.jsonl").open()]
    floors = [step["measured_over_floor"] for step in steps if step["measured_over_floor"] is not None]
    seconds = [step["seconds"] for step in steps]
    outside = [1 - (taken.get("sketch", 0.0) + taken["train"]) / taken["step"] for taken in seconds]
    return {
        "benchmark": "runs",
        "name": name,
        "method": config["selection"]["method"],
        "seed": config["train"]["seed"],
        "estimator": config["selection"]["estimator"],
        "candidates": config["selection"]["candidates"],
        "budget": config["selection"]["budget"],
        "data": digest(config["data"]["train"]),
        "steps": len(steps),
        "before": scores(evaluations[0]),
        "after": scores(evaluations[-1]),
        "step_seconds": quantiles([taken["step"] for taken in seconds]),
        "measured_over_floor": quantiles(floors) if floors else None,
        "share_outside": quantiles(outside),
        "exchanged_bytes": mean_by_key([step["exchanged_bytes"] for step in steps]),
        "padding_share": mean_by_key([step["padding_share"] for step in steps]),
        "peak_bytes": np.max([step["peak_bytes"] for step in steps], axis=0).tolist(),
        "environment": environment,
        "config": config,
    }


def scores(evaluation: dict) -> dict[str, float | None]:
    """The means of an evaluation."""
    return {key: evaluation[key] for key in ("loss", "loss_by_source", "small_loss", "accuracy")}


def quantiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    return {f"p{q}": float(np.percentile(values, q)) for q in (20, 50, 80)}


def mean_by_key(steps: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each key over the steps."""
    return {key: float(np.mean([step.get(key, 0.0) for step in steps])) for key in steps[-1]}


def digest(files: list[str] | None) -> str:
    """The data: the built-in mixture, or names and hashes of files."""
    if not files:
        return "built-in"
    content = hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:16]
    return f"{' '.join(Path(file).name for file in files)} sha256:{content}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the rows")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    own, options = rows.split(sys.argv[1:])
    given = parser.parse_args(own)
    for seed in given.seeds:
        for method in given.methods:
            out, keep = run(method, seed, given.processes, options)
            result = row(out, given.name)
            rows.append("runs", portable(result))
            print(f"{given.name} {method} seed {seed}: {result['after']}", flush=True)
            keep.cleanup()


def portable(result: dict) -> dict:
    """Remove paths of the machine."""
    config = result["config"]
    for split in ("train", "eval"):
        config["data"][split] = [Path(file).name for file in config["data"][split] or []] or None
    config["output_dir"] = None
    config["ds_config"] = Path(config["ds_config"]).name
    result["environment"].pop("command", None)
    return result


if __name__ == "__main__":
    main()
