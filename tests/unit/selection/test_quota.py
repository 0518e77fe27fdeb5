from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.runs import candidates_of

from colm_scale.errors import UserError
from colm_scale.randomness import generator
from colm_scale.records import Quota, long_tensor
from colm_scale.selection.quota import (
    RecentSources,
    allocate,
    check_names,
    expected_share,
    kept_sources,
    reallocate,
)

NAMES = ["algebra", "geometry", "logic", "proofs"]


def of_counts(*counts: int) -> torch.Tensor:
    """Sources ``[n]``, ``counts[s]`` candidates of source s, shuffled."""
    sources = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return sources[torch.randperm(len(sources), generator=generator(1, "test shuffle"))]


def draw() -> torch.Generator:
    return generator(0, "overflow")


def allocated(counts: list[int], kept: list[bool], budget: int) -> tuple[torch.Tensor, Quota]:
    sources = of_counts(*counts)
    return sources, allocate(candidates_of(sources), torch.tensor(kept), budget, draw())


def test_by_default_sources_below_the_average_size_are_kept():
    # The average is 25; a source of exactly that size is not below it.
    assert kept_sources(torch.tensor([25, 50, 24, 1]), NAMES, None).tolist() == [False, False, True, True]


def test_chosen_sources_are_kept_whatever_their_size():
    sizes = torch.tensor([25, 50, 24, 1])
    assert kept_sources(sizes, NAMES, ["geometry", "proofs"]).tolist() == [False, True, False, True]
    assert not kept_sources(sizes, NAMES, []).any()


@pytest.mark.parametrize(
    ("quantile", "expected"),
    [(0.0, ""), (0.24, ""), (0.25, "logic"), (0.5, "logic geometry"), (0.75, "logic geometry proofs"), (1.0, "all")],
)
def test_the_smallest_quantile_of_the_sources_is_kept(quantile, expected):
    # geometry and proofs are equally small: the first comes first.
    kept = kept_sources(torch.tensor([50, 25, 3, 25]), NAMES, quantile)
    names = NAMES if expected == "all" else expected.split()
    assert kept.tolist() == [name in names for name in NAMES]


def test_a_share_of_the_sources_is_no_matter_of_binary_fractions():
    assert 0.29 * 100 < 29
    assert int(kept_sources(torch.arange(100), [str(n) for n in range(100)], 0.29).sum()) == 29


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
        quota = allocate(candidates_of(sources), kept, 3, generator(trial, "overflow"))
        assert quota.overflow == 6
        assert quota.per_source.tolist() == [0, 0, 0]
        assert quota.kept.tolist() == sorted(set(quota.kept.tolist()))
        for position in quota.kept.tolist():
            times[position] += 1
    # Each of the 9 enters 3 times in 9: 300 times of 900, standard deviation 14; 5 of them either way.
    assert all(230 <= count <= 370 for count in times.values())


def test_the_same_generator_draws_the_same_overflow():
    sources, kept = of_counts(8, 8), torch.tensor([True, False])
    candidates = candidates_of(sources)
    assert torch.equal(allocate(candidates, kept, 3, draw()).kept, allocate(candidates, kept, 3, draw()).kept)


def marked(n: int, *positions: int) -> torch.Tensor:
    return torch.isin(torch.arange(n), torch.tensor(positions))


def test_protected_candidates_enter_whatever_their_source():
    sources = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2])
    quota = allocate(candidates_of(sources, marked(10, 1, 4, 9)), torch.tensor([False, False, True]), 6, draw())
    assert quota.kept.tolist() == [1, 4, 9]
    # 3 of the 4 and 3 that are left: floors 1 and 1, and one more to the first of them.
    assert quota.per_source.tolist() == [2, 1, 0]
    assert quota.to_sketch(sources).tolist() == [0, 2, 3, 5, 6, 7, 8]
    assert quota.overflow == 0


def test_protected_candidates_come_before_those_of_kept_sources():
    sources, kept = torch.tensor([0, 1, 1, 1, 1, 0, 0, 2]), torch.tensor([False, True, False])
    protected = marked(8, 0, 4, 5)
    for budget, of_kept in ((5, 2), (4, 1), (3, 0)):
        quota = allocate(candidates_of(sources, protected), kept, budget, draw())
        assert {0, 4, 5} <= set(quota.kept.tolist()) <= {0, 1, 2, 3, 4, 5}
        assert len(quota.kept) == 3 + of_kept
        assert quota.overflow == 3 - of_kept
        assert not quota.per_source.any()
    # With room for two of three, the protected ones are drawn from, and who is left is ranked if there is a quota.
    quota = allocate(candidates_of(sources, protected), kept, 2, draw())
    assert len(quota.kept) == 2
    assert set(quota.kept.tolist()) < {0, 4, 5}


