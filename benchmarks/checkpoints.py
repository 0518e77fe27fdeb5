"""Cost of a checkpoint: seconds for which steps wait, seconds until it is on the disk, seconds to read it.

python benchmarks/checkpoints.py sizes                 by the number of adapter parameters, in one process
python benchmarks/checkpoints.py runs [--code FOLDER]  in the built-in run, under each engine, in 2 ranks

Uses the disk of the current folder. Rows are appended to benchmarks/results/checkpoints.jsonl. ``--code`` runs another
checkout, for a comparison; one that writes no ``checkpoints.jsonl`` is taken to stop its steps for all of a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median

import rows
import torch
from torch import Tensor, nn

from colm_scale.checkpoint.background import BackgroundWriter, Snapshot
from colm_scale.checkpoint.store import CheckpointFolder
from colm_scale.distributed.group import Group
from colm_scale.engines.base import Part
from colm_scale.engines.tensors import collect, landing

MODELS = {
    "built-in base, rank 16": 317_440,
    "Phi-2, rank 16": 23_592_960,
    "Phi-2, rank 128": 188_743_680,
}
"""Adapter parameters: rank times inputs plus outputs of 4 layers of 2,560 and 2 of 2,560 by 10,240, in 32 blocks."""
MATRICES = 64
ENGINES = {
    "single": (),
    "ddp": (),
    "fsdp": ("--engine", "fsdp"),
    "zero2": ("--ds_config", "ds_configs/zero2.json"),
    "zero3": ("--ds_config", "ds_configs/zero3.json"),
}
STEPS, EVERY = 13, 3
_CPU = torch.device("cpu")


class Trained:
    """An engine whose adapters and averages are random."""

    is_sharded, state_keys = False, ("exp_avg", "exp_avg_sq")

    def __init__(self, parameters: int):
        self.module = nn.ParameterDict({f"matrix {i}": torch.randn(parameters // MATRICES) for i in range(MATRICES)})
        self._averages = {
            (name, key): torch.randn_like(weight)
            for name, weight in self.module.named_parameters()
            for key in self.state_keys
        }

    def part(self, name: str, key: str) -> Part:
        values: Tensor = self._averages.get((name, key), self.module[name]).detach()
        return Part(values.shape, 0, values)


def measure(name: str, parameters: int) -> dict[str, object]:
    """Write a checkpoint with this many adapter parameters while steps go on, and read it."""
    engine, group = Trained(parameters), Group(0, 1, 0, 1, _CPU)
    alone = median(step_seconds() for _ in range(20))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        writer = BackgroundWriter(CheckpointFolder(Path(folder), keep=1))
        held = _reset_peak()
        started = time.perf_counter()
        tensors = collect(engine, group)
        writer.begin(Snapshot(1, {"step": 1}, tensors, started, landing(_CPU)))
        meanwhile = [step_seconds()]
        while not (saved := writer.saved()):
            meanwhile.append(step_seconds())
        peak = _resident("VmHWM") - held
        del tensors
        began = time.perf_counter()
        CheckpointFolder(Path(folder), keep=1).newest(fallback=False)
        read = time.perf_counter() - began
    return {
        "benchmark": "checkpoints",
        "name": name,
        "parameters": parameters,
        **asdict(saved[0]),
        "read_seconds": read,
        "step_seconds_alone": alone,
        "step_seconds_meanwhile": median(meanwhile),
        "longest_step_seconds_meanwhile": max(meanwhile),
        "peak_bytes": peak,
    }


def step_seconds() -> float:
    """Work of the size of a step, one operation after the other as the host starts them."""
    started = time.perf_counter()
    matrix = torch.full((256, 256), 1 / 256)
    for _ in range(100):
        matrix = matrix @ matrix
    return time.perf_counter() - started


def _reset_peak() -> int:
    """Let the peak of the resident memory begin anew; returns the bytes held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(kind: str) -> int:
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1])


def measure_run(engine: str, code: Path) -> dict[str, object]:
    """The built-in run with a checkpoint every few steps."""
    ranks = 1 if engine == "single" else 2
    launcher = ["torchrun", "--nproc_per_node", str(ranks), "--master_port", "29619"] if ranks > 1 else [sys.executable]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        options = [
            *("--train.steps", str(STEPS), "--checkpoint.every", str(EVERY), "--train.threads", "1"),
            *("--eval.every", "0", "--eval.generate", "0", "--eval.limit", "5", "--profile.floor_every", "0"),
            *("--profile.display", "plain", *ENGINES[engine], "--output_dir", str(run)),
        ]
        environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
        command = [*launcher, "launchers/train.py", *options]
        done = subprocess.run(command, cwd=code, env=environment, check=True, capture_output=True, text=True)
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        saved = run / "checkpoints.jsonl"
        if behind := saved.exists():
            checkpoints = [json.loads(line) for line in saved.read_text().splitlines()]
        else:
            took = [float(seconds) for seconds in re.findall(r"checkpoint of step .* MB in ([\d.]+) s", done.stdout)]
            checkpoints = [{"stall_seconds": seconds, "seconds": seconds} for seconds in took]
    checkpoints = checkpoints[:-1]  # the steps are over when the last is written
    return {
        "benchmark": "checkpoints of runs",
        "engine": engine,
        "ranks": ranks,
        "behind": behind,
        "step_seconds": median(row["seconds"]["step"] for row in metrics[1:]),
        "stall_seconds": [row["stall_seconds"] for row in checkpoints],
        "seconds": [row["seconds"] for row in checkpoints],
    }


def table() -> str:
    """One row per model; the last measurement of each, and the one in which steps waited for the whole write."""
    found = [row for row in rows.read("checkpoints") if row["benchmark"] == "checkpoints"]
    before = {row["name"]: row for row in found if "write_seconds" in row}
    lines = [
        "| adapters | parameters | MB | steps waited, s | and before | on the disk after, s | read and verify, s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in {row["name"]: row for row in found if "stall_seconds" in row}.items():
        waited = f"{row['stall_seconds']:.3f} | {before[name]['write_seconds']:.2f}"
        seconds = f"{row['seconds']:.2f} | {row['read_seconds']:.2f}"
        lines.append(f"| {name} | {row['parameters']:,} | {row['bytes'] / 1e6:,.1f} | {waited} | {seconds} |")
    return "\n".join(lines)


def table_of_runs() -> str:
    """One row per engine, of the last measurements."""
    found = [row for row in rows.read("checkpoints") if row["benchmark"] == "checkpoints of runs"]
    lines = [
        "| engine | ranks | a step, s | steps waited, s | of a step | before, s | of a step |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for engine in ENGINES:
        cells = [engine]
        for behind in (True, False):
            row = [row for row in found if row["engine"] == engine and row["behind"] is behind][-1]
            waited = median(row["stall_seconds"])
            cells += [str(row["ranks"]), f"{row['step_seconds']:.2f}"] if behind else []
            cells += [f"{waited:.3f}", f"{waited / row['step_seconds']:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {"checkpoints": table, "checkpoints of runs": table_of_runs}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sizes", "runs"))
    parser.add_argument("--code", type=Path, default=rows.ROOT)
    given = parser.parse_args()
    facts = rows.here()
    measured = (
        (measure(name, parameters) for name, parameters in MODELS.items())
        if given.what == "sizes"
        else (measure_run(engine, given.code.absolute()) for engine in ENGINES)
    )
    for row in measured:
        rows.append("checkpoints", row | {"environment": facts})
        print(row, flush=True)


if __name__ == "__main__":
    main()
