from __future__ import annotations

from functools import partial

import pytest
import torch

from colm_scale.config import SelectionConfig
from colm_scale.randomness import generator
from colm_scale.records import CandidateMatrix, Quota, long_tensor
from colm_scale.selection.select import full, random, select_coreset, stratified

# Position:              0  1  2  3  4  5  6  7  8  9
SOURCES = long_tensor([2, 0, 1, 2, 1, 0, 2, 1, 1, 1])
# Source 1 has candidates 2, 4, 7, 8, 9 at 0, 1, 2, 9, 11; source 2 has 0, 3, 6 at 0, 5, 5.5. Source 0 is kept.
PLACE = {0: 0.0, 3: 5.0, 6: 5.5, 2: 0.0, 4: 1.0, 7: 2.0, 8: 9.0, 9: 11.0}
KEPT = long_tensor([1, 5])


def matrix(quota: Quota, invalid: tuple[int, ...] = ()) -> CandidateMatrix:
    positions = quota.to_sketch(SOURCES)
    valid = ~torch.isin(positions, long_tensor(invalid))
    rows = torch.tensor([[PLACE[position], 0.0] for position in positions.tolist()]) * valid.unsqueeze(1)
    return CandidateMatrix(positions, rows, valid, torch.zeros(len(positions)))


def select(quota: Quota, invalid: tuple[int, ...] = (), of: CandidateMatrix | None = None, **options):
    of = matrix(quota, invalid) if of is None else of
    return select_coreset(of, SOURCES, quota, SelectionConfig(**options), partial(generator, 0, "test"))


def test_kept_first_then_medoids_source_by_source_in_the_order_of_picking():
    selection = select(Quota(KEPT, long_tensor([0, 2, 1]), overflow=4), ranking="facility")
    # Source 1: 2.0 is the median (7), then 9.0 (8) gains 5 + 2. Source 2: 5.0 (3).
    assert selection.positions.tolist() == [1, 5, 7, 8, 3]
    assert selection.weights.tolist() == [1, 1, 1, 1, 1]
    assert (selection.kept, selection.overflow, selection.invalid) == (2, 4, 0)
    assert selection.picked.tolist() == [7, 8, 3]
    assert selection.positions.dtype == torch.int64
    assert selection.weights.dtype == torch.float32


def test_a_matrix_of_one_column_is_solved_exactly():
    quota = Quota(KEPT, long_tensor([0, 2, 2]))
    of = matrix(quota)
    line = CandidateMatrix(of.positions, of.rows[:, :1], of.valid, of.losses)
    selection = select(quota, of=line, ranking="facility", weights="cluster")
    # Source 1 at 0, 1, 2 | 9, 11: the middles are 1 (4) and 9 (8); greedy would begin with 2 (7), the middle of all.
    assert selection.positions.tolist() == [1, 5, 4, 8, 0, 3]
    assert selection.weights.tolist() == [1, 1, 3, 2, 1, 2]


def test_cluster_weights_count_the_candidates_a_medoid_stands_for():
    selection = select(Quota(KEPT, long_tensor([0, 2, 1])), ranking="facility", weights="cluster")
    assert selection.positions.tolist() == [1, 5, 7, 8, 3]
    assert selection.weights.tolist() == [1, 1, 3, 2, 3]


def test_a_source_whose_quota_is_what_it_has_enters_whole():
    selection = select(Quota(KEPT, long_tensor([0, 1, 3])), ranking="facility", weights="cluster")
    assert selection.positions.tolist() == [1, 5, 7, 0, 3, 6]
    assert selection.weights.tolist() == [1, 1, 5, 1, 1, 1]


def test_a_source_without_quota_is_left_out():
    assert select(Quota(KEPT, long_tensor([0, 0, 2])), ranking="facility").positions.tolist() == [1, 5, 3, 0]


def test_invalid_candidates_are_not_picked_and_counted():
    selection = select(Quota(KEPT, long_tensor([0, 2, 1])), invalid=(7, 3), ranking="facility", weights="cluster")
    # Source 1 now has 0, 1, 9, 11: 1 (4) is the first of the middle pair, then 9 (8). Source 2 has 0 and 5.5: a tie.
    assert selection.positions.tolist() == [1, 5, 4, 8, 0]
    assert selection.weights.tolist() == [1, 1, 2, 2, 2]
    assert selection.invalid == 2


def test_what_a_source_lacks_goes_to_another():
    selection = select(Quota(KEPT, long_tensor([0, 2, 2])), invalid=(3, 6), ranking="facility")
    assert selection.positions.tolist() == [1, 5, 7, 8, 2, 0]


def test_what_no_source_has_is_left_out():
    selection = select(Quota(KEPT, long_tensor([0, 5, 3])), invalid=(3, 6, 8))
    assert selection.positions.tolist() == [1, 5, 2, 4, 7, 9, 0]
    assert selection.invalid == 3


