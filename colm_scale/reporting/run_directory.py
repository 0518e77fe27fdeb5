"""The files a run leaves behind. Each line of a ``.jsonl`` file is valid JSON; numbers that are not finite are null."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from safetensors import SafetensorError

from colm_scale.data.examples import Examples
from colm_scale.errors import TrainingError, UserError
from colm_scale.records import StepReport
from colm_scale.reporting.audit import AuditWriter, cut, write_examples
from colm_scale.reporting.summary import Evaluation
from colm_scale.step.source_refresh import Drift

FACTS = "run.json"
"""The file with what is known of a run before its first step."""


class RunDirectory:
    """A run's folder. Only rank 0 has one.

    Args:
        path: The folder; by default ``runs/`` and the date and time. Nothing is written before `create`.
        resume: Whether the run that the folder may hold is to go on.

    Raises:
        UserError: The folder holds a run that is not to go on, or cannot be made or written to.
    """

    def __init__(self, path: str | None = None, *, resume: bool = False):
        self.path = Path(path or f"runs/{datetime.now():%Y%m%d-%H%M%S}")
        self.adapter = self.path / "adapter"
        self.log = self.path / "log.txt"
        self.metrics = self.path / "metrics.jsonl"
        self._selection = self.path / "selection.jsonl"
        self._evaluations = self.path / "evaluations.jsonl"
        self._drift = self.path / "drift.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self._audit_folder = self.path / "audit"
        self._examples = self.path / "examples.parquet"
        self._audit = AuditWriter(self._audit_folder)
        self._resume = resume
        if self.metrics.exists() and not resume:
            raise UserError(
                f"--output_dir {self.path} holds a run already ({self.metrics.name}): give another folder, or "
                f"--resume auto to go on with that run"
            )
        nearest = next(folder for folder in (self.path.absolute(), *self.path.absolute().parents) if folder.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"--output_dir {self.path} cannot be written: {nearest} is not a folder open to writing")

    def create(
        self,
        config_yaml: str,
        environment: Mapping[str, object],
        after: int = 0,
        facts: Mapping[str, object] | None = None,
    ) -> None:
        """Make the folder, claim it for this run, and write ``config.yaml``, ``environment.json`` and ``run.json``.

        Args:
            facts: What ``run.json`` holds: the schedule, and the training examples of each source.
            after: The step after which the run goes on: rows of later steps, which will come again, are taken out.

        Raises:
            UserError: The folder cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.metrics.touch(exist_ok=self._resume)
            for rows in (self.metrics, self._selection, self._evaluations, self._drift):
                _cut(rows, after)
            cut(self._audit_folder, after)
            (self.path / "config.yaml").write_text(config_yaml, encoding="utf-8")
            for name, content in {"environment.json": environment, FACTS: facts or {}}.items():
                (self.path / name).write_text(json.dumps(finite(content), indent=2), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output_dir {self.path} cannot be written: {error.strerror}") from None

    def report(self, report: StepReport, source_names: Sequence[str]) -> None:
        """Append a step to ``metrics.jsonl`` and ``selection.jsonl``, and to the audit if there is one."""
        _append(self.metrics, metrics_row(report))
        _append(self._selection, selection_row(report, source_names))
        if report.audit is not None:
            with writing(self._audit_folder):
                self._audit.add(report, source_names)

    def flush(self) -> None:
        """Write what is held of the audit."""
        with writing(self._audit_folder):
            self._audit.flush()

    def examples(self, examples: Examples) -> None:
        """Write ``examples.parquet``, see `write_examples`."""
        with writing(self._examples):
            write_examples(self._examples, examples)

    def drift(self, drift: Drift) -> None:
        """Append to ``drift.jsonl``: the fields of `Drift`."""
        _append(self._drift, dataclasses.asdict(drift))

    def evaluation(self, evaluation: Evaluation) -> None:
        """Append to ``evaluations.jsonl``: the fields of `Evaluation`."""
        _append(self._evaluations, dataclasses.asdict(evaluation))


def metrics_row(report: StepReport) -> dict[str, object]:
    """A step's line of ``metrics.jsonl``; lists are by rank, dicts by phase."""
    selection = report.selection
    return {
        "step": report.step,
        "loss": report.loss,
        "learning_rate": report.learning_rate,
        "gradient_norm": report.gradient_norm,
        "applied": report.applied,
        "loss_scale": report.loss_scale,
        "seconds": report.seconds,
        "measured_over_floor": report.floor,
        "peak_bytes": report.peak_bytes,
        "phase_peak_bytes": report.phase_peak_bytes,
        "exchanged_bytes": report.exchanged_bytes,
        "padding_share": report.padding_share,
        "imbalance": report.imbalance,
        "candidates": len(report.candidates),
        "selected": len(selection),
        "kept": selection.kept,
        "invalid": selection.invalid,
        "overflow": selection.overflow,
        "telemetry": report.telemetry,
    }


def selection_row(report: StepReport, source_names: Sequence[str]) -> dict[str, object]:
    """A step's line of ``selection.jsonl``: candidates are ids, ``sources`` names the source of each of them."""
    candidates, selection = report.candidates, report.selection
    return {
        "step": report.step,
        "candidates": candidates.ids.tolist(),
        "sources": [source_names[source] for source in candidates.sources.tolist()],
        "selected": candidates.ids[selection.positions].tolist(),
        "weights": selection.weights.tolist(),
        "kept": selection.kept,
    }


def _cut(path: Path, after: int) -> None:
    """Take out the rows of later steps, and a last line that was not written to its end."""
    if not path.exists():
        return
    kept = [line for line in path.read_bytes().splitlines(keepends=True) if _belongs(line, after)]
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(b"".join(kept))
    new.replace(path)


def _belongs(line: bytes, after: int) -> bool:
    # The evaluation before training is that of step 0: a run that begins makes it again.
    return after > 0 and line.endswith(b"\n") and json.loads(line)["step"] <= after


def _append(path: Path, row: Mapping[str, object]) -> None:
    """Opened for each row, so that a run that is killed leaves whole lines."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(row), allow_nan=False, ensure_ascii=False) + "\n")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block that writes ``path``, of a run that is under way.

    Raises:
        TrainingError: The disk is full or will not take it.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TrainingError(
            f"{path} cannot be written: {reason}. Checkpoints are untouched: make room and go on with --resume auto"
        ) from error


def finite(value: object) -> object:
    """``value`` with null for every float that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
