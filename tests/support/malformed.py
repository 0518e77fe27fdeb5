"""Malformed data files: small valid files with mutated bytes or grammar, reproducible by seed.

A mutation may leave a file valid.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from functools import cache
from random import Random
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".xlsx")
_WORDS = ("2 + 3?", "la la", "", " ", "naïve 中文 🎼", 'he said "x, y"', "a\nb", "\u2028", "=1+1", "{{ 1 }}", "0")


@dataclass(frozen=True, slots=True)
class Malformed:
    """A file: extension, mutation and content."""

    suffix: str
    mutation: str
    content: bytes


def malformed(seed: int, number: int) -> Malformed:
    """The ``number``-th file of a seed; the formats take turns."""
    rng = Random(f"{seed}:{number}")
    suffix = SUFFIXES[number % len(SUFFIXES)]
    mutations = _OF_BYTES | _OF_FORMAT[suffix]
    # Half of the files get mutations of their format, which are fewer and go deeper.
    name = rng.choice(list(rng.choice([_OF_BYTES, _OF_FORMAT[suffix]])))
    content = mutations[name](rng, _valid(rng, suffix))
    if rng.random() < 0.1:
        suffix, name = rng.choice(SUFFIXES), f"{name}, other suffix"
    return Malformed(suffix, name, content)


# Valid files


def _rows(rng: Random, chats: bool) -> list[dict[str, Any]]:
    kind = rng.randrange(3 if chats else 2)
    sources, protected = rng.random() < 0.5, rng.random() < 0.2
    more = {"protected": rng.choice((True, "false", 0))} if protected else {}
    return [
        _row(rng, kind) | ({"source": rng.choice("ab")} if sources else {}) | more for _ in range(rng.randint(1, 6))
    ]


def _row(rng: Random, kind: int) -> dict[str, Any]:
    asked, answer = rng.choice(_WORDS), rng.choice(_WORDS) + "5"
    if kind == 0:
        return {"instruction": asked, "output": answer}
    if kind == 1:
        return {"prompt": asked, "completion": answer}
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def _valid(rng: Random, suffix: str) -> bytes:
    return _WRITERS[suffix](_rows(rng, chats=suffix not in (".csv", ".xlsx")))


def _jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _json(rows: Any) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=1).encode("utf-8", "surrogatepass")


def _csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    return _parquet_of(pa.Table.from_pylist(rows))


def _parquet_of(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def _xlsx(rows: list[dict[str, Any]]) -> bytes:
    book, sink = openpyxl.Workbook(), io.BytesIO()
    for cells in [list(rows[0]), *(list(row.values()) for row in rows)]:
        book.active.append(cells)
    book.save(sink)
    now = rb"(?<=>)\d{4}-[^<]*Z(?=<)"
    return _zipped(zipfile.ZipFile(sink), lambda _, part: re.sub(now, b"2000-01-01T00:00:00Z", part))


def _zipped(old: zipfile.ZipFile, change: Callable[[str, bytes], bytes]) -> bytes:
    """An archive with changed parts and a fixed time stamp."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(zipfile.ZipInfo(name), change(name, old.read(name)), zipfile.ZIP_DEFLATED)
    return sink.getvalue()


_WRITERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".xlsx": _xlsx}


# Mutations of bytes


def _piece(rng: Random, content: bytes) -> tuple[int, int]:
    start, end = sorted(rng.randint(0, len(content)) for _ in range(2))
    return start, end


def _flipped(rng: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if content else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _inserted(rng: Random, content: bytes, more: bytes) -> bytes:
    at = rng.randint(0, len(content))
    return content[:at] + more + content[at:]


def _duplicated(rng: Random, content: bytes) -> bytes:
    start, end = _piece(rng, content)
    return content[:end] + content[start:end] * rng.choice((1, 1, 3, 100)) + content[end:]


def _cut_out(rng: Random, content: bytes) -> bytes:
    start, end = _piece(rng, content)
    return content[:start] + content[end:]


def _swapped(rng: Random, content: bytes) -> bytes:
    start, end = _piece(rng, content)
    return content[end:] + content[start:end] + content[:start]


def _encoded(rng: Random, content: bytes) -> bytes:
    return content.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "latin-1", "cp037")), "replace")


