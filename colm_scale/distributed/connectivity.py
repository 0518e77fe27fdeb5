"""A connectivity test of the ranks, without unlimited waits.

All ranks meet at the launcher's store; each opens a port and connects to those of all others. If every connection
works, they sum a number with gloo and, if each has a GPU, with NCCL.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import metadata

import torch
import torch.distributed as dist

from colm_scale.distributed.connect import first_line, interface_to, open_store, own_address
from colm_scale.distributed.device import identity, take_device
from colm_scale.errors import UserError

_HELLO = b"colm"
_CONNECT_SECONDS = 5.0
_SAME = ("torch", "transformers", "peft", "deepspeed")
"""Packages whose versions should be equal on all ranks."""


@dataclass(frozen=True, slots=True)
class Reach:
    """Results of the test.

    Attributes:
        ranks: Number of ranks expected.
        absent: Ranks that did not reach the meeting point, or were lost afterwards.
        cut: Pairs of ranks, the first of which cannot connect to the second, and the error.
        failed: Errors by backend, empty if it works; backends that were not tried are missing.
        versions: Versions by rank, if they differ.
        error: Reason why the test could not start.
    """

    ranks: int
    absent: list[int] = field(default_factory=list)
    cut: list[tuple[int, int, str]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    versions: dict[int, str] = field(default_factory=dict)
    error: str = ""


def try_ranks(seconds: float) -> Reach:
    """Test the ranks that the launcher started. All ranks call it together; only rank 0 gets the results.

    Args:
        seconds: Time limit of each of the three stages.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store = dist.PrefixStore("colm_scale/doctor", open_store(rank, seconds))
        meeting = _Meeting(store, rank, ranks, seconds)
    except (OSError, RuntimeError) as error:  # torch's DistError is a RuntimeError
        return Reach(ranks, error=f"rank {rank} cannot reach the meeting point {where}: {first_line(error)}")
    return meeting.hold()


class _Meeting:
    """One rank's part in the test."""

    def __init__(self, store: dist.Store, rank: int, ranks: int, seconds: float):
        self._store, self._rank, self._ranks, self._seconds = store, rank, ranks, seconds
        own = own_address(os.environ["MASTER_ADDR"])
        self._listener = socket.create_server((own, 0), family=socket.AF_INET6 if ":" in own else socket.AF_INET)
        threading.Thread(target=self._answer, daemon=True).start()
        self._device = _device()
        place = (own, self._listener.getsockname()[1], _versions(), identity(self._device))
        store.set(f"place/{rank}", json.dumps(place))

    def hold(self) -> Reach:
        """Run all three stages."""
        said = self._collected("place", range(self._ranks), self._seconds)
        places: dict[int, tuple[str, int, str, str]] = {peer: json.loads(place) for peer, place in said.items()}
        cut = [(peer, _connect(address, port)) for peer, (address, port, *_) in places.items() if peer != self._rank]
        self._store.set(f"cut/{self._rank}", json.dumps([(peer, why) for peer, why in cut if why]))
        gpus = {gpu for *_, gpu in places.values() if gpu}
        backends = ("gloo", "nccl") if len(gpus) == self._ranks else ("gloo",)  # NCCL needs a GPU for each rank
        if self._rank:
            if self._awaited("go", 5 * self._seconds + self._ranks * _CONNECT_SECONDS) == b"yes":
                self._try(backends)
            return Reach(self._ranks)
        said = self._collected("cut", places, 2 * self._seconds + len(places) * _CONNECT_SECONDS)
        rows: dict[int, list[tuple[int, str]]] = {peer: json.loads(row) for peer, row in said.items()}
        absent = [peer for peer in range(self._ranks) if peer not in rows]
        pairs = [(rank, peer, why) for rank, row in sorted(rows.items()) for peer, why in row]
        self._store.set("go", "no" if absent or pairs else "yes")
        failed = {} if absent or pairs else self._try(backends)
        versions = {peer: found for peer, (_, _, found, _) in sorted(places.items())}
        return Reach(self._ranks, absent, pairs, failed, versions if len(set(versions.values())) > 1 else {})

    def _collected(self, what: str, ranks: Iterable[int], seconds: float) -> dict[int, bytes]:
        """Collect the messages of those ranks that send one in time."""
        deadline = time.monotonic() + seconds
        awaited = {peer: self._awaited(f"{what}/{peer}", max(0.1, deadline - time.monotonic())) for peer in ranks}
        return {peer: said for peer, said in awaited.items() if said}

    def _awaited(self, key: str, seconds: float) -> bytes:
        """Wait for a message; empty if it does not come."""
        with suppress(RuntimeError):
            self._store.wait([key], timedelta(seconds=seconds))
            return self._store.get(key)
        return b""

    def _answer(self) -> None:
        while True:
            with suppress(OSError):
                way, _ = self._listener.accept()
                with way:
                    way.sendall(_HELLO)

    def _try(self, backends: Sequence[str]) -> dict[str, str]:
        """Try each backend; return their errors. A backend that hangs is left in its thread."""
        failed = {}
        for backend in backends:
            done: list[str] = []
            thread = threading.Thread(target=lambda b=backend, d=done: d.append(self._sum(b)), daemon=True)
            thread.start()
            thread.join(self._seconds)
            failed[backend] = done[0] if done else f"did not end within {self._seconds:g} s"
            if failed[backend]:
                break
        return failed

    def _sum(self, backend: str) -> str:
        """Sum a one from each rank; return the error, empty if there is none."""
        device = self._device if backend == "nccl" else torch.device("cpu")
        if interface := interface_to(os.environ["MASTER_ADDR"]):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        try:
            store, limit = dist.PrefixStore(backend, self._store), timedelta(seconds=self._seconds)
            dist.init_process_group(backend, store=store, rank=self._rank, world_size=self._ranks, timeout=limit)
            total = torch.ones(1, device=device)
            dist.all_reduce(total)
            found = int(total)
            dist.destroy_process_group()
        except RuntimeError as error:
            return first_line(error)
        return "" if found == self._ranks else f"{self._ranks} ones add up to {found}"


def _device() -> torch.device:
    """Take this rank's GPU; the CPU if there are too few, because the ranks can still be tried without."""
    with suppress(UserError):
        return take_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def _connect(address: str, port: int) -> str:
    """Connect to a rank; return the error, empty if there is none."""
    try:
        with socket.create_connection((address, port), _CONNECT_SECONDS) as way:
            return "" if way.recv(len(_HELLO)) == _HELLO else f"{address}:{port} does not answer"
    except OSError as error:
        return f"{address}:{port}: {error.strerror or error}"


def _versions() -> str:
    found = [f"python {platform.python_version()}"]
    for package in _SAME:
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return ", ".join(found)
