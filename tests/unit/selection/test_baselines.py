from __future__ import annotations

import torch

from colm_scale.randomness import generator
from colm_scale.records import Quota, long_tensor
from colm_scale.selection.baselines import full, random, stratified

SOURCES = long_tensor([0, 1, 2, 1, 1, 2, 0, 1, 2, 1])
QUOTA = Quota(kept=long_tensor([0, 6]), per_source=long_tensor([0, 2, 3]), overflow=1)


def test_stratified_has_the_kept_and_the_quotas():
    selection = stratified(SOURCES, QUOTA, generator(0, "stratified", 1))
    assert selection.positions[:2].tolist() == [0, 6]
    assert SOURCES[selection.picked].tolist() == [1, 1, 2, 2, 2]
    assert selection.positions[4:].tolist() == [2, 5, 8]  # a quota of all takes all
    assert len(set(selection.positions.tolist())) == 7
    assert (selection.kept, selection.overflow, selection.invalid) == (2, 1, 0)
    assert selection.weights.tolist() == [1.0] * 7


def test_stratified_draws_uniformly_within_a_source():
    drawn = torch.cat([stratified(SOURCES, QUOTA, generator(0, "stratified", s)).positions[2:4] for s in range(500)])
    counts = torch.bincount(drawn, minlength=10)
    # 5 candidates enter 2 times in 5: 200 times of 500, standard deviation 11; 5 of them either way.
    assert counts[SOURCES != 1].sum() == 0
    assert ((counts[SOURCES == 1] - 200).abs() < 55).all()


def test_stratified_can_let_picks_stand_for_the_candidates_of_their_source():
    selection = stratified(SOURCES, QUOTA, generator(0, "stratified", 1), unbiased=True)
    # 2 of 5 candidates of source 1, all of source 2; one kept candidate has overflowed, so two stand for three.
    assert selection.weights.tolist() == [1.5, 1.5, 2.5, 2.5, 1, 1, 1]
    assert torch.equal(selection.positions, stratified(SOURCES, QUOTA, generator(0, "stratified", 1)).positions)


def test_a_kept_candidate_of_a_source_with_a_quota_is_not_drawn_again():
    protected = Quota(kept=long_tensor([3]), per_source=long_tensor([0, 4, 0]))
    for step in range(20):
        selection = stratified(SOURCES, protected, generator(0, "stratified", step), unbiased=True)
        assert selection.positions.tolist() == [3, 1, 4, 7, 9]
        assert selection.weights.tolist() == [1] * 5


def test_random_is_a_uniform_subset():
    counts = torch.zeros(8, dtype=torch.int64)
    for trial in range(600):
        positions = random(8, 3, generator(trial, "random")).positions
        assert positions.tolist() == sorted(set(positions.tolist()))
        counts[positions] += 1
    assert counts.sum() == 3 * 600
    assert ((counts - 225).abs() < 60).all()  # standard deviation 12


def test_random_takes_all_if_the_budget_allows():
    assert random(4, 9, generator(0, "random")).positions.tolist() == [0, 1, 2, 3]


def test_full_takes_all():
    selection = full(5)
    assert selection.positions.tolist() == [0, 1, 2, 3, 4]
    assert selection.weights.tolist() == [1.0] * 5
    assert selection.kept == 0


def test_equal_keys_draw_equal_selections():
    a, b = (stratified(SOURCES, QUOTA, generator(3, "stratified", 7)) for _ in range(2))
    assert torch.equal(a.positions, b.positions)
