"""The gradient of each example that is trained on, read off the training pass itself: no forward or backward more.

A hook on the probe's output sees the same factors as `sketch.tap` does, but of the loss of the step: an example's
``delta`` comes multiplied with what its loss counts for, whatever shares and scales the engine has put into that. It is
the gradient of the step's loss with respect to the example's loss, and a hook on the losses sees it first.

With activation checkpointing the block runs a second time in the backward pass, but the gradient flows through the
tensors of the first time only, and it is these that are listened to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from colm_scale.randomness import generator
from colm_scale.sketch.tap import ProbeTap, Tap

PROJECTED = 256
"""Numbers that a gradient is projected to (p): inner products of projections are off by a sixteenth of the sizes."""


class GradientReader:
    """Reads squared norm and projection of the probe's gradient, of each example of a micro-batch that is trained.

    The projection gives each number a random sign and adds up every p-th (Charikar et al., 2002, with places that take
    turns): inner products are kept in expectation. It is fixed for the run, so that projections can be averaged.

    Args:
        tap: The probes of the model that is trained.
        seed: Of the run; the signs are rank-equal.
    """

    def __init__(self, tap: Tap, seed: int):
        self._tap = tap
        signs = torch.randint(2, (tap.size,), generator=generator(seed, "observe")).float() * 2 - 1
        self._signs = signs.to(next(tap.model.parameters()).device)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A block in which forwards and backwards of the model are read; call `take` after each backward."""
        with ExitStack() as hooks:
            hooks.enter_context(self._tap.model.register_forward_hook(self._watch_losses))
            for probe in self._tap.probes:
                hooks.enter_context(probe.lora_b.register_forward_hook(self._watch(probe)))
            yield

    def take(self) -> Tensor:
        """``[B, 1 + p]`` float32 squared norm and projection of the gradient of each example of the micro-batch.

        Not finite for one whose loss counts for nothing.
        """
        return self._rows

    def _watch_losses(self, _model, _args, losses: Tensor) -> None:
        def begin(shares: Tensor) -> None:
            self._shares = shares.float()
            self._rows = shares.new_zeros(len(shares), 1 + PROJECTED, dtype=torch.float32)

        losses.register_hook(begin)

    def _watch(self, probe: ProbeTap) -> Callable[..., None]:
        def watch(_module, args, output: Tensor) -> None:
            if output.requires_grad:
                a = args[0].detach()
                output.register_hook(lambda delta: self._read(probe, a, delta))

        return watch

    def _read(self, probe: ProbeTap, a: Tensor, delta: Tensor) -> None:
        d_out, r = probe.shape
        delta, a = probe.of_output(delta).float(), a.float()
        count = len(self._shares)
        product = delta.reshape(count, -1, d_out).transpose(1, 2) @ a.reshape(count, -1, r)
        gradients = product.flatten(1) / self._shares.unsqueeze(1)
        signed = gradients * self._signs[probe.slice]
        aligned = F.pad(signed, (probe.slice.start % PROJECTED, -probe.slice.stop % PROJECTED))
        self._rows[:, 0] += gradients.square().sum(1)
        self._rows[:, 1:] += aligned.view(count, -1, PROJECTED).sum(1)
