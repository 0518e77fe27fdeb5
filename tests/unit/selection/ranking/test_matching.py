"""Matching the mean against every exchange and every subset there is."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colm_scale.randomness import generator
from colm_scale.records import long_tensor
from colm_scale.selection.ranking import matching
from colm_scale.selection.ranking.matching import (
    match_by_swaps,
    match_in_parts,
    products_of_deviations,
    whole_numbers,
)

UNTIMED = settings(deadline=None)  # a busy machine makes no failure


def drawn(n: int, h: int, trial: int = 0) -> Tensor:
    return torch.randn(n, h, generator=generator(trial, "rows"))


def picked(rows: Tensor, k: int) -> list[int]:
    return match_by_swaps(products_of_deviations(rows, nothing(rows)), k).tolist()


def in_parts(rows: Tensor, k: int, largest: int) -> list[int]:
    return match_in_parts(rows, k, largest, nothing(rows)).tolist()


def nothing(rows: Tensor) -> Tensor:
    return torch.zeros(rows.shape[1], dtype=torch.float64)


def away(rows: Tensor, picks) -> float:
    """Length of ``sum (x_i - mean)`` over the picks."""
    rows = rows.double()
    return float((rows[long_tensor(picks)] - rows.mean(0)).sum(0).norm())


@st.composite
def pools(draw):
    """Rows with ties and without, and how many to pick of them."""
    n, h = draw(st.integers(2, 12)), draw(st.integers(1, 3))
    entries = st.integers(-2, 2) if draw(st.booleans()) else st.floats(-3, 3, width=32)
    rows = torch.tensor(draw(st.lists(entries, min_size=n * h, max_size=n * h)), dtype=torch.float32).view(n, h)
    return rows, draw(st.integers(1, n - 1))


@settings(UNTIMED, max_examples=200)
@given(pools())
def test_no_exchange_comes_nearer(pool):
    rows, k = pool
    picks = picked(rows, k)
    assert picks == sorted(set(picks))
    assert len(picks) == k
    reached = away(rows, picks)
    for pick in picks:
        for other in set(range(len(rows))) - set(picks):
            exchanged = [other if member == pick else member for member in picks]
            assert away(rows, exchanged) >= reached - 1e-6


def herded(rows: Tensor, k: int) -> list[int]:
    """The start, literally: each pick makes the sum of the deviations as small as can be."""
    picks: list[int] = []
    for _ in range(k):
        left = [i for i in range(len(rows)) if i not in picks]
        picks.append(min(left, key=lambda i: (away(rows, [*picks, i]), i)))
    return picks


def swept(rows: Tensor, k: int) -> list[int]:
    """The exchanges, literally: every pick in turn for the best other row, until a sweep changes nothing."""
    picks, before = herded(rows, k), None
    while picks != before:
        before = list(picks)
        for slot in range(k):
            others = [i for i in range(len(rows)) if i not in picks]
            exchanged = [[*picks[:slot], i, *picks[slot + 1 :]] for i in others]
            best = min(exchanged, key=lambda subset: away(rows, subset))
            picks = best if away(rows, best) < away(rows, picks) - 1e-9 else picks
    return sorted(picks)


def test_the_picks_are_those_of_literal_sweeps():
    for trial in range(20):
        rows = drawn(15, 3, trial)
        assert picked(rows, 6) == swept(rows, 6)


def test_a_source_of_one_part_is_matched_as_a_whole():
    rows = drawn(30, 4)
    assert in_parts(rows, 11, 30) == picked(rows, 11)


@pytest.mark.parametrize(("n", "k", "largest"), [(40, 17, 10), (41, 40, 10), (8, 7, 3), (50, 2, 10), (50, 1, 10)])
def test_parts_share_the_picks(n, k, largest):
    picks = in_parts(drawn(n, 2), k, largest)
    assert picks == sorted(set(picks))
    assert len(picks) == k
    parts = -(-n // largest)
    counts = [sum(pick % parts == part for pick in picks) for part in range(parts)]
    assert max(counts) - min(counts) <= 1


def shortest(deviations: Tensor, left: Tensor, k: int) -> Tensor:
    """Sum of ``k`` deviations that brings ``left`` back to zero."""
    products = whole_numbers(deviations @ torch.cat([deviations, left.unsqueeze(0)]).T)
    return deviations[match_by_swaps(products, k)].sum(0)


def test_a_part_makes_up_for_the_error_of_those_before_it():
    """Four parts that each match the whole mean alone err by twice as much as one of them; together by less."""
    together = apart = whole = 0.0
    for trial in range(20):
        rows = drawn(200, 12, trial)
        deviations = (rows - rows.mean(0)).double()
        apart += float(sum(shortest(deviations[part::4], nothing(rows), 20) for part in range(4)).norm())
        together += away(rows, in_parts(rows, 80, 50))
        whole += away(rows, in_parts(rows, 80, 200))
    assert whole < together < 0.6 * apart


def test_the_error_left_is_made_up_for():
    """The last column holds the products with a vector, and the picks add up to minus this vector."""
    rows = drawn(12, 2)
    deviations = (rows - rows.mean(0)).double()
    left = 3 * deviations[4] + 0.1
    picks = match_by_swaps(products_of_deviations(rows, left), 4)

    def length(subset) -> float:
        return float((deviations[list(subset)].sum(0) + left).norm())

    for pick in picks.tolist():
        for other in set(range(12)) - set(picks.tolist()):
            assert length({*picks.tolist(), other} - {pick}) >= length(picks.tolist()) - 1e-9


def test_exchanges_only_ever_come_nearer_and_mostly_do(monkeypatch):
    nearer = 0
    for trial in range(30):
        rows = drawn(14, 3, trial)
        start = herded(rows, 5)
        reached = away(rows, picked(rows, 5))
        assert reached <= away(rows, start) + 1e-9
        nearer += reached < away(rows, start) - 1e-9
        with monkeypatch.context() as patch:
            patch.setattr(matching, "_MOST_SWEEPS", 0)
            assert picked(rows, 5) == sorted(start)
    assert nearer >= 10


def test_the_best_subset_is_often_found_and_a_bad_one_never():
    """Of 252 subsets, the nearest in a third of the trials, one of the best tenth in nearly all, of the best third."""
    ranks = []
    for trial in range(30):
        rows = drawn(10, 2, trial)
        reached = away(rows, picked(rows, 5))
        every = [away(rows, subset) for subset in combinations(range(10), 5)]
        ranks.append(sum(other < reached - 1e-9 for other in every))
    assert ranks.count(0) >= 10
    assert sum(rank < 25 for rank in ranks) >= 28
    assert max(ranks) < 84


def test_known_subsets():
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0], [14.0]])  # the mean is 4
    assert picked(line, 1) == [3]
    assert picked(line, 2) == [2, 3]  # 5 of 8: nearer than 14 with any
    assert picked(line, 3) == [0, 1, 4]  # 15 of 12, nearer than 6; 0 with 1 before 16 and 17


def test_equal_candidates_are_taken_in_order():
    assert picked(torch.ones(6, 3) * 0.1, 3) == [0, 1, 2]
    pairs = torch.tensor([[0.1, 0.3], [-0.7, 0.2], [0.1, 0.3], [-0.7, 0.2], [0.1, 0.3], [-0.7, 0.2]])
    assert picked(pairs, 2) == [0, 1]


@pytest.mark.parametrize("k", [3, 8])
def test_picks_belong_to_the_rows_and_not_to_their_order(k):
    for trial in range(10):
        rows, order = drawn(20, 4, trial), torch.randperm(20, generator=generator(trial, "order"))
        assert sorted(order[picked(rows[order], k)].tolist()) == picked(rows, k)


def test_size_and_place_of_the_rows_do_not_matter_to_swaps():
    rows = drawn(20, 4)
    assert picked(rows * 1e-6, 8) == picked(rows * 1e6, 8) == picked(rows + 3, 8) == picked(rows, 8)


def test_sums_are_exact_in_any_order_and_near_the_values():
    values = torch.randn(500, 3, generator=generator(0, "values"), dtype=torch.float64) * 1e-9
    whole = whole_numbers(values)
    order = torch.randperm(500, generator=generator(0, "order"))
    assert torch.equal(whole, whole.round())
    assert whole.cumsum(0)[-1].tolist() == whole[order].cumsum(0)[-1].tolist() == whole.sum(0).tolist()
    assert (4 * whole.abs().sum(0) < 2**53).all()
    torch.testing.assert_close(whole / whole.abs().max(), values / values.abs().max(), rtol=0, atol=1e-11)
    assert values.cumsum(0)[-1].tolist() != values[order].cumsum(0)[-1].tolist(), "or this shows nothing"


def test_what_differs_by_rounding_is_equal():
    tenth = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    assert tenth[0] + tenth[1] != tenth[2]
    whole = whole_numbers(torch.stack([tenth[0] + tenth[1], tenth[2]]))
    assert whole[0] == whole[1]


def test_nothing_but_zeros_stays_zero():
    assert whole_numbers(torch.zeros(3, dtype=torch.float64)).tolist() == [0, 0, 0]
