from __future__ import annotations

import mmap
import os
import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import psutil
import pytest
import torch

from colm_scale.distributed.group import Group
from colm_scale.profiling import memory
from colm_scale.profiling.memory import NvmlGauge, ResidentMeter, SampledPeak, find_device, memory_meter

MIB = 2**20
UUID = "8932f937-d72c-4106-c12f-20bd9faed9f6"
SLICES = ("c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f", "1b0f9b5e-7b77-5b24-a1de-3a4d4a8f9f10")


@dataclass
class Device:
    uuid: str
    used: int = 0
    processes: dict[int, int | None] = field(default_factory=dict)
    slices: dict[int, Device] = field(default_factory=dict)


class FakeNvml:
    """What colm_scale uses of pynvml, over a list of devices."""

    class NVMLError(Exception):
        pass

    NVML_DEVICE_MIG_ENABLE = 1

    def __init__(self, *devices: Device, driver: bool = True):
        self.devices, self.driver = devices, driver

    def nvmlInit(self):
        if not self.driver:
            raise self.NVMLError("NVML Shared Library Not Found")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Device:
        every = [*self.devices, *(part for device in self.devices for part in device.slices.values())]
        return self._only([device for device in every if device.uuid == uuid])

    def nvmlDeviceGetMigMode(self, device: Device):
        if device.uuid.startswith("MIG-"):
            raise self.NVMLError("Invalid Argument")
        return [int(bool(device.slices)), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, device: Device) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Device, index: int) -> Device:
        return self._only([device.slices[index]] if index in device.slices else [])

    def nvmlDeviceGetUUID(self, device: Device) -> str:
        return device.uuid

    def nvmlDeviceGetComputeRunningProcesses(self, device: Device):
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in device.processes.items()]

    def nvmlDeviceGetMemoryInfo(self, device: Device):
        return SimpleNamespace(used=device.used)

    def _only(self, found: list[Device]) -> Device:
        if not found:
            raise self.NVMLError("Not Found")
        return found[0]


@pytest.fixture
def nvml(monkeypatch):
    def install(*devices: Device, driver: bool = True) -> None:
        monkeypatch.setattr(memory, "pynvml", FakeNvml(*devices, driver=driver))

    return install


class Allocator:
    """A caching allocator: blocks that it has taken from the device stay its own."""

    def __init__(self):
        self.reserved = self.peak = 5 * MIB

    def phase(self, peak: int) -> None:
        """The tensors of a phase take up to ``peak`` bytes."""
        self.peak, self.reserved = peak, max(self.reserved, peak)


