"""The cores of a rank: what it is bound to, and quotas in files as the kernel writes them."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from colm_scale.distributed import cores
from colm_scale.distributed.cores import own_share, quota, usable_cores


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 64 cores and no quota, and a function that writes its files."""

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n", "utf-8")

    monkeypatch.setattr(cores, "_CONTROL", tmp_path / "control")
    monkeypatch.setattr(cores, "_MEMBERSHIP", tmp_path / "membership")
    bind(monkeypatch, range(64))
    return write


def bind(monkeypatch, numbers) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(numbers), raising=False)


QUOTAS = {
    "none": ({}, math.inf),
    "version 2": ({"membership": "0::/job/step", "control/job/step/cpu.max": "400000 100000"}, 4),
    "version 2, no limit": ({"membership": "0::/", "control/cpu.max": "max 100000"}, math.inf),
    "version 2, the group above is tighter": (
        {
            "membership": "0::/job/step",
            "control/job/step/cpu.max": "max 100000",
            "control/job/cpu.max": "250000 100000",
        },
        2.5,
    ),
    "version 2, a path from outside the container": (
        {"membership": "0::/kubepods/pod7", "control/cpu.max": "300000 100000"},
        3,
    ),
    "version 1": (
        {
            "membership": "5:memory:/x\n4:cpu,cpuacct:/docker/a",
            "control/cpu,cpuacct/docker/a/cpu.cfs_quota_us": "150000",
            "control/cpu,cpuacct/docker/a/cpu.cfs_period_us": "50000",
        },
        3,
    ),
    "version 1, no limit": (
        {
            "membership": "1:cpu:/\n0::/",
            "control/cpu/cpu.cfs_quota_us": "-1",
            "control/cpu/cpu.cfs_period_us": "100000",
        },
        math.inf,
    ),
}


@pytest.mark.parametrize(("files", "limit"), QUOTAS.values(), ids=QUOTAS)
def test_the_quota_of_a_control_group(files, limit, machine):
    machine(files)
    assert quota() == limit
    assert usable_cores() == min(64, max(1, math.floor(limit) if limit < math.inf else 64))


@pytest.mark.parametrize(
    ("bound", "sharers", "ranks", "limit", "share"),
    [
        (range(64), 8, 8, "max", 8),  # all may run everywhere
        (range(8, 16), 1, 8, "max", 8),  # each is bound to its own eighth
        (range(8, 24), 2, 8, "max", 8),  # bound in pairs
        (range(64), 8, 8, "3200000", 4),  # half of the machine for the container
        (range(8, 16), 1, 8, "3200000", 4),
        (range(2), 8, 8, "max", 1),
        (range(64), 8, 8, "50000", 1),
    ],
)
def test_a_rank_keeps_its_own_cores_and_shares_the_others(bound, sharers, ranks, limit, share, machine, monkeypatch):
    machine({"membership": "0::/", "control/cpu.max": f"{limit} 100000"})
    bind(monkeypatch, bound)
    assert own_share(sharers, ranks) == share


def test_this_process_has_a_core():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert Path("/proc/self/cgroup").exists() or quota() == math.inf
