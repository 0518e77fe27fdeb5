"""Compare every engine with one process and with DDP: selected ids, adapters, memory per rank, time of a step.

python benchmarks/engines.py              every engine, float32
python benchmarks/engines.py fsdp zero3   only these
python benchmarks/engines.py --dtypes bfloat16 float16    the first step that differs, in half precision
python benchmarks/engines.py --seeds 10   only the ids, in float32, with seeds 0 to 9; goes on where it was interrupted

For each engine, --processes ranks train the built-in model on the built-in data: 20 steps under DDP, the same steps
under the engine, and the rest of them again from the engine's checkpoint of step 7. The time of a step is compared with
the DDP run just before. Rows are appended to benchmarks/results/engines.jsonl.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import rows
from safetensors.torch import load_file

ROOT = rows.ROOT
TRAIN = str(ROOT / "launchers" / "train.py")
STEPS, BREAK = 20, 7
RUN = (
    *("--train.steps", str(STEPS), "--train.threads", "1", "--selection.candidates", "32", "--selection.budget", "16"),
    *("--eval.every", "0", "--eval.generate", "0", "--eval.limit", "1"),
    *("--profile.floor_every", "0", "--profile.display", "off"),
    *("--checkpoint.every", str(BREAK), "--checkpoint.keep", "9"),
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "{ranks}", TRAIN)
DEEPSPEED = (
    *("-m", "deepspeed.launcher.runner", "--num_gpus", "{ranks}", "--master_port", "{port}"),
    *(TRAIN, "--ds_config"),
)
ENGINES = {
    "single": (TRAIN,),
    "ddp": TORCHRUN,
    **{
        stage: (*DEEPSPEED, str(ROOT / "ds_configs" / f"{stage}.json"))
        for stage in ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
    },
    "fsdp": (*TORCHRUN, "--engine", "fsdp"),
    "fsdp, no reshard": (*TORCHRUN, "--engine", "fsdp", "--fsdp.reshard_after_forward", "false"),
    "fsdp, offload": (*TORCHRUN, "--engine", "fsdp", "--fsdp.cpu_offload", "true"),
}


def run(engine: str, ranks: int, out: Path, *options: str) -> None:
    """Run the product once under an engine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [part.format(ranks=ranks, port=port) for part in ENGINES[engine]]
    command = [sys.executable, *launcher, *RUN, *options, "--output_dir", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def resumed(engine: str, ranks: int, whole: Path, out: Path, *options: str) -> None:
    """Resume a run from its checkpoint of step 7, as after a kill."""
    step = f"step-{BREAK:08d}"
    shutil.copytree(whole / "checkpoints" / step, out / "checkpoints" / step)
    for file in whole.glob("*.jsonl"):
        shutil.copy(file, out)
    run(engine, ranks, out, *options, "--resume", "auto")


def selected(out: Path) -> list[list[int]]:
    return [row["selected"] for row in read(out / "selection.jsonl")]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read(out / "metrics.jsonl")]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def seconds(out: Path) -> float:
    """Median seconds of a step, without the first three."""
    return median(row["seconds"]["step"] for row in read(out / "metrics.jsonl")[3:])


def largest_difference(one: Path, other: Path) -> float:
    """Largest difference between the adapters of two runs."""
    ours, theirs = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (one, other))
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def row(engine: str, ranks: int, dtype: str, folder: Path, alone: Path) -> dict[str, object]:
    """Measure one engine; in half precision, compare only the ids."""
    ddp, whole = folder / "ddp", folder / "whole"
    if dtype == "float32":
        run("ddp", ranks, ddp)
    run(engine, ranks, whole, "--train.dtype", dtype)
    pairs = zip(selected(whole), selected(alone), strict=True)
    differs = [number for number, (ours, theirs) in enumerate(pairs, 1) if ours != theirs]
    environment = json.loads((whole / "environment.json").read_text())
    environment.pop("command", None)
    checkpoint = whole / "checkpoints" / f"step-{STEPS:08d}"
    found = {
        "benchmark": "engines",
        "engine": engine,
        "dtype": dtype,
        "ranks": environment["world_size"],
        "steps": STEPS,
        "first_step_that_differs": differs[0] if differs else None,
        "largest_weight_difference": largest_difference(whole, alone),
        "weight_bytes_by_rank": environment.pop("weight_bytes_by_rank"),
        "peak_bytes": [max(peaks) for peaks in zip(*(row["peak_bytes"] for row in read(whole / "metrics.jsonl")))],
        "step_seconds": seconds(whole),
        "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint.iterdir()),
        "environment": environment,
    }
    if dtype == "float32":
        found |= {
            "step_over_ddp": seconds(whole) / seconds(ddp),
            "resume_exact": goes_on(engine, ranks, whole, folder / "again"),
        }
    return found


