"""Free memory, and whether a model fits into it."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn

from colm_scale.distributed.group import Group
from colm_scale.engines import tensors
from colm_scale.engines.tensors import all_have_room, free_bytes


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
