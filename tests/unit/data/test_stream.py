from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colm_scale.config import DataConfig, ModelConfig
from colm_scale.data import stream
from colm_scale.data.examples import Examples, tokenise, tokenise_block
from colm_scale.data.readers import Row, each_row, read_rows
from colm_scale.data.stream import BlockStream, Position, RowDigest, survey
from colm_scale.errors import TrainingError, UserError
from colm_scale.modeling.load import load_tokenizer
from colm_scale.randomness import generator

SEED = 3
LONGEST = 16
"""Tokens. Of `RECORDS`, every seventh is longer."""
RECORDS = [
    {
        "source": "sums" if number % 3 else "songs",
        "prompt": f"{number} + 1?",
        "completion": "la " * 30 if number % 7 == 6 else f"{number + 1}",
    }
    for number in range(32)
]
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
PAIR = {"prompt": "a", "completion": "b"}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelConfig())


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def files(in_tmp) -> list[str]:
    """`RECORDS`, and 5 more rows of a file that names no source: 37 rows, of which 4 are too long."""
    write("a.jsonl", RECORDS)
    write("more.jsonl", [{"prompt": f"{number}?", "completion": "!"} for number in range(5)])
    return ["a.jsonl", "more.jsonl"]


def write(path: str, records: list[dict]) -> None:
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def block_stream(specs: list[str], tokenizer, shuffle_rows: int, **options) -> BlockStream:
    config = DataConfig(shuffle_rows=shuffle_rows, **options)
    return BlockStream(specs, config, survey(specs, config), tokenizer, LONGEST, SEED)


def by_id(examples: Examples) -> dict[int, tuple]:
    """What belongs to each example."""
    parts = (examples.example(index) for index in range(len(examples)))
    return {
        number: (examples.source_names[source], tokens.tolist(), labelled.tolist())
        for number, source, (tokens, labelled) in zip(examples.ids.tolist(), examples.sources.tolist(), parts)
    }


def ids(source: BlockStream, *counts: int) -> list[list[int]]:
    return [source.draw(count).ids.tolist() for count in counts]


def error_of(specs: list[str], read=survey) -> str:
    with pytest.raises(UserError) as caught:
        read(specs, DataConfig())
    return str(caught.value)


# Rows


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\r\n\r\n \t\n{"prompt": "c", "completion": "d"}',
        '{"prompt": "a\u2028b\x85", "completion": "c"}\n\n'.encode(),
        b'{"prompt": "a\\r", "completion": "b"}\r\n\n\n{"prompt": "", "completion": "d", "source": null}\n\n',
    ],
)
def test_streamed_rows_are_the_rows_that_are_read(in_tmp, content):
    Path("a.jsonl").write_bytes(content)
    write("b.jsonl", RECORDS[:2])
    specs = ["a.jsonl", "b.jsonl", "a.jsonl"]
    assert list(each_row(specs, DataConfig(), streaming=True)) == read_rows(specs, DataConfig())
    digest, rows = RowDigest(DataConfig()), read_rows(specs, DataConfig())
    assert list(digest.over(rows)) == rows
    assert survey(specs, DataConfig()).digest == digest.hexadecimal()


def test_a_row_is_read_when_it_is_asked_for(in_tmp):
    Path("a.jsonl").write_text(json.dumps(PAIR) + "\nno JSON\n")
    rows = each_row(["a.jsonl"], DataConfig(), streaming=True)
    assert next(rows).completion == "b"
    with pytest.raises(UserError, match=r"a\.jsonl line 2, column 1: invalid JSON"):
        next(rows)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"prompt": "a", "completion": "b"}\n\n{"prompt": "a",}\n', "bad.jsonl line 3, column"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": \n}\n', "bad.jsonl line 2, column 12: invalid JSON"),
        (b'{"prompt": "a", "completion": "b"}\n"text"\n', 'bad.jsonl line 2 holds "text"'),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "caf\xe9"}\n', "bad.jsonl line 2 is not UTF-8"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xe2\x82', "bad.jsonl line 2 is not UTF-8 (unexpected end"),
        (b'\n\xef\xbb\xbf{"prompt": "a", "completion": "b"}\n', "bad.jsonl line 2, column 1: invalid JSON"),
        (b'{"prompt": "a", "completion": " "}\n', "bad.jsonl line 1: 'completion' is empty"),
        (b'{"source": "s", "prompt": "a", "completion": "b"}\n' + b'{"prompt": "a", "completion": "b"}\n' * 2, "2 of"),
        (b"\n \n", "bad.jsonl has no rows"),
        (b"", "bad.jsonl has no rows"),
    ],
)
def test_the_survey_says_what_is_wrong_as_without_streaming(in_tmp, content, expected):
    write("good.jsonl", RECORDS)
    Path("bad.jsonl").write_bytes(content)
    message = error_of(["good.jsonl", "bad.jsonl"])
    assert expected in message
    assert message == error_of(["good.jsonl", "bad.jsonl"], read_rows)


