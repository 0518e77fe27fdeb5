from __future__ import annotations

import csv
import json
from pathlib import Path

import datasets
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from colm_scale.config import DataConfig
from colm_scale.data.builtin import builtin_as_rows, builtin_rows
from colm_scale.data.messages import Message
from colm_scale.data.readers import Row, each_row, read_rows
from colm_scale.errors import UserError

CONFIG = DataConfig()
RECORDS = [
    {"source": "sums", "instruction": "2 + 3?", "output": "5"},
    {"source": "songs", "instruction": 'Sing\nin two lines, "la"', "output": "la\nla"},
    {"source": "sums", "instruction": "", "output": "6 "},
]
READ = [
    ("sums", "2 + 3?\n", "5"),
    ("songs", 'Sing\nin two lines, "la"\n', "la\nla"),
    ("sums", "\n", "6 "),
]


def write_jsonl(path: Path, records: list) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_json(path: Path, records: list) -> None:
    path.write_text(json.dumps(records, indent=2), encoding="utf-8")


def write_csv(path: Path, records: list) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)


def write_xlsx(path: Path, records: list) -> None:
    book = openpyxl.Workbook()
    book.active.append(list(records[0]))
    for record in records:
        book.active.append(list(record.values()))
    book.save(path)


def write_parquet(path: Path, records: list) -> None:
    pq.write_table(pa.Table.from_pylist(records), path)


WRITERS = {
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".csv": write_csv,
    ".xlsx": write_xlsx,
    ".parquet": write_parquet,
}
# The line or row of each of RECORDS as an editor shows it: a CSV cell of the second goes on for two more lines.
PLACES = {
    ".jsonl": ["line 1", "line 2", "line 3"],
    ".json": ["item 1", "item 2", "item 3"],
    ".csv": ["line 2", "line 3", "line 6"],
    ".xlsx": ["row 2", "row 3", "row 4"],
    ".parquet": ["row 1", "row 2", "row 3"],
}


def error_of(specs: list[str], config: DataConfig = CONFIG) -> str:
    with pytest.raises(UserError) as caught:
        read_rows(specs, config)
    return str(caught.value)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_rows_and_says_where_they_stand(in_tmp, suffix):
    WRITERS[suffix](Path(f"sheet{suffix}"), RECORDS)
    rows = read_rows([f"sheet{suffix}"], CONFIG)
    assert [(row.source, row.prompt, row.completion) for row in rows] == READ
    assert [row.where for row in rows] == [f"sheet{suffix} {place}" for place in PLACES[suffix]]
    assert [row.id for row in rows] == [0, 1, 2]
    assert all(row.messages == () for row in rows)


def test_ids_count_on_over_files_in_the_order_given(in_tmp):
    write_jsonl(Path("b.jsonl"), RECORDS)
    write_csv(Path("a.csv"), RECORDS[:1])
    rows = read_rows(["b.jsonl", "a.csv"], CONFIG)
    assert [(row.id, row.where) for row in rows] == [
        (0, "b.jsonl line 1"),
        (1, "b.jsonl line 2"),
        (2, "b.jsonl line 3"),
        (3, "a.csv line 2"),
    ]


def test_blank_lines_are_skipped_but_counted(in_tmp):
    Path("gaps.jsonl").write_text('\n{"prompt": "a", "completion": "b"}\r\n  \n{"prompt": "c", "completion": "d"}')
    Path("gaps.csv").write_text("\nprompt,completion\n\na,b\n\n\nc,d\n")
    assert [row.where for row in read_rows(["gaps.jsonl"], CONFIG)] == ["gaps.jsonl line 2", "gaps.jsonl line 4"]
    assert [row.where for row in read_rows(["gaps.csv"], CONFIG)] == ["gaps.csv line 4", "gaps.csv line 7"]


