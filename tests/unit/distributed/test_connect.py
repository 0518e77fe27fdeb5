"""How ranks find each other, and what they find in a store that ranks before them have used."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from colm_scale.distributed import connect
from colm_scale.distributed.connect import interface_to, meet
from colm_scale.distributed.group import PeerFailed
from colm_scale.errors import TrainingError, UserError

NO_GPUS: Mapping[int, str] = {}


def met(store: dist.Store, order: list[int]) -> list[str]:
    """What each rank calls the attempt, if they arrive in this order, each once the one before has begun."""
    names: dict[int, str] = {}
    with ThreadPoolExecutor(len(order)) as pool:
        for rank in order:
            begun = threading.Event()

            def arrive(rank: int = rank, begun: threading.Event = begun) -> None:
                begun.set()
                names[rank] = meet(store, rank, len(order), 60)

            pool.submit(arrive)
            begun.wait()
    return [names[rank] for rank in sorted(order)]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]], ids=["first rank first", "first rank last"])
def test_ranks_that_start_again_agree_on_a_new_name(order):
    """Also where those that come early find what the ranks before have left."""
    store, before = dist.HashStore(), set()
    for _ in range(4):
        names = met(store, order)
        assert len(set(names)) == 1
        assert names[0] not in before
        before.add(names[0])


def test_a_rank_does_not_take_the_answer_that_its_predecessor_got():
    """Alone with what an attempt has left, it waits for the first rank."""
    store = dist.HashStore()
    (old, _) = met(store, [0, 1])
    found: list[str] = []
    early = threading.Thread(target=lambda: found.append(meet(store, 1, 2, 60)))
    early.start()
    early.join(0.5)
    assert early.is_alive()
    assert not found
    new = meet(store, 0, 2, 60)
    early.join()
    assert found == [new] != [old]


def test_the_way_to_a_host_is_an_interface():
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("nowhere.invalid") is None


def in_threads(
    ranks: dict[int, str], store: dist.Store, world_size: int, seconds: float, gpus: Mapping[int, str] = NO_GPUS
) -> dict[int, str]:
    """Let ranks on hosts of these names meet, with these GPUs; returns what each raises, or the name of the attempt."""
    found: dict[int, str] = {}

    def arrive(rank: int) -> None:
        try:
            found[rank] = meet(store, rank, world_size, seconds, gpus.get(rank, ""))
        except (UserError, TrainingError, PeerFailed) as error:
            found[rank] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=arrive, args=[rank], name=host) for rank, host in ranks.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def named_hosts(monkeypatch):
    """A host of each thread's name."""
    monkeypatch.setattr(socket, "gethostname", lambda: threading.current_thread().name)


def test_ranks_that_do_not_arrive_are_named_once_with_the_hosts_of_the_others(named_hosts):
    store = dist.HashStore()
    found = in_threads({0: "a", 1: "a", 2: "b", 6: "c"}, store, 8, 0.5)
    assert found[0].startswith(
        "TrainingError: rank 3-5, 7 did not arrive within 0.5 seconds; here: rank 0-1 on a; rank 2 on b; rank 6 on c. "
    )
    assert all(found[rank].startswith("PeerFailed") for rank in (1, 2, 6))
    # The store of a launcher outlives them: those that start again do not read the old verdict.
    names = in_threads(dict.fromkeys(range(3), "a"), store, 3, 30)
    assert len(set(names.values())) == 1
    assert "Error" not in names[0]


def test_a_first_rank_that_does_not_arrive_is_named(named_hosts, monkeypatch):
    monkeypatch.setattr(connect, "_VERDICT_SECONDS", 0.1)
    found = in_threads({1: "b"}, dist.HashStore(), 2, 0.2)
    assert found[1].startswith("TrainingError: rank 1 on b: rank 0 did not arrive within 0.2 seconds")


def test_the_limit_is_a_number_of_seconds(monkeypatch):
    monkeypatch.setenv("RDZV_SECONDS", "soon")
    with pytest.raises(UserError, match="RDZV_SECONDS=soon: must be a number of seconds"):
        connect._limit()


GPUS = {0: "GPU-1", 1: "GPU-2", 2: "GPU-1", 3: "GPU-1"}


def test_ranks_on_one_gpu_are_named(named_hosts):
    found = in_threads(dict.fromkeys(GPUS, "a"), dist.HashStore(), 4, 30, GPUS)
    assert found[0].startswith("UserError: ranks 0, 2-3 on a share one GPU (GPU-1), which NCCL refuses: ")
    assert all(found[rank].startswith("PeerFailed") for rank in (1, 2, 3))


def test_ranks_share_a_gpu_where_nccl_is_told_to(monkeypatch):
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    names = in_threads(dict.fromkeys(GPUS, "a"), dist.HashStore(), 4, 30, GPUS)
    assert len(set(names.values())) == 1


def test_ranks_with_a_gpu_each_meet():
    gpus = {rank: f"GPU-{rank}" for rank in range(3)}
    names = in_threads(dict.fromkeys(gpus, "a"), dist.HashStore(), 3, 30, gpus)
    assert len(set(names.values())) == 1