_OF_BYTES: dict[str, Callable[[Random, bytes], bytes]] = {
    "bits flipped": _flipped,
    "truncated": lambda rng, content: content[: rng.randint(0, len(content))],
    "random bytes inserted": lambda rng, content: _inserted(rng, content, rng.randbytes(rng.choice((1, 4, 100)))),
    "NULs inserted": lambda rng, content: _inserted(rng, content, bytes(rng.choice((1, 3, 5000)))),
    "broken UTF-8 inserted": lambda rng, content: _inserted(rng, content, rng.choice((b"\xff", b"\xed\xa0\x80"))),
    "a piece repeated": _duplicated,
    "a piece cut out": _cut_out,
    "pieces swapped": _swapped,
    "written twice": lambda rng, content: content * 2,
    "byte order marks": lambda rng, content: rng.choice((b"\xef\xbb\xbf", b"\xef\xbb\xbf" * 2, b"\xff\xfe")) + content,
    "another encoding": _encoded,
    "other line ends": lambda rng, content: content.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n", b"\x0b"))),
    "reversed": lambda rng, content: content[::-1],
    "random bytes": lambda rng, content: rng.randbytes(rng.choice((0, 1, 50, 5000))),
    "white space": lambda rng, content: rng.choice((b" ", b"\n", b"\t", b"\r\n")) * rng.choice((1, 1000)),
}


# Mutations of JSON


_ODD_JSON = (
    *("null", "true", "0", "-1.5", '""', '" "', '"x"', "[]", "{}", '["x"]', '{"x": "y"}', '["x", 1, null]'),
    *("NaN", "-Infinity", "1e999", "1e-999", "9" * 30, "9" * 4300, "-" + "9" * 5000, "0x10", "01", "+1", ".5", "'x'"),
    *('"\\ud83d"', '"\\udc00\\ud83d"', '"\\u0000"', '"\\u12"', '"\\x"', '"tab\there"', '"\\u001b[31m"', "b''"),
    *("[" * 50 + "]" * 50, "[" * 990 + "]" * 990, "[" * 1100 + "]" * 1100, '{"a":' * 700 + "1" + "}" * 700),
    *("[" * 1_000_000, '{"a":' * 100_000, "9" * 1_000_000, '"' + "x" * 300_000 + '"', "[" + "1," * 100_000 + "1]"),
    *('{"role": "assistant", "content": "y"}', '[{"role": "assistant"}]', '[{"role": ["user"], "content": "y"}]'),
    *('[{"role": "assistant", "content": "y"}]', '[{"role": "assistant", "content": "\\udfff"}]', "[[[]]]", "[{}]"),
    *('[{"role": "tool", "content": ""}, {"role": "assistant", "content": "y"}, {"role": "system", "content": "z"}]',),
)
_MARK = "\x1amark\x1a"


def _json_of(rng: Random, suffix: str, rows: Any) -> bytes:
    return _jsonl(rows) if suffix == ".jsonl" and isinstance(rows, list) else _json(rows)


def _odd_value(suffix: str) -> Callable[[Random, bytes], bytes]:
    """Replace one value anywhere in the rows by an unsuitable one."""

    def mutate(rng: Random, content: bytes) -> bytes:
        rows = _rows(rng, chats=True)
        holder, key = rng.choice(list(_places(rows)))
        holder[key] = _MARK
        marked = _json_of(rng, suffix, rows).decode()
        return marked.replace(json.dumps(_MARK), rng.choice(_ODD_JSON)).encode()

    return mutate


def _places(value: Any) -> Any:
    """Every (container, key) below a value."""
    for key in range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ():
        yield value, key
        yield from _places(value[key])


def _odd_names(suffix: str) -> Callable[[Random, bytes], bytes]:
    """Omit, repeat, rename or add columns."""

    def mutate(rng: Random, content: bytes) -> bytes:
        rows = _rows(rng, chats=True)
        row = rng.choice(rows)
        name = rng.choice(list(row))
        match rng.randrange(4):
            case 0:
                del row[name]
            case 1:
                row[rng.choice(("", "Output", "line\nbreak", "\x1b[31m", "\ud83d", "x" * 100_000))] = row.pop(name)
            case 2:
                row |= {f"column {number}": number for number in range(20_000)}
            case 3:
                row[_MARK] = "second"
        return _json_of(rng, suffix, rows).replace(json.dumps(_MARK).encode(), json.dumps(name).encode())

    return mutate


_OF_JSON_TEXT: dict[str, Callable[[Random, bytes], bytes]] = {
    "an odd document": lambda rng, content: rng.choice(_ODD_JSON).encode(),
    "a token changed": lambda rng, content: _token_changed(rng, content.decode()).encode(),
    "single quotes": lambda rng, content: content.replace(b'"', b"'"),
    "a comment": lambda rng, content: _inserted(rng, content, b"// note\n"),
}


def _token_changed(rng: Random, text: str) -> str:
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[\w.+-]+|\s+|.', text)
    at = rng.randrange(len(tokens))
    tokens[at] = rng.choice(("", ",", ":", "[", "]", "{", "}", '"', "null", "\n", tokens[at] * 2, *_ODD_JSON[:30]))
    return "".join(tokens)


# Mutations of CSV


