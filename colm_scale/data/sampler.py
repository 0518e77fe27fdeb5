"""Samplers of candidates: a step's candidates are a function of its number alone, so that a run can resume anywhere."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from colm_scale.data.examples import Examples, too_few
from colm_scale.data.recorded_selection import SelectionRecord, index_of
from colm_scale.errors import UserError
from colm_scale.randomness import generator
from colm_scale.records import Candidates, Json


class Sampler(Protocol):
    """Draws the candidates of each step, the same ones on every rank.

    Attributes:
        examples: The examples that the indices of the last drawn candidates refer to.
        counts: Examples per source with each of the `REMARKS` so far.
    """

    examples: Examples
    counts: dict[str, dict[str, int]]

    def __call__(self, step: int) -> Candidates:
        """Draw the candidates of a step; steps count from 1 and come in order."""

    def state(self) -> Json:
        """Return the position of the next step, as plain JSON."""

    def load(self, state: Json) -> None:
        """Continue from the position of a `state`."""


class CandidateSampler:
    """Cuts an endless stream of examples, one seeded permutation per epoch, into steps of ``count``.

    Every example is a candidate once per epoch, whatever ``count`` is; a step that crosses the end of an epoch may
    contain an example twice. Steps can be drawn in any order. Rank-equal.

    Raises:
        UserError: There are fewer than ``count`` examples.
    """

    def __init__(self, examples: Examples, count: int, seed: int):
        if count > len(examples):
            raise UserError(too_few(count, len(examples), examples.dropped))
        self.examples, self.counts = examples, examples.counts
        self._lengths, self._protects = examples.lengths, bool(examples.protected.any())
        self._size, self._count, self._seed = len(examples), count, seed
        self._permutations: dict[int, Tensor] = {}

    def __call__(self, step: int) -> Candidates:
        start = (step - 1) * self._count
        first, last = start // self._size, (start + self._count - 1) // self._size
        self._permutations = {epoch: self._permutation(epoch) for epoch in range(first, last + 1)}
        stream = torch.cat(list(self._permutations.values()))
        return self._at(step, stream[start - first * self._size :][: self._count])

    def _at(self, step: int, indices: Tensor) -> Candidates:
        ids, sources = self.examples.ids[indices], self.examples.sources[indices]
        protected = self.examples.protected[indices] if self._protects else None
        return Candidates(step, indices, ids, sources, self._lengths[indices], protected)

    def state(self) -> Json:
        return {}  # the step's number says it all

    def load(self, state: Json) -> None:
        pass

    def _permutation(self, epoch: int) -> Tensor:
        """Return ``[N]``, drawn unless the previous step used it too."""
        if epoch in self._permutations:
            return self._permutations[epoch]
        return torch.randperm(self._size, generator=generator(self._seed, "shuffle", epoch))


class RecordedSampler(CandidateSampler):
    """Gives each step its recorded candidates, for a replay.

    Raises:
        UserError: The record does not fit these examples, see `SelectionRecord.check`.
    """

    def __init__(self, examples: Examples, record: SelectionRecord):
        super().__init__(examples, 1, seed=0)
        record.check(examples.ids, examples.sources, examples.source_names)
        self._record = record

    def __call__(self, step: int) -> Candidates:
        return self._at(step, index_of(self._record.candidates(step), self.examples.ids))
