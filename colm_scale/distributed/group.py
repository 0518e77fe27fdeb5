"""The ranks of a run, and the few collectives the step needs. With one rank every operation is the identity.

Only this folder talks to torch.distributed. All exchanges are of fixed-size tensors, never of pickled objects, and
each adds the bytes of its payload to `Group.traffic` under the label of the stage that asked for it.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from colm_scale.errors import TrainingError, UserError

_TIMEOUT = timedelta(days=1)
"""`Watch` ends a run that hangs, and says which rank does; rank 0 may have a whole stream to read first."""
_POLL_SECONDS = 0.1
_COUNT = "_get_sequence_number_for_group"
"""How many collectives a backend has begun; not in torch's types."""
_Plain = TypeVar("_Plain")
# torch 2.13 renamed these two and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class PeerFailed(RuntimeError):
    """Another rank failed and has said why; this one only has to end."""


@dataclass(slots=True)
class Group:
    """One rank's view of the run.

    Attributes:
        rank, world_size: Place among all ranks.
        local_rank, local_world_size: Place among the ranks of this machine.
        device: Where this rank computes.
        attempt: Names this start of the ranks; those that a launcher starts again have another.
        traffic: Payload bytes per label since the last `take_traffic`: what a gather returns, what a reduction
            takes in, what a broadcast carries. Equal on every rank.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    attempt: str = ""
    traffic: Counter[str] = field(default_factory=Counter)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def all_gather(self, tensor: Tensor, label: str) -> Tensor:
        """``[...]`` on each rank -> ``[W, ...]`` on all."""
        if self.world_size == 1:
            return tensor.unsqueeze(0)
        gathered = tensor.new_empty((self.world_size * tensor.shape[0], *tensor.shape[1:]))
        _all_gather(gathered, tensor.contiguous())
        self._count(label, gathered)
        return gathered.view(self.world_size, *tensor.shape)

    def reduce_scatter(self, tensor: Tensor, label: str) -> Tensor:
        """``[W * k, ...]`` on each rank -> the sum's rows ``[k, ...]`` that this rank owns."""
        if self.world_size == 1:
            return tensor
        own = tensor.new_empty((tensor.shape[0] // self.world_size, *tensor.shape[1:]))
        _reduce_scatter(own, tensor.contiguous())
        self._count(label, tensor)
        return own

    def all_reduce(self, tensor: Tensor, label: str, *, largest: bool = False) -> Tensor:
        """The elementwise sum (or largest value) over ranks."""
        if self.world_size == 1:
            return tensor
        tensor = tensor.contiguous().clone()
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        self._count(label, tensor)
        return tensor

    def broadcast(self, tensor: Tensor, label: str, source: int = 0) -> Tensor:
        """``source``'s tensor on every rank; the others pass one of the same shape and type."""
        if self.world_size == 1:
            return tensor
        tensor = tensor.contiguous().clone()
        dist.broadcast(tensor, src=source)
        self._count(label, tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return bool(self.all_reduce(torch.tensor([flag], dtype=torch.int32, device=self.device), "control").any())

    def share_json(self, value: _Plain | None) -> _Plain:
        """The first rank's plain data on every rank; the others pass None."""
        text = json.dumps(value).encode() if self.is_first else b""
        size = int(self.broadcast(torch.tensor([len(text)], device=self.device), "control"))
        encoded = torch.zeros(size, dtype=torch.uint8, device=self.device)
        if self.is_first:
            encoded.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        shared: _Plain = json.loads(bytes(self.broadcast(encoded, "control").cpu().numpy()))
        return shared

    def barrier(self) -> None:
        if self.world_size > 1:
            self.all_reduce(torch.zeros(1, device=self.device), "control")

    def agree(self, value: str, what: str) -> None:
        """Raise on every rank unless all ranks hold the same short text (up to 256 bytes), such as a digest."""
        row = torch.zeros(256, dtype=torch.uint8)
        encoded = torch.frombuffer(bytearray(value.encode()[:256]), dtype=torch.uint8)
        row[: len(encoded)] = encoded
        rows = self.all_gather(row.to(self.device), "control").cpu()
        different = (rows != rows[0]).any(1).nonzero().flatten().tolist()
        if different:
            raise UserError(f"rank {different[0]} has other {what} than rank 0: every rank must read the same input")

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block in which an expected error on any rank ends the run on all: the lowest such rank raises its own error
        and the others `PeerFailed`, so that one message is printed and nobody waits for a rank that is gone."""
        error: UserError | TrainingError | None = None
        try:
            yield
        except (UserError, TrainingError) as caught:
            error = caught
        failed = self.all_gather(torch.tensor([error is not None], dtype=torch.int32, device=self.device), "control")
        if failed.any():
            first = int(failed.flatten().argmax())
            if error is not None and self.rank == first:
                raise error
            raise PeerFailed(f"rank {first} failed")

    def take_traffic(self) -> dict[str, int]:
        """Payload bytes per label since the last call."""
        taken, self.traffic = dict(self.traffic), Counter()
        return taken

    def collectives(self) -> int:
        """How many collectives this rank has begun, those of the engines among them."""
        begun = 0
        for group in list(dist.distributed_c10d._world.pg_map):
            # A backend that does not count them, or a torch without these private names: phases then tell ranks apart.
            with suppress(RuntimeError, AttributeError):
                begun += getattr(group._get_backend(self.device), _COUNT)()
        return begun

    def ensure_process_group(self) -> None:
        """Give a lone process a process group of its own, which FSDP2 and DeepSpeed want all the same."""
        if not dist.is_initialized():
            dist.init_process_group(_backend(self.device), store=dist.HashStore(), rank=0, world_size=1)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def _count(self, label: str, tensor: Tensor) -> None:
        self.traffic[label] += tensor.numel() * tensor.element_size()


def launched() -> bool:
    """Whether a launcher (torchrun, deepspeed, Slurm's template) started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _interface_to(host: str) -> str | None:
    """The network interface that leads to a host; None where the host's name does not resolve.

    Gloo would take the one that this machine's own name resolves to: none, or the loopback, on many machines.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing, but chooses the way
            own = probe.getsockname()[0]
    except OSError:
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, found in interfaces if own in [address.address for address in found]), None)


def connect() -> Group:
    """Join the ranks that the launcher named in the environment; a lone process is a group of one."""
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible; start fewer processes "
                f"or unset CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        if interface := _interface_to(os.environ.get("MASTER_ADDR", "")):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        store, rank, _ = next(dist.rendezvous("env://", timeout=_TIMEOUT))
        attempt = meet(store, rank, world_size)
        dist.init_process_group(
            _backend(device),
            store=dist.PrefixStore(attempt, store),
            rank=rank,
            world_size=world_size,
            timeout=_TIMEOUT,
        )
        return Group(rank, world_size, local_rank, local_world_size, device, attempt)
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Group(rank, world_size, local_rank, local_world_size, device)


def meet(store: dist.Store, rank: int, world_size: int) -> str:
    """A name for this attempt that all its ranks agree on and that none before has had. All ranks call it together.

    torchrun's store outlives a restart, and what the ranks before have left in it looks like the peers of the new ones:
    torch would connect to addresses where nobody listens. The launcher's count of restarts is no such name, since
    each host counts its own.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("colm_scale/attempt", own)
        for peer in range(1, world_size):
            store.set(f"colm_scale/{own}/answer/{peer}", store.get(f"colm_scale/{own}/hello/{peer}").decode())
        return own
    while True:
        attempt = store.get("colm_scale/attempt").decode()  # it may be that of ranks which are gone
        answer = f"colm_scale/{attempt}/answer/{rank}"
        store.set(f"colm_scale/{attempt}/hello/{rank}", own)
        if store.check([answer]) and store.get(answer).decode() == own:
            return attempt
        time.sleep(_POLL_SECONDS)
