"""The paper's estimator, K directional derivatives per candidate, as it runs across ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from colm_scale.distributed.group import Group
from colm_scale.estimators.base import Sketching, finite, picked_rows
from colm_scale.records import Batch, CandidateMatrix, Selection, SketchPlan, on_device
from colm_scale.selection.moments import Moments
from colm_scale.sketch import zeroth_order
from colm_scale.sketch.precision import float32_tail
from colm_scale.sketch.tap import Tap


class ZerothOrder(Sketching):
    """Exchanges the K derivatives of each candidate; everything else is a pure function of them."""

    fixed_coordinates = True

    def __init__(self, tap: Tap, group: Group, moments: Moments, directions: Tensor, columns: int):
        self.moments = moments
        self._tap, self._group = tap, group
        self._directions, self._columns = directions, columns

    def sketch(self, plan: SketchPlan, batches: list[Batch]) -> None:
        self._plan = plan
        width = len(self._directions) + 1
        found = [torch.zeros(0, width, device=self._group.device)]
        for batch in batches:
            with float32_tail(self._tap):
                losses, coefficients = zeroth_order.directional_derivatives(
                    self._tap, batch, self._directions, zeroth_order.PERTURBATION
                )
            found.append(torch.cat([coefficients, losses.unsqueeze(1)], dim=1)[: len(batch.positions)])
        self._local = torch.cat(found)

    def matrix(self, numbers: Tensor) -> CandidateMatrix:
        valid, numbers = finite(numbers)
        self._coefficients = numbers[:, :-1]
        rows = zeroth_order.rows_from_coefficients(
            self._coefficients, valid, self._directions, self.moments, self._plan, self._columns
        )
        return CandidateMatrix.fetched(self._plan.positions, rows, valid, numbers[:, -1])

    def learn(self, selection: Selection) -> None:
        picked = self._coefficients[on_device(picked_rows(self._plan, selection), self._group.device)]
        self.moments = (
            zeroth_order.learn_from_coefficients(self.moments, picked, self._directions)
            if len(picked)
            else self.moments.skip()
        )
        del self._coefficients, self._local
