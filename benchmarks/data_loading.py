"""Start of several ranks of one host on the same data: seconds, and memory of all ranks together.

python benchmarks/data_loading.py --rows 1000000 --ranks 8

Ranks are processes connected by gloo, as in a run, and only read their inputs: no model is loaded. The first start
finds no tokens in the cache, the second one does. The rows are those of the built-in mixture, numbered, in a .jsonl
file; the tokenizer is the built-in base's. Results are appended to benchmarks/results/data_loading.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path

import psutil
import rows

BETWEEN_SECONDS = 0.5
"""Time between measurements of all ranks' memory."""


def write_data(path: Path, count: int) -> None:
    """Write ``count`` rows, all of them different."""
    from colm_scale.data.builtin import builtin_rows

    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(islice(cycle(builtin_rows("train")), count)):
            prompt = f"{number}. {row['instruction']}"
            file.write(json.dumps({"source": row["source"], "prompt": prompt, "completion": row["output"]}) + "\n")


def read_as_rank(data: str) -> None:
    """Read the inputs as one rank, and print the measurements of this process."""
    from colm_scale.config import DataConfig, RunConfig
    from colm_scale.distributed.connect import connect
    from colm_scale.run.inputs import read_inputs
    from colm_scale.run.prepare import resolve

    config = resolve(RunConfig(data=DataConfig(train=[data])))
    group = connect()
    group.barrier()
    process = psutil.Process()
    before, computed, started = process.memory_full_info(), time.process_time(), time.perf_counter()
    inputs = read_inputs(config, group)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - computed
    group.barrier()
    after = process.memory_full_info()
    found = {
        "rank": group.rank,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "private_bytes": after.uss - before.uss,
        "proportional_bytes": after.pss - before.pss,
        "peak_resident_bytes": _peak_resident(),
        "examples": int(inputs.sizes.sum()),
        "digest": inputs.digest,
        "rows_digest": inputs.rows_digest,
    }
    print(json.dumps(found), flush=True)
    group.barrier()
    group.close()


def _peak_resident() -> int:
    """Largest resident memory so far, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def start(data: Path, ranks: int, cache: Path) -> dict:
    """Start all ranks once, and return their measurements together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)},
        **{"LOCAL_WORLD_SIZE": str(ranks), "COLM_SCALE_CACHE": str(cache), "CUDA_VISIBLE_DEVICES": ""},
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--as-rank", str(data)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    together = _Together([psutil.Process(process.pid) for process in processes])
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    assert len({(one["digest"], one["rows_digest"], one["examples"]) for one in found}) == 1
    return {
        "seconds": max(one["seconds"] for one in found),
        "cpu_seconds": sum(one["cpu_seconds"] for one in found),
        "private_bytes": [one["private_bytes"] for one in found],
        "all_ranks_bytes": sum(one["proportional_bytes"] for one in found),
        "all_ranks_peak_bytes": together.stop(),
        "peak_resident_bytes": [one["peak_resident_bytes"] for one in found],
        "examples": found[0]["examples"],
        "digest": found[0]["digest"],
    }


class _Together:
    """Measures the most memory that processes ever had together; shared pages count once."""

    def __init__(self, processes: list[psutil.Process]):
        self._processes, self._peak, self._stop = processes, 0, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(BETWEEN_SECONDS):
            with suppress(psutil.Error):
                self._peak = max(self._peak, sum(one.memory_full_info().pss for one in self._processes))

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self._peak


def measure(count: int, ranks: int, starts: int, name: str) -> None:
    """Measure some starts on the same data, and append a row for each."""
    with tempfile.TemporaryDirectory() as folder:
        data, cache = Path(folder, "data.jsonl"), Path(folder, "cache")
        write_data(data, count)
        for number in range(1, starts + 1):
            row = {"benchmark": "data_loading", "way": name, "rows": count, "ranks": ranks, "start": number}
            row |= start(data, ranks, cache) | {"data_bytes": data.stat().st_size}
            print(row, flush=True)
            rows.append("data_loading", row | {"environment": rows.here()})


def table() -> str:
    """Time of each start, and memory beyond what a rank has before it reads."""
    lines = [
        "| tokenised by | rows | ranks | start | seconds | CPU seconds | all ranks | rank 0 | peak of a rank |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    last = {tuple(row[name] for name in ("rows", "way", "ranks", "start")): row for row in rows.read("data_loading")}
    for key in sorted(last):
        row = last[key]
        start = "any" if row["way"] == "every rank" else "first" if row["start"] == 1 else "from the cache"
        sizes = row["all_ranks_bytes"], row["private_bytes"][0], max(row["peak_resident_bytes"])
        cells = [f"{row['rows']:,}", f"{row['ranks']}", start, f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}"]
        cells += [f"{size / 2**20:,.0f} MiB" for size in sizes]
        lines.append(f"| {' | '.join([row['way'].replace('once per', 'one per'), *cells])} |")
    return "\n".join(lines)


TABLES = {"data loading": table}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--name", default="once per host", help="how the package loads data, a column of the table")
    parser.add_argument("--as-rank", metavar="FILE", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.as_rank:
        read_as_rank(given.as_rank)
    else:
        measure(given.rows, given.ranks, given.starts, given.name)


if __name__ == "__main__":
    main()
