"""Greedy facility location: medoids that represent all candidates of a source (docs/method.md, Select).

The value of a set of picks is the sum over candidates of the similarity to the most similar pick. Similarities are
first rounded to multiples of one tiny unit, in float64. Every sum is then exact, gains can be updated instead of
recomputed, ties are real ties, and the picks do not depend on the order of addition, the device or the threads.

*Rounds.* A pick lowers another candidate's gain only if both improve the cover of the same candidate. In descending
order of gain, a candidate that shares no improvement with an earlier one therefore retains its gain until it is picked.
A round finds all such candidates at once; sorted by gain, they are in greedy's order. Picking half of 128 candidates
takes about 12 rounds of a few array operations each, half of 4,096 about 120.

*Lists.* After a few picks, few candidates are more similar to another than its covering pick is: 1 to 9 % of the pairs
after 8 picks. For large sources only these pairs are listed, and a round visits only the pairs of candidates it covers
better. The first picks are found by lazy greedy (Minoux 1978).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_WINDOW = 32
"""Candidates examined in a round."""
_WINDOW_ON_DEVICE = 128
_FEW = 256
"""Most candidates whose pairs are not listed: rows are short, and the number of operations dominates."""
_FIRST = 8
"""Picks before pairs are listed."""
_BLOCK = 65536
"""Similarities processed at a time."""
_BLOCK_ROWS = 1024
_RANK = np.arange(_WINDOW)[:, None]


def greedy(similarity: Tensor, k: int) -> Tensor:
    """Return the picks of `greedy_with_gains`."""
    return greedy_with_gains(similarity, k)[0]


def greedy_with_gains(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Pick ``k`` candidates, each the one that raises the value most; the lowest index wins ties.

    The CPU version uses numpy on one core, whose small operations take a third of torch's time. Besides the
    similarities it holds a shifted copy if the smallest is not 0, and 16 bytes per listed pair.

    Args:
        similarity: ``[n, n]``, symmetric; may be negative.
        k: At most n.

    Returns:
        int64 ``[k]`` in the order of picking, and float64 ``[k]`` the gain of each, which never grows. The first gain
        is measured from the smallest similarity.
    """
    if similarity.device.type != "cpu":
        return greedy_on_device(similarity, k)
    low, high = (float(end) for end in similarity.aminmax())
    worth = (similarity.double() - low if low else similarity.double()).numpy()
    n = len(worth)
    lift = _lift(high - low, n)
    picks, raised = np.empty(0, np.int64), np.empty(0)
    if n <= _FEW:
        pairs: _AllPairs | _ListedPairs = _AllPairs(worth + lift - lift)
    else:
        bounds = worth.sum(1) + n * lift / 2**50  # more than the rounding error of the sums
        picks, raised, covered = _first_picks(worth, lift, bounds, min(k, _FIRST))
        if len(picks) == k:
            return torch.from_numpy(picks), torch.from_numpy(raised)
        pairs = _ListedPairs(worth, lift, covered)
    gains = pairs.gains()
    gains[picks] = -1
    picks, raised = _rounds(pairs, gains, k, [picks], [raised])
    return torch.from_numpy(picks), torch.from_numpy(raised)


