"""The exact solver on the line against all subsets, a plain dynamic program, and one way against the other."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from colm_scale.randomness import generator
from colm_scale.selection.ranking import line
from colm_scale.selection.ranking.facility import greedy
from colm_scale.selection.ranking.line import medoids_on_line
from colm_scale.selection.ranking.similarity import similarities

KINDS = ("normal", "ties", "few values", "even", "clusters", "heavy tail", "clipped")


def drawn(kind: str, n: int, trial: int = 0) -> torch.Tensor:
    draw = generator(trial, "line", kind, n)
    normal = torch.randn(n, generator=draw, dtype=torch.float64)
    match kind:
        case "ties":
            return torch.randint(0, max(2, n // 3), (n,), generator=draw).double()
        case "few values":
            return torch.randint(0, 5, (n,), generator=draw).double()
        case "even":
            return torch.randperm(n, generator=draw).double()
        case "clusters":
            return torch.randint(0, 4, (n,), generator=draw) * 100 + normal / 1000
        case "heavy tail":
            return (3 * normal).exp()
        case "clipped":
            return (3 * normal).float().clamp(-1, 1).double()
    return normal


def spread(values: torch.Tensor, picks) -> float:
    """Sum of distances to the nearest pick."""
    return float((values.unsqueeze(1) - values[list(picks)]).abs().amin(1).sum())


def least_spread(values: torch.Tensor, k: int) -> float:
    """By the dynamic program that tries every last segment: O(n^2 k)."""
    x = values.sort().values
    n = len(x)
    before = torch.cat([x.new_zeros(1), x.cumsum(0)])
    i, j = torch.arange(n), torch.arange(n).unsqueeze(1)
    middle = (i + j) // 2
    left = x[middle] * (middle - i + 1) - (before[middle + 1] - before[i])
    right = before[j + 1] - before[middle + 1] - x[middle] * (j - middle)
    costs = (left + right).masked_fill(j < i, torch.inf)
    best = costs[:, 0]
    for _ in range(k - 1):
        best = (costs[:, 1:] + best[:-1]).amin(1)
    return float(best[-1])


@pytest.fixture(params=["layers", "prices"])
def only(request, monkeypatch):
    """One of the two ways, whatever the sizes."""
    way = {"layers": line._by_layers, "prices": line._by_price}[request.param]
    monkeypatch.setattr(line, "_by_layers", way)
    monkeypatch.setattr(line, "_by_price", way)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_no_subset_is_better(n, kind, only):
    for trial in range(2):
        values = drawn(kind, n, trial)
        for k in range(1, n + 1):
            picks, sizes = medoids_on_line(values, k)
            assert len(set(picks.tolist())) == k
            best = min(spread(values, subset) for subset in combinations(range(n), k))
            assert spread(values, picks.tolist()) == pytest.approx(best, rel=1e-9, abs=1e-9)  # sums in float64
            assert (sizes > 0).all()
            assert sizes.sum() == n


def test_a_medoid_stands_for_the_candidates_nearest_to_it(only):
    for k in (1, 3, 8):
        values = drawn("normal", 9)
        picks, sizes = medoids_on_line(values, k)
        nearest = (values.unsqueeze(1) - values[picks]).abs().argmin(1)
        assert sizes.tolist() == torch.bincount(nearest, minlength=k).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_no_cut_is_better(kind, only):
    for n in (40, 130):
        values = drawn(kind, n)
        for k in {2, n // 7, n // 2, 3 * n // 4}:
            picks, sizes = medoids_on_line(values, k)
            assert len(set(picks.tolist())) == k
            assert sizes.sum() == n
            assert (values[picks].diff() >= 0).all()
            assert spread(values, picks.tolist()) == pytest.approx(least_spread(values, k), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_are_worth_the_same_where_the_line_is_many_blocks(kind):
    on_line = line._Line.of(drawn(kind, 2000).sort().values.numpy())
    for share in (2, 5):
        k = on_line.last // share
        paths = [way(on_line, k) for way in (line._by_layers, line._by_price)]
        costs = [line._Path(on_line, path).cost for path in paths]
        assert len(paths[0]) == len(paths[1]) == k + 1
        assert costs[0] == costs[1]


def test_paths_at_a_price_are_those_of_one_block():
    on_line = line._Line.of(drawn("normal", 3000).sort().values.numpy())
    price = int(line._guess(on_line, 1500)) | 1
    whole = line._steps_at_price(on_line, price, reach=3000)
    for reach in (4, 64, 500):  # 4 is too short for some: those are done again
        assert np.array_equal(line._steps_at_price(on_line, price, reach), whole)


def test_paths_that_never_meet_are_found_all_the_same():
    """On an even line all steps are of three nodes, and paths from two nodes next to each other stay apart."""
    on_line = line._Line.of(np.arange(300.0))
    path = line._by_price(on_line, 100)
    assert np.diff(path).tolist() == [3] * 100


def test_two_paths_are_joined_to_one_of_any_number_between():
    on_line = line._Line.of(np.arange(31.0))  # three values to a step or one: each step more saves the same
    few, many = np.append(np.arange(0, 31, 3), 31), np.arange(32)
    cost_of_few = line._Path(on_line, few).cost
    saved = cost_of_few // (len(many) - len(few))
    for k in range(len(few) - 1, len(many)):
        joined = line._joined(few, many, k)
        assert len(joined) == k + 1
        assert (np.diff(joined) > 0).all()
        assert (joined[0], joined[-1]) == (0, 31)
        assert line._Path(on_line, joined).cost == cost_of_few - (k + 1 - len(few)) * saved


def test_the_guessed_price_is_near():
    for kind in ("normal", "heavy tail"):
        on_line = line._Line.of(drawn(kind, 3000).sort().values.numpy())
        for k in (300, 1500):
            path = line._cheapest_path(on_line, int(line._guess(on_line, k)) | 1, k)
            assert k / 1.3 < len(path) < 1.3 * k


def test_greedy_is_never_better():
    values = torch.randn(60, generator=generator(1, "line"))
    for k in (1, 2, 7, 30, 59):
        taken = greedy(similarities(values.unsqueeze(1), "l1"), k)
        exact = spread(values, medoids_on_line(values, k)[0].tolist())
        assert exact <= spread(values, taken.tolist()) + 1e-5  # float32 distances


def test_known_answers():
    values = torch.tensor([10.0, 0.0, 1.0, 11.0, 2.0, 12.0])
    picks, sizes = medoids_on_line(values, 2)
    assert (picks.tolist(), sizes.tolist()) == ([2, 3], [3, 3])
    # Of two middles the lower value; among equal values the lower index.
    assert medoids_on_line(torch.tensor([3.0, 1.0]), 1)[0].tolist() == [1]
    assert medoids_on_line(torch.tensor([5.0, 5.0, 5.0]), 1)[0].tolist() == [1]
    assert medoids_on_line(torch.tensor([5.0, 5.0, 9.0]), 2)[1].tolist() == [2, 1]


def test_more_medoids_than_values_share_equal_ones():
    picks, sizes = medoids_on_line(torch.tensor([7.0, 5.0, 5.0, 7.0, 5.0]), 4)
    assert sizes.tolist() == [1, 1, 1, 2]
    assert picks.tolist() == [1, 2, 4, 0]


def test_permuted_candidates_give_the_same_medoids():
    values = torch.randn(40, generator=generator(2, "line"))
    order = torch.randperm(40, generator=generator(3, "line"))
    assert order[medoids_on_line(values[order], 9)[0]].tolist() == medoids_on_line(values, 9)[0].tolist()


def test_the_scale_and_the_origin_do_not_matter():
    values = drawn("normal", 50).float().double()
    picks = medoids_on_line(values, 20)[0].tolist()
    assert medoids_on_line(values * 2.0**60, 20)[0].tolist() == picks
    assert medoids_on_line(values * 2.0**-90, 20)[0].tolist() == picks
    assert medoids_on_line(values + 2.0**10, 20)[0].tolist() == picks
