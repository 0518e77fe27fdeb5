"""Data out of the cache, and when it must not come from there."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from colm_scale.config import DataConfig, ModelConfig
from colm_scale.data import reading
from colm_scale.data.examples import tokenise
from colm_scale.data.readers import read_rows
from colm_scale.data.reading import Reading, find_or_read
from colm_scale.data.tokenised import Tokenised
from colm_scale.errors import UserError
from colm_scale.modeling.load import load_tokenizer

LONGEST = 24
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def base():
    return load_tokenizer(ModelConfig())


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    """Files to read, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLM_SCALE_CACHE", str(tmp_path / "cache"))
    write("a.jsonl", "one")
    write("b.jsonl", "two")
    write("held.jsonl", "six")
    Path("labels.jsonl").write_text('{"source": "x"}\n{"source": "y"}\n{"source": "z"}\n')
    Path("template.jinja").write_text(TEMPLATE)


def write(path: str, word: str) -> None:
    """Three rows, of which the second is too long."""
    rows = [{"prompt": f"{number} {word} ", "completion": "la " * (60 if number == 1 else 3)} for number in range(3)]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def entries() -> list[Path]:
    return sorted(Path("cache").rglob("*.safetensors"))


def a_reading(tokenizer, split="train", max_length=LONGEST, source_names=(), **options) -> Reading:
    return Reading(split, DataConfig(**{"train": ["a.jsonl"], **options}), tokenizer, max_length, source_names)


def never(line: str) -> None:
    raise AssertionError(line)


def got(one: Reading, *spare: Path, warn: Callable[[str], None] = never) -> Tokenised:
    return find_or_read(one, spare, warn)


@pytest.fixture
def count(monkeypatch) -> list[int]:
    """Appended to whenever rows are tokenised."""
    calls = []

    def counting(*arguments):
        calls.append(1)
        return tokenise(*arguments)

    monkeypatch.setattr(reading, "tokenise", counting)
    return calls


# What is found


@pytest.mark.parametrize("overlong", ["drop", "cut"])
def test_a_second_run_finds_the_same_without_tokenising(base, count, overlong):
    one = a_reading(base, train=["a.jsonl", "b.jsonl"], overlong=overlong)
    expected = tokenise(read_rows(one.config.train, one.config), base, one.config, LONGEST)
    first, second = got(one), got(one)
    assert len(count) == 1
    assert len(entries()) == 1
    for found in (first, second):
        assert found.digest == found.examples.digest() == expected.digest()
        assert (found.examples.dropped, found.examples.cut) == (expected.dropped, expected.cut)
        assert found.examples.dropped or found.examples.cut
        assert found.rows_digest == first.rows_digest == one.tokenised().rows_digest


def test_held_out_data_and_the_built_in_mixture_are_cached_too(base, count):
    held = a_reading(base, "eval", source_names=("a", "b"), eval=["held.jsonl"])
    mixture = Reading("eval", DataConfig(), base, 200)
    for one in (held, mixture, held, mixture):
        got(one)
    assert len(count) == 2
    assert got(held).examples.source_names == ("a", "b", "held")


