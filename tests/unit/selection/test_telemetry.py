"""Each number of the telemetry against an answer known beforehand."""

from __future__ import annotations

import math

import pytest
import torch

from colm_scale.randomness import generator
from colm_scale.records import CandidateMatrix, Candidates, Selection, long_tensor
from colm_scale.selection import telemetry

SOURCES = long_tensor([0, 1, 0, 1, 0, 1, 2, 0, 0, 1])
"""Source 2 is kept: position 6."""
KEPT, PICKED = [6], [0, 2, 1, 3]
ELIGIBLE = torch.arange(10) != 6


def selection(picked=PICKED, weights=None, kept=KEPT) -> Selection:
    positions = long_tensor([*kept, *picked])
    weights = torch.ones(len(positions)) if weights is None else torch.tensor([1.0] * len(kept) + weights)
    return Selection(positions, weights, kept=len(kept))


def matrix(rows: torch.Tensor, invalid=()) -> CandidateMatrix:
    valid = torch.ones(9, dtype=torch.bool)
    valid[list(invalid)] = False
    return CandidateMatrix(ELIGIBLE.nonzero().flatten(), rows.float(), valid, torch.ones(9))


def measured(rows, chosen=None, draw=None) -> dict[str, float]:
    chosen = chosen or selection()
    return telemetry.ranking(matrix(rows), SOURCES, ELIGIBLE, chosen, draw or chosen)


def relative(own: torch.Tensor, whole: torch.Tensor) -> tuple[float, float]:
    cosine = torch.nn.functional.cosine_similarity(own, whole, dim=0)
    return float((own - whole).norm() / whole.norm()), float(cosine)


# The draw


def test_the_draw_has_the_quotas_of_the_selection_and_its_weights_by_source():
    chosen = selection(weights=[3.0, 1.0, 0.5, 0.25])
    seen = set()
    for seed in range(40):
        draw = telemetry.stratified_like(chosen, SOURCES, ELIGIBLE, generator(seed, "test"))
        assert draw.positions[:1].tolist() == KEPT
        assert draw.kept == 1
        assert torch.bincount(SOURCES[draw.picked]).tolist() == [2, 2]
        assert draw.weights.tolist() == [1.0, 2.0, 2.0, 0.375, 0.375]
        seen |= set(draw.picked.tolist())
    assert seen == set(range(10)) - {6}


def test_the_draw_takes_only_what_could_be_picked():
    candidates = Candidates(1, *[torch.arange(10)] * 2, SOURCES, torch.ones(10).long())
    sketched = matrix(torch.zeros(9, 1), invalid=[4, 7])  # rows 4 and 7 are positions 4 and 8
    eligible = telemetry.could_be_picked(candidates, selection(), sketched)
    assert eligible.nonzero().flatten().tolist() == [0, 1, 2, 3, 5, 7, 9]
    nobody = CandidateMatrix.without_rows()
    assert telemetry.could_be_picked(candidates, selection(), nobody).tolist() == ELIGIBLE.tolist()
    drawn = [telemetry.stratified_like(selection(), SOURCES, eligible, generator(s, "test")) for s in range(30)]
    assert {position for draw in drawn for position in draw.picked.tolist()} == {0, 1, 2, 3, 5, 7, 9}


def test_the_draw_of_everything_is_everything():
    whole = selection([0, 2, 4, 7, 8, 1, 3, 5, 9])
    draw = telemetry.stratified_like(whole, SOURCES, ELIGIBLE, generator(0, "test"))
    assert draw.positions.tolist() == whole.positions.tolist()


# Overlap


def test_overlap_and_what_chance_makes_of_it():
    found = measured(torch.rand(9, 2), draw=selection([0, 4, 3, 1]))
    assert found["overlap"] == 0.75
    assert found["overlap_by_chance"] == pytest.approx((2 * 2 / 5 + 2 * 2 / 4) / 4)


def test_any_selection_has_as_much_in_common_with_a_draw_as_chance_says():
    """So overlap alone says nothing: not the worst selection either is told from random by it."""
    rows, shared = torch.rand(9, 2), []
    for seed in range(400):
        draw = telemetry.stratified_like(selection(), SOURCES, ELIGIBLE, generator(seed, "test"))
        found = measured(rows, draw=draw)
        shared.append(found["overlap"])
    assert sum(shared) / 400 == pytest.approx(found["overlap_by_chance"], abs=0.03)


# Rank


def test_one_column_has_rank_one():
    assert measured(torch.rand(9, 1))["rank"] == pytest.approx(1)


