"""Data as the user has it, files and hub data sets of several kinds, into one kind of row.

Every format becomes records (a dict per row, and where it stands), one after the other; from there on one path checks
them, whether the rows are held or streamed. What is wrong with a row is said with its file and line, and nothing is
skipped but empty lines.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Number
from pathlib import Path
from typing import Any

from colm_scale.config import DataConfig
from colm_scale.data.builtin import Split, builtin_rows
from colm_scale.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
_HUB_SPEC = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>.+))?")


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
    """

    id: int
    source: str
    messages: tuple[Message, ...] | None
    prompt: str
    completion: str
    where: str


@dataclass(frozen=True, slots=True)
class _Record:
    """One row as its format gives it."""

    where: str
    cells: dict[str, Any]


def read_rows(specs: Sequence[str], config: DataConfig) -> list[Row]:
    """All rows of some files and hub data sets (``ORG/NAME`` or ``ORG/NAME:SPLIT``), in their order.

    Raises:
        UserError: A spec is neither, a file cannot be read or is empty, or a row is not what DataConfig describes.
    """
    return list(_rows(specs, config, streaming=False))


def stream_rows(specs: Sequence[str], config: DataConfig) -> Iterator[Row]:
    """The same rows of .jsonl files and hub data sets, each read when it is asked for, and none held.

    That only some rows of a file name a source comes out at the file's end.

    Raises:
        UserError: As `read_rows`, or a file is of another kind.
    """
    return _rows(specs, config, streaming=True)


def builtin_as_rows(split: Split, config: DataConfig, seed: int = 0) -> list[Row]:
    """The built-in mixture as rows. Its columns are its own; of ``config`` only the template counts.

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
        )
        for number, row in enumerate(builtin_rows(split, seed))
    ]


# From a spec to records


def _records(spec: str, *, streaming: bool) -> tuple[str, Iterable[_Record]]:
    """The source of a spec's rows unless they name one, and the rows, which are read as they are asked for."""
    path = Path(spec)
    if path.suffix.lower() in _READERS or path.exists():
        reader = _file_reader(path)
        if streaming and reader is not _jsonl:
            raise UserError(
                f"{path} cannot be streamed, only .jsonl files and hub data sets can: write it as .jsonl, or leave "
                "--data.streaming out"
            )
        return path.stem, reader(path)
    if match := _HUB_SPEC.fullmatch(spec):
        return match["name"], _hub(match["name"], match["split"] or "train", streaming=streaming)
    raise UserError(
        f"data {spec!r} is neither a file ({', '.join(_READERS)}) nor a hub data set (ORG/NAME or ORG/NAME:SPLIT)"
    )


def _file_reader(path: Path) -> Callable[[Path], Iterable[_Record]]:
    """The reader of a file that is there."""
    if path.is_dir():
        raise UserError(f"{path} is a directory: name the data files in it")
    if not path.exists():
        raise UserError(f"{path} does not exist{_suggestion(path)}")
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{path} has no suffix that tells its format: give one of {', '.join(_READERS)}")
    return _READERS[path.suffix.lower()]


def _suggestion(path: Path) -> str:
    if not path.parent.is_dir():
        return f", nor does its folder {path.parent}"
    close = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _jsonl(path: Path) -> Iterator[_Record]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield _object(_parsed(path, line, number), f"{path} line {number}")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file, read as they are asked for. Nothing but a line feed ends one."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield _decoded(path, line, number).removesuffix("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _json(path: Path) -> Iterator[_Record]:
    text = _text(path)
    items = _parsed(path, text, 1) if text.strip() else []
    if not isinstance(items, list):
        raise UserError(f"{path} holds {_shown(items)}, but a .json file must be a list of objects")
    for number, item in enumerate(items, 1):
        yield _object(item, f"{path} item {number}")


def _csv(path: Path) -> Iterator[_Record]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)

    def lines() -> Iterator[tuple[str, list[str]]]:
        line = 1  # where the row starts; a quoted cell can go on for several lines
        for cells in reader:
            if cells:
                yield f"{path} line {line}", cells
            line = reader.line_num + 1

    try:
        yield from _table(lines())
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: invalid CSV: {error}") from error


def _xlsx(path: Path) -> Iterator[_Record]:
    import openpyxl

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        sheets = {sheet.title: list(sheet.iter_rows(values_only=True)) for sheet in book.worksheets}
        book.close()
    except Exception as error:  # whatever a damaged file makes the library raise
        raise UserError(f"{path} cannot be read as XLSX: {error}") from error
    filled = {title: rows for title, rows in sheets.items() if any(map(_has_content, rows))}
    if len(filled) > 1:
        raise UserError(f"{path} has several sheets with content ({', '.join(filled)}): give one sheet per file")
    for rows in filled.values():
        width = max(map(len, rows))  # trailing empty cells need not be in the file
        yield from _table(
            (f"{path} row {number}", [_spreadsheet_cell(cell) for cell in cells] + [""] * (width - len(cells)))
            for number, cells in enumerate(rows, 1)
            if _has_content(cells)
        )


def _spreadsheet_cell(cell: Any) -> Any:
    # An empty cell is an empty text, as in CSV: so a prompt can be empty.
    return "" if cell is None else _number_as_text(cell)


def _has_content(cells: Sequence[Any]) -> bool:
    return any(cell is not None for cell in cells)


