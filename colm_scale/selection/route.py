"""Micro-batches under a token budget, and their assignment to ranks (docs/method.md, Route and train).

The *cost* of a micro-batch is its number of computed tokens: count times longest length if padded, the sum of lengths
if packed. Padded micro-batches are runs of the examples in descending order of length, which keeps padding low; packed
ones are balanced.

Every rank computes the whole assignment, so it must be quick with many of them. For n examples, W parts (ranks, or
packed micro-batches), M padded micro-batches and at most T tokens in one:

- A padded run that starts with length l and may cost c holds c // l examples, so cutting examples sorted by length
  jumps from run to run: O(M). The search for the best limit repeats that up to log T times.
- Parts are filled by whole rounds. Sorted by load, they take one example each, up to the first that is not the least
  loaded any more when its turn comes; then they are sorted again. That is what one example at a time gives, in
  O(n log W), and about n / W rounds of array operations.
- The fullest and the emptiest part come from heaps: O(log W) for each of up to 4 W swaps.
- The ranks' shares are cut like the whole, O(n) for all together.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from itertools import accumulate, chain, pairwise
from operator import add

import numpy as np
import torch
from torch import Tensor

from colm_scale.records import Route, Shares, long_tensor

MicroBatch = tuple[int, ...]

_MOST_EVEN = 8
"""Most ranks among which the number of micro-batches is made to divide evenly."""
REUSED = 0.75
"""Work of a token with a reused forward, relative to any other: with activation checkpointing that takes two forwards
and a backward of about two more, and reuse saves the first."""
_SWAPS = 4
"""Most swaps per part when balancing."""


def form_micro_batches(
    lengths: Tensor, positions: Tensor, token_budget: int, *, packed: bool = False, even: bool = False
) -> tuple[MicroBatch, ...]:
    """Form the fewest micro-batches that the budget allows, with balanced costs.

    Args:
        lengths: ``[n]`` tokens of each candidate, at least 1.
        positions: ``[s]`` candidates to group.
        token_budget: Largest cost in tokens; a longer example forms a micro-batch alone.
        packed: Whether examples are packed rather than padded.
        even: Form a few more if 2, 4 or 8 ranks can then share them evenly: 5 become 8, and 9 become 16.

    Returns:
        Tuples of positions, longest first.
    """
    costs = _Costs(lengths, packed)
    order = longest_first(lengths, positions).tolist()
    count = costs.fewest(order, token_budget)
    if even and count:
        among = min(_MOST_EVEN, 1 << (count.bit_length() - 1))
        count = min(math.ceil(count / among) * among, len(order))
    return tuple(map(tuple, costs.group(order, token_budget, count)))


def deal(micro_batches: Sequence[MicroBatch], lengths: Tensor, world_size: int, *, packed: bool = False) -> Shares:
    """Deal whole micro-batches to ranks: the costliest first, each to the rank with the least work so far.

    Returns:
        ``shares[rank]``, ``ceil(M / W)`` micro-batches for each rank, the last ones empty if there are not enough.
    """
    costs = _Costs(lengths, packed)
    most = math.ceil(len(micro_batches) / world_size)
    shares: list[list[MicroBatch]] = [[] for _ in range(world_size)]
    loads: list[tuple[float, int]] = [(0, rank) for rank in range(world_size)]  # a heap: the least loaded first
    of_all = [*map(costs, micro_batches)]
    for number in sorted(range(len(of_all)), key=of_all.__getitem__, reverse=True):
        load, rank = loads[0]
        shares[rank].append(micro_batches[number])
        full = len(shares[rank]) == most
        heapreplace(loads, (math.inf if full else load + of_all[number], rank))
    return tuple((*share, *[()] * (most - len(share))) for share in shares)


def route(
    lengths: Tensor,
    positions: Tensor,
    world_size: int,
    token_budget: int,
    *,
    packed: bool = False,
    held_on: Tensor | None = None,
) -> Route:
    """Deal the coreset to ranks with balanced work.

    Every rank gets the number of micro-batches that the budget demands of the neediest rank; the others form smaller
    ones. Only a rank with fewer examples than that gets empty ones.

    Args:
        lengths: ``[n]`` tokens of each candidate.
        positions: ``[b]`` candidates to train on.
        token_budget, packed: As in `form_micro_batches`.
        held_on: ``[n]`` rank that holds the block inputs of a candidate, -1 if none does. Held candidates stay on their
            rank, in separate micro-batches, and the others balance the work.
    """
    costs, order = _Costs(lengths, packed), longest_first(lengths, positions)
    held: list[list[int]] = [[] for _ in range(world_size)]
    free = order
    if held_on is not None:
        owner = held_on[order]
        by_owner, free = order[owner.argsort(stable=True)], order[owner < 0]
        counts = torch.bincount(owner + 1, minlength=world_size + 1).tolist()
        held = [part.tolist() for part in by_owner.split(counts)[1:]]

    def grouped(orders: list[list[int]]) -> list[list[list[int]]]:
        count = max(costs.fewest(order, token_budget) for order in orders)
        return [costs.group(order, token_budget, count) for order in orders]

    return _routed(costs, held, free.tolist(), grouped)


def route_evenly(
    lengths: Tensor, positions: Tensor, world_size: int, count: int, *, packed: bool = False
) -> Route:
    """Deal the coreset to ranks as `route` does, but in ``count`` micro-batches per rank, regardless of their cost."""
    costs = _Costs(lengths, packed)
    most = len(lengths) * int(lengths.max())

    def grouped(orders: list[list[int]]) -> list[list[list[int]]]:
        return [costs.group(order, most, count) for order in orders]

    free = longest_first(lengths, positions).tolist()
    return _routed(costs, [[] for _ in range(world_size)], free, grouped)


def _routed(
    costs: _Costs, held: list[list[int]], free: list[int], grouped: Callable[[list[list[int]]], list[list[list[int]]]]
) -> Route:
    """Route candidates that are ``held`` by a rank, and deal out the ``free`` ones.

    Args:
        grouped: Cuts the candidates of each rank into micro-batches, the same number for all.
    """
    of_held = [*map(costs.tokens_of, held)]
    saved = [REUSED * tokens for tokens in of_held]
    dealt = _share_out(free, costs.tokens, saved)
    of_dealt = [*map(costs.tokens_of, dealt)]
    reused: list[list[list[int]]] = grouped(held) if any(held) else [[] for _ in held]
    shares = [[*first, *rest] for first, rest in zip(reused, grouped(dealt))]
    return Route(
        micro_batches=tuple(tuple(map(tuple, share)) for share in shares),
        reused=len(reused[0]),
        work=tuple(map(add, saved, of_dealt)),
        tokens=tuple(map(add, of_held, of_dealt)),
        padded_tokens=tuple(sum(map(costs, share)) for share in shares),
    )


class _Costs:
    """Costs of micro-batches whose longest example comes first, and cuts of an order of examples by cost."""

    def __init__(self, lengths: Tensor, packed: bool):
        self.tokens: list[int] = lengths.tolist()
        self._packed = packed

    def __call__(self, members: Sequence[int]) -> int:
        if self._packed:
            return self.tokens_of(members)
        return len(members) * self.tokens[members[0]] if members else 0

    def tokens_of(self, members: Iterable[int]) -> int:
        return sum(map(self.tokens.__getitem__, members))

    def fewest(self, order: list[int], token_budget: int) -> int:
        """Find the least number of micro-batches into which `group` can cut ``order`` within the budget."""
        if self(order) <= token_budget:
            return min(1, len(order))
        if not self._packed:
            return _padded_runs(self._lengths(order), token_budget)
        sums = [0, *accumulate(self._lengths(order))]
        count = at = 0
        while at < len(order):
            at, count = max(at + 1, bisect_right(sums, sums[at] + token_budget) - 1), count + 1
        while count < len(order):
            groups = _share_out(order, self.tokens, [0] * count, enough=token_budget)
            if all(len(members) < 2 or self(members) <= token_budget for members in groups):
                break
            count += 1
        return count

    def group(self, order: list[int], token_budget: int, count: int) -> list[list[int]]:
        """Cut ``order`` into ``count`` parts with balanced costs; ``count`` is at least what the budget demands."""
        if len(order) <= count:
            return [[position] for position in order] + [[] for _ in range(count - len(order))]
        if count == 1:
            return [order]
        if self._packed:
            return _share_out(order, self.tokens, [0] * count)
        bounds = _balanced_bounds(self._lengths(order), token_budget, count)
        return [order[start:end] for start, end in pairwise(bounds)] + [[] for _ in range(count + 1 - len(bounds))]

    def _lengths(self, order: list[int]) -> list[int]:
        return [self.tokens[position] for position in order]


def _padded_runs(lengths: list[int], limit: int) -> int:
    """Count the fewest runs of descending ``lengths`` that cost at most ``limit`` each, or have one member."""
    count = at = 0
    while at < len(lengths):
        at += limit // lengths[at] or 1
        count += 1
    return count


def _balanced_bounds(lengths: list[int], token_budget: int, count: int) -> list[int]:
    """Cut descending ``lengths`` into ``count`` padded runs with balanced costs; with fewer lengths, into one each.

    Returns:
        The starts of the runs, and the end of the last.
    """
    # The lowest limit that needs at most count runs; their number only falls as the limit rises. One of them has m or
    # more members, and with m members in each there are no more.
    members = math.ceil(len(lengths) / count)
    least = members * lengths[-members] if members > 1 else 0
    possible = range(min(least, token_budget), min(members * lengths[0], token_budget))
    limit = possible.start + bisect_left(possible, -count, key=lambda limit: -_padded_runs(lengths, limit))
    bounds = [0]
    while bounds[-1] < len(lengths):
        bounds.append(min(bounds[-1] + (limit // lengths[bounds[-1]] or 1), len(lengths)))
    # While there are too few, halve the costliest, and of equal ones the first.
    runs = [(-(end - start) * lengths[start], start, end) for start, end in pairwise(bounds) if end - start > 1]
    heapify(runs)
    for _ in range(min(count, len(lengths)) + 1 - len(bounds)):
        _, start, end = heappop(runs)
        middle = start + (end - start) // 2
        bounds.append(middle)
        for first, last in ((start, middle), (middle, end)):
            if last - first > 1:
                heappush(runs, (-(last - first) * lengths[first], first, last))
    bounds.sort()
    # Cutting from the long end leaves the rest to the last run: move members on while that lowers the larger cost.
    for at in range(len(bounds) - 2, 0, -1):
        start, end = bounds[at - 1], bounds[at + 1]
        cut = bounds[at]
        while cut - start > 1 and (end - cut + 1) * lengths[cut - 1] < (cut - start) * lengths[start]:
            cut -= 1
        bounds[at] = cut
    return bounds


def _share_out(
    order: list[int], tokens: list[int], before: Sequence[float], *, enough: float = 0
) -> list[list[int]]:
    """Divide ``order`` into parts with balanced sums of tokens, each longest first, empty ones last.

    The longest example first, to the part with the least so far (Graham 1969). Then the fullest and the emptiest part
    swap the two examples that bring them closest, as long as that helps.

    Args:
        before: The load that each part already has.
        enough: Stop as soon as no load is larger.
    """
    parts: list[list[int]] = [[] for _ in before]
    where, loads = _fill(np.array([tokens[position] for position in order], float), np.array(before, float))
    for position, part in zip(order, where):
        parts[part].append(position)
    emptiest = [*zip(loads, range(len(loads)))]
    fullest = [(-load, part) for load, part in emptiest]
    heapify(emptiest)
    heapify(fullest)
    for _ in range(_SWAPS * len(parts)):
        # Entries of loads that have changed since are still in the heaps.
        while -fullest[0][0] != loads[fullest[0][1]]:
            heappop(fullest)
        while emptiest[0][0] != loads[emptiest[0][1]]:
            heappop(emptiest)
        most, least = fullest[0][1], emptiest[0][1]
        if loads[most] <= enough:
            break
        full, empty = parts[most], parts[least]
        lengths = [tokens[position] for position in full], [tokens[position] for position in empty]
        swap = _best_swap(*lengths, loads[most] - loads[least])
        if swap is None:
            break
        given, taken = swap
        moved = lengths[0][given] - lengths[1][taken]
        full[given], empty[taken] = empty[taken], full[given]
        loads[most], loads[least] = loads[most] - moved, loads[least] + moved
        for changed in (most, least):
            parts[changed].sort(key=tokens.__getitem__, reverse=True)
            heappush(fullest, (-loads[changed], changed))
            heappush(emptiest, (loads[changed], changed))
    return parts


def _fill(lengths: np.ndarray, loads: np.ndarray) -> tuple[list[int], list[float]]:
    """Give each of descending ``lengths`` to the part with the least load, the first of equal ones.

    Returns:
        The part of each, and the loads of all parts.
    """
    where, at = np.empty(len(lengths), int), 0
    while at < len(lengths):
        by_load = loads.argsort(kind="stable")[: len(lengths) - at]
        before = loads[by_load]
        after = before + lengths[at : at + len(by_load)]
        overtaken = np.minimum.accumulate(after)[:-1] <= before[1:]
        count = int(overtaken.argmax()) + 1 if overtaken.any() else len(by_load)
        where[at : at + count] = by_load[:count]
        loads[by_load[:count]] = after[:count]
        at += count
    return where.tolist(), loads.tolist()


def _best_swap(full: list[int], empty: list[int], gap: float) -> tuple[int, int] | None:
    """Find the swap between two parts that brings their sums, ``gap`` apart, closest.

    Args:
        full, empty: Their lengths, descending.
    """
    best, found, other = gap, None, 0
    for at, length in enumerate(full):
        # In the other part, the two next to the length that would make the sums equal.
        wanted = length - gap / 2
        while other < len(empty) and empty[other] > wanted:
            other += 1
        for candidate in (other - 1, other)[not other : 1 + (other < len(empty))]:
            left = abs(gap - 2 * (length - empty[candidate]))
            if left < best:
                best, found = left, (at, candidate)
    return found


def longest_first(lengths: Tensor, positions: Tensor) -> Tensor:
    """Sort ``positions`` by descending length; equal ones keep their order."""
    return positions[lengths[positions].argsort(stable=True, descending=True)]


def longest_of(lengths: Tensor, micro_batches: Sequence[MicroBatch]) -> Tensor:
    """``[M]`` int64 length of the longest example of each micro-batch; none of them is empty."""
    members = lengths[long_tensor([*chain.from_iterable(micro_batches)])]
    starts = long_tensor([0, *map(len, micro_batches)][:-1]).cumsum(0)
    return torch.from_numpy(np.maximum.reduceat(members.numpy(), starts.numpy())) if len(starts) else members


def padding_share(lengths: Tensor, shares: Sequence[Sequence[MicroBatch]]) -> float:
    """Compute the share of padding among the tokens of micro-batches."""
    micro_batches = [*filter(None, chain.from_iterable(shares))]
    padded = int((longest_of(lengths, micro_batches) * long_tensor([*map(len, micro_batches)])).sum())
    real = int(lengths[long_tensor([*chain.from_iterable(micro_batches)])].sum())
    return 1 - real / padded if padded else 0.0
