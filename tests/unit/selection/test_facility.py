from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colm_scale.randomness import generator
from colm_scale.selection.facility import cluster_sizes, greedy, objective
from colm_scale.selection.similarity import similarities


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
    similarity = similarities(rows(300, 1), "l1")
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
