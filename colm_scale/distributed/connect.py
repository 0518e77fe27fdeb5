"""The start of the ranks: they meet at a store, agree on a name for this start, and form a process group.

torchrun's agent holds the store, with other launchers rank 0. Each wait has a limit of minutes, and ends with the names
of those that are missing; later waits are the business of `Watch`.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from colm_scale.distributed.cores import own_cores, own_share
from colm_scale.distributed.device import identity, take_device
from colm_scale.distributed.group import Group, PeerFailed, backend_of
from colm_scale.errors import TrainingError, UserError

LIMIT = "RDZV_SECONDS"
"""Variable with the seconds that ranks wait for each other at the start."""
_LIMIT_SECONDS = 600.0
_TIMEOUT = timedelta(days=1)
"""`Watch` ends a hanging run much earlier; but rank 0 may have to read a whole stream first."""
_ATTEMPT = "colm_scale/attempt"
_POLL_SECONDS = 0.1
_PROBE_SECONDS = 5.0
_VERDICT_SECONDS = 10.0
"""Time for rank 0's verdict to reach the others, and for these to end before the store does."""


def connect() -> Group:
    """Join the ranks that the launcher names in the environment; a single process is a group of one.

    Raises:
        UserError: A rank has no GPU, or not its own, or a variable is wrong.
        TrainingError: Ranks are missing, or cannot reach each other.
        PeerFailed: Another rank has said why the run does not start.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
    device = take_device(local_rank)
    if world_size > 1 and not dist.is_initialized():
        if interface := interface_to(os.environ.get("MASTER_ADDR", "")):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        rank, seconds = int(os.environ["RANK"]), _limit()
        attempt, sharers = _join(rank, world_size, device, seconds)
        cores = own_share(sharers, local_world_size)
        return Group(rank, world_size, local_rank, local_world_size, device, attempt, cores)
    rank = dist.get_rank() if dist.is_initialized() else 0
    cores = own_share(local_world_size, local_world_size)
    return Group(rank, world_size, local_rank, local_world_size, device, cores=cores)


def _limit() -> float:
    given = os.environ.get(LIMIT, "") or str(_LIMIT_SECONDS)
    try:
        return float(given)
    except ValueError:
        raise UserError(f"{LIMIT}={given}: must be a number of seconds") from None


def _join(rank: int, world_size: int, device: torch.device, seconds: float) -> tuple[str, int]:
    """Meet the other ranks, and connect each with each, in that many seconds each; return what `meet` does."""
    where = f"MASTER_ADDR:MASTER_PORT, {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store = open_store(rank, seconds)
    except (OSError, RuntimeError) as error:  # torch's DistError is a RuntimeError
        does = "reaches nothing" if rank else "cannot open a store"
        raise TrainingError(
            f"rank {rank} {does} at {where} ({first_line(error)}): see whether rank 0 has started, whether that is its "
            f"host, and whether the port is free and open; {LIMIT} ({seconds:g}) sets the limit"
        ) from None
    try:
        place = Place(socket.gethostname(), identity(device), sum(1 << core for core in own_cores()))
        attempt, sharers = meet(store, rank, world_size, seconds, place)
    except dist.DistError:
        raise TrainingError(f"rank {rank}: the store at {where} is gone: its process has ended") from None
    try:
        whole = dist.PrefixStore(attempt, store)
        limit = timedelta(seconds=seconds)
        dist.init_process_group(backend_of(device), store=whole, rank=rank, world_size=world_size, timeout=limit)
    except RuntimeError as error:
        with suppress(dist.DistError):  # without the store, each says it
            if store.add(f"colm_scale/{attempt}/unconnected", 1) > 1:
                raise PeerFailed("another rank has said that it cannot connect") from None
        raise TrainingError(
            f"rank {rank} on {socket.gethostname()} met the others, but cannot connect to all of them "
            f"({first_line(error)}): colm-scale doctor, started in the same way, names the pairs"
        ) from None
    _set_pg_timeout(_TIMEOUT)
    return attempt, sharers


def open_store(rank: int, seconds: float) -> dist.TCPStore:
    """Open the launcher's store, or one on rank 0. Unlike torch's rendezvous, this does not wait for all ranks.

    Raises:
        OSError: Nothing listens there within that many seconds.
        RuntimeError: From torch, for example because the port is taken.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not is_master:
        _await_listener(host, port, seconds)  # torch prints a page for each attempt that fails
    limit = timedelta(seconds=seconds)
    return dist.TCPStore(host, port, is_master=is_master, timeout=limit, wait_for_workers=False, multi_tenant=True)


def _await_listener(host: str, port: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, port), _PROBE_SECONDS):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_SECONDS)


class Place(NamedTuple):
    """Where a rank computes: its host, its GPU (empty for the CPU), and the cores that it may use, as a bit mask."""

    host: str
    gpu: str
    cores: int

    def shares_cores(self, other: Place) -> bool:
        """Return whether both may run on the same core."""
        return self.host == other.host and bool(self.cores & other.cores)