def greedy_on_device(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Compute `greedy_with_gains` with torch on a GPU, in the same rounds but on whole rows, without lists.

    Holds a second matrix. The host waits for the device once per round, not for each pick.
    """
    shifted = similarity.double() - similarity.min()
    lift = _lift(float(shifted.max()), len(shifted))
    worth = shifted.add_(lift).sub_(lift)
    covered, gains = worth.new_zeros(len(worth)), worth.sum(0)
    raised = torch.full_like(gains, -torch.inf)  # gains of the picks, when they were picked
    rank = torch.arange(_WINDOW_ON_DEVICE, device=worth.device)[: len(worth)].unsqueeze(1)
    while True:
        best = gains.max()
        goes_on = (best > 0) & ((raised > best).sum() < k)
        top = gains.sort(descending=True, stable=True).indices[: len(rank)]
        better = worth[top] > covered
        first = torch.where(better, rank, len(rank)).amin(0)
        free = ~(better & (first < rank)).any(1) & (gains[top] >= 0)
        improved = free[first.clamp(max=len(rank) - 1)] & (first < len(rank))
        again, count = torch.stack([goes_on, improved.sum()]).tolist()
        if not again:
            break
        raised[top] = torch.where(free, gains[top], raised[top])
        for some in improved.byte().argsort(descending=True, stable=True)[:count].split(_BLOCK_ROWS):
            old, new = covered[some], worth[top[first[some]], some]
            gains -= worth[some].clamp_(old.unsqueeze(1), new.unsqueeze(1)).sum(0) - old.sum()
            covered[some] = new
        gains[top] = torch.where(free, -1.0, gains[top])
    gained = torch.where(raised.isinf(), gains, raised)
    order = gained.argsort(descending=True, stable=True)[:k]
    return order, gained[order]


def objective(similarity: Tensor, picks: Tensor) -> float:
    """Compute the facility-location value of one or more ``picks`` ``[k]``."""
    return float(similarity[:, picks].double().amax(1).sum())


def cluster_sizes(similarity: Tensor, picks: Tensor) -> Tensor:
    """Count the candidates that each pick represents, itself included: int64 ``[k]``, at least 1, with sum n.

    A candidate belongs to its most similar pick, the earlier one in a tie.
    """
    owner = similarity[:, picks].argmax(1)
    owner[picks] = torch.arange(len(picks), device=picks.device)
    return torch.zeros_like(picks).index_add_(0, owner, torch.ones_like(owner))


def _lift(largest: float, n: int) -> float:
    """Return a number whose addition rounds values up to ``largest`` to multiples of a unit.

    The unit is the spacing of float64 near that number; sums of n values are below 2^53 units.
    """
    return 1.5 * 2.0 ** (math.frexp(largest)[1] + n.bit_length())


def _rounds(
    pairs: _AllPairs | _ListedPairs, gains: np.ndarray, k: int, picks: list[np.ndarray], raised: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Complete the ``k`` picks and their gains in rounds.

    Args:
        gains: ``[n]`` gains of the candidates, -1 for picks; overwritten.
        picks: Arrays of known picks; extended.
        raised: Their gains; extended.
    """
    made = sum(map(len, picks))
    while (best := gains.max()) > 0 and (made < k or (np.concatenate(raised) > best).sum() < k):
        top = _best(gains)
        free, lost = pairs.cover(top)
        chosen = top[free]
        made += len(chosen)
        picks.append(chosen)
        raised.append(gains[chosen])
        gains -= lost
        gains[chosen] = -1
    left = (gains >= 0).nonzero()[0]
    found, gained = np.concatenate([*picks, left]), np.concatenate([*raised, gains[left]])
    order = np.lexsort((found, -gained))[:k]
    return found[order], gained[order]


def _best(gains: np.ndarray) -> np.ndarray:
    """Find the candidates with the largest gains, in greedy's order."""
    bar = max(0.0, np.partition(gains, -_WINDOW)[-_WINDOW]) if len(gains) > _WINDOW else 0.0
    top = (gains >= bar).nonzero()[0]
    return top[(-gains[top]).argsort(kind="stable")][:_WINDOW]


def _first_picks(
    worth: np.ndarray, lift: float, bounds: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the first picks by lazy greedy: a gain never grows, so its earlier value is a bound.

    Args:
        bounds: ``[n]`` upper bounds of the gains; overwritten.

    Returns:
        The picks, their gains, and ``[n]`` the similarity of each candidate to its nearest pick.
    """
    picks, raised, covered = np.empty(count, np.int64), np.empty(count), np.zeros(len(worth))
    made = 0
    while made < count:
        top = _best(bounds)
        bounds[top] = _gains(worth[top], lift, covered)
        pick = bounds.argmax()
        if pick in top:
            picks[made], raised[made] = pick, bounds[pick]
            covered = np.maximum(covered, worth[pick])
            if made == 0:  # the first pick lowers most gains, so update all at once
                bounds = np.concatenate([_gains(worth[rows], lift, covered) for rows in _blocks(len(worth))])
            bounds[pick] = -1
            made += 1
    return picks, raised, covered


def _gains(worth: np.ndarray, lift: float, covered: np.ndarray) -> np.ndarray:
    """Compute the gains ``[r]`` of candidates from their rows ``[r, n]`` of similarities that are not rounded."""
    above = worth + lift
    above -= covered + lift
    gains: np.ndarray = np.maximum(above, 0, out=above).sum(1)
    return gains


def _blocks(n: int) -> list[slice]:
    """Divide ``n`` rows of ``n`` numbers into blocks that fit the cache."""
    rows = max(1, _BLOCK // n)
    return [slice(start, start + rows) for start in range(0, n, rows)]


class _AllPairs:
    """All pairs, from rounded similarities ``worth`` ``[n, n]``."""

    def __init__(self, worth: np.ndarray):
        self._worth, self._covered = worth, np.zeros(len(worth))

    def gains(self) -> np.ndarray:
        gains: np.ndarray = self._worth.sum(1)
        return gains

    def cover(self, top: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the picks among ``top``, bool ``[len(top)]``, and the loss of gain of every candidate, ``[n]``."""
        better = self._worth[top] > self._covered
        free = ~(better & (better.argmax(0) < _RANK[: len(top)])).any(1)
        nearest = self._worth[top[free]].max(0)
        rows = (nearest > self._covered).nonzero()[0]
        old, new = self._covered[rows], nearest[rows]
        self._covered[rows] = new
        lost = np.minimum(self._worth[rows], new[:, None])
        np.maximum(lost, old[:, None], out=lost)
        return free, lost.sum(0) - old.sum()


class _ListedPairs:
    """The pairs in which one candidate is more similar to the other than the other's covering pick is.

    They are listed by that other candidate. ``worth`` ``[n, n]`` is not rounded; values are rounded on use.
    """

    def __init__(self, worth: np.ndarray, lift: float, covered: np.ndarray):
        self._worth, self._lift, self._covered = worth, lift, covered
        n = len(worth)
        counts, candidates, values = [], [], []
        for rows in _blocks(n):
            block = worth[rows]
            at = (block > covered[rows, None]).ravel().nonzero()[0]
            starts = np.arange(0, block.size + 1, n)
            counts.append(np.diff(np.searchsorted(at, starts)))
            candidates.append(at - np.repeat(starts[:-1], counts[-1]))
            values.append(block.ravel()[at])
        self._counts = np.concatenate(counts)
        self._starts = self._counts.cumsum() - self._counts
        self._candidates = np.concatenate(candidates)
        self._values = np.concatenate(values) + lift
        self._first = np.empty(n, np.int64)

    def gains(self) -> np.ndarray:
        every = np.arange(len(self._worth))
        return self._between(every, self._covered + self._lift, np.full(len(every), np.inf))

    def cover(self, top: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Do the same as `_AllPairs.cover`."""
        n = len(self._worth)
        rows = self._worth[top]
        at = (rows > self._covered).ravel().nonzero()[0]
        by, of = np.divmod(at, n)
        self._first[of[::-1]] = by[::-1]  # the last write wins: the first candidate
        free = np.ones(len(top), bool)
        free[by[self._first[of] != by]] = False
        picked = free[by]
        of, new = of[picked], rows.ravel()[at[picked]]
        old, self._covered[of] = self._covered[of], new
        return free, self._between(of, old + self._lift, new + self._lift)

    def _between(self, of: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Sum, over ``of``, the part of each candidate's values between ``low`` and ``high``: ``[n]``."""
        counts = self._counts[of]
        ends = counts.cumsum()
        at = np.repeat(self._starts[of] - ends + counts, counts) + np.arange(counts.sum())
        above = np.minimum(self._values[at], np.repeat(high, counts))
        above -= np.repeat(low, counts)
        return np.bincount(self._candidates[at], np.maximum(above, 0, out=above), len(self._worth))
