"""One optimizer step: sample, sketch, gather, select, broadcast, learn, route, train, optimizer, report (DESIGN 2).

Data flows one way, in frozen records: `SelectionStage` chooses the coreset, `TrainingStage` trains on it, and
`Measurement` reports. Nothing here asks how many ranks there are or what shards the model.
"""

from __future__ import annotations

from functools import partial

from colm_scale.data.examples import Examples
from colm_scale.data.sampler import Sampler
from colm_scale.profiling.spans import Spans
from colm_scale.records import Candidates, StepReport
from colm_scale.step.checks import check_update
from colm_scale.step.floor import Work
from colm_scale.step.measure import Measurement, Trained
from colm_scale.step.select import SelectionStage
from colm_scale.step.source_refresh import Drift, SourceRefresh
from colm_scale.step.train import TrainingStage

PHASES = ("sample", "sketch", "gather", "select", "broadcast", "learn", "route", "train", "optimizer", "report")


class CoresetStep:
    """Makes the steps of a run. All ranks call it together, with the step's number (from 1) and learning rate."""

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
            TrainingError: On every rank: ranks disagree, no sketch is finite, a loss of the coreset is not (names step
                and ids), or the gradient is not. The weights have not changed.
        """
        spans = self._spans
        chosen = self.select(partial(self.draw, number))
        with spans("route"):
            routed = self.train.route(chosen)
        with spans("train"):
            losses = self.train(chosen, routed)
        with spans("optimizer"):
            update = self.train.engine.step(learning_rate)
            self.select.conclude(chosen, applied=update.applied)
        check_update(update, number)
        trained = Trained(routed, losses, update, learning_rate)
        report = self.measure(chosen, trained, self.select.facts(chosen))
        return report, Work(chosen.sketched.batches, routed.micro_batches)

    def draw(self, number: int) -> tuple[Candidates, Examples]:
        """The candidates of a step with their sources of now, and the examples that their indices refer to."""
        candidates = self.refresh.relabelled(self.sampler(number))
        return candidates, self.sampler.examples

    def refresh_sources(self, number: int) -> Drift | None:
        """Re-cluster the sources after step ``number`` if that is due, and go by them from then on."""
        return self.refresh(number, self.select.sources)
