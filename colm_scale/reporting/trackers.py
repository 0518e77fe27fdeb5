"""Experiment trackers: rank 0 sends metrics to TensorBoard, Weights & Biases, MLflow and trackio through accelerate.

A tracker that fails is logged once, then disabled, and the run continues. A resumed run continues the same history:
TensorBoard deletes the steps that are repeated; the others cannot, so repeated steps, whose numbers are equal, are not
sent again. The run's ``trackers.json`` records the last step that each tracker was sent.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from colm_scale.config import RunConfig, TrackConfig
from colm_scale.errors import UserError
from colm_scale.records import Json, StepReport
from colm_scale.reporting.run_directory import metrics_row, writing
from colm_scale.reporting.summary import Evaluation

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

Numbers = dict[str, float]

_STATE = "trackers.json"
_BEFORE_ANY = -1
"""The last step sent to a new tracker; the evaluation before training has step 0."""
_NO_NEWS = ("step", "candidates", "selected", "peak_bytes", "phase_peak_bytes")
"""Fields of metrics.jsonl that are constant, or sent in another unit."""


def check_trackers(config: TrackConfig) -> None:
    """Check that every tracker is installed.

    Raises:
        UserError: A tracker is not installed.
    """
    if not config.to:
        return
    from accelerate.tracking import get_available_trackers

    available = {str(kind) for kind in get_available_trackers()}
    for name in config.to:
        if name not in available:
            raise UserError(f"--track.to {name}: {name} is not installed: pip install {name}, or leave it out")


class Trackers:
    """The trackers of a run, on the first rank.

    Args:
        folder: The run directory, already created.
        say: Prints a message for the user.
    """

    def __init__(self, config: RunConfig, folder: Path, say: Callable[[str], None]):
        self._config, self._folder, self._say = config, folder, say
        self._running: dict[str, GeneralTracker] = {}
        self._state: dict[str, Json] = {}
        self._already: dict[str, int] = {}

    def start(self, done: int) -> None:
        """Start, or continue after step ``done`` of the same run."""
        track = self._config.track
        if not track.to:
            return
        if done:
            self._state = self._read_state()
        for name in track.to:
            known = self._state.setdefault(name, {"id": uuid.uuid4().hex[:12], "sent": _BEFORE_ANY})
            self._already[name] = _BEFORE_ANY if name == "tensorboard" else known["sent"]
            begun = known["sent"] != _BEFORE_ANY
            self._guarded(name, partial(self._open, name, done, begun))

    def step(self, report: StepReport) -> None:
        """Send a step."""
        self._send(report.step, step_numbers(report))

    def evaluation(self, evaluation: Evaluation) -> None:
        """Send an evaluation."""
        self._send(evaluation.step, evaluation_numbers(evaluation))

    def close(self) -> None:
        """Finish every tracker; a second call has no effect."""
        for name in list(self._running):
            self._guarded(name, self._running[name].finish)
        self._running = {}

    def _open(self, name: str, done: int, begun: bool) -> None:
        """Start a tracker, or continue the run that it ``begun`` before."""
        _let_accelerate_log()
        known = self._state[name]
        tracker = _made(name, self._config.track, self._folder, known["id"], done, begun)
        tracker.start()
        if name == "mlflow":  # the only one that chooses the run's id itself
            known["id"] = tracker.tracker.info.run_id
        self._running[name] = tracker
        self._write_state()
        if not begun:
            tracker.store_init_configuration(_options(self._config))

    def _send(self, step: int, numbers: Numbers) -> None:
        for name, tracker in list(self._running.items()):
            if step > self._already[name]:
                named = _for_mlflow(numbers) if name == "mlflow" else numbers
                if self._guarded(name, partial(tracker.log, named, step=step)):
                    self._state[name]["sent"] = max(step, self._state[name]["sent"])
        if self._running:
            self._write_state()

    def _guarded(self, name: str, call: Callable[[], None]) -> bool:
        """Call a tracker and return True; if it fails, disable it and return False."""
        try:
            call()
            return True
        except Exception as error:
            self._running.pop(name, None)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._say(f"warning: --track.to {name} failed and is disabled; the run continues: {reason}")
            return False

    def _read_state(self) -> dict[str, Json]:
        path = self._folder / _STATE
        found: dict[str, Json] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        return found

    def _write_state(self) -> None:
        new = self._folder / f".{_STATE}.new"
        with writing(self._folder / _STATE):
            new.write_text(json.dumps(self._state), "utf-8")
            new.replace(self._folder / _STATE)


def step_numbers(report: StepReport) -> Numbers:
    """A flat row of metrics.jsonl: ``train/loss``, ``seconds/sketch``, ``peak_gib/device/rank0``, ..."""
    row = {name: value for name, value in metrics_row(report).items() if name not in _NO_NEWS}
    row["peak_gib"] = {
        kind: {f"rank{rank}": peak / 2**30 for rank, peak in enumerate(by_phase["step"])}
        for kind, by_phase in report.phase_peak_bytes.items()
    }
    grouped = {name: value for name, value in row.items() if isinstance(value, Mapping)}
    single = {f"train/{name}": value for name, value in row.items() if name not in grouped}
    return dict(_flat(single | grouped))


def evaluation_numbers(evaluation: Evaluation) -> Numbers:
    """Flat numbers of an evaluation.

    Returns:
        ``eval/loss`` (natural mixture), ``eval/loss_by_source``, ``eval/losses/SOURCE``, ... over all held-out
        examples, and ``eval/sample/loss``, ... over the sample of every evaluation.
    """
    numbers = asdict(evaluation)
    if not evaluation.whole:
        numbers = {"sample": numbers["sample"]}
    for counted in (numbers, numbers["sample"]):
        for name in ("step", "counts", "whole"):
            counted.pop(name, None)
    return dict(_flat({"eval": numbers}))


def _made(name: str, track: TrackConfig, folder: Path, run_id: str, done: int, begun: bool) -> GeneralTracker:
    """Create accelerate's tracker of this kind."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind, title = LOGGER_TYPE_TO_CLASS[name], folder.resolve().name
    match name:
        case "tensorboard":
            return kind(name, logging_dir=folder, purge_step=done + 1 if done else 0)
        case "wandb":
            return kind(track.project, name=title, id=run_id, resume="allow", dir=str(folder))
        case "mlflow":
            return kind(track.project, run_name=title, run_id=run_id if begun else None)
        case "trackio":
            return kind(track.project, name=f"{title}-{run_id}", resume="allow")


def _let_accelerate_log() -> None:
    """Create accelerate's state, which its trackers need for logging, without changing the number of threads."""
    from accelerate import PartialState

    threads = torch.get_num_threads()
    PartialState(cpu=True)  # joins the existing ranks, and does not choose a device
    torch.set_num_threads(threads)


def _options(config: RunConfig) -> dict[str, str | int | float | bool]:
    """Every option by its dotted name; other values than numbers and text as JSON."""
    flat = {}
    for section, options in asdict(config).items():
        values = options if isinstance(options, dict) else {"": options}
        for name, value in values.items():
            key = f"{section}.{name}".rstrip(".")
            flat[key] = value if isinstance(value, (str, int, float, bool)) else json.dumps(value)
    return flat


def _flat(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers of a tree, with names joined by slashes."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)


def _for_mlflow(numbers: Numbers) -> Numbers:
    """Replace each character that MLflow refuses in a name by its code, so that names stay distinct."""
    refused = re.compile(r"[^\w\-. :/]")
    return {refused.sub(lambda found: f"_{ord(found[0]):x}_", name): value for name, value in numbers.items()}
