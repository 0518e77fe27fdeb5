"""The one interface behind which a model is trained, and the two engines that shard nothing.

An engine sums: the losses handed to `backward`, over all micro-batches and ranks, add up to the loss of the step. The
averaging over ranks that DDP, DeepSpeed and FSDP do by themselves is undone inside the engine (DESIGN 2.4).

Adapters and their optimizer are float32 whatever the base's type. In float16 the gradients that flow through the base
would underflow, so the loss is scaled, the same way under every engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from colm_scale.config import TrainConfig
from colm_scale.distributed.group import Group
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.optimizers import begun_state, make_optimizer, state_keys
from colm_scale.records import Batch

WEIGHT = "weight"
"""Beside the averages of the optimizer, what is kept of each adapter tensor: itself."""


@dataclass(frozen=True, slots=True)
class Update:
    """What a call of `Engine.step` did.

    Attributes:
        norm: Gradient norm over all adapters before clipping, without the loss scale.
        applied: False if the norm was not finite; then nothing has changed.
        loss_scale: What the losses were multiplied with.
    """

    norm: float
    applied: bool
    loss_scale: float


@dataclass(slots=True)
class LossScale:
    """What a loss is multiplied with so that float16 can hold its gradients: as much as does not overflow.

    Halved after a step that overflowed, doubled after 2,000 that did not (Micikevicius et al., ICLR 2018, section 3.2).
    """

    scale: float
    steps_since_change: int = 0

    @classmethod
    def of(cls, dtype: str) -> LossScale:
        """For a base in ``dtype``; only float16 needs one other than 1."""
        return cls(2.0**16 if dtype == "float16" else 1.0)

    def update(self, *, finite: bool) -> None:
        """Learn from a step whether the scale fits."""
        if self.scale == 1.0:
            return
        self.steps_since_change += 1
        if not finite:
            self.scale, self.steps_since_change = max(1.0, self.scale / 2), 0
        elif self.steps_since_change == 2000:
            self.scale, self.steps_since_change = self.scale * 2, 0


class Engine(Protocol):
    """What trains the adapters of one model on all ranks."""

    name: str
    module: ExampleLoss
    """The unwrapped module: sketches, evaluation and the bare floor run on it, past the engine's own hooks."""
    scale: LossScale
    state_keys: tuple[str, ...]
    """Names of the averages that the optimizer keeps of each adapter tensor."""

    def forward(self, batch: Batch) -> Tensor:
        """``[B]`` losses with a graph, to be reduced to a scalar and given to `backward`."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of a scalar; ``last`` marks the step's last micro-batch on this rank. Every rank
        makes the same number of calls."""

    def step(self, learning_rate: float) -> Update:
        """Clip, update, clear the gradients."""

    def snapshot(self) -> Callable[[], None]:
        """Remember the adapters and the optimizer's state; the returned function puts them back."""

    def read(self, name: str, key: str) -> Tensor:
        """An adapter tensor (`WEIGHT`), or one of `state_keys` of it, whole, in float32. All ranks call it together."""

    def write(self, name: str, key: str, value: Tensor) -> None:
        """Set what `read` returns, to a value that every rank gives. All ranks call it together."""

    @property
    def updates(self) -> int:
        """How often the optimizer has updated the adapters; 0 if its update does not depend on it."""

    @updates.setter
    def updates(self, count: int) -> None: ...


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name; names and order are the same under every engine."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def updates_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> int:
    """How often ``optimizer`` has updated ``parameter``; 0 if it does not count."""
    return int(begun_state(optimizer, parameter).get("step", 0))


def set_updates_of(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], count: int) -> None:
    """Set what `updates_of` returns, if ``optimizer`` counts."""
    for parameter in parameters:
        if "step" in (state := begun_state(optimizer, parameter)):
            state["step"].fill_(count)


def unscale(parameters: Iterable[nn.Parameter], scale: float) -> None:
    """Divide every gradient by a loss scale: a power of two, so this is exact."""
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.div_(scale)


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
    return [*dict.fromkeys([*parameters, *optimizer.state]), *state]


