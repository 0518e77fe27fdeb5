"""The interface between a step and its estimator: sketch on this rank, exchange, learn from what was selected.

The mathematics is in `colm_scale.sketch` and knows nothing of ranks; the modules here decide what is exchanged.

Bytes exchanged per step, with W ranks (none with one), G ranked sources, e = ceil(d / W) columns owned by each rank,
and S = W * (most candidates sketched by any rank) rows, s of which are not padding:

| estimator | gather | columns | moments, if any row was picked |
|---|---|---|---|
| `ZerothOrder` | 4 S (K + 1) | - | - |
| `Measured`, of c columns | 4 S c | - | - |
| `Length` | - | - | - |
| `LastLayer` | 4 S (h + 2) | 4 G W e + 8 G W min(h, e) | 16 d |
| `CountSketched` | 4 S (h + 2) | - | 16 d |
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from colm_scale.distributed.exchange import gather_rows
from colm_scale.distributed.group import Group
from colm_scale.records import Batch, CandidateMatrix, Candidates, Selection, SketchPlan
from colm_scale.selection.moments import Moments, NoMoments
from colm_scale.sketch.store import NoSketchStore, SketchStore


class Estimator:
    """Computes the candidate matrix of each step. The base class compares no candidates.

    Every rank calls the methods once per step, in this order.

    Attributes:
        moments: Normalise the sketches.
        fixed_coordinates: Whether the matrix depends on the moments and the numbers from `exchange` alone, so that
            numbers from an earlier step can stand for a candidate.
        facts: Numbers about the last step for its report, by name.
        store: Numbers from earlier steps for sketch reuse. Part of a checkpoint, as are the moments.
    """

    moments: Moments = NoMoments()
    fixed_coordinates: bool = False
    facts: Mapping[str, float] = MappingProxyType({})
    store: SketchStore = NoSketchStore()

    def known(self, candidates: Candidates) -> Tensor:
        """``[n]`` bool, candidates that need no forward."""
        return torch.zeros(len(candidates), dtype=torch.bool)

    def sketch(self, plan: SketchPlan, batches: list[Batch]) -> None:
        """Sketch this rank's micro-batches. An empty one (no positions) is forwarded and its result dropped."""

    def exchange(self) -> Tensor:
        """Exchange the ranks' numbers.

        Returns:
            ``[s, c]`` float32, equal on every rank: the numbers of each candidate in the plan, zero if it was not
            forwarded. A row that is not finite is a failed sketch.
        """
        return torch.zeros(0, 0)

    def matrix(self, numbers: Tensor) -> CandidateMatrix:
        """The candidate matrix, from the numbers that `exchange` returned."""
        return CandidateMatrix.without_rows()

    def gather(self) -> CandidateMatrix:
        """Exchange, and return the candidate matrix, equal on every rank."""
        return self.matrix(self.exchange())

    def learn(self, selection: Selection) -> None:
        """Update the moments from the picked (not kept) rows, and forget the sketches."""

    def restart_moments(self) -> None:
        """Forget the moments, because the sources have changed."""
        self.moments = self.moments.fresh()


class Sketching(Estimator):
    """Exchanges one row for each candidate that this rank sketched: ``[own, c]`` in ``_local``."""

    _group: Group
    _plan: SketchPlan
    _local: Tensor

    def exchange(self) -> Tensor:
        return gather_rows(self._local, self._plan, self._group, "gather")


def finite(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """``[s]`` bool, the rows that are finite; and ``numbers``, zero in the others."""
    valid = numbers.isfinite().all(1)
    return valid, torch.where(valid.unsqueeze(1), numbers, 0.0)


def picked_rows(plan: SketchPlan, selection: Selection) -> Tensor:
    """Rows of the candidate matrix that were picked, ascending."""
    return torch.searchsorted(plan.positions, selection.picked.sort().values)