def _csv_text(rng: Random, content: bytes) -> bytes:
    changes = ((b",", b";"), (b",", b"\t"), (b",", b""), (b",", b",,"), (b"\r\n", b"\r"), (b'"', b""), (b"5", b'5"'))
    return content.replace(*rng.choice(changes), rng.choice((-1, 1)))


_ODD_LINES = (
    *(b"", b",", b'"', b'""', b'"a', b'a"b,"c', b'"a"b,c', b"a", b"a,b,c,d", b",,,,,", b" , ", b"\0,\0", b"\r"),
    *(b"x" * 200_000 + b",y", b'"' + b"x\n" * 50_000 + b'",y', b"," * 100_000, b"#N/A,NULL", b'"a\nb","c\nd"'),
    *(b"\xef\xbb\xbfa,b", b"\x1b[31m,x"),
)
_ODD_HEADERS = (
    *(b"", b",", b"prompt,prompt", b"prompt", b"PROMPT,COMPLETION", b'"line\nbreak","line\nbreak"', b"prompt;x"),
    *(b"prompt,completion,,", b",prompt,completion", b"a," * 20_000 + b"b", b"messages,source", b"\x1b[31m,\x1b[31m"),
    *(b"x" * 100_000 + b",completion", b"prompt,completion,source", b'"prompt,completion', b"prompt\0,completion"),
)
_OF_CSV: dict[str, Callable[[Random, bytes], bytes]] = {
    "other punctuation": _csv_text,
    "an odd line": lambda rng, content: _with_line(rng, content, rng.choice(_ODD_LINES)),
    "an odd header": lambda rng, content: rng.choice(_ODD_HEADERS) + b"\r\n" + content.partition(b"\n")[2],
}


def _with_line(rng: Random, content: bytes, line: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    lines.insert(rng.randint(0, len(lines)), line + b"\r\n")
    return b"".join(lines)


# Mutations of Parquet


def _odd_column(rng: Random) -> pa.Array:
    """Give two cells a type or content other than text."""
    broken = pa.py_buffer(b"\xff\xfe\xed\xa0")
    return rng.choice(
        (
            lambda: pa.array([1, 2]),
            lambda: pa.array([1.5, float("nan")]),
            lambda: pa.array([None, None]),
            lambda: pa.array(["x", None]),
            lambda: pa.array([b"\xff", b"x"]),
            lambda: pa.array([True, False]),
            lambda: pa.array([Decimal("1.50"), Decimal("-2.25")]),
            lambda: pa.array([date(1, 1, 1), date(9999, 12, 31)]),
            lambda: pa.array([timedelta(1), None]),
            lambda: pa.array([2**62, -(2**62)], pa.timestamp("us")),
            lambda: pa.array([2**62, 1], pa.timestamp("ns", "Mars/Olympus")),
            lambda: pa.array([2**31 - 1, -(2**31)], pa.date32()),
            lambda: pa.array([2**62, 1], pa.duration("s")),
            lambda: pa.array([["x"], []]),
            lambda: pa.array([{"role": "user"}, {"role": None}]),
            lambda: pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int8())),
            lambda: pa.array(["x", "y"]).dictionary_encode(),
            lambda: pa.array(["x", "y"], pa.large_string()),
            lambda: pa.array(["x", "y"], pa.string_view()),
            lambda: pa.array([[[[["x"]]]], None]),
            lambda: pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), broken]),
            lambda: pa.array([[{"role": "assistant", "content": "x"}], [{"role": "assistant", "content": None}]]),
        )
    )()


def _odd_table(rng: Random, content: bytes) -> bytes:
    names = ["prompt", "completion"] if rng.random() < 0.7 else ["messages", "source"]
    columns = [pa.array(["x", "y"]), pa.array(["x", "y"])]
    columns[rng.randrange(2)] = _odd_column(rng)
    if rng.random() < 0.2:
        names, columns = [*names, rng.choice((*names, "", "line\nbreak"))], [*columns, _odd_column(rng)]
    return _parquet_of(pa.table(columns, names=names), compression=rng.choice(("NONE", "GZIP", "ZSTD")))


def _in_the_footer(rng: Random, content: bytes) -> bytes:
    size = int.from_bytes(content[-8:-4], "little")
    start = len(content) - 8 - size
    return content[:start] + _flipped(rng, content[start:-8]) + content[-8:]


def _without_rows(rng: Random, content: bytes) -> bytes:
    table = pq.read_table(io.BytesIO(content))
    return _parquet_of(rng.choice((table.slice(0, 0), table.select([]), pa.table({}))))


