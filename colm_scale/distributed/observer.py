"""Kept sources and coverage, followed while a run trains. All ranks know the selections: nothing is exchanged."""

from __future__ import annotations

from torch import Tensor

from colm_scale.config import RunConfig
from colm_scale.records import Candidates, Selection
from colm_scale.selection.coverage import Coverage
from colm_scale.selection.recent import RecentSources


class Observer:
    """Watches each step, on every rank.

    Args:
        kept: ``[Q]`` bool, the sources that are kept at the beginning.

    Attributes:
        recent: The sources that are kept in the next step.
        coverage: What each source is owed, if there is a floor under what is trained of it.
    """

    def __init__(self, kept: Tensor, config: RunConfig):
        self.recent = RecentSources.beginning(kept)
        self.coverage = Coverage.beginning(len(kept))
        self._selection = config.selection
        self._every = 0 if config.reclusters else config.sources.refresh_every

    def after(self, candidates: Candidates, selection: Selection, applied: bool) -> bool:
        """Take in a step.

        Args:
            applied: Whether the step was an update; if not, nothing of it was trained on.

        Returns:
            Whether the kept sources were chosen again (`SourcesConfig.refresh_every`), and the moments are to begin
            anew.
        """
        trained = selection.positions if applied else selection.positions[:0]
        self.coverage = self.coverage.after(candidates.sources, trained, self._selection)
        self.recent = self.recent.after(candidates.sources)
        if not self._every or candidates.step % self._every:
            return False
        rule = self._selection.kept_sources
        assert not isinstance(rule, list)
        self.recent = self.recent.refreshed(rule)
        return True
