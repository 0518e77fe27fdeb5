"""The evaluations of a run, and the adapters that it saves."""

from __future__ import annotations

from dataclasses import asdict

from colm_scale.distributed.group import Group
from colm_scale.engines.base import Engine
from colm_scale.engines.tensors import collect, landing
from colm_scale.records import Json
from colm_scale.reporting.summary import Evaluation
from colm_scale.run.evaluate import Evaluator
from colm_scale.run.reports import Reports


class Session:
    """A run in progress. Use it as a context, so that the terminal is always restored.

    Attributes:
        reports: Receives steps and evaluations.
        owed: Whether an evaluation is due: the one before the first step, or one that a stopped run has put off.
    """

    def __init__(self, engine: Engine, evaluator: Evaluator, reports: Reports, group: Group):
        self.reports = reports
        self.owed = True
        self._engine, self._evaluator, self._group = engine, evaluator, group
        self._best: Evaluation | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self.reports.close(failed=error is not None)

    def state(self) -> Json:
        """Return the counts (on rank 0) and the best evaluation so far, as plain JSON."""
        best = asdict(self._best) if self._best else None
        return {"best": best, "owed": self.owed, "summary": self.reports.state()}

    def load(self, state: Json) -> None:
        """Resume from rank 0's `state`."""
        self._best = Evaluation.of(state["best"]) if state["best"] else None
        self.owed = state.get("owed", False)  # older runs evaluated before they saved
        self.reports.load(state["summary"])

    def evaluate(self, step: int, *, whole: bool) -> None:
        """Evaluate on all ranks; after the first step, save the adapter if it is the best so far.

        Adapters are compared by the mean loss over sources on the sample that every evaluation scores, even if one of
        the evaluations is ``whole``: the mean of other examples would mostly reflect how hard those are.
        """
        self.owed = False
        if not self._evaluator.evaluates:
            return
        evaluation = self._evaluator(self._engine.module, step, whole=whole)
        self.reports.evaluation(evaluation)
        if step and self._is_best(evaluation):
            self._best = evaluation
            self._save("adapter")

    def finish(self, steps: int) -> None:
        """Save the last adapter, as ``adapter_last`` if an evaluation found a better one, and show the tables."""
        best_step = self._best.step if self._best else 0
        if not best_step:
            self._save("adapter")
        elif best_step != steps:
            self._save("adapter_last")
        self.reports.finish(best_is_last=best_step in (0, steps))

    def _is_best(self, evaluation: Evaluation) -> bool:
        """Return whether it is the best so far. The first on another sample is, for example after a resume."""
        if self._best is None or self._best.sample.counts != evaluation.sample.counts:
            return True
        return evaluation.sample.loss_by_source < self._best.sample.loss_by_source

    def _save(self, name: str) -> None:
        weights = collect(self._engine, self._group)["adapter"]
        landing(self._group.device)()
        self.reports.adapter(name, self._engine.module, weights)
        self._group.barrier()
