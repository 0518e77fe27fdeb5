"""From the candidate matrix to the coreset: a pure function, the same on every rank (DESIGN 2.3)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from colm_scale.config import Metric
from colm_scale.records import CandidateMatrix, Quota, Selection
from colm_scale.selection import line, partition
from colm_scale.selection.facility import cluster_sizes, greedy
from colm_scale.selection.quota import reallocate
from colm_scale.selection.similarity import similarities


def select_coreset(
    matrix: CandidateMatrix, sources: Tensor, quota: Quota, metric: Metric, weights: Literal["uniform", "cluster"]
) -> Selection:
    """Kept candidates, then the medoids of each source in ascending order of source, each in the order of picking.

    Candidates whose row is not valid are never picked: their source picks among the others, and what it then lacks
    goes to sources that have more (`reallocate`).

    Args:
        matrix: On the device that is to do the work.
        sources: ``[n]`` source of each candidate, on the CPU.
        quota: On the CPU.
        weights: 1 for each, or the number of candidates that a medoid stands for (1 for a kept one).

    Returns:
        The selection, on the CPU.
    """
    valid = matrix.valid.cpu()
    of_row = sources[matrix.positions]
    available = torch.bincount(of_row[valid], minlength=len(quota.per_source))
    positions, counts = [quota.kept], [torch.ones_like(quota.kept)]
    for source, picks in enumerate(reallocate(quota.per_source, available).tolist()):
        if picks:
            rows = (valid & (of_row == source)).nonzero().flatten()
            picked, stands_for = _medoids(matrix.rows[rows.to(matrix.rows.device)], picks, metric, weights == "cluster")
            positions.append(matrix.positions[rows[picked]])
            counts.append(stands_for)
    chosen, count = torch.cat(positions), torch.cat(counts).float()
    return Selection(
        positions=chosen,
        weights=count if weights == "cluster" else torch.ones_like(count),
        kept=len(quota.kept),
        overflow=quota.overflow,
        invalid=int((~valid).sum()),
    )


def _medoids(rows: Tensor, k: int, metric: Metric, counted: bool) -> tuple[Tensor, Tensor]:
    """``[k]`` medoids among ``rows`` ``[n, h]`` and how many rows each stands for, on the CPU; all of them if k = n.

    Counting costs a large source as much as picking, so unless ``counted`` is asked for its counts may be 1.
    """
    if k == len(rows):
        return torch.arange(k), torch.ones(k, dtype=torch.int64)
    if rows.shape[1] == 1 and metric != "cosine" and len(rows) <= line.LARGEST:
        return line.medoids_on_line(rows[:, 0], k)
    if len(rows) > partition.LARGEST:
        picks = partition.partitioned_greedy(rows, k, metric, partition.LARGEST)
        counts = partition.cluster_sizes(rows, picks, metric) if counted else torch.ones_like(picks)
        return picks.cpu(), counts.cpu()
    # Where few directions make the rows, many candidates lie between two others in every column, and medoids tie. In
    # float64 the distances between float32 rows show such ties, instead of deciding them by their own rounding.
    similarity = similarities(rows.double(), metric)
    picks = greedy(similarity, k)
    return picks.cpu(), cluster_sizes(similarity, picks).cpu()