def test_nothing_but_kept_candidates():
    selection = select(Quota(KEPT, long_tensor([0, 0, 0])))
    assert selection.positions.tolist() == [1, 5]
    assert len(selection.picked) == 0


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
def test_the_same_matrix_gives_the_same_bits(metric):
    quota = Quota(KEPT, long_tensor([0, 3, 2]))
    first, second = (select(quota, ranking="facility", weights="cluster", metric=metric) for _ in range(2))
    assert torch.equal(first.positions, second.positions)
    assert torch.equal(first.weights, second.weights)


# Rankings. One column: source 1 is 2, 4, 7, 8, 9 at 0, 1, 2, 9, 11; source 2 is 0, 3, 6 at 0, 5, 5.5.


def on_the_line(quota: Quota) -> CandidateMatrix:
    of = matrix(quota)
    return CandidateMatrix(of.positions, of.rows[:, :1], of.valid, of.losses)


def test_matching_takes_the_subset_whose_mean_is_that_of_its_source():
    quota = Quota(KEPT, long_tensor([0, 2, 1]))
    # The means are 4.6 and 3.5: 0 and 9, rather than 1 and 9 or 0 and 11; and 5.
    assert select(quota, ranking="matching").positions.tolist() == [1, 5, 2, 8, 3]


def test_systematic_goes_by_the_only_column_and_else_by_the_product_with_the_mean():
    quota = Quota(KEPT, long_tensor([0, 2, 1]))
    picks, config = [], SelectionConfig(ranking="systematic")
    for seed in range(30):
        draws = partial(generator, seed, "test")
        one = select_coreset(on_the_line(quota), SOURCES, quota, config, draws).picked.tolist()
        # The second column is zero, so the product goes with the first.
        assert select_coreset(matrix(quota), SOURCES, quota, config, draws).picked.tolist() == one
        picks.append(one)
    # Of 2, 4, 7, 8, 9 one, and another that is 2 or 3 further.
    assert {tuple(three[:2]) for three in picks} == {(2, 7), (2, 8), (4, 8), (4, 9), (7, 9)}
    assert {three[2] for three in picks} == {0, 3, 6}


def test_unbiased_weights_let_the_picks_of_a_source_stand_for_its_valid_candidates():
    quota = Quota(KEPT, long_tensor([0, 2, 3]))
    for ranking in ("facility", "matching", "systematic"):
        selection = select(quota, invalid=(9,), ranking=ranking, weights="unbiased")
        assert selection.weights.tolist() == [1, 1, 2, 2, 1, 1, 1]
    # Kept candidates stand for those that overflowed too: 2 of 3.
    overflowed = Quota(KEPT, long_tensor([0, 2, 1]), overflow=1)
    assert select(overflowed, weights="unbiased").weights.tolist() == [1.5, 1.5, 2.5, 2.5, 3]
    assert select(overflowed).weights.tolist() == [1] * 5


MIXED = long_tensor([0, 1, 2, 1, 1, 2, 0, 1, 2, 1])
SHARED = Quota(kept=long_tensor([0, 6]), per_source=long_tensor([0, 2, 3]), overflow=1)


def test_stratified_has_the_kept_and_the_quotas():
    selection = stratified(MIXED, SHARED, generator(0, "stratified", 1))
    assert selection.positions[:2].tolist() == [0, 6]
    assert MIXED[selection.picked].tolist() == [1, 1, 2, 2, 2]
    assert selection.positions[4:].tolist() == [2, 5, 8]  # a quota of all takes all
    assert len(set(selection.positions.tolist())) == 7
    assert (selection.kept, selection.overflow, selection.invalid) == (2, 1, 0)
    assert selection.weights.tolist() == [1.0] * 7


def test_stratified_draws_uniformly_within_a_source():
    drawn = torch.cat([stratified(MIXED, SHARED, generator(0, "stratified", s)).positions[2:4] for s in range(500)])
    counts = torch.bincount(drawn, minlength=10)
    # 5 candidates enter 2 times in 5: 200 times of 500, standard deviation 11; 5 of them either way.
    assert counts[MIXED != 1].sum() == 0
    assert ((counts[MIXED == 1] - 200).abs() < 55).all()


def test_stratified_can_let_picks_stand_for_the_candidates_of_their_source():
    selection = stratified(MIXED, SHARED, generator(0, "stratified", 1), unbiased=True)
    # 2 of 5 candidates of source 1, all of source 2; one kept candidate has overflowed, so two stand for three.
    assert selection.weights.tolist() == [1.5, 1.5, 2.5, 2.5, 1, 1, 1]
    assert torch.equal(selection.positions, stratified(MIXED, SHARED, generator(0, "stratified", 1)).positions)


def test_a_kept_candidate_of_a_source_with_a_quota_is_not_drawn_again():
    protected = Quota(kept=long_tensor([3]), per_source=long_tensor([0, 4, 0]))
    for step in range(20):
        selection = stratified(MIXED, protected, generator(0, "stratified", step), unbiased=True)
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
    a, b = (stratified(MIXED, SHARED, generator(3, "stratified", 7)) for _ in range(2))
    assert torch.equal(a.positions, b.positions)
