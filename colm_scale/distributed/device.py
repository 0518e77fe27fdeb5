"""The device of a rank."""

from __future__ import annotations

import os

import torch

from colm_scale.errors import UserError


def take_device(local_rank: int) -> torch.device:
    """Choose this rank's device and make it torch's current one: the GPU of its number on the host, or the only one
    that it sees, as with Slurm's ``--gpus-per-task=1``; without GPUs the CPU.

    DeepSpeed, torch's device meshes and accelerate take LOCAL_RANK for the number of the GPU, so it becomes that.

    Raises:
        UserError: Several GPUs are visible, but fewer than this host has ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise UserError(
            f"local rank {local_rank} has no GPU, {count} are visible: start fewer processes, or unset "
            f"CUDA_VISIBLE_DEVICES"
        )
    os.environ["LOCAL_RANK"] = str(index)
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def identity(device: torch.device) -> str:
    """Name the hardware behind a device: the UUID of the GPU or, under MIG, of the slice; empty for a CPU."""
    if device.type != "cuda":
        return ""
    visible = visible_as(device)
    return visible if visible.startswith("MIG-") else f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def visible_as(device: torch.device) -> str:
    """Return the device's entry in CUDA_VISIBLE_DEVICES; empty if there is none."""
    entries = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    index = device.index or 0
    return entries[index].strip() if index < len(entries) else ""
