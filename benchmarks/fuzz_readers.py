"""Malformed data files: each must be rejected in one clear line that names it, or be read into well-formed rows.

python benchmarks/fuzz_readers.py --files 10000 --seed 0

Appends the counts by format and outcome to benchmarks/results/fuzz.jsonl. Prints every other outcome (an unexpected
exception, an unclear message, a hang, the end of the process), and then exits with 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings

import rows

ROOT = rows.ROOT


def measured(seed: int, files: int) -> dict[str, object]:
    """A row with the outcomes of all files."""
    from support.fuzz import MEMORY_BYTES, SECONDS, fuzz, tally

    started, verdicts = time.monotonic(), []
    for verdict in fuzz(seed, range(files)):
        verdicts.append(verdict)
        if verdict.outcome == "failure":
            print(f"file {verdict.number} ({verdict.suffix}, {verdict.mutation}): {verdict.said!r}", flush=True)
    return {
        "benchmark": "fuzz_readers",
        "seed": seed,
        "files": files,
        "tally": tally(verdicts),
        "failures": [f"{verdict.number} {verdict.said}" for verdict in verdicts if verdict.outcome == "failure"],
        "mutations": len({verdict.mutation for verdict in verdicts}),
        "seconds": time.monotonic() - started,
        "seconds_allowed_per_file": SECONDS,
        "bytes_allowed": MEMORY_BYTES,
        "peak_bytes": max(verdict.peak_bytes for verdict in verdicts),
        "environment": rows.here(),
    }


def table() -> str:
    """Outcomes of the files of the last run, by format."""
    row = rows.read("fuzz")[-1]
    lines = ["| format | files | one clear line | read | anything else |", "|---|---:|---:|---:|---:|"]
    for suffix, found in row["tally"].items():
        counts = f"{found['error']:,} | {found['read']:,} | {found['failure']:,}"
        lines.append(f"| `{suffix}` | {sum(found.values()):,} | {counts} |")
    return "\n".join(lines)


TABLES = {"fuzz": table}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    result = measured(given.seed, given.files)
    rows.append("fuzz", result)
    for suffix, outcomes in result["tally"].items():
        print(suffix.ljust(10), *(f"{outcome} {count:6d}" for outcome, count in outcomes.items()))
    sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
    warnings.simplefilter("ignore")  # openpyxl warns about skipped parts of a damaged workbook
    main()
