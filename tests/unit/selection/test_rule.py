from __future__ import annotations

import dataclasses

import pytest
import torch

from colm_scale.config import SelectionConfig
from colm_scale.errors import TrainingError
from colm_scale.randomness import generator
from colm_scale.records import CandidateMatrix, Candidates, Selection, long_tensor
from colm_scale.selection.coverage import Coverage
from colm_scale.selection.rule import SelectionRule, loss_shares

SOURCES = long_tensor([0, 1, 0, 2, 0, 1, 0, 0, 1, 0, 0, 1])
KEPT = torch.tensor([False, False, True])


def candidates(step: int = 1) -> Candidates:
    n = len(SOURCES)
    return Candidates(step, torch.arange(n), 100 + torch.arange(n), SOURCES, torch.full((n,), 8))


def rule(method: str = "colm", seed: int = 0, **options) -> SelectionRule:
    return SelectionRule(SelectionConfig(method=method, candidates=len(SOURCES), budget=6, **options), KEPT, seed)


def selected(of: SelectionRule, step: int = 1) -> list[int]:
    drawn = candidates(step)
    return of.select(drawn, of.quota(drawn), None).positions.tolist()


def on_a_line(values: list[float]) -> CandidateMatrix:
    """A matrix whose second column is zero, with a row for every candidate that is not kept."""
    positions = (SOURCES != 2).nonzero().flatten()
    rows = torch.tensor(values)[positions].unsqueeze(1) * torch.tensor([1.0, 0.0])
    return CandidateMatrix(positions, rows, torch.ones(len(positions), dtype=torch.bool), torch.zeros(len(positions)))


def test_example_shares_are_the_weights_over_their_sum():
    selection = Selection(long_tensor([3, 1, 2]), torch.tensor([1.0, 4.0, 3.0]))
    shares = loss_shares(selection, long_tensor([7, 1, 100]), "example")
    assert shares.tolist() == [0.125, 0.5, 0.375]


def test_token_shares_weigh_by_label_tokens():
    selection = Selection(long_tensor([3, 1, 2]), torch.tensor([1.0, 4.0, 3.0]))
    shares = loss_shares(selection, long_tensor([4, 1, 8]), "token")  # 4, 4 and 24 of 32
    assert shares.tolist() == [0.125, 0.125, 0.75]


@pytest.mark.parametrize("per", ["example", "token"])
def test_shares_belong_to_the_examples_and_not_to_their_order(per):
    weights, tokens = torch.tensor([2.0, 1.0, 5.0]), long_tensor([3, 9, 2])
    order = long_tensor([2, 0, 1])
    shares = loss_shares(Selection(order, weights), tokens, per)
    moved = loss_shares(Selection(order, weights[order]), tokens[order], per)
    assert moved.tolist() == shares[order].tolist()


def test_many_equal_shares_add_up_to_one():
    shares = loss_shares(Selection(torch.arange(3000), torch.ones(3000)), torch.ones(3000).long(), "example")
    assert float(shares.double().sum()) == pytest.approx(1, abs=3000 * 2**-25 / 3000)  # each is off by half a last bit


def test_only_colm_sketches():
    assert [method for method in ("colm", "stratified", "random", "full") if rule(method).sketches] == ["colm"]


def test_only_full_can_select_more_than_the_budget():
    assert {method: rule(method).most_selected for method in ("colm", "stratified", "random", "full")} == {
        "colm": 6,
        "stratified": 6,
        "random": 6,
        "full": 12,
    }


def test_quota_keeps_the_kept_source_and_shares_out_the_rest():
    quota = rule().quota(candidates())
    assert quota.kept.tolist() == [3]
    assert quota.per_source.tolist() == [3, 2, 0]  # 5 over 7 and 4: floor(3.2), floor(1.8), one more to the smallest


def test_protected_candidates_are_kept_by_the_methods_with_kept_sources():
    drawn = dataclasses.replace(candidates(), protected=torch.isin(torch.arange(12), long_tensor([2, 5])))
    stratified = rule("stratified").select(drawn, rule("stratified").quota(drawn), None)
    assert stratified.positions[: stratified.kept].tolist() == [2, 3, 5]
    assert SOURCES[stratified.picked].tolist() == [0, 0, 1]
    assert len(set(stratified.positions.tolist())) == 6
    of = rule("random")
    assert of.select(drawn, of.quota(drawn), None).kept == 0


