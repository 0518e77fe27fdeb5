"""How many steps a run makes, when it is evaluated, and the learning rate of each step: functions of the options
alone."""

from __future__ import annotations

import math

from colm_scale.config import EvalConfig, RunConfig, TrainConfig

_DEFAULT_STEPS = 80
_DEFAULT_EVALUATIONS = 5
"""Evaluations after the one before the first step."""


def total_steps(config: RunConfig, examples: int) -> int:
    """Optimizer steps of a run; an epoch shows every example once as a candidate."""
    if config.train.epochs is not None:
        return max(1, math.ceil(config.train.epochs * examples / config.selection.candidates))
    return config.train.steps or _DEFAULT_STEPS


def evaluation_period(config: EvalConfig, steps: int) -> int:
    """Steps between evaluations. 0: only before and after."""
    return math.ceil(steps / _DEFAULT_EVALUATIONS) if config.every is None else config.every


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The rate of a step (from 1): linear warm-up to the peak, then cosine or linear to 0, or constant."""
    peak = config.learning_rate
    assert peak is not None  # a run's is resolved
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
