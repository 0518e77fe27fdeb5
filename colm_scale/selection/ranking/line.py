"""Exact facility location on the line, the case of one number per candidate (docs/method.md, Select).

On the line, the candidates that a medoid represents are adjacent, so the best ``k`` medoids are the middles of the best
cut of the sorted candidates into ``k`` segments. That cut is a shortest path of ``k`` steps over nodes 0..m, the places
between distinct values. The costs ``w(u, v)`` of steps obey the quadrangle inequality (they are Monge):
``w(a, c) + w(b, d) <= w(a, d) + w(b, c)`` for ``a <= b <= c <= d``. Values are integers (`_Line`), so all sums are
exact. Two algorithms:

*Layers*, for few steps or few nodes: the shortest paths of 1, 2, ..., k steps to every node. The best last step moves
to the right with the node, so the search for it is bounded by those of the neighbouring nodes.

*A price per step*, otherwise (Aggarwal, Schieber and Tokuyama 1994). The cost is convex in k, so at the right price the
cheapest path has k steps, or two cheapest paths have fewer and more and can be joined to one of k steps. At a given
price all parts of the line are processed at once (`_steps_at_price`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_LAYERS = 2**15
"""Square of the number of layers up to which layers are always faster than prices."""
_GUESSES = 8
"""Most guessed prices; later ones come from the costs, which is sure to end."""
_CLOSE = 64
"""Difference in steps between two paths below which prices come from the costs."""


def medoids_on_line(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the ``k`` candidates with the smallest sum of distances from each candidate to the nearest of them.

    Distances are exact to 2^-41 of the range of the values for 65,536 values, and finer for fewer. A segment of even
    length is represented by the lower of its two middles.

    Args:
        values: ``[n]`` finite, n at least k.

    Returns:
        int64 ``[k]`` picks in ascending order of value, and ``[k]`` the number of candidates each represents.
    """
    x, order = values.double().cpu().sort(stable=True)
    line = _Line.of(x.numpy())
    if k >= line.last:  # only equal values share a medoid
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
    """Sorted values as integers.

    Attributes:
        starts: ``[m + 1]`` number of candidates before each node.
        sums: ``[n + 1]`` twice the sum of the values before each candidate.
    """

    starts: np.ndarray
    sums: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray) -> _Line:
        """Convert to a unit in which no sum of costs and prices reaches 2^62."""
        bits = 58 - len(x).bit_length()
        whole = np.rint(np.ldexp(x - x[0], bits - math.frexp(x[-1] - x[0])[1])).astype(np.int64)
        starts = np.concatenate([[0], np.diff(whole).nonzero()[0] + 1, [len(x)]])
        return cls(starts, np.concatenate([[0], 2 * whole.cumsum()]))

    @property
    def last(self) -> int:
        """Index of the last node."""
        return len(self.starts) - 1

    def cost(self, u: np.ndarray | int, v: np.ndarray | int) -> np.ndarray:
        """Compute twice the sum of distances to the middle of the segment between nodes ``u`` and ``v``."""
        begin, end = self.starts[u], self.starts[v]
        half = (end - begin) // 2
        upper = self.sums[end] - self.sums[end - half]
        lower = self.sums[begin + half] - self.sums[begin]
        found: np.ndarray = upper - lower
        return found


def _by_layers(line: _Line, k: int) -> np.ndarray:
    """Find the nodes ``[k + 1]`` of a shortest path of ``k`` steps."""
    nodes = np.arange(1, line.last - k + 2)  # ends of a first step from which k - 1 more can reach the last node
    cost, before = line.cost(0, nodes), [np.zeros_like(nodes)]
    for layer in range(2, k + 1):
        cost, step = _with_one_step_more(line, layer, cost, before[-1])
        before.append(step)
    path = [line.last]
    for layer in range(k, 0, -1):
        path.append(int(before[layer - 1][path[-1] - layer]))
    return np.array(path[::-1])


