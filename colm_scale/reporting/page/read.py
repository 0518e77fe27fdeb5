"""Read run directories: numbers by step in columns, counts by source, and a list of what is missing.

Files are parsed row by row, so that memory grows with the numbers of a long run and not with its text.
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

from colm_scale.data.recorded_selection import SourceNames
from colm_scale.errors import UserError
from colm_scale.records import Json
from colm_scale.reporting.run_directory import FACTS
from colm_scale.reporting.summary import Evaluation

MOST_RUNS = 8
"""Most runs on a page, one for each colour."""

START = "start_seconds."
"""Beginning of the names, in `Run.environment`, of the seconds from the start of the process to the first step."""

_Parsed = TypeVar("_Parsed")
Key = tuple[str, ...]
"""Path of a number in a row: ``("seconds", "train")``, or in a list its index, ``("peak_bytes", "0")``."""


@dataclass(frozen=True, slots=True)
class Composition:
    """Candidates and selected examples of a run, by source.

    Attributes:
        names: The ``Q`` sources, those of the training data first.
        candidates, selected: ``[S, Q]`` int64 examples in each step.
        seen, trained: ``[Q]`` int64 distinct examples that were candidates, and that were trained on.
    """

    names: tuple[str, ...]
    candidates: np.ndarray
    selected: np.ndarray
    seen: np.ndarray
    trained: np.ndarray


@dataclass(frozen=True, slots=True)
class Run:
    """The content of a run directory.

    Attributes:
        name: Name of the folder, with its parents if two runs share the name.
        steps: ``[S]`` int64 steps of ``metrics.jsonl``.
        columns: ``[S]`` float64 for each number of ``metrics.jsonl``; NaN if a step lacks it.
        composition: Content of ``selection.jsonl``.
        config: Every option and its value, ``{"train.steps": 80, ...}``.
        environment: Content of ``environment.json``, flat in the same way.
        planned: Planned steps; 0 if not recorded.
        sizes: Training examples of each source; empty if not recorded.
        kept: Sources whose candidates all enter the coreset.
        missing: Sentences that name missing or incomplete files.
    """

    name: str
    path: Path
    steps: np.ndarray
    columns: Mapping[Key, np.ndarray]
    composition: Composition
    evaluations: tuple[Evaluation, ...]
    config: Mapping[str, object]
    environment: Mapping[str, object]
    planned: int
    sizes: Mapping[str, int]
    kept: frozenset[str]
    missing: tuple[str, ...]

    def column(self, *key: str) -> np.ndarray:
        """``[S]`` one number of every step; all NaN if no step has it."""
        return self.columns.get(key, np.full(len(self.steps), np.nan))

    def below(self, *key: str) -> list[str]:
        """Names below ``key``, e.g. the phases below ``("seconds",)``, in the order of the rows."""
        return list(dict.fromkeys(name[len(key)] for name in self.columns if name[: len(key)] == key != name))

    def start_seconds(self) -> dict[str, float]:
        """Seconds from the start of the process until it was ready for its first step, by part; empty if unknown."""
        found = {name.removeprefix(START): value for name, value in self.environment.items() if name.startswith(START)}
        return {part: seconds for part, seconds in found.items() if isinstance(seconds, float)}

    def floor_seconds(self) -> np.ndarray:
        """``[S]`` seconds of the bare floor; NaN if it was not measured."""
        seconds: np.ndarray = self.column("seconds", "step") / self.column("measured_over_floor")
        return seconds


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Read runs, in the order of ``paths``.

    Raises:
        UserError: A folder is not a run directory or is listed twice, or a file is damaged (names file and line).
    """
    if len(paths) > MOST_RUNS:
        raise UserError(f"{len(paths)} runs do not fit on one page: list at most {MOST_RUNS}")
    folders = [Path(path) for path in paths]
    resolved = [folder.resolve() for folder in folders]
    for number, folder in enumerate(resolved):
        if folder in resolved[:number]:
            raise UserError(f"{folders[number]} is listed twice: list each run once")
    return [_read_run(folder, name) for folder, name in zip(folders, _names(resolved))]


