"""The rankings in benchmarks/rankings.py: pursuit against a literal one, draws against their chances, and all of them
as the package calls a ranking of the user's."""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.config.user_functions import load_own
from colm_scale.randomness import generator
from colm_scale.records import CandidateMatrix, Candidates, Quota, long_tensor
from colm_scale.selection.rule import SelectionRule
from colm_scale.selection.select import select_coreset

RANKINGS = Path(__file__).resolve().parents[3] / "benchmarks" / "rankings.py"
UNTIMED = settings(deadline=None)  # a busy machine makes no failure
DRAWS = 3000
SIZES = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 100)), min_size=2, max_size=20)


def named(ranking: str) -> str:
    return f"{RANKINGS}:{ranking}"


def function(name: str, parameters: int):
    return load_own("selection.ranking", named(name), parameters)


walked = function("walked", 3)
match_by_pursuit, drawn_by_size = function("match_by_pursuit", 2), function("drawn_by_size", 3)
inclusion, NonNegativeFit = function("inclusion", 2), function("NonNegativeFit", 3)


def drawn(n: int, h: int, trial: int = 0) -> Tensor:
    return torch.randn(n, h, generator=generator(trial, "rows"))


# Balanced draws


def test_a_balanced_draw_has_equal_chances_and_a_near_mean():
    rows = drawn(9, 3).double()
    gram = rows @ rows.T + 0.1 * torch.eye(9)
    found = torch.zeros(DRAWS, 9, dtype=torch.float64)
    for number in range(DRAWS):
        picks = walked(gram, 3, generator(number, "walk"))
        assert len(picks) == len(set(picks.tolist())) == 3
        found[number, picks] = 1 / 3
    chances = 3 * found.mean(0)
    assert (chances - 1 / 3).abs().max() < 5 * (2 / 9 / DRAWS) ** 0.5  # no row is passed over, however far out
    own = ((found - 1 / 9) @ rows).square().sum(1).mean()
    plain = (rows - rows.mean(0)).square().sum() / 8 * (1 / 3 - 1 / 9)
    assert own < 0.5 * plain
    assert torch.equal(walked(gram, 9, generator(0, "walk")), torch.arange(9))


# Pursuit


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


def literal_pursuit(rows: Tensor, k: int) -> tuple[list[int], Tensor]:
    """With the additional entry written out."""
    rows = rows.double()
    square = float(rows.square().sum(1).mean())
    rows = torch.cat([rows, torch.full((len(rows), 1), 10 * square**0.5, dtype=torch.float64)], dim=1)
    target = left = rows.mean(0)
    picks: list[int] = []
    while len(picks) < k:
        there = [i for i in range(len(rows)) if i not in picks]
        picks.append(max(there, key=lambda i: float(rows[i] @ left)))
        own = rows[picks]
        w = least_squares(own @ own.T, own @ target, 0.5 * square)
        left = target - w @ own
    return picks, w


@pytest.mark.parametrize("k", [1, 4])
def test_pursuit_picks_what_points_most_to_what_is_left(k):
    for trial in range(8):
        rows = drawn(10, 3, trial) + 0.2
        picks, coefficients = match_by_pursuit(rows, k)
        expected, w = literal_pursuit(rows, k)
        assert picks.tolist() == expected
        relative = (w / w.mean()).clamp(min=0.1)
        torch.testing.assert_close(coefficients, relative / relative.mean(), rtol=1e-9, atol=1e-9)


@st.composite
def pools(draw):
    """Rows with ties and without, and how many to pick of them."""
    n, h = draw(st.integers(2, 12)), draw(st.integers(1, 3))
    entries = st.integers(-2, 2) if draw(st.booleans()) else st.floats(-3, 3, width=32)
    rows = torch.tensor(draw(st.lists(entries, min_size=n * h, max_size=n * h)), dtype=torch.float32).view(n, h)
    return rows, draw(st.integers(1, n - 1))


@settings(UNTIMED, max_examples=150)
@given(pools())
def test_pursuit_picks_as_many_as_are_wanted_and_lets_each_count(pool):
    rows, k = pool
    picks, coefficients = match_by_pursuit(rows, k)
    assert len(set(picks.tolist())) == len(picks) == k
    assert (coefficients > 0.01).all()
    assert float(coefficients.mean()) == pytest.approx(1)


