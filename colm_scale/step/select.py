"""The first half of a step, from sample to learn: choose the coreset (docs/method.md).

Runs and the trainers of other libraries share this code, so they select the same examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from colm_scale.data.examples import Examples
from colm_scale.distributed.exchange import share_selection
from colm_scale.distributed.group import Group
from colm_scale.profiling.spans import Spans
from colm_scale.records import Candidates, Quota, Selection
from colm_scale.selection.moments import Moments
from colm_scale.selection.rule import SelectionRule
from colm_scale.step.sketch import Sketched, SketchStage
from colm_scale.step.source_state import SourceState

Draw = Callable[[], tuple[Candidates, Examples]]
"""Returns the candidates of a step, equal on every rank, and the examples their indices refer to."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A coreset and everything it was chosen from.

    Attributes:
        examples: The examples that the candidates' indices refer to.
        rule: The selection method, with this step's kept sources, shares and budget.
        moments: The estimator's, before they learned from the selection.
    """

    candidates: Candidates
    examples: Examples
    rule: SelectionRule
    quota: Quota
    sketched: Sketched
    selection: Selection
    moments: Moments


class SelectionStage:
    """Chooses the coreset of each step. All ranks call it together.

    Attributes:
        sketch: Computes the candidate matrix; does nothing for a method that does not compare candidates.
        sources: Kept sources, shares, coverage and error feedback for the next step.
    """

    def __init__(self, rule: SelectionRule, sketch: SketchStage, sources: SourceState, group: Group, spans: Spans):
        self.sketch, self.sources = sketch, sources
        self._rule, self._group, self._spans = rule, group, spans

    def __call__(self, draw: Draw) -> Chosen:
        """Choose among the candidates that ``draw`` returns.

        Raises:
            TrainingError: On every rank: the ranks disagree, or no sketch is finite.
        """
        spans = self._spans
        self._group.take_traffic()  # exchanges between steps do not count
        with spans("sample"):
            candidates, examples = draw()
            rule = self.rule(candidates)
            quota = rule.quota(candidates, self.sources.coverage)
        sketched = self.sketch(candidates, examples, quota)
        with spans("select"):
            feedback = self.sources.feedback
            selection = rule.select(candidates, quota, sketched.matrix, feedback) if self._group.is_first else None
        with spans("broadcast"):
            selection = share_selection(selection, rule.most_selected, candidates, self._group)
        moments = self.sketch.estimator.moments
        self.sketch.learn(sketched, selection, candidates.step)
        return Chosen(candidates, examples, rule, quota, sketched, selection, moments)

    def rule(self, candidates: Candidates) -> SelectionRule:
        """The selection method with the current kept sources and shares, and a budget for these candidates."""
        return self._rule.now(len(candidates), self.sources.kept, self.sources.shares)

    def conclude(self, chosen: Chosen, *, applied: bool) -> None:
        """Account for the training of the coreset; ``applied`` unless the step changed no weight.

        The optimizer has then learned nothing, and neither do the moments, which stand for its averages.
        """
        if not applied:
            self.sketch.estimator.moments = chosen.moments
        if self.sources.after(chosen.candidates, chosen.selection, chosen.sketched.matrix, applied=applied):
            self.sketch.estimator.restart_moments()

    def facts(self, chosen: Chosen) -> dict[str, float]:
        """Numbers about the selection for the step's report, by name."""
        return self.sketch.facts(chosen.sketched, chosen.selection) | self.sources.facts
