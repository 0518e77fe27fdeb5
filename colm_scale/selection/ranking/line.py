"""Facility location on the line, solved exactly (DESIGN 2.2): what one probe per candidate amounts to.

On the line the candidates that a medoid stands for lie side by side, so the best ``k`` medoids are the best cut of the
sorted candidates into ``k`` segments, each stood for by its middle. That is a shortest path of ``k`` steps over nodes
0..m, the places between distinct values, and the costs ``w(u, v)`` of steps obey the quadrangle inequality (they are
Monge): ``w(a, c) + w(b, d) <= w(a, d) + w(b, c)`` for ``a <= b <= c <= d``. Values are whole numbers (`_Line`), so all
sums are exact. Two ways:

*Layers*, where the steps are few or the nodes: the shortest paths of 1, 2, ..., k steps to every node. The best last
steps move to the right with the node, so each needs to be looked for only between those of its neighbours.

*A price per step*, else (Aggarwal, Schieber and Tokuyama 1994). The cost is convex in k, so at the right price the
cheapest path has k steps; or one has fewer and another more, at the same price, and they can be joined to one of k.
At a given price all parts of the line are worked on at once (`_steps_at_price`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_LAYERS = 2**15
"""Square of the most layers that are always faster than prices."""
_GUESSES = 8
"""Most prices that are guessed before they are taken from the costs, which always ends."""
_CLOSE = 64
"""Steps between two paths from which on they are."""


def medoids_on_line(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` candidates with the smallest sum of distances from each candidate to the nearest of them.

    Distances are exact up to 2^-41 of the range of the values (65,536 of them; finer for fewer). Of the two middles of
    a segment of even length the lower value is taken.

    Args:
        values: ``[n]`` finite, n at least k.

    Returns:
        int64 ``[k]`` picks, in ascending order of value, and ``[k]`` how many candidates each stands for.
    """
    x, order = values.double().cpu().sort(stable=True)
    line = _Line.of(x.numpy())
    if k >= line.last:  # nothing but equal values need share a medoid
        equal = np.setdiff1d(np.arange(len(x)), line.starts, assume_unique=True)
        edges = np.union1d(line.starts, equal[: k - line.last])
    elif k * k <= 4 * line.last + _LAYERS:
        edges = line.starts[_by_layers(line, k)]
    else:
        edges = line.starts[_by_price(line, k)]
    bounds = torch.from_numpy(edges)
    return order[(bounds[:-1] + bounds[1:] - 1) // 2], bounds.diff()


@dataclass(frozen=True, slots=True)
class _Line:
    """Sorted values as whole numbers.

    Attributes:
        starts: ``[m + 1]`` of each node, how many candidates lie before it.
        sums: ``[n + 1]`` of each candidate, twice the sum of the values before it.
    """

    starts: np.ndarray
    sums: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray) -> _Line:
        """In units of which no sum of costs and prices reaches 2^62."""
        bits = 58 - len(x).bit_length()
        whole = np.rint(np.ldexp(x - x[0], bits - math.frexp(x[-1] - x[0])[1])).astype(np.int64)
        starts = np.concatenate([[0], np.diff(whole).nonzero()[0] + 1, [len(x)]])
        return cls(starts, np.concatenate([[0], 2 * whole.cumsum()]))

    @property
    def last(self) -> int:
        """The last node."""
        return len(self.starts) - 1

    def cost(self, u: np.ndarray | int, v: np.ndarray | int) -> np.ndarray:
        """Twice the sum of distances to the middle of what lies between nodes ``u`` and ``v``."""
        begin, end = self.starts[u], self.starts[v]
        half = (end - begin) // 2
        upper = self.sums[end] - self.sums[end - half]
        lower = self.sums[begin + half] - self.sums[begin]
        found: np.ndarray = upper - lower
        return found


def _by_layers(line: _Line, k: int) -> np.ndarray:
    """Nodes ``[k + 1]`` of a shortest path of ``k`` steps."""
    nodes = np.arange(1, line.last - k + 2)  # at which a path of one step can be, if k - 1 more reach the last
    cost, before = line.cost(0, nodes), [np.zeros_like(nodes)]
    for layer in range(2, k + 1):
        cost, step = _with_one_step_more(line, layer, cost, before[-1])
        before.append(step)
    path = [line.last]
    for layer in range(k, 0, -1):
        path.append(int(before[layer - 1][path[-1] - layer]))
    return np.array(path[::-1])


