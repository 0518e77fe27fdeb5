"""The rows in benchmarks/results, one JSON object a line, and what each says about where it was measured."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def append(name: str, row: dict[str, object]) -> None:
    """Add a row to ``results/NAME.jsonl``."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(name: str) -> list[dict]:
    """The rows of ``results/NAME.jsonl``, as they were measured."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """A benchmark's own arguments, and those after ``--``, which go to the product."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def here() -> dict[str, object]:
    """Versions, device and commit of what is measured in this process."""
    import torch

    from colm_scale.reporting.environment import environment

    facts = environment(torch.device("cpu"), 1, "none")
    del facts["command"]  # it may name the machine's folders
    return facts