def test_overflow_can_end_the_run():
    drawn = dataclasses.replace(candidates(4), protected=torch.arange(12) < 7)
    with pytest.raises(TrainingError, match=r"step 4: 1 of 7 kept candidates.*--selection\.overflow is fail"):
        rule(overflow="fail").quota(drawn)
    assert rule(overflow="fail").quota(candidates(4)).kept.tolist() == [3]
    rule("random", overflow="fail").quota(drawn)  # keeps none anyway


def test_full_takes_all_in_order():
    assert selected(rule("full")) == list(range(12))


def test_stratified_fills_the_quotas():
    positions = selected(rule("stratified"))
    assert positions[0] == 3
    assert SOURCES[positions].tolist() == [2, 0, 0, 0, 1, 1]
    assert len(set(positions)) == 6


@pytest.mark.parametrize("method", ["stratified", "random"])
def test_draws_depend_on_seed_and_step_only(method):
    assert selected(rule(method), 5) == selected(rule(method), 5)
    others = [selected(rule(method), step) for step in range(1, 9)] + [selected(rule(method, seed=1), 5)]
    assert len({tuple(positions) for positions in others}) > 5


def test_random_ignores_sources():
    sources = torch.cat([SOURCES[selected(rule("random"), step)] for step in range(1, 60)])
    counts = torch.bincount(sources, minlength=3)
    # 354 draws at 7/12, 4/12 and 1/12; four standard deviations of the binomial are 37, 35 and 21.
    assert (counts - torch.tensor([206.5, 118.0, 29.5])).abs().lt(torch.tensor([37.0, 35.0, 21.0])).all()


def test_systematic_draws_depend_on_seed_and_step_and_the_other_rankings_draw_nothing():
    matrix = on_a_line([1.0, 5, 1, 0, 2, 1, 3, 6, 2, 2, 3, 1])

    def picks(step: int, seed: int = 0, ranking: str = "systematic") -> tuple[int, ...]:
        of = rule(ranking=ranking, seed=seed)
        return tuple(of.select(candidates(step), of.quota(candidates(step)), matrix).positions.tolist())

    assert picks(5) == picks(5)
    assert len({picks(step) for step in range(1, 9)} | {picks(5, seed=1)}) > 3
    for other in ("facility", "matching"):
        assert picks(5, ranking=other) == picks(6, seed=1, ranking=other)


def test_facility_picks_the_medoids_of_each_source():
    # Source 0 is 0 1 2 20 21 22 90: first its median, position 6, then what is worst covered, then the middle of 0 1 2.
    # Source 1 is 50 51 52 99: first 51 (position 5), the lower of two medians, then 99.
    values = [0.0, 50, 1, 0, 2, 51, 20, 21, 52, 22, 90, 99]
    of = rule(ranking="facility")
    selection = of.select(candidates(), of.quota(candidates()), on_a_line(values))
    assert selection.positions.tolist() == [3, 6, 10, 2, 5, 11]
    assert selection.kept == 1
    assert selection.weights.tolist() == [1.0] * 6


def test_colm_matches_the_mean_of_each_source_unless_told_otherwise():
    # Source 0 is 0 1 2 20 21 22 90, of mean 22.3, and three picks should add up to 66.9: 22, 21 and 20 miss by 3.9, and
    # no single exchange is nearer. Of 50 51 52 99, of mean 63, two should add up to 126: 52 and 51 miss by 23, and 50
    # and 99 by as much; the first pick is the one nearest to the mean, 52, and its best exchange is none.
    values = [0.0, 50, 1, 0, 2, 51, 20, 21, 52, 22, 90, 99]
    selection = rule().select(candidates(), rule().quota(candidates()), on_a_line(values))
    matched = rule(ranking="matching").select(candidates(), rule().quota(candidates()), on_a_line(values))
    assert selection.positions.tolist() == matched.positions.tolist() == [3, 6, 7, 9, 5, 8]
    assert selection.kept == 1
    assert selection.weights.tolist() == [1.0] * 6