def test_what_is_missing_is_said_before_anything_is_read(in_tmp):
    Path("bad.jsonl").write_text("no JSON")
    assert error_of(["bad.jsonl", "nowhere.jsonl"]) == "nowhere.jsonl does not exist"


@pytest.mark.parametrize("name", ["a.json", "a.parquet", "a.csv", "a.xlsx"])
def test_other_kinds_of_files_are_refused(in_tmp, name):
    Path(name).write_text("whatever")
    assert f"{name} cannot be streamed, only .jsonl files and hub data sets can" in error_of([name])


# The survey


def test_the_survey_counts_rows_and_sources(files):
    found = survey(files, DataConfig())
    assert found.source_names == ("more", "songs", "sums")
    assert found.sizes.tolist() == [5, 11, 21]
    assert found.protected_sizes.tolist() == [0, 0, 0]
    assert found.rows == 37
    assert found.first_chat == ""


def test_the_survey_finds_the_first_chat(in_tmp):
    write("a.jsonl", [PAIR, CHAT, CHAT])
    assert survey(["a.jsonl"], DataConfig()).first_chat == "a.jsonl line 2"


def test_the_digest_is_of_the_rows_and_not_of_where_they_lie(files):
    whole = survey(files, DataConfig()).digest
    Path("elsewhere").mkdir()
    for name in files:
        Path("elsewhere", name).write_text("\n" + Path(name).read_text())
    assert survey([f"elsewhere/{name}" for name in files], DataConfig()).digest == whole
    assert survey(files[::-1], DataConfig()).digest != whole


@pytest.mark.parametrize(
    "other",
    [
        [{**RECORDS[0], "source": "x"}, *RECORDS[1:]],
        [{**RECORDS[0], "prompt": "x"}, *RECORDS[1:]],
        [{**RECORDS[0], "completion": "x"}, *RECORDS[1:]],
        [{"source": "songs", **CHAT}, *RECORDS[1:]],
        [{**RECORDS[0], "protected": True}, *RECORDS[1:]],
        RECORDS[:-1],
        [RECORDS[1], RECORDS[0], *RECORDS[2:]],
    ],
)
def test_every_part_of_a_row_changes_the_digest(in_tmp, other):
    write("a.jsonl", RECORDS)
    write("b.jsonl", other)
    assert survey(["a.jsonl"], DataConfig()).digest != survey(["b.jsonl"], DataConfig()).digest


def test_the_chat_template_changes_the_digest(files):
    digests = []
    for text in ("one", "two"):
        Path("template").write_text(text)
        digests.append(survey(files, DataConfig(chat_template="template")).digest)
    assert len({*digests, survey(files, DataConfig()).digest}) == 3


# Examples


@pytest.mark.parametrize("overlong", ["drop", "cut"])
@pytest.mark.parametrize("shuffle_rows", [1, 5, 37, 100])
def test_an_epoch_holds_what_is_there_without_streaming(files, tokenizer, shuffle_rows, overlong):
    config = DataConfig(overlong=overlong)
    expected = tokenise(read_rows(files, config), tokenizer, config, LONGEST)
    streamed = block_stream(files, tokenizer, shuffle_rows, overlong=overlong)
    first, second = (streamed.draw(len(expected)) for _ in range(2))
    assert len(expected) == (33 if overlong == "drop" else 37)
    assert by_id(first) == by_id(second) == by_id(expected)
    assert first.source_names == expected.source_names
    assert (first.ids.tolist() == second.ids.tolist()) == (shuffle_rows == 1)
    # Both epochs were read, and each row is counted once.
    assert (streamed.dropped, streamed.cut) == (expected.dropped, expected.cut)


def brute_force(usable: list[list[int]], epochs: int) -> list[int]:
    """All epochs' ids in a row, from the usable ids of each block."""
    return [
        block[index]
        for epoch in range(epochs)
        for number, block in enumerate(usable)
        for index in torch.randperm(len(block), generator=generator(SEED, "shuffle", epoch, number)).tolist()
    ]


@pytest.mark.parametrize("shuffle_rows", [1, 8, 37, 50])
@pytest.mark.parametrize("count", [1, 7, 33])
def test_steps_cut_an_endless_stream_of_shuffled_blocks(files, tokenizer, shuffle_rows, count):
    usable = [
        [number for number in range(start, min(start + shuffle_rows, 37)) if number % 7 != 6 or number >= len(RECORDS)]
        for start in range(0, 37, shuffle_rows)
    ]
    expected = brute_force(usable, epochs=3)
    steps = 99 // count
    drawn = ids(block_stream(files, tokenizer, shuffle_rows), *[count] * steps)
    assert drawn == [expected[step * count : (step + 1) * count] for step in range(steps)]


