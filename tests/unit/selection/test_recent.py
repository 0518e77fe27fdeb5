from __future__ import annotations

import torch

from colm_scale.config import SelectionConfig
from colm_scale.records import long_tensor
from colm_scale.selection.recent import RecentSources, is_refreshed


def sources(*counts: int):
    """So many candidates of each source."""
    return torch.arange(len(counts)).repeat_interleave(long_tensor(counts))


def after(recent: RecentSources, config: SelectionConfig, *steps: tuple[int, ...]) -> RecentSources:
    for step, counts in enumerate(steps, 1):
        recent = recent.after(step, sources(*counts), config)
    return recent


def test_kept_sources_follow_what_came_since_the_last_time():
    config = SelectionConfig(refresh_every=2)
    begin = RecentSources.beginning(torch.tensor([False, True, False]))
    one = after(begin, config, (1, 9, 5))
    assert one.kept.tolist() == [False, True, False]
    assert one.seen.tolist() == [1, 9, 5]
    two = after(begin, config, (1, 9, 5), (1, 9, 5))  # 2, 18, 10: below the average of 10 is only the first
    assert two.kept.tolist() == [True, False, False]
    assert two.seen.tolist() == [0, 0, 0]
    four = after(begin, config, (1, 9, 5), (1, 9, 5), (9, 9, 1), (9, 9, 1))
    assert four.kept.tolist() == [False, False, True]


def test_a_source_that_did_not_come_is_no_small_source_and_does_not_move_the_average():
    config = SelectionConfig(refresh_every=1)
    recent = after(RecentSources.beginning(torch.ones(4, dtype=torch.bool)), config, (0, 4, 8, 0))
    assert recent.kept.tolist() == [False, True, False, False]  # the average of the two that came is 6, not 3


def test_the_quantile_rule_is_asked_too():
    config = SelectionConfig(refresh_every=1, kept_rule="quantile", kept_quantile=0.75)
    recent = after(RecentSources.beginning(torch.zeros(4, dtype=torch.bool)), config, (9, 1, 2, 3))
    assert recent.kept.tolist() == [False, True, True, True]


def test_without_refreshing_nothing_is_chosen_anew():
    recent = after(RecentSources.beginning(torch.tensor([True, False])), SelectionConfig(), *[(1, 9)] * 50)
    assert recent.kept.tolist() == [True, False]
    assert not any(is_refreshed(step, SelectionConfig()) for step in range(1, 50))
