"""What ``colm-scale preview`` shows."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from colm_scale.cli.main import main
from colm_scale.config import DataConfig, ModelConfig
from colm_scale.data.examples import tokenise
from colm_scale.data.readers import read_rows
from colm_scale.modeling.load import load_tokenizer

CHAT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "5", "weight": 0},
    {"role": "user", "content": "no"},
    {"role": "assistant", "content": "4"},
]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def shown(capsys, *arguments: str, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["preview", *arguments])
    assert ended.value.code == code
    return capsys.readouterr()


def written(*records: dict[str, object]) -> str:
    Path("a.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return "a.jsonl"


def test_an_object_for_each_row(capsys):
    name = written({"messages": CHAT, "source": "s"}, {"instruction": "a", "output": "b", "source": "t"})
    out, _ = shown(capsys, "--json", "--data.train", name)
    chat, pair = map(json.loads, out.splitlines())
    assert chat == {
        "row": "a.jsonl line 1",
        "source": "s",
        "text": "user: 2+2?\nassistant: 5<eos>\nuser: no\nassistant: 4<eos>",
        "learned": ["4<eos>"],
        "tokens": 32,
        "label_tokens": 2,
    }
    assert (pair["text"], pair["learned"], pair["label_tokens"]) == ("a\nb<eos>", ["b<eos>"], 2)
    assert len(shown(capsys, "--json", "--rows", "1", "--data.train", name)[0].splitlines()) == 1


def test_rows_of_each_source_and_the_counts_of_all(capsys):
    short = [{"instruction": "a", "output": "b", "source": source, "note": "n"} for source in "sst"]
    name = written(*short, {"instruction": "a" * 50, "output": "b", "source": "t"})
    out, _ = shown(capsys, "--rows", "1", "--data.train", name, "--data.max_length", "20")
    assert out.count("[[b<eos>]]") == 2
    table = [line.replace("│", " ").split() for line in out.splitlines() if line.startswith("│")]
    assert table == [["s", "2", "8", "4", "0", "0", "0", "0"], ["t", "2", "4", "2", "1", "0", "0", "0"]]
    assert "a.jsonl: columns not read: 'note' (3 rows)" in out
    _, error = shown(capsys, "--json", "--data.train", name, "--data.max_length", "20")
    assert error.splitlines() == [
        "a.jsonl: columns not read: 'note' (3 rows)",
        "training examples too long or without anything to learn, dropped: 1 (t 1)",
    ]


@pytest.mark.parametrize("overlong", ["drop", "cut"])
def test_the_counts_are_those_of_a_run(capsys, overlong):
    off = [{**turn, "weight": 0} for turn in CHAT]
    chats = [{"messages": chat, "source": "s"} for chat in (CHAT, off, CHAT * 3)]
    name = written(*chats, {"prompt": "<bos>a", "completion": "b<eos>", "source": "t"}, {"text": "c", "source": "t"})
    longest = ["--data.max_length", "40", "--data.overlong", overlong]
    out, _ = shown(capsys, "--data.train", name, *longest)
    table = [line.replace("│", " ").split() for line in out.splitlines() if line.startswith("│")]
    config = DataConfig(train=[name], overlong=overlong)
    examples = tokenise(read_rows([name], config), load_tokenizer(ModelConfig()), config, 40)
    learned = [int(examples.labelled[a:b].sum()) for a, b in pairwise(examples.offsets.tolist())]
    for source, (word, rows, tokens, labels, *remarks) in enumerate(table):
        assert word == examples.source_names[source]
        mine = (examples.sources == source).nonzero().flatten().tolist()
        assert int(rows) == len(mine) + examples.dropped.get(word, 0)
        assert int(tokens) == int(examples.lengths[mine].sum())
        assert int(labels) == sum(learned[at] for at in mine)
        assert [int(count) for count in remarks] == [found.get(word, 0) for found in examples.counts.values()]


def test_what_a_run_refuses_is_refused(capsys):
    name = written({"messages": [CHAT[0], {**CHAT[3], "reasoning_content": "two and two"}]})
    _, error = shown(capsys, "--data.train", name, code=2)
    assert error.startswith("error: a.jsonl line 1: the chat template leaves out messages[1].reasoning_content")
    out, _ = shown(capsys, "--data.train", name, "--data.left_out", "count")
    assert "left out" in out


def test_turns_without_an_end_token_are_counted(capsys):
    Path("t.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if "
                               "add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    name = written({"messages": CHAT})
    _, error = shown(capsys, "--json", "--data.train", name, "--data.chat_template", "t.jinja")
    assert error.startswith("warning: training examples with a learned part that ends in no end token")
