"""Data that one process of each host tokenises: two processes, on one host and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import write_rows
from support.readers import Case, read_all

from colm_scale.config import DataConfig, ModelConfig
from colm_scale.data.reading import Reading
from colm_scale.modeling.load import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, dict]]:
    rows = [{"prompt": f"{number}?", "completion": f"{number}"} for number in range(30)]
    data = str(write_rows(folder / "data.jsonl", rows))
    bad = str(write_rows(folder / "bad.jsonl", [*rows, {"prompt": "a"}]))
    (folder / "file").touch()
    cases = {
        "one host": Case(data),
        "again": Case(data),
        "a bad row": Case(bad),
        "two hosts": Case(data, ("first", "second")),
        "no cache": Case(data, ("file", "file")),
    }
    return read_all(cases, folder)


READERS = {"one host": [1, 0], "again": [0, 0], "two hosts": [1, 1], "no cache": [1, 0]}
"""How often each rank tokenises."""


@pytest.mark.parametrize("case", READERS)
def test_both_ranks_have_what_one_process_reads(ranks, folder, case):
    tokenizer = load_tokenizer(ModelConfig())
    expected = Reading("train", DataConfig(train=[str(folder / "data.jsonl")]), tokenizer, 64).tokenised()
    for rank in ranks:
        found = rank[case]
        assert found["digest"] == found["own_digest"] == expected.digest
        assert found["rows_digest"] == expected.rows_digest


@pytest.mark.parametrize(("case", "expected"), READERS.items(), ids=READERS)
def test_one_rank_of_each_host_tokenises_and_all_map_the_file(ranks, case, expected):
    assert [rank[case]["tokenised"] for rank in ranks] == expected
    assert all(rank[case]["mapped"] and rank[case]["file"] for rank in ranks)
    files = {rank[case]["file"] for rank in ranks}
    assert len(files) == (2 if case == "two hosts" else 1)


def test_without_a_cache_nothing_is_left(ranks):
    assert not Path(ranks[0]["no cache"]["file"]).parent.exists()


def test_a_bad_row_ends_both_ranks_with_one_message(ranks):
    first, second = (rank["a bad row"]["error"] for rank in ranks)
    assert first.startswith("UserError: ")
    assert "bad.jsonl line 31 has the columns 'prompt'" in first
    assert second == "PeerFailed: rank 0 failed"
