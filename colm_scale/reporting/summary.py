"""Tables at the end of a run: by source, by rank, and closing figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from colm_scale.records import Json, StepReport, long_tensor
from colm_scale.reporting.nearness import Nearness
from colm_scale.reporting.noise import NoiseScale

_FORWARD_BACKWARD = ("sketch", "train")
"""Phases with forward and backward passes; all others are overhead or the optimizer."""
_COUNTS = ("candidates", "selected", "kept", "protected")
_NONE = "-"


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Loss of some held-out examples.

    Attributes:
        losses: Mean loss of each source's examples.
        counts: Examples of each source.
        loss: Mean over the natural mixture: sources are weighted by their training examples. None if there are none.
        loss_by_source: Mean over sources.
        small_loss: Mean over the small sources; None if there are none.
    """

    losses: dict[str, float]
    counts: dict[str, int]
    loss: float | None
    loss_by_source: float
    small_loss: float | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out loss and accuracy at one step (0: before training).

    Attributes:
        losses, counts, loss, loss_by_source, small_loss: As in `HeldOutLoss`, over the scored examples.
        accuracies: Share of correct generated answers of each source; None if none was generated.
        accuracy: Mean over the sources with generated answers; None if there are none.
        whole: True if all held-out examples (up to --eval.limit) were scored, False if only those of `sample`.
        sample: Loss of the examples that every evaluation of the run scores (--eval.sample).
    """

    step: int
    losses: dict[str, float]
    accuracies: dict[str, float | None]
    counts: dict[str, int]
    loss: float | None
    loss_by_source: float
    small_loss: float | None
    accuracy: float | None
    whole: bool
    sample: HeldOutLoss

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Evaluation:
        """Restore an evaluation from `dataclasses.asdict`.

        Raises:
            KeyError: A field is missing.
            TypeError: The sample is not a `HeldOutLoss`.
        """
        own = {field.name: row[field.name] for field in fields(cls)}
        return cls(**own | {"sample": HeldOutLoss(**own["sample"])})


class RunSummary:
    """Accumulates the reports and evaluations of a run.

    Args:
        source_names: Name of each source, 0..Q-1.
        sizes: ``[Q]`` training examples.
        small: ``[Q]`` bool, the sources reported as small.
        memory_label: Name of the headline memory figure, e.g. "GPU memory (torch allocator)".
        remarks: Examples of each source by what became of them, see `data.examples.REMARKS`.
    """

    def __init__(
        self,
        source_names: Sequence[str],
        sizes: Tensor,
        small: Tensor,
        memory_label: str,
        remarks: Mapping[str, Mapping[str, int]],
    ):
        self._names, self._small, self._memory_label = list(source_names), small, memory_label
        self.sizes = sizes
        counts = torch.zeros(4, len(source_names), dtype=torch.int64)
        self.candidates, self.selected, self.kept, self.protected = counts.unbind()
        self._remarks = {title: counts for title, counts in remarks.items() if any(counts.values())}
        self._evaluations: list[Evaluation] = []
        self._seconds: list[float] = []
        self._outside: list[float] = []
        self._floors: list[float] = []
        self._without_update = 0
        self._exchanged: Counter[str] = Counter()
        self._peaks: dict[str, dict[str, Tensor]] = {}
        self._gradient_bytes = 0
        self._nearness, self._noise = Nearness(), NoiseScale()

    def report(self, report: StepReport) -> None:
        """Add one step."""
        sources, selection = report.candidates.sources, report.selection
        self.candidates += self._per_source(sources)
        self.selected += self._per_source(sources[selection.positions])
        kept = selection.positions[: selection.kept]
        self.kept += self._per_source(sources[kept])
        if report.candidates.protected is not None:
            self.protected += self._per_source(sources[kept[report.candidates.protected[kept]]])
        total = report.seconds["step"]
        inside = sum(report.seconds.get(phase, 0.0) for phase in _FORWARD_BACKWARD)
        self._seconds.append(total)
        self._without_update += not report.applied
        # A phase takes as long as its slowest rank, so the phases may add up to slightly more than the step.
        self._outside.append(max(0.0, 1 - inside / total))
        if report.floor is not None:
            self._floors.append(report.floor)
        self._exchanged.update(report.exchanged_bytes)
        self._gradient_bytes += report.gradient_bytes
        self._nearness.add(report.telemetry)
        self._noise.add(report.noise, report.source_noise)
        for kind, by_phase in report.phase_peak_bytes.items():
            so_far = self._peaks.setdefault(kind, {})
            for phase, peaks in by_phase.items():
                both = [long_tensor(peaks), so_far.get(phase, long_tensor([]))]
                so_far[phase] = pad_sequence(both, batch_first=True).amax(0)

    def state(self) -> Json:
        """The accumulated figures, as plain JSON."""
        return {
            **{name: getattr(self, name).tolist() for name in _COUNTS},
            "evaluations": [asdict(evaluation) for evaluation in self._evaluations],
            "seconds": self._seconds,
            "outside": self._outside,
            "floors": self._floors,
            "without_update": self._without_update,
            "exchanged": self._exchanged,
            "gradient_bytes": self._gradient_bytes,
            "peaks": {kind: {name: of.tolist() for name, of in peaks.items()} for kind, peaks in self._peaks.items()},
            "worth": self._nearness.state(),
            "noise": self._noise.state(),
        }

    def load(self, state: Json) -> None:
        """Continue from `state`."""
        for name in _COUNTS:
            getattr(self, name).copy_(long_tensor(state[name]))
        self._evaluations = [Evaluation.of(evaluation) for evaluation in state["evaluations"]]
        self._seconds, self._outside, self._floors = state["seconds"], state["outside"], state["floors"]
        self._without_update = state["without_update"]
        self._exchanged, peaks = Counter(state["exchanged"]), state["peaks"].items()
        self._peaks = {kind: {name: long_tensor(of) for name, of in by_phase.items()} for kind, by_phase in peaks}
        self._gradient_bytes = state.get("gradient_bytes", 0)  # older checkpoints have none
        self._nearness.load(state["worth"])
        self._noise.load(state.get("noise", {}))

    @property
    def evaluated(self) -> int:
        """Step of the last evaluation; 0 before the first."""
        return self._evaluations[-1].step if self._evaluations else 0

    def evaluation(self, evaluation: Evaluation) -> None:
        """Add one evaluation; the first and the last are compared."""
        self._evaluations.append(evaluation)

    @property
    def seconds(self) -> float:
        """Median seconds of a step."""
        return median(self._seconds)

    @property
    def share_outside(self) -> float:
        """Median share of a step that is spent outside forward and backward passes."""
        return median(self._outside)

    @property
    def exchanged_bytes(self) -> dict[str, float]:
        """Mean bytes per step, by phase."""
        return {phase: count / len(self._seconds) for phase, count in self._exchanged.items()}

    def render(self, places: Mapping[str, Path]) -> Group:
        """All tables, and the verdicts on the selection and on the size of a step.

        Args:
            places: Paths of the run's files by title, e.g. ``{"adapter": ..., "metrics": ..., "log": ...}``.
        """
        ranks = max((len(of) for phases in self._peaks.values() for of in phases.values()), default=1)
        verdict = map(Text, [*self._nearness.sentences(), *self._noise.sentences(ranks=ranks)])
        return Group(self.source_table(), *map(self.rank_table, self._peaks), self.closing_table(places), *verdict)

    def source_table(self) -> Table:
        """One row per source, including sources without training examples, then totals."""
        remarks, noise = self._remarks, self._noise.of_sources(self._names)
        table = _table("source", *self._columns(), *remarks, *noise, "held-out loss", "accuracy")
        held_out = [evaluation.losses for evaluation in self._evaluations[-1:]]
        names = dict.fromkeys(chain(self._names, *remarks.values(), *held_out))
        for source, name in enumerate(names):
            counts = self._counts(slice(source, source + 1))
            cells = [f"{counted.get(name, 0):,}" for counted in remarks.values()]
            cells += [scales.get(name, _NONE) for scales in noise.values()]
            _add_row(table, name, *counts, *cells, *self._held_out(name))
        table.add_section()
        self._add_totals(table)
        return table

    def _held_out(self, name: str) -> tuple[str, str]:
        """Held-out loss and accuracy of a source."""
        loss = self._change(lambda e: e.losses.get(name), ".3f")
        return loss, self._change(lambda e: e.accuracies.get(name), ".1%")

    def rank_table(self, kind: str) -> Table:
        """Peak memory of one kind over the run: a row per rank, a column per phase."""
        label = self._memory_label if kind == next(iter(self._peaks)) else kind
        table = _table("rank", *self._peaks[kind], title=f"peak {label}, GiB")
        for rank, peaks in enumerate(zip(*[of.tolist() for of in self._peaks[kind].values()])):
            _add_row(table, str(rank), *map(gib, peaks))
        return table

    def closing_table(self, places: Mapping[str, Path]) -> Table:
        """Paths of files, cost of a step, and telemetry of the selection."""
        exchanged = self.exchanged_bytes
        by_phase = ", ".join(f"{phase} {count:,.0f}" for phase, count in exchanged.items())
        table = Table.grid(padding=(0, 2))
        for name, path in places.items():
            _add_row(table, name, str(path))
        _add_row(table, "seconds per step", f"{self.seconds:.3f} (median of {len(self._seconds)})")
        _add_row(table, "outside forward and backward", f"{self.share_outside:.1%} of a step (median)")
        if self._without_update:
            _add_row(table, "steps without update", f"{self._without_update} (float16 overflow)")
        if self._floors:
            _add_row(table, "step / bare floor", f"{median(self._floors):.3f} (median of {len(self._floors)})")
        _add_row(table, "exchanged bytes per step", f"{sum(exchanged.values()):,.0f} ({by_phase or 'one rank'})")
        if self._gradient_bytes:
            _add_row(table, "reduced gradient bytes per step", f"{self._gradient_bytes / len(self._seconds):,.0f}")
        for name, value in {**self._nearness.rows(), **self._noise.rows()}.items():
            _add_row(table, name, value)
        return table

    def _add_totals(self, table: Table) -> None:
        remarks = [f"{sum(counted.values()):,}" for counted in self._remarks.values()]
        unknown = [_NONE] * len(self._noise.of_sources(self._names))
        blank = [_NONE] * len(remarks)
        natural = self._change(lambda e: e.loss, ".3f")
        by_source = self._change(lambda e: e.loss_by_source, ".3f")
        accuracy = self._change(lambda e: e.accuracy, ".1%")
        small = self._change(lambda e: e.small_loss, ".3f")
        _add_row(table, "mean over examples", *self._counts(slice(None)), *remarks, *unknown, natural, _NONE)
        _add_row(table, "mean over sources", *[_NONE] * len(self._columns()), *blank, *unknown, by_source, accuracy)
        _add_row(table, "small sources", *self._counts(self._small), *blank, *unknown, small, _NONE)

    def _counts(self, which: slice | Tensor) -> list[str]:
        return [f"{int(column[which].sum()):,}" for column in self._columns().values()]

    def _columns(self) -> dict[str, Tensor]:
        """Counts per source, by column title; protected candidates only if there are any."""
        counts = {"examples": self.sizes, "candidates": self.candidates, "selected": self.selected, "kept": self.kept}
        return counts | ({"protected": self.protected} if self.protected.any() else {})

    def _change(self, value: Callable[[Evaluation], float | None], form: str) -> str:
        """A figure of the first evaluation and, if there are two, of the last."""
        evaluations = [*self._evaluations[:1], *self._evaluations[1:][-1:]]
        known = [number for number in map(value, evaluations) if number is not None]
        return " -> ".join(format(number, form) for number in known) or _NONE

    def _per_source(self, sources: Tensor) -> Tensor:
        return torch.bincount(sources, minlength=len(self._names))


def gib(count: float) -> str:
    """Format bytes as GiB."""
    return f"{count / 2**30:.2f}"


def _table(first: str, *numbers: str, title: str | None = None) -> Table:
    table = Table(first, box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="")
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _add_row(table: Table, *cells: str) -> None:
    table.add_row(*map(Text, cells))  # as text: brackets in a name are not markup
