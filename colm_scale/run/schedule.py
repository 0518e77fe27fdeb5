"""The number of steps, the evaluation period and the learning rate, as functions of the options."""

from __future__ import annotations

import math

from colm_scale.config import EvalConfig, RunConfig, TrainConfig

_DEFAULT_STEPS = 80
_DEFAULT_EVALUATIONS = 5
"""Not counting the one before the first step."""


def total_steps(config: RunConfig, examples: int) -> int:
    """Return the optimizer steps of a run; in an epoch every example is a candidate once."""
    if config.train.epochs:
        return max(1, math.ceil(config.train.epochs * examples / config.selection.candidates))
    return config.train.steps or _DEFAULT_STEPS


def evaluation_period(config: EvalConfig, steps: int) -> int:
    """Return the steps between evaluations; 0: only before and after."""
    return math.ceil(steps / _DEFAULT_EVALUATIONS) if config.every is None else config.every


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the rate of a step (from 1): linear warm-up to the peak, then cosine or linear to 0, or constant."""
    peak = config.learning_rate
    assert peak is not None  # `resolve` fills in the default
    warmup = math.ceil(config.warmup_ratio * steps)
    if step <= warmup:
        return peak * step / warmup
    done = (step - 1 - warmup) / max(1, steps - warmup)
    match config.schedule:
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * done))
        case "linear":
            return peak * (1 - done)
        case "constant":
            return peak
