"""Data as the user has it, files and hub data sets of several kinds, into one kind of row.

Every format becomes records (a dict per row, and where it stands), one after the other; from there on one path checks
them, whether the rows are held or streamed. What is wrong with a row is said with its file and line, and nothing is
skipped but empty lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from colm_scale.config import COLUMN_ROLES, DataConfig, RowConfig
from colm_scale.data.builtin import Split, builtin_rows
from colm_scale.data.formats import Record, records_of, shortened, shown
from colm_scale.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
_FLAGS = {"true": True, "1": True, "false": False, "0": False, "": False}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    """One of `ROLES`."""
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the user's data, checked. Either ``messages`` or ``completion`` is there.

    Attributes:
        id: Position in the data as given, counted over all files in their order.
        source: The sub-population that the row belongs to.
        messages: A chat with an assistant's turn in it; None for a prompt and its completion.
        prompt: Text before the completion, with the template already around it; may be empty.
        completion: Text to learn, verbatim.
        where: File and line, for error messages: ``train.jsonl line 12``.
        protected: Whether it is trained on whenever it is a candidate.
    """

    id: int
    source: str
    messages: tuple[Message, ...] | None
    prompt: str
    completion: str
    where: str
    protected: bool = False


def read_rows(specs: Sequence[str], config: DataConfig) -> list[Row]:
    """All rows of some files and hub data sets (``ORG/NAME`` or ``ORG/NAME:SPLIT``), in their order.

    Raises:
        UserError: A spec is neither, a file cannot be read or is empty, or a row is not what DataConfig describes.
    """
    return list(_rows(specs, config, streaming=False))


def each_row(specs: Sequence[str], config: RowConfig) -> Iterator[Row]:
    """The same rows, one at a time: of .jsonl and .parquet files and of hub data sets, little more than one is held.

    Raises:
        UserError: As `read_rows`.
    """
    return _rows(specs, config, streaming=False)


def stream_rows(specs: Sequence[str], config: DataConfig) -> Iterator[Row]:
    """The same rows of .jsonl files and hub data sets, each read when it is asked for, and none held.

    That only some rows of a file name a source comes out at the file's end.

    Raises:
        UserError: As `read_rows`, or a file is of another kind.
    """
    return _rows(specs, config, streaming=True)


def builtin_as_rows(split: Split, config: DataConfig) -> list[Row]:
    """The built-in mixture as rows. Its columns are its own; of ``config`` template and protected sources count.

    Raises:
        UserError: The split is neither "train" nor "eval".
    """
    return [
        Row(
            id=number,
            source=row["source"],
            messages=None,
            prompt=_templated(row["instruction"], config),
            completion=row["output"],
            where=f"built-in {split} data row {number + 1}",
            protected=row["source"] in (config.protected_sources or ()),
        )
        for number, row in enumerate(builtin_rows(split))
    ]


def _rows(specs: Sequence[str], config: RowConfig, *, streaming: bool) -> Iterator[Row]:
    opened = [records_of(spec, streaming=streaming) for spec in specs]
    number = 0
    for spec, (default_source, records) in zip(specs, opened):
        sources = _FileSources(default_source, config.column("source"))
        for record in records:
            yield _row(number, sources.of(record), record, config)
            number += 1
        sources.check(spec)


@dataclass(slots=True)
class _FileSources:
    """Tells the source of each row of one file: all of them name it, or none does."""

    default: str
    column: str
    rows: int = 0
    lacking: int = 0
    first_lacking: str = ""

    def of(self, record: Record) -> str:
        self.rows += 1
        value = record.cells.get(self.column)
        if value not in (None, ""):
            return str(value) if isinstance(value, int) else _string(value, self.column, record.where)
        self.lacking += 1
        self.first_lacking = self.first_lacking or record.where
        return self.default

    def check(self, spec: str) -> None:
        """Raise a UserError unless the file, read to its end, has rows that are alike."""
        if not self.rows:
            raise UserError(f"{spec} has no rows")
        if 0 < self.lacking < self.rows:
            raise UserError(
                f"{self.first_lacking} has no source in the column {self.column!r}, like {self.lacking} of the "
                f"{self.rows} rows of its file: give every row a source, or none (--data.columns.source names "
                "the column)"
            )


