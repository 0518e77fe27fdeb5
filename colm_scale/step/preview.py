"""A preview of a step for ``--dry-run``: its candidates, quotas, plan and routing, without a forward."""

from __future__ import annotations

from dataclasses import dataclass

from colm_scale.data.batching import Batching
from colm_scale.randomness import generator
from colm_scale.records import CandidateMatrix, Candidates, Quota, Route, Selection, SketchPlan
from colm_scale.selection.route import route
from colm_scale.selection.select import stratified
from colm_scale.step.step import CoresetStep


@dataclass(frozen=True, slots=True)
class Preview:
    """A step that has not been computed. Equal on every rank.

    Attributes:
        plan: The sketch; empty if the method does not sketch.
        drawn: A random coreset with the step's quotas if the step would rank; else the step's own.
        routed: The route of ``drawn``.
    """

    candidates: Candidates
    quota: Quota
    plan: SketchPlan
    drawn: Selection
    routed: Route


def preview(step: CoresetStep, number: int, batching: Batching, ranks: int) -> Preview:
    """Preview step ``number``. Only the sampler advances."""
    candidates, _ = step.draw(number)
    rule = step.select.rule(candidates)
    quota = rule.quota(candidates, step.select.sources.coverage)
    plan = step.select.sketch.plan(candidates, quota)
    if rule.sketches:
        drawn = stratified(candidates.sources, quota, generator(rule.seed, "preview", number))
    else:
        drawn = rule.select(candidates, quota, CandidateMatrix.without_rows())
    routed = route(candidates.lengths, drawn.positions, ranks, batching.token_budget, packed=batching.packed)
    return Preview(candidates, quota, plan, drawn, routed)
