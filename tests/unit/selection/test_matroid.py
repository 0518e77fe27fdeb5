"""Greedy under quotas against a literal one, the plain one, and the best there is."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from colm_scale.randomness import generator
from colm_scale.records import long_tensor
from colm_scale.selection.facility import greedy, objective
from colm_scale.selection.matroid import Room, greedy_under_quotas
from colm_scale.selection.similarity import similarities

GROUPS = long_tensor([0, 1, 0, 2, 1, 0, 1, 2])


def rows(trial: int, n: int = len(GROUPS), whole: bool = False) -> Tensor:
    drawn = torch.randn(n, 2, generator=generator(trial, "rows"), dtype=torch.float64)
    return (2 * drawn).round() if whole else drawn


def literal(similarity: Tensor, groups: list[int], quotas: list[int]) -> list[int]:
    picks: list[int] = []
    while len(picks) < sum(quotas):
        left = [quota - sum(groups[pick] == group for pick in picks) for group, quota in enumerate(quotas)]
        open_now = [i for i in range(len(groups)) if i not in picks and left[groups[i]]]
        values = [round(objective(similarity, long_tensor([*picks, i])), 9) for i in open_now]  # ties, but for rounding
        picks.append(open_now[values.index(max(values))])
    return picks


@pytest.mark.parametrize("quotas", [[1, 1, 1], [2, 1, 1], [1, 2, 0], [3, 3, 2]])
@pytest.mark.parametrize("whole", [False, True])  # whole numbers: ties
def test_each_pick_is_the_best_that_has_room(quotas, whole):
    for trial in range(20):
        similarity = similarities(rows(trial, whole=whole), "l1")
        picks = greedy_under_quotas(similarity, GROUPS, long_tensor(quotas))
        assert picks.tolist() == literal(similarity, GROUPS.tolist(), quotas)


def test_one_group_is_plain_greedy():
    for trial in range(10):
        similarity = similarities(rows(trial, 30), "l2")
        one = torch.zeros(30, dtype=torch.int64)
        assert torch.equal(greedy_under_quotas(similarity, one, long_tensor([12])), greedy(similarity, 12))


def test_the_value_is_at_least_half_of_the_best():
    """And not always the best itself, or the test would not know the difference."""
    shares = []
    for trial in range(40):
        similarity = similarities(rows(trial), "l1")
        own = objective(similarity, greedy_under_quotas(similarity, GROUPS, long_tensor([1, 1, 1])))
        sets = [s for s in combinations(range(8), 3) if sorted(GROUPS[list(s)].tolist()) == [0, 1, 2]]
        shares.append(own / max(objective(similarity, long_tensor(s)) for s in sets))
    assert 0.5 <= min(shares) < 1 == pytest.approx(max(shares))


def test_what_another_group_covers_is_not_covered_again():
    # Group 0 at 0 and 10, group 1 at 0.5, 0.6 and 9: alone, 0 would cover its own; together, 1 pick of each is spread.
    places = torch.tensor([[0.0], [10.0], [0.5], [0.6], [9.0]])
    picks = greedy_under_quotas(similarities(places, "l1"), long_tensor([0, 0, 1, 1, 1]), long_tensor([1, 1]))
    assert picks.tolist() == [3, 1]  # 0.6 has the least distance to all; then 10 is left with 9 beside it


def test_room_closes_for_a_group_that_is_full_and_for_what_is_picked():
    room = Room(long_tensor([0, 1, 0, 1, 2]), long_tensor([1, 2, 0]))
    assert room.open.tolist() == [True, True, True, True, False]
    room.take(1)
    assert room.open.tolist() == [True, False, True, True, False]
    room.take(2)
    assert room.open.tolist() == [False, False, False, True, False]
