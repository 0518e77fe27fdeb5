"""Training under FSDP2. Every decoder block is a unit: its weights are gathered when it runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from colm_scale.config import FsdpConfig, TrainConfig
from colm_scale.distributed.group import Group
from colm_scale.engines.base import Engine, Part
from colm_scale.engines.tensors import all_have_room
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import decoder_blocks
from colm_scale.modeling.weights import WHOLE, Weights
from colm_scale.records import Batch


def units(model: nn.Module) -> list[nn.Module | list[nn.Module]]:
    """List the modules that are gathered at a time: each decoder block, every other module with its own weights
    (modules that share a weight together), and last the model.

    Embedding, norm and head are no single unit: its backward gathering waits for the gradient of the logits, and there
    is none because the loss is computed from the head's input.
    """
    blocks = list(decoder_blocks(model)[1])
    inside = {module for block in blocks for module in block.modules()} | {model}
    sharing: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        weights = list(module.parameters(recurse=False))
        if module not in inside and weights:
            others = next((sharing[weight] for weight in weights if weight in sharing), [])
            others.append(module)
            sharing |= dict.fromkeys(weights, others)
    groups = {id(modules): modules for modules in sharing.values()}
    return [*blocks, *groups.values(), model]


def mesh_of(group: Group) -> DeviceMesh:
    """Make a one-dimensional mesh of all ranks."""
    group.ensure_process_group()
    return init_device_mesh(group.device.type, (group.world_size,))


@contextmanager
def among_absent_ranks(world_size: int) -> Iterator[tuple[Group, DeviceMesh]]:
    """Act as rank 0 of a fake process group, whose collectives return at once. For tracing memory."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cpu = torch.device("cpu")
    group = Group(rank=0, world_size=world_size, local_rank=0, local_world_size=world_size, device=cpu)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield group, mesh_of(group)
    finally:
        dist.destroy_process_group()


class FsdpEngine(Engine):
    """Trains with `fully_shard`. The model comes on the CPU, or without its weights, and moves to the device block by
    block.

    The root is the causal language model itself, not the loss module around it, so that generation gathers too.
    """

    name = "fsdp"
    is_sharded = True

    def __init__(
        self,
        module: ExampleLoss,
        train: TrainConfig,
        fsdp: FsdpConfig,
        group: Group,
        mesh: DeviceMesh,
        weights: Weights = WHOLE,
    ):
        self._device, self._group = group.device, group
        self._reshard = fsdp.reshard_after_forward
        precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        offload = CPUOffloadPolicy(pin_memory=group.device.type == "cuda") if fsdp.cpu_offload else OffloadPolicy()
        root = module.causal_model
        for unit in units(root):
            weights.fill(unit)
            fully_shard(
                unit,
                mesh=mesh,
                reshard_after_forward=self._reshard,
                mp_policy=precision,
                offload_policy=offload,
            )
        assert isinstance(root, FSDPModule)
        self._root: FSDPModule = root
        super().__init__(module, train, group.world_size)  # makes the optimizer over the shards

    def forward(self, batch: Batch) -> Tensor:
        losses: Tensor = self.module(batch)
        return losses

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        self._root.set_is_last_backward(last)
        self._root.set_requires_gradient_sync(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        (loss * (self._ranks * self.scale.scale)).backward()

    @contextmanager
    def gathered(self) -> Iterator[bool]:
        if not all_have_room(self.module, self._group):
            yield False
            return
        sharded = [module for module in self.module.causal_model.modules() if isinstance(module, FSDPModule)]
        self._root.set_reshard_after_forward(False)
        for module in sharded:
            module.unshard()
        try:
            yield True
        finally:
            self._root.set_reshard_after_forward(self._reshard)
            for module in sharded:
                module.reshard()

    def part(self, name: str, key: str) -> Part:
        # Rows are cut as by `torch.chunk`; a last rank may have none.
        tensor = _as_sharded(self._tensor(name, key).detach())
        rows, width = len(tensor), tensor.shape[1:].numel()
        start = min(rows, self._group.rank * math.ceil(rows / self._ranks))
        return Part(tensor.shape, start * width, tensor.to_local().flatten())

    @torch.no_grad()
    def write(self, name: str, key: str, value: Tensor) -> None:
        tensor = _as_sharded(self._tensor(name, key))
        value = value.to(self._device, tensor.dtype)
        whole = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.to_local().copy_(whole.to_local())


def _as_sharded(tensor: Tensor) -> DTensor:
    assert isinstance(tensor, DTensor)
    return tensor
