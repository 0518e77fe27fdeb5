"""Drawn subsets of one source that represent it without bias: every candidate with a known probability."""

from __future__ import annotations

import torch
from torch import Tensor


def systematic(values: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Every n/k-th candidate in the order of ``values`` ``[n]``, from a random start; each enters with probability k/n.

    Args:
        k: At least 1, at most n.
        generator: Rank-equal; draws the start.

    Returns:
        int64 ``[k]`` in ascending order of value; equal values in the order of their index.
    """
    n = len(values)
    start = torch.randint(n, (), generator=generator)  # in steps of 1/k, so that all that follows is whole
    return values.argsort(stable=True)[(start + n * torch.arange(k)) // k]
