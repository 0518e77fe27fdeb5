"""Memory and bytes of a start, from the model's files to the ranks that hold it, by engine and number of ranks.

python benchmarks/loading.py [--engines fsdp ...] [--ranks 1 2 4] [--dtype float16] [--label NAME]

Writes a random model of 1 GB, in several files, to the temporary folder, and starts runs of it on the CPU up to their
first step. With another type than the files' bfloat16, weights are converted while they load. Rows are appended to
benchmarks/results/loading.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import rows

ENGINES = {
    "single": (),
    "ddp": (),
    "fsdp": ("--engine", "fsdp"),
    "zero3": ("--ds_config", str(rows.ROOT / "ds_configs" / "zero3.json")),
}
QUIET = ("--train.threads", "1", "--profile.display", "off", "--lora.rank", "16")
PERIOD = 0.004
"""Seconds between two samples of a rank's memory."""
KINDS = {"private": "RssAnon", "mapped": "RssFile"}
"""Resident bytes of a rank: its own, and pages of files, which the ranks of a host share."""
PHASES = ("model", "trials", "engine")


def write_model(folder: Path) -> int:
    """Write a random Llama of half a billion parameters in bfloat16; return its bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from colm_scale.base import BASE_MODEL

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=14,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=512,
        torch_dtype="bfloat16",
    )
    with torch.random.fork_rng():
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200MB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BASE_MODEL / name, folder)
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def measure(folder: Path, engine: str, ranks: int, dtype: str) -> list[dict[str, object]]:
    """Start the ranks, sample their memory, and return each rank's peaks in bytes by phase, seconds and bytes read."""
    for file in folder.glob("*.safetensors"):  # so that what is read comes from the disk
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as out:
        started = [
            subprocess.Popen(
                [sys.executable, __file__, "rank", str(folder), engine, out, dtype],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(ranks)
        ]
        samples: list[list[tuple[float, dict[str, int]]]] = [[] for _ in started]
        while any(process.poll() is None for process in started):
            for process, own in zip(started, samples):
                if found := _memory(process.pid):
                    own.append((time.time(), found))
            time.sleep(PERIOD)
        if any(process.returncode for process in started):
            raise SystemExit(f"{engine} on {ranks} ranks failed")
        told = [json.loads((Path(out) / f"{rank}.json").read_text()) for rank in range(ranks)]
    return [of_rank(rank, own) for rank, own in zip(told, samples)]


def _memory(pid: int) -> dict[str, int]:
    """Resident bytes of a process by kind; none if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    found = dict(line.split(":", 1) for line in lines)
    return {kind: int(found[name].split()[0]) * 1024 for kind, name in KINDS.items() if name in found}


def of_rank(told: dict, samples: list[tuple[float, dict[str, int]]]) -> dict[str, object]:
    """A rank's peaks by phase over what it held before the model was loaded, with what it says itself."""
    marks = told.pop("marks")
    loads = max(at for part, at in marks if part == "data")
    before = [found for at, found in samples if at < loads][-1]
    peaks = {phase: dict.fromkeys(KINDS, 0) for phase in PHASES}
    for (_, first), (phase, last) in pairwise(marks):
        for found in (found for at, found in samples if phase in PHASES and first <= at <= last):
            peaks[phase] = {kind: max(peaks[phase][kind], found[kind] - before[kind]) for kind in KINDS}
    after = [found for at, found in samples if at <= marks[-1][1]][-1]
    return {"peaks": peaks, "held": {kind: after[kind] - before[kind] for kind in KINDS}, **told}


def start(folder: str, engine: str, out: str, dtype: str) -> None:
    """Start a run on this rank up to its first step, and write what it did."""
    import psutil
    import torch
    import transformers

    from colm_scale.config import command_line as arguments
    from colm_scale.distributed.connect import connect
    from colm_scale.run import prepare as preparation

    marks: list[tuple[str, float]] = []

    class Clock(preparation.StartClock):
        def __call__(self, part: str) -> None:
            super().__call__(part)
            marks.append((part, time.time()))

    preparation.StartClock = Clock
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    given = ["--model.name", folder, *ENGINES[engine], *QUIET, "--train.dtype", dtype, "--output_dir", f"{out}/run"]
    config, group = preparation.resolve(arguments.parse(given)), connect()
    before = psutil.Process().io_counters()
    ready = preparation.prepare(config, group, SimpleNamespace(enter=lambda _: None))
    after = psutil.Process().io_counters()
    found = {"marks": marks, "seconds": ready.clock.seconds}
    found |= {"read_bytes": after.read_bytes - before.read_bytes, "rchar": after.read_chars - before.read_chars}
    (Path(out) / f"{group.rank}.json").write_text(json.dumps(found))
    time.sleep(0.1)  # for the last samples
    group.barrier()
    os._exit(0)


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == ["rank"]:
        start(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--ranks", nargs="+", default=[1, 2, 4], type=int)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--label", default="part by part", help="name of the way of loading in the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        size = write_model(Path(place))
        for engine in options.engines:
            for ranks in options.ranks:
                if (engine == "single") != (ranks == 1) and engine in ("single", "ddp"):
                    continue
                found = measure(Path(place), engine, ranks, options.dtype)
                row = {"benchmark": "loading", "label": options.label, "engine": engine, "ranks": ranks}
                row |= {"dtype": options.dtype, "model_bytes": size, "of_ranks": found}
                rows.append("loading", row | {"environment": rows.here()})
                print(*cells(row), sep=" | ", flush=True)


def cells(row: dict) -> list[str]:
    """Engine, ranks, peaks of the worst rank over the model, seconds, and bytes from the disk over the model."""
    size, ranks = row["model_bytes"], row["of_ranks"]

    def worst(kind: str, phases: tuple[str, ...]) -> str:
        return f"{max(rank['peaks'][phase][kind] for rank in ranks for phase in phases) / size:.2f}"

    held = max(rank["held"]["private"] for rank in ranks) / size
    seconds = max(sum(rank["seconds"][phase] for phase in PHASES) for rank in ranks)
    read = sum(rank["read_bytes"] for rank in ranks) / size
    peaks = [worst("private", (phase,)) for phase in PHASES]
    found = [*peaks, f"{held:.2f}", worst("mapped", PHASES), f"{seconds:.1f}", f"{read:.2f}"]
    return [row["label"], row["dtype"], row["engine"], str(row["ranks"]), *found]


def table() -> str:
    """One row per way of loading, engine and number of ranks; the last measurement of each."""
    last = {(row["engine"], row["dtype"], row["ranks"], row["label"]): row for row in rows.read("loading")}
    lines = [
        "| loading | type | engine | ranks | private: model | trials | engine | held | mapped | seconds | read |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    order = {name: number for number, name in enumerate(ENGINES)}
    for _, row in sorted(last.items(), key=lambda item: (order[item[0][0]], *item[0][1:])):
        lines.append(f"| {' | '.join(cells(row))} |")
    return "\n".join(lines)


TABLES = {"loading": table}

if __name__ == "__main__":
    main()
