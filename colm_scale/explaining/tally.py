"""What a run's record adds up to, by example and by source. Read line by line; what is held is 25 bytes a candidate.

    T  steps of the record        C  candidates of all steps        N  examples known        Q  sources known
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from colm_scale.selection.recorded import RecordedStep

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums over the steps of a run.

    Attributes:
        names: ``[Q]`` sources that had a candidate, in the order in which they came.
        candidates, trained, kept: ``[T, Q]`` candidates of each source and step, those trained on, and those kept.
        ids, sources: ``[C]`` each time that an example was a candidate: its id and source.
        chances: ``[C]`` with what chance it would have been trained on, had the picks of its source in that step been
            drawn at random: picks over candidates, of those that were not kept; 1 for a kept one.
        chosen: ``[C]`` bool, whether it was.
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
    """Add up all ``steps``."""
    numbers: dict[str, int] = {}
    ids, sources, chances, chosen = array("q"), array("q"), array("d"), array("b")
    counts: list[tuple[Counter, Counter, Counter]] = []
    for step in steps:
        of = [numbers.setdefault(name, len(numbers)) for name in step.sources]
        chance, taken, of_step = _step(step, of)
        ids.extend(step.candidates)
        sources.extend(of)
        chances.extend(chance)
        chosen.extend(taken)
        counts.append(of_step)
    by_step = (np.array([[of[kind][q] for q in range(len(numbers))] for of in counts]) for kind in range(3))
    columns = (np.frombuffer(ids, np.int64), np.frombuffer(sources, np.int64), np.frombuffer(chances, np.float64))
    return Tally(list(numbers), *by_step, *columns, np.frombuffer(chosen, np.int8).astype(bool))


def _step(step: RecordedStep, sources: Sequence[int]) -> tuple[list[float], list[bool], tuple[Counter, ...]]:
    """Chance of each candidate and whether it was chosen; candidates, trained and kept of each source."""
    left_kept, left = Counter(step.selected[: step.kept]), Counter(step.selected[step.kept :])
    present, trained, kept, picked = Counter(sources), Counter(), Counter(), Counter()
    entered, taken = [], []
    for id_, source in zip(step.candidates, sources):
        # An example that is a candidate twice in a step, at the seam of two epochs, is taken once for each selection.
        entered.append(left_kept[id_] > 0)
        left_kept[id_] -= entered[-1]
        was_picked = not entered[-1] and left[id_] > 0
        left[id_] -= was_picked
        taken.append(entered[-1] or was_picked)
        kept[source] += entered[-1]
        picked[source] += was_picked
        trained[source] += taken[-1]
    chances = [
        1.0 if is_kept else picked[source] / (present[source] - kept[source])
        for is_kept, source in zip(entered, sources)
    ]
    return chances, taken, (present, trained, kept)
