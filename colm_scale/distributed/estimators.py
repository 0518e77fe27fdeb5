"""The estimators as the step uses them: sketch on this rank, exchange, and learn from what was selected.

The mathematics is in `colm_scale.sketch` and knows nothing of ranks; here is what each estimator exchanges.

Bytes a step moves, with W ranks (none with one), G ranked sources, e = ceil(d / W) columns that a rank owns, and
S = W * (largest number of candidates that any rank sketches) rows, s of which are not padding:

| estimator | gather | columns | moments, if any row was picked |
|---|---|---|---|
| `ZerothOrder` | 4 S (K + 1) | - | - |
| `LastLayer` | 4 S (h + 2) | 4 G W e + 8 G W min(h, e) | 16 d |
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from colm_scale.config import SelectionConfig, TrainConfig
from colm_scale.distributed.exchange import gather_rows
from colm_scale.distributed.group import Group
from colm_scale.records import Batch, CandidateMatrix, Selection, SketchPlan
from colm_scale.selection.mask import merge_proposals, top_columns
from colm_scale.selection.moments import Moments
from colm_scale.sketch import last_layer, zeroth_order
from colm_scale.sketch.tap import Tap


class Estimator(Protocol):
    """Called once per step in this order, on every rank."""

    moments: Moments

    def sketch(self, plan: SketchPlan, batches: list[Batch]) -> None:
        """Sketch this rank's micro-batches; what is computed for an empty one (no positions) is dropped."""

    def gather(self) -> CandidateMatrix:
        """Exchange; the same matrix on every rank."""

    def learn(self, selection: Selection) -> None:
        """Let the moments learn from the picked (not kept) rows, and forget the sketches."""


def make_estimator(tap: Tap, selection: SelectionConfig, train: TrainConfig, group: Group) -> Estimator:
    """The estimator that the configuration names, with fresh moments."""

    def fresh(size: int) -> Moments:
        return Moments.zeros(size, train.betas, train.adam_epsilon, group.device)

    if selection.estimator == "zeroth_order":
        directions = zeroth_order.probes(train.seed, selection.num_probes, tap.shape, group.device)
        moments = fresh(1 if selection.num_probes == 1 else tap.size)
        return ZerothOrder(tap, group, moments, directions, selection.perturbation, selection.columns)
    return LastLayer(tap, group, fresh(tap.size), selection.columns)


class ZerothOrder:
    """K finite differences per candidate. All that is exchanged is them; the rest is a pure function of them."""

    def __init__(
        self, tap: Tap, group: Group, moments: Moments, directions: Tensor, perturbation: float, columns: int
    ):
        self.moments = moments
        self._tap, self._group = tap, group
        self._directions, self._perturbation, self._columns = directions, perturbation, columns

    def sketch(self, plan: SketchPlan, batches: list[Batch]) -> None:
        self._plan = plan
        width = len(self._directions) + 1
        found = [torch.zeros(0, width, device=self._group.device)]
        for batch in batches:
            losses, coefficients = zeroth_order.directional_derivatives(
                self._tap, batch, self._directions, self._perturbation
            )
            found.append(torch.cat([coefficients, losses.unsqueeze(1)], dim=1)[: len(batch.positions)])
        self._local = torch.cat(found)

    def gather(self) -> CandidateMatrix:
        gathered = gather_rows(self._local, self._plan, self._group, "gather")
        valid = gathered.isfinite().all(1)
        gathered = torch.where(valid.unsqueeze(1), gathered, 0.0)
        self._coefficients = gathered[:, :-1]
        rows = zeroth_order.rows_from_coefficients(
            self._coefficients, valid, self._directions, self.moments, self._plan, self._columns
        )
        return CandidateMatrix(self._plan.positions, rows, valid, gathered[:, -1])

    def learn(self, selection: Selection) -> None:
        picked = self._coefficients[_picked_rows(self._plan, selection).to(self._group.device)]
        self.moments = (
            zeroth_order.learn_from_coefficients(self.moments, picked, self._directions)
            if len(picked)
            else self.moments.skip()
        )
        self._coefficients = self._local = None


