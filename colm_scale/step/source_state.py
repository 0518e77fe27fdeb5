"""Kept sources, shares and coverage, followed while a run trains.

Every rank knows the selections, so nothing is exchanged.
"""

from __future__ import annotations

from torch import Tensor

from colm_scale.config import RunConfig
from colm_scale.records import Candidates, Selection
from colm_scale.selection.coverage import Coverage
from colm_scale.selection.quota import RecentSources


class SourceState:
    """What a run goes by in the next step. Equal on every rank.

    Args:
        kept: ``[Q]`` bool, the sources that are kept at the beginning.
        shares: ``[Q]`` of the sources, see `source_shares`.

    Attributes:
        recent: The kept sources, and the candidates of each source since they were chosen.
        shares: What the quotas of the sources are in proportion to; None: their candidates.
        coverage: What each source is owed, if there is a floor under what is trained of it.
    """

    def __init__(self, kept: Tensor, shares: Tensor | None, config: RunConfig):
        self.recent = RecentSources.beginning(kept)
        self.coverage = Coverage.beginning(len(kept))
        self.shares = shares
        self._selection = config.selection
        self._every = 0 if config.reclusters else config.sources.refresh_every

    @property
    def kept(self) -> Tensor:
        """``[Q]`` bool, the sources that are kept in the next step."""
        return self.recent.kept

    @property
    def facts(self) -> dict[str, float]:
        """Numbers for the step's report, by name."""
        return {"coverage_owed": float(self.coverage.examples_owed)} if self._selection.coverage_floor else {}

    def after(self, candidates: Candidates, selection: Selection, applied: bool) -> bool:
        """Take in a step.

        Args:
            applied: Whether the step was an update; if not, nothing of it was trained on.

        Returns:
            Whether the kept sources were chosen again (`SourcesConfig.refresh_every`), and the moments are to restart.
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

    def renew(self, kept: Tensor, shares: Tensor | None) -> None:
        """Go by re-clustered sources from now on."""
        self.recent, self.shares = RecentSources.beginning(kept), shares
