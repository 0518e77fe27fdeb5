"""The estimators as the step uses them: sketch on this rank, exchange, and learn from what was selected.

The mathematics is in `colm_scale.sketch` and knows nothing of ranks; here is what each estimator exchanges.

Bytes a step moves, with W ranks (none with one), G ranked sources, e = ceil(d / W) columns that a rank owns, and
S = W * (largest number of candidates that any rank sketches) rows, s of which are not padding:

| estimator | gather | columns | moments, if any row was picked |
|---|---|---|---|
| `ZerothOrder` | 4 S (K + 1) | - | - |
| `Measured` | 4 S c | - | - |
| `Length` | - | - | - |
| `LastLayer` | 4 S (h + 2) | 4 G W e + 8 G W min(h, e) | 16 d |
| `CountSketched` | 4 S (h + 2) | - | 16 d |

`Measured` exchanges the c columns of its function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from colm_scale.config import SelectionConfig, TrainConfig
from colm_scale.config.user_functions import is_own, load_own
from colm_scale.distributed.exchange import gather_rows
from colm_scale.distributed.group import Group
from colm_scale.errors import TrainingError
from colm_scale.records import Batch, CandidateMatrix, Candidates, Selection, SketchPlan
from colm_scale.selection.mask import merge_proposals, top_columns
from colm_scale.selection.moments import Moments, NoMoments, Shapes, make_moments
from colm_scale.sketch import last_layer, zeroth_order
from colm_scale.sketch.compress import CountSketch
from colm_scale.sketch.precision import float32_tail
from colm_scale.sketch.store import SketchStore
from colm_scale.sketch.tap import Tap

Measure = Callable[[Tap, Batch], Tensor]
"""What `Measured` asks of a micro-batch."""


class Estimator(Protocol):
    """Called once per step in this order, on every rank.

    Attributes:
        moments: What the sketches are normalised by.
        fixed_coordinates: Whether the matrix is a function of the moments and of the numbers that `exchange` returns,
            so that numbers of an earlier step can stand for a candidate.
        facts: What is to be told about the last step, by name.
        store: Numbers of earlier steps, if they count in later ones. Part of a checkpoint, as the moments are.
    """

    moments: Moments
    fixed_coordinates: bool = False
    facts: Mapping[str, float] = MappingProxyType({})
    store: SketchStore | None = None

    def known(self, candidates: Candidates) -> Tensor | None:
        """``[n]`` bool, candidates of which nothing is to be computed; None: there are none."""
        return None

    def sketch(self, plan: SketchPlan, batches: list[Batch]) -> None:
        """Sketch this rank's micro-batches; what is computed for an empty one (no positions) is dropped."""

    def exchange(self) -> Tensor:
        """``[s, c]`` float32, what each candidate's rank has found out about it; zero where none was to. A row that is
        not finite is a sketch that failed. Equal on every rank."""

    def matrix(self, numbers: Tensor) -> CandidateMatrix:
        """The candidate matrix, from what `exchange` returned."""

    def gather(self) -> CandidateMatrix:
        """Exchange; the same matrix on every rank."""
        return self.matrix(self.exchange())

    def learn(self, selection: Selection) -> None:
        """Let the moments learn from the picked (not kept) rows, and forget the sketches."""
        return

    def restart_moments(self) -> None:
        """Forget what the moments have learned, for sources are others now."""
        self.moments = self.moments.fresh()


class NoEstimator(Estimator):
    """Knows nothing of any candidate, for a method that does not compare them."""

    def __init__(self) -> None:
        self.moments = NoMoments()

    def sketch(self, plan: SketchPlan, batches: list[Batch]) -> None:
        """Nobody is sketched."""

    def exchange(self) -> Tensor:
        return torch.zeros(0, 0)

    def matrix(self, numbers: Tensor) -> CandidateMatrix:
        return CandidateMatrix.without_rows()
        return None


class Sketching(Estimator):
    """Exchanges a row for each candidate that this rank sketched: ``[own, c]`` in ``_local``."""

    _group: Group
    _plan: SketchPlan
    _local: Tensor

    def exchange(self) -> Tensor:
        return gather_rows(self._local, self._plan, self._group, "gather")


def make_estimator(tap: Tap, selection: SelectionConfig, train: TrainConfig, group: Group) -> Estimator:
    """The estimator that the configuration names, with fresh moments."""

    def fresh(shapes: Shapes) -> Moments:
        return make_moments(train, shapes, group.device)

    if is_own(selection.estimator):
        own = load_own("selection.estimator", selection.estimator, parameters=2)
        return Measured(tap, group, partial(_own_numbers, selection.estimator, own))
    if selection.estimator == "length":
        return Length(group)
    if selection.estimator == "zeroth_order":
        directions = zeroth_order.probes(train.seed, selection.num_probes, tap.size, group.device)
        moments = fresh(((1, 1) if selection.num_probes == 1 else tap.shape,))
        return ZerothOrder(tap, group, moments, directions, selection.columns)
    if selection.compression == "countsketch":
        projection = CountSketch(train.seed, tap.size, selection.columns, group.device)
        return CountSketched(tap, group, fresh((tap.shape,)), projection)
    return LastLayer(tap, group, fresh((tap.shape,)), selection.columns)


class ZerothOrder(Sketching):
    """K derivatives per candidate. All that is exchanged is them; the rest is a pure function of them."""

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
        valid, numbers = _finite(numbers)
        self._coefficients = numbers[:, :-1]
        rows = zeroth_order.rows_from_coefficients(
            self._coefficients, valid, self._directions, self.moments, self._plan, self._columns
        )
        return CandidateMatrix(self._plan.positions, rows, valid, numbers[:, -1])

    def learn(self, selection: Selection) -> None:
        picked = self._coefficients[_picked_rows(self._plan, selection).to(self._group.device)]
        self.moments = (
            zeroth_order.learn_from_coefficients(self.moments, picked, self._directions)
            if len(picked)
            else self.moments.skip()
        )
        del self._coefficients, self._local


