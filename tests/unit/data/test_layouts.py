"""Rows in the layouts that people have, read without options."""

from __future__ import annotations

import json
from pathlib import Path

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from colm_scale.config import DataConfig
from colm_scale.data.messages import Message
from colm_scale.data.readers import Columns, Row, read_rows
from colm_scale.errors import UserError

CALLS = [{"id": "c1", "function": {"name": "lookup", "arguments": {"city": "Oslo"}}}]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def written(*records: dict[str, object]) -> str:
    Path("a.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return "a.jsonl"


def row_of(record: dict[str, object], **columns: str) -> Row:
    return read_rows([written(record)], DataConfig(columns=columns))[0]


def error_of(record: dict[str, object]) -> str:
    with pytest.raises(UserError) as caught:
        row_of(record)
    return str(caught.value)


def test_dolly():
    cells = {"instruction": "Who wrote it?", "context": "Emma is by Austen.", "response": "Austen", "category": "qa"}
    row = row_of(cells)
    assert (row.prompt, row.completion) == ("Who wrote it?\nEmma is by Austen.\n", "Austen")


def test_alpaca_with_system_and_history():
    history = [["a?", "b"], ["c?", "d"]]
    row = row_of({"instruction": "e?", "input": "", "output": "f", "system": "be kind", "history": history})
    assert (row.prompt, row.completion) == ("be kind\na?\nb\nc?\nd\ne?\n", "f")
    assert "'history' is [\"a\"], but must be a list of pairs" in error_of(
        {"instruction": "e?", "output": "f", "history": ["a"]}
    )


def test_sharegpt():
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    row = row_of({"conversations": turns, "system": "be kind", "tools": '[{"name": "lookup"}]'})
    assert row.messages == (Message("system", "be kind"), Message("user", "hi"), Message("assistant", "ho"))
    assert row.tools == ({"name": "lookup"},)


def test_a_call_in_sharegpt():
    call = {"from": "function_call", "value": '{"name": "lookup", "arguments": {"city": "Oslo"}}'}
    _, message = row_of({"conversations": [{"from": "human", "value": "hi"}, call]}).messages
    assert message.more == {"tool_calls": [{"function": CALLS[0]["function"], "type": "function"}]}


def test_several_calls_in_sharegpt_and_a_thought_before_a_call():
    call = {"name": "lookup", "arguments": {"city": "Oslo"}}
    two = {"from": "function_call", "value": json.dumps([call, call])}
    thought = {"from": "function_call", "value": f"<think>where?</think>\n{json.dumps(call)}"}
    _, first, second = row_of({"conversations": [{"from": "human", "value": "hi"}, two, thought]}).messages
    assert first.more == {"tool_calls": [{"type": "function", "function": call}] * 2}
    assert (second.content, second.more) == (
        "<think>where?</think>",
        {"tool_calls": [{"type": "function", "function": call}]},
    )


def test_calls_and_their_answers_in_other_words():
    call = {"name": "lookup", "arguments": {"city": "Oslo"}}
    chats = (
        [
            {"role": "tool_call", "content": json.dumps(call), "loss": False},
            {"role": "tool_response", "content": "3 C"},
        ],
        [{"role": "assistant", "content": None, "function_call": call}, {"role": "function", "content": "3 C"}],
    )
    for number, chat in enumerate(chats):
        calling, answer = row_of({"messages": [*chat, {"role": "assistant", "content": "a"}]}).messages[:2]
        assert calling.more == {"tool_calls": [{"type": "function", "function": call}]}
        assert (calling.learned, answer) == (number == 1, Message("tool", "3 C"))


def test_a_thought_under_several_names():
    turn = {"role": "assistant", "content": "a", "reasoning_content": "", "thinking": "b"}
    assert row_of({"messages": [turn]}).messages[0].more == {"reasoning_content": "b"}
    assert row_of({"messages": [turn | {"reasoning": "b"}]}).messages[0].more == {"reasoning_content": "b"}
    message = error_of({"messages": [turn | {"reasoning": "c"}]})
    assert message == "a.jsonl line 1: messages[0] has different thinking and reasoning: leave one of them out"


@pytest.mark.parametrize("key", ["train", "training", "loss", "weight"])
@pytest.mark.parametrize("value", [0, 0.0, False, "0", "false", "False"])
def test_marks_of_turns_that_are_not_learned(key, value):
    turns = [{"role": "assistant", "content": "a", key: value}, {"role": "assistant", "content": "b", key: 1}]
    assert [message.learned for message in row_of({"messages": turns}).messages] == [False, True]


def test_a_turn_that_is_not_learned_may_be_empty():
    empty = {"role": "assistant", "content": ""}
    turns = [empty | {"train": False}, {"role": "assistant", "content": "b"}]
    assert [message.content for message in row_of({"messages": turns}).messages] == ["", "b"]
    assert "'messages[0].content' is empty" in error_of({"messages": [empty]})


@pytest.mark.parametrize("tools", [" ", "null", "[]", [], '[{"name": "f"}]', ['{"name": "f"}'], [{"name": "f"}]])
def test_tools_as_json_of_all_or_of_each(tools):
    row = row_of({"messages": [{"role": "assistant", "content": "a"}], "tools": tools})
    assert row.tools == (({"name": "f"},) if "f" in str(tools) else ())


def test_a_system_column_beside_a_system_message():
    turns = [{"role": "system", "content": "be kind"}, {"role": "assistant", "content": "a"}]
    assert len(row_of({"messages": turns, "system": "be kind\n"}).messages) == 2
    assert "a.jsonl line 1: 'messages' begins with a system message, and 'system' has another" in error_of(
        {"messages": turns, "system": "be brief"}
    )


def test_a_prompt_that_is_a_text_is_taken_verbatim_and_the_columns_beside_it_are_named():
    columns, chat = Columns(), [{"role": "user", "content": "a"}]
    records = ({"prompt": "a", "completion": "b"}, {"prompt": chat, "completion": "b"})
    rows = read_rows([written(*(record | {"system": "be kind"} for record in records))], DataConfig(), columns)
    assert [row.prompt for row in rows] == ["a", ""]
    assert rows[1].messages[0] == Message("system", "be kind")
    assert columns.lines() == ["a.jsonl: columns not read: 'system' (1 rows)"]


def test_history_in_csv():
    Path("a.csv").write_text('instruction,output,history\ne?,f,"[[""a?"", ""b""]]"\ne?,f,\n')
    assert [row.prompt for row in read_rows(["a.csv"], DataConfig())] == ["a?\nb\ne?\n", "e?\n"]


def test_prompt_and_completion_as_messages():
    user, assistant = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
    row = row_of({"prompt": [user, assistant, user], "completion": [assistant]})
    assert [message.learned for message in row.messages if message.role == "assistant"] == [False, True]
    assert row_of({"prompt": "hi", "completion": [assistant]}).messages == (
        Message("user", "hi", learned=False),
        Message("assistant", "ho"),
    )


def test_plain_text_is_all_learned():
    row = row_of({"text": "once upon a time"})
    assert (row.prompt, row.completion) == ("", "once upon a time")


def test_rows_of_a_union_are_read_by_what_is_filled():
    empty = {"messages": None, "conversations": None, "instruction": None, "output": None, "text": None}
    chat = [{"role": "assistant", "content": "ho"}]
    records = ({"instruction": "a", "output": "b"}, {"text": "c"}, {"messages": chat}, {"conversations": chat})
    rows = read_rows([written(*(empty | record for record in records))], DataConfig())
    assert [row.completion for row in rows] == ["b", "c", "", ""]
    assert rows[2].messages == rows[3].messages == (Message("assistant", "ho"),)


def test_json_in_texts_is_what_it_says():
    chat = json.dumps([{"role": "assistant", "content": None, "tool_calls": CALLS}])
    (message,) = row_of({"messages": chat}).messages
    assert message.more == {"tool_calls": CALLS}
    arguments = [{"function": {"name": "lookup", "arguments": '{"city": "Oslo"}'}}]
    (message,) = row_of({"messages": [{"role": "assistant", "tool_calls": arguments}]}).messages
    assert message.more["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}


def test_keys_that_only_other_rows_have_are_not_there_in_parquet():
    calls = [
        {"function": {"name": "lookup", "arguments": {"city": "Oslo"}}},
        {"function": {"name": "add", "arguments": {"numbers": [1, 2]}}},
    ]
    rows = [{"messages": [{"role": "assistant", "content": "a", "tool_calls": [call]}]} for call in calls]
    pq.write_table(pa.Table.from_pylist([*rows, {"messages": [{"role": "assistant", "content": "b"}]}]), "a.parquet")
    found = [row.messages[0].more for row in read_rows(["a.parquet"], DataConfig())]
    assert found == [{"tool_calls": [calls[0]]}, {"tool_calls": [calls[1]]}, {}]


def test_nan_is_missing_in_every_format():
    Path("a.jsonl").write_text('{"instruction": "a", "input": NaN, "output": "b", "source": NaN}\n')
    table = pa.table({"instruction": ["a"], "input": [float("nan")], "output": ["b"], "source": [float("nan")]})
    pq.write_table(table, "b.parquet")
    Path("c.csv").write_text("instruction,input,output,source\na,nan,b,NaN\n")
    sheet = openpyxl.Workbook()
    for cells in (["instruction", "input", "output"], ["a", "nan", "b"]):
        sheet.active.append(cells)
    sheet.save("d.xlsx")
    rows = read_rows(["a.jsonl", "b.parquet", "c.csv", "d.xlsx"], DataConfig())
    assert [(row.prompt, row.completion, row.source) for row in rows] == [("a\n", "b", source) for source in "abcd"]
    pq.write_table(pa.table({"instruction": ["a"], "output": [float("nan")]}), "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet row 1: 'output' is null"):
        read_rows(["b.parquet"], DataConfig())


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"weight": 0.5}, "'messages[0].weight' is 0.5, but must be 1"),
        ({"train": "no"}, "'messages[0].train' is \"no\", but must be 1"),
        ({"role": ["assistant"]}, 'the role of messages[0] is ["assistant"], but must be one of'),
        ({"tool_calls": "lookup"}, "'messages[0].tool_calls' is \"lookup\", but must be a list of calls"),
        ({"tool_calls": [{"id": "c1"}]}, "'messages[0].tool_calls' has a call without the name of a function"),
        ({"content": [{"type": "image", "url": "u"}]}, "'messages[0].content' has a part of type \"image\""),
    ],
)
def test_what_cannot_be_trained_is_named(turn, expected):
    message = error_of({"messages": [{"role": "assistant", "content": "a", **turn}]})
    assert message.startswith("a.jsonl line 1: ")
    assert expected in message


def test_columns_that_are_not_read_are_counted():
    columns = Columns()
    records = ({"instruction": "a", "response": "b", "category": "c", "text": "d"}, {"text": "e", "category": ""})
    read_rows([written(*records)], DataConfig(), columns)
    assert columns.lines() == ["a.jsonl: columns not read: 'category' (1 rows), 'text' (1 rows)"]


def test_a_column_that_no_file_has_is_refused_with_the_closest_name():
    columns, config = Columns(), DataConfig(columns={"source": "datset"})
    read_rows([written({"text": "a", "dataset": "b"})], config, columns)
    with pytest.raises(UserError, match=r"--data\.columns\.source: no file has a column 'datset'; did you .*'dataset'"):
        columns.check(config)
