"""The estimators that compare one number as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.families import BLOCKS, PROBES, ROWS, adapted_model, batch_of, part_of, some_of

from colm_scale.config import SelectionConfig, TrainConfig
from colm_scale.distributed.group import Group
from colm_scale.estimators.make import make_estimator
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import Probe
from colm_scale.records import Candidates, Quota, long_tensor
from colm_scale.sketch.plan import plan_sketch
from colm_scale.sketch.tap import Tap

GROUP = Group(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
LENGTHS = [9, 5, 7, 12, 6]
LOSS = f"{Path(__file__).resolve().parents[3] / 'docs' / 'examples' / 'loss_estimator.py'}:loss"
QUOTA = Quota(kept=long_tensor([3]), per_source=long_tensor([1, 0]))
"""Of five candidates the last is of a source without a quota, and the fourth is kept."""


@pytest.fixture(scope="module")
def tap() -> Tap:
    return Tap(
        ExampleLoss(adapted_model("llama")), Probe(BLOCKS["llama"], PROBES["llama"], torch.tensor(ROWS["llama"]))
    )


def sketched(tap: Tap, estimator_name: str, broken: int | None = None):
    """The estimator, the plan of the candidates and the batches that it asks for, sketched; one example broken."""
    estimator = make_estimator(tap, SelectionConfig(estimator=estimator_name), TrainConfig(), GROUP)
    order = torch.arange(5)
    candidates = Candidates(1, order, order, long_tensor([0, 0, 0, 0, 1]), long_tensor(LENGTHS))
    plan = plan_sketch(candidates, QUOTA, 1, 24, estimator.known(candidates))
    whole = batch_of(LENGTHS)
    batches = [some_of(whole, positions) for positions in plan.shares[0]]
    if broken is not None:
        tap = estimator._tap = BrokenTap(tap, broken)
    estimator.sketch(plan, batches)
    return estimator, plan, batches


class BrokenTap:
    """A tap whose loss of one candidate is not finite."""

    def __init__(self, tap: Tap, position: int):
        self._tap, self._position = tap, position

    def bare_losses(self, batch):
        losses = self._tap.bare_losses(batch)
        return losses.masked_fill(batch.positions == self._position, torch.inf)


def test_losses_of_whom_something_is_decided(tap):
    estimator, plan, batches = sketched(tap, LOSS)
    assert sorted(p for batch in batches for p in batch.positions.tolist()) == [0, 1, 2]
    matrix = estimator.gather()
    assert matrix.positions.tolist() == plan.positions.tolist() == [0, 1, 2]
    alone = [float(tap.bare_losses(part_of(batch_of(LENGTHS), row))) for row in range(3)]
    assert matrix.rows.squeeze(1).tolist() == pytest.approx(alone, rel=1e-5)
    assert torch.equal(matrix.losses, matrix.rows[:, 0])
    assert matrix.valid.all()


def test_a_loss_that_is_not_finite_is_no_number_to_compare(tap):
    matrix = sketched(tap, LOSS, broken=1)[0].gather()
    assert matrix.valid.tolist() == [True, False, True]
    assert matrix.rows[1] == matrix.losses[1] == 0
    assert matrix.rows.isfinite().all()


def test_lengths_are_known_without_a_forward(tap):
    estimator, _plan, batches = sketched(tap, "length")
    assert not batches
    matrix = estimator.gather()
    assert matrix.positions.tolist() == [0, 1, 2]
    assert matrix.rows.tolist() == [[9.0], [5.0], [7.0]]
    assert matrix.valid.all()
    assert matrix.losses.isnan().all(), "nobody has measured them"


@pytest.mark.parametrize("name", [LOSS, "length"], ids=["loss", "length"])
def test_there_is_nothing_to_learn(tap, name):
    estimator, _plan, _batches = sketched(tap, name)
    estimator.gather()
    before = estimator.moments
    estimator.learn(None)
    assert estimator.moments == before
    assert before.tensors() == {}
    assert before.with_tensors({}, 3).step == 3
