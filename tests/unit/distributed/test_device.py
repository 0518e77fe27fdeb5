"""The GPU of a rank, on hosts that show each process all GPUs, or one, with stand-ins for CUDA."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from colm_scale.distributed.device import identity, take_device
from colm_scale.errors import UserError


@pytest.fixture
def host(monkeypatch):
    """A host with GPUs 0 to 3, of which a process sees those in CUDA_VISIBLE_DEVICES."""
    found = SimpleNamespace(current=None)

    def visible() -> list[str]:
        return os.environ["CUDA_VISIBLE_DEVICES"].split(",")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible()))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(found, "current", device.index))
    properties = lambda device: SimpleNamespace(uuid=f"uuid-{visible()[device.index]}")  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setenv("LOCAL_RANK", "")
    return found


@pytest.mark.parametrize(
    ("visible", "local_rank", "index", "gpu"),
    [("0,1,2,3", 3, 3, "GPU-uuid-3"), ("3", 3, 0, "GPU-uuid-3"), ("2", 0, 0, "GPU-uuid-2"), ("MIG-a", 1, 0, "MIG-a")],
)
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_it_sees(visible, local_rank, index, gpu, host, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    device = take_device(local_rank)
    assert (device.index, host.current) == (index, index)
    assert os.environ["LOCAL_RANK"] == str(index)  # which DeepSpeed and device meshes take for the GPU's number
    assert identity(device) == gpu


def test_more_ranks_than_gpus_are_refused(host, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match="local rank 2 has no GPU, 2 are visible"):
        take_device(2)


def test_a_cpu_belongs_to_all_ranks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert identity(take_device(5)) == ""
