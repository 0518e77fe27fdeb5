"""The selection method of a run, as pure functions of the step's candidates and sketches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.data.recorded_selection import SelectionRecord
from colm_scale.errors import TrainingError
from colm_scale.randomness import generator
from colm_scale.records import CandidateMatrix, Candidates, Quota, Selection
from colm_scale.selection.coverage import Coverage
from colm_scale.selection.feedback import NO_FEEDBACK, ErrorFeedback
from colm_scale.selection.quota import Share, allocate, proportional
from colm_scale.selection.select import full, random, select_coreset, stratified
from colm_scale.selection.shares import quotas


@dataclass(frozen=True, slots=True)
class SelectionRule:
    """CoLM or one of its baselines.

    Attributes:
        config: Method, budget, metric and weights.
        kept: ``[Q]`` bool, the kept sources.
        seed: Seed of the run; each step draws from its own rank-equal generators.
        shares: ``[Q]`` shares that quotas are in proportion to; None: in proportion to the candidates.
        record: The selections to replay, with method replay.
    """

    config: SelectionConfig
    kept: Tensor
    seed: int
    shares: Tensor | None = None
    record: SelectionRecord | None = None

    @property
    def sketches(self) -> bool:
        """True if the method sketches candidates; if not, nothing is forwarded before training."""
        return self.config.sketches

    def now(self, count: int, kept: Tensor, shares: Tensor | None) -> SelectionRule:
        """Adapt the rule to the current sources, and the budget in proportion to ``count`` candidates."""
        config = self.config
        if count != config.candidates and self.record is None:
            budget = math.ceil(config.budget * min(1, count / config.candidates))
            config = replace(config, candidates=count, budget=budget)
        return replace(self, config=config, kept=kept, shares=shares)

    @property
    def most_selected(self) -> int:
        """Size of the largest coreset the method can return."""
        if self.record is not None:
            return self.record.most_selected
        return self.config.candidates if self.config.method == "full" else self.config.budget

    def quota(self, candidates: Candidates, coverage: Coverage | None = None) -> Quota:
        """Find the kept candidates and the quotas of the other sources (docs/method.md, Select).

        Args:
            coverage: Coverage after the previous step; used only with a coverage floor.

        Raises:
            TrainingError: Not all kept candidates fit, and ``--selection.overflow`` is ``fail``; or there is nothing to
                train on.
        """
        config = self.config
        quota = allocate(
            candidates,
            self.kept,
            config.budget,
            generator(self.seed, "kept", candidates.step),
            self._share(generator(self.seed, "allocation", candidates.step)),
            coverage.due(candidates.sources, config) if coverage and config.coverage_floor else 0,
        )
        if config.method in ("colm", "stratified"):
            self._check(quota, candidates.step)
        return quota

    def select(
        self,
        candidates: Candidates,
        quota: Quota,
        matrix: CandidateMatrix,
        feedback: ErrorFeedback = NO_FEEDBACK,
    ) -> Selection:
        """Select the coreset; only a method that `sketches` uses the ``matrix`` and the errors of earlier steps."""
        match self.config.method:
            case "colm":
                draws = partial(generator, self.seed, self.config.ranking.rpartition(":")[2], candidates.step)
                return select_coreset(matrix, candidates.sources, quota, self.config, draws, feedback)
            case "stratified":
                unbiased = self.config.weights == "unbiased"
                return stratified(candidates.sources, quota, self._draw(candidates), unbiased)
            case "random":
                return random(len(candidates), self.config.budget, self._draw(candidates))
            case "full":
                return full(len(candidates))
            case "replay":
                assert self.record is not None
                return self.record.selection(candidates)

    def _share(self, lots: torch.Generator) -> Share:
        if self.shares is None:
            return proportional
        return partial(quotas, self.shares, generator=lots)

    def _check(self, quota: Quota, step: int) -> None:
        if quota.overflow and self.config.overflow == "fail":
            raise TrainingError(
                f"step {step}: {quota.overflow} of {len(quota.kept) + quota.overflow} kept candidates do not fit into "
                f"the coreset, and --selection.overflow is fail. Use a larger --selection.budget, fewer "
                f"--selection.kept_sources or protected examples, or --selection.overflow subset"
            )
        if not len(quota.kept) and not quota.per_source.any():
            raise TrainingError(
                f"step {step}: --selection.shares gives 0 to the sources of all candidates, so there is nothing to "
                f"train on. Give one of them a share, or remove its rows from the data"
            )

    def _draw(self, candidates: Candidates) -> torch.Generator:
        return generator(self.seed, self.config.method, candidates.step)


def loss_shares(selection: Selection, label_tokens: Tensor, per: str) -> Tensor:
    """Compute the weight of each coreset example's mean token loss in the loss of the step.

    Args:
        label_tokens: ``[b]`` label tokens of each selected example.
        per: ``example``: ``w_i / sum(w)``; ``token``: ``w_i n_i / sum(w n)``, the weighted mean over tokens.

    Returns:
        ``[b]`` float32, with sum 1.
    """
    weights = selection.weights.double()
    if per == "token":
        weights = weights * label_tokens
    return (weights / weights.sum()).float()
