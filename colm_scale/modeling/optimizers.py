"""The optimizers of ``--train.optimizer``, and their state per parameter.

Weight decay is decoupled in all of them: a parameter shrinks by ``learning rate * weight decay`` of itself.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Muon, Optimizer

from colm_scale.config import OptimizerName, TrainConfig

NEED_WHOLE_MATRICES = ("adafactor", "muon")
"""Optimizers whose update of an entry depends on its whole row and column."""
_LEARNING_RATES: dict[OptimizerName, tuple[float, float]] = {
    "adamw": (1e-2, 2e-4),
    "sgd": (0.5, 1e-2),
    "lion": (2e-3, 4e-5),
    "adafactor": (1e-2, 2e-4),
    "muon": (3e-2, 6e-4),
}
"""For the built-in base, where they were tuned, and for other models, in the same proportion to AdamW's."""


def default_learning_rate(optimizer: OptimizerName, *, builtin: bool) -> float:
    """The default of ``--train.learning_rate``."""
    return _LEARNING_RATES[optimizer][0 if builtin else 1]


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> Optimizer:
    """Make the optimizer of a run. Its learning rate, 0 here, is set at every step.

    Adafactor and Muon are configured so that the learning rate has about the same scale as in AdamW: the root mean
    square of the update is the learning rate times 1 or 0.2, whatever the size of a parameter. (Adafactor's own
    relative step would never move LoRA's B, which starts at zero.)
    """
    parameters, decay = list(parameters), config.weight_decay
    match config.optimizer:
        case "adamw":
            return AdamW(parameters, lr=0.0, betas=config.betas, eps=config.adam_epsilon, weight_decay=decay)
        case "sgd":
            return Sgd(parameters, config.betas[0], decay)
        case "lion":
            return Lion(parameters, config.betas, decay)
        case "adafactor":
            return Adafactor(parameters, lr=0.0, eps=(config.adam_epsilon, 1.0), weight_decay=decay)
        case "muon":
            momentum = config.betas[0]
            return Muon(parameters, lr=0.0, weight_decay=decay, momentum=momentum, adjust_lr_fn="match_rms_adamw")


class Sgd(SGD):
    """SGD with momentum: ``m = b m + g``, ``x -= lr m``."""

    def __init__(self, parameters: list[nn.Parameter], momentum: float, weight_decay: float):
        super().__init__(parameters, lr=0.0, momentum=momentum)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = weight_decay

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            if group["decoupled_weight_decay"]:
                for parameter in group["params"]:
                    parameter.mul_(1 - group["lr"] * group["decoupled_weight_decay"])
        super().step(closure)


class Lion(Optimizer):
    """Chen et al. 2023, algorithm 2: ``x -= lr sign(b1 m + (1 - b1) g)``, then ``m = b2 m + (1 - b2) g``."""

    def __init__(self, parameters: list[nn.Parameter], betas: tuple[float, float], weight_decay: float):
        super().__init__(parameters, {"lr": 0.0, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = begun_state(self, parameter)["exp_avg"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(momentum.lerp(parameter.grad, 1 - beta1).sign_(), alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1 - beta2)


_AVERAGES: dict[type[Optimizer], tuple[str, ...]] = {
    AdamW: ("exp_avg", "exp_avg_sq"),
    Sgd: ("momentum_buffer",),
    Lion: ("exp_avg",),
    Adafactor: ("row_var", "col_var"),
    Muon: ("momentum_buffer",),
}
_COUNTING = (AdamW, Adafactor)


def state_keys(optimizer: Optimizer) -> tuple[str, ...]:
    """Names of the averages that ``optimizer`` stores per parameter."""
    return _AVERAGES[type(optimizer)]


def begun_state(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The state of a parameter in ``optimizer``, initialised if it has none yet.

    It holds the averages and, if the update depends on it, ``step``, the number of updates so far.
    """
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        for key in state_keys(optimizer):
            state[key] = torch.zeros_like(_part(parameter, key), requires_grad=False)
        if isinstance(optimizer, _COUNTING):
            state["step"] = torch.tensor(0.0)
    return state


def _part(parameter: Tensor, key: str) -> Tensor:
    """A part of ``parameter`` with the shape of one of its averages."""
    match key:
        case "row_var":
            return parameter[:, :1]
        case "col_var":
            return parameter[:1]
    return parameter
