"""The cores that a rank may use: those that it is bound to, within the quota of its control group."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CONTROL = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def own_cores() -> set[int]:
    """Return the numbers of the cores that this process is bound to."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def usable_cores() -> int:
    """Count the cores that this process may use, at least one."""
    return own_share(1, 1)


def own_share(sharers: int, ranks: int) -> int:
    """Count the cores for a rank to use, at least one.

    Its cores are divided by the ranks that may run on some of them too: ranks that are bound to cores of their own keep
    these. The quota is divided by all ranks of the host, because a quota says nothing about who shares it.

    Args:
        sharers: Number of ranks, this one too, that are bound to some of its cores.
        ranks: Number of ranks on this host.
    """
    return max(1, int(min(len(own_cores()) / sharers, quota() / ranks)))


def quota() -> float:
    """Return the limit, in cores, of this process's control group and those above it, in both versions of cgroups.

    In a container the process's path may be that outside; the file at the top is the container's then.
    """
    limits = [math.inf]
    for line in _words(_MEMBERSHIP):
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            root = _CONTROL / controllers
            group = root / path.lstrip("/")
            limits += [_limit(folder) for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return min(limits)


def _limit(group: Path) -> float:
    """Return the limit of one group: version 2 has one file, version 1 two."""
    match _words(group / "cpu.max") or _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us"):
        case [limit, period] if limit not in ("max", "-1"):
            return int(limit) / int(period)
    return math.inf


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
