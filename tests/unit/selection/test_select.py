from __future__ import annotations

from functools import partial

import pytest
import torch

from colm_scale.config import SelectionConfig
from colm_scale.randomness import generator
from colm_scale.records import CandidateMatrix, Quota, long_tensor
from colm_scale.selection.select import select_coreset

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
    selection = select(Quota(KEPT, long_tensor([0, 2, 1]), overflow=4))
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
    selection = select(quota, of=line, weights="cluster")
    # Source 1 at 0, 1, 2 | 9, 11: the middles are 1 (4) and 9 (8); greedy would begin with 2 (7), the middle of all.
    assert selection.positions.tolist() == [1, 5, 4, 8, 0, 3]
    assert selection.weights.tolist() == [1, 1, 3, 2, 1, 2]


def test_cluster_weights_count_the_candidates_a_medoid_stands_for():
    selection = select(Quota(KEPT, long_tensor([0, 2, 1])), weights="cluster")
    assert selection.positions.tolist() == [1, 5, 7, 8, 3]
    assert selection.weights.tolist() == [1, 1, 3, 2, 3]


def test_a_source_whose_quota_is_what_it_has_enters_whole():
    selection = select(Quota(KEPT, long_tensor([0, 1, 3])), weights="cluster")
    assert selection.positions.tolist() == [1, 5, 7, 0, 3, 6]
    assert selection.weights.tolist() == [1, 1, 5, 1, 1, 1]


def test_a_source_without_quota_is_left_out():
    assert select(Quota(KEPT, long_tensor([0, 0, 2]))).positions.tolist() == [1, 5, 3, 0]


def test_invalid_candidates_are_not_picked_and_counted():
    selection = select(Quota(KEPT, long_tensor([0, 2, 1])), invalid=(7, 3), weights="cluster")
    # Source 1 now has 0, 1, 9, 11: 1 (4) is the first of the middle pair, then 9 (8). Source 2 has 0 and 5.5: a tie.
    assert selection.positions.tolist() == [1, 5, 4, 8, 0]
    assert selection.weights.tolist() == [1, 1, 2, 2, 2]
    assert selection.invalid == 2


def test_what_a_source_lacks_goes_to_another():
    selection = select(Quota(KEPT, long_tensor([0, 2, 2])), invalid=(3, 6))
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
    first, second = (select(quota, weights="cluster", metric=metric) for _ in range(2))
    assert torch.equal(first.positions, second.positions)
    assert torch.equal(first.weights, second.weights)


# Rankings. One column: source 1 is 2, 4, 7, 8, 9 at 0, 1, 2, 9, 11; source 2 is 0, 3, 6 at 0, 5, 5.5.


def on_the_line(quota: Quota, invalid: tuple[int, ...] = (), losses: dict[int, float] | None = None):
    of = matrix(quota, invalid)
    by_position = torch.zeros(len(SOURCES))
    for position, loss in (losses or {}).items():
        by_position[position] = loss
    return CandidateMatrix(of.positions, of.rows[:, :1], of.valid, by_position[of.positions])


def weights_of(selection) -> dict[int, float]:
    return dict(zip(selection.positions.tolist(), selection.weights.tolist()))


def test_matching_takes_the_subset_whose_mean_is_that_of_its_source():
    quota = Quota(KEPT, long_tensor([0, 2, 1]))
    # The means are 4.6 and 3.5: 0 and 9, rather than 1 and 9 or 0 and 11; and 5.
    assert select(quota, ranking="matching").positions.tolist() == [1, 5, 2, 8, 3]


def test_matching_together_makes_up_for_one_source_in_another():
    # Alone, 0 and 9 are off by -0.2 in all, and 5 by 1.5, which nothing makes up for.
    quota = Quota(KEPT, long_tensor([0, 2, 1]))
    together = select(quota, ranking="matching", joint=True)
    assert SOURCES[together.positions].tolist() == [0, 0, 1, 1, 2]
    off = sum(PLACE[p] - {1: 4.6, 2: 3.5}[int(SOURCES[p])] for p in together.picked.tolist())
    every = [
        PLACE[a] + PLACE[b] - 9.2 + PLACE[c] - 3.5
        for a in (2, 4, 7, 8, 9) for b in (2, 4, 7, 8, 9) if a < b for c in (0, 3, 6)
    ]  # fmt: skip
    assert abs(off) == pytest.approx(min(map(abs, every)))


def test_top_takes_the_highest_losses_in_order_and_of_equal_ones_the_first():
    quota = Quota(KEPT, long_tensor([0, 3, 1]))
    of = on_the_line(quota, losses={2: 1.0, 4: 3.0, 7: 2.0, 8: 2.0, 9: 2.0, 0: 0.5, 3: 0.5, 6: 0.1})
    assert select(quota, of=of, ranking="top").positions.tolist() == [1, 5, 4, 7, 8, 0]


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


