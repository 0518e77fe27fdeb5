from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colm_scale.config import SelectionConfig
from colm_scale.errors import UserError
from colm_scale.randomness import generator
from colm_scale.records import Candidates, long_tensor
from colm_scale.selection import allocation
from colm_scale.selection.allocation import quotas
from colm_scale.selection.rule import SelectionRule
from colm_scale.selection.statistics import SourceStatistics

EQUAL = [1.0, 1.0, 1.0, 1.0]


def of(shares: list[float], available: list[int], total: int, floor: int = 0, draw: int = 0) -> list[int]:
    wanted = torch.tensor(shares, dtype=torch.float64)
    return quotas(wanted, long_tensor(available), total, floor, generator(draw, "lots")).tolist()


@pytest.mark.parametrize(
    ("shares", "available", "total", "floor", "expected"),
    [
        (EQUAL, [9, 9, 9, 9], 12, 0, [3, 3, 3, 3]),
        # Water: the second has 1, so 11 are left for three, and the third has no more than 2: 9 for two.
        (EQUAL, [9, 1, 2, 9], 12, 0, [4.5, 1, 2, 4.5]),
        (EQUAL, [9, 0, 2, 9], 12, 0, [5, 0, 2, 5]),
        # In proportion, 6 : 3 : 2 : 1.
        ([6.0, 3.0, 2.0, 1.0], [9, 9, 9, 9], 12, 0, [6, 3, 2, 1]),
        # What the first lacks goes to the others in proportion, 10 to 3 : 1 : 1.
        ([9.0, 3.0, 1.0, 1.0], [2, 9, 9, 9], 12, 0, [2, 6, 2, 2]),
        # The floor comes first, and what it takes is missing in proportion: 8 to 3 : 1.
        ([3.0, 1.0, 0.0, 0.1], [9, 9, 9, 9], 12, 2, [6, 2, 2, 2]),
        # A floor is no more than what is there.
        ([1.0, 1.0, 0.0, 0.0], [9, 9, 1, 0], 9, 2, [4, 4, 1, 0]),
        # Too little for the floors: the same for all, as far as they have it.
        ([9.0, 1.0, 1.0, 1.0], [9, 9, 9, 1], 7, 3, [2, 2, 2, 1]),
        # A share of nothing gets what nobody else can take.
        ([1.0, 0.0, 0.0, 0.0], [3, 4, 0, 4], 5, 0, [3, 1, 0, 1]),
        ([0.0, 0.0, 0.0, 0.0], [3, 4, 0, 4], 6, 0, [2, 2, 0, 2]),
        # All, and none.
        ([5.0, 1.0, 1.0, 1.0], [3, 1, 2, 0], 6, 1, [3, 1, 2, 0]),
        (EQUAL, [3, 1, 2, 0], 0, 1, [0, 0, 0, 0]),
    ],
)
def test_quotas_by_hand(shares, available, total, floor, expected):
    found = of(shares, available, total, floor)
    assert sum(found) == total
    for quota, aim in zip(found, expected):
        assert quota in (math.floor(aim), math.ceil(aim))


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 12)), min_size=1, max_size=9),
    st.integers(0, 4),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_the_sum_is_met_within_floors_and_candidates(sources, floor, part, draw):
    shares, available = zip(*sources)
    total = round(part * sum(available))
    found = of([*shares], [*available], total, floor, draw)
    assert sum(found) == total
    least = [min(floor, count) for count in available]
    assert all(0 <= quota <= count for quota, count in zip(found, available))
    if total >= sum(least):
        assert all(quota >= low for quota, low in zip(found, least))


@given(st.lists(st.tuples(st.floats(0.1, 10), st.integers(1, 12)), min_size=2, max_size=6), st.floats(0.05, 0.95))
def test_whoever_is_between_its_bounds_is_at_the_common_level(sources, part):
    """Bisection for the level is the brute force; quotas are its floor or ceiling."""
    shares, available = zip(*sources)
    total = max(1, round(part * sum(available)))
    low, high = 0.0, 1e3
    for _ in range(200):
        level = (low + high) / 2
        over = sum(min(level * share, count) for share, count in sources) > total
        low, high = (low, level) if over else (level, high)
    for quota, (share, count) in zip(of([*shares], [*available], total), sources):
        aim = min(level * share, count)
        assert math.floor(aim + 1e-5) >= quota - 1
        assert math.ceil(aim - 1e-5) <= quota + 1
        assert abs(quota - aim) < 1 + 1e-5


def test_over_the_steps_each_source_gets_its_share():
    shares, trials = [5.3, 2.2, 1.9, 0.6], 3000
    found = torch.tensor([of(shares, [20] * 4, 10, draw=draw) for draw in range(trials)]).double()
    assert set(found[:, 3].tolist()) == {0.0, 1.0}
    # A lot is off by at most 1, so the mean's deviation is below 0.5 / sqrt(3000) = 0.01; the order of the lots is only
    # nearly that of unequal probabilities.
    assert (found.mean(0) - torch.tensor(shares).double()).abs().max() < 0.05


