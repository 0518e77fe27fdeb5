"""Ranks that are threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from colm_scale.distributed.group import Group


class Board:
    """Where ranks that are threads of this process lay down what they send."""

    def __init__(self, ranks: int):
        self.sent: list[Tensor | None] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=60)  # a rank that is left alone fails


class ThreadGroup(Group):
    """A group whose ranks are threads; everything but the two collectives is the product's."""

    def __init__(self, rank: int, board: Board):
        ranks = len(board.sent)
        super().__init__(rank, ranks, rank, ranks, torch.device("cpu"))
        self.board = board

    def all_gather(self, tensor: Tensor, label: str) -> Tensor:
        return torch.stack(self._exchanged(tensor, label))

    def broadcast(self, tensor: Tensor, label: str, source: int = 0) -> Tensor:
        sent = self._exchanged(tensor, label)
        assert (sent[source].shape, sent[source].dtype) == (tensor.shape, tensor.dtype)
        return sent[source].clone()

    def _exchanged(self, tensor: Tensor, label: str) -> list[Tensor]:
        self.board.sent[self.rank] = tensor
        self.board.barrier.wait()
        sent = list(self.board.sent)
        self.board.barrier.wait()
        self._count(label, tensor)
        return sent


def on_ranks(ranks: int, work: Callable[[Group], object]) -> list:
    """What ``work`` returns or raises on each rank."""
    board = Board(ranks)

    def outcome(rank: int) -> object:
        try:
            return work(ThreadGroup(rank, board))
        except Exception as error:
            return error

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(outcome, range(ranks)))
