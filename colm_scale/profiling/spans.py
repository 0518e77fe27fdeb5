"""Time and peak memory of each phase of a step, and the time before the first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from colm_scale.distributed.group import Group
from colm_scale.profiling.memory import MemoryMeter
from colm_scale.records import on_device

STEP = "step"
"""Name of the whole step among the phases."""


class Spans:
    """Measures the phases of one step on this rank, in sequence: ``with spans("sketch"): ...``.

    On a GPU a phase lies between two events on the current stream, read after the step, so that measuring does not make
    the host wait within the step.

    Args:
        entered: Called with the name of each phase when it begins.
    """

    def __init__(self, device: torch.device, meter: MemoryMeter, entered: Callable[[str], None] = lambda _: None):
        self._clock: _StreamClock | _HostClock = _HostClock() if device.type == "cpu" else _StreamClock(device)
        self._meter, self._entered = meter, entered
        self._open, self._began = "", 0.0
        self._reset()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        assert not self._open, f"phase {phase!r} inside of {self._open!r}"
        assert phase != STEP, "the whole step is measured anyway"
        if not self._marks:
            self._began = time.perf_counter()
        self._open = phase
        self._entered(phase)
        self._meter.start()
        start = self._clock.mark()
        try:
            yield
        finally:
            self._marks.append((phase, start, self._clock.mark()))
            for kind, peak in self._meter.stop().items():
                of_kind = self._peaks.setdefault(kind, {})
                of_kind[phase] = max(of_kind.get(phase, 0), peak)
            self._open = ""

    def finish(self) -> tuple[dict[str, float], dict[str, dict[str, int]]]:
        """End the step; return seconds by phase, and peak bytes by kind (the meter's primary first) and phase.

        A phase that ran twice gets the sum of its seconds and the larger of its peaks. ``step`` is the wall-clock time
        from the first phase until the device has finished, and the largest peak.
        """
        assert not self._open, f"the step ends inside of {self._open!r}"
        assert self._marks, "a step without a phase"
        self._clock.wait()
        seconds: dict[str, float] = {}
        for phase, start, end in self._marks:
            seconds[phase] = seconds.get(phase, 0.0) + self._clock.seconds(start, end)
        seconds[STEP] = time.perf_counter() - self._began
        kinds = sorted(self._peaks, key=lambda kind: kind != self._meter.primary)
        peaks = {kind: {**self._peaks[kind], STEP: max(self._peaks[kind].values())} for kind in kinds}
        self._reset()
        return seconds, peaks

    def _reset(self) -> None:
        self._marks: list[tuple[str, Any, Any]] = []
        self._peaks: dict[str, dict[str, int]] = {}


class StartClock:
    """Seconds from the start of this process to its first step, by part: ``clock("data")`` when the data is there.

    A part begins where the one before it ended, and one that is ended twice gets the sum.

    Attributes:
        seconds: By part. The first holds what the operating system, which counts from boot, rounds: up to a second.
    """

    def __init__(self) -> None:
        self._last = time.perf_counter() - max(0.0, time.time() - psutil.Process().create_time())
        self.seconds: dict[str, float] = {}

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now


def over_ranks(
    seconds: dict[str, float], peaks: dict[str, dict[str, int]], group: Group
) -> tuple[dict[str, float], dict[str, dict[str, tuple[int, ...]]]]:
    """Combine the results of `Spans.finish`: the slowest rank's seconds by phase, all ranks' peaks by kind and phase.

    All ranks call it together, with the same phases.
    """
    row = [*seconds.values(), *(float(peak) for of_kind in peaks.values() for peak in of_kind.values())]
    own = torch.tensor(row, dtype=torch.float64)
    rows = group.all_gather(on_device(own, group.device), "report").cpu() if group.world_size > 1 else own.unsqueeze(0)
    slowest = dict(zip(seconds, rows[:, : len(seconds)].amax(0).tolist()))
    columns = iter(rows[:, len(seconds) :].long().T.tolist())
    return slowest, {kind: {phase: tuple(next(columns)) for phase in of_kind} for kind, of_kind in peaks.items()}


class _HostClock:
    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def wait(self) -> None:
        """The CPU runs synchronously."""


class _StreamClock:
    def __init__(self, device: torch.device):
        self._device = device

    def mark(self) -> Any:
        event = torch.get_device_module(self._device).Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1000

    def wait(self) -> None:
        torch.get_device_module(self._device).synchronize(self._device)
