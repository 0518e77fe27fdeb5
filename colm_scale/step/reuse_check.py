"""A check of forward reuse in the run itself: the gradient of one micro-batch, with and without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from colm_scale.distributed.group import Group
from colm_scale.engines.base import Engine
from colm_scale.errors import UserError
from colm_scale.modeling.probe import decoder_blocks
from colm_scale.records import MicroBatch

TOLERANCE = {"float32": 64 * 2.0**-10, "float16": 64 * 2.0**-10, "bfloat16": 64 * 2.0**-7}
"""Largest difference between the two gradients of a block, relative to its norm: 64 units of the computation's type (of
TF32 for float32).

A unit off in every number of every block's input changed the gradients of random models with 8 to 64 blocks by 4 to 33
units. A wrong input changes them by about their own size."""

_Weight = tuple[int, str]
"""Number of a block, and a name in it."""
_Take = Callable[[_Weight, Tensor], Tensor | None]


class ReuseCheck:
    """Compares the gradients of a micro-batch with and without a reused forward, once in a run.

    The micro-batch runs once more, before its turn and without reuse. Each rank compares the gradients of its own
    micro-batch as they reach the adapters, before an engine reduces them. Those of the additional run are replaced by
    zeros, so that to every engine it is one more micro-batch, which adds nothing.
    """

    def __init__(self, engine: Engine, dtype: str, group: Group):
        self._engine, self._dtype, self._group = engine, dtype, group
        self._done = False

    @contextmanager
    def __call__(self, micro_batch: MicroBatch, step: int) -> Iterator[None]:
        """A context for forward and backward of a micro-batch. All ranks enter it together.

        A gradient that is zero or not finite on every rank shows nothing; then the next micro-batch is compared.

        Raises:
            UserError: On every rank: the gradients differ by more than rounding.
        """
        if self._done or not micro_batch.reuses_forward:
            yield
            return
        engine, blocks = self._engine, decoder_blocks(self._engine.module.causal_model)[1]
        plain: dict[_Weight, Tensor] = {}
        squares = torch.zeros(2, len(blocks), device=self._group.device)

        def keep(weight: _Weight, gradient: Tensor) -> Tensor:
            plain[weight] = gradient
            return torch.zeros_like(gradient)

        def compare(weight: _Weight, gradient: Tensor) -> None:
            expected = plain.pop(weight)
            squares[:, weight[0]] += torch.stack([(gradient - expected).square().sum(), expected.square().sum()])

        with _reached(blocks, keep), engine.micro_batch(last=False):
            losses = engine.forward(micro_batch.batch)
            engine.backward((losses * micro_batch.shares).sum())
        with _reached(blocks, compare):
            yield
        self._conclude(squares, step)

    def _conclude(self, squares: Tensor, step: int) -> None:
        """Judge this rank's squared differences and norms ``[2, blocks]`` together with those of the others."""
        squares = squares.where(squares.isfinite().all(), 0)  # the step itself refuses what is not finite
        own = torch.stack([(squares[0] / squares[1]).nan_to_num(0, posinf=torch.inf).max(), squares[1].max()])
        worst, size = self._group.all_reduce(own, "report", largest=True).tolist()
        self._done = size > 0
        limit = TOLERANCE[self._dtype]
        if worst > limit**2:
            raise UserError(
                f"step {step}: with forward reuse a block's gradient differs from that of a second forward by "
                f"{worst ** 0.5:.2g} of its norm, and rounding in {self._dtype} explains at most {limit:g}: forward "
                f"reuse is wrong for this model or with these versions (see colm-scale doctor); use "
                f"--train.forward_reuse off"
            )


@contextmanager
def _reached(blocks: Iterable[nn.Module], take: _Take) -> Iterator[None]:
    """A context in which ``take`` gets each gradient of the blocks' adapters when it is complete, and may replace it.

    Weights are looked up when their block runs: FSDP2 then computes with others than it holds.
    """
    with ExitStack() as stack:
        seen: set[_Weight] = set()

        def watch(number: int, block: nn.Module, _args: object) -> None:
            for name, weight in block.named_parameters():
                if weight.requires_grad and (number, name) not in seen:
                    seen.add((number, name))
                    stack.callback(weight.register_hook(partial(take, (number, name))).remove)

        for number, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(partial(watch, number)).remove)
        yield
