"""Re-clustering of sources: examples are clustered again as the model changes, and clusters keep their numbers.

    m  examples        p  width of an example's state
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from colm_scale.clustering.cluster import one_thread

_COMPONENTS = 32
"""Most principal components that are clustered."""
_STARTS = 5
_BETTER = 0.95
"""A clustering from scratch is used only if its inertia is below this share of the inertia of one that starts from the
current sources, so that examples do not move for little gain."""


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
        from_scratch = KMeans(k, n_init=_STARTS, random_state=seed).fit(points)
    better = from_scratch.inertia_ < _BETTER * going_on.inertia_
    labels: np.ndarray = (from_scratch if better else going_on).labels_
    return labels
