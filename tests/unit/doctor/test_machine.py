"""Checks of the machine, with the outermost calls replaced."""

from __future__ import annotations

import shutil
import subprocess
from collections import namedtuple
from types import SimpleNamespace

import psutil
import pynvml
import pytest
import torch

from colm_scale.doctor import machine

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def gpus(monkeypatch):
    device = SimpleNamespace(name="H100", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)


def nvml(monkeypatch, version: str | None) -> None:
    def init() -> None:
        if version is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", init)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: version)


def test_gpus_are_named_and_what_they_lack(gpus):
    found = machine.check_devices()
    assert [(finding.status, finding.what) for finding in found] == [
        ("ok", "H100 (80 GiB), H100 (80 GiB)"),
        ("warning", "no bfloat16"),
    ]


def test_the_allocator_extends_its_blocks_or_not(gpus, monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    option = "expandable_segments:"
    for given, status in ((f"{option}True", "ok"), ("", "warning"), (f"{option}False", "warning")):
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", given)
        (found,) = machine.check_allocator()
        assert found.status == status
    assert found.way_out == "export PYTORCH_ALLOC_CONF=expandable_segments:True"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.check_allocator() == []


@pytest.mark.parametrize(
    ("cuda", "visible", "status", "words"),
    [
        (None, None, "problem", "built without CUDA"),
        ("13.0", None, "problem", "built for CUDA 13.0"),
        ("13.0", "", "warning", "CUDA_VISIBLE_DEVICES hides all GPUs"),
    ],
)
def test_a_driver_whose_gpus_torch_cannot_use(monkeypatch, cuda, visible, status, words):
    nvml(monkeypatch, "570.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (found,) = machine.check_devices()
    assert found.status == status
    assert words in found.what
    assert found.way_out


def test_cpus_alone_are_no_problem(monkeypatch):
    nvml(monkeypatch, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [finding.status for finding in (*machine.check_devices(), *machine.check_nvml())] == ["ok", "ok"]
    assert f"{psutil.virtual_memory().total / 2**30:.0f} GiB" in machine.check_devices()[0].what


def test_a_gpu_without_nvml_is_a_warning(monkeypatch, gpus):
    nvml(monkeypatch, None)
    (found,) = machine.check_nvml()
    assert found.status == "warning"
    assert "allocator" in found.what
    nvml(monkeypatch, "570.1")
    assert machine.check_nvml()[0].what == "driver 570.1"


def test_the_compiler_is_asked_for_only_where_deepspeed_is(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert [finding.status for finding in machine.check_compiler()] == ["warning", "warning"]
    monkeypatch.setattr(machine, "find_spec", lambda _: None)
    (found,) = machine.check_compiler()
    assert (found.status, "not installed" in found.what) == ("ok", True)


@pytest.mark.parametrize(("nvcc", "status"), [("12.8", "problem"), ("13.1", "ok"), (None, "warning")])
def test_the_cuda_toolkit_must_have_torch_s_major_version(monkeypatch, tmp_path, nvcc, status):
    import torch.utils.cpp_extension

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", str(tmp_path))
    if nvcc:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/nvcc").touch()
    said = SimpleNamespace(stdout=f"Cuda compilation tools, release {nvcc}, V{nvcc}.1")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
    found = machine.check_compiler()[-1]
    assert (found.about, found.status) == ("compiler: nvcc", status)


@pytest.mark.parametrize(("free", "status"), [(0.5, "problem"), (5, "warning"), (50, "ok")])
def test_room_for_runs(monkeypatch, tmp_path, free, status):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free * 2**30))
    (found,) = machine.check_disk(str(tmp_path / "not/yet/there"))
    assert found.status == status


def test_a_file_in_the_way_of_the_runs(tmp_path):
    (tmp_path / "file").touch()
    (found,) = machine.check_disk(str(tmp_path / "file/runs"))
    assert found.status == "problem"


def test_little_shared_memory_matters_to_several_gpus(monkeypatch, gpus):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**26, 0, 2**26))
    assert machine.check_shared_memory()[0].status == "warning"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert machine.check_shared_memory()[0].status == "ok"


def test_caches_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    environ = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "file/hub"), "TRITON_CACHE_DIR": str(tmp_path)}
    found = {finding.about: finding for finding in machine.check_caches(environ)}
    statuses = {about: finding.status for about, finding in found.items()}
    names = ("COLM_SCALE_CACHE", "HF_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")
    assert statuses == dict(zip((f"cache: {name}" for name in names), ("ok", "warning", "ok", "ok")))
    assert "set HF_HOME" in found["cache: HF_HOME"].way_out


def test_flash_attention_that_cannot_be_loaded(monkeypatch, gpus, tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c104')")
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = machine.check_attention()
    assert found.status == "problem"
    assert "undefined symbol" in found.what
