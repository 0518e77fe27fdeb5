"""What a run learns about its sources while it trains, for what goes by it. All ranks know the losses: nothing is
exchanged."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.records import Candidates, Selection
from colm_scale.selection.coverage import Coverage
from colm_scale.selection.recent import RecentSources, is_refreshed
from colm_scale.selection.statistics import SourceStatistics, observation_weights


class Observer:
    """Watches each step, on every rank.

    Args:
        kept: ``[Q]`` bool, the sources that are kept at the beginning.

    Attributes:
        statistics: What is known after the last step; equal on every rank.
        recent: The sources that are kept in the next step.
        coverage: What each source is owed, if there is a floor under what is trained of it.
    """

    def __init__(self, kept: Tensor):
        self.statistics = SourceStatistics.zeros(len(kept))
        self.recent = RecentSources.beginning(kept)
        self.coverage = Coverage.beginning(len(kept))

    def after(
        self,
        candidates: Candidates,
        selection: Selection,
        losses: Tensor | None,
        applied: bool,
        config: SelectionConfig,
    ) -> bool:
        """Take in a step.

        Args:
            losses: ``[n]`` of all ranks, on the CPU; None if they are not known.
            applied: Whether the step was an update; if not, nothing of it was trained on.

        Returns:
            Whether the kept sources were chosen anew (`SelectionConfig.refresh_every`).
        """
        if applied and losses is not None:
            self._learn(candidates, selection, losses)
        trained = selection.positions if applied else selection.positions[:0]
        self.coverage = self.coverage.after(candidates.sources, trained, config)
        self.recent = self.recent.after(candidates.step, candidates.sources, config)
        return is_refreshed(candidates.step, config)

    def _learn(self, candidates: Candidates, selection: Selection, losses: Tensor) -> None:
        weights = observation_weights(selection, candidates.sources)
        member = F.one_hot(candidates.sources, len(self.statistics.recent)) * weights.unsqueeze(1)  # [n, Q]
        seen = member.T @ torch.stack([torch.ones(len(losses)), losses], dim=1).double()
        self.statistics = self.statistics.learn(seen)
