"""Micro-batches under a token budget, and which rank computes which (DESIGN 2.1 and 2.4).

What a micro-batch *costs* are the tokens that are computed: if its examples are padded to the longest, their count
times its length, and if they are packed, their own. Padded micro-batches are runs of the examples in descending order
of length, which keeps padding low; packed ones are made as equal as can be.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from heapq import heapify, heapreplace
from itertools import pairwise

from torch import Tensor

from colm_scale.records import Route

MicroBatch = tuple[int, ...]
Shares = tuple[tuple[MicroBatch, ...], ...]

_MOST_EVEN = 8
"""Ranks, at most, among which a number of micro-batches is made to go up evenly."""
REUSED = 0.75
"""Work of a token whose forward is reused: with activation checkpointing any other takes two forwards and a backward of
about two more, and this one saves the first."""
_SWAPS = 4
"""Swaps, at most, for each part that examples are shared out to."""


def form_micro_batches(
    lengths: Tensor, positions: Tensor, token_budget: int, *, packed: bool = False, even: bool = False
) -> tuple[MicroBatch, ...]:
    """The fewest micro-batches that the budget allows, of costs as equal as that number allows.

    Args:
        lengths: ``[n]`` tokens of each candidate.
        positions: ``[s]`` candidates to group.
        token_budget: Largest cost in tokens; a longer example forms a micro-batch of its own.
        packed: Whether examples are packed rather than padded.
        even: A few more where that lets 2, 4 or 8 ranks share them out evenly: 5 become 8, and 9 become 16.

    Returns:
        Tuples of positions, longest first; a function of the arguments alone.
    """
    costs = _Costs(lengths.tolist(), packed)
    order = costs.longest_first(positions.tolist())
    count = costs.fewest(order, token_budget)
    if even and count:
        among = min(_MOST_EVEN, 1 << (count.bit_length() - 1))
        count = min(math.ceil(count / among) * among, len(order))
    return tuple(map(tuple, costs.group(order, token_budget, count)))


def deal(micro_batches: Sequence[MicroBatch], lengths: Tensor, world_size: int, *, packed: bool = False) -> Shares:
    """Deal whole micro-batches to ranks: the costliest first, onto the rank with the least so far.

    Returns:
        ``shares[rank]``, ``ceil(M / W)`` micro-batches for each rank, the last ones empty where there are not enough.
    """
    costs = _Costs(lengths.tolist(), packed)
    most = math.ceil(len(micro_batches) / world_size)
    shares: list[list[MicroBatch]] = [[] for _ in range(world_size)]
    loads: list[tuple[float, int]] = [(0, rank) for rank in range(world_size)]  # a heap: the least loaded comes first
    for micro_batch in sorted(micro_batches, key=lambda members: -costs(members)):
        load, rank = loads[0]
        shares[rank].append(micro_batch)
        full = len(shares[rank]) == most
        heapreplace(loads, (math.inf if full else load + costs(micro_batch), rank))
    return tuple((*share, *[()] * (most - len(share))) for share in shares)


def route(
    lengths: Tensor,
    positions: Tensor,
    world_size: int,
    token_budget: int,
    *,
    packed: bool = False,
    held_on: Tensor | None = None,
    count: int | None = None,
) -> Route:
    """Deal the coreset to ranks, each as much work as can be.

    Every rank gets as many micro-batches as the budget demands of the neediest. The others form smaller ones, and only
    a rank with fewer examples than that gets empty ones.

    Args:
        lengths: ``[n]`` tokens of each candidate.
        positions: ``[b]`` candidates to train on.
        token_budget, packed: As in `form_micro_batches`.
        held_on: ``[n]`` the rank that holds a candidate's block inputs, from which it is trained; -1 where none does.
            Those examples stay where they are, in micro-batches of their own, and the others even the work out.
        count: So many micro-batches for every rank, whatever the budget; not where inputs are held.
    """
    tokens = lengths.tolist()
    costs = _Costs(tokens, packed)
    order = costs.longest_first(positions.tolist())
    at: list[int] = [-1] * len(tokens) if held_on is None else held_on.tolist()
    local = [[position for position in order if at[position] == rank] for rank in range(world_size)]
    saved = [REUSED * sum(tokens[position] for position in of_rank) for of_rank in local]
    dealt = _share_out([position for position in order if at[position] < 0], tokens, world_size, saved)

    def grouped(orders: list[list[int]]) -> list[list[list[int]]]:
        most = count or max(costs.fewest(order, token_budget) for order in orders)
        return [costs.group(order, token_budget, most) for order in orders]

    if count:
        token_budget = len(tokens) * max(tokens)
    reused: list[list[list[int]]] = grouped(local) if any(local) else [[] for _ in local]
    shares = [[*first, *rest] for first, rest in zip(reused, grouped(dealt))]
    own = [[*first, *rest] for first, rest in zip(local, dealt)]
    return Route(
        micro_batches=tuple(tuple(map(tuple, share)) for share in shares),
        reused=len(reused[0]),
        work=tuple(less + sum(tokens[position] for position in rest) for less, rest in zip(saved, dealt)),
        tokens=tuple(sum(tokens[position] for position in order) for order in own),
        padded_tokens=tuple(sum(map(costs, share)) for share in shares),
    )


class _Costs:
    """What micro-batches cost, longest example first, and how an order of examples is cut by it."""

    def __init__(self, tokens: list[int], packed: bool):
        self._tokens, self._packed = tokens, packed

    def __call__(self, members: Sequence[int]) -> int:
        if self._packed:
            return sum(self._tokens[position] for position in members)
        return len(members) * self._tokens[members[0]] if members else 0

    def longest_first(self, positions: list[int]) -> list[int]:
        return sorted(positions, key=lambda position: -self._tokens[position])

    def fewest(self, order: list[int], token_budget: int) -> int:
        """The least number of micro-batches into which `group` can cut ``order`` within the budget."""
        count = len(self.cut(order, token_budget))
        if self._packed:
            while count < len(order) and not self._fit(self.group(order, token_budget, count), token_budget):
                count += 1
        return count

    def _fit(self, groups: list[list[int]], token_budget: int) -> bool:
        return all(len(members) < 2 or self(members) <= token_budget for members in groups)

    def cut(self, order: list[int], limit: int) -> list[list[int]]:
        """The fewest runs of ``order`` that cost at most ``limit`` each, or have one member."""
        runs: list[list[int]] = []
        cost = 0
        for position in order:
            length = self._tokens[position]
            grown = cost + (length if self._packed or not runs else self._tokens[runs[-1][0]])
            if runs and grown <= limit:
                runs[-1].append(position)
                cost = grown
            else:
                runs.append([position])
                cost = length
        return runs

    def group(self, order: list[int], token_budget: int, count: int) -> list[list[int]]:
        """``count`` parts of ``order``, of costs as equal as can be; ``count`` is at least what the budget demands."""
        if self._packed:
            return _share_out(order, self._tokens, count)
        # The lowest limit that needs no more than count runs. The number of runs only falls as the limit rises.
        limit = bisect_left(range(token_budget), -count, key=lambda limit: -len(self.cut(order, limit)))
        runs = self.cut(order, limit)
        while len(runs) < min(count, len(order)):
            costliest = max((run for run in runs if len(run) > 1), key=self)
            at, half = runs.index(costliest), len(costliest) // 2
            runs[at : at + 1] = costliest[:half], costliest[half:]
        # Cutting from the long end leaves the rest to the last run: hand members on while that lowers the larger cost.
        for left, right in reversed(list(pairwise(runs))):
            while len(left) > 1 and self([left[-1], *right]) < self(left):
                right.insert(0, left.pop())
        return runs + [[] for _ in range(count - len(runs))]


def _share_out(
    order: list[int], tokens: list[int], count: int, before: Sequence[float] | None = None
) -> list[list[int]]:
    """``count`` parts of ``order`` with as equal sums of tokens as can be, each longest first, empty ones last.

    ``before`` is what the parts have already.

    The longest first, onto the part with the least so far (Graham 1969); then, for as long as it helps, the fullest and
    the emptiest part swap the two examples that bring them closest.
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    before = before or [0] * count
    heap = [(load, part) for part, load in enumerate(before)]
    heapify(heap)
    for position in order:
        load, part = heap[0]
        parts[part].append(position)
        heapreplace(heap, (load + tokens[position], part))
    loads = [load + sum(tokens[position] for position in part) for load, part in zip(before, parts)]
    for _ in range(_SWAPS * count):
        most, least = loads.index(max(loads)), loads.index(min(loads))
        swap = _best_swap(parts[most], parts[least], tokens, loads[most] - loads[least])
        if swap is None:
            break
        given, taken = swap
        moved = tokens[parts[most][given]] - tokens[parts[least][taken]]
        parts[most][given], parts[least][taken] = parts[least][taken], parts[most][given]
        loads[most], loads[least] = loads[most] - moved, loads[least] + moved
        for changed in (parts[most], parts[least]):
            changed.sort(key=lambda position: -tokens[position])
    return parts


def _best_swap(full: list[int], empty: list[int], tokens: list[int], gap: float) -> tuple[int, int] | None:
    """Which of two parts' examples, both longest first, are to change places to bring sums ``gap`` apart closest."""
    best, found, other = gap, None, 0
    for at, position in enumerate(full):
        # Of the other part, the two next to what would make it even.
        wanted = tokens[position] - gap / 2
        while other < len(empty) and tokens[empty[other]] > wanted:
            other += 1
        for candidate in (other - 1, other):
            if 0 <= candidate < len(empty):
                left = abs(gap - 2 * (tokens[position] - tokens[empty[candidate]]))
                if left < best:
                    best, found = left, (at, candidate)
    return found


def padding_share(lengths: Tensor, shares: Sequence[Sequence[tuple[int, ...]]]) -> float:
    """Share of the tokens of some micro-batches that is padding."""
    groups = [lengths[list(positions)] for share in shares for positions in share if positions]
    padded = sum(len(group) * int(group.max()) for group in groups)
    return 1 - sum(int(group.sum()) for group in groups) / padded if padded else 0.0