class OptimizerEngine:
    """What engines share that leave the optimizer to torch: gradients and its state are where torch puts them."""

    def __init__(self, module: ExampleLoss, config: TrainConfig):
        self.module = module
        self.scale = LossScale.of(config.dtype)
        self._parameters = trainable(module)
        self.optimizer = make_optimizer(self._parameters.values(), config)
        self.state_keys = state_keys(self.optimizer)
        self._max_norm = config.max_grad_norm or math.inf

    @torch.no_grad()
    def step(self, learning_rate: float) -> Update:
        used = self.scale.scale
        if used != 1.0:
            unscale(self._parameters.values(), used)
        total = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._max_norm)
        norm = float(total.full_tensor() if hasattr(total, "full_tensor") else total)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        finite = math.isfinite(norm)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scale.update(finite=finite)
        return Update(norm, finite, used)

    def snapshot(self) -> Callable[[], None]:
        return remember(optimizer_tensors(self.optimizer))

    def read(self, name: str, key: str) -> Tensor:
        return self._tensor(name, key).detach()

    @torch.no_grad()
    def write(self, name: str, key: str, value: Tensor) -> None:
        self._tensor(name, key).copy_(value)

    @property
    def updates(self) -> int:
        return updates_of(self.optimizer, next(iter(self._parameters.values())))

    @updates.setter
    def updates(self, count: int) -> None:
        set_updates_of(self.optimizer, self._parameters.values(), count)

    def _tensor(self, name: str, key: str) -> Tensor:
        parameter = self._parameters[name]
        return parameter if key == WEIGHT else begun_state(self.optimizer, parameter)[key]


class TorchEngine(OptimizerEngine):
    """One process, or one replica per rank kept equal by DistributedDataParallel."""

    def __init__(self, module: ExampleLoss, config: TrainConfig, group: Group):
        super().__init__(module, config)
        self._ranks = group.world_size
        self.name = "ddp" if group.world_size > 1 else "single"
        self._wrapped: ExampleLoss | DistributedDataParallel = module
        if group.world_size > 1:
            self._wrapped = DistributedDataParallel(
                module, device_ids=[group.device.index] if group.device.type == "cuda" else None
            )

    def forward(self, batch: Batch) -> Tensor:
        losses: Tensor = self._wrapped(batch)
        return losses

    def backward(self, loss: Tensor, *, last: bool) -> None:
        wrapped = self._wrapped
        with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else nullcontext():
            (loss * (self._ranks * self.scale.scale)).backward()


def collect(engine: Engine, *, keep: bool) -> dict[str, dict[str, Tensor]]:
    """All that training has changed: ``{"adapter": {name: weight}, "optimizer": {"key/name": average, ...}}``.

    All ranks call it together; copies, on the CPU, are made where ``keep`` is set.
    """
    found: dict[str, dict[str, Tensor]] = {"adapter": {}, "optimizer": {}}
    for name in trainable(engine.module):
        for file, label, key in _entries(engine, name):
            value = engine.read(name, key)
            if keep:
                found[file][label] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    return found


def restore(engine: Engine, tensors: Mapping[str, Mapping[str, Tensor]], group: Group) -> None:
    """Put back what `collect` found; only the first rank's ``tensors`` count. All ranks call it together."""
    for name in trainable(engine.module):
        for file, label, key in _entries(engine, name):
            shape = engine.read(name, key).shape
            value = torch.empty(shape, device=group.device)
            if group.is_first:
                value.copy_(tensors[file][label])
            engine.write(name, key, group.broadcast(value, "control"))


def _entries(engine: Engine, name: str) -> list[tuple[str, str, str]]:
    """File, label and key of everything that is kept about an adapter tensor."""
    averages = [("optimizer", f"{key}/{name}", key) for key in engine.state_keys]
    return [("adapter", name, WEIGHT), *averages]
