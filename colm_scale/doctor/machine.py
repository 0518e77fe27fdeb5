"""Checks of this machine: devices, NVML, compilers, attention, disks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from colm_scale.config.cache import CACHE_VARIABLE, cache_folder
from colm_scale.distributed.cores import usable_cores
from colm_scale.doctor.finding import Finding, Status
from colm_scale.reporting.environment import driver_version
from colm_scale.reporting.run_directory import nearest_folder

_GIB = 2**30
_SHARED_MEMORY = Path("/dev/shm")


def check_devices() -> list[Finding]:
    """List the GPUs that torch can use, or the reason why it can use none in spite of a driver."""
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        names = [f"{device.name} ({device.total_memory / _GIB:.0f} GiB)" for device in found]
        findings = [Finding("devices", "ok", ", ".join(names))]
        if not torch.cuda.is_bf16_supported():
            findings.append(Finding("devices", "warning", "no bfloat16", "use --train.dtype float16 or float32"))
        return findings
    cpus = f"no GPU; {usable_cores()} cores, {psutil.virtual_memory().total / _GIB:.0f} GiB of memory"
    driver = driver_version()
    if driver is None:
        return [Finding("devices", "ok", cpus)]
    if torch.version.cuda is None:
        what, way_out = f"this torch ({torch.__version__}) is built without CUDA", "install torch's CUDA build"
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return [Finding("devices", "warning", f"{cpus}: CUDA_VISIBLE_DEVICES hides all GPUs", "unset it to use them")]
    else:
        what = f"torch is built for CUDA {torch.version.cuda} and finds no GPU that it can use with this driver"
        way_out = "update the driver, or install a torch built for an older CUDA"
    return [Finding("devices", "problem", f"{what}, although there is an NVIDIA driver ({driver})", way_out)]


def check_nvml() -> list[Finding]:
    """Check that GPU memory can be read from the driver."""
    if driver := driver_version():
        return [Finding("NVML", "ok", f"driver {driver}")]
    if torch.cuda.is_available():
        what = "no answer: memory is read from torch's allocator, without the CUDA context and NCCL's buffers"
        way_out = "make libnvidia-ml.so.1 visible (in a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility)"
        return [Finding("NVML", "warning", what, way_out)]
    return [Finding("NVML", "ok", "not available, and not needed on CPUs")]


def check_allocator() -> list[Finding]:
    """Check that the allocator of GPU memory extends its blocks; others fragment, because lengths differ."""
    if not torch.cuda.is_available():
        return []
    given = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if "expandable_segments:true" in given.lower():
        return [Finding("allocator", "ok", given)]
    what = "blocks of fixed size, which micro-batches of different lengths fragment"
    return [Finding("allocator", "warning", what, "export PYTORCH_ALLOC_CONF=expandable_segments:True")]


def check_compiler() -> list[Finding]:
    """Look for the tools with which DeepSpeed builds its operators when an optimizer is first offloaded to the CPU."""
    if not find_spec("deepspeed"):
        return [Finding("compiler", "ok", "not checked: only deepspeed needs one, and it is not installed")]
    what = "DeepSpeed needs it to build its CPU optimizer (zero2_offload.json, zero3_offload.json)"
    found = [_tool("ninja", what, "pip install ninja"), _tool("g++", what, "install a C++ compiler (g++)")]
    return [*found, _cuda_toolkit()] if torch.version.cuda else found


def _tool(name: str, what: str, way_out: str) -> Finding:
    if place := shutil.which(name):
        return Finding(f"compiler: {name}", "ok", place)
    return Finding(f"compiler: {name}", "warning", f"not found; {what}", way_out)


def _cuda_toolkit() -> Finding:
    """Compare the CUDA version of nvcc with that of torch; DeepSpeed requires the same major version."""
    from torch.utils.cpp_extension import CUDA_HOME

    about, link = "compiler: nvcc", "https://www.deepspeed.ai/tutorials/advanced-install/"
    place = Path(CUDA_HOME or "/nonexistent") / "bin/nvcc"
    if not place.exists():
        what = f"no CUDA toolkit (CUDA_HOME is {CUDA_HOME or 'not set'}): DeepSpeed cannot build operators for GPUs"
        way_out = f"install the CUDA {torch.version.cuda} toolkit and set CUDA_HOME"
        return Finding(about, "warning", what, way_out, link)
    said = subprocess.run([str(place), "--version"], capture_output=True, text=True, timeout=20).stdout
    version = re.search(r"release (\d+)\.(\d+)", said)
    if not version:
        return Finding(about, "warning", f"{place} does not print its version")
    major = (torch.version.cuda or "").split(".")[0]
    what = f"{version[1]}.{version[2]} at {CUDA_HOME}, torch is built for {torch.version.cuda}"
    if version[1] != major:
        way_out = f"set CUDA_HOME to a CUDA {major} toolkit"
        return Finding(about, "problem", f"{what}: DeepSpeed refuses to build operators", way_out, link)
    return Finding(about, "ok", what)


def check_attention() -> list[Finding]:
    """Check that flash attention, if installed, can be loaded; runs do not require it."""
    names = [name for name, module in (("flash-attn", "flash_attn"), ("kernels", "kernels")) if find_spec(module)]
    if "flash-attn" in names and torch.cuda.is_available():
        try:
            __import__("flash_attn")
        except (ImportError, OSError) as error:
            what = f"flash-attn cannot be loaded: {str(error).splitlines()[0]}"
            return [Finding("attention", "problem", what, "build it against this torch, or uninstall it to use sdpa")]
    installed = f"{', '.join(names)} installed" if names else "sdpa; neither flash-attn nor kernels is installed"
    return [Finding("attention", "ok", installed)]


def check_disk(output_dir: str) -> list[Finding]:
    """Check that the output folder can be written and has free space."""
    nearest, writable = nearest_folder(Path(output_dir))
    if not writable:
        return [Finding("disk", "problem", f"{nearest} is not a writable folder", "use another --output_dir")]
    free = shutil.disk_usage(nearest).free / _GIB
    status: Status = "problem" if free < 1 else "warning" if free < 10 else "ok"
    way_out = "free some space, or use another --output_dir; colm-scale plan estimates the size of checkpoints"
    found = f"{free:.1f} GiB free for {output_dir}"
    return [Finding("disk", status, found, "" if status == "ok" else way_out)]


def check_shared_memory() -> list[Finding]:
    """Check the size of /dev/shm, which NCCL and data loaders use within a machine; containers often have 64 MB."""
    if not _SHARED_MEMORY.is_dir():
        return [Finding("shared memory", "warning", f"there is no {_SHARED_MEMORY}")]
    size = shutil.disk_usage(_SHARED_MEMORY).total / _GIB
    if size < 1 and torch.cuda.device_count() > 1:
        link = "https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html"
        what = f"{_SHARED_MEMORY} has {size:.2f} GiB: NCCL may fail between the GPUs of this machine"
        return [Finding("shared memory", "warning", what, "in a container, use --shm-size=1g or --ipc=host", link)]
    return [Finding("shared memory", "ok", f"{_SHARED_MEMORY} has {size:.2f} GiB")]


def check_caches(environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """Check that cache folders can be written."""
    home = Path(environ.get("HOME", "~")).expanduser()
    cache = Path(environ.get("XDG_CACHE_HOME", home / ".cache"))
    hub = Path(environ.get("HF_HOME", cache / "huggingface"))
    extensions = Path(environ.get("TORCH_EXTENSIONS_DIR", cache / "torch_extensions"))
    folders = {
        CACHE_VARIABLE: (cache_folder(environ), "tokenised data"),
        "HF_HOME": (hub, "models and data sets of the hub"),
        "TORCH_EXTENSIONS_DIR": (extensions, "DeepSpeed's operators"),
        "TRITON_CACHE_DIR": (Path(environ.get("TRITON_CACHE_DIR", home / ".triton")), "compiled kernels"),
    }
    return [_cache(name, *entry) for name, entry in folders.items()]


def _cache(variable: str, path: Path, what: str) -> Finding:
    if nearest_folder(path)[1]:
        return Finding(f"cache: {variable}", "ok", str(path))
    found = f"{path} cannot be written ({what})"
    return Finding(f"cache: {variable}", "warning", found, f"set {variable} to a writable folder")
