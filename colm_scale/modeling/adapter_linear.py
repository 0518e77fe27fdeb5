"""Adapters in float32 that compute in the type of the base.

peft lifts the input of a float32 adapter to float32, and multiplies there: a second, larger copy of the input is kept
for the backward pass, and on a GPU the product takes many times as long as in half precision. Autocast around the whole
forward would avoid that, but lifts normalised states in turn. Here only the adapter's weights are cast.
"""

from __future__ import annotations

import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


class AdapterLinear(nn.Linear):
    """A linear layer whose weights are cast to the type of its input; their gradients are in their own type."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


def compute_in_input_type(model: nn.Module) -> None:
    """Make every LoRA layer compute in the type of its input. In float32, nothing changes."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False  # of peft: the input to the type of the weights
            for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                if type(factor) is nn.Linear:
                    factor.__class__ = AdapterLinear
