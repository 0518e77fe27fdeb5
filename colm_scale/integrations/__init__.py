"""CoLM in training loops that are not colm_scale's: transformers' ``Trainer``, TRL's ``SFTTrainer``, one's own."""

from __future__ import annotations

from colm_scale.config import DataConfig, RunConfig, SelectionConfig, TrainConfig
from colm_scale.integrations.selector import Coreset, CoresetSelector
from colm_scale.integrations.trainer import CoresetTrainerMixin

__all__ = [
    "Coreset",
    "CoresetSelector",
    "CoresetTrainerMixin",
    "DataConfig",
    "RunConfig",
    "SelectionConfig",
    "TrainConfig",
]
