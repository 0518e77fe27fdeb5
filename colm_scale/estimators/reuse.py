"""Sketch reuse: a candidate sketched a few steps ago is not forwarded again."""

from __future__ import annotations

from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.estimators.base import Estimator
from colm_scale.records import Batch, CandidateMatrix, Candidates, Selection, SketchPlan, on_device
from colm_scale.selection.moments import Moments
from colm_scale.sketch.store import SketchStore


def reusing(estimator: Estimator, config: SelectionConfig, examples: int) -> Estimator:
    """Wrap an estimator so that its sketches stay valid for ``config.reuse`` steps; with 0, return it as it is.

    Args:
        examples: Upper bound of the number of training examples.
    """
    if not config.reuse:
        return estimator
    return Reusing(estimator, SketchStore(config.reuse, min(config.reuse * config.candidates, examples)))


class Reusing(Estimator):
    """Reuses another estimator's numbers of a candidate for some steps (``--selection.reuse``).

    Reused numbers describe the model of an earlier step. `ZerothOrder` turns old coefficients into rows with the
    current moments. `CountSketched` normalises before it projects, so its reused rows have old moments as well, and its
    moments learn only from rows picked in the step that made them. A failed sketch is not stored: it is repeated.

    Args:
        inner: In fixed coordinates, so that numbers from different steps can be compared.
    """

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
        return (self._places >= 0) | self.inner.known(candidates)

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
            numbers[on_device(reused.nonzero().flatten(), numbers.device)] = on_device(rows, numbers.device)
            self.facts["reused_age"] = step - float(made.double().mean())
        on_host = numbers.cpu()
        new = self._plan.forwarded & on_host.isfinite().all(1)
        if new.any():
            ids = self._candidates.ids[positions[new]]
            self.store.add(ids, ids.new_full(ids.shape, step), on_host[new])
        return numbers

    def matrix(self, numbers: Tensor) -> CandidateMatrix:
        return self.inner.matrix(numbers)

    def learn(self, selection: Selection) -> None:
        self.inner.learn(selection)
