"""How alike the candidates of one source are (DESIGN 2.3, step 5).

Everything is built from `torch.cdist` without its matrix product: each pair is computed by itself, so a matrix is
symmetric to the last bit, permuting the rows permutes it, and nothing of size ``n x n x h`` is formed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from colm_scale.config import Metric

_ORDER = {"l1": 1.0, "l2": 2.0}


def distances(rows: Tensor, metric: Metric) -> Tensor:
    """Distances ``[n, n]`` between rows ``[n, h]`` for the metrics that are distances, l1 and l2; the diagonal is 0."""
    return torch.cdist(rows, rows, p=_ORDER[metric], compute_mode="donot_use_mm_for_euclid_dist")


def similarities(rows: Tensor, metric: Metric) -> Tensor:
    """Similarities of the candidates of one source.

    Args:
        rows: ``[n, h]`` float32 or float64.

    Returns:
        ``[n, n]`` of the same type: ``max(D) - D`` for l1 and l2, else the cosine, which is 0 with a row of zeros.
    """
    if metric == "cosine":
        # <a, b> = (|a|^2 + |b|^2 - |a - b|^2) / 2 for units a and b, of squared length 1, or 0 for a row of zeros.
        unit = F.normalize(rows)
        length = unit.square().sum(1).round()
        return (length.unsqueeze(1) + length - distances(unit, "l2").square()) / 2
    apart = distances(rows, metric)
    return apart.max() - apart
