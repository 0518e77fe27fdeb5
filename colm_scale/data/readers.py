"""Files and hub data sets to rows of one kind.

Every format is read as records (a dict per row, and its place in the file), one after the other. The rows are then
checked the same way whether they are held or streamed. Errors name the file and line, and only empty lines are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from colm_scale.config import COLUMN_ROLES, RowConfig
from colm_scale.data.formats import Record, records_of, shortened, shown
from colm_scale.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
_FLAGS = {"true": True, "1": True, 1: True, "false": False, "0": False, "": False, 0: False, None: False}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    """One of `ROLES`."""
    content: str


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
    """

    id: int
    source: str
    messages: tuple[Message, ...]
    prompt: str
    completion: str
    where: str
    protected: bool = False


def read_rows(specs: Sequence[str], config: RowConfig) -> list[Row]:
    """Read all rows of files and hub data sets (``ORG/NAME`` or ``ORG/NAME:SPLIT``), in their order.

    Raises:
        UserError: A spec is neither, a file cannot be read or is empty, or a row is not what RowConfig describes.
    """
    return list(each_row(specs, config))


def each_row(specs: Sequence[str], config: RowConfig, *, streaming: bool = False) -> Iterator[Row]:
    """Iterate over the rows of `read_rows`. Of .jsonl and .parquet files and hub data sets, few are held at a time.

    A file in which only some rows name a source is refused at its end.

    Args:
        streaming: Accept only what can be read row by row, .jsonl files and hub data sets, and hold no rows.

    Raises:
        UserError: As `read_rows`; or, with ``streaming``, a file is of another kind.
    """
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
    """Finds the source of each row of one file, in which either all rows name it or none does."""

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
        """Raise a UserError if the file, read to its end, has no rows, or only some of them name a source."""
        if not self.rows:
            raise UserError(f"{spec} has no rows")
        if 0 < self.lacking < self.rows:
            raise UserError(
                f"{self.first_lacking} has no source in the column {self.column!r}, like {self.lacking} of the "
                f"{self.rows} rows of its file: give every row a source, or none (--data.columns.source names "
                "the column)"
            )


def _row(number: int, source: str, record: Record, config: RowConfig) -> Row:
    """Make a row of the first of the three kinds whose columns the record has."""
    cells, where = record.cells, record.where
    column = {role: config.column(role) for role in COLUMN_ROLES}
    there = {role for role, name in column.items() if name in cells}
    messages: tuple[Message, ...] = ()
    prompt = completion = ""
    if "messages" in there:
        messages = _messages(cells[column["messages"]], column["messages"], where)
    elif {"prompt", "completion"} <= there:
        prompt = _string(cells[column["prompt"]], column["prompt"], where)
        completion = _filled(cells[column["completion"]], column["completion"], where)
    elif {"instruction", "output"} <= there:
        prompt = templated(_instruction(cells, column, where), config)
        completion = _filled(cells[column["output"]], column["output"], where)
    else:
        raise UserError(_missing_columns(record, column))
    protected = _flag(cells.get(column["protected"]), column["protected"], where) or protected_by_name(source, config)
    return Row(number, source, messages, prompt, completion, where, protected)


def _instruction(cells: Mapping[str, Any], column: Mapping[str, str], where: str) -> str:
    """Join the instruction and, on a new line, the optional input."""
    instruction = _string(cells[column["instruction"]], column["instruction"], where)
    more = cells.get(column["input"])
    return f"{instruction}\n{_string(more, column['input'], where)}" if more else instruction


def templated(instruction: str, config: RowConfig) -> str:
    """Put an instruction into ``--data.template``."""
    # Not str.format: a template may hold braces of its own.
    return config.template.replace("{instruction}", instruction)


def protected_by_name(source: str, config: RowConfig) -> bool:
    """Tell whether ``--data.protected_sources`` names the source."""
    return source in (config.protected_sources or ())


def _missing_columns(record: Record, column: Mapping[str, str]) -> str:
    there = shortened(", ".join(map(repr, record.cells))) or "(none)"
    return (
        f"{record.where} has the columns {there}, but needs "
        f"{column['messages']!r}, or {column['prompt']!r} and {column['completion']!r}, or "
        f"{column['instruction']!r} and {column['output']!r}. Map columns of other names with --data.columns, "
        "for instance --data.columns '{instruction: question, output: answer}'"
    )


def _messages(value: Any, column: str, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise UserError(f"{where}: {column!r} is {shown(value)}, but must be a list of {{role, content}}")
    messages = tuple(_message(turn, f"{column}[{number}]", where) for number, turn in enumerate(value))
    if not any(message.role == "assistant" for message in messages):
        raise UserError(f"{where}: {column!r} has no turn of the assistant, so there is nothing to learn")
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
    """Read a truth value, a number or, in formats without them, a text; an empty cell is false."""
    key = value.lower() if isinstance(value, str) else value
    if not isinstance(key, str | int | None) or key not in _FLAGS:
        raise UserError(
            f"{where}: {column!r} is {shown(value)}, but must be true or false (or 1 or 0): it marks examples that are "
            "always trained on (--data.columns.protected names the column)"
        )
    return _FLAGS[key]


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
        raise UserError(f"{where}: {name!r} holds half a character, {half!r}, which is not valid text") from error
    return value
