"""The files of a run. Each line of a ``.jsonl`` file is valid JSON; numbers that are not finite are null."""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError

from colm_scale.data.examples import Examples
from colm_scale.errors import TrainingError, UserError
from colm_scale.records import StepReport
from colm_scale.reporting.audit import AuditWriter, cut, write_examples
from colm_scale.reporting.lock import RunLock
from colm_scale.reporting.summary import Evaluation
from colm_scale.step.source_refresh import Drift

FACTS = "run.json"
"""File with the schedule and the sources of a run, written before its first step."""


class RunDirectory:
    """The folder of a run, on rank 0.

    Args:
        path: By default ``runs/`` with date and time. Nothing is written before `create`.
        resume: Continue the run in the folder, if there is one.

    Raises:
        UserError: The folder holds a run and ``resume`` is False, is in use by another, or cannot be written.
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
        self._saved = self.path / "checkpoints.jsonl"
        self._audit_folder = self.path / "audit"
        self._examples = self.path / "examples.parquet"
        self._audit = AuditWriter(self._audit_folder)
        self._resume = resume
        self._named: Sequence[str] = ()
        if self.metrics.exists() and not resume:
            raise UserError(
                f"--output_dir {self.path} already holds a run ({self.metrics.name}): use another folder, or "
                f"--resume auto to continue that run"
            )
        nearest, writable = nearest_folder(self.path)
        if not writable:
            raise UserError(f"--output_dir {self.path} cannot be written: {nearest} is not a writable folder")
        self._lock = RunLock(self.path)
        try:
            self._lock.wait()
        except OSError as error:
            raise UserError(f"--output_dir {self.path} cannot be used: {error.filename}: {error.strerror}") from None

    def create(
        self,
        config_yaml: str,
        environment: Mapping[str, object],
        after: int = 0,
        facts: Mapping[str, object] = MappingProxyType({}),
        evaluated: int = 0,
    ) -> None:
        """Create the folder, claim it for this run, and write ``config.yaml``, ``environment.json`` and ``run.json``.

        Args:
            after: Step after which the run continues; rows of later steps are removed, since those steps are repeated.
            evaluated: Step of the last evaluation that is not repeated.
            facts: Content of ``run.json``: the schedule, and the training examples of each source.

        Raises:
            UserError: The folder cannot be written, or another run has just claimed it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.take()
            self.metrics.touch(exist_ok=self._resume)
            for rows in (self.metrics, self._selection, self._drift, self._saved):
                _cut(rows, after or -1)  # even the evaluation before the first step, with the number 0, comes again
            _cut(self._evaluations, evaluated if after else -1)
            cut(self._audit_folder, after)
            (self.path / "config.yaml").write_text(config_yaml, encoding="utf-8")
            for name, content in {"environment.json": environment, FACTS: facts}.items():
                (self.path / name).write_text(json.dumps(finite(content), indent=2), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output_dir {self.path} cannot be written: {error.strerror}") from None

    def report(self, report: StepReport, source_names: Sequence[str]) -> None:
        """Append a step to ``metrics.jsonl``, ``selection.jsonl`` and, if enabled, the audit.

        Raises:
            TrainingError: A file cannot be written, or another run has taken the folder over.
        """
        with writing(self.path):
            self._lock.check()
        _append(self.metrics, metrics_row(report))
        _append(self._selection, selection_row(report, source_names, self._named))
        self._named = tuple(source_names)
        if report.audit is not None:
            with writing(self._audit_folder):
                self._audit.add(report, report.audit, source_names)

    def flush(self) -> None:
        """Write the buffered rows of the audit."""
        with writing(self._audit_folder):
            self._audit.flush()

    def close(self) -> None:
        """Leave the folder to other runs."""
        self._lock.release()

    def examples(self, examples: Examples) -> None:
        """Write ``examples.parquet`` (`write_examples`)."""
        with writing(self._examples):
            write_examples(self._examples, examples)

    def drift(self, drift: Drift) -> None:
        """Append the fields of `Drift` to ``drift.jsonl``."""
        _append(self._drift, dataclasses.asdict(drift))

    def checkpoint(self, row: Mapping[str, object]) -> None:
        """Append a checkpoint's step, bytes and seconds to ``checkpoints.jsonl``."""
        _append(self._saved, row)

    def evaluation(self, evaluation: Evaluation) -> None:
        """Append the fields of `Evaluation` to ``evaluations.jsonl``."""
        _append(self._evaluations, dataclasses.asdict(evaluation))


def nearest_folder(path: Path) -> tuple[Path, bool]:
    """The path or its nearest parent that exists, and whether that is a writable folder."""
    path = path.absolute()
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    return nearest, nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def free_name(path: Path) -> Path:
    """Return the path, or the first of ``path2``, ``path3``, ... that does not exist.

    What a network file system will not remove, because a file in it is open elsewhere, must be in nobody's way.
    """
    numbered = (path.with_name(f"{path.name}{number if number > 1 else ''}") for number in count(1))
    return next(name for name in numbered if not name.exists())


def metrics_row(report: StepReport) -> dict[str, object]:
    """The line of a step in ``metrics.jsonl``; lists are by rank, dicts by phase."""
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
        "gradient_bytes": report.gradient_bytes,
        "padding_share": report.padding_share,
        "imbalance": report.imbalance,
        "candidates": len(report.candidates),
        "selected": len(selection),
        "kept": selection.kept,
        "invalid": selection.invalid,
        "overflow": selection.overflow,
        "telemetry": report.telemetry,
        "noise": report.noise,
    }


