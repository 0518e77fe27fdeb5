"""Free memory, whether a model fits into it, and what is collected from the parts of all ranks."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn

from colm_scale.distributed.group import Group
from colm_scale.engines import tensors
from colm_scale.engines.base import Part
from colm_scale.engines.tensors import all_have_room, collect, free_bytes


def group_on(device: str, local_world_size: int = 1) -> Group:
    return Group(0, 1, 0, local_world_size, torch.device(device))


def test_ranks_of_a_host_share_its_free_memory(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert free_bytes(group_on("cpu", local_world_size=4)) == 250


def test_what_the_allocator_keeps_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 500)
    assert free_bytes(group_on("cuda")) == 1200


@pytest.mark.parametrize(("free", "room"), [(2 * 4 * 90, True), (2 * 4 * 90 - 1, False)])
def test_missing_weights_may_take_half_of_what_is_free(monkeypatch, free, room):
    weight = nn.Parameter(torch.empty(0))
    weight.ds_tensor, weight.ds_numel = torch.zeros(10), 100
    module = nn.Module()
    module.weight = weight
    monkeypatch.setattr(tensors, "free_bytes", lambda _: free)
    assert all_have_room(module, group_on("cpu")) is room


WHOLE = {"a": torch.tensor([[1.0, -0.0], [torch.nan, 1e-45], [3.0, -4.0]]), "b": torch.tensor([7.0])}


class Cut:
    """An engine whose ranks have parts: an uneven cut of "a", and all of "b" on the first."""

    is_sharded, state_keys = True, ("average",)

    def __init__(self, rank: int):
        self.module = nn.Module()
        for name, whole in WHOLE.items():
            self.module.register_parameter(name, nn.Parameter(whole.clone()))
        self._cuts = {"a": slice(0, 5) if rank == 0 else slice(5, 6), "b": slice(0, 1) if rank == 0 else slice(1, 1)}

    def part(self, name: str, key: str) -> Part:
        values = WHOLE[name].flatten() * (1 if key == "weight" else 2)
        return Part(WHOLE[name].shape, self._cuts[name].start, values[self._cuts[name]])


class OfTwo(Group):
    """One of two ranks; the first adds up what the second, which comes before it, has sent."""

    def reduce(self, tensor, label):
        if self.rank:
            SENT.append(tensor.clone())
        return tensor + SENT.pop(0) if self.is_first else tensor


SENT: list[torch.Tensor] = []


@pytest.mark.parametrize("bucket", [1, 6, 7, 100])
def test_parts_of_all_ranks_are_collected_bit_by_bit(bucket, monkeypatch):
    monkeypatch.setattr(tensors, "_BUCKET", bucket)
    second, first = (collect(Cut(rank), OfTwo(rank, 2, rank, 2, torch.device("cpu"))) for rank in (1, 0))
    assert second == {"adapter": {}, "optimizer": {}}
    assert not SENT
    assert first["optimizer"].keys() == {"average/a", "average/b"}
    for name, whole in WHOLE.items():
        assert torch.equal(first["adapter"][name].view(torch.int32), whole.view(torch.int32))
        assert torch.equal(first["optimizer"][f"average/{name}"].view(torch.int32), (2 * whole).view(torch.int32))
