"""Hashed words, as a user-defined estimator that forwards nothing.

colm-scale train --selection.estimator benchmarks/words.py:words --selection.candidates 256

Its results are in docs/negative_results.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from colm_scale.records import Batch
from colm_scale.sketch.tap import Tap

PLACES = 512
_PRIME = 7919


def words(tap: Tap, batch: Batch) -> Tensor:
    """``[B, 1 + PLACES]``: no loss, then the logarithms of the counts of an example's tokens, hashed, at length 1."""
    tokens = batch.by_example(batch.input_ids.unsqueeze(-1))[..., 0] * _PRIME % PLACES
    counts = [row[:length].bincount(minlength=PLACES) for row, length in zip(tokens, batch.lengths)]
    return F.pad(F.normalize(torch.stack(counts).float().log1p()), (1, 0))