def test_global_generators_are_left_alone(files, tokenizer):
    before = torch.get_rng_state()
    block_stream(files, tokenizer, 8).draw(33)
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture(scope="module")
def lasting(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("lasting")
    write(str(folder / "a.jsonl"), RECORDS)
    return [str(folder / "a.jsonl")]


@settings(deadline=None, max_examples=40)  # a case reads the file three times
@given(shuffle_rows=st.integers(1, 40), before=st.integers(0, 70), count=st.integers(1, 28))
def test_a_stream_goes_on_from_any_position(lasting, tokenizer, shuffle_rows, before, count):
    unbroken = block_stream(lasting, tokenizer, shuffle_rows)
    if before:
        ids(unbroken, *[1] * before)
    position = unbroken.position
    resumed = block_stream(lasting, tokenizer, shuffle_rows)
    resumed.seek(position)
    for _ in range(4):
        assert resumed.position == unbroken.position
        expected, drawn = unbroken.draw(count), resumed.draw(count)
        assert drawn.ids.tolist() == expected.ids.tolist()
        assert by_id(drawn) == by_id(expected)


def test_blocks_before_a_position_are_not_tokenised(files, tokenizer, monkeypatch):
    streamed, seen = block_stream(files, tokenizer, 8), []

    def remember(rows: list[Row], *rest) -> Examples:
        seen.append([row.id for row in rows])
        return tokenise_block(rows, *rest)

    wait([streamed._ahead])
    monkeypatch.setattr(stream, "tokenise_block", remember)
    streamed.seek(Position(epoch=2, block=3, offset=1))
    wait([streamed._ahead])
    assert seen == [list(range(24, 32)), list(range(32, 37))]  # and the one after it, ahead


def test_what_goes_wrong_ahead_is_raised_when_its_turn_comes(files, tokenizer, monkeypatch):
    streamed = block_stream(files, tokenizer, 8)
    wait([streamed._ahead])

    def fail(*_):
        raise UserError("this row cannot be written")

    monkeypatch.setattr(stream, "tokenise_block", fail)
    held, ahead = len(streamed._block), len(streamed._ahead.result())
    assert held
    assert ahead
    for _ in range(held + ahead):
        streamed.draw(1)
    with pytest.raises(UserError, match="this row cannot be written"):
        streamed.draw(1)


# Memory


class Counted(Row):
    """A row that can be counted while it is alive."""

    __slots__ = ("__weakref__",)


@pytest.fixture
def alive(monkeypatch) -> list[int]:
    """How many rows were alive whenever another one had been read."""
    rows, counts = weakref.WeakValueDictionary(), []

    def counted(specs, config, streaming) -> Iterator[Row]:
        for row in each_row(specs, config, streaming=streaming):
            row = Counted(row.id, row.source, row.messages, row.prompt, row.completion, row.where)
            rows[id(row)] = row
            counts.append(len(rows))
            yield row
            del row

    monkeypatch.setattr(stream, "each_row", counted)
    return counts


def test_the_survey_holds_no_rows(files, alive):
    survey(files, DataConfig())
    assert len(alive) == 37
    assert max(alive) == 2  # one is let go when the next is there


@pytest.mark.parametrize("shuffle_rows", [1, 8])
def test_no_more_than_a_block_of_rows_is_ever_held(files, tokenizer, alive, shuffle_rows):
    streamed = block_stream(files, tokenizer, shuffle_rows)
    for _ in range(20):
        streamed.draw(5)
        assert len(streamed._block) <= shuffle_rows
    streamed.seek(Position(epoch=1, block=4))
    assert len(alive) > 37 * 4
    assert max(alive) == shuffle_rows + 1  # the one read last tells that a block is full


# What changes meanwhile


def until_it_fails(streamed: BlockStream) -> tuple[list[int], str]:
    """The ids that come before the data is found to have changed, and what is said of it."""
    drawn = []
    try:
        while True:
            drawn += streamed.draw(1).ids.tolist()
    except TrainingError as error:
        return drawn, str(error)


def test_unchanged_data_passes_every_epoch(files, tokenizer):
    assert len(ids(block_stream(files, tokenizer, 8), *[33] * 4)) == 4


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda records: records[:-1], "it had 32 rows and now has 31"),
        (lambda records: [*records, records[0]], "a.jsonl line 33 is new"),
        (lambda records: [*records[:-1], {**records[-1], "prompt": "x"}], "as many rows as before, but not the same"),
        (lambda records: [*records[:-1], {**records[-1], "source": "x"}], "a.jsonl line 32 is new"),
        (lambda records: [*records[:-1], {"prompt": "a"}], "a.jsonl line 32 has the columns 'prompt'"),
    ],
)
@pytest.mark.parametrize("shuffle_rows", [5, 8])
def test_changed_data_ends_the_run_before_the_last_block_of_an_epoch(files, tokenizer, change, expected, shuffle_rows):
    streamed = block_stream(["a.jsonl"], tokenizer, shuffle_rows)
    write("b.jsonl", change(RECORDS))
    Path("b.jsonl").replace("a.jsonl")  # the old file stays open where it is read
    streamed.seek(Position())
    drawn, message = until_it_fails(streamed)
    assert f"has changed since the run first read it to stream it: {expected}" in message
    last = 31 // shuffle_rows * shuffle_rows
    assert sorted(drawn) == [number for number in range(last) if number % 7 != 6]


