"""Hardware and versions behind a run's numbers, without anything that identifies the machine or its user."""

from __future__ import annotations

import platform
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import psutil
import pynvml
import torch

from colm_scale.distributed.cores import usable_cores
from colm_scale.profiling.memory import cpu_name

_PACKAGES = ("colm_scale", "torch", "transformers", "peft", "deepspeed", "numpy")


def environment(device: torch.device, world_size: int, engine: str, **extra: object) -> dict[str, object]:
    """The content of ``environment.json``, plus ``extra``; no host name and no environment variables."""
    return {
        "versions": _versions(),
        "devices": _devices(device),
        "world_size": world_size,
        "engine": engine,
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "host_memory_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(),
        "commit": _commit(Path(__file__)),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        **extra,
    }


def _versions() -> dict[str, str | None]:
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "driver": driver_version(),
    }


def _version(package: str) -> str | None:
    """Version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """Version of the NVIDIA driver; None without one."""
    try:
        pynvml.nvmlInit()
        version: str = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None
    return version


def _devices(device: torch.device) -> list[dict[str, object]]:
    """Devices of this machine that the ranks compute on."""
    if device.type != "cuda":
        return [{"name": cpu_name(), "memory_bytes": psutil.virtual_memory().total}]
    visible = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [{"name": properties.name, "memory_bytes": properties.total_memory} for properties in visible]


def _commit(file: Path) -> dict[str, object] | None:
    """Commit of ``file`` and whether the checkout has changes; None if the file is not tracked by git.

    A package that is installed in a folder of the user's own repository is not tracked there.
    """
    with suppress(OSError, subprocess.SubprocessError):
        _git(file, "ls-files", "--error-unmatch", file.name)
        changes = _git(file, "status", "--porcelain", "--untracked-files=no")
        return {"id": _git(file, "rev-parse", "HEAD"), "dirty": bool(changes)}
    return None


def _git(file: Path, *arguments: str) -> str:
    command = ["git", "-C", str(file.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