@pytest.mark.parametrize("k", [3, 8])
def test_picks_belong_to_the_rows_and_not_to_their_order(k):
    for trial in range(10):
        rows, order = drawn(20, 4, trial), torch.randperm(20, generator=generator(trial, "order"))
        picks, weights = match_by_pursuit(rows, k)
        moved, moved_weights = match_by_pursuit(rows[order], k)
        assert torch.equal(order[moved], picks)
        torch.testing.assert_close(moved_weights, weights)


def test_the_coefficients_come_nearer_to_the_mean_than_equal_weights():
    ratios = []
    for trial in range(20):
        rows = drawn(40, 8, trial).double() * torch.arange(1, 9) ** -1.0 + 0.2
        picks, w = match_by_pursuit(rows.float(), 20)
        equal, fitted = rows[picks].mean(0), w @ rows[picks] / w.sum()
        ratios.append(float((fitted - rows.mean(0)).norm() / (equal - rows.mean(0)).norm()))
    assert sum(ratios) / len(ratios) < 0.5
    assert max(ratios) < 1


def test_pursuit_balances_a_large_row_and_takes_equal_ones_in_order():
    # The mean is 1: 9 points most to it, and then what is left points the other way.
    line = torch.tensor([[9.0], [1.0], [-1.0], [-2.0], [-2.0]])
    picks, _ = match_by_pursuit(line, 2)
    assert picks.tolist() == [0, 3]
    picks, coefficients = match_by_pursuit(torch.zeros(5, 2), 3)
    assert (picks.tolist(), coefficients.tolist()) == ([0, 1, 2], pytest.approx([1, 1, 1]))


# Draws by size


def frequencies(draw, n: int) -> Tensor:
    """Frequency of each of ``n`` candidates over many seeds."""
    counts = torch.zeros(n, dtype=torch.int64)
    for seed in range(DRAWS):
        counts[draw(generator(seed, "draw"))] += 1
    return counts / DRAWS


def allowed(probabilities: Tensor) -> Tensor:
    """Four standard deviations of a frequency, and nothing where the probability is 0 or 1."""
    return 4 * (probabilities * (1 - probabilities) / DRAWS).sqrt() + 1e-12


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
def test_a_draw_by_size_takes_each_as_often_as_its_size_says(sizes, k):
    sizes = torch.tensor(sizes)
    expected = inclusion(sizes, k)
    found = frequencies(lambda draw: drawn_by_size(sizes, k, draw)[0], len(sizes))
    assert ((found - expected).abs() <= allowed(expected)).all()


@UNTIMED
@given(SIZES, st.data())
def test_a_draw_by_size_takes_as_many_as_are_wanted_and_says_how_likely_each_was(sizes, data):
    k = data.draw(st.integers(1, len(sizes) - 1))
    sizes = torch.tensor(sizes, dtype=torch.float64)
    picks, probabilities = drawn_by_size(sizes, k, generator(data.draw(st.integers(0, 50)), "draw"))
    assert len(set(picks.tolist())) == k
    assert picks.tolist() == sorted(picks.tolist())
    assert torch.equal(probabilities, inclusion(sizes, k)[picks])
    assert set((inclusion(sizes, k) == 1).nonzero().flatten().tolist()) <= set(picks.tolist())


def test_a_sum_weighted_by_one_over_the_probability_is_right_on_average():
    sizes = torch.tensor([9.0, 1, 2, 3, 0.5, 4, 0, 6])
    values = torch.tensor([1.0, -2, 3, 5, -1, 2, 4, 1], dtype=torch.float64)
    estimates = []
    for seed in range(DRAWS):
        picks, probabilities = drawn_by_size(sizes, 3, generator(seed, "draw"))
        estimates.append(float((values[picks] / probabilities).sum()))
    estimates = torch.tensor(estimates, dtype=torch.float64)
    assert abs(estimates.mean() - values.sum()) < 4 * estimates.std() / DRAWS**0.5
    unweighted = values[long_tensor([0, 3, 7])].sum() * 8 / 3  # what the largest alone would say
    assert abs(unweighted - values.sum()) > 4 * estimates.std() / DRAWS**0.5


