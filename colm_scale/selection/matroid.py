"""Picking from several sources together, each filling its own quota: the sets allowed form a partition matroid."""

from __future__ import annotations

import torch
from torch import Tensor

from colm_scale.selection.exact import whole_numbers


class Room:
    """Which candidates can still be picked: those not picked yet, of a group whose quota is not filled.

    Attributes:
        open: ``[n]`` bool, on the CPU.
    """

    def __init__(self, groups: Tensor, quotas: Tensor):
        self.open = quotas[groups] > 0
        self._groups, self._of, self._left = groups, groups.tolist(), quotas.tolist()

    def take(self, pick: int) -> None:
        """``pick`` is picked."""
        group = self._of[pick]
        self.open[pick] = False
        self._left[group] -= 1
        if not self._left[group]:
            self.open[self._groups == group] = False


def greedy_under_quotas(similarity: Tensor, groups: Tensor, quotas: Tensor) -> Tensor:
    """Facility location of all groups together: in each step the candidate with room that raises the value most.

    The value is at least half of the best under the quotas (Fisher, Nemhauser and Wolsey 1978). With one group the
    picks of `facility.greedy`; the lowest index wins ties.

    Args:
        similarity: ``[n, n]``, symmetric; may be negative.
        groups: ``[n]`` 0..G-1, on the CPU.
        quotas: ``[G]`` how many of each group, at most what it has, on the CPU.

    Returns:
        int64 ``[k]`` in the order of picking, on the CPU.
    """
    worth = whole_numbers(similarity.double() - similarity.min())
    covered, gains = worth.new_zeros(len(worth)), worth.sum(0)
    room, picks = Room(groups, quotas), []
    for _ in range(int(quotas.sum())):
        pick = int(gains.where(room.open.to(gains.device), -1).argmax())  # a gain is never below 0
        picks.append(pick)
        room.take(pick)
        better = (worth[pick] > covered).nonzero().flatten()
        old, new = covered[better], worth[pick, better]
        gains -= worth[better].clamp_(old.unsqueeze(1), new.unsqueeze(1)).sum(0) - old.sum()
        covered[better] = new
    return torch.tensor(picks, dtype=torch.int64)
