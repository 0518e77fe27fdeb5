"""Estimators without moments: numbers from a user's function, and lengths."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from colm_scale.config.user_functions import load_own
from colm_scale.distributed.group import Group
from colm_scale.errors import TrainingError
from colm_scale.estimators.base import Estimator, Sketching, finite
from colm_scale.records import Batch, CandidateMatrix, Candidates, SketchPlan
from colm_scale.sketch.tap import Tap


class Measured(Sketching):
    """Compares candidates by the numbers of a user's function, as they are.

    Args:
        name: ``--selection.estimator``, which names the function. Called as ``measure(tap, batch)``, it returns
            ``[B, c]``: each example's loss, then the numbers to compare; with c = 1 the losses are compared.
    """

    fixed_coordinates = True

    def __init__(self, tap: Tap, group: Group, name: str):
        self._tap, self._group, self._name = tap, group, name
        self._measure: Callable[[Tap, Batch], object] = load_own("selection.estimator", name, parameters=2)

    def sketch(self, plan: SketchPlan, batches: list[Batch]) -> None:
        self._plan = plan
        found = [self._numbers(batch)[: len(batch.positions)] for batch in batches]
        self._local = torch.cat(found or [torch.zeros(0, 1, device=self._group.device)])

    def matrix(self, numbers: Tensor) -> CandidateMatrix:
        valid, numbers = finite(numbers)
        compared = numbers[:, 1:] if numbers.shape[1] > 1 else numbers
        return CandidateMatrix.fetched(self._plan.positions, compared, valid, numbers[:, 0])

    def _numbers(self, batch: Batch) -> Tensor:
        numbers = self._measure(self._tap, batch)
        if not isinstance(numbers, Tensor) or numbers.ndim != 2 or len(numbers) != len(batch.lengths):
            found = f"a tensor {list(numbers.shape)}" if isinstance(numbers, Tensor) else type(numbers).__name__
            raise TrainingError(
                f"--selection.estimator {self._name} returned {found} for a micro-batch of {len(batch.lengths)} "
                f"examples; return a tensor with one row per example: its loss, then the numbers to compare"
            )
        return numbers.detach().float()


class Length(Estimator):
    """Compares candidates by their number of tokens, which every rank knows. Nothing is forwarded."""

    fixed_coordinates = True

    def __init__(self, group: Group):
        self._group = group

    def known(self, candidates: Candidates) -> Tensor:
        self._lengths = candidates.lengths
        return torch.ones(len(candidates), dtype=torch.bool)

    def sketch(self, plan: SketchPlan, batches: list[Batch]) -> None:
        self._plan = plan

    def exchange(self) -> Tensor:
        return self._lengths[self._plan.positions].float().unsqueeze(1)

    def matrix(self, numbers: Tensor) -> CandidateMatrix:
        valid = torch.ones(len(numbers), dtype=torch.bool, device=numbers.device)
        return CandidateMatrix.fetched(self._plan.positions, numbers, valid, torch.full_like(numbers[:, 0], torch.nan))
