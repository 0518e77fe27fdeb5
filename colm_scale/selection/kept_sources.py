"""Kept sources of a mixture that drifts: those that are small in what came lately, not in the whole data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from colm_scale.selection.quota import kept_sources


@dataclass(frozen=True, slots=True)
class RecentSources:
    """The kept sources, and what has come since they were chosen. A function of the candidates; part of a checkpoint.

    Attributes:
        kept: ``[Q]`` bool.
        seen: ``[Q]`` candidates of each source since.
    """

    kept: Tensor
    seen: Tensor

    @classmethod
    def beginning(cls, kept: Tensor) -> RecentSources:
        """Before the first step."""
        return cls(kept, torch.zeros(len(kept), dtype=torch.int64))

    def after(self, sources: Tensor) -> RecentSources:
        """After a step with candidates of these ``sources`` ``[n]``."""
        return RecentSources(self.kept, self.seen + torch.bincount(sources, minlength=len(self.kept)))

    def refreshed(self, share: float | None) -> RecentSources:
        """With the kept sources chosen again among those seen since, by the rule of `kept_sources`."""
        kept, present = torch.zeros_like(self.kept), self.seen > 0
        kept[present] = kept_sources(self.seen[present], (), share)
        return RecentSources.beginning(kept)