def test_importance_takes_what_is_large_for_certain_and_weighs_by_its_chance():
    quota = Quota(KEPT, long_tensor([0, 3, 1]))
    # Sizes 0, 1, 2, 9, 11 for 3 picks: 9 and 11 are certain; the third is 4 or 7, with odds of 1 to 2 (2 counts for
    # 0.046). Of source 2, 5 and 5.5.
    for seed in range(20):
        draws = partial(generator, seed, "test")
        config = SelectionConfig(ranking="importance", weights="unbiased")
        selection = select_coreset(matrix(quota), SOURCES, quota, config, draws)
        found = weights_of(selection)
        assert found[8] == found[9] == 1
        (third,) = set(selection.picked.tolist()) & {2, 4, 7}
        assert found[third] == pytest.approx(3.046 / PLACE[third] if PLACE[third] else 3.046 / 0.046)
        of_two = selection.positions[-1].item()
        assert found[of_two] == pytest.approx(10.535 / max(PLACE[of_two], 0.035))


def test_unbiased_weights_let_the_picks_of_a_source_stand_for_its_valid_candidates():
    quota = Quota(KEPT, long_tensor([0, 2, 3]))
    for ranking in ("facility", "matching", "systematic"):
        selection = select(quota, invalid=(9,), ranking=ranking, weights="unbiased")
        assert selection.weights.tolist() == [1, 1, 2, 2, 1, 1, 1]
    # Kept candidates stand for those that overflowed too: 2 of 3.
    overflowed = Quota(KEPT, long_tensor([0, 2, 1]), overflow=1)
    assert select(overflowed, weights="unbiased").weights.tolist() == [1.5, 1.5, 2.5, 2.5, 3]
    assert select(overflowed).weights.tolist() == [1] * 5


def test_pursuit_weighs_by_least_squares_and_each_source_as_its_candidates():
    quota = Quota(KEPT, long_tensor([0, 2, 1]))
    selection = select(quota, ranking="pursuit", weights="unbiased")
    assert selection.picked.tolist() == [9, 2, 6]  # the largest, and what balances it
    of_one = selection.weights[2:4]
    assert float(of_one.sum()) == pytest.approx(5)
    assert float(of_one @ torch.tensor([11.0, 0.0])) / 5 == pytest.approx(4.6, abs=1)
    assert float(selection.weights[4]) == pytest.approx(3)
    assert select(quota, ranking="pursuit").weights.tolist() == [1] * 5


def test_facility_together_covers_across_sources():
    quota = Quota(KEPT, long_tensor([0, 1, 1]))
    # All are at 0, 0, 1, 2, 5, 5.5, 9, 11. The sum of distances is least at 5 (3) and 2 (7). 5 then covers 9 and 11 of
    # source 1 too, so that this picks 0 (2); by itself it would pick 2 (7).
    assert select(quota, joint=True).positions.tolist() == [1, 5, 2, 3]
    assert select(quota).positions.tolist() == [1, 5, 7, 3]
    assert weights_of(select(quota, joint=True, weights="cluster")) == {1: 1, 5: 1, 2: 4, 3: 4}


@pytest.mark.parametrize("ranking", ["facility", "matching", "pursuit"])
def test_free_picks_are_those_of_one_source(ranking):
    quota = Quota(KEPT, long_tensor([0, 0, 0]), free=3)
    of = matrix(quota, invalid=(9,))
    free = select(quota, of=of, ranking=ranking, joint=True, weights="unbiased")
    assert free.positions[:2].tolist() == [1, 5]
    everything = select_coreset(
        of,
        torch.zeros_like(SOURCES),
        Quota(long_tensor([]), long_tensor([3])),
        SelectionConfig(ranking=ranking, weights="unbiased"),
        partial(generator, 0, "test"),
    )
    assert sorted(free.picked.tolist()) == sorted(everything.positions.tolist())
    assert SOURCES[free.picked].tolist() == sorted(SOURCES[free.picked].tolist())
    assert float(free.weights[2:].sum()) == pytest.approx(7)
    assert {p: w for p, w in weights_of(free).items() if p not in (1, 5)} == weights_of(everything)


def test_free_picks_are_no_more_than_there_are():
    quota = Quota(KEPT, long_tensor([0, 0, 0]), free=8)
    selection = select(quota, invalid=(9, 0), joint=True)
    assert selection.positions.tolist() == [1, 5, 2, 4, 7, 8, 3, 6]
    assert selection.invalid == 2
