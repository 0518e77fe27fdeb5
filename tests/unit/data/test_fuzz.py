"""Malformed files; benchmarks/fuzz_readers.py reads many more of them."""

from __future__ import annotations

import io
import re
import zipfile
from random import Random

import pytest
from support import fuzz
from support.malformed import SUFFIXES, _valid, malformed

from colm_scale.data.messages import Message
from colm_scale.data.readers import Row

FILES = 600


@pytest.mark.filterwarnings("ignore::UserWarning")  # what openpyxl leaves out of a damaged book
def test_every_file_is_read_or_refused_in_one_clear_line():
    verdicts = list(fuzz.fuzz(0, range(FILES)))
    assert [verdict.number for verdict in verdicts] == list(range(FILES))
    assert not [verdict for verdict in verdicts if verdict.outcome == "failure"]
    counts = fuzz.tally(verdicts)
    assert sum(sum(outcomes.values()) for outcomes in counts.values()) == FILES
    # The files are of all kinds: broken ones, and ones that a mutation has left valid.
    assert all(counts[suffix]["error"] > 50 for suffix in SUFFIXES)
    assert sum(outcomes["read"] for outcomes in counts.values()) > 30


def test_a_file_is_a_function_of_seed_and_number():
    assert [malformed(3, number) for number in range(60)] == [malformed(3, number) for number in range(60)]
    assert len({malformed(seed, 5).content for seed in range(20)}) > 15


def test_a_book_does_not_hold_the_time_at_which_it_was_written():
    book = zipfile.ZipFile(io.BytesIO(_valid(Random(0), ".xlsx")))
    assert {part.date_time for part in book.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert set(re.findall(rb">(\d{4}-.*?)<", book.read("docProps/core.xml"))) == {b"2000-01-01T00:00:00Z"}


# What counts as a failure


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "a.jsonl"


def judged(path, monkeypatch, error: Exception):
    def fail(*_):
        raise error

    monkeypatch.setattr(fuzz, "read_rows", fail)
    return fuzz.judged(path, tokenizer=None)


@pytest.mark.parametrize(
    "message", ["{}: two\nlines", "no name", "{}: \x1b[31m", "{}: MemoryError", "{} " + "x" * 2000]
)
def test_an_unclear_message_is_a_failure(path, monkeypatch, message):
    assert judged(path, monkeypatch, fuzz.UserError(f"{path} line 1 is wrong"))[0] == "error"
    assert judged(path, monkeypatch, fuzz.UserError(message.replace("{}", str(path))))[0] == "failure"


def test_another_exception_is_a_failure(path, monkeypatch):
    assert judged(path, monkeypatch, KeyError("x")) == ("failure", "KeyError: 'x'")


def test_a_row_that_is_not_what_it_should_be_is_a_failure(path):
    chat = (Message("user", "a"), Message("assistant", "b"))
    good = [Row(0, "s", (), "", "b", f"{path} line 1"), Row(0, "s", chat, "", "", f"{path} line 1")]
    bad = [
        Row(1, "s", (), "", "b", f"{path} line 1"),
        Row(0, "", (), "", "b", f"{path} line 1"),
        Row(0, 5, (), "", "b", f"{path} line 1"),
        Row(0, "s", (), "", " ", f"{path} line 1"),
        Row(0, "s", (), "", "b", "line 1"),
        Row(0, "s", chat[:1], "", "", f"{path} line 1"),
        Row(0, "s", (*chat, Message("bot", "c")), "", "", f"{path} line 1"),
    ]
    assert [fuzz.is_well_formed(row, 0, path) for row in good + bad] == [True] * len(good) + [False] * len(bad)


def test_a_file_that_hangs_or_ends_the_process_is_a_failure_and_the_next_ones_are_read(monkeypatch):
    told = [_Pipe(["ready", _verdict(0), TimeoutError]), _Pipe(["ready", EOFError]), _Pipe(["ready", _verdict(3)])]
    waiting = list(range(4))
    verdicts = [verdict for pipe in told for verdict in fuzz._received(pipe, 0, waiting)]
    assert [(verdict.number, verdict.outcome) for verdict in verdicts] == [
        *((0, "read"), (1, "failure"), (2, "failure"), (3, "read")),
    ]
    assert "not done within" in verdicts[1].said
    assert "gone" in verdicts[2].said
    assert waiting == []


def _verdict(number: int) -> fuzz.Verdict:
    return fuzz.Verdict(number, ".csv", "bits flipped", "read")


class _Pipe:
    """The parent's end of a pipe: what it is told, that nothing comes, or that nobody is there."""

    def __init__(self, told: list):
        self.told = told

    def poll(self, _seconds: float) -> bool:
        return self.told[0] is not TimeoutError

    def recv(self):
        said = self.told.pop(0)
        if said is EOFError:
            raise EOFError
        return said
