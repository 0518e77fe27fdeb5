"""Facility location for a source too large to compare all its candidates in pairs.

The source is cut into groups, greedy ranks each group, and the picks with the largest gains over all groups are taken.
This equals greedy on the whole source, except that a candidate covers only its own group. A group whose candidates
differ more gets more picks, and the memory is that of one group's matrices.

The usual second greedy over the union of the groups' picks (GreeDi, Mirzasoleiman et al. 2013) suits few picks: each
group passes on the full number of picks, which is everything if half of the source is picked. The value lost here comes
from similar candidates picked in different groups, so groups are regions, made by halving, rather than every g-th
candidate. benchmarks/README.md has the measured losses of all three.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colm_scale.config.selection import Metric
from colm_scale.selection.ranking.facility import greedy, greedy_with_gains
from colm_scale.selection.ranking.similarity import similarities, similarities_to

LARGEST_GROUP = 8192
"""Most rows of a source that are compared in pairs (the two float64 matrices take 1 GiB); a larger source is cut into
regions."""
_BLOCK_ROWS = 1024


def partitioned_greedy(rows: Tensor, k: int, metric: Metric, largest: int) -> Tensor:
    """Pick ``k`` of the ``rows`` ``[n, h]``; the lowest index wins ties of gain.

    Args:
        k: At most n.
        largest: Most rows of a group.

    Returns:
        int64 ``[k]`` in descending order of gain, the first pick of every group before all others. With one group, the
        picks of `greedy`.
    """
    picks, gains = [], []
    groups = regions(rows, metric, largest)
    for group in groups:
        order, raised = greedy_with_gains(_compared(rows[group], metric), min(k, len(group)))
        raised[:1] = torch.inf  # measured from the group's own zero
        picks.append(group[order])
        gains.append(raised)
    union, gain = torch.cat(picks), torch.cat(gains)
    by_index = union.argsort()
    union = union[by_index][gain[by_index].argsort(descending=True, stable=True)]
    if len(groups) <= k:
        return union[:k]
    firsts = union[: len(groups)]
    return firsts[greedy(_compared(rows[firsts], metric), k)]


def regions(rows: Tensor, metric: Metric, largest: int) -> list[Tensor]:
    """Cut ``rows`` ``[n, h]`` into groups of neighbours, of at most ``largest``.

    A group that is too large is halved between two distant rows, by similarity to one or the other.

    Returns:
        The indices of each group, ascending.
    """
    if len(rows) <= largest:
        return [torch.arange(len(rows), device=rows.device)]

    def likeness(row: int | Tensor) -> Tensor:
        return similarities_to(rows, rows[row].unsqueeze(0), metric).flatten()

    like_one = likeness(likeness(0).argmin())
    like_other = likeness(like_one.argmin())
    order = (like_other - like_one).argsort(stable=True)
    halves = [half.sort().values for half in order.tensor_split(2)]
    return [half[group] for half in halves for group in regions(rows[half], metric, largest)]


def cluster_sizes(rows: Tensor, picks: Tensor, metric: Metric) -> Tensor:
    """Count as `facility.cluster_sizes` does, over all groups, a block of ``rows`` at a time."""
    picked = rows[picks].double()
    owner = torch.cat([similarities_to(block.double(), picked, metric).argmax(1) for block in rows.split(_BLOCK_ROWS)])
    owner[picks] = torch.arange(len(picks), device=picks.device)
    return torch.bincount(owner, minlength=len(picks))


def _compared(rows: Tensor, metric: Metric) -> Tensor:
    return similarities(rows.double(), metric)
