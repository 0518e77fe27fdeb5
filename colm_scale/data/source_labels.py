"""The file of sources that `colm-scale sources` writes and ``--data.sources`` reads.

It has one line per row of the data, in the same order: ``{"source": NAME, "row": DIGEST}``. The digest of the row's
content shows that line and row belong together; a file written by hand can omit it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from colm_scale.data.files import files_of
from colm_scale.data.formats import Record, records_of, shown
from colm_scale.data.readers import Row
from colm_scale.errors import UserError


def row_digest(row: Row) -> str:
    """Return 32 bits, in hexadecimal, of the SHA-256 of a row's content without its source."""
    return hashlib.sha256(json.dumps(row.said, default=str).encode()).hexdigest()[:8]


def label_line(row: Row, source: str) -> str:
    """Write a row's line of the file."""
    return json.dumps({"source": source, "row": row_digest(row)}, ensure_ascii=False) + "\n"


def labelled(rows: Iterable[Row], path: str | None) -> Iterator[Row]:
    """Replace the sources of rows by those in a file; without a file, return the rows unchanged.

    Raises:
        UserError: The file cannot be read, a line is malformed or belongs to another row, or there are more or fewer
            lines than rows.
    """
    if path is None:
        yield from rows
        return
    if Path(path).suffix != ".jsonl":
        raise UserError(f"--data.sources {path} is not a .jsonl file: use the one that colm-scale sources has written")
    files_of(path)  # refuses a file that is missing
    for row, label in zip_longest(rows, records_of(path, streaming=True)):
        if label is None:
            raise UserError(f"--data.sources {path} ends before {row.where}: {_again(path)}")
        if row is None:
            raise UserError(f"--data.sources {path} has more lines than the data has rows: {label.where} is left over")
        yield replace(row, source=_source(row, label, path))


def _source(row: Row, label: Record, path: str) -> str:
    source, digest = label.cells.get("source"), row_digest(row)
    if not isinstance(source, str) or not source:
        raise UserError(f"{label.where}: source is {shown(source)}, but must be the name of a source")
    if label.cells.get("row") not in (None, digest):
        raise UserError(f"{label.where} does not belong to {row.where}, whose content differs: {_again(path)}")
    return source


def _again(path: str) -> str:
    return (
        f"the data, or the options for reading it, have changed since {Path(path).name} was written; write it again "
        "with colm-scale sources"
    )
