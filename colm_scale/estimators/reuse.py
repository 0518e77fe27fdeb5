"""Sketches that serve for several steps: whoever was sketched a short while ago is not forwarded again."""

from __future__ import annotations

from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.estimators.estimators import Estimator
from colm_scale.records import Batch, CandidateMatrix, Candidates, Selection, SketchPlan
from colm_scale.selection.moments import Moments
from colm_scale.sketch.store import SketchStore


def reusing(estimator: Estimator, config: SelectionConfig, examples: int) -> Estimator:
    """The estimator, whose sketches count for ``config.reuse`` steps; itself if that is 0.

    Args:
        examples: How many there are, at most; more than that are never kept.
    """
    if not config.reuse:
        return estimator
    return Reusing(estimator, SketchStore(config.reuse, min(config.reuse * config.candidates, examples)))


class Reusing(Estimator):
    """Another estimator, whose numbers of a candidate count for some steps (``--selection.reuse``).

    What is stale is what the model was then. `ZerothOrder` makes rows of old coefficients with the moments of now. In
    `CountSketched`, whose rows are normalised before they are projected, the moments are stale too, and they learn only
    from rows that were picked in the step that made them. A sketch that failed is not kept: it is made anew.

    Args:
        inner: In fixed coordinates; numbers of different steps could not be compared otherwise.
    """

    store: SketchStore

    def __init__(self, inner: Estimator, store: SketchStore):
        assert inner.fixed_coordinates
        self.inner, self.store = inner, store

    @property
    def moments(self) -> Moments:
        return self.inner.moments

    @moments.setter
    def moments(self, moments: Moments) -> None:
        self.inner.moments = moments

    def known(self, candidates: Candidates) -> Tensor:
        self._candidates, self._places = candidates, self.store.find(candidates.ids, candidates.step)
        fresh, known = self._places >= 0, self.inner.known(candidates)
        return fresh if known is None else fresh | known

    def sketch(self, plan: SketchPlan, batches: list[Batch]) -> None:
        self._plan = plan
        self.inner.sketch(plan, batches)

    def exchange(self) -> Tensor:
        numbers, positions, step = self.inner.exchange(), self._plan.positions, self._candidates.step
        places = self._places[positions]
        reused = places >= 0
        self.facts = {"reused_share": float(reused.sum()) / max(1, len(reused)), "reused_age": 0.0}
        if reused.any():
            rows, made = self.store.at(places[reused])
            numbers[reused.to(numbers.device)] = rows.to(numbers.device)
            self.facts["reused_age"] = step - float(made.double().mean())
        new = self._plan.forwarded & numbers.isfinite().all(1).cpu()
        if new.any():
            ids = self._candidates.ids[positions[new]]
            self.store.keep(ids, ids.new_full(ids.shape, step), numbers[new.to(numbers.device)].cpu())
        return numbers

    def matrix(self, numbers: Tensor) -> CandidateMatrix:
        return self.inner.matrix(numbers)

    def learn(self, selection: Selection) -> None:
        self.inner.learn(selection)