def goes_on(engine: str, ranks: int, whole: Path, again: Path) -> bool:
    """True if a run that resumes from step 7 ends like the whole run, bit for bit."""
    resumed(engine, ranks, whole, again)
    equal = selected(again) == selected(whole) and losses(again) == losses(whole)
    return equal and largest_difference(again, whole) == 0.0


IDS = ("ddp", "zero1", "zero2", "zero3", "fsdp")
"""Engines of `compare_ids`: the others are these with memory elsewhere."""


def compare_ids(seeds: int, ranks: int) -> None:
    """Compare the selected ids of each engine with those of one process, seed by seed."""
    done = {(row["engine"], row["seed"]) for row in rows.read("engine_ids")}
    for seed in range(seeds):
        left = [engine for engine in IDS if (engine, seed) not in done]
        with tempfile.TemporaryDirectory() as folder:
            alone = Path(folder) / "alone"
            if left:
                run("single", 1, alone, "--train.seed", str(seed), "--checkpoint.every", "0")
            for engine in left:
                out = Path(folder) / engine
                run(engine, ranks, out, "--train.seed", str(seed), "--checkpoint.every", "0")
                pairs = zip(selected(out), selected(alone), strict=True)
                equal = sum(ours == theirs for ours, theirs in pairs)
                found = {"benchmark": "engine_ids", "engine": engine, "seed": seed, "ranks": ranks, "steps": STEPS}
                rows.append("engine_ids", found | {"steps_equal": equal, "environment": rows.here()})
                print(engine, seed, f"{equal} of {STEPS} steps have the same ids", flush=True)


def ids_table() -> str:
    """Steps with the ids of one process, of all steps of all seeds."""
    lines = ["| engine | seeds | steps | with the ids of one process |", "|---|---:|---:|---:|"]
    for engine in IDS:
        of_engine = [row for row in rows.read("engine_ids") if row["engine"] == engine]
        steps, equal = (sum(row[key] for row in of_engine) for key in ("steps", "steps_equal"))
        lines.append(f"| `{engine}` | {len(of_engine)} | {steps} | {equal} |")
    return "\n".join(lines)


def engine_table() -> str:
    """One row per engine in float32; the last measurement of each."""
    last = {row["engine"]: row for row in rows.read("engines") if row["dtype"] == "float32"}
    whole = max(last["ddp"]["weight_bytes_by_rank"])
    lines = [
        "| engine | ranks | ids equal | largest weight difference | weights held per rank, MB | step / DDP | resumed |",
        "|---|---:|---|---:|---:|---:|---|",
    ]
    for engine, found in last.items():
        differs = found["first_step_that_differs"]
        held = max(found["weight_bytes_by_rank"])
        cells = [
            f"`{engine}`",
            str(found["ranks"]),
            "yes" if differs is None else f"until step {differs - 1}",
            f"{found['largest_weight_difference']:.1e}" if found["largest_weight_difference"] else "0",
            f"{held / 1e6:.2f} ({held / whole:.0%})",
            f"{found['step_over_ddp']:.2f}",
            "bit for bit" if found["resume_exact"] else "not equal",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def half_table() -> str:
    """The first step whose ids differ from those of one process, by engine and dtype."""
    last = {(row["engine"], row["dtype"]): row for row in rows.read("engines")}
    types = [dtype for dtype in ("bfloat16", "float16") if any(dtype == key[1] for key in last)]
    lines = [f"| engine | {' | '.join(types)} |", f"|---|{'---:|' * len(types)}"]
    for engine in dict.fromkeys(engine for engine, dtype in last if dtype in types):
        differs = [last[engine, dtype]["first_step_that_differs"] for dtype in types]
        lines.append(f"| `{engine}` | {' | '.join('none' if step is None else str(step) for step in differs)} |")
    return "\n".join(lines)


TABLES = {"engines": engine_table, "engine ids": ids_table, "half precision": half_table}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=", ".join(ENGINES))
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=0, help="compare ids alone, with seeds from 0 on")
    given = parser.parse_args()
    if given.seeds:
        compare_ids(given.seeds, given.processes)
        return
    for dtype in given.dtypes:
        with tempfile.TemporaryDirectory() as alone:
            run("single", 1, Path(alone) / "run", "--train.dtype", dtype)
            for engine in given.engines or ENGINES:
                with tempfile.TemporaryDirectory() as folder:
                    found = row(engine, given.processes, dtype, Path(folder), Path(alone) / "run")
                rows.append("engines", found)
                print({key: value for key, value in found.items() if key != "environment"}, flush=True)


if __name__ == "__main__":
    main()
