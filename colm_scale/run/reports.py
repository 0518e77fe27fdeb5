"""The reports of a run: run directory, display, trackers and tables on rank 0, nothing on other ranks."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from torch import Tensor

from colm_scale.checkpoint.background import Saved
from colm_scale.config import RunConfig, as_yaml
from colm_scale.distributed.group import Group
from colm_scale.engines.base import Engine
from colm_scale.errors import TrainingError
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.profiling.memory import MemoryMeter
from colm_scale.records import Json, StepReport
from colm_scale.reporting.display import Display
from colm_scale.reporting.environment import environment
from colm_scale.reporting.run_directory import RunDirectory, free_name, writing
from colm_scale.reporting.summary import Evaluation, RunSummary
from colm_scale.reporting.trackers import Trackers
from colm_scale.run.inputs import Inputs
from colm_scale.run.saved_adapter import name_base, of_run
from colm_scale.step.source_refresh import Drift


class Reports:
    """Receives the events of a run, and reports nothing: on other ranks than the first, and in a dry run."""

    def claim(self, engine: Engine, group: Group, found: Json, done: int, facts: Json) -> None:
        """Write the files that describe the run.

        Args:
            found: Further content of ``environment.json``.
            done: Steps that are complete.
            facts: Content of ``run.json``.
        """

    def start(self, steps: int, lines: Sequence[str], done: int) -> None:
        """Print ``lines`` about a run of ``steps``, ``done`` of which are complete."""

    def step(self, report: StepReport) -> None:
        """Write and show a step."""

    def drifted(self, drift: Drift) -> None:
        """Write and show a refresh of the sources."""

    def evaluation(self, evaluation: Evaluation) -> None:
        """Write and show an evaluation."""

    def adapter(self, name: str, module: ExampleLoss, weights: Mapping[str, Tensor]) -> None:
        """Write an adapter, in PEFT format, as the folder ``name``."""

    def saved(self, saved: Saved) -> None:
        """Write and show that a checkpoint was written."""

    def stopped(self, step: int) -> None:
        """Show that the run was asked to stop, and how to resume it."""

    def finish(self, *, best_is_last: bool) -> None:
        """Show the tables at the end of a run."""

    def flush(self) -> None:
        """Write buffered rows, so that a checkpoint is never of a later step than the files."""

    def close(self, *, failed: bool) -> None:
        """Restore the terminal, write buffered rows, and leave the run directory to other runs."""

    def state(self) -> Json | None:
        """Return the counts so far, as plain JSON."""
        return None

    def load(self, state: Json) -> None:
        """Resume from rank 0's `state`."""


class WrittenReports(Reports):
    """Writes the run directory and shows the run.

    Args:
        small: ``[Q]`` bool, the sources that are reported as small.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory, inputs: Inputs, small: Tensor, meter: MemoryMeter):
        self._config, self._directory, self._inputs, self._meter = config, directory, inputs, meter
        self._tokenizer = of_run(inputs.tokenizer, config.data)
        self._display = Display(config.profile.display, meter.label, directory.log)
        self._trackers = Trackers(config, directory.path, self._display.message)
        self._summary = RunSummary(inputs.source_names, inputs.sizes, small, meter.label, inputs.sampler.counts)

    def claim(self, engine: Engine, group: Group, found: Json, done: int, facts: Json) -> None:
        whole = environment(
            group.device,
            group.world_size,
            engine.name,
            device_name=self._meter.device_name,
            memory=self._meter.label,
            **found,
        )
        self._directory.create(as_yaml(self._config), whole, done, facts, self._summary.evaluated)
        if self._config.audit and not self._config.data.streaming:
            self._directory.examples(self._inputs.sampler.examples)

    def start(self, steps: int, lines: Sequence[str], done: int) -> None:
        for line in lines:
            self._display.message(line)
        self._trackers.start(done)
        self._display.start(steps, done)

    def step(self, report: StepReport) -> None:
        self._directory.report(report, self._inputs.source_names)
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
        """Write under a dot-name and rename, so that a folder ``name`` always holds a whole adapter."""
        named = {label.removeprefix("model."): weight for label, weight in weights.items()}
        place = self._directory.path / name
        with writing(place):
            new = _cleared(place.with_name(f".{name}.new"))
            module.model.save_pretrained(str(new), state_dict=named, save_embedding_layers=False)
            name_base(new, self._config.model)
            self._tokenizer.save_pretrained(new)
            old = _cleared(place.with_name(f".{name}.old"))
            if place.exists():
                place.rename(old)
            new.rename(place)
            shutil.rmtree(old, ignore_errors=True)

    def saved(self, saved: Saved) -> None:
        row = dataclasses.asdict(saved)
        for note in row.pop("notes"):
            self._display.message(f"warning: {note}")
        self._directory.checkpoint(row)
        took = f"{saved.bytes / 1e6:,.1f} MB in {saved.seconds:.2f} s, steps waited {saved.stall_seconds:.2f} s"
        self._display.message(f"checkpoint of step {saved.step}: {took}")

    def stopped(self, step: int) -> None:
        self._display.close()
        way_on = f"resume with --resume auto --output_dir {self._directory.path}"
        saved = way_on if self._config.checkpoint.every else "nothing was saved, because --checkpoint.every is 0"
        self._display.message(f"stopped after step {step}, as requested: {saved}")

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
        # Report the error that ended the run, not its consequences, such as the same full disk.
        try:
            with suppress(TrainingError) if failed else nullcontext():
                self.flush()
        finally:
            self._directory.close()

    def state(self) -> Json | None:
        return self._summary.state()

    def load(self, state: Json) -> None:
        self._summary.load(state)


def _cleared(path: Path) -> Path:
    """Remove what was left under a name as far as it will go, and return a free name like it."""
    for left in path.parent.glob(f"{path.name}*"):
        shutil.rmtree(left, ignore_errors=True)
    return free_name(path)


def drift_line(drift: Drift) -> str:
    """Describe a refresh of the sources in one line."""
    line = (
        f"sources re-clustered after step {drift.step}: {drift.moved:,} of {drift.examples:,} examples seen have moved"
    )
    for what, names in (("new", drift.new), ("now kept", drift.kept), ("no longer kept", drift.no_longer_kept)):
        if names:
            line += f"; {what}: {', '.join(names)}"
    return f"{line} ({drift.seconds:.2f} s)"
