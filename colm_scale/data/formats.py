"""Readers of every data format: each gives records, a dict per row with its place in the file.

Whatever a file contains, reading it gives records or raises one `UserError`, of one line, that names the file.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Number
from pathlib import Path
from typing import Any

from colm_scale.errors import UserError

_HUB_SPEC = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>.+))?")
_SHEET_ROWS = 1_048_576
"""Rows of the largest possible sheet. A damaged file may number one higher, and all rows before it would be made up."""
_UNPACKED_BYTES, _EXPANSION = 2**26, 100
"""Refuse an archive that unpacks to more than this many bytes and also more than this many times its own size: the XML
of a real spreadsheet shrinks to a tenth or a twentieth, that of a zip bomb to a thousandth."""
_SHOWN_CHARACTERS = 300
"""Most characters that a message quotes from a file, or from a library's error."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row as read, before it is checked."""

    where: str
    cells: dict[str, Any]


def records_of(spec: str, *, streaming: bool) -> tuple[str, Iterable[Record]]:
    """Return the default source of a spec's rows, and an iterator that reads the rows one by one."""
    path = Path(spec)
    if path.suffix.lower() in _READERS or path.exists():
        reader = _file_reader(path)
        if streaming and reader is not _jsonl:
            raise UserError(
                f"{path} cannot be streamed, only .jsonl files and hub data sets can: convert it to .jsonl, or leave "
                "--data.streaming out"
            )
        return path.stem, reader(path)
    if match := _HUB_SPEC.fullmatch(spec):
        return match["name"], _hub(match["name"], match["split"] or "train", streaming=streaming)
    raise UserError(
        f"data {spec!r} is neither a file ({', '.join(_READERS)}) nor a hub data set (ORG/NAME or ORG/NAME:SPLIT)"
    )


def identity(spec: str) -> list[object] | None:
    """Return what changes when a file or a hub data set changes; None if nothing is known to."""
    path = Path(spec)
    if path.is_file():
        found = path.stat()  # the time of change too: a copy can have the old time of modification
        return [path.stem, str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    match = _HUB_SPEC.fullmatch(spec)
    if match is None or path.exists() or path.suffix.lower() in _READERS:
        return None
    try:
        return [spec, _load_dataset(match["name"], match["split"] or "train", streaming=False)._fingerprint]
    except Exception:  # reading it will say why
        return None


def _file_reader(path: Path) -> Callable[[Path], Iterable[Record]]:
    """Choose the reader of an existing file by its suffix."""
    if path.is_dir():
        raise UserError(f"{path} is a directory: name the data files in it")
    if not path.parent.is_dir():
        raise UserError(f"{path} does not exist, nor does its folder {path.parent}")
    if not path.exists():
        close = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
        raise UserError(f"{path} does not exist" + (f"; did you mean {path.parent / close[0]}?" if close else ""))
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{path} has no suffix of a known format: use one of {', '.join(_READERS)}")
    return _READERS[path.suffix.lower()]


def _jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield _object(_parsed(path, line, number), f"{path} line {number}")


def _lines(path: Path) -> Iterator[str]:
    """Read a file line by line. Only a line feed ends a line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield _decoded(path, line, number).removesuffix("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _json(path: Path) -> Iterator[Record]:
    text = _text(path)
    items = _parsed(path, text, 1) if text.strip() else []
    if not isinstance(items, list):
        raise UserError(f"{path} holds {shown(items)}, but a .json file must be a list of objects")
    for number, item in enumerate(items, 1):
        yield _object(item, f"{path} item {number}")


def _csv(path: Path) -> Iterator[Record]:
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


def _load_dataset(name: str, split: str, *, streaming: bool) -> Any:
    import datasets

    return datasets.load_dataset(name, split=split, streaming=streaming)


def _hub(name: str, split: str, *, streaming: bool) -> Iterator[Record]:
    try:
        yield from _typed(_load_dataset(name, split, streaming=streaming), f"{name}:{split}")
    except Exception as error:  # the hub, the network and the data set's own files each fail in their own way
        raise UserError(
            f"{name} is not a file, and cannot be loaded from the hub as a data set with a split {split!r}: "
            f"{said(error)}"
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
        yield Record(f"{name} row {number}", {column: _number_as_text(cell) for column, cell in row.items()})


def _table(lines: Iterator[tuple[str, list[Any]]]) -> Iterator[Record]:
    """Make records of lines, the first of which names the columns; trailing unnamed and empty columns are dropped."""
    where, header = next(lines, ("", []))
    while header and not header[-1]:
        header.pop()
    _check_names(header, where)
    for where, cells in lines:
        if len(cells) < len(header) or any(cell != "" for cell in cells[len(header) :]):
            raise UserError(f"{where} has {len(cells)} cells, but {len(header)} columns are named")
        yield Record(where, dict(zip(header, cells)))


def _check_names(names: Sequence[Any], where: str) -> None:
    """Raise a UserError if two columns have the same name, since one of them would be lost."""
    if twice := _repeated(names):
        raise UserError(f"{where}: a column name appears twice: {shown(twice[0])}")


def _repeated(names: Iterable[Any]) -> list[Any]:
    return [name for name, count in Counter(names).items() if count > 1]


def _number_as_text(cell: Any) -> Any:
    return str(cell) if isinstance(cell, Number) else cell


def _text(path: Path) -> str:
    try:
        return _decoded(path, path.read_bytes(), 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _decoded(path: Path, content: bytes, first_line: int) -> str:
    """Decode a file, or a line of it, without the byte order mark that some editors put at its start."""
    try:
        return content.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + error.object.count(b"\n", 0, error.start)  # error.object lacks the mark
        raise UserError(f"{path} line {line} is not UTF-8 ({error.reason}): save the file as UTF-8") from error


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
