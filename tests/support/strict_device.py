"""A device for tests that computes on the CPU and is as strict as a GPU: it refuses to mix devices, and notes every
place where the host waits for it.

`install` makes the device ``strict`` in this process, for good: start a process for it (`support.strict_runs`). It is
torch's PrivateUse1 backend in Python. The memory of its tensors is the CPU's, and an operation runs on CPU tensors that
share it, so all numbers are those of the CPU. As under CUDA,

- operations on tensors of both devices raise, except for numbers without dimension from the CPU, copies, and indices;
- random numbers of the device come from its own generator, and another one raises;
- a copy to the host without blocking ends in pinned memory, which has its values only after an event or a read.

What it does not have: kernels of its own (flash attention), several streams, the allocator's statistics, autocast.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.weak import WeakIdKeyDictionary

import colm_scale

NAME = "strict"
PACKAGE = str(Path(colm_scale.__file__).parent)
_TORCH = str(Path(torch.__file__).parent)
NOT_THE_PRODUCT = {__file__, warnings.__file__}
"""Files that a stack of a read leaves out, beside torch's."""
_CPU, _EXTENSION = 1, 12
"""Device types of DLPack."""
_WAITS = {
    *("nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
    *("bincount", "equal", "multinomial", "_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_lstsq"),
}
"""Operations whose CUDA kernels wait for a number from the device, mostly the size of their result."""
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


@dataclass(frozen=True)
class Read:
    """A place where the host waited for the device.

    Attributes:
        phase: Of the step, from `Recorder.enter`.
        kind: ``item``, ``copy to host``, ``copy to device`` (of memory that is not pinned, or blocking), ``mask``,
            ``event``, or the name of an operation.
        site: File and function in the package; of another library if none of the package is on the stack.
        where: Line there, and the innermost one outside torch.
    """

    phase: str
    kind: str
    site: str
    where: str


class Recorder:
    """All reads, in order."""

    def __init__(self) -> None:
        self.reads: list[Read] = []
        self._phase = ""

    def enter(self, phase: str) -> None:
        self._phase = phase

    def note(self, kind: str) -> None:
        frames = _frames()
        of_package = next(((file, line, name) for file, line, name in frames if file.startswith(PACKAGE)), frames[0])
        file, line, name = of_package
        site = f"{file.removeprefix(PACKAGE + '/').rpartition('site-packages/')[2]}:{name}"
        inner = "" if of_package == frames[0] else f" through {frames[0][0]}:{frames[0][1]}"
        self.reads.append(Read(self._phase, kind, site, f"{file}:{line}{inner}"))


def _frames() -> list[tuple[str, int, str]]:
    """File, line and function of the stack outside torch and this module, innermost first."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        helper = file == f"{PACKAGE}/records.py" and frame.f_code.co_name in ("on_device", "on_host")
        if file not in NOT_THE_PRODUCT and not file.startswith(_TORCH) and not helper:
            found.append((file, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return found or [("autograd", 0, "thread")]


recorder = Recorder()
_pinned = WeakIdKeyDictionary()
_late: list[tuple[Tensor, Tensor]] = []
"""Copies to pinned memory that have not ended: the target, and the values."""
_generator = torch.Generator()
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _shared(tensor: Tensor, kind: int) -> Tensor:
    """The tensor as one of the other device in the same memory."""
    capsule = torch._C._to_dlpack(tensor)
    ctypes.c_int32.from_address(_pointer(capsule, b"dltensor") + 8).value = kind
    return torch._C._from_dlpack(capsule)


def _is_here(tensor: Tensor) -> bool:
    return tensor.device.type == NAME


def _host(tensor: Tensor) -> Tensor:
    return _shared(tensor, _CPU) if _is_here(tensor) else tensor


def _waited(kind: str) -> None:
    """The host waits until the device has done everything so far."""
    recorder.note(kind)
    settle()


def settle() -> None:
    """End all copies to pinned memory, as waiting for the device or for an event does."""
    for target, values in _late:
        target.copy_(values)
    _late.clear()


def is_pinned(tensor: Tensor, device: object = None) -> bool:
    return tensor.untyped_storage() in _pinned


def pin_memory(tensor: Tensor, device: object = None) -> Tensor:
    if _is_here(tensor):
        raise RuntimeError(f"cannot pin '{tensor.type()}' only dense CPU tensors can be pinned")
    if is_pinned(tensor):
        return tensor
    copy = tensor.clone()
    _pinned[copy.untyped_storage()] = True
    return copy


def _copied(target: Tensor, source: Tensor, non_blocking: bool) -> None:
    """Copy between the devices, or on this one."""
    if not source.numel():
        return
    if _is_here(target) and not _is_here(source):
        if not (non_blocking and is_pinned(source)):
            _waited("copy to device")
    elif _is_here(source) and not _is_here(target):
        if non_blocking and is_pinned(target):
            values = _host(source).clone()
            target.fill_(torch.nan if target.is_floating_point() else 77)
            _late.append((target, values))
            return
        _waited("copy to host")
    _host(target).copy_(_host(source))


def _fallback(op: Any, *args: object, **kwargs: object) -> object:
    """Run an operation on the CPU, on the memory of its arguments."""
    name = op._schema.name.removeprefix("aten::")
    lent: list[tuple[Tensor, Tensor]] = []
    on_host, options = _lend(args, lent), {key: _lend(value, lent) for key, value in kwargs.items()}
    for place in _tensors_of(op):
        if place < len(args) and isinstance(args[place], (int, float)):  # torch has unpacked a wrapped number
            wide = any(own.dtype == torch.float64 for own, _ in lent) and isinstance(args[place], float)
            on_host[place] = torch.tensor(args[place], dtype=torch.float64 if wide else None)
    if name in ("resize_", "set_"):
        raise NotImplementedError(f"{NAME} has no {name}")
    if name in _INDEXING:
        _check_indices(*args[:3])
    elif any(own is alias and own.ndim for own, alias in lent):
        devices = ", ".join(str(own.device) for own, _ in lent)
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found {devices}")
    if name in _WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        _waited(name)
    if "device" in options:
        options["device"] = torch.device("cpu")
    if torch.Tag.nondeterministic_seeded in op.tags:
        _give_generator(op, args, options)
    found = op(*on_host, **options)
    owners = {}
    for own, alias in lent:
        owners[id(alias)] = own
        if own.shape != alias.shape:
            own.data = _shared(alias, _EXTENSION)
    return _given_back(found, owners)


@functools.cache
def _tensors_of(op: Any) -> tuple[int, ...]:
    """The places of the arguments that are tensors."""
    return tuple(place for place, one in enumerate(op._schema.arguments) if str(one.type) == "Tensor")


def _lend(value: Any, lent: list[tuple[Tensor, Tensor]]) -> Any:
    """A value with its tensors on the CPU; all tensors are added to ``lent``, with those that stand for them."""
    if isinstance(value, Tensor):
        alias = value
        if _is_here(value):  # an empty one may be an output that the operation makes larger
            alias = _shared(value, _CPU) if value.numel() else torch.empty(value.shape, dtype=value.dtype)
        lent.append((value, alias))
        return alias
    return [_lend(part, lent) for part in value] if isinstance(value, (list, tuple)) else value


def _given_back(value: Any, owners: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return owners[id(value)] if id(value) in owners else _shared(value, _EXTENSION)
    return type(value)(_given_back(part, owners) for part in value) if type(value) in (list, tuple) else value


def _check_indices(indexed: Tensor, indices: list[Tensor | None], values: Tensor | None = None) -> None:
    indices = [index for index in indices if index is not None]
    if not _is_here(indexed):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if values is not None and not _is_here(values) and values.ndim:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME} and cpu")
    for index in indices:
        if not _is_here(index) and index.numel():
            _waited("copy to device")
        # A mask that takes one number needs no indices.
        if index.dtype in (torch.bool, torch.uint8) and (values is None or values.ndim):
            _waited("mask")


def _give_generator(op: Any, args: tuple[object, ...], options: dict[str, object]) -> None:
    """Let a random operation draw from the device's generator."""
    if any(argument.name == "generator" for argument in op._schema.arguments):
        positional = next((leaf for leaf in args if isinstance(leaf, torch.Generator)), None)
        if positional is not None or options.get("generator") is not None:
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
        options["generator"] = _generator


def _empty(size: list[int], **options: Any) -> Tensor:
    return _shared(torch.empty(size, **{**options, "device": None, "pin_memory": False}), _EXTENSION)


def _empty_strided(size: list[int], stride: list[int], **options: Any) -> Tensor:
    return _shared(torch.empty_strided(size, stride, **{**options, "device": None, "pin_memory": False}), _EXTENSION)


def _to_copy(
    tensor: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: object = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    device = device or tensor.device
    if memory_format is None or memory_format == torch.preserve_format:
        target = torch.empty_like(_host(tensor), dtype=dtype)
    else:
        target = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, memory_format=memory_format)
    if device.type == NAME:
        target = _shared(target, _EXTENSION)
    elif non_blocking:  # as torch does
        _pinned[target.untyped_storage()] = True
    _copied(target, tensor, non_blocking)
    return target


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    _copied(target, source, non_blocking)
    return target


def _item(tensor: Tensor) -> bool | int | float | complex:
    _waited("item")
    return _host(tensor).item()


class Event:
    """A place in the device's only stream."""

    def __init__(self, *, enable_timing: bool = False, blocking: bool = False):
        self._recorded = False

    def record(self, stream: object = None) -> None:
        self._recorded = True

    def query(self) -> bool:
        return not _late

    def wait(self, stream: object = None) -> None:
        """The stream waits for itself."""

    def synchronize(self) -> None:
        if self._recorded:
            _waited("event")

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class Stream:
    """The device's only stream."""

    def __init__(self, device: object = None, priority: int = 0):
        self.device = torch.device(NAME, 0)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def wait_event(self, event: Event) -> None:
        """It waits for itself."""

    def wait_stream(self, stream: Stream) -> None:
        """It waits for itself."""

    def synchronize(self) -> None:
        _waited("synchronize")


def _module() -> SimpleNamespace:
    """The functions that ``torch.cuda`` has too."""
    return SimpleNamespace(
        Event=Event,
        Stream=Stream,
        current_stream=lambda _device=None: Stream(),
        stream=lambda _stream: contextlib.nullcontext(),
        current_device=lambda: 0,
        device_count=lambda: 1,
        set_device=lambda _device: None,
        is_available=lambda: True,
        is_initialized=lambda: True,
        synchronize=lambda _device=None: _waited("synchronize"),
        get_rng_state=lambda _device=None: _generator.get_state(),
        set_rng_state=lambda state, _device=None: _generator.set_state(state),
        manual_seed_all=_generator.manual_seed,
        _is_in_bad_fork=lambda: False,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
    )


_libraries: list[torch.library.Library] = []


def install() -> torch.device:
    """Make the device in this process."""
    if not _libraries:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_module())
        everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        everything.fallback(_fallback, "PrivateUse1")
        kernels: dict[str, Callable[..., object]] = {
            "empty.memory_format": _empty,
            "empty_strided": _empty_strided,
            "_to_copy": _to_copy,
            "copy_": _copy_,
            "_local_scalar_dense": _item,
            # Otherwise torch itself moves the indices, and would do so twice.
            "index.Tensor": functools.partial(_fallback, torch.ops.aten.index.Tensor),
        }
        for name, kernel in kernels.items():
            aten.impl(name, kernel, "PrivateUse1")
        torch.Tensor.pin_memory, torch.Tensor.is_pinned = pin_memory, is_pinned
        empty, deepcopy = torch.empty, torch.Tensor.__deepcopy__

        def made(*size: object, pin_memory: bool = False, **options: Any) -> Tensor:
            found = empty(*size, **options)
            return globals()["pin_memory"](found) if pin_memory else found

        def copied(tensor: Tensor, memo: dict[int, object]) -> Tensor:
            if not _is_here(tensor):
                return deepcopy(tensor, memo)
            return memo.setdefault(id(tensor), tensor.detach().clone())

        torch.empty, torch.Tensor.__deepcopy__ = made, copied
        _libraries.extend((everything, aten))
    return torch.device(NAME, 0)
