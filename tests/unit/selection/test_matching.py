"""Matching the mean against every exchange and every subset there is, and pursuit against a literal one."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colm_scale.randomness import generator
from colm_scale.records import long_tensor
from colm_scale.selection import matching
from colm_scale.selection.matching import NonNegativeFit, match_by_pursuit, match_by_swaps

UNTIMED = settings(deadline=None)  # a busy machine makes no failure
ONE = torch.ones(1, dtype=torch.float64)


def drawn(n: int, h: int, trial: int = 0) -> Tensor:
    return torch.randn(n, h, generator=generator(trial, "rows"))


def alone(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


def swapped(rows: Tensor, k: int) -> list[int]:
    return match_by_swaps(rows, alone(len(rows)), long_tensor([k]), ONE).tolist()


def away(rows: Tensor, groups: Tensor, picks, weights: Tensor) -> float:
    """Length of ``sum_i w_i (x_i - mean of its group)`` over the picks."""
    rows, picks = rows.double(), long_tensor(picks)
    means = torch.stack([rows[groups == group].mean(0) for group in range(len(weights))])
    return float((weights[groups[picks]].unsqueeze(1) * (rows[picks] - means[groups[picks]])).sum(0).norm())


@st.composite
def pools(draw):
    """Rows with ties and without, of groups that each have more than their quota, and weights."""
    h = draw(st.integers(1, 3))
    sizes = draw(st.lists(st.integers(2, 6), min_size=1, max_size=3))
    n, quotas = sum(sizes), [draw(st.integers(1, size - 1)) for size in sizes]
    entries = st.integers(-2, 2) if draw(st.booleans()) else st.floats(-3, 3, width=32)
    rows = torch.tensor(draw(st.lists(entries, min_size=n * h, max_size=n * h)), dtype=torch.float32).view(n, h)
    groups = torch.arange(len(sizes)).repeat_interleave(long_tensor(sizes))
    groups = groups[long_tensor(draw(st.permutations(range(n))))]
    weights = torch.tensor(draw(st.lists(st.integers(1, 3), min_size=len(sizes), max_size=len(sizes)))).double()
    return rows, groups, long_tensor(quotas), weights


# By swaps


@settings(UNTIMED, max_examples=200)
@given(pools())
def test_no_exchange_within_a_group_comes_nearer(pool):
    rows, groups, quotas, weights = pool
    picks = match_by_swaps(*pool).tolist()
    assert picks == sorted(set(picks))
    assert torch.bincount(groups[picks], minlength=len(quotas)).tolist() == quotas.tolist()
    reached = away(rows, groups, picks, weights)
    for pick in picks:
        for other in set(range(len(rows))) - set(picks):
            if groups[other] == groups[pick]:
                exchanged = [other if member == pick else member for member in picks]
                assert away(rows, groups, exchanged, weights) >= reached - 1e-6


def herded(rows: Tensor, k: int) -> list[int]:
    """The start, literally: each pick makes the sum of the deviations as small as can be."""
    picks: list[int] = []
    for _ in range(k):
        left = [i for i in range(len(rows)) if i not in picks]
        picks.append(min(left, key=lambda i: (away(rows, alone(len(rows)), [*picks, i], ONE), i)))
    return picks


def test_exchanges_only_ever_come_nearer_and_mostly_do(monkeypatch):
    nearer = 0
    for trial in range(30):
        rows = drawn(14, 3, trial)
        start = herded(rows, 5)
        reached = away(rows, alone(14), swapped(rows, 5), ONE)
        assert reached <= away(rows, alone(14), start, ONE) + 1e-9
        nearer += reached < away(rows, alone(14), start, ONE) - 1e-9
        with monkeypatch.context() as patch:
            patch.setattr(matching, "_MOST_SWEEPS", 0)
            assert swapped(rows, 5) == sorted(start)
    assert nearer >= 10


def test_the_best_subset_is_often_found_and_a_bad_one_never():
    """Of 252 subsets, the nearest in a third of the trials, one of the best tenth in nearly all, of the best third."""
    ranks = []
    for trial in range(30):
        rows = drawn(10, 2, trial)
        reached = away(rows, alone(10), swapped(rows, 5), ONE)
        every = [away(rows, alone(10), subset, ONE) for subset in combinations(range(10), 5)]
        ranks.append(sum(other < reached - 1e-9 for other in every))
    assert ranks.count(0) >= 10
    assert sum(rank < 25 for rank in ranks) >= 28
    assert max(ranks) < 84


def test_known_subsets():
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0], [14.0]])  # the mean is 4
    assert swapped(line, 1) == [3]
    assert swapped(line, 2) == [2, 3]  # 5 of 8: nearer than 14 with any
    assert swapped(line, 3) == [0, 1, 4]  # 15 of 12, nearer than 6; 0 with 1 before 16 and 17


def test_equal_candidates_are_taken_in_order():
    assert swapped(torch.ones(6, 3) * 0.1, 3) == [0, 1, 2]
    pairs = torch.tensor([[0.1, 0.3], [-0.7, 0.2], [0.1, 0.3], [-0.7, 0.2], [0.1, 0.3], [-0.7, 0.2]])
    assert swapped(pairs, 2) == [0, 1]


def test_a_group_makes_up_for_what_another_cannot_match():
    # Group 0 is -1, 1 about 0: one pick is off by 1 either way. Of group 1, about 10, the pick that is off by -1 helps.
    rows = torch.tensor([[-1.0], [1.0], [9.0], [10.0], [11.0]])
    groups = long_tensor([0, 0, 1, 1, 1])
    both = match_by_swaps(rows, groups, long_tensor([1, 1]), torch.ones(2, dtype=torch.float64))
    assert float((rows[both] - torch.tensor([[0.0], [10.0]])).sum()) == 0
    # A pick of group 0 that counts for half as much is made up for by no other: 0.5 is nearer than 0.5 and 1.
    halved = match_by_swaps(rows, groups, long_tensor([1, 1]), torch.tensor([0.5, 1.0], dtype=torch.float64))
    assert halved[1] in (2, 3, 4)
    assert away(rows, groups, halved, torch.tensor([0.5, 1.0]).double()) == 0.5


@pytest.mark.parametrize("k", [3, 8])
def test_picks_belong_to_the_rows_and_not_to_their_order(k):
    for trial in range(10):
        rows, order = drawn(20, 4, trial), torch.randperm(20, generator=generator(trial, "order"))
        assert sorted(order[swapped(rows[order], k)].tolist()) == swapped(rows, k)
        picks, weights = match_by_pursuit(rows, alone(20), long_tensor([k]), ONE)
        moved, moved_weights = match_by_pursuit(rows[order], alone(20), long_tensor([k]), ONE)
        assert torch.equal(order[moved], picks)
        torch.testing.assert_close(moved_weights, weights)


def test_size_and_place_of_the_rows_do_not_matter_to_swaps():
    rows = drawn(20, 4)
    assert swapped(rows * 1e-6, 8) == swapped(rows * 1e6, 8) == swapped(rows + 3, 8) == swapped(rows, 8)


# By pursuit


def least_squares(gram: Tensor, products: Tensor, ridge: float) -> Tensor:
    """The best of the solutions over all supports that are not negative."""
    k, best = len(products), (0.0, torch.zeros_like(products))
    equations = gram + ridge * torch.eye(k, dtype=gram.dtype)
    for size in range(1, k + 1):
        for support in combinations(range(k), size):
            at = list(support)
            w = torch.zeros_like(products)
            w[at] = torch.linalg.solve(equations[at][:, at], products[at])
            if (w >= 0).all():
                best = min(best, (float(w @ equations @ w - 2 * w @ products), w), key=lambda pair: pair[0])
    return best[1]


def test_the_fit_is_the_best_that_is_not_negative_after_every_row():
    zeros = 0
    for trial in range(15):
        rows, target = drawn(8, 3, trial).double(), drawn(1, 3, 100 + trial)[0].double()
        fit = NonNegativeFit(rows @ rows.T, rows @ target, 0.05)
        for count, pick in enumerate((5, 2, 7, 0, 1, 4), 1):
            fit.add(pick)
            own = rows[fit.picks]
            expected = least_squares(own @ own.T, own @ target, 0.05)
            torch.testing.assert_close(fit.coefficients, expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(fit.left, rows @ (target - expected @ own), rtol=1e-9, atol=1e-9)
            assert len(fit.picks) == count
        zeros += int((fit.coefficients == 0).sum())
    assert zeros > 10  # or nothing ever left the fit


def literal_pursuit(rows: Tensor, groups: Tensor, quotas: Tensor, weights: Tensor) -> tuple[list[int], Tensor]:
    """With the additional entry written out."""
    rows = rows.double()
    square = float(rows.square().sum(1).mean())
    rows = torch.cat([rows, torch.full((len(rows), 1), 10 * square**0.5, dtype=torch.float64)], dim=1)
    shares = quotas * weights / (quotas * weights).sum()
    target = sum(share * rows[groups == group].mean(0) for group, share in enumerate(shares))
    picks: list[int] = []
    left = target
    while len(picks) < int(quotas.sum()):
        filled = torch.bincount(groups[picks], minlength=len(quotas)) == quotas
        there = [i for i in range(len(rows)) if i not in picks and not filled[groups[i]]]
        picks.append(max(there, key=lambda i: float(rows[i] @ left)))
        own = rows[picks]
        w = least_squares(own @ own.T, own @ target, 0.5 * square)
        left = target - w @ own
    return picks, w


@pytest.mark.parametrize("quotas", [[4, 0], [1, 3], [2, 2]])
def test_pursuit_picks_what_points_most_to_what_is_left(quotas):
    groups = long_tensor([0, 0, 1, 0, 1, 0, 1, 1, 0, 1])
    quotas, weights = long_tensor(quotas), torch.tensor([1.0, 2.5], dtype=torch.float64)
    for trial in range(8):
        rows = drawn(10, 3, trial) + 0.2
        picks, coefficients = match_by_pursuit(rows, groups, quotas, weights)
        expected, w = literal_pursuit(rows, groups, quotas, weights)
        assert picks.tolist() == expected
        relative = (w / w.mean()).clamp(min=0.1)
        torch.testing.assert_close(coefficients, relative / relative.mean(), rtol=1e-9, atol=1e-9)


@settings(UNTIMED, max_examples=150)
@given(pools())
def test_pursuit_fills_the_quotas_and_lets_every_pick_count(pool):
    _, groups, quotas, _ = pool
    picks, coefficients = match_by_pursuit(*pool)
    assert len(set(picks.tolist())) == len(picks)
    assert torch.bincount(groups[picks], minlength=len(quotas)).tolist() == quotas.tolist()
    assert (coefficients > 0.01).all()
    assert float(coefficients.mean()) == pytest.approx(1)


def test_the_coefficients_come_nearer_to_the_mean_than_equal_weights():
    ratios = []
    for trial in range(20):
        rows = drawn(40, 8, trial).double() * torch.arange(1, 9) ** -1.0 + 0.2
        picks, w = match_by_pursuit(rows.float(), alone(40), long_tensor([20]), ONE)
        equal, fitted = rows[picks].mean(0), w @ rows[picks] / w.sum()
        ratios.append(float((fitted - rows.mean(0)).norm() / (equal - rows.mean(0)).norm()))
    assert sum(ratios) / len(ratios) < 0.5
    assert max(ratios) < 1


def test_pursuit_balances_a_large_row_and_takes_equal_ones_in_order():
    # The mean is 1: 9 points most to it, and then what is left points the other way.
    line = torch.tensor([[9.0], [1.0], [-1.0], [-2.0], [-2.0]])
    picks, _ = match_by_pursuit(line, alone(5), long_tensor([2]), ONE)
    assert picks.tolist() == [0, 3]
    picks, coefficients = match_by_pursuit(torch.zeros(5, 2), alone(5), long_tensor([3]), ONE)
    assert (picks.tolist(), coefficients.tolist()) == ([0, 1, 2], pytest.approx([1, 1, 1]))
