"""What the selection has to beat: the same composition without ranking, a uniform subset, and everything."""

from __future__ import annotations

import torch
from torch import Tensor

from colm_scale.records import Quota, Selection


def stratified(sources: Tensor, quota: Quota, generator: torch.Generator) -> Selection:
    """The kept candidates and quotas of CoLM, but a uniform draw within each source.

    Args:
        sources: ``[n]`` source of each candidate.
        generator: Rank-equal.
    """
    positions = [quota.kept]
    for source, count in enumerate(quota.per_source.tolist()):
        positions.append(_draw((sources == source).nonzero().flatten(), count, generator))
    return _equally_weighted(torch.cat(positions), kept=len(quota.kept), overflow=quota.overflow)


def random(n: int, budget: int, generator: torch.Generator) -> Selection:
    """``budget`` of ``n`` candidates, uniformly (all of them if that is fewer)."""
    return _equally_weighted(_draw(torch.arange(n), budget, generator))


def full(n: int) -> Selection:
    """All ``n`` candidates."""
    return _equally_weighted(torch.arange(n))


def _draw(positions: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` of ``positions`` in ascending order. Draws even for 0, so that a source's quota moves no other draw."""
    return positions[torch.randperm(len(positions), generator=generator)[:count]].sort().values


def _equally_weighted(positions: Tensor, kept: int = 0, overflow: int = 0) -> Selection:
    return Selection(positions, torch.ones(len(positions)), kept=kept, overflow=overflow)
