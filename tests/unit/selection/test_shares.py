from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colm_scale.config import SelectionConfig
from colm_scale.errors import TrainingError, UserError
from colm_scale.randomness import generator
from colm_scale.records import Candidates, long_tensor
from colm_scale.selection.rule import SelectionRule
from colm_scale.selection.shares import check_shares, quotas, shares_facts, source_shares

EQUAL = [1.0, 1.0, 1.0, 1.0]


def of(shares: list[float], available: list[int], total: int, draw: int = 0) -> list[int]:
    wanted = torch.tensor(shares, dtype=torch.float64)
    return quotas(wanted, long_tensor(available), total, generator(draw, "lots")).tolist()


@pytest.mark.parametrize(
    ("shares", "available", "total", "expected"),
    [
        (EQUAL, [9, 9, 9, 9], 12, [3, 3, 3, 3]),
        # Water: the second has 1, so 11 are left for three, and the third has no more than 2: 9 for two.
        (EQUAL, [9, 1, 2, 9], 12, [4.5, 1, 2, 4.5]),
        (EQUAL, [9, 0, 2, 9], 12, [5, 0, 2, 5]),
        # In proportion, 6 : 3 : 2 : 1.
        ([6.0, 3.0, 2.0, 1.0], [9, 9, 9, 9], 12, [6, 3, 2, 1]),
        # What the first lacks goes to the others in proportion, 10 to 3 : 1 : 1.
        ([9.0, 3.0, 1.0, 1.0], [2, 9, 9, 9], 12, [2, 6, 2, 2]),
        # One of each comes first, and what it takes is missing in proportion: 10 to 3 : 1.
        ([3.0, 1.0, 0.01, 0.1], [9, 9, 9, 9], 12, [7.5, 2.5, 1, 1]),
        # Too little for one of each: the same chance for all that are there.
        ([9.0, 1.0, 1.0, 1.0], [9, 9, 0, 1], 2, [0.5, 0.5, 0, 0.5]),
        # All, and none.
        ([5.0, 1.0, 1.0, 1.0], [3, 1, 2, 0], 6, [3, 1, 2, 0]),
        (EQUAL, [3, 1, 2, 0], 0, [0, 0, 0, 0]),
    ],
)
def test_quotas_by_hand(shares, available, total, expected):
    found = of(shares, available, total)
    assert sum(found) == total
    for quota, aim in zip(found, expected):
        assert quota in (math.floor(aim), math.ceil(aim))


def test_a_share_of_nothing_gets_nothing_even_if_the_others_cannot_use_all():
    assert of([1.0, 0.0, 2.0, 0.0], [3, 4, 2, 4], 9) == [3, 0, 2, 0]
    assert of([1.0, 0.0, 0.0, 0.0], [0, 4, 0, 4], 5) == [0, 0, 0, 0]


@given(
    st.lists(st.tuples(st.one_of(st.just(0.0), st.floats(1e-3, 1e6)), st.integers(0, 12)), min_size=1, max_size=9),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_the_sum_is_met_with_one_of_each_and_within_candidates(sources, part, draw):
    shares, available = zip(*sources)
    total = round(part * sum(available))
    found = of([*shares], [*available], total, draw)
    most = [count if share else 0 for share, count in sources]
    assert sum(found) == min(total, sum(most))
    assert all(0 <= quota <= count for quota, count in zip(found, most))
    if total >= sum(map(bool, most)):
        assert all(quota > 0 for quota, count in zip(found, most) if count)


@given(st.lists(st.tuples(st.floats(0.1, 10), st.integers(1, 12)), min_size=2, max_size=6), st.floats(0.05, 0.95))
def test_whoever_is_between_its_bounds_is_at_the_common_level(sources, part):
    """Bisection for the level is the brute force; quotas are its floor or ceiling."""
    shares, available = zip(*sources)
    total = len(sources) + round(part * (sum(available) - len(sources)))
    low, high = 0.0, 1e3
    for _ in range(200):
        level = (low + high) / 2
        over = sum(max(1, min(level * share, count)) for share, count in sources) > total
        low, high = (low, level) if over else (level, high)
    for quota, (share, count) in zip(of([*shares], [*available], total), sources):
        aim = max(1, min(level * share, count))
        assert math.floor(aim + 1e-5) >= quota - 1
        assert math.ceil(aim - 1e-5) <= quota + 1
        assert abs(quota - aim) < 1 + 1e-5


def test_over_the_steps_each_source_gets_its_share():
    shares, trials = [4.7, 2.2, 1.9, 1.2], 3000
    found = torch.tensor([of(shares, [20] * 4, 10, draw=draw) for draw in range(trials)]).double()
    assert set(found[:, 3].tolist()) == {1.0, 2.0}
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
        assert of(shares, [9] * 4, 12, draw) == of(shaken, [9] * 4, 12, draw)


# Shares

NAMES = ("a", "b", "c", "d")
SIZES = long_tensor([4, 16, 64, 1])


def test_a_number_goes_from_proportional_to_equal():
    assert source_shares(0.5, NAMES, SIZES).tolist() == [2, 4, 8, 1]
    assert source_shares(1.0, NAMES, SIZES).tolist() == [4, 16, 64, 1]
    assert source_shares(0.0, NAMES, SIZES).tolist() == source_shares("equal", NAMES, SIZES).tolist() == [1] * 4
    assert source_shares("proportional", NAMES, SIZES) is None


def test_ratios_go_by_name():
    assert source_shares({"c": 2.0, "a": 0.5, "b": 0.0}, NAMES, SIZES).tolist() == [0.5, 0, 2, 0]


def test_a_source_without_an_example_in_the_data_has_a_share():
    assert source_shares(0.5, ("a", "b"), long_tensor([9, 0])).tolist() == [3, 1]


KEPT = torch.tensor([False, False, False, True])


def checked(ratios: dict[str, float], refreshed: bool = False, method: str = "colm") -> None:
    check_shares(SelectionConfig(method=method, shares=ratios), NAMES, KEPT, refreshed=refreshed)


def test_a_ratio_of_a_source_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"--selection.shares names 'bb'.* mean 'b'\? The sources are: a, b, c, d"):
        checked({"a": 1, "bb": 2, "c": 1})


