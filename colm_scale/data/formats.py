"""Readers of every data format: each gives records, a dict per row with its place in the file.

Whatever a file contains, reading it gives records or raises one `UserError`, of one line, that names the file.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from numbers import Number
from pathlib import Path
from typing import IO, Any

from colm_scale.data.files import COMPRESSED, format_of, hub_set
from colm_scale.data.hub import HubSet
from colm_scale.errors import UserError

_SHEET_ROWS = 1_048_576
"""Rows of the largest possible sheet. A damaged file may number one higher, and all rows before it would be made up."""
_UNPACKED_BYTES, _EXPANSION = 2**26, 100
"""Refuse an archive that unpacks to more than this many bytes and also more than this many times its own size: the XML
of a real spreadsheet shrinks to a tenth or a twentieth, that of a zip bomb to a thousandth."""
_NAN = ("nan", "NaN")
"""What libraries write for a missing number into formats without types."""
_AS_UTF8 = "save the file as UTF-8"
_OTHER_CONTENT = {
    b"\x1f\x8b": "it is compressed with gzip, so its name must end in .gz",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd, so its name must end in .zst",
}
"""What is said of files that are not UTF-8, by their first bytes."""
_SHOWN_CHARACTERS = 300
"""Most characters that a message quotes from a file, or from a library's error."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row as read, before it is checked."""

    where: str
    cells: dict[str, Any]


def is_missing(value: Any) -> bool:
    """Tell whether a cell has no value: null, or NaN, which some libraries write instead."""
    return value is None or (isinstance(value, float) and math.isnan(value))


_FLAGS = {"true": True, "1": True, 1: True, "false": False, "0": False, 0: False}


def as_flag(value: Any) -> bool:
    """Read a truth value, 0 or 1 or, in formats without them, a text. Raises ValueError for anything else."""
    key = value.lower() if isinstance(value, str) else value
    if not isinstance(key, str | int) or key not in _FLAGS:
        raise ValueError(shown(value))
    return _FLAGS[key]


def records_of(spec: str, *, streaming: bool) -> Iterable[Record]:
    """Return an iterator that reads the rows of a file or a hub data set one by one."""
    if hub := hub_set(spec):
        return _hub(hub, streaming=streaming)
    path = Path(spec)
    reader = _READERS[format_of(path)]
    if streaming and reader is not _jsonl:
        raise UserError(
            f"{path} cannot be streamed, only .jsonl files and hub data sets can: convert it to .jsonl, or leave "
            "--data.streaming out"
        )
    return reader(path)


def identity(spec: str) -> list[object] | None:
    """Return what changes when a file or a hub data set changes; None if nothing is known to."""
    try:
        if hub := hub_set(spec):
            return [spec, hub.load(streaming=False)._fingerprint]
        path = Path(spec)
        if not path.is_file():
            return None
        found = path.stat()  # the time of change too: a copy can have the old time of modification
        return [str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    except Exception:  # reading it will say why
        return None


def _jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield _object(_parsed(path, line, number), f"{path} line {number}")


def _lines(path: Path) -> Iterator[str]:
    """Read a file line by line. Only a line feed ends a line."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            yield _decoded(path, line, number).removesuffix("\n")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, decompressed if it is compressed."""
    try:
        if path.suffix.lower() not in COMPRESSED:
            with path.open("rb") as file:
                yield file
        else:
            import pyarrow

            kind = "gzip" if path.suffix.lower() == ".gz" else "zstd"
            with pyarrow.input_stream(str(path), compression=kind) as stream, io.BufferedReader(stream) as file:
                yield file
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or said(error)}") from error


def _json(path: Path) -> Iterator[Record]:
    text = _text(path)
    items = _parsed(path, text, 1) if text.strip() else []
    if not isinstance(items, list):
        raise UserError(f"{path} holds {shown(items)}, but a .json file must be a list of objects")
    for number, item in enumerate(items, 1):
        yield _object(item, f"{path} item {number}")


def _csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # a cell may be a whole document
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)

    def lines() -> Iterator[tuple[str, list[str]]]:
        line = 1  # where the row starts; a quoted cell can span several lines
        for cells in reader:
            if cells:
                yield f"{path} line {line}", cells
            line = reader.line_num + 1

    try:
        yield from _table(lines())
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: invalid CSV: {error}") from error


def _xlsx(path: Path) -> Iterator[Record]:
    try:
        sheets = _sheets(path)
    except Exception as error:  # whatever a damaged file makes the library raise
        raise UserError(f"{path} cannot be read as XLSX: {said(error)}") from error
    filled = [(title, rows) for title, rows in sheets if any(map(_has_content, rows))]
    if len(filled) > 1:
        titles = _in_one_line(", ".join(title for title, _ in filled))
        raise UserError(f"{path} has several sheets with content ({titles}): use one sheet per file")
    for _, rows in filled:
        width = max(map(len, rows))
        padded = ((*cells, *[None] * (width - len(cells))) for cells in rows)  # the file may omit trailing empty cells
        yield from _table(
            # An empty cell is an empty text, as in CSV, so that a prompt can be empty.
            (f"{path} row {number}", ["" if cell is None else _number_as_text(cell) for cell in cells])
            for number, cells in enumerate(padded, 1)
            if _has_content(cells)
        )


def _sheets(path: Path) -> list[tuple[str, list[tuple[object, ...]]]]:
    """Read title and rows of every sheet. Raises ValueError for a zip bomb, and whatever the libraries raise."""
    import openpyxl

    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > max(_UNPACKED_BYTES, _EXPANSION * path.stat().st_size):
        raise ValueError(f"it would unpack to {unpacked} bytes, more than {_EXPANSION} times its own size")
    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    try:
        return [(sheet.title, _sheet_rows(sheet)) for sheet in book.worksheets]
    finally:
        book.close()


