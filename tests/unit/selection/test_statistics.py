from __future__ import annotations

import pytest
import torch

from colm_scale.randomness import generator
from colm_scale.records import Selection, long_tensor
from colm_scale.selection.statistics import FIRST, MEMORY, SourceStatistics, observation_weights


def losses(*of_source: tuple[int, float]) -> torch.Tensor:
    """``[Q, 2]`` sums of so many examples with that mean loss."""
    return torch.tensor([[count, count * loss] for count, loss in of_source], dtype=torch.float64)


def test_learning_fades_what_was_before_and_changes_nothing_in_place():
    before = SourceStatistics.zeros(2)
    one = before.learn(losses((3, 2.0), (0, 0.0)))
    two = one.learn(losses((1, 4.0), (2, 1.0)))
    fade = 1 - 1 / MEMORY
    assert not before.recent.any()
    assert one.recent.tolist() == [[3, 6], [0, 0]]
    assert two.recent.tolist() == [[3 * fade + 1, 6 * fade + 4], [2, 2]]


def test_the_first_losses_are_those_of_the_first_examples():
    known = SourceStatistics.zeros(1)
    for loss in (4.0, 3.0, 1.0):
        known = known.learn(losses((FIRST * 3 // 4, loss)))
    assert known.first.tolist() == [[FIRST, FIRST * (0.75 * 4 + 0.25 * 3)]]


def test_unseen_sources_are_the_average():
    known = SourceStatistics.zeros(3).learn(losses((9, 3.0), (9, 1.0), (0, 0.0)))
    assert known.excess.tolist() == pytest.approx([0, 0, 0])


def test_what_is_rarely_seen_is_near_the_average():
    """A source that is seen no more is drawn back to the others, whatever its last examples said."""
    known = SourceStatistics.zeros(2)
    for step in range(200):
        known = known.learn(losses((8, 4.0 if step < 2 else 2.0), (3, 4.0) if step < 8 else (0, 0.0)))
        if step == 7:
            soon = known.excess
    assert soon[1] > 0.1
    assert known.excess.tolist() == pytest.approx([0, 0], abs=0.01)


def test_excess_is_over_what_the_average_source_has_left_of_its_first_loss():
    # Losses fall from 4 to 2, from 1 to 1/2 and from 2 to 2: a half, a half and all is left; the last falls behind.
    known = SourceStatistics.zeros(3)
    for step in range(200):
        now = losses((8, 4.0), (8, 1.0), (8, 2.0)) if step < 2 else losses((8, 2.0), (8, 0.5), (8, 2.0))
        known = known.learn(now)
    assert known.first[:, 0].tolist() == [FIRST] * 3
    assert known.excess.tolist() == pytest.approx([-1 / 4, -1 / 4, 1 / 2], rel=0.05)  # the prior is 4 of 164


def test_examples_count_for_their_weight_among_those_of_their_source():
    sources = long_tensor([0, 0, 0, 1, 1, 2])
    selection = Selection(long_tensor([4, 0, 2, 3]), torch.tensor([5.0, 1.0, 3.0, 5.0]))
    assert observation_weights(selection, sources).tolist() == [0.5, 0, 1.5, 1, 1, 0]


def test_weights_that_undo_the_choice_undo_the_bias():
    """Large values are drawn three times as often; weighted by a third, their mean is right."""
    values = torch.tensor([1.0] * 500 + [5.0] * 500)
    chance = torch.tensor([0.2] * 500 + [0.6] * 500)
    chosen = (torch.rand(1000, generator=generator(0, "chosen")) < chance).nonzero().flatten()
    sources = torch.zeros(1000, dtype=torch.int64)
    means = []
    for weights in (1 / chance[chosen], torch.ones(len(chosen))):
        counted = observation_weights(Selection(chosen, weights), sources)
        assert float(counted.sum()) == pytest.approx(len(chosen))
        means.append(float((counted * values).sum() / counted.sum()))
    assert means[0] == pytest.approx(3, abs=0.3)  # 400 draws of 1 or 5: 2 / 20, and weights that differ
    assert means[1] == pytest.approx(4, abs=0.3)
