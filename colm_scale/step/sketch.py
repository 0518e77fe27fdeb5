"""Sketch and gather: compute the candidate matrix of a step, if the method compares candidates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from colm_scale.data.batching import Batching
from colm_scale.data.examples import Examples
from colm_scale.distributed.group import Group
from colm_scale.errors import TrainingError
from colm_scale.estimators.base import Estimator
from colm_scale.modeling.forward_reuse import BlockInputs
from colm_scale.profiling.spans import Spans
from colm_scale.records import Batch, CandidateMatrix, Candidates, Quota, Selection, SketchPlan
from colm_scale.sketch.plan import held_inputs, plan_sketch
from colm_scale.step.source_refresh import SourceRefresh


@dataclass(frozen=True, slots=True)
class Sketched:
    """The sketch of a step. Equal on every rank except for ``batches``.

    Attributes:
        plan: The candidates that were compared, and where they were sketched; empty if the method does not sketch.
        matrix: The candidate matrix, one row per candidate of the plan.
        batches: The micro-batches that this rank has sketched.
        held_on: ``[n]`` the rank that holds a candidate's block inputs, or -1.
    """

    plan: SketchPlan
    matrix: CandidateMatrix
    batches: list[Batch]
    held_on: Tensor


class SketchStage:
    """The sketch of a step. The base class sketches nothing, for a method that does not compare candidates.

    All ranks call it together.

    Attributes:
        estimator: Computes the candidate matrix, with moments from earlier steps.
    """

    def __init__(self, ranks: int):
        self.estimator = Estimator()
        self._empty = SketchPlan.of_nobody(ranks)

    def plan(self, candidates: Candidates, quota: Quota) -> SketchPlan:
        """Plan the sketch without computing it."""
        return self._empty

    def __call__(self, candidates: Candidates, examples: Examples, quota: Quota) -> Sketched:
        """Sketch the candidates that have to be compared."""
        held_on = torch.full_like(candidates.lengths, -1)
        return Sketched(self._empty, CandidateMatrix.without_rows(), [], held_on)

    def learn(self, sketched: Sketched, selection: Selection, step: int) -> None:
        """Update the moments from the selection.

        Raises:
            TrainingError: No sketch is finite.
        """

    def facts(self, sketched: Sketched, selection: Selection) -> dict[str, float]:
        """Numbers about the sketch for the step's report, by name."""
        return {}


class EstimatorStage(SketchStage):
    """Runs an estimator on the candidates that have to be compared.

    Args:
        inputs: Holds the block inputs for forward reuse.
        refresh: Records the hidden states for re-clustering.
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
            batches = self._batching.share(examples, candidates, plan.shares, rank)
            held_on, counts = held_inputs(plan, candidates.lengths, self._inputs.most_tokens, self._inputs.tokens_of)
            with self._inputs.holding(counts[rank]), self._refresh.watching():
                self.estimator.sketch(plan, batches)
        with self._spans("gather"):
            matrix = self.estimator.gather()
        return Sketched(plan, matrix, batches, held_on)

    def learn(self, sketched: Sketched, selection: Selection, step: int) -> None:
        _check_sketches(len(sketched.plan.positions), selection, step)
        with self._spans("learn"):
            self.estimator.learn(selection)

    def facts(self, sketched: Sketched, selection: Selection) -> dict[str, float]:
        facts = dict(self.estimator.facts)
        if self._inputs.most_tokens:
            facts["forward_reused_share"] = float((sketched.held_on[selection.positions] >= 0).double().mean())
        return facts


def _check_sketches(sketched: int, selection: Selection, step: int) -> None:
    """Refuse a step without a finite sketch. Single bad examples are left out of the selection and counted."""
    if selection.invalid == sketched and (sketched > 1 or not len(selection)):
        raise TrainingError(
            f"step {step}: none of the {sketched} sketched candidates has a finite sketch; the adapter was not changed "
            f"by this step. Try --train.dtype float32, or --selection.method stratified, which needs no sketch"
        )
