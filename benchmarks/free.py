"""Choices without a forward of the candidates, as user-defined functions: hashed words, and losses of earlier epochs.

colm-scale train --selection.estimator benchmarks/free.py:words --selection.candidates 256
colm-scale train --selection.compression countsketch --selection.reuse 1000 \\
    --selection.ranking benchmarks/free.py:infobatch

Their results are in docs/negative_results.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rankings import drawn_by_size
from torch import Tensor

from colm_scale.records import Batch
from colm_scale.selection.ranking.rank import Ranked
from colm_scale.sketch.tap import Tap

PLACES = 512
_PRIME = 7919


def words(tap: Tap, batch: Batch) -> Tensor:
    """``[B, 1 + PLACES]``: no loss, then the logarithms of the counts of an example's tokens, hashed, at length 1."""
    tokens = batch.by_example(batch.input_ids.unsqueeze(-1))[..., 0] * _PRIME % PLACES
    counts = [row[:length].bincount(minlength=PLACES) for row, length in zip(tokens, batch.lengths)]
    return F.pad(F.normalize(torch.stack(counts).float().log1p()), (1, 0))


def infobatch(ranked: Ranked) -> tuple[Tensor, Tensor]:
    """Draw losses below the source's mean half as often, and weight them twice (InfoBatch, Qin et al. 2024).

    The weights of a source's picks are 1 on average, as in every other ranking, so that only the draw differs.
    """
    losses = ranked.losses.cpu()
    sizes = torch.where(losses < losses.mean(), 0.5, 1.0)
    picks, probabilities = drawn_by_size(sizes, ranked.count, ranked.draw)
    return picks, ranked.count / len(losses) / probabilities
