"""How alike the candidates of one source are (DESIGN 2.3, step 5).

Everything is built from `torch.cdist` without its matrix product: each pair is computed by itself, so a matrix is
symmetric to the last bit, permuting the rows permutes it, and nothing of size ``n x n x h`` is formed. A matrix of a
large source takes a good part of a GiB and most of the time, so it is changed in place, and one half mirrors the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from colm_scale.config.selection import Metric

_ORDER = {"l1": 1.0, "l2": 2.0}
_BLOCK_ROWS = 1024


def distances(rows: Tensor, metric: Metric) -> Tensor:
    """Distances ``[n, n]`` between rows ``[n, h]`` for the metrics that are distances, l1 and l2; the diagonal is 0."""
    apart = rows.new_empty(len(rows), len(rows))
    for start in range(0, len(rows), _BLOCK_ROWS):
        block, rest = slice(start, start + _BLOCK_ROWS), slice(start, None)
        found = _between(rows[block], rows[rest], metric)
        apart[block, rest], apart[rest, block] = found, found.T
    return apart


def similarities(rows: Tensor, metric: Metric, others: Tensor | None = None) -> Tensor:
    """Similarities of the candidates of one source.

    Args:
        rows: ``[n, h]`` float32 or float64.
        others: ``[m, h]`` what they are compared with; each other by default.

    Returns:
        ``[n, m]`` of the same type: ``max(D) - D`` for l1 and l2, else the cosine, which is 0 with a row of zeros.
    """
    if metric == "cosine":
        # <a, b> = (|a|^2 + |b|^2 - |a - b|^2) / 2 for units a and b, of squared length 1, or 0 for a row of zeros.
        unit = F.normalize(rows)
        unit_others = unit if others is None else F.normalize(others)
        length, length_others = (of.square().sum(1).round() for of in (unit, unit_others))
        apart = distances(unit, "l2") if others is None else _between(unit, unit_others, "l2")
        return (length.unsqueeze(1) + length_others).sub_(apart.square_()).div_(2)
    apart = distances(rows, metric) if others is None else _between(rows, others, metric)
    largest = apart.max()
    return apart.neg_().add_(largest)


def nearest(rows: Tensor, others: Tensor, metric: Metric) -> Tensor:
    """``[n]`` how far each of the ``rows`` ``[n, h]`` is from the nearest of ``others`` ``[m, h]``, m at least 1.

    By the cosine, that is 1 minus it.
    """
    blocks = rows.split(_BLOCK_ROWS)
    if metric == "cosine":
        return torch.cat([(1 - similarities(block, metric, others)).amin(1) for block in blocks])
    return torch.cat([_between(block, others, metric).amin(1) for block in blocks])


def _between(rows: Tensor, others: Tensor, metric: Metric) -> Tensor:
    return torch.cdist(rows, others, p=_ORDER[metric], compute_mode="donot_use_mm_for_euclid_dist")
