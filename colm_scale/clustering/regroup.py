"""Clusters of a model that has changed meanwhile, under the numbers of those before.

    m  examples        p  numbers of an example's state        Q  sources
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from colm_scale.clustering.cluster import one_thread

_COMPONENTS = 32
"""Most principal components that are clustered."""
_STARTS = 5
_BETTER = 0.95
"""A clustering from scratch is taken if its inertia is below this share of that which goes on from the sources as they
are: else many examples would move for little."""


@dataclass(frozen=True, slots=True)
class Regrouped:
    """What has become of the sources.

    Attributes:
        sources: ``[m]`` int64 source of each example now.
        new: Sources most of whose examples were of another one before.
    """

    sources: np.ndarray
    new: tuple[int, ...]


def regroup(states: np.ndarray, sources: np.ndarray, seed: int) -> Regrouped:
    """Cluster examples into as many groups as they have sources, and name each group after the source most like it.

    k-means goes on from the means of the sources as they are, and also begins from scratch. Groups are matched with
    sources so that as many examples as can be keep theirs (Kuhn 1955: the assignment problem).

    Args:
        states: ``[m, p]`` float32.
        sources: ``[m]`` source of each example so far.
        seed: Of the start from scratch.
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
    """``[m]`` group of each example, by the better of two starts."""
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
