"""A ranking of your own: farthest first.

    colm-scale train --selection.ranking docs/examples/own_ranking.py:farthest_first

Begins with the candidate of the highest loss, and takes the one that is farthest from all that are taken, until the
source's quota is full: a cover of the outskirts, where facility location covers the middle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colm_scale.selection.ranking.rank import Ranked


def farthest_first(ranked: Ranked) -> tuple[Tensor, Tensor | None]:
    """``[k]`` rows of the candidates that are picked; None: each counts for what `--selection.weights` says.

    Ranks of a run must agree, so what is random may come from ``ranked.draw`` only.
    """
    rows = ranked.rows.double()  # [m, h], one for each candidate of the source
    picks = [int(ranked.losses.argmax())]
    nearest = torch.full((len(rows),), torch.inf, dtype=torch.float64, device=rows.device)
    while len(picks) < ranked.count:
        nearest = nearest.minimum((rows - rows[picks[-1]]).norm(dim=1))
        nearest[picks] = -1  # taken, though another may lie in the same place
        picks.append(int(nearest.argmax()))
    return torch.tensor(picks), None