def test_rank_is_that_of_each_source_s_own_rows():
    rows = torch.zeros(9, 4)
    order = [0, 1, 0, 1, 0, 1, 0, 0, 1]  # sources of positions 0 to 5 and 7 to 9
    ones = iter(torch.eye(4)[[0, 1, 2, 3]])  # four equal singular values in source 1
    for row, source in enumerate(order):
        rows[row] = next(ones) if source else torch.ones(4)  # and one in source 0
    assert measured(rows)["rank"] == pytest.approx((5 * 1 + 4 * 4) / 9)


def test_effective_rank_by_its_definition():
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    p = torch.linalg.svdvals(rows)
    p = p / p.sum()
    expected = math.exp(-sum(x * math.log(x) for x in p.tolist()))
    assert telemetry.effective_rank(rows) == pytest.approx(expected, rel=1e-5)
    assert telemetry.effective_rank(rows.T) == pytest.approx(expected, rel=1e-5)
    assert telemetry.effective_rank(torch.zeros(3, 2)) == 0


# Nearness of sketches


def test_error_and_cosine_of_a_source_s_mean():
    rows = torch.rand(9, 3, generator=torch.Generator().manual_seed(0))
    chosen = selection([0, 2], weights=[3.0, 1.0])  # source 0 alone is ranked
    found = measured(rows, chosen, selection([2, 7]))
    own = rows[[0, 2, 4, 6, 7]]  # positions 0, 2, 4, 7 and 8
    selected = found["sketch_error"], found["sketch_cosine"]
    assert selected == pytest.approx(relative((3 * own[0] + own[1]) / 4, own.mean(0)), rel=1e-5)
    drawn = found["sketch_error_stratified"], found["sketch_cosine_stratified"]
    assert drawn == pytest.approx(relative((own[1] + own[3]) / 2, own.mean(0)), rel=1e-5)


def test_sources_count_by_their_candidates_and_their_columns_are_their_own():
    rows = torch.rand(9, 3, generator=torch.Generator().manual_seed(0))
    found = measured(rows)
    one, other = rows[[0, 2, 4, 6, 7]], rows[[1, 3, 5, 8]]
    whole = torch.cat([5 * one.mean(0), 4 * other.mean(0)])
    own = torch.cat([5 * one[:2].mean(0), 4 * other[:2].mean(0)])
    assert (found["sketch_error"], found["sketch_cosine"]) == pytest.approx(relative(own, whole), rel=1e-5)


def test_a_source_taken_whole_was_not_compared():
    rows = torch.rand(9, 3, generator=torch.Generator().manual_seed(0))
    found = measured(rows, selection([0, 2, 1, 3, 5, 9]))
    expected = relative(rows[[0, 2]].mean(0), rows[[0, 2, 4, 6, 7]].mean(0))
    assert (found["sketch_error"], found["sketch_cosine"]) == pytest.approx(expected, rel=1e-5)


def test_a_row_that_is_not_valid_does_not_count():
    rows = torch.rand(9, 3, generator=torch.Generator().manual_seed(0))
    rows[4] = 0  # that of position 4
    eligible = ELIGIBLE & (torch.arange(10) != 4)
    chosen = selection([0, 2])
    found = telemetry.ranking(matrix(rows, [4]), SOURCES, eligible, chosen, chosen)
    expected = relative(rows[[0, 2]].mean(0), rows[[0, 2, 6, 7]].mean(0))
    assert (found["sketch_error"], found["sketch_cosine"]) == pytest.approx(expected, rel=1e-5)


def test_where_nothing_had_to_be_ranked_there_is_nothing_to_tell():
    assert measured(torch.rand(9, 2), selection([1, 3, 5, 9])).keys() == {"overlap", "overlap_by_chance"}
    assert measured(torch.rand(9, 2), selection([])) == {}
    assert "sketch_error" not in measured(torch.zeros(9, 2))


def test_nearness_of_vectors():
    vectors = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 2.0]]).double()
    assert telemetry.nearness(vectors @ vectors.T) == pytest.approx(
        {
            "sketch_error": 1.5,
            "sketch_cosine": -1,
            "sketch_error_stratified": math.sqrt(2),
            "sketch_cosine_stratified": 0,
        }
    )
    assert telemetry.nearness(torch.full((3, 3), math.nan).double()) == {}
    assert telemetry.nearness(torch.zeros(3, 3).double()) == {}


# Sources


def test_effective_number_of_sources():
    found = telemetry.composition(SOURCES, selection([0, 1], weights=[1.0, 1.0]))
    assert found["effective_sources"] == pytest.approx(3)
    shares = [0.5, 0.4, 0.1]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert found["effective_sources_candidates"] == pytest.approx(expected)
    heavy = telemetry.composition(SOURCES, selection([0, 1], weights=[2.0, 1.0]))
    assert heavy["effective_sources"] == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))
