from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colm_scale.errors import UserError
from colm_scale.randomness import generator
from colm_scale.records import Quota
from colm_scale.selection.quota import allocate, kept_sources, reallocate

NAMES = ["algebra", "geometry", "logic", "proofs"]


def of_counts(*counts: int) -> torch.Tensor:
    """Sources ``[n]``, ``counts[s]`` candidates of source s, shuffled."""
    sources = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return sources[torch.randperm(len(sources), generator=generator(1, "test shuffle"))]


def draw() -> torch.Generator:
    return generator(0, "overflow")


def allocated(counts: list[int], kept: list[bool], budget: int) -> tuple[torch.Tensor, Quota]:
    sources = of_counts(*counts)
    return sources, allocate(sources, torch.tensor(kept), budget, draw())


def test_by_default_sources_below_the_average_size_are_kept():
    # The average is 25; a source of exactly that size is not below it.
    assert kept_sources(torch.tensor([25, 50, 24, 1]), NAMES, None).tolist() == [False, False, True, True]


def test_chosen_sources_are_kept_whatever_their_size():
    sizes = torch.tensor([25, 50, 24, 1])
    assert kept_sources(sizes, NAMES, ["geometry", "proofs"]).tolist() == [False, True, False, True]
    assert not kept_sources(sizes, NAMES, []).any()


def test_unknown_kept_source_is_refused_with_the_closest_and_all_names():
    with pytest.raises(UserError) as caught:
        kept_sources(torch.ones(4), NAMES, ["logic", "geometri"])
    message = str(caught.value)
    assert "--selection.kept_sources" in message
    assert "'geometri'" in message
    assert "mean 'geometry'?" in message
    assert "algebra, geometry, logic, proofs" in message


def test_a_name_like_no_other_is_refused_too():
    with pytest.raises(UserError, match="'0000'"):
        kept_sources(torch.ones(4), NAMES, ["0000"])


@pytest.mark.parametrize(
    ("counts", "kept", "budget", "quotas"),
    [
        # 6 of 18 are left: 1.67, 3, 1.33 -> floors 1, 3, 1; sources 0 and 2 tie for the extra one.
        ([5, 9, 4, 6], [False, False, False, True], 12, [2, 3, 1, 0]),
        # 3 of 15: 1.2, 0.2, 0.8, 0.4, 0.4 -> floors 1, 0, 0, 0, 0 and two extra.
        ([6, 1, 4, 2, 2], [False] * 5, 3, [1, 1, 1, 0, 0]),
        # 8 of 20: 6.4, 1.6 -> floors 6, 1: the smallest gets the extra one although its fraction is no reason.
        ([16, 4], [False, False], 8, [6, 2]),
        # Absent sources get nothing although they are the smallest.
        ([0, 3, 3], [False] * 3, 3, [0, 2, 1]),
        # All fit.
        ([3, 4], [False, False], 7, [3, 4]),
        ([3, 4], [False, False], 9, [3, 4]),
        ([3, 4], [True, False], 9, [0, 4]),
        # Kept ones take all of it.
        ([3, 4], [True, False], 3, [0, 0]),
    ],
)
def test_quotas_by_hand(counts, kept, budget, quotas):
    sources, quota = allocated(counts, kept, budget)
    assert quota.per_source.tolist() == quotas
    assert quota.kept.tolist() == [i for i, source in enumerate(sources.tolist()) if kept[source]]
    assert quota.overflow == 0


def test_overflow_is_a_uniform_subset_of_the_kept():
    sources = of_counts(4, 6, 5)
    kept = torch.tensor([True, False, True])
    of_kept = set(kept[sources].nonzero().flatten().tolist())
    times = dict.fromkeys(of_kept, 0)
    for trial in range(900):
        quota = allocate(sources, kept, 3, generator(trial, "overflow"))
        assert quota.overflow == 6
        assert quota.per_source.tolist() == [0, 0, 0]
        assert quota.kept.tolist() == sorted(set(quota.kept.tolist()))
        for position in quota.kept.tolist():
            times[position] += 1
    # Each of the 9 enters 3 times in 9: 300 times of 900, standard deviation 14; 5 of them either way.
    assert all(230 <= count <= 370 for count in times.values())


def test_the_same_generator_draws_the_same_overflow():
    sources, kept = of_counts(8, 8), torch.tensor([True, False])
    assert torch.equal(allocate(sources, kept, 3, draw()).kept, allocate(sources, kept, 3, draw()).kept)


SOURCES = st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=8).filter(
    lambda sources: sum(count for count, _ in sources) > 0
)


@given(SOURCES, st.integers(1, 100))
def test_the_budget_is_met_and_nothing_exceeds_what_is_there(described, budget):
    counts, kept = [count for count, _ in described], [flag for _, flag in described]
    sources, quota = allocated(counts, kept, budget)
    of_kept = sum(count for count, flag in described if flag)
    assert len(quota.kept) + int(quota.per_source.sum()) == min(budget, len(sources))
    assert len(quota.kept) == min(of_kept, budget)
    assert quota.overflow == of_kept - len(quota.kept)
    assert all(kept[source] for source in sources[quota.kept].tolist())
    others = sum(counts) - of_kept
    left = min(budget - len(quota.kept), others)
    for count, flag, share in zip(counts, kept, quota.per_source.tolist()):
        assert 0 <= share <= (0 if flag else count)
        if not flag and others:
            assert share - count * left // others in (0, 1)


def test_reallocation_by_hand():
    # Source 0 lacks 3. One goes to the smallest that has any to spare (2), one to the next (3); then 2 is the
    # smallest again.
    assert reallocate(torch.tensor([4, 2, 1, 2]), torch.tensor([1, 2, 9, 9])).tolist() == [1, 2, 3, 3]
    assert reallocate(torch.tensor([3, 2]), torch.tensor([3, 5])).tolist() == [3, 2]
    assert reallocate(torch.tensor([3, 2]), torch.tensor([0, 4])).tolist() == [0, 4]  # one cannot be met
    assert reallocate(torch.tensor([3, 2]), torch.tensor([0, 0])).tolist() == [0, 0]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_reallocation_meets_the_sum_if_it_can(pairs):
    per_source, available = (torch.tensor(column) for column in zip(*pairs))
    quota = reallocate(per_source, available)
    assert (quota <= available).all()
    assert (quota >= torch.minimum(per_source, available)).all()
    assert quota.sum() == min(per_source.sum(), available.sum())
