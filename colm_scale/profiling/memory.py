"""Peak memory of each phase of a step on this rank.

On a GPU the peak of torch's allocator is exact, but excludes the CUDA context and NCCL's buffers. NVML's figure
includes them, but it never falls, because the allocator keeps the blocks that it frees: every phase would show the
largest so far. So the memory of a phase is the allocator's peak in it, plus what NVML counts beyond the allocator's
blocks, which is sampled. On the CPU the kernel tracks peak resident memory. No reading synchronises the device: the
host allocates memory when it launches work, so phases are those of the host.
"""

from __future__ import annotations

import os
import platform
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import psutil
import pynvml
import torch

from colm_scale.distributed.device import visible_as
from colm_scale.distributed.group import Group

_SAMPLE_SECONDS = 0.02
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CPU_INFO = Path("/proc/cpuinfo")


class MemoryMeter(Protocol):
    """Measures the peak between `start` and `stop`; phases do not overlap.

    Attributes:
        primary: The kind of peak to report, a key of the result of `stop`.
        label: The primary kind, described for people.
        device_name: The device that the memory belongs to.
    """

    primary: str
    label: str
    device_name: str

    def start(self) -> None:
        """Begin a phase."""

    def stop(self) -> dict[str, int]:
        """End the phase; return peak bytes by kind: ``resident``, or ``allocator`` and, if NVML answers, ``device``."""


def memory_meter(group: Group) -> MemoryMeter:
    """Make the meter of this rank's device, once the model is on it. All ranks call it together.

    All measure the same kinds: where NVML does not answer on some rank, none asks it.
    """
    if group.device.type != "cuda":
        return ResidentMeter()
    gauge = _nvml_gauge(group.device)
    return GpuMeter(group.device, None if group.any(gauge is None) else gauge)


def free_cached(device: torch.device) -> None:
    """Return the blocks that the allocator keeps on a GPU, after work whose tensors are not of a step's sizes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def cpu_name() -> str:
    """Return the processor's model."""
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", _CPU_INFO.read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


class ResidentMeter:
    """Measures resident memory: the peak if the kernel allows resetting it, else the value at the end of the phase."""

    primary = "resident"

    def __init__(self) -> None:
        self._has_peak = _restart_peak() and _peak_resident() > 0
        self.label = "resident memory (CPU)" if self._has_peak else "resident memory (CPU, at the end of a phase)"
        self.device_name = cpu_name()

    def start(self) -> None:
        if self._has_peak:
            _restart_peak()

    def stop(self) -> dict[str, int]:
        return {"resident": _peak_resident() if self._has_peak else psutil.Process().memory_info().rss}


def _restart_peak() -> bool:
    """Reset the kernel's VmHWM (``man 5 proc_pid_clear_refs``); return False if that is not allowed."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _peak_resident() -> int:
    """Return VmHWM in bytes; 0 if the kernel does not report it."""
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    return 0


class GpuMeter:
    """Measures a GPU's memory with torch's allocator and, where a ``gauge`` is given, what is beside it."""

    def __init__(self, device: torch.device, gauge: NvmlGauge | None):
        self._device = device
        self._beside = SampledPeak(self._beside_allocator(gauge)) if gauge else None
        self.primary = "device" if gauge else "allocator"
        self.label = gauge.label if gauge else "GPU memory (torch allocator)"
        self.device_name = torch.cuda.get_device_name(device)

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        if self._beside:
            self._beside.mark()

    def stop(self) -> dict[str, int]:
        peaks = {"allocator": torch.cuda.max_memory_allocated(self._device)}
        if self._beside:
            peaks["device"] = peaks["allocator"] + self._beside.largest()
        return peaks

    def _beside_allocator(self, gauge: NvmlGauge) -> Callable[[], int | None]:
        def read() -> int | None:
            reserved = torch.cuda.memory_reserved(self._device)
            used = gauge.read()
            # If the allocator took or returned memory meanwhile, the two figures do not belong together.
            return used - reserved if torch.cuda.memory_reserved(self._device) == reserved else None

        return read


class SampledPeak:
    """The largest reading since a mark, by a thread that reads every 20 ms as long as the process lives.

    Args:
        read: Returns a reading, or None for one that does not count.
    """

    def __init__(self, read: Callable[[], int | None]):
        self._read = read
        self._last = self._largest = read() or 0
        self._errors: list[pynvml.NVMLError] = []
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._sample, name="colm_scale-memory", daemon=True)
        self._thread.start()

    def mark(self) -> None:
        """Forget all readings but the last."""
        with self._lock:
            self._largest = self._last

    def largest(self) -> int:
        """Return the largest reading since the mark, and the last before it.

        Raises:
            pynvml.NVMLError: A reading has failed.
        """
        for error in self._errors:
            raise error
        return self._largest

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        try:
            while not self._ended.wait(_SAMPLE_SECONDS):
                reading = self._read()
                if reading is not None:
                    with self._lock:
                        self._last, self._largest = reading, max(self._largest, reading)
        except pynvml.NVMLError as error:
            self._errors.append(error)


class NvmlGauge:
    """Reads memory in use with NVML: this process's, or the whole device's if the driver does not list the process.

    In a container the driver may list outside process ids, and some drivers list no sizes. Readings then include other
    processes, and the label says so.
    """

    def __init__(self, handle: object):
        self._handle = handle
        self._own = self._used_by_process() is not None
        self.label = "GPU memory (allocator and NVML)"
        if not self._own:
            self.label = "GPU memory (allocator and NVML, with other processes on the device)"

    def read(self) -> int:
        if self._own:
            return self._used_by_process() or 0
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def _used_by_process(self) -> int | None:
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        sizes = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
        return None if not sizes or None in sizes else sum(sizes)


def _nvml_gauge(device: torch.device) -> NvmlGauge | None:
    """Return a gauge; None if NVML has no library, no driver, or no such device (ROCm)."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    try:
        pynvml.nvmlInit()
        return NvmlGauge(find_device(uuid, visible_as(device)))
    except pynvml.NVMLError:
        return None


def find_device(uuid: str, visible: str) -> object:
    """Find NVML's handle of a CUDA device.

    NVML ignores CUDA_VISIBLE_DEVICES in its numbering, so only the UUID identifies a device. Under MIG, CUDA reports
    the UUID of the slice or, in older versions, of the whole GPU.

    Args:
        uuid: As CUDA reports it, without a prefix.
        visible: The device's entry in CUDA_VISIBLE_DEVICES: an index, a UUID or the start of one, or empty.

    Raises:
        pynvml.NVMLError: NVML does not know the device.
    """
    named = [visible] if visible.startswith("MIG-") else []
    for name in [*named, f"GPU-{uuid}"]:
        with suppress(pynvml.NVMLError):
            return _shown_part(pynvml.nvmlDeviceGetHandleByUUID(name), visible)
    return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def _shown_part(device: object, visible: str) -> object:
    """Return the visible slice of a GPU in MIG mode (the named one, else the first); otherwise the device itself."""
    slices = _mig_slices(device)
    named = [part for part in slices if pynvml.nvmlDeviceGetUUID(part).startswith(visible)]
    return (named or slices or [device])[0]


def _mig_slices(gpu: object) -> list[object]:
    """List the MIG devices of a GPU; empty for a slice and without MIG mode."""
    slices: list[object] = []
    with suppress(pynvml.NVMLError):
        current, _ = pynvml.nvmlDeviceGetMigMode(gpu)
        count = pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu) if current == pynvml.NVML_DEVICE_MIG_ENABLE else 0
        for index in range(count):
            with suppress(pynvml.NVMLError):  # a place without a slice
                slices.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index))
    return slices
