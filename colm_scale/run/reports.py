"""What the first rank writes and shows of a run: run directory, display, trackers, tables; nothing on other ranks."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Protocol

from torch import Tensor

from colm_scale.config import RunConfig
from colm_scale.errors import TrainingError
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.profiling.memory import MemoryMeter
from colm_scale.records import Json, StepReport
from colm_scale.reporting.display import Display
from colm_scale.reporting.facts import drift_line
from colm_scale.reporting.run_directory import RunDirectory, writing
from colm_scale.reporting.summary import Evaluation, RunSummary
from colm_scale.reporting.trackers import Trackers
from colm_scale.run.inputs import Inputs
from colm_scale.step.source_refresh import Drift


class Reports(Protocol):
    """Takes in what happens in a run."""

    def start(self, steps: int, facts: Sequence[str], done: int) -> None:
        """Say what is about to run, ``done`` of its ``steps`` before."""

    def step(self, report: StepReport) -> None:
        """Write and show a step."""

    def drifted(self, drift: Drift) -> None:
        """Write and show what has become of the sources."""

    def evaluation(self, evaluation: Evaluation) -> None:
        """Write and show an evaluation."""

    def adapter(self, name: str, module: ExampleLoss, weights: Mapping[str, Tensor]) -> None:
        """Write an adapter, in PEFT format, as the folder ``name``."""

    def saved(self, step: int, seconds: float) -> None:
        """Say that a checkpoint was written."""

    def stopped(self, step: int) -> None:
        """Say that the run was told to stop, and how it goes on."""

    def finish(self, *, best_is_last: bool) -> None:
        """Show the tables at the end of a run."""

    def flush(self) -> None:
        """Write what is held; before a checkpoint, so that none is of a later step than what is written."""

    def close(self, *, failed: bool) -> None:
        """Restore the terminal, and write what is held."""

    def state(self) -> Json | None:
        """Counts so far, as plain JSON."""

    def load(self, state: Json) -> None:
        """Go on from the first rank's `state`."""


class NoReports(Reports):
    """Goes nowhere: on other ranks than the first, and where nothing is to be written."""

    def start(self, steps: int, facts: Sequence[str], done: int) -> None: ...

    def step(self, report: StepReport) -> None: ...

    def drifted(self, drift: Drift) -> None: ...

    def evaluation(self, evaluation: Evaluation) -> None: ...

    def adapter(self, name: str, module: ExampleLoss, weights: Mapping[str, Tensor]) -> None: ...

    def saved(self, step: int, seconds: float) -> None: ...

    def stopped(self, step: int) -> None: ...

    def finish(self, *, best_is_last: bool) -> None: ...

    def flush(self) -> None: ...

    def close(self, *, failed: bool) -> None: ...

    def state(self) -> Json | None:
        return None

    def load(self, state: Json) -> None: ...


class WrittenReports(Reports):
    """Writes the run directory and shows the run.

    Args:
        directory: Already created.
        small: ``[Q]`` bool, the sources that are reported as small.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory, inputs: Inputs, small: Tensor, meter: MemoryMeter):
        self._config, self._directory, self._names = config, directory, inputs.source_names
        self._display = Display(config.profile.display, meter.label, directory.log)
        self._trackers = Trackers(config, directory.path, self._display.message)
        too_long = {"dropped": inputs.sampler.dropped, "cut": inputs.sampler.cut}
        self._summary = RunSummary(inputs.source_names, inputs.sizes, small, meter.label, too_long)

    def start(self, steps: int, facts: Sequence[str], done: int) -> None:
        for fact in facts:
            self._display.message(fact)
        self._trackers.start(done)
        self._display.start(steps, done)

    def step(self, report: StepReport) -> None:
        self._directory.report(report, self._names)
        self._summary.report(report)
        self._display.step(report)
        self._trackers.step(report)

    def drifted(self, drift: Drift) -> None:
        self._directory.drift(drift)
        self._display.message(drift_line(drift))

    def evaluation(self, evaluation: Evaluation) -> None:
        self._directory.evaluation(evaluation)
        self._summary.evaluation(evaluation)
        self._display.evaluation(evaluation)
        self._trackers.evaluation(evaluation)

    def adapter(self, name: str, module: ExampleLoss, weights: Mapping[str, Tensor]) -> None:
        """Written beside its place and renamed, so that a folder of that name always holds a whole adapter."""
        named = {label.removeprefix("model."): weight for label, weight in weights.items()}
        place = self._directory.path / name
        new, old = place.with_name(f".{name}.new"), place.with_name(f".{name}.old")
        with writing(place):
            shutil.rmtree(new, ignore_errors=True)
            module.model.save_pretrained(str(new), state_dict=named, save_embedding_layers=False)
            shutil.rmtree(old, ignore_errors=True)
            if place.exists():
                place.rename(old)
            new.rename(place)
            shutil.rmtree(old, ignore_errors=True)

    def saved(self, step: int, seconds: float) -> None:
        files = (self._directory.checkpoints / f"step-{step:08d}").iterdir()
        size = sum(file.stat().st_size for file in files)
        self._display.message(f"checkpoint of step {step}: {size / 1e6:,.1f} MB in {seconds:.2f} s")

    def stopped(self, step: int) -> None:
        self._display.close()
        way_on = f"go on with --resume auto --output_dir {self._directory.path}"
        saved = way_on if self._config.checkpoint.every else "nothing was saved, for --checkpoint.every is 0"
        self._display.message(f"stopped after step {step}, as told: {saved}")

    def finish(self, *, best_is_last: bool) -> None:
        self._display.close()
        places = {"adapter": self._directory.adapter, "metrics": self._directory.metrics, "log": self._directory.log}
        if not best_is_last:
            places["last adapter"] = self._directory.path / "adapter_last"
        self._display.message(self._summary.render(places))

    def flush(self) -> None:
        self._directory.flush()

    def close(self, *, failed: bool) -> None:
        self._display.close()
        self._trackers.close()
        # The error that has ended the run is told, not what follows from it: the same disk is full.
        with suppress(TrainingError) if failed else nullcontext():
            self.flush()

    def state(self) -> Json | None:
        return self._summary.state()

    def load(self, state: Json) -> None:
        self._summary.load(state)
