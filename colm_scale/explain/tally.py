"""Totals of a run's record by example and by source, read line by line into 34 bytes per candidate.

    T  steps of the record        C  candidates of all steps        Q  sources with a candidate
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from colm_scale.data.recorded_selection import RecordedStep

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Tally:
    """Totals over the steps of a run.

    Attributes:
        names: ``[Q]`` sources, in the order of their first candidates.
        candidates, trained, kept: ``[T, Q]`` counts of candidates, of those trained on, and of those kept.
        ids, sources: ``[C]`` id and source of each candidate of each step.
        chances: ``[C]`` probability that the candidate is trained on if the picks of its source in that step are drawn
            at random: picks over candidates, among those that were not kept; 1 for a kept one.
        chosen: ``[C]`` bool, candidates that were trained on.
    """

    names: Sequence[str]
    candidates: Ints
    trained: Ints
    kept: Ints
    ids: Ints
    sources: Ints
    chances: Floats
    chosen: NDArray[np.bool_]


def tally(steps: Iterable[RecordedStep]) -> Tally:
    """Sum over all ``steps``."""
    numbers: dict[str, int] = {}
    ids, sources, numbered = array("q"), array("q"), array("q")
    chances, kept, picked = array("d"), array("b"), array("b")
    for step in steps:
        of = [numbers.setdefault(name, len(numbers)) for name in step.sources]
        were_kept = _taken(step.candidates, step.selected[: step.kept])
        others = [None if is_kept else id_ for is_kept, id_ in zip(were_kept, step.candidates)]
        were_picked = _taken(others, step.selected[step.kept :])
        ids.extend(step.candidates)
        sources.extend(of)
        numbered.extend([step.step - 1] * len(of))
        kept.extend(were_kept)
        picked.extend(were_picked)
        chances.extend(_chances(of, were_kept, were_picked))
    source_of, step_of = np.frombuffer(sources, np.int64), np.frombuffer(numbered, np.int64)
    kept_ones, others_picked = (np.frombuffer(column, np.int8).astype(bool) for column in (kept, picked))
    chosen = kept_ones | others_picked
    cells, shape = step_of * len(numbers) + source_of, (int(step_of[-1]) + 1, len(numbers))

    def by_step(cells: Ints) -> Ints:
        return np.bincount(cells, minlength=math.prod(shape)).reshape(shape)

    return Tally(
        names=list(numbers),
        candidates=by_step(cells),
        trained=by_step(cells[chosen]),
        kept=by_step(cells[kept_ones]),
        ids=np.frombuffer(ids, np.int64),
        sources=source_of,
        chances=np.frombuffer(chances, np.float64),
        chosen=chosen,
    )


def _taken(ids: Sequence[int | None], selected: Sequence[int]) -> list[bool]:
    """Mark the selected ``ids``. An id that occurs twice, at the seam of two epochs, is marked as often as selected."""
    left: Counter[int | None] = Counter(selected)
    found: list[bool] = []
    for id_ in ids:
        found.append(left[id_] > 0)
        left[id_] -= found[-1]
    return found


def _chances(sources: Sequence[int], kept: Sequence[bool], picked: Sequence[bool]) -> list[float]:
    """Compute the chance of each candidate of a step, see `Tally`."""
    eligible = Counter(source for source, is_kept in zip(sources, kept) if not is_kept)
    picks = Counter(source for source, is_picked in zip(sources, picked) if is_picked)
    return [1.0 if is_kept else picks[source] / eligible[source] for source, is_kept in zip(sources, kept)]
