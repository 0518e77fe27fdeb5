"""`colm_scale.selection.route` and the plan's bookkeeping as plainly as they can be written: one example, one rank and
one candidate limit at a time."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from heapq import heapify, heapreplace
from itertools import pairwise

from torch import Tensor

from colm_scale.records import Route, SketchPlan
from colm_scale.selection.route import REUSED

MicroBatch = tuple[int, ...]
Shares = tuple[tuple[MicroBatch, ...], ...]

_MOST_EVEN = 8
_SWAPS = 4
"""Most swaps per part when balancing."""


def form_micro_batches(
    lengths: Tensor, positions: Tensor, token_budget: int, *, packed: bool = False, even: bool = False
) -> tuple[MicroBatch, ...]:
    """Form the fewest micro-batches that the budget allows, with balanced costs.

    Args:
        lengths: ``[n]`` tokens of each candidate.
        positions: ``[s]`` candidates to group.
        token_budget: Largest cost in tokens; a longer example forms a micro-batch alone.
        packed: Whether examples are packed rather than padded.
        even: Form a few more if 2, 4 or 8 ranks can then share them evenly: 5 become 8, and 9 become 16.

    Returns:
        Tuples of positions, longest first.
    """
    costs = _Costs(lengths.tolist(), packed)
    order = costs.longest_first(positions.tolist())
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
    costs = _Costs(lengths.tolist(), packed)
    most = math.ceil(len(micro_batches) / world_size)
    shares: list[list[MicroBatch]] = [[] for _ in range(world_size)]
    loads: list[tuple[float, int]] = [(0, rank) for rank in range(world_size)]  # a heap: the least loaded first
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
    costs = _Costs(lengths.tolist(), packed)
    order = costs.longest_first(positions.tolist())
    rank_of: list[int] = [-1] * len(lengths) if held_on is None else held_on.tolist()
    held = [[position for position in order if rank_of[position] == rank] for rank in range(world_size)]

    def grouped(orders: list[list[int]]) -> list[list[list[int]]]:
        count = max(costs.fewest(order, token_budget) for order in orders)
        return [costs.group(order, token_budget, count) for order in orders]

    return _routed(costs, held, [position for position in order if rank_of[position] < 0], grouped)


def route_evenly(
    lengths: Tensor, positions: Tensor, world_size: int, count: int, *, packed: bool = False
) -> Route:
    """Deal the coreset to ranks as `route` does, but in ``count`` micro-batches per rank, regardless of their cost."""
    costs = _Costs(lengths.tolist(), packed)
    most = len(lengths) * int(lengths.max())

    def grouped(orders: list[list[int]]) -> list[list[list[int]]]:
        return [costs.group(order, most, count) for order in orders]

    return _routed(costs, [[] for _ in range(world_size)], costs.longest_first(positions.tolist()), grouped)


def _routed(
    costs: _Costs, held: list[list[int]], free: list[int], grouped: Callable[[list[list[int]]], list[list[list[int]]]]
) -> Route:
    """Route candidates that are ``held`` by a rank, and deal out the ``free`` ones.

    Args:
        grouped: Cuts the candidates of each rank into micro-batches, the same number for all.
    """
    saved = [REUSED * costs.tokens_of(part) for part in held]
    dealt = _share_out(free, costs.tokens, saved)
    reused: list[list[list[int]]] = grouped(held) if any(held) else [[] for _ in held]
    shares = [[*first, *rest] for first, rest in zip(reused, grouped(dealt))]
    return Route(
        micro_batches=tuple(tuple(map(tuple, share)) for share in shares),
        reused=len(reused[0]),
        work=tuple(less + costs.tokens_of(rest) for less, rest in zip(saved, dealt)),
        tokens=tuple(costs.tokens_of([*first, *rest]) for first, rest in zip(held, dealt)),
        padded_tokens=tuple(sum(map(costs, share)) for share in shares),
    )


class _Costs:
    """Costs of micro-batches whose longest example comes first, and cuts of an order of examples by cost."""

    def __init__(self, tokens: list[int], packed: bool):
        self.tokens, self._packed = tokens, packed

    def __call__(self, members: Sequence[int]) -> int:
        if self._packed:
            return self.tokens_of(members)
        return len(members) * self.tokens[members[0]] if members else 0

    def tokens_of(self, members: Sequence[int]) -> int:
        return sum(self.tokens[position] for position in members)

    def longest_first(self, positions: list[int]) -> list[int]:
        return sorted(positions, key=lambda position: -self.tokens[position])

    def fewest(self, order: list[int], token_budget: int) -> int:
        """Find the least number of micro-batches into which `group` can cut ``order`` within the budget."""
        count = len(self.cut(order, token_budget))
        if self._packed:
            while count < len(order) and not self._fit(self.group(order, token_budget, count), token_budget):
                count += 1
        return count

    def _fit(self, groups: list[list[int]], token_budget: int) -> bool:
        return all(len(members) < 2 or self(members) <= token_budget for members in groups)

    def cut(self, order: list[int], limit: int) -> list[list[int]]:
        """Cut ``order`` into the fewest runs that cost at most ``limit`` each, or have one member."""
        runs: list[list[int]] = []
        cost = 0
        for position in order:
            length = self.tokens[position]
            grown = cost + (length if self._packed or not runs else self.tokens[runs[-1][0]])
            if runs and grown <= limit:
                runs[-1].append(position)
                cost = grown
            else:
                runs.append([position])
                cost = length
        return runs

    def group(self, order: list[int], token_budget: int, count: int) -> list[list[int]]:
        """Cut ``order`` into ``count`` parts with balanced costs; ``count`` is at least what the budget demands."""
        if self._packed:
            return _share_out(order, self.tokens, [0] * count)
        # The lowest limit that needs at most count runs; their number only falls as the limit rises.
        limit = bisect_left(range(token_budget), -count, key=lambda limit: -len(self.cut(order, limit)))
        runs = self.cut(order, limit)
        while len(runs) < min(count, len(order)):
            costliest = max((run for run in runs if len(run) > 1), key=self)
            at, half = runs.index(costliest), len(costliest) // 2
            runs[at : at + 1] = costliest[:half], costliest[half:]
        # Cutting from the long end leaves the rest to the last run: move members on while that lowers the larger cost.
        for left, right in reversed(list(pairwise(runs))):
            while len(left) > 1 and self([left[-1], *right]) < self(left):
                right.insert(0, left.pop())
        return runs + [[] for _ in range(count - len(runs))]


def _share_out(order: list[int], tokens: list[int], before: Sequence[float]) -> list[list[int]]:
    """Divide ``order`` into parts with balanced sums of tokens, each longest first, empty ones last.

    The longest example first, to the part with the least so far (Graham 1969). Then the fullest and the emptiest part
    swap the two examples that bring them closest, as long as that helps.

    Args:
        before: The load that each part already has.
    """
    parts: list[list[int]] = [[] for _ in before]
    heap = [(load, part) for part, load in enumerate(before)]
    heapify(heap)
    for position in order:
        load, part = heap[0]
        parts[part].append(position)
        heapreplace(heap, (load + tokens[position], part))
    loads = [load + sum(tokens[position] for position in part) for load, part in zip(before, parts)]
    for _ in range(_SWAPS * len(parts)):
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
    """Find the swap between two parts, both longest first, that brings their sums, ``gap`` apart, closest."""
    best, found, other = gap, None, 0
    for at, position in enumerate(full):
        # In the other part, the two candidates next to the length that would make the sums equal.
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
    """Compute the share of padding among the tokens of micro-batches."""
    groups = [lengths[list(positions)] for share in shares for positions in share if positions]
    padded = sum(len(group) * int(group.max()) for group in groups)
    return 1 - sum(int(group.sum()) for group in groups) / padded if padded else 0.0


def held_inputs(plan: SketchPlan, lengths: Tensor, most_tokens: float) -> tuple[list[int], list[int]]:
    """The rank that holds each candidate, or -1, and the number of micro-batches that each rank holds."""
    found, counts = [-1] * len(lengths), []
    for rank, share in enumerate(plan.shares):
        held = count = 0
        for members in filter(len, share):
            held += len(members) * int(lengths[list(members)].max())
            if held > most_tokens:
                break
            for position in members:
                found[position] = rank
            count += 1
        counts.append(count)
    return found, counts


def rows_of(plan: SketchPlan, rank: int) -> list[int]:
    """The rows of the candidate matrix that a rank computes."""
    places = {position: row for row, position in enumerate(plan.positions.tolist())}
    return [places[position] for micro_batch in plan.shares[rank] for position in micro_batch]
