from __future__ import annotations

import pytest
import torch
from support.families import base_model, with_adapters
from torch import nn

from colm_scale.engines.zero import _check_adapters, _off
from colm_scale.errors import UserError
from colm_scale.modeling.losses import ExampleLoss


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


def test_adapters_on_experts_are_refused_before_weights_are_cut():
    model = base_model("mixtral", num_local_experts=4)
    _check_adapters(ExampleLoss(with_adapters(model, target_modules=["v_proj"])))
    experts = {"target_modules": ["v_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    module = ExampleLoss(with_adapters(base_model("mixtral", num_local_experts=4), **experts))
    with pytest.raises(UserError, match=r"^ZeRO-3 \(--ds_config\) cannot train adapters on experts: use --engine fsdp"):
        _check_adapters(module)
