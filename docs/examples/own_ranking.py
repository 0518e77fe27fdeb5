"""A ranking of your own: farthest first.

    colm-scale train --selection.ranking docs/examples/own_ranking.py:farthest_first

Starts with the candidate of highest loss, and repeatedly picks the one farthest from all picked ones until the source's
quota is full. This covers the outskirts of a source; facility location covers its middle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colm_scale.selection.ranking.rank import Ranked


def farthest_first(ranked: Ranked) -> tuple[Tensor, Tensor | None]:
    """``[k]`` rows of the picked candidates, and their weights; None: those of `--selection.weights`.

    The result must be equal on every rank, so draw random numbers from ``ranked.draw`` only.
    """
    rows = ranked.rows.double()  # [m, h], one per candidate of the source
    picks = [int(ranked.losses.argmax())]
    nearest = torch.full((len(rows),), torch.inf, dtype=torch.float64, device=rows.device)
    while len(picks) < ranked.count:
        nearest = nearest.minimum((rows - rows[picks[-1]]).norm(dim=1))
        nearest[picks] = -1  # picked, even if another candidate has the same row
        picks.append(int(nearest.argmax()))
    return torch.tensor(picks), None
