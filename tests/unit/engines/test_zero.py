from __future__ import annotations

import torch
from torch import nn

from colm_scale.engines.zero import _off


def test_hooks_are_off_and_then_in_their_old_order():
    layer, calls = nn.Identity(), []
    handles = [
        register(lambda *_, name=name: calls.append(name))
        for register in (layer.register_forward_pre_hook, layer.register_forward_hook)
        for name in "abcd"
    ]
    layer(torch.zeros(1))
    assert calls == [*"abcd"] * 2
    calls.clear()
    with _off([handles[1], handles[3], handles[4]]):
        layer(torch.zeros(1))
        assert calls == [*"ac", *"bcd"]
    calls.clear()
    layer(torch.zeros(1))
    assert calls == [*"abcd"] * 2
    handles[1].remove()
    calls.clear()
    layer(torch.zeros(1))
    assert calls == [*"acd", *"abcd"]