def _parquet(path: Path) -> Iterator[_Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error
    yield from _typed(table.to_pylist(), str(path))


def _hub(name: str, split: str, *, streaming: bool) -> Iterator[_Record]:
    import datasets

    try:
        yield from _typed(datasets.load_dataset(name, split=split, streaming=streaming), f"{name}:{split}")
    except Exception as error:  # the hub, the network and the data set's own files each fail in their own way
        raise UserError(
            f"{name} is no file here, and cannot be loaded from the hub as a data set with a split {split!r}: {error}"
        ) from error


_READERS: dict[str, Callable[[Path], Iterable[_Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".xlsx": _xlsx,
}


def _typed(rows: Iterable[dict[str, Any]], name: str) -> Iterator[_Record]:
    """Records of a format with typed columns."""
    for number, row in enumerate(rows, 1):
        yield _Record(f"{name} row {number}", {column: _number_as_text(cell) for column, cell in row.items()})


def _table(lines: Iterator[tuple[str, list[Any]]]) -> Iterator[_Record]:
    """Records of a format whose first line names the columns; trailing columns without a name and a cell are none."""
    where, header = next(lines, ("", []))
    while header and not header[-1]:
        header = header[:-1]
    if len(set(header)) < len(header):
        raise UserError(f"{where}: a column name stands twice in {', '.join(map(str, header))}")
    for where, cells in lines:
        if len(cells) < len(header) or any(cell != "" for cell in cells[len(header) :]):
            raise UserError(f"{where} has {len(cells)} cells, but {len(header)} columns are named")
        yield _Record(where, dict(zip(header, cells)))


def _number_as_text(cell: Any) -> Any:
    return str(cell) if isinstance(cell, Number) else cell


def _text(path: Path) -> str:
    try:
        return _decoded(path, path.read_bytes(), 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _decoded(path: Path, content: bytes, first_line: int) -> str:
    """The text of a file or of a line of it, without the byte order mark that some editors begin a file with."""
    try:
        return content.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + error.object.count(b"\n", 0, error.start)  # error.object lacks the mark
        raise UserError(f"{path} line {line} is not UTF-8 ({error.reason}): save the file as UTF-8") from error


def _parsed(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} line {first_line + error.lineno - 1}, column {error.colno}: invalid JSON: {error.msg} "
            "(a .jsonl file has one object on each line, a .json file is one list of objects)"
        ) from error


def _object(value: Any, where: str) -> _Record:
    if not isinstance(value, dict):
        raise UserError(f"{where} holds {_shown(value)}, but must be an object with the row's columns")
    return _Record(where, value)


# From records to rows


def _rows(specs: Sequence[str], config: DataConfig, *, streaming: bool) -> Iterator[Row]:
    opened = [_records(spec, streaming=streaming) for spec in specs]
    number = 0
    for spec, (default_source, records) in zip(specs, opened):
        sources = _FileSources(default_source, config.source_column)
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

    def of(self, record: _Record) -> str:
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
                f"{self.rows} rows of its file: give every row a source, or none (--data.source_column names the "
                "column)"
            )


def _row(number: int, source: str, record: _Record, config: DataConfig) -> Row:
    """A record as a row, by the first of the three kinds whose columns it has."""
    cells, where = record.cells, record.where
    messages, prompt, completion = None, "", ""
    if config.messages_column in cells:
        messages = _messages(cells[config.messages_column], config.messages_column, where)
    elif config.prompt_column in cells and config.completion_column in cells:
        prompt = _string(cells[config.prompt_column], config.prompt_column, where)
        completion = _filled(cells[config.completion_column], config.completion_column, where)
    elif config.instruction_column in cells and config.output_column in cells:
        instruction = _string(cells[config.instruction_column], config.instruction_column, where)
        more = cells.get(config.input_column)
        if more:
            instruction += "\n" + _string(more, config.input_column, where)
        prompt = _templated(instruction, config)
        completion = _filled(cells[config.output_column], config.output_column, where)
    else:
        raise UserError(_missing_columns(record, config))
    return Row(number, source, messages, prompt, completion, where)


def _templated(instruction: str, config: DataConfig) -> str:
    # Not str.format: a template may hold braces of its own.
    return config.template.replace("{instruction}", instruction)


def _missing_columns(record: _Record, config: DataConfig) -> str:
    return (
        f"{record.where} has the columns {', '.join(map(repr, record.cells)) or '(none)'}, but needs "
        f"{config.messages_column!r}, or {config.prompt_column!r} and {config.completion_column!r}, or "
        f"{config.instruction_column!r} and {config.output_column!r}. Columns of other names can be given with "
        "--data.messages_column, --data.prompt_column and --data.completion_column, or --data.instruction_column and "
        "--data.output_column"
    )


def _messages(value: Any, column: str, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise UserError(f"{where}: {column!r} is {_shown(value)}, but must be a list of {{role, content}}")
    messages = tuple(_message(turn, f"{column}[{number}]", where) for number, turn in enumerate(value))
    if not any(message.role == "assistant" for message in messages):
        raise UserError(f"{where}: no turn of {column!r} is the assistant's, so there is nothing to learn")
    return messages


def _message(turn: Any, name: str, where: str) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{where}: {name} is {_shown(turn)}, but must be an object with role and content")
    role = turn.get("role")
    if role not in ROLES:
        raise UserError(f"{where}: the role of {name} is {_shown(role)}, but must be one of {', '.join(ROLES)}")
    check = _filled if role == "assistant" else _string
    return Message(role, check(turn.get("content"), f"{name}.content", where))


def _filled(value: Any, name: str, where: str) -> str:
    if not _string(value, name, where).strip():
        raise UserError(f"{where}: {name!r} is empty, so there is nothing to learn: fill it or leave the row out")
    return value


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {name!r} is {_shown(value)}, but must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise UserError(f"{where}: {name!r} holds half a character, {half!r}, which is no text") from error
    return value


def _shown(value: Any) -> str:
    """A value as JSON has it, shortened."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:40]}..."