def _with_one_step_more(line: _Line, layer: int, cost: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Extend shortest paths to ``layer`` steps.

    Args:
        cost: ``[r]`` costs of the shortest paths with one step less, to the nodes from ``layer - 1``.
        before: ``[r]`` the last node but one of each.

    Returns:
        The same for the nodes from ``layer``.
    """
    count = len(cost)
    branch = 16 if count < 4096 else 2  # few rows: fewer operations; many: fewer elements
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
    """Find the nodes ``[k + 1]`` of a shortest path of ``k`` steps.

    Costs are even and prices odd, so at each price all cheapest paths have the same number of steps.
    """
    few, many = _Path(line, np.array([0, line.last])), _Path(line, np.arange(line.last + 1))
    high, low = few.cost + 1, 1  # prices at which these are the cheapest paths
    aim, guesses = float(k), 0
    while high - low > 2:
        guesses += 1
        if guesses > _GUESSES or many.steps - few.steps < _CLOSE:
            saved = (few.cost - many.cost) // (many.steps - few.steps) // 2 * 2  # per additional step, on average
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
        aim *= (k / path.steps) ** 2  # aim beyond k, on the other side
    return _joined(few.nodes, many.nodes, k)


def _guess(line: _Line, steps: float) -> float:
    """Guess a price at which the cheapest path has about ``steps`` steps.

    The density of steps is the square root of that of the candidates (Zador 1982): a gap between candidates has
    ``sqrt(gap / (2 price))`` steps, at most one. The largest gaps have one, and the others sum to the rest.
    """
    values = line.sums[line.starts[:-1] + 1] - line.sums[line.starts[:-1]]
    roots = np.sort(np.sqrt(np.diff(values)))[::-1] / 2
    steps = min(steps, len(roots) - 0.5)
    whole = np.arange(math.ceil(steps))
    price_root = roots[::-1].cumsum()[::-1][whole] / (steps - whole)
    return float(price_root[(roots[whole] <= price_root).argmax()]) ** 2


class _Path:
    """A path and its cost without the price of its steps."""

    def __init__(self, line: _Line, nodes: np.ndarray):
        self.nodes, self.steps = nodes, len(nodes) - 1
        self.cost = int(line.cost(nodes[:-1], nodes[1:]).sum())


def _joined(few: np.ndarray, many: np.ndarray, k: int) -> np.ndarray:
    """Join two paths with fewer and more steps, cheapest at the same price, to a cheapest path of ``k`` steps.

    If a step of the second lies within one of the first, crossing over costs nothing (quadrangle inequality).
    """
    more = k + 1 - len(few)
    at = int((few[1:] >= many[more + 1 : more + len(few)]).argmax())
    return np.concatenate([many[: at + more + 1], few[at + 1 :]])


def _cheapest_path(line: _Line, price: int, k: int) -> np.ndarray:
    """Find the nodes of a cheapest path if every step adds ``price``; about ``k`` steps are expected."""
    before = _steps_at_price(line, price, min(32 * -(-line.last // k), line.last)).tolist()
    path = [line.last]
    while path[-1]:
        path.append(before[path[-1]])
    return np.array(path[::-1])


def _steps_at_price(line: _Line, price: int, reach: int) -> np.ndarray:
    """Find, for each node, the node before it on the cheapest path: ``[m + 1]``.

    The line is cut into blocks of ``reach`` nodes, which are processed at once. The nodes through which the path enters
    a block are unknown, but it never steps over two nodes so far apart that a stop between them saves more than the
    price. Paths do not cross, so it stays between the paths that start at these two nodes. They soon meet, and if their
    last steps to every node of the block are equal, so is that of the cheapest path. Blocks where they are not are
    repeated, twice as long and from nodes twice as far back.
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
    """Find nodes ``right``, up to ``most``, such that no cheapest path steps over ``left`` and ``right``; and if found.

    The saving of a stop grows with the step. Every path starts at node 0, which serves as its own ``right``.
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
    """Find the last steps of the cheapest paths from nodes to those after them, the longest step in a tie.

    Args:
        source: ``[l]`` nodes.

    Returns:
        ``[length + 1, l]`` the node before ``source + row`` on the path; arbitrary beyond the last node.
    """
    cost = np.zeros((length + 1, len(source)), np.int64)
    steps = np.zeros_like(cost)
    first = np.zeros(len(source), np.int64)  # the best last step moves to the right with the node
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
    """Return the run of each element, and its place in it, for consecutive runs of 1 or more elements."""
    run = np.repeat(np.arange(len(counts)), counts)
    return run, np.arange(len(run)) - (counts.cumsum() - counts)[run]


def _least(values: np.ndarray, run: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the least value of each run, and its first place."""
    begin = np.append(True, run[1:] != run[:-1]).nonzero()[0]
    least = np.minimum.reduceat(values, begin)
    at = (values == least[run]).nonzero()[0][::-1]
    first = np.empty(len(begin), np.int64)
    first[run[at]] = place[at]
    return least, first
