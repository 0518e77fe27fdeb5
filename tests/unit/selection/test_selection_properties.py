"""What holds of every selection, whatever the candidates, sources, sketches and quotas."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs import candidates_of
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.config.selection import Ranking
from colm_scale.randomness import generator
from colm_scale.records import CandidateMatrix, Candidates, Quota, Selection, long_tensor
from colm_scale.selection.quota import allocate, reallocate
from colm_scale.selection.route import route
from colm_scale.selection.rule import SelectionRule

UNTIMED = settings(deadline=None)  # a busy machine makes no failure
ONE_IN_THREE = st.sampled_from([False, False, True])
# Whole numbers: ties, duplicates and constant rows are the rule, not the exception.
ENTRIES = st.one_of(st.integers(-2, 2), st.floats(-3, 3, width=32))


@dataclass(frozen=True)
class Step:
    """Everything that a selection depends on."""

    rule: SelectionRule
    candidates: Candidates
    quota: Quota
    matrix: CandidateMatrix

    def select(self) -> Selection:
        return self.rule.select(self.candidates, self.quota, self.matrix if self.rule.sketches else None)

    @property
    def sources(self) -> Tensor:
        return self.candidates.sources

    @property
    def available(self) -> Tensor:
        """``[Q]`` candidates that can be picked."""
        return self.counts(self.matrix.positions[self.matrix.valid])

    def counts(self, positions: Tensor) -> Tensor:
        """``[Q]`` how many of some positions are of each source."""
        return torch.bincount(self.sources[positions], minlength=len(self.rule.kept))


@st.composite
def configs(draw, method: str, n: int) -> SelectionConfig:
    """Any ranking with any weights that it has."""
    ranking = draw(st.sampled_from(get_args(Ranking)))
    weights = ["uniform", "cluster", "unbiased"] if ranking == "facility" else ["uniform", "unbiased"]
    return SelectionConfig(
        method=method,
        candidates=n,
        budget=draw(st.integers(1, n)),
        ranking=ranking,
        metric=draw(st.sampled_from(["l1", "l2", "cosine"])),
        weights=draw(st.sampled_from(weights)),
    )


@st.composite
def steps(draw, method: str = "colm", invalid: bool = True) -> Step:
    n, sources_there = draw(st.integers(1, 20)), draw(st.integers(1, 4))  # of which some may have no candidate
    config = draw(configs(method, n))
    kept = torch.tensor(draw(st.lists(ONE_IN_THREE, min_size=sources_there, max_size=sources_there)))
    sources = long_tensor(draw(st.lists(st.integers(0, sources_there - 1), min_size=n, max_size=n)))
    rule = SelectionRule(config, kept, draw(st.integers(0, 3)))
    number = torch.arange(n)
    candidates = Candidates(draw(st.integers(1, 3)), number, 100 + number, sources, 8 + number)
    quota = rule.quota(candidates)
    return Step(rule, candidates, quota, draw(matrices(quota.to_sketch(sources), invalid)))


@st.composite
def matrices(draw, positions: Tensor, invalid: bool) -> CandidateMatrix:
    s, h = len(positions), draw(st.integers(1, 3))
    rows = torch.tensor(draw(st.lists(ENTRIES, min_size=s * h, max_size=s * h)), dtype=torch.float32).view(s, h)
    valid = ~torch.tensor(draw(st.lists(ONE_IN_THREE, min_size=s, max_size=s)), dtype=torch.bool) | (not invalid)
    losses = torch.full((s,), torch.nan).where(~valid, rows[:, 0])
    return CandidateMatrix(positions, rows.masked_fill(~valid.unsqueeze(1), 0), valid, losses)


def same(left: Selection, right: Selection) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(dataclasses.astuple(left), dataclasses.astuple(right))
    )


# CoLM


@UNTIMED
@given(steps())
def test_the_kept_come_first_and_then_each_source_in_turn_nobody_twice(step):
    selection = step.select()
    positions = selection.positions.tolist()
    assert len(set(positions)) == len(positions)
    assert positions[: selection.kept] == step.quota.kept.tolist()
    assert not step.rule.kept[step.sources[selection.picked]].any()
    assert all(a <= b for a, b in pairwise(step.sources[selection.picked].tolist()))
    assert (selection.overflow, selection.invalid) == (step.quota.overflow, int((~step.matrix.valid).sum()))


@settings(UNTIMED, max_examples=250)
@given(steps())
def test_the_coreset_is_as_large_as_the_budget_and_what_can_be_picked_allow(step):
    selection = step.select()
    left = step.rule.config.budget - len(step.quota.kept)
    assert len(selection) == len(step.quota.kept) + min(left, int(step.available.sum()))
    if step.matrix.valid.all():
        # A source without a quota is not sketched, and is not missed: the quotas already add up to the budget.
        assert len(selection) == min(step.rule.config.budget, len(step.candidates))


@UNTIMED
@given(steps())
def test_no_candidate_is_picked_whose_row_is_not_valid(step):
    invalid = set(step.matrix.positions[~step.matrix.valid].tolist())
    assert invalid.isdisjoint(step.select().positions.tolist())


@UNTIMED
@given(steps())
def test_a_source_gets_its_quota_and_more_only_if_another_lacks_some(step):
    picked = step.counts(step.select().picked)
    assert (picked >= torch.minimum(step.quota.per_source, step.available)).all()
    assert (picked <= step.available).all()
    if (step.available >= step.quota.per_source).all():
        assert picked.tolist() == step.quota.per_source.tolist()


@settings(UNTIMED, max_examples=250)
@given(steps())
def test_weights_share_out_the_valid_candidates_of_every_source_that_is_picked_from(step):
    selection, config = step.select(), step.rule.config
    kept, picked = selection.weights.split([selection.kept, len(selection.picked)])
    assert selection.weights.dtype == torch.float32
    assert (selection.weights > 0).all()
    if config.weights == "uniform":
        assert (selection.weights == 1).all()
        return
    stand_for = 1.0 if config.weights == "cluster" else 1 + step.quota.overflow / max(1, len(kept))
    assert kept.tolist() == pytest.approx([stand_for] * len(kept))
    assert (picked >= 1).all()
    sources, there = step.sources[selection.picked], step.available
    for source in sources.unique():
        assert float(picked[sources == source].sum()) == pytest.approx(int(there[source]))


@UNTIMED
@given(steps(), st.integers(0, 3))
def test_the_same_arguments_give_the_same_bits_whatever_was_drawn_before(step, draws):
    first = step.select()
    torch.rand(draws)
    assert torch.equal(step.rule.quota(step.candidates).kept, step.quota.kept)
    assert same(step.select(), first)


@UNTIMED
@given(steps(), st.data())
def test_the_picks_of_a_source_depend_on_its_own_rows_alone(step, data):
    source = data.draw(st.integers(0, len(step.rule.kept) - 1))
    of_row = step.sources[step.matrix.positions]
    others = (step.matrix.valid & (of_row != source)).unsqueeze(1)
    changed = dataclasses.replace(step.matrix, rows=torch.where(others, step.matrix.rows * -7 + 1, step.matrix.rows))
    before, after = step.select(), dataclasses.replace(step, matrix=changed).select()
    assert [p for p in before.picked.tolist() if step.sources[p] == source] == [
        p for p in after.picked.tolist() if step.sources[p] == source
    ]


@UNTIMED
@given(steps())
def test_what_an_invalid_row_holds_does_not_matter(step):
    odd = torch.where(step.matrix.valid.unsqueeze(1), step.matrix.rows, torch.tensor(torch.nan))
    losses = torch.where(step.matrix.valid, step.matrix.losses, torch.tensor(torch.inf))
    other = dataclasses.replace(step.matrix, rows=odd, losses=losses)
    assert same(dataclasses.replace(step, matrix=other).select(), step.select())


def test_kept_candidates_that_do_not_fit_are_drawn_anew_in_every_step_and_for_every_seed():
    sources, kept = torch.zeros(12, dtype=torch.int64), torch.tensor([True])
    drawn = set()
    for seed in range(4):
        rule = SelectionRule(SelectionConfig(candidates=12, budget=6), kept, seed)
        for step in range(1, 6):
            quota = rule.quota(Candidates(step, sources, sources, sources, sources))
            assert (len(quota.kept), quota.overflow) == (6, 6)
            drawn.add(tuple(quota.kept.tolist()))
    assert len(drawn) > 15  # of 924 subsets, 20 draws seldom repeat one


# Its baselines


@UNTIMED
@given(st.sampled_from(["stratified", "random", "full"]).flatmap(lambda method: steps(method, invalid=False)))
def test_baselines_are_of_the_size_and_composition_they_state(step):
    selection, config = step.select(), step.rule.config
    positions = selection.positions.tolist()
    assert len(set(positions)) == len(positions)
    if config.method != "stratified" or config.weights != "unbiased":
        assert (selection.weights == 1).all()
    assert same(step.select(), selection)
    match config.method:
        case "stratified":
            assert positions[: selection.kept] == step.quota.kept.tolist()
            assert step.counts(selection.picked).tolist() == step.quota.per_source.tolist()
            assert selection.overflow == step.quota.overflow
            if config.weights == "unbiased":
                there = step.counts(torch.arange(len(step.candidates))) - step.counts(step.quota.kept)
                stand_for = torch.bincount(step.sources[selection.picked], selection.weights[selection.kept :])
                assert stand_for.tolist() == pytest.approx(
                    torch.where(step.quota.per_source > 0, there, 0)[: len(stand_for)].tolist()
                )
        case "random":
            assert len(positions) == config.budget
            assert positions == sorted(positions)
        case "full":
            assert positions == list(range(len(step.candidates)))


# Quotas


COUNTS = st.lists(st.integers(0, 15), min_size=1, max_size=6).filter(any)


def quotas(counts: list[int], budget: int) -> list[int]:
    sources = torch.repeat_interleave(torch.arange(len(counts)), long_tensor(counts))
    none_kept = torch.zeros(len(counts), dtype=torch.bool)
    return allocate(candidates_of(sources), none_kept, budget, generator(0, "kept")).per_source.tolist()


@UNTIMED
@given(COUNTS, st.integers(1, 60))
def test_a_source_with_more_candidates_gets_no_less_but_for_the_one_that_goes_to_the_smallest(counts, budget):
    shares = quotas(counts, budget)
    for count, share in zip(counts, shares):
        assert all(share >= other_share - 1 for other, other_share in zip(counts, shares) if other <= count)


@UNTIMED
@given(COUNTS, st.integers(1, 60))
def test_a_larger_budget_takes_no_more_than_that_one_from_a_source(counts, budget):
    before, after = quotas(counts, budget), quotas(counts, budget + 1)
    assert sum(after) - sum(before) == (1 if budget < sum(counts) else 0)
    assert all(larger >= smaller - 1 for smaller, larger in zip(before, after))


@UNTIMED
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6), st.data())
def test_a_source_that_has_more_to_give_gets_no_less_and_leaves_the_others_no_more(pairs, data):
    wanted, available = (long_tensor(column) for column in zip(*pairs))
    source = data.draw(st.integers(0, len(pairs) - 1))
    more = available.clone()
    more[source] += data.draw(st.integers(1, 5))
    before, after = reallocate(wanted, available), reallocate(wanted, more)
    assert after[source] >= before[source]
    assert int(after.sum()) >= int(before.sum())
    others = torch.arange(len(pairs)) != source
    assert (after <= before)[others].all()


@UNTIMED
@given(COUNTS, st.integers(1, 60))
def test_quotas_that_can_be_met_stay_as_they_are(counts, budget):
    shares = long_tensor(quotas(counts, budget))
    assert torch.equal(reallocate(shares, long_tensor(counts)), shares)


# Routing what was selected


@settings(UNTIMED, max_examples=50)
@given(steps(), st.integers(1, 5), st.integers(1, 80), st.data())
def test_all_that_is_selected_is_trained_once_and_no_rank_waits_for_more_than_one_example(step, ranks, limit, data):
    n = len(step.candidates)
    lengths = long_tensor(data.draw(st.lists(st.integers(1, 40), min_size=n, max_size=n)))
    positions = step.select().positions
    if not len(positions):
        return
    routed = route(lengths, positions, ranks, limit)
    assert sorted(chain(*chain(*routed.micro_batches))) == sorted(positions.tolist())
    assert len({len(share) for share in routed.micro_batches}) == 1
    for members in chain(*routed.micro_batches):
        assert len(members) <= 1 or len(members) * int(lengths[list(members)].max()) <= limit
    # The longest first, to the rank that has least, makes ranks differ by one example at most (Graham 1969).
    loads = [0] * ranks
    for length in sorted(lengths[positions].tolist(), reverse=True):
        loads[loads.index(min(loads))] += length
    assert max(routed.tokens) - min(routed.tokens) <= max(loads) - min(loads) <= int(lengths[positions].max())
