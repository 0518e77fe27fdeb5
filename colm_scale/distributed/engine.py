"""The one interface behind which a model is trained, and the two engines that need no DeepSpeed.

An engine sums: the losses handed to `backward`, over all micro-batches and ranks, add up to the loss of the step. The
averaging over ranks that DDP and DeepSpeed do by themselves is undone inside the engine (DESIGN 2.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from colm_scale.config import TrainConfig
from colm_scale.distributed.group import Group
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.records import Batch


class Engine(Protocol):
    """What trains the adapters of one model on all ranks."""

    name: str
    module: ExampleLoss
    """The unwrapped module: sketches, evaluation and the bare floor run on it, past the engine's own hooks."""

    def forward(self, batch: Batch) -> Tensor:
        """``[B]`` losses with a graph, to be reduced to a scalar and given to `backward`."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of a scalar; ``last`` marks the step's last micro-batch on this rank. Every rank
        makes the same number of calls."""

    def step(self, learning_rate: float) -> float | None:
        """Clip, update, clear the gradients. Returns the gradient norm before clipping, None if it is not known.

        A norm that is not finite ends the run; where it is known in time, nothing is updated."""

    def snapshot(self) -> Callable[[], None]:
        """Remember the adapters and the optimizer's state; the returned function puts them back."""


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The adapters' parameters."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def make_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the adapters; its learning rate is set at every step."""
    return torch.optim.AdamW(
        trainable(module), lr=0.0, betas=config.betas, eps=config.adam_epsilon, weight_decay=config.weight_decay
    )


def remember(tensors: Iterable[Tensor]) -> Callable[[], None]:
    """Copies of ``tensors``, and a function that writes them back in place."""
    saved = [(tensor, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def restore() -> None:
        for tensor, copy in saved:
            tensor.copy_(copy)

    return restore


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Everything that a step of ``optimizer`` changes: its parameters and its state."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return [*parameters, *state]


class TorchEngine:
    """One process, or one replica per rank kept equal by DistributedDataParallel."""

    def __init__(self, module: ExampleLoss, config: TrainConfig, group: Group):
        self.module = module
        self.optimizer = make_optimizer(module, config)
        self._max_norm, self._ranks = config.max_grad_norm, group.world_size
        self.name = "ddp" if group.world_size > 1 else "single"
        self._wrapped: nn.Module = module
        if group.world_size > 1:
            self._wrapped = DistributedDataParallel(
                module, device_ids=[group.device.index] if group.device.type == "cuda" else None
            )

    def forward(self, batch: Batch) -> Tensor:
        return self._wrapped(batch.input_ids, batch.attention_mask, batch.labels)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        accumulate = self._ranks > 1 and not last
        with self._wrapped.no_sync() if accumulate else nullcontext():
            (loss * self._ranks).backward()

    def step(self, learning_rate: float) -> float | None:
        parameters = trainable(self.module)
        limit = self._max_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def snapshot(self) -> Callable[[], None]:
        return remember(optimizer_tensors(self.optimizer))