def test_equal_sources_take_turns():
    found = torch.tensor([of(EQUAL, [9] * 4, 6, draw=draw) for draw in range(400)]).double()
    assert (found.mean(0) - 1.5).abs().max() < 0.1  # four standard deviations of 0.5 / sqrt(400)


def test_noise_in_the_last_bits_moves_no_example():
    for draw in range(200):
        shares = torch.rand(4, generator=generator(draw, "shares")).tolist()
        shaken = [share * (1 + 1e-9 * (-1) ** i) for i, share in enumerate(shares)]
        assert of(shares, [9] * 4, 12, 1, draw) == of(shaken, [9] * 4, 12, 1, draw)


# Shares


def shares(name: str, sizes=(4, 16, 64), present=(2, 4, 8), known: SourceStatistics | None = None, **options):
    config = SelectionConfig(method="stratified", allocation=name, **options)
    return allocation.shares(config, long_tensor(sizes), long_tensor(present), known)


def test_temperature_goes_from_proportional_to_equal():
    assert shares("temperature", allocation_exponent=0.5).tolist() == [2, 4, 8]
    assert shares("temperature", allocation_exponent=1.0).tolist() == [4, 16, 64]
    assert shares("temperature", allocation_exponent=0.0).tolist() == shares("equal").tolist() == [1, 1, 1]


def test_the_excess_is_an_exponent():
    class Known:
        excess = torch.tensor([0.0, 1 / 3, 2 / 3], dtype=torch.float64)

    low, middle, high = shares("excess_loss", known=Known).tolist()
    assert (middle / low, high / middle) == pytest.approx((math.e, math.e))


def test_no_gain_is_too_large():
    class Known:
        excess = torch.cat([torch.full((999,), -1.0), torch.tensor([998.0])]).double()

    found = shares("excess_loss", known=Known)
    assert quotas(found, long_tensor([1] * 999 + [4]), 6, 0, generator(0, "lots"))[-1] == 4


def test_before_anything_is_known_sources_are_alike():
    nothing = SourceStatistics.zeros(3)
    assert shares("excess_loss", present=(4, 4, 4), known=nothing).unique().numel() == 1


# In the rule

SOURCES = torch.repeat_interleave(long_tensor([10, 8, 4, 2]))


def quota_of(**options):
    config = SelectionConfig(candidates=len(SOURCES), budget=12, **options)
    rule = SelectionRule(config, torch.tensor([False, False, False, True]), 0, long_tensor([100, 80, 40, 20]))
    n = torch.arange(len(SOURCES))
    return rule.quota(Candidates(1, n, n, SOURCES, n))


def test_kept_sources_take_no_part():
    quota = quota_of(allocation="equal")
    assert quota.kept.tolist() == [22, 23]
    assert sorted(quota.per_source.tolist()) == [0, 3, 3, 4]
    assert quota.per_source[3] == 0


def test_temperature_one_is_proportional_but_for_the_lots():
    """10 of 22: 4.55, 3.64, 1.82. The paper's rule floors and tops up the smallest; a lot decides otherwise."""
    for quota, aim in zip(quota_of(allocation="temperature", allocation_exponent=1.0).per_source, (4.55, 3.64, 1.82)):
        assert int(quota) in (math.floor(aim), math.ceil(aim))
    assert quota_of(allocation="proportional").per_source.tolist() == [4, 4, 2, 0]


def test_nothing_is_allocated_if_the_ranking_decides():
    quota = quota_of(allocation="none", joint=True)
    assert quota.per_source.tolist() == [0] * 4
    assert quota.free == 10
    assert quota_of(allocation="equal").free == quota_of().free == 0


def test_what_has_no_ranking_cannot_leave_it_to_one():
    with pytest.raises(UserError, match=r"--selection\.allocation none .* --selection\.method stratified"):
        quota_of(allocation="none", joint=True, method="stratified")


NAMES = ("a", "b", "c", "d")


def facts_of(**options) -> str:
    config = SelectionConfig(**options)
    kept = torch.tensor([False, False, False, True])
    return "\n".join(allocation.allocation_facts(config, NAMES, long_tensor([100, 36, 64, 5]), kept))


def test_the_mixture_that_is_aimed_at_is_told():
    text = facts_of(allocation="temperature", allocation_floor=2, method="stratified")
    assert "allocation temperature, at least 2 of each source: a 41.7%, b 25.0%, c 33.3%\n" in text
    assert "the mixture that is trained is that so allocated" in text
    assert "the same of all 3 that are not kept" in facts_of(allocation="equal")
    assert "by what training shows" in facts_of(allocation="excess_loss")
    assert "of the candidates, by the weights" in facts_of(
        allocation="excess_loss", weights="unbiased", ranking="systematic"
    )
    assert not facts_of(allocation="proportional")
    assert not facts_of(allocation="equal", method="random")
