from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colm_scale.randomness import generator
from colm_scale.selection.ranking import facility
from colm_scale.selection.ranking.facility import cluster_sizes, greedy, greedy_on_device, greedy_with_gains, objective
from colm_scale.selection.ranking.similarity import similarities


def rows(n: int, h: int = 3, trial: int = 0) -> torch.Tensor:
    return torch.randn(n, h, generator=generator(trial, "test rows", n))


def without_ties(n: int, trial: int = 0, lowest: float = 0.0) -> torch.Tensor:
    """Symmetric and generic, so that no two candidates ever gain the same (on rows, mutually nearest pairs do)."""
    drawn = torch.rand(n, n, generator=generator(trial, "test similarity", n), dtype=torch.float64)
    return drawn + drawn.T + lowest


def value(similarity: torch.Tensor, picks: list[int]) -> float:
    return math.fsum(max(row[pick] for pick in picks) for row in similarity.tolist())


def literal_greedy(similarity: torch.Tensor, k: int) -> list[int]:
    picks: list[int] = []
    for _ in range(k):
        left = [j for j in range(len(similarity)) if j not in picks]
        picks.append(max(left, key=lambda j: (value(similarity, [*picks, j]), -j)))
    return picks


@pytest.mark.parametrize("trial", range(6))
@pytest.mark.parametrize("lowest", [0.0, -1.5, -9.0])
def test_each_pick_is_the_best_next_one(trial, lowest):
    similarity = without_ties(9, trial, lowest)
    assert greedy(similarity, 9).tolist() == literal_greedy(similarity, 9)


def test_picks_of_a_round_that_do_not_touch_are_in_the_order_of_their_gains():
    """Three clusters of 3, 2 and 4: one round finds the medoids of all, another their neighbours."""
    similarity = similarities(torch.tensor([[0.0, 1, 2, 50, 51, 90, 91, 93, 94]]).T, "l1")
    assert greedy(similarity, 9).tolist() == literal_greedy(similarity, 9)
    assert greedy(similarity, 4).tolist() == literal_greedy(similarity, 4)


def gains_one_by_one(similarity: torch.Tensor, k: int) -> tuple[list[int], list[float]]:
    """Picks and gains, all gains computed afresh for every pick; for similarities that are small whole numbers."""
    covered, picks, raised = similarity.min().expand(len(similarity)).clone(), [], []
    for _ in range(k):
        gains = (similarity - covered.unsqueeze(1)).clamp(min=0).sum(0)
        gains[picks] = -1
        picks.append(int(gains.argmax()))
        raised.append(float(gains.max()))
        covered = torch.maximum(covered, similarity[picks[-1]])
    return picks, raised


@pytest.fixture(params=["few", "many", "device"])
def way(request, monkeypatch):
    """Each of the ways in which it is done, for any number of candidates; the device's on the CPU."""
    monkeypatch.setattr(facility, "_FEW", 10**6 if request.param == "few" else 0)
    return greedy_on_device if request.param == "device" else greedy_with_gains


@pytest.mark.parametrize("n", [1, 2, 9, 40, 300])
@pytest.mark.parametrize("high", [2, 9, 10**6])
def test_all_ways_are_greedy_to_the_last_tie(way, n, high):
    drawn = torch.randint(-high, high, (n, n), generator=generator(n, "test similarity"), dtype=torch.float64)
    for similarity in (drawn + drawn.T, similarities(drawn[:, :2], "l1"), similarities(drawn[:, :1] // 2, "l1")):
        for k in {0, 1, n // 16, n // 2, n}:
            picks, raised = way(similarity, k)
            assert picks.dtype == torch.int64
            assert (picks.tolist(), raised.tolist()) == gains_one_by_one(similarity, k)


def test_all_ways_leave_the_similarities_as_they_are(way):
    similarity = similarities(rows(60).double(), "cosine")
    before = similarity.clone()
    way(similarity, 30)
    assert torch.equal(similarity, before)


def test_all_ways_agree_where_similarities_are_rounded():
    similarity = similarities(rows(300, 8).double(), "cosine")
    picks, raised = greedy_with_gains(similarity, 150)
    by_device = greedy_on_device(similarity, 150)
    assert picks.tolist() == by_device[0].tolist()
    assert raised.tolist() == by_device[1].tolist()


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 2), (7, 3), (8, 5)])
def test_greedy_reaches_its_share_of_the_optimum(metric, n, k):
    for trial in range(5):
        similarity = similarities(rows(n, trial=trial), metric).double()
        shifted = similarity - similarity.min()  # the guarantee is for values that start from 0
        best = max(value(shifted, list(subset)) for subset in combinations(range(n), k))
        reached = value(shifted, greedy(similarity, k).tolist())
        assert (1 - 1 / math.e) * best <= reached <= best + 1e-9  # float64 rounding