def test_an_error_is_that_of_the_rows_and_nothing_is_stored(base):
    with Path("a.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(UserError, match=r"a\.jsonl line 4"):
        got(a_reading(base))
    with pytest.raises(UserError, match=r"nowhere\.jsonl does not exist"):
        got(a_reading(base, train=["nowhere.jsonl"]))
    assert not entries()


# The key

CHANGED = {
    "columns": {"prompt": "completion"},
    "protected_sources": ["a"],
    "chat_template": "template.jinja",
    "template": "{instruction} ",
    "train": ["b.jsonl"],
    "sources": "labels.jsonl",
    "overlong": "cut",
}
ELSEWHERE = {
    "max_length": "Reading.max_length, with the model's context as its default",
    "eval": "test_the_other_split_does_not_matter",
    "streaming": "streamed data is not held",
    "shuffle_rows": "likewise",
}


def test_every_option_of_the_data_is_considered():
    assert {field.name for field in dataclasses.fields(DataConfig)} == CHANGED.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("option", CHANGED)
def test_another_value_of_an_option_is_another_key(base, option):
    plain, other = a_reading(base), a_reading(base, **{option: CHANGED[option]})
    assert len({plain.key(), other.key(), ""}) == 3
    assert plain.key() == a_reading(base).key()


def test_the_other_split_does_not_matter(base):
    held = a_reading(base, eval=["held.jsonl"])
    assert a_reading(base).key() == held.key()
    assert dataclasses.replace(held, split="eval").key() not in (held.key(), "")


def test_longest_length_and_names_are_part_of_the_key(base):
    keys = {a_reading(base).key(), a_reading(base, max_length=23).key(), a_reading(base, source_names=("a",)).key()}
    assert len(keys - {""}) == 3


def test_a_file_of_the_same_size_and_time_is_another(base):
    before, facts = a_reading(base).key(), Path("a.jsonl").stat()
    write("a.jsonl", "two")
    os.utime("a.jsonl", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    after = Path("a.jsonl").stat()
    assert (after.st_size, after.st_mtime_ns) == (facts.st_size, facts.st_mtime_ns)
    assert a_reading(base).key() not in (before, "")


@pytest.mark.parametrize(("option", "file"), [("sources", "labels.jsonl"), ("chat_template", "template.jinja")])
def test_the_content_of_a_file_of_an_option_is_part_of_the_key(base, option, file):
    before = a_reading(base, **{option: file}).key()
    Path(file).write_text(Path(file).read_text().replace("x", "w").replace("role", "content"))
    assert a_reading(base, **{option: file}).key() not in (before, "")


def test_a_name_gives_its_source(base):
    """Two names of one file."""
    Path("link.jsonl").symlink_to("a.jsonl")
    assert a_reading(base, train=["link.jsonl"]).key() != a_reading(base).key()
    assert a_reading(base, train=[str(Path("a.jsonl").absolute())]).key() == a_reading(base).key()


def with_one_more_token(tokenizer) -> None:
    tokenizer.add_tokens(["la la"])


def with_another_end(tokenizer) -> None:
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)


def with_a_template(tokenizer) -> None:
    tokenizer.chat_template = TEMPLATE


def with_special_tokens_as_text(tokenizer) -> None:
    tokenizer.split_special_tokens = True


def with_another_start(tokenizer) -> None:
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(7)


CHANGES = [with_one_more_token, with_another_end, with_a_template, with_special_tokens_as_text, with_another_start]


@pytest.mark.parametrize("change", CHANGES)
def test_another_tokenizer_is_another_key(base, change):
    other = copy.deepcopy(base)
    assert a_reading(other).key() == a_reading(base).key()
    change(other)
    assert a_reading(other).key() not in (a_reading(base).key(), "")


def test_using_a_tokenizer_does_not_change_the_key(base, count):
    """The file of a tokenizer may ask for truncation, which the first use switches off."""
    other = copy.deepcopy(base)
    other.backend_tokenizer.enable_truncation(4)
    got(a_reading(other))
    got(a_reading(copy.deepcopy(other)))
    assert len(count) == 1


@pytest.mark.parametrize("library", reading._LIBRARIES)
def test_another_version_is_another_key(base, library, monkeypatch):
    before, found = a_reading(base).key(), reading.metadata.version
    monkeypatch.setattr(reading.metadata, "version", lambda name: "0.1" if name == library else found(name))
    assert a_reading(base).key() != before


def test_other_code_is_another_key(base, monkeypatch, tmp_path):
    before = a_reading(base).key()
    (tmp_path / "examples.py").write_text("")
    monkeypatch.setattr(reading, "__file__", str(tmp_path / "reading.py"))
    assert a_reading(base).key() != before


# What has no key


class OwnTokenizer(PreTrainedTokenizerFast):
    """As the code of a model's repository may define it."""


def own(base) -> PreTrainedTokenizerFast:
    special = {"eos_token": base.eos_token, "pad_token": base.pad_token}
    return OwnTokenizer(tokenizer_object=copy.deepcopy(base.backend_tokenizer), **special)


def test_a_tokenizer_with_code_of_its_own_is_not_cached(base, count):
    for _ in range(2):
        assert not got(a_reading(own(base))).file
    assert len(count) == 2
    assert not entries()


@pytest.mark.parametrize("changing", ["{{ strftime_now('%d') }}", "{# random #}", "{# lipsum #}"])
def test_a_template_that_renders_differently_tomorrow_is_not_cached(base, changing):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    Path("chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    Path("template.jinja").write_text(changing + TEMPLATE)
    other = copy.deepcopy(base)
    other.chat_template = changing + TEMPLATE
    for one in (a_reading(base, chat_template="template.jinja"), a_reading(other)):
        chats = dataclasses.replace(one, config=dataclasses.replace(one.config, train=["a.jsonl", "chats.jsonl"]))
        assert not got(chats).file
        assert got(one).file, "no row is rendered"
    assert len(entries()) == 2


def test_a_pipe_is_not_cached(base):
    os.mkfifo("pipe.jsonl")
    assert not a_reading(base, train=["pipe.jsonl"]).key()


def test_hub_data_sets_are_known_by_their_fingerprint(base, monkeypatch):
    rows = [{"prompt": "a", "completion": "b"}]

    def load_dataset(name: str, split: str, streaming: bool):
        if name == "org/none":
            raise FileNotFoundError(name)
        return datasets.Dataset.from_list([*rows])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    before = a_reading(base, train=["org/set"]).key()
    assert a_reading(base, train=["org/set"]).key() == before != ""
    rows.append(rows[0])
    assert a_reading(base, train=["org/set"]).key() not in (before, "")
    assert not a_reading(base, train=["org/none"]).key()
    with pytest.raises(UserError, match="org/none is not a file"):
        got(a_reading(base, train=["org/none"]))


def test_a_file_that_changes_while_it_is_read_is_not_cached(base, monkeypatch):
    def changing(*arguments):
        found = tokenise(*arguments)
        write("a.jsonl", "new")
        return found

    monkeypatch.setattr(reading, "tokenise", changing)
    assert not got(a_reading(base)).file
    assert not entries()


# A cache that is damaged, or cannot be written


def test_a_damaged_file_is_said_and_written_again(base, count):
    lines: list[str] = []
    one = a_reading(base)
    path = Path(got(one).file)
    path.write_bytes(path.read_bytes()[:-1])
    found = got(one, warn=lines.append)
    assert found.examples.digest() == got(one).digest
    assert len(count) == 2
    (line,) = lines
    assert line.startswith(f"warning: {path} is damaged (")
    assert line.endswith("): the data is tokenised again")


def test_without_a_cache_the_data_is_in_the_next_folder(base, monkeypatch, tmp_path):
    lines: list[str] = []
    monkeypatch.setenv("COLM_SCALE_CACHE", str(tmp_path / "a.jsonl"))
    found = got(a_reading(base), tmp_path / "spare", warn=lines.append)
    assert Path(found.file).parent == tmp_path / "spare"
    (line,) = lines
    assert line.startswith(f"warning: {tmp_path}/a.jsonl/tokens cannot hold the tokenised data (")
    assert "COLM_SCALE_CACHE" in line


def test_without_any_folder_the_data_is_in_memory(base, monkeypatch, tmp_path):
    lines: list[str] = []
    monkeypatch.setenv("COLM_SCALE_CACHE", str(tmp_path / "a.jsonl"))
    found = got(a_reading(base), tmp_path / "b.jsonl/spare", warn=lines.append)
    assert found.file == ""
    assert found.examples.digest() == found.digest
    assert len(lines) == 2
