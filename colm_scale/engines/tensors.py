"""Tensors of a model under any engine: the shards on this rank, and what training changes, whole from all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import psutil
import torch
from torch import Tensor, nn

from colm_scale.distributed.group import Group
from colm_scale.engines.base import WEIGHT, Engine, Part, trainable

_BUCKET = 2**24
"""Numbers that are collected at a time: 64 MiB."""


def local_tensors(parameter: nn.Parameter) -> list[Tensor]:
    """Return a parameter's tensors on this rank: the whole, an FSDP2 shard, or a ZeRO-3 shard (and the whole too while
    it is gathered)."""
    if hasattr(parameter, "ds_tensor") and hasattr(parameter, "ds_numel"):
        gathered = [parameter.data] if parameter.data.numel() == parameter.ds_numel else []
        return [parameter.ds_tensor, *gathered]
    return [parameter.to_local() if hasattr(parameter, "to_local") else parameter.data]


def held_bytes(module: nn.Module) -> int:
    """Count the bytes of parameters that this rank holds between steps; tied weights count once."""
    tensors = [tensor for parameter in module.parameters() for tensor in local_tensors(parameter)]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def all_have_room(module: nn.Module, group: Group) -> bool:
    """Return whether all weights fit into half of what is free on every rank; the other half is for running them.

    All ranks call it together.
    """
    sizes = ((getattr(weight, "ds_numel", weight.numel()), weight.element_size()) for weight in module.parameters())
    missing = sum(numbers * size for numbers, size in sizes) - held_bytes(module)
    return not group.any(missing > free_bytes(group) / 2)


def free_bytes(group: Group) -> int:
    """Count the free bytes of this rank's device, those in the allocator's cache too; of a CPU, this rank's share."""
    if group.device.type != "cuda":
        available: int = psutil.virtual_memory().available
        return available // group.local_world_size
    cached = torch.cuda.memory_reserved(group.device) - torch.cuda.memory_allocated(group.device)
    return torch.cuda.mem_get_info(group.device)[0] + cached


@torch.no_grad()
def collect(engine: Engine, group: Group) -> dict[str, dict[str, Tensor]]:
    """Return all that training has changed: ``{"adapter": {name: weight}, "optimizer": {"key/name": average, ...}}``.

    All ranks call it together. The first gets float32 copies in CPU memory of their own, the others nothing. From a GPU
    these are copies in flight, to pinned memory: read them after `landing`.
    """
    found: dict[str, dict[str, Tensor]] = {"adapter": {}, "optimizer": {}}
    if engine.is_sharded or group.is_first:
        for bucket in _buckets(engine):
            parts = [part for _, _, part in bucket]
            whole = _gathered(parts, group) if engine.is_sharded else torch.cat([part.values for part in parts])
            if group.is_first:
                whole = whole.to("cpu", non_blocking=True)
                for (file, label, part), values in zip(bucket, whole.split([part.shape.numel() for part in parts])):
                    found[file][label] = values.view(part.shape)
    return found


def to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor into CPU memory of its own; from a GPU in flight, see `landing`."""
    return tensor.detach().to("cpu", non_blocking=True, copy=True, memory_format=torch.contiguous_format)


def landing(device: torch.device) -> Callable[[], None]:
    """Return a function that waits for the copies from ``device`` that have begun, and for no later work there."""
    if device.type == "cpu":
        return lambda: None
    event = torch.get_device_module(device).Event()
    event.record()
    wait: Callable[[], None] = event.synchronize
    return wait


def restore(engine: Engine, tensors: Mapping[str, Mapping[str, Tensor]], group: Group) -> None:
    """Restore what `collect` returned. All ranks call it together; only rank 0's ``tensors`` count."""
    for name in trainable(engine.module):
        for file, label, key in _entries(engine, name):
            value = torch.empty(engine.part(name, key).shape, device=group.device)
            if group.is_first:
                value.copy_(tensors[file][label])
            engine.write(name, key, group.broadcast(value, "control"))


def _entries(engine: Engine, name: str) -> list[tuple[str, str, str]]:
    """Return file, label and key of everything that is saved of an adapter tensor."""
    averages = [("optimizer", f"{key}/{name}", key) for key in engine.state_keys]
    return [("adapter", name, WEIGHT), *averages]


def _buckets(engine: Engine) -> Iterator[list[tuple[str, str, Part]]]:
    """Yield file, label and this rank's part of all that is saved, in pieces of about `_BUCKET` numbers of the whole.

    One exchange for each tensor would cost more than their bytes: adapters are hundreds of small tensors.
    """
    bucket: list[tuple[str, str, Part]] = []
    size = 0
    for name in trainable(engine.module):
        for file, label, key in _entries(engine, name):
            part = engine.part(name, key)
            if bucket and size + part.shape.numel() > _BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append((file, label, part))
            size += part.shape.numel()
    yield bucket


def _gathered(parts: Sequence[Part], group: Group) -> Tensor:
    """Return the whole tensors of all ranks' ``parts``, flattened and joined, on the first rank."""
    joined = torch.zeros(sum(part.shape.numel() for part in parts), device=group.device)
    for part, place in zip(parts, joined.split([part.shape.numel() for part in parts])):
        place[part.start :][: len(part.values)] = part.values
    # Summed as integers, one of which is not zero: floats would lose the sign of -0.0.
    return group.reduce(joined.view(torch.int32), "control").view(torch.float32)
