"""What the selection has to beat: the same composition without ranking, a uniform subset, and everything."""

from __future__ import annotations

import torch
from torch import Tensor

from colm_scale.records import Quota, Selection


def stratified(sources: Tensor, quota: Quota, generator: torch.Generator, unbiased: bool = False) -> Selection:
    """The kept candidates and quotas of CoLM, but a uniform draw within each source.

    Args:
        sources: ``[n]`` source of each candidate.
        generator: Rank-equal.
        unbiased: Let the picks of a source count for all its candidates that are not kept, rather than 1 each.
    """
    positions, weights = [quota.kept], [torch.full((len(quota.kept),), quota.kept_weight if unbiased else 1.0)]
    for source, count in enumerate(quota.per_source.tolist()):
        # Shuffled even for 0, so that a source's quota moves no other draw.
        shuffled = _shuffled((sources == source).nonzero().flatten(), generator)
        others = shuffled[~torch.isin(shuffled, quota.kept)]
        positions.append(others[:count].sort().values)
        weights.append(torch.full((count,), len(others) / count if unbiased and count else 1.0))
    return Selection(torch.cat(positions), torch.cat(weights), kept=len(quota.kept), overflow=quota.overflow)


def random(n: int, budget: int, generator: torch.Generator) -> Selection:
    """``budget`` of ``n`` candidates, uniformly (all of them if that is fewer)."""
    return _equally_weighted(_shuffled(torch.arange(n), generator)[:budget].sort().values)


def full(n: int) -> Selection:
    """All ``n`` candidates."""
    return _equally_weighted(torch.arange(n))


def _shuffled(positions: Tensor, generator: torch.Generator) -> Tensor:
    return positions[torch.randperm(len(positions), generator=generator)]


def _equally_weighted(positions: Tensor) -> Selection:
    return Selection(positions, torch.ones(len(positions)))
