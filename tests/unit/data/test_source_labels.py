from __future__ import annotations

import json
from pathlib import Path

import pytest

from colm_scale.config import DataConfig
from colm_scale.data.readers import read_rows
from colm_scale.data.source_labels import label_line, labelled, row_digest
from colm_scale.data.stream import survey
from colm_scale.errors import UserError

CONFIG = DataConfig()
NAMES = ["b", "a", "b"]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = [{"prompt": f"p{number}", "completion": "c"} for number in range(3)]
    text = json.dumps(written[0]) + "\n\n" + "".join(json.dumps(row) + "\n" for row in written[1:])
    (tmp_path / "data.jsonl").write_text(text)
    return read_rows(["data.jsonl"], CONFIG)


def write(rows, names=NAMES, path="labels.jsonl"):
    with open(path, "w") as file:
        file.writelines(label_line(row, name) for row, name in zip(rows, names))


def error_of(rows, path="labels.jsonl") -> str:
    with pytest.raises(UserError) as caught:
        list(labelled(rows, path))
    return str(caught.value)


def test_each_row_has_the_source_of_its_line(rows):
    write(rows)
    assert [row.source for row in labelled(rows, "labels.jsonl")] == NAMES
    assert [row.source for row in labelled(rows, None)] == ["data"] * 3


def test_a_line_without_a_digest_is_taken_at_its_word(rows):
    with open("labels.jsonl", "w") as file:
        file.writelines(json.dumps({"source": name}) + "\n" for name in NAMES)
    assert [row.source for row in labelled(rows, "labels.jsonl")] == NAMES


def test_the_line_of_another_row_is_named_with_the_row(rows):
    write([rows[0], rows[2], rows[1]])
    assert error_of(rows).startswith("labels.jsonl line 2 does not belong to data.jsonl line 3, whose content differs")


def test_lines_that_are_missing_or_left_over_are_named(rows):
    write(rows[:2])
    assert "labels.jsonl ends before data.jsonl line 4" in error_of(rows)
    write([*rows, rows[0]], [*NAMES, "a"])
    assert "labels.jsonl line 4 is left over" in error_of(rows)


@pytest.mark.parametrize("source", ["3", '""', "null", '["a"]'])
def test_a_source_is_a_name(rows, source):
    Path("labels.jsonl").write_text(f'{{"source": {source}}}\n')
    assert error_of(rows).startswith("labels.jsonl line 1: source is ")


def test_other_files_and_no_file(rows):
    assert "missing.jsonl does not exist" in error_of(rows, "missing.jsonl")
    assert "is not a .jsonl file" in error_of(rows, "labels.csv")


def test_the_digest_is_of_what_is_written_and_of_nothing_else(rows):
    assert len({row_digest(row) for row in rows}) == 3
    (moved,) = read_rows(["data.jsonl"], DataConfig(columns={"source": "prompt"}))[:1]
    assert moved.source != rows[0].source
    assert row_digest(moved) == row_digest(rows[0])


def test_a_stream_has_them_too(rows):
    write(rows)
    found = survey(["data.jsonl"], DataConfig(train=["data.jsonl"], sources="labels.jsonl"))
    assert found.source_names == ("a", "b")
    assert found.sizes.tolist() == [1, 2]
