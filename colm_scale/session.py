"""What a run leaves behind and shows: run directory, display, best adapter. Rank 0 writes, all ranks take part."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from colm_scale.config import RunConfig
from colm_scale.distributed.engine import Engine, collect
from colm_scale.distributed.follow import Drift
from colm_scale.distributed.group import Group
from colm_scale.errors import TrainingError
from colm_scale.evaluate import Evaluator
from colm_scale.inputs import Inputs
from colm_scale.profiling.memory import MemoryMeter
from colm_scale.records import Json, StepReport
from colm_scale.reporting.display import Display
from colm_scale.reporting.facts import drift_line
from colm_scale.reporting.run_directory import RunDirectory, writing
from colm_scale.reporting.summary import Evaluation, RunSummary
from colm_scale.reporting.trackers import Trackers


class Session:
    """Reports of one run. Use it as a context, so that the terminal is restored whatever happens.

    Args:
        directory: Where the run is written, already created; None on every rank but the first.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory | None,
        inputs: Inputs,
        small: Tensor,
        engine: Engine,
        evaluator: Evaluator | None,
        group: Group,
        meter: MemoryMeter,
    ):
        self._config, self._directory, self._engine = config, directory, engine
        self._evaluator, self._group, self._names = evaluator, group, inputs.source_names
        self._best: Evaluation | None = None
        if directory is not None:
            self._display = Display(config.profile.display, meter.label, directory.log)
            self._trackers = Trackers(config, directory.path, self._display.message)
            self._summary = RunSummary(
                inputs.source_names, inputs.sizes, small, meter.label, inputs.sampler.dropped, inputs.sampler.cut
            )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._directory is not None:
            self._display.close()
            self._trackers.close()
            # What has ended the run is told, not what follows from it: the same disk is full.
            with nullcontext() if error is None else suppress(TrainingError):
                self.flush()

    def flush(self) -> None:
        """Write what is held; before a checkpoint, so that none is of a later step than what is written."""
        if self._directory is not None:
            self._directory.flush()

    def start(self, steps: int, facts: Sequence[str], done: int = 0) -> None:
        """Say what is about to run, ``done`` steps of it before."""
        if self._directory is not None:
            for fact in facts:
                self._display.message(fact)
            self._trackers.start(done)
            self._display.start(steps, done)

    def state(self) -> Json:
        """What has been counted and evaluated so far, as plain JSON; the counts on the first rank."""
        return {
            "best": None if self._best is None else asdict(self._best),
            "summary": None if self._directory is None else self._summary.state(),
        }

    def load(self, state: Json) -> None:
        """Go on from what `state` returned on the first rank."""
        self._best = None if state["best"] is None else Evaluation.of(state["best"])
        if self._directory is not None:
            self._summary.load(state["summary"])

    def step(self, report: StepReport) -> None:
        """Write and show a step."""
        if self._directory is not None:
            self._directory.report(report, self._names)
            self._summary.report(report)
            self._display.step(report)
            self._trackers.step(report)

    def drifted(self, drift: Drift | None) -> None:
        """Write and show what was found when sources were found anew, if they were."""
        if self._directory is not None and drift is not None:
            self._directory.drift(drift)
            self._display.message(drift_line(drift))

    def evaluate(self, step: int, *, whole: bool) -> None:
        """Evaluate on all ranks; after the first step, keep the adapter if none before was better.

        The better of two adapters has the lower mean over sources on the examples that every evaluation scores, also
        where one of the evaluations is ``whole``. Both losses are then of the same examples, and how hard those happen
        to be cancels out; the mean of all examples beside that of a few would mostly tell which examples are harder.
        """
        if self._evaluator is None:
            return
        evaluation = self._evaluator(self._engine.module, step, whole=whole)
        if self._directory is not None:
            self._directory.evaluation(evaluation)
            self._summary.evaluation(evaluation)
            self._display.evaluation(evaluation)
            self._trackers.evaluation(evaluation)
        if step and self._is_best(evaluation):
            self._best = evaluation
            self._save("adapter")

    def _is_best(self, evaluation: Evaluation) -> bool:
        """Whether it is the best so far; the first on other examples is, as after a resume with another sample."""
        if self._best is None or self._best.sample.counts != evaluation.sample.counts:
            return True
        return evaluation.sample.loss_by_source < self._best.sample.loss_by_source

    def saved(self, step: int, seconds: float) -> None:
        """Say that a checkpoint was written."""
        if self._directory is not None:
            files = (self._directory.checkpoints / f"step-{step:08d}").iterdir()
            size = sum(file.stat().st_size for file in files)
            self._display.message(f"checkpoint of step {step}: {size / 1e6:,.1f} MB in {seconds:.2f} s")

    def stopped(self, step: int) -> None:
        """Say that the run was told to stop, and how it goes on."""
        if self._directory is not None:
            self._display.close()
            way_on = f"go on with --resume auto --output_dir {self._directory.path}"
            saved = way_on if self._config.checkpoint.every else "nothing was saved, for --checkpoint.every is 0"
            self._display.message(f"stopped after step {step}, as told: {saved}")

    def finish(self, steps: int) -> None:
        """Save the last adapter, as ``adapter`` unless an evaluation found a better one, and show the tables."""
        best_is_last = self._best is None or self._best.step == steps
        if self._best is None:
            self._save("adapter")
        elif not best_is_last:
            self._save("adapter_last")
        if self._directory is None:
            return
        self._display.close()
        places = {"adapter": self._directory.adapter, "metrics": self._directory.metrics, "log": self._directory.log}
        if not best_is_last:
            places["last adapter"] = self._directory.path / "adapter_last"
        self._display.message(self._summary.render(places))

    def _save(self, name: str) -> None:
        """Written beside its place and renamed, so that a folder of that name always holds a whole adapter."""
        weights = collect(self._engine, keep=self._directory is not None)["adapter"]
        if self._directory is not None:
            named = {label.removeprefix("model."): weight for label, weight in weights.items()}
            place = self._directory.path / name
            with writing(place):
                self._replace(place, named)
        self._group.barrier()

    def _replace(self, place: Path, named: dict[str, Tensor]) -> None:
        new, old = place.with_name(f".{place.name}.new"), place.with_name(f".{place.name}.old")
        shutil.rmtree(new, ignore_errors=True)
        self._engine.module.model.save_pretrained(str(new), state_dict=named, save_embedding_layers=False)
        shutil.rmtree(old, ignore_errors=True)
        if place.exists():
            place.rename(old)
        new.rename(place)
        shutil.rmtree(old, ignore_errors=True)
