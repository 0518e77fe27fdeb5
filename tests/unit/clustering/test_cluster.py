from __future__ import annotations

import numpy as np
import pytest

from colm_scale.clustering.cluster import check_installed, hdbscan, kmeans, one_thread, regroup
from colm_scale.errors import UserError
from colm_scale.sources.report import Agreement, small


def blobs(sizes, spread=0.3, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Points around corners far from each other, and the corner of each."""
    draws = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    corners = 10 * np.eye(len(sizes))
    points = corners[labels] + spread * draws.standard_normal((len(labels), len(sizes)))
    order = draws.permutation(len(labels))
    return points[order].astype(np.float32), labels[order]


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def partition(labels) -> set[frozenset]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)}


def test_the_largest_stable_number_is_that_of_the_groups():
    points, truth = blobs((80, 60, 40, 30, 20))
    found = kmeans(points, [2, 3, 5, 8, 12], 0.8, seed=0)
    labels, distances = found.assign(points)
    assert partition(labels) == partition(truth)
    assert found.stability[5] == 1
    assert max(found.stability[8], found.stability[12]) < 0.8
    centres = np.stack([points[labels == label].mean(0) for label in labels])
    np.testing.assert_allclose(distances, np.linalg.norm(points - centres, axis=1), rtol=1e-3)


def test_where_nothing_is_stable_the_most_stable_number_is_taken():
    points = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    found = kmeans(points, [4, 9], 0.99, seed=0)
    assert len(found.centres) == max(found.stability, key=found.stability.get)


def test_too_few_points_are_refused():
    with pytest.raises(UserError, match="5 rows are too few for 3 clusters"):
        kmeans(np.zeros((5, 2), np.float32), [3, 4], 0.8, seed=0)


def test_dense_groups_are_found_and_the_rest_goes_to_the_nearest():
    points, truth = blobs((80, 60, 40))
    odd = np.array([[60.0, 4.0, 0.0]], np.float32)  # beside the first
    found = hdbscan(np.concatenate([points, odd]), 15, seed=0)
    labels, _ = found.assign(np.concatenate([points, odd]))
    assert partition(labels[:-1]) == partition(truth)
    assert labels[-1] == labels[:-1][truth == 0][0]
    assert 0 < found.noise < 0.3


def test_agreement_with_known_sources():
    truth = np.repeat([0, 1, 2], [80, 15, 5])
    same = Agreement.of(("large", "small", "tiny"), truth, truth[::1])
    assert same.adjusted_rand == 1
    assert same.recovered == {"small": 1, "tiny": 1}
    assert same.kept_share == pytest.approx(0.2)
    # "small" has a cluster of its own but for three rows, "tiny" is in the large one's.
    labels = np.where(truth == 1, 1, 0)
    labels[80:83] = 0
    mixed = Agreement.of(("large", "small", "tiny"), truth, labels)
    assert mixed.recovered == {"small": 12 / 15, "tiny": 0}


def test_the_small_ones_are_those_of_the_rule():
    assert small(np.repeat([0, 1, 2], [6, 3, 3])).tolist() == [False, True, True]
    assert small(np.repeat([0, 1], [4, 4])).tolist() == [False, False]


def test_what_is_not_installed_is_named_with_its_extra():
    check_installed("sklearn", "matplotlib")
    with pytest.raises(UserError, match=r"needs no_such_module: pip install 'colm_scale\[sources\]'"):
        check_installed("sklearn", "no_such_module")


# regroup.py


def test_sources_that_are_as_they_were_stay():
    points, truth = blobs((60, 30, 10))
    found = regroup(points, truth + 3, seed=0)  # numbers need not begin at 0
    assert found.sources.tolist() == (truth + 3).tolist()
    assert found.new == ()


def test_whoever_moved_is_found_and_the_rest_keeps_its_number():
    points, truth = blobs((60, 30, 20))
    before = truth.copy()
    before[np.flatnonzero(truth == 0)[:7]] = 2
    found = regroup(points, before, seed=0)
    assert found.sources.tolist() == truth.tolist()
    assert found.new == ()


def test_a_group_that_comes_up_takes_the_number_of_one_that_is_gone():
    """Two sources that were told apart by chance are one group; what was a part of the large source is another."""
    points, truth = blobs((90, 60, 40))
    draws = np.random.default_rng(1)
    before = np.where(truth == 2, 0, np.where(truth == 1, draws.integers(1, 3, len(truth)), 0))
    found = regroup(points, before, seed=0)
    assert partition(found.sources) == partition(truth)
    assert (found.sources[truth == 0] == 0).all()
    (taken,) = found.new
    assert (found.sources[truth == 2] == taken).all()


def test_one_source_stays_one():
    assert regroup(np.zeros((4, 3), np.float32), np.full(4, 2), seed=0).sources.tolist() == [2, 2, 2, 2]
