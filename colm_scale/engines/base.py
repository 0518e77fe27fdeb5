"""The interface of all engines, and what they share.

An engine sums: the step's loss is the sum of the losses given to `backward`, over all micro-batches and ranks. Engines
undo the averaging over ranks of DDP, DeepSpeed and FSDP (docs/method.md, Engines).

Adapters and their optimizer are float32 whatever the base's type. Float16 gradients would underflow on their way
through the base, so every engine scales the loss in the same way.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from colm_scale.config import TrainConfig
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.optimizers import begun_state, make_optimizer, state_keys
from colm_scale.records import Batch

WEIGHT = "weight"
"""Key of an adapter tensor itself; its other keys are averages of the optimizer."""


@dataclass(frozen=True, slots=True)
class Update:
    """Result of `Engine.step`.

    Attributes:
        norm: Gradient norm over all adapters before clipping, without the loss scale.
        applied: False if the norm was not finite; nothing has changed then.
        loss_scale: Factor by which the losses were multiplied.
    """

    norm: float
    applied: bool
    loss_scale: float


@dataclass(frozen=True, slots=True)
class Part:
    """What this rank has of a tensor that training changes.

    Attributes:
        shape: Shape of the whole tensor.
        start: Place of the first of ``values`` in the whole tensor, flattened.
        values: Flat and float32. Not copied where that is possible.
    """

    shape: torch.Size
    start: int
    values: Tensor


@dataclass(slots=True)
class LossScale:
    """Factor of the loss that keeps its gradients within the range of float16.

    Halved after a step that overflowed, doubled after 2,000 that did not (Micikevicius et al., ICLR 2018, section 3.2).
    """

    scale: float
    steps_since_change: int = 0

    @classmethod
    def of(cls, dtype: str) -> LossScale:
        """Start with the scale for a base in ``dtype``: 1 except for float16."""
        return cls(2.0**16 if dtype == "float16" else 1.0)

    def update(self, *, finite: bool) -> None:
        """Adjust the scale after a step."""
        if self.scale == 1.0:
            return
        self.steps_since_change += 1
        if not finite:
            self.scale, self.steps_since_change = max(1.0, self.scale / 2), 0
        elif self.steps_since_change == 2000:
            self.scale, self.steps_since_change = self.scale * 2, 0


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapters' parameters by name. Names and order are the same under every engine."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def updates_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> int:
    """Return the number of updates of ``parameter``; 0 if the optimizer does not count them."""
    return int(begun_state(optimizer, parameter).get("step", 0))


def set_updates_of(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], count: int) -> None:
    """Set the number of updates, if the optimizer counts them."""
    for parameter in parameters:
        if "step" in (state := begun_state(optimizer, parameter)):
            state["step"].fill_(count)


def unscale(parameters: Iterable[nn.Parameter], scale: float) -> None:
    """Divide every gradient by a loss scale. Exact, because the scale is a power of two."""
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.div_(scale)


def remember(tensors: Iterable[Tensor]) -> Callable[[], None]:
    """Copy ``tensors``, and return a function that writes the copies back in place."""
    saved = [(tensor, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def restore() -> None:
        for tensor, copy in saved:
            tensor.copy_(copy)

    return restore


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return everything that an optimizer step changes: parameters and state."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return [*dict.fromkeys([*parameters, *optimizer.state]), *state]


class Engine(ABC):
    """Trains the adapters of one model on all ranks. By default, torch holds gradients and optimizer state whole.

    Attributes:
        module: The unwrapped module. Sketches, evaluation and the bare floor run on it, without the engine's hooks.
        state_keys: Names of the optimizer's averages of each adapter tensor.
        is_sharded: Whether ranks have different parts of what training changes, which together are the whole once.
            Otherwise each has the whole.
    """

    name: str
    is_sharded = False

    def __init__(self, module: ExampleLoss, config: TrainConfig, ranks: int):
        self.module, self._ranks = module, ranks
        self.scale = LossScale.of(config.dtype)
        self._parameters = trainable(module)
        # ZeRO-3 has emptied the tensor itself.
        self._elements = sum(getattr(weight, "ds_numel", weight.numel()) for weight in self._parameters.values())
        self.optimizer = make_optimizer(self._parameters.values(), config)
        self.state_keys = state_keys(self.optimizer)
        self._max_norm = config.max_grad_norm or math.inf

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """Return a context for forward and backward of a micro-batch; every rank enters it equally often.

        Args:
            last: Marks the step's last micro-batch: gradients are reduced once, with it, if the engine can wait.
        """
        return nullcontext()

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """Compute ``[B]`` losses with a graph; reduce them to a scalar for `backward`."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a scalar."""

    def reduced_bytes(self, micro_batches: int) -> int:
        """Return the bytes of gradients that each rank passes to the reductions of a step of ``micro_batches``."""
        if self._ranks == 1:
            return 0
        return self._elements * torch.float32.itemsize

    @torch.no_grad()
    def step(self, learning_rate: float) -> Update:
        """Clip the gradients, update the adapters and clear the gradients."""
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

    def gathered(self) -> AbstractContextManager[bool]:
        """Return a context in which every rank has all weights, if all have memory for them. All ranks enter it
        together.

        Its value says whether they have: ranks may then run `module` each as often as it needs to, under `no_grad`.
        Otherwise they run it equally often.
        """
        return nullcontext(True)

    def snapshot(self) -> Callable[[], None]:
        """Copy all that a step changes; the returned function restores it.

        An optimizer that has not stepped yet gets the state with which its first step would begin.
        """
        self._begin_state()
        rewrite = remember([*self._stepped(), *optimizer_tensors(self.optimizer)])
        scale, rates = replace(self.scale), [group["lr"] for group in self.optimizer.param_groups]

        def restore() -> None:
            rewrite()
            self.scale = replace(scale)
            for group, rate in zip(self.optimizer.param_groups, rates):
                group["lr"] = rate

        return restore

    def part(self, name: str, key: str) -> Part:
        """Return this rank's part of an adapter tensor (`WEIGHT`) or of one of its `state_keys`."""
        whole = self._tensor(name, key).detach()
        return Part(whole.shape, 0, whole.flatten())

    @torch.no_grad()
    def write(self, name: str, key: str, value: Tensor) -> None:
        """Set a whole adapter tensor or one of its `state_keys`. All ranks call it together, with the same value."""
        self._tensor(name, key).copy_(value)

    @property
    def updates(self) -> int:
        """Number of updates so far; 0 if the optimizer does not count them."""
        return updates_of(self.optimizer, self._stepped()[0])

    @updates.setter
    def updates(self, count: int) -> None:
        set_updates_of(self.optimizer, self._stepped(), count)

    def _stepped(self) -> list[Tensor]:
        """Return the tensors that the optimizer has a state of."""
        return [*self._parameters.values()]

    def _begin_state(self) -> None:
        """Create the optimizer's state, if it has not made a step yet."""
        for tensor in self._stepped():
            begun_state(self.optimizer, tensor)

    def _tensor(self, name: str, key: str) -> Tensor:
        parameter = self._parameters[name]
        return parameter if key == WEIGHT else begun_state(self.optimizer, parameter)[key]
