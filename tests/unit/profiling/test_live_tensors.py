from __future__ import annotations

import gc

import torch
from torch._subclasses import FakeTensorMode

from colm_scale.profiling.live_tensors import LiveBytes


def test_storages_are_counted_until_they_are_freed():
    there = torch.ones(100)
    with LiveBytes([there]) as live:
        assert live.now == 400
        double = there * 2
        view = double.view(10, 10)
        assert live.now == 800  # a view holds nothing of its own
        del double
        assert live.now == 800
        del view
        assert (live.now, live.peak) == (400, 800)
        live.restart()
        assert live.peak == 400


def test_what_is_outside_is_not_counted_and_neither_are_parts_of_it():
    data = torch.ones(1000)
    with LiveBytes(outside=[data]) as live:
        part = data[:10]
        assert live.now == 0
        copied = part.clone()
        assert live.now == copied.nbytes == 40


def test_a_storage_that_is_emptied_and_filled_again():
    with LiveBytes() as live:
        weights = torch.ones(100)
        weights.untyped_storage().resize_(0)
        assert live.now == 0
        weights.untyped_storage().resize_(400)
        assert live.now == 400
    storage = torch.ones(2).untyped_storage()
    storage.resize_(0)  # as ever
    assert storage.size() == 0


def test_the_backward_is_counted():
    x = torch.ones(100, requires_grad=True)
    with LiveBytes([x]) as live:
        y = x.exp().sum()
        assert live.now == 400 + 400 + 4
        y.backward()
        del y
        gc.collect()
        assert live.now == 800  # the gradient
        assert live.peak >= 1200


def test_fake_tensors_count_as_real_ones_would():
    with FakeTensorMode(), LiveBytes() as live:
        x = torch.empty(1000, 1000)
        y = x @ x
        del x
        assert (live.now, live.peak) == (y.nbytes, 2 * y.nbytes) == (4_000_000, 8_000_000)


def test_tensors_without_memory_are_not_counted():
    with torch.device("meta"):
        layer = torch.nn.Linear(8, 8)
    with LiveBytes(there=layer.parameters()) as live:
        kept = torch.zeros(4, device="meta"), torch.zeros(4)
        assert live.now == kept[1].nbytes
