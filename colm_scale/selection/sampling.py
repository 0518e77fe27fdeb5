"""Drawn subsets of one source that represent it without bias: every candidate with a known probability."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_SIZE = 0.01


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


def importance(sizes: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Candidates drawn without replacement, each entering with `inclusion` probability (systematic, in random order).

    Args:
        sizes: ``[n]`` not negative.
        k: At least 1, at most n.
        generator: Rank-equal; draws the order and the start.

    Returns:
        int64 ``[k]`` ascending, and float64 ``[k]`` the probability with which each enters.
    """
    probabilities = inclusion(sizes, k)
    certain = probabilities == 1
    order = torch.randperm(len(sizes), generator=generator)
    order = order[~certain[order]]
    start = torch.rand((), generator=generator, dtype=torch.float64)
    drawn = k - int(certain.sum())
    ends = probabilities[order].cumsum(0)  # the last is `drawn`, but for rounding
    at = torch.searchsorted(ends, start + torch.arange(drawn), right=True).clamp(max=len(order) - 1)
    picks = torch.cat([certain.nonzero().flatten(), order[at]]).sort().values
    return picks, probabilities[picks]


def inclusion(sizes: Tensor, k: int) -> Tensor:
    """Probabilities float64 ``[n]`` of sum k, in proportion to size where that is not above 1.

    A size below a hundredth of the mean counts as that: a sketch that says nothing of a candidate must not rule it out,
    and the weight of none is more than a hundred times the average.
    """
    sizes = sizes.double()
    sizes = sizes.clamp(min=_LEAST_SIZE * float(sizes.mean())) if sizes.any() else torch.ones_like(sizes)
    certain = torch.zeros(len(sizes), dtype=torch.bool)
    while True:
        left = k - int(certain.sum())
        share = (sizes * left / sizes[~certain].sum()).masked_fill(certain, 1)
        # Not quite 1 is 1: an interval of that length could be hit twice, or never, by rounding.
        above = ~certain & (share > 1 - 1e-9)
        if not above.any():
            return share
        certain |= above
