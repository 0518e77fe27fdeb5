from __future__ import annotations

from itertools import product
from math import comb, prod

import numpy as np
import pytest

from colm_scale.explain.chance import distribution, false_discovery, family_wise, most_extreme, two_sided

CHANCES = np.array([[0.5, 0.1, 1.0], [0.25, 0.25, 0.25]])


def by_enumeration(chances: np.ndarray) -> list[float]:
    found = [0.0] * (len(chances) + 1)
    for outcome in product([0, 1], repeat=len(chances)):
        found[sum(outcome)] += prod(p if success else 1 - p for success, p in zip(outcome, chances))
    return found


def test_the_distribution_is_that_of_all_outcomes():
    for found, chances in zip(distribution(CHANCES), CHANCES, strict=True):
        assert found.tolist() == pytest.approx(by_enumeration(chances))


def test_equal_chances_are_binomial():
    (found,) = distribution(np.full((1, 40), 0.3))
    assert found.tolist() == pytest.approx([comb(40, k) * 0.3**k * 0.7 ** (40 - k) for k in range(41)])


def test_p_values_are_twice_the_smaller_tail():
    coins = distribution(np.full((4, 4), 0.5))
    assert two_sided(coins, np.array([0, 1, 2, 4])).tolist() == pytest.approx([2 / 16, 10 / 16, 1, 2 / 16])
    assert most_extreme(coins).tolist() == pytest.approx([2 / 16] * 4)
    certain = distribution(np.ones((1, 3)))
    assert two_sided(certain, np.array([3])).tolist() == most_extreme(certain).tolist() == [1]


def test_false_discovery_is_the_published_procedure():
    """The 15 p-values of Benjamini and Hochberg (1995), section 4: four of them are rejected at 0.05, and by Holm's
    procedure three."""
    p = (0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344)
    p = np.array([*p, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0])
    shuffled = np.random.default_rng(0).permutation(15)
    adjusted = false_discovery(p[shuffled])
    assert set(shuffled[adjusted <= 0.05]) == {0, 1, 2, 3}
    assert adjusted[shuffled.argsort()][:2].tolist() == pytest.approx([0.0015, 0.003])
    assert set(shuffled[family_wise(p[shuffled]) <= 0.05]) == {0, 1, 2}
    assert false_discovery(np.array([])).tolist() == family_wise(np.array([])).tolist() == []
