"""Facility location for a source too large to compare every candidate with every other.

The source is cut into groups, each is ranked by greedy on its own, and of the union of the rankings the picks with the
largest gains are taken. That is greedy on the whole, except that a candidate covers only its own group. So how many
picks a group gets follows from how much its candidates differ, and the memory is that of one group's matrices.

A second greedy over the union of the groups' picks (GreeDi, Mirzasoleiman et al. 2013) is made for few picks: each
group hands on as many as are wanted in all, so with half of the source wanted it hands on everything. What costs value
is two candidates that are nearly alike but in different groups, both picked; so groups are regions, made by halving,
and not every g-th candidate. benchmarks/README.md has the measured losses of all three.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colm_scale.config.selection import MOST_COMPARED, Metric
from colm_scale.selection.ranking.facility import greedy, greedy_with_gains
from colm_scale.selection.ranking.similarity import similarities

LARGEST_GROUP = MOST_COMPARED
"""Most rows of a source that are compared all with all; a larger source is cut into regions. The memory grows with the
square: 1 GiB."""
_BLOCK_ROWS = 1024


def partitioned_greedy(rows: Tensor, k: int, metric: Metric, largest: int) -> Tensor:
    """Pick ``k`` of the ``rows`` ``[n, h]``; of equal gains the lowest index wins.

    Args:
        k: At most n.
        largest: Most rows of a group.

    Returns:
        int64 ``[k]`` in descending order of gain, the first pick of every group before all others. With one group the
        picks of `greedy`.
    """
    picks, gains = [], []
    groups = regions(rows, metric, largest)
    for group in groups:
        order, raised = greedy_with_gains(_compared(rows[group], metric), min(k, len(group)))
        raised[:1] = torch.inf  # it counts from a zero that is the group's own
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

    A group that is too large is halved between two rows that lie far apart, by which of them the others are more like.

    Returns:
        Their indices, ascending in each group.
    """
    if len(rows) <= largest:
        return [torch.arange(len(rows), device=rows.device)]

    def likeness(row: int | Tensor) -> Tensor:
        return similarities(rows, metric, rows[row].unsqueeze(0)).flatten()

    like_one = likeness(likeness(0).argmin())
    like_other = likeness(like_one.argmin())
    order = (like_other - like_one).argsort(stable=True)
    halves = [half.sort().values for half in order.tensor_split(2)]
    return [half[group] for half in halves for group in regions(rows[half], metric, largest)]


def cluster_sizes(rows: Tensor, picks: Tensor, metric: Metric) -> Tensor:
    """As `facility.cluster_sizes`, over all of the ``rows``, whatever their groups, and a block of them at a time."""
    picked = rows[picks].double()
    owner = torch.cat([similarities(block.double(), metric, picked).argmax(1) for block in rows.split(_BLOCK_ROWS)])
    owner[picks] = torch.arange(len(picks), device=picks.device)
    return torch.bincount(owner, minlength=len(picks))


def _compared(rows: Tensor, metric: Metric) -> Tensor:
    return similarities(rows.double(), metric)