def test_every_source_that_is_not_kept_needs_a_ratio():
    with pytest.raises(UserError, match="gives no number for b, c: add one for each, 0 for no quota"):
        checked({"a": 1})
    checked({"a": 1, "b": 0, "c": 2})
    checked({"a": 1}, method="random")


def test_a_source_that_is_kept_only_for_now_needs_a_ratio_too():
    with pytest.raises(UserError, match="gives no number for d: "):
        checked({"a": 1, "b": 0, "c": 2}, refreshed=True)


# In the rule

SOURCES = torch.repeat_interleave(long_tensor([10, 8, 4, 2]))


def quota_of(step: int = 1, sources=SOURCES, **options):
    config = SelectionConfig(candidates=len(SOURCES), budget=12, **options)
    shares = source_shares(config.shares, NAMES, long_tensor([100, 80, 40, 20]))
    n = torch.arange(len(sources))
    return SelectionRule(config, KEPT, 0, shares).quota(Candidates(step, n, n, sources, n))


def test_kept_sources_take_no_part():
    quota = quota_of(shares="equal")
    assert quota.kept.tolist() == [22, 23]
    assert sorted(quota.per_source.tolist()) == [0, 3, 3, 4]
    assert quota.per_source[3] == 0


def test_an_exponent_of_one_is_proportional_but_for_the_lots():
    """10 of 22: 4.55, 3.64, 1.82. The paper's rule floors and tops up the smallest; a lot decides otherwise."""
    for quota, aim in zip(quota_of(shares=1.0).per_source, (4.55, 3.64, 1.82)):
        assert int(quota) in (math.floor(aim), math.ceil(aim))
    assert quota_of(shares="proportional").per_source.tolist() == [4, 4, 2, 0]


def test_ratios_are_met_over_the_steps():
    found = torch.stack([quota_of(step, shares={"a": 3, "b": 1, "c": 0.5}).per_source for step in range(1, 400)])
    # 10 of 4.5 parts: 6.67, 2.22, 1.11; the mean of 399 lots is off by 0.5 / sqrt(399) = 0.025, four times that.
    assert (found.double().mean(0) - torch.tensor([60, 20, 10, 0]) / 9).abs().max() < 0.1


def test_a_source_whose_ratio_is_nothing_gets_no_quota_and_the_step_may_train_on_less():
    quota = quota_of(shares={"a": 0, "b": 1, "c": 1})
    assert quota.per_source.tolist() == [0, 6, 4, 0]
    assert quota_of(shares={"a": 0, "b": 0, "c": 1}).per_source.tolist() == [0, 0, 4, 0]


def test_a_step_with_nothing_to_train_on_ends_the_run():
    with pytest.raises(TrainingError, match=r"step 3: --selection.shares gives 0 to the sources of all candidates"):
        quota_of(3, SOURCES[:10], shares={"a": 0, "b": 1, "c": 1})
    quota_of(3, SOURCES[:10], shares={"a": 0, "b": 1, "c": 1}, method="random")  # has no quotas


def facts_of(**options) -> str:
    return "\n".join(shares_facts(SelectionConfig(**options), NAMES, long_tensor([100, 36, 64, 5]), KEPT))


def test_the_mixture_that_is_aimed_at_is_printed():
    text = facts_of(shares=0.5, method="stratified")
    assert "shares 0.5, at least 1 of each source: a 41.7%, b 25.0%, c 33.3%\n" in text
    assert "the mixture that is trained is that so shared out" in text
    assert "the same of all 3 that are not kept" in facts_of(shares="equal")
    assert "of the candidates, by the weights" in facts_of(shares="equal", weights="unbiased", ranking="systematic")
    assert not facts_of(shares="proportional")
    assert not facts_of(shares="equal", method="random")


def test_sources_without_a_quota_are_printed():
    text = facts_of(shares={"a": 0, "b": 3, "c": 1, "d": 0})
    assert "shares as given, at least 1 of each source: b 75.0%, c 25.0%\n" in text
    assert "warning: --selection.shares gives 0, and so no quota, to a" in text.splitlines()
