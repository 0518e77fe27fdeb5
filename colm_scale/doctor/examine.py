"""All checks, and how they are shown."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from colm_scale.config.commands import DoctorConfig
from colm_scale.doctor import machine
from colm_scale.doctor.finding import Finding, guarded
from colm_scale.doctor.hosts import check_hostfile
from colm_scale.doctor.ranks import check_ranks
from colm_scale.doctor.versions import check_versions

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}
_WIDTH = 140


def examine(options: DoctorConfig) -> list[Finding]:
    """What every check finds. Of several ranks all take part, and the first finds all but its own way to the others."""
    seconds = options.timeout
    found = check_ranks(options.ranks, seconds)
    if os.environ.get("RANK", "0") != "0":
        return found
    checks: dict[str, Callable[[], list[Finding]]] = {
        "versions": check_versions,
        "devices": machine.check_devices,
        "NVML": machine.check_nvml,
        "compiler": machine.check_compiler,
        "attention": machine.check_attention,
        "disk": lambda: machine.check_disk(options.output_dir),
        "shared memory": machine.check_shared_memory,
        "caches": machine.check_caches,
    }
    if options.hostfile is not None:
        checks["hostfile"] = partial(check_hostfile, options.hostfile, seconds)
    return [*(finding for about, check in checks.items() for finding in guarded(about, check, 10 * seconds)), *found]


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if there is a problem."""
    return int(any(finding.status == "problem" for finding in findings))


def as_json(findings: Sequence[Finding]) -> str:
    """A list of objects with the fields of `Finding`."""
    return json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2)


def show(findings: Sequence[Finding], console: Console | None = None) -> None:
    """A row for each, and what to do where something is wrong."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=_WIDTH, color_system=None)
    table = Table(box=box.SIMPLE, show_edge=False)
    for heading in ("about", "", "found"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        advice = [f"-> {finding.way_out}"] if finding.way_out else []
        lines = "\n".join([finding.what, *advice, *([finding.link] if finding.link else [])])
        table.add_row(Text(finding.about), Text(finding.status, style=_COLOURS[finding.status]), Text(lines))
    console.print(table)
    counts = Counter(finding.status for finding in findings)
    console.print(f"{counts['problem']} problem(s), {counts['warning']} warning(s)", highlight=False)
