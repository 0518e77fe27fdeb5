"""Rows in benchmarks/results, one JSON object per line, and their environment."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def append(name: str, row: dict[str, object]) -> None:
    """Append a row to ``results/NAME.jsonl``."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(name: str) -> list[dict]:
    """The rows of ``results/NAME.jsonl``, in the order of measurement; none if nothing was measured yet."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split the arguments into a benchmark's own and, after ``--``, the product's."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def here() -> dict[str, object]:
    """Versions, devices and commit of this process."""
    import torch

    from colm_scale.reporting.environment import environment

    facts = environment(torch.device("cpu"), 1, "none")
    del facts["command"]  # it may contain paths of the machine
    return facts
