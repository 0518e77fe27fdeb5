"""Tensors of a model under any engine: the shards on this rank, and what training changes, whole from all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import psutil
import torch
from torch import Tensor, nn

from colm_scale.distributed.group import Group
from colm_scale.engines.base import WEIGHT, Engine, trainable


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


def collect(engine: Engine, *, keep: bool) -> dict[str, dict[str, Tensor]]:
    """Return all that training has changed: ``{"adapter": {name: weight}, "optimizer": {"key/name": average, ...}}``.

    All ranks call it together. Those with ``keep`` get float32 copies on the CPU, the others nothing.
    """
    found: dict[str, dict[str, Tensor]] = {"adapter": {}, "optimizer": {}}
    for name in trainable(engine.module):
        for file, label, key in _entries(engine, name):
            value = engine.read(name, key)
            if keep:
                found[file][label] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    return found


def restore(engine: Engine, tensors: Mapping[str, Mapping[str, Tensor]], group: Group) -> None:
    """Restore what `collect` returned. All ranks call it together; only rank 0's ``tensors`` count."""
    for name in trainable(engine.module):
        for file, label, key in _entries(engine, name):
            shape = engine.read(name, key).shape
            value = torch.empty(shape, device=group.device)
            if group.is_first:
                value.copy_(tensors[file][label])
            engine.write(name, key, group.broadcast(value, "control"))


def _entries(engine: Engine, name: str) -> list[tuple[str, str, str]]:
    """Return file, label and key of everything that is saved of an adapter tensor."""
    averages = [("optimizer", f"{key}/{name}", key) for key in engine.state_keys]
    return [("adapter", name, WEIGHT), *averages]
