"""Who is forwarded again, and what stands for the others; the tests of many ranks do the same with real sketches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.distributed.group import Group
from colm_scale.errors import UserError
from colm_scale.estimators.base import Estimator
from colm_scale.estimators.measured import Length
from colm_scale.estimators.reuse import Reusing, reusing
from colm_scale.records import Batch, CandidateMatrix, Candidates, Quota, SketchPlan, long_tensor
from colm_scale.sketch.plan import plan_sketch

WORLD_SIZE = 2


class Telling(Estimator):
    """Finds out, about whoever is forwarded, its id and the step; never anything finite about the ids ``failing``."""

    fixed_coordinates = True

    def __init__(self, *failing: int):
        self.failing = failing
        self.forwarded: list[list[int]] = []

    def known(self, candidates: Candidates) -> Tensor:
        self._candidates = candidates
        return super().known(candidates)

    def sketch(self, plan: SketchPlan, batches: list[Batch]) -> None:
        self._plan = plan
        self.forwarded.append(self._ids[plan.forwarded].tolist())

    def exchange(self) -> Tensor:
        numbers = torch.stack([self._ids, torch.full_like(self._ids, self._candidates.step)], dim=1).float()
        numbers[[id_ in self.failing for id_ in self._ids.tolist()]] = torch.nan
        return torch.where(self._plan.forwarded.unsqueeze(1), numbers, 0.0)

    def matrix(self, numbers: Tensor) -> CandidateMatrix:
        valid = numbers.isfinite().all(1)
        return CandidateMatrix(self._plan.positions, numbers, valid, numbers[:, 0])

    @property
    def _ids(self) -> Tensor:
        return self._candidates.ids[self._plan.positions]


def step_of(estimator: Estimator, step: int, ids: list[int], kept: tuple[int, ...] = ()) -> tuple[SketchPlan, Tensor]:
    """The plan and the rows of a step with these candidates, of one source, of which those at ``kept`` are kept."""
    count = len(ids)
    candidates = Candidates(step, torch.arange(count), long_tensor(ids), torch.zeros(count).long(), torch.arange(count))
    quota = Quota(long_tensor(kept), long_tensor([1]))
    plan = plan_sketch(candidates, quota, WORLD_SIZE, 8, estimator.known(candidates))
    estimator.sketch(plan, [])
    return plan, estimator.gather().rows


def reused(*failing: int, reuse: int = 2) -> Reusing:
    return reusing(Telling(*failing), SelectionConfig(reuse=reuse, estimator="length"), examples=100)


def test_only_those_without_a_fresh_sketch_are_forwarded():
    estimator = reused()
    plan, rows = step_of(estimator, 1, [70, 80, 90])
    assert rows.tolist() == [[70, 1], [80, 1], [90, 1]]
    assert estimator.facts == {"reused_share": 0.0, "reused_age": 0.0}
    plan, rows = step_of(estimator, 2, [80, 60, 70, 50])
    assert rows.tolist() == [[80, 1], [60, 2], [70, 1], [50, 2]]
    assert plan.positions.tolist() == [0, 1, 2, 3]
    assert sorted(position for share in plan.shares for batch in share for position in batch) == [1, 3]
    assert estimator.facts == {"reused_share": 0.5, "reused_age": 1.0}
    _, rows = step_of(estimator, 3, [60, 80])
    assert rows.tolist() == [[60, 2], [80, 1]]
    assert estimator.facts == {"reused_share": 1.0, "reused_age": 1.5}
    _, rows = step_of(estimator, 4, [60, 80])
    assert rows.tolist() == [[60, 2], [80, 4]], "80 was made three steps ago"
    assert estimator.inner.forwarded == [[70, 80, 90], [60, 50], [], [80]]


def test_a_step_in_which_all_are_fresh_forwards_nothing():
    estimator = reused()
    step_of(estimator, 1, [70, 80])
    plan, _ = step_of(estimator, 2, [80, 70])
    assert plan.shares == ((), ())
    assert plan.counts.tolist() == [0, 0]
    assert plan.positions.tolist() == [0, 1]


def test_a_kept_candidate_is_neither_sketched_nor_remembered():
    estimator = reused()
    _, rows = step_of(estimator, 1, [70, 80, 90], kept=(1,))
    assert rows.tolist() == [[70, 1], [90, 1]]
    _, rows = step_of(estimator, 2, [90, 80, 70], kept=(0,))
    assert rows.tolist() == [[80, 2], [70, 1]]
    assert estimator.facts == {"reused_share": 0.5, "reused_age": 1.0}


def test_a_sketch_that_failed_is_made_anew():
    estimator = reused(80)
    _, rows = step_of(estimator, 1, [70, 80])
    assert rows.isnan().any(1).tolist() == [False, True]
    estimator.inner.failing = ()
    _, rows = step_of(estimator, 2, [70, 80])
    assert rows.tolist() == [[70, 1], [80, 2]]


def test_an_example_that_is_twice_a_candidate_is_known_twice():
    estimator = reused()
    _, rows = step_of(estimator, 1, [70, 70, 80])
    assert rows.tolist() == [[70, 1], [70, 1], [80, 1]]
    _, rows = step_of(estimator, 2, [80, 70, 70])
    assert rows.tolist() == [[80, 1], [70, 1], [70, 1]]
    assert estimator.inner.forwarded == [[70, 70, 80], []]


def test_no_more_is_held_than_there_are_examples_or_steps_can_use():
    store = reusing(Telling(), SelectionConfig(reuse=1000, estimator="length"), examples=3).store
    assert len(store._ids) == 3
    store = reusing(Telling(), SelectionConfig(reuse=2, estimator="length", candidates=40), examples=1000).store
    assert len(store._ids) == 80


def test_without_reuse_an_estimator_is_itself():
    inner = Telling()
    assert reusing(inner, SelectionConfig(), examples=3) is inner


def test_lengths_need_no_store():
    group = Group(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
    estimator = reusing(Length(group), SelectionConfig(reuse=2, estimator="length"), examples=3)
    for step in (1, 2):
        _, rows = step_of(estimator, step, [70, 80, 90])
        assert rows.tolist() == [[0], [1], [2]]
        assert estimator.facts["reused_share"] == 0.0


def test_columns_that_differ_from_step_to_step_are_refused_with_the_way_out():
    with pytest.raises(UserError, match=r"--selection\.reuse 3 .*--selection\.compression columns .*: leave one out"):
        SelectionConfig(reuse=3, compression="columns")
    SelectionConfig(reuse=3)
    SelectionConfig(reuse=3, estimator="zeroth_order")
    SelectionConfig(reuse=3, preset="paper")  # whose estimator is another, and which does not reuse
    assert SelectionConfig(reuse=3, preset="paper").resolved().reuse == 0
