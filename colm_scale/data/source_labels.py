"""The sources of rows, in a file beside the data: what `colm-scale sources` writes and ``--data.sources`` reads.

A line per row of the data, in its order: ``{"source": NAME, "row": DIGEST}``. The digest, of what the row says, is what
tells that the line is that row's; who writes such a file by hand can leave it out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from colm_scale.data.formats import Record, records_of, shown
from colm_scale.data.readers import Row
from colm_scale.errors import UserError


def row_digest(row: Row) -> str:
    """32 bits, in hexadecimal, of a SHA-256 of what is written in a row; not of its source."""
    messages = [(message.role, message.content) for message in row.messages or ()]
    written = json.dumps([messages, row.prompt, row.completion])
    return hashlib.sha256(written.encode()).hexdigest()[:8]


def label_line(row: Row, source: str) -> str:
    """A row's line of the file."""
    return json.dumps({"source": source, "row": row_digest(row)}, ensure_ascii=False) + "\n"


def labelled(rows: Iterable[Row], path: str | None) -> Iterator[Row]:
    """The rows with the sources that a file gives them; as they are without one.

    Raises:
        UserError: The file cannot be read, a line of it is not such a line or another row's, or it has fewer lines than
            there are rows, or more.
    """
    if path is None:
        yield from rows
        return
    for row, label in zip_longest(rows, _lines(path)):
        if label is None:
            raise UserError(f"--data.sources {path} ends before {row.where}: {_again(path)}")
        if row is None:
            raise UserError(f"--data.sources {path} goes on after the last row of the data: {label.where} is left over")
        yield replace(row, source=_source(row, label, path))


def _lines(path: str) -> Iterable[Record]:
    if Path(path).suffix != ".jsonl":
        raise UserError(f"--data.sources {path} is no .jsonl file: give the one that colm-scale sources has written")
    return records_of(path, streaming=True)[1]


def _source(row: Row, label: Record, path: str) -> str:
    source, digest = label.cells.get("source"), label.cells.get("row")
    if not isinstance(source, str) or not source:
        raise UserError(f"{label.where}: source is {shown(source)}, but must be the name of a source")
    if digest is not None and digest != row_digest(row):
        raise UserError(f"{label.where} is not about {row.where}, which says something else: {_again(path)}")
    return source


def _again(path: str) -> str:
    return (
        f"the data or the options that say how it is read have changed since {Path(path).name} was made; make it again "
        "with colm-scale sources"
    )
