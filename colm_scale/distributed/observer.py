"""What a run learns about its sources while it trains, for the allocations that go by it.

Losses are exchanged anyway. Gradients, which only the `neyman` and `agreement` allocations read, cost one reduction of
``8 Q (1 + p)`` bytes a step, whatever the candidates, the budget and the ranks (none with one rank).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.distributed.group import Group
from colm_scale.records import Candidates, Selection
from colm_scale.selection.recent import RecentSources, is_refreshed
from colm_scale.selection.statistics import SourceStatistics, observation_weights
from colm_scale.sketch.observe import PROJECTED, GradientReader


class Observer:
    """Watches the training pass of each step, on every rank.

    Args:
        kept: ``[Q]`` bool, the sources that are kept at the beginning.
        reader: Reads gradients, where they are asked for.

    Attributes:
        statistics: What is known after the last step; equal on every rank.
        recent: The sources that are kept in the next step.
    """

    def __init__(self, kept: Tensor, reader: GradientReader | None, group: Group):
        self.statistics = SourceStatistics.zeros(len(kept), 2 if reader is None else 3 + PROJECTED)
        self.recent = RecentSources.beginning(kept)
        self._reader, self._group = reader, group
        self._seen: list[tuple[Tensor, Tensor]] = []

    def watching(self) -> AbstractContextManager[None]:
        """A block with the training pass of a step."""
        self._seen = []
        return nullcontext() if self._reader is None else self._reader.reading()

    def see(self, positions: Tensor) -> None:
        """After the backward of a micro-batch with these candidates."""
        if self._reader is not None:
            self._seen.append((positions, self._reader.take()[: len(positions)]))

    def learn(self, candidates: Candidates, selection: Selection, losses: Tensor) -> None:
        """Let the statistics learn from the step; ``losses`` ``[n]`` are those of all ranks, on the CPU."""
        weights = observation_weights(selection, candidates.sources)
        member = F.one_hot(candidates.sources, len(self.statistics.recent)) * weights.unsqueeze(1)  # [n, Q]
        seen = member.T @ torch.stack([torch.ones(len(losses)), losses], dim=1).double()
        if self._reader is not None:
            seen = torch.cat([seen, self._gradients(member)], dim=1)
        self.statistics = self.statistics.learn(seen)

    def refreshed(self, candidates: Candidates, config: SelectionConfig) -> bool:
        """Count a step's candidates; whether the kept sources were chosen anew (`SelectionConfig.refresh_every`)."""
        self.recent = self.recent.after(candidates.step, candidates.sources, config)
        return is_refreshed(candidates.step, config)

    def _gradients(self, member: Tensor) -> Tensor:
        """``[Q, 1 + p]`` sums over the examples of all ranks."""
        device = self._group.device
        sums = torch.zeros(member.shape[1], 1 + PROJECTED, dtype=torch.float64, device=device)
        for positions, rows in self._seen:
            sums += member[positions].to(device).T @ rows.double()
        self._seen = []
        return self._group.all_reduce(sums, "sources").cpu()
