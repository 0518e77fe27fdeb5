"""Drawn subsets: every candidate enters as often as it should, so that weighted sums are right on average."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colm_scale.randomness import generator
from colm_scale.records import long_tensor
from colm_scale.selection.sampling import importance, inclusion, systematic

UNTIMED = settings(deadline=None)  # a busy machine makes no failure
DRAWS = 3000
SIZES = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 100)), min_size=2, max_size=20)


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


def literal_inclusion(sizes: list[float], k: int) -> list[float]:
    """``min(1, c * size)`` with the ``c`` that makes the sum k, by bisection."""
    low, high = 0.0, k / min(sizes)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(min(1.0, middle * size) for size in sizes) < k else (low, middle)
    return [min(1.0, high * size) for size in sizes]


@UNTIMED
@given(SIZES, st.data())
def test_probabilities_go_with_the_sizes_and_add_up_to_the_number_of_picks(sizes, data):
    k = data.draw(st.integers(1, len(sizes) - 1))
    least = 0.01 * sum(sizes) / len(sizes)
    expected = literal_inclusion([max(size, least) for size in sizes] if any(sizes) else [1.0] * len(sizes), k)
    found = inclusion(torch.tensor(sizes, dtype=torch.float64), k)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert float(found.sum()) == pytest.approx(k)
    assert (found > 0).all()


def test_known_probabilities():
    assert inclusion(torch.tensor([1.0, 2.0, 3.0]), 1).tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    # 8 of 12 is more than a third of the three picks: it is certain, and so is then 2 of 4, for two picks.
    assert inclusion(torch.tensor([8.0, 2.0, 1.0, 1.0]), 3).tolist() == pytest.approx([1, 1, 0.5, 0.5])


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("sizes", [[1.0, 2, 3, 4, 5, 6], [100.0, 1, 1, 2, 30, 0, 0], [0.0, 0, 0, 0], [1e-30, 1, 2]])
def test_importance_takes_each_as_often_as_its_size_says(sizes, k):
    sizes = torch.tensor(sizes)
    expected = inclusion(sizes, k)
    found = frequencies(lambda draw: importance(sizes, k, draw)[0], len(sizes))
    assert ((found - expected).abs() <= allowed(expected)).all()


@UNTIMED
@given(SIZES, st.data())
def test_importance_takes_as_many_as_are_wanted_and_says_how_likely_each_was(sizes, data):
    k = data.draw(st.integers(1, len(sizes) - 1))
    sizes = torch.tensor(sizes, dtype=torch.float64)
    picks, probabilities = importance(sizes, k, generator(data.draw(st.integers(0, 50)), "draw"))
    assert len(set(picks.tolist())) == k
    assert picks.tolist() == sorted(picks.tolist())
    assert torch.equal(probabilities, inclusion(sizes, k)[picks])
    assert set((inclusion(sizes, k) == 1).nonzero().flatten().tolist()) <= set(picks.tolist())


def test_a_sum_weighted_by_one_over_the_probability_is_right_on_average():
    sizes = torch.tensor([9.0, 1, 2, 3, 0.5, 4, 0, 6])
    values = torch.tensor([1.0, -2, 3, 5, -1, 2, 4, 1], dtype=torch.float64)
    estimates = []
    for seed in range(DRAWS):
        picks, probabilities = importance(sizes, 3, generator(seed, "draw"))
        estimates.append(float((values[picks] / probabilities).sum()))
    estimates = torch.tensor(estimates, dtype=torch.float64)
    assert abs(estimates.mean() - values.sum()) < 4 * estimates.std() / DRAWS**0.5
    unweighted = values[long_tensor([0, 3, 7])].sum() * 8 / 3  # what the largest alone would say
    assert abs(unweighted - values.sum()) > 4 * estimates.std() / DRAWS**0.5