def test_cluster_weights_count_the_candidates_a_medoid_stands_for():
    values = [0.0, 50, 1, 0, 2, 51, 20, 21, 52, 22, 90, 99]
    of = rule(ranking="facility", weights="cluster")
    selection = of.select(candidates(), of.quota(candidates()), on_a_line(values))
    weights = dict(zip(selection.positions.tolist(), selection.weights.tolist()))
    assert weights == {3: 1, 2: 3, 6: 3, 10: 1, 5: 3, 11: 1}


@pytest.mark.parametrize("ranking", ["stratified", "systematic"])
def test_a_draw_with_unbiased_weights_is_on_average_all_candidates(ranking):
    options = {"method": "stratified"} if ranking == "stratified" else {"ranking": ranking}
    of = rule(weights="unbiased", **options)
    matrix = on_a_line([4.0, 5, 1, 0, 2, 1, 3, 6, 2, 2, 9, 1])
    values = torch.tensor([1.0, 2, 4, 8, -3, 5, -7, 2, 6, 1, 0, 9], dtype=torch.float64)  # have no part in the draw
    totals = []
    for step in range(1, 1001):
        drawn = candidates(step)
        selection = of.select(drawn, of.quota(drawn), matrix)
        assert len(selection) == 6
        totals.append(float(selection.weights.double() @ values[selection.positions]))
    totals = torch.tensor(totals)
    assert abs(totals.mean() - values.sum()) < 4 * totals.std() / len(totals) ** 0.5
    assert totals.std() / len(totals) ** 0.5 < 0.7


def test_the_metric_is_the_configured_one():
    # By cosine the sizes of numbers of one sign do not matter: all candidates of a source are alike, the first wins.
    of = rule(metric="cosine", ranking="facility")
    values = [1.0, 50, 2, 0, 3, 51, 20, 21, 52, 22, 90, 99]
    selection = of.select(candidates(), of.quota(candidates()), on_a_line(values))
    assert selection.positions.tolist() == [3, 0, 2, 4, 1, 5]


def test_of_the_two_middles_of_an_even_number_the_lower_wins():
    """Rounding does not decide: a last bit that differs between world sizes would else select other examples."""
    sources, positions = torch.zeros(8, dtype=torch.int64), torch.arange(8)
    one = SelectionRule(SelectionConfig(candidates=8, budget=1, ranking="facility"), torch.tensor([False]), seed=0)
    drawn = Candidates(1, positions, positions, sources, positions)
    for draw in range(50):
        values = torch.randn(8, 1, generator=generator(draw, "line"))
        matrix = CandidateMatrix(positions, values, torch.ones(8, dtype=torch.bool), torch.zeros(8))
        middle = values.flatten().argsort()[3:5]
        assert one.select(drawn, one.quota(drawn), matrix).positions.tolist() == [int(middle[0])]


METHODS = [
    {"method": "stratified"},
    {"method": "stratified", "weights": "unbiased"},
    *({"ranking": ranking} for ranking in ("facility", "matching", "systematic")),
    {"coverage_floor": 0.4},
    {"method": "stratified", "coverage_floor": 0.4},
]


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_whoever_selects_all_that_is_kept_or_protected_is_trained_on(options):
    protected = long_tensor([0, 8])
    for step in range(1, 6):
        drawn = dataclasses.replace(candidates(step), protected=torch.isin(torch.arange(len(SOURCES)), protected))
        of = rule(**options)
        quota = of.quota(drawn, coverage=Coverage(long_tensor([700_000, 900_000, 0])))
        positions = quota.to_sketch(SOURCES)
        values = torch.randn(len(positions), 4, generator=generator(step, "rows"))
        matrix = CandidateMatrix(positions, values, torch.ones(len(positions), dtype=torch.bool), values[:, 0].abs())
        selection = of.select(drawn, quota, matrix)
        assert sorted(selection.positions[: selection.kept].tolist()) == [0, 3, 8]
        assert len(set(selection.positions.tolist())) == 6
