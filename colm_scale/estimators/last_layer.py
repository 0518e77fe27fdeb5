"""Estimators on the exact gradient of the probe tensor, as they run across ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from colm_scale.distributed.exchange import gather_rows
from colm_scale.distributed.group import Group
from colm_scale.estimators.base import Sketching, finite, picked_rows
from colm_scale.records import Batch, CandidateMatrix, Selection, SketchPlan, on_device
from colm_scale.selection.mask import merge_proposals, top_columns
from colm_scale.selection.moments import Moments
from colm_scale.sketch import last_layer
from colm_scale.sketch.compress import CountSketch
from colm_scale.sketch.tap import Tap


class LastLayer(Sketching):
    """Exchanges h columns of the gradient per source. Each rank chooses among the columns it owns."""

    def __init__(self, tap: Tap, group: Group, moments: Moments, columns: int):
        self.moments = moments
        self._tap, self._group, self._columns = tap, group, columns
        self._held: list[last_layer.Gradients] = []

    @property
    def held_numbers(self) -> int:
        """Count of the numbers held as gradients between `sketch` and `learn`."""
        return sum(gradients.numbers for gradients in self._held)

    def sketch(self, plan: SketchPlan, batches: list[Batch]) -> None:
        self._plan = plan
        rows = plan.rows_of(self._group.rank)
        found = [torch.zeros(0, 2, device=self._group.device)]
        for batch in batches:
            count = len(batch.positions)
            if not count:  # no rows: forward only, to stay in step with the other ranks
                self._tap.factors(batch)
                continue
            losses, gradients = last_layer.sketch(self._tap, batch, rows[:count])
            found.append(torch.stack([losses, gradients.largest], dim=1))
            self._held.append(gradients)
            rows = rows[count:]
        self._local = torch.cat(found)

    def matrix(self, numbers: Tensor) -> CandidateMatrix:
        plan, group = self._plan, self._group
        valid, numbers = finite(numbers)
        self._largest = numbers[:, 1]
        moments = self.moments.fitted(self._largest)
        columns = self._agree_on_columns(valid, moments)
        rows = gather_rows(last_layer.rows_at(self._held, columns, plan.groups, moments), plan, group, "gather")
        rows = torch.where(valid.unsqueeze(1), rows, 0.0)
        return CandidateMatrix.fetched(plan.positions, rows, valid, numbers[:, 0])

    def learn(self, selection: Selection) -> None:
        group = self._group
        picked = torch.zeros(len(self._plan.positions), dtype=torch.bool)
        picked[picked_rows(self._plan, selection)] = True
        picked &= self._plan.forwarded  # only these have a gradient in this step
        count = int(picked.sum())
        if count:
            largest = torch.where(on_device(picked, group.device), self._largest, 0.0).max()
            exponent = torch.frexp(largest).exponent
            sums = last_layer.moment_sums(self._held, picked, self._tap.size, exponent)
            sums = group.all_reduce(sums, "moments")
            self.moments = self.moments.learn(*last_layer.from_moment_sums(sums, len(picked), count, exponent))
        else:
            self.moments = self.moments.skip()
        self._held = []

    def _agree_on_columns(self, valid: Tensor, moments: Moments) -> Tensor:
        """``[G, h]`` columns of each ranked source. Each rank sums the columns it owns and proposes its best."""
        plan, group = self._plan, self._group
        d, ranks = self._tap.size, group.world_size
        if not plan.num_groups:
            return torch.zeros(0, min(self._columns, d), dtype=torch.int64, device=group.device)
        sums = last_layer.source_sums(self._held, plan.groups, plan.num_groups, moments, valid)
        owned = math.ceil(d / ranks)
        padded = sums.new_zeros(plan.num_groups, ranks * owned)
        padded[:, :d] = sums
        by_owner = padded.view(plan.num_groups, ranks, owned).transpose(0, 1)
        mine = group.reduce_scatter(by_owner, "columns").view(plan.num_groups, owned)
        best = top_columns(mine, self._columns)
        proposal = torch.stack([mine.gather(1, best), (best + group.rank * owned).int()])
        proposals = group.all_gather(proposal, "columns")
        return merge_proposals(proposals[:, 0], proposals[:, 1].long(), min(self._columns, d))


class CountSketched(LastLayer):
    """Exchanges a random projection of the normalised gradient, so the ranks need not agree on columns."""

    fixed_coordinates = True

    def __init__(self, tap: Tap, group: Group, moments: Moments, projection: CountSketch):
        super().__init__(tap, group, moments, projection.columns)
        self._projection = projection

    def sketch(self, plan: SketchPlan, batches: list[Batch]) -> None:
        super().sketch(plan, batches)
        rows = [torch.zeros(0, self._columns, device=self._group.device)]
        rows += [self._projection.rows(gradients, self.moments) for gradients in self._held]
        self._local = torch.cat([self._local, torch.cat(rows)], dim=1)

    def matrix(self, numbers: Tensor) -> CandidateMatrix:
        valid, numbers = finite(numbers)
        self._largest = numbers[:, 1]
        return CandidateMatrix.fetched(self._plan.positions, numbers[:, 2:], valid, numbers[:, 0])
