"""A step before it is made: what is known of it without computing anything."""

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
    """A step that is to be made. Equal on every rank.

    Attributes:
        plan: Who will be sketched where; nobody if the method does not sketch.
        drawn: A coreset with the step's quotas, drawn at random where the step would rank.
        routed: Who would train it.
    """

    candidates: Candidates
    quota: Quota
    plan: SketchPlan
    drawn: Selection
    routed: Route


def preview(step: CoresetStep, number: int, batching: Batching, ranks: int) -> Preview:
    """Look at step ``number``; of what it changes, only the sampler goes on."""
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
