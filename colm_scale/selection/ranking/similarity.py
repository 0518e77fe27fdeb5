"""Similarities between the candidates of one source (docs/method.md, Select).

Everything is built from `torch.cdist` without its matrix product: each pair is computed separately, so a matrix is
symmetric to the last bit, permuting the rows permutes it, and nothing of size ``n x n x h`` is formed. The matrix of a
large source takes much of a GiB and most of the time, so it is changed in place, and one half mirrors the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from colm_scale.config.selection import Metric

_ORDER = {"l1": 1.0, "l2": 2.0}
_BLOCK_ROWS = 1024


def distances(rows: Tensor, metric: Metric) -> Tensor:
    """Compute l1 or l2 distances ``[n, n]`` between rows ``[n, h]``; the diagonal is 0."""
    apart = rows.new_empty(len(rows), len(rows))
    for start in range(0, len(rows), _BLOCK_ROWS):
        block, rest = slice(start, start + _BLOCK_ROWS), slice(start, None)
        found = _between(rows[block], rows[rest], metric)
        apart[block, rest], apart[rest, block] = found, found.T
    return apart


def similarities(rows: Tensor, metric: Metric) -> Tensor:
    """Compare the candidates of one source with each other.

    Args:
        rows: ``[n, h]`` float32 or float64.

    Returns:
        ``[n, n]`` of the same type: ``max(D) - D`` for l1 and l2, else the cosine, which is 0 with a row of zeros.
    """
    if metric == "cosine":
        unit = F.normalize(rows)
        return _cosines(unit, unit, distances(unit, "l2"))
    return _below_largest(distances(rows, metric))


def similarities_to(rows: Tensor, others: Tensor, metric: Metric) -> Tensor:
    """Compare rows ``[n, h]`` with ``others`` ``[m, h]`` as `similarities` does: ``[n, m]``."""
    if metric == "cosine":
        unit, unit_others = F.normalize(rows), F.normalize(others)
        return _cosines(unit, unit_others, _between(unit, unit_others, "l2"))
    return _below_largest(_between(rows, others, metric))


def nearest(rows: Tensor, others: Tensor, metric: Metric) -> Tensor:
    """Compute the distance ``[n]`` of each of the ``rows`` ``[n, h]`` to the nearest of ``others`` ``[m, h]``, m >= 1.

    The cosine distance is 1 minus the cosine.
    """
    blocks = rows.split(_BLOCK_ROWS)
    if metric == "cosine":
        return torch.cat([(1 - similarities_to(block, others, metric)).amin(1) for block in blocks])
    return torch.cat([_between(block, others, metric).amin(1) for block in blocks])


def _between(rows: Tensor, others: Tensor, metric: Metric) -> Tensor:
    return torch.cdist(rows, others, p=_ORDER[metric], compute_mode="donot_use_mm_for_euclid_dist")


def _cosines(unit: Tensor, others: Tensor, apart: Tensor) -> Tensor:
    """Cosines from the L2 distances between units, overwriting them.

    ``<a, b> = (|a|^2 + |b|^2 - |a - b|^2) / 2``; a unit has squared length 1, or 0 for a row of zeros.
    """
    length, length_others = (of.square().sum(1).round() for of in (unit, others))
    return (length.unsqueeze(1) + length_others).sub_(apart.square_()).div_(2)


def _below_largest(apart: Tensor) -> Tensor:
    largest = apart.max()
    return apart.neg_().add_(largest)
