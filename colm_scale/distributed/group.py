"""The ranks of a run and their collectives. With one rank every operation is the identity.

Only this folder and the engines use torch.distributed. Exchanges are fixed-size tensors, never pickled objects, and
each adds its payload bytes to `Group.traffic` under the label of its stage.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from colm_scale.errors import TrainingError, UserError
from colm_scale.records import on_device

_COUNT = "_get_sequence_number_for_group"
"""Method that returns the number of collectives a backend has started; not in torch's types."""
_Plain = TypeVar("_Plain")
# torch 2.13 renamed these two and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class PeerFailed(RuntimeError):
    """Another rank failed and has reported why; this one only has to end."""


@dataclass(slots=True)
class Group:
    """One rank's view of the run.

    Attributes:
        rank, world_size: Rank and number of all ranks.
        local_rank, local_world_size: Rank and number of those on this machine.
        device: Device of this rank.
        attempt: Name of this start of the ranks; after a restart by the launcher it is another.
        cores: Number of cores for this rank to use, see `cores.own_share`.
        traffic: Payload bytes per label since the last `take_traffic`: output of a gather, input of a reduction or
            broadcast. Equal on every rank.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    attempt: str = ""
    cores: int = 1
    traffic: Counter[str] = field(default_factory=Counter)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def all_gather(self, tensor: Tensor, label: str) -> Tensor:
        """Gather ``[...]`` of each rank to ``[W, ...]`` on all."""
        if self.world_size == 1:
            return tensor.unsqueeze(0)
        gathered = tensor.new_empty((self.world_size * tensor.shape[0], *tensor.shape[1:]))
        _all_gather(gathered, tensor.contiguous())
        self._count(label, gathered)
        return gathered.view(self.world_size, *tensor.shape)

    def reduce_scatter(self, tensor: Tensor, label: str) -> Tensor:
        """Sum ``[W * k, ...]`` over ranks, and return the rows ``[k, ...]`` that this rank owns."""
        if self.world_size == 1:
            return tensor
        own = tensor.new_empty((tensor.shape[0] // self.world_size, *tensor.shape[1:]))
        _reduce_scatter(own, tensor.contiguous())
        self._count(label, tensor)
        return own

    def all_reduce(self, tensor: Tensor, label: str, *, largest: bool = False) -> Tensor:
        """Return the elementwise sum (or largest value) over ranks."""
        if self.world_size == 1:
            return tensor
        tensor = tensor.contiguous().clone()
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        self._count(label, tensor)
        return tensor

    def reduce(self, tensor: Tensor, label: str) -> Tensor:
        """Return the elementwise sum over ranks on the first, anything on the others. Overwrites ``tensor``."""
        if self.world_size > 1:
            dist.reduce(tensor, dst=0)
            self._count(label, tensor)
        return tensor

    def broadcast(self, tensor: Tensor, label: str, source: int = 0) -> Tensor:
        """Return the tensor of rank ``source`` on every rank; the others pass one of the same shape and type."""
        if self.world_size == 1:
            return tensor
        tensor = tensor.contiguous().clone()
        dist.broadcast(tensor, src=source)
        self._count(label, tensor)
        return tensor

    def gathered(self, number: int) -> list[int]:
        """Return a small number of every rank on each."""
        if self.world_size == 1:
            return [number]
        # Filled on the device: a copy from the host would wait for it.
        own = torch.full((1,), number, dtype=torch.int32, device=self.device)
        found: list[int] = self.all_gather(own, "control").flatten().tolist()
        return found

    def any(self, flag: bool) -> bool:
        """Return on every rank whether the flag is set on any."""
        return any(self.gathered(flag))

    def share_json(self, value: _Plain | None) -> _Plain:
        """Return rank 0's plain data on every rank; what the others pass is ignored."""
        text = json.dumps(value).encode() if self.is_first else b""
        if self.world_size > 1:
            size = int(self.broadcast(torch.full((1,), len(text), device=self.device), "control"))
            encoded = torch.zeros(size, dtype=torch.uint8, device=self.device)
            if self.is_first:
                encoded = on_device(torch.frombuffer(bytearray(text), dtype=torch.uint8), self.device)
            text = bytes(self.broadcast(encoded, "control").cpu().numpy())
        shared: _Plain = json.loads(text)
        return shared

    def texts(self, text: str) -> list[str]:
        """Return a short text of every rank on each."""
        encoded = text.encode(errors="surrogateescape")
        row = torch.zeros(max(1, *self.gathered(len(encoded))), dtype=torch.uint8)
        row[: len(encoded)] = torch.tensor([*encoded], dtype=torch.uint8)
        rows = self.all_gather(row.to(self.device), "control").cpu()
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="surrogateescape") for row in rows]

    def rest(self) -> None:
        """Wait for all ranks without using the processor, which a wait on a GPU does: for work that only some do."""
        self.all_gather(torch.zeros(1), "control")

    def barrier(self) -> None:
        if self.world_size > 1:
            self.all_reduce(torch.zeros(1, device=self.device), "control")

    def agree(self, value: str, what: str) -> None:
        """Raise on every rank unless all have the same short text, such as a digest.

        Rank 0 raises `UserError` and the others `PeerFailed`, so that only one message is printed.
        """
        texts = self.texts(value)
        different = [rank for rank, text in enumerate(texts) if text != texts[0]]
        if different and not self.is_first:
            raise PeerFailed(f"rank {different[0]} and rank 0 differ in {what}")
        if different:
            raise UserError(f"rank {different[0]} and rank 0 differ in {what}: every rank must read the same input")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block, and raise on every rank if any rank raises `UserError` or `TrainingError` in it.

        The lowest such rank raises its own error and the others `PeerFailed`, so that only one message is printed.
        """
        errors: list[UserError | TrainingError] = []
        try:
            yield
        except (UserError, TrainingError) as caught:
            errors.append(caught)
        failed = self.gathered(len(errors))
        if any(failed):
            first = failed.index(1)
            if self.rank == first:
                raise errors[0]
            raise PeerFailed(f"rank {first} failed")

    def take_traffic(self) -> dict[str, int]:
        """Return the payload bytes per label since the last call, and reset them."""
        taken, self.traffic = dict(self.traffic), Counter()
        return taken

    def collectives(self) -> int:
        """Count the collectives that this rank has started, including those of the engines."""
        begun = 0
        for group in list(dist.distributed_c10d._world.pg_map):
            # Some backends and versions of torch do not count; `Watch` then compares phases only.
            with suppress(RuntimeError, AttributeError):
                begun += getattr(group._get_backend(self.device), _COUNT)()
        return begun

    def ensure_process_group(self) -> None:
        """Make a process group for a single process, because FSDP2 and DeepSpeed need one."""
        if not dist.is_initialized():
            dist.init_process_group(backend_of(self.device), store=dist.HashStore(), rank=0, world_size=1)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def _count(self, label: str, tensor: Tensor) -> None:
        self.traffic[label] += tensor.numel() * tensor.element_size()


def launched() -> bool:
    """Return whether a launcher (torchrun, deepspeed, the Slurm template) started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def backend_of(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
