"""Sketch and gather: the numbers by which the candidates of a step are compared, where the method compares them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from colm_scale.data.batching import Batching
from colm_scale.data.examples import Examples
from colm_scale.distributed.group import Group
from colm_scale.estimators.estimators import Estimator, NoEstimator
from colm_scale.modeling.forward_reuse import BlockInputs
from colm_scale.profiling.spans import Spans
from colm_scale.records import Batch, CandidateMatrix, Candidates, Quota, Selection, SketchPlan
from colm_scale.sketch.plan import held_inputs, plan_sketch
from colm_scale.step.checks import check_sketches
from colm_scale.step.source_refresh import SourceRefresh


@dataclass(frozen=True, slots=True)
class Sketched:
    """What a step knows of its candidates before it selects. Equal on every rank but for ``batches``.

    Attributes:
        plan: Who was sketched where; nobody if the method does not sketch.
        matrix: The candidate matrix, with a row for each candidate of the plan.
        batches: The micro-batches that this rank has sketched.
        held_on: ``[n]`` the rank that holds a candidate's block inputs, -1 where none does.
    """

    plan: SketchPlan
    matrix: CandidateMatrix
    batches: list[Batch]
    held_on: Tensor


class SketchStage(Protocol):
    """Sketches the candidates of a step. All ranks call it together.

    Attributes:
        estimator: Finds the numbers, and remembers what it has learned from earlier steps.
    """

    estimator: Estimator

    def plan(self, candidates: Candidates, quota: Quota) -> SketchPlan:
        """Plan who is sketched where, without computing anything."""

    def __call__(self, candidates: Candidates, examples: Examples, quota: Quota) -> Sketched:
        """Sketch the candidates that have to be compared."""

    def learn(self, sketched: Sketched, selection: Selection, step: int) -> None:
        """Let the moments learn from what was selected.

        Raises:
            TrainingError: No sketch is finite.
        """

    def facts(self, sketched: Sketched, selection: Selection) -> dict[str, float]:
        """Numbers about the sketch for the step's report, by name."""


class NoSketchStage(SketchStage):
    """Sketches nobody, for a method that does not compare candidates."""

    def __init__(self, ranks: int):
        self.estimator = NoEstimator()
        self._nobody = SketchPlan.of_nobody(ranks)

    def plan(self, candidates: Candidates, quota: Quota) -> SketchPlan:
        return self._nobody

    def __call__(self, candidates: Candidates, examples: Examples, quota: Quota) -> Sketched:
        held_on = torch.full_like(candidates.lengths, -1)
        return Sketched(self._nobody, CandidateMatrix.without_rows(), [], held_on)

    def learn(self, sketched: Sketched, selection: Selection, step: int) -> None:
        """There is nothing to learn from."""

    def facts(self, sketched: Sketched, selection: Selection) -> dict[str, float]:
        return {}


class EstimatorStage(SketchStage):
    """Runs an estimator on the candidates that have to be compared.

    Args:
        inputs: Holds what goes into the blocks, for training to start from.
        refresh: Sees the hidden states of the forwards.
    """

    def __init__(
        self,
        estimator: Estimator,
        batching: Batching,
        inputs: BlockInputs,
        refresh: SourceRefresh,
        group: Group,
        spans: Spans,
    ):
        self.estimator = estimator
        self._batching, self._inputs, self._refresh = batching, inputs, refresh
        self._group, self._spans = group, spans

    def plan(self, candidates: Candidates, quota: Quota) -> SketchPlan:
        batching, known = self._batching, self.estimator.known(candidates)
        return plan_sketch(candidates, quota, self._group.world_size, batching.token_budget, known, batching.packed)

    def __call__(self, candidates: Candidates, examples: Examples, quota: Quota) -> Sketched:
        rank = self._group.rank
        with self._spans("sketch"):
            plan = self.plan(candidates, quota)
            batches = self._batching.share(examples, candidates, plan.shares[rank])
            held_on, counts = held_inputs(plan, candidates.lengths, self._inputs.most_tokens)
            with self._inputs.holding(counts[rank]), self._refresh.watching():
                self.estimator.sketch(plan, batches)
        with self._spans("gather"):
            matrix = self.estimator.gather()
        return Sketched(plan, matrix, batches, held_on)

    def learn(self, sketched: Sketched, selection: Selection, step: int) -> None:
        check_sketches(sketched.plan, selection, step)
        with self._spans("learn"):
            self.estimator.learn(selection)

    def facts(self, sketched: Sketched, selection: Selection) -> dict[str, float]:
        facts = dict(self.estimator.facts)
        if self._inputs.most_tokens:
            facts["forward_reused_share"] = float((sketched.held_on[selection.positions] >= 0).double().mean())
        return facts
