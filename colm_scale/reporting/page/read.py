"""Run directories as a page needs them: numbers by step in columns, what each source had, and what is missing.

Files are read row by row and folded at once, so that a long run takes memory by its numbers and not by its text.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import yaml

from colm_scale.errors import UserError
from colm_scale.records import Json
from colm_scale.reporting.run_directory import FACTS
from colm_scale.reporting.summary import Evaluation

MOST_RUNS = 8
"""Runs of one page: so many colours there are."""

_Parsed = TypeVar("_Parsed")
Key = tuple[str, ...]
"""Where a number stands in a row: ``("seconds", "train")``; in a list, its place: ``("peak_bytes", "0")``."""


@dataclass(frozen=True, slots=True)
class Composition:
    """What a run drew and trained on, by source.

    Attributes:
        names: The ``Q`` sources, those of the training data first.
        candidates, selected: ``[S, Q]`` int64, how many of each step.
        seen, trained: ``[Q]`` int64, different examples that were ever candidates, or trained on.
    """

    names: tuple[str, ...]
    candidates: np.ndarray
    selected: np.ndarray
    seen: np.ndarray
    trained: np.ndarray


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory.

    Attributes:
        name: The folder's name, made longer where two runs share it.
        steps: ``[S]`` int64, the steps of ``metrics.jsonl``.
        columns: ``[S]`` float64 per number of ``metrics.jsonl``; NaN where a step has none.
        composition: Of ``selection.jsonl``.
        config: Every option and its value, ``{"train.steps": 80, ...}``.
        environment: Of ``environment.json``, as flat.
        planned: Steps that the run is to make; None if that is not written down.
        sizes: Training examples of each source; empty if that is not written down.
        kept: Sources all of whose candidates are trained on.
        missing: What could not be read, or is not there yet, in sentences.
    """

    name: str
    path: Path
    steps: np.ndarray
    columns: Mapping[Key, np.ndarray]
    composition: Composition
    evaluations: tuple[Evaluation, ...]
    config: Mapping[str, object]
    environment: Mapping[str, object]
    planned: int | None
    sizes: Mapping[str, int]
    kept: frozenset[str]
    missing: tuple[str, ...]

    def column(self, *key: str) -> np.ndarray:
        """``[S]`` a number of every step; all NaN if no step has it."""
        return self.columns.get(key, np.full(len(self.steps), np.nan))

    def below(self, *key: str) -> list[str]:
        """The names that follow ``key``, e.g. of the phases below ``("seconds",)``, in the order of the rows."""
        return list(dict.fromkeys(name[len(key)] for name in self.columns if name[: len(key)] == key != name))

    def floor_seconds(self) -> np.ndarray:
        """``[S]`` seconds of the bare floor; NaN where it was not taken."""
        seconds: np.ndarray = self.column("seconds", "step") / self.column("measured_over_floor")
        return seconds


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Every run, in the order of ``paths``.

    Raises:
        UserError: A folder is no run directory, is named twice, or one of its files is damaged (names file and line).
    """
    if len(paths) > MOST_RUNS:
        raise UserError(f"{len(paths)} runs are more than can be told apart side by side: name at most {MOST_RUNS}")
    folders = [Path(path) for path in paths]
    resolved = [folder.resolve() for folder in folders]
    for number, folder in enumerate(resolved):
        if folder in resolved[:number]:
            raise UserError(f"{folders[number]} is named twice: name each run once")
    return [read_run(folder, name) for folder, name in zip(folders, _names(resolved))]


def read_run(path: Path, name: str) -> Run:
    """One run.

    Raises:
        UserError: As `read_runs`.
    """
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{path} is no run directory: it has no metrics.jsonl")
    missing: list[str] = []
    steps, columns = _columns(_rows(metrics, missing), metrics)
    facts = _optional(path / FACTS, json.loads, missing)
    planned, sources = _planned(facts, path / FACTS)
    sizes = {source["name"]: source["examples"] for source in sources}
    selection = path / "selection.jsonl"
    composition = _composition(_rows(selection, missing), list(sizes), selection)
    evaluations = tuple(_evaluation(row, path) for row in _rows(path / "evaluations.jsonl", missing))
    missing += _not_yet(len(steps) and int(steps[-1]), planned, evaluations)
    return Run(
        name=name,
        path=path,
        steps=steps,
        columns=columns,
        composition=composition,
        evaluations=evaluations,
        config=_flat(_optional(path / "config.yaml", yaml.safe_load, missing)),
        environment=_flat(_optional(path / "environment.json", json.loads, missing)),
        planned=planned,
        sizes=sizes,
        kept=frozenset(source["name"] for source in sources if source["kept"]),
        missing=tuple(missing),
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as it takes to tell the runs apart."""
    longest = max(len(folder.parts) for folder in folders)
    for depth in range(1, longest + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return list(map(str, folders))


def _rows(path: Path, missing: list[str]) -> Iterator[tuple[int, Json]]:
    """Line number and content of each row. A last line that is being written is left out, and said to be."""
    if not path.is_file():
        missing.append(f"There is no {path.name}.")
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                missing.append(f"The last line of {path.name} is not whole, and left out.")
                return
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise UserError(f"{path} line {number} is damaged: it is not the JSON row of a step")
            yield number, row


class _Table:
    """Columns that grow by a row at a time. What a row does not have is ``blank`` there."""

    def __init__(self, blank: float):
        self._blank, self._rows = blank, 0
        self._columns: dict[Key, MutableSequence[float]] = {}

    def add(self, row: Iterable[tuple[Key, float]]) -> None:
        for key, value in row:
            column = self._filled(key)
            column.append(value)
        self._rows += 1

    def columns(self) -> dict[Key, np.ndarray]:
        """``[S]`` float64 each."""
        return {key: np.array(self._filled(key)) for key in self._columns}

    def _filled(self, key: Key) -> MutableSequence[float]:
        column = self._columns.setdefault(key, array("d"))
        column.extend([self._blank] * (self._rows - len(column)))
        return column


def _columns(rows: Iterable[tuple[int, Json]], path: Path) -> tuple[np.ndarray, dict[Key, np.ndarray]]:
    steps: list[int] = []
    table = _Table(np.nan)
    for number, row in rows:
        if steps and row["step"] <= steps[-1]:
            raise UserError(f"{path} line {number} is damaged: step {row['step']} follows step {steps[-1]}")
        steps.append(row["step"])
        table.add(_numbers(row))
    return np.array(steps, dtype=np.int64), table.columns()


def _numbers(value: object, key: Key = ()) -> Iterator[tuple[Key, float]]:
    match value:
        case Mapping():
            for name, below in value.items():
                yield from _numbers(below, (*key, name))
        case list():
            for place, below in enumerate(value):
                yield from _numbers(below, (*key, str(place)))
        case bool() | int() | float():
            yield key, float(value)


def _composition(rows: Iterable[tuple[int, Json]], names: list[str], path: Path) -> Composition:
    drawn, steps = _Table(0), 0
    seen: dict[str, set[int]] = {name: set() for name in names}
    trained: dict[str, set[int]] = {name: set() for name in names}
    for number, row in rows:
        try:
            source_of = dict(zip(row["candidates"], row["sources"], strict=True))
            picked = [source_of[example] for example in row["selected"]]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path} line {number} is damaged: candidates, sources and selected do not fit") from None
        for example, source in source_of.items():
            seen.setdefault(source, set()).add(example)
        for example, source in zip(row["selected"], picked):
            trained.setdefault(source, set()).add(example)
        drawn.add(_numbers({"candidates": Counter(row["sources"]), "selected": Counter(picked)}))
        steps += 1
    columns, none = drawn.columns(), np.zeros(steps)
    by_step = (
        np.array([columns.get((what, name), none) for name in seen], dtype=np.int64).reshape(len(seen), steps).T
        for what in ("candidates", "selected")
    )
    distinct = (np.array([len(ids.get(name, ())) for name in seen], dtype=np.int64) for ids in (seen, trained))
    return Composition(tuple(seen), *by_step, *distinct)