class LastLayer:
    """The exact gradient, of which h columns per source are exchanged; each rank chooses among the columns it owns."""

    def __init__(self, tap: Tap, group: Group, moments: Moments, columns: int):
        self.moments = moments
        self._tap, self._group, self._columns = tap, group, columns
        self._held: list[last_layer.Gradients] = []

    @property
    def held_numbers(self) -> int:
        """Numbers held as sketches between `sketch` and `learn`."""
        return sum(gradients.numbers for gradients in self._held)

    def sketch(self, plan: SketchPlan, batches: list[Batch]) -> None:
        self._plan = plan
        rows = plan.rows_of(self._group.rank).to(self._group.device)
        found = [torch.zeros(0, 2, device=self._group.device)]
        for batch in batches:
            count = len(batch.positions)
            if not count:  # there are no rows: only the forward is needed, to keep the ranks in step
                self._tap.factors(batch)
                continue
            losses, largest, gradients = last_layer.sketch(self._tap, batch, rows[:count])
            found.append(torch.stack([losses, largest], dim=1))
            self._held.append(gradients)
            rows = rows[count:]
        self._local = torch.cat(found)

    def gather(self) -> CandidateMatrix:
        plan, group = self._plan, self._group
        scalars = gather_rows(self._local, plan, group, "gather")
        valid = scalars.isfinite().all(1)
        self._largest = torch.where(valid, scalars[:, 1], 0.0)
        groups = plan.groups.to(group.device)
        columns = self._agree_on_columns(groups, valid)
        rows = gather_rows(last_layer.rows_at(self._held, columns, groups, self.moments), plan, group, "gather")
        rows = torch.where(valid.unsqueeze(1), rows, 0.0)
        return CandidateMatrix(plan.positions, rows, valid, torch.where(valid, scalars[:, 0], 0.0))

    def learn(self, selection: Selection) -> None:
        group = self._group
        picked = torch.zeros(len(self._plan.positions), dtype=torch.bool)
        rows = _picked_rows(self._plan, selection)
        picked[rows] = True
        picked = picked.to(group.device)
        if len(rows):
            largest = float(self._largest[picked].max())
            exponent = math.frexp(largest)[1] if largest > 0 else 0
            sums = last_layer.moment_sums(self._held, picked, self._tap.size, exponent)
            sums = group.all_reduce(sums, "moments")
            self.moments = self.moments.learn(*last_layer.from_moment_sums(sums, len(picked), len(rows), exponent))
        else:
            self.moments = self.moments.skip()
        self._held = []

    def _agree_on_columns(self, groups: Tensor, valid: Tensor) -> Tensor:
        """``[G, h]`` columns of each ranked source. Each rank sums the columns it owns and proposes its best."""
        plan, group = self._plan, self._group
        d, ranks = self._tap.size, group.world_size
        if not plan.num_groups:
            return torch.zeros(0, min(self._columns, d), dtype=torch.int64, device=group.device)
        sums = last_layer.source_sums(self._held, groups, plan.num_groups, self.moments, valid)
        owned = math.ceil(d / ranks)
        padded = sums.new_zeros(plan.num_groups, ranks * owned)
        padded[:, :d] = sums
        by_owner = padded.view(plan.num_groups, ranks, owned).transpose(0, 1)
        mine = group.reduce_scatter(by_owner, "columns").view(plan.num_groups, owned)
        best = top_columns(mine, self._columns)
        proposal = torch.stack([mine.gather(1, best), (best + group.rank * owned).int()])
        proposals = group.all_gather(proposal, "columns")
        return merge_proposals(proposals[:, 0], proposals[:, 1].long(), min(self._columns, d))


def _picked_rows(plan: SketchPlan, selection: Selection) -> Tensor:
    """Rows of the candidate matrix that were picked, ascending."""
    return torch.searchsorted(plan.positions, selection.picked.sort().values)
