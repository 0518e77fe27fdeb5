"""How ranks find each other, and what they find in a store that ranks before them have used."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from colm_scale.distributed import connect
from colm_scale.distributed.connect import Place, interface_to, meet
from colm_scale.distributed.group import PeerFailed
from colm_scale.errors import TrainingError, UserError

HERE = Place("here", "", 1)


def met(store: dist.Store, order: list[int]) -> list[str]:
    """What each rank calls the attempt, if they arrive in this order, each once the one before has begun."""
    names: dict[int, str] = {}
    with ThreadPoolExecutor(len(order)) as pool:
        for rank in order:
            begun = threading.Event()

            def arrive(rank: int = rank, begun: threading.Event = begun) -> None:
                begun.set()
                names[rank] = meet(store, rank, len(order), 60, HERE)[0]

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
    early = threading.Thread(target=lambda: found.append(meet(store, 1, 2, 60, HERE)[0]))
    early.start()
    early.join(0.5)
    assert early.is_alive()
    assert not found
    new = meet(store, 0, 2, 60, HERE)[0]
    early.join()
    assert found == [new] != [old]


def test_the_way_to_a_host_is_an_interface():
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("nowhere.invalid") is None


def in_threads(ranks: Mapping[int, Place], store: dist.Store, world_size: int, seconds: float) -> dict[int, object]:
    """Let ranks meet; returns what `meet` returns, or a line of what it raises."""
    found: dict[int, object] = {}

    def arrive(rank: int) -> None:
        try:
            found[rank] = meet(store, rank, world_size, seconds, ranks[rank])
        except (UserError, TrainingError, PeerFailed) as error:
            found[rank] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=arrive, args=[rank]) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def on(*hosts: str) -> dict[int, Place]:
    """Ranks from 0 on these hosts."""
    return {rank: Place(host, "", 1) for rank, host in enumerate(hosts)}


def test_ranks_that_do_not_arrive_are_named_once_with_the_hosts_of_the_others():
    store = dist.HashStore()
    found = in_threads({**on("a", "a", "b"), 6: Place("c", "", 1)}, store, 8, 0.5)
    assert found[0].startswith(
        "TrainingError: rank 3-5, 7 did not arrive within 0.5 seconds; here: rank 0-1 on a; rank 2 on b; rank 6 on c. "
    )
    assert all(found[rank].startswith("PeerFailed") for rank in (1, 2, 6))
    # The store of a launcher outlives them: those that start again do not read the old verdict.
    ((_, sharers),) = set(in_threads(on("a", "a", "a"), store, 3, 30).values())
    assert sharers == 3


def test_a_first_rank_that_does_not_arrive_is_named(monkeypatch):
    monkeypatch.setattr(connect, "_VERDICT_SECONDS", 0.1)
    found = in_threads({1: Place("b", "", 1)}, dist.HashStore(), 2, 0.2)
    assert found[1].startswith("TrainingError: rank 1 on b: rank 0 did not arrive within 0.2 seconds")


def test_ranks_that_meet_but_cannot_connect_say_so_once(monkeypatch):
    """A firewall lets them reach the store alone; torch's message goes on with a stack."""
    store = dist.HashStore()

    def refuse(*_: object, timeout: timedelta, **__: object) -> None:
        assert timeout == timedelta(seconds=5)
        raise RuntimeError("Gloo connectFullMesh failed: timed out\nframe #0: ...")

    monkeypatch.setattr(connect, "open_store", lambda rank, seconds: store)
    monkeypatch.setattr(dist, "init_process_group", refuse)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with ThreadPoolExecutor(3) as pool:
        joined = [pool.submit(connect._join, rank, 3, torch.device("cpu"), 5.0) for rank in range(3)]
    errors = [one.exception() for one in joined]
    (said,) = [str(error) for error in errors if isinstance(error, TrainingError)]
    assert "cannot connect to all of them (Gloo connectFullMesh failed: timed out): colm-scale doctor" in said
    assert sum(isinstance(error, PeerFailed) for error in errors) == 2


def test_the_limit_is_a_number_of_seconds(monkeypatch):
    monkeypatch.setenv("RDZV_SECONDS", "soon")
    with pytest.raises(UserError, match="RDZV_SECONDS=soon: must be a number of seconds"):
        connect._limit()


SHARING = {rank: Place("a", gpu, 1) for rank, gpu in enumerate(["GPU-1", "GPU-2", "GPU-1", "GPU-1"])}


def test_ranks_on_one_gpu_are_named():
    found = in_threads(SHARING, dist.HashStore(), 4, 30)
    assert found[0].startswith("UserError: ranks 0, 2-3 on a share one GPU (GPU-1), which NCCL refuses: ")
    assert all(found[rank].startswith("PeerFailed") for rank in (1, 2, 3))


def test_ranks_share_a_gpu_where_nccl_is_told_to(monkeypatch):
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert len(set(in_threads(SHARING, dist.HashStore(), 4, 30).values())) == 1


def test_ranks_with_a_gpu_each_meet():
    places = {rank: Place("a", f"GPU-{rank}", 1) for rank in range(3)}
    assert len(set(in_threads(places, dist.HashStore(), 3, 30).values())) == 1


def test_a_rank_counts_those_that_may_run_on_its_cores():
    """Two bound to the same half of a host, one to the other half, and two on another host."""
    bound = [("a", 0b0011), ("a", 0b0011), ("a", 0b1100), ("b", 0b1111), ("b", 0b1111)]
    places = {rank: Place(host, "", cores) for rank, (host, cores) in enumerate(bound)}
    found = in_threads(places, dist.HashStore(), 5, 30)
    assert [found[rank][1] for rank in range(5)] == [2, 2, 1, 2, 2]
