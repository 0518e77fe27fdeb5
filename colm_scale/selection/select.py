"""From the candidate matrix to the coreset: a pure function, the same on every rank (DESIGN 2.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.records import CandidateMatrix, Quota, Selection
from colm_scale.selection.quota import reallocate
from colm_scale.selection.ranking.rank import Ranked, rank

Draws = Callable[[int], torch.Generator]
"""Gives the generator for what is drawn of one source; rank-equal."""


def select_coreset(
    matrix: CandidateMatrix, sources: Tensor, quota: Quota, config: SelectionConfig, draws: Draws
) -> Selection:
    """Kept candidates, then the picks of each source in ascending order of source, each in the order of picking.

    A source of which all are picked enters whole; the others are ranked one by one. The kept take no part: they have no
    sketch, so a pick may resemble them.

    Candidates whose row is not valid are never picked: their source picks among the others, and what it then lacks
    goes to sources that have more (`reallocate`).

    Args:
        matrix: On the device that is to do the work.
        sources: ``[n]`` source of each candidate, on the CPU.
        quota: On the CPU.
        config: The ranking, and its metric and weights.
        draws: Where the ranking is a draw.

    Returns:
        The selection, on the CPU.
    """
    valid, of_row = matrix.valid.cpu(), sources[matrix.positions]
    available = torch.bincount(of_row[valid], minlength=len(quota.per_source))
    quotas = reallocate(quota.per_source, available)
    whole = (valid & (quotas == available)[of_row]).nonzero().flatten()
    picked, weights = [whole], [torch.ones(len(whole))]
    for source in ((quotas > 0) & (quotas < available)).nonzero().flatten().tolist():
        rows = (valid & (of_row == source)).nonzero().flatten()
        picks, counts = rank(_ranked(matrix, rows, int(quotas[source]), config, draws(source)))
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


def _ranked(
    matrix: CandidateMatrix, rows: Tensor, count: int, config: SelectionConfig, draw: torch.Generator
) -> Ranked:
    """``count`` of some ``rows`` ``[m]`` of the matrix are to be picked."""
    of_matrix = rows.to(matrix.rows.device)
    stands_for = len(rows) / count if config.weights == "unbiased" else 1.0
    return Ranked(matrix.rows[of_matrix], matrix.losses[of_matrix], count, stands_for, config, draw)
