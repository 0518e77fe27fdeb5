"""The evaluations of a run and the adapters that it keeps. Rank 0 writes, all ranks take part."""

from __future__ import annotations

from dataclasses import asdict

from colm_scale.distributed.group import Group
from colm_scale.engines.base import Engine, collect
from colm_scale.records import Json
from colm_scale.reporting.summary import Evaluation
from colm_scale.run.evaluate import HeldOutEvaluator, NoEvaluator
from colm_scale.run.reports import Reports


class Session:
    """A run that is under way. Use it as a context, so that the terminal is restored whatever happens.

    Attributes:
        reports: Where steps and evaluations are written and shown.
    """

    def __init__(self, engine: Engine, evaluator: HeldOutEvaluator | NoEvaluator, reports: Reports, group: Group):
        self.reports = reports
        self._engine, self._evaluator, self._group = engine, evaluator, group
        self._best: Evaluation | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self.reports.close(failed=error is not None)

    def state(self) -> Json:
        """What has been counted and evaluated so far, as plain JSON; the counts on the first rank."""
        return {"best": None if self._best is None else asdict(self._best), "summary": self.reports.state()}

    def load(self, state: Json) -> None:
        """Go on from what `state` returned on the first rank."""
        self._best = None if state["best"] is None else Evaluation.of(state["best"])
        self.reports.load(state["summary"])

    def evaluate(self, step: int, *, whole: bool) -> None:
        """Evaluate on all ranks; after the first step, keep the adapter if none before was better.

        The better of two adapters has the lower mean over sources on the examples that every evaluation scores, also
        where one of the evaluations is ``whole``. Both losses are then of the same examples, and how hard those happen
        to be cancels out; the mean of all examples beside that of a few would mostly tell which examples are harder.
        """
        if not self._evaluator.evaluates:
            return
        evaluation = self._evaluator(self._engine.module, step, whole=whole)
        self.reports.evaluation(evaluation)
        if step and self._is_best(evaluation):
            self._best = evaluation
            self._save("adapter")

    def finish(self, steps: int) -> None:
        """Save the last adapter, as ``adapter`` unless an evaluation found a better one, and show the tables."""
        best_is_last = self._best is None or self._best.step == steps
        if self._best is None:
            self._save("adapter")
        elif not best_is_last:
            self._save("adapter_last")
        self.reports.finish(best_is_last=best_is_last)

    def _is_best(self, evaluation: Evaluation) -> bool:
        """Whether it is the best so far; the first on other examples is, as after a resume with another sample."""
        if self._best is None or self._best.sample.counts != evaluation.sample.counts:
            return True
        return evaluation.sample.loss_by_source < self._best.sample.loss_by_source

    def _save(self, name: str) -> None:
        weights = collect(self._engine, keep=self._group.is_first)["adapter"]
        self.reports.adapter(name, self._engine.module, weights)
        self._group.barrier()