def test_a_file_that_is_gone_ends_the_run(files, tokenizer):
    streamed = block_stream(["a.jsonl"], tokenizer, 40)
    Path("a.jsonl").unlink()
    drawn, message = until_it_fails(streamed)
    assert len(drawn) == 28
    assert "a.jsonl does not exist" in message


# What cannot be used


def test_an_epoch_with_fewer_examples_than_asked_for_is_refused(files, tokenizer):
    assert len(block_stream(files, tokenizer, 8).draw(33)) == 33
    with pytest.raises(UserError, match=r"is 34, but there are only 33 .*\(4 were dropped\): use at most 33"):
        block_stream(files, tokenizer, 8).draw(34)


def test_an_epoch_without_usable_examples_is_refused(in_tmp, tokenizer):
    write("a.jsonl", [{"prompt": "", "completion": "la " * 30}] * 5)
    with pytest.raises(UserError, match=r"none of the 5 examples can be used: .* is 16 tokens \(--data.max_length"):
        block_stream(["a.jsonl"], tokenizer, 2).draw(1)


def test_blocks_without_usable_examples_are_passed_over(in_tmp, tokenizer):
    write("a.jsonl", [{"prompt": "", "completion": "la " * 30 if number % 8 < 6 else "!"} for number in range(16)])
    streamed = block_stream(["a.jsonl"], tokenizer, 2)
    assert [sorted(drawn) for drawn in ids(streamed, 4, 4)] == [[6, 7, 14, 15]] * 2
    assert streamed.dropped == {"a": 12}


def test_a_missing_chat_template_is_found_before_the_first_chat_is_read(in_tmp, tokenizer):
    write("a.jsonl", [PAIR] * 5 + [CHAT])
    without = copy.deepcopy(tokenizer)
    without.chat_template = None
    with pytest.raises(UserError, match=r"a\.jsonl line 6 is a chat, but the model's tokenizer has no chat template"):
        block_stream(["a.jsonl"], without, 2)
    assert len(block_stream(["a.jsonl"], tokenizer, 2).draw(6)) == 6


# The hub


@pytest.fixture
def hub(in_tmp, monkeypatch):
    """A hub of one data set, which is a folder here; what was loaded from it."""
    Path("set").mkdir()
    write("set/train.jsonl", RECORDS)
    write("set/test.jsonl", RECORDS[:3])
    load, loaded = datasets.load_dataset, []
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", in_tmp / "cache")

    def load_dataset(name: str, **options):
        if name != "org/set":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        loaded.append(load("set", **options, cache_dir=str(in_tmp / "cache")))
        return loaded[-1]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return loaded


def test_hub_data_sets_are_streamed(hub, tokenizer):
    specs, config = ["org/set", "org/set:test"], DataConfig()
    assert list(each_row(specs, config, streaming=True)) == read_rows(specs, config)
    assert [isinstance(rows, datasets.IterableDataset) for rows in hub] == [True, True, False, False]
    expected = tokenise(read_rows(specs, config), tokenizer, config, LONGEST)
    streamed = block_stream(specs, tokenizer, 8)
    assert by_id(streamed.draw(len(expected))) == by_id(streamed.draw(len(expected))) == by_id(expected)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("org/other", "Dataset 'org/other' doesn't exist"), ("org/set:dev", "with a split 'dev'")],
)
def test_what_a_streamed_hub_says_is_passed_on(hub, spec, expected):
    message = error_of([spec])
    assert f"{spec.partition(':')[0]} is not a file" in message
    assert expected in message


def test_a_hub_that_breaks_off_ends_the_run_with_what_it_says(monkeypatch, tokenizer):
    def rows() -> Iterator[dict]:
        yield PAIR
        raise ConnectionError("the line is dead")

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *_, **__: [PAIR] * 4)
        streamed = block_stream(["org/set"], tokenizer, 2)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    assert "the line is dead" in error_of(["org/set"])
    with pytest.raises(TrainingError, match="the line is dead"):
        streamed.seek(Position())
