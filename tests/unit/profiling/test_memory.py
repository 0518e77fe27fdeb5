from __future__ import annotations

import mmap
import os
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import psutil
import pytest
import torch

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


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA device as torch shows it; its allocator has seen a peak of 5 MiB."""
    properties = SimpleNamespace(uuid=UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake GPU")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * MIB)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("the meter synchronised the device"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return properties


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
    assert gauge.label == "GPU memory (NVML)"


@pytest.mark.parametrize(
    "processes",
    [{}, {os.getpid() + 1: 300 * MIB}, {os.getpid(): None}],
    ids=["nobody listed", "other process numbers", "no size"],
)
def test_the_whole_device_is_read_where_the_process_is_not(nvml, processes):
    nvml()
    gauge = NvmlGauge(Device("GPU-0", used=900 * MIB, processes=processes))
    assert gauge.read() == 900 * MIB
    assert gauge.label == "GPU memory (NVML, all processes on the device)"


def test_gpu_meter_reports_both_kinds(nvml, gpu):
    device = Device(f"GPU-{UUID}", processes={os.getpid(): 300 * MIB})
    nvml(device)
    meter = memory_meter(torch.device("cuda", 0))
    meter.start()
    device.processes[os.getpid()] = 400 * MIB
    assert meter.stop() == {"allocator": 5 * MIB, "nvml": 400 * MIB}
    assert (meter.primary, meter.label, meter.device_name) == ("nvml", "GPU memory (NVML)", "Fake GPU")


def test_gpu_meter_starts_again_each_phase(nvml, gpu):
    device = Device(f"GPU-{UUID}", processes={os.getpid(): 300 * MIB})
    nvml(device)
    meter = memory_meter(torch.device("cuda", 0))
    peaks = []
    for before in (400, 100):
        device.processes[os.getpid()] = before * MIB
        meter.start()
        device.processes[os.getpid()] = 200 * MIB
        peaks.append(meter.stop()["nvml"])
    assert peaks == [400 * MIB, 200 * MIB]


def test_gpu_meter_reads_the_entry_of_its_own_device(nvml, gpu, monkeypatch):
    other, own = (Device(f"MIG-{uuid}", processes={os.getpid(): size}) for uuid, size in zip(SLICES, (1, 2)))
    nvml(other, own)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"MIG-{SLICES[0]}, MIG-{SLICES[1]}")
    meter = memory_meter(torch.device("cuda", 1))
    meter.start()
    assert meter.stop()["nvml"] == 2


@pytest.mark.parametrize("driver", [False, True], ids=["no driver", "unknown device"])
def test_without_nvml_the_allocator_remains(nvml, gpu, driver):
    nvml(driver=driver)
    meter = memory_meter(torch.device("cuda", 0))
    meter.start()
    assert meter.stop() == {"allocator": 5 * MIB}
    assert (meter.primary, meter.label) == ("allocator", "GPU memory (torch allocator)")


def test_a_peak_between_start_and_stop_is_sampled():
    sampled = threading.Event()
    readings = iter([10, 70])

    def read() -> int:
        reading = next(readings, None)
        if reading is None:
            sampled.set()
            return 20
        return reading

    peak = SampledPeak(read)
    assert sampled.wait(timeout=30)
    assert peak.stop() == 70


def test_an_error_while_sampling_is_raised_at_the_end_of_the_phase(nvml):
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
    with pytest.raises(FakeNvml.NVMLError, match="GPU is lost"):
        peak.stop()


def test_resident_peak_rises_in_its_phase_and_not_in_the_next():
    meter = memory_meter(torch.device("cpu"))
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
    meter = memory_meter(device)
    meter.start()
    block = torch.zeros(64 * MIB, dtype=torch.uint8, device=device)
    del block
    peaks = meter.stop()
    assert peaks["allocator"] >= 64 * MIB + held.nbytes
    assert peaks.get("nvml", peaks["allocator"]) >= peaks["allocator"]
