"""What the fuzz (benchmarks/fuzz_readers.py) has found, and what it cannot see: rows that were lost in silence."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from colm_scale.config import DataConfig
from colm_scale.data.formats import shown
from colm_scale.data.readers import read_rows
from colm_scale.errors import UserError

ROWS = [["prompt", "completion"], ["a", "b"], ["c", "d"], ["e", "f"]]


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def error_of(name: str, content: bytes | str) -> str:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_rows([name], DataConfig())
    message = str(caught.value)
    assert message.startswith(name)
    assert message.isprintable()
    assert len(message) < 1000
    return message


def completions(name: str, content: bytes) -> list[str]:
    Path(name).write_bytes(content)
    return [row.completion for row in read_rows([name], DataConfig())]


def xlsx(*changes: tuple[str, str]) -> bytes:
    """A sheet of ``ROWS`` with one thing after the other replaced in its XML."""
    book, whole, sink = openpyxl.Workbook(), io.BytesIO(), io.BytesIO()
    for cells in ROWS:
        book.active.append(cells)
    book.save(whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            text = old.read(name).decode()
            for pattern, other in changes if name.endswith("sheet1.xml") else ():
                text, count = re.subn(pattern, lambda _, other=other: other, text, count=1)
                assert count, pattern
            new.writestr(name, text)
    return sink.getvalue()


def parquet(**columns: pa.Array) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


# JSON


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("deep", ["[" * 1_000_000, '{"a":' * 100_000])
def test_json_nested_too_deeply_is_refused(name, deep):
    assert "in the JSON that begins on line 1: maximum recursion depth" in error_of(name, deep)


def test_json_nested_just_not_too_deeply_to_be_read_can_be_shown():
    for depth in range(800, 1000, 10):
        error_of("a.jsonl", json.dumps({"prompt": "a"})[:-1] + ', "completion": ' + "[" * depth + "]" * depth + "}")


def test_a_number_with_more_digits_than_python_reads_is_refused():
    message = error_of("a.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": ' + "9" * 5000 + "}\n")
    assert message.startswith("a.jsonl, in the JSON that begins on line 2: Exceeds the limit")


def test_a_name_that_stands_twice_in_an_object_is_refused():
    message = error_of("a.jsonl", '{"prompt": "a", "completion": "b", "completion": "c"}')
    assert message == 'a.jsonl, in the JSON that begins on line 1: "completion" appears twice in one object'


def test_only_the_beginning_of_a_value_is_shown():
    assert shown({"a": [1, None, "é"]}) == '{"a": [1, null, "\\u00e9"]}'
    assert shown("x" * 100) == '"' + "x" * 39 + "..."
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "[" * 40 + "..."


# Tables


def test_long_and_odd_column_names_are_shortened_and_escaped():
    error_of("a.csv", "x" * 100_000 + ",b\n1,2\n")
    error_of("b.csv", ",".join(f"column {number}" for number in range(20_000)) + "\n" + "1," * 19_999 + "1\n")
    assert 'appears twice: "line\\nbreak"' in error_of("c.csv", '"line\nbreak","line\nbreak"\n1,2\n')
    assert 'appears twice: "\\u001b[31m"' in error_of("d.csv", "\x1b[31m,\x1b[31m\n1,2\n")


def test_many_empty_names_take_no_time():
    # It was the square of their number, most of a minute here: the limit is not what is tested, but that it ends.
    assert "2 cells, but 0 columns are named" in error_of("a.csv", "," * 400_000 + "\na,b\n")


# XLSX


def test_cells_outside_the_size_that_a_sheet_states_are_read():
    for size in ("A1", "A1:B2", "A1:A4"):
        assert completions("a.xlsx", xlsx((r'(?<=<dimension ref=")[^"]*', size))) == ["b", "d", "f"]


def test_a_sheet_that_states_a_huge_size_is_read_as_it_is():
    assert completions("a.xlsx", xlsx((r'(?<=<dimension ref=")[^"]*', "A1:XFD1048576"))) == ["b", "d", "f"]


@pytest.mark.parametrize("number", ["1048577", "99999999999999"])
def test_a_row_beyond_the_last_that_a_sheet_can_have_is_refused(number):
    assert "a row is numbered above 1048576" in error_of("a.xlsx", xlsx((r'(?<=<row r=")4', number)))


def test_an_archive_that_unpacks_to_far_more_than_it_is_is_refused_unread(monkeypatch):
    content = xlsx(("<sheetData>", "<sheetData>" + " " * 80_000_000))
    assert len(content) < 100_000
    monkeypatch.setattr(openpyxl, "load_workbook", lambda *_, **__: pytest.fail("it was unpacked"))
    assert "it would unpack to 800" in error_of("bomb.xlsx", content)


def test_two_sheets_of_one_name_are_two():
    book, sink = openpyxl.Workbook(), io.BytesIO()
    for sheet in (book.active, book.create_sheet("other")):
        for cells in ROWS:
            sheet.append(cells)
    book.save(sink)
    changed = io.BytesIO()
    with zipfile.ZipFile(sink) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b'name="other"', b'name="Sheet"'))
    assert "several sheets with content (Sheet, Sheet)" in error_of("a.xlsx", changed.getvalue())


def test_what_the_library_says_in_several_lines_is_one():
    assert "Unable to read workbook" in error_of("a.xlsx", xlsx((r'(?<=<dimension ref=")[^"]*', "A1:ZZZZ9")))


# Parquet


@pytest.mark.parametrize(
    "column",
    [
        pa.array([2**62], pa.timestamp("us")),
        pa.array([2**31 - 1], pa.date32()),
        pa.array([1], pa.timestamp("us", "Mars/Olympus")),
        pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]),
    ],
    ids=["a late time", "a late date", "no such time zone", "not UTF-8"],
)
def test_cells_that_python_cannot_hold_are_an_error_of_the_file(column):
    message = error_of("a.parquet", parquet(prompt=column, completion=pa.array(["b"])))
    assert message.startswith("a.parquet cannot be read as Parquet: ")


def test_a_column_name_that_stands_twice_is_refused():
    table, sink = pa.table([["a"], ["b"], ["c"]], names=["prompt", "completion", "completion"]), io.BytesIO()
    pq.write_table(table, sink)
    assert error_of("a.parquet", sink.getvalue()) == 'a.parquet: a column name appears twice: "completion"'


def test_a_footer_that_is_no_footer_is_said_in_one_line():
    content = parquet(prompt=pa.array(["a"]), completion=pa.array(["b"]))
    size = int.from_bytes(content[-8:-4], "little")
    error_of("a.parquet", content[: -8 - size] + bytes(size) + content[-8:])


def test_rows_are_counted_on_over_the_batches_of_a_large_file():
    count = 70_000  # a batch has 65,536
    Path("a.parquet").write_bytes(
        parquet(prompt=pa.array(["a"] * count), completion=pa.array(map(str, range(count)), pa.string()))
    )
    rows = read_rows(["a.parquet"], DataConfig())
    assert [row.completion for row in rows] == [str(number) for number in range(count)]
    assert rows[-1].where == "a.parquet row 70000"
