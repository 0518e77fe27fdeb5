from __future__ import annotations

from itertools import chain

import torch

from colm_scale.records import Candidates, Quota, SketchPlan, long_tensor
from colm_scale.sketch.plan import held_inputs, plan_sketch

# Position:              0  1  2  3  4  5  6  7  8  9
SOURCES = long_tensor([2, 0, 1, 2, 1, 0, 3, 1, 1, 3])
KEPT = long_tensor([1, 5])  # source 0


def plan(per_source: list[int], **options) -> SketchPlan:
    number = torch.arange(len(SOURCES))
    drawn = Candidates(1, number, number, SOURCES, 8 + number)
    return plan_sketch(drawn, Quota(KEPT, long_tensor(per_source)), 2, 40, **options)


def forwarded(of: SketchPlan) -> list[int]:
    return sorted(chain(*chain(*of.shares)))


def test_each_ranked_source_is_a_group_and_a_source_that_enters_whole_is_in_none():
    found = plan([0, 2, 2, 1])  # all of source 2
    assert found.positions.tolist() == forwarded(found) == [0, 2, 3, 4, 6, 7, 8, 9]
    assert found.groups.tolist() == [-1, 0, -1, 0, 1, 0, 0, 1]
    assert found.num_groups == 2


def test_a_source_without_a_quota_is_not_sketched():
    found = plan([0, 2, 0, 2])
    assert found.positions.tolist() == forwarded(found) == [2, 4, 6, 7, 8, 9]
    assert found.groups.tolist() == [0, 0, -1, 0, 0, -1]


def test_what_enters_anyway_needs_no_group():
    found = plan([0, 4, 2, 2])
    assert found.groups.tolist() == [-1] * 8
    assert found.num_groups == 0
    assert len(plan([0, 0, 0, 0]).positions) == 0


def test_what_is_known_is_ranked_but_not_forwarded():
    known = torch.zeros(len(SOURCES), dtype=torch.bool)
    known[[1, 4, 6]] = True
    found = plan([0, 2, 2, 1], known=known)
    assert forwarded(found) == [0, 2, 3, 7, 8, 9]
    assert found.groups.tolist() == plan([0, 2, 2, 1]).groups.tolist()


def test_inputs_are_held_as_far_as_their_blocks_fit():
    found = plan([0, 2, 2, 1])  # one rank has two micro-batches of 20 and 26 tokens, the other of 34 and 32
    lengths = 8 + torch.arange(len(SOURCES))
    tokens = [[len(members) * int(lengths[list(members)].max()) for members in share] for share in found.shares]
    most = max(of_rank[0] for of_rank in tokens)
    assert held_inputs(found, lengths, most)[1] == [1, 1]
    assert held_inputs(found, lengths, most, lambda tokens: 2 * tokens)[1] == [0, 0]
