"""From the candidate matrix to the coreset: a pure function, the same on every rank (DESIGN 2.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.records import CandidateMatrix, Quota, Selection, long_tensor
from colm_scale.selection import line, partition
from colm_scale.selection.facility import cluster_sizes, greedy
from colm_scale.selection.matching import match_by_pursuit, match_by_swaps
from colm_scale.selection.matroid import greedy_under_quotas
from colm_scale.selection.quota import reallocate
from colm_scale.selection.sampling import importance, systematic
from colm_scale.selection.similarity import similarities

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
        picks, counts = _rank(matrix, rows, groups, quotas[together], config, draws(int(together[0])))
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


def _rank(
    matrix: CandidateMatrix,
    rows: Tensor,
    groups: Tensor,
    quotas: Tensor,
    config: SelectionConfig,
    draw: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """``[k]`` picks among some ``rows`` ``[m]`` of the matrix, and ``[k]`` what each counts for, on the CPU.

    Args:
        groups: ``[m]`` 0..G-1.
        quotas: ``[G]`` how many of each group: at least one, and fewer than it has.
    """
    of_matrix = rows.to(matrix.rows.device)
    sketches, k = matrix.rows[of_matrix], int(quotas.sum())
    stands_for = torch.ones(len(quotas), dtype=torch.float64)
    if config.weights == "unbiased":
        stands_for = torch.bincount(groups) / quotas.double()
    match config.ranking:
        case "facility":
            picks, sizes = _medoids(sketches, groups, quotas, config)
            if config.weights == "cluster":
                return picks, sizes
        case "matching":
            picks = match_by_swaps(sketches, groups, quotas, stands_for)
        case "pursuit":
            picks, coefficients = match_by_pursuit(sketches, groups, quotas, stands_for)
            if config.weights == "unbiased":
                return picks, coefficients * (len(rows) / k)
        case "systematic":
            picks = systematic(along_the_mean(sketches), k, draw)
        case "importance":
            picks, probabilities = importance(sketches.double().norm(dim=1).cpu(), k, draw)
            if config.weights == "unbiased":
                return picks, 1 / probabilities
        case "top":
            picks = matrix.losses[of_matrix].cpu().argsort(descending=True, stable=True)[:k]
    return picks, stands_for[groups[picks]]


def along_the_mean(rows: Tensor) -> Tensor:
    """``[m]`` one number for each of the ``rows`` ``[m, h]``: its product with their mean, or its only entry."""
    rows = rows.double().cpu()
    return rows.flatten() if rows.shape[1] == 1 else (rows * rows.mean(0)).sum(1)


def _medoids(rows: Tensor, groups: Tensor, quotas: Tensor, config: SelectionConfig) -> tuple[Tensor, Tensor]:
    """``[k]`` medoids among ``rows`` ``[m, h]`` and how many rows each stands for, on the CPU.

    Counting costs a large source as much as picking, so where weights do not count its counts may be 1.
    """
    k, alone, metric = int(quotas.sum()), len(quotas) == 1, config.metric
    if alone and rows.shape[1] == 1 and metric != "cosine":
        return line.medoids_on_line(rows[:, 0], k)
    if alone and len(rows) > config.largest_group:
        picks = partition.partitioned_greedy(rows, k, metric, config.largest_group)
        counted = config.weights == "cluster"
        counts = partition.cluster_sizes(rows, picks, metric) if counted else torch.ones_like(picks)
        return picks.cpu(), counts.cpu()
    # Where few directions make the rows, many candidates lie between two others in every column, and medoids tie. In
    # float64 the distances between float32 rows show such ties, instead of deciding them by their own rounding.
    similarity = similarities(rows.double(), metric)
    picks = greedy(similarity, k) if alone else greedy_under_quotas(similarity, groups, quotas)
    return picks.cpu(), cluster_sizes(similarity, picks.to(similarity.device)).cpu()