def test_a_line_separator_within_a_json_string_ends_no_line(in_tmp):
    Path("a.jsonl").write_text('{"prompt": "a\u2028b\x85", "completion": "c"}\n', encoding="utf-8")
    assert [row.prompt for row in read_rows(["a.jsonl"], CONFIG)] == ["a\u2028b\x85"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_no_part_of_the_data(in_tmp, suffix):
    path = Path(f"a{suffix}")
    WRITERS[suffix](path, RECORDS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [row.source for row in read_rows([str(path)], CONFIG)] == ["sums", "songs", "sums"]


@pytest.mark.parametrize("suffix", [".csv", ".xlsx", ".parquet"])
def test_numbers_in_cells_become_text(in_tmp, suffix):
    WRITERS[suffix](Path(f"n{suffix}"), [{"source": 7, "prompt": 12, "completion": 2.5}])
    assert read_rows([f"n{suffix}"], CONFIG) == [
        Row(0, "7", (), "12", "2.5", f"n{suffix} {'line 2' if suffix == '.csv' else PLACES[suffix][0]}")
    ]


def test_integers_as_sources_become_text_in_json_too(in_tmp):
    write_jsonl(Path("a.jsonl"), [{"source": 3, "prompt": "a", "completion": "b"}])
    assert read_rows(["a.jsonl"], CONFIG)[0].source == "3"


def test_trailing_empty_spreadsheet_cells_and_rows_are_no_data(in_tmp):
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("first")
    for cells in [["prompt", "completion", "note"], [None, "b", "n"], [None, None], ["c", "d"], [None]]:
        sheet.append(cells)
    book.create_sheet("empty")
    book.save("a.xlsx")
    rows = read_rows(["a.xlsx"], CONFIG)
    assert [(row.prompt, row.completion, row.where) for row in rows] == [
        ("", "b", "a.xlsx row 2"),
        ("c", "d", "a.xlsx row 4"),
    ]


def test_trailing_columns_without_name_and_content_are_none(in_tmp):
    Path("a.csv").write_text("prompt,completion,,\na,b,,\n")
    assert [(row.prompt, row.completion) for row in read_rows(["a.csv"], CONFIG)] == [("a", "b")]
    Path("b.csv").write_text("prompt,completion,,\na,b,,c\n")
    assert "b.csv line 2 has 4 cells, but 2 columns are named" in error_of(["b.csv"])


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("marks", [(True, False), (1, 0), ("true", "false"), ("TRUE", ""), ("1", "0")], ids=str)
def test_a_column_marks_protected_rows(in_tmp, suffix, marks):
    WRITERS[suffix](Path(f"p{suffix}"), [{"prompt": "a", "completion": "b", "protected": mark} for mark in marks])
    assert [row.protected for row in read_rows([f"p{suffix}"], CONFIG)] == [True, False]
    other = DataConfig(columns={"protected": "must"})
    assert [row.protected for row in read_rows([f"p{suffix}"], other)] == [False, False]


def test_rows_without_a_mark_are_not_protected(in_tmp):
    pair = {"prompt": "a", "completion": "b"}
    write_jsonl(Path("a.jsonl"), [pair, pair | {"protected": None}, pair | {"must": True}])
    assert not any(row.protected for row in read_rows(["a.jsonl"], CONFIG))
    other = DataConfig(columns={"protected": "must"})
    assert [row.protected for row in read_rows(["a.jsonl"], other)] == [False, False, True]


@pytest.mark.parametrize("mark", ["yes", 2, -1, 1.0, [], {"a": True}, " true"], ids=str)
def test_any_other_mark_is_refused(in_tmp, mark):
    pair = {"prompt": "a", "completion": "b"}
    write_jsonl(Path("a.jsonl"), [pair, pair | {"protected": mark}])
    message = error_of(["a.jsonl"])
    assert f"a.jsonl line 2: 'protected' is {json.dumps(mark)}, but must be true or false" in message
    assert "--data.columns.protected" in message


# Kinds of rows


def test_only_instructions_are_written_through_the_template(in_tmp):
    write_jsonl(Path("a.jsonl"), [{"instruction": "{x}?", "output": "1"}, {"prompt": "{x}?", "completion": "1"}])
    config = DataConfig(template='{"question": {instruction}} ')
    assert [row.prompt for row in read_rows(["a.jsonl"], config)] == ['{"question": {x}?} ', "{x}?"]


def test_an_input_column_belongs_to_the_prompt(in_tmp):
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Hi", "input": "", "output": "Ho"}]
    write_jsonl(Path("a.jsonl"), rows)
    assert [row.prompt for row in read_rows(["a.jsonl"], CONFIG)] == ["Add.\n1 2\n", "Hi\n"]


def test_messages_win_over_prompt_and_completion_and_those_over_instruction_and_output(in_tmp):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    pair, instruction = {"prompt": "p", "completion": "c"}, {"instruction": "i", "output": "o"}
    write_jsonl(Path("a.jsonl"), [{**instruction, **pair, "messages": chat}, {**instruction, **pair}, instruction])
    rows = read_rows(["a.jsonl"], CONFIG)
    assert rows[0].messages == (Message("user", "hi"), Message("assistant", "ho"))
    assert [row.completion for row in rows] == ["", "c", "o"]


def test_half_of_a_pair_is_no_pair(in_tmp):
    write_jsonl(Path("a.jsonl"), [{"prompt": "p", "instruction": "i", "output": "o"}])
    assert [row.completion for row in read_rows(["a.jsonl"], CONFIG)] == ["o"]


def test_every_column_can_have_another_name(in_tmp):
    roles = ("source", "instruction", "input", "output", "prompt", "completion", "messages")
    config = DataConfig(columns={role: role[0].upper() + role[1] for role in roles})
    chat = [{"role": "assistant", "content": "ho"}]
    records = [{"So": "1", "In": "i", "Ou": "o"}, {"So": "2", "Pr": "p", "Co": "c"}, {"So": "3", "Me": chat}]
    write_jsonl(Path("a.jsonl"), records)
    rows = read_rows(["a.jsonl"], config)
    assert [(row.source, row.completion) for row in rows] == [("1", "o"), ("2", "c"), ("3", "")]
    assert rows[2].messages == (Message("assistant", "ho"),)


def test_chats_come_out_of_parquet_too(in_tmp):
    chat = [{"role": role, "content": text} for role, text in [("system", "s"), ("user", ""), ("assistant", "a")]]
    write_parquet(Path("a.parquet"), [{"messages": chat}])
    expected = (Message("system", "s"), Message("user", ""), Message("assistant", "a"))
    assert read_rows(["a.parquet"], CONFIG)[0].messages == expected


# Sources


def test_a_file_without_sources_is_a_source(in_tmp):
    Path("sub").mkdir()
    write_jsonl(Path("sub/farm.v2.jsonl"), [{"prompt": "a", "completion": "b"}])
    write_jsonl(Path("mixed.jsonl"), RECORDS)
    rows = read_rows(["sub/farm.v2.jsonl", "mixed.jsonl"], CONFIG)
    assert [row.source for row in rows] == ["farm.v2", "sums", "songs", "sums"]


@pytest.mark.parametrize("lacking", [{}, {"source": None}, {"source": ""}])
def test_a_file_with_sources_has_one_in_every_row(in_tmp, lacking):
    pair = {"prompt": "a", "completion": "b"}
    write_jsonl(Path("a.jsonl"), [{"source": "s", **pair}, {**pair, **lacking}, {**pair, **lacking}])
    message = error_of(["a.jsonl"])
    assert "a.jsonl line 2 has no source in the column 'source'" in message
    assert "2 of the 3 rows" in message
    assert "--data.columns.source" in message


# The hub


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set, and the splits that were asked for."""
    asked = []

    def load_dataset(name: str, split: str, streaming: bool):
        asked.append((name, split))
        if name != "org/set.v1":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return datasets.Dataset.from_list([{"prompt": "a", "completion": 1}, {"prompt": "b", "completion": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_hub_data_sets_are_loaded_by_name_and_split(in_tmp, hub):
    rows = read_rows(["org/set.v1", "org/set.v1:test[:2]"], CONFIG)
    assert hub == [("org/set.v1", "train"), ("org/set.v1", "test[:2]")]
    assert rows[1] == Row(1, "org/set.v1:train", (), "b", "2", "org/set.v1:train row 2")
    assert rows[3] == Row(3, "org/set.v1:test[:2]", (), "b", "2", "org/set.v1:test[:2] row 2")
    assert read_rows(["org/set.v1:dev"], CONFIG)[0].source == "org/set.v1"


def test_what_the_hub_says_is_passed_on(in_tmp, hub):
    message = error_of(["org/other:dev"])
    assert "org/other is not a file" in message
    assert "split 'dev'" in message
    assert "Dataset 'org/other' doesn't exist on the Hub" in message


@pytest.mark.parametrize("spec", ["gsm8k", "a/b/c", "org/", "", "org/a b"])
def test_what_is_neither_a_file_nor_a_hub_name_is_refused(in_tmp, hub, spec):
    message = error_of([spec])
    assert repr(spec) in message
    assert hub == []


# What is wrong with a file


def test_a_missing_file_suggests_the_closest_name_there(in_tmp):
    Path("data").mkdir()
    write_jsonl(Path("data/train.jsonl"), RECORDS)
    write_jsonl(Path("data/other.jsonl"), RECORDS)
    assert error_of(["data/trian.jsonl"]) == "data/trian.jsonl does not exist; did you mean data/train.jsonl?"
    assert error_of(["data/zz.jsonl"]) == "data/zz.jsonl does not exist", "its suffix is no likeness"
    assert error_of(["nowhere/a.csv"]) == "nowhere/a.csv does not exist, nor does its folder nowhere"


def test_a_folder_without_data_is_refused(in_tmp):
    Path("data.jsonl").mkdir()
    Path("org/name").mkdir(parents=True)
    assert "data.jsonl is a folder without any file of a known format" in error_of(["data.jsonl"])
    assert "org/name is a folder without any file of a known format" in error_of(["org/name"])


def test_an_unknown_format_is_refused(in_tmp):
    Path("a.txt").write_text("hello")
    message = error_of(["a.txt"])
    assert "a.txt" in message
    assert ".jsonl, .json, .parquet, .csv, .xlsx" in message


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_without_rows_is_refused(in_tmp, suffix):
    path = Path(f"empty{suffix}")
    if suffix == ".parquet":
        pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    elif suffix == ".xlsx":
        openpyxl.Workbook().save(path)
    else:
        path.write_text("")
    assert error_of([str(path)]) == f"{path} has no rows"


def test_a_header_alone_has_no_rows(in_tmp):
    Path("a.csv").write_text("prompt,completion\n\n")
    assert error_of(["a.csv"]) == "a.csv has no rows"


@pytest.mark.parametrize("suffix", [".xlsx", ".parquet"])
def test_damaged_files_are_named(in_tmp, suffix):
    Path(f"bad{suffix}").write_bytes(b"PK\x03\x04 no such thing")
    assert f"bad{suffix} cannot be read as {suffix[1:].upper() if suffix == '.xlsx' else 'Parquet'}" in error_of(
        [f"bad{suffix}"]
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_text_that_is_not_utf8_is_named_with_its_line(in_tmp, suffix):
    Path(f"bad{suffix}").write_bytes(b'\n\n{"prompt": "caf\xe9"}\n')
    assert f"bad{suffix} line 3 is not UTF-8" in error_of([f"bad{suffix}"])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n\n{"a": 1,}\n', "a.jsonl line 3, column "),
        ("a.jsonl", '{"a": "b\n', "a.jsonl line 1, column 7: invalid JSON"),
        ("a.json", '[\n {"a": 1},\n {"a" 1}\n]', "a.json line 3, column 7: invalid JSON"),
        ("a.json", '{"a": 1}\n{"a": 1}', "a.json line 2, column 1: invalid JSON: Extra data (a .jsonl file has one"),
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n[1, 2]\n', "a.jsonl line 2 holds [1, 2], but must be"),
        ("a.jsonl", "null\n", "a.jsonl line 1 holds null, but must be an object"),
        ("a.json", '{"a": 1}', 'a.json holds {"a": 1}, but a .json file must be a list of objects'),
        ("a.json", '[{"prompt": "a", "completion": "b"}, "c"]', 'a.json item 2 holds "c", but must be an object'),
        ("a.csv", "prompt,completion\na,b\nc\n", "a.csv line 3 has 1 cells, but 2 columns are named"),
        ("a.csv", "prompt,completion\na,b,c\n", "a.csv line 2 has 3 cells, but 2 columns are named"),
        ("a.csv", 'prompt,completion\na,b\n"c,d\n', "a.csv line 3: invalid CSV: unexpected end of data"),
        ("a.csv", "prompt,completion,prompt\na,b,c\n", "a.csv line 1: a column name appears twice"),
    ],
)
def test_malformed_files_are_named_with_line_and_column(in_tmp, name, text, expected):
    Path(name).write_text(text)
    assert expected in error_of([name])


def test_several_filled_sheets_are_refused(in_tmp):
    book = openpyxl.Workbook()
    book.active.append(["prompt", "completion"])
    book.create_sheet("Notes").append(["remember"])
    book.save("a.xlsx")
    assert "several sheets with content (Sheet, Notes)" in error_of(["a.xlsx"])


# What is wrong with a row


def test_missing_columns_are_listed_with_the_options_that_rename_them(in_tmp):
    write_jsonl(Path("a.jsonl"), [{"prompt": "a", "completion": "b"}, {"question": "a", "output": "b"}])
    message = error_of(["a.jsonl"])
    assert message.startswith("a.jsonl line 2 has the columns 'question', 'output', but needs 'messages', or 'prompt'")
    assert "--data.columns '{instruction: question, output: answer}'" in message
    config = DataConfig(columns={"instruction": "question", "output": "answer"})
    with pytest.raises(UserError, match="or 'question' and 'answer'"):
        read_rows(["a.jsonl"], DataConfig(columns=config.columns | {"prompt": "ask"}))


@pytest.mark.parametrize("suffix", [".csv", ".xlsx", ".parquet"])
def test_missing_columns_of_a_table_are_named_with_the_first_row(in_tmp, suffix):
    WRITERS[suffix](Path(f"a{suffix}"), [{"question": "a", "answer": "b"}])
    first = "line 2" if suffix == ".csv" else PLACES[suffix][0]
    assert error_of([f"a{suffix}"]).startswith(f"a{suffix} {first} has the columns 'question', 'answer'")


def chat(*turns: tuple[str, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "a", "output": ""}, "'output' is empty"),
        ({"instruction": "a", "output": " \n"}, "'output' is empty"),
        ({"instruction": "a", "output": None}, "'output' is null, but must be text"),
        ({"instruction": "a", "output": 5}, "'output' is 5, but must be text"),
        ({"prompt": "a", "completion": ["b"]}, 'completion[0] is "b", but must be an object with role and content'),
        ({"prompt": 3, "completion": "b"}, "'prompt' is 3, but must be text"),
        ({"instruction": None, "output": "b"}, "'instruction' is null, but must be text"),
        ({"prompt": "a", "completion": "\ud83d!"}, "'completion' holds half a character, '\\ud83d'"),
        ({"source": ["s"], "prompt": "a", "completion": "b"}, "'source' is [\"s\"], but must be text"),
        ({"messages": "hi"}, "'messages' is \"hi\", but must be a list"),
        ({"messages": None}, "'messages' is null, but must be a list"),
        ({"messages": []}, "'messages' has no turn of the assistant"),
        ({"messages": ["hi"]}, 'messages[0] is "hi", but must be an object'),
        ({"messages": [{"content": "hi"}]}, "the role of messages[0] is null"),
        (chat(("user", "a"), ("bot", "b")), 'the role of messages[1] is "bot", but must be one of system, dev'),
        (chat(("user", 5), ("assistant", "b")), "'messages[0].content' is 5, but must be text"),
        (chat(("user", "a"), ("assistant", None)), "'messages[1].content' is empty"),
        (chat(("user", "a"), ("assistant", [1])), "'messages[1].content' is 1, but must be text"),
        (chat(("user", "a"), ("assistant", " ")), "'messages[1].content' is empty"),
        (chat(("system", "a"), ("user", "b")), "'messages' has no turn of the assistant"),
    ],
)
def test_bad_rows_are_named_with_their_line(in_tmp, record, expected):
    good = {"prompt": "a", "completion": "b", **({"source": "s"} if "source" in record else {})}
    write_jsonl(Path("a.jsonl"), [good, record])
    message = error_of(["a.jsonl"])
    assert message.startswith("a.jsonl line 2")
    assert expected in message


def test_a_null_output_in_parquet_is_missing(in_tmp):
    write_parquet(Path("a.parquet"), [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": None}])
    assert "a.parquet row 2: 'completion' is null" in error_of(["a.parquet"])


@pytest.mark.parametrize("suffix", [".csv", ".xlsx"])
def test_an_empty_output_cell_is_an_error_and_an_empty_prompt_cell_is_not(in_tmp, suffix):
    WRITERS[suffix](Path(f"a{suffix}"), [{"prompt": "", "completion": "b"}, {"prompt": "c", "completion": None}])
    place = PLACES[suffix][1]
    assert f"a{suffix} {place}: 'completion' is empty" in error_of([f"a{suffix}"])


def test_long_values_are_shortened_in_messages(in_tmp):
    write_jsonl(Path("a.jsonl"), [{"messages": "x" * 10_000}])
    assert len(error_of(["a.jsonl"])) < 200


def test_a_spec_of_an_uppercase_suffix_is_a_file(in_tmp):
    write_jsonl(Path("A.JSONL"), RECORDS)
    assert len(read_rows(["A.JSONL"], CONFIG)) == 3


# The built-in mixture


def test_builtin_rows_are_templated_and_numbered():
    records = builtin_rows("eval")
    rows = builtin_as_rows("eval", DataConfig(template="Q: {instruction}\nA: "))
    assert [row.id for row in rows] == list(range(len(records)))
    assert rows[5] == Row(
        5,
        records[5]["source"],
        (),
        f"Q: {records[5]['instruction']}\nA: ",
        records[5]["output"],
        "built-in eval data row 6",
    )


def test_sources_are_protected_by_name(in_tmp):
    pair = {"prompt": "a", "completion": "b"}
    marked = {"source": "other", "protected": True}
    write_jsonl(Path("a.jsonl"), [pair | {"source": "rare"}, pair | {"source": "other"}, pair | marked])
    config = DataConfig(protected_sources=["rare"])
    assert [row.protected for row in read_rows(["a.jsonl"], config)] == [True, False, True]
    assert [row.protected for row in each_row(["a.jsonl"], config, streaming=True)] == [True, False, True]
    built_in = builtin_as_rows("train", DataConfig(protected_sources=["EQ/tank"]))
    assert {row.source for row in built_in if row.protected} == {"EQ/tank"}
    assert sum(row.protected for row in built_in) == 20
