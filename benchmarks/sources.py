"""Sources without labels: agreement of clusters with known sources, and memory and time for a million rows.

python benchmarks/sources.py agreement --data NAME=FILE ... [--model M] [--adapter NAME=FOLDER ...] [--rows 20000]
python benchmarks/sources.py memory --rows 50000 200000 1000000

`agreement`: the product clusters data without its source labels, and is compared with k-means on TF-IDF, with the
number of sources and with the number of clusters that it chooses itself. `memory`: peak resident memory and seconds of
the command on generated rows. Rows are appended to benchmarks/results/sources.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

import rows

COMMAND = "from colm_scale.cli.main import main; main()"


def agreement(name: str, path: Path, most: int, arm: str, options: list[str]) -> None:
    """Cluster at most ``most`` rows of a file with one arm: as many clusters as sources, then the stable number."""
    with path.open(encoding="utf-8", newline="\n") as file:
        lines = list(file)
    lines = Random(0).sample(lines, min(most, len(lines)))
    known = len({json.loads(line)["source"] for line in lines})
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(lines), encoding="utf-8")
        for chosen, clusters in ((False, ["--clusters", str(known)]), (True, [])):
            out = Path(folder) / f"chosen-{chosen}"
            found = command([str(data), *options, *clusters, "--nearest", "0", "--output_dir", str(out)])
            report = json.loads((out / "report.json").read_text(encoding="utf-8"))
            row = {"benchmark": "agreement", "data": name, "rows": len(lines), "sources": known, "arm": arm}
            row |= {"chosen": chosen, "clusters": len(report["clusters"]), "stability": report["stability"]}
            row |= {what: report[what] for what in ("agreement", "baseline", "cut", "seconds")}
            rows.append("sources", row | {"peak_bytes": found["peak_bytes"], "environment": rows.here()})
            print(name, arm, row["clusters"], report["agreement"], report["baseline"], flush=True)


def memory(count: int, embedding: str) -> None:
    """Run the whole command on ``count`` generated rows."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        generate(data, count)
        options = [str(data), "--output_dir", str(Path(folder) / "out"), "--embedding", embedding]
        found = command([*options, "--clusters", "4", "8", "16"])
        row = {"benchmark": "memory", "rows": count, "embedding": embedding, "file_bytes": data.stat().st_size}
        rows.append("sources", row | found | {"environment": rows.here()})
    print(count, embedding, found, flush=True)


def generate(path: Path, count: int) -> None:
    """Rows of about 40 words from one of 12 overlapping vocabularies, the first 3 times as frequent as the last."""
    draw = Random(0)
    vocabularies = [[f"w{number}" for number in draw.sample(range(5000), 600)] for _ in range(12)]
    weights = [12 / (4 + number) for number in range(12)]
    with path.open("w", encoding="utf-8") as file:
        for kind in draw.choices(range(12), weights, k=count):
            words = draw.choices(vocabularies[kind], k=40)
            row = {"prompt": " ".join(words[:30]), "completion": " ".join(words[30:])}
            file.write(json.dumps(row) + "\n")


def command(options: list[str]) -> dict[str, float]:
    """Run ``colm-scale sources`` in a separate process; returns its memory and time."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "sources", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"colm-scale sources {' '.join(options)} has failed")
    return {"seconds": time.perf_counter() - started, "peak_bytes": usage.ru_maxrss * 1024}


def agreement_table() -> str:
    """The last rows of each arm and data set."""
    lines = [
        "| data | rows | sources | embedding | clusters | adjusted Rand index | k-means on TF-IDF | "
        "small sources recovered | on TF-IDF | share of all rows kept | on TF-IDF |",
        f"|---|---:|---:|---|---:|{'---:|' * 6}",
    ]
    for (data, arm, chosen), row in last("agreement", "data", "arm", "chosen").items():
        ours, theirs = row["agreement"], row["baseline"]
        cells = [data, f"{row['rows']:,}", row["sources"], f"`{arm}`"]
        cells.append(f"{row['clusters']} ({'chosen' if chosen else 'given'})")
        cells += [f"{found['adjusted_rand']:.2f}" for found in (ours, theirs)]
        cells += [f"{sum(found['recovered'].values()) / len(found['recovered']):.0%}" for found in (ours, theirs)]
        cells += [f"{found['kept_share']:.0%}" for found in (ours, theirs)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def memory_table() -> str:
    """Memory and time by number of rows."""
    lines = ["| rows | embedding | file | peak | seconds |", "|---:|---|---:|---:|---:|"]
    for row in last("memory", "rows", "embedding").values():
        size, peak = row["file_bytes"] / 2**20, row["peak_bytes"] / 2**20
        lines.append(
            f"| {row['rows']:,} | `{row['embedding']}` | {size:,.0f} MiB | {peak:,.0f} MiB | {row['seconds']:,.0f} |"
        )
    return "\n".join(lines)


def last(benchmark: str, *keys: str) -> dict[tuple, dict]:
    """The last row of each case."""
    return {tuple(row[key] for key in keys): row for row in rows.read("sources") if row["benchmark"] == benchmark}


TABLES = {"sources agreement": agreement_table, "sources memory": memory_table}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("agreement", "memory"))
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=FILE")
    parser.add_argument("--model", help="a model instead of the built-in base")
    parser.add_argument("--adapter", nargs="+", default=[], metavar="NAME=FOLDER", help="adapter for the named data")
    parser.add_argument("--arms", nargs="+", choices=("states", "words"), default=["states", "words"])
    parser.add_argument("--rows", nargs="+", type=int, default=[20_000])
    given = parser.parse_args()
    if given.what == "memory":
        for count in given.rows:
            for arm in given.arms:
                memory(count, arm)
        return
    adapters = dict(pair.split("=", 1) for pair in given.adapter)
    for name, path in (pair.split("=", 1) for pair in given.data):
        for arm in given.arms:
            options = ["--embedding", arm]
            if arm == "states":
                options += ["--data.max_length", "256", *(["--model.name", given.model] if given.model else [])]
            agreement(name, Path(path), given.rows[0], arm if not given.model else f"{arm} of {given.model}", options)
            if arm == "states" and name in adapters:
                options += ["--adapter", adapters[name]]
                agreement(name, Path(path), given.rows[0], f"{arm}, after a warm-up", options)


if __name__ == "__main__":
    main()