def _with_one_step_more(line: _Line, layer: int, cost: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shortest paths of ``layer`` steps.

    Args:
        cost: ``[r]`` of shortest paths of a step less, to the nodes ``layer - 1`` and up.
        before: ``[r]`` the node before the last on each.

    Returns:
        As ``cost`` and ``before``, to the nodes ``layer`` and up.
    """
    count = len(cost)
    branch = 16 if count < 4096 else 2  # of few rows the number of operations counts, of many that of their elements
    stride = branch ** math.ceil(math.log(count, branch))
    least, best = np.empty_like(cost), np.full(count + stride, count)  # best: counted from node layer - 1
    least[0], best[0] = cost[0] + line.cost(layer - 1, layer), 0
    lowest = np.append(before[1:] - layer + 1, 0)
    while stride > 1:
        row = np.arange(0, count, stride // branch)
        row = row[row % stride > 0]
        left = row - row % stride
        first = np.maximum(best[left], lowest[row])
        run, place = _runs(np.minimum(row, best[left + stride]) - first + 1)
        column = first[run] + place
        least[row], found = _least(cost[column] + line.cost(layer - 1 + column, layer + row[run]), run, place)
        best[row] = first + found
        stride //= branch
    return least, best[:count] + layer - 1


def _by_price(line: _Line, k: int) -> np.ndarray:
    """Nodes ``[k + 1]`` of a shortest path of ``k`` steps.

    Costs are even and prices odd, so at each price all cheapest paths have the same number of steps.
    """
    few, many = _Path(line, np.array([0, line.last])), _Path(line, np.arange(line.last + 1))
    high, low = few.cost + 1, 1  # prices of which these are the cheapest paths
    aim, guesses = float(k), 0
    while high - low > 2:
        guesses += 1
        if guesses > _GUESSES or many.steps - few.steps < _CLOSE:
            saved = (few.cost - many.cost) // (many.steps - few.steps) // 2 * 2  # by each step more, on average
            guess: float = saved + 1 if saved + 1 < high else saved - 1
        elif few.steps == 1 or many.steps == line.last:
            guess = _guess(line, aim)
        else:
            guess = low * (high / low) ** (math.log(many.steps / k) / math.log(many.steps / few.steps))
        price = min(max(int(guess) | 1, low + 2), high - 2)
        path = _Path(line, _cheapest_path(line, price, k))
        if path.steps == k:
            return path.nodes
        if path.steps < k:
            few, high = path, price
        else:
            many, low = path, price
        aim *= (k / path.steps) ** 2  # to the other side
    return _joined(few.nodes, many.nodes, k)


def _guess(line: _Line, steps: float) -> float:
    """A price of which the cheapest path has about so many steps.

    Where candidates are dense, steps are as dense as the square root of that (Zador 1982): a gap between candidates has
    ``sqrt(gap / (2 price))`` steps. It has one at most, so the largest have one, and of the others the sum is the rest.
    """
    values = line.sums[line.starts[:-1] + 1] - line.sums[line.starts[:-1]]
    roots = np.sort(np.sqrt(np.diff(values)))[::-1] / 2
    steps = min(steps, len(roots) - 0.5)
    whole = np.arange(math.ceil(steps))
    price_root = roots[::-1].cumsum()[::-1][whole] / (steps - whole)
    return float(price_root[(roots[whole] <= price_root).argmax()]) ** 2


class _Path:
    """A path and its cost, without the price of its steps."""

    def __init__(self, line: _Line, nodes: np.ndarray):
        self.nodes, self.steps = nodes, len(nodes) - 1
        self.cost = int(line.cost(nodes[:-1], nodes[1:]).sum())


def _joined(few: np.ndarray, many: np.ndarray, k: int) -> np.ndarray:
    """A cheapest path of ``k`` steps from two, with fewer and with more, that are cheapest at the same price.

    Where a step of the second lies within one of the first, crossing over costs nothing (quadrangle inequality).
    """
    more = k + 1 - len(few)
    at = int((few[1:] >= many[more + 1 : more + len(few)]).argmax())
    return np.concatenate([many[: at + more + 1], few[at + 1 :]])


def _cheapest_path(line: _Line, price: int, k: int) -> np.ndarray:
    """The nodes of a path whose cost is least if every step adds ``price``; about ``k`` steps are expected."""
    before = _steps_at_price(line, price, min(32 * -(-line.last // k), line.last)).tolist()
    path = [line.last]
    while path[-1]:
        path.append(before[path[-1]])
    return np.array(path[::-1])


def _steps_at_price(line: _Line, price: int, reach: int) -> np.ndarray:
    """``[m + 1]`` for each node, the node before it on the cheapest path.

    The line is cut into blocks of ``reach`` nodes, and all are worked on at once. Through which nodes the path comes is
    not known; but it steps over no two nodes so far apart that a stop between them saves more than the price. Paths do
    not cross, so it stays between the paths that begin at either. These two soon meet, and where their last steps
    to every node of the block are the same, so is that of the cheapest path. Where they are not, it is done again with
    blocks twice as long and nodes twice as far back.
    """
    before = np.full(line.last + 1, -1)
    before[0] = 0
    while (unknown := (before < 0).nonzero()[0]).size:
        blocks = reach * np.unique((unknown - 1) // reach)
        left = np.maximum(blocks - reach, 0)
        right, sure = _a_step_beyond(line, price, left, blocks)
        steps = _paths_from(line, price, np.concatenate([left, right]), reach + int((blocks - left).max()))
        node = blocks[:, None] + np.arange(1, reach + 1)
        lane = np.arange(len(blocks))[:, None]
        lower, upper = steps[node - left[:, None], lane], steps[node - right[:, None], lane + len(blocks)]
        within = node <= line.last
        sure &= (lower == upper).all(1, where=within)
        within &= sure[:, None]
        before[node[within]] = lower[within]
        reach *= 2
    return before


def _a_step_beyond(line: _Line, price: int, left: np.ndarray, most: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nodes ``right``, at most ``most``, such that no cheapest path steps over both, and whether there is one.

    What a stop saves only grows with the step. Every path begins at node 0, so that one is its own.
    """
    distance = np.full(len(left), 2)
    while True:
        right = np.minimum(left + distance, most)
        stop = (left + right) // 2
        saves = line.cost(left, right) - line.cost(left, stop) - line.cost(stop, right) > price
        near = ~saves & (right < most)
        if not near.any():
            return np.where(left > 0, right, 0), saves | (left == 0)
        distance[near] *= 2


def _paths_from(line: _Line, price: int, source: np.ndarray, length: int) -> np.ndarray:
    """The last steps of the cheapest paths from each of some nodes to those after it: of equally good ones the longest.

    Args:
        source: ``[l]`` nodes.

    Returns:
        ``[length + 1, l]`` the node before ``source + row`` on the path; any beyond the last node.
    """
    cost = np.zeros((length + 1, len(source)), np.int64)
    steps = np.zeros_like(cost)
    first = np.zeros(len(source), np.int64)  # the best last steps move to the right with the node
    for row in range(1, length + 1):
        node = np.minimum(source + row, line.last)
        run, place = _runs(row - first)
        place += first[run]
        start = np.minimum(source[run] + place, line.last)
        least, first = _least(cost[place, run] + line.cost(start, node[run]), run, place)
        cost[row] = least + price
        steps[row] = source + first
    return steps


def _runs(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of consecutive runs of 1 or more elements: each element's run, and its place in it."""
    run = np.repeat(np.arange(len(counts)), counts)
    return run, np.arange(len(run)) - (counts.cumsum() - counts)[run]


def _least(values: np.ndarray, run: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least value of each run, and the first of the places that hold it."""
    begin = np.append(True, run[1:] != run[:-1]).nonzero()[0]
    least = np.minimum.reduceat(values, begin)
    at = (values == least[run]).nonzero()[0][::-1]
    first = np.empty(len(begin), np.int64)
    first[run[at]] = place[at]
    return least, first
