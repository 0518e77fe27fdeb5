"""Files by name, folder and pattern, and the sources their names give."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pytest

from colm_scale.config import DataConfig
from colm_scale.data.files import default_sources, files_of
from colm_scale.data.readers import each_row, read_rows
from colm_scale.errors import UserError

ROWS = b'{"text": "a"}\n{"text": "b"}\n'


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("files", "sources"),
    [
        (["math/train.jsonl", "code/train.jsonl", "other.csv"], ["math", "code", "other"]),
        (["math/v1/train.jsonl", "code/v1/train.jsonl", "code/v1/test.jsonl"], ["math", "code", "test"]),
        (["math/train.jsonl", "code/train.jsonl", "math.jsonl"], ["math/train", "code", "math"]),
        (["a/train.jsonl", "a/train.jsonl"], ["train", "train"]),
        (["a/train.jsonl", "a/train.csv"], ["train.jsonl", "train.csv"]),
        (["math/train.jsonl", "code/train.csv"], ["math", "code"]),
        (["a/train.jsonl.gz", "b/train.v2.csv"], ["train", "train.v2"]),
        (["org/set", "org/set:test", "org/other:test"], ["org/set:train", "org/set:test", "org/other"]),
    ],
)
def test_a_source_is_the_shortest_part_of_the_path_that_tells_files_apart(files, sources):
    assert default_sources(files) == sources


def test_folders_and_patterns():
    for name in ("b/two.jsonl", "b/deep/three.jsonl", "b/notes.txt", "one.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(ROWS)
    assert files_of("b") == ["b/deep/three.jsonl", "b/two.jsonl"]
    assert files_of("*.jsonl") == ["one.jsonl"]
    assert files_of("**/t*.jsonl") == ["b/deep/three.jsonl", "b/two.jsonl"]
    assert [row.source for row in read_rows(["b"], DataConfig())] == ["three", "three", "two", "two"]
    with pytest.raises(UserError, match=r"no file matches \*\.csv"):
        files_of("*.csv")


@pytest.mark.parametrize("streaming", [False, True])
def test_compressed_files(streaming):
    Path("a.jsonl.gz").write_bytes(gzip.compress(ROWS))
    Path("b.jsonl.zst").write_bytes(pa.compress(ROWS, codec="zstd", asbytes=True))
    Path("c.csv.gz").write_bytes(gzip.compress(b"text\nc\n"))
    names = ["a.jsonl.gz", "b.jsonl.zst", *([] if streaming else ["c.csv.gz"])]
    rows = list(each_row(names, DataConfig(), streaming=streaming))
    assert [row.completion for row in rows] == ["a", "b", "a", "b", "c"][: len(rows)]
    assert rows[0].where == "a.jsonl.gz line 1"


def test_a_damaged_compressed_file_is_named():
    Path("a.jsonl.gz").write_bytes(gzip.compress(ROWS * 1000)[:-30])
    with pytest.raises(UserError, match=r"^a\.jsonl\.gz cannot be read: "):
        read_rows(["a.jsonl.gz"], DataConfig())
    Path("a.parquet.gz").write_bytes(b"")
    with pytest.raises(UserError, match="no suffix of a known format"):
        read_rows(["a.parquet.gz"], DataConfig())


def test_a_compressed_file_whose_name_does_not_say_so():
    for name, content, suffix in (
        ("a.jsonl", gzip.compress(ROWS), ".gz"),
        ("b.csv", pa.compress(ROWS, codec="zstd", asbytes=True), ".zst"),
    ):
        Path(name).write_bytes(content)
        with pytest.raises(UserError, match=rf"^{name} line 1 is not UTF-8 .* so its name must end in {suffix}$"):
            read_rows([name], DataConfig())


def test_a_long_cell_in_csv():
    Path("a.csv").write_text(f"text\n{'x' * 300_000}\n")
    assert len(read_rows(["a.csv"], DataConfig())[0].completion) == 300_000


@pytest.mark.parametrize("spec", ["data/corpus.txt", "data/corpus.gz"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(spec):
    with pytest.raises(UserError, match="is neither a file"):
        read_rows([spec], DataConfig())
