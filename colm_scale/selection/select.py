"""From the candidate matrix to the coreset: a pure function, the same on every rank (DESIGN 2.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.records import CandidateMatrix, Quota, Selection, long_tensor
from colm_scale.selection.quota import reallocate
from colm_scale.selection.ranking import Ranked, rank

Draws = Callable[[int], torch.Generator]
"""Gives the generator for what is drawn of one source; rank-equal."""


def select_coreset(
    matrix: CandidateMatrix, sources: Tensor, quota: Quota, config: SelectionConfig, draws: Draws
) -> Selection:
    """Kept candidates, then the picks of each source in ascending order of source, each in the order of picking.

    A source of which all are picked enters whole. The others are ranked one by one, or with ``config.joint`` all
    together, each filling its quota; where `Quota.free` are picked, all sources count as one. The kept take no part:
    they have no sketch, so a pick may resemble them.

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
    valid, of_row, wanted = matrix.valid.cpu(), sources[matrix.positions], quota.per_source
    if quota.free:
        of_row, wanted = torch.zeros_like(of_row), long_tensor([quota.free])
    available = torch.bincount(of_row[valid], minlength=len(wanted))
    quotas = reallocate(wanted, available)
    ranked = ((quotas > 0) & (quotas < available)).nonzero().flatten()
    whole = (valid & (quotas == available)[of_row]).nonzero().flatten()
    picked, weights = [whole], [torch.ones(len(whole))]
    for together in ranked.split(len(ranked) if config.joint else 1) if len(ranked) else ():
        rows = (valid & torch.isin(of_row, together)).nonzero().flatten()
        groups = torch.searchsorted(together, of_row[rows])
        picks, counts = rank(_ranked(matrix, rows, groups, quotas[together], config, draws(int(together[0]))))
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
    matrix: CandidateMatrix,
    rows: Tensor,
    groups: Tensor,
    quotas: Tensor,
    config: SelectionConfig,
    draw: torch.Generator,
) -> Ranked:
    """Some ``rows`` ``[m]`` of the matrix, ``groups`` ``[m]`` and ``quotas`` ``[G]`` as in `Ranked`."""
    of_matrix = rows.to(matrix.rows.device)
    stands_for = torch.ones(len(quotas), dtype=torch.float64)
    if config.weights == "unbiased":
        stands_for = torch.bincount(groups) / quotas.double()
    return Ranked(matrix.rows[of_matrix], matrix.losses[of_matrix], groups, quotas, stands_for, config, draw)
