"""The exact solver on the line against all subsets, and against greedy."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from colm_scale.randomness import generator
from colm_scale.selection.facility import greedy
from colm_scale.selection.line import medoids_on_line
from colm_scale.selection.similarity import similarities


def spread(values: torch.Tensor, picks) -> float:
    """Sum of distances to the nearest pick."""
    return float((values.unsqueeze(1) - values[list(picks)]).abs().amin(1).sum())


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_no_subset_is_better(n):
    for draw in range(6):
        values = torch.randn(n, generator=generator(draw, "line", n), dtype=torch.float64)
        for k in range(1, n + 1):
            picks, sizes = medoids_on_line(values, k)
            assert len(set(picks.tolist())) == k
            best = min(spread(values, subset) for subset in combinations(range(n), k))
            assert spread(values, picks.tolist()) == pytest.approx(best, abs=1e-12)  # sums of float64 numbers near 1
            nearest = (values.unsqueeze(1) - values[picks]).abs().argmin(1)
            assert sizes.tolist() == torch.bincount(nearest, minlength=k).tolist()


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


def test_permuted_candidates_give_the_same_medoids():
    values = torch.randn(40, generator=generator(2, "line"))
    order = torch.randperm(40, generator=generator(3, "line"))
    assert order[medoids_on_line(values[order], 9)[0]].tolist() == medoids_on_line(values, 9)[0].tolist()