_OF_PARQUET: dict[str, Callable[[Random, bytes], bytes]] = {
    "an odd column": _odd_table,
    "a changed footer": _in_the_footer,
    "no rows or columns": _without_rows,
    "an odd length of the footer": lambda rng, content: content[:-8] + rng.randbytes(4) + content[-4:],
    "many row groups": lambda rng, content: _flipped(
        rng, _parquet_of(pq.read_table(io.BytesIO(content)), row_group_size=1, compression="NONE", use_dictionary=False)
    ),
}


# Mutations of XLSX


def _in_a_part(rng: Random, content: bytes, mutate: Callable[[Random, bytes], bytes], part: str = "") -> bytes:
    """Change one file of the archive (whose name contains ``part``) and correct its checksum."""
    old = zipfile.ZipFile(io.BytesIO(content))
    chosen = rng.choice([name for name in old.namelist() if part in name])
    return _zipped(old, lambda name, content: mutate(rng, content) if name == chosen else content)


_CELLS = (
    *(b'<c r="A1"><v>1</v></c>', b'<c r="ZZZ9"><v>1</v></c>', b'<c r="AAAAA1"><v>1</v></c>', b'<c r="x"><v>1</v></c>'),
    *(b'<c t="s"><v>99999</v></c>', b'<c t="s"><v>-1</v></c>', b'<c t="s"><v>x</v></c>', b'<c t="n"><v>x</v></c>'),
    *(b'<c t="d"><v>now</v></c>', b'<c t="e"><v>#REF!</v></c>', b'<c t="b"><v>2</v></c>', b'<c t="z"><v>1</v></c>'),
    *(b'<c s="9999"><v>1</v></c>', b"<c><f>1+</f></c>", b'<c t="inlineStr"><is/></c>', b"<c><v>1e400</v></c>", b"<c/>"),
    *(b"<c><v>" + b"9" * 10_000 + b"</v></c>", b'<c t="str"><v>' + b"x" * 300_000 + b"</v></c>", b"<c><v>nan</v></c>"),
)
_ODD_ROWS = (b"1", b"0", b"-3", b"x", b"1048576", b"1048577", b"99999999999999", b"2.5", b"", b"9" * 5000)
_LAUGHS = b'<!DOCTYPE x [<!ENTITY a "' + b"ha" * 50 + b'">' + b"".join(
    b'<!ENTITY %c "%s">' % (letter, b"&%c;" % (letter - 1) * 20) for letter in b"bcdefgh"
) + b"]>"  # fmt: skip


@cache
def _spaces(megabytes: int) -> bytes:
    """A sheet of white space, much smaller in the archive."""
    return b"<worksheet><sheetData>" + b" " * (megabytes * 2**20) + b"</sheetData></worksheet>"


def _xml(pattern: bytes, choices: tuple[bytes, ...]) -> Callable[[Random, bytes], bytes]:
    """Replace one match of a pattern in the sheet."""

    def mutate(rng: Random, content: bytes) -> bytes:
        def change(rng: Random, xml: bytes) -> bytes:
            found = rng.choice(list(re.finditer(pattern, xml)) or [re.search(b"$", xml)])
            return xml[: found.start()] + rng.choice(choices) + xml[found.end() :]

        return _in_a_part(rng, content, change, "sheet1")

    return mutate


_OF_XLSX: dict[str, Callable[[Random, bytes], bytes]] = {
    **{
        f"{name} in a part": lambda rng, content, mutate=mutate: _in_a_part(rng, content, mutate)
        for name, mutate in _OF_BYTES.items()
    },
    "an odd cell": _xml(rb"<c [^>]*>.*?</c>", _CELLS),
    "an odd row number": _xml(rb'(?<=<row r=")\d+(?=")', _ODD_ROWS),
    "an odd size": _xml(rb'(?<=<dimension ref=")[^"]*', (b"A1", b"A1:XFD1048576", b"B2:A1", b"x", b"", b"A1:ZZZZ9")),
    "entities": lambda rng, content: _in_a_part(
        rng, content, lambda rng, xml: re.sub(rb"(<worksheet)", _LAUGHS + rb"\1", xml.replace(b"5<", b"&h;<"), count=1)
    ),
    "a bomb": lambda rng, content: _in_a_part(rng, content, lambda rng, xml: _spaces(80), "sheet1"),
    "a part left out": lambda rng, content: _in_a_part(rng, content, lambda rng, xml: b""),
}
_OF_FORMAT: dict[str, dict[str, Callable[[Random, bytes], bytes]]] = {
    ".jsonl": {**_OF_JSON_TEXT, "an odd value": _odd_value(".jsonl"), "odd names": _odd_names(".jsonl")},
    ".json": {**_OF_JSON_TEXT, "an odd value": _odd_value(".json"), "odd names": _odd_names(".json")},
    ".csv": _OF_CSV,
    ".parquet": _OF_PARQUET,
    ".xlsx": _OF_XLSX,
}
