"""Which examples are the candidates of a step: a pure function of the step, so that a run resumes anywhere."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from colm_scale.data.examples import Examples
from colm_scale.data.recorded_selection import SelectionRecord, index_of
from colm_scale.errors import UserError
from colm_scale.randomness import generator
from colm_scale.records import Candidates


class Sampler(Protocol):
    """Draws the candidates of each step in turn, the same ones on every rank.

    Attributes:
        examples: What the indices of the candidates last drawn refer to.
        dropped, cut: Examples per source that were too long and left out, or cut, so far.
    """

    examples: Examples
    dropped: dict[str, int]
    cut: dict[str, int]

    def __call__(self, step: int) -> Candidates:
        """The candidates of a step, from 1; steps are asked for in turn."""

    def state(self) -> dict[str, Any]:
        """Where the next step begins, as plain JSON."""

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""


class CandidateSampler:
    """Cuts an endless stream of examples, one seeded permutation after the other, into steps of ``count``.

    Every example is a candidate once per epoch, whatever ``count`` is; a step across the end of an epoch may hold an
    example twice. Rank-equal.

    Raises:
        UserError: There are fewer than ``count`` examples.
    """

    def __init__(self, examples: Examples, count: int, seed: int):
        if count > len(examples):
            raise UserError(
                f"--selection.candidates is {count}, but only {len(examples)} training examples are there "
                f"({sum(examples.dropped.values())} were dropped): give at most {len(examples)}"
            )
        self.examples, self.dropped, self.cut = examples, examples.dropped, examples.cut
        self._ids, self._sources, self._lengths = examples.ids, examples.sources, examples.lengths
        self._protected = examples.protected if examples.protected.any() else None
        self._size, self._count, self._seed = len(examples), count, seed
        self._permutations: dict[int, Tensor] = {}

    def __call__(self, step: int) -> Candidates:
        """The candidates of a step, from 1."""
        start = (step - 1) * self._count
        first, last = start // self._size, (start + self._count - 1) // self._size
        self._permutations = {epoch: self._permutation(epoch) for epoch in range(first, last + 1)}
        stream = torch.cat(list(self._permutations.values()))
        return self._at(step, stream[start - first * self._size :][: self._count])

    def _at(self, step: int, indices: Tensor) -> Candidates:
        protected = None if self._protected is None else self._protected[indices]
        return Candidates(step, indices, self._ids[indices], self._sources[indices], self._lengths[indices], protected)

    def state(self) -> dict[str, Any]:
        return {}  # all there is to know is the step

    def load(self, state: dict[str, Any]) -> None:
        """Nothing to do: any step can be asked for."""

    def _permutation(self, epoch: int) -> Tensor:
        """``[N]``, drawn unless the step before has used it too."""
        if epoch in self._permutations:
            return self._permutations[epoch]
        return torch.randperm(self._size, generator=generator(self._seed, "shuffle", epoch))


class RecordedSampler(CandidateSampler):
    """Gives each step the candidates that a record has for it.

    Raises:
        UserError: The record is not one of these examples, see `SelectionRecord.check`.
    """

    def __init__(self, examples: Examples, record: SelectionRecord):
        super().__init__(examples, 1, seed=0)
        record.check(examples.ids, examples.sources, examples.source_names)
        self._record = record

    def __call__(self, step: int) -> Candidates:
        return self._at(step, index_of(self._record.candidates(step), self._ids))
