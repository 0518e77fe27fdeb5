"""Kept sources, shares, coverage and error feedback during a run.

Every rank knows the selections, so nothing is exchanged.
"""

from __future__ import annotations

from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.records import CandidateMatrix, Candidates, Selection
from colm_scale.selection.coverage import Coverage
from colm_scale.selection.feedback import ErrorFeedback
from colm_scale.selection.quota import RecentSources


class SourceState:
    """The sources as the next step's selection treats them. Equal on every rank.

    Args:
        kept: ``[Q]`` bool, the sources kept at the beginning.
        shares: ``[Q]`` of the sources, see `source_shares`.
        refresh_every: Choose the kept sources again after this many steps; 0: never, or by re-clustering (`renew`).
        columns: Of the error feedback (`SelectionConfig.feedback_columns`); 0: none.

    Attributes:
        recent: The kept sources, and the candidates of each source since they were chosen.
        shares: The quotas of the sources are in proportion to them; None: to the candidates.
        coverage: The examples owed to each source under ``--selection.coverage_floor``.
        feedback: What the picks of each source have deviated from its candidates.
    """

    def __init__(
        self,
        kept: Tensor,
        shares: Tensor | None,
        selection: SelectionConfig,
        refresh_every: int = 0,
        columns: int = 0,
    ):
        self.recent = RecentSources.beginning(kept)
        self.coverage = Coverage.beginning(len(kept))
        self.feedback = ErrorFeedback.beginning(len(kept), columns)
        self.shares = shares
        self._selection, self._every = selection, refresh_every

    @property
    def kept(self) -> Tensor:
        """``[Q]`` bool, the sources kept in the next step."""
        return self.recent.kept

    @property
    def facts(self) -> dict[str, float]:
        """Numbers for the step's report, by name."""
        return {"coverage_owed": float(self.coverage.examples_owed)} if self._selection.coverage_floor else {}

    def after(
        self, candidates: Candidates, selection: Selection, matrix: CandidateMatrix, *, applied: bool
    ) -> bool:
        """Account for a step.

        Args:
            applied: Whether the step updated the weights. If not, its coreset does not count as trained.

        Returns:
            Whether the kept sources were chosen again, so that the moments must restart.
        """
        trained = selection.positions if applied else selection.positions[:0]
        self.coverage = self.coverage.after(candidates.sources, trained, self._selection)
        if applied:
            self.feedback = self.feedback.after(matrix, candidates.sources, selection)
        self.recent = self.recent.after(candidates.sources)
        if not self._every or candidates.step % self._every:
            return False
        rule = self._selection.kept_sources
        assert not isinstance(rule, list)
        self.renew(self.recent.refreshed(rule).kept, self.shares)
        return True

    def renew(self, kept: Tensor, shares: Tensor | None) -> None:
        """Use re-clustered sources from now on."""
        self.recent, self.shares = RecentSources.beginning(kept), shares
        self.feedback = ErrorFeedback.beginning(len(kept), self.feedback.deviations.shape[1])
