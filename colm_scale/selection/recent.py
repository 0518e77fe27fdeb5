"""Which sources are kept when the mixture drifts: those that are small in what came lately, not in the whole data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from colm_scale.config import SelectionConfig
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

    def after(self, step: int, sources: Tensor, config: SelectionConfig) -> RecentSources:
        """After a step with candidates of these ``sources`` ``[n]``.

        Every ``--selection.refresh_every`` steps the rule chooses anew, among the sources that were seen since.
        """
        seen = self.seen + torch.bincount(sources, minlength=len(self.kept))
        if not is_refreshed(step, config):
            return RecentSources(self.kept, seen)
        kept, present = torch.zeros_like(self.kept), seen > 0
        kept[present] = kept_sources(seen[present], (), None, config.quantile)
        return RecentSources.beginning(kept)


def is_refreshed(step: int, config: SelectionConfig) -> bool:
    """Whether kept sources are chosen anew after this step, and the moments begin anew."""
    return config.refresh_every > 0 and step % config.refresh_every == 0
