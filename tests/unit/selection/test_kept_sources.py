from __future__ import annotations

import torch

from colm_scale.records import long_tensor
from colm_scale.selection.kept_sources import RecentSources


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
