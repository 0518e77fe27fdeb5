"""One optimizer step: sample, sketch, gather, select, broadcast, learn, route, train, report, optimizer.

Data flows one way, in frozen records: `SelectionStage` chooses the coreset, `TrainingStage` trains on it, and
`Measurement` reports. Nothing here depends on the number of ranks or on how the model is sharded.
"""

from __future__ import annotations

from functools import partial

from colm_scale.data.examples import Examples
from colm_scale.data.sampler import Sampler
from colm_scale.profiling.spans import Spans
from colm_scale.records import Candidates, StepReport
from colm_scale.step.floor import Work
from colm_scale.step.measure import Measurement
from colm_scale.step.select import SelectionStage
from colm_scale.step.source_refresh import Drift, SourceRefresh
from colm_scale.step.train import Trained, TrainingStage, check_update

PHASES = ("sample", "sketch", "gather", "select", "broadcast", "learn", "route", "train", "report", "optimizer")


class CoresetStep:
    """Trains one step per call. All ranks call it together, with the step's number (from 1) and learning rate."""

    def __init__(
        self,
        sampler: Sampler,
        refresh: SourceRefresh,
        select: SelectionStage,
        train: TrainingStage,
        measure: Measurement,
        spans: Spans,
    ):
        self.sampler, self.refresh, self.select, self.train, self.measure = sampler, refresh, select, train, measure
        self._spans = spans

    def __call__(self, number: int, learning_rate: float) -> tuple[StepReport, Work]:
        """Train one step.

        Raises:
            TrainingError: On every rank, with the weights unchanged: the ranks disagree; no sketch is finite; a loss of
                the coreset is not finite (names step and ids); or the gradient is not finite.
        """
        spans = self._spans
        chosen = self.select(partial(self.draw, number))
        with spans("route"):
            routed = self.train.route(chosen)
        with spans("train"):
            computing = self.train(chosen, routed)
        with spans("report"):
            described = self.measure.describe(chosen)  # while the device trains
        with spans("optimizer"):
            losses, gradients = self.train.finish(chosen, computing)
            update = self.train.engine.step(learning_rate)
            self.select.conclude(chosen, applied=update.applied)
        check_update(update, number)
        reduced_bytes = self.train.engine.reduced_bytes(len(routed.micro_batches))
        trained = Trained(routed, losses, update, learning_rate, reduced_bytes, gradients)
        report = self.measure(chosen, trained, described, self.select.facts(chosen))
        return report, Work(chosen.sketched.batches, routed.micro_batches)

    def draw(self, number: int) -> tuple[Candidates, Examples]:
        """Draw the candidates of a step, with their current sources, and the examples their indices refer to."""
        candidates = self.refresh.relabelled(self.sampler(number))
        return candidates, self.sampler.examples

    def refresh_sources(self, number: int) -> Drift | None:
        """Re-cluster the sources after step ``number`` if due, and use them from the next step on."""
        return self.refresh(number, self.select.sources)
