"""The method of a run: which candidates enter the coreset. Pure functions of the step's candidates and sketches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.randomness import generator
from colm_scale.records import CandidateMatrix, Candidates, Quota, Selection
from colm_scale.selection import baselines
from colm_scale.selection.quota import allocate
from colm_scale.selection.select import select_coreset


@dataclass(frozen=True, slots=True)
class SelectionRule:
    """CoLM or one of its baselines.

    Attributes:
        config: The method, the budget, metric and weights.
        kept: ``[Q]`` bool, the sources that are kept.
        seed: Of the run; each step draws from its own generators, equal on every rank.
    """

    config: SelectionConfig
    kept: Tensor
    seed: int

    @property
    def sketches(self) -> bool:
        """Whether the method looks at gradients; if not, nothing is forwarded before training."""
        return self.config.method == "colm"

    @property
    def most_selected(self) -> int:
        """The largest coreset the method can return."""
        return self.config.candidates if self.config.method == "full" else self.config.budget

    def quota(self, candidates: Candidates) -> Quota:
        """Kept candidates and the shares of the other sources (DESIGN 2.3)."""
        draw = generator(self.seed, "kept", candidates.step)
        return allocate(candidates.sources, self.kept, self.config.budget, draw)

    def select(self, candidates: Candidates, quota: Quota, matrix: CandidateMatrix | None) -> Selection:
        """The coreset. ``matrix`` is needed exactly if `sketches`."""
        match self.config.method:
            case "colm":
                return select_coreset(matrix, candidates.sources, quota, self.config.metric, self.config.weights)
            case "stratified":
                return baselines.stratified(candidates.sources, quota, self._draw(candidates))
            case "random":
                return baselines.random(len(candidates), self.config.budget, self._draw(candidates))
            case "full":
                return baselines.full(len(candidates))

    def _draw(self, candidates: Candidates) -> torch.Generator:
        return generator(self.seed, self.config.method, candidates.step)


def loss_shares(selection: Selection, label_tokens: Tensor, per: str) -> Tensor:
    """What each coreset example's mean token loss counts for in the loss of the step (DESIGN 2.4).

    Args:
        label_tokens: ``[b]`` label tokens of each selected example.
        per: ``example``: ``w_i / sum(w)``; ``token``: ``w_i n_i / sum(w n)``, the weighted mean over tokens.

    Returns:
        ``[b]`` float32, adding up to 1.
    """
    weights = selection.weights.double()
    if per == "token":
        weights = weights * label_tokens
    return (weights / weights.sum()).float()
