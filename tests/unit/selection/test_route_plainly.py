"""What is computed for all ranks at once is, to the last bit, what a plain loop over ranks and examples gives."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import plain_route

from colm_scale.randomness import generator
from colm_scale.records import Candidates, Quota, SketchPlan, last_of_each, long_tensor
from colm_scale.selection import route
from colm_scale.sketch.plan import held_inputs, plan_sketch

UNTIMED = settings(deadline=None)
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40) | st.lists(st.integers(6, 8), min_size=1, max_size=40)


def some_of(data: st.DataObject, n: int) -> torch.Tensor:
    """Some of n positions, in any order."""
    return long_tensor(data.draw(st.permutations(range(n)))[: data.draw(st.integers(0, n))])


@UNTIMED
@given(LENGTHS, st.integers(1, 150), st.integers(1, 7), st.booleans(), st.booleans(), st.data())
def test_micro_batches_and_shares(lengths, budget, ranks, packed, even, data):
    lengths, positions = long_tensor(lengths), some_of(data, len(lengths))
    formed = route.form_micro_batches(lengths, positions, budget, packed=packed, even=even)
    assert formed == plain_route.form_micro_batches(lengths, positions, budget, packed=packed, even=even)
    shares = route.deal(formed, lengths, ranks, packed=packed)
    assert shares == plain_route.deal(formed, lengths, ranks, packed=packed)
    assert route.padding_share(lengths, shares) == plain_route.padding_share(lengths, shares)


@UNTIMED
@given(LENGTHS, st.integers(1, 150), st.integers(1, 7), st.booleans(), st.booleans(), st.data())
def test_routes(lengths, budget, ranks, packed, holds, data):
    n, lengths = len(lengths), long_tensor(lengths)
    holders = st.lists(st.integers(-1, ranks - 1), min_size=n, max_size=n)
    held_on = long_tensor(data.draw(holders)) if holds else None
    case = lengths, some_of(data, n), ranks
    expected = plain_route.route(*case, budget, packed=packed, held_on=held_on)
    assert route.route(*case, budget, packed=packed, held_on=held_on) == expected
    count = data.draw(st.integers(1, 9))
    assert route.route_evenly(*case, count, packed=packed) == plain_route.route_evenly(*case, count, packed=packed)


@pytest.mark.parametrize("packed", [False, True])
def test_many_ranks(packed):
    """Rounds in which hundreds of parts are filled, and many swaps."""
    drawn = torch.randn(1600, generator=generator(0, "test lengths"))
    lengths, every = (drawn * 0.6 + 5).exp().clamp(8, 2048).long(), torch.arange(1600)
    formed = route.form_micro_batches(lengths, every, 1024, packed=packed, even=True)
    assert formed == plain_route.form_micro_batches(lengths, every, 1024, packed=packed, even=True)
    expected = plain_route.route(lengths, every[::2], 200, 1024, packed=packed)
    assert route.route(lengths, every[::2], 200, 1024, packed=packed) == expected


@UNTIMED
@given(LENGTHS, st.integers(1, 150), st.integers(1, 7), st.booleans(), st.data())
def test_the_plan_of_a_sketch(lengths, budget, ranks, packed, data):
    n, lengths = len(lengths), long_tensor(lengths)
    sources = long_tensor(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    drawn = Candidates(1, torch.arange(n), torch.arange(n), sources, lengths)
    known = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    plan = plan_sketch(drawn, Quota(long_tensor([]), long_tensor([1, 0, 2])), ranks, budget, known, packed)
    most = data.draw(st.integers(0, 300))
    found, counts = held_inputs(plan, lengths, most)
    assert (found.tolist(), counts) == plain_route.held_inputs(plan, lengths, most)
    rows = [plain_route.rows_of(plan, rank) for rank in range(ranks)]
    assert [plan.rows_of(rank).tolist() for rank in range(ranks)] == rows
    assert plan.counts.tolist() == [len(of_rank) for of_rank in rows]
    assert plan.forwarded.nonzero().flatten().tolist() == sorted(chain(*rows))


def test_a_plan_of_nobody():
    plan = SketchPlan.of_nobody(3)
    assert plan.counts.tolist() == [0, 0, 0]
    assert plan.forwarded.tolist() == plan.rows_of(0, 1, 2).tolist() == []
    assert held_inputs(plan, long_tensor([5, 5]), 100)[0].tolist() == [-1, -1]


@given(st.lists(st.integers(-3, 3), max_size=12))
def test_the_last_of_each(values):
    expected = sorted({value: place for place, value in enumerate(values)}.values())
    assert last_of_each(long_tensor(values)).tolist() == expected
