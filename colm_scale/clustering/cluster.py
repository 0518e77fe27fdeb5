"""Clustering of points: k-means with a stable number of clusters, HDBSCAN, and re-clustering of sources during a run.

    n  points        p  numbers of a point        k  clusters        m  examples that are re-clustered
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from colm_scale.errors import UserError

if TYPE_CHECKING:
    from sklearn.cluster import KMeans

MOST_COMPARED = 20_000
"""Most points on which stability is measured, and that HDBSCAN clusters."""
_PAIRS, _STARTS, _RECLUSTER_STARTS = 3, 10, 5
"""Pairs of halves compared for each number of clusters; starts of k-means, of which the best is used."""
_COMPONENTS = 32
"""Most principal components that are clustered."""
_BETTER = 0.95
"""A clustering from scratch is used only if its inertia is below this share of the inertia of one that starts from the
current sources, so that examples do not move for little gain."""


def check_installed(*modules: str) -> None:
    """Raise a UserError if one of these modules of the extra ``sources`` is not installed."""
    for module in modules:
        if not importlib.util.find_spec(module):
            raise UserError(f"finding sources needs {module}: pip install 'colm_scale[sources]'")


@contextmanager
def one_thread() -> Iterator[None]:
    """Run scikit-learn on one thread within a block; on several threads, the order of sums varies."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


@dataclass(frozen=True, slots=True)
class Clusters:
    """Fitted clusters.

    Attributes:
        centres: ``[k, p]`` float32 mean of each cluster.
        predict: Maps ``[n, p]`` points to ``[n]`` clusters.
        stability: Agreement of halves (adjusted Rand index) for each number of clusters that was tried.
        noise: Share of the points that were in no dense cluster, and were assigned to the nearest one.
    """

    centres: np.ndarray
    predict: Callable[[np.ndarray], np.ndarray]
    stability: dict[int, float] = field(default_factory=dict)
    noise: float = 0.0

    def assign(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return ``[n]`` int32 cluster of each point, and ``[n]`` float32 distance to its centre."""
        labels = self.predict(points)
        distances = np.linalg.norm(points - self.centres[labels], axis=1)
        return labels.astype(np.int32), distances.astype(np.float32)


def kmeans(points: np.ndarray, numbers: Sequence[int], threshold: float, seed: int) -> Clusters:
    """Cluster with the largest stable number of clusters; if none is stable, with the most stable number.

    Args:
        points: ``[n, p]``.
        numbers: Numbers of clusters to try; those of n / 2 or more are skipped.
        threshold: Least stability of a stable number.

    Raises:
        UserError: There are too few points for any number.
    """
    from sklearn.metrics import pairwise_distances_argmin

    possible = sorted(number for number in set(numbers) if 2 * number < len(points))
    if not possible:
        raise UserError(f"{len(points)} rows are too few for {min(numbers)} clusters: use fewer --clusters")
    draws = np.random.default_rng(seed)
    some = points[draws.permutation(len(points))[:MOST_COMPARED]]
    found = {number: stability(some, number, seed) for number in possible} if len(possible) > 1 else {}
    stable = [number for number, agreement in found.items() if agreement >= threshold]
    chosen = max(stable) if stable else max(found, key=lambda number: found[number], default=possible[0])
    centres = _fitted(points, chosen, seed).cluster_centers_.astype(np.float32)
    return Clusters(centres, partial(pairwise_distances_argmin, Y=centres), found)


def stability(points: np.ndarray, k: int, seed: int) -> float:
    """Measure how well clusterings fitted to two halves of the points agree: mean adjusted Rand index, 1 at best.

    Model selection by replication, as in Lange et al. 2004 and Tibshirani and Walther 2005.
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
    """Find dense clusters; a point in none of them gets the cluster of the nearest point in one.

    Args:
        points: ``[n, p]``, of which a sample of `MOST_COMPARED` is clustered.
        smallest: Fewest points of the sample that form a cluster.

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
            f"--method hdbscan has found {count} cluster(s) of at least {smallest} rows: use a smaller --smallest, or "
            f"--method kmeans"
        )
    clear = labels >= 0
    neighbours = KNeighborsClassifier(1).fit(some[clear], labels[clear])
    centres = np.stack([some[labels == number].mean(0) for number in range(count)])
    return Clusters(centres.astype(np.float32), neighbours.predict, noise=float(1 - clear.mean()))


def _fitted(points: np.ndarray, k: int, seed: int, starts: int = _STARTS) -> KMeans:
    from sklearn.cluster import KMeans

    return KMeans(k, n_init=starts, random_state=seed).fit(points)


@dataclass(frozen=True, slots=True)
class Regrouped:
    """Re-clustered sources.

    Attributes:
        sources: ``[m]`` int64 new source of each example.
        new: Sources most of whose examples had another source before.
    """

    sources: np.ndarray
    new: tuple[int, ...]


def regroup(states: np.ndarray, sources: np.ndarray, seed: int) -> Regrouped:
    """Cluster examples into as many groups as they have sources, and match each group with a source.

    k-means starts from the means of the current sources, and also from scratch. Groups are matched with sources so that
    as many examples as possible keep their source (the assignment problem, Kuhn 1955).

    Args:
        states: ``[m, p]`` float32.
        sources: ``[m]`` current source of each example.
        seed: Seed of the start from scratch.
    """
    from scipy.optimize import linear_sum_assignment

    present, before = np.unique(sources, return_inverse=True)
    if len(present) < 2:
        return Regrouped(sources.astype(np.int64), ())
    groups = _clustered(states, before, len(present), seed)
    common = np.zeros((len(present), len(present)), np.int64)
    np.add.at(common, (groups, before), 1)
    _, source_of = linear_sum_assignment(common, maximize=True)
    stayed, sizes = common[np.arange(len(present)), source_of], common.sum(1)
    new = present[source_of[2 * stayed < sizes]]
    return Regrouped(present[source_of[groups]].astype(np.int64), tuple(sorted(new.tolist())))


def _clustered(states: np.ndarray, before: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Return ``[m]`` group of each example, from the better of the two starts."""
    with one_thread():
        from sklearn.cluster import KMeans
        from sklearn.decomposition import PCA
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        components = min(_COMPONENTS, *states.shape)
        points = make_pipeline(StandardScaler(), PCA(components, svd_solver="full")).fit_transform(states)
        means = np.stack([points[before == number].mean(0) for number in range(k)])
        going_on = KMeans(k, init=means, n_init=1).fit(points)
        from_scratch = KMeans(k, n_init=_RECLUSTER_STARTS, random_state=seed).fit(points)
    better = from_scratch.inertia_ < _BETTER * going_on.inertia_
    labels: np.ndarray = (from_scratch if better else going_on).labels_
    return labels
