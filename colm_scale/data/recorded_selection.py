"""A run's recorded selections (``selection.jsonl``), read back and checked for a replay.

A line has the numbers of its candidates' sources; their names are in it if they are not those of the line before. Older
versions wrote a name for each candidate.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from colm_scale.errors import TrainingError, UserError
from colm_scale.records import Candidates, Json, Selection, long_tensor

FILE = "selection.jsonl"


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """A line of ``selection.jsonl``.

    Attributes:
        candidates, sources: Id and source name of each candidate.
        selected, weights: Ids and weights of the coreset, the kept ones first.
        kept: Number of kept ones.
    """

    step: int
    candidates: Sequence[int]
    sources: Sequence[str]
    selected: Sequence[int]
    weights: Sequence[float]
    kept: int


def recorded_steps(file: Path) -> Iterator[RecordedStep]:
    """Read the steps of a file in their order, from 1. An incomplete last line is skipped.

    Raises:
        UserError: The file cannot be read, or a line is not a step, or not the next one. Names the line.
    """
    count, names = 0, SourceNames()
    try:
        with file.open("rb") as lines:
            for count, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    count -= 1
                    break
                yield _step(line, count, names, f"{file} line {count}")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    if not count:
        raise UserError(f"{file} holds no step")


class SourceNames:
    """The names of sources in the lines read so far."""

    def __init__(self) -> None:
        self._names: Sequence[str] = ()

    def of(self, line: Json) -> list[str]:
        """Return the source of each candidate of the next line.

        Raises:
            ValueError, TypeError, KeyError: The line is malformed, or it and those before do not name each source.
        """
        if "names" in line:
            self._names = list(line["names"])
        named: dict[object, object] = dict(enumerate(self._names))
        found = [source if isinstance(source, str) else named.get(source) for source in line["sources"]]
        names = [name for name in found if isinstance(name, str)]
        if len(names) < len(found):
            raise ValueError("a source has no name")
        return names


def _step(line: bytes, number: int, names: SourceNames, where: str) -> RecordedStep:
    try:
        written = json.loads(line)
        written["sources"] = names.of(written)
        found = RecordedStep(**{name: written[name] for name in RecordedStep.__dataclass_fields__})
        whole = len(found.candidates) == len(found.sources) and len(found.selected) == len(found.weights)
        whole = whole and 0 <= found.kept <= len(found.selected) > 0
        whole = whole and all(isinstance(each, int) for each in (*found.candidates, *found.selected))
        whole = whole and all(math.isfinite(weight) and weight > 0 for weight in found.weights)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} is not a step of a selection.jsonl: {type(error).__name__}: {error}") from None
    if not whole:
        raise UserError(f"{where} is not a step of a selection.jsonl: its lists do not fit together")
    if found.step != number:
        raise UserError(f"{where} is step {found.step}, but must be step {number}")
    strangers = Counter(found.selected) - Counter(found.candidates)
    if strangers:
        raise UserError(f"{where}: step {number} has selected id {min(strangers)}, which was not a candidate")
    return found


class SelectionRecord:
    """A record in memory: 16 bytes per candidate and per selected example.

    Args:
        path: A run directory, or its ``selection.jsonl``.

    Attributes:
        file: The ``selection.jsonl``.
        steps: Number of steps.
        most_selected: Size of the largest coreset.
        digest: SHA-256 of the record, in hexadecimal.
        rows_digest: SHA-256 of the rows that the run trained on; None if the run has not recorded it.
        ids: ``[C]`` int64 ids of the candidates of all steps.

    Raises:
        UserError: See `recorded_steps`.
    """

    def __init__(self, path: str):
        self.file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        ids, picks, weights, kept = array("q"), array("q"), array("d"), array("q")
        ends, pick_ends, numbers = array("q", [0]), array("q", [0]), array("q")
        codes: dict[str, int] = {}
        for step in recorded_steps(self.file):
            ids.extend(step.candidates)
            picks.extend(step.selected)
            weights.extend(step.weights)
            numbers.extend(codes.setdefault(name, len(codes)) for name in step.sources)
            kept.append(step.kept)
            ends.append(len(ids))
            pick_ends.append(len(picks))
        columns = (ids, picks, numbers, kept, ends, pick_ends)
        self.ids, self._picks, self._sources, self._kept, self._ends, self._pick_ends = map(_tensor, columns)
        self._weights, self._names = torch.frombuffer(weights, dtype=torch.float64).clone(), list(codes)
        self.steps, self.most_selected = len(kept), int(self._pick_ends.diff().max())
        digest = hashlib.sha256(repr(self._names).encode())
        for column in (*columns, weights):
            digest.update(column.tobytes())
        self.digest, self.rows_digest = digest.hexdigest(), _rows_digest(self.file.parent / "run.json")

    def candidates(self, step: int) -> Tensor:
        """Return ``[n]`` int64 ids of a step's candidates.

        Raises:
            TrainingError: There is no such step.
        """
        if step > self.steps:
            raise TrainingError(f"step {step}: {self.file} holds {self.steps} steps")
        return self.ids[self._ends[step - 1] : self._ends[step]]

    def selection(self, candidates: Candidates) -> Selection:
        """Return the recorded selection from a step's candidates.

        Raises:
            TrainingError: The candidates differ from the recorded ones. Names the first difference.
        """
        step, recorded = candidates.step, self.candidates(candidates.step)
        if len(recorded) != len(candidates) or not torch.equal(recorded, candidates.ids):
            pairs = zip(candidates.ids.tolist(), recorded.tolist())
            here, there = next(((a, b) for a, b in pairs if a != b), (f"{len(candidates)} in all", len(recorded)))
            raise TrainingError(
                f"step {step}: the candidates differ from those in {self.file}: id {here} in place of {there}. Use "
                f"the same data, in the same order, and the same --train.seed"
            )
        places: dict[int, deque[int]] = {}
        for position, id_ in enumerate(recorded.tolist()):
            places.setdefault(id_, deque()).append(position)
        own = slice(self._pick_ends[step - 1], self._pick_ends[step])
        positions = long_tensor([places[id_].popleft() for id_ in self._picks[own].tolist()])
        return Selection(positions, self._weights[own].float(), kept=int(self._kept[step - 1]))

    def check(self, ids: Tensor, sources: Tensor, names: Sequence[str]) -> None:
        """Check that the record was made from these training examples.

        Args:
            ids, sources: ``[N]`` of all examples.
            names: ``[Q]`` names of the sources.

        Raises:
            UserError: A candidate is not among the examples, or has another source. Names the first.
        """
        places = index_of(self.ids, ids)
        if len(absent := (places < 0).nonzero().flatten()):
            raise UserError(
                f"{self._where(absent[0])} is not among the training examples: the record was made from other data, or "
                f"the example is too long here (--data.max_length, --data.overlong)"
            )
        numbers = {name: number for number, name in enumerate(names)}
        recorded = long_tensor([numbers.get(name, -1) for name in self._names])[self._sources]
        if len(other := (recorded != sources[places]).nonzero().flatten()):
            there = self._names[int(self._sources[other[0]])]
            here = names[int(sources[places[other[0]]])]
            raise UserError(f"{self._where(other[0])} has source {there!r}, but {here!r} in this data")

    def _where(self, place: Tensor) -> str:
        step = int(torch.searchsorted(self._ends, place, right=True))
        return f"{self.file} step {step}: id {int(self.ids[place])}"


def index_of(wanted: Tensor, ids: Tensor) -> Tensor:
    """Find each of the ``wanted`` ``[m]`` in the distinct ``ids`` ``[N]``: ``[m]`` int64 places, -1 if absent."""
    order = ids.argsort()
    places = order[torch.searchsorted(ids[order], wanted).clamp(max=len(ids) - 1)]
    return torch.where(ids[places] == wanted, places, -1)


def _tensor(column: array[int]) -> Tensor:
    return torch.from_numpy(np.frombuffer(column, dtype=np.int64).copy())


def _rows_digest(facts: Path) -> str | None:
    try:
        found: Mapping[str, str] = json.loads(facts.read_text("utf-8"))
    except (OSError, ValueError):
        return None  # a record without its run, or of an older version: ids and sources are still checked
    return found.get("rows_digest")
