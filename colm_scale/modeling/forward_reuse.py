"""Forward reuse: the coreset's backward starts from block inputs held during the sketch of the candidates.

With activation checkpointing a training step runs each block forward, holds its input, and runs it again in the
backward pass. The sketch has already run the same blocks with the same weights, so their inputs are known: a
micro-batch that *reuses* its forward skips the first of the two runs (docs/method.md, Route and train).

Only the blocks below the first *live* one are reused. From the live block on, the sketch branches or computes in
another precision, so the live blocks and the head run as usual.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from colm_scale.modeling.causal import input_weight
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import decoder_blocks
from colm_scale.records import Batch, on_device

_Found = Tensor | tuple[Tensor, ...]
"""The output of a block."""


@dataclass(slots=True)
class _Held:
    """The inputs of each block for one micro-batch, ``[tokens, hidden]``, padding included."""

    batch: Batch
    inputs: list[Tensor]


class BlockInputs:
    """Inputs of a model's blocks, held for the training of the same examples. The base class holds none.

    Attributes:
        most_tokens: Number of tokens that can be held on a rank.
        absent_because: Reason why none are held although that would save time; else empty.
    """

    most_tokens = 0

    def __init__(self, absent_because: str = ""):
        self.absent_because = absent_because

    def tokens_of(self, tokens: Tensor) -> Tensor:
        """Return how many of `most_tokens` micro-batches of ``tokens`` (int64) take."""
        return tokens

    def holding(self, most: int) -> AbstractContextManager[None]:
        """A context in which the first ``most`` forwards hold the block inputs."""
        return nullcontext()

    def arrange(self, batches: Sequence[Batch]) -> None:
        """Arrange the held inputs for ``batches``, whose examples are all held, and forget the rest.

        An empty batch (no positions) starts from zeros.
        """

    def reusing(self, batch: Batch) -> AbstractContextManager[None]:
        """A context in which one forward of an arranged batch skips the blocks below the live one. Its backward
        computes them."""
        return nullcontext()


class HeldBlockInputs(BlockInputs):
    """Holds block inputs on the device or in CPU memory.

    Args:
        model: The loss module around the adapted model, sharded or not. The forward of its blocks is wrapped; outside
            of `holding` and `reusing` it does the same as before.
        live: The first block that is not reused.
        store: ``device`` or ``cpu``, the memory in which inputs are held.
        most_bytes: Limit for the held inputs.
    """

    def __init__(self, model: ExampleLoss, live: int, store: str = "device", most_bytes: float = math.inf):
        super().__init__()
        self._model, self._store = model, store
        self._blocks = decoder_blocks(model.causal_model)[1][: live + 1]
        self._mode = "run"
        self._most = 0
        self._like = torch.empty(0)
        self._outputs = 0
        self._held: list[_Held] = []
        self._arranged: dict[int, list[Tensor]] = {}
        self._reused: list[Tensor] = []
        self._end_copies: Callable[[], object] = list
        self.most_tokens = sys.maxsize if most_bytes == math.inf else int(most_bytes // self.bytes_per_token)
        for number, block in enumerate(self._blocks):
            block.forward = self._wrapped(number, block)

    @property
    def bytes_per_token(self) -> int:
        """Bytes held per token."""
        model = self._model.causal_model
        hidden: int = model.config.get_text_config().hidden_size
        return len(self._blocks) * hidden * input_weight(model).element_size()

    def tokens_of(self, tokens: Tensor) -> Tensor:
        if self._store == "device" or not torch.accelerator.is_available():
            return tokens
        width = self.bytes_per_token // len(self._blocks)
        bits = torch.frexp((tokens * width - 1).double()).exponent  # torch rounds a pinned block up to a power of two
        return (torch.ones_like(tokens) << bits) // width

    @contextmanager
    def holding(self, most: int) -> Iterator[None]:
        self._mode, self._most = "hold", most
        try:
            yield
        finally:
            self._mode = "run"

    def arrange(self, batches: Sequence[Batch]) -> None:
        self._end_copies()
        places = [self._places(batch) for batch in batches]
        self._arranged = {id(batch): [] for batch in batches}
        for number in range(len(self._blocks)):
            for batch, of_batch in zip(batches, places):
                self._arranged[id(batch)].append(self._laid_out(batch, of_batch, number))
            for held in self._held:
                held.inputs[number] = torch.empty(0)  # block by block, to limit the peak memory
        self._held = []

    @contextmanager
    def reusing(self, batch: Batch) -> Iterator[None]:
        self._mode, self._reused = "reuse", self._arranged.pop(id(batch))
        try:
            with ExitStack() as stack:
                for block in self._blocks[:-1]:
                    stack.enter_context(_not_checkpointed(block))
                yield
        finally:
            self._mode, self._reused = "run", []

    def _wrapped(self, number: int, block: nn.Module) -> Callable[..., _Found]:
        live, forward = len(self._blocks) - 1, block.forward

        def again(known: Tensor, *args: object, **kwargs: object) -> _Found:
            with _not_checkpointed(block):
                found: _Found = forward(known, *args, **kwargs)
            return found

        def wrapped(hidden_states: Tensor, *args: object, **kwargs: object) -> _Found:
            if self._mode == "hold":
                self._hold(number, hidden_states)
            if self._mode != "reuse" or number == live:
                found: _Found = forward(hidden_states, *args, **kwargs)
                self._outputs = len(found) if isinstance(found, tuple) else 0
                return found
            inputs, shape = self._reused, hidden_states.shape
            anchor = torch.zeros((), device=hidden_states.device, requires_grad=True)
            # The last reused block hands on the live block's input, so that the live block's recomputation gets it too.
            onward = on_device(inputs.pop(), anchor.device).view(shape) if number == live - 1 else hidden_states
            passed: Tensor = _ReusedBlock.apply(
                hidden_states, onward, anchor, inputs, lambda known: again(known, *args, **kwargs)
            )
            # Beside its hidden states a block may return the weights of its attention, which nobody reads.
            return (passed, *(torch.empty(0),) * (self._outputs - 1)) if self._outputs else passed

        return wrapped

    def _hold(self, number: int, hidden: Tensor) -> None:
        batch = self._model.current_batch
        if number == 0:
            self._like = hidden.detach()[:0]
            again = bool(self._held) and self._held[-1].batch is batch  # for further branches of a model of one block
            if len(self._held) < self._most and not again:
                self._held.append(_Held(batch, []))
        if self._held and self._held[-1].batch is batch:
            # The first rows of a branched micro-batch are unchanged, and its input is not yet in float32.
            hidden = hidden.detach()[: len(batch.input_ids)].flatten(0, 1).to(self._like.dtype)
            self._held[-1].inputs.append(self._kept(hidden))

    def _kept(self, hidden: Tensor) -> Tensor:
        if self._store == "device" or hidden.device.type == "cpu":
            return hidden
        kept = hidden.to("cpu", non_blocking=True)
        event = torch.get_device_module(hidden.device).Event()
        event.record()  # the host must not read the copy before
        self._end_copies = event.synchronize
        return kept

    def _places(self, batch: Batch) -> list[tuple[int, Tensor, Tensor]]:
        """For each held micro-batch with examples of ``batch``: its number, tokens, and their places in ``batch``."""
        starts = {
            position: (number, start)
            for number, held in enumerate(self._held)
            for position, start in zip(held.batch.positions.tolist(), held.batch.starts)
        }
        found: list[tuple[int, Tensor, Tensor]] = []
        by_held: dict[int, list[tuple[int, int, int]]] = {}
        for position, start, length in zip(batch.positions.tolist(), batch.starts, batch.lengths):
            number, held_start = starts[position]
            by_held.setdefault(number, []).append((held_start, start, length))
        for number, spans in by_held.items():
            tokens, targets = (torch.cat([torch.arange(span[i], span[i] + span[2]) for span in spans]) for i in (0, 1))
            found.append((number, tokens, targets))
        return found

    def _laid_out(self, batch: Batch, places: list[tuple[int, Tensor, Tensor]], number: int) -> Tensor:
        """``[tokens of batch, hidden]``; padding is zero."""
        device = "cpu" if self._store == "cpu" else self._like.device
        found = self._like.new_zeros(batch.input_ids.numel(), self._like.shape[-1], device=device)
        for held, tokens, targets in places:
            of_held = self._held[held].inputs[number]
            taken = of_held.index_select(0, on_device(tokens, of_held.device))
            found.index_copy_(0, on_device(targets, found.device), taken)
        return found


class _ReusedBlock(torch.autograd.Function):
    """Skips a block in the forward, which returns ``onward``. The backward computes the block from its held input.

    ``inputs`` are those of the blocks up to this one when its backward begins: the last is taken. ``anchor`` requires a
    gradient, so that there is a backward even if the first block's input requires none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        onward: Tensor,
        anchor: Tensor,
        inputs: list[Tensor],
        block: Callable[[Tensor], _Found],
    ) -> Tensor:
        ctx.inputs, ctx.block, ctx.shape, ctx.device = inputs, block, hidden.shape, hidden.device
        return onward.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        known = on_device(ctx.inputs.pop(), ctx.device).view(ctx.shape).detach().requires_grad_(True)
        with torch.enable_grad():
            found = ctx.block(known)
        found = found[0] if isinstance(found, tuple) else found
        torch.autograd.backward(found, gradient)
        return known.grad if ctx.needs_input_grad[0] else None, None, None, None, None


@contextmanager
def _not_checkpointed(block: nn.Module) -> Iterator[None]:
    """A context without activation checkpointing of ``block``, which is only computed in the backward."""
    if not isinstance(block, GradientCheckpointingLayer):
        yield
        return
    before = block.gradient_checkpointing
    block.gradient_checkpointing = False
    try:
        yield
    finally:
        block.gradient_checkpointing = before


def dropout_of(model: ExampleLoss) -> str:
    """Name where a model has dropout, with which each of its forwards is different; empty if it has none."""
    drops = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    config = model.causal_model.config.get_text_config()
    drops += [name for name in ("attention_dropout", "attn_pdrop") if getattr(config, name, 0)]
    return next(iter(drops), "")
