"""All checks, in the order of the report."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from colm_scale.config.commands import DoctorConfig
from colm_scale.doctor import machine
from colm_scale.doctor.finding import Finding, guarded
from colm_scale.doctor.network import check_hostfile, check_ranks
from colm_scale.doctor.packages import check_packages


def examine(options: DoctorConfig) -> list[Finding]:
    """Run the connection check on every rank, and all other checks on the first."""
    seconds = options.timeout
    found = check_ranks(options.ranks, seconds)
    if os.environ.get("RANK", "0") != "0":
        return found
    checks: dict[str, Callable[[], list[Finding]]] = {
        "versions": check_packages,
        "devices": machine.check_devices,
        "NVML": machine.check_nvml,
        "allocator": machine.check_allocator,
        "compiler": machine.check_compiler,
        "attention": machine.check_attention,
        "disk": partial(machine.check_disk, options.output_dir),
        "shared memory": machine.check_shared_memory,
        "caches": machine.check_caches,
    }
    if options.hostfile:
        checks["hostfile"] = partial(check_hostfile, options.hostfile, seconds)
    return [*(finding for about, check in checks.items() for finding in guarded(about, check, 10 * seconds)), *found]
