"""Cost of a checkpoint: bytes, and seconds to write and to read, by the number of adapter parameters.

python benchmarks/checkpoints.py

Uses the disk of the current folder. Rows are appended to benchmarks/results/checkpoints.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import rows
import torch

from colm_scale.checkpoint.store import CheckpointFolder

MODELS = {
    "built-in base, rank 16": 317_440,
    "Phi-2, rank 16": 23_592_960,
    "Phi-2, rank 128": 188_743_680,
}
"""Adapter parameters: rank times inputs plus outputs of 4 layers of 2,560 and 2 of 2,560 by 10,240, in 32 blocks."""
MATRICES = 64


def measure(name: str, parameters: int) -> dict[str, object]:
    """Write and read a checkpoint with this many adapter parameters."""
    weights = {f"matrix {i}": torch.randn(parameters // MATRICES) for i in range(MATRICES)}
    averages = {f"{key}/{name}": weight for key in ("exp_avg", "exp_avg_sq") for name, weight in weights.items()}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpoints = CheckpointFolder(Path(folder), keep=1)
        started = time.perf_counter()
        path = checkpoints.write(1, {"step": 1}, {"adapter": weights, "optimizer": averages})
        written = time.perf_counter()
        checkpoints.newest(fallback=False)
        read = time.perf_counter()
        size = sum(file.stat().st_size for file in path.iterdir())
    return {
        "benchmark": "checkpoints",
        "name": name,
        "parameters": parameters,
        "bytes": size,
        "write_seconds": written - started,
        "read_seconds": read - written,
    }


def table() -> str:
    """One row per model; the last measurement of each."""
    last = {row["name"]: row for row in rows.read("checkpoints")}
    lines = ["| adapters | parameters | MB | write, s | read and verify, s |", "|---|---:|---:|---:|---:|"]
    for name, row in last.items():
        seconds = f"{row['write_seconds']:.2f} | {row['read_seconds']:.2f}"
        lines.append(f"| {name} | {row['parameters']:,} | {row['bytes'] / 1e6:,.1f} | {seconds} |")
    return "\n".join(lines)


TABLES = {"checkpoints": table}


def main() -> None:
    """Run the command line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    facts = rows.here()
    for name, parameters in MODELS.items():
        row = measure(name, parameters)
        rows.append("checkpoints", row | {"environment": facts})
        print(row, flush=True)


if __name__ == "__main__":
    main()