def _sheet_rows(sheet: Any) -> list[tuple[object, ...]]:
    sheet.reset_dimensions()  # a file may state fewer rows and columns than it has, and the rest would be skipped
    rows = list(islice(sheet.iter_rows(values_only=True), _SHEET_ROWS + 1))
    if len(rows) > _SHEET_ROWS:
        raise ValueError(f"a row is numbered above {_SHEET_ROWS}, the most that a sheet can have")
    return rows


def _has_content(cells: Sequence[Any]) -> bool:
    return any(cell is not None for cell in cells)


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet

    def rows() -> Iterator[dict[str, Any]]:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                _check_names(file.schema_arrow.names, str(path))
                for batch in file.iter_batches():
                    yield from batch.to_pylist()
        except UserError:
            raise
        except Exception as error:  # whatever a damaged file makes the library raise
            raise UserError(f"{path} cannot be read as Parquet: {said(error)}") from error

    return _typed(rows(), str(path))


def _hub(hub: HubSet, *, streaming: bool) -> Iterator[Record]:
    try:
        yield from _typed(hub.load(streaming=streaming), str(hub))
    except Exception as error:  # the hub, the network and the data set's own files each fail in their own way
        config = f" and a configuration {hub.config!r}" if hub.config else ""
        raise UserError(
            f"{hub.name} is not a file or folder here, and cannot be loaded from the hub as a data set with a split "
            f"{hub.split!r}{config}: {said(error)}"
        ) from error


_READERS: dict[str, Callable[[Path], Iterable[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".xlsx": _xlsx,
}


def _typed(rows: Iterable[dict[str, Any]], name: str) -> Iterator[Record]:
    """Make records of the rows of a format with typed columns; numbers become text."""
    for number, row in enumerate(rows, 1):
        yield Record(f"{name} row {number}", {column: _as_written(cell) for column, cell in row.items()})


def _table(lines: Iterator[tuple[str, list[Any]]]) -> Iterator[Record]:
    """Make records of lines, the first of which names the columns; trailing unnamed and empty columns are dropped."""
    where, header = next(lines, ("", []))
    while header and not header[-1]:
        header.pop()
    _check_names(header, where)
    for where, cells in lines:
        if len(cells) < len(header) or any(cell != "" for cell in cells[len(header) :]):
            raise UserError(f"{where} has {len(cells)} cells, but {len(header)} columns are named")
        yield Record(where, {name: None if cell in _NAN else cell for name, cell in zip(header, cells)})


def _check_names(names: Sequence[Any], where: str) -> None:
    """Raise a UserError if two columns have the same name, since one of them would be lost."""
    if twice := _repeated(names):
        raise UserError(f"{where}: a column name appears twice: {shown(twice[0])}")


def _repeated(names: Iterable[Any]) -> list[Any]:
    return [name for name, count in Counter(names).items() if count > 1]


def _number_as_text(cell: Any) -> Any:
    return str(cell) if isinstance(cell, Number) and not is_missing(cell) else cell


def _as_written(cell: Any) -> Any:
    """Undo what a typed column does to a cell: numbers become text, and keys that only other rows have go away."""
    return _without_nulls(cell) if isinstance(cell, (dict, list)) else _number_as_text(cell)


def _without_nulls(value: Any) -> Any:
    match value:
        case dict():
            return {key: _without_nulls(item) for key, item in value.items() if not is_missing(item)}
        case list():
            return [_without_nulls(item) for item in value]
    return value


def _text(path: Path) -> str:
    with _opened(path) as file:
        return _decoded(path, file.read(), 1)


def _decoded(path: Path, content: bytes, first_line: int) -> str:
    """Decode a file, or a line of it, without the byte order mark that some editors put at its start."""
    try:
        return content.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + error.object.count(b"\n", 0, error.start)  # error.object lacks the mark
        way_out = next((hint for magic, hint in _OTHER_CONTENT.items() if content.startswith(magic)), _AS_UTF8)
        raise UserError(f"{path} line {line} is not UTF-8 ({error.reason}): {way_out}") from error


def _parsed(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_named)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} line {first_line + error.lineno - 1}, column {error.colno}: invalid JSON: {error.msg} "
            "(a .jsonl file has one object on each line, a .json file is one list of objects)"
        ) from error
    except (ValueError, RecursionError) as error:  # valid JSON that cannot be loaded: too deep, too many digits
        raise UserError(f"{path}, in the JSON that begins on line {first_line}: {said(error)}") from error


def _named(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object. Raises ValueError if a name is repeated, since one of the values would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{shown(_repeated(name for name, _ in pairs)[0])} appears twice in one object")
    return found


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{where} holds {shown(value)}, but must be an object with the row's columns")
    return Record(where, value)


def shown(value: Any) -> str:
    """Write a value as JSON, shortened; only the beginning of a large or deeply nested one is ever written."""
    text = ""
    for piece in json.JSONEncoder(default=str).iterencode(value):
        text += piece
        if len(text) > 40:
            return f"{text[:40]}..."
    return text


def said(error: Exception) -> str:
    """Put a library's error into one line."""
    return _in_one_line(str(error)) or type(error).__name__


def _in_one_line(text: str) -> str:
    """Remove line breaks and terminal control characters from text that comes from a file."""
    return shortened("".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split())))


def shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
