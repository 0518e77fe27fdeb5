"""CoLM in other training loops: transformers' ``Trainer``, TRL's ``SFTTrainer``, or your own."""

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