# As rankings of the user's

# Position:              0  1  2  3  4  5  6  7  8  9
SOURCES = long_tensor([2, 0, 1, 2, 1, 0, 2, 1, 1, 1])
# Source 1 has candidates 2, 4, 7, 8, 9 at 0, 1, 2, 9, 11; source 2 has 0, 3, 6 at 0, 5, 5.5. Source 0 is kept.
PLACE = {0: 0.0, 3: 5.0, 6: 5.5, 2: 0.0, 4: 1.0, 7: 2.0, 8: 9.0, 9: 11.0}
LOSSES = {2: 1.0, 4: 3.0, 7: 2.0, 8: 2.0, 9: 2.0, 0: 0.5, 3: 0.5, 6: 0.1}


def select(ranking: str, per_source: list[int], seed: int = 0, **options):
    quota = Quota(long_tensor([1, 5]), long_tensor(per_source))
    positions = quota.to_sketch(SOURCES)
    rows = torch.tensor([[PLACE[position], 0.0] for position in positions.tolist()])
    losses = torch.tensor([LOSSES[position] for position in positions.tolist()])
    matrix = CandidateMatrix(positions, rows, torch.ones(len(positions), dtype=torch.bool), losses)
    config = SelectionConfig(ranking=named(ranking), **options)
    return select_coreset(matrix, SOURCES, quota, config, partial(generator, seed, "test"))


def test_top_takes_the_highest_losses_in_order_and_of_equal_ones_the_first():
    assert select("top", [0, 3, 1]).positions.tolist() == [1, 5, 4, 7, 8, 0]


def test_importance_takes_what_is_large_for_certain_and_weighs_by_its_chance():
    # Sizes 0, 1, 2, 9, 11 for 3 picks: 9 and 11 are certain; the third is 4 or 7, with odds of 1 to 2 (2 counts for
    # 0.046). Of source 2, 5 and 5.5.
    for seed in range(20):
        selection = select("importance", [0, 3, 1], seed, weights="unbiased")
        found = dict(zip(selection.positions.tolist(), selection.weights.tolist()))
        assert found[8] == found[9] == 1
        (third,) = set(selection.picked.tolist()) & {2, 4, 7}
        assert found[third] == pytest.approx(3.046 / PLACE[third] if PLACE[third] else 3.046 / 0.046)
        of_two = selection.positions[-1].item()
        assert found[of_two] == pytest.approx(10.535 / max(PLACE[of_two], 0.035))


def test_pursuit_weighs_by_least_squares_and_each_source_as_its_candidates():
    selection = select("pursuit", [0, 2, 1], weights="unbiased")
    assert selection.picked.tolist() == [9, 2, 6]  # the largest, and what balances it
    of_one = selection.weights[2:4]
    assert float(of_one.sum()) == pytest.approx(5)
    assert float(of_one @ torch.tensor([11.0, 0.0])) / 5 == pytest.approx(4.6, abs=1)
    assert float(selection.weights[4]) == pytest.approx(3)
    assert select("pursuit", [0, 2, 1]).weights.tolist() == [1] * 5


def test_the_draws_of_a_rule_are_those_of_the_function_wherever_its_file_is(tmp_path):
    (tmp_path / "rankings.py").write_text(RANKINGS.read_text("utf-8"), encoding="utf-8")
    one = SelectionRule(SelectionConfig(candidates=12, budget=5, ranking=named("importance")), torch.tensor([False]), 0)
    elsewhere = dataclasses.replace(one.config, ranking=f"{tmp_path / 'rankings.py'}:importance")
    positions, rows = torch.arange(12), drawn(12, 2)
    matrix = CandidateMatrix(positions, rows, torch.ones(12, dtype=torch.bool), torch.zeros(12))
    picks = []
    for step in range(1, 9):
        candidates = Candidates(step, positions, positions, torch.zeros_like(positions), positions)
        quota = one.quota(candidates)
        found = one.select(candidates, quota, matrix).positions.tolist()
        assert dataclasses.replace(one, config=elsewhere).select(candidates, quota, matrix).positions.tolist() == found
        picks.append(tuple(found))
    assert len(set(picks)) > 4
