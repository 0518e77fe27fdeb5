"""Drawn subsets: every candidate enters as often as it should."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colm_scale.randomness import generator
from colm_scale.selection.ranking.rank import systematic

UNTIMED = settings(deadline=None)  # a busy machine makes no failure
DRAWS = 3000


def frequencies(draw, n: int) -> Tensor:
    """How often each of ``n`` candidates enters, over many seeds."""
    counts = torch.zeros(n, dtype=torch.int64)
    for seed in range(DRAWS):
        counts[draw(generator(seed, "draw"))] += 1
    return counts / DRAWS


def allowed(probabilities: Tensor) -> Tensor:
    """Four standard deviations of a frequency, and nothing where the probability is 0 or 1."""
    return 4 * (probabilities * (1 - probabilities) / DRAWS).sqrt() + 1e-12


@pytest.mark.parametrize(("n", "k"), [(10, 5), (7, 3), (5, 4), (6, 1), (9, 9)])
def test_systematic_takes_each_equally_often(n, k):
    values = torch.randn(n, generator=generator(n, "values"))
    found = frequencies(lambda draw: systematic(values, k, draw), n)
    expected = torch.full((n,), k / n)
    assert ((found - expected).abs() <= allowed(expected)).all()


@UNTIMED
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.data())
def test_systematic_takes_every_so_many_in_order(values, data):
    n, values = len(values), torch.tensor(values)
    k = data.draw(st.integers(1, n))
    picks = systematic(values, k, generator(data.draw(st.integers(0, 50)), "draw")).tolist()
    order = sorted(range(n), key=lambda i: (values[i], i))
    places = [order.index(pick) for pick in picks]
    gaps = [later - earlier for earlier, later in pairwise(places)]
    assert len(set(picks)) == k
    assert set(gaps) <= {n // k, -(-n // k)}
    assert places[0] < n / k
    assert places[-1] >= n - n / k - 1


def test_systematic_draws_one_of_the_starts_there_are():
    values = torch.tensor([3.0, 0.0, 2.0, 1.0, 5.0, 4.0])  # in order: 1, 3, 2, 0, 5, 4
    drawn = {tuple(systematic(values, 2, generator(seed, "draw")).tolist()) for seed in range(40)}
    assert drawn == {(1, 0), (3, 5), (2, 4)}


def test_a_systematic_sum_is_off_by_less_than_one_gap():
    """What the order is for: random subsets have no such bound."""
    values = torch.randn(60, generator=generator(0, "values"), dtype=torch.float64)
    for seed in range(50):
        estimate = 6 * values[systematic(values, 10, generator(seed, "draw"))].sum()
        assert (estimate - values.sum()).abs() <= 6 * (values.max() - values.min())