def _read_run(path: Path, name: str) -> Run:
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{path} is not a run directory: it has no metrics.jsonl")
    missing: list[str] = []
    steps, columns = _columns(_rows(metrics, missing), metrics)
    planned, sources = _optional(path / FACTS, _planned, missing) or (0, [])
    sizes = {source["name"]: source["examples"] for source in sources}
    selection = path / "selection.jsonl"
    composition = _composition(_rows(selection, missing), list(sizes), selection)
    evaluated = path / "evaluations.jsonl"
    evaluations = tuple(_evaluation(row, evaluated) for row in _rows(evaluated, missing))
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
    """The last part of each path, or as many parts as make the names distinct."""
    longest = max(len(folder.parts) for folder in folders)
    for depth in range(1, longest + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return list(map(str, folders))


def _rows(path: Path, missing: list[str]) -> Iterator[tuple[int, Json]]:
    """Line number and content of each row. An incomplete last line is skipped and added to ``missing``."""
    if not path.is_file():
        missing.append(f"There is no {path.name}.")
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                missing.append(f"The last line of {path.name} is incomplete and was skipped.")
                return
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise UserError(f"{path} line {number} is damaged: it is not the JSON row of a step")
            yield number, row


class _Table:
    """Columns that grow row by row; a number that a row lacks is ``blank``."""

    def __init__(self, blank: float):
        self._blank, self._rows = blank, 0
        self._columns: dict[Key, MutableSequence[float]] = {}

    def add(self, row: Iterable[tuple[Key, float]]) -> None:
        for key, value in row:
            self._filled(key).append(value)
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
    drawn, steps, named = _Table(0), 0, SourceNames()
    seen: dict[str, set[int]] = {name: set() for name in names}
    trained: dict[str, set[int]] = {name: set() for name in names}
    for number, row in rows:
        try:
            sources = named.of(row)
            source_of = dict(zip(row["candidates"], sources, strict=True))
            picked = [source_of[example] for example in row["selected"]]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path} line {number} is damaged: candidates, sources and selected do not match") from None
        for example, source in source_of.items():
            seen.setdefault(source, set()).add(example)
        for example, source in zip(row["selected"], picked):
            trained.setdefault(source, set()).add(example)
        drawn.add(_numbers({"candidates": Counter(sources), "selected": Counter(picked)}))
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
        raise UserError(f"{path} line {number} is damaged: it lacks {lacking}") from None
    except TypeError:
        raise UserError(f"{path} line {number} is damaged: its sample is malformed") from None
    if not isinstance(found.losses, dict):
        raise UserError(f"{path} line {number} is damaged: losses are not by source")
    return found


def _optional(path: Path, parse: Callable[[str], _Parsed], missing: list[str]) -> _Parsed | None:
    """The parsed content of a file. If there is no such file, returns None and adds a sentence to ``missing``."""
    try:
        return parse(path.read_text("utf-8"))
    except FileNotFoundError:
        missing.append(f"There is no {path.name}.")
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from None


def _planned(text: str) -> tuple[int, list[Json]]:
    """Planned steps and sources of ``run.json``."""
    facts = json.loads(text)
    try:
        sources = [{name: source[name] for name in ("name", "examples", "kept")} for source in facts["sources"]]
        return facts["schedule"]["steps"], sources
    except (KeyError, TypeError):
        raise ValueError("it lacks the planned steps or the sources") from None


def _not_yet(done: int, planned: int, evaluations: Sequence[Evaluation]) -> list[str]:
    found = []
    if not done:
        found.append("No step is recorded yet.")
    elif done < planned:
        found.append(f"{done} of {planned} steps are recorded: the run is in progress, or was stopped.")
    if not evaluations:
        found.append("No evaluation is recorded, so there is no held-out loss.")
    return found


def _flat(tree: object, prefix: str = "") -> dict[str, object]:
    """Flatten a tree of mappings; keys are joined by dots."""
    flat: dict[str, object] = {}
    for name, value in tree.items() if isinstance(tree, Mapping) else ():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
    return flat