def _row(number: int, source: str, record: Record, config: RowConfig) -> Row:
    """A record as a row, by the first of the three kinds whose columns it has."""
    cells, where = record.cells, record.where
    column = {role: config.column(role) for role in COLUMN_ROLES}
    there = {role for role, name in column.items() if name in cells}
    messages, prompt, completion = None, "", ""
    if "messages" in there:
        messages = _messages(cells[column["messages"]], column["messages"], where)
    elif {"prompt", "completion"} <= there:
        prompt = _string(cells[column["prompt"]], column["prompt"], where)
        completion = _filled(cells[column["completion"]], column["completion"], where)
    elif {"instruction", "output"} <= there:
        prompt = _templated(_instruction(cells, column, where), config)
        completion = _filled(cells[column["output"]], column["output"], where)
    else:
        raise UserError(_missing_columns(record, column))
    protected = _flag(cells.get(column["protected"]), column["protected"], where)
    protected = protected or source in (config.protected_sources or ())
    return Row(number, source, messages, prompt, completion, where, protected)


def _instruction(cells: Mapping[str, Any], column: Mapping[str, str], where: str) -> str:
    """The instruction and, on a new line, the input that a row may have."""
    instruction = _string(cells[column["instruction"]], column["instruction"], where)
    more = cells.get(column["input"])
    return f"{instruction}\n{_string(more, column['input'], where)}" if more else instruction


def _templated(instruction: str, config: RowConfig) -> str:
    # Not str.format: a template may hold braces of its own.
    return config.template.replace("{instruction}", instruction)


def _missing_columns(record: Record, column: Mapping[str, str]) -> str:
    there = shortened(", ".join(map(repr, record.cells))) or "(none)"
    return (
        f"{record.where} has the columns {there}, but needs "
        f"{column['messages']!r}, or {column['prompt']!r} and {column['completion']!r}, or "
        f"{column['instruction']!r} and {column['output']!r}. Columns of other names can be given with --data.columns, "
        "for instance --data.columns '{instruction: question, output: answer}'"
    )


def _messages(value: Any, column: str, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise UserError(f"{where}: {column!r} is {shown(value)}, but must be a list of {{role, content}}")
    messages = tuple(_message(turn, f"{column}[{number}]", where) for number, turn in enumerate(value))
    if not any(message.role == "assistant" for message in messages):
        raise UserError(f"{where}: no turn of {column!r} is the assistant's, so there is nothing to learn")
    return messages


def _message(turn: Any, name: str, where: str) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{where}: {name} is {shown(turn)}, but must be an object with role and content")
    role = turn.get("role")
    if role not in ROLES:
        raise UserError(f"{where}: the role of {name} is {shown(role)}, but must be one of {', '.join(ROLES)}")
    check = _filled if role == "assistant" else _string
    return Message(role, check(turn.get("content"), f"{name}.content", where))


def _flag(value: Any, column: str, where: str) -> bool:
    """Formats without truth values or numbers write them as text; an empty cell, or none, is false."""
    known = isinstance(value, str | int | None)
    flag = _FLAGS.get("" if value is None else str(value).lower()) if known else None
    if flag is None:
        raise UserError(
            f"{where}: {column!r} is {shown(value)}, but must be true or false (or 1 or 0): it marks examples that are "
            "always trained on (--data.columns.protected names the column)"
        )
    return flag


def _filled(value: Any, name: str, where: str) -> str:
    found = _string(value, name, where)
    if not found.strip():
        raise UserError(f"{where}: {name!r} is empty, so there is nothing to learn: fill it or leave the row out")
    return found


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {name!r} is {shown(value)}, but must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise UserError(f"{where}: {name!r} holds half a character, {half!r}, which is no text") from error
    return value
