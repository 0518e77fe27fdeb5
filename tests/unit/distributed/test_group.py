"""How ranks find each other, and what they find in a store that ranks before them have used."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from support.threads import on_ranks

from colm_scale.distributed.group import interface_to, meet


def met(store: dist.Store, order: list[int]) -> list[str]:
    """What each rank calls the attempt, if they arrive in this order, each once the one before has begun."""
    names: dict[int, str] = {}
    with ThreadPoolExecutor(len(order)) as pool:
        for rank in order:
            begun = threading.Event()

            def arrive(rank: int = rank, begun: threading.Event = begun) -> None:
                begun.set()
                names[rank] = meet(store, rank, len(order))

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
    early = threading.Thread(target=lambda: found.append(meet(store, 1, 2)))
    early.start()
    early.join(0.5)
    assert early.is_alive()
    assert not found
    new = meet(store, 0, 2)
    early.join()
    assert found == [new] != [old]


def test_the_way_to_a_host_is_an_interface():
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("nowhere.invalid") is None


@pytest.mark.parametrize("texts", [["a", "", "é" * 300], ["", "", ""], ["\udcff/x", "b", "c"]])
def test_every_rank_gets_the_texts_of_all(texts):
    """Also those that are no UTF-8, as the names of files may be."""
    assert on_ranks(3, lambda group: group.texts(texts[group.rank])) == [texts] * 3
