"""float32 for the last blocks of a zeroth-order sketch (docs/method.md, Sketch).

Two losses whose probe tensors differ by eps are closer to each other than the rounding of half precision. So everything
after the change is computed in float32, whatever rounds elsewhere: half-precision weights, autocast, or the mixed
precision of an engine. A layer gets a float32 copy of its weights after its engine has gathered them and until its
forward ends: no weight is written, sharded weights need no special case, and only one layer's copy exists at a time.
Of the head, the widest layer, the loss copies a part at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
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
    """A context in which the last ``blocks`` blocks, final norm, head and loss run in float32, without autocast.

    4-bit layers stay 4-bit, with float32 activations. The blocks below run as they do elsewhere.
    """
    before = {module for block in tap.blocks[:-blocks] for module in block.modules()}
    tail = _Tail(tap.model, tap.blocks[-blocks:])
    with ExitStack() as stack:
        stack.enter_context(without_flash_attention(tap.model))
        for block in tail.blocks:
            stack.enter_context(disable_input_dtype_casting(block))  # of peft, to the type of adapters not yet lent
        stack.callback(tail.end)
        stack.callback(tap.model.register_forward_pre_hook(tail.restart).remove)
        for module in tap.model.modules():
            if module not in before and module is not tap.model:
                # Around the engine's own hooks, and inside them, where its weights are gathered.
                stack.callback(module.register_forward_pre_hook(tail.given, prepend=True, with_kwargs=True).remove)
                stack.callback(module.register_forward_pre_hook(tail.begin, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(tail.found, prepend=True).remove)
                stack.callback(module.register_forward_hook(tail.finish).remove)
        yield


class _Tail:
    """The hooks of `float32_tail` on the modules that are not below it.

    A module runs in the tail once a forward has reached the first block of the tail. An engine with mixed precision
    rounds the inputs and outputs of the modules that it shards; hooks on both sides of its own undo that.
    """

    def __init__(self, model: ExampleLoss, blocks: Iterable[nn.Module]):
        self.blocks = {*blocks}
        self._model = model
        self._autocast = _autocast()
        self._reached = False
        self._kept: dict[nn.Module, object] = {}
        self._lent: dict[nn.Module, dict[str, nn.Parameter | None]] = {}

    def restart(self, *_: object) -> None:
        """Start a forward, below the tail."""
        self._reached = False
        _set_autocast(self._autocast)

    def end(self) -> None:
        """Leave the model as it was, also after a forward that failed."""
        self.restart()
        for layer in [*self._lent]:
            self._take_back(layer)

    def given(self, module: nn.Module, args: object, kwargs: object) -> None:
        """Keep a module's inputs, before the engine rounds them."""
        if module in self.blocks and not self._reached:
            self._reached = True
            _set_autocast(dict.fromkeys(self._autocast, False))
        if self._reached:
            self._kept[module] = args, kwargs

    def begin(self, module: nn.Module, *inputs: object) -> tuple[tuple[object, ...], dict[str, object]] | None:
        """Lend the layer float32 weights, and the block float32 inputs."""
        if not self._reached:
            return None
        halves = any(weight is not None and _is_half(weight) for weight in module._parameters.values())
        packed = hasattr(module, "quant_state")  # bytes of 4-bit weights, whatever their type says
        if halves and not packed and module is not self._model.fused_head:
            self._lent[module] = module._parameters
            copies = {k: None if v is None else _in_float32(v) for k, v in module._parameters.items()}
            vars(module)["_parameters"] = copies  # tensors, where torch has parameters
        exact: tuple[tuple[object, ...], dict[str, object]] = _not_rounded(self._kept.pop(module), inputs)
        if module in self.blocks:
            exact = pytree.tree_map_only(Tensor, _in_float32, exact)
        return exact

    def found(self, module: nn.Module, _args: object, output: object) -> None:
        """Keep a module's output, before the engine rounds it, and return its weights, before the engine frees them."""
        self._take_back(module)
        if self._reached:
            self._kept[module] = output

    def finish(self, module: nn.Module, _args: object, output: object) -> object:
        """Return the output as the module computed it."""
        return _not_rounded(self._kept.pop(module), output) if module in self._kept else output

    def _take_back(self, layer: nn.Module) -> None:
        if layer in self._lent:
            layer._parameters = self._lent.pop(layer)


def _not_rounded(exact: object, rounded: Any) -> Any:
    """Nested tensors, with float32 ones of ``exact`` for those that are in half precision only in ``rounded``."""
    wanted, of_exact = pytree.tree_flatten(exact)
    leaves, of_rounded = pytree.tree_flatten(rounded)
    if of_exact != of_rounded:
        return rounded
    return pytree.tree_unflatten([_more_exact(*pair) for pair in zip(wanted, leaves)], of_rounded)


def _more_exact(exact: object, leaf: object) -> object:
    if not isinstance(exact, Tensor) or not isinstance(leaf, Tensor):
        return leaf
    return exact if exact.dtype == torch.float32 and _is_half(leaf) else leaf


def _autocast() -> dict[str, bool]:
    """Whether autocast is on, on the CPU and on the accelerator."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = ["cpu", *([] if accelerator is None else [accelerator.type])]
    return {kind: torch.is_autocast_enabled(kind) for kind in kinds}


def _set_autocast(enabled: dict[str, bool]) -> None:
    for kind, on in enabled.items():
        torch.set_autocast_enabled(kind, on)


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if _is_half(tensor) else tensor
