"""How often the host waits for the device in a step, by method and phase, on the strict device of the tests.

python benchmarks/host_reads.py            run every method (a few minutes), append a row for each and print the table

The device computes on the CPU (tests/support/strict_device.py), so this needs no GPU. A read is a number or a size that
the host asks for, or a copy that blocks; the wait that ends a step, to measure it, is not counted.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

import rows

NAME = "host_reads"
PHASES = ("sketch", "gather", "select", "broadcast", "learn", "route", "train", "report", "optimizer")


def counts(reads: list[list[str]]) -> dict[str, int]:
    """Reads of a step by phase; what ends the step, over ranks, counts to the optimizer."""
    found = Counter(phase.replace("end", "optimizer") for phase, kind, _, _ in reads if kind != "synchronize")
    return {phase: found[phase] for phase in PHASES if found[phase]}


def table() -> str:
    """The first and the last row of each method."""
    first: dict[str, dict] = {}
    last: dict[str, dict] = {}
    for row in rows.read(NAME):
        first.setdefault(row["method"], row)
        last[row["method"]] = row
    lines = [f"| method | {' | '.join(PHASES)} | a step |", f"|---|{'---:|' * (len(PHASES) + 1)}"]
    for method, row in last.items():
        before, now = (one["reads"] for one in (first[method], row))
        cells = [_change(before.get(phase, 0), now.get(phase, 0)) for phase in PHASES]
        lines.append(f"| {method} | {' | '.join(cells)} | {_change(sum(before.values()), sum(now.values()))} |")
    return "\n".join(lines)


def _change(before: int, now: int) -> str:
    return f"{before} → {now}" if before != now else str(now)


TABLES = {"host reads": table}


def main() -> None:
    """Run the command line."""
    sys.path[:0] = [str(rows.ROOT), str(rows.ROOT / "tests")]
    from support import strict_runs

    with tempfile.TemporaryDirectory() as folder:
        results = strict_runs.launch([*strict_runs.CASES, *strict_runs.ENGINES], Path(folder))
    for method, result in results.items():
        found = {"benchmark": NAME, "method": method, "reads": counts(result["reads"])}
        rows.append(NAME, found | {"environment": rows.here()})
    print(table())


if __name__ == "__main__":
    main()
