"""Training without shards: in one process, or under DDP."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from colm_scale.config import TrainConfig
from colm_scale.distributed.group import Group
from colm_scale.engines.base import Engine
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.records import Batch


class TorchEngine(Engine):
    """Trains in one process, or with DistributedDataParallel one replica per rank."""

    def __init__(self, module: ExampleLoss, config: TrainConfig, group: Group):
        super().__init__(module, config, group.world_size)
        self.name = "ddp" if group.world_size > 1 else "single"
        self._wrapped: ExampleLoss | DistributedDataParallel = module
        if group.world_size > 1:
            # The frozen weights need not be sent: every rank has read the same files.
            for parameter in self._parameters.values():
                parameter.data.copy_(group.broadcast(parameter.data, "control"))
            self._wrapped = DistributedDataParallel(
                module,
                device_ids=[group.device.index] if group.device.type == "cuda" else None,
                init_sync=False,
                broadcast_buffers=False,  # they are equal and no training changes them
            )

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        # DDP decides in the forward whether the backward reduces.
        wrapped = self._wrapped
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else nullcontext()

    def forward(self, batch: Batch) -> Tensor:
        losses: Tensor = self._wrapped(batch)
        return losses

    def backward(self, loss: Tensor) -> None:
        (loss * (self._ranks * self.scale.scale)).backward()
