"""The coreset of CoLM and of its baselines: pure functions, equal on every rank (docs/method.md, Select)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.records import CandidateMatrix, Quota, Selection
from colm_scale.selection.feedback import NO_FEEDBACK, ErrorFeedback
from colm_scale.selection.quota import reallocate
from colm_scale.selection.ranking.rank import Ranked, rank

Draws = Callable[[int], torch.Generator]
"""Returns the rank-equal generator for the draws of one source."""


def select_coreset(
    matrix: CandidateMatrix,
    sources: Tensor,
    quota: Quota,
    config: SelectionConfig,
    draws: Draws,
    feedback: ErrorFeedback = NO_FEEDBACK,
) -> Selection:
    """Return kept candidates, then the picks of each source in ascending order of source, in the order of picking.

    A source whose quota takes all its candidates enters whole; the others are ranked one by one. Kept candidates have
    no sketch and take no part in the ranking, so a pick may resemble them.

    Candidates with an invalid row are never picked. Their source picks among its others, and the rest of its quota goes
    to other sources (`reallocate`).

    Args:
        sources: ``[n]`` source of each candidate, on the CPU.
        quota: On the CPU.
        config: The ranking, and its metric and weights.
        draws: For a ranking that draws.
        feedback: Errors of earlier steps, for matching to make up for.

    Returns:
        The selection, on the CPU.
    """
    valid, of_row = matrix.valid, sources[matrix.positions]
    available = torch.bincount(of_row[valid], minlength=len(quota.per_source))
    quotas = reallocate(quota.per_source, available)
    whole = (valid & (quotas == available)[of_row]).nonzero().flatten()
    members, contests = [], []
    for source in ((quotas > 0) & (quotas < available)).nonzero().flatten().tolist():
        rows, count = (valid & (of_row == source)).nonzero().flatten(), int(quotas[source])
        represents = len(rows) / count if config.weights == "unbiased" else 1.0
        members.append(rows)
        own, left = matrix.rows[rows], feedback.of(source, matrix.rows.shape[1]) / represents
        contests.append(
            Ranked(own, matrix.losses[rows], count, represents, config, draws(source), left, matrix.device)
        )
    picked, weights = [whole], [torch.ones(len(whole))]
    for rows, (picks, counts) in zip(members, rank(contests)):
        picked.append(rows[picks])
        weights.append(counts.float())
    of_kept = quota.kept_weight if config.weights == "unbiased" else 1.0
    chosen, counted = matrix.positions[torch.cat(picked)], torch.cat(weights)
    by_source = sources[chosen].argsort(stable=True)
    return Selection(
        positions=torch.cat([quota.kept, chosen[by_source]]),
        weights=torch.cat([torch.full((len(quota.kept),), of_kept), counted[by_source]]),
        kept=len(quota.kept),
        overflow=quota.overflow,
        invalid=int((~valid).sum()),
    )


def stratified(sources: Tensor, quota: Quota, generator: torch.Generator, unbiased: bool = False) -> Selection:
    """Return the kept candidates and quotas of CoLM, with a uniform draw within each source.

    Args:
        sources: ``[n]`` source of each candidate.
        generator: Rank-equal.
        unbiased: Weight the picks of a source to represent all its candidates that are not kept, rather than 1 each.
    """
    is_kept = torch.zeros(len(sources), dtype=torch.bool)
    is_kept[quota.kept] = True
    positions, weights = [quota.kept], [torch.full((len(quota.kept),), quota.kept_weight if unbiased else 1.0)]
    for source, count in enumerate(quota.per_source.tolist()):
        # Shuffled even for 0, so that a source's quota changes no other draw.
        shuffled = _shuffled((sources == source).nonzero().flatten(), generator)
        others = shuffled[~is_kept[shuffled]]
        positions.append(others[:count].sort().values)
        weights.append(torch.full((count,), len(others) / count if unbiased and count else 1.0))
    return Selection(torch.cat(positions), torch.cat(weights), kept=len(quota.kept), overflow=quota.overflow)


def random(n: int, budget: int, generator: torch.Generator) -> Selection:
    """Draw ``budget`` of ``n`` candidates uniformly (or all of them if there are fewer)."""
    return _equally_weighted(_shuffled(torch.arange(n), generator)[:budget].sort().values)


def full(n: int) -> Selection:
    """Return all ``n`` candidates."""
    return _equally_weighted(torch.arange(n))


def _shuffled(positions: Tensor, generator: torch.Generator) -> Tensor:
    return positions[torch.randperm(len(positions), generator=generator)]


def _equally_weighted(positions: Tensor) -> Selection:
    return Selection(positions, torch.ones(len(positions)))
