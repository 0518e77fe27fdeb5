"""Files and hub data sets to rows of one kind.

Every format is read as records (a dict per row, and its place in the file), one after the other. The rows are then
checked the same way whether they are held or streamed. Errors name the file and line, and only empty lines are skipped.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from colm_scale.config import RowConfig
from colm_scale.data.files import default_sources, files_of
from colm_scale.data.formats import Record, as_flag, is_missing, records_of
from colm_scale.data.layouts import Cells, layout_of
from colm_scale.data.messages import Message, checked_text
from colm_scale.errors import UserError


@dataclass(frozen=True, slots=True)
class Row:
    """One checked row of the user's data, with either ``messages`` or a ``completion``.

    Attributes:
        id: Position in the data as given, counted over all files in their order.
        source: The sub-population that the row belongs to.
        messages: A chat with at least one assistant turn; empty for a prompt and its completion.
        prompt: Text before the completion, with the template applied; may be empty.
        completion: Text to learn, verbatim.
        where: File and line, for error messages: ``train.jsonl line 12``.
        protected: True if the row is trained on whenever it is a candidate.
        tools: What the chat template is told of tools that the assistant may call.
    """

    id: int
    source: str
    messages: tuple[Message, ...]
    prompt: str
    completion: str
    where: str
    protected: bool = False
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def said(self) -> list[object]:
        """All that the model can read of the row, for digests."""
        messages = [message.said for message in self.messages]
        return [messages, self.prompt, self.completion, *([self.tools] if self.tools else [])]


class Columns:
    """Counts the columns that files have and that no row is read from."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._unread: dict[str, Counter[str]] = {}
        self._file = ""

    def begin(self, spec: str) -> None:
        """Note that the rows of a file follow."""
        self._file = spec

    def note(self, cells: Cells, read: Iterable[str]) -> None:
        """Count the columns of a row that are filled and have none of the roles that are ``read``."""
        self._seen.update(cells.names)
        if unread := cells.filled.difference(map(cells.column, read)):
            self._unread.setdefault(self._file, Counter()).update(unread)

    def check(self, config: RowConfig) -> None:
        """Check that every column that ``--data.columns`` names was seen.

        Raises:
            UserError: No file has it.
        """
        for role, column in config.columns.items():
            if column not in self._seen:
                near = difflib.get_close_matches(column, self._seen, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f", they have {', '.join(sorted(self._seen))}"
                raise UserError(f"--data.columns.{role}: no file has a column {column!r}{hint}")

    def lines(self) -> list[str]:
        """Describe what was not read, a line for each file."""
        lines = []
        for spec, counts in self._unread.items():
            columns = ", ".join(f"{name!r} ({count:,} rows)" for name, count in sorted(counts.items()))
            lines.append(f"{spec}: columns not read: {columns}")
        return lines


def read_rows(specs: Sequence[str], config: RowConfig, columns: Columns | None = None) -> list[Row]:
    """Read all rows of files and hub data sets (`data.hub`), in their order.

    Args:
        columns: Notes the columns that are not read.

    Raises:
        UserError: A spec is neither, a file cannot be read or is empty, or a row is not what RowConfig describes.
    """
    return list(each_row(specs, config, columns))


def each_row(
    specs: Sequence[str], config: RowConfig, columns: Columns | None = None, *, streaming: bool = False
) -> Iterator[Row]:
    """Iterate over the rows of `read_rows`. Of .jsonl and .parquet files and hub data sets, few are held at a time.

    A file in which only some rows name a source is refused at its end.

    Args:
        streaming: Accept only what can be read row by row, .jsonl files and hub data sets, and hold no rows.

    Raises:
        UserError: As `read_rows`; or, with ``streaming``, a file is of another kind.
    """
    files = [file for spec in specs for file in files_of(spec)]
    opened = [records_of(file, streaming=streaming) for file in files]
    columns = columns or Columns()
    number = 0
    for file, default_source, records in zip(files, default_sources(files), opened):
        columns.begin(file)
        sources = _FileSources(default_source, config.column("source"))
        for record in records:
            yield _row(number, sources.of(record), record, config, columns)
            number += 1
        sources.check(file)


@dataclass(slots=True)
class _FileSources:
    """Finds the source of each row of one file, in which either all rows name it or none does."""

    default: str
    column: str
    rows: int = 0
    lacking: int = 0
    first_lacking: str = ""

    def of(self, record: Record) -> str:
        self.rows += 1
        value = record.cells.get(self.column)
        if not is_missing(value) and value != "":
            return str(value) if isinstance(value, int) else checked_text(value, self.column, record.where)
        self.lacking += 1
        self.first_lacking = self.first_lacking or record.where
        return self.default

    def check(self, spec: str) -> None:
        """Raise a UserError if the file, read to its end, has no rows, or only some of them name a source."""
        if not self.rows:
            raise UserError(f"{spec} has no rows")
        if 0 < self.lacking < self.rows:
            raise UserError(
                f"{self.first_lacking} has no source in the column {self.column!r}, like {self.lacking} of the "
                f"{self.rows} rows of its file: give every row a source, or none (--data.columns.source names "
                "the column)"
            )


def _row(number: int, source: str, record: Record, config: RowConfig, columns: Columns) -> Row:
    """Make a row of a record, and note which of its columns are read."""
    cells = Cells(record, config)
    layout = layout_of(cells)
    content = layout.read(cells)
    protected = _flag(cells.get("protected"), cells.column("protected"), record.where)
    read = {*layout.needs, *layout.takes, "source", "protected"} - {*content.unread}
    columns.note(cells, read)
    return Row(
        id=number,
        source=source,
        messages=content.messages,
        prompt=content.prompt,
        completion=content.completion,
        where=record.where,
        protected=protected or protected_by_name(source, config),
        tools=content.tools,
    )


def protected_by_name(source: str, config: RowConfig) -> bool:
    """Tell whether ``--data.protected_sources`` names the source."""
    return source in (config.protected_sources or ())


def _flag(value: Any, column: str, where: str) -> bool:
    """Read a truth value; an empty cell is false."""
    try:
        return value not in (None, "") and as_flag(value)
    except ValueError as error:
        raise UserError(
            f"{where}: {column!r} is {error}, but must be true or false (or 1 or 0): it marks examples that are "
            "always trained on (--data.columns.protected names the column)"
        ) from error