@given(st.integers(2, 7).flatmap(lambda n: st.lists(st.integers(-3, 3), min_size=n * n, max_size=n * n)))
def test_with_many_ties_the_lowest_index_wins(entries):
    n = math.isqrt(len(entries))
    drawn = torch.tensor(entries, dtype=torch.float64).view(n, n)
    similarity = drawn + drawn.T
    assert greedy(similarity, n).tolist() == literal_greedy(similarity, n)


def test_duplicates_are_picked_last_and_in_order():
    similarity = similarities(torch.tensor([[0.0], [5.0], [5.0], [0.0], [9.0]]), "l1")
    assert greedy(similarity, 3).tolist() == [1, 0, 4]  # 1 and 2 are the median
    assert greedy(similarity, 5).tolist() == [1, 0, 4, 2, 3]


def test_all_candidates_alike():
    similarity = similarities(torch.ones(4, 2), "l1")
    assert greedy(similarity, 3).tolist() == [0, 1, 2]
    assert cluster_sizes(similarity, torch.tensor([0, 1, 2])).tolist() == [2, 1, 1]


def test_one_candidate_and_none():
    similarity = similarities(rows(1), "l2")
    assert greedy(similarity, 1).tolist() == [0]
    assert greedy(similarity, 0).tolist() == []
    assert greedy(similarity, 0).dtype == torch.int64


def test_picking_all_picks_each_once():
    similarity = similarities(rows(33), "l1")
    assert greedy(similarity, 33).sort().values.tolist() == list(range(33))


@pytest.mark.parametrize("trial", range(4))
def test_permuted_candidates_give_the_same_picks(trial):
    similarity = without_ties(40, trial)
    order = torch.randperm(40, generator=generator(trial, "test order"))
    picks = greedy(similarity, 15)
    assert order[greedy(similarity[order][:, order], 15)].tolist() == picks.tolist()


def test_many_candidates_equal_recomputed_gains():
    """The gains that are updated stay those that one computes afresh, on a size where drift would show."""
    similarity = similarities(rows(200, 8), "l1")
    picks = greedy(similarity, 120)
    s = similarity.double()
    covered = torch.full((200,), float(s.min()), dtype=torch.float64)
    for pick in picks.tolist():
        gains = (s - covered.unsqueeze(1)).clamp(min=0).sum(0)
        assert gains[pick] >= gains.max() - 1e-9  # float64 rounding of sums of about 1e3
        covered = torch.maximum(covered, s[:, pick])


def test_repeats_are_identical_whatever_the_number_of_threads():
    similarity = similarities(rows(400, 1), "l1")
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(greedy(similarity, 150).tolist())
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_the_scale_of_similarities_does_not_matter():
    similarity = without_ties(30)
    picks = greedy(similarity, 12).tolist()
    for scale in (2.0**-60, 2.0**60):
        assert greedy(similarity * scale, 12).tolist() == picks


def test_objective_and_cluster_sizes_by_hand():
    similarity = similarities(torch.tensor([[0.0], [1.0], [6.0], [10.0], [3.5]]), "l1")
    picks = torch.tensor([2, 1])  # 3.5 lies 2.5 from both: the earlier pick has it
    assert objective(similarity, picks) == 50 - (1 + 0 + 0 + 4 + 2.5)
    assert cluster_sizes(similarity, picks).tolist() == [3, 2]
    assert cluster_sizes(similarity, picks.flip(0)).tolist() == [3, 2]


def test_a_pick_stands_for_itself_even_if_a_duplicate_was_picked_earlier():
    similarity = similarities(torch.tensor([[0.0], [0.0], [0.0], [4.0]]), "l2")
    assert cluster_sizes(similarity, torch.tensor([1, 3, 0])).tolist() == [2, 1, 1]


def test_objective_of_a_negative_similarity_is_negative():
    similarity = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
    assert objective(similarity, torch.tensor([0])) == 0.5
    assert objective(similarity - 2, torch.tensor([1])) == -3.5
