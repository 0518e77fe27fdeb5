from __future__ import annotations

import time

import psutil
import pytest
import torch

from colm_scale.profiling.spans import Spans, StartClock

CPU = torch.device("cpu")


class ListedMeter:
    """Gives the peaks of a list, one per phase."""

    primary, label, device_name = "second", "listed", "none"

    def __init__(self, *peaks: int):
        self._peaks = iter(peaks)
        self.open = False

    def start(self) -> None:
        assert not self.open
        self.open = True

    def stop(self) -> dict[str, int]:
        assert self.open
        self.open = False
        return {"first": -1, "second": next(self._peaks)}


@pytest.fixture
def clock(monkeypatch):
    """``clock.append(seconds)`` moves the time on."""
    passed: list[float] = []
    monkeypatch.setattr(time, "perf_counter", lambda: sum(passed))
    return passed


def test_seconds_and_peaks_by_phase(clock):
    spans = Spans(CPU, ListedMeter(8, 9, 7))
    clock.append(100)
    with spans("sketch"):
        clock.append(2)
    clock.append(0.5)  # between two phases
    with spans("train"):
        clock.append(3)
    with spans("sketch"):
        clock.append(4)
    seconds, peaks = spans.finish()
    assert seconds == {"sketch": 6, "train": 3, "step": 9.5}
    assert peaks["second"] == {"sketch": 8, "train": 9, "step": 9}
    assert list(peaks) == ["second", "first"], "the primary kind comes first"
    assert list(seconds) == ["sketch", "train", "step"]


def test_the_next_step_starts_anew(clock):
    spans = Spans(CPU, ListedMeter(7, 5))
    with spans("sketch"):
        clock.append(2)
    spans.finish()
    clock.append(50)  # an evaluation between steps
    with spans("train"):
        clock.append(1)
    seconds, peaks = spans.finish()
    assert seconds == {"train": 1, "step": 1}
    assert peaks["second"] == {"train": 5, "step": 5}


def test_nested_phases_are_refused():
    spans = Spans(CPU, ListedMeter(1))
    with pytest.raises(AssertionError, match="'train' inside of 'sketch'"), spans("sketch"), spans("train"):
        pass


def test_an_exception_ends_its_phase(clock):
    meter = ListedMeter(3, 4)
    spans = Spans(CPU, meter)
    with pytest.raises(RuntimeError, match="out of memory"), spans("sketch"):
        raise RuntimeError("out of memory")
    assert not meter.open
    with spans("train"):
        pass
    assert spans.finish()[1]["second"] == {"sketch": 3, "train": 4, "step": 4}


def test_a_step_ends_after_its_last_phase():
    spans = Spans(CPU, ListedMeter(1))
    with pytest.raises(AssertionError, match="without a phase"):
        spans.finish()
    with pytest.raises(AssertionError, match="inside of 'sketch'"), spans("sketch"):
        spans.finish()


def test_a_phase_cannot_be_called_like_the_step():
    with pytest.raises(AssertionError, match="whole step"), Spans(CPU, ListedMeter())("step"):
        pass


def test_on_a_gpu_events_are_read_when_the_step_is_over(monkeypatch):
    calls: list[str] = []

    class Event:
        """Records itself; the n-th lies n**2 milliseconds after the start."""

        made = 0

        def __init__(self, enable_timing: bool):
            assert enable_timing
            self.at = Event.made**2
            Event.made += 1

        def record(self) -> None:
            calls.append("record")

        def elapsed_time(self, end: Event) -> float:
            calls.append("read")
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(f"wait for {device}"))
    spans = Spans(torch.device("cuda", 1), ListedMeter(7, 9))
    for phase in ("sketch", "train"):
        with spans(phase):
            pass
    seconds, _ = spans.finish()
    assert calls == ["record"] * 4 + ["wait for cuda:1"] + ["read"] * 2
    assert (seconds["sketch"], seconds["train"]) == (0.001, 0.005)


def test_a_start_has_parts_that_follow_one_another(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: psutil.Process().create_time() + 7)
    now = iter([100.0, 102.0, 105.0, 109.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = StartClock()  # at 100, so the process began at 93
    for part in ("data", "model", "data"):
        clock(part)
    assert clock.seconds == pytest.approx({"data": 9 + 4, "model": 3})