def test_protected_candidates_that_do_not_fit_are_ranked_like_any_other():
    sources = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    quota = allocate(candidates_of(sources, marked(8, 0, 1, 2)), torch.tensor([False, False]), 2, draw())
    assert len(quota.kept) == 2
    assert quota.overflow == 1
    assert set(quota.to_sketch(sources).tolist()) == set()


@pytest.mark.parametrize(
    ("protected", "budget", "expected"),
    [
        (0, 32, 1.0),  # 16 of 64 candidates on average, and room for 32
        (0, 8, 0.5),
        (200, 8, 8 / 32),  # 100 + 100 of 400 examples
    ],
)
def test_the_share_that_is_expected_to_enter(protected, budget, expected):
    sizes, kept = torch.tensor([100, 300]), torch.tensor([True, False])
    of_each = torch.tensor([protected // 2, protected // 2])
    assert expected_share(sizes, kept, of_each, 64, budget) == pytest.approx(expected)
    assert expected_share(sizes, torch.zeros(2, dtype=torch.bool), torch.zeros_like(of_each), 64, budget) == 1


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


@given(SOURCES, st.integers(1, 100), st.integers(0, 99))
def test_the_budget_is_met_whatever_is_protected(described, budget, seed):
    sources = of_counts(*[count for count, _ in described])
    kept = torch.tensor([flag for _, flag in described])
    protected = torch.rand(len(sources), generator=generator(seed, "protected")) < 0.3
    quota = allocate(candidates_of(sources, protected), kept, budget, draw())
    assert torch.equal(quota.kept, allocate(candidates_of(sources, protected), kept, budget, draw()).kept)
    wanted = kept[sources] | protected
    assert len(quota.kept) + int(quota.per_source.sum()) == min(budget, len(sources))
    assert wanted[quota.kept].all()
    assert quota.overflow == int(wanted.sum()) - len(quota.kept)
    if protected.sum() <= len(quota.kept):
        assert set(protected.nonzero().flatten().tolist()) <= set(quota.kept.tolist())
    available = torch.bincount(sources[quota.to_sketch(sources)], minlength=len(kept))
    assert (quota.per_source <= available).all()


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


def test_a_protected_source_that_is_none_is_refused():
    check_names("data.protected_sources", ["rare"], ["big", "rare"])
    with pytest.raises(UserError, match=r"--data.protected_sources names 'rere'.* did you mean 'rare'"):
        check_names("data.protected_sources", ["rere"], ["big", "rare"])


def test_what_is_due_of_others_leaves_the_kept_less_room():
    sizes, kept, none = long_tensor([30, 70]), torch.tensor([True, False]), long_tensor([0, 0])
    assert expected_share(sizes, kept, none, 100, 40) == 1
    assert expected_share(sizes, kept, none, 100, 40, floor=0.4) == pytest.approx(12 / 30)


def after(recent: RecentSources, *steps: tuple[int, ...]) -> RecentSources:
    """After steps with so many candidates of each source."""
    for counts in steps:
        recent = recent.after(torch.arange(len(counts)).repeat_interleave(long_tensor(counts)))
    return recent


def test_kept_sources_follow_what_came_since_the_last_time():
    begin = RecentSources.beginning(torch.tensor([False, True, False]))
    two = after(begin, (1, 9, 5), (1, 9, 5))
    assert two.kept.tolist() == [False, True, False]
    assert two.seen.tolist() == [2, 18, 10]
    refreshed = two.refreshed(None)  # below the average of 10 is only the first
    assert refreshed.kept.tolist() == [True, False, False]
    assert refreshed.seen.tolist() == [0, 0, 0]
    assert after(refreshed, (9, 9, 1), (9, 9, 1)).refreshed(None).kept.tolist() == [False, False, True]


def test_a_source_that_did_not_come_is_no_small_source_and_does_not_move_the_average():
    recent = after(RecentSources.beginning(torch.ones(4, dtype=torch.bool)), (0, 4, 8, 0)).refreshed(None)
    assert recent.kept.tolist() == [False, True, False, False]  # the average of the two that came is 6, not 3


def test_a_share_of_the_sources_is_kept_again_too():
    recent = after(RecentSources.beginning(torch.zeros(4, dtype=torch.bool)), (9, 1, 2, 3)).refreshed(0.75)
    assert recent.kept.tolist() == [False, True, True, True]
