"""Micro-batches under a token budget, and which rank computes which (DESIGN 2.1 and 2.4).

Examples of one micro-batch are padded to the longest, so it *costs* its count times its longest length. Micro-batches
are runs of the examples in descending order of length, which keeps padding low.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from heapq import heapreplace
from itertools import pairwise

from torch import Tensor

from colm_scale.records import Route

MicroBatch = tuple[int, ...]
Shares = tuple[tuple[MicroBatch, ...], ...]


def form_micro_batches(lengths: Tensor, positions: Tensor, token_budget: int) -> tuple[MicroBatch, ...]:
    """The fewest micro-batches that the budget allows, of costs as equal as that number allows.

    Args:
        lengths: ``[n]`` tokens of each candidate.
        positions: ``[s]`` candidates to group.
        token_budget: Largest cost in tokens; a longer example forms a micro-batch of its own.

    Returns:
        Tuples of positions, longest first; a function of the arguments alone.
    """
    tokens = lengths.tolist()
    order = _longest_first(positions.tolist(), tokens)
    return tuple(map(tuple, _group(order, tokens, token_budget, len(_cut(order, tokens, token_budget)))))


def deal(micro_batches: Sequence[MicroBatch], lengths: Tensor, world_size: int) -> Shares:
    """Deal whole micro-batches to ranks: the costliest first, onto the rank with the least so far.

    Returns:
        ``shares[rank]``, ``ceil(M / W)`` micro-batches for each rank, the last ones empty where there are not enough.
    """
    tokens = lengths.tolist()
    most = math.ceil(len(micro_batches) / world_size)
    shares: list[list[MicroBatch]] = [[] for _ in range(world_size)]
    loads: list[tuple[float, int]] = [(0, rank) for rank in range(world_size)]  # a heap: the least loaded comes first
    for micro_batch in sorted(micro_batches, key=lambda members: -_cost(members, tokens)):
        load, rank = loads[0]
        shares[rank].append(micro_batch)
        full = len(shares[rank]) == most
        heapreplace(loads, (math.inf if full else load + _cost(micro_batch, tokens), rank))
    return tuple((*share, *[()] * (most - len(share))) for share in shares)


def route(lengths: Tensor, positions: Tensor, world_size: int, token_budget: int) -> Route:
    """Deal the coreset to ranks, the longest example first onto the rank with the fewest tokens so far.

    Every rank gets as many micro-batches as the budget demands of the neediest. The others form smaller ones, and only
    a rank with fewer examples than that gets empty ones.

    Args:
        lengths: ``[n]`` tokens of each candidate.
        positions: ``[b]`` candidates to train on.
        token_budget: As in `form_micro_batches`.
    """
    tokens = lengths.tolist()
    dealt: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]  # a heap: the least loaded comes first
    for position in _longest_first(positions.tolist(), tokens):
        load, rank = loads[0]
        dealt[rank].append(position)
        heapreplace(loads, (load + tokens[position], rank))
    count = max(len(_cut(order, tokens, token_budget)) for order in dealt)
    shares = [_group(order, tokens, token_budget, count) for order in dealt]
    return Route(
        micro_batches=tuple(tuple(map(tuple, share)) for share in shares),
        tokens=tuple(sum(tokens[position] for position in order) for order in dealt),
        padded_tokens=tuple(sum(_cost(members, tokens) for members in share) for share in shares),
    )


def _longest_first(positions: list[int], tokens: list[int]) -> list[int]:
    return sorted(positions, key=lambda position: -tokens[position])


def _cost(members: Sequence[int], tokens: list[int]) -> int:
    """Padded tokens of a micro-batch whose longest example comes first."""
    return len(members) * tokens[members[0]] if members else 0


def _cut(order: list[int], tokens: list[int], limit: int) -> list[list[int]]:
    """The fewest runs of ``order`` (longest first) that cost at most ``limit`` each, or have one member."""
    runs: list[list[int]] = []
    for position in order:
        if runs and (len(runs[-1]) + 1) * tokens[runs[-1][0]] <= limit:
            runs[-1].append(position)
        else:
            runs.append([position])
    return runs


def _group(order: list[int], tokens: list[int], token_budget: int, count: int) -> list[list[int]]:
    """``count`` runs of ``order``, of costs as equal as can be; ``count`` is at least what the budget demands."""
    # The lowest limit that needs no more than count runs. The number of runs only falls as the limit rises.
    limit = bisect_left(range(token_budget), -count, key=lambda limit: -len(_cut(order, tokens, limit)))
    runs = _cut(order, tokens, limit)
    while len(runs) < min(count, len(order)):
        costliest = max((run for run in runs if len(run) > 1), key=lambda run: _cost(run, tokens))
        at, half = runs.index(costliest), len(costliest) // 2
        runs[at : at + 1] = costliest[:half], costliest[half:]
    # Cutting from the long end leaves the rest to the last run: hand members on while that lowers the larger cost.
    for left, right in reversed(list(pairwise(runs))):
        while len(left) > 1 and _cost([left[-1], *right], tokens) < _cost(left, tokens):
            right.insert(0, left.pop())
    return runs + [[] for _ in range(count - len(runs))]
