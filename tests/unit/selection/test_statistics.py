from __future__ import annotations

import pytest
import torch

from colm_scale.randomness import generator
from colm_scale.records import Selection, long_tensor
from colm_scale.selection.statistics import FIRST, MEMORY, PRIOR, SourceStatistics, observation_weights

P = 64


def draws(seed: int, count: int, mean: torch.Tensor, spread: float = 1.0, loss: float = 2.0) -> torch.Tensor:
    """``[3 + p]`` the sums over ``count`` examples with normal gradients of size ``spread`` around ``mean``."""
    gradients = mean + spread / P**0.5 * torch.randn(count, P, generator=generator(seed, "draws")).double()
    squares = gradients.square().sum()
    return torch.cat([torch.tensor([count, count * loss, squares]).double(), gradients.sum(0)])


def direction(i: int) -> torch.Tensor:
    return torch.eye(P, dtype=torch.float64)[i]


def after(steps: int, rows) -> SourceStatistics:
    """Statistics after steps that have added ``rows(step)``."""
    known = SourceStatistics.zeros(len(rows(0)), 3 + P)
    for step in range(steps):
        known = known.learn(torch.stack([row.double() for row in rows(step)]))
    return known


def losses(*of_source: tuple[int, float]) -> torch.Tensor:
    """``[Q, 2]`` sums of so many examples with that mean loss."""
    return torch.tensor([[count, count * loss] for count, loss in of_source], dtype=torch.float64)


def test_learning_fades_what_was_before_and_changes_nothing_in_place():
    before = SourceStatistics.zeros(2, 2)
    one = before.learn(losses((3, 2.0), (0, 0.0)))
    two = one.learn(losses((1, 4.0), (2, 1.0)))
    fade = 1 - 1 / MEMORY
    assert not before.recent.any()
    assert one.recent.tolist() == [[3, 6], [0, 0]]
    assert two.recent.tolist() == [[3 * fade + 1, 6 * fade + 4], [2, 2]]


def test_the_first_losses_are_those_of_the_first_examples():
    known = SourceStatistics.zeros(1, 2)
    for loss in (4.0, 3.0, 1.0):
        known = known.learn(losses((FIRST * 3 // 4, loss)))
    assert known.first.tolist() == [[FIRST, FIRST * (0.75 * 4 + 0.25 * 3)]]


def test_spread_is_that_within_the_source():
    """The second source's gradients lie as far out, but close together; the third's spread is twice the first's."""
    known = after(
        60,
        lambda step: [
            draws(3 * step, 8, 0 * direction(0)),
            draws(3 * step + 1, 8, direction(1), spread=0.1),
            draws(3 * step + 2, 8, direction(2), spread=2.0),
        ],
    )
    effective = 8 * MEMORY * (1 - (1 - 1 / MEMORY) ** 60)
    average = (1 + 0.1**2 + 2**2) / 3
    for found, true in zip(known.spread.tolist(), (1.0, 0.1, 2.0)):
        shrunk = (effective * true**2 + PRIOR * average) / (effective - 1 + PRIOR)
        assert found == pytest.approx(shrunk**0.5, rel=0.1)  # of 150 examples with 64 numbers each


def test_what_is_rarely_seen_is_near_the_average():
    def rows(step: int) -> list[torch.Tensor]:
        rare = draws(999, 3, 0 * direction(0), spread=50.0) if not step else torch.zeros(3 + P)
        return [draws(step, 8, 0 * direction(0)), rare]

    spread = after(1, rows).spread
    assert 2 * spread[0] < spread[1] < 40
    later = after(200, rows).spread
    assert later[1] == pytest.approx(float(later[0]), rel=0.1)  # long ago: as if never seen


def test_unseen_sources_are_the_average():
    known = SourceStatistics.zeros(3, 3 + P).learn(
        torch.stack([draws(1, 9, direction(0), loss=3.0), draws(2, 9, direction(0), loss=1.0), torch.zeros(3 + P)])
    )
    assert known.spread[2] == pytest.approx(float(known.spread[:2].square().mean().sqrt()))
    assert known.excess.tolist() == pytest.approx([0, 0, 0])
    assert known.agreement[2] == pytest.approx(float(known.agreement[:2].mean()))


def test_excess_is_over_what_the_average_source_has_left_of_its_first_loss():
    # Losses fall from 4 to 2, from 1 to 1/2 and from 2 to 2: a half, a half and all is left; the last falls behind.
    known = SourceStatistics.zeros(3, 2)
    for step in range(200):
        now = losses((8, 4.0), (8, 1.0), (8, 2.0)) if step < 2 else losses((8, 2.0), (8, 0.5), (8, 2.0))
        known = known.learn(now)
    assert known.first[:, 0].tolist() == [FIRST] * 3
    assert known.excess.tolist() == pytest.approx([-1 / 4, -1 / 4, 1 / 2], rel=0.05)  # the prior is 4 of 164


def test_agreement_is_with_the_others_and_not_with_itself():
    """Two sources pull one way and the third another. A source's own noise or size is no agreement."""

    def rows(step: int) -> list[torch.Tensor]:
        directions = (direction(0), direction(0), direction(1), 0 * direction(0))
        return [draws(4 * step + i, 8, mean, spread=0.5) for i, mean in enumerate(directions)]

    one, two, odd, noise = after(60, rows).agreement.tolist()
    assert one == pytest.approx(two, rel=0.15)
    assert one > 0.5
    assert abs(odd) < 0.1
    assert abs(noise) < 0.1


def test_opposed_sources_disagree():
    known = after(60, lambda step: [draws(2 * step + i, 8, sign * direction(0)) for i, sign in enumerate((1, -1))])
    assert (known.agreement < -0.8).all()


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
