"""The audit of a run: Parquet files with a row for every candidate of every step, and one with all training examples.

Rows are buffered, and written before each checkpoint and at the end of the run, as complete files named after their
steps. A killed run therefore leaves complete files, and lacks only steps that are repeated when it resumes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from colm_scale.data.examples import Examples
from colm_scale.records import REASONS, Audit, StepReport

if TYPE_CHECKING:
    import pyarrow as pa

MOST_ROWS = 65_536
"""Rows that are buffered, about 2 MB."""
_PART = "part-{:08d}-{:08d}.parquet"


class AuditWriter:
    """Writes the audit of one run.

    Args:
        folder: Folder of the files, created with the first one.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._held: list[Mapping[str, Tensor]] = []
        self._names: Sequence[str] = ()

    def add(self, report: StepReport, audit: Audit, source_names: Sequence[str]) -> None:
        """Buffer a step's candidates; write if the buffer is full."""
        candidates, selection = report.candidates, report.selection
        weights = torch.zeros(len(candidates))
        weights[selection.positions] = selection.weights.float()
        columns = {"id": candidates.ids, "source": candidates.sources, "reason": audit.reasons}
        columns |= {"score": audit.scores, "loss": audit.losses, "weight": weights}
        self._held.append({"step": torch.full_like(candidates.ids, report.step), **columns})
        self._names = source_names
        if sum(len(step["id"]) for step in self._held) >= MOST_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the buffered rows.

        Raises:
            OSError: The file cannot be written.
        """
        if not self._held:
            return
        columns = {name: torch.cat([step[name] for step in self._held]).numpy() for name in self._held[0]}
        first, last = (int(self._held[place]["step"][0]) for place in (0, -1))
        _write(_table(columns, {"source": self._names, "reason": REASONS}), self._folder / _PART.format(first, last))
        self._held.clear()


def write_examples(path: Path, examples: Examples) -> None:
    """Write a row for each training example, which shows those that never become candidates.

    Raises:
        OSError: The file cannot be written.
    """
    columns = {"id": examples.ids, "source": examples.sources, "protected": examples.protected}
    numbers = {name: column.numpy() for name, column in columns.items()}
    _write(_table(numbers, {"source": examples.source_names}), path)


def cut(folder: Path, after: int) -> None:
    """Remove the rows of steps later than ``after``, and incomplete files."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    for part in sorted(folder.glob("*part-*")):
        first, last = _steps(part)
        if part.suffix != ".parquet" or first > after:
            part.unlink()
        elif last > after:
            table = pq.read_table(part)
            _write(table.filter(pc.field("step") <= after), folder / _PART.format(first, after))
            part.unlink()


def _steps(part: Path) -> tuple[int, int]:
    first, last = part.name.split(".parquet")[0].split("-")[1:]
    return int(first), int(last)


def _table(columns: Mapping[str, object], words: Mapping[str, Sequence[str]]) -> pa.Table:
    """Build a table from numpy columns, NaN as null.

    Args:
        words: Columns of indices, and the words that they stand for.
    """
    import pyarrow as pa

    arrays = {name: pa.array(values, from_pandas=True) for name, values in columns.items()}
    for name, known in words.items():
        arrays[name] = pa.DictionaryArray.from_arrays(arrays[name].cast(pa.int32()), pa.array(known, pa.string()))
    return pa.table(arrays)


def _write(table: pa.Table, path: Path) -> None:
    """Write to a temporary name and rename, so that the file is always complete."""
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    pq.write_table(table, new, compression="zstd")
    new.replace(path)