def selection_row(report: StepReport, source_names: Sequence[str], named: Sequence[str] = ()) -> dict[str, object]:
    """The line of a step in ``selection.jsonl``, which `data.recorded_selection` reads.

    Args:
        named: Names of the sources in the lines before; names that are the same are not repeated.
    """
    candidates, selection = report.candidates, report.selection
    names = {} if list(named) == list(source_names) else {"names": list(source_names)}
    return {
        "step": report.step,
        **names,
        "candidates": candidates.ids.tolist(),
        "sources": candidates.sources.tolist(),
        "selected": candidates.ids[selection.positions].tolist(),
        "weights": selection.weights.tolist(),
        "kept": selection.kept,
    }


def _cut(path: Path, last: int) -> None:
    """Remove the rows of steps later than ``last``, and an incomplete last line. Reads only what it removes.

    Rows are appended in the order of steps, so nothing but the end changes: a crash leaves the file as it was, or cut.
    """
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = 0
        if last >= 0 and os.fstat(file.fileno()).st_size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as rows:
                end = rows.rfind(b"\n") + 1
                while end and not _belongs(rows[(start := rows.rfind(b"\n", 0, end - 1) + 1) : end], last):
                    end = start
        file.truncate(end)


def _belongs(line: bytes, last: int) -> bool:
    """Return whether a line is the row of a step up to ``last``; one that a crash of the machine spoiled is not."""
    try:
        found: bool = json.loads(line)["step"] <= last
    except (ValueError, TypeError, KeyError):
        return False
    return found


def _append(path: Path, row: Mapping[str, object]) -> None:
    """Open the file for each row, so that a killed run leaves complete lines."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(_as_line(row) + "\n")


def _as_line(row: Mapping[str, object]) -> str:
    encoded = partial(json.dumps, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    try:
        return encoded(row)
    except ValueError:  # some number is not finite; a search through the lists of all ranks and candidates takes longer
        return encoded(finite(row))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report errors in a block that writes ``path`` during training.

    Raises:
        TrainingError: The disk is full or cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TrainingError(
            f"{path} cannot be written: {reason}. Checkpoints are intact: free some space and use --resume auto"
        ) from error


def finite(value: object) -> object:
    """Replace floats that are not finite by None, which JSON writes as null."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
