"""What a rank holds of a parameter, whatever shards it."""

from __future__ import annotations

from torch import Tensor, nn


def local_tensors(parameter: nn.Parameter) -> list[Tensor]:
    """The tensors behind a parameter on this rank: all of it, an FSDP2 shard, or a ZeRO-3 shard (and, while it is
    gathered, the whole)."""
    if hasattr(parameter, "ds_tensor") and hasattr(parameter, "ds_numel"):
        gathered = [parameter.data] if parameter.data.numel() == parameter.ds_numel else []
        return [parameter.ds_tensor, *gathered]
    return [parameter.to_local() if hasattr(parameter, "to_local") else parameter.data]


def held_bytes(module: nn.Module) -> int:
    """Bytes of a model's parameters that this rank holds between steps; tied weights count once."""
    tensors = [tensor for parameter in module.parameters() for tensor in local_tensors(parameter)]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())
