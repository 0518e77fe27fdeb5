"""float32 for the last blocks of a zeroth-order sketch (DESIGN 2.1).

Two losses whose probe tensors differ by eps are closer to each other than the rounding of half precision. So everything
after the change is computed in float32. A layer gets a float32 copy of its weights after its engine has gathered them
and until its forward ends: no weight is written, sharded weights need no special case, and only one layer's copy exists
at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from colm_scale.modeling.attention import PACKED_SDPA
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.sketch.tap import Tap

FLOAT32_BLOCKS = 2
"""Blocks in float32. Without the last one, the differences are mostly rounding; more than two change little."""


@contextmanager
def without_flash_attention(model: ExampleLoss) -> Iterator[None]:
    """A context with sdpa in place of attention kernels that do not support float32 (all but sdpa and eager)."""
    config = model.causal_model.config.get_text_config()
    chosen = config._attn_implementation
    if chosen not in ("sdpa", "eager"):
        config._attn_implementation = PACKED_SDPA if model.packs else "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = chosen


@contextmanager
def float32_tail(tap: Tap, blocks: int = FLOAT32_BLOCKS) -> Iterator[None]:
    """A context in which the last ``blocks`` blocks, final norm, head and loss run in float32.

    4-bit layers stay 4-bit, with float32 activations.
    """
    model = tap.model.causal_model
    every = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and tap.block in [*m])
    tail = every[-blocks:]
    before = {module for block in every[:-blocks] for module in block.modules()}
    lent: dict[nn.Module, dict[str, nn.Parameter | None]] = {}
    reached = False

    def enter(_block: nn.Module, args: object, kwargs: object) -> tuple[tuple[object, ...], dict[str, object]]:
        nonlocal reached
        reached = True
        lifted: tuple[tuple[object, ...], dict[str, object]]
        lifted = pytree.tree_map_only(Tensor, _in_float32, (args, kwargs))
        return lifted

    def lend(layer: nn.Module, _args: object) -> None:
        if reached and any(weight is not None and _is_half(weight) for weight in layer._parameters.values()):
            lent[layer] = layer._parameters
            copies = {k: None if v is None else _in_float32(v) for k, v in layer._parameters.items()}
            vars(layer)["_parameters"] = copies  # tensors, where torch has parameters

    def take_back(layer: nn.Module, *_: object) -> None:
        if layer in lent:
            layer._parameters = lent.pop(layer)

    def take_all_back() -> None:
        for layer in [*lent]:
            take_back(layer)

    with ExitStack() as stack:
        stack.enter_context(without_flash_attention(tap.model))
        stack.callback(take_all_back)
        for block in tail:
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
        for layer in model.modules():
            if layer._parameters and layer not in before:
                # Inside the engine's own hooks, which gather the weights before the layer runs and free them after it.
                stack.callback(layer.register_forward_pre_hook(lend).remove)
                stack.callback(layer.register_forward_hook(take_back, prepend=True).remove)
        yield


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if _is_half(tensor) else tensor