def meet(store: dist.Store, rank: int, world_size: int, seconds: float, place: Place) -> tuple[str, int]:
    """Agree on a new name for this start of the ranks; return it, and the number of ranks that share this one's cores.

    All ranks call it together.

    torchrun's store outlives a restart, and torch would take its old entries for those of the new ranks and connect to
    dead addresses. The launcher's count of restarts cannot be the name, because each host has its own count.

    Raises:
        TrainingError: Ranks do not arrive within that many seconds. Rank 0 names them, and the hosts of the others.
        UserError: Ranks share a GPU. Rank 0 names them.
        PeerFailed: On the others, if rank 0 raises.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        return own, _receive(store, own, world_size, seconds, place)
    hello = json.dumps([own, place])
    deadline = time.monotonic() + seconds + _VERDICT_SECONDS
    while time.monotonic() < deadline:
        if store.check([_ATTEMPT]):
            attempt = store.get(_ATTEMPT).decode()  # may be that of earlier ranks
            answer = f"colm_scale/{attempt}/answer/{rank}"
            store.set(f"colm_scale/{attempt}/hello/{rank}", hello)
            name, sharers = json.loads(store.get(answer)) if store.check([answer]) else ("", 0)
            if name == own and sharers:
                return attempt, sharers
            if name == own:
                store.add(f"colm_scale/{attempt}/left", 1)
                raise PeerFailed("rank 0 has said why the run does not start")
        time.sleep(_POLL_SECONDS)
    raise TrainingError(
        f"rank {rank} on {place.host}: rank 0 did not arrive within {seconds:g} seconds: see whether its host started "
        f"it; {LIMIT} sets the limit"
    )


def _receive(store: dist.Store, attempt: str, world_size: int, seconds: float, place: Place) -> int:
    """Wait on rank 0 for the others, and answer each."""
    keys = {peer: f"colm_scale/{attempt}/hello/{peer}" for peer in range(1, world_size)}
    store.set(_ATTEMPT, attempt)
    with suppress(RuntimeError):  # torch raises several kinds when the time is over
        store.wait(list(keys.values()), timedelta(seconds=seconds))
    hellos = {peer: json.loads(store.get(key)) for peer, key in keys.items() if store.check([key])}
    places = {0: place} | {peer: Place(*found) for peer, (_, found) in hellos.items()}
    refused = _refusal(places, [peer for peer in keys if peer not in hellos], seconds)
    sharers = {rank: sum(own.shares_cores(other) for other in places.values()) for rank, own in places.items()}
    for peer, (name, _) in hellos.items():
        store.set(f"colm_scale/{attempt}/answer/{peer}", json.dumps([name, 0 if refused else sharers[peer]]))
    for error in refused:
        _leave_last(store, attempt, len(hellos))
        raise error
    return sharers[0]


def _refusal(arrived: Mapping[int, Place], absent: list[int], seconds: float) -> list[UserError | TrainingError]:
    """Return what keeps the ranks from starting, at most one error."""
    if absent:
        hosts: dict[str, list[int]] = {}
        for rank, place in arrived.items():
            hosts.setdefault(place.host, []).append(rank)
        came = "; ".join(f"rank {ranges(ranks)} on {host}" for host, ranks in hosts.items())
        first = (
            f"rank {ranges(absent)} did not arrive within {seconds:g} seconds; here: {came}. See whether the missing "
        )
        where = f"whether it reaches MASTER_ADDR ({os.environ.get('MASTER_ADDR')}); {LIMIT} sets the limit"
        return [TrainingError(f"{first}missing host started, and {where}")]
    gpus: dict[str, list[int]] = {}
    for rank, place in arrived.items():
        gpus.setdefault(place.gpu, []).append(rank)
    for gpu, ranks in gpus.items():
        if gpu and len(ranks) > 1 and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
            shared = f"ranks {ranges(ranks)} on {arrived[ranks[0]].host} share one GPU ({gpu}), which NCCL refuses"
            return [UserError(f"{shared}: start a process per GPU, or give each its own (Slurm: --gpus-per-task=1)")]
    return []


def _leave_last(store: dist.Store, attempt: str, others: int) -> None:
    """Wait until the others know, because rank 0 may hold the store."""
    deadline = time.monotonic() + _VERDICT_SECONDS
    while store.add(f"colm_scale/{attempt}/left", 0) < others and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def ranges(numbers: list[int]) -> str:
    """Write ascending numbers as ``0-3, 6``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def own_address(host: str) -> str:
    """Return this machine's address on the route to ``host``. Connecting a datagram socket sends nothing."""
    family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        own: str = probe.getsockname()[0]
    return own


def interface_to(host: str) -> str | None:
    """Return the network interface on the route to ``host``; None if the name does not resolve.

    Gloo by default takes the interface that this machine's own name resolves to, on many machines none or the loopback.
    """
    try:
        own = own_address(host)
    except OSError:
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, found in interfaces if own in [address.address for address in found]), None)


def first_line(error: BaseException) -> str:
    """Return the first line of a message, for libraries that print their stack in it."""
    return (str(error).splitlines() or [repr(error)])[0]
