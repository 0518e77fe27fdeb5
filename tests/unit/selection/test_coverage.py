from __future__ import annotations

import dataclasses

import pytest
import torch
from support.runs import candidates_of

from colm_scale.config import SelectionConfig
from colm_scale.errors import UserError
from colm_scale.randomness import generator
from colm_scale.records import Candidates, long_tensor
from colm_scale.selection.coverage import Coverage
from colm_scale.selection.quota import allocate, at_least
from colm_scale.selection.rule import SelectionRule
from colm_scale.selection.shares import quotas

FLOOR = SelectionConfig(candidates=16, budget=8, coverage_floor=0.25)
SHARES = (0.7, 0.2, 0.07, 0.03)
NOTHING_KEPT = torch.zeros(4, dtype=torch.bool)


def sources_of(step: int, n: int = 16) -> torch.Tensor:
    return torch.multinomial(torch.tensor(SHARES), n, replacement=True, generator=generator(step, "sources"))


def greedy(available: torch.Tensor, total: int) -> torch.Tensor:
    """A share that gives everything to the first source that can take it."""
    before = (available.cumsum(0) - available).clamp(max=total)
    return torch.minimum(available, total - before)


def test_what_is_owed_adds_up_and_is_worked_off():
    coverage = Coverage.beginning(2)
    nothing, one = long_tensor([]), long_tensor([0])
    for due in ([0, 0], [0, 1], [0, 1]):  # a quarter for each candidate
        assert coverage.due(long_tensor([0, 1, 1]), FLOOR).tolist() == due
        coverage = coverage.after(long_tensor([0, 1, 1]), nothing, FLOOR)
    assert coverage.owed.tolist() == [750_000, 1_500_000]
    assert coverage.examples_owed == 1
    assert coverage.due(long_tensor([0, 0]), FLOOR).tolist() == [1, 0]  # without a candidate nothing can be due
    coverage = coverage.after(long_tensor([0, 1]), one, FLOOR)
    assert coverage.owed.tolist() == [0, 1_750_000]


def test_what_is_trained_on_beyond_the_floor_is_no_credit():
    coverage = Coverage.beginning(1).after(long_tensor([0] * 8), long_tensor(range(8)), FLOOR)
    assert coverage.owed.tolist() == [0]


@pytest.mark.parametrize("kept", [[], [0], [3], [0, 1]])
def test_every_source_has_its_share_over_every_stretch_of_steps(kept):
    """However unfairly picks are shared out: of each source, of any steps in a row, at least its share less one."""
    is_kept = torch.zeros(4, dtype=torch.bool)
    is_kept[kept] = True
    coverage, seen, trained, without = Coverage.beginning(4), [], [], []
    for step in range(60):
        sources = sources_of(step)
        draw = generator(step, "draw")
        due = coverage.due(sources, FLOOR)
        quota = allocate(candidates_of(sources), is_kept, 8, draw, due=due, share=greedy)
        without.append(allocate(candidates_of(sources), is_kept, 8, generator(step, "draw"), greedy).per_source)
        counts = torch.bincount(sources[quota.kept], minlength=4) + quota.per_source
        assert counts.sum() == 8
        picked = torch.cat([(sources == source).nonzero().flatten()[:count] for source, count in enumerate(counts)])
        coverage = coverage.after(sources, picked, FLOOR)
        seen.append(torch.bincount(sources, minlength=4))
        trained.append(counts)
        assert (counts >= due).all()
    seen, trained = (torch.stack([torch.zeros(4).long(), *of]).cumsum(0) for of in (seen, trained))
    for start in range(60):
        for end in range(start + 1, 61):
            share = 0.25 * (seen[end] - seen[start]) - (trained[end] - trained[start])
            assert (share < 1).all(), f"steps {start + 1} to {end}"
    if not kept:
        assert (torch.stack(without)[:, 3] == 0).all()  # which the last source did not have without the floor


def test_too_small_a_budget_is_shared_and_the_rest_is_carried_on():
    sources, due = long_tensor([0] * 6 + [1] * 6 + [2]), long_tensor([4, 4, 1])
    quota = allocate(candidates_of(sources), torch.zeros(3, dtype=torch.bool), 5, generator(0, "draw"), due=due)
    assert quota.per_source.tolist() == [2, 2, 1]


def test_the_protected_come_first_then_what_is_due_then_the_kept():
    sources = long_tensor([0, 0, 0, 0, 1, 1, 2, 2])
    protected = torch.tensor([True, True, *[False] * 6])
    kept = torch.tensor([False, True, False])
    quota = allocate(candidates_of(sources, protected), kept, 4, generator(0, "draw"), due=long_tensor([1, 0, 1]))
    assert quota.per_source.tolist() == [0, 0, 1]  # what is due of the first source is among its protected ones
    assert sources[quota.kept].tolist() == [0, 0, 1]
    assert quota.overflow == 1


def test_what_is_due_of_kept_sources_is_among_those_that_fit():
    sources = long_tensor([0] * 12 + [1])
    kept = torch.ones(2, dtype=torch.bool)
    for seed in range(20):
        draw = generator(seed, "draw")
        quota = allocate(candidates_of(sources), kept, 3, draw, due=long_tensor([1, 1]))
        assert len(quota.kept) == 3
        assert 12 in quota.kept


def test_quotas_above_the_least_stay_as_they_are():
    assert at_least(long_tensor([5, 1, 2]), long_tensor([5, 0, 1])).tolist() == [5, 1, 2]


def test_what_some_lack_comes_from_those_furthest_above_their_least():
    assert at_least(long_tensor([7, 4, 0, 0]), long_tensor([3, 3, 1, 2])).tolist() == [4, 4, 1, 2]


def test_the_floor_holds_under_any_shares():
    available, least = long_tensor([40, 6, 2]), long_tensor([0, 3, 2])
    shares = torch.tensor([100.0, 1.0, 1.0], dtype=torch.float64)
    found = at_least(quotas(shares, available, 20, generator(0, "lots")), least)
    assert found.tolist() == [15, 3, 2]


@pytest.mark.parametrize("method", ["stratified", "colm"])
def test_without_a_floor_nothing_is_due(method):
    sources = sources_of(1)
    config = dataclasses.replace(FLOOR, method=method, coverage_floor=0.0)
    candidates = Candidates(1, torch.arange(16), torch.arange(16), sources, torch.ones(16).long())
    owing = Coverage(long_tensor([0, 0, 0, 9_000_000]))
    rule = SelectionRule(config, NOTHING_KEPT, 0)
    assert rule.quota(candidates, coverage=owing).per_source.tolist() == rule.quota(candidates).per_source.tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"coverage_floor": 0.6}, ["--selection.coverage_floor 0.6", "at most 0.5"]),
        ({"coverage_floor": -0.1}, ["--selection.coverage_floor is -0.1"]),
        ({"coverage_floor": 0.1, "method": "random"}, ["--selection.method random", "stratified"]),
        ({"coverage_floor": 0.1, "shares": {"a": 1, "b": 0}}, ["--selection.shares gives b no quota"]),
    ],
)
def test_a_floor_that_cannot_hold_is_refused(options, words):
    with pytest.raises(UserError) as refused:
        SelectionConfig(candidates=16, budget=8, **options)
    for word in words:
        assert word in str(refused.value)
