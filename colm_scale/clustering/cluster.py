"""Groups of alike points, as many as two halves of the data agree on.

    n  points        p  numbers of a point        k  clusters
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from colm_scale.errors import UserError

if TYPE_CHECKING:
    from sklearn.cluster import KMeans

MOST_COMPARED = 20_000
"""Points, at most, on which stability is measured and that HDBSCAN looks at."""
_PAIRS, _STARTS = 3, 10
"""Pairs of halves that are compared for each number of clusters; starts of k-means, of which the best counts."""


def check_installed(*modules: str) -> None:
    """Raise a UserError unless these modules, of the extra for sources, are there."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UserError(f"finding sources needs {module}: pip install 'colm_scale[sources]'")


@contextmanager
def one_thread() -> Iterator[None]:
    """A block in which scikit-learn computes on one thread: on several, sums are taken in an order that changes."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


@dataclass(frozen=True, slots=True)
class Clusters:
    """Which cluster a point belongs to.

    Attributes:
        centres: ``[k, p]`` float32 mean of each cluster.
        stability: For every number of clusters that was tried, how well halves agree (adjusted Rand index).
        neighbours: Points that say for those around them which cluster they belong to; None: the centres do.
        noise: Share of the points that were in no dense cluster, and went to the nearest.
    """

    centres: np.ndarray
    stability: dict[int, float] = field(default_factory=dict)
    neighbours: Any = None
    noise: float = 0.0

    def assign(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``[n]`` int32 cluster of each point, and ``[n]`` float32 distance to its centre."""
        from sklearn.metrics import pairwise_distances_argmin

        if self.neighbours is not None:
            labels = self.neighbours.predict(points)
        else:
            labels = pairwise_distances_argmin(points, self.centres)
        distances = np.linalg.norm(points - self.centres[labels], axis=1)
        return labels.astype(np.int32), distances.astype(np.float32)


def kmeans(points: np.ndarray, numbers: Sequence[int], threshold: float, seed: int) -> Clusters:
    """The largest of some numbers of clusters that is stable; the most stable one if none is.

    Args:
        points: ``[n, p]``.
        numbers: Of clusters, below n / 2; larger ones are not tried.
        threshold: Least stability.

    Raises:
        UserError: There are too few points for any number.
    """
    possible = sorted(number for number in set(numbers) if 2 * number < len(points))
    if not possible:
        raise UserError(f"{len(points)} rows are too few for {min(numbers)} clusters: give fewer --clusters")
    draws = np.random.default_rng(seed)
    some = points[draws.permutation(len(points))[:MOST_COMPARED]]
    found = {number: stability(some, number, seed) for number in possible} if len(possible) > 1 else {}
    stable = [number for number, agreement in found.items() if agreement >= threshold]
    chosen = max(stable) if stable else max(found, key=lambda number: found[number], default=possible[0])
    return Clusters(_fitted(points, chosen, seed).cluster_centers_.astype(np.float32), found)


def stability(points: np.ndarray, k: int, seed: int) -> float:
    """How well clusterings of two halves of the points agree about all of them: mean adjusted Rand index, 1 at best.

    Source: model selection by replication, as in Lange et al. 2004 and Tibshirani and Walther 2005.
    """
    from sklearn.metrics import adjusted_rand_score

    agreements = []
    for pair in range(_PAIRS):
        order = np.random.default_rng([seed, k, pair]).permutation(len(points))
        halves = order[: len(points) // 2], order[len(points) // 2 :]
        labels = [_fitted(points[half], k, seed, starts=3).predict(points) for half in halves]
        agreements.append(adjusted_rand_score(*labels))
    return float(np.mean(agreements))


def hdbscan(points: np.ndarray, smallest: int, seed: int) -> Clusters:
    """As many clusters as are dense; a point in none goes where the nearest point that is in one belongs.

    Args:
        points: ``[n, p]``, of which `MOST_COMPARED` are looked at.
        smallest: Fewest of these that make a cluster.

    Raises:
        UserError: Fewer than two clusters are dense.
    """
    from sklearn.cluster import HDBSCAN
    from sklearn.neighbors import KNeighborsClassifier

    some = points[np.random.default_rng(seed).permutation(len(points))[:MOST_COMPARED]]
    labels = HDBSCAN(min_cluster_size=min(smallest, len(some)), copy=True).fit_predict(some)
    count = labels.max() + 1
    if count < 2:
        raise UserError(
            f"--method hdbscan has found {count} cluster(s) of at least {smallest} rows: give a smaller --smallest, or "
            f"--method kmeans"
        )
    clear = labels >= 0
    neighbours = KNeighborsClassifier(1).fit(some[clear], labels[clear])
    centres = np.stack([some[labels == number].mean(0) for number in range(count)])
    return Clusters(centres.astype(np.float32), {}, neighbours, float(1 - clear.mean()))


def _fitted(points: np.ndarray, k: int, seed: int, starts: int = _STARTS) -> KMeans:
    from sklearn.cluster import KMeans

    return KMeans(k, n_init=starts, random_state=seed).fit(points)