def _evaluation(row: tuple[int, Json], path: Path) -> Evaluation:
    number, content = row
    try:
        found = Evaluation.of(content)
    except KeyError as lacking:
        raise UserError(f"{path / 'evaluations.jsonl'} line {number} is damaged: it lacks {lacking}") from None
    except TypeError:
        raise UserError(f"{path / 'evaluations.jsonl'} line {number} is damaged: its sample is not one") from None
    if not isinstance(found.losses, dict):
        raise UserError(f"{path / 'evaluations.jsonl'} line {number} is damaged: losses are not by source")
    return found


def _optional(path: Path, parse: Callable[[str], _Parsed], missing: list[str]) -> _Parsed | None:
    """What a file holds; None, and a sentence, if it is not there."""
    try:
        return parse(path.read_text("utf-8"))
    except FileNotFoundError:
        missing.append(f"There is no {path.name}.")
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"{path} is damaged: {said}") from None


def _planned(facts: Json | None, path: Path) -> tuple[int | None, list[Json]]:
    """Steps that the run is to make, and its sources; None and none if there is no such file."""
    if facts is None:
        return None, []
    try:
        sources = [{name: source[name] for name in ("name", "examples", "kept")} for source in facts["sources"]]
        return facts["schedule"]["steps"], sources
    except (KeyError, TypeError):
        raise UserError(f"{path} is damaged: it does not hold the planned steps and the sources") from None


def _not_yet(done: int, planned: int | None, evaluations: Sequence[Evaluation]) -> list[str]:
    found = []
    if not done:
        found.append("No step is written down yet.")
    elif planned is not None and done < planned:
        found.append(f"{done} of {planned} steps are written down: the run is under way, or was stopped.")
    if not evaluations:
        found.append("No evaluation is written down: there is no held-out loss to show.")
    return found


def _flat(tree: object, prefix: str = "") -> dict[str, object]:
    """A tree of mappings as one, its keys joined by dots."""
    flat: dict[str, object] = {}
    for name, value in tree.items() if isinstance(tree, Mapping) else ():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
    return flat