class LastLayer(Sketching):
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

    def matrix(self, numbers: Tensor) -> CandidateMatrix:
        plan, group = self._plan, self._group
        valid, numbers = _finite(numbers)
        self._largest = numbers[:, 1]
        groups = plan.groups.to(group.device)
        moments = self.moments.fitted(self._largest)
        columns = self._agree_on_columns(groups, valid, moments)
        rows = gather_rows(last_layer.rows_at(self._held, columns, groups, moments), plan, group, "gather")
        rows = torch.where(valid.unsqueeze(1), rows, 0.0)
        return CandidateMatrix(plan.positions, rows, valid, numbers[:, 0])

    def learn(self, selection: Selection) -> None:
        group = self._group
        picked = torch.zeros(len(self._plan.positions), dtype=torch.bool)
        picked[_picked_rows(self._plan, selection)] = True
        picked &= self._plan.forwarded  # of the others the gradient is not at hand
        count = int(picked.sum())
        picked = picked.to(group.device)
        if count:
            largest = float(self._largest[picked].max())
            exponent = math.frexp(largest)[1] if largest > 0 else 0
            sums = last_layer.moment_sums(self._held, picked, self._tap.size, exponent)
            sums = group.all_reduce(sums, "moments")
            self.moments = self.moments.learn(*last_layer.from_moment_sums(sums, len(picked), count, exponent))
        else:
            self.moments = self.moments.skip()
        self._held = []

    def _agree_on_columns(self, groups: Tensor, valid: Tensor, moments: Moments) -> Tensor:
        """``[G, h]`` columns of each ranked source. Each rank sums the columns it owns and proposes its best."""
        plan, group = self._plan, self._group
        d, ranks = self._tap.size, group.world_size
        if not plan.num_groups:
            return torch.zeros(0, min(self._columns, d), dtype=torch.int64, device=group.device)
        sums = last_layer.source_sums(self._held, groups, plan.num_groups, moments, valid)
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
    """The exact gradient, of whose update a random projection is exchanged: no columns to agree on."""

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
        valid, numbers = _finite(numbers)
        self._largest = numbers[:, 1]
        return CandidateMatrix(self._plan.positions, numbers[:, 2:], valid, numbers[:, 0])


class Measured(Sketching):
    """Numbers that a function finds in a micro-batch, compared as they are: no optimizer's averages are taken of them.

    Args:
        measure: ``measure(tap, batch)`` returns ``[B, c]``: the losses, then what is compared; else the losses are.
    """

    fixed_coordinates = True

    def __init__(self, tap: Tap, group: Group, measure: Measure):
        self.moments = NoMoments()
        self._tap, self._group, self._measure = tap, group, measure

    def sketch(self, plan: SketchPlan, batches: list[Batch]) -> None:
        self._plan = plan
        found = [self._measure(self._tap, batch)[: len(batch.positions)] for batch in batches]
        self._local = torch.cat(found or [torch.zeros(0, 1, device=self._group.device)])

    def matrix(self, numbers: Tensor) -> CandidateMatrix:
        valid, numbers = _finite(numbers)
        compared = numbers[:, 1:] if numbers.shape[1] > 1 else numbers
        return CandidateMatrix(self._plan.positions, compared, valid, numbers[:, 0])


def _own_numbers(name: str, measure: Measure, tap: Tap, batch: Batch) -> Tensor:
    """What a function of the user's finds, if it is as it must be."""
    numbers = measure(tap, batch)
    if not isinstance(numbers, Tensor) or numbers.ndim != 2 or len(numbers) != len(batch.lengths):
        found = f"a tensor {list(numbers.shape)}" if isinstance(numbers, Tensor) else type(numbers).__name__
        raise TrainingError(
            f"--selection.estimator {name} returned {found} for a micro-batch of {len(batch.lengths)} examples, but "
            f"was to return a tensor with a row for each: its loss, and what is compared"
        )
    return numbers.detach().float()


class Length(Estimator):
    """The tokens of each candidate, which every rank knows: nothing is forwarded, and no loss is known."""

    fixed_coordinates = True

    def __init__(self, group: Group):
        self.moments = NoMoments()
        self._group = group

    def known(self, candidates: Candidates) -> Tensor:
        self._lengths = candidates.lengths
        return torch.ones(len(candidates), dtype=torch.bool)

    def sketch(self, plan: SketchPlan, batches: list[Batch]) -> None:
        self._plan = plan

    def exchange(self) -> Tensor:
        return self._lengths[self._plan.positions].float().unsqueeze(1).to(self._group.device)

    def matrix(self, numbers: Tensor) -> CandidateMatrix:
        valid = torch.ones(len(numbers), dtype=torch.bool, device=numbers.device)
        return CandidateMatrix(self._plan.positions, numbers, valid, torch.full_like(numbers[:, 0], torch.nan))


def _finite(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows are finite ``[s]``, and all of them, zero where they are not."""
    valid = numbers.isfinite().all(1)
    return valid, torch.where(valid.unsqueeze(1), numbers, 0.0)


def _picked_rows(plan: SketchPlan, selection: Selection) -> Tensor:
    """Rows of the candidate matrix that were picked, ascending."""
    return torch.searchsorted(plan.positions, selection.picked.sort().values)