@pytest.fixture
def gpu(monkeypatch):
    """The allocator of a CUDA device as torch shows it; it has seen a peak of 5 MiB."""
    allocator, properties = Allocator(), SimpleNamespace(uuid=UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake GPU")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocator.peak)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: allocator.reserved)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("the meter synchronised the device"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    made, sampled_peak = [], memory.SampledPeak
    monkeypatch.setattr(memory, "SampledPeak", lambda read: made.append(sampled_peak(read)) or made[-1])
    yield allocator
    for sampler in made:
        sampler.close()


def alone(index: int = 0) -> Group:
    return Group(0, 1, 0, 1, torch.device("cuda", index))


def mig_gpu() -> Device:
    """Slices at places 2 and 3; the others are empty."""
    return Device(f"GPU-{UUID}", slices={2 + i: Device(f"MIG-{uuid}") for i, uuid in enumerate(SLICES)})


@pytest.mark.parametrize("visible", ["", "1", f"GPU-{UUID}", "GPU-8932"])
def test_a_gpu_is_found_by_its_uuid_however_it_is_made_visible(nvml, visible):
    nvml(Device("GPU-00000000-0000-0000-0000-000000000000"), Device(f"GPU-{UUID}"))
    assert find_device(UUID, visible).uuid == f"GPU-{UUID}"


@pytest.mark.parametrize("reported", [UUID, SLICES[1]], ids=["uuid of the gpu", "uuid of the slice"])
@pytest.mark.parametrize("visible", [f"MIG-{SLICES[1]}", "MIG-1b0f"], ids=["full", "abbreviated"])
def test_a_named_slice_is_found(nvml, reported, visible):
    nvml(Device("GPU-0"), mig_gpu())
    assert find_device(reported, visible).uuid == f"MIG-{SLICES[1]}"


@pytest.mark.parametrize("visible", ["", "0", f"GPU-{UUID}"])
def test_of_an_unnamed_gpu_with_slices_the_first_is_taken(nvml, visible):
    nvml(mig_gpu())
    assert find_device(UUID, visible).uuid == f"MIG-{SLICES[0]}"


def test_an_unknown_device_is_an_nvml_error(nvml):
    nvml(Device("GPU-0"))
    with pytest.raises(FakeNvml.NVMLError, match="Not Found"):
        find_device(UUID, "")


def test_own_memory_is_read_where_the_process_is_listed(nvml):
    nvml()
    gauge = NvmlGauge(Device("GPU-0", used=900 * MIB, processes={1: 500 * MIB, os.getpid(): 300 * MIB}))
    assert gauge.read() == 300 * MIB
    assert gauge.label == "GPU memory (allocator and NVML)"


@pytest.mark.parametrize(
    "processes",
    [{}, {os.getpid() + 1: 300 * MIB}, {os.getpid(): None}],
    ids=["nobody listed", "other process numbers", "no size"],
)
def test_the_whole_device_is_read_where_the_process_is_not(nvml, processes):
    nvml()
    gauge = NvmlGauge(Device("GPU-0", used=900 * MIB, processes=processes))
    assert gauge.read() == 900 * MIB
    assert gauge.label == "GPU memory (allocator and NVML, with other processes on the device)"


CONTEXT = 7 * MIB
"""What a process has on a device beside the allocator's blocks."""


class NvmlDevice(Device):
    """A device on which this process has the allocator's blocks and ``beside`` them."""

    def __init__(self, allocator: Allocator, beside: int = CONTEXT, uuid: str = f"GPU-{UUID}"):
        super().__init__(uuid)
        self._allocator, self.beside, self.readings = allocator, beside, 0

    @property
    def processes(self) -> dict[int, int]:
        self.readings += 1
        return {os.getpid(): self._allocator.reserved + self.beside}

    @processes.setter
    def processes(self, _: object) -> None:
        """Set by the base class, and computed here."""


def read_twice_by_the_thread(device: NvmlDevice) -> None:
    """Wait until a whole reading has begun after this call."""
    goal, deadline = device.readings + 2, time.monotonic() + 30
    while device.readings < goal:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_phases_after_the_largest_report_their_own_peak(nvml, gpu):
    """NVML's figure is 97 MiB from the second phase on, because the allocator keeps what it has."""
    device = NvmlDevice(gpu)
    nvml(device)
    meter = memory_meter(alone())
    peaks = []
    for peak in (20, 90, 10, 30):
        meter.start()
        gpu.phase(peak * MIB)
        read_twice_by_the_thread(device)
        peaks.append(meter.stop())
    assert [found["allocator"] // MIB for found in peaks] == [20, 90, 10, 30]
    assert [found["device"] // MIB for found in peaks] == [27, 97, 17, 37]
    assert (meter.primary, meter.label, meter.device_name) == ("device", "GPU memory (allocator and NVML)", "Fake GPU")


def test_what_is_beside_the_allocator_counts_from_its_phase_on(nvml, gpu):
    """NCCL takes buffers at its first collective, and a library gives some back."""
    device = NvmlDevice(gpu)
    nvml(device)
    meter = memory_meter(alone())
    found = []
    for beside in (7, 40, 12):
        meter.start()
        device.beside = beside * MIB
        read_twice_by_the_thread(device)
        found.append((meter.stop()["device"] - 5 * MIB) // MIB)
    assert found == [7, 40, 40]
    meter.start()
    assert meter.stop()["device"] == (5 + 12) * MIB


def test_a_reading_while_the_allocator_grows_does_not_count(nvml, gpu):
    device = NvmlDevice(gpu)
    nvml(device)
    meter = memory_meter(alone())
    read, growing = NvmlGauge.read, []

    def slow(gauge: NvmlGauge) -> int:
        used = read(gauge)
        if growing:
            gpu.reserved += MIB
        return used

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NvmlGauge, "read", slow)
        growing.append(True)
        read_twice_by_the_thread(device)
        meter.start()
        read_twice_by_the_thread(device)
        assert meter.stop()["device"] == gpu.peak + CONTEXT


def test_one_thread_samples_all_phases(nvml, gpu):
    device = NvmlDevice(gpu)
    nvml(device)
    before = threading.active_count()
    meter = memory_meter(alone())
    for _ in range(3):
        meter.start()
        assert threading.active_count() == before + 1
        meter.stop()


def test_gpu_meter_reads_the_entry_of_its_own_device(nvml, gpu, monkeypatch):
    other, own = (NvmlDevice(gpu, size, f"MIG-{uuid}") for uuid, size in zip(SLICES, (1, 2)))
    nvml(other, own)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"MIG-{SLICES[0]}, MIG-{SLICES[1]}")
    meter = memory_meter(alone(1))
    meter.start()
    assert meter.stop()["device"] == 5 * MIB + 2


@pytest.mark.parametrize("driver", [False, True], ids=["no driver", "unknown device"])
def test_without_nvml_the_allocator_remains(nvml, gpu, driver):
    nvml(driver=driver)
    meter = memory_meter(alone())
    meter.start()
    assert meter.stop() == {"allocator": 5 * MIB}
    assert (meter.primary, meter.label) == ("allocator", "GPU memory (torch allocator)")


def test_a_failing_reading_is_an_error_at_the_end_of_the_phase(nvml):
    nvml()
    failed = threading.Event()
    readings = iter([10])

    def read() -> int:
        reading = next(readings, None)
        if reading is None:
            failed.set()
            raise FakeNvml.NVMLError("GPU is lost")
        return reading

    peak = SampledPeak(read)
    assert failed.wait(timeout=30)
    peak.close()
    with pytest.raises(FakeNvml.NVMLError, match="GPU is lost"):
        peak.largest()


def test_resident_peak_rises_in_its_phase_and_not_in_the_next():
    meter = memory_meter(Group(0, 1, 0, 1, torch.device("cpu")))
    if meter.label != "resident memory (CPU)":
        pytest.skip("the kernel does not let this process restart VmHWM")
    peaks = []
    for size in (1, 96, 1):
        meter.start()
        with mmap.mmap(-1, size * MIB) as block:  # given back to the kernel at once, unlike malloc's
            for page in range(0, size * MIB, mmap.PAGESIZE):
                block[page] = 1
        peaks.append(meter.stop()["resident"])
    # What Python itself allocates meanwhile is far below 16 MiB.
    assert peaks[1] - peaks[0] == pytest.approx(95 * MIB, abs=16 * MIB)
    assert peaks[2] == pytest.approx(peaks[0], abs=16 * MIB)
    assert meter.primary == "resident"


@pytest.mark.parametrize("missing", ["_CLEAR_REFS", "_STATUS"])
def test_resident_memory_without_a_peak_says_so(monkeypatch, tmp_path, missing):
    monkeypatch.setattr(memory, missing, tmp_path / "none" / "file")
    meter = ResidentMeter()
    meter.start()
    # Both are read from the same kernel count within a few calls: what lies between them is far below 16 MiB.
    assert meter.stop()["resident"] == pytest.approx(psutil.Process().memory_info().rss, abs=16 * MIB)
    assert meter.label == "resident memory (CPU, at the end of a phase)"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_real_gpu_both_kinds_see_an_allocation():
    device = torch.device("cuda", 0)
    held = torch.zeros(MIB, device=device)
    meter = memory_meter(alone())
    meter.start()
    block = torch.zeros(64 * MIB, dtype=torch.uint8, device=device)
    del block
    peaks = meter.stop()
    assert peaks["allocator"] >= 64 * MIB + held.nbytes
    assert peaks.get("device", peaks["allocator"]) >= peaks["allocator"]
