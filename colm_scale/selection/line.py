"""Facility location on the line, solved exactly (DESIGN 2.2): what one probe per candidate amounts to.

On the line the candidates that a medoid stands for lie side by side, so the best ``k`` medoids are the best cut of the
sorted candidates into ``k`` segments, each stood for by its middle.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 512
"""Most candidates of a source that are cut exactly; the time grows with n^2 k, to a good part of a second here."""


def medoids_on_line(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` candidates with the smallest sum of distances from each candidate to the nearest of them.

    Of the two middles of a segment of even length the lower value is taken, and of equally good cuts the one whose last
    segment is longest.

    Args:
        values: ``[n]`` finite, n at least k.

    Returns:
        int64 ``[k]`` picks, in ascending order of value, and ``[k]`` how many candidates each stands for.
    """
    x, order = values.double().cpu().sort(stable=True)
    n = len(x)
    costs = _segment_costs(x)
    best, cuts = costs[:, 0], []
    for _ in range(k - 1):
        # One more segment, which begins at i: the candidates before it are cut as well as they can be.
        best, cut = (costs[:, 1:] + best[:-1]).min(1)
        cuts.append(cut + 1)
    ends = [n]
    for cut in reversed(cuts):
        ends.append(int(cut[ends[-1] - 1]))
    edges = torch.tensor([0, *reversed(ends)])
    return order[(edges[:-1] + edges[1:] - 1) // 2], edges.diff()


def _segment_costs(x: Tensor) -> Tensor:
    """``[n, n]``: at ``j, i`` the sum of distances to the middle of the sorted ``x[i..j]``, infinite for j < i."""
    n = len(x)
    before = torch.cat([x.new_zeros(1), x.cumsum(0)])
    i, j = torch.arange(n), torch.arange(n).unsqueeze(1)
    middle = (i + j) // 2
    left = x[middle] * (middle - i + 1) - (before[middle + 1] - before[i])
    right = before[j + 1] - before[middle + 1] - x[middle] * (j - middle)
    return (left + right).masked_fill(j < i, torch.inf)
